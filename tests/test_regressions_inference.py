"""Faults that a review found in what is read: requests, documents, the events of a stream."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.api import reader
from beacon_proxy.wire.dialects import Shape
from beacon_proxy.wire.watch import Watch

from .kit import (
    SSE_HEAD,
    Answer,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat,
    chat_events,
    chat_stream,
    chunk,
    each_request,
    event,
    json_answer,
    json_bytes,
    line,
    proxy,
    request,
    sse,
)
from .kit_apis import CHAT, NDJSON_HEAD, OLLAMA_CHAT

ASK = {"model": "m", "prompt": "Say hello."}
FORM = ("Content-Type", "application/x-www-form-urlencoded")
JSON = ("Content-Type", "application/json")
GOOD = json_bytes(CHAT.document)


async def post(p: Proxy, body: Any, *headers: tuple[str, str]) -> Answer:
    """One request to `/inference`."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with RawClient(p.port) as client:
        return await client.ask(request("POST", "/inference", [JSON, *headers], data), "POST")


def in_turn(*answers: bytes) -> Script:
    """The first request to any backend gets the first answer, and so on; the last one stays."""
    left = list(answers)

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(left.pop(0) if len(left) > 1 else left[0])

    return script


def smuggled(filling: int) -> str:
    """A trace id that ends its header, fills the body's length and starts another request."""
    inner = "DELETE /v1/everything HTTP/1.1\r\nHost: b\r\nX-R: y"
    return "x\r\n\r\n" + "A" * filling + inner


@pytest.mark.parametrize(
    "trace", [smuggled(120), smuggled(0), "a\nX-B: c", "a\r", "a b", "a\0", "é", "x" * 129]
)
async def test_trace_id_that_would_leave_its_header_is_422_and_reaches_no_backend(
    trace: str,
) -> None:
    """It was written into the backend's request as it came, requests of its own and all."""
    async with RawBackend(answer(GOOD)) as backend, proxy(backend) as p:
        got = await post(p, {**ASK, "trace_id": trace})
        assert got.status == 422
        assert backend.connections == 0


@pytest.mark.parametrize("trace", ["a b", "\xe9\x80", "x" * 129, "a\tb"])
async def test_trace_header_that_is_no_id_is_left_out(trace: str) -> None:
    async with RawBackend(answer(GOOD)) as backend, proxy(backend) as p:
        odd = await post(p, ASK, ("X-Trace-Id", trace))
        plain = await post(p, ASK, ("X-Trace-Id", "abc-1"))
        assert (odd.status, plain.status) == (200, 200)
        seen = [got.header("x-trace-id") for got in backend.requests]
    assert seen == [[], [b"abc-1"]]


