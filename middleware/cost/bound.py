"""The bound on the average price: what all work together may cost per billed second.

The *excess* of an attempt is what it cost above `bound` x its billed seconds, below zero if it was
cheaper; a rented backend and one that bills tokens are counted alike. The *deficit* is the sum of
all, of every attempt that was sent. A backend is *dear* for a request if its expected excess is
above zero, and may then be asked in the order of the mode only where deficit + what runs on dear
ones + its own expected excess is no more than zero. Else it stands behind all that need no such
leave, cheapest first: it is asked only where those have no room. That is a *spill*.

**What holds.** A dear attempt that was no spill left deficit + reserve at zero or below. After the
last such one the deficit rises only by spills and by what attempts overran, where the *overrun* of
an attempt is what its excess was above the expected one, and above zero. So at any moment

    sum(usd) <= bound x sum(billed) + spilled + overrun + forgotten

where, since the last dear attempt that was no spill was begun, `spilled` is the expected excess of
the spills that were begun and `overrun` that of all attempts that ended. Who bills seconds below
the bound never overruns, so `overrun` is at most one error of estimate for each dear attempt that
was then running, and for each spill; who bills tokens, and was expected to be cheap, may add its
own.
`forgotten` is what the memory leaves out: the deficit is kept within +-`_MEMORY` x bound. That it
is kept from falling is no loss: over any stretch of time, not only from the start, the same
inequality holds with `_MEMORY` x bound, which may have been saved before, on its right side.
"""

from __future__ import annotations

from beacon_proxy.contracts import Backend, Candidate, Candidates, Permit

from .order import expected_billed, measure, nearest

# Billed seconds whose price at the bound is remembered, saved or overspent. An hour: the saving
# lets a burst of dear work pass; what an outage cost is made up for by hours of work, not days.
_MEMORY = 3600.0


class Account:
    """Keeps the deficit, and reserves for what runs."""

    __slots__ = ("_bound", "_excess", "_most", "deficit", "reserved")

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._most = _MEMORY * bound
        self._excess: dict[str, float] = {}  # of the dear ones in the last plan, expected, USD
        self.deficit = 0.0  # USD
        self.reserved = 0.0  # USD

    def parted(
        self, candidates: Candidates, work: str | None, now: float
    ) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
        """Candidates that keep to the bound, those that do not, and those of last resort."""
        within: list[Candidate] = []
        beyond: list[Candidate] = []
        last: list[Candidate] = []
        room = -(self.deficit + self.reserved)
        guess = measure(candidates, work)
        # Each plan is followed at once by the admission of one of its candidates, or of none.
        self._excess = dear = {}
        for c in candidates:
            backend, typical = c.backend, nearest(c, work) or guess
            price = backend.token_price
            if price is None:
                billed = expected_billed(c.live, typical, now)
                excess = billed * (backend.price_per_second - self._bound)
            else:
                excess = price.usd(typical) - typical.billed * self._bound
            if excess > 0.0:
                dear[backend.name] = excess
            chosen = last if c.last_resort else within if excess <= max(room, 0.0) else beyond
            chosen.append(c)
        return within, beyond, last

    def reserve(self, backend: Backend, permit: Permit) -> Permit:
        """Keep free what the last plan expected of this backend, as long as `permit` is held."""
        excess = self._excess.get(backend.name)
        return permit if excess is None else Reserve(self, excess, permit)

    def settle(self, usd: float, billed: float) -> None:
        """Book an attempt that was sent: what it cost (USD), and the seconds it was paid for."""
        deficit = self.deficit + usd - self._bound * billed
        self.deficit = min(max(deficit, -self._most), self._most)


class Reserve:
    """What one running attempt may cost above the bound; a second release changes nothing."""

    __slots__ = ("_account", "_permit", "_usd")

    def __init__(self, account: Account, usd: float, permit: Permit) -> None:
        self._account = account
        self._usd = usd
        self._permit = permit
        account.reserved += usd

    def release(self) -> None:
        self._account.reserved -= self._usd
        self._usd = 0.0
        self._permit.release()
