"""What an attempt costs, once it has ended.

Rule 1: who bills seconds is paid for those it reports, else for those of our own clock: from the
    connect to the end, a cold start included. Backoff and the wait for room are no attempt's.
Rule 2: who bills tokens is paid for those it counted, else for those that passed; its seconds cost
    nothing. What came from its prompt cache, or was put there, has a price of its own where the
    configuration names one. Where a POST on a path that we do not know was answered well, and
    nobody says what it took, it is held to have cost what was expected: else its client could go
    round every budget. Of a document, or of such a POST, that was given up before it could be
    counted, as much of what was expected has run as its time is of that which such answers take.
Rule 3: a rented backend costs what a second of work costs more than a second of none: nothing,
    while its agreement lasts (`Backend.idle_price_per_second` is what the rent itself is).
Rule 4: an attempt that failed, or that nobody waited for to the end, costs what ran. One of which
    no byte was sent costs nothing.
"""

from __future__ import annotations

from ..contracts import Backend, Usage


def price_of(backend: Backend, billed: float, usage: Usage | None) -> float:
    """USD of an attempt at `backend` with `billed` s that are paid for."""
    price = backend.token_price
    if price is None:
        return billed * backend.price_per_second
    return 0.0 if usage is None else price.usd(usage)
