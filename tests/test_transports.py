"""What a provider may do beside HTTP as it comes: carry a request by itself, hop, add, refuse.

The providers here are small plugins of the tests: what is tested is the core around them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import aiohttp
import pytest

from beacon_proxy.contracts import (
    Backend,
    Exchange,
    Fault,
    Headers,
    Hop,
    Reply,
    Submission,
)
from providers.openai import OpenAI

from .kit import (
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chat_stream,
    each_request,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .kit_proxy import TIMEOUTS
from .test_garbage import asked, left_over

SSE = ((b"Content-Type", b"text/event-stream"),)
JSON = ((b"Content-Type", b"application/json"),)
ANSWER = {"choices": [{"message": {"content": "carried"}, "finish_reason": "stop"}]}
Work = Callable[[Submission, Reply], Awaitable[None]]


class Carrying(OpenAI):
    """A provider whose every backend is reached by `work`."""

    name = "carrying"
    cold_start = 3.0
    stays_warm = 60.0
    work: ClassVar[Work]
    cancelled: ClassVar[list[str]]

    def carries(self, backend: Backend) -> bool:
        return True

    async def carry(
        self,
        backend: Backend,
        submission: Submission,
        reply: Reply,
        session: aiohttp.ClientSession,
    ) -> None:
        try:
            await type(self).work(submission, reply)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)  # as a request to the job's address would take
            type(self).cancelled.append(submission.id)
            raise

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> None:
        return None


def named(got: Answer, name: str) -> str | None:
    """The one value of a field; None where it is not there."""
    values = got.header(name)
    assert len(values) <= 1
    return values[0].decode() if values else None


@asynccontextmanager
async def carried(work: Work, *others: Any, **overrides: Any) -> Any:
    """A proxy before one carried backend, `b0`, and others."""
    kind = type("Kind", (Carrying,), {"work": staticmethod(work), "cancelled": []})
    row = {"provider": "carrying", "url": "http://127.0.0.1:9"}
    async with proxy(row, *others, providers={"carrying": kind}, **overrides) as running:
        yield running, kind


def document(obj: Any, status: int = 200, headers: Headers = JSON) -> Work:
    async def work(submission: Submission, reply: Reply) -> None:
        reply.head(status, headers)
        reply.piece(json.dumps(obj).encode())
        reply.end()

    return work


async def test_carry_when_it_brings_a_document_the_client_gets_it_as_an_answer() -> None:
    seen: list[Submission] = []

    async def work(submission: Submission, reply: Reply) -> None:
        seen.append(submission)
        await document(ANSWER)(submission, reply)

    async with carried(work) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat(model="héllo"))
        assert (got.status, json.loads(got.body)) == (200, ANSWER)
        assert named(got, "x-beacon-backend") == "b0"
        again = await client.ask(chat())  # the connection serves on
        assert again.status == 200
        done = await p.exchanges(2)
    assert [each["end"] for each in done] == ["complete", "complete"]
    assert seen[0].method == "POST"
    assert seen[0].path == "/v1/chat/completions"
    assert json.loads(seen[0].body)["model"] == "héllo"
    assert not seen[0].stream


async def test_carry_when_it_streams_each_piece_goes_out_as_it_comes() -> None:
    events, go = chat_events("one two", 2), asyncio.Event()

    async def work(submission: Submission, reply: Reply) -> None:
        assert submission.stream
        reply.head(200, SSE)
        for number, piece in enumerate(events):
            if number == 2:
                await go.wait()
            await reply.room()
            reply.piece(piece)
        reply.end()

    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(chat(stream=True))
        await client.read_until(events[1])
        assert p.in_flight() == 1
        go.set()
        rest = await client.read_until(b"0\r\n\r\n")
        assert events[-1] in rest
        (done,) = await p.exchanges(1)
    assert done["end"] == "complete"


@pytest.mark.parametrize("headed", [False, True])
async def test_carry_when_the_client_leaves_the_task_is_cancelled_and_cleans_up(
    headed: bool,
) -> None:
    begun = asyncio.Event()

    async def work(submission: Submission, reply: Reply) -> None:
        if headed:
            reply.head(200, SSE)
            reply.piece(chat_events("hi", 1)[0])
        begun.set()
        await asyncio.Event().wait()

    async with carried(work) as (p, kind):
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await begun.wait()
        await eventually(lambda: kind.cancelled)
        (done,) = await p.exchanges(1)
        await eventually(lambda: len(p.app._carriers) == 0)
    assert done["end"] == "client_closed"


async def test_carry_when_the_process_stops_its_cleaning_up_is_waited_for() -> None:
    begun = asyncio.Event()

    async def work(submission: Submission, reply: Reply) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with carried(work, leaks=True) as (p, kind), RawClient(p.port) as client:
        await client.send(chat())
        await begun.wait()
        await p.app.stop(0)
        assert len(kind.cancelled) == 1


@pytest.mark.parametrize(
    ("what", "status", "fault"),
    [
        ("fail", 502, "reset"),
        ("timeout", 504, "timeout"),
        ("raise", 502, "malformed"),
        ("nothing", 502, "closed"),
        ("limit", 504, "timeout"),
    ],
)
async def test_carry_when_there_is_no_answer_the_next_candidate_is_asked(
    what: str, status: int, fault: str
) -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        if what == "fail":
            reply.fail(Fault.RESET, "gone")
        elif what == "timeout":
            reply.fail(Fault.TIMEOUT, "late")
        elif what == "raise":
            raise KeyError("a bug")
        elif what == "limit":
            await asyncio.Event().wait()

    quick = {"document": 0.2, "first_content": 0.2, "cold_start": 0}
    async with carried(work, timeouts=quick) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat())
        assert got.status == status
        (done,) = await p.exchanges(1)
        assert [each["fault"] for each in done["attempts"]] == [fault]
        assert bool(p.events("carry.failed")) == (what == "raise")
    async with (
        RawBackend(json_answer(ANSWER)) as good,
        carried(work, {"url": good, "timeouts": TIMEOUTS}, timeouts=quick) as (p, _),
        RawClient(p.port) as client,
    ):
        for _ in range(2):  # whichever comes first, the other answers in the end
            got = await client.ask(chat())
            assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")


async def test_carry_when_it_breaks_off_after_content_the_stream_is_visibly_broken() -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        reply.head(200, SSE)
        reply.piece(chat_events("some words", 2)[0] + chat_events("some words", 2)[1])
        await asyncio.sleep(0)
        reply.fail(Fault.RESET, "the worker died")

    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(chat(stream=True))
        got = await client.read_all()
        (done,) = await p.exchanges(1)
    assert b'"error"' in got
    assert not got.endswith(b"0\r\n\r\n")
    assert done["end"] == "error"


async def test_carry_when_an_error_status_comes_it_is_judged_like_any_other() -> None:
    refused = {"error": {"message": "no such thing", "type": "invalid_request_error"}}
    async with carried(document(refused, 400)) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat())
        assert (got.status, json.loads(got.body)) == (400, refused)
    busy = ((b"Retry-After", b"7"), *JSON)
    async with carried(document({"error": "full"}, 429, busy)) as (p, _):
        async with RawClient(p.port) as client:
            got = await client.ask(chat())
        assert (got.status, named(got, "retry-after")) == (429, "7")
        (live,) = [c.live for c in p.app.fleet.candidates()]
        assert live.resting_until > 0
        assert live.success == 1.0


async def test_carry_when_a_field_would_end_its_line_nothing_of_it_reaches_the_client() -> None:
    bad = ((b"X-Note", b"a\r\nSet-Cookie: stolen"), *JSON)
    async with carried(document(ANSWER, 200, bad)) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat())
    assert got.status == 502
    assert b"stolen" not in got.body


async def test_carry_when_it_names_a_length_or_a_framing_the_pieces_decide() -> None:
    lying = ((b"Content-Length", b"3"), (b"Transfer-Encoding", b"gzip"), *JSON)
    async with carried(document(ANSWER, 200, lying)) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat())
    assert json.loads(got.body) == ANSWER
    assert got.header("content-length") == []
    assert got.framing == "chunked"


async def test_carry_when_the_client_is_slow_room_holds_the_provider_back() -> None:
    sent = 0

    async def work(submission: Submission, reply: Reply) -> None:
        nonlocal sent
        reply.head(200, SSE)
        event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 65536)
        for _ in range(400):
            await reply.room()
            reply.piece(event)
            sent += 1
            await asyncio.sleep(0)
        reply.piece(b'data: {"choices":[{"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
        reply.end()

    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(chat(stream=True))
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 400  # 26 MB do not lie in our memory
        await client.read_until(b"[DONE]\n\n")
        await eventually(lambda: sent == 400)


async def test_carry_when_it_says_that_the_backend_wakes_the_longer_limit_holds() -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        reply.waking()
        await asyncio.sleep(0.6)
        reply.started_cold(0.5)
        await document(ANSWER)(submission, reply)

    limits = {"timeouts": {"document": 0.2, "first_content": 0.2, "cold_start": 5}}
    async with carried(work, **limits) as (p, _), RawClient(p.port) as client:
        (candidate,) = p.app.fleet.candidates()
        candidate.live.learn_warmth(type(candidate.live.warmth).WARM, float("inf"))
        got = await client.ask(chat())
        assert got.status == 200
        told = json.loads((await client.ask(request("GET", "/providers"))).body)["providers"][0]
    assert told["warmth"] == "warm"
    assert told["cold_start_p50"] == 0.5


# -- hop ---------------------------------------------------------------------------------------


class Hopping(OpenAI):
    """Follows a 303 to where it says, and asks again after a 503 that says `warming`."""

    name = "hopping"
    cold_start = 3.0

    def hop(
        self, backend: Backend, status: int, headers: Headers, body: bytes, target: bytes, hops: int
    ) -> Hop | None:
        if status == 303:
            return Hop({n.lower(): v for n, v in headers}[b"location"])
        return Hop(None, 0.02) if status == 503 and b"warming" in body else None

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        return Fault.LOADING if status == 503 and b"warming" in body else None

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> None:
        return None


def hopping(backend: RawBackend, **more: Any) -> dict[str, Any]:
    return {"provider": "hopping", "url": backend.url, **more}


HOPS: dict[str, type] = {"hopping": Hopping}
SEE_OTHER = b"HTTP/1.1 303 See Other\r\nLocation: /result?id=1\r\nContent-Length: 0\r\n\r\n"
WARMING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 7\r\n\r\nwarming"


async def test_hop_when_the_answer_is_elsewhere_it_is_fetched_from_there_by_get() -> None:
    async def script(conn: BackendConn) -> None:
        async for got in each_request(conn):
            first = got.method == "POST" or len(backend.requests) < 3
            await conn.send(SEE_OTHER if first else json_bytes(ANSWER))

    async with RawBackend(script) as backend:
        row = hopping(backend, api_key="ours")
        async with proxy(row, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[("X-Team", "research"), ("Cookie", "a=b")]))
            assert (got.status, json.loads(got.body)) == (200, ANSWER)
            assert named(got, "x-beacon-attempts") == "1"
        asked = backend.requests
    assert [r.method for r in asked] == ["POST", "GET", "GET"]
    for each in asked[1:]:
        assert each.target == b"/result?id=1"
        assert each.body == b""
        assert each.header("authorization") == [b"Bearer ours"]
        assert each.header("x-team") == [b"research"]
        assert each.header("content-type") == []
        assert each.header("content-length") == []


async def test_hop_when_the_connection_breaks_while_waiting_the_work_is_not_done_twice() -> None:
    async def script(conn: BackendConn) -> None:
        async for got in each_request(conn):
            if got.method == "POST":
                await conn.send(SEE_OTHER)
            elif sum(r.method == "GET" for r in backend.requests) < 3:
                conn.reset()
                return
            else:
                await conn.send(json_bytes(ANSWER))

    async with RawBackend(script) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend), {"url": other.url, "region": "eu-west"})
        async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[("X-Beacon-Region", "us-east")]))
            assert (got.status, named(got, "x-beacon-backend")) == (200, "b0")
        assert [r.method for r in backend.requests] == ["POST", "GET", "GET", "GET"]
        assert other.requests == []


async def test_hop_when_it_warms_and_nobody_else_is_warm_it_is_asked_until_it_answers() -> None:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(WARMING if len(backend.requests) < 4 else json_bytes(ANSWER))

    async with RawBackend(script) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat())
            assert (got.status, named(got, "x-beacon-attempts")) == (200, "1")
        bodies = {r.body for r in backend.requests}
        assert len(backend.requests) == 4
        assert len(bodies) == 1


async def test_hop_when_it_warms_and_another_is_warm_that_one_answers_without_a_strike() -> None:
    async with RawBackend(json_answer(ANSWER)) as good:

        async def script(conn: BackendConn) -> None:
            async for _ in each_request(conn):
                await conn.send(WARMING)

        async with RawBackend(script) as cold:
            rows = (hopping(cold), {"url": good.url, "region": "eu-west"})
            async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
                got = await client.ask(chat(headers=[("X-Beacon-Region", "us-east")]))
                assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")
                one = p.app.fleet.candidates()[0].live
                assert (one.warmth, one.success) == ("warming", 1.0)
            assert len(cold.requests) == 1


async def test_hop_when_the_limit_runs_out_the_last_answer_stands() -> None:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(WARMING)

    limits = {"first_content": 0.2, "cold_start": 0.3}
    async with RawBackend(script) as backend:
        one = proxy(hopping(backend), providers=HOPS, timeouts=limits)
        async with one as p, RawClient(p.port) as client:
            got = await client.ask(chat())
        assert (got.status, got.body) == (503, b"warming")
        assert len(backend.requests) > 2


async def test_hop_when_the_client_leaves_during_the_wait_nothing_more_is_asked() -> None:
    async def script(conn: BackendConn) -> None:
        async for got in each_request(conn):
            if got.method == "POST":
                await conn.send(SEE_OTHER)

    async with RawBackend(script) as backend, proxy(hopping(backend), providers=HOPS) as p:
        async with RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: len(backend.requests) == 2)
        (done,) = await p.exchanges(1)
        assert done["end"] == "client_closed"
        await eventually(lambda: backend.open_connections == 0)


async def test_hop_when_a_request_may_not_be_repeated_a_503_is_its_answer() -> None:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(WARMING)

    async with RawBackend(script) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(request("POST", "/deed", body=b"{}"))
        assert got.status == 503
        assert len(backend.requests) == 1


# -- fields, takes, wakes ----------------------------------------------------------------------


class Choosy(OpenAI):
    """Takes OpenAI's dialect alone, names the exchange, and would be woken by a check."""

    name = "choosy"
    checks: ClassVar[int]

    def takes(self, backend: Backend, exchange: Exchange) -> bool:
        return exchange.path.startswith("/v1/")

    def fields(self, backend: Backend, exchange: Exchange) -> Headers:
        return ((b"Accept", b"text/event-stream"),) if exchange.stream else ()

    def wakes(self, backend: Backend) -> bool:
        return True

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> None:
        type(self).checks += 1


