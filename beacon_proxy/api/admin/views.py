"""What the own routes show of the fleet: plain data from candidates, without HTTP.

Numbers that are not known keep their type: 0.0 s, a success rate of 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import inf
from typing import Any

from ...contracts import Candidate, Candidates, Capacity, Check, Live
from ...fleet.load import GROUPS, Load, Share
from ...ops.metrics import healthy
from ...ops.totals import Totals
from ...ops.windows import SPANS, Place, Windows
from .models import names_of

_PERCENTILES = (50, 95, 99)


def usable(live: Live, now: float) -> bool:
    """Whether a request may go there: believed to work, or due for a trial."""
    return healthy(live, now) or 0 < live.ejected_until <= now


def provider(
    candidate: Candidate, now: float, unix: float, totals: Totals, share: Share, *, draining: bool
) -> dict[str, Any]:
    """One entry of /providers. The first eight fields are read by old clients: types are fixed."""
    backend, live = candidate.backend, candidate.live
    ejected = live.ejected_until > now
    until = backend.rented_until_unix
    return {
        "name": backend.name,
        "type": backend.provider,
        "region": backend.region,
        "healthy": healthy(live, now),
        "cost_per_second": float(backend.price_per_second),
        "avg_latency": round(live.latency or 0.0, 6),
        "success_rate": round(live.success, 6),
        "last_health_check": float(live.last_check),
        "price_model": backend.price_model,
        "idle_cost_per_second": float(backend.idle_price_per_second),
        "rented_until": None if until == inf else until,
        "region_assumed": backend.region_assumed,
        "pool": backend.pool,
        "draining": draining,  # it has left: no new request, those that run end as they would
        "in_flight": live.in_flight,
        "max_in_flight": backend.max_in_flight,
        "room": 0 if draining else share.room,
        "utilisation": round(share.utilisation, 4),
        "models": names_of(candidate),
        "ejected_until": unix + live.ejected_until - now if ejected else None,
        "resting_until": unix + live.resting_until - now if live.resting_until > now else None,
        "warmth": live.warmth_at(now),
        "cold_start_p50": _rounded(live.cold_starts.quantile(0.5)),
        "cold_start_p95": _rounded(live.cold_starts.quantile(0.95)),
        "capacity": live.capacity and _told(live.capacity),
        "check_latency": _rounded(live.check_latency),
        "last_check_result": live.check and _check(live.check),
        "ttft_p50": _rounded(totals.ttft_quantile(0.5)),
        "ttft_p95": _rounded(totals.ttft_quantile(0.95)),
    }


def _check(check: Check) -> dict[str, Any]:
    return {"verdict": check.verdict, "fault": check.fault, "detail": check.detail}


def _told(capacity: Capacity) -> dict[str, int]:
    return {name: count for name, count in asdict(capacity).items() if count is not None}


def sums(totals: Totals) -> dict[str, Any]:
    """What some attempts add up to; null where nothing was measured."""
    rate = totals.success_rate()
    return {
        "attempts": totals.attempts,
        "good": totals.good,
        "strikes": totals.strikes,
        "busy": totals.busy,
        "success_rate": None if rate is None else round(rate, 4),
        "seconds": round(totals.seconds, 3),
        "billed_seconds": round(totals.billed, 3),
        "usd": round(totals.usd, 9),
        "cost_per_second": _rounded(totals.cost_per_second(), 9),
        "cost_per_million_tokens": _rounded(totals.cost_per_million_tokens()),
        "tokens_in": totals.tokens_in,
        "tokens_out": totals.tokens_out,
        "estimated_share": _rounded(totals.estimated_share(), 4),
        "tokens_per_second": _rounded(totals.tokens_per_second(), 3),
        **_quantiles("ttft", totals.ttft_quantile),
        **_quantiles("duration", totals.duration_quantile),
        "cold_starts": 0 if totals.starts is None else len(totals.starts),
        **_quantiles("cold_start", totals.start_quantile),
    }


def _quantiles(name: str, quantile: Callable[[float], float | None]) -> dict[str, float | None]:
    return {f"{name}_p{percent}": _rounded(quantile(percent / 100)) for percent in _PERCENTILES}


def _rounded(number: float | None, digits: int = 6) -> float | None:
    return None if number is None else round(number, digits)


def regions(candidates: Candidates, now: float, windows: Windows) -> dict[str, Any]:
    """Performance by region and provider: of every region that has a backend or had an attempt."""
    spans = {n: windows.places(n) for n in SPANS}
    pairs = dict.fromkeys(Place(c.backend.region, c.backend.provider) for c in candidates)
    for groups in spans.values():
        pairs.update(dict.fromkeys(groups))
    found: dict[str, Any] = {}
    for region, kind in pairs:
        if region not in found:
            here = [c for c in candidates if c.backend.region == region]
            found[region] = {
                "providers_total": len(here),
                "providers_healthy": sum(healthy(c.live, now) for c in here),
                "in_flight": sum(c.live.in_flight for c in here),
                "windows": {str(n): sums(_of_region(spans[n], region)) for n in SPANS},
                "providers": {},
            }
        found[region]["providers"][kind] = {
            str(n): sums(spans[n].get(Place(region, kind), Totals())) for n in SPANS
        }
    return found


def _of_region(groups: Mapping[Place, Totals], region: str) -> Totals:
    whole = Totals()
    for place, totals in groups.items():
        if place.region == region:
            whole.add(totals)
    return whole


def summary(candidates: Candidates, now: float, load: Load) -> dict[str, Any]:
    """The fleet in numbers, as /metrics tells it in JSON."""
    utilisation: dict[str, dict[str, float]] = {kind: {} for kind in GROUPS}
    for kind, name, share in load.groups():
        utilisation[kind][name] = round(share.utilisation, 4)
    latencies = [c.live.latency for c in candidates if c.live.latency is not None]
    rates = [c.live.success for c in candidates]
    prices = [c.backend.price_per_second for c in candidates if c.backend.token_price is None]
    return {
        "total_providers": len(candidates),
        "healthy_providers": sum(healthy(c.live, now) for c in candidates),
        "avg_latency": sum(latencies) / len(latencies) if latencies else 0.0,
        "avg_success_rate": sum(rates) / len(rates) if rates else 1.0,
        "cost_range": {"min": min(prices, default=0.0), "max": max(prices, default=0.0)},
        "in_flight": sum(c.live.in_flight for c in candidates),
        "utilisation": utilisation,
    }
