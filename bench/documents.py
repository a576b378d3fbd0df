"""The load of documents: clients that ask again as soon as they have their answer."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from typing import Any, cast

from . import work
from .counts import Counts, Spec
from .framing import Broken, read


async def load(spec: Spec, counts: Counts) -> dict[str, Any]:
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
