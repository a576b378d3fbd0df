"""LLM: API traffic passes byte for byte in all four dialects, and what broke never looks whole."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Sequence

import pytest

from .kit import (
    APIS,
    CHAT,
    LAST_CHUNK,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    SSE_HEAD,
    Answer,
    Api,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat_events,
    chunk,
    closed_port,
    each_request,
    event,
    eventually,
    json_answer,
    json_bytes,
    line,
    named,
    proxy,
    request,
    through,
)

every_api = pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
quiet_apis = pytest.mark.parametrize(
    "api", [api for api in APIS if api.quiet], ids=lambda api: api.name
)


def streams(api: Api, events: Sequence[bytes], *, end: str = "clean") -> Script:
    """Stream `events`, one a chunk, and end: clean | close | reset."""

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(api.head)
            for one in events:
                await conn.send(chunk(one))
            if end == "clean":
                await conn.send(LAST_CHUNK)
                continue
            await eventually(lambda: conn.wire.transport.get_write_buffer_size() == 0)
            conn.reset() if end == "reset" else conn.close()
            return

    return script


async def both(first: Script, second: Script, data: bytes) -> tuple[Answer, list[int]]:
    """Ask a proxy whose nearest backend runs `first`, with one that runs `second` standing ready.

    Returns the answer, and how many requests each of the two got.
    """
    async with RawBackend(first) as near, RawBackend(second) as far:
        rows = {"url": near}, {"url": far, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            got = await client.ask(data, "POST")
        return got, [len(near.requests), len(far.requests)]


@every_api
async def test_llm_01_stream_passes_byte_for_byte_in_order_asked_once(api):
    seen = await through(api.request(stream=True), streams(api, api.events), method="POST")
    assert (seen.answer.status, seen.answer.complete) == (200, True)
    assert seen.answer.body == b"".join(api.events)
    assert seen.answer.header("content-type") == [
        value.strip() for value in [api.head.split(b"Content-Type:")[1].split(b"\r\n")[0]]
    ]
    assert (seen.got.target, seen.got.body) == (api.path.encode(), api.body(stream=True))
    assert [entry["end"] for entry in seen.log if entry["event"] == "exchange.done"] == ["complete"]


@every_api
async def test_llm_02_document_passes_byte_for_byte_asked_once(api):
    raw = json_bytes(api.document, headers=[("X-Own", "1")])
    seen = await through(api.request(stream=False), answer(raw), method="POST")
    assert (seen.answer.status, seen.answer.complete) == (200, True)
    assert raw.endswith(b"\r\n\r\n" + seen.answer.body)
    assert seen.answer.header("x-own") == [b"1"]
    assert seen.got.body == api.body(stream=False)


async def test_llm_02b_document_keeps_its_own_spelling():
    """Spaces, key order, escapes, big numbers and a line end after it: nothing is written anew."""
    body = b'{ "z": 1.0e+2, "a": 12345678901234567890123, "e": "\\u00e9\\/", "choices": [] }\n\n'
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    got = (await through(CHAT.request(stream=False), answer(raw))).answer
    assert (got.status, got.body) == (200, body)


def assert_cut_after(got: Answer, sent: bytes) -> None:
    """All of `sent` is there; behind it at most an error of the proxy's own; and no clean end."""
    assert got.status == 200
    assert got.body.startswith(sent)
    assert not got.complete, "a stream that broke must not end cleanly"
    rest = got.body[len(sent) :]
    assert b"error" in rest or not rest


