"""The bounded wait for room, in one place, fair between tenants.

Each tenant's exchanges stand in a line of their own, in the order they came; the lines stand in a
round. A released slot is promised to the first line of the round in which somebody wants its
backend, and who takes one sends its line to the end of the round. So a tenant that waits is served
once before any other is served twice, however many it sends; where nobody is called a tenant there
is one line, and who came first is first.

Room that comes without a release is found by a newcomer first: it is promised, likewise, to who
waits for that backend. That of a backend which nobody waited for, since it was ejected, is not.

Where there is no newcomer either, it is found by who waits: every `RECHECK` some of them look
again, `_AT_ONCE` of them at most, so that a long queue costs no more than a short one. Who wanted
the same backends is taken to want the same once more: of each such kind one is sure to look, and
what it finds is passed on to the others, as a guess, which ends with the first that is not let in.

A slot that is promised nobody may take before the one it is promised to has tried. Who is refused
for another reason than room passes it on, and holds up nobody.

When the queue is full, a newcomer takes the place of the newest of the tenant with the most places,
if that leaves the two nearer to each other: nobody can fill the queue and lock the others out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from ..contracts import Clock, Gauge, QueueLimits

RECHECK = 0.25  # s; health and back-pressure change without a release
_AT_ONCE = 40  # places that look again; a look over 10 backends costs some 60 us: 1 % of a core
_LEAST_WAIT, _MOST_WAIT = 1.0, 60.0  # s, of a Retry-After
_REMEMBERED = 64  # slots taken, for the pace


@dataclass(eq=False, slots=True)
class Place:
    """One exchange's place in the queue."""

    wants: frozenset[str]
    tenant: str | None = None
    joined: float = 0.0  # monotonic s
    wake: asyncio.Future[None] | None = None
    owed: str | None = field(default=None)  # the backend whose release woke it
    offer: int = 0  # the number of that release
    guess: bool = False  # nothing was released: somebody found room there
    refused: dict[str, int] = field(default_factory=dict)  # backend -> the latest it did not take
    displaced: bool = False  # it has lost its place to another tenant


class _Line:
    """The places of one tenant, oldest first."""

    __slots__ = ("owed", "places")

    def __init__(self) -> None:
        self.places: dict[Place, None] = {}
        self.owed = 0  # promises among them

    def first(self, name: str, offer: int) -> Place | None:
        """Who waits for that backend and has not refused this offer, or a later one."""
        for place in self.places:
            if name not in place.wants or place.wake is None or place.wake.done():
                continue
            if not place.refused or place.refused.get(name, -1) < offer:
                return place
        return None


