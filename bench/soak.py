"""The soak: a thousand clients who come, read, and sometimes leave, while backends die under them.

    python -m bench.soak '{"port": 8080, "root": 4711, "seconds": 600, "record": "sent.json"}'

prints one line of JSON: how the process tree fared, before, meanwhile and after. What became of
each request is written to `record`; `account.account` holds that
against the proxy's own log and metrics.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import uvloop

from . import work
from .account import PREFIX, Sent, write_record
from .framing import END_OF_HEAD, Broken, Chunks, length_of
from .processes import Tree

HOUR = 3600.0


@dataclass
class Spec:
    """How the clients behave."""

    port: int
    root: int
    record: str  # file that gets what became of each request
    probe: str = ""  # file into which the proxy writes its number of tasks when it gets SIGUSR2
    clients: int = 1000
    seconds: float = 600.0
    warm: float = 120.0  # s at the beginning that the slope of the RSS leaves out
    seed: int = 1
    limit: float = 60.0  # s that an answer may take at most
    leaving: float = 0.2  # share of the requests whose client leaves
    patience: float = 8.0  # s after which it has left for sure
    documents: float = 0.1  # share of the requests that ask for a document
    pause: float = 0.5  # s at most between two requests of a client
    staying: float = 0.7  # share of the answers after which a client keeps its connection
    rest: float = (
        8.0  # s that nobody asks, before and after: connections to backends idle 4 at most
    )


class Line(asyncio.Protocol):
    """A client's connection: one request at a time, until one side has enough."""

    def __init__(self) -> None:
        self._sent: Sent | None = None
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._sent is not None:
            self._end("cut" if self._sent.heard else "silent")

    def ask(self, sent: Sent, request: bytes, number: int, expected: bytes) -> asyncio.Future[None]:
        """Send; the future is done once `sent` says what came of it."""
        self._sent, self._number, self._expected = sent, number, expected
        self._head, self._body = b"", b""
        self._chunks: Chunks | None = None
        self._length: int | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._ended

    def leave(self, *, rudely: bool) -> None:
        """Go before the answer has ended."""
        if self._sent is None:
            return
        self._end("left")
        self.open = False
        if rudely:
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._sent is None:
            return
        self._sent.heard = True
        try:
            if not self._head:
                self._body += data
                end = self._body.find(END_OF_HEAD)
                if end < 0:
                    return
                self._head, data = self._body[:end].lower(), self._body[end + 4 :]
                self._body = b""
                self._sent.status = int(self._head[9:12])
                self._length = length_of(self._head)
                self._chunks = Chunks() if self._length is None else None
            self._body += self._chunks.feed(data) if self._chunks else data
            if self._chunks.done if self._chunks else len(self._body) == self._length:
                self._whole(self._sent)
        except (Broken, ValueError) as exc:
            self._sent.detail = str(exc)
            self._end("wrong")

    def _whole(self, sent: Sent) -> None:
        if b"\r\nconnection: close" in self._head:
            self.open = False
        if sent.status != 200:
            self._end("answered")
        elif b"\r\ncontent-type: text/event-stream" in self._head:
            self._end("complete" if _is_whole(self._body) else "wrong")
        else:
            self._end("complete" if self._body == self._expected else "wrong")

    def _end(self, result: str) -> None:
        assert self._sent is not None
        self._sent.result = result
        self._sent = None
        if not self._ended.done():
            self._ended.set_result(None)


def _is_whole(events: bytes) -> bool:
    """Whether a stream has all the tokens that the backend says it sent, and its end marker."""
    at = events.rfind(work.TOTAL) + len(work.TOTAL)
    total = events[at : at + work.DIGITS]
    tokens = events.count(work.STAMP)
    return total.isdigit() and tokens == int(total) and events.endswith(b"data: [DONE]\n\n")


