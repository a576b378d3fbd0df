"""The live view of every backend: what probes and outcomes say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from math import inf

from ..contracts import (
    WARMING_TIME,
    Backend,
    Candidate,
    Candidates,
    Check,
    Clock,
    Exchange,
    Fault,
    Live,
    Notify,
    Outcome,
    Provider,
    Verdict,
    Warmth,
    Workers,
    tell_nobody,
)
from ..spending.estimates import Estimates
from .control import Control
from .hooks import Hooks
from .roster import Roster
from .spelling import learn

# Looked up once: a member of an enumeration is slow to reach.
_GOOD, _LOADING = Verdict.GOOD, Fault.LOADING
_WARM, _WARMING, _UNKNOWN = Warmth.WARM, Warmth.WARMING, Warmth.UNKNOWN
_TOLD_START = 1.0  # s; a start longer than this is worth a line in the log
_LACKING_TIME = 300.0  # s that a model stays unlikely on a backend that said it has not got it
_LACKING_MOST = 256  # models remembered so, a backend
_WEIGHT = 0.2  # of the newest outcome in the moving averages: about the last ten count
_LOOK_PAUSE = 5.0  # s between two looks for a model that nobody serves
_LOOK_TIME = 2.0  # s that such a look takes at most
_LOOK_AT_ONCE = 64  # backends asked side by side


class Fleet(Roster):
    """Every backend with its live state, as requests and probes see it."""

    def __init__(
        self,
        backends: Iterable[Backend],
        providers: Mapping[str, Provider],
        *,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        version: str = "",
        notify: Notify = tell_nobody,
    ) -> None:
        self._control = control = Control(providers, version, notify)
        hooks = {name: Hooks.of(each, control.carriage) for name, each in providers.items()}
        super().__init__(backends, providers, hooks, clock, unix, notify)
        self.estimates = Estimates()
        self._asking: dict[str, asyncio.Task[Check | None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._look_again = 0.0

    def serving(self, model: str | None, tried: Collection[str]) -> list[Candidate]:
        """Candidates that serve `model` (a canonical name; None: any) and were not tried yet.

        A backend whose models are not known may serve any.
        """
        self._end_rents_in_time()
        found = []
        for backend, live in self.rows:
            if tried and backend.name in tried:
                continue
            models = live.models if backend.models is None else backend.models
            # The usual cases without a call: it lists the model, or never said that it lacks one.
            usual = not live.lacking if models is None else model in models
            if usual or model is None or self._serves(backend, live, model):
                found.append(Candidate(backend, live))
        return found

    def taking(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Those whose provider can take this very request."""
        hooks = self.hooks
        return [
            c
            for c in candidates
            if (takes := hooks[c.backend.provider].takes) is None or takes(c.backend, exchange)
        ]

    def knows(self, model: str) -> bool:
        """Whether some backend serves, or may serve, the model."""
        for backend, live in self.rows:
            if self._serves(backend, live, model):
                return True
        return not self.rows or self.unasked > 0  # who is still to be found may serve it

    def note(self, exchange: Exchange, outcome: Outcome, live: Live) -> None:
        """Learn latency, success and cost from one attempt."""
        live.last_used = now = self.now()
        live.occupied += now
        if outcome.verdict is _GOOD:
            live.warmth = _WARM
            live.warmth_until = live.cold_from = now + outcome.backend.stays_warm
            live.success += _WEIGHT * (1.0 - live.success)
            if outcome.status != 101:  # how long a tunnel lasts says nothing of requests
                self.estimates.note(live, exchange.work, outcome)
            ttft = outcome.ttft
            if outcome.cold_start is not None:
                # How fast it answers is another question than how long it takes to start.
                ttft = self._note_start(outcome.backend, live, outcome.cold_start, ttft)
            if ttft is not None:
                old = live.latency
                live.latency = ttft if old is None else old + _WEIGHT * (ttft - old)
        elif outcome.verdict is Verdict.STRIKE:
            live.success -= _WEIGHT * live.success
        elif outcome.fault is _LOADING:
            live.learn_warmth(_WARMING, now + WARMING_TIME)
        elif outcome.fault is Fault.DEADLINE and outcome.sent:
            # No strike, for the client chose how long to wait; but no sign of health either.
            live.success -= _WEIGHT / 2 * live.success

    def _note_start(
        self, backend: Backend, live: Live, seconds: float, ttft: float | None
    ) -> float | None:
        """Remember a cold start. Returns `ttft` without it, None where that is not known."""
        live.cold_starts.note(seconds)
        if seconds >= _TOLD_START:
            self._notify("backend.started", backend=backend.name, seconds=round(seconds, 3))
        return ttft - seconds if ttft is not None and ttft > seconds else None

    def lacks(self, live: Live, model: str) -> None:
        """A backend whose models were only assumed said that it has not got this one."""
        if len(live.lacking) >= _LACKING_MOST:
            live.lacking.clear()
        live.lacking[model] = self.now() + _LACKING_TIME

    def _serves(self, backend: Backend, live: Live, model: str) -> bool:
        models = live.models if backend.models is None else backend.models
        if models is not None:
            return model in models
        return model not in live.lacking or live.lacking[model] <= self.now()

    # -- what is asked of backends ---------------------------------------------------------------

    async def check(self, candidate: Candidate, seconds: float) -> Check | None:
        """See `contracts.Fleet.check`."""
        backend, live = candidate.backend, candidate.live
        wakes = self.hooks[backend.provider].wakes
        # A busy worker often takes one request at a time: beside it, too, a check would start one.
        would_start = live.in_flight > 0 or live.warmth_at(self.now()) is not _WARM
        if wakes is not None and would_start and wakes(backend):
            return None
        started = self.now()
        check = await self._control.ask(backend, seconds)
        if check is None:
            return None
        backend = self.current(backend, live)  # its row may have been revised meanwhile
        live.check = check
        live.last_check = self._unix()
        live.check_latency = check.latency if check.latency is not None else self.now() - started
        if check.warmth is not None:
            live.learn_warmth(check.warmth, self.now() + WARMING_TIME)
        elif check.fault is _LOADING:
            live.learn_warmth(_WARMING, self.now() + WARMING_TIME)
        elif check.verdict is _GOOD and check.models is not None and live.warmth is _WARMING:
            live.learn_warmth(_UNKNOWN, inf)  # it starts no more
        if check.kind is not None and backend.kind != check.kind:
            self.found_kind(live, check.kind)
        if check.capacity is not None:
            live.capacity = check.capacity
        learn(backend, live, check)
        return check

    async def finds(self, model: str) -> bool:
        """Whether some backend serves the model after all, by asking those that tell.

        It may be new there since they were last asked. One look at a time, and not soon again: who
        comes meanwhile waits for it, and learns from it. Who leaves does not end it.
        """
        if self._looking is None:
            if self.now() < self._look_again:
                return False
            self._looking = asyncio.create_task(self._look(), name="look for a model")
        await asyncio.shield(self._looking)
        return self.knows(model)

    async def _look(self) -> None:
        gate = asyncio.Semaphore(_LOOK_AT_ONCE)

        async def ask(candidate: Candidate) -> None:
            async with gate:
                await self.check(candidate, _LOOK_TIME)

        now = self.now()
        try:
            async with asyncio.timeout(_LOOK_TIME), asyncio.TaskGroup() as group:
                for candidate in self.candidates():
                    backend = candidate.backend
                    if backend.models is None and candidate.live.ejected_until <= now:
                        group.create_task(ask(candidate), name=f"look {backend.name}")
        except TimeoutError:
            pass  # who did not say in time may say it to a probe
        finally:
            self._look_again = self.now() + _LOOK_PAUSE
            self._looking = None

    def ask_soon(self, candidate: Candidate) -> None:
        """Ask a backend whether what it said still holds, unless it was asked just now."""
        name = candidate.backend.name
        if name in self._asking or self._unix() - candidate.live.last_check < _LOOK_PAUSE:
            return
        task = asyncio.create_task(self.check(candidate, _LOOK_TIME), name=f"ask {name}")
        self._asking[name] = task
        task.add_done_callback(lambda _: self._asking.pop(name))

    async def kept(self, backend: Backend, seconds: float) -> int | str:
        """See `Control.kept`."""
        return await self._control.kept(backend, seconds)

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        """See `Control.scale`."""
        return await self._control.scale(backend, workers, seconds)

    async def close(self) -> None:
        """End what is being asked, and close the sessions of the control plane."""
        asking = [*self._asking.values(), *([self._looking] if self._looking else [])]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await self._control.close()
