"""The load of one large body: an upload or a download."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any, cast

from . import bodies, work
from .bodies import Sink, Source
from .counts import Counts, Spec
from .framing import END_OF_HEAD, Broken, Chunks, length_of, read
from .processes import Tree


async def load(spec: Spec, counts: Counts) -> dict[str, Any]:
    """One upload or download; the window is the whole of it, and the peak is of its time."""
    tree = Tree(spec.root)
    if spec.root:
        tree.forget_peak()
    before = tree.memory().rss if spec.root else 0
    counts.begin()
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Transfer(spec), "127.0.0.1", spec.port)
    fault: str | None = "no end"
    with suppress(TimeoutError):
        async with asyncio.timeout(spec.limit):
            fault = await client.ended
    if fault:
        counts.errors[fault] += 1
    else:
        counts.all_done += 1
    return counts.end() | {"before": before}


class Transfer(asyncio.Protocol):
    """One client of one large request or answer."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._rest = b""
        self._sink: Sink | None = None
        self._source: Source | None = None
        self.ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        host, size = f"127.0.0.1:{self._spec.port}", self._spec.size
        if self._spec.kind == "download":
            self._transport.write(work.plain_head(f"GET /v1/files/{size}/content", host))
            return
        length, pieces = bodies.BODIES[self._spec.body](size)
        target = "/v1/chat/completions" if self._spec.body == "chat" else "/v1/files"
        self._transport.write(work.plain_head(f"POST {target}", host, length))
        self._source = Source(self._transport, pieces)

    def pause_writing(self) -> None:
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        if self._source is not None:
            self._source.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("connection lost")

    def data_received(self, data: bytes) -> None:
        try:
            if self._sink is not None:
                self._take(data)
                return
            self._rest = data = self._rest + data
            if self._spec.kind == "download":
                self._begin(data)
            elif (answer := read(data)) is not None:
                self._end(self._fault(*answer))
        except (Broken, ValueError, LookupError) as exc:
            self._end(str(exc))

    def _begin(self, data: bytes) -> None:
        end = data.find(END_OF_HEAD)
        if end < 0:
            return
        head = data[:end].lower()
        if not head.startswith(b"http/1.1 200 "):
            raise Broken(f"status {head[9:12].decode()}")
        self._chunks = Chunks() if length_of(head) is None else None
        if self._chunks is None and length_of(head) != self._spec.size:
            raise Broken("an answer of another length")
        self._sink = Sink(self._transport, self._spec.rate)
        if len(data) > end + 4:
            self._take(data[end + 4 :])

    def _take(self, data: bytes) -> None:
        sink, chunks = self._sink, self._chunks
        assert sink is not None
        sink.feed(data if chunks is None else chunks.feed(data))
        if sink.size > self._spec.size:
            raise Broken("more bytes than the answer has")
        if sink.size == self._spec.size and (chunks is None or chunks.done):
            whole = sink.crc == bodies.crc_of(bodies.blocks(sink.size))
            self._end(None if whole else "an answer with other bytes")

    def _fault(self, head: bytes, body: bytes) -> str | None:
        if not head.startswith(b"http/1.1 200 "):
            return f"status {head[9:12].decode()}"
        length, pieces = bodies.BODIES[self._spec.body](self._spec.size)
        said = json.loads(body)
        if (said["size"], said["crc"]) != (length, bodies.crc_of(pieces)):
            return "an upload that came with other bytes"
        return None

    def _end(self, fault: str | None) -> None:
        if not self.ended.done():
            self.ended.set_result(fault)
            self._transport.abort()
