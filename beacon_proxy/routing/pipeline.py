"""The one loop: plan, choose, open, judge; again or relay; always release and observe.

Every exchange leaves `run` in exactly one way: its answer was relayed to the end, an error was
raised for the client, or the client left and `CancelledError` passes through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from ..contracts import (
    Backend,
    Candidate,
    Candidates,
    End,
    Exchange,
    Fault,
    Live,
    Outcome,
    Permit,
    Provider,
    QueueLimits,
    Stage,
    Verdict,
    canonical_model,
)
from ..errors import Limited, ModelNotFound, NoBackend, Overloaded, ProxyError, UpstreamError
from ..wire.answer import Answer
from ..wire.request import Source
from .attempt import Attempt, Wire
from .fleet import Fleet
from .judge import Judgement, judge
from .queue import Place, Queue

SelectPhase = Callable[[Exchange, Candidates], Candidates]
AdmitPhase = Callable[[Exchange, Backend], Permit | None]
RetryPhase = Callable[[Exchange, Outcome], float | None]
ObservePhase = Callable[[Exchange, Outcome], None]


@dataclass(frozen=True, slots=True)
class Chain:
    """The phases of all middlewares, sorted once into tuples of bound methods."""

    selects: tuple[SelectPhase, ...]
    admits: tuple[AdmitPhase, ...]
    retries: tuple[RetryPhase, ...]
    observers: tuple[ObservePhase, ...]
    lifespans: tuple[Any, ...]
    queue: QueueLimits

    @classmethod
    def of(cls, middlewares: Iterable[object]) -> Chain:
        """Sort middlewares, in the order of the chain."""
        things = tuple(middlewares)

        def phase(name: str) -> tuple[Any, ...]:
            return tuple(getattr(thing, name) for thing in things if hasattr(thing, name))

        rules = phase("queue")
        return cls(
            phase("select"),
            phase("admit"),
            phase("retry"),
            phase("observe"),
            phase("lifespan"),
            rules[0]() if rules else QueueLimits(0, 0.0),
        )


class Client(Protocol):
    """The server's side of an exchange."""

    def commit(self, attempt: Attempt, attempts: int) -> None:
        """Send the attempt's answer on: what is held now, every further piece as it comes."""
        ...


class Watcher(Protocol):
    """Who records attempts beside the middlewares: telemetry."""

    def attempt(self, exchange: Exchange, outcome: Outcome) -> None: ...

    def notify(self, event: str, /, **fields: Any) -> None: ...

    def queue_depth(self, depth: int) -> None: ...


@dataclass(slots=True)
class Run:
    """What one exchange leaves behind for its log line."""

    end: End = End.CLIENT_CLOSED
    queued: float = 0.0  # s, waiting for room
    waited: float = 0.0  # s, backing off between attempts


