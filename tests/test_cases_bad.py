"""BAD: what a broken backend sends never hangs a client and never looks like a whole answer.

The client gets 502, 503 or 504, or a message that its own parser knows to be cut short. A head that
cannot be trusted gives 502, for no byte of it can be passed on; a body that ends early is cut where
it was already on its way.
"""

from __future__ import annotations

import gzip

import pytest

from .kit import (
    LAST_CHUNK,
    OK,
    SSE_HEAD,
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat,
    chat_events,
    chunk,
    closed_port,
    each_request,
    eventually,
    json_bytes,
    proxy,
    request,
    through,
)

GET = request("GET", "/x")
ROUTES = {"plain": GET, "document": chat(), "stream": chat(stream=True)}
any_route = pytest.mark.parametrize("data", ROUTES.values(), ids=ROUTES.keys())
inference = pytest.mark.parametrize("data", [chat(), chat(stream=True)], ids=["document", "stream"])

HEAD = b"HTTP/1.1 200 OK\r\n"
DOCUMENT = b'{"choices":[{"message":{"role":"assistant","content":"hello"}}]}'


def says(raw: bytes, *, reset: bool = False) -> Script:
    """Read one request, send `raw`, close."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        if raw:
            await conn.send(raw)
        if reset:
            conn.reset()

    return script


def assert_502(got: Answer) -> None:
    assert got.status == 502, got
    assert got.complete, got.fault
    assert got.json["error"]["code"] == "upstream_error"


def assert_broken(got: Answer, sent: bytes) -> None:
    """Cut short, or an error instead: never a fragment that passes for the whole."""
    if got.complete:
        assert got.status in (502, 503, 504), got
    else:
        assert sent.startswith(got.body), "bytes that the backend never sent"


@any_route
async def test_bad_01_upstream_closes_without_a_byte_gives_502(data):
    assert_502((await through(data, says(b""))).answer)


@any_route
async def test_bad_02_upstream_resets_without_a_byte_gives_502(data):
    assert_502((await through(data, says(b"", reset=True))).answer)


@pytest.mark.parametrize("raw", [b"H", b"HTTP/1.1", b"HTTP/1.1 20", b"HTTP/1.1 200 O"])
async def test_bad_03_upstream_closes_inside_the_status_line_gives_502(raw):
    assert_502((await through(GET, says(raw))).answer)


@pytest.mark.parametrize(
    "raw",
    [b"", b"Content-Le", b"Content-Length: 2", b"Content-Length: 2\r\n", b"A: b\r\nC: d\r\n\r"],
)
async def test_bad_04_upstream_closes_inside_the_header_gives_502(raw):
    assert_502((await through(GET, says(HEAD + raw))).answer)


BAD_HEADS = {
    "05 two Content-Length that differ": HEAD
    + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nokk",
    "06 Content-Length that is no number": HEAD + b"Content-Length: abc\r\n\r\nok",
    "06b empty Content-Length": HEAD + b"Content-Length: \r\n\r\nok",
    "06c Content-Length in hex": HEAD + b"Content-Length: 0x2\r\n\r\nok",
    "06d Content-Length with a plus sign": HEAD + b"Content-Length: +2\r\n\r\nok",
    "06e Content-Length with a fraction": HEAD + b"Content-Length: 2.0\r\n\r\nok",
    "07 negative Content-Length": HEAD + b"Content-Length: -2\r\n\r\nok",
    "08 Content-Length past 64 bits": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nok",
    "08b list of two lengths that differ": HEAD + b"Content-Length: 2, 3\r\n\r\nokk",
    "09 status code of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
    "09b status code of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "09c status code of letters": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok",
    "09d status code zero": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "10 garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not HTTP at all\r\n\r\n",
    "10b HTML without a head": b"<html><body>hello</body></html>\r\n\r\n",
    "10c another protocol's greeting": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "11 NUL in a value": HEAD + b"X-A: a\x00b\r\nContent-Length: 2\r\n\r\nok",
    "11b NUL in a name": HEAD + b"X-\x00A: b\r\nContent-Length: 2\r\n\r\nok",
    "12 bare CR in a value": HEAD + b"X-A: a\rSet-Cookie: x\r\nContent-Length: 2\r\n\r\nok",
    "14 space before the colon": HEAD + b"X-A : b\r\nContent-Length: 2\r\n\r\nok",
    "14b line without a colon": HEAD + b"nonsense\r\nContent-Length: 2\r\n\r\nok",
    "14c empty name": HEAD + b": b\r\nContent-Length: 2\r\n\r\nok",
    "16 coding that is not known": HEAD + b"Transfer-Encoding: gzip\r\n\r\nok",
    "16b chunked is not the last coding": HEAD
    + b"Transfer-Encoding: chunked, gzip\r\n\r\n2\r\nok\r\n",
    "17 version 9.9": b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "17b version 2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "17c no version": b"HTTP 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "17d lower case": b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
}


@pytest.mark.parametrize("raw", BAD_HEADS.values(), ids=["BAD-" + name for name in BAD_HEADS])
async def test_bad_05_to_17_head_that_cannot_be_trusted_gives_502(raw):
    assert_502((await through(GET, says(raw))).answer)


@inference
@pytest.mark.parametrize("case", ["05 two Content-Length that differ", "10 garbage"])
async def test_bad_05_and_10_on_an_inference_route_give_502(data, case):
    assert_502((await through(data, says(BAD_HEADS[case]))).answer)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(HEAD + b"X-A: a\r\n b\r\nContent-Length: 2\r\n\r\nok", id="a space"),
        pytest.param(HEAD + b"X-A: a\r\n\tb\r\nContent-Length: 2\r\n\r\nok", id="a tab"),
        pytest.param(HEAD + b" X-A: a\r\nContent-Length: 2\r\n\r\nok", id="on the first line"),
    ],
)
async def test_bad_13_folded_header_gives_502_or_comes_unfolded(raw):
    """RFC 9112 5.2: a gateway replaces the fold by spaces or answers 502."""
    got = (await through(GET, says(raw))).answer
    if got.status == 200:
        assert got.complete
        assert [v.split() for v in got.header("x-a")] == [[b"a", b"b"]]
        assert b"\r\n " not in got.raw
        assert b"\r\n\t" not in got.raw
    else:
        assert_502(got)


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 100\r\n",
    ],
)
async def test_bad_15_both_lengths_give_502_or_chunked_wins(lines):
    got = (await through(GET, says(HEAD + lines + b"\r\n2\r\nok\r\n0\r\n\r\n"))).answer
    if got.status == 200:
        assert (got.complete, got.body) == (True, b"ok")
        assert not (got.header("content-length") and got.header("transfer-encoding"))
    else:
        assert_502(got)


async def test_bad_18_huge_head_gives_502():
    filler = b"".join(b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(1000))
    assert_502((await through(GET, says(HEAD + filler + b"Content-Length: 0\r\n\r\n"))).answer)


async def test_bad_18b_head_that_never_ends_gives_502_and_is_not_kept():
    """The proxy must stop reading: a head is bounded in bytes, not only in time."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        conn.write(HEAD)
        while not conn.wire.eof:
            await conn.send(b"X-Filler: " + b"a" * 60_000 + b"\r\n")

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert_502(await client.ask(GET))
        assert backend.conns[0].sent < 24 * 2**20


