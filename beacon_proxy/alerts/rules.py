"""What each rule reads of a view: a value for each of its subjects, and what that means in words.

Nothing here is counted for a request. What is not there (no traffic, a gauge that nobody shows)
says nothing.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any, NamedTuple

from ..config.alerts import (
    BlendOffTarget,
    BudgetUsed,
    DiscoveryStale,
    LedgerTrouble,
    LogLinesLost,
    PoolUtilisation,
    ProviderDown,
    ProviderRefuses,
    QueueLong,
    Rules,
    SuccessRate,
    TtftP95,
)
from ..contracts import WARMING_TIME, Live, Warmth
from .alarm import Mark, Severity
from .view import MINUTES, Place, Reading, View

Read = Callable[[View], Iterable[Reading]]

_WARMING = Warmth.WARMING
_WINDOW = MINUTES * 60.0  # s
_PAST = 3600.0  # s before the recent ones, that a TTFT is held against
_PAST_LEAST = 600.0  # s of them that there must be


class Rule(NamedTuple):
    """What is read, and the marks at which it is an alert."""

    name: str
    read: Read
    marks: tuple[Mark, ...]


def rules_of(settings: Rules) -> list[Rule]:
    """The rules that are switched on, in the order of the configuration."""
    made = []
    for name, make in _MAKERS.items():
        section = getattr(settings, name)
        if section is not None:
            read, *marks = make(section)
            made.append(Rule(name, read, tuple(marks)))
    return made


def _percent(share: float) -> str:
    return f"{round(share * 100, 1):g} %"


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


# The fleet


def alive(live: Live, now: float) -> bool:
    """Whether it is not down: neither set aside nor found down, or only starting.

    One that rests is not: a 429 is an answer, whatever its `Retry-After`.
    """
    if live.ejected_until > now:
        return False
    return live.healthy or live.warmth_at(now) is _WARMING  # cold is no fault


def usable(live: Live, now: float) -> bool:
    """Whether a request may well go there now: it is not down, and not left alone."""
    if not alive(live, now):
        return False
    return live.resting_until <= now or live.warmth_at(now) is _WARMING


def _pool_utilisation(rule: PoolUtilisation) -> tuple[Any, ...]:
    refused, load = _Growth(), _Load()
    means: dict[str, _Mean] = {}

    def read(view: View) -> Iterator[Reading]:
        wanted = refused.see(view.now, view.shed) > 0 or view.queue[0] > 0
        loads = load.see(view)
        for pool in means.keys() - loads.keys():
            del means[pool]
        for pool, (share, slots) in loads.items():
            # Where the mark is the last slot, as with few of them, to use all is no trouble: it is
            # that somebody would have more.
            small = (slots - 1) / slots < rule.above
            mean = means.setdefault(pool, _Mean(rule.for_))
            mean.add(load.seconds, share, 0.0 if small and not wanted else share)
            says = f"pool {pool} is {_percent(mean.share)} full"
            if small and not wanted:
                yield Reading(pool, mean.value, f"{says}, and nobody waits")
            else:
                yield Reading(pool, mean.value, f"{says} (alert from {_percent(rule.above)})")

    # That it lasts is in the mean: of ten single moments one is below it, however full the pool.
    return read, Mark(rule.above, _or(rule.clear, 0.9 * rule.above), 0.0, rule.clear_for)


class _Load:
    """What share of each pool's slots was taken on average since the look before.

    Attributes:
        seconds: since then; 0 at the first look, which has no more than its moment.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._at: float | None = None
        self._taken: dict[str, tuple[Live, float]] = {}  # `Live.taken`, by the name of the backend

    def see(self, view: View) -> dict[str, tuple[float, int]]:
        """The share and the slots of each pool's usable backends; one without any is left out."""
        now = view.now
        self.seconds = seconds = 0.0 if self._at is None else now - self._at
        self._at, before, self._taken = now, self._taken, {}
        found: dict[str, tuple[float, int]] = {}  # what runs, and slots
        for candidate in view.candidates:
            backend, live = candidate.backend, candidate.live
            if not usable(live, now):
                continue
            name, slots = backend.name, backend.max_in_flight
            for limit in view.limits:
                slots = min(slots, limit(backend))
            taken, mean = live.taken(now), float(live.in_flight)
            self._taken[name] = live, taken
            if seconds > 0 and name in before and before[name][0] is live:
                mean = (taken - before[name][1]) / seconds
            running, room = found.get(backend.pool, (0.0, 0))
            found[backend.pool] = running + mean, room + slots
        return {pool: (runs / slots, slots) for pool, (runs, slots) in found.items() if slots > 0}


