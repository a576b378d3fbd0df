"""RSP: the client gets status, fields and body bytes as the backend sent them, correctly framed.

A relay may choose the framing, never the content: nothing is decoded, followed, invented or put
into another order, and after each answer the client's connection stands at the start of the next.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib

import pytest

from .kit import (
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    each_request,
    header,
    proxy,
    request,
)

BINARY = random.Random(52).randbytes(70_000) + b"\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
TEXT = b'{"object": "list",\n  "data": [1.0, 12345678901234567890, "\\u00e9"]}\n'
OURS = {b"x-beacon-backend", b"x-beacon-provider", b"x-beacon-region", b"x-beacon-attempts"}
OURS |= {b"x-request-id", b"date", b"via", b"connection", b"keep-alive", b"transfer-encoding"}


def whole(head: bytes, body: bytes = b"") -> bytes:
    """An answer with a length, from its head lines."""
    return head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def chunks(body: bytes, size: int = 1000, trailers: bytes = b"") -> bytes:
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(x), x) for x in pieces) + b"0\r\n" + trailers + b"\r\n"


def then_close(*pieces: bytes) -> Script:
    """One request, the pieces, each in a segment of its own, and the end of the connection."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        for piece in pieces:
            conn.write(piece)
            await conn.drain()
        conn.close()

    return script


