"""STR: every piece is passed on before the next one exists.

The backend writes piece n+1 only once the client has seen piece n, so any buffering anywhere shows
as a hang. On an inference route the head and what says nothing (a role chunk, a ping) come with the
first content at the latest: that is where the answer is committed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chunk,
    each_request,
    event,
    eventually,
    proxy,
    request,
)
from .kit_wire import framing, pieces

PATIENCE = 2.0  # s that a piece may take before it counts as held back
STREAM = b'{"model": "m", "stream": true}'


def head(kind: bytes, *lines: bytes) -> bytes:
    fields = [b"HTTP/1.1 200 OK", b"Content-Type: " + kind, *lines]
    return b"\r\n".join(fields) + b"\r\n\r\n"


CHUNKED = b"Transfer-Encoding: chunked"


class Stepper:
    """A backend's script that waits for the client after each piece, and the client's half."""

    def __init__(self, start: bytes, steps: Sequence[bytes], end: bytes | None) -> None:
        self.start, self.steps, self.end = start, steps, end
        self.go = asyncio.Semaphore(0)

    async def script(self, conn: BackendConn) -> None:
        await conn.request()
        await conn.send(self.start)
        for step in self.steps:
            await self.go.acquire()
            await conn.send(step)
        await self.go.acquire()
        if self.end is not None:
            await conn.send(self.end)
            await conn.wait_closed()


class Reader:
    """The body of one answer as it arrives."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.body = bytearray()
        self._pieces: AsyncIterator[bytes]

    async def head(self) -> int:
        answer = await self.client.head(timeout=PATIENCE)
        self._pieces = pieces(self.client.wire, framing(answer.headers, request=False))
        return answer.status

    async def upto(self, size: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.body) < size:
                self.body += await anext(self._pieces)

    async def rest(self) -> None:
        async with asyncio.timeout(PATIENCE):
            async for piece in self._pieces:
                self.body += piece


async def walk(client: RawClient, stepper: Stepper, parts: Sequence[bytes]) -> None:
    """See each of `parts` before the backend is let on, then the end while it stays connected."""
    reader = Reader(client)
    assert await reader.head() == 200
    size = 0
    for part in parts:
        size += len(part)
        await reader.upto(size)
        assert reader.body == b"".join(parts)[:size]
        stepper.go.release()
    await reader.rest()
    assert reader.body == b"".join(parts)