class _Mean:
    """The mean of what was seen of a pool over some last seconds.

    Attributes:
        share: of its slots that were taken.
        value: the same, less the time in which that was no trouble; None: it was not seen for as
            long yet.
    """

    def __init__(self, over: float) -> None:
        self._over = over
        self._seen: deque[tuple[float, float, float]] = deque()  # s, and both over them
        self.share = 0.0
        self.value: float | None = None

    def add(self, seconds: float, share: float, value: float) -> None:
        seen = self._seen
        seen.append((seconds, share, value))
        covered = sum([each[0] for each in seen])
        while len(seen) > 1 and covered - seen[0][0] >= self._over:
            covered -= seen.popleft()[0]
        if covered <= 0:
            self.share, mean = share, value
        else:
            self.share = sum([each[0] * each[1] for each in seen]) / covered
            mean = sum([each[0] * each[2] for each in seen]) / covered
        # The last look may come a little early.
        self.value = mean if covered >= 0.99 * self._over else None


def _provider_down(rule: ProviderDown) -> tuple[Any, ...]:
    def read(view: View) -> Iterator[Reading]:
        all_of: dict[str, int] = {}
        well: dict[str, int] = {}
        for candidate in view.candidates:
            provider = candidate.backend.provider
            all_of[provider] = all_of.get(provider, 0) + 1
            well[provider] = well.get(provider, 0) + alive(candidate.live, view.now)
        for provider, count in all_of.items():
            yield Reading(
                provider,
                well[provider],
                f"provider {provider}: {well[provider]} of {count} backends are up",
            )

    mark = Mark(
        1.0, 1.0, rule.for_, rule.clear_for, Severity.CRITICAL, past=operator.lt, clear=operator.ge
    )
    return read, mark


# The last minutes


def _provider_refuses(rule: ProviderRefuses) -> tuple[Any, ...]:
    starting: dict[Place, float] = {}  # since when it has answered nothing but that; monotonic s

    def read(view: View) -> Iterator[Reading]:
        refusing = {
            place: sums for place, sums in view.recent.items() if sums.busy and not sums.good
        }
        rows: dict[Place, list[Live]] = {place: [] for place in refusing}
        for candidate in view.candidates:
            backend = candidate.backend
            if (lives := rows.get((backend.region, backend.provider))) is not None:
                lives.append(candidate.live)
        for place in starting.keys() - refusing.keys():
            del starting[place]
        for place, sums in view.recent.items():
            says = f"{_words(place)}: {sums.good} attempts in {MINUTES} minutes were good"
            if place not in refusing:
                yield Reading(_name(place), 0.0, says)
                continue
            since, lives = starting.setdefault(place, view.now), rows[place]
            # Cold is no fault; but who says so for longer than a start takes does not start.
            starts = any(live.warmth_at(view.now) is _WARMING for live in lives)
            if starts and view.now - since < WARMING_TIME:
                continue
            count = sums.busy + sums.strikes
            # Who asks for minutes of rest is hardly asked at all.
            if lives and (
                count >= rule.min_attempts or not any(usable(live, view.now) for live in lives)
            ):
                yield Reading(
                    _name(place),
                    1.0,
                    f"{_words(place)}: none of {count} attempts in {MINUTES} minutes was good,"
                    f" {sums.busy} were pushed back (429, 503)",
                )

    return read, Mark(1.0, 0.0, rule.for_, rule.clear_for, Severity.CRITICAL)


