"""Cost: which backend is worth asking first, by price, by speed, or by a blend of the two pools.

Every order holds inside a candidate's priority and ends in the same ties: warm before cold, nearer,
less in flight, less often picked; so two equal backends share the load, and a GPU that would have
to be started first waits until the warm ones are full.

`order.py` ranks, `blend.py` keeps the split of the pools, `bound.py` the operator's bound on the
average price. The bound is over all else but health: over a client's wish for speed, and over the
region that it prefers (one that it requires has left no other candidate).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from beacon_proxy.contracts import (
    NO_SLOT,
    Backend,
    Candidates,
    Clock,
    Exchange,
    Gauge,
    Outcome,
    Permit,
    Verdict,
)

from .blend import Advance, Blend, Ledger, Pool
from .bound import Account
from .order import Rank, by_blend, by_latency, by_price

__all__ = ["Blend", "Cost"]

_MODES = ("blend", "cost", "latency")
_SERVED = (Verdict.GOOD, Verdict.CALLER)
_PRICE_MEMORY = 0.999  # kept of the past at each attempt: the last thousand or so make the average


@dataclass(slots=True)
class Cost:
    """Order candidates inside their priority and hold the blend of the pools."""

    default: Literal["blend", "cost", "latency"] = field(
        default="blend", metadata={"help": "order for exchanges without X-Beacon-Cost-Priority"}
    )
    blend: Blend = field(default_factory=Blend, metadata={"help": "split between the pools"})
    max_blended_price: float | None = field(
        default=None,
        metadata={
            "help": "USD per second that the average paid stays under, as far as room allows"
        },
    )
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    _ledger: Ledger = field(init=False, repr=False)
    _pools: dict[str, Pool] = field(init=False, repr=False)
    _account: Account | None = field(default=None, init=False, repr=False)
    _paid: float = field(default=0.0, init=False, repr=False)  # USD, fading
    _seconds: float = field(default=0.0, init=False, repr=False)  # s, fading alike

    def __post_init__(self) -> None:
        if self.default not in _MODES:
            raise ValueError(f"default: must be one of {', '.join(_MODES)}, got {self.default!r}")
        bound = self.max_blended_price
        if bound is not None:
            if not 0 < bound < math.inf:
                raise ValueError(f"max_blended_price: must be > 0 and finite, got {bound}")
            self._account = Account(bound)
        self._ledger = Ledger(self.blend)
        # Only what the blend decides is counted. Who asks for cost or latency goes where it wants
        # without bending the split of the others.
        self._pools = self._ledger.pools if self.default == "blend" else {}

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Sort; candidates of last resort stay behind, in the order in which they came."""
        wish, account, now = exchange.cost_priority, self._account, self.clock()
        mode = self.default if wish is None else "cost" if wish else "latency"
        rank: Rank
        if mode == "blend":
            rank = by_blend(self._ledger.first(), candidates, exchange.work, now)
        elif mode == "cost":
            rank = by_price(candidates, exchange.work, now)
        else:
            rank = by_latency(now)
        if account is None:
            return sorted(candidates, key=rank)
        within, beyond, last = account.parted(candidates, exchange.work, now)
        self._ledger.lends = not beyond
        within.sort(key=rank)
        if beyond:
            beyond.sort(key=by_price(candidates, exchange.work, now, over_priority=True))
        return [*within, *beyond, *last]

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        """Never refuses; the permit counts the exchange in advance."""
        permit: Permit = NO_SLOT
        if exchange.cost_priority is None and backend.pool in self._pools:
            permit = Advance(self._ledger, self._pools[backend.pool])
        return permit if self._account is None else self._account.reserve(backend, permit)

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        backend, usd, seconds = outcome.backend, outcome.usd, outcome.billed
        if outcome.sent:
            self._paid = self._paid * _PRICE_MEMORY + usd
            self._seconds = self._seconds * _PRICE_MEMORY + seconds
            if self._account is not None:
                self._account.settle(usd, seconds)
        if exchange.cost_priority is not None or backend.pool not in self._pools:
            return
        if not outcome.committed and outcome.verdict not in _SERVED:
            self._pools[backend.pool].asked = True
            return  # it served nobody
        by = self.blend.by
        amount = 1.0 if by == "requests" else seconds if by == "seconds" else usd
        self._ledger.charge(self._pools[backend.pool], amount)

    def blended_price(self) -> float:
        """Return the average paid of late, USD per second of attempts."""
        return self._paid / self._seconds if self._seconds else 0.0

    def gauges(self) -> Iterator[Gauge]:
        if self._pools:
            yield from self._ledger.gauges()
        if self._seconds:
            yield Gauge(
                "blended_price_usd_per_second",
                "Average paid per billed second, over about the last 1000 attempts.",
                self.blended_price(),
            )
        if self._account is not None:
            yield Gauge(
                "blended_price_deficit_usd",
                "Paid above cost.max_blended_price and not made up for; below zero: saved.",
                self._account.deficit,
            )