class Queue:
    """Exchanges that wait for a slot.

    Attributes:
        places: who waits, in the order they came.
        owed: free slots that are promised to somebody, over all backends.
    """

    def __init__(
        self, limits: QueueLimits, told: Callable[[int], None], clock: Clock = time.monotonic
    ) -> None:
        """`told` hears the length of the queue at each change."""
        self.limits = limits
        self._told = told
        self._clock = clock
        self.places: dict[Place, None] = {}
        self._lines: dict[str | None, _Line] = {}  # in the order of the round
        self._wanted: dict[str, int] = {}
        self._kinds: dict[frozenset[str], dict[Place, None]] = {}  # who wants the same
        self._asleep: dict[Place, None] = {}  # who has slept longest first
        self._timer: asyncio.TimerHandle | None = None  # of the next recheck
        self._lost: set[frozenset[str]] = set()  # kinds of which all look, since the last one
        self.owed = 0
        self._offers = 0
        self._promised: dict[str, int] = {}  # backend -> slots
        self._guessed: set[str] = set()  # backends at which one looks for more room
        self._turned_away: set[str] = set()  # backends refused for a promise alone
        self._since = 0.0  # monotonic s: when somebody came to wait here, and nobody else did
        self._taken: deque[float] = deque(maxlen=_REMEMBERED)  # monotonic s, since then

    def __len__(self) -> int:
        return len(self.places)

    @property
    def full(self) -> bool:
        return len(self.places) >= self.limits.size

    def waiting(self, name: str) -> int:
        """How many wait that this backend would do for."""
        return self._wanted.get(name, 0)

    def has_place(self, tenant: str | None) -> bool:
        """Whether `tenant` may join: there is a place, or one that it may take from another."""
        return not self.full or self._displaceable(tenant) is not None

    def promised(self, name: str, place: Place | None) -> bool:
        """Whether a free slot of this backend belongs to another than `place` (None: a newcomer).

        It is promised to who was woken for it, until that one has tried.
        """
        if place is not None and place.owed == name:
            return False
        if self._promised.get(name):
            self._turned_away.add(name)
            return True
        return place is None and name in self._guessed

    def yields(self, name: str) -> bool:
        """Whether room that a newcomer found on this backend goes to one who waits for it.

        It came without a release, for a limit has risen. Who has refused the latest offer, be it
        for another reason than room, is passed over.
        """
        if name in self._wanted:
            self._promise(name, self._offers)
        return self.promised(name, None)

    def join(self, wants: frozenset[str], tenant: str | None = None) -> Place:
        """Take a place at the end of the tenant's line. The caller has seen `has_place`."""
        if self.full:
            self._displace(self._displaceable(tenant))
        now = self._clock()
        if not self.places:
            self._since = now
            self._taken.clear()
        place = Place(wants, tenant, now)
        self.places[place] = None
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line()
        line.places[place] = None
        self._kinds.setdefault(wants, {})[place] = None
        self._count(wants, 1)
        self._told(len(self.places))
        return place

    def want(self, place: Place, wants: frozenset[str]) -> None:
        """Change what a place waits for, as health changes what may serve it."""
        if wants == place.wants:
            return
        if gained := wants - place.wants:
            self._share(place, gained)
        if wants != place.wants:
            self._count(place.wants, -1)
            self._count(wants, 1)
            self._part(place)
            place.wants = wants
            self._kinds.setdefault(wants, {})[place] = None

    def leave(self, place: Place) -> None:
        """Give the place up; one that was displaced has none."""
        if place.displaced:
            return
        self.tried(place)
        self._remove(place)

    def tried(self, place: Place, took: str | None = None) -> None:
        """`place` has tried its luck: a slot promised to it that it did not take goes on."""
        name, place.owed = place.owed, None
        guess, place.guess = place.guess, False
        line = self._lines[place.tenant]
        if took is not None:
            self._taken.append(self._clock())
            if len(self._lines) > 1:  # its tenant has had its turn
                self._lines[place.tenant] = self._lines.pop(place.tenant)
        if name is not None:
            line.owed -= 1
            self.owed -= 1
            if guess:
                self._guessed.discard(name)
                if name == took:
                    self._guess(name)
            else:
                self._kept(place, name, name == took)
        if took is not None and took != name:
            if took not in place.wants:
                self._share(place, frozenset({took}))
            self._guess(took)

    def released(self, name: str) -> None:
        """A slot on this backend is free: wake who is to have it."""
        if self._wanted.get(name):
            self._offers += 1
            self._promise(name, self._offers)

    def _guess(self, name: str) -> None:
        """There was room on this backend without a release: let one look whether there is more."""
        if name in self._wanted and name not in self._guessed:
            self._promise(name, self._offers + 1, guess=True)

    def _promise(self, name: str, offer: int, *, guess: bool = False) -> None:
        chosen: Place | None = None
        line_of_chosen: _Line | None = None
        for line in self._lines.values():
            # A line with a promise outstanding is nearly served: those with fewer go first.
            if line_of_chosen is None or line.owed < line_of_chosen.owed:
                place = line.first(name, offer)
                if place is not None:
                    chosen, line_of_chosen = place, line
                    if not line.owed:
                        break
        if chosen is None or line_of_chosen is None or chosen.wake is None:
            return
        chosen.owed, chosen.offer, chosen.guess = name, offer, guess
        line_of_chosen.owed += 1
        if guess:
            self._guessed.add(name)
        else:
            self._promised[name] = self._promised.get(name, 0) + 1
        self.owed += 1
        chosen.wake.set_result(None)

    async def wait(self, place: Place, seconds: float) -> None:
        """Sleep until woken, by a recheck among others, or `seconds` are over."""
        loop = asyncio.get_running_loop()
        place.wake = loop.create_future()
        timer = loop.call_later(seconds, _wake, place)
        self._asleep[place] = None
        if self._timer is None:
            self._timer = loop.call_later(RECHECK, self._due)
        try:
            await place.wake
        finally:
            timer.cancel()
            place.wake = None
            del self._asleep[place]
            if not self._asleep and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _due(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(RECHECK, self._due)
        self.recheck()

    def recheck(self) -> None:
        """Let some look again: who came first of each kind, in turn, and who has slept longest."""
        self._lost.clear()
        left = _AT_ONCE
        if len(self._asleep) > left:
            for wants in list(islice(self._kinds, left // 2)):
                kind = self._kinds[wants] = self._kinds.pop(wants)  # the others' turn is next
                left -= _wake(next(iter(kind)))
        for place in self._asleep:
            if not left:
                break
            left -= _wake(place)

    def lost(self, place: Place) -> None:
        """Nobody is left whom this place could wait for: who wanted the same looks at once."""
        if place.wants not in self._lost:
            self._lost.add(place.wants)
            for other in self._kinds[place.wants]:
                _wake(other)

    def retry_after(self) -> float:
        """Seconds until there may be room, by the pace at which those who wait are served; 1..60.

        The time until all who wait now are served. While nobody was: as long as they have waited.
        """
        if not self.places:
            return _LEAST_WAIT
        taken = self._taken
        began = taken[0] if len(taken) == _REMEMBERED else self._since
        seconds = self._clock() - began
        if taken:
            seconds *= (len(self.places) + 1) / len(taken)
        return min(max(seconds, _LEAST_WAIT), _MOST_WAIT)

    def gauges(self) -> Iterable[Gauge]:
        """See `contracts.Measures`. By nothing that a client makes up: no tenant, no model."""
        oldest = next(iter(self.places), None)
        waited = self._clock() - oldest.joined if oldest is not None else 0.0
        yield Gauge("queue_oldest_seconds", "How long the longest in the queue has waited.", waited)

    def _displaceable(self, tenant: str | None) -> Place | None:
        """The newest place, if any, that a newcomer of `tenant` may take in a full queue."""
        if not self._lines:
            return None
        line = self._lines.get(tenant)
        own = len(line.places) if line is not None else 0
        longest = max(self._lines.values(), key=lambda line: len(line.places))
        if len(longest.places) < own + 2:  # else the two would only change sides
            return None
        return next((place for place in reversed(longest.places) if place.owed is None), None)

    def _displace(self, place: Place | None) -> None:
        assert place is not None, "who joins a full queue has seen that it may"
        self._remove(place)
        place.displaced = True
        _wake(place)

    def _share(self, place: Place, gained: frozenset[str]) -> None:
        """All who wanted the same as `place` want these backends too, until they look themselves.

        Else room there would be a newcomer's until each of them has looked.
        """
        wants = place.wants | gained
        kind = self._kinds.pop(place.wants)
        for other in kind:
            other.wants = wants
        self._kinds.setdefault(wants, {}).update(kind)
        for name in gained:
            self._wanted[name] = self._wanted.get(name, 0) + len(kind)

    def _part(self, place: Place) -> None:
        kind = self._kinds[place.wants]
        del kind[place]
        if not kind:
            del self._kinds[place.wants]

    def _remove(self, place: Place) -> None:
        del self.places[place]
        places = self._lines[place.tenant].places
        del places[place]
        if not places:
            del self._lines[place.tenant]
        self._part(place)
        self._count(place.wants, -1)
        self._told(len(self.places))

    def _kept(self, place: Place, name: str, taken: bool) -> None:
        """One promise less; it goes on where it was not taken."""
        left = self._promised[name] - 1
        if left:
            self._promised[name] = left
        else:
            del self._promised[name]
        if not taken:
            place.refused[name] = place.offer
            self._promise(name, place.offer)
        elif not left and name in self._turned_away:
            self._turned_away.discard(name)
            self._guess(name)  # there may have been more room than promised

    def _count(self, names: frozenset[str], step: int) -> None:
        for name in names:
            wanted = self._wanted.get(name, 0) + step
            if wanted:
                self._wanted[name] = wanted
            else:  # backends come and go: a name that nobody waits for must not stay for ever
                del self._wanted[name]
                self._turned_away.discard(name)


def _wake(place: Place) -> bool:
    """Whether it slept."""
    if place.wake is None or place.wake.done():
        return False
    place.wake.set_result(None)
    return True
