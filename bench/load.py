"""The load: a process that asks, reads every answer to its last byte, and counts.

    python -m bench.load '{"kind": "documents", "port": 8080, "root": 4711, "connections": 32}'

prints one line of JSON: what it counted between the two ends of a window of `seconds`, with the CPU
seconds of the process tree `root` in that window. An answer that is wrong in any way is an error,
whenever it comes.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from . import transfer, work
from .framing import END_OF_HEAD, Broken, Chunks, length_of
from .processes import Tree
from .transfer import Sink, Source

STARTING = 200  # streams that may wait for their first token; more would test listen(2) alone


@dataclass
class Spec:
    """What to ask, of whom, and for how long."""

    kind: str  # documents, streams, upload or download
    port: int
    root: int = 0  # leader of the process tree that is measured; 0: none
    connections: int = 32
    warm: float = 1.0  # s before the window, at least
    seconds: float = 5.0  # of the window
    limit: float = 30.0  # s until all streams must have begun, and until the last answer ends
    backend: int = 0  # process that ends the streams at SIGUSR1; 0: they end by themselves
    exact: bool = True  # answers must be the backend's to the byte
    size: int = 0  # bytes of an upload or download
    rate: float = 0.0  # bytes/s at which a download is read; 0: as they come
    body: str = "file"  # of an upload: see transfer.BODIES


@dataclass
class Counts:
    """What was seen; `errors` from the beginning, all else since `begin`."""

    root: int
    errors: Counter[str] = field(default_factory=Counter)
    done: int = 0  # answers
    tokens: int = 0
    times: list[float] = field(default_factory=list)  # s of an answer, or of a token's way
    all_done: int = 0  # answers since the start of the load, good ones

    def begin(self) -> None:
        self.done = self.tokens = 0
        self.times.clear()
        self._began = time.perf_counter()
        self._cpu = Tree(self.root).cpu() if self.root else 0.0

    def end(self) -> dict[str, Any]:
        """The figures of the window."""
        seconds = time.perf_counter() - self._began
        found: dict[str, Any] = {"seconds": seconds, "done": self.done, "tokens": self.tokens}
        found |= quantiles(self.times)
        if self.root:
            tree = Tree(self.root)
            found["cpu"] = tree.cpu() - self._cpu
            memory = tree.memory()
            found |= {"rss": memory.rss, "pss": memory.pss, "peak": memory.peak}
        return found


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p50 and p99, by the nearest rank; none where there is no time."""
    ordered = sorted(times)
    ranks = {"p50": 0.5, "p99": 0.99}
    return {n: ordered[int(q * (len(ordered) - 1) + 0.5)] for n, q in ranks.items() if ordered}


