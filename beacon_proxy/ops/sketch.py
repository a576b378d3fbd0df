"""Quantiles of any number of values in bounded room, to be merged with others of their kind.

Rule 1: up to 512 values are kept as they are, and their quantiles are exact (nearest rank). More
    are folded into a t-digest (T. Dunning, O. Ertl, arXiv:1902.04023) of at most 200 centroids. Its
    error is one of rank: what it calls the p95 is the true quantile of some share near 0.95. How
    near is written in docs/regions.md, and held by tests/test_sketch.py.
Rule 2: to add a value is to append to an array. Who adds calls `fold` once in 512 values.
Rule 3: merging leaves the other as it is, and its order changes nothing beyond that error.
"""

from __future__ import annotations

import math
from array import array

from fastdigest import TDigest

EXACT = 512  # values: they take less room than one digest, and 20 us to sort
_CENTROIDS = 200


class Sketch:
    """What is known of some values: seconds, for one.

    Attributes:
        waiting: values that are not folded yet; finite numbers alone may be appended.
    """

    __slots__ = ("_digest", "waiting")

    def __init__(self) -> None:
        self.waiting = array("d")
        self._digest: TDigest | None = None

    def __len__(self) -> int:
        """How many values it has seen."""
        return len(self.waiting) + (0 if self._digest is None else self._digest.n_values)

    def fold(self) -> None:
        """Make room for further values, where many wait."""
        if len(self.waiting) > EXACT:
            self._fold()

    def pack(self) -> None:
        """Take less room, and less time to be merged: where there is a digest it holds all."""
        if self._digest is not None and self.waiting:
            self._fold()
            self._digest = self._digest.copy()  # a quarter smaller: no room for another batch

    def merge(self, other: Sketch) -> None:
        """Take in what the other has seen."""
        self.waiting.extend(other.waiting)
        if other._digest is not None:
            if self._digest is None:
                self._digest = other._digest.copy()
            else:
                self._digest.merge_inplace(other._digest)
        self.fold()

    def quantile(self, q: float) -> float | None:
        """The value that the share `q` (0..1) did not exceed; None where nothing was seen."""
        if self._digest is not None:
            if self.waiting:
                self._fold()
            return self._digest.quantile(q)
        if not self.waiting:
            return None
        # Kept sorted: it is rarely asked for one quantile alone, and a sorted one sorts fast.
        self.waiting = array("d", sorted(self.waiting))
        return self.waiting[max(math.ceil(q * len(self.waiting)), 1) - 1]

    def _fold(self) -> None:
        if self._digest is None:
            self._digest = TDigest(_CENTROIDS)
        self._digest.batch_update(self.waiting)
        self.waiting = array("d")
