"""From aiohttp's request to an exchange, and from its end to the canonical line.

The one place that turns errors into answers, and the one place that catches everything: whatever
happens inside, an exchange ends as complete, as an explicit error, or with its client gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, cast

from aiohttp import web
from multidict import CIMultiDict

from ..contracts import Clock, Dialect, End, Exchange
from ..errors import BadRequest, HeadTooLarge, MethodNotAllowed, ProxyError
from ..ops.telemetry import Telemetry
from ..routing.attempt import Attempt
from ..routing.chooser import Run
from ..routing.pipeline import Pipeline
from ..wire.dialects import dialect_of, error_body
from ..wire.expect import Framing
from ..wire.headers import RequestHead, read_request_head, request_id
from ..wire.relay import ClientSink
from ..wire.request import Verbatim
from ..wire.upload import ClientGone, Kept, Upload
from .cors import Cors
from .intake import is_json, look, path_of, read_hints, read_target, route_of
from .naming import answered_by
from .protocol import FIELDS_CAP, HEAD_CAP, ClientProtocol, Sent, Tunnel, peer_of

OwnRoute = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class State(Protocol):
    """What the process tells of itself."""

    @property
    def draining(self) -> bool: ...

    @property
    def cutting(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_size: int  # bytes
    idle: float  # s a client may stay silent inside its body


class Translator(Protocol):
    """The `/inference` route."""

    async def run(self, exchange: Exchange, body: bytes, sink: ClientSink, run: Run) -> None: ...


class Downlink:
    """`pipeline.Client`: sends an attempt's answer to the client as it is."""

    __slots__ = ("_exchange", "_protocol", "_transport", "sink", "upload")

    def __init__(
        self,
        exchange: Exchange,
        protocol: ClientProtocol,
        transport: asyncio.Transport,
        sink: ClientSink,
        upload: Upload,
    ) -> None:
        self._exchange = exchange
        self.upload = upload
        self._protocol = protocol
        self._transport = transport
        self.sink = sink

    def commit(self, attempt: Attempt, attempts: int) -> None:
        answer = attempt.answer
        assert answer is not None
        if attempt.upload_runs:
            self.sink.keep_alive = False  # the rest of the body would be taken for a request
        else:
            self._exchange.body = None  # a stream may last for minutes
            self.upload.forget()
        self._exchange.answered = attempt.backend
        answer.commit(self.sink, answered_by(attempt.backend, attempts))
        if not answer.ended:
            self.sink.flow_from(attempt.flow)  # after the commit: it may have filled the buffer
        if answer.framing is Framing.TUNNEL:
            connection = attempt.tunnel(self._transport)
            self._protocol.set_parser(cast(Any, Tunnel(connection)))


