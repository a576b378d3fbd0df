"""Failover: whether a failed attempt is followed by another, and after how long.

The *retry budget* belongs to the whole process, in the form of tower's `TpsBudget`: a bucket that
looks back over a window of 10 s. Each good attempt deposits `retry_budget` of a retry, each retry
withdraws one, and `min_retries_per_second` are granted besides, so that a quiet proxy can fail over
too. So a failing fleet never sees more than about (1 + `retry_budget`) times its good load, however
many clients ask: retries cannot become the outage.

Another backend that stands ready is asked at once. Only where there is none (what is left rests or
is offered as a last resort) does waiting help: exponential backoff with full jitter, from 25 ms.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field

from beacon_proxy.contracts import Clock, Exchange, Notify, Outcome, Verdict, tell_nobody

_GOOD = Verdict.GOOD  # looked up once: a member of an enumeration is slow to reach
_SLOTS = 10
_SLOT = 1.0  # s; ten of them make the window
_FIRST_WAIT = 0.025  # s, the bound of the first backoff
_LONGEST_WAIT = 1.0  # s, the bound of any
# A Retry-After binds the backend that said it, and that one is not asked again in this exchange; a
# short one is waited for because its siblings often share the quota, a long one would only hold the
# client.
_PATIENCE = 10.0  # s


@dataclass(slots=True)
class Failover:
    """Grant retries within attempts, budget and deadline."""

    max_attempts: int = field(
        default=3, metadata={"help": "attempts of one exchange, the first included"}
    )
    retry_budget: float = field(
        default=0.2, metadata={"help": "retries per good attempt, over 10 s; 0: the minimum alone"}
    )
    min_retries_per_second: float = field(
        default=10.0, metadata={"help": "retries per second granted beside the budget"}
    )
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    rng: random.Random = field(
        default_factory=random.Random, metadata={"injected": True}, repr=False
    )
    notify: Notify = field(default=tell_nobody, metadata={"injected": True}, repr=False)
    _slots: list[float] = field(default_factory=lambda: [0.0] * _SLOTS, init=False, repr=False)
    _tick: int = field(default=0, init=False, repr=False)  # the slot in use, counted from time 0
    _rolls_at: float = field(default=_SLOT, init=False, repr=False)  # monotonic s
    _told: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: must be >= 1, got {self.max_attempts}")
        for name in ("retry_budget", "min_retries_per_second"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be >= 0 and finite, got {value}")

    def retry(self, exchange: Exchange, outcome: Outcome) -> float | None:
        """Return the wait in seconds, None to stop; a granted retry is paid for here.

        The core asks only where a candidate is left, and `outcome.repeatable` is its word that HTTP
        and the route allow another attempt, after a 4xx too.
        """
        attempts = max(outcome.number, len(exchange.attempts))
        if not outcome.repeatable or attempts >= self.max_attempts:
            return None
        if outcome.verdict in (Verdict.GOOD, Verdict.NEUTRAL):
            return None
        now = self.clock()
        left = math.inf if exchange.deadline is None else exchange.deadline - now
        wait = 0.0 if exchange.spare > 0 else self._backoff(attempts, outcome.retry_after, left)
        if wait >= left or not self._withdraw(now):
            return None
        return wait

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        if outcome.verdict is _GOOD:
            now = self.clock()
            if now >= self._rolls_at:
                self._roll(now)
            self._slots[self._tick % _SLOTS] += self.retry_budget

    def _backoff(self, attempts: int, retry_after: float | None, left: float) -> float:
        bound = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(attempts - 1, 16))
        wait = self.rng.uniform(0.0, bound)
        if retry_after is not None and retry_after < min(left, _PATIENCE):
            wait = max(wait, retry_after)
        return wait

    def _withdraw(self, now: float) -> bool:
        self._roll(now)
        reserve = self.min_retries_per_second * _SLOT * _SLOTS
        # The sum of many fifths is a hair off; a thousandth of a retry is no retry.
        if reserve + sum(self._slots) >= 1.0 - 1e-3:
            self._slots[self._tick % _SLOTS] -= 1.0
            return True
        if now - self._told >= _SLOT * _SLOTS:
            self._told = now
            self.notify("retry.refused", reason="budget", window_s=_SLOT * _SLOTS)
        return False

    def _roll(self, now: float) -> None:
        """Empty the slots that have left the window."""
        tick = int(now / _SLOT)
        if tick <= self._tick:
            return
        for passed in range(self._tick + 1, min(tick, self._tick + _SLOTS) + 1):
            self._slots[passed % _SLOTS] = 0.0
        self._tick = tick
        self._rolls_at = (tick + 1) * _SLOT