class Soak:
    """All clients, and what is measured while they run."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._rng = random.Random(spec.seed)
        self._answers = work.Answers()
        self._numbers = count(1)
        self._stopping = asyncio.Event()
        self.sent: list[Sent] = []
        self.errors: Counter[str] = Counter()
        self._tree = Tree(spec.root)

    async def run(self) -> dict[str, Any]:
        spec = self._spec
        before = await self._at_rest()
        began = time.monotonic()
        clients = [asyncio.create_task(self._client(n)) for n in range(spec.clients)]
        samples: list[tuple[float, float]] = []
        most = 0
        while (at := time.monotonic() - began) < spec.seconds:
            samples.append((at, float(self._tree.rss())))
            most = max(most, self._tree.descriptors())
            await asyncio.sleep(1)
        self._stopping.set()
        _, late = await asyncio.wait(clients, timeout=2 * spec.limit)
        for client in late:
            self.errors["a client that does not end"] += 1
            client.cancel()
        for client in clients:
            if client.done() and not client.cancelled() and client.exception():
                self.errors[f"in the soak: {client.exception()!r}"] += 1
        after = await self._at_rest()
        kept = [sample for sample in samples if sample[0] >= spec.warm] or samples
        return {
            "before": before,
            "after": after,
            "metrics": (await self._metrics()).decode(),
            "samples": samples,
            "slope": slope(kept) * HOUR,
            "most_descriptors": most,
            "errors": dict(self.errors),
        }

    async def _at_rest(self) -> dict[str, float]:
        """The least that the tree holds while nobody asks."""
        seen = []
        until = time.monotonic() + self._spec.rest
        while time.monotonic() < until:
            await asyncio.sleep(min(0.5, self._spec.rest / 4))
            seen.append((self._tree.descriptors(), self._tree.threads(), self._tree.rss()))
        descriptors, threads, rss = (min(each) for each in zip(*seen, strict=True))
        found: dict[str, float] = {"descriptors": descriptors, "threads": threads, "rss": rss}
        if self._spec.probe:
            found |= await asyncio.to_thread(probe, self._spec.root, Path(self._spec.probe))
        return found

    async def _metrics(self) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._spec.port)
        writer.write(
            b"GET /metrics HTTP/1.1\r\nHost: bench\r\nAccept: text/plain\r\n"
            b"Connection: close\r\n\r\n"
        )
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        return answer.partition(END_OF_HEAD)[2]

    async def _client(self, lane: int) -> None:
        spec, rng = self._spec, self._rng
        line: Line | None = None
        host = f"127.0.0.1:{spec.port}"
        await asyncio.sleep(rng.uniform(0, min(5.0, spec.seconds / 4)))
        while not self._stopping.is_set():
            if line is None or not line.open:
                line = await self._connect()
                if line is None:
                    await asyncio.sleep(0.2)
                    continue
            await self._ask(line, host)
            if rng.random() > spec.staying and line.open:
                line.transport.close()
                line.open = False
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0, spec.pause)):
                    await self._stopping.wait()
        if line is not None:
            line.transport.close()

    async def _connect(self) -> Line | None:
        loop = asyncio.get_running_loop()
        try:
            _, line = await loop.create_connection(Line, "127.0.0.1", self._spec.port)
        except OSError as exc:
            self.errors[f"cannot connect: {exc.strerror}"] += 1
            return None
        return line

    async def _ask(self, line: Line, host: str) -> None:
        spec, rng, number = self._spec, self._rng, next(self._numbers)
        wants_stream = rng.random() > spec.documents
        sent = Sent(f"{PREFIX}{number}")
        self.sent.append(sent)
        _, request = work.Requests(host, number, stream=wants_stream, texts=1).next()
        end = request.find(b"\r\n") + 2
        request = request[:end] + b"X-Request-Id: %b\r\n" % sent.id.encode() + request[end:]
        ended = line.ask(sent, request, number, self._answers.body(number))
        goes = rng.random() < spec.leaving
        after, rudely = rng.uniform(0, spec.patience), rng.random() < 0.5
        done, _ = await asyncio.wait([ended], timeout=after if goes else spec.limit)
        if not done:
            if not goes:
                self.errors["an answer that does not end"] += 1
            line.leave(rudely=rudely)


def probe(root: int, path: Path) -> dict[str, float]:
    """What the process tells of itself; see probe/sitecustomize.py.

    Raises:
        TimeoutError: it does not.
    """
    path.unlink(missing_ok=True)
    os.kill(root, signal.SIGUSR2)
    deadline = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the proxy does not tell how many tasks it has")
        time.sleep(0.05)
    return dict(json.loads(path.read_text()))


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """How much the second grows with the first, by least squares; 0 where that is not defined."""
    n = len(samples)
    if n < 2:
        return 0.0
    x, y = (sum(column) / n for column in zip(*samples, strict=True))
    spread = sum((a - x) ** 2 for a, _ in samples)
    return sum((a - x) * (b - y) for a, b in samples) / spread if spread else 0.0


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    soak = Soak(spec)
    found = uvloop.run(soak.run())
    write_record(Path(spec.record), soak.sent)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
