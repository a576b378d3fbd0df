"""SMG: two readers never see two different requests in one stream of bytes.

Each case sends raw bytes that hide a request for `/hidden` where a careless parser would find it.
The proxy refuses them, or forwards one request in the one form that RFC 9112 knows; the hidden
request never runs, and the connection is never reused out of step: a canary behind proves that.
"""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import suppress

import pytest

from .kit import (
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    Received,
    each_request,
    eventually,
    header,
    proxy,
)

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
CANARY = b"GET /canary HTTP/1.1\r\nHost: x\r\n\r\n"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(_TOKEN + rb" [!-~\x80-\xff]+ HTTP/1\.1\Z")
_FIELD_LINE = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\Z")


def post(fields: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    return b"POST /main " + version + b"\r\nHost: x\r\n" + fields + b"\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = b"Transfer-Encoding: chunked\r\n"
END = b"0\r\n\r\n"
# By Transfer-Encoding the hidden request is the body; by `Content-Length: 4` it is the next one.
INSIDE = chunk(HIDDEN) + END
FOUR = b"Content-Length: 4\r\n"


async def tell(conn: BackendConn) -> None:
    """Answer each request with its own target, so that a client knows whose answer it got."""
    async for received in each_request(conn):
        if not received.complete:
            return
        body = b"" if received.method == "HEAD" else received.target
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def assert_unambiguous(received: Received) -> None:
    """The head is what every reader of RFC 9112 reads in the same way."""
    first, *lines = received.raw_head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert _REQUEST_LINE.match(first), first
    for line in lines:
        assert _FIELD_LINE.match(line), line
    assert len(header(received.headers, b"Host")) == 1
    assert received.framing.fault == ""


def completed(backend: RawBackend) -> list[Received]:
    """What a backend would have run, less the canary; every head is judged, whole or not."""
    for received in backend.requests:
        assert_unambiguous(received)
        assert b"hidden" not in received.target
    whole = [received for received in backend.requests if received.complete]
    return [received for received in whole if received.target != b"/canary"]


def ends(got: Answer) -> bool:
    """Whether the answer says that it is the last on its connection."""
    return got.version == "1.0" or header(got.headers, b"Connection") == [b"close"]


async def in_step(client: RawClient, first: Answer) -> bool:
    """Send the canary: its own answer comes, or a refusal, or none as the connection has ended."""
    await client.send(CANARY)
    try:
        second = await client.response(timeout=0.3 if ends(first) else 4)
    except TimeoutError:
        return ends(first)
    return second.status in (0, 400) or (second.status, second.body) == (200, b"/canary")


async def send(raw: bytes, method: str = "POST") -> tuple[Answer, list[Received], list[Received]]:
    """The first answer to `raw`, the requests that a backend would have run, and all heads."""
    async with RawBackend(tell) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(raw)
        first = await client.response(method, timeout=4)
        assert first.status == 0 or first.complete, first.fault
        assert await in_step(client, first)
        await eventually(lambda: p.in_flight() == 0)
        return first, completed(backend), backend.requests


def named(case: str, raw: bytes) -> object:
    return pytest.param(raw, id=case)


REFUSED = [
    named("SMG-01 space before the colon", post(b"Content-Length : 4\r\n", b"abcd" + HIDDEN)),
    named("SMG-02 tab before the colon", post(b"Transfer-Encoding\t: chunked\r\n", INSIDE)),
    named("SMG-03 two different Host lines", post(b"Host: y\r\n")),
    named("SMG-04 no Host", b"GET /main HTTP/1.1\r\nX-A: 1\r\n\r\n"),
    named("SMG-05 Host with a space", b"GET /main HTTP/1.1\r\nHost: x y\r\n\r\n"),
    named("SMG-05 Host with a path", b"GET /main HTTP/1.1\r\nHost: x/hidden\r\n\r\n"),
    named("SMG-05 Host with userinfo", b"GET /main HTTP/1.1\r\nHost: u@x\r\n\r\n"),
    named("SMG-05 Host with a list", b"GET /main HTTP/1.1\r\nHost: x, y\r\n\r\n"),
    named("SMG-06 two equal Host lines", post(b"Host: x\r\n")),
    named("SMG-08 line without a colon", post(b"NoColon\r\n", HIDDEN)),
    named("SMG-09 NUL in a value", post(b"X-A: a\x00b\r\n", HIDDEN)),
    named("SMG-10 NUL in a name", post(b"X\x00A: b\r\n", HIDDEN)),
    named("SMG-12 space in a name", post(b"X A: b\r\n", HIDDEN)),
    named("SMG-12 parenthesis in a name", post(b"X(A: b\r\n", HIDDEN)),
    named("SMG-12 quote in a name", post(b'"Content-Length": 4\r\n', HIDDEN)),
    named("SMG-13 lower-case http/1.1", post(b"", HIDDEN, b"http/1.1")),
    named("SMG-14 HTTP/0.9", b"GET /main\r\n\r\n" + HIDDEN),
    named("SMG-15 space inside the target", b"GET /main /x HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    named("SMG-16 tabs around the target", b"GET\t/main\tHTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    named("SMG-16 no target", b"GET HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    named("SMG-16 delimiter in the method", b"G(T /main HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    named("SMG-17 negative length", post(b"Content-Length: -1\r\n", HIDDEN)),
    named("SMG-18 length with a plus", post(b"Content-Length: +4\r\n", b"abcd" + HIDDEN)),
    named("SMG-19 length in hexadecimal", post(b"Content-Length: 0x4\r\n", b"abcd" + HIDDEN)),
    named("SMG-20 length with an underscore", post(b"Content-Length: 1_0\r\n", b"abcd" + HIDDEN)),
    named("SMG-21 length with a space inside", post(b"Content-Length: 4 6\r\n", b"abcd" + HIDDEN)),
    named("SMG-22 length over 64 bits", post(b"Content-Length: 18446744073709551620\r\n", b"abcd")),
    named("SMG-22 length of 400 digits", post(b"Content-Length: " + b"4" * 400 + b"\r\n", b"ab")),
    named("SMG-23 empty length", post(b"Content-Length:\r\n", HIDDEN)),
    named("SMG-24 two lengths in a line", post(b"Content-Length: 4, 40\r\n", b"abcd" + HIDDEN)),
    named(
        "SMG-24 length in fullwidth digits", post("Content-Length: \uff14\r\n".encode(), b"abcd")
    ),
    named("SMG-24 length with a vertical tab", post(b"Content-Length: \x0b4\r\n", b"abcd")),
    named(
        "SMG-25 two lengths", post(b"Content-Length: 4\r\nContent-Length: 40\r\n", b"abcd" + HIDDEN)
    ),
    named(
        "SMG-26 a length of 0 first", post(b"Content-Length: 0\r\nContent-Length: 33\r\n", HIDDEN)
    ),
    named(
        "SMG-26 an empty length first", post(b"Content-Length:\r\nContent-Length: 33\r\n", HIDDEN)
    ),
    named("SMG-27 chunked is not last", post(b"Transfer-Encoding: chunked, identity\r\n", INSIDE)),
    named("SMG-28 xchunked", post(b"Transfer-Encoding: xchunked\r\n", INSIDE)),
    named("SMG-28 chunkedx", post(b"Transfer-Encoding: chunkedx\r\n", INSIDE)),
    named("SMG-29 chunked in HTTP/1.0", post(CHUNKED, INSIDE, b"HTTP/1.0")),
    named("SMG-30 quoted chunked", post(b'Transfer-Encoding: "chunked"\r\n', INSIDE)),
    named("SMG-30 chunked with a parameter", post(b"Transfer-Encoding: chunked;q=1\r\n", INSIDE)),
    named(
        "SMG-30 vertical tab before chunked", post(b"Transfer-Encoding: \x0bchunked\r\n", INSIDE)
    ),
    named("SMG-30 vertical tab after chunked", post(b"Transfer-Encoding: chunked\x0b\r\n", INSIDE)),
    named("SMG-31 NUL after chunked", post(b"Transfer-Encoding: chunked\x00\r\n", INSIDE)),
    named("SMG-32 identity", post(b"Transfer-Encoding: identity\r\n", INSIDE)),
    named("SMG-32 empty Transfer-Encoding", post(b"Transfer-Encoding:\r\n", INSIDE)),
    named(
        "SMG-33 HTTP/2 preface",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    ),
    named("SMG-34 a TLS hello", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03\r\n\r\n" + HIDDEN),
    named("SMG-34 binary garbage", random.Random(34).randbytes(300) + b"\r\n\r\n" + HIDDEN),
    named("SMG-35 text behind the version", post(b"", HIDDEN, b"HTTP/1.1 x")),
    named("SMG-35 letters behind the version", post(b"", HIDDEN, b"HTTP/1.1x")),
    named("SMG-36 HTTP/2.0", post(b"", HIDDEN, b"HTTP/2.0")),
    named("SMG-36 HTTP/1.10", post(b"", HIDDEN, b"HTTP/1.10")),
    named("SMG-36 HTTP/1,1", post(b"", HIDDEN, b"HTTP/1,1")),
    named("SMG-36 no version number", post(b"", HIDDEN, b"HTTP/")),
    named("SMG-37 blank before the first line", b"GET /main HTTP/1.1\r\n Host: x\r\n\r\n" + HIDDEN),
    named("SMG-86 CR alone ends lines", b"GET /main HTTP/1.1\rHost: x\r\r" + HIDDEN),
]


@pytest.mark.parametrize("raw", REFUSED)
async def test_request_is_refused_and_nothing_reaches_the_backend(raw: bytes) -> None:
    first, _, received = await send(raw)
    assert first.status == 0 or 400 <= first.status <= 599
    assert [request for request in received if request.target != b"/canary"] == []


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b": x", id="SMG-07 empty name"),
        pytest.param(b"X-\xe9: 1", id="SMG-11 non-ASCII byte in a name"),
        pytest.param("Transfer-Encod\u0131ng: chunked".encode(), id="SMG-11 dotless i in a name"),
    ],
)
async def test_line_with_no_valid_name_is_refused_or_dropped(line: bytes) -> None:
    first, whole, _ = await send(post(line + b"\r\nContent-Length: 2\r\n", b"ab"))
    if first.status == 200:
        assert [(x.target, x.body) for x in whole] == [(b"/main", b"ab")]
        assert line.partition(b":")[0] + b":" not in whole[0].raw_head.replace(b"\r\n", b"\n\r")
    else:
        assert (first.status in (0, 400), whole) == (True, [])


DOUBTFUL = [
    named("SMG-38 folded line", post(b"X-A: a\r\n b\r\nContent-Length: 4\r\n", b"abcd")),
    named(
        "SMG-39 folded Transfer-Encoding",
        post(FOUR + b"Transfer-Encoding:\r\n chunked\r\n", INSIDE),
    ),
    named("SMG-40 CL.TE", post(b"Content-Length: 38\r\n" + CHUNKED, END + HIDDEN)),
    named("SMG-41 TE.CL", post(FOUR + CHUNKED, INSIDE)),
    named("SMG-41 TE.CL, the other order", post(CHUNKED + FOUR, INSIDE)),
    named(
        "SMG-42 chunked, then a coding of its own",
        post(FOUR + CHUNKED + b"Transfer-Encoding: cow\r\n", INSIDE),
    ),
    named("SMG-42 space before the colon", post(FOUR + b"Transfer-Encoding : chunked\r\n", INSIDE)),
    named("SMG-42 tab for a space", post(FOUR + b"Transfer-Encoding:\tchunked\r\n", INSIDE)),
    named(
        "SMG-42 behind a bare LF", post(FOUR + b"X-A: a\nTransfer-Encoding: chunked\r\n", INSIDE)
    ),
    named(
        "SMG-42 name and colon on two lines",
        post(FOUR + b"Transfer-Encoding\r\n: chunked\r\n", INSIDE),
    ),
    named(
        "SMG-42 folded behind another field",
        post(FOUR + b"X-A: a\r\n\tTransfer-Encoding: chunked\r\n", INSIDE),
    ),
    named("SMG-42 capitals", post(FOUR + b"TRANSFER-ENCODING: CHUNKED\r\n", INSIDE)),
    named("SMG-43 chunked on two lines", post(CHUNKED * 2, INSIDE)),
    named(
        "SMG-44 chunked twice in a line", post(b"Transfer-Encoding: chunked, chunked\r\n", INSIDE)
    ),
    named("SMG-45 ,chunked and a length", post(FOUR + b"Transfer-Encoding: ,chunked\r\n", INSIDE)),
    named("SMG-45 chunked, and a length", post(FOUR + b"Transfer-Encoding: chunked,\r\n", INSIDE)),
    named("SMG-46 gzip, chunked", post(b"Transfer-Encoding: gzip, chunked\r\n", INSIDE)),
    named(
        "SMG-47 Transfer_Encoding and a length",
        post(b"Content-Length: 4\r\nTransfer_Encoding: chunked\r\n", b"abcd"),
    ),
    named(
        "SMG-48 Content_Length and a length",
        post(b"Content-Length: 4\r\nContent_Length: 40\r\n", b"abcd"),
    ),
    named("SMG-49 Content-Length: 4, 4", post(b"Content-Length: 4, 4\r\n", b"abcd")),
    named("SMG-50 two equal lengths", post(FOUR + FOUR, b"abcd")),
    named(
        "SMG-51 bare CR in a value",
        post(b"X-A: a\rTransfer-Encoding: chunked\r\nContent-Length: 4\r\n", b"abcd"),
    ),
    named("SMG-52 bare CR before a line end", post(b"X-A: a\r\r\nContent-Length: 4\r\n", b"abcd")),
    named(
        "SMG-53 bare LF line ends", post(b"Content-Length: 4\r\n", b"abcd").replace(b"\r\n", b"\n")
    ),
    named("SMG-54 one bare LF line end", post(b"X-A: a\nContent-Length: 4\r\n", b"abcd")),
    named(
        "SMG-54 bare LF ends the head",
        b"POST /main HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\nabcd",
    ),
    named("SMG-55 chunk size with a plus", post(CHUNKED, b"+4\r\nabcd\r\n" + END)),
    named("SMG-56 chunk size with 0x", post(CHUNKED, b"0x4\r\nabcd\r\n" + END)),
    named("SMG-57 negative chunk size", post(CHUNKED, b"-4\r\nabcd\r\n" + END)),
    named("SMG-58 chunk size with an underscore", post(CHUNKED, b"0_4\r\nabcd\r\n" + END)),
    named("SMG-59 empty chunk size line", post(CHUNKED, b"\r\nabcd\r\n" + END)),
    named("SMG-60 space before the chunk size", post(CHUNKED, b" 4\r\nabcd\r\n" + END)),
    named("SMG-60 space behind the chunk size", post(CHUNKED, b"4 \r\nabcd\r\n" + END)),
    named("SMG-61 chunk longer than its size", post(CHUNKED, b"4\r\nabcdefgh\r\n" + END)),
    named("SMG-61 chunk longer by a request", post(CHUNKED, b"4\r\nabcd" + HIDDEN + END)),
    named("SMG-62 LF alone ends a chunk", post(CHUNKED, b"4\r\nabcd\n" + END)),
    named("SMG-62 LF alone ends a chunk size", post(CHUNKED, b"4\nabcd\r\n" + END)),
    named("SMG-62 nothing ends a chunk", post(CHUNKED, b"4\r\nabcd" + END)),
    named("SMG-62 CR alone ends a chunk", post(CHUNKED, b"4\r\nabcd\r" + END)),
    named("SMG-62 any two bytes end a chunk", post(CHUNKED, b"4\r\nabcdXY0\r\n\r\n")),
    named(
        "SMG-63 bare LF in an extension hides a request (TERM.EXT)",
        post(CHUNKED, b"2;\nxx\r\n26\r\n" + END + HIDDEN + b"\r\n" + END),
    ),
    named("SMG-63 bare LF in an extension", post(CHUNKED, b"4;a\nb\r\nabcd\r\n" + END)),
    named("SMG-64 bare CR in an extension", post(CHUNKED, b"4;a\rb\r\nabcd\r\n" + END)),
    named("SMG-65 NUL in an extension", post(CHUNKED, b"4;a\x00b\r\nabcd\r\n" + END)),
    named("SMG-66 chunk size over 64 bits", post(CHUNKED, b"10000000000000004\r\nabcd\r\n" + END)),
    named(
        "SMG-73 trailer with a bare LF",
        post(CHUNKED, chunk(b"abcd") + b"0\r\nX-T: a\nX-U: b\r\n\r\n"),
    ),
    named("SMG-73 trailer section ended by LF", post(CHUNKED, chunk(b"abcd") + b"0\r\n\n")),
    named(
        "SMG-77 extension of 64 kB", post(CHUNKED, b"4;" + b"a" * 65_536 + b"\r\nabcd\r\n" + END)
    ),
    named(
        "SMG-79 chunk size of 40 zeros and a 4", post(CHUNKED, b"0" * 40 + b"4\r\nabcd\r\n" + END)
    ),
    named("SMG-87 length with leading zeros", post(b"Content-Length: 0004\r\n", b"abcd")),
    named("SMG-92 Expect of its own", post(b"Expect: 200-maybe\r\nContent-Length: 4\r\n", b"abcd")),
]


@pytest.mark.parametrize("raw", DOUBTFUL)
async def test_request_is_refused_or_forwarded_in_one_form(raw: bytes) -> None:
    """Where it is forwarded, its body is what the stricter of the two readings gives."""
    first, whole, _ = await send(raw)
    if first.status == 200:
        assert [x.target for x in whole] == [b"/main"]
        assert whole[0].body in (b"abcd", HIDDEN)
    else:
        assert first.status == 0 or 400 <= first.status <= 599
        assert whole == []


STAYS = [
    named("SMG-67 inside a chunk", post(CHUNKED, INSIDE)),
    named(
        "SMG-67 inside a chunk, as two", post(CHUNKED, chunk(HIDDEN[:3]) + chunk(HIDDEN[3:]) + END)
    ),
    named(
        "SMG-68 GET with a body",
        b"GET /main HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + HIDDEN,
    ),
    named(
        "SMG-69 OPTIONS with a body",
        b"OPTIONS /main HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + HIDDEN,
    ),
    named(
        "SMG-70 DELETE with a body",
        b"DELETE /main HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + HIDDEN,
    ),
    named(
        "SMG-71 Expect with the body at once",
        post(b"Expect: 100-continue\r\nContent-Length: 33\r\n", HIDDEN),
    ),
    named("SMG-72 Expect with chunks at once", post(b"Expect: 100-continue\r\n" + CHUNKED, INSIDE)),
    named("SMG-78 empty lines ahead of it", b"\r\n\r\n" + post(b"Content-Length: 33\r\n", HIDDEN)),
    named("SMG-80 odd case", post(b"tRANSFER-eNCODING: CHUNKed\r\n", INSIDE)),
    named(
        "SMG-82 GET with chunks", b"GET /main HTTP/1.1\r\nHost: x\r\n" + CHUNKED + b"\r\n" + INSIDE
    ),
    named(
        "SMG-88 extension of the chunk",
        post(CHUNKED, b'21;a="b";c\r\n' + HIDDEN + b"\r\n0;d\r\n\r\n"),
    ),
    named("SMG-89 blanks around the length", post(b"Content-Length: \t 33 \t\r\n", HIDDEN)),
    named(
        "SMG-90 chunk size in capitals with zeros",
        post(CHUNKED, b"0021\r\n" + HIDDEN + b"\r\n00\r\n\r\n"),
    ),
]


@pytest.mark.parametrize("raw", STAYS)
async def test_hidden_request_in_a_valid_body_stays_body(raw: bytes) -> None:
    assert len(HIDDEN) == 0x21 == 33
    first, whole, _ = await send(raw)
    assert (first.status, first.body) == (200, b"/main")
    assert [x.body for x in whole] == [HIDDEN]


async def test_smg_70_head_with_a_body_keeps_it_apart() -> None:
    raw = b"HEAD /main HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + HIDDEN
    first, whole, _ = await send(raw, "HEAD")
    if first.status == 200:
        assert [x.body for x in whole] == [HIDDEN]
    else:
        assert (400 <= first.status <= 599, whole) == (True, [])


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(b"Content-Length: 3", id="SMG-74 a length"),
        pytest.param(b"Transfer-Encoding: gzip", id="SMG-74 a coding"),
        pytest.param(b"Host: evil.example", id="SMG-74 Host"),
        pytest.param(b"Authorization: Bearer evil.example", id="SMG-74 a credential"),
    ],
)
async def test_field_in_the_trailers_never_becomes_a_header(field: bytes) -> None:
    raw = post(CHUNKED, chunk(HIDDEN) + b"0\r\n" + field + b"\r\n\r\n")
    first, whole, _ = await send(raw)
    if first.status != 200:
        assert (400 <= first.status <= 599, whole) == (True, [])
        return
    assert [x.body for x in whole] == [HIDDEN]
    assert field not in whole[0].raw_head
    assert header(whole[0].trailers, field.partition(b":")[0]) == []


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"/main%0d%0aX-Evil:%201", id="SMG-75 in the path"),
        pytest.param(
            b"/main?x=%0D%0A%0D%0A" + HIDDEN.split(b"\r")[0].replace(b" ", b"%20"),
            id="SMG-75 in the query",
        ),
        pytest.param(
            "/main\u560d\u560aX-Evil:1".encode(), id="SMG-76 characters that end in 0d and 0a"
        ),
    ],
)
async def test_smg_75_escaped_line_end_in_the_target_is_not_decoded(target: bytes) -> None:
    async with RawBackend(tell) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        if got.status != 200:
            assert (got.status, backend.requests) == (400, [])
            return
        assert got.body == target
        (received,) = backend.requests
        assert received.target == target
        assert header(received.headers, b"X-Evil") == []
        assert not any(
            b"\x0d" in name + value or b"\x0a" in name + value for name, value in received.headers
        )


