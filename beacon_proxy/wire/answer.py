"""One backend's answer: held until it can be judged, then relayed piece by piece.

State chart (`stage`): HEAD -> CONTENT -> [committed: STREAM] -> DONE, or a `fault` at any point.

Rule 1: nothing reaches the client before `commit`. Until then an attempt can still be given up.
Rule 2: how long an answer is held depends on what it is (`Hold`). An answer that nobody could
replace is passed on `GRACE` seconds after its head: holding it would only hide what it says.
Rule 3: after `commit` pieces go from the parser's callback into the sink; no coroutine sees them.
Rule 4: exactly one of `on_complete` and `fail` ends it, once.
"""

from __future__ import annotations

import asyncio
from math import inf
from time import monotonic
from typing import Protocol

from ..contracts import Fault, Headers, Stage, Timeouts
from .dialects import Shape, error_event
from .expect import GRACE, HOLD_CAP, Framing, Hold, hold_for
from .headers import AnswerHead
from .usage import NOTHING, Ends, Told, guess_output, told_by
from .watch import Watch

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_HOLD_BYTE, _HOLD_CONTENT, _HOLD_WHOLE = Hold.BYTE, Hold.CONTENT, Hold.WHOLE
_STAGE_SEND, _STAGE_HEAD, _STAGE_CONTENT = Stage.SEND, Stage.HEAD, Stage.CONTENT
_STAGE_STREAM, _STAGE_DONE = Stage.STREAM, Stage.DONE
_CLOSED, _RESET = Fault.CLOSED, Fault.RESET
_FRAMING_NONE, _FRAMING_TUNNEL = Framing.NONE, Framing.TUNNEL


class Sink(Protocol):
    """Where a committed answer goes."""

    def start(self, answer: Answer, added: bytes) -> None:
        """Send the head; `added` are header lines of the proxy's own."""
        ...

    def write(self, data: bytes) -> None: ...

    def flush(self) -> None:
        """Let out what `start` and the pieces after it may have held back to go together."""
        ...

    def finish(self, trailers: Headers) -> None: ...

    def moved(self) -> bool:
        """Whether the client took something since the last time this was asked."""
        ...

    def fail(self, event: bytes | None) -> None:
        """Show a broken answer: `event` if the stream can take one, then an unclean end."""
        ...