async def test_bad_19_too_many_headers_give_502():
    filler = b"".join(b"X-%d: a\r\n" % n for n in range(50_000))
    assert_502((await through(GET, says(HEAD + filler + b"Content-Length: 0\r\n\r\n"))).answer)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", [0, 1, 63, len(DOCUMENT) - 1])
@any_route
async def test_bad_20_body_shorter_than_its_length_never_looks_whole(data, sent, reset):
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(DOCUMENT)
    got = (await through(data, says(head + DOCUMENT[:sent], reset=reset))).answer
    assert_broken(got, DOCUMENT)
    if data == ROUTES["document"]:  # held whole, so the failure is told as one
        assert_502(got)


async def test_bad_21_bytes_past_the_length_reach_nobody():
    """They may answer a request that somebody else smuggled: the connection is dropped."""
    async with RawBackend(answer(OK + OK.replace(b"ok", b"no"))) as backend:
        async with proxy(backend) as p, RawClient(p.port) as client:
            for _ in range(3):
                got = await client.ask(GET)
                assert (got.complete, got.body) == (True, b"ok")
            await eventually(lambda: backend.open_connections == 0)
        assert len(backend.requests) == backend.connections == 3


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="BAD-22 before the first chunk"),
        pytest.param(b"5\r\nhello\r\n", id="BAD-22 without the last chunk"),
        pytest.param(b"5\r\nhello\r\n0\r\n", id="BAD-22 inside the end"),
        pytest.param(b"5\r\nhello\r\n0\r\nX-A: b\r\n", id="BAD-22 inside the trailers"),
        pytest.param(b"5\r\nhello\r\n5\r\nwo", id="BAD-23 inside a chunk"),
        pytest.param(b"5\r\nhello\r\n5", id="BAD-23 inside a chunk size"),
        pytest.param(
            b"5\r\nhello\r\nxyz\r\nworld\r\n0\r\n\r\n", id="BAD-24 size that is no number"
        ),
        pytest.param(b"5\r\nhello\r\n\r\nworld\r\n0\r\n\r\n", id="BAD-24 empty size"),
        pytest.param(b"5\r\nhello\r\n-5\r\nworld\r\n0\r\n\r\n", id="BAD-25 negative size"),
        pytest.param(b"5\r\nhello\r\n+5\r\nworld\r\n0\r\n\r\n", id="BAD-25 size with a plus sign"),
        pytest.param(b"5\r\nhello\r\n0x5\r\nworld\r\n0\r\n\r\n", id="BAD-25 size with 0x"),
        pytest.param(
            b"5\r\nhello\r\nfffffffffffffffff\r\nworld\r\n0\r\n\r\n", id="BAD-25 size past 64 bits"
        ),
        pytest.param(
            b"5\r\nhello\r\n5\r\nworld!!\r\n0\r\n\r\n", id="BAD-25 chunk longer than its size"
        ),
    ],
)
async def test_bad_22_to_25_broken_chunks_never_look_whole(raw):
    assert_broken((await through(GET, says(CHUNKED + raw))).answer, b"helloworld")


