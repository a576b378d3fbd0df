"""From a client's request to an exchange, and from its end to the canonical line.

The one place that turns errors into answers, and the one place that catches everything: whatever
happens inside, an exchange ends as complete, as an explicit error, or with its client gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from math import ceil
from typing import Any, Protocol

from aiohttp import web
from multidict import CIMultiDict

from ..contracts import Clock, Dialect, End, Exchange, Headers
from ..errors import BadRequest, MethodNotAllowed, ProxyError, told
from ..ops.telemetry import Telemetry
from ..routing.attempt import Attempt
from ..routing.chooser import Run
from ..routing.pipeline import Pipeline
from ..wire.dialects import dialect_of, error_body
from ..wire.expect import Framing
from ..wire.headers import RequestHead, find, read_request_head, request_id
from ..wire.relay import ClientSink
from ..wire.request import Verbatim
from ..wire.upload import BodyLimits, ClientGone, Upload
from .cors import Cors
from .intake import (
    is_json,
    look,
    path_of,
    read_hints,
    read_target,
    route_of,
    session_of,
    tenant_of,
)
from .naming import answered_by
from .own import OwnRoute, OwnRoutes
from .protocol import ClientConnection, Request, Tunnel

_JSON = (b"Content-Type", b"application/json")
_SERVER = (b"Server", b"beacon-proxy")
_OURS = frozenset({"CONNECT", "OPTIONS", "TRACE"})  # methods that the proxy may answer itself


# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_COMPLETE, _ERROR, _CLIENT_CLOSED = End.COMPLETE, End.ERROR, End.CLIENT_CLOSED
_TUNNEL = Framing.TUNNEL


class State(Protocol):
    """What the process tells of itself."""

    @property
    def draining(self) -> bool: ...

    @property
    def cutting(self) -> bool: ...


class Translator(Protocol):
    """The `/inference` route."""

    async def run(self, exchange: Exchange, body: bytes, sink: ClientSink, run: Run) -> None: ...


class Downlink:
    """`pipeline.Client`: sends an attempt's answer to the client as it is."""

    __slots__ = ("_connection", "_exchange", "sink", "upload")

    def __init__(self, exchange: Exchange, connection: ClientConnection, sink: ClientSink) -> None:
        self._exchange = exchange
        self._connection = connection
        self.sink = sink
        self.upload: Upload | None = None

    def commit(self, attempt: Attempt, attempts: int) -> None:
        answer, backend, upload = attempt.answer, attempt.backend, self.upload
        assert answer is not None
        if attempt.upload_runs:
            self.sink.keep_alive = False  # the rest of the body would be taken for a request
        else:
            self._exchange.body = None  # a stream may last for minutes
            if upload is not None:
                upload.forget()
        self._exchange.answered = backend
        answer.commit(
            self.sink, answered_by(backend.name, backend.provider, backend.region, attempts)
        )
        if not answer.ended:
            self.sink.flow_from(attempt.flow)  # after the commit: it may have filled the buffer
        if answer.framing is _TUNNEL and self._connection.transport is not None:
            self._connection.hand_over(Tunnel(attempt.tunnel(self._connection.transport)))


