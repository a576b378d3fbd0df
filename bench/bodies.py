"""Large bodies: what they hold, who sends them, and who takes them, both at a rate if need be.

A body is text that JSON takes as it is, each block of it with a number, so that the CRC tells what
is missing, doubled or out of order. Neither side keeps more than a block.
"""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections.abc import Callable, Iterator

from . import work

_BLOCK = 1 << 16
_TEXT = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=_BLOCK - 8))
_REST = _TEXT.encode()
_AT_ONCE = 8  # blocks that are written before others have their turn
_SLICE = 0.005  # s that a side may be ahead of its rate


def blocks(size: int) -> Iterator[bytes]:
    """`size` bytes of text."""
    for number in range(-(-size // _BLOCK)):
        yield (b"%08d" % number + _REST)[: size - number * _BLOCK]


def file_of(size: int) -> tuple[int, Iterator[bytes]]:
    """The bytes of a file, and how many."""
    return size, blocks(size)


def chat_of(size: int) -> tuple[int, Iterator[bytes]]:
    """A chat request with so many bytes of text, in the order in which openai-python writes it."""
    before = b'{"messages":[{"role":"user","content":"'
    after = b'"}],"model":"%b","stream":false}' % work.MODEL.encode()

    def pieces() -> Iterator[bytes]:
        yield before
        yield from blocks(size)
        yield after

    return len(before) + size + len(after), pieces()


BODIES: dict[str, Callable[[int], tuple[int, Iterator[bytes]]]] = {"file": file_of, "chat": chat_of}


def crc_of(pieces: Iterator[bytes]) -> int:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


class Source:
    """Writes pieces as fast as the other side takes them; its protocol tells it when to wait."""

    def __init__(self, transport: asyncio.WriteTransport, pieces: Iterator[bytes]) -> None:
        self._transport, self._pieces = transport, pieces
        self._paused = self._scheduled = False
        self._go_on()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._go_on()

    def _go_on(self) -> None:
        if self._paused or self._scheduled:
            return
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        self._scheduled = False
        for _ in range(_AT_ONCE):
            if self._paused or self._transport.is_closing():
                return
            piece = next(self._pieces, None)
            if piece is None:
                return
            self._transport.write(piece)
        self._go_on()


class Sink:
    """Takes bytes, at most `rate` a second, 0: as they come; counts them and sums them up."""

    def __init__(self, transport: asyncio.Transport, rate: float) -> None:
        self._transport, self._rate = transport, rate
        self._began = time.monotonic()
        self.size = self.crc = 0

    def feed(self, data: bytes) -> None:
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        if not self._rate:
            return
        ahead = self.size / self._rate - (time.monotonic() - self._began)
        if ahead > _SLICE and self._transport.is_reading():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(ahead, self._resume)

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
