"""The client's connection: aiohttp's server protocol, with what a relay needs besides.

Three things aiohttp leaves to its user: an upstream that slows down with a slow client, an upload
whose framing breaks half-way (its reader would wait for ever), and bounds on what is framing alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo

from ..contracts import Dialect
from ..wire.answer import Flow
from ..wire.connection import Connection
from ..wire.dialects import error_body

HEAD_CAP = 64 << 10  # bytes of one request's header section
FIELDS_CAP = 256
LINE_CAP = 32 << 10  # bytes of the request line, and of one field
FRAMING_FACTOR = 16  # bytes on the wire for each byte of a body: chunks of one byte take six
FRAMING_SPARE = 64 << 10  # bytes beside that
FLUSH_LIMIT = 30.0  # s for the rest of an answer to leave a connection that is closing
HEAD_TIMEOUT = 75.0  # s to the end of a head, from the connect or from the last answer

Refused = Callable[[int, str], None]  # status and reason of a request that never became one


class ClientProtocol(RequestHandler):
    """One client connection."""

    __slots__ = ("_body_size", "_head_size", "_refused", "upstream")

    def __init__(self, manager: BeaconServer, refused: Refused, **options: Any) -> None:
        super().__init__(manager, **options)
        self._refused = refused
        self._head_size = self._body_size = 0
        self.upstream: Flow | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.upstream is not None:
            self.upstream.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.upstream is not None:
            self.upstream.resume_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp asks for this at each read; to parse nothing again costs more than the read.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._messages:
            if self.idle:
                self._count_head(len(data))
            elif self._current_request is not None:
                self._count_body(self._current_request.content, len(data))
            return
        self._head_size = self._body_size = 0
        last = self._messages[-1][0]
        if isinstance(last, _ErrInfo) and self._current_request is not None:
            payload = self._current_request.content
            if not payload.is_eof() and payload.exception() is None:
                payload.set_exception(RequestPayloadError(last.message))

    def close(self) -> None:
        """Finish the request under way, if any, then close.

        aiohttp only wakes an idle connection; to drain, its transport has to go as well.
        """
        idle = self.idle
        super().close()
        if idle and self.transport is not None:
            self.transport.close()

    def force_close(self) -> None:
        transport = self.transport
        super().force_close()
        if transport is not None and transport.get_write_buffer_size():
            self._loop.call_later(FLUSH_LIMIT, transport.abort)  # a client that takes nothing

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self._waiter is not None and not self._waiter.done()

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > HEAD_CAP + LINE_CAP and not self._close:
            exc = LineTooLong(b"header section", HEAD_CAP)
            self._messages.append((_ErrInfo(431, exc, exc.message), EMPTY_PAYLOAD))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
            self._pause_transport_reading()

    def _count_body(self, payload: StreamReader, size: int) -> None:
        """Refuse a body that is nearly all framing: an endless chunk extension, say."""
        if payload.is_eof():
            return
        self._body_size += size
        if self._body_size > FRAMING_SPARE + FRAMING_FACTOR * payload.total_bytes:
            self._body_size = 0
            payload.set_exception(RequestPayloadError("more framing than body"))
            self._pause_transport_reading()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse, or a handler that failed; always closes."""
        reason, text = "internal_error", "internal error"
        if isinstance(exc, HttpProcessingError):
            too_large = isinstance(exc, LineTooLong) or "Too many headers" in str(exc)
            status = 431 if too_large else 400
            reason = "request_header_too_large" if too_large else "invalid_request"
            text = "header section too large" if too_large else "malformed HTTP request"
        self._refused(status, reason if exc is None else f"{reason}: {type(exc).__name__}")
        response = web.Response(
            status=status,
            body=error_body(Dialect.UNKNOWN, status, text, reason),
            content_type="application/json",
        )
        response.force_close()
        return response


class BeaconServer(web.Server):
    """aiohttp's low-level server over `ClientProtocol`."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        refused: Refused,
        *,
        head_timeout: float = HEAD_TIMEOUT,
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._refused = refused
        self._head_timeout = head_timeout

    def cut(self) -> None:
        """Cancel every exchange. Ahead of `shutdown`, which closes the transports under them."""
        for connection in self.connections:
            task = connection._task_handler
            if task is not None:
                task.cancel()

    def pre_shutdown(self) -> None:
        """Close idle connections. Not the others: aiohttp would drop what they still receive."""
        for connection in self.connections:
            if isinstance(connection, ClientProtocol) and connection.idle:
                connection.close()

    def __call__(self) -> ClientProtocol:
        return ClientProtocol(
            self,
            self._refused,
            loop=self._loop,
            keepalive_timeout=self._head_timeout,
            access_log=None,
            auto_decompress=False,
            max_line_size=LINE_CAP,
            max_field_size=LINE_CAP,
            max_headers=FIELDS_CAP,
        )


class Tunnel:
    """Takes the client's bytes after a 101, in the place of aiohttp's WebSocket reader."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._connection.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """The exchange is cancelled with its client; nothing is left to do here."""


class Sent:
    """What a handler returns once its answer has gone out by itself."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self) -> None:
        """Nothing is left to write."""


def peer_of(protocol: RequestHandler) -> str:
    """The client's address; "" once it is gone, or over a Unix socket."""
    peer = protocol.peername
    return str(peer[0]) if isinstance(peer, tuple) else ""