class Api:
    """The handler of every client request."""

    def __init__(
        self,
        pipeline: Pipeline,
        telemetry: Telemetry,
        own: Mapping[str, OwnRoute],
        translated: Mapping[str, Translator],
        limits: BodyLimits,
        cors: Cors,
        state: State,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        tenant_header: str | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._telemetry = telemetry
        self._own = own
        self._translated = translated
        self._limits = limits
        self._cors = cors
        self._crosses = bool(cors)
        self._state = state
        self._clock = clock
        self._tenant_header = None if tenant_header is None else tenant_header.lower().encode()
        self._own_routes = OwnRoutes(self._answer_own, loop)

    def begin(
        self, connection: ClientConnection, request: Request
    ) -> Coroutine[Any, Any, None] | None:
        """See `protocol.Handler`."""
        path = request.path
        if path is None:
            path = request.path = path_of(request.target)
        if path in self._own:
            self._own_routes.begin(connection, request)
            return None
        return self._answer(connection, request, path)

    def refuse(self, connection: ClientConnection, error: ProxyError, cause: str) -> None:
        """See `protocol.Handler`."""
        self._telemetry.notify(
            "request.refused", status=error.status, reason=f"{error.reason}: {cause}"
        )
        if connection.transport is not None:
            sink = ClientSink(connection, connection.transport, "GET", True, False)
            body = error_body(Dialect.UNKNOWN, error.status, error.message, error.reason)
            sink.send_own(error.status, (_JSON, _SERVER), body)

    async def _answer_own(self, request: web.BaseRequest) -> web.StreamResponse:
        own = self._own[path_of(request.raw_path.encode("utf-8", "surrogateescape"))]
        origin = request.headers.get("Origin")
        upgrade = request.headers.get("Upgrade")
        if upgrade and not self._cors.may_listen(origin, request.headers.get("Host", "")):
            body = error_body(Dialect.UNKNOWN, 403, "origin not allowed", "origin_not_allowed")
            response: web.StreamResponse = web.Response(
                status=403, body=body, content_type="application/json"
            )
        elif self._cors.preflight(request.method, request.headers):
            response = web.Response(status=204)
        else:
            response = await own(request)
        if not response.prepared:
            response.headers["Server"] = "beacon-proxy"
            response.headers.update(CIMultiDict(self._cors.fields(origin)))
            if self._state.draining:
                response.force_close()
        return response

    async def _answer(self, connection: ClientConnection, request: Request, path: str) -> None:
        """Take one request to its end; nothing is raised but CancelledError."""
        transport = connection.transport
        if transport is None:
            return
        method = request.method.decode("ascii")
        exchange = Exchange(
            "",
            method,
            request.target,
            path,
            request.headers,
            self._clock(),
            connection.peer,
            dialect_of(path),
        )
        if self._tenant_header is not None:
            exchange.tenant = tenant_of(request.headers, self._tenant_header)
        keep_alive = request.keep_alive and not self._state.draining
        sink = ClientSink(connection, transport, method, request.http11, keep_alive)
        run = Run()
        client = Downlink(exchange, connection, sink)
        reason: str | None = None  # where the end itself does not say it
        try:
            head = self._read_head(exchange, sink, request)
            if method in _OURS and self._answer_itself(exchange, head, sink):
                run.end = _COMPLETE
            else:
                client.upload = upload = request.upload
                expects = head.rebuilt.get(b"expect")
                asked = expects is not None and expects.lower() == b"100-continue"
                upload.open(
                    self._limits,
                    head.length,
                    head.chunked,
                    transport if asked and request.http11 else None,
                )
                await self._run(exchange, head, upload, client, run)
        except ProxyError as exc:
            reason = exc.reason
            run.end = _ERROR
            self._refuse(exchange, sink, exc)
        except ClientGone:
            run.end = _CLIENT_CLOSED
            sink.keep_alive = False
        except asyncio.CancelledError:
            reason = self._cut(sink, run)
            raise
        except Exception as exc:  # ours: the client still gets an error, the operator a line
            reason = "internal_error"
            run.end = _ERROR
            self._telemetry.notify("server.failed", id=exchange.id, error=told(exc))
            self._refuse(exchange, sink, ProxyError("internal error"))
        finally:
            try:
                self._tell(exchange, sink, run, reason, request.upload)
            except Exception as exc:  # a plugin's facts that are none: its client must not wait
                sink.keep_alive = False
                self._telemetry.notify("server.failed", id=exchange.id, error=told(exc))
            request.upload.forget()
            if sink.broken:
                sink.close()
            connection.served(sink.keep_alive)

    def _cut(self, sink: ClientSink, run: Run) -> str | None:
        """Tell why an exchange was cancelled: its client left, or this process stops."""
        if run.end is _COMPLETE:
            return None
        if not self._state.cutting:
            run.end = _CLIENT_CLOSED
            return None
        run.end = _ERROR
        if sink.status and not sink.finished:
            sink.fail(None)
        return "draining"

    def _read_head(self, exchange: Exchange, sink: ClientSink, request: Request) -> RequestHead:
        headers, head, fault = request.headers, request.head, None
        new = head is None
        if new:
            try:
                head = read_request_head(headers, request.http11)
            except ProxyError as exc:
                fault = exc
        # First of all the id, so that a refusal carries it too.
        exchange.id = request_id(head.rebuilt.get(b"x-request-id") if head is not None else None)
        sink.extra = b"X-Request-Id: %b\r\n" % exchange.id.encode("ascii")
        if self._crosses:
            sink.own_fields(self._cors.fields(_origin(headers)))
        if head is None:
            raise fault or BadRequest("malformed HTTP request")
        if new:
            exchange.target = read_target(exchange.method, request.target, head)
            request.head = head
        if head.hints:
            read_hints(exchange, head)
        return head

    def _answer_itself(self, exchange: Exchange, head: RequestHead, sink: ClientSink) -> bool:
        """CONNECT, TRACE, a spent Max-Forwards (RFC 9110 7.6.2), CORS preflights."""
        method = exchange.method
        if method != "OPTIONS":
            sink.keep_alive = False
            raise MethodNotAllowed(f"{method} is not offered")
        if self._cors:
            asked = find(exchange.headers, b"access-control-request-method")
            if asked is not None and self._cors.allows(_origin(exchange.headers)):
                sink.send_own(204, (), b"")
                return True
        hops = head.rebuilt.get(b"max-forwards")
        if hops is not None and not hops.isdigit():
            raise BadRequest("Max-Forwards must be a number")
        if exchange.target == b"*" or (hops is not None and int(hops[:9]) == 0):
            sink.send_own(204, ((b"Allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),), b"")
            return True
        if hops is not None:
            head.rebuilt[b"max-forwards"] = b"%d" % (int(hops[:9]) - 1)
        return False

    async def _run(
        self, exchange: Exchange, head: RequestHead, upload: Upload, client: Downlink, run: Run
    ) -> None:
        sessions = self._pipeline.fleet.reads_sessions
        if sessions:
            exchange.session = session_of(exchange.headers)
        translator = self._translated.get(exchange.path)
        if translator is not None:
            if exchange.method != "POST":
                raise MethodNotAllowed("only POST is offered here")
            await translator.run(exchange, await upload.whole(), client.sink, run)
            return
        route = route_of(exchange.method, exchange.path)
        exchange.inference = route is not None
        json = upload.framed and is_json(head.content_type)
        if route is not None:
            if not upload.complete:
                await upload.fill()
            json = json or upload.start.lstrip()[:1] == b"{"  # curl -d says it is a form
        exchange.body = upload.body if upload.framed else None
        if json:
            look(exchange, route, upload, sessions)
        await self._pipeline.run(exchange, Verbatim(exchange, head, upload, route), client, run)

    def _refuse(self, exchange: Exchange, sink: ClientSink, exc: ProxyError) -> None:
        """Tell the client an error of the proxy's own, in its dialect."""
        if sink.status:
            if not sink.finished:
                sink.fail(None)
            return
        fields: list[tuple[bytes, bytes]] = [_JSON]
        if exc.retry_after is not None:
            fields.append((b"Retry-After", b"%d" % max(1, ceil(exc.retry_after))))
        if exc.status in (400, 408, 413, 431):
            sink.keep_alive = False  # where the next request begins is no longer certain
        if exchange.attempts:
            fields.append((b"X-Beacon-Attempts", b"%d" % len(exchange.attempts)))
        if exc.status == 405 and exchange.path in self._translated:
            fields.append((b"Allow", b"POST"))
        body = error_body(exchange.dialect, exc.status, exc.message, exc.reason)
        sink.send_own(exc.status, tuple(fields), body)

    def _tell(
        self,
        exchange: Exchange,
        sink: ClientSink,
        run: Run,
        reason: str | None,
        upload: Upload,
    ) -> None:
        attempts = exchange.attempts
        last = attempts[-1] if attempts else None
        end = run.end or _ERROR
        if reason is None and end is _CLIENT_CLOSED:
            reason = "client_closed"
        elif reason is None and end is _ERROR:
            reason = run.reason or (last.fault if last is not None else "internal_error")
        now = self._clock()
        ttft = last.started + last.ttft - exchange.started if last and last.ttft else None
        self._telemetry.exchange(
            exchange,
            end,
            status=sink.status,
            reason=reason,
            bytes_in=upload.size,
            bytes_out=sink.bytes_out,
            ttft=ttft,
            duration=now - exchange.started,
            queued=run.queued + run.waited,
        )


def _origin(headers: Headers) -> str | None:
    origin = find(headers, b"origin")
    return None if origin is None else origin.decode("latin-1")
