"""One connection to a backend: bytes out, and llhttp's callbacks in.

Rule 1: strict. What two parsers could read in two ways is a fault of the backend, never passed on.
Rule 2: a connection is used again only after a message that ended exactly where its framing said,
whose request was sent whole, and behind which no byte followed. Any doubt closes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import cast

import httptools

from ..contracts import Fault
from .again import Again
from .answer import Answer
from .expect import Framing
from .headers import AnswerHead, find
from .wheel import GRAIN, Wheel

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_NONE, _LENGTH, _CHUNKED = Framing.NONE, Framing.LENGTH, Framing.CHUNKED
_EOF, _TUNNEL = Framing.EOF, Framing.TUNNEL

ROUND = 2.0  # s between two looks at the limits of a connection
HEAD_CAP = 128 << 10  # bytes
FIELDS_CAP = 500


class _Malformed(Exception):
    """Raised inside a parser callback."""


class Connection(asyncio.Protocol):
    """The proxy's connection to one backend; carries one exchange at a time.

    Attributes:
        reused: it has carried an exchange before.
        shelf: where it lies while it is idle; it takes itself away when it is lost.
        answered: some byte of the current answer has come.
        uploaded: the current request has been sent whole; written by who sends it.
    """

    __slots__ = (
        "_again",
        "_answer",
        "_done",
        "_drained",
        "_excess",
        "_fields",
        "_framing",
        "_framing_size",
        "_headed",
        "_interim",
        "_keep",
        "_loop",
        "_parser",
        "_pieces",
        "_reason",
        "_release",
        "_tunnel",
        "_wheel",
        "_writing_paused",
        "answered",
        "bucket",
        "closing",
        "idle_until",
        "on_body",
        "reading_paused",
        "reused",
        "shelf",
        "transport",
        "uploaded",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: Wheel,
        release: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._wheel = wheel
        self._release = release
        self.transport: asyncio.Transport | None = None
        self.shelf: dict[Connection, None] | None = None
        self.closing = False
        self.reused = self.answered = self.uploaded = False
        self.reading_paused = False
        self.bucket: int | None = None
        self.idle_until = inf
        self._answer: Answer | None = None
        self._tunnel: asyncio.Transport | None = None
        self._drained: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._pieces: list[bytes] = []  # of the body, of one read
        self.on_body = self._pieces.append  # the parser's callback: with no frame of ours between
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._again: Again[AnswerHead] | None = None
        self._reset_message()

    def _reset_message(self) -> None:
        self._fields: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._framing_size = 0  # bytes since the last of the body
        self._headed = self._done = self._keep = self._excess = self._interim = False
        self._framing = _NONE

    # -- the attempt's side ----------------------------------------------------------------------

    def start(self, answer: Answer, data: bytes, sending: bool) -> None:
        """Send `data`, and tell `answer` the next message; `sending`: more data takes a while."""
        self._answer = answer
        self.answered = False
        self.uploaded = not sending
        answer.begin(self, sending)
        if self.closing or self.transport is None:
            self._lost(Fault.CLOSED, "the connection had closed")
        else:
            self.transport.write(data)

    def write(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.touch()
        if self.transport is not None and not self.closing:
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the transport takes more."""
        if self._writing_paused and not self.closing:
            self._drained = self._loop.create_future()
            await self._drained

    def tunnel(self, client: asyncio.Transport) -> None:
        """Let the pace of this side steer the client's, too: bytes now pass both ways."""
        self._tunnel = client

    def abort(self) -> None:
        """Close at once; the answer, if one is running, is not told."""
        self._answer = None
        self.closing = True
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self) -> None:
        if not self.reading_paused and self.transport is not None and not self.closing:
            self.reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused:
            self.reading_paused = False
            if self._answer is not None:
                self._answer.touch()  # the client took something
            if self.transport is not None and not self.closing:
                self.transport.resume_reading()

    def ask_by(self, when: float) -> None:
        if self.bucket is None or when < self.bucket * GRAIN:
            self._wheel.add(self, when)

    def expire(self, now: float) -> float | None:
        """The limits of the answer, or of lying idle. On the wheel for life."""
        if self._answer is not None:
            again = self._answer.expire(now)
        else:
            again = self.idle_until
            if now >= again:
                self.abort()
        return None if self.closing else min(again, now + ROUND)

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._wheel.add(self, self._loop.time() + ROUND)

    def data_received(self, data: bytes) -> None:
        answer, parser = self._answer, self._parser
        if answer is None or parser is None:
            self.abort()  # bytes that nobody asked for
            return
        if self._headed:
            if self._framing is _TUNNEL:
                answer.on_piece(data)
                return
        else:
            self.answered = True
            if self._again is not None and not self._framing_size:
                known = self._again.look(data)
                if known is not None and not answer.head_only:
                    self._repeat(known, self._again, data)
                    return
        pieces = self._pieces
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            if rest := data[exc.args[0] :]:
                pieces.append(rest)
        except httptools.HttpParserError as exc:
            if not self._done:
                self._flush()
                self._broken(str(exc.__context__ or exc) or type(exc).__name__)
                return
            self._excess = True
        if pieces:
            if len(pieces) == 1:
                piece = pieces.pop()
            else:
                piece = b"".join(pieces)
                pieces.clear()
            self._framing_size = 0
            answer.on_piece(piece)
        else:
            self._framing_size += len(data)
            if self._framing_size > HEAD_CAP:
                self._broken("the answer's head, trailers or chunk extensions are too large")
                return
        if self._done:
            self._finish()
        elif not answer.decided:
            answer.on_read()

    def _repeat(self, known: AnswerHead, again: Again[AnswerHead], data: bytes) -> None:
        """Take a whole answer whose head has been read before."""
        answer = self._answer
        assert answer is not None
        answer.on_head(known.again(again.digits), _LENGTH)
        if again.body_at < len(data):
            answer.on_piece(data[again.body_at :])
        self._answer = None
        self._leave(self.uploaded and not self.closing)
        answer.on_complete(())

    def _learn(self) -> None:
        """Remember the head of an answer that ended well: the next may have the same."""
        head = self._answer.head if self._answer is not None else None
        if not self.reused:
            return
        if self._again is None:
            self._again = Again()
        elif head is not None and self._framing is _LENGTH:
            first = head.line[:-2]
            self._again.learn(head, first, head.headers, head.length)

    def eof_received(self) -> None:
        if self._tunnel is None and self._answer is not None:
            if self._headed and self._framing is _EOF:
                self._excess = True  # the end of the connection is the end of the message
                self._finish()
            else:
                self._lost(Fault.CLOSED, "the backend closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.transport = None
        if self.shelf is not None:
            self.shelf.pop(self, None)
            self.shelf = None
        self._parser = None  # it holds this object
        self._wheel.drop(self)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._tunnel is not None:
            self._tunnel = None
            answer, self._answer = self._answer, None
            if answer is not None:
                answer.on_complete(())  # and the server closes the client's side
        elif exc is None:
            self._lost(Fault.CLOSED, "the backend closed the connection")
        else:
            self._lost(Fault.RESET, f"the connection broke: {type(exc).__name__}")

    def pause_writing(self) -> None:
        self._writing_paused = True
        if self._tunnel is not None and not self._tunnel.is_closing():
            self._tunnel.pause_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._tunnel is not None and not self._tunnel.is_closing():
            self._tunnel.resume_reading()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # -- httptools' callbacks --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._done:
            self._excess = True
            raise _Malformed("bytes behind the end of the answer")
        self._fields = []
        self._reason = b""

    def on_status(self, data: bytes) -> None:
        self._reason += data

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.strip(b" \t")))
        if len(self._fields) > FIELDS_CAP:
            raise _Malformed("too many header fields")

    def on_headers_complete(self) -> None:
        answer, parser = self._answer, self._parser
        assert answer is not None
        assert parser is not None
        status, version = parser.get_status_code(), parser.get_http_version()
        headers = tuple(self._fields)
        if status == 101:
            asked = answer.upgrade and parser.should_upgrade()
            if not asked or (find(headers, b"upgrade") or b"").lower() != b"websocket":
                raise _Malformed("switched protocols unasked")
            self._framing = _TUNNEL
        elif status < 200:
            if status < 100:
                raise _Malformed("invalid status")
            self._interim = True
            return
        self._headed = True
        self._fields = []
        if version not in ("1.1", "1.0"):
            raise _Malformed("unknown HTTP version")
        try:
            head = AnswerHead(status, self._reason, headers, version == "1.1")
        except ValueError as exc:
            raise _Malformed(str(exc)) from exc
        if self._framing is not _TUNNEL:
            if answer.head_only or status in (204, 304):
                self._framing = _NONE
            elif head.chunked:
                self._framing = _CHUNKED
            else:
                self._framing = _EOF if head.length is None else _LENGTH
        answer.on_head(head, self._framing)
        if answer.head_only and self._framing is not _TUNNEL:
            # llhttp would wait for a body, and httptools has no way to tell it: leave the feed
            # here. Whether bytes followed is not known then: this connection is not used again.
            self._done = True
            raise _Malformed("the answer to a HEAD ends with its head")

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self._framing is not _TUNNEL and self._parser is not None:
            self._done = True
            self._keep = self._parser.should_keep_alive()  # asked later, it speaks of the next one

    # -- inside ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._pieces and self._answer is not None:
            piece = b"".join(self._pieces)
            self._pieces.clear()
            self._answer.on_piece(piece)

    def _finish(self) -> None:
        trailers = tuple(self._fields) if self._framing is _CHUNKED else ()
        again = not self._excess and self.uploaded and not self.closing and self._keep
        if again:
            self._learn()
            self._reset_message()
        answer, self._answer = self._answer, None
        assert answer is not None
        self._leave(again)
        answer.on_complete(trailers)

    def _leave(self, again: bool) -> None:
        """Lie idle, to be used again, or close."""
        if again:
            self.reused = True
            self._release(self)
        else:
            self.closing = True
            if self.transport is not None:
                self.transport.close()

    def _broken(self, detail: str) -> None:
        self._lost(Fault.MALFORMED, detail)
        self.abort()

    def _lost(self, fault: Fault, detail: str) -> None:
        self._flush()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(fault, detail)
