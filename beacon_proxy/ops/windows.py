"""The last hour of attempts, minute by minute, in memory that does not grow with traffic.

Rule 1: an answer "over n minutes" covers n full minutes and the begun one.
Rule 2: an attempt is counted in the cell of its backend and model. A cell lives for seconds: then
    it is collected into the minute of its backend, its model and its site. So an hour takes room
    for backends + models + sites, not for each model on each backend.
Rule 3: nobody adds up an hour at once. Ten minutes that are over are one sum, made when they end,
    and a span that was asked for is kept ready until the next minute is over (`History`).
Rule 4: whoever reads collects first, so nothing is missing. `settle` does it ahead, every few
    seconds, and makes the sums of a minute that has ended: what is left to do is little.

To find a cell by its key takes longer than to count in it. So until it is collected each backend
keeps the way to its cells by the models that clients named.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import NamedTuple, TypeVar

from ..contracts import Backend, Clock, Outcome, Verdict, canonical_model
from .sketch import EXACT
from .totals import Totals

MINUTES = 60
SPANS = (1, 5, 60)  # minutes that are told
_TEN = 10
_CELLS = 1024  # that wait to be collected: some ms of work
_STEP = 8  # histories that are settled in one piece, in some ms
_MODELS = 128  # names kept apart; a client may invent any number of them
_SPELLING = 128  # characters of one
# As globals they are found in a third of the time.
_GOOD, _STRIKE, _BUSY = Verdict.GOOD, Verdict.STRIKE, Verdict.BUSY
# Tokens a second that no stream reaches: one that seems to was held back and came at once.
_FASTEST = 10_000.0

_Group = TypeVar("_Group", bound=Hashable)
_Whole = TypeVar("_Whole", bound=Hashable)
_Thing = TypeVar("_Thing")


class Key(NamedTuple):
    """What attempts are told apart by."""

    backend: str
    provider: str
    region: str
    pool: str
    model: str  # canonical; unknown: the request named none; other: not known to be served


class Place(NamedTuple):
    """Where backends of one kind stand."""

    region: str
    provider: str


class Site(NamedTuple):
    """A place, and the pool there."""

    region: str
    provider: str
    pool: str

    @property
    def place(self) -> Place:
        return Place(self.region, self.provider)


class History:
    """What one backend, model or site came to in the last hour.

    Minutes are numbered by the clock. One that is over never changes again.
    """

    __slots__ = ("_kept", "_minutes", "_tens")

    def __init__(self) -> None:
        self._minutes: dict[int, Totals] = {}  # in their order; only those that had an attempt
        self._tens: dict[int, Totals | None] = {}  # by the first of ten, a multiple of ten
        # By how many minutes: before which one they were, and what they came to.
        self._kept: dict[int, tuple[int, Totals | None]] = {}

    def minute(self, number: int) -> Totals:
        """Where to add what came in the running one."""
        return _of(self._minutes, number, Totals)

    def parts(self, minutes: int, now: int) -> Iterator[Totals]:
        """What to add up for that many minutes before the one numbered `now`, and that one."""
        past, running = self._past(minutes, now), self._minutes.get(now)
        if past is not None:
            yield past
        if running is not None:
            running.pack()  # several spans are asked for at once: this is done for all of them
            yield running

    def settle(self, now: int) -> None:
        """Make ahead what will be asked for until the minute `now` is over."""
        if (totals := self._minutes.get(now - 1)) is not None:
            totals.pack()
        if now % _TEN == 0:
            self._ten(now - _TEN)
        for minutes in self._kept:
            self._past(minutes, now)

    def forget(self, before: int) -> bool:
        """Drop the minutes before that one; whether any is left."""
        minutes = self._minutes
        while minutes and (number := next(iter(minutes))) < before:
            del minutes[number]
        self._tens = {first: totals for first, totals in self._tens.items() if first >= before}
        return bool(minutes)

    def _past(self, minutes: int, now: int) -> Totals | None:
        kept = self._kept.get(minutes)
        if kept is None or kept[0] != now:
            kept = now, _sum(self._pieces(now - minutes, now))
            if minutes in SPANS:
                self._kept[minutes] = kept
        return kept[1]

    def _pieces(self, first: int, end: int) -> Iterator[Totals | None]:
        while first < end:
            if first % _TEN == 0 and first + _TEN <= end:
                yield self._ten(first)
                first += _TEN
            else:
                yield self._minutes.get(first)
                first += 1

    def _ten(self, first: int) -> Totals | None:
        if first not in self._tens:
            self._tens[first] = _sum(map(self._minutes.get, range(first, first + _TEN)))
        return self._tens[first]


def _sum(pieces: Iterable[Totals | None]) -> Totals | None:
    """None: of nothing. One alone is its own sum."""
    some = [each for each in pieces if each is not None]
    if len(some) < 2:
        return some[0] if some else None
    whole = Totals()
    for each in some:
        whole.add(each)
    whole.pack()
    return whole


@dataclass(slots=True)
class _Ways:
    """To the cells of one backend, by models as clients spell them."""

    backend: Backend
    cells: dict[str | None, Totals] = field(default_factory=dict)


class Windows:
    """Sums over the last 1 to 60 minutes, since the start of this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = now = clock()
        self._number = int(now // 60)  # of the running minute
        self._over = (self._number + 1) * 60.0  # s of the clock: when it will not be any more
        self._settled = self._number
        self._models: set[str] = set()
        self._cells: dict[Key, Totals] = {}  # of the running minute, not collected yet
        self._ways: dict[str, _Ways] = {}  # by backend name
        self._by_backend: dict[str, History] = {}
        self._by_model: dict[str, History] = {}
        self._by_site: dict[Site, History] = {}

    def add(self, outcome: Outcome, model: str | None, stream: bool = False) -> None:
        """Count one attempt that has just ended; `model` as the client spells it.

        The pace of a `stream` is that of all tokens but the first, from its first content to its
        end; of a document, and of a stream that came at once, that of all tokens in all the time.
        """
        now = self._clock()
        if now >= self._over:
            self._turn(now)
        backend, verdict = outcome.backend, outcome.verdict
        ways = self._ways.get(backend.name)
        if ways is None or ways.backend is not backend:
            ways = self._ways[backend.name] = _Ways(backend)
        totals = ways.cells.get(model)
        if totals is None:
            totals = self._cell(ways, model, verdict is _GOOD)
        totals.attempts += 1
        if not totals.attempts % EXACT:
            totals.fold()
        seconds = outcome.duration
        totals.seconds += seconds
        totals.billed += outcome.billed
        totals.usd += outcome.usd
        usage, ttft, start = outcome.usage, outcome.ttft, outcome.cold_start
        if start is not None:
            ttft = totals.started(start, ttft)
            seconds -= start
        output = 0
        if usage is not None:
            output = usage.output
            totals.tokens_in += usage.input
            totals.tokens_out += output
            if usage.estimated:
                totals.tokens_estimated += usage.input + output
        if verdict is _GOOD:
            totals.good += 1
            if ttft is not None:
                totals.ttft.waiting.append(ttft)
                totals.duration.waiting.append(seconds)
                if output:
                    if stream and (seconds - ttft) * _FASTEST > output:
                        output -= 1
                        seconds -= ttft
                    totals.paced_tokens += output
                    totals.paced_seconds += seconds
        elif verdict is _STRIKE:
            totals.strikes += 1
        elif verdict is _BUSY:
            totals.busy += 1

    def settle(self) -> Iterator[None]:
        """Do what is due, some ms at a time: others may run, and read, between two pieces."""
        now = self._now()
        self._collect()
        if now == self._settled:
            return
        self._settled = now
        for number, history in enumerate([*self._histories()], 1):
            history.settle(now)
            if not number % _STEP:
                yield

    def left(self) -> float:
        """Seconds until the running minute is over."""
        return max(self._over - self._clock(), 0.0)

    def _now(self) -> int:
        """The running minute. A clock that goes back begins none."""
        now = self._clock()
        if now >= self._over:
            self._turn(now)
        return self._number

    def _turn(self, now: float) -> None:
        self._collect()
        self._number = int(now // 60)
        self._over = (self._number + 1) * 60.0
        self._ways = {}
        self._forget(self._by_backend)
        self._forget(self._by_model)
        self._forget(self._by_site)

    def _forget(self, histories: dict[_Group, History]) -> None:
        oldest = self._number - MINUTES
        for group in [group for group, it in histories.items() if not it.forget(oldest)]:
            del histories[group]

    def _collect(self) -> None:
        if not self._cells:
            return
        cells, self._cells = self._cells, {}
        for ways in self._ways.values():
            ways.cells.clear()
        for key, totals in cells.items():
            backend, provider, region, pool, model = key
            for history in (
                _of(self._by_backend, backend, History),
                _of(self._by_model, model, History),
                _of(self._by_site, Site(region, provider, pool), History),
            ):
                history.minute(self._number).add(totals)

    def _histories(self) -> Iterator[History]:
        groups = self._by_site, self._by_backend, self._by_model
        return chain.from_iterable(each.values() for each in groups)

    def _cell(self, ways: _Ways, model: str | None, good: bool) -> Totals:
        backend = ways.backend
        name = self._known(model, backend.models, good) if model else "unknown"
        key = Key(backend.name, backend.provider, backend.region, backend.pool, name)
        totals = self._cells.get(key)
        if totals is None:
            if len(self._cells) >= _CELLS:
                self._collect()
            totals = self._cells[key] = Totals()
        # An `other` may be known by its next answer. A client may invent spellings, too.
        if name != "other" and len(ways.cells) < _MODELS and len(model or "") <= _SPELLING:
            ways.cells[model] = totals
        return totals

    def _known(self, model: str, configured: frozenset[str] | None, good: bool) -> str:
        # A backend that does not tell its models takes any name: one is believed once it was
        # answered well, and only so many of those.
        name = canonical_model(model[:_SPELLING])
        if configured is not None and name in configured:
            return name
        if name in self._models:
            return name
        if good and len(self._models) < _MODELS:
            self._models.add(name)
            return name
        return "other"

    def totals(self, minutes: int, by: str) -> dict[str, Totals]:
        """Sum the last `minutes` full minutes and the begun one, by a field of `Key`."""
        if by == "backend":
            return self._sums(self._by_backend, minutes, str)
        if by == "model":
            return self._sums(self._by_model, minutes, str)
        return self._sums(self._by_site, minutes, attrgetter(by))

    def places(self, minutes: int) -> dict[Place, Totals]:
        """The same by region and provider."""
        return self._sums(self._by_site, minutes, attrgetter("place"))

    def _sums(
        self, histories: dict[_Group, History], minutes: int, by: Callable[[_Group], _Whole]
    ) -> dict[_Whole, Totals]:
        now = self._now()
        self._collect()
        sums: dict[_Whole, Totals] = {}
        for group, history in histories.items():
            for part in history.parts(minutes, now):
                _of(sums, by(group), Totals).add(part)
        return sums

    def covered(self, minutes: int) -> float:
        """Seconds that `totals(minutes, …)` looks back: less in a young process."""
        now = self._clock()
        return min(now - self._started, minutes * 60 + now % 60)


def _of(things: dict[_Group, _Thing], group: _Group, new: Callable[[], _Thing]) -> _Thing:
    thing = things.get(group)
    if thing is None:
        thing = things[group] = new()
    return thing