class Flow(Protocol):
    """The connection under an answer, as far as the answer steers it."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...

    def ask_by(self, when: float) -> None:
        """Call `expire` at `when` (monotonic s) at the latest, as well as every few seconds."""
        ...

    @property
    def reading_paused(self) -> bool: ...


class Answer:
    """See the module's docstring. Times are monotonic seconds.

    Attributes:
        shape, inference, stream: what the request lets one self.
        head_only: the method was HEAD.
        upgrade: the request asks for another protocol.
        deadline: it must be over.
        answer_by: it must have begun, for another backend could still answer.
        lone: no other backend stands ready.
        told: tokens that the backend counted, where a whole answer was read for them.
        cold_start: s that the backend took to start, where it, or its provider, says so.
        billed: s that its provider says it bills; None: it does not say, or the work still runs.
        billed_from: when the work began to be paid for (monotonic s), by its provider's word.
    """

    __slots__ = (
        "_ends",
        "_flow",
        "_hold",
        "_loop",
        "_sink",
        "_timeouts",
        "_waiter",
        "answer_by",
        "billed",
        "billed_from",
        "cold_start",
        "committed",
        "complete",
        "deadline",
        "decided",
        "detail",
        "ended",
        "fault",
        "first_content",
        "framing",
        "head",
        "head_at",
        "head_only",
        "held",
        "held_size",
        "inference",
        "last",
        "lone",
        "sending",
        "sent_at",
        "shape",
        "size",
        "stage",
        "status",
        "stream",
        "told",
        "trailers",
        "upgrade",
        "watch",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeouts: Timeouts,
        shape: Shape,
        inference: bool,
        stream: bool,
        head_only: bool,
        upgrade: bool,
        deadline: float,
        answer_by: float,
        lone: bool,
    ) -> None:
        self._loop = loop
        self._timeouts = timeouts
        self.shape = shape
        self.inference = inference
        self.stream = stream
        self.head_only = head_only
        self.upgrade = upgrade
        self.deadline = deadline
        self.answer_by = answer_by
        self.lone = lone
        self._flow: Flow | None = None
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._hold = _HOLD_BYTE
        self.stage = _STAGE_SEND
        self.status: int | None = None
        self.head: AnswerHead | None = None
        self.trailers: Headers = ()
        self.framing = _FRAMING_NONE
        self.held: list[bytes] = []
        self.held_size = 0
        self.size = 0
        self.watch: Watch | None = None
        self.decided = self.ended = self.complete = self.committed = False
        self.sending = False
        self.fault: Fault | None = None
        self.detail = ""
        self.told = NOTHING
        self._ends: Ends | None = None  # of what is passed on before it is whole
        self.cold_start: float | None = None
        self.billed: float | None = None
        self.billed_from: float | None = None
        self.sent_at = self.last = 0.0
        self.head_at: float | None = None
        self.first_content: float | None = None

    # -- the connection's side -------------------------------------------------------------------

    def begin(self, flow: Flow, sending: bool) -> None:
        """The request goes out over `flow`; `sending`: its body will take a while."""
        self._flow = flow
        self.sending = sending
        if not sending:
            self.stage = _STAGE_HEAD
        self.sent_at = self.last = monotonic()
        flow.ask_by(self._limit())

    def sent(self) -> None:
        """The last byte of the request is out: the wait for the answer counts from here."""
        self.sending = False
        self.sent_at = monotonic()
        if self.stage is _STAGE_SEND:
            self.stage = _STAGE_HEAD
        self._arm()

    def _arm(self) -> None:
        """See that the next limit is kept. They are far off, so the usual round comes in time."""
        if self._flow is not None:
            self._flow.ask_by(self._limit())

    def on_head(self, head: AnswerHead, framing: Framing) -> None:
        self.status, self.head = head.status, head
        self.framing = framing
        self.stage = _STAGE_CONTENT
        self.head_at = self.last = monotonic()
        if framing is _FRAMING_TUNNEL:
            self._decide()
            return
        self._hold = hold_for(head, self.shape, self.inference)
        if self._hold is _HOLD_CONTENT:
            self.watch = Watch(self.shape)

    def on_read(self) -> None:
        """All of one read has been told, and the answer is still held."""
        self._arm()

    def relax(self, timeouts: Timeouts, since: float | None = None) -> None:
        """Let other limits hold from here on, counted from `since` (monotonic s)."""
        self._timeouts = timeouts
        if since is not None:
            self.sent_at = since
        self._arm()

    def touch(self) -> None:
        """Something moved, if not towards the client: its body, its tunnel, its full buffer."""
        self.last = monotonic()

    def on_piece(self, data: bytes) -> None:
        self.size += len(data)
        self.last = now = monotonic()
        watch = self.watch
        if watch is not None:
            watch.feed(data)
        elif self._ends is not None:
            self._ends.feed(data)
        if self.first_content is None and (watch is None or watch.content):
            self.first_content = now
        sink = self._sink
        if sink is not None:
            sink.write(data)
            return
        self.held.append(data)
        self.held_size += len(data)
        if not self.decided:
            said = watch is not None and (watch.content or watch.error)
            if said or self._hold is _HOLD_BYTE or self.held_size > HOLD_CAP:
                self._decide()
        elif self.held_size > HOLD_CAP and self._flow is not None:
            self._flow.pause_reading()

    def on_complete(self, trailers: Headers) -> None:
        self.trailers = trailers
        self.complete = True
        if self._sink is None or self._passes_whole(self._sink):
            self._end()

    def _passes_whole(self, sink: Sink) -> bool:
        """Tell the client the end of a complete answer; False where it has failed instead."""
        if self.watch is not None and not self.watch.whole:
            self.ended = False
            self.fail(Fault.TRUNCATED, "the stream ended without its end marker")
            return False
        sink.finish(self.trailers)
        self.stage = _STAGE_DONE
        return True

    def fail(self, fault: Fault, detail: str = "") -> None:
        """End the answer as broken. Does nothing once it has ended."""
        if self.ended:
            return
        self.fault, self.detail = fault, detail
        try:
            if self._sink is not None:
                event = None
                if self.watch is not None and self.watch.fresh and not self.watch.ended:
                    event = error_event(self.shape, _broken_message(fault), "upstream_error")
                self._sink.fail(event)
        finally:
            self._end()

    def count(self) -> None:
        """Look for counts of tokens in an answer on whatever path; nothing is held for it."""
        self._ends = Ends()

    # -- the exchange's side ---------------------------------------------------------------------

    def next_step(self) -> asyncio.Future[None]:
        """Is done once the answer is `decided`, or, where it is already, once it has `ended`."""
        self._waiter = self._loop.create_future()
        return self._waiter

    def commit(self, sink: Sink, added: bytes) -> None:
        """Send what is held, then every piece as it comes."""
        self._sink = sink
        self.committed = True
        self.stage = _STAGE_STREAM
        sink.start(self, added)
        held = self.held
        if held:
            self.held, self.held_size = [], 0
            sink.write(held[0] if len(held) == 1 else b"".join(held))
        if self.ended:
            if self.complete:
                self._passes_whole(sink)
            else:
                self.ended = False
                self.fail(self.fault or Fault.CLOSED, self.detail)
            sink.flush()
            return
        if self.watch is None and self.inference and not self.coded:
            self._ends = Ends()
            for piece in held:
                self._ends.feed(piece)
        sink.flush()
        if self._flow is not None:
            self._flow.resume_reading()
        self._arm()

    def cut(self, fault: Fault, detail: str) -> None:
        """End an answer that its reader refuses, and the connection under it."""
        flow = self._flow
        self.fail(fault, detail)
        if flow is not None:
            flow.abort()

    def abandon(self) -> None:
        """Close the connection under an answer that nobody wants any more."""
        if not self.ended and self._flow is not None:
            self._flow.abort()
        self._end()

    @property
    def cut_short(self) -> bool:
        """Whether the connection under it ended too soon."""
        return self.fault is _CLOSED or self.fault is _RESET

    @property
    def said_all(self) -> bool:
        """Whether the client was sent the end marker, and nothing but the framing is missing."""
        watch = self.watch
        return self.committed and watch is not None and watch.ended and not watch.error

    def tokens(self) -> Told:
        """Tokens as the backend counted them, as far as it has said."""
        if self.watch is not None:
            told = self.watch.told()
            return self.told if told == NOTHING else told
        if self.told == NOTHING and self._ends is not None and not self.coded:
            if self.head is not None and self.head.events:
                return self._ends.last_word()
            return told_by(self._ends.document())
        return self.told

    def guess(self) -> tuple[int, bool]:
        """Output tokens by what passed, and whether any of an answer did."""
        watch = self.watch
        if watch is not None:
            return watch.events, watch.content
        ran = self.size > 0 and (self.committed or self.fault is not None)
        return guess_output(self.size, self.coded), ran

    @property
    def coded(self) -> bool:
        """Whether the body is in a content coding."""
        coding = self.head.coding if self.head is not None else None
        return coding is not None and coding.lower() != b"identity"

    @property
    def readable(self) -> bool:
        """Whether the answer is of a kind that its words can be judged by."""
        return self._hold is not _HOLD_BYTE

    def body(self) -> bytes:
        """What is held of the body."""
        if len(self.held) > 1:
            self.held = [b"".join(self.held)]
        return self.held[0] if self.held else b""

    # -- limits ----------------------------------------------------------------------------------

    def _limit(self) -> float:
        """When the next thing must have happened."""
        times = self._timeouts
        limit = self.deadline
        if self.status is None:
            if self.sending:
                return limit  # who sends has a limit of its own
            whole = self.inference and not self.stream
            begun = _after(self.sent_at, times.document if whole else times.first_content)
            limit = limit if limit < self.answer_by else self.answer_by
            return limit if limit < begun else begun
        if self.framing is _FRAMING_TUNNEL:
            return min(limit, _after(self.last, times.idle))
        if self._sink is None:
            limit = min(limit, self.answer_by)
            if self._hold is _HOLD_CONTENT:
                limit = min(limit, _after(self.sent_at, times.first_content))
            else:
                limit = min(limit, _after(self.last, times.idle))
                if self._hold is _HOLD_WHOLE:
                    limit = min(limit, _after(self.sent_at, times.document))
            if not self.decided and (self.lone or self._hold is _HOLD_BYTE):
                limit = min(limit, (self.head_at or self.sent_at) + GRACE)
            return limit
        return min(limit, _after(self.last, times.idle))

    def expire(self, now: float) -> float:
        """Act on a limit that has passed. Returns when to be asked again; inf: never."""
        if self.ended:
            return inf
        limit = self._limit()
        if now < limit:
            return limit
        if self._client_is_slow() and now < self.deadline:
            self.last = now  # the client is slow, not gone: what it was sent still drains
            return self._limit()
        grace = self.head_at is not None and now < self._limit_without_grace()
        if grace:
            self._decide()
            return self._limit()
        self._run_out(now)
        return inf

    def _client_is_slow(self) -> bool:
        """Whether all that is waited for is a client that still takes what it was sent."""
        paused = self._flow is not None and self._flow.reading_paused
        return paused and self._sink is not None and self._sink.moved()

    def _limit_without_grace(self) -> float:
        decided, self.decided = self.decided, True
        limit = self._limit()
        self.decided = decided
        return limit

    def _run_out(self, now: float) -> None:
        flow = self._flow
        if now >= self.deadline:
            self.fail(Fault.DEADLINE, "the client's deadline, or the total time, ran out")
        elif flow is not None and flow.reading_paused:
            self.fail(Fault.CLIENT_CLOSED, "the client took nothing for too long")
        else:
            self.fail(Fault.TIMEOUT, f"nothing more came at stage {self.stage}")
        if flow is not None:
            flow.abort()

    # -- inside ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _decide(self) -> None:
        self.decided = True
        self._wake()

    def _end(self) -> None:
        self.ended = self.decided = True
        self._flow = None
        self._wake()


def _after(start: float, seconds: float) -> float:
    return start + seconds if seconds > 0 else inf


def _broken_message(fault: Fault) -> str:
    if fault in (Fault.TIMEOUT, Fault.DEADLINE):
        return "the backend went silent; the answer is incomplete"
    return "the backend's stream broke; the answer is incomplete"