def _success_rate(rule: SuccessRate) -> tuple[Any, ...]:
    def read(view: View) -> Iterator[Reading]:
        for place, sums in view.recent.items():
            rate, count = sums.success_rate(), sums.good + sums.strikes
            if rate is not None and count >= rule.min_attempts:
                yield Reading(
                    _name(place),
                    rate,
                    f"{_words(place)}: {_percent(rate)} of {count} attempts in"
                    f" {MINUTES} minutes were good (alert below {_percent(rule.below)})",
                )

    ends = _or(rule.clear, (1.0 + rule.below) / 2)
    mark = Mark(rule.below, ends, rule.for_, rule.clear_for, past=operator.lt, clear=operator.ge)
    return read, mark


def _ttft_p95(rule: TtftP95) -> tuple[Any, ...]:
    past = _Past()

    def read(view: View) -> Iterator[Reading]:
        enough = {
            place: p95
            for place, sums in view.recent.items()
            if len(sums.ttft) >= rule.min_attempts and (p95 := sums.ttft_quantile(0.95)) is not None
        }
        past.keep(view.recent_at, enough)
        for place, p95 in enough.items():
            before = past.of(place, view.recent_at)
            if before and p95 >= rule.at_least:
                times = p95 / before
                yield Reading(
                    _name(place),
                    times,
                    f"{_words(place)}: TTFT p95 is {p95:.3g} s, {times:.3g} times that of the"
                    f" hour before, {before:.3g} s (alert from {rule.factor:g} times)",
                )

    ends = _or(rule.clear, (1.0 + rule.factor) / 2)
    return read, Mark(rule.factor, ends, rule.for_, rule.clear_for)


def _name(place: Place) -> str:
    region, provider = place
    return f"{provider}/{region}"


def _words(place: Place) -> str:
    region, provider = place
    return f"{provider} in {region}"


