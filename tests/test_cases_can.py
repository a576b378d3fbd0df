"""CAN: a client that leaves stops the GPU, in whatever phase it leaves.

Within 2 s the upstream connection is closed; the request is not tried again, though another backend
stands ready; the permit is back (the kit looks at the end of each test); and the one canonical line
says `client_closed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from .kit import (
    LAST_CHUNK,
    OK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    answer,
    blackhole,
    chat,
    chat_events,
    chunk,
    eventually,
    json_bytes,
    proxy,
    request,
)

SOON = 4.0  # s; by then no limit of the kit's has helped
ROLE, TOKEN, *_ = chat_events("tok", 1)
DOCUMENT = json_bytes({"choices": [{"message": {"role": "assistant", "content": "x" * 2000}}]})
NEVER_ASKED = {"provider": "openai", "region": "asia-pacific"}

either_way = pytest.mark.parametrize("way", ["close", "reset"])
ROUTES = {"plain": request("GET", "/x"), "document": chat(), "stream": chat(stream=True)}
any_route = pytest.mark.parametrize("data", ROUTES.values(), ids=ROUTES.keys())


def sends_and_waits(*parts: bytes) -> Script:
    """Answer with `parts`, then be silent until the client goes."""

    async def script(conn: BackendConn) -> None:
        while await conn.request() is not None:
            for part in parts:
                await conn.send(part)
            await conn.wait_closed()

    return script


@dataclass
class Scene:
    """A backend that takes the request, and a second one that must never be asked."""

    backend: RawBackend
    spare: RawBackend
    proxy: Proxy

    async def gone(self, count: int = 1) -> None:
        """The client has left: the upstream is closed, nothing tried again, one line told."""
        await self.backend.closed.wait(count, timeout=SOON)
        assert self.backend.open_connections == 0
        done = await self.proxy.exchanges(count, SOON)
        assert [line["end"] for line in done] == ["client_closed"] * count
        assert self.proxy.in_flight() == 0
        assert len(self.backend.requests) == count
        assert self.spare.requests == []


@asynccontextmanager
async def scene(script: Script, **row: object) -> AsyncIterator[Scene]:
    async with (
        RawBackend(script) as backend,
        RawBackend(answer(OK)) as spare,
        proxy({"url": backend, **row}, {"url": spare, **NEVER_ASKED}) as p,
    ):
        yield Scene(backend, spare, p)


@either_way
@any_route
async def test_can_01_client_leaves_before_the_response_header(data, way):
    async with scene(sends_and_waits()) as s, RawClient(s.proxy.port) as client:
        await client.send(data)
        await eventually(lambda: s.backend.requests and s.backend.requests[0].complete)
        getattr(client, way)()
        await s.gone()


@either_way
@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_can_02_client_leaves_during_its_upload(path, way):
    async with scene(sends_and_waits()) as s, RawClient(s.proxy.port) as client:
        await client.send(request("POST", path, [("Transfer-Encoding", "chunked")]))
        # Past what is kept for a replay, so that the upload has certainly begun.
        for _ in range(64):
            await client.send(chunk(b"x" * 65536))
        await eventually(lambda: s.backend.requests)
        getattr(client, way)()
        await s.gone()
        assert not s.backend.requests[0].complete


@either_way
@any_route
async def test_can_03_client_leaves_while_tokens_flow(data, way):
    """The backend goes on sending: its own writes must run into the closed connection."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        while not conn.wire.eof:
            await conn.send(chunk(TOKEN))
            await eventually(
                lambda: conn.wire.eof or not conn.wire.transport.get_write_buffer_size()
            )

    async with scene(script) as s, RawClient(s.proxy.port) as client:
        await client.send(data)
        await client.read_until(b"tok")
        await client.read_until(b"tok")
        getattr(client, way)()
        await s.gone()


@either_way
async def test_can_04_client_leaves_in_the_middle_of_a_held_document(way):
    """Nothing has been sent to the client yet, so no write to it could tell that it is gone."""
    async with scene(sends_and_waits(DOCUMENT[:1000])) as s, RawClient(s.proxy.port) as client:
        await client.send(chat())
        await eventually(lambda: s.backend.conns and s.backend.conns[0].sent == 1000)
        getattr(client, way)()
        await s.gone()


@any_route
async def test_can_05_client_resets_while_the_upstream_is_silent(data):
    script = sends_and_waits(SSE_HEAD + chunk(ROLE) + chunk(TOKEN))
    async with scene(script) as s, RawClient(s.proxy.port) as client:
        await client.send(data)
        await client.read_until(b"tok")
        client.reset()
        await s.gone()


