"""Looks at what is asked of each backend under `autoscale`, and tells its provider.

Rule 1: nothing here is on the way of a request. A provider that does not answer, or says no, costs
    a line in the log and is asked again after the cooldown. Each backend has a loop of its own: no
    provider waits for another, and no backend gets two orders at once.
Rule 2: who raised the number of workers takes them back at its end: nobody is there to do it later,
    and each costs as long as it runs. An order that had no good answer may have been done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from ..contracts import Backend, Candidate, Clock, Gauge, Notify, Workers
from .plan import Bounds, Plan

_LIMIT = 30.0  # s that a provider may take for one answer
_AT_END = 5.0  # s likewise when this process stops


class Fleet(Protocol):
    """The live view, as far as it is looked at, and the way to the providers."""

    def candidates(self) -> list[Candidate]: ...

    async def kept(self, backend: Backend, seconds: float) -> int | str:
        """How many workers the backend's provider keeps at least, or why it does not say."""
        ...

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        """Tell the backend's provider; why it could not be told, or None where it was."""
        ...


class Scaler:
    """Scales the backends of `bounds`, by name.

    `waiting` says how many exchanges wait for room and would take that backend.
    """

    def __init__(
        self,
        bounds: Mapping[str, Bounds],
        *,
        interval: float,
        dry_run: bool,
        fleet: Fleet,
        waiting: Callable[[str], int],
        clock: Clock,
        notify: Notify,
    ) -> None:
        now = clock()
        self.plans = {name: Plan(each, now) for name, each in bounds.items()}
        if dry_run:  # nobody is asked: what is kept is what would be without demand
            for plan in self.plans.values():
                plan.kept = plan.bounds.min
        self._interval = interval
        self._dry_run = dry_run
        self._fleet = fleet
        self._waiting = waiting
        self._clock = clock
        self._notify = notify
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Scale from now on; at the end take back what was raised."""
        task = asyncio.create_task(self._run(), name="autoscale")
        task.add_done_callback(self._stopped)
        try:
            yield
        finally:
            self._stop.set()
            # An order under way first: cut off, it might yet be done after it was taken back.
            await asyncio.wait([task], timeout=_AT_END)
            task.cancel()
            await asyncio.wait([task])
            await self._take_back()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name in self.plans:
                group.create_task(self._each(name), name=f"scale {name}")

    async def _each(self, name: str) -> None:
        while not self._stop.is_set():
            await self.look(name)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._stop.wait()

    async def look(self, name: str) -> None:
        """Look at one backend once, and ask and tell its provider where that is due."""
        found = self._found(name)
        if found is None:
            return
        backend, running = found
        plan = self.plans[name]
        if not plan.look(running + self._waiting(name), self._clock()):
            return
        if not self._dry_run and not await self._hear(backend, plan):
            return
        workers = plan.order(self._clock())
        if workers is not None and not self._stop.is_set():
            await self._tell(backend, plan, workers, _LIMIT)

    def _found(self, name: str) -> tuple[Backend, int] | None:
        """The backend, and how many requests run there."""
        for candidate in self._fleet.candidates():
            if candidate.backend.name == name:
                return candidate.backend, candidate.live.in_flight
        return None

    async def _hear(self, backend: Backend, plan: Plan) -> bool:
        kept = await self._fleet.kept(backend, _LIMIT)
        if isinstance(kept, str):
            self._failed(backend, plan, kept)
            return False
        plan.heard(kept, self._clock())
        return True

    async def _tell(self, backend: Backend, plan: Plan, workers: int, seconds: float) -> None:
        before, event = plan.kept, "autoscale.planned"
        plan.tells(self._clock())
        if not self._dry_run:
            event = "autoscale.scaled"
            bounds = Workers(workers, max(plan.bounds.max, workers))
            problem = await self._fleet.scale(backend, bounds, seconds)
            if problem is not None:
                self._failed(backend, plan, problem)
                return
        plan.told(workers, self._clock())
        self._notify(event, backend=backend.name, workers=workers, before=before)

    def _failed(self, backend: Backend, plan: Plan, problem: str) -> None:
        plan.failed(self._clock())
        self._notify("autoscale.failed", backend=backend.name, detail=problem)

    async def _take_back(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, plan in self.plans.items():
                found = self._found(name) if plan.raised else None
                if found is not None:
                    back = self._tell(found[0], plan, plan.bounds.min, _AT_END)
                    group.create_task(back, name=f"scale {name}")

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._notify("autoscale.stopped", error=repr(error))

    def gauges(self) -> Iterator[Gauge]:
        for name, plan in self.plans.items():
            of = (("backend", name),)
            yield Gauge(
                "autoscale_workers_wanted",
                "Workers that the demand asks for, within the bounds.",
                plan.wanted,
                of,
            )
            if plan.kept is not None and not self._dry_run:
                yield Gauge(
                    "autoscale_workers_told",
                    "Workers that the provider keeps at least, by its last answer.",
                    plan.kept,
                    of,
                )
