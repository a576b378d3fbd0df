"""The backends behind the proxy: workers that start and stop, faults and outages, what they bill.

They stand for what is outside; the facts are those of docs/providers.md, the speeds, the prices of
the defaults and the times of a start are made up, within what is known.

Rule 1: a worker has slots; in each a request takes its own time, whoever else is there.
Rule 2: a request finds a free slot, or waits for one on a worker that is starting, or starts a
    worker. Where there can be no further worker it waits (Ollama) or is refused by a 429 (RunPod).
Rule 3: what is billed is the request's own time here, the start that it waited for included: what
    anybody outside can see. What a serverless provider's invoice would say, the seconds that its
    workers were up, is counted beside it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from beacon_proxy.contracts import Fault, Reply

from .clock import Clock
from .trace import LARGE, SMALL, Request


@dataclass(frozen=True, slots=True)
class Family:
    """What all backends of one provider have in common."""

    head: float  # s before a request begins
    prefill: float  # tokens/s
    decode: float  # tokens/s of one request
    start: float  # s, median of a start
    idle: float  # s without a request after which a worker stops
    queues: bool  # waits for room instead of saying 429
    faults: float  # part of the requests that fail for no reason


FAMILIES = {
    # Ollama on a GPU of one's own: its model is unloaded after five minutes (OLLAMA_KEEP_ALIVE)
    "golem": Family(0.15, 1_500, 50, 6.0, 300.0, True, 0.006),
    # scaledown window of a minute
    "modal": Family(0.12, 4_000, 70, 18.0, 60.0, True, 0.002),
    # idle timeout of five seconds; over what its workers take it says 429
    "runpod": Family(0.12, 4_000, 70, 12.0, 5.0, False, 0.002),
}


@dataclass(frozen=True, slots=True)
class Site:
    """One backend: what the operator wrote down, and what it can really do."""

    name: str
    provider: str
    region: str
    models: tuple[str, ...]
    max_in_flight: int  # as configured
    workers: int  # at most
    slots: int  # of each


_BOTH = (SMALL, LARGE)
SITES = (
    Site("golem-us-1", "golem", "us-east", (SMALL,), 3, 1, 3),
    Site("golem-us-2", "golem", "us-east", (SMALL,), 3, 1, 3),
    Site("golem-us-3", "golem", "us-east", _BOTH, 3, 1, 3),
    Site("golem-eu-1", "golem", "eu-west", (SMALL,), 3, 1, 3),
    Site("golem-eu-2", "golem", "eu-west", _BOTH, 3, 1, 2),  # one waits without a word
    Site("modal-us", "modal", "us-east", _BOTH, 8, 4, 2),
    Site("modal-eu", "modal", "eu-west", (SMALL,), 8, 4, 2),
    Site("runpod-us", "runpod", "us-east", _BOTH, 6, 3, 2),
    Site("runpod-eu", "runpod", "eu-west", (SMALL,), 6, 2, 2),  # refuses two of six
)


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which some backends do not do their work; parts of the whole time."""

    begin: float
    end: float
    how: Literal["refuses", "stalls", "fails"]
    sites: tuple[str, ...]


OUTAGES = (
    # three of the five nodes of the baseline pool: two are gone, one accepts and never answers
    Outage(0.32, 0.40, "refuses", ("golem-us-1", "golem-us-3")),
    Outage(0.32, 0.40, "stalls", ("golem-us-2",)),
    # one burst provider: its edge answers 500
    Outage(0.66, 0.74, "fails", ("modal-us", "modal-eu")),
)


@dataclass(slots=True, eq=False)
class Visit:
    """One request at one backend, as the backend saw it."""

    id: str
    site: str
    began: float  # monotonic s
    ended: float = 0.0
    billed: float | None = None  # s
    usd: float = 0.0
    waited: float = 0.0  # s for a worker to start
    end: str = "abandoned"  # answered | abandoned | refused | failed | busy | cut


