"""The `beacon_*` metrics.

Counts are plain numbers of this one thread and become Prometheus samples only when they are asked
for: prometheus_client's own counters hold a lock each and cost several times as much an update.
Labels come from bounded sets: backend names, stages, faults, reasons, ends. What a client can make
up (model, path, tenant) is never a label.

A counter that is not there before it counts is no rise to Prometheus: a whole outage between two
scrapes would be in no `rate()`. So what is most asked for is there from the start, at 0.

`attempt` and `exchange` run for every request: there `Histogram.observe` stands written out, as the
call takes as long as what it does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .. import __version__
from ..contracts import Candidates, Clock, End, Exchange, Fault, Gauge, Live, Outcome, Stage, Warmth
from ..errors import (
    BudgetExceeded,
    Limited,
    ModelNotFound,
    NoBackend,
    Overloaded,
    ProxyError,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WAITS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_GONE_MOST = 256  # backends that are gone and were not told so yet
_COMPLETE = End.COMPLETE  # as a global it is found in a third of the time
_OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


def _slugs(error: type[ProxyError]) -> set[str]:
    return {error.reason}.union(*map(_slugs, error.__subclasses__()))


# What `reason` may be as a label: the proxy's own errors and the faults, as plain text.
_REASONS = {
    reason: reason
    for reason in (
        *sorted(_slugs(ProxyError)),
        *(fault._value_ for fault in Fault),
        "upstream_error",
        "upstream_timeout",
        "draining",
    )
}


# How exchanges end that no backend had a word in; `/inference` tells such things inside a 200.
_ENDS = {
    (End.COMPLETE, 2, ""): 0,
    (End.ERROR, 5, "upstream_error"): 0,
    (End.ERROR, 5, "upstream_timeout"): 0,
    **{
        (End.ERROR, hundreds, error.reason): 0
        for error in (BudgetExceeded, Limited, ModelNotFound, NoBackend, Overloaded)
        for hundreds in (error.status // 100, 2)
    },
}
# How attempts end that work, and most of those that do not. Each is a series for every backend:
# a thousand of them make a reading 3 % longer.
_ATTEMPTS: dict[tuple[Stage, Fault | None], int] = {
    (Stage.DONE, None): 0,
    (Stage.DONE, Fault.BUSY): 0,
    (Stage.DONE, Fault.STATUS): 0,
    (Stage.CONNECT, Fault.REFUSED): 0,
}


class Histogram:
    """Counts of values in fixed buckets, in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts with their upper bounds, as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


class Tally:
    """What the attempts at one backend add up to.

    Attributes:
        attempts: counts by stage and fault.
        ttft: s to first content.
        tokens_in, tokens_out, usd, expected_usd: sums.
        starts: cold ones; None before the first.
    """

    __slots__ = ("attempts", "expected_usd", "starts", "tokens_in", "tokens_out", "ttft", "usd")

    def __init__(self) -> None:
        self.attempts = _ATTEMPTS.copy()
        self.ttft = Histogram(_SECONDS)
        self.starts: Histogram | None = None
        self.usd = self.expected_usd = 0.0
        self.tokens_in = self.tokens_out = 0


_NONE = Tally()  # of a backend that was never asked