async def ask(raw_answer: bytes, raw: bytes | None = None, method: str = "GET") -> Answer:
    """Ask for `/x` twice on one connection: the second answer proves that it is in step."""
    raw = raw or request(method, "/x")
    async with (
        RawBackend(answer(raw_answer)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        answers = []
        for _ in range(2):
            await client.send(raw)
            answers.append(await client.response(method=method))
        first, second = answers
        assert (second.status, second.body) == (first.status, first.body)
        assert len(backend.requests) == 2
        return first


STATUSES = [
    (b"201 Created", "RSP-01"),
    (b"202 Accepted", "RSP-02"),
    (b"400 Bad Request", "RSP-03"),
    (b"401 Unauthorized", "RSP-04"),
    (b"404 Not Found", "RSP-05"),
    (b"405 Method Not Allowed", "RSP-06"),
    (b"413 Content Too Large", "RSP-07"),
    (b"422 Unprocessable Content", "RSP-08"),
    (b"429 Too Many Requests", "RSP-09"),
    (b"500 Internal Server Error", "RSP-10"),
    (b"299 Perhaps", "RSP-11"),
    (b"503 Service Unavailable", "RSP-12"),
    (b"529 Overloaded", "RSP-13"),
    (b"502 Bad Gateway", "RSP-14"),
    (b"203 Non-Authoritative Information", "RSP-60"),
    (b"206 Partial Content", "RSP-60"),
    (b"402 Payment Required", "RSP-60"),
    (b"403 Forbidden", "RSP-60"),
    (b"408 Request Timeout", "RSP-60"),
    (b"409 Conflict", "RSP-60"),
    (b"410 Gone", "RSP-60"),
    (b"418 I'm a teapot", "RSP-60"),
    (b"451 Unavailable For Legal Reasons", "RSP-60"),
    (b"501 Not Implemented", "RSP-60"),
    (b"504 Gateway Timeout", "RSP-60"),
    (b"599 Late", "RSP-60"),
]


@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "line", [pytest.param(line, id=f"{case} {line.decode()}") for line, case in STATUSES]
)
async def test_status_of_an_only_backend_passes_with_its_body(line: bytes, path: str) -> None:
    body = b'{"error": {"message": "its own words", "code": 7}}'
    if line < b"3":
        body = b'{"choices": [{"message": {"content": "its own words"}}]}'
    raw = whole(b"HTTP/1.1 " + line + b"\r\nContent-Type: application/json", body)
    async with (
        RawBackend(answer(raw)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("POST", path, body=b'{"model":"m","messages":[]}'))
        got = await client.response(method="POST")
        assert b"%d " % got.status == line[:4]
        assert got.body == body
        assert got.complete


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(status, id=f"{case} {status}")
        for status, case in [
            (307, "RSP-15"),
            (301, "RSP-16"),
            (302, "RSP-17"),
            (303, "RSP-18"),
            (308, "RSP-19"),
        ]
    ],
)
async def test_redirect_is_not_followed_and_its_location_is_verbatim(status: int) -> None:
    async with RawBackend(answer(whole(b"HTTP/1.1 200 OK"))) as elsewhere:
        place = b"http://127.0.0.1:%d/a%%2Fb?c=%%20+#f" % elsewhere.port
        got = await ask(whole(b"HTTP/1.1 %d Go\r\nLocation: " % status + place, b"moved"))
        assert (got.status, got.body) == (status, b"moved")
        assert header(got.headers, b"Location") == [place]
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    "reason",
    [
        pytest.param(b"Fine By Me", id="RSP-61 own words"),
        pytest.param(b"", id="RSP-61 empty"),
        pytest.param(b"tr\xe8s bien", id="RSP-61 latin-1"),
    ],
)
async def test_rsp_61_reason_phrase_does_no_harm(reason: bytes) -> None:
    got = await ask(whole(b"HTTP/1.1 200 " + reason, b"ok"))
    assert (got.status, got.body) == (200, b"ok")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(
            [b"Set-Cookie: a=1; Path=/", b"Set-Cookie: b=2, x; Secure", b"Set-Cookie: a=3"],
            id="RSP-20 three Set-Cookie lines",
        ),
        pytest.param(
            [b"X-B: 1", b"x-a: 2", b"X-b: 3", b"X-A: 4"], id="RSP-21 order, case and repeats"
        ),
        pytest.param([b"Server: llama.cpp", b"X-C: 1"], id="RSP-23 Server of the backend"),
        pytest.param([b"X-Empty:", b"X-C: 1"], id="RSP-24 empty value"),
        pytest.param([b"X-L: caf\xe9 \xa0\x85\xff"], id="RSP-25 latin-1 bytes"),
        pytest.param([b'X-S: a  b\tc "d  e" , ,f'], id="RSP-26 inner spaces, tabs and quotes"),
        pytest.param([b"x_under-SCORE.!#$%&'*+^`|~: 1"], id="RSP-27 every token character"),
        pytest.param([b"X-%d: v%d" % (n, n) for n in range(60)], id="RSP-28 60 headers"),
        pytest.param([b"X-Long: " + b"v" * 6000], id="RSP-29 a value of 6 kB"),
        pytest.param(
            [
                b"openai-processing-ms: 12",
                b"anthropic-ratelimit-tokens-remaining: 9",
                b"Retry-After: 3",
                b'WWW-Authenticate: Bearer realm="x, y"',
                b"Access-Control-Allow-Origin: *",
                b"Vary: Origin, Accept",
                b"Cache-Control: no-cache",
                b'ETag: W/"1"',
                b"Link: </a>; rel=next, </b>; rel=last",
            ],
            id="RSP-62 fields that clients of LLM servers read",
        ),
    ],
)
async def test_fields_reach_the_client_line_by_line(lines: list[bytes]) -> None:
    """Each line as it was, in its order; only the space around the value may change."""
    got = await ask(whole(b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(lines), b"ok"))
    names = {line.partition(b":")[0] for line in lines}
    seen = [name + b":" + value for name, value in got.headers if name in names]
    assert [x.replace(b": ", b":", 1) for x in seen] == [x.replace(b": ", b":", 1) for x in lines]


