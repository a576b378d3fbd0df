"""MSG: method, body bytes and framing arrive intact; an aborted body never looks complete."""

from __future__ import annotations

import asyncio
import gzip
import json
import random

import pytest

from .kit import (
    CHAT,
    LAST_CHUNK,
    OK,
    BackendConn,
    RawBackend,
    RawClient,
    answer,
    chunk,
    each_request,
    eventually,
    header,
    json_answer,
    proxy,
    request,
    through,
)

paths = pytest.mark.parametrize("path", ["/x", CHAT.path])
both_framings = pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
ALL_BYTES = bytes(range(256)) * 4


def reply(path: str) -> object:
    """A good answer for the path: a held document must be JSON."""
    return json_answer(CHAT.document) if path == CHAT.path else answer(OK)


METHODS = {
    "01": "GET",
    "02": "POST",
    "03": "PUT",
    "04": "PATCH",
    "05": "DELETE",
    "06": "OPTIONS",
}


@pytest.mark.parametrize(
    "method", METHODS.values(), ids=[f"MSG-{n} {method}" for n, method in METHODS.items()]
)
async def test_msg_01_to_06_method_passes(method):
    seen = await through(request(method, "/x"))
    assert (seen.answer.status, seen.answer.body, seen.got.method) == (200, b"ok", method)


async def test_msg_01b_head_passes_and_its_answer_has_no_body():
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nETag: x\r\n\r\n"
    seen = await through(request("HEAD", "/x"), answer(raw), method="HEAD")
    assert (seen.answer.status, seen.got.method) == (200, "HEAD")
    assert seen.answer.header("content-length") == [b"5000"]
    assert seen.answer.header("etag") == [b"x"]


@pytest.mark.parametrize(
    "method", ["PROPFIND", "SEARCH", "REPORT", "M-SEARCH", "FOO", "get", "Post", "X!#$%&'*+.^_`|~9"]
)
async def test_msg_07_unknown_method_passes_as_it_is_or_is_refused(method):
    """RFC 9110 9.1: methods are case-sensitive, `get` is no GET."""
    seen = await through(request(method, "/x"))
    if seen.answer.status == 200:
        assert seen.got.method == method
    else:
        assert seen.answer.status in (400, 405, 501)
        assert (seen.answer.complete, seen.requests) == (True, [])


@pytest.mark.parametrize("method", ["G T", "GE\x01T", "GET\x00", "(GET)", "G@T", ""])
async def test_msg_08_method_that_is_no_token_is_refused(method):
    seen = await through(request(method, "/x"))
    assert seen.answer.status in (0, 400, 405, 501)
    assert seen.requests == []


async def test_msg_09_trace_passes_or_is_refused():
    """A TRACE that is echoed by the proxy itself would show the backend's own key."""
    async with RawBackend(answer(OK)) as backend:
        row = {"url": backend, "api_key": "${KEY}"}
        async with proxy(row, env={"KEY": "secret-1"}) as p, RawClient(p.port) as client:
            got = await client.ask(request("TRACE", "/x"), "TRACE")
        assert got.complete
        assert b"secret-1" not in got.raw
        if got.status == 200:
            assert [r.method for r in backend.requests] == ["TRACE"]
        else:
            assert got.status in (403, 405, 501)


async def test_msg_10_connect_is_no_way_through():
    """An open proxy by accident: CONNECT must reach nobody."""
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        target = f"127.0.0.1:{backend.port}"
        got = await client.ask(request("CONNECT", target, host=target), "CONNECT")
        assert got.status in (0, 400, 403, 405, 501)
        assert backend.requests == []


@paths
@pytest.mark.parametrize("sizes", [[1], [1, 2, 3, 5, 8], [1024], [65536, 1, 65536]])
async def test_msg_11_chunked_body_arrives_byte_for_byte(path, sizes):
    body = random.Random(7).randbytes(sum(sizes))
    parts, at = [], 0
    for size in sizes:
        parts.append(chunk(body[at : at + size]))
        at += size
    head = request("POST", path, [("Transfer-Encoding", "chunked")])
    seen = await through(head + b"".join(parts) + LAST_CHUNK, reply(path))
    assert (seen.answer.status, seen.got.complete, seen.got.body) == (200, True, body)
    assert len(seen.got.header("content-length") + seen.got.header("transfer-encoding")) == 1


