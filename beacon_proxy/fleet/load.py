"""How full the fleet is: worked out from its rows when somebody asks, kept nowhere.

*Room* is how many further requests would be taken now. A backend has as much as the least of these
leaves: its `max_in_flight`, what the middlewares let run there (slow start, a limit that adapts),
and, while it is fresh, what its provider tells of its workers. One that is ejected, found down or
resting has none; one that is due for a trial has one.

What a provider tells is asked for every 30 s at most, of a backend that answers well every 300 s,
and others may use the same workers. So it counts for a minute, and here alone: these numbers are
for people, rankings and autoscalers, and nobody is refused by them. What a backend really has no
room for it says itself, with 429 or 503.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import NamedTuple, Protocol

from ..contracts import Backend, Candidate, Capacity, Clock, Gauge, Live

_FRESH = 60.0  # s that what a provider told counts
GROUPS = ("backend", "pool", "region")

Limit = Callable[[Backend], int]


class Rows(Protocol):
    """The part of the fleet that is read."""

    def candidates(self) -> list[Candidate]: ...

    def now(self) -> float: ...


class Share(NamedTuple):
    """What runs and what would fit, of a backend or of several."""

    in_flight: int = 0
    room: int = 0
    limit: int = 0  # at once

    @property
    def utilisation(self) -> float:
        """The part of `limit` that is taken, 0..1; 1 where there is no room at all."""
        return 1.0 - self.room / self.limit if self.limit else 1.0

    def plus(self, other: Share) -> Share:
        return Share(*(a + b for a, b in zip(self, other, strict=True)))


class Load:
    """What of the fleet is in use."""

    def __init__(self, fleet: Rows, limits: Sequence[Limit] = (), unix: Clock = time.time) -> None:
        """`limits` are those of the middlewares; see `contracts.Limits`."""
        self._fleet = fleet
        self._limits = limits
        self._unix = unix

    def of(self, candidate: Candidate) -> Share:
        """One backend's share."""
        backend, live = candidate.backend, candidate.live
        limit = min([backend.max_in_flight, *(limit(backend) for limit in self._limits)])
        now = self._fleet.now()
        if live.ejected_until > now or live.resting_until > now:
            limit = 0
        elif live.ejected_until:
            limit = 1
        elif not live.healthy:
            limit = 0
        if live.capacity is not None and self._unix() - live.last_check <= _FRESH:
            limit = _as_told(limit, live, live.capacity)
        return Share(live.in_flight, max(limit - live.in_flight, 0), limit)

    def groups(self) -> Iterator[tuple[str, str, Share]]:
        """Kind of group (backend, pool, region), its name, and what its backends add up to."""
        found: dict[tuple[str, str], Share] = {}
        for candidate in self._fleet.candidates():
            backend, share = candidate.backend, self.of(candidate)
            for key in zip(GROUPS, (backend.name, backend.pool, backend.region), strict=True):
                found[key] = found.get(key, Share()).plus(share)
        for kind in GROUPS:  # the families of /metrics stand together
            yield from ((of, name, share) for (of, name), share in found.items() if of == kind)

    def gauges(self) -> Iterable[Gauge]:
        """See `contracts.Measures`."""
        for of, name, share in self.groups():
            labels = (("of", of), ("name", name))
            told = "The part of what may run at once that runs now; 1 where there is no room."
            yield Gauge("utilisation", told, share.utilisation, labels)
            yield Gauge("room", "Further requests that would be taken now.", share.room, labels)


def _as_told(limit: int, live: Live, capacity: Capacity) -> int:
    """What is left of `limit` by what the provider tells of its workers."""
    running = capacity.running or 0
    able = running + (capacity.idle or 0) + (capacity.starting or 0)
    unable = (capacity.throttled or 0) + (capacity.unhealthy or 0)
    if unable:  # the operator's limit is for all workers: take the part of those that can work
        limit = ceil(limit * able / (able + unable))
    if capacity.room is not None and running:  # without one, the next request starts some
        limit = min(limit, live.in_flight + capacity.room)
    return limit
