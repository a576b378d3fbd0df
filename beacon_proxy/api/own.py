"""The own routes, answered by aiohttp's server over the client's connection.

What clients ask of models goes another way (`server.Api`). Health, metrics and the WebSocket come
seldom and want comfort: for these the connection lends its transport to aiohttp's own protocol,
one request at a time, each written out anew as the strict parser read it and without its body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from .protocol import ClientConnection, Request

OwnRoute = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_NEVER = 1e9  # s; the client's connection has a limit of its own
_BODY_FIELDS = frozenset({b"content-length", b"transfer-encoding", b"expect", b"trailer"})


class OwnRoutes:
    """aiohttp's server for the own routes."""

    def __init__(self, handler: OwnRoute, loop: asyncio.AbstractEventLoop) -> None:
        self._server = web.Server(handler, handler_cancellation=True)
        self._loop = loop

    def begin(self, connection: ClientConnection, request: Request) -> None:
        """Let aiohttp answer this request."""
        guest = connection.guest
        if not isinstance(guest, _Guest):
            assert connection.transport is not None
            guest = connection.guest = _Guest(self._server, connection, self._loop)
            guest.connection_made(connection.transport)
            if connection.writing_paused:
                guest.pause_writing()
        guest.data_received(_written_out(request))


class _Guest(RequestHandler):
    """aiohttp's side of one client connection."""

    __slots__ = ("_connection",)

    def __init__(
        self,
        server: web.Server,
        connection: ClientConnection,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        quiet: Any = {"access_log": None}  # aiohttp's own type forbids what its code allows
        super().__init__(server, loop=loop, keepalive_timeout=_NEVER, **quiet)
        self._connection = connection

    def set_parser(self, parser: Any, *args: Any, **options: Any) -> None:
        super().set_parser(parser, *args, **options)
        self._connection.hand_over(self)  # a WebSocket: no more requests

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        response, reset = await super().finish_response(request, resp, start_time)
        # Later: aiohttp has to come to its own end first.
        self._loop.call_soon(self._connection.served, bool(response.keep_alive) and not reset)
        return response, reset


def _written_out(request: Request) -> bytes:
    version = b" HTTP/1.1\r\n" if request.http11 else b" HTTP/1.0\r\n"
    parts = [request.method, b" ", request.target, version]
    for name, value in request.headers:
        if name.lower() not in _BODY_FIELDS:
            parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)
