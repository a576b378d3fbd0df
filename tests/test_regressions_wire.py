"""Faults that a review found on the wire, each held down by the test that would have shown it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

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
    Wire,
    chat,
    chat_events,
    chunk,
    each_request,
    eventually,
    proxy,
    request,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = 8 << 20  # bytes after which an endless answer ends all the same, so that a test does
UPGRADE = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")]
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


def small_buffers(p: Proxy) -> None:
    """Give the proxy's client sockets a small send buffer: they inherit the listener's."""
    listener = p.app._server.sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)


@asynccontextmanager
async def stalled(p: Proxy) -> AsyncIterator[RawClient]:
    """A client with a small receive buffer that reads nothing until told to."""
    small_buffers(p)
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", p.port))
    client = RawClient(p.port)
    _, client.wire = await loop.create_connection(Wire, sock=sock)
    client.hold()
    try:
        yield client
    finally:
        client.wire.transport.abort()
        client.wire.closing = True
        await asyncio.sleep(0)


async def settled(number: Callable[[], int], still: float = 0.3, timeout: float = 4.0) -> int:  # noqa: ASYNC109
    """`number()` once it has not changed for `still` s, or what it is after `timeout` s."""
    deadline = time.monotonic() + timeout
    last, since = number(), time.monotonic()
    while (now := time.monotonic()) < deadline and now - since < still:
        await asyncio.sleep(0.01)
        if number() != last:
            last, since = number(), time.monotonic()
    return last


def narrow(conn: BackendConn) -> None:
    """Keep the kernel from taking megabytes that the proxy has not read."""
    sock = conn.wire.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)


def endless(head: bytes, piece: bytes, end: bytes = b"") -> Script:
    """`piece` over and over, at the reader's pace."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        narrow(conn)
        await conn.send(head)
        for _ in range(ENDLESS // len(piece)):
            await conn.send(piece)
        await conn.send(end)
        await conn.wait_closed()

    return script


def sent(backend: RawBackend) -> int:
    return sum(conn.sent for conn in backend.conns)


async def test_held_stream_when_its_beginning_fills_the_client_is_not_read_on() -> None:
    """The commit wrote what was held, that paused the backend, and the commit resumed it."""
    role, said, *_ = chat_events("x" * 300_000, 1)  # held until whole
    script = endless(SSE_HEAD + chunk(role), chunk(said))
    async with RawBackend(script) as backend, proxy(backend) as p, stalled(p) as client:
        await client.send(chat(stream=True))
        await eventually(lambda: sent(backend) > 300_000)
        assert await settled(lambda: sent(backend)) < 4_000_000
        client.reset()
        await backend.closed.wait()


async def test_pipelined_requests_when_the_client_reads_nothing_are_not_all_buffered() -> None:
    """Each answer after the first began with a full client and never paused its backend."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000

    async def script(conn: BackendConn) -> None:
        narrow(conn)
        async for _ in each_request(conn):
            await conn.send(raw)

    async with RawBackend(script) as backend, proxy(backend) as p, stalled(p) as client:
        await client.send(request("GET", "/big") * 30)
        await eventually(lambda: sent(backend) > 0)
        assert await settled(lambda: sent(backend)) < 4_000_000
        client.reset()
        await eventually(lambda: p.in_flight() == 0)


def waiting_for(p: Proxy) -> int:
    """Bytes that wait in the proxy for its one client."""
    (connection,) = p.app._http.connections
    return int(connection.transport.get_write_buffer_size())


async def test_last_chunk_when_it_fills_the_client_leaves_the_pooled_connection_reading() -> None:
    """The write of the last chunk paused a backend connection that lay in the pool already."""
    high_water = 64 << 10
    running: list[Proxy] = []

    async def fill(conn: BackendConn) -> None:
        """Bring the proxy's buffer, byte for byte, to where five more are too many."""
        p = running[0]
        await conn.send(CHUNKED)
        while await settled(lambda: waiting_for(p), 0.05) < 50_000:
            await conn.send(chunk(b"x" * 4000))
        left = high_water - 2 - await settled(lambda: waiting_for(p), 0.05)
        await conn.send(chunk(b"x" * (left - len(chunk(b"x" * left)) + left)))
        await eventually(lambda: waiting_for(p) == high_water - 2)
        await conn.send(LAST_CHUNK)

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            if received.target == b"/full":
                await fill(conn)
            else:
                await conn.send(OK)

    limits = {"first_content": 1, "idle": 4}
    async with RawBackend(script) as backend, proxy(backend, timeouts=limits) as p:
        running.append(p)
        async with stalled(p) as client:
            await client.send(request("GET", "/full"))
            await p.exchanges(1, 4)
            async with RawClient(p.port) as other:
                got = await other.ask(request("GET", "/next"))
            assert (got.status, got.body) == (200, b"ok")
            assert backend.connections == 1, "the pooled connection was to be used"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(CHUNKED + chunk(b"hi") + b"0\r\nX-Long: ", id="trailers"),
        pytest.param(CHUNKED + chunk(b"hi") + b"2;ext=", id="chunk extension"),
    ],
)
async def test_framing_without_an_end_from_a_backend_is_cut_early(head: bytes) -> None:
    """It never became a body, so no limit counted it."""
    end = b"\r\n\r\n" if b"X-Long" in head else b"\r\nhi\r\n" + LAST_CHUNK
    script = endless(head, b"a" * 8192, end)
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x"))
        assert not got.complete
        await backend.closed.wait()
        assert sent(backend) < 700_000
        (told,) = await p.exchanges(1)
        assert told["end"] == "error"


