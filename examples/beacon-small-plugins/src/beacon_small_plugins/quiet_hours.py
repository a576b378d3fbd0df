"""A middleware: at night the burst pool rests, as long as the baseline has anybody."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from beacon_proxy.contracts import Candidates, Clock, Exchange


@dataclass(slots=True)
class QuietHours:
    """Keep to the baseline pool between two hours of the day."""

    start: int = field(default=22, metadata={"help": "hour, UTC"})
    end: int = field(default=6, metadata={"help": "hour, UTC"})
    unix: Clock = field(default=time.time, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, hour in (("start", self.start), ("end", self.end)):
            if not 0 <= hour < 24:
                raise ValueError(f"{name}: must be in 0..23, got {hour}")

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        hour = int(self.unix() // 3600) % 24
        if (hour - self.start) % 24 >= (self.end - self.start) % 24:
            return candidates
        return [c for c in candidates if c.backend.pool == "baseline"] or candidates
