"""Which backends can no longer answer in time, so that nobody is sent there for nothing.

Rule 1: never a guess. What counts is what a backend's own good answers with this very model took;
    where none was seen, nothing is claimed. One that is known to be cold takes its start longer,
    the quickest of those that were seen, if there were three.
Rule 2: only what is hopeless: half of what the quickest took (`Typical.quickest`) is not left.
Rule 3: once in a while one is let through all the same. What is never tried is never seen to work,
    and a short answer (`max_tokens: 1`) may be quicker than any before it.
Rule 4: how long others will wait and work is not known, so nobody is refused for who waits ahead.
"""

from __future__ import annotations

from math import inf

from ..contracts import Candidate, Candidates, Exchange, Live, Warmth

_PART = 0.5  # of what the quickest took
_STARTS = 3  # seen, before they say what a start takes at least
_RISK_PAUSE = 10.0  # s between two that are let through, for each backend and model
_COLD = Warmth.COLD


def needed(live: Live, exchange: Exchange, now: float) -> float:
    """Seconds, at `now` (monotonic s), below which an answer is not to be had; 0: not known."""
    work = exchange.work
    typical = live.typical.get(work) if work else None
    if typical is None:
        return 0.0
    quickest = typical.quickest
    if live.warmth is _COLD and now < live.warmth_until and len(live.cold_starts) >= _STARTS:
        quickest += live.cold_starts.quantile(0.0) or 0.0
    return _PART * quickest


def latest_start(exchange: Exchange, candidate: Candidate, now: float) -> float:
    """Until when the candidate might still answer in time; monotonic s."""
    return exchange.ends_on(candidate.backend) - needed(candidate.live, exchange, now)


def hopeful(exchange: Exchange, candidates: Candidates, now: float, *, totals: bool) -> Candidates:
    """Those that might still answer in time; where none might, now and then one is risked.

    `totals` says whether some backend limits the whole time of an exchange.
    """
    if not totals and _all_might(exchange, candidates, now):
        return candidates
    found = [c for c in candidates if now < latest_start(exchange, c, now)]
    if not found:
        for candidate in candidates:
            typical = candidate.live.typical.get(exchange.work)
            ends = exchange.ends_on(candidate.backend)
            if now < ends and typical is not None and now - typical.risked >= _RISK_PAUSE:
                typical.risked = now
                return [candidate]
    return found


def _all_might(exchange: Exchange, candidates: Candidates, now: float) -> bool:
    """Whether there is time enough for any of them: the usual case, told quickly."""
    work = exchange.work
    left = inf if exchange.deadline is None else exchange.deadline - now
    for candidate in candidates:
        live = candidate.live
        typical = live.typical.get(work)
        if typical is not None and (typical.quickest > left or live.warmth is _COLD):
            return False
    return left > 0
