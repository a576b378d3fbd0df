"""Connections to backends: found idle, or made.

Idle ones are used last in, first out, and closed before the backend would: llama.cpp and vLLM drop
an idle connection after 5 s. Names resolve to any number of addresses, which are raced (RFC 8305).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache, partial
from math import inf

import aiohappyeyeballs

from ..contracts import Backend, Fault, Stage
from ..errors import UpstreamError
from .connection import Connection
from .names import Names
from .wheel import Wheel

IDLE_LIMIT = 4.0  # s
HAPPY_EYEBALLS_DELAY = 0.25  # s, RFC 8305 section 5


def _always(_: Backend) -> bool:
    return True


class Pool:
    """All connections of this process to its backends.

    Attributes:
        keeps: whether connections to a backend are worth keeping once they are idle.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wheel: Wheel) -> None:
        self._loop = loop
        self._wheel = wheel
        self._idle: dict[str, dict[Connection, None]] = {}  # backend: connections, oldest first
        self._names = Names(loop)
        self.keeps: Callable[[Backend], bool] = _always

    def take(self, backend: Backend) -> Connection | None:
        """An idle connection, newest first; None where there is none."""
        idle = self._idle.get(backend.name)
        while idle:
            connection, _ = idle.popitem()
            connection.shelf = None
            if connection.closing:
                continue
            if self._loop.time() < connection.idle_until:
                connection.idle_until = inf
                return connection
            connection.abort()
        return None

    async def connect(self, backend: Backend) -> Connection:
        """A new connection, TLS included, within the backend's connect limit.

        Raises:
            UpstreamError: at stage connect; nothing was sent.
        """
        limit = backend.timeouts.connect or None
        try:
            async with asyncio.timeout(limit):
                return await self._connect(backend)
        except TimeoutError as exc:
            detail = f"no connection within {limit} s"
            raise UpstreamError(Fault.TIMEOUT, Stage.CONNECT, detail) from exc
        except OSError as exc:
            raise UpstreamError(
                _fault_of(exc), Stage.CONNECT, _detail_of(exc)
            ) from exc.with_traceback(None)

    async def _connect(self, backend: Backend) -> Connection:
        infos = await self._names.resolve(backend.host, backend.port)
        sock = await aiohappyeyeballs.start_connection(
            infos,
            loop=self._loop,
            happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY if len(infos) > 1 else None,
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        secure = backend.scheme == "https"
        context = tls_context(backend.tls_verify, backend.tls_ca_file) if secure else None
        # None of its own for a backend that has left: who has its name now may be another.
        shelf = self._idle.setdefault(backend.name, {}) if self.keeps(backend) else {}
        connection = Connection(self._loop, self._wheel, partial(self._put, backend, shelf))
        try:
            await self._loop.create_connection(
                lambda: connection,
                sock=sock,
                ssl=context,
                server_hostname=backend.host if secure else None,
            )
        except BaseException:
            sock.close()
            connection.connection_lost(None)
            raise
        return connection

    def _put(self, backend: Backend, idle: dict[Connection, None], connection: Connection) -> None:
        if self._idle.get(backend.name) is not idle:
            connection.abort()  # it has left
            return
        if len(idle) >= backend.max_in_flight and len(idle) >= 8:
            oldest = next(iter(idle))
            del idle[oldest]
            oldest.abort()
        if connection.reading_paused:
            connection.resume_reading()
        connection.idle_until = self._loop.time() + IDLE_LIMIT
        idle[connection] = None
        connection.shelf = idle

    def forget(self, backend: Backend) -> None:
        """Close what is idle to a backend; what is in use is closed when it is done."""
        for connection in tuple(self._idle.pop(backend.name, ())):
            connection.abort()
        self._names.forget(backend.host, backend.port)

    def close(self) -> None:
        """Close every idle connection."""
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.abort()
        self._idle.clear()


@lru_cache(maxsize=64)
def tls_context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    """A context for HTTP/1.1; certificate and name are checked unless switched off."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _fault_of(exc: OSError) -> Fault:
    if isinstance(exc, socket.gaierror):
        return Fault.DNS
    if isinstance(exc, ssl.SSLError):
        return Fault.TLS
    if isinstance(exc, ConnectionResetError | ConnectionAbortedError):
        return Fault.RESET
    return Fault.REFUSED


def _detail_of(exc: OSError) -> str:
    """What went wrong, without the backend's address: clients may see it."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {exc.verify_message}"
    return {Fault.DNS: "the backend's name does not resolve", Fault.TLS: "TLS failed"}.get(
        _fault_of(exc), "the backend refused the connection"
    )
