"""The client's connection: llhttp's callbacks in, one exchange at a time, answers straight out.

    WAITING --head is whole--> SERVING --answer is out, body taken--> WAITING
                                  |  answer is out, body not
                                  v
                               LINGERING --body passed--> WAITING, or the connection closes

Rule 1: strict. What two parsers could read in two ways is refused, and the connection with it.
Rule 2: requests are answered in the order they came. What a client sends ahead is read to a bound.
Rule 3: while an upgrade is asked for, nothing behind its request is parsed: after a 101 it is the
backend's, after anything else it is the next request.
Rule 4: a client whose request cannot be read any further is still read for a while, unparsed:
closing under bytes it is still sending would reset the connection, and our answer would be lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from math import inf
from typing import Any, Protocol, cast

import httptools

from ..contracts import Headers
from ..errors import BadRequest, HeadTooLarge, ProxyError
from ..wire.again import Again
from ..wire.answer import Flow
from ..wire.connection import Connection
from ..wire.headers import RequestHead, may_vary
from ..wire.upload import ClientGone, Upload
from ..wire.wheel import GRAIN, Wheel

HEAD_CAP = 64 << 10  # bytes of one request's header section
FIELDS_CAP = 256
LINE_CAP = 32 << 10  # bytes of the request line, and of one field
FRAMING_FACTOR = 16  # bytes on the wire for each byte of a body: chunks of one byte take six
FRAMING_SPARE = 64 << 10  # bytes beside that
FLUSH_LIMIT = 30.0  # s for the rest of an answer to leave a connection that is closing
LINGER = 10.0  # s that the rest of a body may take when nobody wants it
# Requests read ahead, and bytes behind an upgrade. A client that sends more is not read, and that
# it left is not noticed before its turn: few clients send any.
AHEAD_MOST = 32
BEHIND_MOST = 64 << 10
HEAD_TIMEOUT = 75.0  # s to the end of a head, from the connect or from the last answer


class Request:
    """A request whose head has come.

    Attributes:
        method, target: as they came.
        headers: values without the space around them.
        keep_alive: what the client asked for, or its version implies.
        upload: its body.
        path: the target's, read by who answers it.
        head: its fields read, by who answers it.
    """

    __slots__ = ("head", "headers", "http11", "keep_alive", "method", "path", "target", "upload")

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        http11: bool,
        keep_alive: bool,
        upload: Upload,
        path: str | None = None,
        head: RequestHead | None = None,
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.http11 = http11
        self.keep_alive = keep_alive
        self.upload = upload
        self.path = path
        self.head = head

    def again(self, again: Again[Request], upload: Upload) -> Request:
        """The same request with another body, and what else `again` saw to differ."""
        assert self.head is not None
        head = self.head.again(again.values, again.digits)
        return Request(
            self.method,
            self.target,
            head.headers,
            self.http11,
            self.keep_alive,
            upload,
            self.path,
            head,
        )


class Handler(Protocol):
    """Who answers requests."""

    def begin(
        self, connection: ClientConnection, request: Request
    ) -> Coroutine[Any, Any, None] | None:
        """Answer it, in a task if a coroutine is returned; ends with `connection.served`."""
        ...

    def refuse(self, connection: ClientConnection, error: ProxyError, cause: str) -> None:
        """Write the answer to what never became a request."""
        ...


class Successor(Protocol):
    """Who takes a client's bytes once they are no requests any more."""

    def data_received(self, data: bytes) -> None: ...


