"""The sources, each asked in its own time, and the fleet made of what they answered last.

The fleet is a function of the last good answers alone: the backends of beacon.yaml, then those of
each source in the order of the configuration. Of two with one name the first stands.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..config import Settings
from ..config.backends import Discovery
from ..contracts import Backend, Clock, Notify, Provider
from .answer import NoAnswer, Source, raised
from .rows import backends_of

JITTER = 0.1  # of the interval, either way: instances must not ask in step
_TOLD_MOST = 10  # problems of one answer in the log


class Fleet(Protocol):
    """Who is told what was found."""

    unasked: int  # sources that have not answered yet

    def follow(self, found: Iterable[Backend]) -> None:
        """Take the discovered backends to be these, from now on."""
        ...


@dataclass(slots=True)
class Watched:
    """A source and what is known of it."""

    source: Source
    settings: Discovery
    label: str  # for the operator
    found: Sequence[Backend] = ()
    answered: bool = False  # ever
    refused: bool = False  # its last answer had rows, and none that could be taken
    failing: str | None = None  # why, as told
    problems: Sequence[str] = ()  # as told
    clashes: frozenset[str] = field(default=frozenset())  # as told
    placed: bool = True  # so far each backend came with a region


class Refresher:
    """Asks every source until it is closed."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: Settings,
        providers: Mapping[str, Provider],
        fleet: Fleet,
        *,
        clock: Clock,
        rng: random.Random,
        notify: Notify,
    ) -> None:
        """`sources` are those of the rows of `settings.discovery`, one each."""
        self._settings = settings
        self._providers = providers
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._notify = notify
        self._configured = frozenset(row.name for row in settings.backends)
        self.sources = [
            Watched(source, row, f"discovery[{number}] ({source.name})")
            for number, (source, row) in enumerate(zip(sources, settings.discovery, strict=True))
        ]
        self._tasks: list[asyncio.Task[None]] = []
        fleet.unasked = len(self.sources)

    def start(self) -> None:
        """Begin to look, in the running loop; returns at once."""
        for watched in self.sources:
            task = asyncio.create_task(self._watch(watched), name=f"discovery {watched.label}")
            task.add_done_callback(self._stopped(watched.label))
            self._tasks.append(task)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for watched in self.sources:
            await watched.source.close()

    def answering(self) -> dict[str, bool]:
        """Each source by its place in the configuration, and whether its last look went well."""
        return {
            f"discovery[{number}]": watched.failing is None
            for number, watched in enumerate(self.sources)
        }

    async def _watch(self, watched: Watched) -> None:
        while True:
            await self.look(watched)
            stretch = self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)
            await watched.source.rest(watched.settings.interval * stretch)

    async def look(self, watched: Watched) -> None:
        """Ask one source once and do as it says."""
        limit = watched.settings.timeout
        try:
            async with asyncio.timeout(limit):
                answer = await watched.source.look()
        except TimeoutError:
            self._failed(watched, f"no answer within {limit:g} s")
            return
        except NoAnswer as exc:
            self._failed(watched, str(exc))
            return
        except Exception as exc:  # whatever it was: the next look may go well
            self._failed(watched, f"the look itself failed: {raised(exc)}")
            return
        if answer is not None:
            found, problems = await backends_of(
                answer, watched.settings, self._settings, self._providers, watched.found
            )
            self._skipped(watched, problems)
            watched.refused = bool(answer) and not found
            if not watched.refused:
                self._take(watched, found)
        if watched.refused:  # also while it goes on saying the same
            self._failed(watched, "has rows, but none that is right")
            return
        self._recovered(watched)

    def _failed(self, watched: Watched, why: str) -> None:
        if watched.failing is None:
            self._notify(
                "discovery.failed", source=watched.label, error=why, kept=len(watched.found)
            )
        watched.failing = why

    def _recovered(self, watched: Watched) -> None:
        if watched.failing is not None:
            self._notify("discovery.recovered", source=watched.label, found=len(watched.found))
        watched.failing = None

    def _skipped(self, watched: Watched, problems: Sequence[str]) -> None:
        if problems and problems != watched.problems:
            self._notify(
                "discovery.skipped",
                source=watched.label,
                problems=list(problems[:_TOLD_MOST]),
                count=len(problems),
            )
        watched.problems = problems

    def _take(self, watched: Watched, found: Sequence[Backend]) -> None:
        if watched.answered:
            # The first answer of all is the fleet as it was when we came, and warm for all we know.
            now = self._clock()
            found = [replace(backend, joined=now) for backend in found]
        else:
            watched.answered = True
            self._fleet.unasked -= 1
        watched.found = found
        nowhere = [backend.name for backend in found if backend.region_assumed]
        if nowhere and watched.placed:
            watched.placed = False
            self._notify(
                "discovery.unplaced",
                source=watched.label,
                assumed=self._settings.server.region,
                names=nowhere[:_TOLD_MOST],
            )
        self._fleet.follow(self._merged())

    def _merged(self) -> list[Backend]:
        taken: dict[str, Backend] = {}
        for watched in self.sources:
            free = [
                backend
                for backend in watched.found
                if backend.name not in taken and backend.name not in self._configured
            ]
            clashes = frozenset(b.name for b in watched.found) - {b.name for b in free}
            if clashes - watched.clashes:
                self._notify(
                    "discovery.clashed",
                    source=watched.label,
                    names=sorted(clashes - watched.clashes)[:_TOLD_MOST],
                )
            watched.clashes = clashes
            taken.update((backend.name, backend) for backend in free)
        return list(taken.values())

    def _stopped(self, label: str) -> Callable[[asyncio.Task[None]], None]:
        def tell(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self._notify("discovery.stopped", source=label, error=repr(task.exception()))

        return tell
