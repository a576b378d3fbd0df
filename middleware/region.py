"""Region: near backends first, far ones for spill-over, none but the named one if required.

A client that names a region gets *priorities*: 0 for that region, then by distance, so that cost
and load decide only among equally near backends. A client that names none gets no priorities: the
policy of the operator (cost, blend) rules over all regions, and the distance from this instance
breaks its ties. `require` without a region means this instance's own.

Candidates of last resort keep the order in which health offers them: where nothing is well, the
least bad counts for more than the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from beacon_proxy.contracts import Candidate, Candidates, Exchange
from beacon_proxy.regions import canonical_region, distance

_MODES = ("prefer", "require")


@dataclass(slots=True)
class Region:
    """Set each candidate's priority and distance, and drop what a client rules out."""

    mode: Literal["prefer", "require"] = field(
        default="prefer",
        metadata={
            "help": "prefer: other regions take the spill-over; require: they are never used"
        },
    )
    region: str = field(default="", metadata={"injected": True})

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode: must be prefer or require, got {self.mode!r}")
        self.region = canonical_region(self.region)

    def prepare(self, exchange: Exchange) -> None:
        """Settle mode and region once, so that every phase after sees the same."""
        if exchange.region_mode is None:
            exchange.region_mode = self.mode
        if exchange.region is None and exchange.region_mode == "require":
            exchange.region = self.region

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Order by region; empty when the required region has no candidate."""
        preferred = exchange.region
        if preferred and (exchange.region_mode or self.mode) == "require":
            candidates = [c for c in candidates if c.backend.region == preferred]
        for candidate in candidates:
            where = candidate.backend.region
            candidate.distance = distance(self.region, where)
            candidate.priority = distance(preferred, where) if preferred else 0
        return sorted(candidates, key=_nearness)


def _nearness(candidate: Candidate) -> tuple[bool, int, int]:
    if candidate.last_resort:
        return True, 0, 0
    return False, candidate.priority, candidate.distance
