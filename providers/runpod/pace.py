"""How often RunPod is asked: fast while there is news, and never above a part of its limits.

RunPod counts requests by endpoint and operation (docs: serverless/endpoints/operation-reference)
and answers 429 above. Several instances of the proxy, and other users of the endpoint, share the
same limits, so one process takes a quarter of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum

from beacon_proxy.contracts import Clock

Sleep = Callable[[float], Awaitable[None]]


class Operation(StrEnum):
    """The part of RunPod's queue API that is used here."""

    RUN = "run"
    RUNSYNC = "runsync"
    STATUS = "status"
    STREAM = "stream"
    CANCEL = "cancel"


_WINDOW = 10.0  # s
# Requests a window, as published.
_PUBLISHED = {
    Operation.RUN: 1000,
    Operation.RUNSYNC: 2000,
    Operation.STATUS: 2000,
    Operation.STREAM: 2000,
    Operation.CANCEL: 100,
}
_PART = 0.25
_AT_ONCE = 0.2  # of that part
# A job that nobody cancels costs more than a refused request, and they come all at once: when the
# process stops, there are seconds to end every job.
_PART_OF_CANCELS, _CANCELS_AT_ONCE = 0.9, 0.8


class Budget:
    """Requests of one operation at one endpoint, spread so that no window holds too many.

    What is over the budget waits its turn, first come first served. (GCRA, as in ITU-T I.371: one
    number, and no timer while nobody asks.)
    """

    def __init__(self, operation: Operation, clock: Clock, sleep: Sleep = asyncio.sleep) -> None:
        part, at_once = _PART, _AT_ONCE
        if operation is Operation.CANCEL:
            part, at_once = _PART_OF_CANCELS, _CANCELS_AT_ONCE
        most = _PUBLISHED[operation] * part
        # Some at once and the others spread over the window: no window holds more than `most`.
        self._step = _WINDOW / (most * (1 - at_once))  # s that one request stands for
        self._ahead = self._step * most * at_once
        self._clock = clock
        self._sleep = sleep
        self._due = 0.0  # monotonic s at which all that was let through is paid for

    async def take(self) -> None:
        """Return when one request may go out."""
        now = self._clock()
        self._due = max(self._due, now) + self._step
        wait = self._due - now - self._ahead
        if wait > 0:
            try:
                await self._sleep(wait)
            except BaseException:
                self._due -= self._step  # who left while it waited has asked for nothing
                raise

    @property
    def idle(self) -> bool:
        """Nothing that was let through, and no pause, is left to be remembered."""
        return self._due <= self._clock()

    def rest(self, seconds: float) -> None:
        """RunPod asks for a pause: from now on nothing goes out for so long."""
        self._due = max(self._due, self._clock() + self._ahead + seconds)


class Pace:
    """The wait before the next look at one job, s."""

    FIRST = 0.05
    RUNNING_MOST = 0.25  # so long may a piece lie there unread
    QUEUED_MOST = 1.0  # a worker that starts takes many seconds
    _GROWTH = 1.4

    def __init__(self) -> None:
        self._wait = self.FIRST

    def news(self) -> None:
        """Something came: more is likely to follow soon."""
        self._wait = self.FIRST

    def next(self, *, queued: bool) -> float:
        """How long to wait now; each time without news it is longer."""
        wait = min(self._wait, self.QUEUED_MOST if queued else self.RUNNING_MOST)
        self._wait = wait * self._GROWTH
        return wait