@paths
@pytest.mark.parametrize("size", [1, 255, 65536, 1_000_000])
async def test_msg_12_body_with_a_length_keeps_length_and_bytes(path, size):
    body = (ALL_BYTES * (size // len(ALL_BYTES) + 1))[:size]
    seen = await through(request("POST", path, body=body), reply(path))
    assert seen.answer.status == 200
    assert (seen.got.complete, seen.got.body) == (True, body)
    assert seen.got.header("content-length") == [b"%d" % size]
    assert seen.got.header("transfer-encoding") == []


@paths
async def test_msg_13_request_trailers_never_become_headers(path):
    trailers = (
        b"Authorization: Bearer evil\r\nContent-Length: 3\r\nX-Forwarded-For: 6.6.6.6\r\n"
        b"Transfer-Encoding: gzip\r\nHost: evil\r\nX-Sum: 7\r\n"
    )
    head = request("POST", path, [("Transfer-Encoding", "chunked"), ("Trailer", "X-Sum")])
    seen = await through(head + chunk(b"abc") + b"0\r\n" + trailers + b"\r\n", reply(path))
    if seen.answer.status != 200:
        assert (seen.answer.status, [r for r in seen.requests if r.complete]) == (400, [])
        return
    assert (seen.got.complete, seen.got.body) == (True, b"abc")
    assert seen.got.header("authorization") == seen.got.header("x-sum") == []
    assert b"6.6.6.6" not in seen.got.raw_head
    assert len(seen.got.header("host")) == 1
    late = {name.lower() for name, _ in seen.got.trailers}
    assert not late & {b"authorization", b"content-length", b"host", b"transfer-encoding"}


@both_framings
async def test_msg_14_chunk_extensions_are_no_body_and_go_no_further(chunked):
    head = request("POST", "/x", [("Transfer-Encoding", "chunked")])
    ext = b';a=b;c="d e"' if chunked else b" ; x"
    seen = await through(head + b"3" + ext + b"\r\nabc\r\n0;end\r\n\r\n")
    if seen.answer.status == 200:
        assert (seen.got.complete, seen.got.body) == (True, b"abc")
    else:
        assert seen.answer.status == 400


@paths
@both_framings
async def test_msg_15_and_16_empty_post_stays_framed_and_empty(path, chunked):
    seen = await through(request("POST", path, body=b"", chunked=chunked), reply(path))
    assert seen.answer.status == 200
    assert (seen.got.complete, seen.got.body) == (True, b"")
    framing = seen.got.header("content-length") + seen.got.header("transfer-encoding")
    assert framing in ([b"0"], [b"chunked"])


@both_framings
@pytest.mark.parametrize("method", ["DELETE", "GET", "OPTIONS", "PROPFIND"])
async def test_msg_17_body_where_none_is_usual_is_forwarded_or_refused(method, chunked):
    body = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request(method, "/x", body=body, chunked=chunked))
        if got.status == 200:
            (received,) = backend.requests
            assert (received.method, received.complete, received.body) == (method, True, body)
            assert (await client.ask(request("GET", "/next"))).body == b"ok"
            assert [r.target for r in backend.requests] == [b"/x", b"/next"]
        else:
            assert (got.status, backend.requests) == (400, [])


@paths
async def test_msg_18_every_byte_value_passes_in_both_directions(path):
    raw = b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%b" % (len(ALL_BYTES), ALL_BYTES)
    seen = await through(request("POST", path, body=ALL_BYTES), answer(raw))
    assert (seen.answer.status, seen.answer.body, seen.got.body) == (400, ALL_BYTES, ALL_BYTES)


PACKED = gzip.compress(json.dumps(CHAT.ask).encode(), mtime=0)


@paths
@both_framings
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        pytest.param("gzip", PACKED, id="MSG-19 gzip"),
        pytest.param("gzip", b"not gzip at all", id="MSG-20 broken gzip"),
        pytest.param("deflate", b"\x78\x9c\x00", id="MSG-20 broken deflate"),
        pytest.param("br", b"\x0b\x02\x80abc\x03", id="MSG-20 br"),
        pytest.param("zstd", b"\x28\xb5\x2f\xfd", id="MSG-20 zstd"),
        pytest.param("gzip, gzip", gzip.compress(PACKED, mtime=0), id="MSG-20 gzip twice"),
        pytest.param("x-own", b"abc", id="MSG-20 unknown"),
    ],
)
async def test_msg_19_and_20_compressed_request_passes_verbatim(path, chunked, coding, body):
    """aiohttp's server decodes unless told otherwise; a bad stream is the backend's to refuse."""
    data = request("POST", path, [("Content-Encoding", coding)], body, chunked=chunked)
    seen = await through(data, reply(path))
    assert seen.answer.status == 200
    assert (seen.got.complete, seen.got.body) == (True, body)
    assert seen.got.header("content-encoding") == [coding.encode()]


