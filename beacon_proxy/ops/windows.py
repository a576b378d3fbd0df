"""The last hour of attempts, minute by minute, in memory that does not grow with traffic.

A ring of 61 minutes holds the running minute and the 60 before it, so an answer "over n minutes"
covers n full minutes and the begun one. A minute holds one `Totals` for each backend and model that
was used in it: sums, and sketches of what good answers took.

To find a cell by its key takes longer than to count in it. So until its minute is over each backend
keeps the way to its cells by the models that clients named. And to add up an hour of cells takes
long where there are many: what a minute that is over comes to in each place is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import NamedTuple, TypeVar

from ..contracts import Backend, Clock, Outcome, Verdict, canonical_model
from .sketch import EXACT, Sketch

MINUTES = 60
SPANS = (1, 5, 60)  # minutes that are told
_MODELS = 128  # names kept apart; a client may invent any number of them
_SPELLING = 128  # characters of one
_GOOD, _STRIKE = Verdict.GOOD, Verdict.STRIKE  # as globals they are found in a third of the time
# Tokens a second that no stream reaches: one that seems to was held back and came at once.
_FASTEST = 10_000.0

_Group = TypeVar("_Group", bound=Hashable)


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


class Totals:
    """Sums over some attempts, and how long the good ones among them took.

    Attributes:
        attempts, good, strikes: how many, that ended well, that are held against a backend.
        seconds: in attempts. billed: s that were paid for. usd: what they cost.
        tokens_in, tokens_out: as backends count them; tokens_estimated: those of both that they did
            not count themselves.
        paced_tokens, paced_seconds: output tokens of good attempts, and the time they came in.
        ttft, duration: s of good attempts to first content and to the end, less a cold start.
        starts: s of cold starts; None before the first.
    """

    __slots__ = (
        "attempts",
        "billed",
        "duration",
        "good",
        "paced_seconds",
        "paced_tokens",
        "seconds",
        "starts",
        "strikes",
        "tokens_estimated",
        "tokens_in",
        "tokens_out",
        "ttft",
        "usd",
    )

    def __init__(self) -> None:
        self.attempts = self.good = self.strikes = 0
        self.seconds = self.billed = self.usd = self.paced_seconds = 0.0
        self.tokens_in = self.tokens_out = self.tokens_estimated = self.paced_tokens = 0
        self.ttft = Sketch()
        self.duration = Sketch()
        self.starts: Sketch | None = None

    def add(self, other: Totals) -> None:
        self.attempts += other.attempts
        self.good += other.good
        self.strikes += other.strikes
        self.seconds += other.seconds
        self.billed += other.billed
        self.usd += other.usd
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.tokens_estimated += other.tokens_estimated
        self.paced_tokens += other.paced_tokens
        self.paced_seconds += other.paced_seconds
        self.ttft.merge(other.ttft)
        self.duration.merge(other.duration)
        if other.starts is not None:
            if self.starts is None:
                self.starts = Sketch()
            self.starts.merge(other.starts)

    def started(self, seconds: float, ttft: float | None) -> float | None:
        """Count a cold start; `ttft` without it, None where no more than the start is known."""
        if not 0 <= seconds < inf:  # as its provider told it: anything may have come
            return None
        if self.starts is None:
            self.starts = Sketch()
        self.starts.waiting.append(seconds)
        return ttft - seconds if ttft is not None and ttft > seconds else None

    def fold(self) -> None:
        """Make room for further attempts; due once in 512 of them."""
        self.ttft.fold()
        self.duration.fold()
        if self.starts is not None:
            self.starts.fold()

    def ttft_quantile(self, q: float) -> float | None:
        """Seconds to first content that the share `q` of good answers did not exceed."""
        return self.ttft.quantile(q)

    def duration_quantile(self, q: float) -> float | None:
        """Seconds to the end, likewise."""
        return self.duration.quantile(q)

    def start_quantile(self, q: float) -> float | None:
        """Seconds of cold starts, likewise."""
        return None if self.starts is None else self.starts.quantile(q)

    def success_rate(self) -> float | None:
        """Good attempts of those that say something about their backend; None without any."""
        return _ratio(self.good, self.good + self.strikes)

    def tokens_per_second(self) -> float | None:
        """How fast good answers came: see `Windows.add`."""
        return _ratio(self.paced_tokens, self.paced_seconds)

    def cost_per_second(self) -> float | None:
        """USD for a second that was paid for, over all attempts."""
        return _ratio(self.usd, self.billed)

    def cost_per_million_tokens(self) -> float | None:
        """USD for a million tokens, in or out; what attempts without a token cost is in it, too."""
        return _ratio(self.usd * 1e6, self.tokens_in + self.tokens_out)

    def estimated_share(self) -> float | None:
        """Of all tokens, those that no backend counted: 0..1."""
        return _ratio(self.tokens_estimated, self.tokens_in + self.tokens_out)


def _ratio(part: float, whole: float) -> float | None:
    share = part / whole if whole > 0 else inf
    return share if isfinite(share) else None


@dataclass(slots=True)
class _Minute:
    number: int = -1  # of the clock; -1: never used
    cells: dict[Key, Totals] = field(default_factory=dict)
    places: dict[Place, Totals] | None = None  # the cells added up, once the minute is over


@dataclass(slots=True)
class _Past:
    """Minutes that are over, added up."""

    now: int  # the number of the minute before which they were
    places: dict[Place, Totals] = field(default_factory=dict)


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
        self._past: dict[int, _Past] = {}  # by how many minutes

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

    def _turn(self, now: float) -> None:
        number = int(now // 60)
        self._over = (number + 1) * 60
        self._minute = self._ring[number % len(self._ring)]
        self._minute.number, self._minute.cells, self._minute.places = number, {}, None
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
        groups: dict[_Group, Totals] = {}
        for minute in self._last(minutes):
            for key, totals in minute.cells.items():
                _into(groups, by(key), totals)
        return groups

    def places(self, minutes: int) -> dict[Place, Totals]:
        """The same by region and provider, for who asks often: what is over is added up once."""
        now = int(self._clock() // 60)
        groups: dict[Place, Totals] = {}
        _add_all(groups, self._over_by_place(minutes, now))
        for minute in self._last(0):
            _add_all(groups, _by_place(minute))
        return groups

    def _over_by_place(self, minutes: int, now: int) -> dict[Place, Totals]:
        """The minutes before the one numbered `now`."""
        past = self._past.get(minutes)
        if past is None or past.now != now:
            past = self._past[minutes] = _Past(now)
            for minute in self._last(minutes):
                if minute.number < now:
                    if minute.places is None:
                        minute.places = _by_place(minute)
                    _add_all(past.places, minute.places)
        return past.places

    def _last(self, minutes: int) -> list[_Minute]:
        first = int(self._clock() // 60) - minutes
        return [each for each in self._ring if each.number >= max(first, 0)]

    def covered(self, minutes: int) -> float:
        """Seconds that `totals(minutes, …)` looks back: less in a young process."""
        now = self._clock()
        return min(now - self._started, minutes * 60 + now % 60)


def _by_place(minute: _Minute) -> dict[Place, Totals]:
    places: dict[Place, Totals] = {}
    for key, totals in minute.cells.items():
        _into(places, Place(key.region, key.provider), totals)
    return places


def _add_all(groups: dict[Place, Totals], more: dict[Place, Totals]) -> None:
    for place, totals in more.items():
        _into(groups, place, totals)


def _into(groups: dict[_Group, Totals], group: _Group, totals: Totals) -> None:
    whole = groups.get(group)
    if whole is None:
        whole = groups[group] = Totals()
    whole.add(totals)
