"""Answers that say where, or when, the real one is to be had.

To a client it is all one wait, so the limits count from the first request. What is being computed
behind a result's address is asked for again where a connection breaks: another backend would do
the same paid work a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from ..contracts import Backend, Fault, Headers, Hop, Stage, Warmth
from ..errors import UpstreamError
from ..fleet.fleet import WARMING_TIME
from ..wire.request import Source

if TYPE_CHECKING:
    from .attempt import Attempt

HOPS_MOST = 1000  # of one attempt; the limits of time end it sooner
BROKEN_MOST = 3  # connections in a row that break while a result is waited for
BROKEN_PAUSE = 0.1  # s, times four for each break in a row

AskHop = Callable[[Backend, int, Headers, bytes, bytes, int], Hop | None]


class Follower:
    """Takes an attempt from an answer that is none yet to one that counts."""

    __slots__ = (
        "_asked",
        "_attempt",
        "_broken",
        "_first",
        "_hops",
        "_lone",
        "_source",
        "_status",
        "_warm_elsewhere",
    )

    def __init__(
        self, attempt: Attempt, source: Source, lone: bool, warm_elsewhere: Callable[[], bool]
    ) -> None:
        """`warm_elsewhere`: another candidate stands ready that need not start first."""
        self._attempt = attempt
        self._source = source
        self._lone = lone
        self._warm_elsewhere = warm_elsewhere
        answer = attempt.answer
        self._first = answer.sent_at if answer is not None else attempt.started
        self._asked: bytes | None = None  # the result's address, once it is known
        self._broken = self._hops = self._status = 0

    async def run(self, ask_hop: AskHop) -> None:
        """Return when the attempt's answer is one that counts, or there is none in time."""
        attempt = self._attempt
        for _ in range(HOPS_MOST):
            hop = self._next(ask_hop)
            if hop is None:
                return
            again = hop.target is None
            if again:
                attempt.candidate.live.learn_warmth(Warmth.WARMING, monotonic() + WARMING_TIME)
                if not attempt.may_ask_again or self._warm_elsewhere():
                    return
            attempt.patience = attempt.backend.cold_timeouts or attempt.backend.timeouts
            if monotonic() + hop.delay >= self._ends(again):
                if not again:
                    attempt.let_go()
                    attempt.error = self._out_of_time()
                return
            attempt.let_go()
            if hop.delay > 0:
                await asyncio.sleep(hop.delay)
            await self._take(hop)

    def _next(self, ask_hop: AskHop) -> Hop | None:
        """What is to be done before the answer counts; None: nothing, it does."""
        attempt = self._attempt
        answer = attempt.answer
        if attempt.error is not None or answer is None or answer.fault is not None:
            return self._after_break()
        self._broken = 0
        head = answer.head
        if head is None or head.status < 300:
            return None
        self._hops = self._hops + 1 if head.status == self._status else 0
        self._status = head.status
        target = self._asked or attempt.exchange.target
        body = answer.body()
        return ask_hop(attempt.backend, head.status, head.headers, body, target, self._hops)

    def _after_break(self) -> Hop | None:
        """The connection under the wait for a result broke: the result is still being made."""
        attempt, answer = self._attempt, self._attempt.answer
        cut = attempt.error is not None or (answer is not None and answer.cut_short)
        if self._asked is None or not cut or self._broken == BROKEN_MOST:
            return None
        self._broken += 1
        return Hop(self._asked, BROKEN_PAUSE * 4**self._broken)

    async def _take(self, hop: Hop) -> None:
        attempt, source = self._attempt, self._source
        attempt.error = None
        candidate, provider, fields_of = attempt.candidate, attempt.provider, attempt.hooks.fields
        if hop.target is None:
            outgoing = source.outgoing(candidate, provider, fields_of)
            await attempt.ask(outgoing, source.upload, False, self._lone, self._first)
        else:
            self._asked = hop.target
            outgoing = source.following(candidate, provider, fields_of, hop.target)
            await attempt.ask(outgoing, None, False, self._lone, self._first)

    def _ends(self, again: bool) -> float:
        """When hopping must be over: an answer that says no more than `later` stands then."""
        attempt = self._attempt
        exchange, limits = attempt.exchange, attempt.patience
        whole = exchange.inference and not exchange.stream and not again
        limit = limits.document if whole else limits.first_content
        own = self._first + limit if limit else inf
        return min(exchange.ends_on(attempt.backend), attempt.answer_by(self._lone), own)

    def _out_of_time(self) -> UpstreamError:
        """A result that is not there in time: its address is no answer for the client."""
        attempt = self._attempt
        over = monotonic() >= attempt.exchange.ends_on(attempt.backend)
        fault = Fault.DEADLINE if over else Fault.TIMEOUT
        return UpstreamError(fault, Stage.HEAD, "the result did not come in time", sent=True)