async def test_smg_77_endless_chunk_extension_is_no_body() -> None:
    """Bytes that never become body keep no upload alive (CVE-2023-39326 was of that kind)."""
    async with (
        RawBackend(tell) as backend,
        proxy(backend, timeouts={"idle": 0.2}) as p,
        RawClient(p.port) as client,
    ):
        await client.send(post(CHUNKED, b"4;"))
        deadline = asyncio.get_running_loop().time() + 4
        while not client.wire.buffer and not client.wire.eof:
            assert asyncio.get_running_loop().time() < deadline
            await client.send(b"a" * 65_536)
            await asyncio.sleep(0.005)
        got = await client.response("POST")
        assert got.status in (0, 400, 408, 413)
        await eventually(lambda: p.in_flight() == 0)
        assert completed(backend) == []


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            post(b"Connection: close\r\n" + FOUR, b"abcd" + HIDDEN), id="SMG-93 Connection: close"
        ),
        pytest.param(post(FOUR, b"abcd" + HIDDEN, b"HTTP/1.0"), id="SMG-94 HTTP/1.0"),
    ],
)
async def test_bytes_behind_the_last_request_of_a_connection_are_never_run(raw: bytes) -> None:
    """RFC 9112 9.6: what follows a request with `close` is not a request."""
    async with RawBackend(tell) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(raw)
        got = await client.response("POST")
        assert (got.status, got.body) == (200, b"/main") or got.status == 400
        assert await client.closed()
        assert [x.target for x in completed(backend)] in ([b"/main"], [])


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(post(FOUR + FOUR, b"abcd" + HIDDEN), id="SMG-95 in the head"),
        pytest.param(post(CHUNKED, b"zz\r\nabcd\r\n" + END + HIDDEN), id="SMG-95 in the body"),
        pytest.param(b"GET /main HTTP/3\r\n\r\n" + HIDDEN, id="SMG-95 in the request line"),
    ],
)
async def test_smg_95_refusal_is_a_framed_error_and_ends_the_connection(raw: bytes) -> None:
    async with RawBackend(tell) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(raw.replace(b"/main", b"/v1/chat/completions"))
        got = await client.response("POST", timeout=4)
        assert (got.status, got.complete) == (400, True)
        assert ends(got)
        assert got.json["error"]["message"]
        assert b"Traceback" not in got.body
        assert b"hidden" not in got.body
        assert await client.closed()
        assert completed(backend) == []


