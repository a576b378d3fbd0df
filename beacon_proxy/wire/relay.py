"""From a backend's answer into the client's transport: the head, the framing, the end.

Rule 1: what the backend framed by Content-Length keeps it, event streams on inference routes aside.
Every other body is chunked for an HTTP/1.1 client, each piece flushed as a chunk of its own, and
ended by the close of the connection for an HTTP/1.0 client.
Rule 2: an answer that did not end well must not look complete: no last chunk, fewer bytes than
promised, or a reset where the end of the connection is the end of the body.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from email.utils import formatdate
from sys import maxsize
from typing import Protocol

from ..contracts import Headers
from .answer import Answer, Flow
from .expect import Framing
from .headers import AnswerHead, answer_lines, phrase, trailer_lines

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_LENGTH, _CHUNKED, _EOF, _TUNNEL = Framing.LENGTH, Framing.CHUNKED, Framing.EOF, Framing.TUNNEL
_BODILESS = (204, 304)


class Downstream(Protocol):
    """The client's connection, as far as a relay steers it."""

    upstream: Flow | None  # paused while the client's write buffer is full

    @property
    def writing_paused(self) -> bool: ...


class ClientSink:
    """Writes one answer to one client.

    Attributes:
        status: of the head that was sent; 0 before.
        bytes_out: body bytes written.
        extra: header lines for every answer of this exchange, whoever makes it.
        keep_alive: the connection may carry another request.
        broken: the answer ended visibly incomplete.
    """

    __slots__ = (
        "_chunked",
        "_downstream",
        "_held",
        "_http11",
        "_method",
        "_replaced",
        "_transport",
        "_until_close",
        "_waiting",
        "broken",
        "bytes_out",
        "extra",
        "finished",
        "keep_alive",
        "status",
    )

    def __init__(
        self,
        downstream: Downstream,
        transport: asyncio.Transport,
        method: str,
        http11: bool,
        keep_alive: bool,
    ) -> None:
        self._downstream = downstream
        self._transport = transport
        self._method = method
        self._http11 = http11
        self.extra = b""
        self._replaced: frozenset[bytes] = frozenset()
        self._chunked = self._until_close = False
        self._held: list[bytes] | None = None
        self.keep_alive = keep_alive
        self._waiting = maxsize  # bytes not yet taken by the client, when last asked
        self.status = 0
        self.bytes_out = 0
        self.broken = self.finished = False

    def own_fields(self, fields: Mapping[str, str]) -> None:
        """Fields that go with every answer, in the place of a backend's of the same names."""
        if fields:
            self.extra += "".join(f"{n}: {v}\r\n" for n, v in fields.items()).encode(
                "latin-1", "replace"
            )
            self._replaced = frozenset(n.lower().encode("latin-1") for n in fields) - {b"vary"}

    def start(self, answer: Answer, added: bytes) -> None:
        head, framing = answer.head, answer.framing
        assert head is not None
        self.status = status = head.status
        # A stream whose end mark is awaited could end short and still keep its promised length.
        watched = answer.watch is not None and framing is _LENGTH
        if watched or framing is _CHUNKED or framing is _EOF:
            self._chunked = self._http11
            self._until_close = not self._http11
            if self._until_close:
                self.keep_alive = False
        if watched or head.special or self._replaced or status == 204:
            parts = [head.line, self._looked_at(head, watched), added]
        else:
            parts = [*head.parts, added]
        if framing is _TUNNEL:
            parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
            self.keep_alive = False
        elif head.events and not head.accel:
            parts.append(b"X-Accel-Buffering: no\r\n")  # else an nginx in front holds tokens back
        self._end_head(parts)

    def _looked_at(self, head: AnswerHead, watched: bool) -> bytes:
        """The lines of a head that not all pass."""
        dropped = self._replaced
        if watched or head.status == 204:
            dropped |= {b"content-length"}
        headers = tuple(pair for pair in head.headers if pair[0].lower() not in dropped)
        return answer_lines(headers, trailers_pass=self._chunked)

    def _own_head(self, status: int, lines: bytes) -> None:
        self.status = status
        self._end_head([b"HTTP/1.1 %d %b\r\n" % (status, phrase(status)), lines])

    def _end_head(self, parts: list[bytes]) -> None:
        parts.append(self.extra)
        if self._chunked:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        if not self.keep_alive:
            if self.status != 101:
                parts.append(b"Connection: close\r\n")
        elif not self._http11:
            parts.append(b"Connection: keep-alive\r\n")
        parts.append(b"\r\n")
        self._held = parts  # head, body and end leave in one system call where they are all there

    def flow_from(self, upstream: Flow | None) -> None:
        """Let the client's pace steer `upstream`; None ends that."""
        self._downstream.upstream = upstream
        if upstream is not None and self._downstream.writing_paused:
            upstream.pause_reading()

    def write(self, data: bytes) -> None:
        self.bytes_out += len(data)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._held is not None:
            self._held.append(data)
            return
        transport = self._transport
        if not transport.is_closing():
            transport.write(data)

    def finish(self, trailers: Headers) -> None:
        # First of all: the write may fill the buffer, and the connection may serve another by now.
        self._downstream.upstream = None
        if self._chunked:
            self._send(b"0\r\n" + trailer_lines(trailers) + b"\r\n" if trailers else b"0\r\n\r\n")
        self.finished = True

    def moved(self) -> bool:
        waiting, self._waiting = self._waiting, self._transport.get_write_buffer_size()
        return self._waiting < waiting

    def fail(self, event: bytes | None) -> None:
        self._downstream.upstream = None
        self.broken = self.finished = True
        self.keep_alive = False
        if event is not None and (self._chunked or self._until_close):
            self.write(event)

    def close(self) -> None:
        """End the connection under a broken answer, once its exchange has been recorded.

        Not in `fail`: the close would cancel the exchange as if its client had left.
        """
        if self._until_close or self._downstream.writing_paused:
            reset(self._transport)  # nor wait for a client that takes nothing
        else:
            self._transport.close()  # what was written still goes out

    def begin_own(self, status: int, headers: Headers, added: bytes = b"") -> None:
        """Begin an answer of the proxy's own; pieces and an end follow."""
        self._chunked = self._http11
        self._until_close = not self._http11
        if self._until_close:
            self.keep_alive = False
        self._own_head(status, _lines(headers) + added + _date())
        self.flush()

    def send_own(self, status: int, headers: Headers, body: bytes, added: bytes = b"") -> None:
        """An answer of the proxy's own, whole."""
        self._chunked = False
        lines = _lines(headers) + added + _date()
        if status not in _BODILESS:
            lines += b"Content-Length: %d\r\n" % len(body)
        self._own_head(status, lines)
        if self._method != "HEAD" and body:
            self.bytes_out += len(body)
            self._send(body)
        self.flush()
        self.finished = True

    def flush(self) -> None:
        held, self._held = self._held, None
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def _send(self, data: bytes) -> None:
        if self._held is not None:
            self._held.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)


def _date() -> bytes:
    """RFC 9110 6.6.1: who makes an answer dates it."""
    return b"Date: " + formatdate(usegmt=True).encode("ascii") + b"\r\n"


def _lines(headers: Headers) -> bytes:
    return b"".join([name + b": " + value + b"\r\n" for name, value in headers])


def reset(transport: asyncio.Transport) -> None:
    """Close with a TCP reset, so that a body ended by the close cannot look complete."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