class Documents(asyncio.Protocol):
    """One client: asks, reads the answer, asks again, on one connection as long as it lasts."""

    def __init__(self, spec: Spec, counts: Counts, answers: work.Answers, lane: int) -> None:
        self._spec, self._counts, self._answers = spec, counts, answers
        host = f"127.0.0.1:{spec.port}"
        self._requests = work.Requests(host, lane + 1, spec.connections)
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._asked = False
        self.stopping = False
        self.idle = asyncio.Event()  # stopped, and no answer is owed

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", self._spec.port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._asked:
            self._fail("connection lost")

    def _ask(self) -> None:
        if self.stopping:
            self.stop()
            return
        assert self._transport is not None
        self._number, data = self._requests.next()
        self._asked = True
        self._began = time.perf_counter()
        self._transport.write(data)

    def stop(self) -> None:
        """Ask no more."""
        self.stopping = True
        if not self._asked:
            self.idle.set()
            if self._transport is not None:
                self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._rest = data = self._rest + data if self._rest else data
        try:
            answer = read(data)
            if answer is None:
                return
            head, body = answer
            fault = "an answer nobody asked for" if not self._asked else self._fault(head, body)
        except (Broken, ValueError, OSError, LookupError) as exc:
            fault = str(exc)
            head = b""
        if fault:
            self._fail(fault)
            return
        self._rest = b""
        self._asked = False
        self._counts.done += 1
        self._counts.all_done += 1
        self._counts.times.append(now - self._began)
        if b"\r\nconnection: close" in head:
            self._again()
        else:
            self._ask()

    def _fault(self, head: bytes, body: bytes) -> str | None:
        if not head.startswith(b"http/1.1 200 "):
            return f"status {head[9:12].decode()}"
        expected = self._answers.body(self._number)
        if body == expected:
            return None
        if self._spec.exact:
            return "another answer than the backend's"
        if b"\r\ncontent-encoding: gzip" in head:
            body = gzip.decompress(body)
        said = json.loads(body)["choices"][0]["message"]["content"]
        wanted = json.loads(expected)["choices"][0]["message"]["content"]
        return None if said == wanted else "another text than the backend's"

    def _fail(self, fault: str) -> None:
        self._counts.errors[fault] += 1
        self._asked, self._rest = False, b""
        self._again(0.05)

    def _again(self, pause: float = 0.0) -> None:
        """Go on with a new connection."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if self.stopping:
            self.stop()
            return
        loop = asyncio.get_running_loop()
        loop.call_later(pause, lambda: setattr(self, "_task", loop.create_task(self._retry())))

    async def _retry(self) -> None:
        try:
            await self.connect()
        except OSError as exc:
            self._fail(f"cannot connect: {exc.strerror}")


def read(data: bytes) -> tuple[bytes, bytes] | None:
    """Head, in lower case, and body of an answer; None: it is not whole.

    Raises:
        Broken: it never will be, or more than it came.
    """
    end = data.find(END_OF_HEAD)
    if end < 0:
        return None
    head = data[:end].lower()
    length = length_of(head)
    if length is None:
        chunks = Chunks()
        body = chunks.feed(data[end + 4 :])
        return (head, body) if chunks.done else None
    missing = end + 4 + length - len(data)
    if missing < 0:
        raise Broken("more bytes than the answer has")
    return None if missing else (head, data[end + 4 :])


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


async def run(spec: Spec) -> dict[str, Any]:
    """Run one load; a fault of its own is an error like any other."""
    counts = Counts(spec.root)

    def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        counts.errors[f"in the load: {context.get('exception') or context['message']!r}"] += 1

    asyncio.get_running_loop().set_exception_handler(failed)
    found = await KINDS[spec.kind](spec, counts)
    if not counts.all_done and not counts.errors:
        counts.errors["no good answer at all"] += 1
    return found | {"answers": counts.all_done, "errors": dict(counts.errors)}


async def load_documents(spec: Spec, counts: Counts) -> dict[str, Any]:
    answers = work.Answers()
    lanes = [Documents(spec, counts, answers, n) for n in range(spec.connections)]
    for lane in lanes:
        await lane.connect()
    await asyncio.sleep(spec.warm)
    counts.begin()
    await asyncio.sleep(spec.seconds)
    found = counts.end()
    for lane in lanes:
        lane.stop()
    try:
        async with asyncio.timeout(spec.limit):
            for lane in lanes:
                await lane.idle.wait()
    except TimeoutError:
        counts.errors["no answer"] += sum(not lane.idle.is_set() for lane in lanes)
    return found


async def load_streams(spec: Spec, counts: Counts) -> dict[str, Any]:
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
        await asyncio.sleep(max(0.5, spec.warm - (time.monotonic() - began)))
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
        length, pieces = transfer.BODIES[self._spec.body](size)
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
            whole = sink.crc == transfer.crc_of(transfer.blocks(sink.size))
            self._end(None if whole else "an answer with other bytes")

    def _fault(self, head: bytes, body: bytes) -> str | None:
        if not head.startswith(b"http/1.1 200 "):
            return f"status {head[9:12].decode()}"
        length, pieces = transfer.BODIES[self._spec.body](self._spec.size)
        said = json.loads(body)
        if (said["size"], said["crc"]) != (length, transfer.crc_of(pieces)):
            return "an upload that came with other bytes"
        return None

    def _end(self, fault: str | None) -> None:
        if not self.ended.done():
            self.ended.set_result(fault)
            self._transport.abort()


async def load_transfer(spec: Spec, counts: Counts) -> dict[str, Any]:
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


KINDS = {
    "documents": load_documents,
    "streams": load_streams,
    "upload": load_transfer,
    "download": load_transfer,
}


if __name__ == "__main__":
    given = Spec(**json.loads(sys.argv[1]))
    gc.disable()  # a load lasts seconds, and its pauses would be measured as the proxy's
    print(json.dumps(uvloop.run(run(given))), flush=True)
