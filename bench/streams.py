"""The load of streams: each client has one, all are open at the same time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from typing import Any, cast

from . import work
from .counts import Counts, Spec
from .framing import END_OF_HEAD, Broken, Chunks, length_of
from .processes import Tree

STARTING = 200  # streams that may wait for their first token; more would test listen(2) alone

SETTLE = 1.0  # s between the first token of the last stream and the window, at least


async def load(spec: Spec, counts: Counts) -> dict[str, Any]:
    """The window begins when every stream has a token; after it the backend ends them all."""
    before = Tree(spec.root).memory().rss if spec.root else 0
    lanes = [Tokens(spec, counts, n) for n in range(spec.connections)]
    ramp = spec.warm * 0.7
    starting = asyncio.Semaphore(STARTING)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(lane.run(ramp * n / len(lanes), starting))
            for n, lane in enumerate(lanes)
        ]
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(spec.limit):
                for lane in lanes:
                    await lane.begun.wait()
        await asyncio.sleep(max(SETTLE, spec.warm - (time.monotonic() - began)))
        counts.begin()
        await asyncio.sleep(spec.seconds)
        found = counts.end()
        if idle := sum(not lane.begun.is_set() for lane in lanes):
            counts.errors["a stream that did not begin"] += idle
        if early := sum(lane.ended.done() for lane in lanes):
            counts.errors["a stream that ended too early"] += early
        if spec.backend:
            os.kill(spec.backend, signal.SIGUSR1)
        _, late = await asyncio.wait(tasks, timeout=spec.limit)
        for task in late:
            counts.errors["a stream that does not end"] += 1
            task.cancel()
    return found | {"before": before}


class Tokens(asyncio.Protocol):
    """One client of one stream."""

    def __init__(self, spec: Spec, counts: Counts, lane: int) -> None:
        self._spec, self._counts = spec, counts
        host = f"127.0.0.1:{spec.port}"
        self.number, self._request = work.Requests(host, lane + 1, stream=True, texts=1).next()
        self._transport: asyncio.Transport | None = None
        self._rest = b""  # of the head, then of an event that is not whole
        self._chunks: Chunks | None = None
        self.tokens, self._total = 0, -1  # that came, and that the backend says it sent
        self._marked = False  # the stream has said that it ends
        self.begun = asyncio.Event()  # it has a token, or never will
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, delay: float, starting: asyncio.Semaphore) -> None:
        """Ask after `delay` s, when it is our turn, and wait for the end of the answer."""
        await asyncio.sleep(delay)
        loop = asyncio.get_running_loop()
        async with starting:
            try:
                await loop.create_connection(lambda: self, "127.0.0.1", self._spec.port)
            except OSError as exc:
                self._end(f"cannot connect: {exc.strerror}")
            await self.begun.wait()
        await self.ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("a stream that was cut")

    def data_received(self, data: bytes) -> None:
        try:
            if self._chunks is None:
                data = self._head(data)
            if data and self._chunks is not None:
                self._events(self._chunks.feed(data))
                if self._chunks.done:
                    self._end(self._fault())
        except (Broken, ValueError) as exc:
            self._end(str(exc))

    def _head(self, data: bytes) -> bytes:
        self._rest = data = self._rest + data
        end = data.find(END_OF_HEAD)
        if end < 0:
            return b""
        head = data[:end].lower()
        if not head.startswith(b"http/1.1 200 "):
            raise Broken(f"status {head[9:12].decode()}")
        if length_of(head) is not None or b"\r\ncontent-type: text/event-stream" not in head:
            raise Broken("an answer that is no stream")
        self._rest = b""
        self._chunks = Chunks()
        return data[end + 4 :]

    def _events(self, payload: bytes) -> None:
        if self._rest:
            payload = self._rest + payload
        if payload.endswith(b"\n\n"):
            self._rest = b""
        else:
            end = payload.rfind(b"\n\n") + 2 if b"\n\n" in payload else 0
            payload, self._rest = payload[:end], payload[end:]
        at = payload.rfind(work.STAMP)
        if at >= 0:
            found = payload.count(work.STAMP)
            counts = self._counts
            counts.tokens += found
            self.tokens += found
            self.begun.set()
            at += len(work.STAMP)
            sent = int(payload[at : at + work.STAMP_DIGITS])
            counts.times.append(time.monotonic() - sent / 1e6)
        at = payload.find(work.TOTAL)
        if at >= 0:
            at += len(work.TOTAL)
            self._total = int(payload[at : at + work.DIGITS])
        if payload.endswith(b"data: [DONE]\n\n"):
            self._marked = True

    def _fault(self) -> str | None:
        if not self._marked or self._rest:
            return "a stream without its end marker"
        if self.tokens != self._total:
            return f"a stream with {self.tokens} of {self._total} tokens"
        return None

    def _end(self, fault: str | None) -> None:
        if self.ended.done():
            return
        self.ended.set_result(None)
        self.begun.set()
        if fault is None:
            self._counts.all_done += 1
        else:
            self._counts.errors[fault] += 1
        if self._transport is not None:
            (self._transport.abort if fault else self._transport.close)()
