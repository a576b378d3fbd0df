"""The clients of a trace: each sends its request when its time has come, and reads, or leaves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import httptools

from .clock import Connection, Loop
from .trace import Request, Trace


@dataclass(slots=True)
class Got:
    """What one client saw."""

    id: str
    status: int = 0  # 0: none came
    backend: str = ""  # X-Beacon-Backend
    first: float | None = None  # s until the first byte of a body
    seconds: float = 0.0  # s until its end
    end: str = ""  # whole | broken | left
    ends: int = 0  # how often it ended; more than once would be wrong


class Clients:
    """All of them. `done` is a future that is done when the last one has its end."""

    def __init__(self, loop: Loop, port: int, trace: Trace) -> None:
        self._loop = loop
        self._port = port
        self.got: list[Got] = []
        self.open = len(trace.requests)
        self.done: asyncio.Future[None] = loop.create_future()
        self._start = loop.time()
        self._coming = iter(trace.requests)
        self._next()

    def _next(self) -> None:
        request = next(self._coming, None)
        if request is not None:
            self._loop.call_at(self._start + request.at, self._begin, request)

    def _begin(self, request: Request) -> None:
        self._next()
        got = Got(request.id)
        self.got.append(got)
        client = _Client(self._loop, self, request, got)
        client.begin(self._loop.connect(self._port, client))

    def ended(self, got: Got) -> None:
        got.ends += 1
        self.open -= got.ends == 1
        if not self.open and not self.done.done():
            self.done.set_result(None)


class _Client:
    """One client and its one request; llhttp tells what it reads."""

    def __init__(self, loop: Loop, clients: Clients, request: Request, got: Got) -> None:
        self._loop, self._clients, self._request, self._got = loop, clients, request, got
        self._parser = httptools.HttpResponseParser(self)
        self._begun = loop.time()
        self._connection: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connection: Connection) -> None:
        self._connection = connection
        connection.send(request_bytes(self._request))
        self._timer = self._loop.call_later(self._request.patience, self._leave)

    def _leave(self) -> None:
        assert self._connection is not None
        self._connection.leave()
        self._end("left")

    def _end(self, how: str) -> None:
        got, self._connection = self._got, None
        if self._timer is not None:
            self._timer.cancel()
        got.end, got.seconds = how, self._loop.time() - self._begun
        self._clients.ended(got)

    # -- clock.Peer ------------------------------------------------------------------------------

    def heard(self, data: bytes) -> None:
        if self._connection is not None:
            self._parser.feed_data(data)

    def lost(self) -> None:
        if self._connection is not None:
            self._end("broken")

    # -- llhttp ----------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name == b"X-Beacon-Backend":
            self._got.backend = value.decode()

    def on_headers_complete(self) -> None:
        self._got.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._got.first is not None:
            return
        self._got.first = self._loop.time() - self._begun
        assert self._timer is not None
        self._timer.cancel()
        if self._request.leaves is not None:
            self._timer = self._loop.call_later(self._request.leaves, self._leave)

    def on_message_complete(self) -> None:
        connection = self._connection
        assert connection is not None
        self._end("whole")
        connection.leave()


def request_bytes(request: Request) -> bytes:
    """A chat as an OpenAI client sends it. What it says does not matter, so it says little."""
    chat: dict[str, object] = {
        "model": request.model,
        "messages": [{"role": "user", "content": "words"}],
        "max_tokens": request.output,
        "stream": request.stream,
    }
    if request.stream:
        chat["stream_options"] = {"include_usage": True}
    body = json.dumps(chat)
    hints = {
        "Region": request.region,
        "Region-Mode": "require" if request.required else None,
        "Cost-Priority": None if request.cheap is None else str(request.cheap).lower(),
        "Timeout": request.timeout,
    }
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: proxy.example",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"X-Request-Id: {request.id}",
        *(f"X-Beacon-{name}: {value}" for name, value in hints.items() if value is not None),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
