"""Which backends can no longer answer in time, so that nobody is sent there for nothing.

Rule 1: never a guess. What counts is what a backend's own good answers with this very model took;
    where none was seen, or no model is known, nothing is claimed. One that is known to be cold
    takes its start longer, the quickest of those that were seen, if there were three.
Rule 2: only what is hopeless: half of what the quickest took (`Typical.quickest`) is not left.
Rule 3: once in a while one is let through all the same. What is never tried is never seen to work,
    and a short answer (`max_tokens: 1`) may be quicker than any before it. Who finds no room waits
    for it as long as there is any time; what is only planned is no try.
Rule 4: how long others will wait and work is not known, so nobody is refused for who waits ahead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import inf

from ..contracts import OTHER_POST, Candidate, Candidates, Exchange, Live, Typical, Warmth

_PART = 0.5  # of what the quickest took
_STARTS = 3  # seen, before they say what a start takes at least
_RISK_PAUSE = 10.0  # s between two that are let through, for each backend and model
_COLD = Warmth.COLD


def needed(live: Live, exchange: Exchange, now: float) -> float:
    """Seconds, at `now` (monotonic s), below which an answer is not to be had; 0: not known."""
    work = exchange.work
    typical = live.typical.get(work) if work and work != OTHER_POST else None
    if typical is None:
        return 0.0
    quickest = typical.quickest
    if live.warmth is _COLD and now < live.warmth_until and len(live.cold_starts) >= _STARTS:
        quickest += live.cold_starts.quantile(0.0) or 0.0
    return _PART * quickest


def latest_start(exchange: Exchange, candidate: Candidate, now: float) -> float:
    """Until when the candidate might still answer in time; monotonic s."""
    return exchange.ends_on(candidate.backend) - needed(candidate.live, exchange, now)


def hopeful(
    exchange: Exchange,
    candidates: Candidates,
    now: float,
    *,
    totals: bool,
    claims: Collection[Typical] = (),
) -> Candidates:
    """Those that might still answer in time; where none might, those that may be risked now.

    `totals` says whether some backend limits the whole time of an exchange; `claims` are its own.
    """
    if not totals and _all_might(exchange, candidates, now):
        return candidates
    found = [c for c in candidates if now < latest_start(exchange, c, now)]
    return found or [c for c in candidates if _may_risk(exchange, c, now, claims)]


def _may_risk(
    exchange: Exchange, candidate: Candidate, now: float, claims: Collection[Typical]
) -> bool:
    typical = candidate.live.typical.get(exchange.work)
    if typical is None or now >= exchange.ends_on(candidate.backend):
        return False
    return now - typical.risked >= _RISK_PAUSE or any(each is typical for each in claims)


def note_risk(exchange: Exchange, candidate: Candidate, now: float) -> None:
    """An attempt begins: if it is one that is risked, it is the one of its time."""
    if now >= latest_start(exchange, candidate, now):
        candidate.live.typical[exchange.work].risked = now


def claim(exchange: Exchange, candidates: Candidates, now: float) -> list[Typical]:
    """Who waits for room to be risked is the only one, until it takes it or `give_back`."""
    claims = [candidate.live.typical[exchange.work] for candidate in candidates]
    for typical in claims:
        typical.risked = now
    return claims


def give_back(claims: Iterable[Typical]) -> None:
    for typical in claims:
        typical.risked = -inf


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