@pytest.mark.parametrize(
    "body",
    [
        b'{ "model" : "m",\n\t"b": 1, "a": 2, "a": 3 }\r\n',
        b'{"model":"m","n":123456789012345678901234567890,"f":1e400,"g":-0.0,"h":1.10}',
        b'{"model":"m","s":"\\u00e9\\/\\ud83d\\ude00","t":"\xc3\xa9/\xf0\x9f\x98\x80"}',
        b'{"model":"m","x_internal":null,"_y":[],"z":{}}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m","deep":' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=["spacing and repeats", "numbers", "escapes", "unknown keys", "BOM", "deep"],
)
async def test_msg_21_json_body_is_not_written_anew(body):
    seen = await through(request("POST", CHAT.path, body=body), json_answer(CHAT.document))
    assert (seen.answer.status, seen.got.body) == (200, body)


async def reads_then_answers(conn: BackendConn) -> None:
    async for _ in each_request(conn):
        await conn.send(json_200)


json_200 = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"choices":[]}'


@paths
@both_framings
async def test_msg_22_expect_100_continue_is_answered_and_the_body_arrives(path, chunked):
    whole = request("POST", path, [("Expect", "100-continue")], b"abc", chunked=chunked)
    head, _, body = whole.partition(b"\r\n\r\n")
    async with (
        RawBackend(reads_then_answers) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(head + b"\r\n\r\n")
        interim = await client.head(timeout=2)
        assert interim.status == 100
        await client.send(body)
        got = await client.response()
        assert (got.status, got.complete) == (200, True)
        (received,) = backend.requests
        assert (received.complete, received.body) == (True, b"abc")


@paths
async def test_msg_23_expect_with_an_early_refusal_reaches_the_client_unharmed(path):
    """The client has sent nothing of its body yet and must learn that it need not."""

    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        fields = [("Expect", "100-continue"), ("Content-Length", "20000000")]
        await client.send(request("POST", path, fields))
        got = await client.head(timeout=2)
        if got.status == 100:
            # Past the replay cap the proxy has to begin its request to hear the refusal.
            await client.send(b"x" * 8_000_000)
            got = await client.head(timeout=2)
        got = await client.body(got)
        assert (got.status, got.complete, got.body) == (413, True, b"no")


@paths
@both_framings
async def test_msg_24_early_answer_during_an_upload_reaches_the_client(path, chunked):
    async def script(conn: BackendConn) -> None:
        received = await conn.head_only()
        assert received is not None
        await conn.send(b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno")
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        field = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "20000000")
        await client.send(request("POST", path, [field]))
        piece = b"x" * 65536
        for _ in range(100):
            await client.send(chunk(piece) if chunked else piece, timeout=2)
            if client.wire.received:
                break
        got = await client.response(timeout=2)
        assert (got.status, got.complete, got.body) == (429, True, b"no")
        assert got.header("retry-after") == [b"7"]


@paths
@pytest.mark.parametrize("way", ["close", "reset", "finish"])
@both_framings
async def test_msg_25_and_26_client_that_dies_in_its_upload_makes_no_complete_request(
    path, way, chunked
):
    """MSG-25 by length, MSG-26 in chunks; small, so that it may be held, and big."""
    async with RawBackend(reads_then_answers) as backend, proxy(backend) as p:
        for size in (100, 3_000_000):
            async with RawClient(p.port) as client:
                field = (
                    ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", f"{size}")
                )
                await client.send(request("POST", path, [field]))
                part = b"x" * (size - 50)
                await client.send(chunk(part) if chunked else part)
                getattr(client, way)()
                await eventually(lambda: p.in_flight() == 0)
                await client.closed()
        await eventually(lambda: backend.open_connections == 0)
        assert [received for received in backend.requests if received.complete] == []
        async with RawClient(p.port) as client:
            assert (await client.ask(request("GET", "/x"))).complete


@paths
@both_framings
async def test_msg_27_request_sent_one_byte_at_a_time_works(path, chunked):
    async with RawBackend(reads_then_answers) as backend:
        async with proxy(backend) as p, RawClient(p.port) as client:
            for byte in request("POST", path, [("X-A", "b")], b'{"model":"m"}', chunked):
                await client.send(bytes([byte]))
                await eventually(lambda: client.wire.transport.get_write_buffer_size() == 0)
            got = await client.response()
        assert (got.status, got.complete) == (200, True)
        (received,) = backend.requests
        assert (received.body, received.header("x-a")) == (b'{"model":"m"}', [b"b"])


@paths
@both_framings
async def test_msg_28_body_past_its_limit_gives_413_and_the_proxy_lives(path, chunked):
    async with RawBackend(reads_then_answers) as backend:
        server = {"max_body_size": 10_000}
        async with proxy(backend, server=server) as p:
            async with RawClient(p.port) as client:
                await client.send(request("POST", path, body=b"x" * 10_001, chunked=chunked))
                got = await client.response()
                assert (got.status, got.complete) == (413, True)
                assert got.json["error"]["code"] == "request_too_large"
            assert [received for received in backend.requests if received.complete] == []
            async with RawClient(p.port) as client:
                got = await client.ask(request("POST", path, body=b"x" * 10_000, chunked=chunked))
                assert got.status == 200
            assert len(backend.requests[-1].body) == 10_000


@both_framings
async def test_msg_29_request_cut_at_every_place_of_its_bytes_works(chunked):
    data = request("POST", "/x", [("X-A", "b")], b"abc\r\n\r\ndef", chunked)
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for at in range(1, len(data)):
            await client.send(data[:at])
            await asyncio.sleep(0.001)  # long enough for a packet of its own
            await client.send(data[at:])
            got = await client.response()
            assert (got.status, got.body) == (200, b"ok")
        assert {received.body for received in backend.requests} == {b"abc\r\n\r\ndef"}
        assert len(backend.requests) == len(data) - 1


@pytest.mark.parametrize("value", ["200-ok", "100-continue, x", ""])
async def test_msg_30_expectation_that_is_not_known_gives_417_or_passes(value):
    seen = await through(request("POST", "/x", [("Expect", value)], b"abc"))
    if seen.answer.status == 200:
        assert seen.got.body == b"abc"
    else:
        assert seen.answer.status in (400, 417)
        assert seen.answer.complete


async def test_msg_31_body_of_one_request_never_leaks_into_the_next():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for number in range(20):
            body = b"%d" % number * (number * 37 % 11)
            got = await client.ask(request("POST", "/x", body=body, chunked=number % 3 == 0))
            assert got.body == b"ok"
            assert backend.requests[-1].body == body


async def test_msg_32_content_type_of_the_client_is_not_read_as_an_order():
    """A form, or a multipart body cut in its middle, is bytes like any other."""
    for kind in (
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
        "text/\xff",
    ):
        body = b"--b\r\nContent-Disposition: form-data\r\n\r\nabc"
        seen = await through(request("POST", "/x", [("Content-Type", kind)], body))
        assert (seen.answer.status, seen.got.body) == (200, body)
        assert header(seen.got.headers, "content-type") == [kind.encode("latin-1")]