@pytest.mark.parametrize("end", ["close", "reset"])
@every_api
async def test_llm_03_tokens_sent_before_the_upstream_died_are_all_delivered(api, end):
    events = api.quiet + api.content

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(api.head)
        for one in events:
            await conn.send(chunk(one))
        await eventually(lambda: client.wire.raw.count(b"hello ") == len(api.content))
        conn.reset() if end == "reset" else conn.close()

    async with RawBackend(script) as backend, RawBackend(json_answer(api.document)) as spare:
        rows = {"url": backend}, {"url": spare, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            got = await client.ask(api.request(stream=True), "POST")
            (told,) = await p.exchanges(1)
        assert_cut_after(got, b"".join(events))
        assert told["end"] == "error"
        assert spare.requests == [], "nothing is tried again after commit"


@every_api
async def test_llm_03b_upstream_that_dies_inside_an_event_is_cut_without_an_error_event(api):
    """An event of ours in the middle of theirs would be read as part of it."""
    part = api.content[0][:-9]
    events = (*api.quiet, api.content[0], part)
    script = streams(api, events, end="close")
    got = (await through(api.request(stream=True), script, method="POST")).answer
    assert got.status == 200
    assert not got.complete
    assert got.body == b"".join(events)


@every_api
async def test_llm_04_clean_end_without_the_end_marker_is_broken(api):
    """A backend that was killed behind its own proxy ends just so."""
    events = api.quiet + api.content
    script = streams(api, events)
    got = (await through(api.request(stream=True), script, method="POST")).answer
    assert_cut_after(got, b"".join(events))


@every_api
async def test_llm_05_error_event_inside_a_stream_passes_untouched(api):
    events = (*api.quiet, *api.content, api.error)
    seen = await through(api.request(stream=True), streams(api, events), method="POST")
    assert seen.answer.status == 200
    assert seen.answer.body == b"".join(events)
    assert [entry["end"] for entry in seen.log if entry["event"] == "exchange.done"] == ["error"]


@every_api
async def test_llm_06_error_as_the_first_event_lets_the_next_backend_answer(api):
    first = streams(api, (*api.quiet, api.error))
    got, asked = await both(first, streams(api, api.events), api.request(stream=True))
    assert (got.status, got.complete, got.body) == (200, True, b"".join(api.events))
    assert asked == [1, 1]


@every_api
async def test_llm_06b_error_as_the_first_event_of_the_only_backend_is_told(api):
    events = (*api.quiet, api.error)
    got = (await through(api.request(stream=True), streams(api, events), method="POST")).answer
    assert got.status >= 500 or got.body == b"".join(events)


PROVIDER_HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "tools-2024-04-04,max-tokens-3-5-sonnet-2024-07-15",
    "x-api-key": "sk-ant-api03-x_y-z",
    "anthropic-dangerous-direct-browser-access": "true",
    "openai-organization": "org-1",
    "OpenAI-Project": "proj_1",
    "OpenAI-Beta": "assistants=v2",
    "x-stainless-retry-count": "0",
    "X-Stainless-Lang": "python",
    "api-key": "azure-1",
    "HTTP-Referer": "https://a.example",
    "X-Title": "a title",
    "Idempotency-Key": "stainless-python-retry-1",
}


@every_api
async def test_llm_07_provider_headers_arrive_verbatim(api):
    data = api.request(stream=False, headers=PROVIDER_HEADERS.items())
    seen = await through(data, json_answer(api.document), method="POST")
    arrived = dict(seen.got.headers)
    for name, value in PROVIDER_HEADERS.items():
        assert arrived[name.encode()] == value.encode()


async def test_llm_07b_rate_limit_headers_of_the_provider_come_back():
    limits = [("x-ratelimit-remaining-tokens", "149984"), ("anthropic-ratelimit-x", "1")]
    limits += [("openai-processing-ms", "12"), ("request-id", "req_1"), ("retry-after-ms", "20")]
    script = json_answer(CHAT.document, headers=limits)
    got = (await through(CHAT.request(stream=False), script)).answer
    for name, value in limits:
        assert got.header(name) == [value.encode()]


@pytest.mark.parametrize("size", [1, 3, 7])
@every_api
async def test_llm_08_pieces_that_cut_characters_and_events_pass_untouched(api, size):
    """Neither the text nor the end marker may depend on where TCP cut them."""
    text = "naïve 世界 🌍 " + "é" * 9
    whole = b"".join(api.events).replace(b"hello ", text.encode())
    cut = [whole[at : at + size] for at in range(0, len(whole), size)]
    got = (await through(api.request(stream=True), streams(api, cut), method="POST")).answer
    assert (got.status, got.complete, got.body) == (200, True, whole)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/x"])