@either_way
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(SSE_HEAD[:40], id="inside the head"),
        pytest.param(SSE_HEAD, id="after the head"),
        pytest.param(SSE_HEAD + chunk(ROLE), id="after the role chunk"),
        pytest.param(SSE_HEAD + chunk(b": queued\n\n"), id="after a comment"),
        pytest.param(SSE_HEAD + b"40\r\ndata: {", id="inside the first chunk"),
    ],
)
async def test_can_06_client_leaves_before_the_first_content(parts, way):
    async with scene(sends_and_waits(parts)) as s, RawClient(s.proxy.port) as client:
        await client.send(chat(stream=True))
        await eventually(lambda: s.backend.conns and s.backend.conns[0].sent == len(parts))
        getattr(client, way)()
        await s.gone()


@either_way
async def test_can_07_client_leaves_the_queue_and_its_place_is_free(way):
    """EXT-25 from the side of the backend: what left the queue is never asked for."""
    async with RawBackend(sends_and_waits()) as backend:
        row = {"url": backend, "max_in_flight": 1}
        middleware = [{"capacity": {"max_queue": 1, "queue_timeout": 5}}, {"failover": {}}]
        async with proxy(row, middleware=middleware) as p, RawClient(p.port) as first:
            await first.send(chat())
            await eventually(lambda: backend.requests)
            for _ in range(3):  # a place that leaked would turn the second one away with 503
                async with RawClient(p.port) as waiting:
                    await waiting.send(chat(model="never"))
                    before = len(p.events("exchange.done"))
                    assert not await waiting.closed(0.03)
                    assert waiting.wire.received == 0
                    getattr(waiting, way)()
                    await p.exchanges(before + 1, SOON)
            assert {line["end"] for line in p.events("exchange.done")} == {"client_closed"}
            backend.script = answer(OK)
            async with RawClient(p.port) as last:
                await last.send(request("GET", "/x"))
                first.close()
                got = await last.response()
                assert (got.status, got.body) == (200, b"ok")
        assert not any(b"never" in received.body for received in backend.requests)


async def test_can_08_thirty_cancelled_streams_leave_nothing_open():
    script = sends_and_waits(SSE_HEAD + chunk(ROLE) + chunk(TOKEN))
    async with scene(script, max_in_flight=40) as s:
        clients = [RawClient(s.proxy.port) for _ in range(30)]
        for client in clients:
            await client.__aenter__()
            await client.send(chat(stream=True))
        for client in clients:
            await client.read_until(b"tok")
        assert s.proxy.in_flight() == 30
        for number, client in enumerate(clients):
            client.close() if number % 2 else client.reset()
        await s.gone(30)


@either_way
async def test_can_09_client_leaves_while_the_proxy_connects(way):
    async with blackhole() as port:
        row = {"url": f"http://127.0.0.1:{port}"}
        timeouts = {"connect": 30}
        async with proxy(row, timeouts=timeouts) as p, RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: p.in_flight() == 1)
            getattr(client, way)()
            (line,) = await p.exchanges(1, SOON)
            assert line["end"] == "client_closed"
            assert p.in_flight() == 0


@either_way
async def test_can_10_client_leaves_during_its_second_request(way):
    """A connection that has answered once is watched as well as a new one."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(OK)
        await conn.request()
        await conn.wait_closed()

    async with scene(script) as s, RawClient(s.proxy.port) as client:
        assert (await client.ask(request("GET", "/x"))).body == b"ok"
        await client.send(chat())
        await eventually(lambda: len(s.backend.requests) == 2)
        getattr(client, way)()
        await s.backend.closed.wait(timeout=SOON)
        ends = [line["end"] for line in await s.proxy.exchanges(2, SOON)]
        assert ends == ["complete", "client_closed"]
        assert (len(s.backend.requests), s.spare.requests) == (2, [])


async def test_can_11_half_closed_client_gets_its_answer_or_stops_the_upstream():
    """TCP cannot tell a client that has sent all from one that left; what must not be is a hang."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        if not await conn.wait_closed(0.1):
            await conn.send(OK)
            await conn.wait_closed()

    async with scene(script) as s, RawClient(s.proxy.port) as client:
        await client.send(request("GET", "/x"))
        await eventually(lambda: s.backend.requests)
        client.finish()
        got = await client.response(timeout=SOON)
        if got.complete:
            assert got.body == b"ok"
        else:
            await s.gone()


