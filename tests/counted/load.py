"""The work that is counted: what the one client asks, and what the backends answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from tests.kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    chunk,
    event,
    json_bytes,
    request,
)

MODEL = "llama3.2:1b"
PIECE = 16384  # bytes of an upload that are sent at once; loopback cuts nothing so small

HEADERS = (  # of OpenAI's own client, less those that change nothing
    ("Accept", "application/json"),
    ("Accept-Encoding", "gzip, deflate"),
    ("Authorization", "Bearer sk-of-the-client"),
    ("Content-Type", "application/json"),
    ("User-Agent", "OpenAI/Python 2.8.1"),
)


def _chat(kind: str, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
    facts = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": MODEL}
    return {**facts, "choices": choices, **more}


def _delta(text: str, finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text}, "finish_reason": finish}
    return event(_chat("chat.completion.chunk", choice))


_MESSAGE = {"role": "assistant", "content": "all that was asked " * 20}
_USAGE = {"prompt_tokens": 21, "completion_tokens": 64, "total_tokens": 85}
DOCUMENT = json_bytes(  # 0.7 kB
    _chat("chat.completion", {"message": _MESSAGE, "finish_reason": "stop"}, usage=_USAGE)
)
MODELS = json_bytes({"data": [{"id": MODEL, "owned_by": "counted"}]})
FILE = json_bytes({"id": "file-1"})


class Load:
    """The backends, and the client once the proxy has a port.

    `probed` counts the questions for models. `_turn` is released by who has received a piece, and
    lets the other side send the next one.
    """

    def __init__(self) -> None:
        self.port = 0
        self.probed = 0
        self._turn = asyncio.Semaphore(0)
        self._asked = 0
        self._client: RawClient | None = None
        self._stack = AsyncExitStack()

    async def listen(self, count: int) -> list[str]:
        """Start `count` backends and return their URLs."""
        backends = [RawBackend(self._script, eager=True) for _ in range(count)]
        return [(await self._stack.enter_async_context(backend)).url for backend in backends]

    async def aclose(self) -> None:
        await self._leave()
        await self._stack.aclose()

    # -- the backends

    async def _script(self, conn: BackendConn) -> None:
        while (got := await conn.head_only()) is not None:
            if got.target == b"/v1/files":
                await conn.read_body(got, self._counted())
                await conn.send(FILE)
                continue
            await conn.read_body(got)
            if got.target == b"/v1/models":
                await conn.send(MODELS)
                self.probed += 1
            elif got.method == "GET":
                await conn.send(json_bytes({}, 404))
            elif got.json["stream"]:
                await self._stream(conn, got.json["max_tokens"])
            else:
                await conn.send(DOCUMENT)

    async def _stream(self, conn: BackendConn, tokens: int) -> None:
        # The proxy holds a stream until its first content: nobody can wait for what is before it.
        await conn.send(SSE_HEAD + chunk(_delta("")) + chunk(_delta("first")))
        for number in range(1, tokens):
            await self._turn.acquire()
            await conn.send(chunk(_delta(f" word{number}")))
        await self._turn.acquire()
        await conn.send(chunk(_delta("", "stop")))
        await self._turn.acquire()
        await conn.send(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)

    def _counted(self) -> Callable[[bytes], None]:
        left = PIECE

        def sink(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            while left <= 0:
                left += PIECE
                self._turn.release()

        return sink

    # -- the client

    async def json(self, count: int) -> None:
        """Ask for `count` documents over one connection."""
        for _ in range(count):
            await self._document(await self._connected())

    async def connect(self, count: int) -> None:
        """Ask for `count` documents, each over a connection of its own."""
        for _ in range(count):
            await self._leave()
            await self._document(await self._connected())
        await self._leave()

    async def exchange(self, count: int) -> None:
        """Ask for `count` streams of one token, over one connection."""
        for _ in range(count):
            await self._streamed(1)

    async def token(self, count: int) -> None:
        """Ask for one stream of `count` tokens."""
        await self._streamed(count)

    async def upload(self, count: int) -> None:
        """Send one body of `count` pieces."""
        client = await self._connected()
        whole = request("POST", "/v1/files", HEADERS, bytes(count * PIECE))
        # Together with the first piece: alone, the head would at times be read alone.
        first = len(whole) - (count - 1) * PIECE
        await client.send(whole[:first])
        await self._turn.acquire()
        for start in range(first, len(whole), PIECE):
            await client.send(whole[start : start + PIECE])
            await self._turn.acquire()
        await self._read(client)

    async def _connected(self) -> RawClient:
        if self._client is None:
            self._client = await RawClient(self.port).__aenter__()
        return self._client

    async def _leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.__aexit__(None, None, None)

    async def _document(self, client: RawClient) -> None:
        await client.send(self._question(False, 64))
        await self._read(client)

    async def _streamed(self, tokens: int) -> None:
        client = await self._connected()
        await client.send(self._question(True, tokens))
        answer = await client.head()
        assert answer.status == 200, answer
        await client.read_until(b"\n\n")
        for _ in range(tokens + 1):  # and the finish
            await client.read_until(b"\n\n")
            self._turn.release()
        await client.read_until(b"data: [DONE]\n\n\r\n" + LAST_CHUNK)

    async def _read(self, client: RawClient) -> None:
        answer = await client.response("POST")
        assert answer.status == 200, answer
        assert answer.complete, answer

    def _question(self, stream: bool, tokens: int) -> bytes:
        self._asked += 1  # no two bodies are alike
        messages = [{"role": "user", "content": f"What is {self._asked} times two?"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": stream}
        return request("POST", "/v1/chat/completions", HEADERS, json.dumps(body).encode())


class Mode(NamedTuple):
    """A kind of work, and how much of it makes a count."""

    unit: str  # what its figures are of
    work: Callable[[Load, int], Awaitable[None]]
    units: int
    base: int = 0  # units that are taken off, of work that has more to it than its units


MODES = {
    "json": Mode("request on an open connection", Load.json, 20),
    "connect": Mode("request and its connection", Load.connect, 20),
    "exchange": Mode("streamed answer of one token", Load.exchange, 20),
    "token": Mode("further token of a stream", Load.token, 101, base=1),
    "upload": Mode("further 16 KiB of an upload", Load.upload, 61, base=1),
}