async def lockstep(
    raw: bytes,
    start: bytes,
    parts: Sequence[bytes],
    *,
    chunked: bool = True,
    closes: bool = False,
) -> None:
    """One stream, piece by piece; the first of `parts` is sent along with the head."""
    framed = [chunk(part) for part in parts] if chunked else list(parts)
    end = None if closes else LAST_CHUNK if chunked else b""
    stepper = Stepper(start + framed[0], framed[1:], end)
    async with (
        RawBackend(stepper.script) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(raw)
        await walk(client, stepper, parts)
        await eventually(lambda: p.in_flight() == 0)
        (line,) = await p.exchanges(1)
        assert line["end"] == "complete"


TOKENS = [b"one ", b"two ", b"three"]


async def test_str_01_head_reaches_the_client_before_the_first_body_byte() -> None:
    """An EventSource opens with the head; an event stream may say nothing for minutes."""
    stepper = Stepper(SSE_HEAD, [chunk(part) for part in TOKENS], LAST_CHUNK)
    async with (
        RawBackend(stepper.script) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("GET", "/events"))
        assert (await client.head(timeout=PATIENCE)).status == 200
        for _ in range(len(TOKENS) + 1):
            stepper.go.release()
        await client.read_until(LAST_CHUNK)


@pytest.mark.parametrize(
    ("start", "chunked", "closes"),
    [
        pytest.param(head(b"text/event-stream", CHUNKED), True, False, id="STR-02 chunked"),
        pytest.param(
            head(b"text/event-stream", b"Content-Length: 13"), False, False, id="STR-03 a length"
        ),
        pytest.param(head(b"text/event-stream"), False, True, id="STR-04 ends with the connection"),
        pytest.param(
            b"HTTP/1.0 200 OK\r\n\r\n", False, True, id="STR-04 HTTP/1.0, ends with the connection"
        ),
    ],
)
async def test_pieces_pass_at_once_in_any_framing(
    start: bytes, chunked: bool, closes: bool
) -> None:
    await lockstep(request("GET", "/x"), start, TOKENS, chunked=chunked, closes=closes)


async def test_str_05_one_byte_pieces() -> None:
    parts = [bytes([byte]) for byte in b'data: {"a": "\xc3\xa9"}\r\n\r\n\x00\xff']
    await lockstep(request("GET", "/x"), SSE_HEAD, parts)


async def test_str_06_half_an_event_passes_without_its_other_half() -> None:
    parts = [b'data: {"te', b'xt": "caf\xc3', b'\xa9"}', b"\n", b"\n", b"data: [DO", b"NE]\n\n"]
    await lockstep(request("GET", "/x"), SSE_HEAD, parts)


async def test_str_07_comments_pings_and_line_ends_pass_untouched() -> None:
    parts = [
        b"\xef\xbb\xbf: a byte order mark before a comment\r\n\r\n",
        b":\n\n",
        b": ping - 2026-01-01 00:00:00\r\n\r\n",
        b"retry: 3000\rid: 7\revent: x\rdata: cr only\r\r",
        b"event:no-space\ndata\ndata:\n\n",
        b"data: a\ndata: b\n\n\n\n",
        b"data: no end",
    ]
    await lockstep(request("GET", "/x"), SSE_HEAD, parts)


async def test_str_08_one_piece_with_many_events_stays_whole() -> None:
    parts = [b"data: %d\n\n" % n * 50 for n in range(5)]
    await lockstep(request("GET", "/x"), SSE_HEAD, parts)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(b"application/x-ndjson", id="STR-09 NDJSON"),
        pytest.param(b"application/json-seq", id="STR-10 JSON sequence"),
        pytest.param(b"application/octet-stream", id="STR-10 bytes"),
        pytest.param(b"text/plain; charset=utf-8", id="STR-10 text"),
        pytest.param(b"audio/mpeg", id="STR-10 speech"),
        pytest.param(b"multipart/x-mixed-replace; boundary=x", id="STR-10 multipart"),
    ],
)
@pytest.mark.parametrize("path", ["/x", "/v1/audio/speech"])
async def test_pieces_pass_at_once_whatever_their_type(kind: bytes, path: str) -> None:
    parts = [b'{"n":%d}\n' % n for n in range(4)]
    await lockstep(request("POST", path, body=b'{"model":"m"}'), head(kind, CHUNKED), parts)


def chat_chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    base = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event({**base, "choices": [choice], **more})


def named(kind: str, **fields: Any) -> bytes:
    """An event with a name, as Anthropic and OpenAI's Responses send them."""
    return b"event: %b\n" % kind.encode() + event({"type": kind, **fields})


def line(**fields: Any) -> bytes:
    return (
        json.dumps({"model": "m", "created_at": "2026-01-01T00:00:00Z", **fields}).encode() + b"\n"
    )


def call_delta(**function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}


