"""How many workers one backend should keep, by what is asked of it: a rule without a clock or I/O.

Rule 1: as many as keep each at `target` of what it can do at once; never outside `min`..`max`
    (target tracking, as Kubernetes' HorizontalPodAutoscaler does it).
Rule 2: up at once, down only to the most that was wanted within `scale_down_after` seconds (its
    stabilization window): a worker that stops in a lull has to start cold in the next burst.
Rule 3: two changes are at least `cooldown` seconds apart, for a start takes its time to show.
Rule 4: what the provider keeps is what it says, not what it was told: a deployment, a person or
    another proxy changes it too. It is asked before each order, and every `scale_down_after`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the operator allows for one backend."""

    min: int = 0  # workers kept when nobody asks
    max: int = 1
    per_worker: int = 1  # requests that one worker serves at once
    target: float = 0.7  # 0..1, of `per_worker`
    cooldown: float = 60.0  # s
    scale_down_after: float = 300.0  # s

    def wanted(self, demand: int) -> int:
        """Workers for `demand` requests, running and waiting."""
        return min(max(ceil(demand / (self.per_worker * self.target)), self.min), self.max)


@dataclass(slots=True)
class Plan:
    """What is wanted for one backend, and what its provider keeps.

    Attributes:
        kept: workers, by the provider's last answer; None: not known, for it was not asked yet, or
            did not answer well.
        wanted: by the last look.
        raised: more than `min` may be kept by an order of ours, or for our demand.
    """

    bounds: Bounds
    started: float  # s of the caller's clock
    kept: int | None = None
    wanted: int = 0
    raised: bool = False
    _tried: float = -inf  # the last order, or failure
    _heard: float = -inf  # the last good answer
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def look(self, demand: int, now: float) -> bool:
        """Whether the provider is to be asked now what it keeps; then `order` says what to do."""
        self.wanted = wanted = self.bounds.wanted(demand)
        recent, since = self._recent, now - self.bounds.scale_down_after
        while recent and (recent[0][0] <= since or recent[0][1] <= wanted):
            recent.popleft()
        while recent and recent[-1][1] <= wanted:  # who came before and is less is never the most
            recent.pop()
        recent.append((now, wanted))
        if now - self._tried < self.bounds.cooldown:
            return False
        stale = self.kept is None or now - self._heard >= self.bounds.scale_down_after
        return stale or self.order(now) is not None

    def order(self, now: float) -> int | None:
        """Workers to tell the provider; None: leave it as it is."""
        kept, least = self.kept, self.bounds.min
        if kept is None:
            return None
        if min(kept, self.wanted) > least:  # who found it there would have asked for it
            self.raised = True
        if self.wanted > kept:
            return self.wanted
        if now - self.started < self.bounds.scale_down_after:
            return None  # another may have raised it for good reason: this process has seen little
        most = self._recent[0][1]
        return most if most < kept else None

    def heard(self, kept: int, now: float) -> None:
        """The provider says what it keeps."""
        self.kept, self._heard = kept, now

    def tells(self, now: float) -> None:
        """An order goes out: until its good answer is here, anything may be kept."""
        self.kept, self.raised, self._tried = None, True, now

    def told(self, workers: int, now: float) -> None:
        """The provider took the order."""
        self.heard(workers, now)
        self.raised, self._tried = workers > self.bounds.min, now

    def failed(self, now: float) -> None:
        """It did not answer, or not well: an order may have been done all the same."""
        self.kept, self._tried = None, now
