"""The request body on its way to a backend: kept for a replay up to a cap, streamed past it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import StreamReader
from aiohttp.web_protocol import RequestPayloadError

from ..errors import BadRequest, BodyTooLarge, Overloaded, RequestTimeout

REPLAY_CAP = 4 << 20  # bytes; a body up to this size can be sent again
KEPT_CAP = 128 << 20  # bytes of all bodies held at the same time in this process


class ClientGone(ConnectionError):
    """The client closed its connection before its request was whole."""


class Kept:
    """How many bytes of request bodies this process holds."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = KEPT_CAP) -> None:
        self.limit = limit
        self.used = 0


class Upload:
    """One request body.

    Attributes:
        framed: the request has a body, be it empty.
        complete: the last byte has come from the client.
        replayable: what came so far is all kept, so another attempt can send the same bytes.
        size: bytes received so far.
    """

    __slots__ = (
        "_all",
        "_continue",
        "_held",
        "_idle",
        "_kept",
        "_limit",
        "_reader",
        "chunked",
        "complete",
        "framed",
        "replayable",
        "size",
    )

    def __init__(
        self,
        reader: StreamReader,
        *,
        length: int | None,
        chunked: bool,
        limit: int,
        kept: Kept,
        idle: float = 0.0,
        ask: asyncio.Transport | None = None,
    ) -> None:
        """Start on one body.

        Args:
            limit: bytes, the largest body taken.
            kept: counts the bytes of all bodies that are held.
            idle: s the client may stay silent inside its body; 0: for ever.
            ask: gets a `100 Continue` before the body is waited for.
        """
        self._reader = reader
        self._kept: list[bytes] = []
        self._held = 0  # bytes in it
        self._all = kept
        self._limit = limit
        self._idle = idle or None
        self._continue = ask
        self.chunked = chunked
        self.framed = chunked or length is not None
        self.complete = not self.framed
        self.replayable = True
        self.size = 0
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body has {length} bytes, the limit is {limit}")
        if self.framed:
            self._take()

    def _take(self) -> None:
        """Keep what has already come, without waiting."""
        if self._reader.exception() is None:
            data = self._reader.read_nowait(-1)
            if data:
                self._keep(data)
            self.complete = self._reader.at_eof()

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._limit:
            raise BodyTooLarge(f"the body is larger than the limit of {self._limit} bytes")

    def _keep(self, data: bytes) -> None:
        self._count(data)
        self._all.used += len(data)
        self._held += len(data)
        self._kept.append(data)

    def _room_for(self, data: bytes) -> bool:
        return self._all.used + len(data) <= self._all.limit

    async def _next(self) -> bytes:
        """The next bytes from the client; b"" at the end."""
        if self._continue is not None:
            self._continue.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._continue = None
        try:
            async with asyncio.timeout(self._idle):
                data = await self._reader.readany()
        except TimeoutError as exc:
            raise RequestTimeout("the request's body stopped coming") from exc
        except RequestPayloadError as exc:
            raise BadRequest("the body's framing is malformed") from exc
        except ConnectionError as exc:
            raise ClientGone from exc
        if not data:
            self.complete = self._reader.at_eof()
        return data

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
            self.complete = self._reader.at_eof()

    async def whole(self) -> bytes:
        """The whole body, however large. Raises BodyTooLarge above the limit."""
        while not self.complete:
            await self._fill_once()
        return b"".join(self._kept)

    @property
    def body(self) -> bytes | None:
        """The whole body, where it is complete and kept."""
        if not (self.complete and self.replayable):
            return None
        if len(self._kept) > 1:
            self._kept = [b"".join(self._kept)]
        return self._kept[0] if self._kept else b""

    def forget(self) -> None:
        """No attempt will follow: let go of what was kept for one. May be called again."""
        self.replayable = False
        self._all.used -= self._held
        self._held = 0
        self._kept.clear()

    @property
    def start(self) -> bytes:
        """The first piece of what is kept."""
        return self._kept[0] if self._kept else b""

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
            self.complete = self._reader.at_eof()
            yield data
