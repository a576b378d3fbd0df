"""BPR: the proxy reads only as fast as the slow side takes, so its memory does not grow.

Kernel buffers on both hops take several megabytes before a sender feels anything: 24 MB is well
above that, and well below what an endless body reaches when nobody pushes back. KIT_BIG_MB says how
big a big body is.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    eventually,
    proxy,
    request,
)

MB = 2**20
BIG = int(os.environ.get("KIT_BIG_MB", "64")) * MB
BLOCK = bytes(range(256)) * 256  # 64 KiB
TAKEN_AT_MOST = 24 * MB
GROWTH_AT_MOST = 40 * MB
LIMIT = 30.0  # s, for one big body

STATM = Path("/proc/self/statm")
measured = pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Meter:
    """The peak growth of this process, looked at now and then."""

    def __init__(self) -> None:
        self.start = resident()
        self.peak = 0

    def look(self) -> None:
        self.peak = max(self.peak, resident() - self.start)


async def stands_still(conn: BackendConn | RawClient, *, still: float = 0.2) -> int:
    """Bytes that one side got rid of, once that number has not moved for `still` s."""
    loop = asyncio.get_running_loop()
    last, since = -1, loop.time()

    def now() -> int:
        wire = conn.wire
        return wire.written - wire.transport.get_write_buffer_size()

    def held() -> bool:
        nonlocal last, since
        if now() != last:
            last, since = now(), loop.time()
        assert last < TAKEN_AT_MOST, f"{last} bytes taken and nothing pushes back"
        return last > 0 and loop.time() - since > still

    await eventually(held, timeout=10)
    return last


EVENT = chat_events("x" * 60_000, 1)[1]


@pytest.mark.parametrize(
    ("data", "head", "piece"),
    [
        pytest.param(request("GET", "/x"), SSE_HEAD, chunk(BLOCK), id="plain, chunked"),
        pytest.param(
            request("GET", "/x"),
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 10**12,
            BLOCK,
            id="plain, by length",
        ),
        pytest.param(
            request("GET", "/x"), b"HTTP/1.1 200 OK\r\n\r\n", BLOCK, id="plain, to the end"
        ),
        pytest.param(chat(stream=True), SSE_HEAD, chunk(EVENT), id="inference stream"),
        pytest.param(chat(), b"HTTP/1.1 200 OK\r\n\r\n", BLOCK, id="document past its cap"),
    ],
)
async def test_bpr_01_client_that_reads_nothing_stops_the_upstream(data, head, piece):
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(head)
        while True:
            await conn.send(piece)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        client.hold()
        await client.send(data)
        await eventually(lambda: backend.conns)
        await stands_still(backend.conns[0])
        client.reset()
        await backend.closed.wait(timeout=2)


async def test_bpr_02_client_that_reads_again_gets_everything():
    """A pause without its resume is a hang that only a slow client sees."""
    total = 16 * MB
    digest = hashlib.sha256(BLOCK * (total // len(BLOCK))).digest()

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // len(BLOCK)):
            await conn.send(BLOCK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        seen, stops = hashlib.sha256(), 0
        await client.send(request("GET", "/x"))
        await client.head()
        size = 0
        while size < total:
            if size > stops * 2 * MB:
                stops += 1
                client.hold()
                await asyncio.sleep(0.02)
                client.unhold()
            data = await client.read_some()
            assert data, f"cut after {size} bytes"
            seen.update(data)
            size += len(data)
        assert stops > 4
        assert (size, seen.digest()) == (total, digest)


@measured
@pytest.mark.parametrize("framed", ["length", "chunked"])
@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_bpr_03_and_04_big_download_is_whole_and_held_nowhere(path, framed):
    """BPR-03 by length, BPR-04 in chunks; on an inference route it is a document past its cap."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
        if framed == "length":
            await conn.send(head + b"Content-Length: %d\r\n\r\n" % BIG)
        else:
            await conn.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(BIG // len(BLOCK)):
            await conn.send(BLOCK if framed == "length" else chunk(BLOCK))
        if framed == "chunked":
            await conn.send(LAST_CHUNK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        meter, seen, size = Meter(), hashlib.sha256(), 0
        await client.send(request("POST", path, body=b'{"model":"m"}'))
        head = await client.head()
        async with asyncio.timeout(LIMIT):
            async for piece in client.body_pieces(head):
                seen.update(piece)
                size += len(piece)
                meter.look()
        assert head.complete, head.fault
    assert size == BIG
    assert seen.digest() == hashlib.sha256(BLOCK * (BIG // len(BLOCK))).digest()
    assert meter.peak < GROWTH_AT_MOST


@measured
@pytest.mark.parametrize("framed", ["chunked", "length"])
@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_bpr_05_and_06_big_upload_is_whole_and_held_nowhere(path, framed):
    """BPR-05 in chunks, BPR-06 by length; on an inference route only its replay is lost."""
    seen = hashlib.sha256()

    async def script(conn: BackendConn) -> None:
        received = await conn.head_only()
        assert received is not None
        await conn.read_body(received, seen.update)
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    server = {"max_body_size": 2 * BIG}
    async with RawBackend(script) as backend:
        async with proxy(backend, server=server) as p, RawClient(p.port) as client:
            meter = Meter()
            length = BIG // len(BLOCK) * len(BLOCK)
            name, value = "Transfer-Encoding", "chunked"
            if framed == "length":
                name, value = "Content-Length", str(length)
            async with asyncio.timeout(LIMIT):
                await client.send(request("POST", path, [(name, value)]))
                for _ in range(BIG // len(BLOCK)):
                    await client.send(chunk(BLOCK) if framed == "chunked" else BLOCK)
                    meter.look()
                if framed == "chunked":
                    await client.send(LAST_CHUNK)
                got = await client.response("POST", timeout=LIMIT)
        (received,) = backend.requests
    assert (got.status, got.complete) == (200, True)
    assert (received.complete, received.size) == (True, BIG)
    assert seen.digest() == hashlib.sha256(BLOCK * (BIG // len(BLOCK))).digest()
    assert meter.peak < GROWTH_AT_MOST


@pytest.mark.parametrize("framed", ["chunked", "length"])
@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_bpr_07_backend_that_reads_nothing_stops_the_client(path, framed):
    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        conn.wire.hold()
        await eventually(lambda: done, timeout=10)
        conn.wire.unhold()
        assert await conn.wait_closed()

    done = False
    server = {"max_body_size": 10**12}
    async with (
        RawBackend(script) as backend,
        proxy(backend, server=server) as p,
        RawClient(p.port) as client,
    ):
        field = ("Transfer-Encoding", "chunked")
        if framed == "length":
            field = ("Content-Length", str(10**12))
        await client.send(request("POST", path, [field]))
        piece = chunk(BLOCK) if framed == "chunked" else BLOCK

        async def push() -> None:
            while not client.wire.lost:
                await client.send(piece)

        async with asyncio.TaskGroup() as tasks:
            pushing = tasks.create_task(push())
            await eventually(lambda: backend.conns)
            await stands_still(client)
            pushing.cancel()
            client.reset()
            done = True
        await backend.closed.wait(timeout=2)


async def test_bpr_08_many_slow_clients_cost_a_bounded_sum():
    """What one stalled client may hold is small enough for hundreds of them."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(chunk(EVENT))

    clients = 8
    async with RawBackend(script) as backend, proxy(backend) as p:
        everyone = [RawClient(p.port) for _ in range(clients)]
        for client in everyone:
            await client.__aenter__()
            client.hold()
            await client.send(chat(stream=True))
        await eventually(lambda: len(backend.conns) == clients)
        for conn in backend.conns:
            await stands_still(conn, still=0.05)
        # What the kernel holds is not the proxy's; what the transports hold in this process is.
        held = sum(conn.wire.written - conn.sent for conn in backend.conns)
        assert held < clients * MB
        for client in everyone:
            client.reset()
        await backend.closed.wait(clients, timeout=2)
        assert backend.open_connections == 0


@measured
async def test_bpr_09_long_stream_of_small_events_leaves_nothing_behind():
    """Nothing may grow with the length of a stream: no copy for the log, none for the usage."""
    one = chunk(chat_events("token ", 1)[1]) * 50
    rounds = BIG // len(one) // 2

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        for _ in range(rounds):
            await conn.send(one)
        await conn.send(b"".join(chunk(e) for e in chat_events("", 0)[1:]) + LAST_CHUNK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        meter, size = Meter(), 0
        await client.send(chat(stream=True))
        head = await client.head()
        async with asyncio.timeout(LIMIT):
            async for piece in client.body_pieces(head):
                size += len(piece)
                meter.look()
        assert head.complete, head.fault
    assert size > BIG // 4
    assert meter.peak < GROWTH_AT_MOST
