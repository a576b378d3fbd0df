"""The one loop: plan, choose, open, judge; again or relay; always release and observe.

Every exchange leaves `run` in exactly one way: its answer was relayed to the end, an error was
raised for the client, or the client left and `CancelledError` passes through.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

from ..contracts import (
    OTHER_POST,
    End,
    Exchange,
    Fault,
    Live,
    Outcome,
    Verdict,
    canonical_model,
)
from ..errors import Limited, ModelNotFound, ProxyError, UpstreamError, told
from ..fleet.fleet import Fleet
from ..spending.budgets import Budgets
from ..wire.answer import Answer
from ..wire.dialects import RUNS_NOTHING
from ..wire.request import Source
from .attempt import Attempt, Wire
from .chain import Chain
from .chooser import Choice, Chooser, Run
from .follow import Follower
from .judge import Judgement, judge
from .queue import Queue

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_GOOD, _CLIENT_CLOSED, _LOADING = Verdict.GOOD, Fault.CLIENT_CLOSED, Fault.LOADING
_COMPLETE, _ERROR = End.COMPLETE, End.ERROR


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


class Pipeline:
    """Takes exchanges through the chain to a backend and back."""

    def __init__(
        self,
        fleet: Fleet,
        chain: Chain,
        wire: Wire,
        watcher: Watcher,
        budgets: Budgets | None = None,
    ) -> None:
        self.fleet = self._fleet = fleet
        self._chain = chain
        self._wire = wire
        self._watcher = watcher
        self.queue = self._queue = Queue(chain.queue, watcher.queue_depth)
        self._chooser = Chooser(fleet, chain, self._queue, budgets)
        self._expected_usd, self._pace = fleet.estimates.usd, fleet.estimates.pace

    def waiting(self, name: str) -> int:
        """How many exchanges wait for room that this backend would do for."""
        return self._queue.waiting(name)

    async def run(self, exchange: Exchange, source: Source, client: Client, run: Run) -> None:
        """Answer one exchange.

        Raises:
            ProxyError: there is no answer; what the client must be told.
        """
        for prepare in self._chain.prepares:
            prepare(exchange)
        model = canonical_model(exchange.model) if exchange.model else None
        if exchange.path not in RUNS_NOTHING:
            if exchange.inference:
                exchange.work = model or ""
            elif exchange.method == "POST":
                exchange.work = OTHER_POST
        fleet = self._fleet
        if model is not None and not fleet.knows(model) and not await fleet.finds(model):
            raise ModelNotFound(f"no backend serves the model {exchange.model!r}")
        tried: tuple[str, ...] = ()
        attempt: Attempt | None = None
        fallback: Attempt | None = None  # the last whole answer, were it an error, of a backend
        while True:
            try:
                choice = self._chooser.try_now(exchange, model, tried)
                if choice is None:
                    # That one is starting is no answer yet: it is worth a wait for another's room.
                    patient = fallback is None or fallback.last.fault is _LOADING
                    choice = await self._chooser.choose(
                        exchange, model, tried, run, patient=patient
                    )
            except ProxyError as exc:
                # That another attempt would cost too much is no answer to the one that was made.
                if attempt is None or (fallback is None and not isinstance(exc, Limited)):
                    raise
                break
            tried = (*tried, choice.candidate.backend.name)
            candidate = choice.candidate
            attempt = Attempt(self._wire, exchange, candidate, choice.provider, choice.hooks)
            attempt.expected_usd = self._expected_usd(
                candidate.backend, candidate.live, exchange.work, attempt.started
            )
            if candidate.backend.token_price is not None:
                attempt.pace = self._pace(candidate.live, exchange.work)
            try:
                delay = await self._try(exchange, source, client, model, tried, choice, attempt)
            except asyncio.CancelledError:
                # A client may close at the end marker, ahead of the last chunk: it has all.
                if exchange.attempts[-1].verdict is _GOOD:
                    run.end = _COMPLETE
                raise
            if delay is None:
                break
            answer = attempt.answer
            if answer is not None and answer.complete and _relayable(answer, attempt.last):
                fallback = attempt
            if delay > 0:
                run.waited += delay
                await asyncio.sleep(delay)
        self._conclude(exchange, client, run, attempt, fallback)

    async def _try(
        self,
        exchange: Exchange,
        source: Source,
        client: Client,
        model: str | None,
        tried: tuple[str, ...],
        choice: Choice,
        attempt: Attempt,
    ) -> float | None:
        """Make one attempt, and relay its answer unless another backend is to be tried.

        Returns the seconds to wait before the next attempt, None when there is none.
        """
        live = choice.candidate.live
        judgement = _LEFT
        cancelled = True
        live.in_flight += 1
        live.occupied -= attempt.started
        live.picked += 1
        try:
            lone = not (choice.spare and exchange.may_repeat)
            await attempt.open(source, lone=lone)
            delay = None
            if choice.hooks.hop is not None:
                leave = partial(self._leave, exchange, model, tried, choice, attempt)
                delay = await Follower(attempt, source, lone, leave).run(choice.hooks.hop)
            judgement = attempt.last = self._judge(exchange, choice, attempt)
            if judgement.lacks_model and model is not None:
                if live.models is None:
                    self._fleet.lacks(live, model)
                else:
                    self._fleet.ask_soon(choice.candidate)
            good = judgement.verdict is _GOOD
            if not good and delay is None:
                delay = self._next(exchange, model, tried, attempt, judgement)
            answer = attempt.answer
            if delay is None and answer is not None and (good or _relayable(answer, judgement)):
                client.commit(attempt, attempt.number)
                while not answer.ended:
                    await answer.next_step()
            cancelled = False
            return delay
        finally:
            attempt.close()
            live.in_flight -= 1
            for permit in choice.permits:
                permit.release()
            self._record(exchange, attempt.outcome(judgement, cancelled=cancelled), live)
            self._queue.released(choice.candidate.backend.name)
            if self._fleet.leaving:
                self._fleet.sweep()

    def _judge(self, exchange: Exchange, choice: Choice, attempt: Attempt) -> Judgement:
        if attempt.error is not None or attempt.answer is None:
            return attempt.judgement_of_error()
        return judge(exchange, choice.candidate, choice.provider, attempt.answer)

    def _leave(
        self,
        exchange: Exchange,
        model: str | None,
        tried: tuple[str, ...],
        choice: Choice,
        attempt: Attempt,
    ) -> float | None:
        """Seconds until an attempt at a warm candidate instead; None: there shall be none."""
        if not self._chooser.warm_elsewhere(exchange, model, tried):
            return None
        judgement = self._judge(exchange, choice, attempt)
        return self._next(exchange, model, tried, attempt, judgement)

    def _next(
        self,
        exchange: Exchange,
        model: str | None,
        tried: tuple[str, ...],
        attempt: Attempt,
        judgement: Judgement,
    ) -> float | None:
        """Seconds until another attempt, by the retry rules; None: no other attempt."""
        outcome = attempt.outcome(judgement, cancelled=False)
        if not outcome.repeatable:
            return None
        exchange.attempts.append(outcome)
        try:
            return self._granted(exchange, model, tried, outcome)
        finally:
            exchange.attempts.pop()

    def _granted(
        self, exchange: Exchange, model: str | None, tried: tuple[str, ...], outcome: Outcome
    ) -> float | None:
        try:
            left = self._chooser.plan(exchange, model, tried)
        except Limited:
            return None
        if not left:
            return None
        exchange.spare = sum(not candidate.last_resort for candidate in left)
        delays = [retry(exchange, outcome) for retry in self._chain.retries]
        granted = [delay for delay in delays if delay is not None]
        # Each rule may stop it; the longest wait that one of them asks for holds.
        return max(granted) if granted and len(granted) == len(delays) else None

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
            run.end = _ERROR
            if attempt.error is not None and not isinstance(attempt.error, UpstreamError):
                raise attempt.take_error()  # the client's own request was at fault
            if fallback is None or attempt.accepted:  # what another said is no word on that work
                raise self._error_of(exchange, attempt)
            client.commit(fallback, len(exchange.attempts))
            return
        good = exchange.attempts[-1].fault is None and (answer.status or 0) < 400
        run.end = _COMPLETE if good else _ERROR
        if answer.fault is _CLIENT_CLOSED:
            run.end = End.CLIENT_CLOSED

    def _error_of(self, exchange: Exchange, attempt: Attempt) -> ProxyError:
        if attempt.candidate.last_resort:
            return self._chooser.nobody(exchange)
        if attempt.error is not None:
            return attempt.take_error()
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
                self._watcher.notify("observe.failed", error=told(exc))


_SAYS_NOTHING = (Fault.EMPTY, Fault.NOT_JSON)
_LEFT = Judgement(Verdict.NEUTRAL, _CLIENT_CLOSED)


def _relayable(answer: Answer, judgement: Judgement) -> bool:
    """Whether there is something of the backend's own to show: its answer, or a beginning of it."""
    if answer.status is None:
        return False
    if answer.fault is None:
        # A document that is none says nothing a client could use, and looks like an answer.
        return answer.watch is not None or judgement.fault not in _SAYS_NOTHING
    if answer.watch is not None:
        return answer.watch.content
    return not answer.inference and answer.held_size > 0
