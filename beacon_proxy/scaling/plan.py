"""How many workers one backend should keep, by what is asked of it: a rule without a clock or I/O.

Rule 1: as many as keep each at `target` of what it can do at once; never outside `min`..`max`
    (target tracking, as Kubernetes' HorizontalPodAutoscaler does it).
Rule 2: up at once, down only to the most that was wanted within `scale_down_after` seconds (its
    stabilization window): a worker that stops in a lull has to start cold in the next burst.
Rule 3: two changes are at least `cooldown` seconds apart, for a start takes its time to show.
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
    """What is wanted for one backend, and what its provider was told last.

    Attributes:
        told: workers; None: nothing yet, so what the provider keeps is not known.
        wanted: by the last look.
    """

    bounds: Bounds
    started: float  # s of the caller's clock
    told: int | None = None
    wanted: int = 0
    _changed: float = -inf
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def look(self, demand: int, now: float) -> int | None:
        """Workers to tell the provider now; None: leave it as it is."""
        self.wanted = wanted = self.bounds.wanted(demand)
        recent, since = self._recent, now - self.bounds.scale_down_after
        while recent and (recent[0][0] <= since or recent[0][1] <= wanted):
            recent.popleft()
        while recent and recent[-1][1] <= wanted:  # who came before and is less is never the most
            recent.pop()
        recent.append((now, wanted))
        if now - self._changed < self.bounds.cooldown:
            return None
        most = recent[0][1]
        if self.told is None:
            # What it keeps is not known: only more than the least is certain to be needed.
            known = wanted > self.bounds.min or now - self.started >= self.bounds.scale_down_after
            return most if known else None
        if wanted > self.told:
            return wanted
        return most if most < self.told else None

    def tried(self, now: float, workers: int | None) -> None:
        """The provider was told `workers`, or, where that is None, could not be."""
        self._changed = now
        if workers is not None:
            self.told = workers
