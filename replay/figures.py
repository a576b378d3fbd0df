"""From the records of a run to what they say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .optimum import Spent, spent
from .trace import Request, Trace
from .world import OUTAGES

SHARE = 0.3  # of the burst pool
WINDOW = 1_000  # exchanges
SLICE = 300.0  # s, of what is drawn over time
_AFTER = 120.0  # s after a spike or an outage until what it left behind is over
_SERVED = ("good", "caller")


@dataclass(frozen=True, slots=True)
class Slice:
    """What ended in one stretch of time."""

    at: float  # s from the start, its middle
    baseline: float | None  # share; None: nobody was served
    price: float | None  # USD per second that was billed
    shed: int


@dataclass(frozen=True, slots=True)
class Alert:
    """What the operator was told."""

    begins: float  # s from the start
    ends: float | None  # None: it lasted to the end
    rule: str
    text: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run says."""

    ends: Mapping[str, int]  # exchanges, by how they ended for their client
    shed: Mapping[str, int]  # those that got an error instead of an answer, by status and reason
    served: int  # exchanges whose pool the blend decided
    baseline: float  # their share at the baseline pool, 0..1
    calm: tuple[float, float]  # least and most of it in any WINDOW in a row that were in calm
    any: tuple[float, float]  # and in any at all
    ttft: tuple[float, float]  # s, p50 and p95 over the streams that were whole
    queued: int  # exchanges that waited for room
    queue_p95: float  # s, of those
    attempts: int
    starts: int  # of workers
    price: float  # USD per second that was billed
    dearest: float  # the most of it in any SLICE
    spent: Spent
    workers_usd: float  # what the burst pool's workers cost by the second that they were up
    burst_usd: float  # and what was recorded for it
    dearest_hour: float  # the most of that in one hour, USD
    alerts: tuple[Alert, ...]
    slices: tuple[Slice, ...]


def figures(trace: Trace, records: Mapping[str, Any]) -> Figures:
    """Compute them all."""
    requests = {request.id: request for request in trace.requests}
    start, attempts, visits = records["start"], records["attempts"], records["visits"]
    prices = {row["name"]: row["price"] for row in records["backends"]}
    pools = {row["name"]: row["pool"] for row in records["backends"]}
    served = _served(attempts, requests, pools, start)
    in_burst = [row for row in records["backends"] if row["pool"] == "burst"]
    firsts = [
        got["first"]
        for got in records["clients"]
        if got["end"] == "whole" and got["status"] == 200 and requests[got["id"]].stream
    ]
    queued = [line["queued_s"] for line in records["exchanges"] if line["queued_s"] > 0]
    slices = _slices(trace, records, served)
    hours = burst_hours(records)
    return Figures(
        ends=Counter(map(_end, records["clients"])),
        shed=Counter(
            f"{line['status']} {line['reason']}"
            for line in records["exchanges"]
            if line["end"] == "error" and line["status"] >= 400
        ),
        served=len(served),
        baseline=sum(at_baseline for _, at_baseline in served) / len(served),
        calm=_extremes(served, calm(trace)),
        any=_extremes(served, [(0.0, float("inf"))]),
        ttft=(_quantile(firsts, 0.5), _quantile(firsts, 0.95)),
        queued=len(queued),
        queue_p95=_quantile(queued, 0.95),
        attempts=len(attempts),
        starts=sum(row["starts"] for row in records["backends"]),
        price=_price(attempts),
        dearest=max(each.price for each in slices if each.price is not None),
        spent=spent(requests, visits, prices, pools, SHARE),
        workers_usd=sum(row["worker_seconds"] * row["price"] for row in in_burst),
        burst_usd=sum(hours),
        dearest_hour=max(hours),
        alerts=_alerts(records["events"], start),
        slices=slices,
    )