async def test_rsp_22_no_field_is_invented() -> None:
    """No Content-Type, no Server; a Date is a relay's duty where there is none (RFC 9110 6.6.1)."""
    got = await ask(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert {name.lower() for name, _ in got.headers} - OURS == {b"content-length"}


async def test_rsp_63_date_of_the_backend_is_the_only_one() -> None:
    date = b"Tue, 15 Nov 1994 08:12:31 GMT"
    got = await ask(whole(b"HTTP/1.1 200 OK\r\nDate: " + date, b"ok"))
    assert header(got.headers, b"Date") == [date]


@pytest.mark.parametrize("name", [b"X-Request-Id", b"X-Beacon-Backend", b"X-Beacon-Attempts"])
async def test_rsp_64_a_field_of_ours_comes_once(name: bytes) -> None:
    """OpenAI's own servers send `x-request-id`, and a proxy behind this one sends the others."""
    got = await ask(whole(b"HTTP/1.1 200 OK\r\n" + name.lower() + b": its-own", b"ok"))
    assert len(header(got.headers, name)) == 1


async def test_rsp_65_fields_of_ours_name_the_backend() -> None:
    got = await ask(whole(b"HTTP/1.1 200 OK", b"ok"))
    for name, value in [
        (b"X-Beacon-Provider", b"openai"),
        (b"X-Beacon-Region", b"us-east"),
        (b"X-Beacon-Attempts", b"1"),
    ]:
        assert header(got.headers, name) == [value]
    assert all(len(header(got.headers, x)) == 1 for x in (b"X-Beacon-Backend", b"X-Request-Id"))


ENCODED = [
    pytest.param(b"gzip", gzip.compress(TEXT), b"gzip", id="RSP-30 gzip, asked for"),
    pytest.param(b"gzip", gzip.compress(TEXT), b"", id="RSP-31 gzip, not asked for"),
    pytest.param(b"deflate", zlib.compress(TEXT), b"deflate", id="RSP-32 deflate"),
    pytest.param(b"br, zstd", b"\x0b\x02\x80\x03", b"br", id="RSP-33 codings we do not know"),
    pytest.param(b"gzip", b"no gzip at all", b"gzip", id="RSP-34 only claims to be gzip"),
    pytest.param(b"identity", TEXT, b"", id="RSP-35 identity"),
]


@pytest.mark.parametrize(("coding", "body", "accept"), ENCODED)
async def test_coded_body_is_verbatim(coding: bytes, body: bytes, accept: bytes) -> None:
    fields = [(b"Accept-Encoding", accept)] if accept else []
    raw = whole(b"HTTP/1.1 200 OK\r\nContent-Encoding: " + coding, body)
    got = await ask(raw, request("GET", "/x", headers=fields))
    assert (got.status, got.body) == (200, body)
    assert header(got.headers, b"Content-Encoding") == [coding]
    assert header(got.headers, b"Content-Length") == [b"%d" % len(body)]


async def test_rsp_36_gzip_document_on_an_inference_route_is_verbatim() -> None:
    """It is JSON to the client, so judging it by its bytes on the wire must not fail it."""
    document = {"object": "chat.completion", "choices": [{"message": {"content": "hi"}}]}
    body = gzip.compress(json.dumps(document).encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip"
    ours = request("POST", "/v1/chat/completions", body=b'{"model":"m","messages":[]}')
    got = await ask(whole(head, body), ours, method="POST")
    assert (got.status, got.body) == (200, body)


async def test_rsp_37_gzip_event_stream_on_an_inference_route_is_verbatim() -> None:
    events = b'data: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
    body = gzip.compress(events + b"data: [DONE]\n\n")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
    raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(body, 9)
    ours = request("POST", "/v1/chat/completions", body=b'{"model":"m","stream":true}')
    got = await ask(raw, ours, method="POST")
    assert (got.status, got.body, got.complete) == (200, body, True)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        pytest.param("/v1/audio/speech", b"audio/mpeg", id="RSP-38 speech"),
        pytest.param("/v1/files/f-1/content", b"application/octet-stream", id="RSP-38 a file"),
        pytest.param("/v1/images/generations", b"image/png", id="RSP-38 an image"),
    ],
)
async def test_rsp_38_answer_that_is_no_json_passes_beside_the_inference_routes(
    path: str, kind: bytes
) -> None:
    raw = whole(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind, BINARY)
    got = await ask(raw, request("POST", path, body=b'{"model":"tts-1"}'), method="POST")
    assert (got.status, got.body) == (200, BINARY)


