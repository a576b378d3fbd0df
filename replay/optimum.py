"""What the work of a run could have cost, known all in advance; and where the rest went.

The optimum is of the requests that were answered: each goes once to a backend that serves its model
(in the region that it requires), takes there exactly what that backend takes for it, and of all of
them no fewer than the burst pool's share go to the burst pool. No start, no fault, no wait, and
room everywhere at every moment: so nothing that answers the same requests at that share can cost
less. It is a bound from below; how near anybody could come to it is not said.

It is computed, not searched: with each request's cheapest backend in either pool, the cheapest way
to send k of them to the dearer pool is to send those for which the difference is least. Those are
the short ones, and nobody knows beforehand which they are. So beside it stands what is paid on
average by who chooses the k without looking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from .trace import Request
from .world import FAMILIES, SITES, Site


@dataclass(frozen=True, slots=True)
class Spent:
    """USD, summed so that each line says where it went; `total` is the sum of the others."""

    optimum: float  # at the target share
    blind: float  # for not knowing which requests are short
    spill: float  # for the share that the burst pool really had
    choice: float  # for other backends of a pool than its cheapest
    line: float  # requests that waited inside a backend that had less room than it was said to
    starts: float  # requests that waited for a worker to start
    useless: float  # attempts that failed, or whose client left
    total: float


def spent(
    requests: Mapping[str, Request],
    visits: Sequence[Mapping[str, Any]],
    prices: Mapping[str, float],
    pools: Mapping[str, str],
    share: float,
) -> Spent:
    """Take a run's money apart; `share` is what the burst pool was to have, 0..1."""
    sites = {site.name: site for site in SITES}
    answered = [visit for visit in visits if visit["end"] == "answered"]
    work = [seconds(requests[visit["id"]], sites[visit["site"]]) for visit in answered]
    paid = [prices[visit["site"]] for visit in answered]
    pure = sum(s * price for s, price in zip(work, paid, strict=True))
    starts = sum(v["waited"] * price for v, price in zip(answered, paid, strict=True))
    whole = sum(v["usd"] for v in answered)
    total = sum(v["usd"] for v in visits)
    costs = [_cheapest(requests[visit["id"]], prices, pools) for visit in answered]
    target = ceil(share * len(costs))
    least, blindly = optimum(costs, target), average(costs, target)
    really = average(costs, sum(pools[visit["site"]] == "burst" for visit in answered))
    return Spent(
        optimum=least,
        blind=blindly - least,
        spill=really - blindly,
        choice=pure - really,
        line=whole - pure - starts,
        starts=starts,
        useless=total - whole,
        total=total,
    )


def seconds(request: Request, site: Site) -> float:
    """What a request takes on a backend that is warm and has room."""
    family = FAMILIES[site.provider]
    work = family.head + request.input / family.prefill + request.output / family.decode
    return work * request.effort


def optimum(costs: Sequence[tuple[float, float]], burst: int) -> float:
    """The least that all can cost together, where at least `burst` of them go to the burst pool.

    Args:
        costs: USD of each at the baseline pool and at the burst pool; inf: not to be had there.
    """
    base, more, free = _split(costs, burst)
    # Beyond the share a request goes to the burst pool only where that is cheaper.
    return base + sum(more[:free]) + sum(each for each in more[free:] if each < 0)


def average(costs: Sequence[tuple[float, float]], burst: int) -> float:
    """The same where any `burst` of them go there, whichever they are: the mean over all ways."""
    base, more, free = _split(costs, burst)
    return base + (sum(more) * min(free / len(more), 1.0) if more else 0.0)


def _split(costs: Sequence[tuple[float, float]], burst: int) -> tuple[float, list[float], int]:
    """What all cost at their cheap pool, what each costs more at the other, how many go there."""
    forced = sum(cheap == inf for cheap, _ in costs)
    base = sum(dear if cheap == inf else cheap for cheap, dear in costs)
    more = sorted(dear - cheap for cheap, dear in costs if max(cheap, dear) < inf)
    return base, more, max(burst - forced, 0)


def _cheapest(
    request: Request, prices: Mapping[str, float], pools: Mapping[str, str]
) -> tuple[float, float]:
    least = {"baseline": inf, "burst": inf}
    for site in SITES:
        if request.model not in site.models:
            continue
        if request.required and site.region != request.region:
            continue
        usd = seconds(request, site) * prices[site.name]
        least[pools[site.name]] = min(least[pools[site.name]], usd)
    return least["baseline"], least["burst"]
