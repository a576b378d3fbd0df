"""`POST /inference` over real sockets: as the first router's clients read it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    BackendConn,
    Proxy,
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
    proxy,
    request,
)
from .kit_apis import NDJSON_HEAD

ASK = {"model": "m", "prompt": "Say hello."}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
SAID = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
FIELDS = {
    "success": bool,
    "response": str,
    "error": str | None,
    "error_code": str | None,
    "failure": dict | None,
    "provider_used": str | None,
    "inference_time": float,
    "cost_estimate": float,
    "metadata": dict,
}
FAILURE = {
    "code": str,
    "stage": str,
    "component": str,
    "message": str,
    "provider": str | None,
    "provider_type": str | None,
    "region": str | None,
    "model": str,
    "transient": bool,
    "timestamp": float,
}
PATHS = ["/inference", "/v1/inference", "/api/inference", "/api/v1/inference"]


def post(body: Any, path: str = "/inference", *headers: tuple[str, str]) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, [("Content-Type", "application/json"), *headers], data)


async def ask(p: Proxy, body: Any = None, *headers: tuple[str, str], **more: Any) -> Answer:
    async with RawClient(p.port) as client:
        asked = {**ASK, **more} if body is None else body
        return await client.ask(post(asked, "/inference", *headers), "POST")


def read(got: Answer) -> dict[str, Any]:
    """The answer of one document, every promised field there and of its type."""
    assert (got.status, got.complete) == (200, True), got
    assert got.header("content-type") == [b"application/json"]
    return well_formed(got.json)


def well_formed(said: dict[str, Any]) -> dict[str, Any]:
    for name, kind in FIELDS.items():
        assert isinstance(said[name], kind), (name, said)
    metadata = said["metadata"]
    assert {"provider_type", "region", "model", "attempts"} <= set(metadata)
    if said["success"]:
        assert (said["error"], said["error_code"], said["failure"]) == (None, None, None)
        assert "failure" not in metadata
        return said
    assert said["response"] == ""
    assert metadata["failure"] == said["failure"]
    for name, kind in FAILURE.items():
        assert isinstance(said["failure"][name], kind), (name, said)
    assert said["failure"]["code"] == said["error_code"]
    return said


@pytest.mark.parametrize("path", PATHS)
async def test_inference_when_all_is_well_answers_every_field(path: str) -> None:
    row = {"provider": "golem", "region": "eu-west", "price_per_second": 100}
    async with RawBackend(json_answer(SAID)) as backend, proxy({**row, "url": backend}) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(post(ASK, path), "POST")
        said = read(got)
        (told,) = await p.exchanges(1)
        (sent,) = backend.requests
    assert (said["success"], said["response"], said["provider_used"]) == (True, "hello", "b0")
    assert said["metadata"] == {
        "provider_type": "golem",
        "region": "eu-west",
        "model": "m",
        "attempts": 1,
        "tokens_generated": 3,
        "tokens_prompt": 5,
    }
    assert 0 < said["inference_time"] < 5
    # Connecting is no work: it is not paid for.
    assert 0 < said["cost_estimate"] <= said["inference_time"] * 100
    assert (sent.method, sent.target) == ("POST", b"/v1/chat/completions")
    assert (told["end"], told["path"], told["status"]) == ("complete", path, 200)
    assert got.header("x-beacon-backend") == [b"b0"]
    assert len(got.header("x-request-id")) == 1


async def test_inference_defaults_and_given_values_reach_the_backend() -> None:
    async with RawBackend(json_answer(SAID)) as backend, proxy(backend) as p:
        read(await ask(p))
        read(await ask(p, temperature=0.7, max_tokens=9, nonsense={"a": 1}, cost_priority=None))
        first, second = (received.json for received in backend.requests)
    assert first["messages"] == [{"role": "user", "content": "Say hello."}]
    assert (first["temperature"], first["max_tokens"], first["stream"]) == (0.1, 512, False)
    assert (second["temperature"], second["max_tokens"], second["model"]) == (0.7, 9, "m")
    assert "nonsense" not in second


DIALECTS = {
    "openai": ("openai", "auto", b"/v1/chat/completions", SAID),
    "modal": ("modal", "auto", b"/v1/chat/completions", SAID),
    "golem-openai": ("golem", "openai", b"/v1/chat/completions", SAID),
    "golem-ollama": (
        "golem",
        "ollama",
        b"/api/generate",
        {"model": "m", "response": "hello", "done": True, "prompt_eval_count": 5, "eval_count": 3},
    ),
    "golem-inference": (
        "golem",
        "inference",
        b"/inference",
        {"success": True, "response": "hello", "metadata": {"tokens_generated": 3}},
    ),
}


@pytest.mark.parametrize(
    ("provider", "kind", "target", "document"), DIALECTS.values(), ids=DIALECTS
)
async def test_inference_is_put_and_read_in_what_the_backend_speaks(
    provider: str, kind: str, target: bytes, document: dict[str, Any]
) -> None:
    async with RawBackend(json_answer(document)) as backend:
        async with proxy({"provider": provider, "kind": kind, "url": backend}) as p:
            said = read(await ask(p))
        (sent,) = backend.requests
    assert (said["success"], said["response"]) == (True, "hello")
    assert said["metadata"]["provider_type"] == provider
    assert said["metadata"]["tokens_generated"] == 3
    assert sent.target == target
    assert b"Say hello." in sent.body


# -- what it refuses

INVALID: dict[str, tuple[Any, list[list[str]]]] = {
    "nothing": ({}, [["body", "model"], ["body", "prompt"]]),
    "no prompt": ({"model": "m"}, [["body", "prompt"]]),
    "a number": ({"model": "m", "prompt": 7}, [["body", "prompt"]]),
    "null": ({"model": None, "prompt": "x"}, [["body", "model"]]),
    "text": ({**ASK, "temperature": "hot"}, [["body", "temperature"]]),
    "bounds": ({**ASK, "max_tokens": 0}, [["body", "max_tokens"]]),
    "a list": ([1], [["body"]]),
    "no JSON": (b"{nonsense", [["body"]]),
    "an empty body": (b"", [["body"]]),
}


@pytest.mark.parametrize(("body", "places"), INVALID.values(), ids=INVALID)
async def test_inference_when_the_input_is_invalid_is_422_and_asks_nobody(
    body: Any, places: list[list[str]]
) -> None:
    async with RawBackend(json_answer(SAID)) as backend, proxy(backend) as p:
        got = await ask(p, body)
        assert (got.status, got.complete, backend.requests) == (422, True, [])
        detail = got.json["detail"]
        assert [entry["loc"] for entry in detail] == places
        assert all({"type", "loc", "msg", "input"} <= set(entry) for entry in detail)
        assert read(await ask(p))["success"]


async def test_inference_when_not_posted_is_405_with_allow() -> None:
    async with (
        RawBackend(json_answer(SAID)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("GET", "/inference"))
    assert (got.status, got.header("allow"), backend.requests) == (405, [b"POST"], [])


# -- what it makes of failures

BUSY = {"error": {"message": "try again", "type": "overloaded", "code": 429}}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
REFUSED = {"error": {"message": "prompt too long", "type": "invalid_request_error", "code": 400}}
FAILURES: dict[str, tuple[Script, str, bool, int | None]] = {
    "rate limit": (json_answer(BUSY, 429, [("Retry-After", "7")]), "RATE_LIMITED", True, 429),
    "loading": (json_answer(LOADING, 503), "PROVIDER_WARMING", True, 503),
    "refused": (json_answer(REFUSED, 400), "REQUEST_REJECTED", False, 400),
    "500": (json_answer({"error": "CUDA error"}, 500), "PROVIDER_ERROR", True, 500),
    "error behind a 200": (json_answer({"error": "CUDA error"}), "PROVIDER_ERROR", True, 200),
    "no JSON": (answer(b"HTTP/1.1 200 OK\r\n\r\nhi", close=True), "INVALID_RESPONSE", True, 200),
    "cut": (
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", close=True),
        "CONNECTION_FAILED",
        True,
        200,
    ),
    "no HTTP": (answer(b"\x00\x01\x02", close=True), "INVALID_RESPONSE", True, None),
}


@pytest.mark.parametrize(("script", "code", "transient", "status"), FAILURES.values(), ids=FAILURES)
async def test_inference_when_the_backend_fails_tells_it_inside_a_200(
    script: Script, code: str, transient: bool, status: int | None
) -> None:
    row = {"provider": "golem", "region": "eu-west"}
    async with RawBackend(script) as backend, proxy({**row, "url": backend}) as p:
        said = read(await ask(p))
        (told,) = await p.exchanges(1)
    failure = said["failure"]
    assert (said["success"], said["error_code"]) == (False, code)
    assert (failure["transient"], failure.get("http_status")) == (transient, status)
    assert (failure["provider"], failure["provider_type"], failure["region"]) == (
        "b0",
        "golem",
        "eu-west",
    )
    assert failure.get("retry_after") == (7 if status == 429 else None)
    assert told["end"] == "error"
    assert str(backend.port) not in json.dumps(said), "an address of a backend is told"


async def test_inference_when_the_port_is_closed_tells_the_connection_failed() -> None:
    with closed_port() as port:
        async with proxy({"url": f"http://127.0.0.1:{port}"}) as p:
            said = read(await ask(p))
    assert (said["success"], said["error_code"]) == (False, "CONNECTION_FAILED")
    assert said["failure"]["transient"]
    assert str(port) not in json.dumps(said)


async def test_inference_when_no_provider_is_healthy_is_provider_unavailable() -> None:
    """Its monitor counts these: the code and `transient` are part of its contract."""
    chain = [{"health": {"consecutive_failures": 1, "probe_interval": 300}}, "failover"]
    with closed_port() as port:
        async with proxy({"url": f"http://127.0.0.1:{port}"}, middleware=chain) as p:
            await ask(p)
            await eventually(lambda: p.events("backend.ejected"))
            said = read(await ask(p))
    assert (said["error_code"], said["failure"]["transient"]) == ("PROVIDER_UNAVAILABLE", True)


async def test_inference_when_the_required_region_has_nobody_is_provider_unavailable() -> None:
    async with RawBackend(json_answer(SAID)) as backend, proxy(backend) as p:
        headers = [("X-Beacon-Region", "eu-west"), ("X-Beacon-Region-Mode", "require")]
        said = read(await ask(p, None, *headers))
        assert backend.requests == []
    assert said["error_code"] == "PROVIDER_UNAVAILABLE"
    assert "eu-west" in said["error"]


async def test_inference_when_nobody_serves_the_model_says_so() -> None:
    async with RawBackend(json_answer(SAID)) as backend:
        async with proxy({"url": backend, "models": ["other"]}) as p:
            said = read(await ask(p))
        assert backend.requests == []
    assert (said["error_code"], said["failure"]["transient"]) == ("MODEL_NOT_FOUND", False)


async def test_inference_when_the_clients_time_runs_out_tells_a_timeout() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p:
        said = read(await ask(p, None, ("X-Beacon-Timeout", "0.2")))
        await backend.closed.wait(timeout=4)
    assert (said["error_code"], said["failure"]["transient"]) == ("TIMEOUT", True)


async def test_inference_when_the_first_backend_fails_the_next_answers() -> None:
    broken = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", close=True)
    async with RawBackend(broken) as near, RawBackend(json_answer(SAID)) as far:
        rows = {"url": near}, {"url": far, "region": "asia-pacific", "provider": "modal"}
        async with proxy(*rows) as p:
            said = read(await ask(p))
            (told,) = await p.exchanges(1)
    assert (said["success"], said["response"], said["provider_used"]) == (True, "hello", "b1")
    assert said["metadata"]["region"] == "asia-pacific", "where it really ran"
    assert (said["metadata"]["provider_type"], said["metadata"]["attempts"]) == ("modal", 2)
    assert [attempt["backend"] for attempt in told["attempts"]] == ["b0", "b1"]


# -- hints in the body, and its trace


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("US", "b0"),
        ("EU", "b1"),
        ("eu", "b1"),
        ("asia", "b2"),
        ("ap-southeast-1", "b2"),
        ("", "b0"),
    ],
)
async def test_inference_goes_to_the_preferred_region_under_any_of_its_names(
    hint: str, expected: str
) -> None:
    async with AsyncExitStack() as stack:
        regions = ("us-east", "eu-west", "asia-pacific")
        rows = [
            {
                "url": await stack.enter_async_context(RawBackend(json_answer(SAID))),
                "region": region,
            }
            for region in regions
        ]
        p = await stack.enter_async_context(proxy(*rows))
        said = read(await ask(p, region_preference=hint))
    assert said["provider_used"] == expected
    assert said["metadata"]["region"] == regions[int(expected[1])]


async def test_inference_cost_priority_in_the_body_chooses_cheap_or_fast() -> None:
    async with RawBackend(json_answer(SAID)) as cheap, RawBackend(json_answer(SAID)) as near:
        rows = (
            {"url": near, "price_per_second": 0.2, "pool": "baseline"},
            {"url": cheap, "price_per_second": 0.1, "region": "asia-pacific"},
        )
        async with proxy(*rows) as p:
            used = [
                read(await ask(p, cost_priority=wish))["provider_used"] for wish in (True, None)
            ]
    assert used == ["b1", "b0"]


@pytest.mark.parametrize("where", ["header", "body"])
async def test_inference_trace_is_told_in_the_log(where: str) -> None:
    async with RawBackend(json_answer(SAID)) as backend, proxy(backend) as p:
        if where == "header":
            read(await ask(p, None, ("X-Trace-Id", "trace-7")))
        else:
            read(await ask(p, trace_id="trace-7"))
        (told,) = await p.exchanges(1)
    assert told["trace_id"] == "trace-7"


# -- streamed


def lines(got: Answer) -> list[dict[str, Any]]:
    assert got.header("content-type") == [b"application/x-ndjson"]
    assert got.body.endswith(b"\n")
    return [json.loads(each) for each in got.body.splitlines()]


def streams(head: bytes, *events: bytes, end: bytes = LAST_CHUNK) -> Script:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(head + b"".join(map(chunk, events)) + end)
            if end != LAST_CHUNK:
                return

    return script


CHAT_STREAM = (*chat_events("hel", 2)[:-1], event({"choices": [], "usage": USAGE}))
GENERATED = [line({"model": "m", "response": "hel", "done": False})] * 2
GENERATED += [line({"response": "", "done": True, "prompt_eval_count": 5, "eval_count": 3})]
STREAMS = {
    "openai": ("openai", "auto", streams(SSE_HEAD, *CHAT_STREAM, b"data: [DONE]\n\n")),
    "ollama": ("golem", "ollama", streams(NDJSON_HEAD, *GENERATED)),
}


@pytest.mark.parametrize(("provider", "kind", "script"), STREAMS.values(), ids=STREAMS)
async def test_inference_when_streamed_is_lines_and_a_last_one_with_every_field(
    provider: str, kind: str, script: Script
) -> None:
    async with RawBackend(script) as backend:
        async with proxy({"provider": provider, "kind": kind, "url": backend}) as p:
            got = await ask(p, stream=True)
            (told,) = await p.exchanges(1)
        assert backend.requests[0].json["stream"] is True
    *said, last = lines(got)
    assert (got.status, got.complete, told["end"]) == (200, True, "complete")
    assert said == [{"response": "hel", "done": False}] * 2
    assert (last["done"], last["success"], last["provider_used"]) == (True, True, "b0")
    assert last["metadata"]["tokens_generated"] == 3
    well_formed(last)


async def test_inference_when_streamed_each_piece_comes_as_it_is_made() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        for number, one in enumerate(CHAT_STREAM[:3]):
            await conn.send(chunk(one))
            while len(seen) < number:
                await read.wait()
                read.clear()
        await conn.send(chunk(CHAT_STREAM[3]) + LAST_CHUNK)

    seen: list[bytes] = []
    read = asyncio.Event()
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(post({**ASK, "stream": True}))
        for _ in range(2):
            seen.append(await client.read_until(b'"hel","done":false}\n'))
            read.set()
        await client.read_until(b'"done":true}\n')


async def test_inference_when_a_stream_fails_before_content_the_next_answers() -> None:
    first = streams(SSE_HEAD, CHAT_STREAM[0], end=b"")
    async with (
        RawBackend(first) as near,
        RawBackend(STREAMS["openai"][2]) as far,
        proxy(near, {"url": far, "region": "asia-pacific"}) as p,
    ):
        *said, last = lines(await ask(p, stream=True))
    assert [each["response"] for each in said] == ["hel", "hel"]
    assert (last["success"], last["provider_used"], last["metadata"]["attempts"]) == (True, "b1", 2)


async def test_inference_when_a_stream_breaks_the_last_line_says_so() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD + b"".join(map(chunk, CHAT_STREAM[:2])))
        await eventually(lambda: b"hel" in client.wire.raw)

    async with RawBackend(script) as backend, RawBackend(json_answer(SAID)) as spare:
        async with proxy(backend, {"url": spare, "region": "asia-pacific"}) as p:
            async with RawClient(p.port) as client:
                got = await client.ask(post({**ASK, "stream": True}), "POST")
            (told,) = await p.exchanges(1)
        assert spare.requests == []
    first, last = lines(got)
    assert (first["response"], last["done"], last["success"]) == ("hel", True, False)
    assert not got.complete, "and a client that only counts bytes sees a break"
    assert told["end"] == "error"
    well_formed(last)


async def test_inference_when_nothing_can_be_streamed_one_line_tells_the_failure() -> None:
    async with RawBackend(json_answer(BUSY, 429)) as backend, proxy(backend) as p:
        (last,) = lines(await ask(p, stream=True))
    assert (last["done"], last["error_code"]) == (True, "RATE_LIMITED")
    well_formed(last)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
async def test_inference_when_the_client_leaves_the_backend_stops(stream: bool) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(json_bytes(SAID)[:80])
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(post({**ASK, "stream": stream}))
            await eventually(lambda: backend.requests)
            client.close()
            await backend.closed.wait(timeout=4)
        (told,) = await p.exchanges(1)
    assert told["end"] == "client_closed"
