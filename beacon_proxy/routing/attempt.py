"""One try at one backend: connect, send, hold the answer until it can be judged."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from ..contracts import (
    Backend,
    Candidate,
    Exchange,
    Fault,
    Outcome,
    Provider,
    Stage,
    Usage,
    Verdict,
    Warmth,
)
from ..errors import ProxyError, UpstreamError
from ..fleet.hooks import NO_HOOKS, Hooks
from ..spending.bill import price_of
from ..spending.estimates import Pace
from ..wire.answer import Answer
from ..wire.carried import Carried, Carriers
from ..wire.connection import Connection
from ..wire.dialects import Shape
from ..wire.pool import Pool
from ..wire.rename import Renaming
from ..wire.request import Outgoing, Source
from ..wire.upload import ClientGone, Upload
from ..wire.usage import LARGE, guess_input, text_size
from ..wire.wheel import Wheel
from .carry import carry_by
from .judge import Judgement, of_fault

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_NEUTRAL, _STRIKE = Verdict.NEUTRAL, Verdict.STRIKE
_DEADLINE, _CONNECT = Fault.DEADLINE, Stage.CONNECT
_DOCUMENT = Shape.DOCUMENT
_WARM, _UNKNOWN, _WARMING = Warmth.WARM, Warmth.UNKNOWN, Warmth.WARMING


@dataclass(slots=True)
class Wire:
    """What an attempt needs of the wire; one a process."""

    loop: asyncio.AbstractEventLoop
    wheel: Wheel
    pool: Pool
    carriers: Carriers = field(default_factory=Carriers)


class Attempt:
    """Opens one answer. `close` is to be called on every path, once.

    Attributes:
        answer: as far as it came.
        error: why there is none; or a fault of the client's own request, to be told to it.
        flow: what is under the answer, for back-pressure.
        last: the judgement of it.
        patience: its limits, by how warm the backend is.
        accepted: the backend has taken the work, and said where its result will be.
        expected_usd: what it is expected to cost.
        pace: of what it is expected to write; None: no tokens are billed. It is that of when the
            attempt began, as `expected_usd` is: who leaves pays for no more output than was held.
        billed_from: when the backend began to be paid for, by our clock (monotonic s).
    """

    __slots__ = (
        "_asked_size",
        "_upload_of",
        "_uploading",
        "_was",
        "accepted",
        "answer",
        "backend",
        "billed_from",
        "candidate",
        "error",
        "exchange",
        "expected_usd",
        "flow",
        "hooks",
        "last",
        "number",
        "pace",
        "patience",
        "provider",
        "sent",
        "started",
        "wire",
    )

    def __init__(
        self,
        wire: Wire,
        exchange: Exchange,
        candidate: Candidate,
        provider: Provider,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self.wire = wire
        self.exchange = exchange
        self.provider = provider
        self.hooks = hooks
        self.flow: Connection | Carried | None = None
        self._uploading: asyncio.Task[None] | None = None
        self._upload_of: Upload | None = None
        self._asked_size = 0
        self.candidate = candidate
        self.backend: Backend = candidate.backend
        self.answer: Answer | None = None
        self.error: ProxyError | None = None
        self.last = _NOTHING_YET
        self.sent = self.accepted = False
        self.number = len(exchange.attempts) + 1
        self.started = self.billed_from = now = monotonic()
        self.expected_usd = 0.0
        self.pace: Pace | None = None
        backend = candidate.backend
        self.patience = backend.timeouts
        self._was = candidate.live.warmth_at(now)
        cold = backend.cold_timeouts
        if cold is not None:
            beside_others = hooks.scales and candidate.live.in_flight > 0
            if self._was is not _WARM or beside_others:
                self.patience = cold

    async def open(self, source: Source, *, lone: bool) -> None:
        """Return when the answer can be judged, or `error` says why there is none.

        A connection that lay idle and closes before it answered is no fault of the backend: the
        request goes once more over a fresh one (RFC 9110 9.2.2). A request that may not be repeated
        is never put on an idle connection.
        """
        self._upload_of = upload = source.upload
        if upload is not None and upload.size > LARGE and upload.body is not None:
            self._asked_size = text_size(upload.body)  # it will be let go of
        hooks = self.hooks
        if hooks.carry is not None and hooks.carries is not None and hooks.carries(self.backend):
            await carry_by(hooks.carry, self, source, lone)
            return
        try:
            outgoing = source.outgoing(self.candidate, self.provider, hooks.fields)
        except ProxyError as exc:
            self.error = exc.with_traceback(None)
            return
        await self.ask(outgoing, source.upload, source.upgrade, lone)

    async def ask(
        self,
        outgoing: Outgoing,
        upload: Upload | None,
        upgrade: bool,
        lone: bool,
        since: float | None = None,
    ) -> None:
        """Send one request; its limits count from `since` (monotonic s), or from now."""
        exchange = self.exchange
        pool, connection = self.wire.pool, None
        # By the time of a hop another server may have the backend's name, and its idle connections.
        if exchange.may_repeat and (since is None or pool.keeps(self.backend)):
            connection = pool.take(self.backend)
        while True:
            fresh = connection is None
            if connection is None:
                try:
                    connection = await self._connect()
                except UpstreamError as exc:
                    self.error = exc.with_traceback(None)
                    return
            answer = self._send(connection, outgoing, upload, upgrade, lone)
            if since is not None:
                answer.relax(self.patience, since)
            while not answer.decided:
                await answer.next_step()
            if answer.fault is None:
                return
            stale = answer.cut_short and not connection.answered
            if fresh or not stale or not can_repeat(upload):
                return
            self._stop_upload()
            connection = None

    def note_start(self, *, certain: bool) -> None:
        """The backend has to start for this: its wait is a cold start and no latency.

        Where that is not `certain`, one that is known to be warm may only be slow.
        """
        if certain or self._was is _UNKNOWN:
            self._was = _WARMING

    @property
    def may_ask_again(self) -> bool:
        """Whether the same request may be sent to the same backend once more."""
        return self.exchange.may_repeat and can_repeat(self._upload_of)

    def let_go(self) -> None:
        """Give up an answer that is not the last one: from here on it is none at all."""
        self._stop_upload()
        answer, self.answer = self.answer, None
        if answer is not None and not answer.ended:
            answer.abandon()

    def answer_by(self, lone: bool) -> float:
        """Where the limit is ours and another could answer: half of what was left is for it."""
        exchange = self.exchange
        if lone or not exchange.deadline_is_ours or exchange.deadline is None:
            return inf
        return self.started + (exchange.deadline - self.started) / 2

    async def _connect(self) -> Connection:
        """Connect, but not past the end of the exchange."""
        deadline = self.exchange.ends_on(self.backend)
        try:
            async with asyncio.timeout_at(deadline if deadline < inf else None):
                connection = await self.wire.pool.connect(self.backend)
        except TimeoutError as exc:
            raise UpstreamError(_DEADLINE, _CONNECT, "the deadline ran out") from exc
        if not self.sent:  # what went before, on a connection that had gone stale, was its work
            self.billed_from = monotonic()
        return connection

    def _send(
        self,
        connection: Connection,
        outgoing: Outgoing,
        upload: Upload | None,
        upgrade: bool,
        lone: bool,
    ) -> Answer:
        self.flow = connection
        self.answer = answer = self.expect(outgoing.shape, outgoing.stream, upgrade, lone)
        self.sent = True
        body = outgoing.body
        if body is not None:
            if upload is not None and upload.chunked:
                body = _framed(body)
            connection.start(answer, outgoing.head + body, False)
        else:
            assert upload is not None
            connection.start(answer, outgoing.head, True)
            self._uploading = asyncio.create_task(
                self._upload(connection, upload, answer, outgoing.renaming),
                name=f"upload {self.exchange.id}",
            )
        return answer

    def expect(self, shape: Shape, stream: bool, upgrade: bool, lone: bool) -> Answer:
        exchange = self.exchange
        # By position: a class called by keywords takes two and a half times as long (3.11).
        answer = Answer(
            self.wire.loop,
            self.patience,
            shape,
            exchange.inference,
            stream,
            exchange.method == "HEAD",
            upgrade,
            exchange.ends_on(self.backend),
            self.answer_by(lone) if exchange.deadline_is_ours else inf,
            lone,
        )
        if not exchange.inference and self._may_be_billed_tokens:
            answer.count()
        return answer

    async def _upload(
        self, connection: Connection, upload: Upload, answer: Answer, renaming: Renaming | None
    ) -> None:
        """Pass the body on as it comes, at the pace of the slower side."""
        idle = self.backend.timeouts.idle or None
        try:
            pieces = upload.pieces()
            async for data in pieces if renaming is None else renaming.applied(pieces):
                connection.write(b"%x\r\n%b\r\n" % (len(data), data) if upload.chunked else data)
                async with asyncio.timeout(idle):
                    await connection.drain()
            if upload.chunked:
                connection.write(b"0\r\n\r\n")
            connection.uploaded = True
            answer.sent()
        except ProxyError as exc:
            self.error = exc.with_traceback(None)
            answer.fail(Fault.CLIENT_CLOSED, exc.message)
            connection.abort()
        except ClientGone:
            connection.abort()  # the exchange itself is being cancelled
        except TimeoutError:
            answer.fail(Fault.TIMEOUT, "the backend stopped taking the body")
            connection.abort()

    def _stop_upload(self) -> None:
        if self._uploading is not None:
            self._uploading.cancel()
            self._uploading = None

    @property
    def upload_runs(self) -> bool:
        """Whether the request is still being sent."""
        return self._uploading is not None and not self._uploading.done()

    def tunnel(self, client: asyncio.Transport) -> Connection:
        """Join the client's transport and the backend's (after a 101)."""
        connection = self.flow
        assert isinstance(connection, Connection)
        connection.tunnel(client)
        return connection

    def take_error(self) -> ProxyError:
        """The error, to be raised; if it stayed here, its traceback would hold this object."""
        error, self.error = self.error, None
        assert error is not None
        return error

    def judgement_of_error(self) -> Judgement:
        error = self.error
        if isinstance(error, UpstreamError):
            return of_fault(error.fault, error.message)
        return Judgement(_NEUTRAL, Fault.CLIENT_CLOSED, detail=error.message if error else "")

    def close(self) -> None:
        """Give up what still runs: the upload, the answer and the connection under it."""
        if self._uploading is not None:
            self._stop_upload()
        if self.answer is not None and not self.answer.ended:
            self.answer.abandon()

    def outcome(self, judgement: Judgement, *, cancelled: bool) -> Outcome:
        """The record of this attempt, once it has ended."""
        answer, now = self.answer, monotonic()
        verdict, fault, retry_after, detail, _, _ = judgement
        if cancelled:
            if answer is None or not answer.said_all:  # else it closed ahead of the last chunk only
                verdict, fault = _NEUTRAL, Fault.CLIENT_CLOSED
        elif answer is not None and answer.committed:
            if answer.fault is not None:
                late = of_fault(answer.fault, answer.detail)
                verdict, fault, detail = late.verdict, late.fault, late.detail
            elif answer.watch is not None and answer.watch.error:
                verdict, fault = _STRIKE, Fault.ERROR_BODY
        elif fault is _DEADLINE and self._waited_out(now):
            verdict = _STRIKE
        if answer is None:
            stage, status, committed, size, ttft = _CONNECT, None, False, 0, None
            given = made = None
            cached = written = 0
            billed = now - self.billed_from if self.sent else 0.0
        else:
            stage, status, committed = answer.stage, answer.status, answer.committed
            size, ttft = answer.size, answer.first_content
            given, made, cached, written = answer.told
            if answer.billed is not None:
                billed = answer.billed
            else:
                since = answer.billed_from
                billed = now - (self.billed_from if since is None else since)
            if ttft is not None:
                ttft -= self.started
            if answer.watch is not None and answer.cold_start is None:
                answer.cold_start = answer.watch.load
        usage: Usage | None = None
        if given is not None and made is not None:
            usage = Usage(given, made, False, cached, written)
        elif self.sent and self.exchange.work is not None:
            inference = self.exchange.inference
            usage = self._usage(verdict, now) if inference else self._usage_elsewhere()
        usd = price_of(self.backend, billed, usage)
        if usage is None and self.pace is not None:
            usd = self.expected_usd * self._part_uncounted(verdict, now)
        return Outcome(
            self.backend,
            self.number,
            verdict,
            stage,
            fault,
            status,
            retry_after,
            self.sent,
            committed,
            not (cancelled or committed) and self._repeatable(judgement),
            self.started,
            ttft,
            now - self.started,
            size,
            usage,
            detail,
            self._cold_start(ttft),
            billed,
            usd,
            self.expected_usd,
        )

    def _usage(self, verdict: Verdict, now: float) -> Usage | None:
        """Tokens that were spent; None: none, as far as anybody can know."""
        answer, exchange = self.answer, self.exchange
        if answer is None or answer.status is None:
            if not self._was_left(verdict):
                return None
            return Usage(self._guess_input(), self._output_by(now), estimated=True)
        if answer.status >= 300:
            return None
        given, made, cached, written = answer.tokens()
        if given is not None and made is not None:
            return Usage(given, made, False, cached, written)
        guess, ran = answer.guess()
        if given is None and made is None and not ran and verdict is not _NEUTRAL:
            return None
        if answer.shape is _DOCUMENT and exchange.prompt is None:  # embeddings, a reranking
            guess, made = 0, 0
        elif answer.watch is None and not answer.complete and verdict is _NEUTRAL:
            guess = max(guess, self._output_by(now))
        if given is not None and made is not None:
            return Usage(given, made, False, cached, written)
        return Usage(
            self._guess_input() if given is None else given,
            guess if made is None else made,
            True,
            cached,
            written,
        )

    @property
    def _may_be_billed_tokens(self) -> bool:
        """Whether what is asked, on a path that we do not know, may run a model by the token."""
        return self.backend.token_price is not None and self.exchange.work is not None

    def _was_left(self, verdict: Verdict) -> bool:
        """Whether it had the whole request, and nobody waited for its answer any more.

        What a silent failure did nobody bills.
        """
        upload = self._upload_of
        return verdict is _NEUTRAL and (upload is None or upload.complete)

    def _part_by(self, now: float) -> float:
        """How much of what is expected has run at `now`, 0..1, as far as time tells."""
        pace, answer, since = self.pace, self.answer, self.billed_from
        if pace is None or (answer is None and not self.accepted):
            return 0.0  # it was only ever said to be starting
        if answer is not None:
            if answer.billed is not None:  # its provider knows when it ran
                return pace.part(answer.billed)
            since = answer.sent_at if answer.billed_from is None else answer.billed_from
        if self._was is not _WARM and self._was is not _UNKNOWN:
            start = self.candidate.live.cold_starts.quantile(0.5)
            if start is None:
                return 0.0  # nobody knows when it began to write
            since += start
        return pace.part(now - since)

    def _output_by(self, now: float) -> int:
        """Tokens that had been written at `now` of a document that nobody saw whole."""
        pace, answer, exchange = self.pace, self.answer, self.exchange
        if pace is None or (exchange.stream if answer is None else answer.stream):
            return 0  # of a stream they are counted as they come
        if answer is not None and answer.shape is _DOCUMENT and exchange.prompt is None:
            return 0  # embeddings, a reranking
        return round(pace.output * self._part_by(now))

    def _part_uncounted(self, verdict: Verdict, now: float) -> float:
        """How much, 0..1, ran of a POST on a path that we do not know, and was never counted."""
        answer = self.answer
        if self.exchange.inference or not self.sent or not self._may_be_billed_tokens:
            return 0.0
        if answer is None or answer.status is None:
            return self._part_by(now) if self._was_left(verdict) else 0.0
        if not 200 <= answer.status < 300:
            return 0.0
        return 1.0 if answer.complete else self._part_by(now)

    def _usage_elsewhere(self) -> Usage | None:
        """Tokens of an answer on a path that we do not know, where its backend counted them."""
        answer = self.answer
        if answer is None or answer.status is None or answer.status >= 300:
            return None
        given, made, cached, written = answer.tokens()
        if given is None and made is None:
            return None
        input = self._guess_input() if given is None else given
        return Usage(input, made or 0, given is None, cached, written)

    def _guess_input(self) -> int:
        prompt, upload = self.exchange.prompt, self._upload_of
        if prompt is not None:
            return guess_input(len(prompt.prompt))
        return guess_input(self._asked_size or (upload.size if upload is not None else 0))

    def _cold_start(self, ttft: float | None) -> float | None:
        """What a start cost, by who knows it best: the backend, its provider, or our own clock."""
        answer = self.answer
        if answer is not None and answer.cold_start is not None:
            return answer.cold_start
        # Who was never asked before may have been warm all along.
        return ttft if self._was is not _WARM and self._was is not _UNKNOWN else None

    def _waited_out(self, now: float) -> bool:
        """Whether the backend had its fair part of a limit that is ours, not the client's."""
        start = self.exchange.started
        limit = self.backend.timeouts.total
        if self.exchange.deadline_is_ours and self.exchange.deadline is not None:
            limit = self.exchange.deadline - start
        return 0 < limit <= now - start and now - self.started >= limit / 2

    @property
    def _result_pends(self) -> bool:
        """Whether the work was taken, and no result has come, were it one that says it failed."""
        answer = self.answer
        if self.error is not None or answer is None or answer.fault is not None:
            return self.accepted
        return self.accepted and 300 <= (answer.status or 0) < 400

    def _repeatable(self, judgement: Judgement) -> bool:
        """Nothing sent: always. Sent: where the route has no side effect, or RFC 9110 9.2.2.

        Work that is being done is never asked for a second time.
        """
        if not can_repeat(self._upload_of) or self._result_pends:
            return False
        exchange = self.exchange
        if not judgement.elsewhere or not self.sent:
            return judgement.elsewhere
        if self.answer is not None and self.answer.status is not None and not exchange.inference:
            # An error may have come after the deed; a refusal for want of room has not.
            refused = judgement.verdict is Verdict.BUSY and exchange.may_repeat
            return exchange.safe or refused
        return exchange.may_repeat


def _framed(body: bytes) -> bytes:
    """A whole body as one chunk and the last."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"


_NOTHING_YET = Judgement(_NEUTRAL)


def can_repeat(upload: Upload | None) -> bool:
    return upload is None or upload.replayable