class Metrics(Collector):
    """Every number of this process, in a registry of its own."""

    def __init__(self, region: str, clock: Clock) -> None:
        self.exchanges = _ENDS.copy()  # by end, status // 100, reason
        self.ejections: Counter[str] = Counter()
        self.queue_depth = 0
        self.lines_lost = 0  # that the logger refused
        self.lines_unwritten = 0  # that were taken, but never written
        self._region = region
        self._clock = clock
        self._backends: dict[str, Tally] = {}
        self._gone: set[str] = set()  # backends whose last numbers are still to be told
        self._durations = Histogram(_SECONDS)
        self._waits = Histogram(_WAITS)
        self._overhead = Histogram(_OVERHEAD)
        self._candidates: Candidates = ()
        self.measured: list[Gauge] = []  # what others show, at the time of a reading
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def attempt(self, outcome: Outcome) -> None:
        name = outcome.backend.name
        tally = self._backends.get(name)
        if tally is None:
            tally = self._backends[name] = Tally()
        how = outcome.stage, outcome.fault
        try:
            tally.attempts[how] += 1
        except KeyError:
            tally.attempts[how] = 1
        tally.usd += outcome.usd
        tally.expected_usd += outcome.expected_usd
        ttft, usage = outcome.ttft, outcome.usage
        if ttft is not None:
            seen = tally.ttft
            seen.counts[bisect_left(_SECONDS, ttft)] += 1
            seen.total += ttft
        if usage is not None:
            tally.tokens_in += usage.input
            tally.tokens_out += usage.output
        if outcome.cold_start is not None:
            if tally.starts is None:
                tally.starts = Histogram(_SECONDS)
            tally.starts.observe(outcome.cold_start)

    def exchange(
        self,
        exchange: Exchange,
        end: End,
        status: int,
        reason: str | None,
        duration: float,
        queued: float,
    ) -> None:
        how = end, status // 100, _REASONS.get(reason, "other") if reason else ""
        try:
            self.exchanges[how] += 1
        except KeyError:
            self.exchanges[how] = 1
        seen = self._durations
        seen.counts[bisect_left(_SECONDS, duration)] += 1
        seen.total += duration
        if queued > 0:
            self._waits.observe(queued)
        if end is _COMPLETE and exchange.attempts:
            # What no attempt and no wait accounts for; reading the client's body is among it.
            ours = duration - queued
            for outcome in exchange.attempts:
                ours -= outcome.duration
            if ours < 0:
                ours = 0.0
            seen = self._overhead
            seen.counts[bisect_left(_OVERHEAD, ours)] += 1
            seen.total += ours

    def forget(self, name: str) -> None:
        """Tell the numbers of a backend that is gone once more, and then no longer.

        Who has come back by then goes on counting where it was.
        """
        if len(self._gone) >= _GONE_MOST:  # nobody asks
            self._drop(self._gone)
        self._gone.add(name)

    def _drop(self, names: Collection[str]) -> None:
        for name in names:
            self._backends.pop(name, None)
            self.ejections.pop(name, None)
        self._gone.clear()

    def render(self, candidates: Candidates, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that `accept` prefers."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encode, content_type = choose_encoder("")
        self._candidates = candidates
        if not self._gone:
            return encode(self._registry), content_type
        told = encode(self._registry)
        self._drop(self._gone - {candidate.backend.name for candidate in candidates})
        return told, content_type

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "beacon_build", "This proxy.", {"version": __version__, "region": self._region}
        )
        yield from self._of_exchanges()
        yield from self._of_attempts()
        yield from self._of_fleet()
        yield from self._of_others()

    def _of_exchanges(self) -> Iterator[Metric]:
        exchanges = CounterMetricFamily(
            "beacon_exchanges",
            "Client requests, by how and why they ended.",
            labels=("end", "status_class", "reason"),
        )
        for (end, hundreds, reason), count in self.exchanges.items():
            exchanges.add_metric((end._value_, f"{hundreds}xx", reason), count)
        yield exchanges
        for name, text, histogram in (
            ("exchange_duration", "From the head of a request to its end.", self._durations),
            ("queue_wait", "Waiting for room or for a retry, of those that waited.", self._waits),
            ("overhead", "Time a complete exchange spent in the proxy itself.", self._overhead),
        ):
            yield HistogramMetricFamily(
                f"beacon_{name}_seconds", text, histogram.buckets(), histogram.total
            )
        yield GaugeMetricFamily("beacon_queue_depth", "Waiting for room now.", self.queue_depth)
        lost = self.lines_lost + self.lines_unwritten
        yield CounterMetricFamily(
            "beacon_log_lines_lost", "Log lines that could not be written.", lost
        )

    def _of_attempts(self) -> Iterator[Metric]:
        attempts = CounterMetricFamily(
            "beacon_attempts",
            "Tries at a backend, by where and why they ended.",
            labels=("backend", "stage", "fault"),
        )
        ttft = HistogramMetricFamily(
            "beacon_ttft_seconds", "From an attempt's start to first content.", labels=("backend",)
        )
        starts = HistogramMetricFamily(
            "beacon_cold_start_seconds", "What backends took to start.", labels=("backend",)
        )
        tokens = CounterMetricFamily(
            "beacon_tokens",
            "Tokens as backends count them, else estimated.",
            labels=("backend", "direction"),
        )
        usd = CounterMetricFamily(
            "beacon_cost_usd", "Spend, as the attempts that ended were billed.", labels=("backend",)
        )
        expected = CounterMetricFamily(
            "beacon_expected_cost_usd",
            "What was expected of these attempts before they were made.",
            labels=("backend",),
        )
        shown = [candidate.backend.name for candidate in self._candidates]
        for name, tally in {**dict.fromkeys(shown, _NONE), **self._backends}.items():
            for (stage, fault), count in tally.attempts.items():
                told = "none" if fault is None else fault._value_
                attempts.add_metric((name, stage._value_, told), count)
            if tally is not _NONE:  # 18 series each
                ttft.add_metric((name,), tally.ttft.buckets(), tally.ttft.total)
            if tally.starts is not None:
                starts.add_metric((name,), tally.starts.buckets(), tally.starts.total)
            tokens.add_metric((name, "in"), tally.tokens_in)
            tokens.add_metric((name, "out"), tally.tokens_out)
            usd.add_metric((name,), tally.usd)
            expected.add_metric((name,), tally.expected_usd)
        ejections = CounterMetricFamily(
            "beacon_ejections", "Times a backend was set aside.", labels=("backend",)
        )
        for name, count in {**dict.fromkeys(shown, 0), **self.ejections}.items():
            ejections.add_metric((name,), count)
        yield from (attempts, ttft, starts, tokens, usd, expected, ejections)

    def _of_fleet(self) -> Iterator[Metric]:
        info = InfoMetricFamily(
            "beacon_backend",
            "What a backend is, to join the others with.",
            labels=("backend", "provider", "region", "pool"),
        )
        in_flight = GaugeMetricFamily(
            "beacon_in_flight", "Attempts running now.", labels=("backend",)
        )
        health = GaugeMetricFamily(
            "beacon_backend_healthy", "1 where it is believed to work.", labels=("backend",)
        )
        resting = GaugeMetricFamily(
            "beacon_backend_resting", "1 while it is left alone, as it asked.", labels=("backend",)
        )
        warmth = GaugeMetricFamily(
            "beacon_backend_warmth",
            "1 for what it is: warm, cold, warming or unknown.",
            labels=("backend", "warmth"),
        )
        capacity = GaugeMetricFamily(
            "beacon_backend_capacity",
            "Workers and requests as the backend's provider counts them.",
            labels=("backend", "what"),
        )
        now = self._clock()
        for candidate in self._candidates:
            backend, live = candidate.backend, candidate.live
            info.add_metric((backend.name, backend.provider, backend.region, backend.pool), {})
            in_flight.add_metric((backend.name,), live.in_flight)
            health.add_metric((backend.name,), healthy(live, now))
            resting.add_metric((backend.name,), live.resting_until > now)
            is_now = live.warmth_at(now)
            for each in Warmth:
                warmth.add_metric((backend.name, each._value_), each is is_now)
            if live.capacity is not None:
                for what, count in asdict(live.capacity).items():
                    if count is not None:
                        capacity.add_metric((backend.name, what), count)
        yield from (info, in_flight, health, resting, warmth, capacity)

    def _of_others(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for gauge in self.measured:
            family = families.get(gauge.name)
            if family is None:
                names = tuple(name for name, _ in gauge.labels)
                kind = CounterMetricFamily if gauge.counts else GaugeMetricFamily
                family = kind(f"beacon_{gauge.name}", gauge.help, labels=names)
                families[gauge.name] = family
            family.add_metric(tuple(value for _, value in gauge.labels), gauge.value)
        yield from families.values()


def healthy(live: Live, now: float) -> bool:
    """Whether a backend is believed to work: not found down, and not set aside."""
    return live.healthy and live.ejected_until <= now