PADDING = b'{"model": "m", "padding": "' + b"-" * 40 + b'", "prompt": "'
BY_LENGTH = PADDING + HIDDEN + b"-" * 30 + b'"}'
BASES = [
    b"POST /main HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    + b"Content-Length: %d\r\n\r\n" % len(BY_LENGTH)
    + BY_LENGTH,
    post(b"X-A: b\r\n" + CHUNKED + b"Trailer: X-T\r\n", chunk(HIDDEN) + b"0\r\nX-T: 1\r\n\r\n"),
]
BYTES = b'\x00\x01\t\n\x0b\r "+,-.0159:;=?AFX_afx\x7f\x85\xa0\xff'


def mutations(count: int, seed: int) -> list[bytes]:
    """Insert, delete or replace one byte. A request for `/hidden` is never a valid reading of one:
    no mutated length ends where it begins, and a chunk size stands before it."""
    rng = random.Random(seed)
    made = []
    for n in range(count):
        base = BASES[n % 2]
        end = base.index(HIDDEN)
        at = rng.randrange(end if n % 3 else end + len(HIDDEN))
        byte = bytes([rng.choice(BYTES)])
        made.append(base[:at] + rng.choice([byte, byte, b""]) + base[at + rng.randrange(2) :])
    return made


async def judge(port: int, raw: bytes) -> list[Answer]:
    """Send a mutation and the canary behind it; every answer on the connection is whole."""
    answers = []
    async with RawClient(port) as client:
        await client.send(raw + CANARY)
        with suppress(TimeoutError):  # it waits for the rest of a body
            while (got := await client.response("POST", timeout=0.4)).status:
                assert got.complete, (raw, got.fault)
                answers.append(got)
    return answers


async def test_smg_81_single_byte_mutations_are_forwarded_unambiguously_or_not_at_all() -> None:
    """200 mutations of two POSTs; nothing that the backend reads holds more than one message."""
    length, start = b"%d" % len(BY_LENGTH), b"%d" % len(PADDING)
    assert start not in {
        length[:at] + x + length[at + cut :]
        for at in range(4)
        for cut in (0, 1)
        for x in (b"", *(b"%d" % digit for digit in range(10)))
    }
    cases = mutations(200, seed=81)
    async with RawBackend(tell) as backend, proxy({"url": backend, "max_in_flight": 64}) as p:
        told: list[Answer] = []
        for at in range(0, len(cases), 40):
            batch = cases[at : at + 40]
            for raw, answers in zip(
                batch, await asyncio.gather(*(judge(p.port, raw) for raw in batch)), strict=True
            ):
                assert len(answers) <= 2, raw
                assert all(got.body == b"/canary" for got in answers[1:] if got.status == 200), raw
                told += answers
        await eventually(lambda: p.in_flight() == 0)
        assert 20 < sum(got.status == 200 for got in told) <= len(told) - 20
        completed(backend)
        for conn in backend.conns:
            assert not conn.wire.buffer, conn.raw