async def test_llm_09_cors_preflight_is_the_backends_to_answer(path):
    asked = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization, content-type"),
    ]
    raw = (
        b"HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: https://app.example\r\n"
        b"Access-Control-Allow-Headers: authorization\r\nVary: Origin\r\n\r\n"
    )
    seen = await through(request("OPTIONS", path, asked), answer(raw), method="OPTIONS")
    assert (seen.got.method, seen.got.target) == ("OPTIONS", path.encode())
    for name, value in asked:
        assert seen.got.header(name) == [value.encode()]
    assert seen.answer.status == 204
    assert seen.answer.header("access-control-allow-origin") == [b"https://app.example"]
    assert seen.answer.header("vary") == [b"Origin"]


def delta(**said: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": said, "finish_reason": None}]})


CALL = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}
FIRST_CONTENT = {
    "tool call": (CHAT, delta(tool_calls=[CALL])),
    "reasoning": (CHAT, delta(reasoning_content="hm")),
    "reasoning, other spelling": (CHAT, delta(reasoning="hm")),
    "refusal": (CHAT, delta(refusal="no")),
    "function call": (CHAT, delta(function_call={"name": "f", "arguments": ""})),
    "role and text at once": (CHAT, delta(role="assistant", content="hello")),
    "no space after data:": (CHAT, delta(content="hi").replace(b"data: ", b"data:")),
    "CRLF line ends": (CHAT, delta(content="hi").replace(b"\n", b"\r\n")),
    "text of white space": (CHAT, delta(content=" ")),
    "thinking": (
        MESSAGES,
        named(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "thinking_delta", "thinking": "hm"},
            }
        ),
    ),
    "partial JSON of a tool": (
        MESSAGES,
        named(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "input_json_delta", "partial_json": "{"},
            }
        ),
    ),
    "reasoning summary": (
        RESPONSES,
        named({"type": "response.reasoning_summary_text.delta", "delta": "hm"}),
    ),
    "arguments of a function": (
        RESPONSES,
        named({"type": "response.function_call_arguments.delta", "delta": "{"}),
    ),
    "thinking of Ollama": (
        OLLAMA_CHAT,
        line({"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False}),
    ),
    "tool call of Ollama": (
        OLLAMA_CHAT,
        line({"message": {"content": "", "tool_calls": [{"function": {}}]}, "done": False}),
    ),
    "thinking of Ollama generate": (
        OLLAMA_GENERATE,
        line({"response": "", "thinking": "hm", "done": False}),
    ),
}


@pytest.mark.parametrize(("api", "first"), FIRST_CONTENT.values(), ids=FIRST_CONTENT.keys())
async def test_llm_10_every_kind_of_first_content_passes_at_once(api, first):
    """With another backend standing ready nothing but content opens the gate."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(api.head + b"".join(chunk(one) for one in (*api.quiet, first)))
        await conn.wait_closed()

    async with RawBackend(script) as backend, RawBackend(json_answer(api.document)) as spare:
        rows = {"url": backend}, {"url": spare, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            await client.send(api.request(stream=True))
            await client.read_until(first.rstrip(), timeout=4)
        assert spare.requests == []


async def test_llm_11_last_event_id_and_accept_reach_the_backend():
    fields = [
        ("Last-Event-ID", "42"),
        ("Accept", "text/event-stream"),
        ("Cache-Control", "no-cache"),
    ]
    raw = SSE_HEAD + chunk(b"id: 43\ndata: x\n\n") + LAST_CHUNK
    seen = await through(request("GET", "/events", fields), answer(raw))
    for name, value in fields:
        assert seen.got.header(name) == [value.encode()]
    assert (seen.answer.complete, seen.answer.body) == (True, b"id: 43\ndata: x\n\n")


@pytest.mark.parametrize("end", ["close", "reset", "clean"])
@quiet_apis
async def test_llm_12_stream_that_dies_before_its_first_content_moves_to_the_next(api, end):
    """An empty role chunk that commits the answer is the most reported failover bug there is."""
    first = streams(api, api.quiet, end=end)
    got, asked = await both(first, streams(api, api.events), api.request(stream=True))
    assert (got.status, got.complete) == (200, True)
    assert got.body == b"".join(api.events), "nothing of the first backend's stream is left in it"
    assert asked == [1, 1]


async def test_llm_13_cookies_of_one_client_never_reach_the_backend_for_another():
    """A client library behind the proxy with one jar for all would do that."""
    script = json_answer(CHAT.document, headers=[("Set-Cookie", "session=of-a; Path=/")])
    async with RawBackend(script) as backend, proxy(backend) as p:
        for _ in range(3):
            async with RawClient(p.port) as client:
                got = await client.ask(CHAT.request(stream=False))
                assert got.header("set-cookie") == [b"session=of-a; Path=/"]
        assert [received.header("cookie") for received in backend.requests] == [[], [], []]


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(b": ping\n\n", id="comment"),
        pytest.param(b":\r\n\r\n", id="empty comment, CRLF"),
        pytest.param(b"\n\n", id="blank lines"),
        pytest.param(b"retry: 3000\n\n", id="retry"),
        pytest.param(b"event: ping\ndata: {}\n\n", id="ping with empty data"),
    ],
)
async def test_llm_14_noise_before_the_content_passes_but_is_no_content(noise):
    whole = noise * 3 + b"".join(CHAT.events)
    ask = CHAT.request(stream=True)
    got = (await through(ask, streams(CHAT, [noise, noise, noise, *CHAT.events]))).answer
    assert (got.complete, got.body) == (True, whole)
    if noise == b"event: ping\ndata: {}\n\n":
        return  # data that is JSON of an unknown shape may count as content
    got, asked = await both(streams(CHAT, [noise], end="close"), streams(CHAT, CHAT.events), ask)
    assert (got.complete, got.body, asked) == (True, b"".join(CHAT.events), [1, 1])


def framed(body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    head = "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return (head % (kind, len(body) if length is None else length)).encode() + body


BAD_DOCUMENTS = {
    "empty": framed(b""),
    "white space": framed(b" \n "),
    "a captive portal": framed(b"<html>log in</html>", "text/html"),
    "cut JSON behind a right length": framed(b'{"choices": [{"mess'),
    "cut short": framed(b'{"choices": []', length=200),
    "cut short in chunks": framed(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    + chunk(b'{"choices": []}'),
    "error behind a 200": framed(b'{"error": {"message": "CUDA out of memory", "code": 500}}'),
    "error as text behind a 200": framed(b'{"error": "model crashed"}'),
}


@pytest.mark.parametrize("raw", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
@every_api
async def test_llm_15_bad_document_moves_to_the_next_backend(api, raw):
    second = json_answer(api.document)
    got, asked = await both(answer(raw, close=True), second, api.request(stream=False))
    assert (got.status, got.complete, asked) == (200, True, [1, 1])
    assert got.json == api.document
    assert got.header("x-beacon-attempts") == [b"2"]


ENDS = {
    "finish_reason without [DONE]": (CHAT, CHAT.end[:1]),
    "[DONE] without finish_reason": (CHAT, CHAT.end[1:]),
    "[DONE] without a space": (CHAT, (b"data:[DONE]\n\n",)),
    "usage after the finish": (
        CHAT,
        (CHAT.end[0], event({"choices": [], "usage": {"completion_tokens": 3}}), CHAT.end[1]),
    ),
    "finish_reason length": (CHAT, (CHAT.end[0].replace(b'"stop"', b'"length"'),)),
    "JSON with spaces": (CHAT, (b'data: {"choices": [{"finish_reason": "stop"}]}\n\n',)),
    "CRLF line ends": (CHAT, tuple(one.replace(b"\n", b"\r\n") for one in CHAT.end)),
    "no blank line after [DONE]": (CHAT, (CHAT.end[0], b"data: [DONE]")),
    "response.incomplete": (
        RESPONSES,
        (named({"type": "response.incomplete", "response": {"status": "incomplete"}}),),
    ),
    "response.failed": (
        RESPONSES,
        (named({"type": "response.failed", "response": {"status": "failed"}}),),
    ),
    "no line end after the last line": (OLLAMA_CHAT, (OLLAMA_CHAT.end[0].rstrip(),)),
    "done for its length": (OLLAMA_CHAT, (line({"done": True, "done_reason": "length"}),)),
    "done with spaces": (OLLAMA_GENERATE, (b'{"response": "", "done": true}\n',)),
}


@pytest.mark.parametrize(("api", "end"), ENDS.values(), ids=ENDS.keys())
async def test_llm_16_every_spelling_of_the_end_is_an_end(api, end):
    events = (*api.quiet, *api.content, *end)
    got = (await through(api.request(stream=True), streams(api, events))).answer
    assert (got.complete, got.body) == (True, b"".join(events))


FORGED = 'data: [DONE]\n\n {"finish_reason":"stop"} {"done":true} event: error {"error": {"type":'
FORGED += '"message_stop"}} "response.completed" data: {"error": "type":"error"'


@every_api
async def test_llm_17_markers_inside_the_generated_text_are_only_text(api):
    """A model that writes about its own protocol must not end its stream, nor break it."""
    forged = json.dumps(FORGED)[1:-1].encode()
    told = [one.replace(b"hello ", forged) for one in api.content]
    whole = (*api.quiet, *told, *api.end)
    got = (await through(api.request(stream=True), streams(api, whole))).answer
    assert (got.complete, got.body) == (True, b"".join(whole))
    cut = (*api.quiet, *told)
    got = (await through(api.request(stream=True), streams(api, cut))).answer
    assert_cut_after(got, b"".join(cut))


@every_api
async def test_llm_18_first_event_of_300_kb_passes_whole(api):
    big = api.content[0].replace(b"hello ", b"x" * 300_000)
    events = (*api.quiet, big, *api.end)
    got = (await through(api.request(stream=True), streams(api, events))).answer
    assert (got.complete, got.body) == (True, b"".join(events))


def assert_error_of(api: Api, got: Answer) -> None:
    """The proxy's own error has the shape that a client of this dialect reads."""
    assert got.complete
    told = got.json
    if api.path.startswith("/api/"):
        assert set(told) == {"error"}
        assert isinstance(told["error"], str)
    elif api is MESSAGES:
        assert told["type"] == "error"
        assert set(told["error"]) >= {"type", "message"}
    else:
        assert set(told["error"]) == {"message", "type", "param", "code"}


@every_api
async def test_llm_19_model_that_no_backend_serves_gives_404_in_the_dialect(api):
    async with RawBackend(json_answer(api.document)) as backend:
        row = {"url": backend, "models": ["another"]}
        async with proxy(row) as p, RawClient(p.port) as client:
            got = await client.ask(api.request(stream=True))
        assert got.status == 404
        assert_error_of(api, got)
        assert backend.requests == []
        if api.path.startswith("/v1/") and api is not MESSAGES:
            assert got.json["error"]["code"] == "model_not_found"


@every_api
async def test_llm_20_own_error_comes_in_the_dialect(api):
    with closed_port() as port:
        row = {"url": f"http://127.0.0.1:{port}"}
        async with proxy(row) as p, RawClient(p.port) as client:
            got = await client.ask(api.request(stream=True))
    assert got.status == 502
    assert_error_of(api, got)


async def test_llm_21_embeddings_and_multipart_uploads_pass_verbatim():
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\nRIFF\x00\xff\r\n--b--\r\n"
    )
    kind = [("Content-Type", "multipart/form-data; boundary=b")]
    seen = await through(request("POST", "/v1/audio/transcriptions", kind, parts))
    assert (seen.answer.body, seen.got.body) == (b"ok", parts)
    vectors = {"object": "list", "data": [{"index": 0, "embedding": [0.1, -2e-9]}]}
    body = b'{"model":"m","input":["a","b"]}'
    seen = await through(request("POST", "/v1/embeddings", (), body), json_answer(vectors))
    assert (seen.answer.json, seen.got.body) == (vectors, body)


