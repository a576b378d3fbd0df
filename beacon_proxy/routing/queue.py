"""The bounded wait for room, in one place.

Waiters stand in the order they came. A released slot is promised to the first waiter that wants its
backend, and nobody may take it before that one has tried. Who is refused for another reason than
room passes it on, and holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ..contracts import QueueLimits

RECHECK = 0.25  # s; health and back-pressure change without a release


@dataclass(eq=False, slots=True)
class Place:
    """One exchange's place in the queue."""

    wants: frozenset[str]
    wake: asyncio.Future[None] | None = None
    owed: str | None = field(default=None)  # the backend whose release woke it


class Queue:
    """Exchanges that wait for a slot.

    Attributes:
        owed: free slots that are promised to somebody, over all backends.
    """

    def __init__(self, limits: QueueLimits, told: Callable[[int], None]) -> None:
        """`told` hears the length of the queue at each change."""
        self.limits = limits
        self._told = told
        self._places: dict[Place, None] = {}
        self._wanted: dict[str, int] = {}
        self.owed = 0
        self._promised: dict[str, int] = {}  # backend -> slots
        self._turned_away: set[str] = set()  # backends refused for a promise alone

    def __len__(self) -> int:
        return len(self._places)

    @property
    def full(self) -> bool:
        return len(self._places) >= self.limits.size

    def waiting(self, name: str) -> int:
        """How many wait that this backend would do for."""
        return self._wanted.get(name, 0)

    def promised(self, name: str, place: Place | None) -> bool:
        """Whether a free slot of this backend belongs to another than `place` (None: a newcomer).

        It is promised to who was woken for it, until that one has tried.
        """
        if (place is not None and place.owed == name) or not self._promised.get(name, 0):
            return False
        self._turned_away.add(name)
        return True

    def join(self, wants: frozenset[str]) -> Place:
        """Take a place at the end. The caller has seen that the queue is not full."""
        place = Place(wants)
        self._places[place] = None
        self._count(wants, 1)
        self._told(len(self._places))
        return place

    def want(self, place: Place, wants: frozenset[str]) -> None:
        """Change what a place waits for, as health changes what may serve it."""
        if wants != place.wants:
            self._count(place.wants, -1)
            self._count(wants, 1)
            place.wants = wants

    def leave(self, place: Place) -> None:
        """Give the place up."""
        self.tried(place)
        del self._places[place]
        self._count(place.wants, -1)
        self._told(len(self._places))

    def tried(self, place: Place, took: str | None = None) -> None:
        """`place` has tried its luck: a slot promised to it that it did not take goes on."""
        name, place.owed = place.owed, None
        if name is not None:
            self._keep(name)
            self.owed -= 1
            if name != took:
                self._wake_for(name, after=place)
            elif name in self._turned_away and name not in self._promised:
                self._turned_away.discard(name)
                self._wake_for(name, after=None)  # there may have been more room than promised

    def released(self, name: str) -> None:
        """A slot on this backend is free: wake the first who wants it."""
        if self._wanted.get(name):
            self._wake_for(name, after=None)

    def _wake_for(self, name: str, after: Place | None) -> None:
        passed = after is None
        for place in self._places:
            if not passed:
                passed = place is after
            elif name in place.wants and place.wake is not None and not place.wake.done():
                place.owed = name
                self._promised[name] = self._promised.get(name, 0) + 1
                self.owed += 1
                place.wake.set_result(None)
                return

    async def wait(self, place: Place, seconds: float) -> None:
        """Sleep until woken, a recheck is due or `seconds` are over."""
        loop = asyncio.get_running_loop()
        place.wake = loop.create_future()
        timer = loop.call_later(min(seconds, RECHECK), _wake, place.wake)
        try:
            await place.wake
        finally:
            timer.cancel()
            place.wake = None

    def _keep(self, name: str) -> None:
        """One promise less."""
        left = self._promised[name] - 1
        if left:
            self._promised[name] = left
        else:
            del self._promised[name]

    def _count(self, names: frozenset[str], step: int) -> None:
        for name in names:
            wanted = self._wanted.get(name, 0) + step
            if wanted:
                self._wanted[name] = wanted
            else:  # backends come and go: a name that nobody waits for must not stay for ever
                del self._wanted[name]
                self._turned_away.discard(name)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