@either_way
async def test_can_12_client_leaves_with_a_pipelined_request_behind(way):
    """Bytes that wait unread must not hide the close behind them; the second never starts."""
    async with scene(sends_and_waits()) as s, RawClient(s.proxy.port) as client:
        await client.send(chat() + request("GET", "/second"))
        await eventually(lambda: s.backend.requests)
        getattr(client, way)()
        await s.backend.closed.wait(timeout=SOON)
        await eventually(lambda: s.proxy.in_flight() == 0)
        assert [r.target for r in s.backend.requests] == [b"/v1/chat/completions"]
        assert s.spare.requests == []


async def test_can_13_client_that_leaves_after_its_answer_cancels_nothing():
    async with scene(answer(OK)) as s, RawClient(s.proxy.port) as client:
        assert (await client.ask(request("GET", "/x"))).complete
        client.reset()
        async with RawClient(s.proxy.port) as other:
            assert (await other.ask(request("GET", "/x"))).complete
        ends = [line["end"] for line in await s.proxy.exchanges(2, SOON)]
        assert ends == ["complete", "complete"]
        assert s.backend.connections == 1, "the upstream connection was kept for the next client"


@either_way
async def test_can_14_client_leaves_while_it_reads_nothing(way):
    """Both directions stand still: the close must come through though no byte moves."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(chunk(TOKEN * 500))

    async with scene(script) as s, RawClient(s.proxy.port) as client:
        client.hold()
        await client.send(chat(stream=True))
        last = -1

        def stuck() -> bool:
            nonlocal last
            before, last = last, s.backend.conns[0].sent if s.backend.conns else 0
            return 0 < before == last

        await eventually(stuck, timeout=5)
        getattr(client, way)()
        await s.gone()


async def test_can_15_one_client_leaves_and_the_other_streams_go_on():
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD + chunk(ROLE) + chunk(TOKEN))
        await eventually(lambda: conn.wire.eof or left)
        for event in chat_events("tok", 5)[2:]:
            await conn.send(chunk(event))
        await conn.send(LAST_CHUNK)

    left = False
    async with RawBackend(script) as backend, proxy(backend) as p:
        async with RawClient(p.port) as stays, RawClient(p.port) as leaves:
            for client in (stays, leaves):
                await client.send(chat(stream=True))
                await eventually(lambda: backend.conns)
            head = await stays.head()
            await leaves.read_until(b"tok")
            leaves.reset()
            await backend.closed.wait(timeout=SOON)
            left = True
            got = await stays.body(head)
        assert got.complete
        assert got.body == b"".join(chat_events("tok", 5))


@either_way
async def test_can_16_client_leaves_during_the_second_attempt(way):
    """The permit of each attempt is its own, and so is its connection."""

    async def fails(conn: BackendConn) -> None:
        await conn.request()

    async with RawBackend(fails) as first, RawBackend(sends_and_waits()) as second:
        rows = {"url": first}, {"url": second, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: second.requests)
            getattr(client, way)()
            await second.closed.wait(timeout=SOON)
            (line,) = await p.exchanges(1, SOON)
            assert line["end"] == "client_closed"
            assert p.in_flight() == 0
        assert (len(first.requests), len(second.requests)) == (1, 1)


@either_way
@pytest.mark.parametrize("stream", [False, True])
async def test_can_17_client_leaves_the_translated_route(stream, way):
    body = b'{"model": "m", "prompt": "hi", "stream": %b}' % (b"true" if stream else b"false")
    async with scene(sends_and_waits()) as s, RawClient(s.proxy.port) as client:
        await client.send(
            request("POST", "/inference", [("Content-Type", "application/json")], body)
        )
        await eventually(lambda: s.backend.requests and s.backend.requests[0].complete)
        getattr(client, way)()
        await s.gone()


async def test_can_18_stop_of_the_proxy_closes_what_still_streams():
    """Drained for as long as it may, then cut: never a clean end, and no GPU left running."""
    script = sends_and_waits(SSE_HEAD + chunk(ROLE) + chunk(TOKEN))
    async with RawBackend(script) as backend:
        async with proxy(backend, leaks=True) as p:
            client = await RawClient(p.port).__aenter__()
            await client.send(chat(stream=True))
            head = await client.head()
            await client.read_until(b"tok")
        await backend.closed.wait(timeout=SOON)
        assert p.in_flight() == 0
        got = await client.body(head)
        assert not got.complete
        await client.__aexit__(None, None, None)