async def test_takes_when_a_backend_cannot_take_a_request_another_gets_it_always() -> None:
    kind = type("Kind", (Choosy,), {"checks": 0})
    ollama = json_bytes({"message": {"content": "hi"}, "done": True})

    async def both(conn: BackendConn) -> None:
        async for got in each_request(conn):
            await conn.send(ollama if got.target == b"/api/chat" else json_bytes(ANSWER))

    async with RawBackend(json_answer(ANSWER)) as one, RawBackend(both) as other:
        rows = ({"provider": "choosy", "url": one.url}, other)
        async with proxy(*rows, providers={"choosy": kind}) as p, RawClient(p.port) as client:
            body = json.dumps({"model": "m", "messages": [], "stream": False}).encode()
            for _ in range(4):
                got = await client.ask(request("POST", "/api/chat", body=body))
                assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")
        assert one.requests == []
        async with proxy(rows[0], providers={"choosy": kind}) as p, RawClient(p.port) as client:
            got = await client.ask(request("POST", "/api/chat", body=body))
            assert (got.status, got.json["error"]) == (503, "no backend takes POST /api/chat")


async def test_fields_when_they_are_added_they_replace_the_clients_of_that_name() -> None:
    kind = type("Kind", (Choosy,), {"checks": 0})
    async with RawBackend(chat_stream("hi", 1)) as backend:
        row = {"provider": "choosy", "url": backend.url, "headers": {"X-Team": "a"}}
        async with proxy(row, providers={"choosy": kind}) as p, RawClient(p.port) as client:
            got = await client.ask(chat(stream=True, headers=[("Accept", "*/*")]))
            assert got.status == 200
        (seen,) = backend.requests
    assert seen.header("accept") == [b"text/event-stream"]
    assert seen.header("x-team") == [b"a"]


