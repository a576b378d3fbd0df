"""The bytes of one TCP connection and the parts of an HTTP/1 message, for both sides of the kit.

Written apart from the code under test on purpose: a framing mistake of the proxy must not be
forgiven by a parser that shares it. Strict where a reader could be fooled (chunk sizes, line ends,
repeated lengths); everything received is kept as it came.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

Fields = list[tuple[bytes, bytes]]

HIGH_WATER = 256 * 1024  # bytes kept unread before reading pauses
RAW_CAP = 4 * 1024 * 1024  # bytes of a connection kept in `raw`
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r\n\Z")
_LENGTH = re.compile(rb"[0-9]{1,18}\Z")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\Z")


class Broken(Exception):
    """A message that ended early or whose framing cannot be trusted."""


class Wire(asyncio.Protocol):
    """One end of a connection: reads as the test asks for bytes, no further than the water mark."""

    def __init__(self, opened: Callable[[Wire], None] | None = None) -> None:
        self.transport: asyncio.Transport
        self.buffer = bytearray()
        self.raw = bytearray()  # the first bytes received, whoever read them since
        self.received = 0  # bytes
        self.consumed = 0  # bytes
        self.written = 0  # bytes handed to the transport
        self.eof = False  # the peer finished or the connection is gone
        self.lost = False
        self.was_reset = False
        self.closing = False  # this side closed first
        self.on_eof: Callable[[], None] = lambda: None
        self._opened = opened
        self._held = self._paused = False
        self._readers: list[asyncio.Future[None]] = []
        self._writers: list[asyncio.Future[None]] = []
        self._blocked = False

    # -- callbacks of the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        if self._opened is not None:
            self._opened(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.received += len(data)
        if len(self.raw) < RAW_CAP:
            self.raw += data[: RAW_CAP - len(self.raw)]
        if len(self.buffer) > HIGH_WATER:
            self._pause()
        _wake(self._readers)

    def eof_received(self) -> bool:
        self._end()
        return True  # stay half-open: the test decides when to close

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.was_reset = isinstance(exc, ConnectionError)
        self._end()
        _wake(self._writers)

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        _wake(self._writers)

    def _end(self) -> None:
        if not self.eof:
            self.eof = True
            self.on_eof()
        _wake(self._readers)

    # -- reading

    def hold(self) -> None:
        """Read nothing more until `unhold`: a client that stalls."""
        self._held = True
        self._pause()

    def unhold(self) -> None:
        self._held = False
        self._resume()

    def _pause(self) -> None:
        if not self._paused and not self.eof:
            self._paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._held:
            self._paused = False
            if not self.lost:
                self.transport.resume_reading()

    async def _more(self) -> None:
        self._resume()
        await _park(self._readers)

    def take(self, count: int) -> bytes:
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        self.consumed += len(data)
        return data

    async def some(self) -> bytes:
        """Whatever has arrived, at least one byte; empty at the end."""
        while not self.buffer and not self.eof:
            await self._more()
        return self.take(len(self.buffer))

    async def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            if self.eof:
                raise Broken(f"ended {count - len(self.buffer)} bytes early")
            await self._more()
        return self.take(count)

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        seen = 0
        while (at := self.buffer.find(mark, max(0, seen - len(mark)))) < 0:
            if self.eof:
                raise Broken(f"ended before {mark!r}")
            seen = len(self.buffer)
            await self._more()
        return self.take(at + len(mark))

    async def ended(self) -> None:
        """Wait for the peer's end, whatever bytes still come."""
        while not self.eof:
            await self._more()

    # -- writing

    def write(self, data: bytes) -> None:
        if not self.lost and not self.closing:
            self.transport.write(data)
            self.written += len(data)

    async def drain(self) -> None:
        await asyncio.sleep(0)  # a script that sends for ever must let the loop see the end
        while self._blocked and not self.lost:
            await _park(self._writers)
        if self.lost:
            raise ConnectionResetError("the peer is gone")

    def finish(self) -> None:
        """Half-close: no more bytes from here, still reading."""
        if not self.lost:
            self.transport.write_eof()

    def close(self) -> None:
        self.closing = True
        if not self.lost:
            self.transport.close()

    def reset(self) -> None:
        """Close with RST instead of FIN; unsent bytes are thrown away."""
        self.closing = True
        if not self.lost:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()


async def _park(waiters: list[asyncio.Future[None]]) -> None:
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    await waiter


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


@dataclass
class Framing:
    """How a message says where it ends; `fault` is set where it says so in a way to be refused."""

    kind: str  # length | chunked | eof | none
    length: int = 0
    fault: str = ""
    trailers: Fields = field(default_factory=list)


def fault_of(head: bytes) -> str:
    """What RFC 9110 5.5 and 9112 5 forbid in a header section; empty for a clean one."""
    for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]:
        if not _FIELD.match(line):
            return f"header line {line[:80]!r}"
    return ""


def parse_fields(head: bytes) -> tuple[bytes, Fields]:
    """The first line and the header lines as they came: order, case and repeats kept."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    fields = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name, value.strip(b" \t")))
    return first, fields


def header(fields: Fields | tuple[tuple[bytes, bytes], ...], name: str | bytes) -> list[bytes]:
    """The values of every line of that name, in order."""
    wanted = (name.encode() if isinstance(name, str) else name).lower()
    return [value for key, value in fields if key.lower() == wanted]


def framing(fields: Fields, *, request: bool) -> Framing:
    """RFC 9112 6.3, and what a careful reader refuses."""
    codings = header(fields, b"transfer-encoding")
    lengths = header(fields, b"content-length")
    fault = ""
    if codings and lengths:
        fault = "both Transfer-Encoding and Content-Length"
    if len(codings) > 1 or (codings and codings[0].lower() != b"chunked"):
        fault = f"Transfer-Encoding {codings!r}"
    if len(lengths) > 1 or (lengths and not _LENGTH.match(lengths[0])):
        fault = f"Content-Length {lengths!r}"
    if codings:
        return Framing("chunked", fault=fault)
    if lengths:
        return Framing("length", length=0 if fault else int(lengths[0]), fault=fault)
    return Framing("none" if request else "eof", fault=fault)


async def pieces(wire: Wire, shape: Framing) -> AsyncIterator[bytes]:
    """The body as it arrives, without its framing. Raises `Broken` where it is not whole."""
    if shape.kind == "length":
        left = shape.length
        while left:
            if not (piece := await wire.some()):
                raise Broken(f"ended {left} bytes early")
            if len(piece) > left:  # the next message has already begun
                wire.buffer[:0] = piece[left:]
                wire.consumed -= len(piece) - left
                piece = piece[:left]
            left -= len(piece)
            yield piece
    elif shape.kind == "chunked":
        async for piece in _chunks(wire, shape):
            yield piece
    elif shape.kind == "eof":
        while piece := await wire.some():
            yield piece
        if wire.was_reset:
            raise Broken("reset")
    if shape.fault:
        raise Broken(shape.fault)


async def _chunks(wire: Wire, shape: Framing) -> AsyncIterator[bytes]:
    while True:
        line = await wire.until(b"\n")
        match = _CHUNK.match(line)
        if match is None:
            raise Broken(f"chunk size line {line!r}")
        size = int(match[1], 16)
        if size == 0:
            break
        yield await wire.exactly(size)
        if (end := await wire.exactly(2)) != b"\r\n":
            raise Broken(f"chunk ends with {end!r}")
    while (line := await wire.until(b"\r\n")) != b"\r\n":
        name, _, value = line.removesuffix(b"\r\n").partition(b":")
        shape.trailers.append((name, value.strip(b" \t")))
