"""The `beacon_*` metrics.

Counts are plain numbers of this one thread and become Prometheus samples only when they are asked
for: prometheus_client's own counters hold a lock each and cost several times as much an update.
Labels come from bounded sets: backend names, stages, faults, reasons, ends. What a client can make
up (model, path, tenant) is never a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
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
from ..contracts import Candidates, Clock, End, Exchange, Fault, Live, Outcome
from ..errors import ProxyError

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WAITS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


def _slugs(error: type[ProxyError]) -> set[str]:
    return {error.reason}.union(*map(_slugs, error.__subclasses__()))


# What `reason` may be as a label: the proxy's own errors and the faults. Plain text, for the same
# cause as in `Metrics.attempt`.
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
    """What the attempts at one backend add up to."""

    __slots__ = ("attempts", "tokens_in", "tokens_out", "ttft", "usd")

    def __init__(self) -> None:
        self.attempts: Counter[tuple[str, str]] = Counter()  # (stage, fault)
        self.ttft = Histogram(_SECONDS)
        self.usd = 0.0
        self.tokens_in = self.tokens_out = 0


class Metrics(Collector):
    """Every number of this process, in a registry of its own."""

    def __init__(self, region: str, clock: Clock) -> None:
        # (end, status // 100, reason)
        self.exchanges: Counter[tuple[str, int, str]] = Counter()
        self.ejections: Counter[str] = Counter()
        self.queue_depth = 0
        self.lines_lost = 0  # that the logger refused
        self.lines_unwritten = 0  # that were taken, but never written
        self._region = region
        self._clock = clock
        self._backends: dict[str, Tally] = {}
        self._durations = Histogram(_SECONDS)
        self._waits = Histogram(_WAITS)
        self._overhead = Histogram(_OVERHEAD)
        self._candidates: Candidates = ()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def attempt(self, outcome: Outcome, usd: float) -> None:
        name = outcome.backend.name
        tally = self._backends.get(name)
        if tally is None:
            tally = self._backends[name] = Tally()
        # The text of an enum member: its hash is a C slot's, the member's own runs Python.
        fault = "none" if outcome.fault is None else outcome.fault._value_
        tally.attempts[outcome.stage._value_, fault] += 1
        tally.usd += usd
        if outcome.ttft is not None:
            tally.ttft.observe(outcome.ttft)
        if outcome.usage is not None:
            tally.tokens_in += outcome.usage.input
            tally.tokens_out += outcome.usage.output

    def exchange(
        self,
        exchange: Exchange,
        end: End,
        status: int,
        reason: str | None,
        duration: float,
        queued: float,
    ) -> None:
        told = _REASONS.get(reason, "other") if reason else ""
        self.exchanges[end._value_, status // 100, told] += 1
        self._durations.observe(duration)
        if queued > 0:
            self._waits.observe(queued)
        if end is End.COMPLETE and exchange.attempts:
            self._overhead.observe(overhead(exchange, duration, queued))

    def render(self, candidates: Candidates, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that `accept` prefers."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encode, content_type = choose_encoder("")
        self._candidates = candidates
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "beacon_build", "This proxy.", {"version": __version__, "region": self._region}
        )
        yield from self._of_exchanges()
        yield from self._of_attempts()
        yield from self._of_fleet()

    def _of_exchanges(self) -> Iterator[Metric]:
        exchanges = CounterMetricFamily(
            "beacon_exchanges",
            "Client requests, by how and why they ended.",
            labels=("end", "status_class", "reason"),
        )
        for (end, hundreds, reason), count in self.exchanges.items():
            exchanges.add_metric((end, f"{hundreds}xx", reason), count)
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
        tokens = CounterMetricFamily(
            "beacon_tokens", "Tokens as backends count them.", labels=("backend", "direction")
        )
        usd = CounterMetricFamily(
            "beacon_cost_usd", "Estimated spend: billed seconds by price.", labels=("backend",)
        )
        for name, tally in self._backends.items():
            for (stage, fault), count in tally.attempts.items():
                attempts.add_metric((name, stage, fault), count)
            ttft.add_metric((name,), tally.ttft.buckets(), tally.ttft.total)
            tokens.add_metric((name, "in"), tally.tokens_in)
            tokens.add_metric((name, "out"), tally.tokens_out)
            usd.add_metric((name,), tally.usd)
        ejections = CounterMetricFamily(
            "beacon_ejections", "Times a backend was set aside.", labels=("backend",)
        )
        for name, count in self.ejections.items():
            ejections.add_metric((name,), count)
        yield from (attempts, ttft, tokens, usd, ejections)

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
        now = self._clock()
        for candidate in self._candidates:
            backend, live = candidate.backend, candidate.live
            info.add_metric((backend.name, backend.provider, backend.region, backend.pool), {})
            in_flight.add_metric((backend.name,), live.in_flight)
            health.add_metric((backend.name,), healthy(live, now))
            resting.add_metric((backend.name,), live.resting_until > now)
        yield from (info, in_flight, health, resting)


def healthy(live: Live, now: float) -> bool:
    """Whether a backend is believed to work: not found down, and not set aside."""
    return live.healthy and live.ejected_until <= now


def overhead(exchange: Exchange, duration: float, queued: float) -> float:
    """Seconds of an exchange that no attempt and no wait accounts for.

    Reading the client's body is among them.
    """
    tried = sum([outcome.duration for outcome in exchange.attempts])
    return max(0.0, duration - tried - queued)
