"""What an attempt is expected to cost before it is made: by what this backend and model did so far.

Rule 1: the nearest past counts: of this backend and model; else of this backend; else of all. What
    names no model (lists, pages, tunnels) is other work, and says nothing about that of models.
Rule 2: seconds and tokens are remembered, not money: a price may change, the work does not.
Rule 3: a cold start is no part of the work. It is added where the backend would have to start.
"""

from __future__ import annotations

from ..contracts import Backend, Live, Outcome, Typical

_WEIGHT = 0.2  # of the newest attempt in the averages: about the last ten count
_RISE = 1.005  # of `Typical.quickest` with each attempt that took longer: twice as much after 140
_CAUTION = 8.0  # it begins at this part of the first one seen
_MODELS = 64  # names told apart, a backend: clients make them up
_LONGEST = 128  # characters of one
_GUESS = Typical(billed=5.0, input=200.0, output=200.0)  # while no answer has been seen at all


class Estimates:
    """Learns from good attempts."""

    def __init__(self) -> None:
        self._all = _GUESS  # over every backend

    def note(self, live: Live, model: str | None, outcome: Outcome) -> None:
        """Learn from a good attempt; `model` as the client spells it."""
        typical = live.typical.get(model)
        if typical is None:
            typical = self._begin(live, model, outcome.duration)
        billed, duration = outcome.billed, outcome.duration
        if outcome.cold_start is not None:
            if billed > outcome.cold_start:
                billed -= outcome.cold_start
            if duration > outcome.cold_start:
                duration -= outcome.cold_start
        quickest = typical.quickest * _RISE
        typical.quickest = quickest if quickest < duration else duration
        every = self._all if model is not None else Typical()  # into nothing: see rule 1
        if every is _GUESS:
            every = self._all = Typical(billed, _GUESS.input, _GUESS.output)
        typical.billed += (_WEIGHT if typical.billed else 1.0) * (billed - typical.billed)
        every.billed += _WEIGHT * (billed - every.billed)
        usage = outcome.usage
        if usage is not None and outcome.backend.token_price is not None:
            for each in (typical, every):
                each.input += (_WEIGHT if each.input else 1.0) * (usage.input - each.input)
                each.output += (_WEIGHT if each.output else 1.0) * (usage.output - each.output)

    def _begin(self, live: Live, model: str | None, duration: float) -> Typical:
        if model is not None and (len(live.typical) >= _MODELS or len(model) > _LONGEST):
            return live.typical.get(None) or self._begin(live, None, duration)
        typical = live.typical[model] = Typical(quickest=duration / _CAUTION)
        return typical

    def usd(self, backend: Backend, live: Live, model: str | None, now: float) -> float:
        """USD that an attempt at `backend`, made now (monotonic s), is expected to cost."""
        typical = live.typical.get(model)
        if typical is None:
            typical = self._nearest(live)
        price = backend.token_price
        if price is not None:
            if not (typical.input or typical.output):
                typical = self._all  # it never said what it took
            return typical.input * price.input + typical.output * price.output
        seconds = typical.billed
        if live.cold_from <= now and live.cold_at(now):
            seconds += live.cold_starts.quantile(0.5) or 0.0
        return seconds * backend.price_per_second

    def _nearest(self, live: Live) -> Typical:
        known = [each for model, each in live.typical.items() if model is not None]
        if not known:
            return self._all
        count = len(known)
        counted = sum(1 for each in known if each.input or each.output) or 1
        return Typical(
            sum(each.billed for each in known) / count,
            sum(each.input for each in known) / counted,
            sum(each.output for each in known) / counted,
        )
