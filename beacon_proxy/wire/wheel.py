"""One coarse timer for every limit in the process.

A timer a request (or a piece) costs more than the work it guards. Here things with a limit lie in
buckets of 50 ms; when a bucket's time has come each is asked whether its limit has really passed,
and names the next time to be asked. Moving a limit forward is an attribute write, nothing more.
"""

from __future__ import annotations

import asyncio
from heapq import heappop, heappush
from math import ceil
from typing import Protocol

GRAIN = 0.05  # s
HORIZON = 900.0  # s; what lies further off is asked again then, so that buckets stay few
_LATE = 0.01  # s that a turn may come late; beyond that the loop has stood still


class Timed(Protocol):
    """Something with a limit."""

    bucket: int | None  # written by the wheel alone

    def expire(self, now: float) -> float | None:
        """Act if the limit has passed. Returns when to be asked again, None for never."""
        ...


class Wheel:
    """Buckets of things with limits, over the loop's clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # In the order in which they came: who runs out first must not hang on memory addresses.
        self._buckets: dict[int, dict[Timed, None]] = {}
        self._order: list[int] = []  # a heap of the buckets there are
        self._timer: asyncio.TimerHandle | None = None
        self._stood = False  # still, so that a turn was put off

    def add(self, thing: Timed, when: float) -> None:
        """Ask `thing` at `when` (monotonic s, as the loop's own clock), or up to a grain later."""
        self.drop(thing)
        bucket = ceil(min(when, self._loop.time() + HORIZON) / GRAIN)
        thing.bucket = bucket
        things = self._buckets.get(bucket)
        if things is None:
            self._buckets[bucket] = things = {}
            heappush(self._order, bucket)
            if self._order[0] == bucket:
                self._arm()
        things[thing] = None

    def drop(self, thing: Timed) -> None:
        """Never ask again. Does nothing for a thing that is not on the wheel."""
        if thing.bucket is not None:
            things = self._buckets.get(thing.bucket)
            if things is not None:
                things.pop(thing, None)
            thing.bucket = None

    def close(self) -> None:
        """Stop the timer and forget everything."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._buckets.clear()
        self._order.clear()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._order[0] * GRAIN, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now > self._order[0] * GRAIN + _LATE and not self._stood:
            # uvloop may come here before it reads what was sent meanwhile, and who has sent it
            # would be cut off as silent: they get another grain, once.
            self._stood = True
            self._timer = self._loop.call_at(now + GRAIN, self._turn)
            return
        self._stood = False
        # The loop's clock has whole milliseconds, so it may still stand just before the bucket.
        try:
            while self._order and self._order[0] * GRAIN <= now + 0.002:
                for thing in self._buckets.pop(heappop(self._order)):
                    thing.bucket = None
                    try:
                        again = thing.expire(now)
                    except Exception as exc:  # one thing's fault must not cost the others' limits
                        told = {"message": "a limit was not kept", "exception": exc}
                        self._loop.call_exception_handler(told)
                        continue
                    if again is not None:
                        self.add(thing, max(again, now + GRAIN))
        finally:
            if self._order:
                self._arm()
