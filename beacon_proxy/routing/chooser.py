"""Plan and choose: the best candidate that lets the exchange in, now or after a bounded wait."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from time import monotonic

from ..contracts import (
    NO_SLOT,
    Candidate,
    Candidates,
    End,
    Exchange,
    Fault,
    Permit,
    Provider,
    Stage,
    Typical,
    Warmth,
    canonical_model,
)
from ..errors import Limited, NoBackend, Overloaded, UpstreamError
from ..fleet.fleet import Fleet
from ..fleet.hooks import Hooks
from ..spending.budgets import Budgets
from .chain import Chain
from .hopeless import claim, give_back, hopeful, latest_start, note_risk
from .queue import Place, Queue


@dataclass(slots=True)
class Choice:
    """Who is asked next, and the slots taken for it."""

    candidate: Candidate
    provider: Provider
    hooks: Hooks
    permits: list[Permit]  # to be released, each once
    spare: bool  # whether another candidate stands ready


@dataclass(slots=True)
class Run:
    """What one exchange leaves behind for its log line."""

    end: End | None = None  # set by who ends the exchange
    reason: str | None = None  # of an error that no attempt tells
    queued: float = 0.0  # s, waiting for room
    waited: float = 0.0  # s, backing off between attempts


class Chooser:
    """Asks the select and admit phases, and keeps the queue."""

    def __init__(
        self, fleet: Fleet, chain: Chain, queue: Queue, budgets: Budgets | None = None
    ) -> None:
        """Without `budgets` only a client's own price limit holds."""
        self._fleet = fleet
        self._chain = chain
        self._queue = queue
        self._budgets = budgets or Budgets((), fleet.estimates.usd, clock=fleet.now)

    def plan(self, exchange: Exchange, model: str | None, tried: Collection[str]) -> Candidates:
        """Candidates for the next attempt, best first, over the live state of this moment.

        Raises:
            Limited: none is expected to stay within every budget and price limit.
        """
        candidates: Candidates = self._fleet.serving(model, tried)
        if self._fleet.choosy:
            candidates = self._fleet.taking(exchange, candidates)
        serving = candidates
        for select in self._chain.selects:
            candidates = select(exchange, candidates)
        if self._budgets.bounded or exchange.max_price is not None:
            return self._within(exchange, candidates, serving)
        return candidates

    def _within(self, exchange: Exchange, plan: Candidates, serving: Candidates) -> Candidates:
        """What of a plan fits into every budget and limit.

        Money comes last, for it says nothing about who is well: that a healthy one is too dear is
        no reason to ask a dead one.
        """
        fitting, refused = self._budgets.part(exchange, plan)
        if not refused:
            return plan
        ready = [each for each in refused if not each.candidate.last_resort]
        if fitting and not (ready and all(each.last_resort for each in fitting)):
            return fitting
        soon = self._ready_again(exchange, serving)
        raise self._budgets.limited(exchange, ready or refused, soon)

    def _ready_again(self, exchange: Exchange, serving: Candidates) -> float:
        """Seconds until one that may be asked, but is not well now, and fits, may be ready."""
        now, where = self._fleet.now(), exchange.region
        if exchange.region_mode == "require" and where:
            serving = [
                c for c in serving if c.backend.region == where and not c.backend.region_assumed
            ]
        fitting, _ = self._budgets.part(exchange, serving)
        waits = [max(c.live.ejected_until, c.live.resting_until) - now for c in fitting]
        return min((max(wait, 1.0) for wait in waits if wait > 0), default=inf)

    def try_now(
        self, exchange: Exchange, model: str | None, tried: Collection[str]
    ) -> Choice | None:
        """The first candidate that every admit lets in; None where all are full.

        Raises:
            Limited, NoBackend: as `plan`, and where it is empty.
            UpstreamError: its time is over.
        """
        now = monotonic()
        return self._admit(exchange, self._plan_in_time(exchange, model, tried, now), None, now)

    async def choose(
        self,
        exchange: Exchange,
        model: str | None,
        tried: Collection[str],
        run: Run,
        *,
        patient: bool,
    ) -> Choice:
        """As `try_now`, but waits in the queue where all are full, if `patient`.

        Raises:
            Overloaded: there was no room in time, or none in the queue.
        """
        place: Place | None = None
        claims: list[Typical] = []  # of one that is let through although it is held to be hopeless
        joined = now = monotonic()
        until = joined + self._queue.limits.timeout
        try:
            while True:
                try:
                    plan = self._plan_in_time(exchange, model, tried, now, claims)
                except NoBackend:
                    if place is not None:
                        self._queue.lost(place)
                    raise
                choice = self._admit(exchange, plan, place, now)
                if place is not None:
                    self._queue.tried(place, choice.candidate.backend.name if choice else None)
                if choice is not None:
                    claims = []
                    return choice
                if now >= until or not patient:
                    raise self._overloaded("every backend is full")
                wants = frozenset(candidate.backend.name for candidate in plan)
                if place is not None:
                    self._queue.want(place, wants)
                elif self._queue.has_place(exchange.tenant):
                    place = self._queue.join(wants, exchange.tenant)
                else:
                    raise self._overloaded("every backend is full, and so is the queue")
                end = max(latest_start(exchange, c, now) for c in plan)
                if end <= now:
                    claims = claims or claim(exchange, plan, now)
                    end = max(exchange.ends_on(c.backend) for c in plan)
                await self._queue.wait(place, min(until, end) - now)
                if place.displaced:
                    raise self._overloaded(
                        "every backend is full, and so is its share of the queue"
                    )
                now = monotonic()
        finally:
            give_back(claims)
            if place is not None:
                run.queued += monotonic() - joined
                self._queue.leave(place)

    def _overloaded(self, message: str) -> Overloaded:
        return Overloaded(message, retry_after=self._queue.retry_after())

    def _plan_in_time(
        self,
        exchange: Exchange,
        model: str | None,
        tried: Collection[str],
        now: float,
        claims: Collection[Typical] = (),
    ) -> Candidates:
        """The plan, less who can no longer answer before the exchange must be over; never empty."""
        if exchange.deadline is not None and now >= exchange.deadline:
            raise UpstreamError(Fault.DEADLINE, Stage.QUEUE, "the deadline ran out")
        plan = self.plan(exchange, model, tried)
        if not plan:
            raise self.nobody(exchange)
        totals = self._fleet.has_totals
        if totals or exchange.deadline is not None:
            plan = hopeful(exchange, plan, now, totals=totals, claims=claims)
            if not plan:
                detail = "too little time is left for any backend"
                raise UpstreamError(Fault.DEADLINE, Stage.QUEUE, detail)
        return plan

    def _admit(
        self, exchange: Exchange, plan: Candidates, place: Place | None, now: float
    ) -> Choice | None:
        queue, admits = self._queue, self._chain.admits
        for candidate in plan:
            backend = candidate.backend
            if queue.owed and queue.promised(backend.name, place):
                continue
            permits: list[Permit] = []
            for admit in admits:
                try:
                    permit = admit(exchange, backend)
                except BaseException:  # a plugin's fault must not cost the slots taken before it
                    _release(permits)
                    raise
                if permit is None:
                    break
                if permit is not NO_SLOT:
                    permits.append(permit)
            else:
                if place is None and queue.places and queue.yields(backend.name):
                    _release(permits)
                    continue
                spare = False
                for other in plan:
                    if not other.last_resort and other is not candidate:
                        spare = True
                        break
                fleet, name = self._fleet, backend.provider
                if exchange.deadline is not None or fleet.has_totals:
                    note_risk(exchange, candidate, now)
                return Choice(candidate, fleet.providers[name], fleet.hooks[name], permits, spare)
            _release(permits)
        return None

    def warm_elsewhere(self, exchange: Exchange, model: str | None, tried: Collection[str]) -> bool:
        """Whether another candidate has room and need not start first, as far as is known."""
        now = self._fleet.now()
        try:
            plan = self.plan(exchange, model, tried)
        except Limited:
            return False
        for candidate in plan:
            backend, live = candidate.backend, candidate.live
            if candidate.last_resort or live.in_flight >= backend.max_in_flight:
                continue
            warmth = live.warmth_at(now)
            if warmth is Warmth.WARM:
                return True
            if warmth is Warmth.UNKNOWN and backend.cold_timeouts is None:
                return True
        return False

    def nobody(self, exchange: Exchange) -> NoBackend:
        """What to tell a client that no backend can be asked for."""
        now = self._fleet.now()
        waits = [
            max(candidate.live.ejected_until, candidate.live.resting_until) - now
            for candidate in self._fleet.candidates()
        ]
        wait = min((wait for wait in waits if wait > 0), default=5.0)
        return NoBackend(self._why_nobody(exchange), retry_after=min(max(wait, 1.0), 60.0))

    def _why_nobody(self, exchange: Exchange) -> str:
        """Health is the usual reason, but not where nobody would ever do."""
        where = f" in region {exchange.region}" if exchange.region else ""
        fleet = self._fleet
        if not fleet.rows and fleet.unasked:
            return "no backend is known yet: discovery has not answered"
        model = canonical_model(exchange.model) if exchange.model else None
        serving: Candidates = fleet.serving(model, ())
        if fleet.choosy and serving:
            serving = fleet.taking(exchange, serving)
            if not serving:
                return f"no backend takes {exchange.method} {exchange.path[:64]}"
        if exchange.region_mode == "require" and exchange.region:
            there = [c for c in serving if c.backend.region == exchange.region]
            if not there:
                what = f" that serves the model {exchange.model!r}" if model else ""
                return f"no backend{where}{what}"
        return f"no healthy backend{where}"


def _release(permits: list[Permit]) -> None:
    for permit in permits:
        permit.release()
