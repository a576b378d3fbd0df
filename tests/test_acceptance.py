"""What the proxy was asked to show at the end, with scripted backends on real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from .kit import (
    CHAT,
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    blackhole,
    chat,
    chat_events,
    chunk,
    each_request,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .kit_faults import Ending, judge

SOON = 4.0  # s, in which a backend sees that its client left: before any limit of the kit's
ROLE, *TOKENS = chat_events("hello ", 20)
DOCUMENT = json_bytes(CHAT.document)
PACE = 0.005  # s between two tokens
QUIET = {"health": {"probe_interval": 300}}


# -- three backends, one of them killed under fifty streams


@dataclass
class Paced:
    """A backend whose every second stream begins at once, and all go on when `go` is set."""

    go: asyncio.Event
    begun: int = 0

    async def script(self, conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(SSE_HEAD + chunk(ROLE))
            rest = iter(TOKENS)
            if conn.number % 2:
                await conn.send(chunk(next(rest)))
                self.begun += 1
            await self.go.wait()
            for token in rest:
                await conn.send(chunk(token))
                await asyncio.sleep(PACE)
            await conn.send(LAST_CHUNK)


async def stream(client: RawClient) -> tuple[str, bool]:
    """Be one of fifty: how it ended, and whether its answer had begun."""
    async with client:
        got = await client.ask(chat(stream=True), "POST", timeout=10)
    begun = b"hello" in got.body
    if got.complete and got.body == b"".join([ROLE, *TOKENS]):
        return "complete", begun
    assert not got.complete or got.status >= 400, f"silently short: {got}"
    return "failed", begun


async def test_killed_under_fifty_streams_then_no_unbegun_answer_is_lost() -> None:
    go = asyncio.Event()
    async with AsyncExitStack() as stack:
        paced = [Paced(go) for _ in range(3)]
        fleet = [await stack.enter_async_context(RawBackend(one.script)) for one in paced]
        rows = [
            {"url": one, "price_per_second": 0.1 + number / 10, "max_in_flight": 20}
            for number, one in enumerate(fleet)
        ]
        chain = [QUIET, {"cost": {"default": "cost"}}, "capacity", "failover"]
        p = await stack.enter_async_context(proxy(*rows, middleware=chain))
        clients = [RawClient(p.port) for _ in range(50)]
        asked = [asyncio.create_task(stream(client)) for client in clients]
        await eventually(lambda: [len(one.requests) for one in fleet] == [20, 20, 10])
        await eventually(lambda: sum(b"hello" in each.wire.raw for each in clients) == 25)
        assert paced[0].begun == 10
        await fleet[0].stop()
        go.set()
        ends = Counter(await asyncio.gather(*asked))
        after = await asyncio.gather(*(stream(RawClient(p.port)) for _ in range(10)))
        lines = await p.exchanges(60)
    assert ends == {("complete", True): 40, ("failed", True): 10}, "of an answer not begun"
    assert after == [("complete", True)] * 10
    _every_attempt_is_told(lines, sum(len(one.requests) for one in fleet))


def _every_attempt_is_told(lines: list[dict[str, Any]], received: int) -> None:
    """One line an exchange; each attempt in it, the failed ones with their stage and fault."""
    assert Counter(str(told["end"]) for told in lines) == {"complete": 50, "error": 10}
    assert len({told["id"] for told in lines}) == 60
    attempts = [attempt for told in lines for attempt in told["attempts"]]
    refused = [attempt for attempt in attempts if attempt["fault"] == "refused"]
    assert len(attempts) - len(refused) == received
    moved = [told for told in lines if len(told["attempts"]) > 1]
    assert len(moved) >= 10
    for told in moved:
        first, *_, last = told["attempts"]
        assert (first["backend"], first["stage"] in ("content", "connect")) == ("b0", True)
        assert first["fault"] in ("reset", "closed", "refused")
        assert (last["backend"] in ("b1", "b2"), last["fault"]) == (True, None)
    for told in lines:
        if told["end"] == "error":
            assert [attempt["stage"] for attempt in told["attempts"]] == ["stream"]


# -- where three hundred requests go, and those that name a wish


def family(url: Any, provider: str, **more: Any) -> dict[str, Any]:
    return {"name": provider, "provider": provider, "url": url, **more}


@pytest.mark.parametrize("at_once", [1, 20])
async def test_three_hundred_without_hints_are_split_seventy_to_thirty(at_once: int) -> None:
    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            await asyncio.sleep(0)
            if not received.json["stream"]:
                await conn.send(DOCUMENT)
                continue
            await conn.send(SSE_HEAD + b"".join(map(chunk, CHAT.events)) + LAST_CHUNK)

    async def client(p: Proxy, count: int) -> None:
        async with RawClient(p.port) as one:
            for number in range(count):
                streamed = bool(number % 2)
                got = await one.ask(CHAT.request(stream=streamed), "POST")
                assert judge(got, CHAT, streamed) is Ending.COMPLETE

    async with RawBackend(script) as base, RawBackend(script) as burst, RawBackend(script) as more:
        rows = (
            family(base, "golem", max_in_flight=40),
            family(burst, "runpod", max_in_flight=40),
            family(more, "modal", max_in_flight=40, region="eu-west"),
        )
        async with proxy(*rows) as p:
            await asyncio.gather(*(client(p, 300 // at_once) for _ in range(at_once)))
            lines = await p.exchanges(300)
        assert len(base.requests) == pytest.approx(210, abs=3)
    pools = Counter(told["provider"] == "golem" for told in lines)
    assert pools[True] == pytest.approx(210, abs=3)


@dataclass
class Gates:
    """Backends that hold each request until it is let go, oldest first."""

    held: list[asyncio.Event] = field(default_factory=list)

    async def script(self, conn: BackendConn) -> None:
        async for _ in each_request(conn):
            go = asyncio.Event()
            self.held.append(go)
            await go.wait()
            await conn.send(DOCUMENT)


def wishing(way: str, cheap: bool) -> bytes:
    """One request that names its wish, by the header or in the body of `/inference`."""
    if way == "inference":
        body = {"model": "m", "prompt": "hi", "cost_priority": cheap}
        fields = [("Content-Type", "application/json")]
        return request("POST", "/inference", fields, json.dumps(body).encode())
    return chat(headers=[("X-Beacon-Cost-Priority", "true" if cheap else "false")])


@pytest.mark.parametrize("way", ["header", "inference"])
async def test_cheapest_first_then_the_next_as_each_fills_up(way: str) -> None:
    """Golem, then RunPod, then Modal, by their default prices; a freed slot is taken again."""
    async with AsyncExitStack() as stack:
        gates = {name: Gates() for name in ("modal", "golem", "runpod")}
        rows = [
            family(await stack.enter_async_context(RawBackend(gate.script)), name, max_in_flight=2)
            for name, gate in gates.items()
        ]
        p = await stack.enter_async_context(proxy(*rows))
        clients = [await stack.enter_async_context(RawClient(p.port)) for _ in range(7)]
        order: list[str] = []

        async def send(client: RawClient) -> None:
            before = {name: len(gate.held) for name, gate in gates.items()}
            await client.send(wishing(way, True))
            await eventually(lambda: sum(len(g.held) for g in gates.values()) > len(order))
            order.extend(name for name, gate in gates.items() if len(gate.held) > before[name])

        for client in clients[:6]:
            await send(client)
        assert order == ["golem"] * 2 + ["runpod"] * 2 + ["modal"] * 2
        gates["golem"].held[0].set()
        assert (await clients[0].response()).complete
        await send(clients[6])
        assert order[-1] == "golem"
        for gate in gates.values():
            for go in gate.held:
                go.set()
        answers = await asyncio.gather(*(client.response() for client in clients[1:]))
        assert [got.status for got in answers] == [200] * 6


@pytest.mark.parametrize("way", ["header", "inference"])
async def test_fastest_after_each_was_tried_once(way: str) -> None:
    waits = {"golem": 0.2, "runpod": 0.1, "modal": 0.0}
    gc.collect()  # a pause amid the three first requests would be held against one of them

    def after(seconds: float) -> Script:
        async def script(conn: BackendConn) -> None:
            async for _ in each_request(conn):
                await asyncio.sleep(seconds)
                await conn.send(DOCUMENT)

        return script

    async with AsyncExitStack() as stack:
        rows = [
            family(await stack.enter_async_context(RawBackend(after(wait))), name)
            for name, wait in waits.items()
        ]
        p = await stack.enter_async_context(proxy(*rows))
        async with RawClient(p.port) as client:
            for _ in range(12):
                assert (await client.ask(wishing(way, False), "POST")).status == 200
        used = [told["backend"] for told in await p.exchanges(12)]
    assert sorted(used[:3]) == ["golem", "modal", "runpod"]
    assert used[3:] == ["modal"] * 9


# -- a client that leaves, in each phase

Leave = Callable[[Proxy, RawClient, RawBackend], Awaitable[None]]


@dataclass(frozen=True)
class Phase:
    """What the backend says before it waits, and how the client comes to be there."""

    name: str
    said: bytes
    data: bytes
    heard: bytes = b""  # by the client, before it leaves


STREAM = chat(stream=True)
BEGUN = SSE_HEAD + chunk(ROLE)
PHASES = [
    Phase("waiting for the head", b"", STREAM),
    Phase("waiting for a document", b"", chat()),
    Phase("inside the head", SSE_HEAD[:30], STREAM),
    Phase("before the content", BEGUN, STREAM),
    Phase("streaming", BEGUN + chunk(TOKENS[0]), STREAM, b"hello "),
    Phase("inside a document", DOCUMENT[:-20], chat()),
    Phase("inside a plain answer", DOCUMENT[:-20], request("GET", "/x"), b"choices"),
    Phase("waiting for /inference", b"", wishing("inference", True)),
]


async def gone(p: Proxy, backend: RawBackend, closes: int = 1) -> None:
    """The backend saw the close in time, nothing is in flight, and the line says who left."""
    await eventually(lambda: backend.closed.count >= closes, SOON)
    await eventually(lambda: p.in_flight() == 0, SOON)
    done = await p.exchanges(closes, SOON)
    assert [told["end"] for told in done] == ["client_closed"] * closes


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
async def test_client_leaves_then_the_backend_sees_it_soon(phase: Phase, way: str) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(phase.said)
        await conn.wait_closed()

    async with RawBackend(script) as backend, RawBackend(json_answer({})) as spare:
        rows = {"url": backend}, {"url": spare, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            await client.send(phase.data)
            await eventually(lambda: backend.conns and backend.conns[0].sent == len(phase.said))
            await eventually(lambda: backend.requests)
            if phase.heard:
                await client.read_until(phase.heard)
            getattr(client, way)()
            await gone(p, backend)
        assert spare.requests == []


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_client_leaves_inside_its_upload_then_the_backend_sees_it(
    path: str, way: str
) -> None:
    async def script(conn: BackendConn) -> None:
        received = await conn.head_only()
        assert received is not None
        await conn.read_body(received)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("POST", path, [("Content-Length", str(64 << 20))]))
        for _ in range(160):
            await client.send(b"x" * 65536)
        await eventually(lambda: backend.requests and backend.requests[0].size)
        getattr(client, way)()
        await gone(p, backend)
        assert not backend.requests[0].complete


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_client_leaves_while_the_proxy_connects_then_nothing_is_in_flight(way: str) -> None:
    async with blackhole() as port:
        row = {"url": f"http://127.0.0.1:{port}"}
        async with proxy(row, timeouts={"connect": 30}) as p, RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: p.in_flight() == 1)
            getattr(client, way)()
            (told,) = await p.exchanges(1, SOON)
            assert (told["end"], p.in_flight()) == ("client_closed", 0)


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_client_leaves_the_queue_then_its_place_is_free_and_it_is_never_sent(
    way: str,
) -> None:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await go.wait()
            await conn.send(DOCUMENT)

    go = asyncio.Event()
    async with RawBackend(script) as backend:
        chain = [{"capacity": {"max_queue": 1, "queue_timeout": 5}}, "failover"]
        row = {"url": backend, "max_in_flight": 1}
        async with proxy(row, middleware=chain) as p, RawClient(p.port) as first:
            await first.send(chat())
            await eventually(lambda: backend.requests)
            async with RawClient(p.port) as queued:
                await queued.send(chat(model="never"))
                await eventually(lambda: p.app.telemetry.metrics.queue_depth == 1)
                getattr(queued, way)()
                (told,) = await p.exchanges(1, SOON)
            assert (told["end"], told["attempts"]) == ("client_closed", [])
            async with RawClient(p.port) as next_one:
                await next_one.send(chat())
                go.set()
                assert (await next_one.response()).complete
            assert (await first.response()).complete
        assert not any(b"never" in received.body for received in backend.requests)
        assert len(backend.requests) == 2
