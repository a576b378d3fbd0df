"""Ready-made scripts for a `RawBackend`, and the bytes they are made of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import Any

from .kit_backend import CRLF, BackendConn, Received, Script


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers)


def answer(raw: bytes, *, close: bool = False) -> Script:
    """The same bytes for each request; `close` for an answer that ends with the connection."""

    async def script(conn: BackendConn) -> None:
        while await conn.request() is not None:
            await conn.send(raw)
            if close:
                return

    return script


def json_bytes(obj: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    body = json.dumps(obj).encode()
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers]
    return b"HTTP/1.1 %d Status\r\n" % status + _lines(fields) + CRLF + body


def json_answer(obj: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Script:
    """A JSON document with a Content-Length for each request."""
    return answer(json_bytes(obj, status, tuple(headers)))


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(pieces: Sequence[bytes], *, head: bytes = SSE_HEAD, gap: float = 0.0) -> Script:
    """Each piece as a chunk of its own, `gap` s apart, then the last chunk; keep-alive."""

    async def script(conn: BackendConn) -> None:
        while await conn.request() is not None:
            await conn.send(head)
            for piece in pieces:
                await conn.send(chunk(piece))
                if gap:
                    await asyncio.sleep(gap)
            await conn.send(LAST_CHUNK)

    return script


def event(obj: Any) -> bytes:
    """One `data:` event of an SSE stream."""
    return b"data: " + json.dumps(obj, separators=(",", ":")).encode() + b"\n\n"


def chat_events(text: str, n: int) -> list[bytes]:
    """A whole OpenAI stream: a role chunk, n chunks that say `text`, a finish chunk, [DONE]."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def one(delta: dict[str, str], finish: str | None = None) -> bytes:
        return event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    role = one({"role": "assistant", "content": ""})
    return [role, *[one({"content": text})] * n, one({}, "stop"), b"data: [DONE]\n\n"]


def chat_stream(text: str, n: int, *, gap: float = 0.0) -> Script:
    return sse(chat_events(text, n), gap=gap)


async def each_request(conn: BackendConn) -> AsyncIterator[Received]:
    """The whole requests of a connection, until the client closes it."""
    with suppress(ConnectionError):
        while (received := await conn.request()) is not None:
            yield received
