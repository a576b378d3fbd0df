"""Simulated time: a clock, an event loop that waits for nothing, connections inside it.

PyPI's looptime fakes the time of a loop, but not `time.monotonic`, by which the proxy measures; and
its loop still waits for sockets. Here there are none: a connection is two objects in one process.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

START = 1_000.0  # monotonic s
START_UNIX = 1_767_571_200.0  # 2026-01-05, a Monday, 00:00 UTC


class Clock:
    """The time, as all of the process sees it.

    Attributes:
        now: monotonic s.
    """

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = START

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return START_UNIX + (self.now - START)


class _Seeded(random.Random):
    """`random.Random` that is the same in each process where nobody seeds it."""

    _made = 0

    def __init__(self, seed: Any = None) -> None:
        if seed is None:
            _Seeded._made += 1
            seed = _Seeded._made
        super().__init__(seed)


def install() -> Clock:
    """Let this process live by a simulated clock, and by no chance, from here on.

    Raises:
        RuntimeError: too late, the proxy has been imported and keeps the real one.
    """
    early = [name for name in sys.modules if name.startswith(("beacon_proxy", "middleware."))]
    if early:
        raise RuntimeError(f"the clock must be there before {early[0]} is")
    clock = Clock()
    time.monotonic, time.time = clock.monotonic, clock.unix
    random.Random = _Seeded  # type: ignore[misc, assignment]
    return clock


class _Jump(selectors.SelectSelector):
    """Instead of waiting, lets the time pass at once. There are no files to be asked for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen, and somebody still waits")
        self._clock.now += max(timeout, 0.0)
        return []


class Peer(Protocol):
    """The client's end of a connection."""

    def heard(self, data: bytes) -> None: ...

    def lost(self) -> None:
        """The proxy closed it."""
        ...


class Loop(asyncio.SelectorEventLoop):
    """asyncio's own loop on a simulated clock, with servers that are reached by `connect` alone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        super().__init__(_Jump(clock))
        self._listening: dict[int, Callable[[], asyncio.BaseProtocol]] = {}

    def time(self) -> float:
        return self._clock.now

    async def create_server(self, protocol_factory: Any, *where: Any, **_: Any) -> Any:
        """Stands for a socket that listens: nobody outside this process can connect."""
        port = 1 + len(self._listening)
        self._listening[port] = protocol_factory
        return _Server(port)

    def connect(self, port: int, peer: Peer) -> Connection:
        return Connection(self, self._listening[port](), peer)


class _Server:
    """`asyncio.Server` and its socket, as far as the proxy uses them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sockets = (self,)

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def close(self) -> None:
        """Nobody connects any more once the proxy closes."""


class Connection(asyncio.Transport):
    """The proxy's transport; the client's end is `send` and `leave`."""

    def __init__(self, loop: Loop, protocol: Any, peer: Peer) -> None:
        super().__init__({"peername": ("127.0.0.1", 50_000)})
        self._loop = loop
        self._protocol = protocol
        self._peer = peer
        self._closing = False
        protocol.connection_made(self)

    # -- the client's end ------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        self._loop.call_soon(self._deliver, data)

    def leave(self) -> None:
        """Close without another word; what the proxy still writes reaches nobody."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    def _deliver(self, data: bytes) -> None:
        if not self._closing:
            self._protocol.data_received(data)

    # -- asyncio.Transport -----------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if not self._closing:
            self._loop.call_soon(self._peer.heard, bytes(data))

    def write_eof(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lost)

    def abort(self) -> None:
        self.close()

    def _lost(self) -> None:
        self._protocol.connection_lost(None)
        self._peer.lost()

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return 0  # the client takes everything at once

    def pause_reading(self) -> None:
        """A request is small and comes whole."""

    def resume_reading(self) -> None:
        """See `pause_reading`."""
