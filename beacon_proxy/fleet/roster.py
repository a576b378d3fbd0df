"""Which backends there are: those of the configuration, then those that were found.

One that was found and is gone takes no new attempt from that moment. While exchanges run on it it
is *leaving*; found again meanwhile, it comes back with its past. Then it is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf

from ..contracts import Backend, Candidate, Clock, Live, Notify, Provider
from .control import trust_of
from .hooks import Hooks
from .spelling import learn_again, new_live

Row = tuple[Backend, Live]


def _server(backend: Backend) -> tuple[str, str, str, int, str]:
    """Where two are the same, what was learnt of the one holds for the other."""
    return backend.provider, backend.scheme, backend.host, backend.port, backend.base_path


def _nobody(_: Backend) -> None:
    """Hear nothing."""


class Roster:
    """The rows of a fleet, and what holds of all of them.

    Attributes:
        now: its clock.
        providers: by the name that a backend gives as its own; hooks: likewise.
        rows: in the order of the configuration, then in that in which they were found.
        choosy: some provider's backends cannot take every request.
        reads_sessions: some provider wants to know what the client calls its conversation.
        has_totals: some backend limits the whole time of an exchange.
        leaving: rows that left and whose exchanges still run.
        unasked: sources of backends that have not answered yet.
        on_left: hears of a backend to which no idle connection is of use any more.
        on_forgotten: hears of a backend whose name nobody has now.
    """

    def __init__(
        self,
        backends: Iterable[Backend],
        providers: Mapping[str, Provider],
        hooks: Mapping[str, Hooks],
        clock: Clock,
        unix: Clock,
        notify: Notify,
    ) -> None:
        self.now = clock
        self._unix = unix
        self._notify = notify
        self.providers = providers
        self.hooks = hooks
        self.rows: list[Row] = [(b, new_live(b)) for b in backends]
        self._found: dict[str, Backend] = {}  # as given to `follow`, by name
        self.leaving: list[Row] = []
        self.unasked = 0
        self.on_left: Callable[[Backend], None] = _nobody
        self.on_forgotten: Callable[[Backend], None] = _nobody
        self._number = 0  # of the fleet that it is now
        self._changed = asyncio.Event()
        self.choosy = self.has_totals = self.reads_sessions = False
        self._rent_ends: float | None = None
        self._survey()

    def candidates(self) -> list[Candidate]:
        """One new candidate a backend."""
        self._end_rents_in_time()
        return [Candidate(backend, live) for backend, live in self.rows]

    def current(self, backend: Backend, live: Live) -> Backend:
        """The facts that hold now of the backend with this live state; its own where it left."""
        return next((row for row, its in self.rows if its is live), backend)

    def draining(self) -> list[Candidate]:
        """One new candidate for each backend that is leaving."""
        return [Candidate(backend, live) for backend, live in self.leaving]

    def keeps(self, backend: Backend) -> bool:
        """Whether it is, as it is, still one of the fleet: else its connections are of no use."""
        now = self._named.get(backend.name)
        return (
            now is not None
            and _server(now) == _server(backend)
            and trust_of(now) == trust_of(backend)
        )

    async def changed(self, seen: int) -> int:
        """See `contracts.Fleet.changed`."""
        while self._number == seen:
            await self._changed.wait()
        return self._number

    def follow(self, found: Iterable[Backend]) -> None:
        """Take the discovered backends to be these, from now on.

        Names are unique, and none is a configured one. A row keeps its place, and its live state
        as long as it is the same server; `joined` counts for one that is new.
        """
        old, self._found = self._found, {backend.name: backend for backend in found}
        new = dict(self._found)
        rows: list[Row] = []
        moved = False
        for row in self.rows:
            was, now = old.get(row[0].name), new.pop(row[0].name, None)
            if was is None or now is was:
                rows.append(row)  # configured, or of a source that did not speak
            elif now is not None and replace(now, joined=was.joined) == was:
                rows.append(row)  # as it was
            elif now is not None and _server(was) == _server(now):
                rows.append(self._revised(row, was, now))
            else:
                moved = True
                self._leave(row)
                if now is not None:
                    rows.append(self._join(replace(now, joined=self.now())))
        moved = moved or bool(new)
        rows += map(self._join, new.values())
        self.rows = rows
        self._survey()
        self.sweep()
        if moved:
            self._number += 1
            self._changed.set()
            self._changed.clear()

    def sweep(self) -> None:
        """Forget those that left and are empty; asked whenever an attempt at one may have ended."""
        gone = [backend for backend, live in self.leaving if not live.in_flight]
        if not gone:
            return
        self.leaving = [row for row in self.leaving if row[1].in_flight]
        still = {backend.name for backend, _ in self.leaving}
        for backend in gone:
            if backend.name not in self._named and backend.name not in still:
                self.on_forgotten(backend)

    def _revised(self, row: Row, was: Backend, now: Backend) -> Row:
        """The row with other facts about the same server."""
        backend, live = row
        if trust_of(was) != trust_of(now):
            self.on_left(backend)
        learn_again(now, live)
        kind = backend.kind if was.kind == now.kind else now.kind  # it may have been found out
        return replace(now, kind=kind, joined=backend.joined), live

    def _leave(self, row: Row) -> None:
        backend, live = row
        self.leaving.append(row)
        self.on_left(backend)
        self._notify("backend.left", backend=backend.name, in_flight=live.in_flight)

    def _join(self, backend: Backend) -> Row:
        self._notify(
            "backend.joined",
            backend=backend.name,
            provider=backend.provider,
            region=backend.region,
        )
        for at, (its, live) in enumerate(self.leaving):
            if its.name == backend.name and _server(its) == _server(backend):
                del self.leaving[at]
                learn_again(backend, live)
                return replace(backend, joined=its.joined), live
        peers = [
            live.picked
            for its, live in self.rows
            if (its.pool, its.region, its.price_per_second)
            == (backend.pool, backend.region, backend.price_per_second)
        ]
        # From zero it would be the least often picked for as long as the others were there.
        live = new_live(backend)
        live.picked = min(peers, default=0)
        return backend, live

    def _survey(self) -> None:
        """Work out what holds of all rows."""
        self._named = {backend.name: backend for backend, _ in self.rows}
        used = {backend.provider for backend, _ in self.rows} & self.hooks.keys()
        self.choosy = any(self.hooks[name].takes is not None for name in used)
        self.reads_sessions = any(
            getattr(self.providers[name], "reads_session", False) for name in used
        )
        self.has_totals = any(backend.timeouts.total for backend, _ in self.rows)
        self._rent_ends = self._next_end_of_rent()

    def _next_end_of_rent(self) -> float | None:
        """When the price of some backend changes next; unix s, None: never."""
        ends = [row.rented_until_unix for row, _ in self.rows if row.idle_price_per_second]
        return None if min(ends, default=inf) == inf else min(ends)

    def _end_rents_in_time(self) -> None:
        """Price those whose agreement is over as what they cost from now on."""
        if self._rent_ends is None or (now := self._unix()) < self._rent_ends:
            return
        for at, (row, live) in enumerate(self.rows):
            if row.idle_price_per_second and row.rented_until_unix <= now:
                self.rows[at] = (row.unrented(), live)
                self._notify("backend.rent_ended", backend=row.name)
        self._survey()

    def found_kind(self, live: Live, kind: str) -> None:
        """From now on it is a backend of this kind, under the same name and with the same past."""
        for at, (row, its) in enumerate(self.rows):
            if its is live:
                self.rows[at] = (replace(row, kind=kind), live)
                self._survey()
                self._notify("backend.identified", backend=row.name, kind=kind)