@dataclass(slots=True, eq=False)
class _Worker:
    """One process with the model in memory, once it has started."""

    begun_at: float
    ready_at: float
    running: int = 0
    idle_since: float = 0.0


class Place:
    """A running site.

    Attributes:
        visits: all that came, in order.
        starts: workers that were started.
        worker_seconds: that workers were up, as far as they have stopped.
    """

    def __init__(self, site: Site, price: float, clock: Clock, span: float, seed: int) -> None:
        """`price` is USD a second, `span` how long the whole takes (s)."""
        self.site, self.price, self.family = site, price, FAMILIES[site.provider]
        self._clock = clock
        self._rng = random.Random(f"{seed} {site.name}")
        self._workers: list[_Worker] = []
        self._line: deque[asyncio.Future[None]] = deque()  # who waits for a slot
        self._present: dict[Visit, tuple[Reply, asyncio.Task[None] | None]] = {}
        self._outages = [
            (clock.now + outage.begin * span, clock.now + outage.end * span, outage.how)
            for outage in OUTAGES
            if site.name in outage.sites
        ]
        self.visits: list[Visit] = []
        self.starts = 0
        self.worker_seconds = 0.0

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let its outages come."""
        for begin, _, how in self._outages:
            if how != "stalls":
                loop.call_at(begin, self._fall)

    def close(self) -> None:
        """Stop what is still up."""
        for worker in tuple(self._workers):
            self._stop(worker)

    @property
    def outage(self) -> str | None:
        now = self._clock.now
        return next((how for begin, end, how in self._outages if begin <= now < end), None)

    # -- a request -------------------------------------------------------------------------------

    async def serve(self, request: Request, reply: Reply) -> None:
        """Take one request from its arrival to its end, whatever that is."""
        now = self._clock.now
        visit = Visit(request.id, self.site.name, now)
        self.visits.append(visit)
        self._present[visit] = reply, asyncio.current_task()
        try:
            visit.end = await self._serve(request, reply, visit)
        finally:
            self._present.pop(visit, None)
            visit.ended = self._clock.now
            if visit.billed is None:
                visit.billed = visit.ended - visit.began
            visit.usd = visit.billed * self.price

    async def _serve(self, request: Request, reply: Reply, visit: Visit) -> str:
        outage = self.outage
        if outage == "refuses":
            reply.fail(Fault.REFUSED, "nobody listens there")
            return "refused"
        if outage == "fails":
            await asyncio.sleep(0.05)
            # as Modal's users report it
            words = "modal-http: internal error: function was terminated by signal"
            _tell(reply, 500, b"text/plain", words.encode())
            return "failed"
        if outage == "stalls":
            await _for_ever()
        worker = await self._slot(visit)
        if worker is None:
            _tell(reply, 429, _JSON, b'{"error":"too many requests"}')
            return "busy"
        try:
            return await self._work(request, reply, visit)
        finally:
            self._leave(worker)

    async def _work(self, request: Request, reply: Reply, visit: Visit) -> str:
        family, effort = self.family, request.effort
        # Which requests fail has to be the same in every run, whoever is asked when.
        luck = random.Random(f"{request.id} {self.site.name}").random() / family.faults
        await asyncio.sleep((family.head + request.input / family.prefill) * effort)
        if luck < 0.5:
            _tell(reply, 500, _JSON, b'{"error":"CUDA error: out of memory"}')
            return "failed"
        parts = min(request.output, _PIECES)
        each = request.output / family.decode * effort / parts
        if request.stream:
            reply.head(200, ((b"Content-Type", b"text/event-stream"),))
        for number in range(parts):
            if self.outage == "stalls":
                await _for_ever()
            if request.stream:
                reply.piece(_EVENT)
            await asyncio.sleep(each)
            if luck < 1.0 and number >= parts // 2:
                reply.fail(Fault.RESET, "the process died")
                return "cut"
            await reply.room()
        self._bill(visit, reply)
        usage = {"prompt_tokens": request.input, "completion_tokens": request.output}
        if request.stream:
            last: dict[str, Any] = {"choices": [], "usage": usage}
            reply.piece(_LAST_EVENT + b"data: %b\n\n" % json.dumps(last).encode() + _DONE)
        else:
            message = {"role": "assistant", "content": "words"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            document = json.dumps({"choices": [choice], "usage": usage})
            reply.head(200, ((b"Content-Type", _JSON),))
            reply.piece(document.encode())
        reply.end()
        return "answered"

    def _bill(self, visit: Visit, reply: Reply) -> None:
        """RunPod alone says what it bills, in whole milliseconds, and what the start took."""
        if self.site.provider == "runpod":
            visit.billed = round(self._clock.now - visit.began, 3)
            reply.billed(visit.billed)
            if visit.waited:
                reply.started_cold(visit.waited)

    # -- workers ---------------------------------------------------------------------------------

    async def _slot(self, visit: Visit) -> _Worker | None:
        """A place on a worker that is ready; None: there is no room, and no line."""
        while (worker := self._room()) is None:
            if not self.family.queues:
                return None
            turn = asyncio.get_running_loop().create_future()
            self._line.append(turn)
            await turn
        worker.running += 1
        wait = worker.ready_at - self._clock.now
        if wait > 0:
            visit.waited = wait
            try:
                await asyncio.sleep(wait)
            except asyncio.CancelledError:
                self._leave(worker)
                raise
        return worker

    def _room(self) -> _Worker | None:
        free = [worker for worker in self._workers if worker.running < self.site.slots]
        if free:
            return min(free, key=lambda worker: worker.ready_at)
        if len(self._workers) == self.site.workers:
            return None
        now = self._clock.now
        seconds = self._rng.lognormvariate(math.log(self.family.start), 0.35)
        worker = _Worker(now, now + round(seconds, 3))
        self._workers.append(worker)
        self.starts += 1
        return worker

    def _leave(self, worker: _Worker) -> None:
        """Give a slot back, to who waits for one."""
        worker.running -= 1
        if worker not in self._workers:
            return  # it fell
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if not worker.running:
            worker.idle_since = max(self._clock.now, worker.ready_at)
            when = worker.idle_since + self.family.idle
            asyncio.get_running_loop().call_at(when, self._retire, worker, worker.idle_since)

    def _retire(self, worker: _Worker, idle_since: float) -> None:
        if not worker.running and worker.idle_since == idle_since and worker in self._workers:
            self._stop(worker)

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self.worker_seconds += self._clock.now - worker.begun_at

    def _fall(self) -> None:
        """An outage begins: what runs is cut off, and the workers are gone."""
        for visit, (reply, task) in tuple(self._present.items()):
            reply.fail(Fault.RESET, "the connection was reset")
            visit.end = "cut"
            if task is not None:
                task.cancel()
        for worker in tuple(self._workers):
            self._stop(worker)

    # -- what it tells for free ------------------------------------------------------------------

    def health(self) -> dict[str, dict[str, int]]:
        """RunPod's `GET /v2/ENDPOINT_ID/health`."""
        now = self._clock.now
        ready = sum(worker.ready_at <= now for worker in self._workers)
        down = self.site.workers - len(self._workers)
        counts = {"idle": down, "ready": down, "running": ready}
        counts |= {"initializing": len(self._workers) - ready, "throttled": 0, "unhealthy": 0}
        return {"jobs": {"inQueue": 0, "inProgress": len(self._present)}, "workers": counts}


_PIECES = 3  # of a stream; each stands for a third of the tokens
_JSON = b"application/json"
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"words "}}]}\n\n'
_LAST_EVENT = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
_DONE = b"data: [DONE]\n\n"


def _tell(reply: Reply, status: int, kind: bytes, body: bytes) -> None:
    reply.head(status, ((b"Content-Type", kind),))
    reply.piece(body)
    reply.end()


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()
