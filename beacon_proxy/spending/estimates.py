"""What an attempt is expected to cost before it is made: by what this backend did so far.

An attempt is known by the `work` of its exchange, and what it took is learnt under the same: an
inference by the canonical model, "" where that is not known, `OTHER_POST` for a POST on a path that
we do not know, and None for what runs no model (lists, pages).
Rule 1: the nearest past counts: of this backend and work; else of all inference on this backend;
    else of all inference. What is none says nothing about it.
Rule 2: seconds and tokens are remembered, not money: a price may change, the work does not.
Rule 3: a cold start is no part of the work. It is added where the backend would have to start.
Rule 4: what runs no model counts no tokens, as far as it is known.
Rule 5: clients make up models. So many of a backend's are told apart; a further one takes the place
    of that which was learnt last the longest ago.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from ..contracts import OTHER_POST, Backend, Live, Outcome, Typical, Usage

_WEIGHT = 0.2  # of the newest attempt in the averages: about the last ten count
_RISE = 1.0002  # of `Typical.quickest` with each attempt that took longer: doubled after 3500
_CAUTION = 8.0  # it begins at this part of the first one seen
_MODELS = 64  # told apart, a backend
_FEW = 48  # of them, for which nobody need know which was learnt the longest ago
_BACKENDS = 64  # that make the average of the fleet: the newest
_LONGEST = 128  # characters of one
_GUESS = Typical(billed=5.0, input=200.0, output=200.0)  # while no answer has been seen at all
_NOTHING, _NO_TOKENS = Typical(), Usage()


class Pace(NamedTuple):
    """How fast an attempt is expected to write."""

    output: float  # tokens, in all
    seconds: float  # that they take, without a cold start

    def part(self, seconds: float) -> float:
        """How much of it has run after so many seconds, 0..1, at an even pace."""
        return min(max(seconds, 0.0) / self.seconds, 1.0) if self.seconds > 0.0 else 1.0


class Estimates:
    """Learns from good attempts."""

    def __init__(self) -> None:
        self._usual: deque[Typical] = deque(maxlen=_BACKENDS)  # `Live.usual` of each

    def note(self, live: Live, work: str | None, outcome: Outcome) -> None:
        """Learn from a good attempt at `work`."""
        known = live.typical
        typical = known.get(work)
        if typical is None:
            work, typical = _begin(known, work, outcome.duration)
            known[work] = typical
        elif len(known) > _FEW:
            known[work] = known.pop(work, typical)  # what was learnt last stands last
        billed, duration = outcome.billed, outcome.duration
        typical.at = at = outcome.started + duration
        if outcome.cold_start is not None:
            if billed > outcome.cold_start:
                billed -= outcome.cold_start
            if duration > outcome.cold_start:
                duration -= outcome.cold_start
        quickest = typical.quickest * _RISE
        typical.quickest = quickest if quickest < duration else duration
        old = typical.billed
        typical.billed = old + _WEIGHT * (billed - old) if old else billed
        if work is None:
            if outcome.backend.token_price is not None:
                _count(typical, outcome.usage or _NO_TOKENS)
            return
        usage = outcome.usage if outcome.backend.token_price is not None else None
        if usage is not None:
            _count(typical, usage)
        if work != OTHER_POST:
            usual = live.usual
            if usual is None:
                usual = live.usual = Typical()
                self._usual.append(usual)
            usual.at = at
            old = usual.billed
            usual.billed = old + _WEIGHT * (billed - old) if old else billed
            if usage is not None:
                _count(usual, usage)

    def usd(self, backend: Backend, live: Live, work: str | None, now: float) -> float:
        """USD that an attempt at `backend`, made now (monotonic s), is expected to cost."""
        price = backend.token_price
        if price is not None:
            return price.usd(self._tokens(live, work))
        seconds = (live.typical.get(work) or live.usual or self._fleet()).billed
        if live.cold_from <= now and live.cold_at(now):
            seconds += live.cold_starts.quantile(0.5) or 0.0
        return seconds * backend.price_per_second

    def pace(self, live: Live, work: str | None) -> Pace:
        """Of an attempt on a backend that bills tokens, made now."""
        seconds = (live.typical.get(work) or live.usual or self._fleet()).billed
        return Pace(self._tokens(live, work).output, seconds)

    def _tokens(self, live: Live, work: str | None) -> Typical:
        """What tells the tokens of an attempt."""
        typical = live.typical.get(work)
        if work is None:
            return typical or _NOTHING
        if typical is None or not (typical.input or typical.output):
            typical = live.usual  # it never said what it took
            if typical is None or not (typical.input or typical.output):
                typical = self._fleet()
        return typical

    def _fleet(self) -> Typical:
        """What inference takes on average, over all backends."""
        known = self._usual
        if not known:
            return _GUESS
        billed = sum(each.billed for each in known) / len(known)
        counted = [each for each in known if each.input or each.output]
        if not counted:
            return replace(_GUESS, billed=billed)
        return Typical(
            billed,
            sum(each.input for each in counted) / len(counted),
            sum(each.output for each in counted) / len(counted),
            sum(each.cached for each in counted) / len(counted),
            sum(each.cache_written for each in counted) / len(counted),
        )


def _begin(
    known: dict[str | None, Typical], work: str | None, duration: float
) -> tuple[str | None, Typical]:
    """What new work is remembered as, and its averages. Makes room for it."""
    if work and len(work) > _LONGEST:
        work = ""
    elif len(known) >= _MODELS:
        del known[next(iter(known))]
    return work, known.pop(work, None) or Typical(quickest=duration / _CAUTION)


def _count(typical: Typical, usage: Usage) -> None:
    if typical.input:
        typical.cached += _WEIGHT * (usage.cached - typical.cached)
        typical.cache_written += _WEIGHT * (usage.cache_written - typical.cache_written)
    else:  # they begin with the input, and not by themselves: else they would outgrow it
        typical.cached, typical.cache_written = float(usage.cached), float(usage.cache_written)
    typical.input = _mean(typical.input, usage.input)
    typical.output = _mean(typical.output, usage.output)


def _mean(old: float, new: int) -> float:
    return old + _WEIGHT * (new - old) if old else float(new)
