"""RTY: a retry only while nothing was shown to the client, bounded, with the same bytes each time.

The backend that fails is the cheaper one and each request asks for the cheapest first, so it is
always the first to be asked; what stands behind it is good.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat,
    chat_events,
    chat_stream,
    chunk,
    closed_port,
    each_request,
    eventually,
    header,
    json_answer,
    json_bytes,
    proxy,
    request,
)

CHEAPEST = ("X-Beacon-Cost-Priority", "true")
GOOD = {"object": "chat.completion", "choices": [{"message": {"content": "whole"}}]}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def ranked(*backends: RawBackend | str) -> list[dict[str, Any]]:
    """Rows in the order in which they are to be asked."""
    return [{"url": x, "price_per_second": 0.001 * (n + 1)} for n, x in enumerate(backends)]


def chain(**options: dict[str, Any]) -> list[dict[str, Any]]:
    """The middlewares in their usual order, with `options` of some."""
    names = ("health", "region", "cost", "capacity", "failover")
    return [{name: options.get(name, {})} for name in names]


def document(headers: Sequence[tuple[str, str]] = ()) -> bytes:
    return chat(headers=[CHEAPEST, *headers])


def stream() -> bytes:
    return chat(stream=True, headers=[CHEAPEST])


def writes(*pieces: bytes, how: str = "close") -> Script:
    """Read one request, write `pieces`, then close, reset or stay silent."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        for piece in pieces:
            await conn.send(piece)
        if how == "stay":
            await conn.wait_closed()
        else:
            getattr(conn, how)()

    return script


async def hang_up(conn: BackendConn) -> None:
    conn.close()


async def cut_off(conn: BackendConn) -> None:
    conn.reset()