ROLE = chat_chunk({"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
USAGE = event(
    {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }
)

CHAT = [
    ROLE + chat_chunk({"content": "Hel"}),
    chat_chunk({"content": "l\u00f6"}),
    chat_chunk({"content": ""}),
    chat_chunk({"content": " [DONE]\n\ndata: x"}),
    chat_chunk({}, "stop"),
    DONE,
]
CHAT_USAGE = [*CHAT[:-1], USAGE, DONE]
CHAT_TOOLS = [
    ROLE + chat_chunk(call_delta(name="weather", arguments="")),
    chat_chunk(call_delta(arguments='{"city":')),
    chat_chunk(call_delta(arguments=' "Paris"}')),
    chat_chunk({}, "tool_calls"),
    DONE,
]
CHAT_REASONING = [
    ROLE + chat_chunk({"reasoning_content": "Let me"}),
    chat_chunk({"reasoning_content": " see"}),
    chat_chunk({"content": "42"}),
    chat_chunk({}, "stop"),
    DONE,
]
CHAT_PINGS = [
    b": ping\n\n" + ROLE + chat_chunk({"content": "a"}),
    b": ping\n\n",
    chat_chunk({"content": "b"}),
    b": ping\n\n",
    chat_chunk({}, "length"),
    DONE,
]
CHAT_NO_DONE = [ROLE + chat_chunk({"content": "a"}), chat_chunk({"content": "b"}, "stop")]
COMPLETIONS = [
    event(
        {"object": "text_completion", "choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    ),
    event(
        {"object": "text_completion", "choices": [{"index": 0, "text": "b", "finish_reason": None}]}
    ),
    event(
        {
            "object": "text_completion",
            "choices": [{"index": 0, "text": "", "finish_reason": "stop"}],
        }
    ),
    DONE,
]
MESSAGES = [
    named(
        "message_start",
        message={
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "m",
            "usage": {"input_tokens": 3, "output_tokens": 1},
        },
    )
    + named("content_block_start", index=0, content_block={"type": "text", "text": ""})
    + named("ping")
    + named("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hel"}),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": "lo"}),
    named("ping"),
    named("content_block_stop", index=0),
    named("an_event_type_of_next_year", index=0),
    named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4}),
    named("message_stop"),
]
RESPONSES = [
    named("response.created", response={"id": "resp_1", "status": "in_progress"})
    + named("response.in_progress", response={"id": "resp_1", "status": "in_progress"})
    + named("response.output_item.added", output_index=0, item={"type": "message", "content": []})
    + named("response.content_part.added", output_index=0, part={"type": "output_text", "text": ""})
    + named("response.output_text.delta", output_index=0, delta="Hel"),
    named("response.output_text.delta", output_index=0, delta="lo"),
    named("response.output_text.done", output_index=0, text="Hello"),
    named("response.output_item.done", output_index=0, item={"type": "message"}),
    named("response.completed", response={"id": "resp_1", "usage": {"output_tokens": 2}}),
]
OLLAMA_CHAT = [
    line(message={"role": "assistant", "content": "Hel"}, done=False),
    line(message={"role": "assistant", "content": "lo"}, done=False),
    line(message={"role": "assistant", "content": ""}, done=True, done_reason="stop", eval_count=2),
]
OLLAMA_GENERATE = [
    line(response="Hel", done=False),
    line(response="lo", done=False),
    line(response="", done=True, done_reason="stop", context=[1, 2, 3]),
]
OLLAMA_THINKING = [
    line(message={"role": "assistant", "content": "", "thinking": "hm"}, done=False),
    line(message={"role": "assistant", "content": "42"}, done=False),
    line(message={"role": "assistant", "content": ""}, done=True, done_reason="stop"),
]

SSE = b"text/event-stream"
NDJSON = b"application/x-ndjson"
STREAMS = [
    pytest.param("/v1/chat/completions", SSE, CHAT, id="STR-20 chat"),
    pytest.param("/v1/chat/completions", SSE, CHAT_USAGE, id="STR-21 chat with usage"),
    pytest.param("/v1/chat/completions", SSE, CHAT_TOOLS, id="STR-22 chat with tool calls"),
    pytest.param("/v1/chat/completions", SSE, CHAT_REASONING, id="STR-23 chat with reasoning"),
    pytest.param("/v1/chat/completions", SSE, CHAT_PINGS, id="STR-24 chat with pings"),
    pytest.param("/v1/chat/completions", SSE, CHAT_NO_DONE, id="STR-25 chat without [DONE]"),
    pytest.param("/v1/completions", SSE, COMPLETIONS, id="STR-26 completions"),
    pytest.param("/v1/messages", SSE, MESSAGES, id="STR-27 Anthropic messages"),
    pytest.param("/v1/responses", SSE, RESPONSES, id="STR-28 responses"),
    pytest.param("/api/chat", NDJSON, OLLAMA_CHAT, id="STR-29 Ollama chat"),
    pytest.param("/api/generate", NDJSON, OLLAMA_GENERATE, id="STR-30 Ollama generate"),
    pytest.param("/api/chat", NDJSON, OLLAMA_THINKING, id="STR-31 Ollama thinking"),
]


@pytest.mark.parametrize(("path", "kind", "events"), STREAMS)
async def test_stream_of_an_inference_route_passes_event_by_event(
    path: str, kind: bytes, events: list[bytes]
) -> None:
    await lockstep(request("POST", path, body=STREAM), head(kind, CHUNKED), events)


@pytest.mark.parametrize(("path", "kind", "events"), STREAMS)
async def test_str_32_stream_of_an_inference_route_split_anywhere_passes_piece_by_piece(
    path: str, kind: bytes, events: list[bytes]
) -> None:
    """From the first content on an event boundary means nothing."""
    rest = b"".join(events[1:])
    parts = [events[0], *(rest[at : at + 37] for at in range(0, len(rest), 37))]
    await lockstep(request("POST", path, body=STREAM), head(kind, CHUNKED), parts)


async def test_str_33_stream_that_nobody_asked_for_passes_event_by_event() -> None:
    body = b'{"model": "m", "messages": []}'
    raw = request("POST", "/v1/chat/completions", body=body)
    await lockstep(raw, SSE_HEAD, CHAT)


async def test_str_34_document_where_a_stream_was_asked_for_passes_whole() -> None:
    body = b'{"object":"chat.completion","choices":[{"message":{"content":"hi"}}]}'
    start = head(b"application/json", b"Content-Length: %d" % len(body))
    await lockstep(
        request("POST", "/v1/chat/completions", body=STREAM), start, [body], chunked=False
    )


async def test_str_35_what_says_nothing_is_held_but_never_lost() -> None:
    """Role chunk, ping and first content come in three segments; the client gets all, in order."""
    parts = [b": queued\n\n", ROLE, b": ping\n\n", *CHAT[1:]]
    stepper = Stepper(SSE_HEAD, [chunk(part) for part in parts], LAST_CHUNK)
    async with (
        RawBackend(stepper.script) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("POST", "/v1/chat/completions", body=STREAM))
        for _ in range(len(parts) + 1):
            stepper.go.release()
        got = await client.response("POST")
        assert (got.status, got.body, got.complete) == (200, b"".join(parts), True)


@pytest.mark.parametrize("path", ["/x", "/v1/chat/completions"])
async def test_str_11_silence_between_two_tokens_does_not_end_the_stream(path: str) -> None:
    """The limits for the first content and for a document say nothing about what follows."""
    stepper = Stepper(SSE_HEAD + chunk(CHAT[0]), [chunk(x) for x in CHAT[1:]], LAST_CHUNK)
    async with (
        RawBackend(stepper.script) as backend,
        proxy(backend, timeouts={"first_content": 0.8, "document": 0.8, "idle": 5}) as p,
        RawClient(p.port) as client,
    ):
        await client.send(request("POST", path, body=STREAM))
        await client.read_until(chunk(CHAT[0]))
        with pytest.raises(TimeoutError):
            await client.read_some(timeout=1.2)
        for _ in range(len(CHAT)):
            stepper.go.release()
        rest = await client.read_until(LAST_CHUNK)
        assert rest.count(b"data: ") == b"".join(CHAT[1:]).count(b"data: ")


async def test_str_13_twenty_thousand_small_chunks_arrive_whole_and_in_order() -> None:
    parts = [b"%d;" % n for n in range(20_000)]

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        for at in range(0, len(parts), 100):
            await conn.send(b"".join(map(chunk, parts[at : at + 100])))
        await conn.send(LAST_CHUNK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/x"))
        got = await client.response(timeout=10)
        assert (got.body == b"".join(parts), got.complete) == (True, True)


async def test_str_14_big_piece_between_small_ones() -> None:
    parts = [b"small", bytes(range(256)) * 4096, b"small again"]
    await lockstep(request("GET", "/x"), SSE_HEAD, parts)


async def test_str_12_stream_reaches_an_http_1_0_client_piece_by_piece() -> None:
    await lockstep(b"GET /x HTTP/1.0\r\nHost: x\r\n\r\n", SSE_HEAD, TOKENS)


async def read_upload(conn: BackendConn) -> None:
    received = await conn.head_only()
    assert received is not None
    await conn.read_body(received)
    await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


UPLOAD = [b"first ", b"second ", b"x" * 3000, b"last"]


@pytest.mark.parametrize(
    ("framing_line", "wrap"),
    [
        pytest.param(b"Transfer-Encoding: chunked", True, id="STR-15 chunked"),
        pytest.param(b"Content-Length: %d" % sum(map(len, UPLOAD)), False, id="STR-16 a length"),
    ],
)
async def test_each_part_of_an_upload_reaches_the_backend_before_the_next_exists(
    framing_line: bytes, wrap: bool
) -> None:
    async with RawBackend(read_upload) as backend, proxy(backend) as p, RawClient(p.port) as client:
        lines = b"POST /files HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
        await client.send(lines + framing_line + b"\r\n\r\n")
        size = 0
        for part in UPLOAD:
            await client.send(chunk(part) if wrap else part)
            size += len(part)
            await eventually(lambda: backend.requests and backend.requests[0].size == size)  # noqa: B023
        await client.send(LAST_CHUNK if wrap else b"")
        assert (await client.response("POST")).body == b"ok"
        assert backend.requests[0].body == b"".join(UPLOAD)


async def test_str_17_both_directions_at_once() -> None:
    """The backend answers each part of the upload before the client sends the next."""

    async def echo(conn: BackendConn) -> None:
        received = await conn.head_only()
        assert received is not None
        conn.write(head(b"application/octet-stream", CHUNKED))
        await conn.read_body(received, lambda piece: conn.write(chunk(piece)))
        await conn.send(LAST_CHUNK)

    async with RawBackend(echo) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(
            b"POST /duplex HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunk(UPLOAD[0])
        )
        reader = Reader(client)
        assert await reader.head() == 200
        await reader.upto(len(UPLOAD[0]))
        for part in UPLOAD[1:]:
            await client.send(chunk(part))
            await reader.upto(len(reader.body) + len(part))
        await client.send(LAST_CHUNK)
        await reader.rest()
        assert reader.body == b"".join(UPLOAD)


async def flood(conn: BackendConn) -> None:
    """`/flood` never ends; every other answer is one chunk for each chunk of the request."""
    async for received in each_request(conn):
        if received.target != b"/flood":
            await conn.send(SSE_HEAD + chunk(received.body) + LAST_CHUNK)
            continue
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(chunk(b"x" * 65_536))


async def test_str_18_stalled_client_does_not_hold_up_another_ones_tokens() -> None:
    async with RawBackend(flood) as backend, proxy(backend) as p, RawClient(p.port) as stalled:
        await stalled.send(request("GET", "/flood"))
        await stalled.head()
        stalled.hold()
        await settled(p, backend)
        async with RawClient(p.port) as client:
            for n in range(20):
                body = b"%d" % n
                got = await client.ask(request("POST", "/x", body=body), "POST", timeout=PATIENCE)
                assert (got.status, got.body) == (200, body)


async def settled(p: Proxy, backend: RawBackend) -> None:
    """Until the flood has come to rest: every buffer on the way to the stalled client is full."""
    await eventually(lambda: p.in_flight() == 1)
    last = -1
    while backend.conns[0].sent != last:
        last = backend.conns[0].sent
        await asyncio.sleep(0.05)


async def test_str_19_streams_side_by_side_do_not_mix() -> None:
    """Twenty streams, each let on by one piece in turn."""
    count, length = 20, 6
    go = [asyncio.Semaphore(0) for _ in range(count)]

    async def script(conn: BackendConn) -> None:
        received = await conn.request()
        assert received is not None
        n = int(received.target[1:])
        await conn.send(SSE_HEAD)
        for step in range(length):
            await go[n].acquire()
            await conn.send(chunk(b"<%d.%d>" % (n, step)))
        await conn.send(LAST_CHUNK)

    async with RawBackend(script) as backend, proxy({"url": backend, "max_in_flight": count}) as p:
        clients = [RawClient(p.port) for _ in range(count)]
        try:
            for n, client in enumerate(clients):
                await client.__aenter__()
                await client.send(request("GET", f"/{n}"))
            for step in range(length):
                for n, client in enumerate(clients):
                    go[n].release()
                    seen = await client.read_until(b"<%d.%d>" % (n, step), PATIENCE)
                    assert seen.count(b"<") == 1
        finally:
            for client in clients:
                await client.__aexit__(None, None, None)