async def test_inference_document_when_the_backend_streams_without_end_is_cut_at_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the unread rest of a line counted, and the text itself grew for ever."""
    monkeypatch.setattr(reader, "ANSWER_CAP", 200_000)
    _, said, *_ = chat_events("x" * 4000, 1)

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        for _ in range(2000):
            await conn.send(chunk(said))
        for last in chat_events("", 0):
            await conn.send(chunk(last))
        await conn.send(b"0\r\n\r\n")

    async with RawBackend(script) as backend, proxy(backend) as p:
        got = await post(p, {**ASK, "stream": False})
        await backend.closed.wait()
        assert backend.conns[0].sent < 6_000_000
        (told,) = await p.exchanges(1)
    assert (got.status, got.json["success"]) == (200, False)
    assert (got.json["response"], got.json["provider_used"]) == ("", "b0")
    assert told["end"] == "error"


def form(path: str, **body: Any) -> bytes:
    """What `curl -d` sends."""
    said = {"messages": [{"role": "user", "content": "hi"}], **body}
    return request("POST", path, [FORM], json.dumps(said).encode())


@pytest.mark.parametrize("api", [CHAT, OLLAMA_CHAT], ids=lambda api: api.name)
async def test_json_that_curl_calls_a_form_is_read_like_any_other(api: Any) -> None:
    """Nothing was read of it: any backend was asked, for a model it does not have."""
    async with (
        RawBackend(json_answer(api.document)) as one,
        RawBackend(json_answer(api.document)) as two,
        proxy({"url": one, "models": ["a"]}, {"url": two, "models": ["b"]}) as p,
        RawClient(p.port) as client,
    ):
        for model, name in (("a", b"b0"), ("b", b"b1"), ("a", b"b0"), ("b", b"b1")):
            got = await client.ask(form(api.path, model=model, stream=False), "POST")
            assert got.header("x-beacon-backend") == [name]
        got = await client.ask(form(api.path, model="nobody's"), "POST")
        assert got.status == 404


@pytest.mark.parametrize(
    ("api", "said", "streams"),
    [
        (OLLAMA_CHAT, {}, True),
        (OLLAMA_CHAT, {"stream": False}, False),
        (CHAT, {}, False),
        (CHAT, {"stream": True}, True),
    ],
)
async def test_json_that_curl_calls_a_form_keeps_the_routes_own_stream_default(
    api: Any, said: dict[str, Any], streams: bool
) -> None:
    """What streams must begin within `first_content`; what does not has `document`."""

    async def late(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            for _ in range(10):
                await asyncio.sleep(0.04)
            await conn.send(json_bytes(api.document))

    limits = {"first_content": 0.15, "document": 5}
    async with RawBackend(late) as backend, proxy(backend, timeouts=limits) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(form(api.path, model="m", **said), "POST")
        (told,) = await p.exchanges(1)
    assert got.status == (504 if streams else 200)
    assert told["model"] == "m"


def _calls(arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def _chat(delta: dict[str, Any]) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


# An answer whose tool calls hold, letter for letter, what else would be the end of the stream.
ENDS_INSIDE = [
    pytest.param(
        Shape.OLLAMA,
        OLLAMA_CHAT,
        NDJSON_HEAD,
        [
            *OLLAMA_CHAT.content[:1],
            line({"model": "m", "message": _calls({"done": True}), "done": False}),
            line({"model": "m", "message": {"content": '"done":true'}, "done": False}),
        ],
        id="ollama",
    ),
    pytest.param(
        Shape.CHAT,
        CHAT,
        SSE_HEAD,
        [
            *CHAT.content[:1],
            _chat(_calls({"finish_reason": "", "error": "x"})),
            _chat(_calls('{"finish_reason":"stop"} [DONE]')),
            event({"choices": [{"delta": {"content": "a"}, "finish_reason": ""}]}),
        ],
        id="chat",
    ),
]


@pytest.mark.parametrize(("shape", "api", "head", "events"), ENDS_INSIDE)
async def test_end_marker_inside_tool_arguments_when_cut_behind_it_is_visibly_broken(
    shape: Shape, api: Any, head: bytes, events: list[bytes]
) -> None:
    """The letters alone were believed, so a cut answer was passed on as a whole one."""
    async with RawBackend(sse(events, head=head)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(api.request(stream=True), "POST")
        (told,) = await p.exchanges(1)
    assert b"".join(events) in got.body
    assert (got.status, got.complete) == (200, False)
    assert told["end"] == "error"


@pytest.mark.parametrize(("shape", "api", "head", "events"), ENDS_INSIDE)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_end_marker_inside_tool_arguments_however_split_ends_no_stream(
    shape: Shape, api: Any, head: bytes, events: list[bytes], cuts: list[int]
) -> None:
    data, rest = b"".join(events), b"".join(api.end)
    watch = Watch(shape)
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, stop in pairwise(places):
        watch.feed(data[start:stop])
    assert (watch.content, watch.ended, watch.error, watch.whole) == (True, False, False, False)
    watch.feed(rest)
    assert (watch.ended, watch.error, watch.whole) == (True, False, True)


HUGE = b"-99999999999999999999999"


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[1]",
        b"no json",
        b'{"model": "m", "prompt": "p", "max_tokens": %b}' % HUGE,
        b'{"model": "m", "prompt": "p", "max_tokens": 99999999999999999999999999}',
        b'{"model": "m", "prompt": "p", "max_tokens": Infinity}',
        b'{"model": "m", "prompt": "p", "temperature": Infinity}',
        b'{"model": "m", "prompt": "p", "temperature": NaN}',
        b'{"model": "m", "prompt": "p", "temperature": %b}' % HUGE,
        b'{"model": "m", "prompt": "p", "temperature": 99999999999999999999999999}',
        b'{"model": %b, "prompt": "p"}' % HUGE,
        b'{"prompt": "p", "nonsense": [%b]}' % HUGE,
    ],
)
async def test_inference_request_that_is_invalid_is_422_and_told_as_an_error(body: bytes) -> None:
    """Told as complete, and a number too long for the writer of the 422 was a 500."""
    async with RawBackend(answer(GOOD)) as backend, proxy(backend) as p:
        got = await post(p, body)
        (told,) = await p.exchanges(1)
        assert backend.connections == 0
    assert (got.status, got.complete) == (422, True)
    assert {"type", "loc", "msg"} <= got.json["detail"][0].keys()
    assert (told["end"], told["status"]) == ("error", 422)


async def test_inference_null_means_the_default() -> None:
    """Old clients send every field, and null for what they do not set."""
    names = ("temperature", "max_tokens", "stream", "region_preference", "trace_id")
    async with RawBackend(answer(GOOD)) as backend, proxy(backend) as p:
        got = await post(p, {**ASK, **dict.fromkeys(names), "cost_priority": None})
        assert (await post(p, ASK)).status == 200
        assert (got.status, got.json["success"]) == (200, True)
        given, left_out = backend.requests
    assert given.json == left_out.json


@pytest.mark.parametrize("said", [[1], {"hello": "world"}, "text", {"choices": []}])
async def test_inference_200_that_says_nothing_known_is_tried_elsewhere(said: Any) -> None:
    """An answer that its provider cannot read was passed on as an empty success."""
    script = in_turn(json_bytes(said), GOOD)
    async with RawBackend(script) as one, RawBackend(script) as two, proxy(one, two) as p:
        got = (await post(p, ASK)).json
        assert len(one.requests) == len(two.requests) == 1
    assert (got["success"], got["response"], got["metadata"]["attempts"]) == (True, "hello", 2)


@pytest.mark.parametrize("base", ["/v2/ep", "/v2/ep/v1", "/v2/ep/openai/v1", "/v1", "/app/v1"])
async def test_inference_stream_of_runpod_whatever_its_url_ends_in(base: str) -> None:
    """How to read the stream was guessed from its path, and the guess was another dialect."""
    async with RawBackend(chat_stream("hello ", 3)) as backend:
        row = {"url": f"{backend.url}{base}", "provider": "runpod"}
        async with proxy(row) as p:
            got = await post(p, {**ASK, "stream": True})
            (told,) = await p.exchanges(1)
        (sent,) = backend.requests
        assert sent.target.endswith(b"/v1/chat/completions")
    *lines, last = [json.loads(said) for said in got.body.splitlines()]
    assert got.complete
    assert "".join(said["response"] for said in lines) == "hello " * 3
    assert (last["done"], last["success"], told["end"]) == (True, True, "complete")


async def test_inference_prompt_of_5_mib_passes() -> None:
    """The cap of what is kept for a replay was taken for that of a body."""
    prompt = "word " * (1 << 20)
    async with RawBackend(answer(GOOD)) as backend, proxy(backend) as p:
        got = await post(p, {**ASK, "prompt": prompt})
        assert (got.status, got.json["success"]) == (200, True)
        assert prompt in json.dumps(backend.requests[0].json)


def zipped(body: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


NOISE = random.Random(2).randbytes(3000).hex()
LONG = {**CHAT.document, "id": NOISE}
PACKED = gzip.compress(json.dumps(LONG).encode())
FAULTY = {
    "cut short": PACKED[:-700],
    "cut in its checksum": PACKED[:-4],
    "spoilt": PACKED[:900] + b"\xff" * 40 + PACKED[940:],
    "an error": gzip.compress(b'{"error": {"message": "boom", "code": 500}}'),
    "no JSON": gzip.compress(b"<html>busy</html>"),
    "empty": gzip.compress(b""),
}


@pytest.mark.parametrize("fault", FAULTY)
async def test_gzip_document_that_is_faulty_inside_is_tried_elsewhere(fault: str) -> None:
    """What is packed was not looked at, so a failure went out as a 200."""
    script = in_turn(zipped(FAULTY[fault]), zipped(PACKED))
    async with RawBackend(script) as one, RawBackend(script) as two, proxy(one, two) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(chat(headers=[("Accept-Encoding", "gzip")]), "POST")
        assert len(one.requests) == len(two.requests) == 1
    assert (got.status, got.body) == (200, PACKED)


async def test_gzip_document_that_is_whole_passes_verbatim() -> None:
    async with RawBackend(answer(zipped(PACKED))) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(chat(headers=[("Accept-Encoding", "gzip")]), "POST")
        (told,) = await p.exchanges(1)
    assert (got.status, got.body, got.framing) == (200, PACKED, "length")
    assert got.header("content-encoding") == [b"gzip"]
    assert len(told["attempts"]) == 1