def sized(head: bytes, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 " + head + b"\r\nContent-Length: %d\r\n\r\n" % size + body


JSON = b"200 OK\r\nContent-Type: application/json"
WHOLE = json.dumps(GOOD).encode()
CHUNKED_JSON = b"HTTP/1.1 " + JSON + b"\r\nTransfer-Encoding: chunked\r\n\r\n"

# What a backend may do to the request of a document; a good one stands behind it each time.
FAULTS = [
    pytest.param(writes(), id="RTY-20 closes once it was asked"),
    pytest.param(writes(how="reset"), id="RTY-20 resets once it was asked"),
    pytest.param(writes(b"HTTP/1.1 2"), id="RTY-21 closes inside the status line"),
    pytest.param(writes(b"HTTP/1.1 200 OK\r\nContent-Ty"), id="RTY-21 closes inside the head"),
    pytest.param(writes(b"what?\r\n\r\n"), id="RTY-21 speaks no HTTP"),
    pytest.param(writes(b"\x15\x03\x01\x00\x02\x02\x28"), id="RTY-21 speaks TLS"),
    pytest.param(
        writes(sized(JSON + b"\r\nContent-Length: 9", WHOLE)), id="RTY-21 gives two lengths"
    ),
    pytest.param(
        writes(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
        id="RTY-21 switches protocols unasked",
    ),
    pytest.param(writes(sized(JSON, b"", 50)), id="RTY-22 closes behind the head"),
    pytest.param(
        writes(sized(JSON, WHOLE[:9], 50)), id="RTY-22 closes inside a body with a length"
    ),
    pytest.param(writes(CHUNKED_JSON + chunk(WHOLE)), id="RTY-22 closes before the last chunk"),
    pytest.param(writes(CHUNKED_JSON + b"zz\r\n"), id="RTY-22 writes a bad chunk size"),
    pytest.param(
        writes(CHUNKED_JSON + chunk(WHOLE[:9]), how="reset"), id="RTY-22 resets inside the body"
    ),
    pytest.param(answer(sized(JSON, b"")), id="RTY-23 says nothing with 200"),
    pytest.param(
        answer(sized(b"200 OK\r\nContent-Type: text/html", b"<html>Sign in</html>")),
        id="RTY-23 is a captive portal",
    ),
    pytest.param(answer(sized(JSON, WHOLE[:-2])), id="RTY-23 cuts its JSON short"),
    pytest.param(
        json_answer({"error": {"message": "CUDA error", "type": "server_error"}}),
        id="RTY-23 says error behind a 200",
    ),
    pytest.param(json_answer({"error": "CUDA error"}), id="RTY-23 says error in Ollama's way"),
    *(
        pytest.param(json_answer({"error": {"message": "x"}}, status), id=f"RTY-24 says {status}")
        for status in (500, 502, 503, 504, 529, 429)
    ),
    pytest.param(
        json_answer({"error": {"message": "Loading model", "type": "unavailable_error"}}, 503),
        id="RTY-24 is loading its model",
    ),
    pytest.param(
        json_answer({"error": "busy"}, 503, [("Retry-After", "30")]),
        id="RTY-24 says 503 with Retry-After",
    ),
    pytest.param(writes(how="stay"), id="RTY-25 never answers"),
    pytest.param(writes(b"HTTP/1.1 200", how="stay"), id="RTY-25 stalls inside the head"),
    pytest.param(
        writes(sized(JSON, WHOLE[:9], 50), how="stay"), id="RTY-25 stalls inside the body"
    ),
    pytest.param(
        writes(b"HTTP/1.1 102 Processing\r\n\r\n", how="stay"), id="RTY-25 stalls behind a 102"
    ),
]
SHORT = {"first_content": 0.15, "document": 0.3, "idle": 0.25}


def hurried(bad: RawBackend, good: RawBackend) -> list[dict[str, Any]]:
    """As `ranked`. The short limits are those of the first alone: the second is not to be late."""
    first, second = ranked(bad, good)
    return [{**first, "timeouts": SHORT}, second]


@pytest.mark.parametrize("fault", FAULTS)
async def test_document_comes_whole_from_the_next_backend(fault: Script) -> None:
    async with (
        RawBackend(fault) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*hurried(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document(), "POST")
        assert (got.status, got.complete, got.json) == (200, True, GOOD)
        assert header(got.headers, b"X-Beacon-Attempts") == [b"2"]
        assert header(got.headers, b"X-Beacon-Backend") == [b"b1"]
        assert (len(bad.requests), len(good.requests)) == (1, 1)
        (line,) = await p.exchanges(1)
        assert (line["end"], len(line["attempts"])) == ("complete", 2)
        assert line["attempts"][0]["fault"]


@pytest.mark.parametrize("gone", [hang_up, cut_off])
async def test_rty_19_connection_that_ends_before_it_was_asked_is_passed_over(gone: Script) -> None:
    async with (
        RawBackend(gone, eager=True) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*ranked(bad, good), middleware=chain(health={"probe_interval": 0})) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document(), "POST")
        assert (got.status, got.json) == (200, GOOD)


EVENTS = chat_events("tok", 3)
ROLE = EVENTS[0]


def sse_then(*parts: bytes, how: str = "close") -> Script:
    return writes(SSE_HEAD, *map(chunk, parts), how=how)


ERROR = b'data: {"error":{"message":"out of memory","type":"server_error","code":500}}\n\n'
STREAM_FAULTS = [
    pytest.param(sse_then(), id="RTY-26 closes behind the head"),
    pytest.param(sse_then(ROLE), id="RTY-26 closes behind the role chunk"),
    pytest.param(sse_then(ROLE, how="reset"), id="RTY-26 resets behind the role chunk"),
    pytest.param(sse_then(ROLE, b'data: {"choi'), id="RTY-26 closes inside the first content"),
    pytest.param(sse_then(ROLE, b": ping\n\n"), id="RTY-26 closes behind a ping"),
    pytest.param(writes(SSE_HEAD + chunk(ROLE) + LAST_CHUNK), id="RTY-27 ends without content"),
    pytest.param(
        writes(SSE_HEAD + chunk(ROLE + b"data: [DONE]\n\n") + LAST_CHUNK),
        id="RTY-27 is done without content",
    ),
    pytest.param(writes(SSE_HEAD + LAST_CHUNK), id="RTY-27 ends without an event"),
    pytest.param(
        writes(SSE_HEAD + chunk(ERROR + b"data: [DONE]\n\n") + LAST_CHUNK),
        id="RTY-28 begins with an error",
    ),
    pytest.param(
        writes(SSE_HEAD + chunk(ROLE) + chunk(ERROR) + LAST_CHUNK),
        id="RTY-28 says error behind the role chunk",
    ),
    pytest.param(sse_then(how="stay"), id="RTY-29 stalls behind the head"),
    pytest.param(sse_then(ROLE, how="stay"), id="RTY-29 stalls behind the role chunk"),
    pytest.param(json_answer({"error": {"message": "x"}}, 500), id="RTY-29 says 500"),
]


@pytest.mark.parametrize("fault", STREAM_FAULTS)
async def test_stream_that_fails_before_its_first_content_comes_from_the_next_backend(
    fault: Script,
) -> None:
    """A head and a role chunk are no answer yet: nothing of the first backend may show."""
    async with (
        RawBackend(fault) as bad,
        RawBackend(chat_stream("good", 3)) as good,
        proxy(*hurried(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(stream(), "POST")
        assert (got.status, got.complete) == (200, True)
        assert got.body == b"".join(chat_events("good", 3))
        assert (len(bad.requests), len(good.requests)) == (1, 1)


async def test_rty_01_two_equal_backends_both_get_traffic() -> None:
    async with (
        RawBackend(answer(OK)) as one,
        RawBackend(answer(OK)) as two,
        proxy(one, two) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(20):
            assert (await client.ask(request("GET", "/x"))).status == 200
        assert len(one.requests) + len(two.requests) == 20
        assert min(len(one.requests), len(two.requests)) >= 5


async def test_rty_02_refused_connection_costs_no_client_its_answer() -> None:
    with closed_port() as dead:
        async with (
            RawBackend(json_answer(GOOD)) as good,
            proxy(*ranked(f"http://127.0.0.1:{dead}", good)) as p,
            RawClient(p.port) as client,
        ):
            for _ in range(10):
                got = await client.ask(document(), "POST")
                assert (got.status, got.json) == (200, GOOD)
            assert len(good.requests) == 10


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
async def test_rty_06_nothing_was_sent_so_any_method_goes_to_the_next(method: str) -> None:
    with closed_port() as dead:
        async with (
            RawBackend(answer(OK)) as good,
            proxy(*ranked(f"http://127.0.0.1:{dead}", good)) as p,
            RawClient(p.port) as client,
        ):
            got = await client.ask(request(method, "/files", [CHEAPEST], body=b"x"), method)
            assert (got.status, got.body) == (200, b"ok")
            assert [x.body for x in good.requests] == [b"x"]


@pytest.mark.parametrize("chunked", [True, False], ids=["RTY-03 chunked", "RTY-04 with a length"])
@pytest.mark.parametrize("size", [300_000, 6_000_000], ids=["300 kB", "above the replay cap"])
async def test_upload_is_whole_at_the_second_backend(chunked: bool, size: int) -> None:
    """The first refuses the connection while the upload is already coming in."""
    body = random.Random(3).randbytes(size)
    with closed_port() as dead:
        async with (
            RawBackend(answer(OK)) as good,
            proxy(*ranked(f"http://127.0.0.1:{dead}", good)) as p,
            RawClient(p.port) as client,
        ):
            framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
            head = request("POST", "/files", [CHEAPEST]).removesuffix(b"\r\n")
            await client.send(head + framing + b"\r\n\r\n")
            for at in range(0, size, 30_000):
                piece = body[at : at + 30_000]
                await client.send(chunk(piece) if chunked else piece)
            await client.send(LAST_CHUNK if chunked else b"")
            assert (await client.response("POST")).status == 200
            (received,) = good.requests
            assert received.complete
            assert received.body == body


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        pytest.param(None, 3, id="RTY-05 the default"),
        pytest.param(1, 1, id="RTY-05 no retry"),
        pytest.param(2, 2, id="RTY-05 one retry"),
        pytest.param(20, 4, id="RTY-05 never the same backend twice"),
    ],
)
async def test_retries_are_bounded_and_end_in_one_502(attempts: int | None, expected: int) -> None:
    options = {} if attempts is None else {"max_attempts": attempts}
    async with (
        RawBackend(writes()) as one,
        RawBackend(writes()) as two,
        RawBackend(writes()) as three,
        RawBackend(writes()) as four,
        proxy(*ranked(one, two, three, four), middleware=chain(failover=options)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document(), "POST")
        assert (got.status, got.complete) == (502, True)
        asked = [len(backend.requests) for backend in (one, two, three, four)]
        assert asked == [1] * expected + [0] * (4 - expected)
        (line,) = await p.exchanges(1)
        assert (line["end"], len(line["attempts"])) == ("error", expected)


@pytest.mark.parametrize("how", ["close", "reset", "stay"])
async def test_rty_07_no_retry_once_the_client_saw_the_head(how: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-From: first\r\nContent-Length: 50\r\n\r\n"
    async with (
        RawBackend(writes(head + b"shown", how=how)) as bad,
        RawBackend(answer(OK)) as good,
        proxy(*ranked(bad, good), timeouts=SHORT) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("GET", "/x", [CHEAPEST]))
        assert (got.status, got.complete) == (200, False)
        assert b"shown".startswith(got.body) or got.body == b"shown"
        assert len(good.requests) == 0
        assert await client.closed()


@pytest.mark.parametrize("how", ["close", "reset", "stay"])
async def test_rty_10_no_retry_once_the_client_saw_content(how: str) -> None:
    """Two halves of two answers are worse than one that breaks off."""
    async with (
        RawBackend(sse_then(*EVENTS[:2], how=how)) as bad,
        RawBackend(chat_stream("good", 3)) as good,
        proxy(*ranked(bad, good), timeouts={"idle": SHORT["idle"]}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(stream(), "POST")
        assert (got.status, got.complete) == (200, False)
        assert got.body.startswith(b"".join(EVENTS[:2]))
        assert b"good" not in got.body
        assert len(good.requests) == 0


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 2", sized(b"500 Oops", b"broke")])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_rty_08_request_with_side_effects_is_sent_once(method: str, reply: bytes) -> None:
    """RFC 9110 9.2.2: the backend may have run it, so nobody else may be asked."""
    async with (
        RawBackend(writes(reply)) as bad,
        RawBackend(answer(OK)) as good,
        proxy(*ranked(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request(method, "/files", [CHEAPEST], body=b"x"), method)
        assert got.status == (500 if b"500" in reply else 502)
        assert got.complete
        assert (len(bad.requests), len(good.requests)) == (1, 0)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 2", sized(b"503 Busy", b"later")])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_rty_09_idempotent_request_goes_to_the_next(method: str, reply: bytes) -> None:
    if method == "HEAD":
        reply = reply.removesuffix(b"later")
    async with (
        RawBackend(writes(reply)) as bad,
        RawBackend(answer(OK if method != "HEAD" else OK[:-2])) as good,
        proxy(*ranked(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        body = b"x" if method in ("PUT", "DELETE") else None
        got = await client.ask(request(method, "/files/1", [CHEAPEST], body=body), method)
        assert got.status == 200
        assert (len(bad.requests), len(good.requests)) == (1, 1)


@pytest.mark.parametrize("status", [400, 401, 403, 409, 413, 415, 422])
async def test_rty_12_fault_of_the_caller_is_no_reason_to_ask_another(status: int) -> None:
    async with (
        RawBackend(json_answer({"error": {"message": "no"}}, status)) as first,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*ranked(first, good)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document(), "POST")
        assert (got.status, got.json) == (status, {"error": {"message": "no"}})
        assert header(got.headers, b"X-Beacon-Attempts") == [b"1"]
        assert len(good.requests) == 0


async def test_rty_13_last_answer_of_a_backend_is_relayed_as_it_is() -> None:
    """Where all fail, the client gets a backend's own words, not ours about them."""
    first = {"error": {"message": "first"}}
    last = {"error": {"message": "last", "code": "its_own"}}
    async with (
        RawBackend(json_answer(first, 500)) as one,
        RawBackend(json_answer(last, 503, [("Retry-After", "7")])) as two,
        proxy(*ranked(one, two)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document(), "POST")
        assert (got.status, got.json) == (503, last)
        assert header(got.headers, b"Retry-After") == [b"7"]
        assert header(got.headers, b"X-Beacon-Attempts") == [b"2"]


BODIES = [
    pytest.param(
        b'{ "model":"m",\n\t"messages" : [ ] , "x":1e400, "x":"\\u00e9\xc3\xa9" }\r\n',
        "application/json",
        id="RTY-11 JSON as it was written",
    ),
    pytest.param(
        gzip.compress(b'{"model":"m"}', mtime=0), "application/json", id="RTY-11 compressed"
    ),
    pytest.param(
        b'{"model":"m","image":"' + b"A" * 900_000 + b'"}', "application/json", id="RTY-11 900 kB"
    ),
    pytest.param(random.Random(11).randbytes(50_000), "multipart/x", id="RTY-11 any bytes"),
]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("body", "kind"), BODIES)
async def test_every_attempt_gets_the_same_bytes(body: bytes, kind: str, chunked: bool) -> None:
    fields = [
        CHEAPEST,
        ("Content-Type", kind),
        ("Authorization", "Bearer of-the-client"),
        ("X-A", "1"),
        ("x-a", " 2"),
    ]
    if body.startswith(b"\x1f\x8b"):
        fields.append(("Content-Encoding", "gzip"))
    async with (
        RawBackend(writes()) as one,
        RawBackend(writes(how="reset")) as two,
        RawBackend(json_answer(GOOD)) as three,
        proxy(*ranked(one, two, three)) as p,
        RawClient(p.port) as client,
    ):
        raw = request("POST", "/v1/chat/completions", fields, body, chunked=chunked)
        assert (await client.ask(raw, "POST")).status == 200
        received = [x for backend in (one, two, three) for x in backend.requests]
        assert len(received) == 3
        assert all(x.complete and x.body == body for x in received)
        heads = {tuple(f for f in x.headers if f[0].lower() != b"host") for x in received}
        assert len(heads) == 1


async def test_rty_30_body_above_the_replay_cap_is_sent_once_and_the_client_told() -> None:
    """Past the cap only the replay is lost: the client gets a clear 502 and no half answer."""
    body = b'{"model":"m","image":"' + b"A" * 6_000_000 + b'"}'
    async with (
        RawBackend(writes()) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*ranked(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        raw = request("POST", "/v1/chat/completions", [CHEAPEST], body)
        got = await client.ask(raw, "POST")
        assert got.complete
        if got.status == 200:
            assert [x.body == body for x in good.requests] == [True]
        else:
            assert (got.status, good.requests) == (502, [])


def racing(*, closes_at: int, how: str = "close", only_first: bool = True) -> Script:
    """Answer on each connection until request number `closes_at` was read on it; end it there."""

    async def script(conn: BackendConn) -> None:
        count = 0
        async for _ in each_request(conn):
            count += 1
            if count == closes_at and (conn.number == 1 or not only_first):
                getattr(conn, how)()
                return
            await conn.send(json_bytes(GOOD))

    return script


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(request("GET", "/x"), id="RTY-14 GET"),
        pytest.param(request("PUT", "/x", body=b"y"), id="RTY-14 PUT"),
        pytest.param(chat(), id="RTY-14 inference"),
        pytest.param(
            request("POST", "/v1/chat/completions", body=b'{"model":"m"}', chunked=True),
            id="RTY-14 inference, chunked",
        ),
    ],
)
async def test_keep_alive_race_is_run_again_on_a_fresh_connection(raw: bytes, how: str) -> None:
    """The backend closed the idle connection as the request was on its way: nobody's fault."""
    async with (
        RawBackend(racing(closes_at=2, how=how)) as backend,
        proxy(backend, middleware=chain(health={"consecutive_failures": 1})) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            got = await client.ask(raw, "POST")
            assert (got.status, got.json, got.complete) == (200, GOOD, True)
        assert backend.connections == 2
        assert len(backend.requests) == 4
        assert len({x.body for x in backend.requests}) == 1
        (candidate,) = p.app.fleet.candidates()
        assert (candidate.live.success, candidate.live.healthy) == (1.0, True)


async def test_rty_15_race_is_run_again_once_only() -> None:
    """A backend that closes on every connection is broken, not unlucky."""
    broken = False

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            if broken:
                return
            await conn.send(json_bytes(GOOD))

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(chat(), "POST")).status == 200
        broken = True
        got = await client.ask(chat(), "POST")
        assert (got.status, got.complete) == (502, True)
        assert len(backend.requests) == 3


async def test_rty_16_request_with_side_effects_never_runs_twice_in_the_race() -> None:
    async with (
        RawBackend(racing(closes_at=2)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(request("GET", "/x"))).status == 200
        got = await client.ask(request("POST", "/files", body=b"once"), "POST")
        assert got.status in (200, 502)
        assert [x.method for x in backend.requests] == ["GET", "POST"]


@pytest.mark.parametrize(
    "raw", [request("GET", "/x"), request("POST", "/files", body=b"y"), chat()]
)
async def test_rty_17_connection_that_was_closed_while_idle_is_not_used(raw: bytes) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(json_bytes(GOOD))
        if conn.number == 1:
            conn.close()
        else:
            await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(request("GET", "/x"))).status == 200
        await eventually(lambda: backend.conns[0].wire.lost)
        assert (await client.ask(raw, "POST")).status == 200
        assert len(backend.requests) == 2


async def test_rty_18_answer_that_began_on_a_reused_connection_is_not_run_again_there() -> None:
    """One byte of an answer, and it is no race any more."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(json_bytes(GOOD))
        await conn.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Le")

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(chat(), "POST")).status == 200
        assert (await client.ask(chat(), "POST")).status == 502
        assert len(backend.requests) == 2


async def test_rty_31_deadline_of_the_client_is_over_all_attempts() -> None:
    async with (
        RawBackend(writes(how="stay")) as one,
        RawBackend(writes(how="stay")) as two,
        proxy(*hurried(one, two)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(document([("X-Beacon-Timeout", "1.5")]), "POST")
        assert got.status == 504
        (line,) = await p.exchanges(1)
        faults = [attempt["fault"] for attempt in line["attempts"]]
        assert faults == ["timeout", "deadline"], "the second had what the first left of it"
        assert 1.4 < line["duration_s"] < 4


async def test_rty_32_attempt_that_was_given_up_is_cancelled_at_its_backend() -> None:
    """A GPU must not go on working for an answer that nobody waits for."""
    async with (
        RawBackend(writes(how="stay")) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*hurried(bad, good)) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(document(), "POST")).status == 200
        await bad.closed.wait(timeout=4)
        assert bad.open_connections == 0


async def test_rty_33_client_that_left_ends_the_attempts() -> None:
    async with (
        RawBackend(writes(how="stay")) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(*ranked(bad, good)) as p,
    ):
        async with RawClient(p.port) as client:
            await client.send(document())
            await eventually(lambda: bad.requests)
        await bad.closed.wait(timeout=4)  # no limit of the backend's is as near
        (line,) = await p.exchanges(1)
        assert line["end"] == "client_closed"
        assert len(good.requests) == 0


async def test_rty_34_ten_at_once_each_get_their_own_whole_answer() -> None:
    """Every first attempt dies at the same time; no answer is lost, doubled or mixed up."""

    async def own(conn: BackendConn) -> None:
        async for received in each_request(conn):
            await conn.send(json_bytes({"echo": received.json["messages"]}))

    async def one(port: int, n: int) -> Answer:
        body = json.dumps({"model": "m", "messages": [n]}).encode()
        async with RawClient(port) as client:
            return await client.ask(
                request("POST", "/v1/chat/completions", [CHEAPEST], body), "POST"
            )

    async with (
        RawBackend(writes()) as bad,
        RawBackend(own) as good,
        proxy(*[{**row, "max_in_flight": 10} for row in ranked(bad, good)]) as p,
    ):
        answers = await asyncio.gather(*(one(p.port, n) for n in range(10)))
        assert [x.json for x in answers] == [{"echo": [n]} for n in range(10)]
        assert len(good.requests) == 10
