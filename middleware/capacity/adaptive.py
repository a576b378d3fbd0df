"""The limit of one backend, found out by how it answers.

What is too much shows in two ways. A server that says no (429, 503), or says nothing in time, has
been asked for more than it takes. One that lets wait what it cannot run yet (llama.cpp and vLLM do)
shows it in the time to the first content, held against what the quickest of its like took.

Rule 1: like is compared with like. A first content comes later for a longer prompt and another
    model, so the times are kept apart by model and by the size of the request. That of a document
    comes when all of it is written, and tells how long it is: only streams are measured.
Rule 2: nothing is learnt from a cold start, a client that left or a request at fault; nor from an
    attempt that was sent before the last step down: it met the limit of before. And a server that
    says no is not believed twice with nothing that went well between: it is down.
Rule 3: a step down goes to where the excess would be gone. If the server worked on its requests for
    a part p of their time and let them wait for the rest, p times as many would have kept it as
    busy (Little's law). Where it only said no: to what ran well since, else to three quarters.
Rule 4: then the limit rests, so that it is seen again what the quickest take, and only after a
    while goes up: by a tenth after each window without excess in which at least half of it was in
    use. If it ends at the same level again, it rests for twice as long.
Rule 5: at the lowest limit nothing waits for another of ours: what is slow there is slow by itself,
    and becomes the measure.

That is additive increase and multiplicative decrease, with the gradient of TCP Vegas and Netflix's
concurrency-limits for the size of a step down.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from beacon_proxy.contracts import Exchange, Fault, Outcome, Stage, Verdict

_WINDOW = 16  # attempts that are judged together
_PATIENT = 4 * _WINDOW  # attempts that cannot be measured, until those that can are judged
_JITTER = 0.05  # s; what is less is no wait in a queue
_STALE = 60.0  # s without a good answer: what was measured before says nothing of now
_FIRST = 8  # of a kind: the quickest of them is taken as it is
# From then on it moves a little with each: up where it took longer, down where it took less. It
# rests where one in ten takes less: a few that a cache answered are no measure for the others.
_RISE, _FALL = 1.001, 0.991
_ALIKE = 0.25  # two levels that were too much, so near to each other, are one limit
_STEP_UP = 0.1
_MARGIN = 0.1  # of the quickest is counted as excess: else what waits a little becomes the measure
_CALM = 1 / 3  # power of the tolerance that is reached before a step down is over
_LEAST_LEFT = 0.5  # of the limit, after one step down by the measured times
_LEFT = 0.75  # of the limit, after one without a measure
_LONGEST_HOLD = 8.0  # times `probe_interval`
_KINDS = 256  # kept apart, a backend
_WAITED = (Stage.HEAD, Stage.CONTENT)  # where a timeout is one of an answer


@dataclass(frozen=True, slots=True)
class Adaptive:
    """How the limit of each backend is found."""

    enabled: bool = field(
        default=False, metadata={"help": "find each backend's real limit, up to max_in_flight"}
    )
    min: int = field(default=1, metadata={"help": "requests at once that are always let in"})
    tolerance: float = field(
        default=2.0,
        metadata={
            "help": "first content may take so many times what the quickest of its like took"
        },
    )
    probe_interval: float = field(
        default=30.0,
        metadata={"help": "s until what was too much is tried again; doubles while it still is"},
    )

    def __post_init__(self) -> None:
        if self.min < 1:
            raise ValueError(f"min: must be >= 1, got {self.min}")
        if not 1 < self.tolerance < math.inf:
            raise ValueError(f"tolerance: must be > 1 and finite, got {self.tolerance}")
        if not 0 < self.probe_interval < math.inf:
            raise ValueError(f"probe_interval: must be > 0 and finite, got {self.probe_interval}")


class _Kind:
    """First contents that may be compared with each other."""

    __slots__ = ("count", "quick")

    def __init__(self, ttft: float) -> None:
        self.quick = ttft  # s; about one in ten takes less
        self.count = 1  # up to _FIRST


class Taken(NamedTuple):
    """What is known of an attempt when its slot is taken."""

    exchange_id: str
    running: int  # at once, this one included
    kind: Hashable  # of request: those that may be compared


class Learner:
    """What is known of one backend's limit.

    Attributes:
        limit: requests at once; inf: nothing was found out that is below `max_in_flight`.
        ended: the slot that was given back last, whose outcome comes next.
    """

    __slots__ = (
        "_ceiling",
        "_changed_at",
        "_failed",
        "_good_at",
        "_hold",
        "_kinds",
        "_options",
        "_peak",
        "_probe_at",
        "_proven",
        "_ratios",
        "_settling",
        "_shares",
        "_unmeasured",
        "ended",
        "limit",
    )

    def __init__(self, options: Adaptive) -> None:
        self._options = options
        self.limit = math.inf
        self.ended: Taken | None = None
        self._kinds: dict[Hashable, _Kind] = {}
        self._ratios: list[float] = []  # of the window: first content by the quickest of its kind
        self._shares: list[float] = []  # of the window: the part of its time that was no excess
        self._unmeasured = 0  # good ones of the window that tell nothing of a wait
        self._peak = 0  # at once, in the window
        self._changed_at = -math.inf  # monotonic s of the last step down
        self._good_at = -math.inf
        self._proven = 0  # at once, beside which one ended well since then
        self._failed = -math.inf  # at once, that were too much last
        self._ceiling = math.inf  # at once, that are not to be tried before `_probe_at`
        self._settling = False  # after a step down by the times, until nobody waits
        self._hold = options.probe_interval  # s
        self._probe_at = -math.inf  # monotonic s

    def bound(self, most: int) -> int:
        """The limit now, where `most` is the operator's."""
        return most if self.limit >= most else int(self.limit)

    def take(self, exchange: Exchange, running: int) -> Taken:
        """Note that a slot was taken, and that so many run now."""
        if running > self._peak:
            self._peak = running
        return Taken(exchange.id, running, _kind_of(exchange))

    def observe(self, exchange: Exchange, outcome: Outcome, now: float) -> None:
        """Learn from an attempt that has ended, right after its slot was given back."""
        ended, self.ended = self.ended, None
        if ended is None or ended.exchange_id != exchange.id:
            return  # it came past the gate
        if outcome.verdict is Verdict.GOOD:
            self._good(exchange, outcome, ended, now)
        elif outcome.started > self._changed_at and self._too_much(exchange, outcome, now):
            running, below = ended.running, ended.running - 1
            to = below if self._proven >= below else int(running * _LEFT)
            self._step_down(running, to, running, now)

    def _too_much(self, exchange: Exchange, outcome: Outcome, now: float) -> bool:
        """Whether the backend said, or showed, that it could not take this one too."""
        if self._good_at < self._changed_at:
            return False  # nothing went well since: a server that is down says no to any number
        if outcome.fault is Fault.BUSY:
            return not (outcome.status == 429 and _is_about_client(exchange, outcome))
        late = outcome.fault is Fault.TIMEOUT and outcome.stage in _WAITED
        return late and now - self._good_at < _STALE  # else it may only be starting

    def _good(self, exchange: Exchange, outcome: Outcome, ended: Taken, now: float) -> None:
        if now - self._good_at >= _STALE:
            self._new_window()
        self._good_at = now
        ttft = outcome.ttft
        if not exchange.inference or outcome.cold_start is not None:
            return
        quickest = self._note(ended.kind, ttft) if ttft and exchange.stream else None
        if outcome.started <= self._changed_at:
            return
        self._proven = max(self._proven, ended.running)
        if not ttft or quickest is None:
            self._unmeasured += 1
        else:
            excess, whole = ttft - quickest, max(outcome.duration, ttft)
            self._ratios.append(ttft / quickest if excess > _JITTER else 1.0)
            self._shares.append(1.0 - (excess + _MARGIN * quickest) / whole)
        measured = len(self._ratios)
        if measured >= _WINDOW or self._unmeasured >= (_PATIENT if measured else _WINDOW):
            self._judge(now)

    def _note(self, kind: Hashable, ttft: float) -> float | None:
        """Remember a first content; returns what the quickest of its kind took, if any did."""
        seen = self._kinds.get(kind)
        if seen is None:
            if len(self._kinds) >= _KINDS:
                self._kinds.clear()  # clients make up sizes
            self._kinds[kind] = _Kind(ttft)
            return None
        if seen.count < _FIRST:
            seen.count += 1
            seen.quick = min(seen.quick, ttft)
        else:
            seen.quick *= _RISE if ttft > seen.quick else _FALL
        return seen.quick

    def _judge(self, now: float) -> None:
        """The window is full: step down, up, or stay."""
        at = len(self._ratios) // 4
        ratio = sorted(self._ratios)[at] if self._ratios else 1.0
        share = sorted(self._shares)[-1 - at] if self._shares else 1.0
        peak, tolerance = self._peak, self._options.tolerance
        to = round(peak * max(share, _LEAST_LEFT))
        if ratio <= (tolerance**_CALM if self._settling else tolerance):
            self._settling = False
            self._step_up(peak, now)
        elif peak <= self._options.min:
            self._kinds.clear()
        elif ratio <= tolerance:
            self._lower(peak, to, now)
            self._ceiling = self.limit + 1
        else:
            self._step_down(peak, to, to + 1, now)
            self._settling = True
        self._new_window()

    def _step_down(self, level: int, to: int, ceiling: int, now: float) -> None:
        """`level` at once were too much: let in `to`, and `ceiling` not again soon."""
        alike = abs(level - self._failed) <= 1 + self._failed * _ALIKE
        longest = self._options.probe_interval * _LONGEST_HOLD
        self._hold = min(self._hold * 2, longest) if alike else self._options.probe_interval
        self._failed, self._ceiling, self._probe_at = level, float(ceiling), now + self._hold
        self._lower(level, to, now)

    def _lower(self, level: int, to: int, now: float) -> None:
        self.limit = max(min(self.limit, to, level - 1), self._options.min)
        self._changed_at, self._proven = now, 0
        self._new_window()

    def _step_up(self, peak: int, now: float) -> None:
        """All is well with `peak` at once."""
        if peak >= self._ceiling:  # what was too much is not any more
            self._ceiling = math.inf
        if self.limit == math.inf or peak * 2 < self.limit:
            return
        higher = self.limit + max(1, int(self.limit * _STEP_UP))
        if higher >= self._ceiling:
            higher = self._ceiling if now >= self._probe_at else self._ceiling - 1
        self.limit = max(self.limit, higher)

    def _new_window(self) -> None:
        self._ratios.clear()
        self._shares.clear()
        self._unmeasured = self._peak = 0


_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})


def _is_about_client(exchange: Exchange, outcome: Outcome) -> bool:
    """Whether the backend knew the client by the client's own key: a 429 is about its quota."""
    backend = outcome.backend
    if backend.api_key or any(name.lower() in _CREDENTIALS for name, _ in backend.headers):
        return False
    return any(name.lower() in _CREDENTIALS for name, _ in exchange.headers)


def _kind_of(exchange: Exchange) -> Hashable:
    """What a first content is compared with: each step of a size is a factor of two.

    To be asked before the attempt: the core lets go of the body once the answer is committed.
    """
    if exchange.prompt is not None:
        size = len(exchange.prompt.prompt)
    else:
        size = 0 if exchange.body is None else len(exchange.body)
    return exchange.model, size.bit_length()
