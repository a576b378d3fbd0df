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
from beacon_proxy.regions import REGIONS, canonical_region, distance

_MODES = ("prefer", "require")
_LAST = 16  # a rank behind all that distances make


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
    _places: dict[str, _Places] = field(default_factory=dict, init=False, repr=False)

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
            # An answer from a place that nobody named would be false data.
            candidates = [
                c
                for c in candidates
                if c.backend.region == preferred and not c.backend.region_assumed
            ]
        places = self._places.get(preferred or "") or self._survey(preferred or "")
        in_order, so_far = True, 0
        for candidate in candidates:
            candidate.priority, candidate.distance, rank = places[candidate.backend.region]
            if candidate.last_resort:
                rank = _LAST
            if rank < so_far:
                in_order = False
            so_far = rank
        return candidates if in_order else sorted(candidates, key=_rank)

    def _survey(self, preferred: str) -> _Places:
        places = _Places(self.region, preferred)
        if not preferred or preferred in REGIONS:  # not what a client makes up
            self._places[preferred] = places
        return places


class _Places(dict[str, tuple[int, int, int]]):
    """Where each backend region lies: its priority, distance and rank; worked out once."""

    def __init__(self, here: str, preferred: str) -> None:
        self._here = here
        self._preferred = preferred

    def __missing__(self, where: str) -> tuple[int, int, int]:
        priority = distance(self._preferred, where) if self._preferred else 0
        away = distance(self._here, where)
        place = self[where] = priority, away, _rank_of(priority, away)
        return place


def _rank(candidate: Candidate) -> int:
    if candidate.last_resort:
        return _LAST
    return _rank_of(candidate.priority, candidate.distance)


def _rank_of(priority: int, away: int) -> int:
    return priority * 4 + away