class Api:
    """The handler of every client request."""

    def __init__(
        self,
        pipeline: Pipeline,
        telemetry: Telemetry,
        own: Mapping[str, OwnRoute],
        translated: Mapping[str, Translator],
        limits: Limits,
        cors: Cors,
        state: State,
        clock: Clock,
    ) -> None:
        self._pipeline = pipeline
        self._telemetry = telemetry
        self._own = own
        self._translated = translated
        self._limits = limits
        self._kept = Kept()
        self._cors = cors
        self._state = state
        self._clock = clock

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path = path_of(request.raw_path)
        own = self._own.get(path)
        if own is not None:
            return await self._handle_own(own, request)
        sent = await self._exchange(request, path)
        return cast(web.StreamResponse, sent)

    async def _handle_own(self, own: OwnRoute, request: web.BaseRequest) -> web.StreamResponse:
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

    async def _exchange(self, request: web.BaseRequest, path: str) -> Sent:
        protocol = cast(ClientProtocol, request.protocol)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client left")
        exchange = Exchange(
            id="",
            method=request.method,
            target=b"",
            path=path,
            headers=request.raw_headers,
            started=self._clock(),
            client=peer_of(protocol),
            dialect=dialect_of(path),
        )
        http11 = request.version >= (1, 1)
        sink = ClientSink(
            protocol,
            transport,
            method=request.method,
            http11=http11,
            keep_alive=request.keep_alive and not self._state.draining,
        )
        run = Run()
        reason: str | None = None  # where the end itself does not say it
        upload: Upload | None = None
        try:
            head = self._read_head(exchange, sink, request, http11)
            if self._answer_itself(exchange, head, sink, request):
                run.end = End.COMPLETE
            else:
                upload = self._upload(exchange, head, request, transport)
                client = Downlink(exchange, protocol, transport, sink, upload)
                await self._run(exchange, head, client, run)
        except ProxyError as exc:
            reason = exc.reason
            run.end = End.ERROR
            self._refuse(exchange, sink, exc)
        except ClientGone:
            run.end = End.CLIENT_CLOSED
            sink.keep_alive = False
        except asyncio.CancelledError:
            reason = self._cut(sink, run)
            raise
        except Exception as exc:  # ours: the client still gets an error, the operator a line
            reason = "internal_error"
            run.end = End.ERROR
            self._telemetry.notify("server.failed", id=exchange.id, error=repr(exc)[:500])
            self._refuse(exchange, sink, ProxyError("internal error"))
        finally:
            self._tell(exchange, sink, run, reason, upload)
            if upload is not None:
                upload.forget()
            if sink.broken:
                sink.close()
        return Sent(sink.keep_alive)

    def _cut(self, sink: ClientSink, run: Run) -> str | None:
        """Tell why an exchange was cancelled: its client left, or this process stops."""
        if run.end is End.COMPLETE:
            return None
        if not self._state.cutting:
            run.end = End.CLIENT_CLOSED
            return None
        run.end = End.ERROR
        if sink.status and not sink.finished:
            sink.fail(None)
        return "draining"

    def _read_head(
        self, exchange: Exchange, sink: ClientSink, request: web.BaseRequest, http11: bool
    ) -> RequestHead:
        head, fault = RequestHead(), None
        headers = exchange.headers
        try:
            if len(headers) > FIELDS_CAP or sum([len(n) + len(v) for n, v in headers]) > HEAD_CAP:
                raise HeadTooLarge("the header section is too large")
            head = read_request_head(headers, http11)
        except ProxyError as exc:
            fault = exc
        # First of all the id, so that a refusal carries it too.
        exchange.id = request_id(head)
        origin = request.headers.get("Origin") if self._cors else None
        sink.extra = b"X-Request-Id: " + exchange.id.encode("ascii") + b"\r\n"
        sink.own_fields(self._cors.fields(origin))
        if fault is not None:
            raise fault
        exchange.target = read_target(request.method, request.raw_path, head)
        read_hints(exchange, head)
        return head

    def _answer_itself(
        self, exchange: Exchange, head: RequestHead, sink: ClientSink, request: web.BaseRequest
    ) -> bool:
        """CONNECT, TRACE, a spent Max-Forwards (RFC 9110 7.6.2), CORS preflights."""
        method = exchange.method
        if method in ("CONNECT", "TRACE"):
            sink.keep_alive = False
            raise MethodNotAllowed(f"{method} is not offered")
        if method != "OPTIONS":
            return False
        if self._cors.preflight(method, request.headers):
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

    def _upload(
        self,
        exchange: Exchange,
        head: RequestHead,
        request: web.BaseRequest,
        transport: asyncio.Transport,
    ) -> Upload:
        expects = head.rebuilt.get(b"expect", b"").lower() == b"100-continue"
        return Upload(
            request.content,
            length=head.length,
            chunked=head.chunked,
            limit=self._limits.max_body_size,
            kept=self._kept,
            idle=self._limits.idle,
            ask=transport if expects and request.version >= (1, 1) else None,
        )

    async def _run(self, exchange: Exchange, head: RequestHead, client: Downlink, run: Run) -> None:
        upload = client.upload
        translator = self._translated.get(exchange.path)
        if translator is not None:
            if exchange.method != "POST":
                raise MethodNotAllowed("only POST is offered here")
            await translator.run(exchange, await upload.whole(), client.sink, run)
            return
        route = route_of(exchange.method, exchange.path)
        exchange.inference = route is not None
        json = upload.framed and is_json(head)
        if route is not None:
            await upload.fill()
            json = json or upload.start.lstrip()[:1] == b"{"  # curl -d says it is a form
        exchange.body = upload.body if upload.framed else None
        if json:
            look(exchange, route, exchange.body, upload.start)
        await self._pipeline.run(exchange, Verbatim(exchange, head, upload, route), client, run)

    def _refuse(self, exchange: Exchange, sink: ClientSink, exc: ProxyError) -> None:
        """Tell the client an error of the proxy's own, in its dialect."""
        if sink.status:
            if not sink.finished:
                sink.fail(None)
            return
        fields: list[tuple[bytes, bytes]] = [(b"Content-Type", b"application/json")]
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
        upload: Upload | None,
    ) -> None:
        attempts = exchange.attempts
        last = attempts[-1] if attempts else None
        end = run.end or End.ERROR
        if reason is None and end is End.CLIENT_CLOSED:
            reason = "client_closed"
        elif reason is None and end is End.ERROR:
            reason = run.reason or (last.fault if last is not None else "internal_error")
        now = self._clock()
        ttft = last.started + last.ttft - exchange.started if last and last.ttft else None
        self._telemetry.exchange(
            exchange,
            end,
            status=sink.status,
            reason=reason,
            bytes_in=upload.size if upload is not None else 0,
            bytes_out=sink.bytes_out,
            ttft=ttft,
            duration=now - exchange.started,
            queued=run.queued + run.waited,
        )