class Guest(Protocol):
    """Another protocol that answers on this connection, and has to know of its state."""

    def connection_lost(self, exc: BaseException | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class _Malformed(Exception):
    """Raised inside a parser callback."""


class _TooLarge(_Malformed):
    """The head is larger than we take."""


def _check_size(fields: list[tuple[bytes, bytes]]) -> None:
    sizes = [len(name) + len(value) for name, value in fields]
    if len(sizes) > FIELDS_CAP or sum(sizes) > HEAD_CAP or max(sizes, default=0) > LINE_CAP:
        raise _TooLarge("the header section is too large")


# Why a client is not read: its body has no taker, its turn has not come, it takes no answers.
_BODY, _AHEAD, _SLOW = 1, 2, 4


class ClientConnection(asyncio.Protocol):
    """One client connection.

    Attributes:
        transport: None once it is lost.
        peer: the client's address; "" over a Unix socket.
        upstream: paused while the client's write buffer is full.
        guest: told of that, and of the end, too.
    """

    __slots__ = (
        "_again",
        "_behind",
        "_broken",
        "_closing",
        "_fields",
        "_framing_size",
        "_keeps",
        "_limit",
        "_lingers",
        "_parser",
        "_paused",
        "_queue",
        "_receiving",
        "_request",
        "_server",
        "_successor",
        "_target",
        "_task",
        "bucket",
        "guest",
        "peer",
        "transport",
        "upstream",
        "writing_paused",
    )

    def __init__(self, server: ClientServer) -> None:
        self._server = server
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._target = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._framing_size = 0  # bytes since the last message, or of the wire for the body
        self._receiving: Request | None = None  # whose body comes
        self._request: Request | None = None  # that is being answered, or lingers
        self._queue: deque[Request] = deque()  # read ahead
        self._task: asyncio.Task[None] | None = None
        self._broken: Exception | None = None  # nothing is parsed any more
        self._behind: bytes | None = None  # came after a request for an upgrade
        self._successor: Successor | None = None
        self._paused = 0
        self._lingers = self._keeps = self._closing = False
        self._limit = inf
        self._again: Again[Request] | None = None
        self.bucket: int | None = None
        self.peer = ""
        self.guest: Guest | None = None
        self.transport: asyncio.Transport | None = None
        self.upstream: Flow | None = None
        self.writing_paused = False

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._server.connections.add(self)
        self._limit_to(self._server.head_timeout)

    def data_received(self, data: bytes) -> None:
        if self._successor is not None:
            self._successor.data_received(data)
        elif self._broken is not None or self._closing:
            return  # heard out, not understood
        elif self._behind is not None:
            self._behind += data
            if len(self._behind) > BEHIND_MOST:
                self._pause(_AHEAD)
        else:
            self._parse(data)

    def eof_received(self) -> None:
        """A client that closes its half is gone: the transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._parser = None  # it holds this object
        self._closing = True
        self._server.connections.discard(self)
        self._server.wheel.drop(self)
        if self._receiving is not None:
            self._receiving.upload.fail(ClientGone())
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        guest, self.guest = self.guest, None
        # Each of them holds this object.
        self._request = self._receiving = self._successor = self._broken = self._again = None
        if guest is not None:
            guest.connection_lost(exc)

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.upstream is not None:
            self.upstream.pause_reading()
        if self.guest is not None:
            self.guest.pause_writing()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._paused & _SLOW and not self._closing:
            self._resume(_SLOW)
            self._go_on()
        if self.upstream is not None:
            self.upstream.resume_reading()
        if self.guest is not None:
            self.guest.resume_writing()

    # -- llhttp ----------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        assert self._parser is not None
        if self._again is not None and not self._framing_size and self._request is None:
            known = self._again.look(data)
            if known is not None:
                self._repeat(known, self._again, data)
                return
        self._framing_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._behind = data[exc.args[0] :]
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            self._break(cause if isinstance(cause, _Malformed) else exc)
        if self._framing_size > FRAMING_SPARE and self._broken is None:
            self._check_framing()
        if self._request is None:
            self._next()
        elif self._lingers:
            self._lingered()
        if len(self._queue) > AHEAD_MOST:
            self._pause(_AHEAD)

    def _repeat(self, known: Request, again: Again[Request], data: bytes) -> None:
        """Take a whole request whose head has been read before."""
        upload = Upload(self, data[again.body_at :])
        self._begin(known.again(again, upload))

    def _learn(self, request: Request) -> None:
        """Remember the head of a request that was answered: the next may have the same."""
        if self._again is None:
            self._again = Again(may_vary)  # only now: most clients that come once never come again
            return
        head = request.head
        if head is None or not head.plain or request.target[:1] != b"/":
            return
        version = b" HTTP/1.1" if request.http11 else b" HTTP/1.0"
        first = b"%b %b%b" % (request.method, request.target, version)
        if self._again.learn(request, first, request.headers, head.length):
            head.mould(self._again.places)

    def _check_framing(self) -> None:
        """Refuse an endless head, and a body that is nearly all framing (chunk extensions, say)."""
        if self._receiving is None:
            if self._framing_size > HEAD_CAP + LINE_CAP:
                self._break(_TooLarge("the header section is too large"))
        elif self._framing_size > FRAMING_SPARE + FRAMING_FACTOR * self._receiving.upload.received:
            self._break(_Malformed("more framing than body"))

    def _break(self, fault: Exception) -> None:
        """Parse no further: what follows cannot be told apart any more."""
        self._broken = fault
        if self._receiving is not None:
            self._receiving.upload.fail(BadRequest("the body's framing is malformed"))
            self._receiving = None

    def on_message_begin(self) -> None:
        self._target = b""
        self._fields = []
        if self._queue or self._request is not None:
            self._framing_size = LINE_CAP + 1  # part of it came with the one before: look at all

    def on_url(self, data: bytes) -> None:
        self._target += data
        if len(self._target) > LINE_CAP:
            raise _TooLarge("the request line is too large")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is not None:
            return  # a trailer: RFC 9110 6.5.1 lets a gateway drop it
        self._fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        parser, fields = self._parser, self._fields
        assert parser is not None
        if self._framing_size > LINE_CAP or len(fields) > FIELDS_CAP:
            _check_size(fields)
        self._fields = []  # what comes now are trailers: RFC 9110 6.5.1 lets a gateway drop them
        self._framing_size = 0
        version = parser.get_http_version()
        http11 = version == "1.1"
        if not http11 and version != "1.0":
            raise _Malformed("unknown HTTP version")
        request = Request(
            parser.get_method(),
            self._target,
            tuple(fields),
            http11,
            parser.should_keep_alive(),
            Upload(self),
        )
        self._receiving = request
        self._queue.append(request)

    def on_body(self, data: bytes) -> None:
        assert self._receiving is not None
        self._receiving.upload.feed(data)

    def on_message_complete(self) -> None:
        if self._receiving is not None:
            self._receiving.upload.end()
            self._receiving = None
        self._framing_size = 0

    # -- one request after the other -------------------------------------------------------------

    def _next(self) -> None:
        """Begin to answer the next request, if there is one."""
        if self._queue:
            request = self._queue.popleft()
            if self._paused and not self._queue and self._behind is None:
                self._resume(_AHEAD)
            self._begin(request)
        elif self._broken is not None:
            self._refuse(self._broken)

    def _begin(self, request: Request) -> None:
        self._request = request
        coroutine = self._server.handler.begin(self, request)
        if coroutine is not None:
            self._task = self._server.loop.create_task(coroutine)

    def served(self, keep_alive: bool) -> None:
        """The request has been answered; go on to the next, if the connection is kept."""
        self._task = None
        self.upstream = None
        request = self._request
        if request is None or self.transport is None or self._successor is not None:
            self._close()
        elif request.upload.ended:
            self._resume(_BODY)  # it may have ended with more than anyone took
            self._let_go(keep_alive)
        elif self._broken is not None:
            self._hear_out()
        else:  # the rest of its body has to pass before anything else
            self._lingers, self._keeps = True, keep_alive
            self._limit_to(LINGER)
            request.upload.discard()

    def _lingered(self) -> None:
        if self._request is not None and self._request.upload.ended:
            self._let_go(self._keeps)
        elif self._broken is not None:
            self._request = None
            self._hear_out()

    def _let_go(self, keep_alive: bool) -> None:
        """Be done with a request that was answered, and whose body has passed."""
        request, self._request = self._request, None
        self._lingers = False
        if not keep_alive or self._server.closing:
            self._close()
            return
        self._limit_to(self._server.head_timeout)
        if request is not None and (self._again is None or self._again.new is not None):
            self._learn(request)
        if self.writing_paused:
            self._pause(_SLOW)  # who takes no answers is asked for no more requests
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Take up what came ahead, if anything did."""
        if self._queue:
            self._next()
            return
        if self._behind is None:
            if self._broken is not None:
                self._refuse(self._broken)
            return
        behind, self._behind = self._behind, None
        self._resume(_AHEAD)
        if behind:
            self._parse(behind)

    def _refuse(self, fault: Exception) -> None:
        error = BadRequest("malformed HTTP request")
        if isinstance(fault, _TooLarge):
            self._server.handler.refuse(self, HeadTooLarge(str(fault)), type(fault).__name__)
        else:
            self._server.handler.refuse(self, error, str(fault) or type(fault).__name__)
        self._hear_out()

    # -- the end ---------------------------------------------------------------------------------

    def hand_over(self, successor: Successor) -> None:
        """Give every byte from here on, and what came behind the request, to `successor`."""
        self._successor = successor
        behind, self._behind = self._behind, None
        self._resume(_AHEAD)
        if behind:
            successor.data_received(behind)

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self._request is None and not self._closing

    def close(self) -> None:
        """Close it if it is idle; else it closes by itself, for its server is closing."""
        if self.idle:
            self._close()

    def cut(self) -> None:
        """End the exchange under way."""
        if self._task is not None:
            self._task.cancel()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _close(self) -> None:
        self._closing = True
        if self.transport is not None:
            self.transport.close()
            if self.transport is not None and self.transport.get_write_buffer_size():
                self._limit_to(FLUSH_LIMIT)  # a client may take nothing

    def _hear_out(self) -> None:
        """Send the end of our half, and wait for the client's."""
        self._closing = True
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self._resume(_BODY | _AHEAD | _SLOW)
        self._limit_to(LINGER)
        transport.write_eof()

    # -- limits and flow -------------------------------------------------------------------------

    def _limit_to(self, seconds: float) -> None:
        self._limit = self._server.loop.time() + seconds
        if self.bucket is None or self._limit < self.bucket * GRAIN:
            self._server.wheel.add(self, self._limit)

    def expire(self, now: float) -> float | None:
        """The limit of a head, of a body that nobody takes, of a close. On the wheel for life."""
        if self._request is not None and not (self._lingers or self._closing):
            return now + self._server.head_timeout  # an exchange has limits of its own
        if now < self._limit:
            return self._limit
        if self._closing:
            self.abort()
            return None
        self._close()
        return now + FLUSH_LIMIT

    def pause_body(self) -> None:
        self._pause(_BODY)

    def resume_body(self) -> None:
        self._resume(_BODY)

    def _pause(self, why: int) -> None:
        if not self._paused and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
        self._paused |= why

    def _resume(self, why: int) -> None:
        if self._paused:
            self._paused &= ~why
            if not self._paused and self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()


class ClientServer:
    """All client connections of this process.

    Attributes:
        closing: no connection is kept for another request.
    """

    def __init__(
        self,
        handler: Handler,
        loop: asyncio.AbstractEventLoop,
        wheel: Wheel,
        *,
        head_timeout: float = HEAD_TIMEOUT,
    ) -> None:
        self.handler = handler
        self.loop = loop
        self.wheel = wheel
        self.head_timeout = head_timeout
        self.closing = False
        self.connections: set[ClientConnection] = set()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self)

    def close_idle(self) -> None:
        """Close connections that wait for a request, and the others after their answer."""
        self.closing = True
        for connection in tuple(self.connections):
            connection.close()

    def cut(self) -> None:
        """Cancel every exchange. Ahead of `abort`, so that each can end as what it is."""
        for connection in tuple(self.connections):
            connection.cut()

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in tuple(self.connections):
            connection.abort()


class Tunnel:
    """Takes the client's bytes after a 101."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def data_received(self, data: bytes) -> None:
        self._connection.write(data)
