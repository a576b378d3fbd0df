"""The split between the pools, held over time and without chance.

**The credit rule** (smooth weighted round robin, as in nginx, between two pools). An exchange of
amount *a* (1, its seconds or its cost) gives each pool its share of *a* and takes *a* from the pool
that served it; the pool with more credit goes first. The two credits always sum to zero, so one
number holds both: the *standing*, baseline's credit in amounts.
Rule 1: what runs counts in advance, at its pool's mean amount, else a burst that arrives before the
    first answer would all go to one pool. A permit holds that advance until the amount is known.
Rule 2: an attempt that failed before an answer served nobody and is forgotten.
Rule 3: a full pool spills into the other at once; it is only the order that the blend decides.
Rule 4: at each choice the standing is within `_NEAR` mean amounts. What goes beyond was served by
    the pool that was not due, because the other was full, ejected or ruled out, and becomes *debt*.
    While there is some, each amount served moves `payback` of itself from the debt into the
    standing: so the split leans by that share at most, and no stampede follows an outage.
Rule 5: debt is remembered up to `_MEMORY` mean amounts. None is made while a pool has served nobody
    yet, where `payback` is 0, while the bound on the price decides, and to a pool without a share.

**What holds.** Let each request stand where its last attempt was begun. Over any stretch of n
requests the part of baseline is then its share of n, less what standing + debt gained between its
ends, and but for the attempts that ran at one of its ends and failed. The standing is within
`_NEAR`, so it gains no more than twice that. The debt changes by payback, at each request that
ends, and by spills; or where so many fail between two choices that rule 4 holds. By requests, while
both pools have room and `payback` is 0.0025, that is 4 + 2.5, and 0.0025 for each that ran at the
beginning: 7 in 1000 with 200 at once, and 3 are left for what ran at an end and failed. By seconds
and by cost the same holds in mean amounts, and what ran at either end counts with how far it was
off the mean: an amount is not known before its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from beacon_proxy.contracts import Gauge

_UNITS = ("requests", "seconds", "cost")
# How far the standing may go, in mean amounts. A request moves it by less than 1; seconds and money
# vary by themselves.
_NEAR = {"requests": 2.0, "seconds": 5.0, "cost": 5.0}
# Held against an exchange while no pool has served: in amounts.
_GUESS = {"requests": 1.0, "seconds": 5.0, "cost": 0.001}
# In mean amounts: as much as the stretch over which the split is promised. With the default payback
# it takes 400 000 requests to make up for; who was away for longer starts anew.
_MEMORY = 1000.0
_MEAN_WEIGHT = 0.1  # of the newest amount in a pool's mean
_BLOCK = 500  # exchanges: the last one to two of these make the share that is shown
_SAYING = 100  # exchanges; the share of fewer says nothing
_EVEN = -1e-9  # amounts; sums of shares that should make zero are off by less


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
    payback: float = field(
        default=0.0025,
        metadata={"help": "share by which the split may lean to make up for a spill; 0: forget it"},
    )

    def __post_init__(self) -> None:
        if not (self.baseline >= 0 and self.burst >= 0):
            raise ValueError(f"shares: must be >= 0, got {self.baseline} and {self.burst}")
        if not abs(self.baseline + self.burst - 1) <= 1e-6:
            raise ValueError(f"shares: must sum to 1, got {self.baseline + self.burst:g}")
        if self.by not in _UNITS:
            raise ValueError(f"by: must be one of {', '.join(_UNITS)}, got {self.by!r}")
        if not 0 <= self.payback <= 1:
            raise ValueError(f"payback: must be between 0 and 1, got {self.payback}")


@dataclass(slots=True, eq=False)
class Pool:
    """One side of the blend."""

    share: float
    step: float  # what the standing moves by for each unit that this pool serves
    mean: float  # amount of an exchange
    proven: bool = False  # it has served, so the mean is its own
    asked: bool = False  # it was there to serve, be it that it never did
    served: float = 0.0  # amounts, since the start
    begun: float = 0.0  # what `served` was as the last block began
    before: float = 0.0  # as the one before it began


class Ledger:
    """The credit between the pools, kept by the rules above."""

    __slots__ = (
        "_baseline",
        "_burst",
        "_near",
        "_payback",
        "_reach",
        "debt",
        "decided",
        "lends",
        "pools",
        "standing",
    )

    def __init__(self, blend: Blend) -> None:
        guess = _GUESS[blend.by]
        self._baseline = Pool(blend.baseline, -blend.burst, guess)
        self._burst = Pool(blend.burst, blend.baseline, guess)
        self.pools = {"baseline": self._baseline, "burst": self._burst}
        self._near = _NEAR[blend.by]
        self._reach = self._near * guess
        self._payback = blend.payback if blend.baseline and blend.burst else 0.0
        self.standing = 0.0  # credit of baseline, in amounts; burst's is the same below zero
        self.debt = 0.0  # amounts owed to baseline; below zero: to burst
        self.decided = 0  # exchanges
        self.lends = True  # what was served out of turn becomes debt

    def first(self) -> str:
        """Return the name of the pool that is due."""
        if not -self._reach <= self.standing <= self._reach:
            self._lend()
        # At zero, too, a pool without a share is last. Burst needs no word: without a share of its
        # own the standing never falls below zero.
        return "baseline" if self._burst.step and self.standing >= _EVEN else "burst"

    def charge(self, pool: Pool, amount: float) -> None:
        """Book an exchange that `pool` has served."""
        if amount != pool.mean or not pool.proven:
            self._weigh(pool, amount)
        pool.served += amount
        self.decided += 1
        if not self.decided % _BLOCK:
            for each in self.pools.values():
                each.before, each.begun = each.begun, each.served
        self.standing += pool.step * amount
        debt = self.debt
        if debt:
            most = self._payback * amount
            paid = min(debt, most) if debt > 0.0 else max(debt, -most)
            self.debt = debt - paid
            self.standing += paid

    def _lend(self) -> None:
        """Make debt of what the standing is beyond its reach, as far as that is remembered."""
        held = min(max(self.standing, -self._reach), self._reach)
        if self.lends and self._payback and self._baseline.proven and self._burst.proven:
            most = self._reach / self._near * _MEMORY
            self.debt = min(max(self.debt + self.standing - held, -most), most)
        self.standing = held

    def _weigh(self, pool: Pool, amount: float) -> None:
        if pool.proven:
            pool.mean += _MEAN_WEIGHT * (amount - pool.mean)
        else:
            pool.proven = True
            # Until the other pool has served, the best guess is that its exchanges are alike.
            for each in self.pools.values():
                if each is pool or not each.proven:
                    each.mean = amount
        self._reach = self._near * max(self._baseline.mean, self._burst.mean)

    def gauges(self) -> Iterator[Gauge]:
        yield Gauge("blend_decided", "Exchanges that the blend decided.", self.decided, counts=True)
        recent = {name: pool.served - pool.before for name, pool in self.pools.items()}
        of_all = sum(recent.values())
        # A fleet with one pool has nothing to split, and no share that could be off. But one that
        # has another, which pushes back whatever it is asked, has.
        split = all(pool.proven or pool.asked for pool in self.pools.values())
        split = split and of_all > 0.0 and self.decided >= _SAYING
        for name, pool in self.pools.items():
            labels = (("pool", name),)
            if split:
                yield Gauge(
                    "blend_share",
                    "Share of a pool in what the blend decided, over the last 500 to 1000.",
                    recent[name] / of_all,
                    labels,
                )
            yield Gauge("blend_target_share", "Share that a pool is to have.", pool.share, labels)
            yield Gauge(
                "blend_served",
                "What a pool served of what the blend decided, in requests, s or USD.",
                pool.served,
                labels,
                counts=True,
            )
            owed = self.debt if pool is self._baseline else -self.debt
            yield Gauge(
                "blend_debt",
                "Owed to a pool for what the other served in its place, in requests, s or USD.",
                max(0.0, owed),  # in this order it is never -0.0
                labels,
            )


class Advance:
    """One running exchange of a pool; a second release changes nothing."""

    __slots__ = ("_ledger", "_moved")

    def __init__(self, ledger: Ledger, pool: Pool) -> None:
        self._moved = pool.step * pool.mean
        self._ledger = ledger
        ledger.standing += self._moved

    def release(self) -> None:
        self._ledger.standing -= self._moved
        self._moved = 0.0
