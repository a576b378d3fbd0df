"""The last hour of attempts, minute by minute, in memory that does not grow with traffic.

A ring of 61 minutes holds the running minute and the 60 before it, so an answer "over n minutes"
covers n full minutes and the begun one. A minute holds one `Totals` for each backend and model that
was used in it. Times to first content go into buckets of a quarter octave: a quantile read from
them is off by less than 10 %, and takes at most some ninety counts however much was seen.

To find a cell by its key takes longer than to count in it. So until its minute is over each backend
keeps the way to its cells by the models that clients named.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..contracts import Backend, Clock, Outcome, Verdict, canonical_model

MINUTES = 60
_STEPS = 4  # buckets an octave
_BOUNDS = tuple(0.001 * math.exp2(n / _STEPS) for n in range(89))  # s: 1 ms to over an hour
_MODELS = 128  # names kept apart; a client may invent any number of them
_SPELLING = 128  # characters of one
_GOOD, _STRIKE = Verdict.GOOD, Verdict.STRIKE  # as globals they are found in a third of the time

_Group = TypeVar("_Group", bound=Hashable)


class Key(NamedTuple):
    """What attempts are told apart by."""

    backend: str
    provider: str
    region: str
    pool: str
    model: str  # canonical; unknown: the request named none; other: not known to be served


@dataclass(slots=True)
class Totals:
    """Sums over some attempts."""

    attempts: int = 0
    good: int = 0
    strikes: int = 0
    seconds: float = 0.0  # s in attempts
    usd: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    ttft: dict[int, int] = field(default_factory=dict)  # bucket: count

    def add(self, other: Totals) -> None:
        self.attempts += other.attempts
        self.good += other.good
        self.strikes += other.strikes
        self.seconds += other.seconds
        self.usd += other.usd
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        for bucket, count in other.ttft.items():
            self.ttft[bucket] = self.ttft.get(bucket, 0) + count

    def ttft_quantile(self, q: float) -> float | None:
        """Seconds to first content that the share `q` of answers did not exceed, within 10 %."""
        rank = math.ceil(q * sum(self.ttft.values()))
        for bucket in sorted(self.ttft):
            rank -= self.ttft[bucket]
            if rank <= 0:
                return _BOUNDS[min(bucket, len(_BOUNDS) - 1)] / math.exp2(0.5 / _STEPS)
        return None

    def success_rate(self) -> float | None:
        """Good attempts of those that say something about their backend; None without any."""
        judged = self.good + self.strikes
        return self.good / judged if judged else None


@dataclass(slots=True)
class _Minute:
    number: int = -1  # of the clock; -1: never used
    cells: dict[Key, Totals] = field(default_factory=dict)


@dataclass(slots=True)
class _Ways:
    """To the cells of one backend in the running minute, by models as clients spell them."""

    backend: Backend
    cells: dict[str | None, Totals] = field(default_factory=dict)


class Windows:
    """Sums over the last 1 to 60 minutes, since the start of this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock()
        self._ring = [_Minute() for _ in range(MINUTES + 1)]
        self._models: set[str] = set()
        self._minute = _Minute()  # the running one
        self._over = 0.0  # s of the clock: when it will not be any more
        self._ways: dict[str, _Ways] = {}  # by backend name

    def add(self, outcome: Outcome, model: str | None) -> None:
        """Count one attempt that has just ended; `model` as the client spells it."""
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
        if verdict is _GOOD:
            totals.good += 1
        elif verdict is _STRIKE:
            totals.strikes += 1
        totals.seconds += outcome.duration
        totals.usd += outcome.usd
        usage, ttft = outcome.usage, outcome.ttft
        if usage is not None:
            totals.tokens_in += usage.input
            totals.tokens_out += usage.output
        if ttft is not None:
            bucket, counts = bisect_left(_BOUNDS, ttft), totals.ttft
            try:
                counts[bucket] += 1
            except KeyError:
                counts[bucket] = 1

    def _turn(self, now: float) -> None:
        number = int(now // 60)
        self._over = (number + 1) * 60
        self._minute = self._ring[number % len(self._ring)]
        self._minute.number, self._minute.cells = number, {}
        self._ways = {}

    def _cell(self, ways: _Ways, model: str | None, good: bool) -> Totals:
        backend, cells = ways.backend, self._minute.cells
        name = self._known(model, backend.models, good) if model else "unknown"
        key = Key(backend.name, backend.provider, backend.region, backend.pool, name)
        totals = cells.get(key)
        if totals is None:
            totals = cells[key] = Totals()
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

    def totals(self, minutes: int, by: Callable[[Key], _Group]) -> dict[_Group, Totals]:
        """Sum the last `minutes` full minutes and the begun one, grouped by what `by` returns."""
        now = int(self._clock() // 60)
        groups: dict[_Group, Totals] = {}
        for minute in self._ring:
            if minute.number < 0 or not now - minutes <= minute.number <= now:
                continue
            for key, totals in minute.cells.items():
                groups.setdefault(by(key), Totals()).add(totals)
        return groups

    def covered(self, minutes: int) -> float:
        """Seconds that `totals(minutes, …)` looks back: less in a young process."""
        now = self._clock()
        return min(now - self._started, minutes * 60 + now % 60)