async def test_wakes_when_a_check_would_start_it_only_a_warm_one_is_checked() -> None:
    kind = type("Kind", (Choosy,), {"checks": 0})
    health = [{"health": {"probe_interval": 0.05}}, "capacity"]
    async with RawBackend(json_answer(ANSWER)) as backend:
        row = {"provider": "choosy", "url": backend.url, "stays_warm": 60}
        async with proxy(row, providers={"choosy": kind}, middleware=health) as p:
            await asyncio.sleep(0.3)
            assert kind.checks == 0
            async with RawClient(p.port) as client:
                assert (await client.ask(chat())).status == 200
            await eventually(lambda: kind.checks > 0)


# -- what is left behind -----------------------------------------------------------------------


async def _warmed(conn: BackendConn) -> None:
    async for got in each_request(conn):
        await conn.send(SEE_OTHER if got.method == "POST" else json_bytes(ANSWER))


async def test_garbage_when_a_carried_or_hopping_exchange_has_ended_is_none() -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        if submission.stream:
            reply.fail(Fault.RESET, "gone")
        else:
            await document(ANSWER)(submission, reply)

    async with carried(work) as (p, _):
        assert await left_over(p, asked(chat())) == {}
        assert await left_over(p, asked(chat(stream=True), 502)) == {}
    async with RawBackend(_warmed) as backend, proxy(hopping(backend), providers=HOPS) as p:
        assert await left_over(p, asked(chat())) == {}


async def test_start_when_the_answer_says_so_counts_as_one_though_nothing_was_known() -> None:
    """The first start of every backend was booked as the latency of its answers."""

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(WARMING if len(backend.requests) < 3 else json_bytes(ANSWER))

    async with (
        RawBackend(script) as backend,
        proxy(hopping(backend), providers=HOPS) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        (live,) = [c.live for c in p.app.fleet.candidates()]
        assert len(live.cold_starts) == 1
        assert live.latency is None
        assert (await client.ask(chat())).status == 200
        assert len(live.cold_starts) == 1
        assert live.latency is not None