async def test_rsp_39_document_on_an_inference_route_is_not_reserialised() -> None:
    body = b'{ "choices":[ {"message":{"content":"\\u00e9\xc3\xa9"}} ],\n\n "big":1e30, "big":0.10}'
    raw = whole(b"HTTP/1.1 200 OK\r\nContent-Type: application/json", body)
    ours = request("POST", "/v1/chat/completions", body=b'{"model":"m","messages":[]}')
    got = await ask(raw, ours, method="POST")
    assert (got.status, got.body, got.framing) == (200, body, "length")


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(b'"\\ud83d"', id="RSP-75 half of a surrogate pair, as of a cut emoji"),
        pytest.param(b"NaN", id="RSP-75 NaN, as Python writes it"),
        pytest.param(b"-Infinity", id="RSP-75 -Infinity, as in log probabilities"),
        pytest.param(b"1e400", id="RSP-75 a number past a double"),
        pytest.param(b"123456789012345678901234567890", id="RSP-75 a number past 64 bits"),
    ],
)
async def test_json_that_only_a_strict_parser_refuses_passes(
    odd: bytes,
) -> None:
    """Clients read such JSON every day; a captive portal's page looks otherwise."""
    body = b'{"choices":[{"message":{"content":"hi"},"odd":' + odd + b"}]}"
    raw = whole(b"HTTP/1.1 200 OK\r\nContent-Type: application/json", body)
    ours = request("POST", "/v1/chat/completions", body=b'{"model":"m","messages":[]}')
    got = await ask(raw, ours, method="POST")
    assert (got.status, got.body) == (200, body)


async def test_rsp_40_binary_body_with_a_length_is_exact() -> None:
    got = await ask(whole(b"HTTP/1.1 200 OK", BINARY))
    assert got.body == BINARY


@pytest.mark.parametrize("size", [1, 13, 5000, 200_000])
async def test_rsp_41_chunked_binary_body_is_exact_for_any_chunk_size(size: int) -> None:
    body = BINARY[-3000:] if size == 1 else BINARY
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(body, size)
    got = await ask(raw)
    assert (got.body, got.framing, got.complete) == (body, "chunked", True)
    assert header(got.headers, b"Content-Length") == []


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
async def test_rsp_42_binary_body_that_ends_with_its_connection_is_exact(version: bytes) -> None:
    head = version + b" 200 OK\r\nContent-Type: application/x\r\n\r\n"
    async with (
        RawBackend(then_close(head, BINARY[:999], BINARY[999:])) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("GET", "/x"))
        got = await client.response()
        assert (got.status, got.body, got.complete) == (200, BINARY, True)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(whole(b"HTTP/1.1 200 OK"), id="RSP-43 a length of 0"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="RSP-45 chunked",
        ),
    ],
)
async def test_empty_body_stays_empty_and_complete(raw: bytes) -> None:
    got = await ask(raw)
    assert (got.status, got.body, got.complete) == (200, b"", True)


async def test_rsp_44_length_of_the_backend_is_kept() -> None:
    got = await ask(whole(b"HTTP/1.1 200 OK", TEXT))
    assert header(got.headers, b"Content-Length") == [b"%d" % len(TEXT)]
    assert header(got.headers, b"Transfer-Encoding") == []
    assert got.body == TEXT