class Pipeline:
    """Takes exchanges through the chain to a backend and back."""

    def __init__(self, fleet: Fleet, chain: Chain, wire: Wire, watcher: Watcher) -> None:
        self._fleet = fleet
        self._chain = chain
        self._wire = wire
        self._watcher = watcher
        self._queue = Queue(chain.queue, watcher.queue_depth)

    async def run(self, exchange: Exchange, source: Source, client: Client, run: Run) -> None:
        """Answer one exchange.

        Raises:
            ProxyError: there is no answer; what the client must be told.
        """
        model = canonical_model(exchange.model) if exchange.model else None
        if model is not None and not self._fleet.knows(model):
            raise ModelNotFound(f"no backend serves the model {exchange.model!r}")
        tried: set[str] = set()
        attempt: Attempt | None = None
        fallback: Attempt | None = None  # the last whole answer, were it an error, of a backend
        while True:
            try:
                chosen = await self._choose(exchange, model, tried, run)
            except ProxyError:
                if fallback is None or attempt is None:
                    raise
                self._conclude(exchange, client, run, attempt, fallback)
                return
            tried.add(chosen.candidate.backend.name)
            attempt = Attempt(self._wire, exchange, chosen.candidate, chosen.provider)
            delay = await self._try(exchange, source, client, chosen, attempt, model, tried)
            if delay is None:
                self._conclude(exchange, client, run, attempt, fallback)
                return
            if attempt.answer is not None and attempt.answer.complete:
                fallback = attempt
            if delay > 0:
                run.waited += delay
                await asyncio.sleep(delay)

    async def _try(
        self,
        exchange: Exchange,
        source: Source,
        client: Client,
        chosen: _Choice,
        attempt: Attempt,
        model: str | None,
        tried: set[str],
    ) -> float | None:
        """Make one attempt, and relay its answer unless another backend is to be tried.

        Returns the seconds to wait before the next attempt, None when there is none.
        """
        judgement = _LEFT
        cancelled = True
        live = chosen.candidate.live
        live.in_flight += 1
        live.picked += 1
        try:
            await attempt.open(source, lone=chosen.spare == 0 or not _may_repeat(exchange))
            judgement = attempt.last = self._judge(exchange, chosen, attempt)
            delay = None
            if judgement.verdict is not Verdict.GOOD:
                exchange.attempts.append(attempt.outcome(judgement, cancelled=False))
                delay = self._next(exchange, model, tried)
                exchange.attempts.pop()
            if delay is None and _relayable(attempt.answer, judgement):
                client.commit(attempt, attempt.number)
                assert attempt.answer is not None
                await attempt.answer.wait_ended()
            cancelled = False
            return delay
        finally:
            attempt.close()
            live.in_flight -= 1
            for permit in chosen.permits:
                permit.release()
            self._record(exchange, attempt.outcome(judgement, cancelled=cancelled), live)
            self._queue.released(chosen.candidate.backend.name)

    def _judge(self, exchange: Exchange, chosen: _Choice, attempt: Attempt) -> Judgement:
        if attempt.error is not None or attempt.answer is None:
            return attempt.judgement_of_error()
        return judge(exchange, attempt.backend, chosen.provider, attempt.answer)

    def _next(self, exchange: Exchange, model: str | None, tried: set[str]) -> float | None:
        """Seconds until another attempt, by the retry rules; None: no other attempt."""
        outcome = exchange.attempts[-1]
        if not outcome.repeatable:
            return None
        left = self._plan(exchange, model, tried)
        if not left:
            return None
        exchange.spare = sum(not candidate.last_resort for candidate in left)
        for retry in self._chain.retries:
            delay = retry(exchange, outcome)
            if delay is None:
                return None
            return delay
        return None

    def _conclude(
        self,
        exchange: Exchange,
        client: Client,
        run: Run,
        attempt: Attempt,
        fallback: Attempt | None,
    ) -> None:
        """Set the end of the exchange, where no further attempt is made."""
        answer = attempt.answer
        if answer is None or not answer.committed:
            run.end = End.ERROR
            if isinstance(attempt.error, ProxyError) and not isinstance(
                attempt.error, UpstreamError
            ):
                raise attempt.error  # the client's own request was at fault
            if fallback is None:
                raise self._error_of(attempt)
            client.commit(fallback, len(exchange.attempts))
            return
        good = exchange.attempts[-1].fault is None and (answer.status or 0) < 400
        run.end = End.COMPLETE if good else End.ERROR
        if answer.fault is Fault.CLIENT_CLOSED:
            run.end = End.CLIENT_CLOSED

    def _error_of(self, attempt: Attempt) -> ProxyError:
        if attempt.candidate.last_resort:
            wait = attempt.candidate.live.ejected_until - self._fleet.now()
            return NoBackend("no healthy backend", retry_after=min(max(wait, 1.0), 60.0))
        if attempt.error is not None:
            return attempt.error
        answer = attempt.answer
        assert answer is not None
        last = attempt.last
        fault = answer.fault or last.fault or Fault.CLOSED
        return UpstreamError(fault, answer.stage, answer.detail or last.detail, sent=attempt.sent)

    def _record(self, exchange: Exchange, outcome: Outcome, live: Live) -> None:
        exchange.attempts.append(outcome)
        self._fleet.note(exchange, outcome, live)
        self._watcher.attempt(exchange, outcome)
        for observe in self._chain.observers:
            try:
                observe(exchange, outcome)
            except Exception as exc:  # a plugin's fault must not cost the client its answer
                self._watcher.notify("observe.failed", error=repr(exc)[:200])

    # -- plan and choose -------------------------------------------------------------------------

    def _plan(self, exchange: Exchange, model: str | None, tried: set[str]) -> Candidates:
        candidates: Candidates = self._fleet.serving(model, tried)
        if exchange.max_price is not None:
            candidates = [c for c in candidates if _estimate(c) <= exchange.max_price]
            if not candidates and not tried:
                raise Limited("no backend is expected to answer within X-Beacon-Max-Price")
        for select in self._chain.selects:
            candidates = select(exchange, candidates)
        return candidates

    async def _choose(
        self, exchange: Exchange, model: str | None, tried: set[str], run: Run
    ) -> _Choice:
        """The first candidate that every admit lets in; waits in the queue where all are full."""
        place: Place | None = None
        joined = now = monotonic()
        until = joined + self._queue.limits.timeout
        try:
            while True:
                if exchange.deadline is not None and now >= exchange.deadline:
                    raise UpstreamError(Fault.DEADLINE, Stage.QUEUE, "the deadline ran out")
                plan = self._plan(exchange, model, tried)
                if not plan:
                    raise self._nobody(exchange)
                choice = self._admit(exchange, plan, place)
                if choice is not None:
                    return choice
                if now >= until or (place is None and self._queue.full):
                    raise Overloaded("every backend is full", retry_after=1.0)
                wants = frozenset(candidate.backend.name for candidate in plan)
                if place is None:
                    place = self._queue.join(wants)
                else:
                    self._queue.want(place, wants)
                end = until if exchange.deadline is None else min(until, exchange.deadline)
                await self._queue.wait(place, end - now)
                now = monotonic()
        finally:
            if place is not None:
                run.queued += monotonic() - joined
                self._queue.leave(place)

    def _admit(self, exchange: Exchange, plan: Candidates, place: Place | None) -> _Choice | None:
        for candidate in plan:
            backend = candidate.backend
            if self._queue.wanted(backend.name, place):
                continue  # someone came first
            permits: list[Permit] = []
            for admit in self._chain.admits:
                permit = admit(exchange, backend)
                if permit is None:
                    break
                permits.append(permit)
            else:
                spare = sum(not other.last_resort for other in plan) - (not candidate.last_resort)
                provider = self._fleet.providers[backend.provider]
                return _Choice(candidate, provider, tuple(permits), spare)
            for permit in permits:
                permit.release()
        return None

    def _nobody(self, exchange: Exchange) -> NoBackend:
        where = f" in region {exchange.region}" if exchange.region else ""
        now = self._fleet.now()
        waits = [
            max(candidate.live.ejected_until, candidate.live.resting_until) - now
            for candidate in self._fleet.candidates()
        ]
        wait = min((wait for wait in waits if wait > 0), default=5.0)
        return NoBackend(f"no healthy backend{where}", retry_after=min(max(wait, 1.0), 60.0))


@dataclass(frozen=True, slots=True)
class _Choice:
    candidate: Candidate
    provider: Provider
    permits: tuple[Permit, ...]
    spare: int  # other candidates that stand ready


_LEFT = Judgement(Verdict.NEUTRAL, Fault.CLIENT_CLOSED)


def _estimate(candidate: Candidate) -> float:
    """USD an attempt is expected to cost, by what attempts at this backend took so far."""
    return candidate.backend.price_per_second * candidate.live.duration


def _may_repeat(exchange: Exchange) -> bool:
    return exchange.inference or exchange.idempotent


def _relayable(answer: Answer | None, judgement: Judgement) -> bool:
    """Whether there is something of the backend's own to show: its answer, or a beginning of it."""
    if answer is None or answer.status is None:
        return False
    if answer.fault is None:
        # A document that is none says nothing a client could use, and looks like an answer.
        return answer.watch is not None or judgement.fault not in (Fault.EMPTY, Fault.NOT_JSON)
    if answer.watch is not None:
        return answer.watch.content
    return not answer.expect.inference and answer.held_size > 0