@pytest.mark.parametrize("marked", [True, False], ids=["with end marker", "without"])
@every_api
async def test_llm_22_stream_ended_by_the_connection_is_whole_only_with_its_end_marker(api, marked):
    events = api.quiet + api.content + (api.end if marked else ())
    head = api.head.replace(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n")
    script = answer(head + b"".join(events), close=True)
    got = (await through(api.request(stream=True), script)).answer
    assert got.status == 200
    if marked:
        assert (got.complete, got.body) == (True, b"".join(events))
    else:
        assert_cut_after(got, b"".join(events))


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
@every_api
async def test_llm_23_callers_fault_is_relayed_as_it_is_and_not_tried_elsewhere(api, status):
    fault = {"error": {"message": "context length exceeded", "type": "invalid_request_error"}}
    got, asked = await both(
        json_answer(fault, status), json_answer(api.document), api.request(stream=True)
    )
    assert (got.status, got.json, asked) == (status, fault, [1, 0])


@every_api
async def test_llm_24_last_answer_of_the_only_backend_is_relayed_as_it_is(api):
    busy = {"error": {"message": "slow down", "type": "rate_limit_error", "param": None}}
    script = json_answer(busy, 429, [("Retry-After", "7"), ("x-ratelimit-reset", "7s")])
    seen = await through(api.request(stream=True), script)
    assert (seen.answer.status, seen.answer.json) == (429, busy)
    assert seen.answer.header("retry-after") == [b"7"]
    assert seen.answer.header("x-ratelimit-reset") == [b"7s"]
    assert seen.got.complete


@pytest.mark.parametrize(
    "asked", ["llama3.2:1b", "llama3.2-1b", "LLAMA3.2:1b", "llama3.2:1b-latest"]
)
async def test_llm_25_spellings_of_one_model_reach_their_backend_as_it_spells_it(asked):
    async with RawBackend(json_answer(CHAT.document)) as right, RawBackend(answer(b"")) as wrong:
        rows = {"url": wrong, "models": ["other"]}, {"url": right, "models": ["llama3.2:1b"]}
        body = b'{"messages": [], "model" : "%b", "x": {"model": "other"}}' % asked.encode()
        async with proxy(*rows) as p, RawClient(p.port) as client:
            got = await client.ask(request("POST", CHAT.path, (), body))
        assert (got.status, wrong.requests) == (200, [])
        assert right.requests[0].body == body.replace(asked.encode(), b"llama3.2:1b")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"not json", id="not JSON"),
        pytest.param(b"", id="empty"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(b'{"model": 5}', id="model that is a number"),
        pytest.param(b'{"stream": "yes"}', id="stream that is a string"),
        pytest.param(b"\xff\xfe{\x00", id="UTF-16"),
    ],
)
async def test_llm_26_body_that_cannot_be_read_is_the_backends_to_judge(body):
    """The look into the body is a hint for routing, never a validation."""
    fault = {"error": {"message": "cannot parse", "type": "invalid_request_error"}}
    seen = await through(request("POST", CHAT.path, (), body), json_answer(fault, 400))
    assert (seen.answer.status, seen.answer.json) == (400, fault)
    assert seen.got.body == body