@pytest.mark.parametrize("raw", [b"5\r\nhello\r\n", b"5\r\nhello\r\nzz\r\n"])
async def test_bad_22_and_24_for_an_http_10_client_end_without_a_clean_end(raw):
    """HTTP/1.0 knows no chunks: the connection's own end is all that can tell, so it is a reset."""
    data = request("GET", "/x", version="HTTP/1.0")
    got = (await through(data, says(CHUNKED + raw))).answer
    assert not got.complete or got.status in (502, 503, 504), got


@inference
async def test_bad_22_stream_cut_before_its_first_content_gives_502(data):
    role = chat_events("x", 1)[0]
    got = (await through(data, says(SSE_HEAD + chunk(role)))).answer
    assert got.status == 502 or not got.complete, got


async def test_bad_22_stream_cut_after_content_is_visibly_broken():
    events = chat_events("hello", 3)[:3]
    raw = SSE_HEAD + b"".join(chunk(e) for e in events)
    got = (await through(chat(stream=True), says(raw))).answer
    assert got.status == 200
    assert got.body.startswith(b"".join(events))
    assert not got.complete


@pytest.mark.parametrize("framed", ["length", "chunked"])
async def test_bad_26_gzip_body_cut_short_is_passed_verbatim_and_looks_cut(framed):
    packed = gzip.compress(b"hello world, " * 1000, mtime=0)
    part = packed[: len(packed) // 2]
    head = HEAD + b"Content-Encoding: gzip\r\n"
    if framed == "length":
        raw = head + b"Content-Length: %d\r\n\r\n" % len(packed) + part
    else:
        raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(part)
    assert_broken((await through(GET, says(raw))).answer, packed)


async def test_bad_27_body_ended_by_a_reset_never_looks_whole():
    """Without a length the clean close is the only end mark there is (RFC 9112 6.3, 8)."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(HEAD + b"\r\nhello")
        await eventually(lambda: client.wire.received > 5)
        conn.reset()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(GET)
        assert_broken(got, b"hello")


async def test_bad_28_bytes_past_the_last_chunk_reach_nobody():
    raw = CHUNKED + b"2\r\nok\r\n0\r\n\r\n" + OK.replace(b"ok", b"no")
    async with RawBackend(answer(raw)) as backend:
        async with proxy(backend) as p, RawClient(p.port) as client:
            for _ in range(3):
                got = await client.ask(GET)
                assert (got.complete, got.body) == (True, b"ok")
        assert len(backend.requests) == backend.connections == 3


@any_route
async def test_bad_29_switching_protocols_that_nobody_asked_for_gives_502(data):
    raw = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + OK
    assert_502((await through(data, says(raw))).answer)


@any_route
async def test_bad_30_backend_not_listening_gives_502_quickly(data):
    with closed_port() as port:
        row = {"url": f"http://127.0.0.1:{port}"}
        async with proxy(row, timeouts={"connect": 60}) as p, RawClient(p.port) as client:
            got = await client.ask(data)
    assert got.complete
    assert got.status in (502, 503)


async def test_bad_31_interim_answers_without_an_end_do_not_hang_or_grow():
    """A backend that says 103 for ever gives no answer: it must run into a bound."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        while not conn.wire.eof:
            await conn.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)

    timeouts = {"first_content": 0.5}
    async with (
        RawBackend(script) as backend,
        proxy(backend, timeouts=timeouts) as p,
        RawClient(p.port) as client,
    ):
        await client.send(GET)
        while (got := await client.head()).status in range(100, 200):
            assert client.wire.received < 24 * 2**20
        got = await client.body(got)
    assert got.status in (502, 504) or not got.complete


