"""Cost: which backend is worth asking first, by price, by speed, or by a blend of the two pools.

Every order holds inside a candidate's priority and ends in the same ties: warm before cold, nearer,
less in flight, less often picked; so two equal backends share the load, and a GPU that would have
to be started first waits until the warm ones are full.

**The credit rule of the blend** (smooth weighted round robin, as in nginx, between two pools). An
exchange of amount *a* (1, its seconds or its cost) gives each pool its share of *a* and takes *a*
from the pool that served it; the pool with more credit goes first. The two credits always sum to
zero, so one number holds both. Over any stretch a pool's part is its share, off by no more than its
credit moved.
Rule 1: what runs counts in advance at its pool's mean amount, else a burst that arrives before the
    first answer would all go to one pool. A permit holds that advance.
Rule 2: an attempt that failed before an answer served nobody and is forgotten.
Rule 3: a full pool spills into the other; it is only the order that the blend decides.
Rule 4: credit is capped, so that an outage is not followed by a stampede.
Rule 5: only exchanges that the blend decides are counted. Those that ask for cost or latency go
    where they want without bending the split of the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from beacon_proxy.contracts import (
    NO_SLOT,
    Backend,
    Candidate,
    Candidates,
    Clock,
    Exchange,
    Outcome,
    Permit,
    Verdict,
)

_MODES = ("blend", "cost", "latency")
_UNITS = ("requests", "seconds", "cost")
_SERVED = (Verdict.GOOD, Verdict.CALLER)
# How far a credit may go, in mean amounts. A request is always 1, so only an outage moves the
# credit far: 3 bounds what 300 later requests see of it to one point. Seconds and money vary by
# themselves.
_REACH = {"requests": 3.0, "seconds": 30.0, "cost": 30.0}
_MEAN_WEIGHT = 0.1  # of the newest amount in a pool's mean
_PRICE_MEMORY = 0.999  # kept of the past at each attempt: the last thousand or so make the average
# A backend ten times slower than the best is asked again after about 3.3 of these: often enough to
# find out that a cold GPU is warm now, too seldom to be felt by clients.
_HALF_LIFE = 300.0  # s
_UNPROVEN = 120.0  # s, the latency held against who never answered well: the default limit
_LEAST_SUCCESS = 0.01
_START = 30.0  # s, held against a cold backend whose start nobody has seen yet


@dataclass(frozen=True, slots=True)
class Blend:
    """The split between the pools."""

    baseline: float = field(default=0.7, metadata={"help": "share of the baseline pool, 0..1"})
    burst: float = field(
        default=0.3, metadata={"help": "share of the burst pool; the shares sum to 1"}
    )
    by: Literal["requests", "seconds", "cost"] = field(
        default="requests", metadata={"help": "what is split: requests, seconds or cost (USD)"}
    )

    def __post_init__(self) -> None:
        if not (self.baseline >= 0 and self.burst >= 0):
            raise ValueError(f"shares: must be >= 0, got {self.baseline} and {self.burst}")
        if not abs(self.baseline + self.burst - 1) <= 1e-6:
            raise ValueError(f"shares: must sum to 1, got {self.baseline + self.burst:g}")
        if self.by not in _UNITS:
            raise ValueError(f"by: must be one of {', '.join(_UNITS)}, got {self.by!r}")


@dataclass(slots=True)
class Cost:
    """Order candidates inside their priority and hold the blend of the pools."""

    default: Literal["blend", "cost", "latency"] = field(
        default="blend", metadata={"help": "order for exchanges without X-Beacon-Cost-Priority"}
    )
    blend: Blend = field(default_factory=Blend, metadata={"help": "split between the pools"})
    max_blended_price: float | None = field(
        default=None,
        metadata={"help": "USD per second; while the average paid is above, cheapest first"},
    )
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    _ledger: _Ledger = field(init=False, repr=False)
    _paid: float = field(default=0.0, init=False, repr=False)  # USD, fading
    _seconds: float = field(default=0.0, init=False, repr=False)  # s, fading alike

    def __post_init__(self) -> None:
        if self.default not in _MODES:
            raise ValueError(f"default: must be one of {', '.join(_MODES)}, got {self.default!r}")
        bound = self.max_blended_price
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"max_blended_price: must be > 0 and finite, got {bound}")
        self._ledger = _Ledger(self.blend)

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Sort; candidates of last resort stay behind, in the order in which they came."""
        return sorted(candidates, key=self._rank(exchange))

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        """Never refuses; the permit counts the exchange in advance."""
        pool = self._pool(exchange, backend)
        return NO_SLOT if pool is None else _Advance(pool)

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        backend, seconds = outcome.backend, outcome.billed
        if outcome.sent:
            self._paid = self._paid * _PRICE_MEMORY + outcome.usd
            self._seconds = self._seconds * _PRICE_MEMORY + seconds
        if not outcome.committed and outcome.verdict not in _SERVED:
            return
        pool = self._pool(exchange, backend)
        if pool is None:
            return
        amount = 1.0 if self.blend.by == "requests" else seconds
        if self.blend.by == "cost":
            amount = outcome.usd
        self._ledger.charge(pool, amount)

    def blended_price(self) -> float:
        """Return the average paid of late, USD per second of attempts."""
        return self._paid / self._seconds if self._seconds else 0.0

    def _mode(self, exchange: Exchange) -> str:
        if exchange.cost_priority is None:
            return self.default
        return "cost" if exchange.cost_priority else "latency"

    def _pool(self, exchange: Exchange, backend: Backend) -> _Pool | None:
        """The pool that the exchange counts in; None: the blend does not decide it."""
        if exchange.cost_priority is not None or self.default != "blend":
            return None
        return self._ledger.pools.get(backend.pool)

    def _rank(self, exchange: Exchange) -> _Rank:
        mode = self._mode(exchange)
        bound, now = self.max_blended_price, self.clock()
        # The operator's bound is over a client's wish for speed, too.
        if mode == "cost" or (bound is not None and self.blended_price() > bound):
            return lambda c: _by_price(c, now)
        if mode == "latency":
            return lambda c: _by_latency(c, now)
        first = self._ledger.first()
        second = "burst" if first == "baseline" else "baseline"

        def by_pool(c: Candidate) -> tuple[float, ...]:
            if c.last_resort:
                return _LAST
            backend, live = c.backend, c.live
            return (
                c.priority,
                0 if backend.pool == first else 1 if backend.pool == second else 2,
                live.cold_from <= now and live.cold_at(now),
                c.distance,
                backend.price_per_second,
                live.in_flight,
                live.picked,
            )

        return by_pool