class _Past:
    """What the recent p95 of each place was at each reading of the last hour."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, dict[Place, float]]] = deque()

    def keep(self, at: float, p95s: dict[Place, float]) -> None:
        """Remember a reading, unless it is the one remembered last; `at` in monotonic s."""
        kept = self._kept
        if not kept or kept[-1][0] != at:
            kept.append((at, p95s))
        while kept[0][0] < at - _WINDOW - _PAST:
            kept.popleft()

    def of(self, place: Place, now: float) -> float | None:
        """The median of those older than the recent minutes; None: there are not enough yet."""
        found = [
            (at, p95s[place]) for at, p95s in self._kept if at <= now - _WINDOW and place in p95s
        ]
        if not found or found[-1][0] - found[0][0] < _PAST_LEAST:
            return None
        return median(p95 for _, p95 in found)


# Money


def _budget(rule: BudgetUsed) -> tuple[Any, ...]:
    def read(view: View) -> Iterator[Reading]:
        limits = view.by_label("budget_usd", "budget")
        for name, share in view.by_label("budget_used_ratio", "budget").items():
            if limits.get(name) == 0:
                continue  # it refuses whatever costs anything: that is what it was made for
            # One tenant at its own limit is that tenant's trouble; the others do not feel it.
            one = name in view.tenant_budgets
            whose = f"budget {name} of one tenant" if one else f"budget {name}"
            yield Reading(name, share, f"{whose} is used up to {_percent(share)}", minor=one)

    wanted = ((rule.warning, Severity.WARNING), (rule.critical, Severity.CRITICAL))
    marks = (
        Mark(at, 0.95 * at, rule.for_, rule.clear_for, severity)
        for at, severity in wanted
        if at is not None
    )
    return read, *marks


def _blend_off_target(rule: BlendOffTarget) -> tuple[Any, ...]:
    decided = _Growth()
    served: dict[str, _Growth] = {}

    def read(view: View) -> Iterator[Reading]:
        now, count = view.now, view.one("blend_decided")
        if count is None:
            return
        targets = view.by_label("blend_target_share", "pool")
        grown = {
            pool: served.setdefault(pool, _Growth()).see(now, amount)
            for pool, amount in view.by_label("blend_served", "pool").items()
        }
        enough = decided.see(now, count) >= rule.min_attempts
        of_all = sum(grown.values())
        shares = {
            # The milder of two pasts. The last thousand alone would be off long after an outage,
            # the last minutes alone where a few long requests make them up.
            pool: max(share, grown[pool] / of_all)
            for pool, share in view.by_label("blend_share", "pool").items()
            if enough and of_all > 0 and pool in grown and pool in targets
        }
        if not shares:
            return
        # What one pool has too little the other has too much: it is one alert.
        pool = max(sorted(shares), key=lambda name: targets[name] - shares[name])
        yield Reading(
            "blend",
            max(0.0, targets[pool] - shares[pool]) * 100,
            f"pool {pool} has {_percent(shares[pool])} of the traffic,"
            f" {_percent(targets[pool])} is its target (alert from {rule.above:g} points)",
        )

    ends = _or(rule.clear, rule.above / 2)
    return read, Mark(rule.above, ends, rule.for_, rule.clear_for)


def _ledger(rule: LedgerTrouble) -> tuple[Any, ...]:
    lost_rows = _Growth()

    def read(view: View) -> Iterator[Reading]:
        healthy, lost = view.one("ledger_healthy"), view.one("ledger_rows_lost")
        if healthy is not None:
            trouble = 0.0 if healthy else 1.0
            says = "the ledger cannot be written" if trouble else "the ledger is written"
            yield Reading("ledger", trouble, says)
        if lost is not None:
            grown = lost_rows.see(view.now, lost)
            says = f"{grown:g} rows of the ledger were lost in {MINUTES} minutes"
            yield Reading("rows", grown, says)

    return read, Mark(1.0, 0.0, rule.for_, rule.clear_for, Severity.CRITICAL)


# The proxy itself


def _queue(rule: QueueLong) -> tuple[Any, ...]:
    def read(view: View) -> Iterator[Reading]:
        waiting, room = view.queue
        if room:
            says = f"{waiting} of {room} places in the queue are taken"
            yield Reading("queue", waiting / room, says)

    ends = _or(rule.clear, rule.above / 2)
    return read, Mark(rule.above, ends, rule.for_, rule.clear_for)


def _discovery(rule: DiscoveryStale) -> tuple[Any, ...]:
    def read(view: View) -> Iterator[Reading]:
        for source, answers in view.sources.items():
            says = "answers" if answers else "cannot be asked; what it said last still stands"
            yield Reading(source, 0.0 if answers else 1.0, f"{source} {says}")

    return read, Mark(1.0, 0.0, rule.for_, rule.clear_for)


def _log_lines_lost(rule: LogLinesLost) -> tuple[Any, ...]:
    lines = _Growth()

    def read(view: View) -> Iterator[Reading]:
        grown = lines.see(view.now, view.lines_lost)
        says = f"{grown:g} log lines could not be written in {MINUTES} minutes"
        yield Reading("log", grown, says)

    mark = Mark(rule.above, rule.above, rule.for_, rule.clear_for, past=operator.gt)
    return read, mark


class _Growth:
    """By how much a count that never falls grew over the recent minutes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque([(float("-inf"), 0.0)])

    def see(self, now: float, count: float) -> float:
        seen = self._seen
        if seen[-1][1] != count:
            seen.append((now, count))
        while len(seen) > 1 and seen[1][0] <= now - _WINDOW:
            seen.popleft()
        return count - seen[0][1]


_MAKERS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "pool_utilisation": _pool_utilisation,
    "provider_down": _provider_down,
    "provider_refuses": _provider_refuses,
    "success_rate": _success_rate,
    "ttft_p95": _ttft_p95,
    "budget": _budget,
    "blend_off_target": _blend_off_target,
    "ledger": _ledger,
    "queue": _queue,
    "discovery": _discovery,
    "log_lines_lost": _log_lines_lost,
}