async def test_bad_31b_interim_answer_and_nothing_more_gives_502():
    got = (await through(GET, says(b"HTTP/1.1 100 Continue\r\n\r\n"))).answer
    assert_502(got)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/x", {"error"}),
        ("/v1/chat/completions", {"error"}),
        ("/v1/messages", {"type", "error"}),
        ("/api/chat", {"error"}),
    ],
)
async def test_bad_32_own_error_is_framed_typed_json_and_tells_no_address(path, shape):
    """`failure.url` of the first router told every client where the backends are."""
    async with RawBackend(says(b"")) as backend:
        async with proxy(backend) as p, RawClient(p.port) as client:
            got = await client.ask(request("POST", path, body=b'{"model":"m"}'))
            again = await client.ask(request("GET", "/health"))
        assert (got.status, got.complete, got.framing) == (502, True, "length")
        assert got.header("content-type")[0].startswith(b"application/json")
        assert got.json.keys() == shape
        assert backend.url.encode() not in got.raw
        assert b"127.0.0.1" not in got.raw
        assert b"Traceback" not in got.raw
    assert again.status == 200, "the client's connection outlives the error"


async def test_bad_33_answer_before_the_request_is_not_taken_for_one():
    """Bytes that wait on an idle connection would be the next client's answer, and so on."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(OK)
        await eventually(lambda: first_done)
        await conn.send(OK.replace(b"ok", b"no"))
        await conn.wait_closed()

    first_done = False
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(GET)).body == b"ok"
        first_done = True
        await backend.closed.wait(timeout=2)
        assert (await client.ask(GET)).body == b"ok"
        assert backend.connections == 2


@pytest.mark.parametrize("seconds", [0.3])
@any_route
async def test_bad_34_head_that_never_comes_gives_504(data, seconds):
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.wait_closed()

    timeouts = {"first_content": seconds, "document": seconds}
    got = (await through(data, script, timeouts=timeouts)).answer
    assert (got.status, got.complete) == (504, True)
    assert got.json["error"]["code"] == "upstream_timeout"


async def test_bad_35_body_that_stalls_is_cut_and_never_looks_whole():
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(HEAD + b"Content-Length: 10\r\n\r\nhello")
        assert await conn.wait_closed()

    got = (await through(GET, script, timeouts={"idle": 0.3})).answer
    assert not got.complete
    assert got.body in (b"", b"hello")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>log in to the hotel's network</html>", id="a captive portal"),
        pytest.param(DOCUMENT[:-1], id="JSON cut short behind a right length"),
    ],
)
async def test_bad_36_inference_document_that_is_no_json_gives_502(body):
    raw = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert_502((await through(chat(), answer(raw))).answer)


async def test_bad_37_answer_in_one_byte_pieces_is_still_whole():
    raw = json_bytes({"choices": [{"message": {"content": "hi"}}]})

    async def script(conn: BackendConn) -> None:
        await conn.request()
        for at in range(len(raw)):
            await conn.send(raw[at : at + 1])
            await eventually(lambda: conn.wire.transport.get_write_buffer_size() == 0)

    got = (await through(chat(), script)).answer
    assert (got.status, got.complete) == (200, True)
    assert raw.endswith(got.body)


async def test_bad_38_broken_answer_leaves_the_proxy_unharmed():
    """After each kind of damage the same client connection, or a new one, gets a good answer."""
    bad = [*BAD_HEADS.values(), CHUNKED + b"zz\r\n", HEAD + b"Content-Length: 5\r\n\r\nab", b""]

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            if received.target != b"/good":
                await conn.send(bad[int(received.target[1:])])
                return
            await conn.send(OK)

    middleware = [{"health": {"consecutive_failures": 1000}}, {"failover": {}}]
    async with RawBackend(script) as backend, proxy(backend, middleware=middleware) as p:
        for number in range(len(bad)):
            async with RawClient(p.port) as client:
                await client.ask(request("GET", f"/{number}"))
            async with RawClient(p.port) as client:
                assert (await client.ask(request("GET", "/good"))).body == b"ok", bad[number]
        assert p.in_flight() == 0


async def test_bad_39_last_chunk_sent_twice_is_no_second_answer():
    script = answer(CHUNKED + chunk(b"ok") + LAST_CHUNK * 2)
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for _ in range(3):
            got = await client.ask(GET)
            assert (got.status, got.complete, got.body) == (200, True, b"ok")