async def test_client_that_stops_reading_is_gone_after_idle_and_holds_up_no_drain() -> None:
    """Its transport waited for ever to flush what nobody took."""
    script = endless(CHUNKED, chunk(b"x" * 16_000))
    async with (
        RawBackend(script) as backend,
        proxy(backend, timeouts={"idle": 0.3}) as p,
        stalled(p) as client,
    ):
        await client.send(request("GET", "/x"))
        await backend.closed.wait()
        await eventually(lambda: not p.app._http.connections)
        async with asyncio.timeout(10):
            await p.app.stop(30)  # s, which nobody is left to need


async def test_old_client_when_the_drain_runs_out_sees_a_reset_not_an_end() -> None:
    """To HTTP/1.0 the end of the connection ends the body: a clean one made the cut a whole."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhalf of ")
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/x", version="HTTP/1.0"))
        head = await client.head()
        assert await client.read_until(b"half of ")
        await p.app.stop(0.05)
        got = await client.body(head)
        assert client.wire.was_reset
        assert (got.framing, got.complete) == ("eof", False)
        (told,) = await p.exchanges(1)
        assert told["end"] == "error"


async def test_slow_but_steady_client_when_idle_is_short_is_not_cut() -> None:
    """What it took from a full buffer was no movement, so it was taken for a silent one."""
    body = b"x" * 350_000

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(CHUNKED)
        for at in range(0, len(body), 5000):
            await conn.send(chunk(body[at : at + 5000]))
        await conn.send(LAST_CHUNK)
        await conn.wait_closed()

    async with (
        RawBackend(script) as backend,
        proxy(backend, timeouts={"idle": 0.5}) as p,
        stalled(p) as client,
    ):
        await client.send(request("GET", "/x"))
        got = bytearray()
        while not got.endswith(LAST_CHUNK) and not client.wire.eof:
            client.unhold()
            got += await client.read_some()
            client.hold()
            await asyncio.sleep(0.02)
        (told,) = await p.exchanges(1)
    assert (told["end"], told["reason"]) == ("complete", None)
    assert got.count(b"x") == len(body)


async def test_tunnel_when_silent_for_longer_than_idle_is_closed_and_returns_its_permit() -> None:
    """It stood outside of every limit, and its place on the backend with it."""

    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(SWITCH)
        while data := await conn.wire.some():
            await conn.send(data)

    async with (
        RawBackend(script) as backend,
        proxy(backend, timeouts={"idle": 0.9}) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("GET", "/v1/realtime", UPGRADE))
        assert (await client.response()).status == 101
        for _ in range(20):  # 1.4 s of frames, more than the limit
            await client.send(b"frame")
            assert await client.read_until(b"frame") == b"frame"
            await asyncio.sleep(0.07)
        assert p.in_flight() == 1
        assert await client.closed(4)
        await eventually(lambda: p.in_flight() == 0)
        await backend.closed.wait()


@contextmanager
def speaks_beside(pieces: int, gap: float) -> Iterator[int]:
    """A backend in a thread, which speaks on while our process stands still; its port."""

    def speak() -> None:
        connection, _ = server.accept()
        with connection, suppress(ConnectionError):
            connection.recv(65536)
            connection.sendall(CHUNKED)
            for _ in range(pieces):
                connection.sendall(chunk(b"piece"))
                time.sleep(gap)
            connection.sendall(LAST_CHUNK)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        thread.join(10)


async def stands_still(seconds: float) -> None:
    """Block the loop where it reads, so that timers run before it reads again."""
    loop, stood = asyncio.get_running_loop(), asyncio.Event()
    one, other = socket.socketpair()

    def still() -> None:
        loop.remove_reader(one)
        time.sleep(seconds)
        stood.set()

    with one, other:
        loop.add_reader(one, still)
        other.send(b"x")
        await stood.wait()


async def test_proxy_when_it_stood_still_cuts_no_stream_that_went_on_meanwhile() -> None:
    """A pause of the machine, longer than the limit, was taken for a silence of the backend."""
    with speaks_beside(10, 0.05) as port:
        row = {"url": f"http://127.0.0.1:{port}"}
        quiet = {"timeouts": {"idle": 0.2}, "middleware": ["failover"]}
        async with proxy(row, **quiet) as p, RawClient(p.port) as client:
            await client.send(request("GET", "/x"))
            await client.read_until(b"piece")
            await stands_still(0.4)
            await client.read_until(LAST_CHUNK)
            (told,) = await p.exchanges(1)
    assert (told["end"], told["reason"]) == ("complete", None)