@every_api
async def test_llm_27_compressed_document_is_judged_by_its_framing_alone(api):
    """Clients ask for gzip by default; bytes that are no JSON to us may be whole all the same."""
    packed = gzip.compress(json.dumps(api.document).encode(), mtime=0)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    raw = head + b"Content-Length: %d\r\n\r\n%b" % (len(packed), packed)
    data = api.request(stream=False, headers=[("Accept-Encoding", "gzip, deflate")])
    got = (await through(data, answer(raw))).answer
    assert (got.status, got.complete, got.body) == (200, True, packed)
    assert got.header("content-encoding") == [b"gzip"]
    cut = raw[: -len(packed) // 2]
    second = json_answer(api.document)
    got, asked = await both(answer(cut, close=True), second, data)
    if got.complete:
        assert (got.status, got.json, asked) == (200, api.document, [1, 1])
    else:
        assert packed.startswith(got.body)


@every_api
async def test_llm_28_compressed_stream_passes_and_its_hidden_end_is_no_fault(api):
    packer = zlib.compressobj(wbits=31)
    parts = [packer.compress(one) + packer.flush(zlib.Z_SYNC_FLUSH) for one in api.events]
    parts[-1] += packer.flush()
    head = api.head.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    raw = head + b"".join(chunk(part) for part in parts) + LAST_CHUNK
    seen = await through(api.request(stream=True), answer(raw))
    assert (seen.answer.status, seen.answer.complete) == (200, True)
    assert seen.answer.body == b"".join(parts)
    assert [entry["end"] for entry in seen.log if entry["event"] == "exchange.done"] == ["complete"]


@pytest.mark.parametrize("end", ["close", "clean"])
@quiet_apis
async def test_llm_29_only_backend_that_dies_long_before_its_first_content_is_no_clean_end(
    api, end
):
    """With nobody to take over the head may go out early; that commits, and must end broken."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(api.head + b"".join(chunk(one) for one in api.quiet))
        late = asyncio.get_running_loop().time() + 0.5
        await eventually(lambda: client.wire.received or asyncio.get_running_loop().time() > late)
        if end == "clean":
            await conn.send(LAST_CHUNK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(api.request(stream=True))
        (told,) = await p.exchanges(1)
    assert told["end"] == "error"
    if got.status == 200:
        assert_cut_after(got, b"".join(api.quiet))
    else:
        assert (got.status, got.complete) == (502, True)


@pytest.mark.parametrize("api", [OLLAMA_CHAT, OLLAMA_GENERATE], ids=lambda api: api.name)
async def test_llm_30_ollama_streams_unless_told_not_to(api):
    data = request("POST", api.path, (), json.dumps(api.ask).encode())
    got = (await through(data, streams(api, api.events))).answer
    assert (got.complete, got.body) == (True, b"".join(api.events))
    got = (await through(data, streams(api, api.quiet + api.content))).answer
    assert_cut_after(got, b"".join(api.quiet + api.content))


@every_api
async def test_llm_31_document_where_a_stream_was_asked_for_passes_whole(api):
    """A backend that cannot stream, or an answer from its cache."""
    raw = json_bytes(api.document)
    got = (await through(api.request(stream=True), answer(raw))).answer
    assert (got.status, got.complete, got.json) == (200, True, api.document)


@every_api
async def test_llm_32_stream_where_a_document_was_asked_for_is_the_clients_to_judge(api):
    """Some servers always stream. Whole it may pass or be refused; cut it never looks whole."""
    data = api.request(stream=False)
    got = (await through(data, streams(api, api.events))).answer
    assert got.complete
    assert got.body == b"".join(api.events) or got.status == 502
    got = (await through(data, streams(api, api.quiet + api.content, end="close"))).answer
    assert not got.complete or got.status == 502


async def test_llm_33_two_streams_at_once_are_never_mixed():
    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            text = str(received.json["messages"][0]["content"])
            await conn.send(CHAT.head)
            for one in chat_events(text, 50):
                await conn.send(chunk(one))
            await conn.send(LAST_CHUNK)

    async with RawBackend(script) as backend, proxy({"url": backend, "max_in_flight": 20}) as p:

        async def one(text: str) -> None:
            ask = {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}
            async with RawClient(p.port) as client:
                for _ in range(3):
                    got = await client.ask(request("POST", CHAT.path, (), json.dumps(ask).encode()))
                    assert got.complete
                    assert got.body == b"".join(chat_events(text, 50))

        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(one(f"text {number} "))
        assert len(backend.requests) == 30