_Rank = Callable[[Candidate], tuple[float, ...]]
_LAST = (math.inf,)  # the rank of every last resort: a sort leaves them as they came


def _by_price(c: Candidate, now: float) -> tuple[float, ...]:
    if c.last_resort:
        return _LAST
    price, live = c.backend.price_per_second, c.live
    cold = live.cold_from <= now and live.cold_at(now)
    return c.priority, price, cold, c.distance, live.in_flight, live.picked


def _by_latency(c: Candidate, now: float) -> tuple[float, ...]:
    """Score in seconds: failures raise it, time without news lowers it.

    Untried ones come first, but by one exchange at a time while others are known: a burst must not
    pile up before a GPU that is only starting. The same goes for estimates that faded. One that was
    picked and never answered well is unproven, whatever it answered: a 4xx is no speed. A cold one
    takes its start longer, and is not started just to find out how fast it is.
    """
    if c.last_resort:
        return _LAST
    live = c.live
    idle = live.in_flight == 0
    unknown, cold = live.latency is None, live.cold_from <= now and live.cold_at(now)
    if unknown and idle and not live.last_used:
        score = _UNPROVEN if cold else 0.0
    else:
        latency = _UNPROVEN if live.latency is None else live.latency
        if cold:
            latency += live.cold_starts.quantile(0.5) or _START
        score = latency / max(live.success, _LEAST_SUCCESS)
        if idle:
            score *= 0.5 ** (max(0.0, now - live.last_used) / _HALF_LIFE)
    # Among the unknown, spreading out tells more than staying near.
    spread = live.in_flight if unknown else 0
    return c.priority, score, spread, c.distance, live.in_flight, live.picked


@dataclass(slots=True, eq=False)
class _Pool:
    """One side of the blend."""

    step: float  # what the credit moves by for each unit that this pool serves
    running: int = 0  # exchanges
    mean: float = 1.0  # amount of an exchange
    proven: bool = False  # the mean is its own


class _Ledger:
    """The credit between the pools, kept by the rules above."""

    __slots__ = ("_baseline", "_burst", "_reach", "credit", "pools")

    def __init__(self, blend: Blend) -> None:
        self._baseline = _Pool(-blend.burst)
        self._burst = _Pool(blend.baseline)
        self._reach = _REACH[blend.by]
        self.pools = {"baseline": self._baseline, "burst": self._burst}
        self.credit = 0.0  # of baseline, in amounts; burst's is the same below zero

    def first(self) -> str:
        # At zero, too, a pool without a share is last. Burst needs no word: without a share of its
        # own the standing never falls below zero.
        return "baseline" if self._burst.step and self._standing() >= 0.0 else "burst"

    def charge(self, pool: _Pool, amount: float) -> None:
        """Book an exchange that `pool` has served."""
        if amount != pool.mean or not pool.proven:
            self._weigh(pool, amount)
        self.credit += pool.step * amount
        # The standing is capped, not the credit: that swings with the order in which a burst ends.
        standing, one, other = self._standing(), self._baseline.mean, self._burst.mean
        reach = self._reach * (one if one > other else other)
        if standing > reach:
            self.credit += reach - standing
        elif standing < -reach:
            self.credit -= reach + standing

    def _standing(self) -> float:
        """Return the credit as it will be once all that runs has been served."""
        one, other = self._baseline, self._burst
        return (
            self.credit
            + one.step * (one.running * one.mean)
            + other.step * (other.running * other.mean)
        )

    def _weigh(self, pool: _Pool, amount: float) -> None:
        if pool.proven:
            pool.mean += _MEAN_WEIGHT * (amount - pool.mean)
            return
        pool.proven = True
        # Until the other pool has served, the best guess is that its exchanges are alike.
        for each in self.pools.values():
            if each is pool or not each.proven:
                each.mean = amount


class _Advance:
    """One running exchange of a pool; a second release changes nothing."""

    __slots__ = ("_pool",)

    def __init__(self, pool: _Pool) -> None:
        pool.running += 1
        self._pool: _Pool | None = pool  # None: given back

    def release(self) -> None:
        pool = self._pool
        if pool is not None:
            pool.running -= 1
            self._pool = None
