"""When an alert begins and when it ends: hysteresis for one rule, subject and severity.

    QUIET ---- past its mark for `for_` s ----> ACTIVE
      ^                                            |
      +------ clear of it for `calm` s ------------+

Rule 1: what is past its mark without a break for `for_` begins; one value that is not starts anew.
Rule 2: it ends by another, milder mark, and only after it was clear for a while without a break.
    Nothing to say (no traffic, a subject that is gone) is clear: nobody could ever see it end.
Rule 3: between two messages lie `pause` s at least. What is still true then is told then.
Rule 4: an alert that comes back within an hour of its end is flapping: each time it has to be clear
    twice as long until it ends, up to an hour. One long alert wakes fewer people than thirty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import inf

Compare = Callable[[float, float], bool]
FLAPS_WITHIN = 3600.0  # s after its end


class Severity(StrEnum):
    """How much it matters: somebody may act, or somebody should."""

    WARNING = "warning"
    CRITICAL = "critical"


class Change(StrEnum):
    """What a look may find."""

    BEGAN = "began"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Mark:
    """Where an alert begins and ends."""

    begins: float
    ends: float
    for_: float  # s
    clear_for: float  # s
    severity: Severity = Severity.WARNING
    past: Compare = operator.ge  # of a value and `begins`
    clear: Compare = operator.le  # of a value and `ends`


class Alarm:
    """One alert that may be.

    Attributes:
        active: it has begun and not ended.
        mark: where it begins and ends.
        since: when it came past its mark, if it is active or about to be; monotonic s.
    """

    __slots__ = ("_clear_since", "_ended", "_flaps", "_pause", "_told", "active", "mark", "since")

    def __init__(self, mark: Mark, pause: float) -> None:
        self.mark, self._pause = mark, pause
        self._clear_since: float | None = None
        self._told = self._ended = -inf  # monotonic s
        self._flaps = 0
        self.active = False
        self.since: float | None = None

    def see(self, now: float, value: float | None) -> Change | None:
        """Take the value of this moment; None: there is nothing to say."""
        if self.active:
            return self._end(now, value)
        return self._begin(now, value)

    def _begin(self, now: float, value: float | None) -> Change | None:
        if value is None or not self.mark.past(value, self.mark.begins):
            self.since = None
            return None
        if self.since is None:
            self.since = now
        if now - self.since < self.mark.for_ or now - self._told < self._pause:
            return None
        self._flaps = self._flaps + 1 if now - self._ended <= FLAPS_WITHIN else 0
        self.active, self._told, self._clear_since = True, now, None
        return Change.BEGAN

    def _end(self, now: float, value: float | None) -> Change | None:
        if value is not None and not self._is_clear(value):
            self._clear_since = None
            return None
        if self._clear_since is None:
            self._clear_since = now
        if now - self._clear_since < self.calm or now - self._told < self._pause:
            return None
        self.active, self.since, self._told, self._ended = False, None, now, now
        return Change.ENDED

    def _is_clear(self, value: float) -> bool:
        mark = self.mark
        return mark.clear(value, mark.ends) and not mark.past(value, mark.begins)

    @property
    def calm(self) -> float:
        """Seconds that it has to be clear until it ends, as often as it came back."""
        clear_for = self.mark.clear_for
        if not self._flaps:
            return clear_for
        longer = max(clear_for, self._pause, 1.0) * 2.0 ** min(self._flaps, 32)
        return max(clear_for, min(longer, FLAPS_WITHIN))

    def forgettable(self, now: float) -> bool:
        """Whether a new one would do the same from now on."""
        quiet = not self.active and self.since is None
        return quiet and now - self._ended > max(FLAPS_WITHIN, self._pause)