@pytest.mark.parametrize(
    ("head", "framing"),
    [
        pytest.param(b"Content-Length: 1234\r\n", [b"1234"], id="RSP-46 with a length"),
        pytest.param(b"Transfer-Encoding: chunked\r\n", [], id="RSP-47 chunked"),
        pytest.param(b"", [], id="RSP-47 without framing"),
    ],
)
async def test_head_keeps_the_framing_fields_and_has_no_body(
    head: bytes, framing: list[bytes]
) -> None:
    got = await ask(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n", method="HEAD")
    assert (got.status, got.body) == (200, b"")
    assert header(got.headers, b"Content-Length") == framing


async def test_rsp_66_head_then_get_on_one_connection_stay_apart() -> None:
    """Where the length of a HEAD answer is taken for a body, the next answer is swallowed."""

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            body = b"" if received.method == "HEAD" else b"0123456789"
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + body)
            await conn.drain()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for method, body in [("HEAD", b""), ("GET", b"0123456789"), ("HEAD", b""), ("HEAD", b"")]:
            await client.send(request(method, "/x"))
            got = await client.response(method=method)
            assert (got.status, got.body) == (200, body)
            assert header(got.headers, b"Content-Length") == [b"10"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_rsp_48_204_and_304_have_no_body_and_no_invented_framing(
    status: bytes, method: str
) -> None:
    got = await ask(b"HTTP/1.1 " + status + b'\r\nETag: "1"\r\n\r\n', method=method)
    assert b"%d " % got.status == status[:4]
    assert got.body == b""
    assert header(got.headers, b"Content-Length") == []
    assert header(got.headers, b"Transfer-Encoding") == []
    assert header(got.headers, b"ETag") == [b'"1"']


async def test_rsp_49_204_with_a_length_of_0_leaves_the_connection_usable() -> None:
    got = await ask(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
    assert (got.status, got.body) == (204, b"")


async def test_rsp_50_304_without_a_length() -> None:
    got = await ask(b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n')
    assert (got.status, header(got.headers, b"Content-Length")) == (304, [])


async def test_rsp_51_304_with_the_length_of_the_200_has_no_body() -> None:
    got = await ask(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n")
    assert (got.status, got.body) == (304, b"")


TRAILERS = b"X-Checksum: abc\r\nX-Usage: 1\r\nX-Usage: 2\r\n"


@pytest.mark.parametrize("announced", [b"", b"Trailer: X-Checksum, X-Usage\r\n"])
@pytest.mark.parametrize("te", [b"", b"trailers"])
async def test_rsp_52_trailers_never_become_headers(te: bytes, announced: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + announced + b"\r\n"
    fields = [(b"TE", te), (b"Connection", b"TE")] if te else []
    got = await ask(head + chunks(TEXT, 7, TRAILERS), request("GET", "/x", headers=fields))
    assert (got.body, got.complete) == (TEXT, True)
    assert header(got.headers, b"X-Checksum") == []
    if te:
        assert header(got.trailers, b"X-Checksum") == [b"abc"]
        assert header(got.trailers, b"X-Usage") == [b"1", b"2"]


async def test_rsp_67_framing_field_in_the_trailers_changes_nothing_or_is_malformed() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = head + chunks(TEXT, 7, b"Content-Length: 3\r\nSet-Cookie: a=1\r\n")
    async with (
        RawBackend(answer(raw)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("GET", "/x", [("TE", "trailers"), ("Connection", "TE")]))
        assert got.status == 200
        assert got.body == TEXT or not got.complete
        for fields in (got.headers, got.trailers):
            assert header(fields, b"Content-Length") == header(fields, b"Set-Cookie") == []


@pytest.mark.parametrize(
    ("head", "body"),
    [
        pytest.param(b"Content-Length: %d\r\n" % len(TEXT), TEXT, id="RSP-54 length"),
        pytest.param(b"Transfer-Encoding: chunked\r\n", chunks(TEXT, 7), id="RSP-53 chunked"),
        pytest.param(b"", TEXT, id="RSP-53 ends with its connection"),
    ],
)
async def test_http_1_0_client_gets_no_chunks_and_the_end_of_the_connection(
    head: bytes, body: bytes
) -> None:
    async with (
        RawBackend(then_close(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(b"GET /x HTTP/1.0\r\nHost: x\r\n\r\n")
        got = await client.response()
        assert (got.status, got.body) == (200, TEXT)
        assert got.framing != "chunked"
        assert await client.closed()


@pytest.mark.parametrize(
    "interim",
    [
        pytest.param(
            b"HTTP/1.1 102 Processing\r\n\r\n"
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
            id="RSP-55 102 and 103",
        ),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="RSP-56 100 that nobody asked for"),
        pytest.param(b"HTTP/1.1 199 Odd\r\nX-Interim: 1\r\n\r\n" * 20, id="RSP-56 twenty of 199"),
    ],
)
async def test_interim_answers_do_no_harm(interim: bytes) -> None:
    final = whole(b"HTTP/1.1 200 OK\r\nX-Final: 1", b"ok")
    async with (
        RawBackend(answer(interim + final)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(2):
            await client.send(request("GET", "/x"))
            got = await client.response()
            assert (got.status, got.body) == (200, b"ok")
            assert header(got.headers, b"X-Final") == [b"1"]
            assert header(got.headers, b"X-Interim") == header(got.headers, b"Link") == []


async def test_rsp_68_interim_answers_never_reach_an_http_1_0_client() -> None:
    """RFC 9110 15.2: a 1xx is not sent to a client that speaks 1.0."""
    raw = b"HTTP/1.1 103 Early Hints\r\n\r\n" + whole(b"HTTP/1.1 200 OK", b"ok")
    async with (
        RawBackend(answer(raw)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(b"GET /x HTTP/1.0\r\nHost: x\r\n\r\n")
        got = await client.response()
        assert (got.status, got.interim) == (200, [])


async def test_rsp_57_bytes_after_the_length_never_reach_another_client() -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen"

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            conn.write(whole(b"HTTP/1.1 200 OK", received.target) + evil)
            await conn.drain()

    async with RawBackend(script) as backend, proxy(backend) as p:
        for n in range(6):
            async with RawClient(p.port) as client:
                await client.send(request("GET", f"/{n}"))
                assert (await client.response()).body == b"/%d" % n


async def test_rsp_69_bytes_after_the_last_chunk_never_reach_another_client() -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen"

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            conn.write(head + chunks(received.target) + evil)
            await conn.drain()

    async with RawBackend(script) as backend, proxy(backend) as p:
        for n in range(6):
            async with RawClient(p.port) as client:
                await client.send(request("GET", f"/{n}"))
                assert (await client.response()).body == b"/%d" % n


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(whole(b"HTTP/1.1 200 OK\r\nConnection: close", TEXT), id="RSP-58 close"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunks(TEXT),
            id="RSP-58 close, chunked",
        ),
        pytest.param(whole(b"HTTP/1.0 200 OK", TEXT), id="RSP-59 HTTP/1.0"),
        pytest.param(
            whole(b"HTTP/1.0 200 OK\r\nConnection: keep-alive", TEXT),
            id="RSP-59 HTTP/1.0 with keep-alive",
        ),
    ],
)
async def test_end_of_the_backend_connection_is_not_the_end_of_the_clients(raw: bytes) -> None:
    async with (
        RawBackend(then_close(raw)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            await client.send(request("GET", "/x"))
            got = await client.response()
            assert (got.status, got.body, got.complete) == (200, TEXT, True)
        assert backend.connections == 3


async def test_rsp_70_backend_that_says_close_but_stays_is_not_asked_again() -> None:
    async with (
        RawBackend(answer(whole(b"HTTP/1.1 200 OK\r\nConnection: close", b"ok"))) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            await client.send(request("GET", "/x"))
            assert (await client.response()).body == b"ok"
        assert backend.connections == 3


async def test_rsp_71_answer_one_byte_a_segment_is_whole() -> None:
    raw = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += chunks(b"split everywhere", 5, b"X-T: 1\r\n")
    async with (
        RawBackend(then_close(*(raw[at : at + 1] for at in range(len(raw))))) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("GET", "/x"))
        got = await client.response()
        assert (got.status, got.body, got.complete) == (200, b"split everywhere", True)
        assert header(got.headers, b"X-A") == [b"1"]


async def test_rsp_72_chunk_extensions_of_the_backend_leave_the_body_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = await ask(head + b'3;a="b;c"\r\nabc\r\n2;x\r\nde\r\n0;y=1\r\n\r\n')
    assert (got.body, got.complete) == (b"abcde", True)


async def test_rsp_73_answers_of_pipelined_requests_come_in_order() -> None:
    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            conn.write(whole(b"HTTP/1.1 200 OK", received.target * 50))
            await conn.drain()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(b"".join(request("GET", f"/{n}") for n in range(10)))
        for n in range(10):
            assert (await client.response()).body == (b"/%d" % n) * 50
        assert [x.target for x in backend.requests] == [b"/%d" % n for n in range(10)]


async def test_rsp_74_document_above_the_holding_cap_is_relayed_whole() -> None:
    body = b'{"data": "' + b"x" * 1_500_000 + b'"}'
    raw = whole(b"HTTP/1.1 200 OK\r\nContent-Type: application/json", body)
    ours = request("POST", "/v1/embeddings", body=b'{"model":"m","input":"x"}')
    got = await ask(raw, ours, method="POST")
    assert (got.status, got.body == body) == (200, True)
