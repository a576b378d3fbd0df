"""Looks at what is asked of each backend under `autoscale`, and tells its provider.

Rule 1: nothing here is on the way of a request. A provider that does not answer, or says no, costs
    a line in the log and is told again after the cooldown.
Rule 2: who raised the number of workers takes them back at its end: nobody is there to do it later,
    and each costs as long as it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from ..contracts import Backend, Candidate, Clock, Gauge, Notify, Workers
from .plan import Bounds, Plan

_LIMIT = 30.0  # s that a provider may take
_AT_END = 5.0  # s likewise when this process stops


class Fleet(Protocol):
    """The live view, as far as it is looked at, and the way to the providers."""

    def candidates(self) -> list[Candidate]: ...

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        """Tell the backend's provider; why it could not be told, or None where it was."""
        ...


class Scaler:
    """One task that scales the backends of `bounds`, by name.

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
        self._interval = interval
        self._dry_run = dry_run
        self._fleet = fleet
        self._waiting = waiting
        self._clock = clock
        self._notify = notify

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Scale from now on; at the end take back what was raised."""
        task = asyncio.create_task(self._run(), name="autoscale")
        task.add_done_callback(self._stopped)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            await self._take_back()

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._interval)

    async def look(self) -> None:
        """Look at every backend once, and tell the providers of those that need it."""
        due: list[tuple[Backend, Plan, int]] = []
        for backend, plan, running in self._here():
            workers = plan.look(running + self._waiting(backend.name), self._clock())
            if workers is not None:
                due.append((backend, plan, workers))
        await self._tell_all(due, _LIMIT)

    def _here(self) -> Iterator[tuple[Backend, Plan, int]]:
        for candidate in self._fleet.candidates():
            plan = self.plans.get(candidate.backend.name)
            if plan is not None:
                yield candidate.backend, plan, candidate.live.in_flight

    async def _tell_all(self, due: Iterable[tuple[Backend, Plan, int]], seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            for backend, plan, workers in due:
                group.create_task(
                    self._tell(backend, plan, workers, seconds), name=f"scale {backend.name}"
                )

    async def _tell(self, backend: Backend, plan: Plan, workers: int, seconds: float) -> None:
        before, event = plan.told, "autoscale.planned"
        if not self._dry_run:
            event = "autoscale.scaled"
            bounds = Workers(workers, max(plan.bounds.max, workers))
            problem = await self._fleet.scale(backend, bounds, seconds)
            if problem is not None:
                plan.tried(self._clock(), None)
                self._notify("autoscale.failed", backend=backend.name, detail=problem)
                return
        plan.tried(self._clock(), workers)
        self._notify(event, backend=backend.name, workers=workers, before=before)

    async def _take_back(self) -> None:
        raised = [
            (backend, plan, plan.bounds.min)
            for backend, plan, _ in self._here()
            if plan.told is not None and plan.told > plan.bounds.min
        ]
        await self._tell_all(raised, _AT_END)

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._notify("autoscale.stopped", error=repr(task.exception()))

    def gauges(self) -> Iterator[Gauge]:
        for name, plan in self.plans.items():
            of = (("backend", name),)
            yield Gauge(
                "autoscale_workers_wanted",
                "Workers that the demand asks for, within the bounds.",
                plan.wanted,
                of,
            )
            if plan.told is not None and not self._dry_run:
                yield Gauge(
                    "autoscale_workers_told",
                    "Workers that the provider was told last to keep.",
                    plan.told,
                    of,
                )
