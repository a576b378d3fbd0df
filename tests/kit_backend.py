"""A scripted backend on a real socket: it does byte for byte what a test's script says."""

# A wait that a test writes names its own limit: `timeout` is the plain word for it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from .kit_wire import (
    Broken,
    Fields,
    Framing,
    Wire,
    fault_of,
    framing,
    header,
    parse_fields,
    pieces,
)

Script = Callable[["BackendConn"], Awaitable[None]]

CRLF = b"\r\n"


def held_port(host: str = "127.0.0.1") -> socket.socket:
    """A socket that never listens and holds its port while no server does.

    Else somebody else gets the port meanwhile. A server that asks to reuse the address gets it.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


@dataclass
class Received:
    """One request as it arrived; it is listed from its head on, `complete` only when whole."""

    method: str
    target: bytes
    version: str  # "1.1"
    headers: Fields
    raw_head: bytes
    framing: Framing
    kept: bytearray = field(default_factory=bytearray, repr=False)
    size: int = 0  # bytes of body read so far, also where they are not kept
    complete: bool = False
    fault: str = ""  # why it is not whole, or no clean HTTP

    @property
    def body(self) -> bytes:
        """The body without its framing; while it is still coming, what there is of it."""
        return bytes(self.kept)

    @property
    def trailers(self) -> Fields:
        return self.framing.trailers

    def header(self, name: str) -> list[bytes]:
        return header(self.headers, name)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class BackendConn:
    """One accepted connection, as a script sees it."""

    def __init__(self, backend: RawBackend, wire: Wire) -> None:
        self.backend = backend
        self.wire = wire
        self.number = 0  # 1 for the first connection that is no probe
        self._ahead: Received | None = None

    @property
    def raw(self) -> bytes:
        """Every byte received on this connection, up to 4 MiB."""
        return bytes(self.wire.raw)

    @property
    def sent(self) -> int:
        """Bytes written that left this process."""
        waiting = 0 if self.wire.lost else self.wire.transport.get_write_buffer_size()
        return self.wire.written - waiting

    async def request(self) -> Received | None:
        """Read one whole request; None when the client closed instead of sending one."""
        received = await self.head_only()
        if received is not None:
            await self.read_body(received)
        return received

    async def head_only(self) -> Received | None:
        """Read the next head and list it in `backend.requests`; None at the end."""
        received, self._ahead = self._ahead, None
        if received is None:
            received = await self._head()
        if received is not None:
            self.backend.requests.append(received)
        return received

    async def _head(self) -> Received | None:
        try:
            raw = await self.wire.until(CRLF + CRLF)
        except Broken:
            return None
        first, fields = parse_fields(raw)
        method, _, rest = first.partition(b" ")
        target, _, version = rest.rpartition(b" ")
        return Received(
            method=method.decode("latin-1"),
            target=target,
            version=version.decode("latin-1").removeprefix("HTTP/"),
            headers=fields,
            raw_head=raw,
            framing=framing(fields, request=True),
            fault=fault_of(raw),
        )

    async def read_body(
        self, received: Received, sink: Callable[[bytes], object] | None = None
    ) -> Received:
        """Read the body of `received`; with `sink` each piece goes there and is not kept."""
        keep = received.kept.extend if sink is None else sink
        try:
            async for piece in pieces(self.wire, received.framing):
                received.size += len(piece)
                keep(piece)
            received.complete = not received.fault
        except Broken as exc:
            received.fault = str(exc)
        return received

    def write(self, data: bytes) -> None:
        self.wire.write(data)

    async def drain(self) -> None:
        """Wait until the client takes more. Raises ConnectionResetError when it is gone."""
        await self.wire.drain()

    async def send(self, data: bytes) -> None:
        self.wire.write(data)
        await self.wire.drain()

    def close(self) -> None:
        self.wire.close()

    def reset(self) -> None:
        self.wire.reset()

    async def wait_closed(self, timeout: float = 5.0) -> bool:
        """True once the client has closed its side; False when it has not after `timeout` s."""
        try:
            async with asyncio.timeout(timeout):
                await self.wire.ended()
        except TimeoutError:
            return False
        return True


@dataclass
class Closes:
    """Counts the connections that the client side closed before the script did."""

    count: int = 0
    _waiters: list[asyncio.Event] = field(default_factory=list)

    def add(self) -> None:
        self.count += 1
        for waiter in self._waiters:
            waiter.set()

    def is_set(self) -> bool:
        return self.count > 0

    async def wait(self, count: int = 1, timeout: float = 5.0) -> None:
        """Until `count` closes were seen. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while self.count < count:
                waiter = asyncio.Event()
                self._waiters.append(waiter)
                await waiter.wait()
                self._waiters.remove(waiter)


class RawBackend:
    """A backend on 127.0.0.1 that runs `script` once for each connection.

    A connection counts, and its script starts, once its first head is there; with `eager` at once,
    which lets a script close before it was asked anything. The proxy's own probes are answered 404
    here and reach neither the script nor any counter (not so with `eager`).
    """

    def __init__(self, script: Script, *, host: str = "127.0.0.1", eager: bool = False) -> None:
        self.script = script
        self.host = host
        self.eager = eager
        self.port = 0
        self.requests: list[Received] = []
        self.conns: list[BackendConn] = []
        self.accepted = 0  # connections of every kind
        self.probes = 0
        self.closed = Closes()
        self.errors: list[BaseException] = []  # what scripts raised; raised again at the end
        self._server: asyncio.Server | None = None
        self._holder: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._wires: set[Wire] = set()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def connections(self) -> int:
        return len(self.conns)

    @property
    def open_connections(self) -> int:
        return sum(not (c.wire.eof or c.wire.closing) for c in self.conns)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        if self._holder is not None:
            self._holder.close()
        if exc is None and self.errors:
            raise self.errors[0]

    async def listen(self) -> None:
        """Accept connections; after `stop` again on the same port. Called twice it does nothing."""
        if self._server is not None:
            return
        if self._holder is None:
            self._holder = held_port(self.host)
            self.port = self._holder.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Wire(self._opened), self.host, self.port, reuse_address=True
        )

    async def stop(self) -> None:
        """Stop listening and cut every connection: the death of a backend."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for wire in tuple(self._wires):
            if not wire.lost:
                wire.closing = True
                wire.transport.abort()
        await asyncio.sleep(0)

    def _opened(self, wire: Wire) -> None:
        if self._server is None:  # accepted just before `stop`: the dead answer nobody
            wire.closing = True
            wire.transport.abort()
            return
        self.accepted += 1
        self._wires = {w for w in self._wires if not w.lost} | {wire}
        conn = BackendConn(self, wire)
        task = asyncio.get_running_loop().create_task(self._serve(conn), name="kit-backend")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, conn: BackendConn) -> None:
        try:
            if not self.eager and not await self._begin(conn):
                return
            self._count(conn)
            await self.script(conn)
        except ConnectionError:
            pass
        except Exception as exc:
            self.errors.append(exc)
        finally:
            conn.close()

    async def _begin(self, conn: BackendConn) -> bool:
        received = await conn._head()
        if received is None:
            return False
        agent = b"".join(received.header("user-agent"))
        if agent.startswith(b"beacon-proxy/") and b"check" in agent:
            self.probes += 1
            conn.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        conn._ahead = received
        return True

    def _count(self, conn: BackendConn) -> None:
        self.conns.append(conn)
        conn.number = len(self.conns)

        def ended() -> None:
            if not conn.wire.closing:
                self.closed.add()

        if conn.wire.eof:
            ended()
        conn.wire.on_eof = ended
