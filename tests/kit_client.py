"""A client on a real socket: it sends the bytes a test gives it and judges the answer strictly."""

# A wait that a test writes names its own limit: `timeout` is the plain word for it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from .kit_wire import (
    Broken,
    Fields,
    Framing,
    Wire,
    fault_of,
    framing,
    header,
    parse_fields,
    pieces,
)

Text = str | bytes


@dataclass
class Answer:
    """One answer as the client saw it; `complete` only if no byte of it can be missing."""

    status: int  # 0: no whole head came
    reason: bytes
    headers: Fields
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    framing: str = "none"  # length | chunked | eof | none
    complete: bool = False
    raw: bytes = b""  # as on the wire, from the head on
    version: str = "1.1"
    fault: str = ""  # why it is not complete, or no clean HTTP
    interim: list[Answer] = field(default_factory=list)  # 1xx answers that came before
    start: int = field(default=0, repr=False)  # offset of its head on the connection

    def header(self, name: str) -> list[bytes]:
        return header(self.headers, name)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """One client connection to 127.0.0.1:`port`."""

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self.port = port
        self.host = host
        self.wire = Wire()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        _, self.wire = await loop.create_connection(Wire, self.host, self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.wire.lost:
            self.wire.transport.abort()
            self.wire.closing = True
            await asyncio.sleep(0)

    @property
    def local_port(self) -> int:
        return int(self.wire.transport.get_extra_info("sockname")[1])

    async def send(self, data: bytes, *, timeout: float = 10.0) -> None:
        """Write, and wait while the proxy does not take it. That it closed is no error here."""
        async with asyncio.timeout(timeout):
            self.wire.write(data)
            try:
                await self.wire.drain()
            except ConnectionResetError:
                return

    async def head(self, *, timeout: float = 5.0) -> Answer:
        """Read one head, of an interim answer too; status 0 if the connection ended before."""
        start = self.wire.consumed
        try:
            async with asyncio.timeout(timeout):
                raw = await self.wire.until(b"\r\n\r\n")
        except Broken as exc:
            rest = self.wire.take(len(self.wire.buffer))
            return Answer(0, b"", [], raw=rest, fault=str(exc), start=start)
        first, fields = parse_fields(raw)
        version, _, rest = first.partition(b" ")
        status, _, reason = rest.partition(b" ")
        if not version.startswith(b"HTTP/1.") or len(status) != 3 or not status.isdigit():
            return Answer(0, b"", fields, raw=raw, fault=f"status line {first!r}", start=start)
        return Answer(
            int(status),
            reason,
            fields,
            raw=raw,
            version=version[5:].decode(),
            fault=fault_of(raw),
            start=start,
        )

    async def body(self, answer: Answer, method: str = "GET", *, timeout: float = 5.0) -> Answer:
        """Read what follows `answer`'s head, to its end by its own framing."""
        if not answer.status:
            return answer
        kept = bytearray()
        async with asyncio.timeout(timeout):
            async for piece in self.body_pieces(answer, method):
                kept += piece
        if not answer.complete and answer.framing == "chunked":
            kept += self.wire.take(len(self.wire.buffer))  # of a chunk that was cut, still seen
        answer.body = bytes(kept)
        answer.raw = bytes(self.wire.raw[answer.start : self.wire.consumed])
        return answer

    async def body_pieces(self, answer: Answer, method: str = "GET") -> AsyncIterator[bytes]:
        """The body as it arrives, kept nowhere; `answer.complete` is settled at its end."""
        bodyless = method == "HEAD" or answer.status < 200 or answer.status in (204, 304)
        tunnel = method == "CONNECT" and answer.status < 300
        shape = framing(answer.headers, request=False)
        if bodyless or tunnel:
            shape = Framing("none")
        answer.framing, answer.trailers = shape.kind, shape.trailers
        try:
            async for piece in pieces(self.wire, shape):
                yield piece
            answer.complete = not answer.fault
        except Broken as exc:
            answer.fault = str(exc)

    async def response(self, method: str = "GET", *, timeout: float = 5.0) -> Answer:
        """Read one final answer. A hang raises TimeoutError; an early end is not `complete`."""
        interim = []
        while (answer := await self.head(timeout=timeout)).status in range(100, 200):
            if answer.status == 101:
                break
            answer.complete = True
            interim.append(answer)
        answer.interim = interim
        return await self.body(answer, method, timeout=timeout)

    async def ask(self, data: bytes, method: str = "GET", *, timeout: float = 5.0) -> Answer:
        """Send one request and read its answer."""
        await self.send(data)
        return await self.response(method, timeout=timeout)

    async def read_some(self, timeout: float = 5.0) -> bytes:
        """Raw bytes as they arrive; empty at the end of the connection."""
        async with asyncio.timeout(timeout):
            return await self.wire.some()

    async def read_until(self, mark: bytes, timeout: float = 5.0) -> bytes:
        """Raw bytes up to and with `mark`. Raises Broken when the connection ends before."""
        async with asyncio.timeout(timeout):
            return await self.wire.until(mark)

    async def read_all(self, timeout: float = 5.0) -> bytes:
        """Raw bytes to the end of the connection."""
        rest = bytearray()
        while data := await self.read_some(timeout):
            rest += data
        return bytes(rest)

    async def closed(self, timeout: float = 4.0) -> bool:
        """True once the proxy closed the connection; False when it has not after `timeout` s."""
        try:
            async with asyncio.timeout(timeout):
                await self.wire.ended()
        except TimeoutError:
            return False
        return True

    def hold(self) -> None:
        """Stop reading: a client that stalls."""
        self.wire.hold()

    def unhold(self) -> None:
        self.wire.unhold()

    def finish(self) -> None:
        """Half-close: all was sent, the answer is still wanted."""
        self.wire.finish()

    def close(self) -> None:
        self.wire.close()

    def reset(self) -> None:
        self.wire.reset()


def _bytes(text: Text) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def request(
    method: Text,
    target: Text,
    headers: Iterable[tuple[Text, Text]] = (),
    body: bytes | None = None,
    chunked: bool = False,
    *,
    host: Text | None = "beacon.test",
    version: Text = "HTTP/1.1",
) -> bytes:
    """The bytes of a request: Host first, then `headers` as given, then the body's framing.

    `host=None` leaves Host out; nothing else is added. With `chunked` the body is one chunk.
    """
    lines = [_bytes(method) + b" " + _bytes(target) + b" " + _bytes(version)]
    if host is not None:
        lines.append(b"Host: " + _bytes(host))
    lines += [_bytes(name) + b": " + _bytes(value) for name, value in headers]
    payload = body or b""
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
        first = b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
        payload = first + b"0\r\n\r\n"
    elif body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + payload


def chat(
    *, stream: bool = False, model: str = "m", headers: Iterable[tuple[Text, Text]] = ()
) -> bytes:
    """A POST to /v1/chat/completions."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    fields = [("Content-Type", "application/json"), *headers]
    return request("POST", "/v1/chat/completions", fields, json.dumps(body).encode())
