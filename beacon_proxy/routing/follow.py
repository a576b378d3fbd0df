"""Answers that say where, or when, the real one is to be had.

To a client it is all one wait, so the limits count from the first request.

Rule 1: once it is known where the result will be, the work has been taken, and is paid for. From
there on the result alone is asked for, here alone: another backend would do the same work a second
time. Only a result that says itself that it failed leaves the request to others.
Rule 2: the request itself is sent again only to a backend that is still one of the fleet. A result
is asked for where the work was left, though it has left since: that exchange is still under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from ..contracts import WARMING_TIME, Backend, Fault, Headers, Hop, Stage, Warmth
from ..errors import ProxyError, UpstreamError
from ..wire.request import Source, is_target

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
        "_leave",
        "_lone",
        "_source",
        "_status",
    )

    def __init__(
        self, attempt: Attempt, source: Source, lone: bool, leave: Callable[[], float | None]
    ) -> None:
        """`leave`: s until an attempt at a candidate that need not start first; None: there is
        none with room, or the retry rules do not grant it. What is granted must be used.
        """
        self._attempt = attempt
        self._source = source
        self._lone = lone
        self._leave = leave
        answer = attempt.answer
        self._first = answer.sent_at if answer is not None else attempt.started
        self._asked: bytes | None = None  # the result's address, once it is known
        self._broken = self._hops = self._status = 0

    async def run(self, ask_hop: AskHop) -> float | None:
        """Return when the attempt's answer is one that counts, or there is none in time.

        Returns what `leave` granted, where the attempt is given up for that; else None.
        """
        attempt, granted, hops = self._attempt, None, 0
        while (hop := self._next(ask_hop)) is not None:
            if hop.target is None and not hop.starting:
                if hops or not attempt.may_ask_again:
                    break  # a way that was found is found once
                hops += 1
                attempt.let_go()
                await attempt.open(self._source, lone=self._lone)
                continue
            if hop.target is None:
                if not self._may_ask_again():
                    break
                granted = self._leave()
                if granted is not None:
                    break
            elif not self._knows_result(hop.target):
                break
            attempt.patience = attempt.backend.cold_timeouts or attempt.backend.timeouts
            again = hop.target is None
            if hops == HOPS_MOST or monotonic() + hop.delay >= self._ends(again):
                if not again:
                    self._fail(self._late(), "")
                break
            hops += 1
            attempt.let_go()
            if hop.delay > 0:
                await asyncio.sleep(hop.delay)
            if again and not self._stays:
                self._fail(Fault.LOADING, "the backend left the fleet while it was starting")
                break
            await self._take(hop)
        self._tell()
        return granted

    @property
    def _stays(self) -> bool:
        """Whether the backend is still one of the fleet."""
        return self._attempt.wire.pool.keeps(self._attempt.backend)

    def _may_ask_again(self) -> bool:
        """Note that the backend is starting. Whether the request may be sent there once more."""
        attempt = self._attempt
        if self._asked is not None:
            return False  # the work is done: this is how it ended
        attempt.candidate.live.learn_warmth(Warmth.WARMING, monotonic() + WARMING_TIME)
        attempt.note_start(certain=True)
        return attempt.may_ask_again and self._stays

    def _knows_result(self, target: bytes) -> bool:
        """Note where the result will be; False where nobody can ask there."""
        if not is_target(target):
            self._fail(Fault.MALFORMED, "the result's address is none that can be asked for")
            return False
        self._asked = target
        self._attempt.note_start(certain=False)
        self._attempt.accepted = self._lone = True  # so half of the time need not be left to others
        return True

    def _fail(self, fault: Fault, detail: str) -> None:
        """The answer at hand is none for the client, and there will be no other."""
        self._attempt.let_go()
        self._attempt.error = UpstreamError(fault, Stage.HEAD, detail, sent=True)

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
        upload, upgrade = source.upload, source.upgrade
        try:
            if hop.target is None:
                outgoing = source.outgoing(candidate, provider, fields_of)
            else:
                outgoing = source.following(candidate, provider, fields_of, hop.target)
                upload, upgrade = None, False
        except ProxyError as exc:
            attempt.error = exc.with_traceback(None)
            return
        await attempt.ask(outgoing, upload, upgrade, self._lone, self._first)

    def _ends(self, again: bool) -> float:
        """When hopping must be over: an answer that says no more than `later` stands then."""
        attempt = self._attempt
        exchange, limits = attempt.exchange, attempt.patience
        whole = exchange.inference and not exchange.stream and not again
        limit = limits.document if whole else limits.first_content
        own = self._first + limit if limit else inf
        return min(exchange.ends_on(attempt.backend), attempt.answer_by(self._lone), own)

    def _late(self) -> Fault:
        attempt = self._attempt
        over = monotonic() >= attempt.exchange.ends_on(attempt.backend)
        return Fault.DEADLINE if over else Fault.TIMEOUT

    def _tell(self) -> None:
        """Say of a result that never came what a client can use: nobody else is asked."""
        attempt = self._attempt
        error, answer = attempt.error, attempt.answer
        if self._asked is None or (answer is not None and answer.status is not None):
            return
        if isinstance(error, UpstreamError):
            fault, stage, detail = error.fault, error.stage, error.message
        elif error is None and answer is not None and answer.fault is not None:
            fault, stage, detail = answer.fault, answer.stage, answer.detail
        else:
            return
        late = fault in (Fault.TIMEOUT, Fault.DEADLINE)
        words = "did not come in time" if late else f"could not be had: {detail}"
        detail = f"the backend took the request, but the result {words}"
        attempt.error = UpstreamError(fault, stage, detail, sent=True)
