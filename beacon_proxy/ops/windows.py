"""The last hour of attempts, minute by minute, in memory that does not grow with traffic.

A ring of 61 minutes holds the running minute and the 60 before it, so an answer "over n minutes"
covers n full minutes and the begun one. A minute holds one `Totals` for each backend and model that
was used in it. Times to first content go into buckets of a quarter octave: a quantile read from
them is off by less than 10 %, and takes at most some ninety counts however much was seen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..contracts import Clock, Outcome, Verdict, canonical_model

MINUTES = 60
_STEPS = 4  # buckets an octave
_BOUNDS = tuple(0.001 * math.exp2(n / _STEPS) for n in range(89))  # s: 1 ms to over an hour
_MODELS = 128  # names kept apart; a client may invent any number of them

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


class Windows:
    """Sums over the last 1 to 60 minutes, since the start of this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock()
        self._ring = [_Minute() for _ in range(MINUTES + 1)]
        self._models: set[str] = set()

    def add(self, outcome: Outcome, model: str | None, usd: float) -> None:
        """Count one attempt that has just ended; `model` as the client spells it."""
        backend = outcome.backend
        good = outcome.verdict is Verdict.GOOD
        name = self._known(model, backend.models, good) if model else "unknown"
        key = Key(backend.name, backend.provider, backend.region, backend.pool, name)
        cells = self._minute().cells
        totals = cells.get(key)
        if totals is None:
            totals = cells[key] = Totals()
        totals.attempts += 1
        totals.good += good
        totals.strikes += outcome.verdict is Verdict.STRIKE
        totals.seconds += outcome.duration
        totals.usd += usd
        if outcome.usage is not None:
            totals.tokens_in += outcome.usage.input
            totals.tokens_out += outcome.usage.output
        if outcome.ttft is not None:
            bucket = bisect_left(_BOUNDS, outcome.ttft)
            totals.ttft[bucket] = totals.ttft.get(bucket, 0) + 1

    def _minute(self) -> _Minute:
        number = int(self._clock() // 60)
        minute = self._ring[number % len(self._ring)]
        if minute.number != number:
            minute.number, minute.cells = number, {}
        return minute

    def _known(self, model: str, configured: frozenset[str] | None, good: bool) -> str:
        # A backend that does not tell its models takes any name: one is believed once it was
        # answered well, and only so many of those.
        name = canonical_model(model[:128])
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
