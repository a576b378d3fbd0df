"""The orders: by price, by latency, and by pool.

**One request, one yardstick.** Prices are by the second or by the token, and are compared for the
same request: it is held to take the same seconds, and the same tokens, wherever it goes, as it
typically did of late where that is known. So who bills seconds stands by its price per second and
who bills tokens by what those tokens cost, spread over those seconds. What each backend took itself
says more about the requests that it happened to get than about it: ranked by that, one that got a
long request would look dear, be asked no more and never be found out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from beacon_proxy.contracts import Backend, Candidate, Candidates, Live, Typical

Rank = Callable[[Candidate], tuple[float, ...]]

_LAST = (inf,)  # the rank of every last resort: a sort leaves them as they came
# A backend ten times slower than the best is asked again after about 3.3 of these: often enough to
# find out that a cold GPU is warm now, too seldom to be felt by clients.
_HALF_LIFE = 300.0  # s
_UNPROVEN = 120.0  # s, the latency held against who never answered well: the default limit
_LEAST_SUCCESS = 0.01
_START = 30.0  # s, held against a cold backend whose start nobody has seen yet
# How much of the way from the usual to the bad wait counts: five times as much as one in twenty is,
# for a wait of ten seconds spoils more than ten of one second.
_TAIL = 0.25
_GUESS = Typical(billed=5.0, input=200.0, output=200.0)  # while no answer has been seen at all


def by_blend(first: str, candidates: Candidates, work: str | None, now: float) -> Rank:
    """The pool that is due, then the other, then any that has no share."""
    second = "burst" if first == "baseline" else "baseline"
    turns = {first: 0, second: 1}
    price_of: Callable[[Backend], float] | None = None

    def rank(c: Candidate) -> tuple[float, ...]:
        nonlocal price_of
        if c.last_resort:
            return _LAST
        backend, live = c.backend, c.live
        price = backend.price_per_second
        if backend.token_price is not None:
            price_of = price_of or yardstick(candidates, work)
            price = price_of(backend)
        return (
            c.priority,
            turns.get(backend.pool, 2),
            live.cold_from <= now and live.cold_at(now),
            c.distance,
            price,
            live.in_flight,
            live.picked,
        )

    return rank


def by_price(
    candidates: Candidates, work: str | None, now: float, *, over_priority: bool = False
) -> Rank:
    """Cheapest first; inside a candidate's priority, unless the price is to rule over that."""
    price_of: Callable[[Backend], float] | None = None

    def rank(c: Candidate) -> tuple[float, ...]:
        nonlocal price_of
        if c.last_resort:
            return _LAST
        backend, live = c.backend, c.live
        price = backend.price_per_second
        if backend.token_price is not None:
            price_of = price_of or yardstick(candidates, work)
            price = price_of(backend)
        cold = live.cold_from <= now and live.cold_at(now)
        one, two = (price, c.priority) if over_priority else (c.priority, price)
        return one, two, cold, c.distance, live.in_flight, live.picked

    return rank


def by_latency(now: float) -> Rank:
    """Fastest first, by `latency_score`."""

    def rank(c: Candidate) -> tuple[float, ...]:
        if c.last_resort:
            return _LAST
        live = c.live
        # Among the unknown, spreading out tells more than staying near.
        spread = live.in_flight if live.latency is None else 0
        return c.priority, latency_score(live, now), spread, c.distance, live.in_flight, live.picked

    return rank


def latency_score(live: Live, now: float) -> float:
    """Score in seconds: failures raise it, and so does a long tail; time without news lowers it.

    An untried one is held to be like those of its region and provider; where nothing is known of
    them it comes first, for one has to find out. But by one exchange at a time while others are
    known: a burst must not pile up before a GPU that is only starting. The same goes for estimates
    that faded. One that was picked and never answered well is unproven, whatever it answered: a 4xx
    is no speed. A cold one takes its start longer, and is not started just to find out how fast.
    """
    recent, latency, success = live.recent, live.latency, live.success
    idle, untried = live.in_flight == 0, latency is None and not live.last_used
    peers = None if recent is None else recent.ttft_p50
    cold = live.cold_from <= now and live.cold_at(now)
    if untried and idle:
        if peers is None or recent is None:
            return _UNPROVEN if cold else 0.0
        latency = peers
        success = success if recent.success is None else recent.success
    elif latency is None:
        latency = _UNPROVEN
    if peers is not None and recent is not None and recent.ttft_p95 is not None:
        latency += _TAIL * max(recent.ttft_p95 - peers, 0.0)
    if cold:
        latency += live.cold_starts.quantile(0.5) or _START
    score = latency / max(success, _LEAST_SUCCESS)
    if idle and not untried:
        score *= 0.5 ** (max(0.0, now - live.last_used) / _HALF_LIFE)
    return score


def yardstick(candidates: Candidates, work: str | None) -> Callable[[Backend], float]:
    """What tells the price of a second of work of a backend that bills tokens (USD)."""
    same = measure(candidates, work)

    def price(backend: Backend) -> float:
        tokens = backend.token_price
        if tokens is None:
            return backend.price_per_second
        return tokens.usd(same) / same.billed

    return price


def measure(candidates: Candidates, work: str | None) -> Typical:
    """What such work typically takes: seconds where they are billed, tokens likewise."""
    seconds: list[Typical] = []
    tokens: list[Typical] = []
    for c in candidates:
        typical = nearest(c, work)
        if typical is not None:
            (seconds if c.backend.token_price is None else tokens).append(typical)
    billed = [each.billed for each in seconds or tokens if each.billed > 0.0]
    counted = [each for each in tokens if each.input or each.output]
    return Typical(
        sum(billed) / len(billed) if billed else _GUESS.billed,
        sum(each.input for each in counted) / len(counted) if counted else _GUESS.input,
        sum(each.output for each in counted) / len(counted) if counted else _GUESS.output,
        sum(each.cached for each in counted) / len(counted) if counted else 0.0,
        sum(each.cache_written for each in counted) / len(counted) if counted else 0.0,
    )


def nearest(candidate: Candidate, work: str | None) -> Typical | None:
    """What good attempts took on a backend: at this work, else at any inference; None: unknown.

    Where tokens are billed, work of which none were ever told is unknown, and not free.
    """
    live = candidate.live
    typical = live.typical.get(work)
    if typical is None or (
        work is not None
        and candidate.backend.token_price is not None
        and not (typical.input or typical.output)
    ):
        return live.usual
    return typical


def expected_billed(live: Live, typical: Typical, now: float) -> float:
    """Seconds that an attempt made now is expected to be billed for, a cold start included."""
    cold = live.cold_from <= now and live.cold_at(now)
    return typical.billed + ((live.cold_starts.quantile(0.5) or 0.0) if cold else 0.0)
