"""The request body on its way to a backend: kept for a replay up to a cap, streamed past it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from ..errors import BadRequest, BodyTooLarge, Overloaded, ProxyError, RequestTimeout

REPLAY_CAP = 4 << 20  # bytes; a body up to this size can be sent again
KEPT_CAP = 128 << 20  # bytes of all bodies held at the same time in this process
HIGH_WATER = 128 << 10  # bytes that may wait for their reader before the client is held back


class ClientGone(ConnectionError):
    """The client closed its connection before its request was whole."""


class Inflow(Protocol):
    """The client's connection, as far as the reader of a body steers it."""

    def pause_body(self) -> None: ...

    def resume_body(self) -> None: ...


class Kept:
    """How many bytes of request bodies this process holds."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = KEPT_CAP) -> None:
        self.limit = limit
        self.used = 0


class BodyLimits:
    """What holds for every request body of this process.

    Attributes:
        size: bytes, the largest body taken.
        idle: s the client may stay silent inside its body; None: for ever.
        kept: counts the bytes of all bodies that are held.
    """

    __slots__ = ("idle", "kept", "size")

    def __init__(self, size: int, idle: float, kept: Kept) -> None:
        self.size = size
        self.idle = idle or None
        self.kept = kept


_NO_LIMITS = BodyLimits(0, 0.0, Kept(0))  # of a body that nobody has opened


class Upload:
    """One request body, fed by the client's connection as it comes.

    Attributes:
        framed: the request has a body, be it empty.
        chunked: it is framed by chunks.
        ended: its last byte has come from the client.
        complete: its last byte has come, and was taken from here.
        replayable: what came so far is all kept, so another attempt can send the same bytes.
        lent: how many tasks of providers hold the whole body; it is counted until they are over.
        received: body bytes fed so far.
        size: body bytes taken so far.
    """

    __slots__ = (
        "_continue",
        "_discards",
        "_error",
        "_flow",
        "_held",
        "_kept",
        "_limits",
        "_waiter",
        "_waiting",
        "_waiting_size",
        "chunked",
        "complete",
        "ended",
        "framed",
        "lent",
        "received",
        "replayable",
        "size",
    )

    def __init__(self, flow: Inflow, whole: bytes | None = None) -> None:
        """`whole`: all of the body, where it has come already."""
        self._flow = flow
        self._waiting: list[bytes] = [whole] if whole else []  # not yet taken
        self._waiting_size = self.received = len(whole) if whole else 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._kept: list[bytes] = []
        self._held = 0  # bytes in it that the limits' `kept` counts
        self._limits = _NO_LIMITS
        self._continue: asyncio.Transport | None = None
        self._discards = self.framed = self.chunked = self.complete = False
        self.ended = whole is not None
        self.replayable = True
        self.size = self.lent = 0

    # -- the connection's side -------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        self.received += len(data)
        if self._discards:
            return
        self._waiting.append(data)
        self._waiting_size += len(data)
        if self._waiting_size > HIGH_WATER:
            self._flow.pause_body()
        if self._waiter is not None:
            self._wake()

    def end(self) -> None:
        self.ended = True
        if self._waiter is not None:
            self._wake()

    def fail(self, error: Exception) -> None:
        """No more will come, and what came is not the whole."""
        self._error = self._error or error
        self._wake()

    def discard(self) -> None:
        """Nobody takes the rest: let it pass."""
        self._discards = True
        self._waiting.clear()
        self._flow.resume_body()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the exchange's side ---------------------------------------------------------------------

    def open(
        self,
        limits: BodyLimits,
        length: int | None,
        chunked: bool,
        ask: asyncio.Transport | None = None,
    ) -> None:
        """Start to take the body.

        Args:
            length: of its Content-Length.
            ask: gets a `100 Continue` before the body is waited for.

        Raises:
            BodyTooLarge: it says so itself, or it is all there.
        """
        self._limits, self._continue = limits, ask
        if length is not None:
            if length > limits.size:
                raise BodyTooLarge(f"the body has {length} bytes, the limit is {limits.size}")
        elif not chunked:
            self.complete = True
            return
        self.framed = True
        self.chunked = chunked
        size = self._waiting_size
        if size and self._error is None and limits.kept.used + size <= limits.kept.limit:
            self._keep(self._take())
        self.complete = self.ended and not self._waiting

    def _take(self) -> bytes:
        """All that waits."""
        waiting = self._waiting
        data = waiting[0] if len(waiting) == 1 else b"".join(waiting)
        waiting.clear()
        if self._waiting_size > HIGH_WATER:
            self._flow.resume_body()
        self._waiting_size = 0
        return data

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        limit = self._limits.size
        if self.size > limit:
            raise BodyTooLarge(f"the body is larger than the limit of {limit} bytes")

    def _keep(self, data: bytes) -> None:
        self._count(data)
        self._limits.kept.used += len(data)
        self._held += len(data)
        self._kept.append(data)

    def _room_for(self, data: bytes) -> bool:
        kept = self._limits.kept
        return kept.used + len(data) <= kept.limit

    async def _next(self) -> bytes:
        """The next bytes from the client; b"" at the end."""
        if not self._waiting and not self.ended:
            if self._continue is not None:
                self._continue.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                async with asyncio.timeout(self._limits.idle):
                    await self._wait()
            except TimeoutError as exc:
                raise RequestTimeout("the request's body stopped coming") from exc
        self._continue = None
        if self._error is not None and not self._waiting:
            if isinstance(self._error, ProxyError | ClientGone):
                raise type(self._error)(*self._error.args)  # raised, it would hold this object
            raise BadRequest("the body's framing is malformed") from self._error
        data = self._take() if self._waiting else b""
        self.complete = self.ended
        return data

    async def _wait(self) -> None:
        while not (self._waiting or self.ended or self._error is not None):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def fill(self) -> bytes | None:
        """Wait for the whole body, up to the replay cap.

        Returns the body, or None where it is larger than the cap.
        """
        while not self.complete and self.size < REPLAY_CAP:
            await self._fill_once()
        return self.body

    async def _fill_once(self) -> None:
        if not self._room_for(b""):
            raise Overloaded("too many request bodies are being held", retry_after=1.0)
        data = await self._next()
        if data:
            self._keep(data)

    async def whole(self) -> bytes:
        """The whole body, however large, kept and counted.

        Raises BodyTooLarge above its limit, Overloaded while too much is kept in this process.
        """
        while not self.complete:
            await self._fill_once()
        body = self.body
        assert body is not None, "asked for after it was let go of"
        return body

    @property
    def body(self) -> bytes | None:
        """The whole body, where it is complete and kept."""
        if not (self.complete and self.replayable):
            return None
        kept = self._kept
        if len(kept) > 1:
            self._kept = kept = [b"".join(kept)]
        return kept[0] if kept else b""

    def forget(self) -> None:
        """No attempt will follow: let go of what was kept for one. May be called again."""
        self.replayable = False
        if self._held and not self.lent:
            self._limits.kept.used -= self._held
            self._held = 0
            self._kept.clear()

    def lend(self, task: asyncio.Task[None]) -> None:
        """Count what is kept for as long as `task` may hold it, whatever the exchange does."""
        self.lent += 1
        task.add_done_callback(self._taken_back)

    def _taken_back(self, task: asyncio.Task[None]) -> None:
        self.lent -= 1
        if not self.replayable:
            self.forget()

    @property
    def start(self) -> bytes:
        """The first piece of what is kept."""
        return self._kept[0] if self._kept else b""

    def beginning(self, most: int) -> bytes:
        """What is kept, up to `most` bytes or a piece more."""
        size, parts = 0, []
        for data in self._kept:
            parts.append(data)
            size += len(data)
            if size >= most:
                break
        return b"".join(parts)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body from its first byte: what is kept, then what still comes.

        May be called again while `replayable`.
        """
        for data in tuple(self._kept):
            yield data
        while not self.complete:
            data = await self._next()
            if not data:
                break
            fits = self.size + len(data) <= REPLAY_CAP and self._room_for(data)
            if self.replayable and fits:
                self._keep(data)
            else:
                self._count(data)
                self.forget()
            yield data