def burst_hours(records: Mapping[str, Any]) -> list[float]:
    """USD of the burst pool's attempts that ended in each hour; an hour begins with the run."""
    pools = {row["name"]: row["pool"] for row in records["backends"]}
    hours: dict[int, float] = defaultdict(float)
    for attempt in records["attempts"]:
        if pools[attempt["backend"]] == "burst":
            end = attempt["started"] + attempt["duration"] - records["start"]
            hours[int(end // 3600)] += attempt["usd"]
    return [hours[number] for number in range(max(hours) + 1)]


def _alerts(events: Iterable[Mapping[str, Any]], start: float) -> tuple[Alert, ...]:
    begun: list[Mapping[str, Any]] = []
    ends: dict[tuple[str, str, str], float] = {}
    for event in events:
        if event["event"] == "alert.began":
            begun.append(event)
        elif event["event"] == "alert.ended":
            ends[event["rule"], event["subject"], event["since"]] = event["at"] - start
    return tuple(
        Alert(
            begins=event["at"] - start,
            ends=ends.get((event["rule"], event["subject"], event["since"])),
            rule=event["rule"],
            text=event["text"],
        )
        for event in begun
    )


def calm(trace: Trace) -> list[tuple[float, float]]:
    """The stretches (s) without a spike or an outage, nor what one leaves behind."""
    busy = [*trace.spikes, *((o.begin * trace.span, o.end * trace.span) for o in OUTAGES)]
    stretches, free_from = [], 0.0
    for begin, end in sorted(busy):
        if begin > free_from:
            stretches.append((free_from, begin))
        free_from = max(free_from, end + _AFTER)
    return [*stretches, (free_from, trace.span)]


def _served(
    attempts: Iterable[Mapping[str, Any]],
    requests: Mapping[str, Request],
    pools: Mapping[str, str],
    start: float,
) -> list[tuple[float, bool]]:
    """When each exchange that the blend decided was served (s), and whether at the baseline pool.

    As the middleware counts: an answer that was passed on, or that was the caller's own fault.
    """
    return [
        (a["started"] + a["duration"] - start, pools[a["backend"]] == "baseline")
        for a in attempts
        if (a["committed"] or a["verdict"] in _SERVED) and requests[a["id"]].cheap is None
    ]


def _extremes(
    served: Sequence[tuple[float, bool]], stretches: Iterable[tuple[float, float]]
) -> tuple[float, float]:
    """The least and the most share of baseline in WINDOW exchanges in a row inside a stretch."""
    shares = []
    for begin, end in stretches:
        inside = [at_baseline for at, at_baseline in served if begin <= at < end]
        if len(inside) < WINDOW:
            continue
        count = sum(inside[:WINDOW])
        shares.append(count)
        for left, entered in zip(inside, inside[WINDOW:], strict=False):
            count += entered - left
            shares.append(count)
    if not shares:
        return float("nan"), float("nan")
    return min(shares) / WINDOW, max(shares) / WINDOW


def _slices(
    trace: Trace, records: Mapping[str, Any], served: Sequence[tuple[float, bool]]
) -> tuple[Slice, ...]:
    start, count = records["start"], round(trace.span / SLICE)
    width = trace.span / count
    ended: list[list[Mapping[str, Any]]] = [[] for _ in range(count)]
    pools: list[list[bool]] = [[] for _ in range(count)]
    shed = [0] * count

    def place(at: float) -> int:
        return min(int(at / width), count - 1)

    for attempt in records["attempts"]:
        ended[place(attempt["started"] + attempt["duration"] - start)].append(attempt)
    for at, at_baseline in served:
        pools[place(at)].append(at_baseline)
    requests = {request.id: request for request in trace.requests}
    for got in records["clients"]:
        if _end(got) == "shed":
            shed[place(requests[got["id"]].at + got["seconds"])] += 1
    return tuple(
        Slice(
            at=(number + 0.5) * width,
            baseline=sum(pools[number]) / len(pools[number]) if pools[number] else None,
            price=_price(ended[number]) if ended[number] else None,
            shed=shed[number],
        )
        for number in range(count)
    )


def _end(got: Mapping[str, Any]) -> str:
    if got["end"] == "whole":
        return "answered" if got["status"] == 200 else "shed"
    return str(got["end"])


def _price(attempts: Sequence[Mapping[str, Any]]) -> float:
    billed = sum(attempt["billed"] for attempt in attempts)
    return sum(attempt["usd"] for attempt in attempts) / billed if billed else 0.0


def _quantile(values: Iterable[float], q: float) -> float:
    """By the nearest rank; 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(int(q * len(ranked)), len(ranked) - 1)] if ranked else 0.0
