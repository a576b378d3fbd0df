"""Golem on real servers: llama.cpp and an Ollama stand-in, directly and through yagna."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from beacon_proxy.contracts import canonical_model

from .kit import (
    CHAT,
    LAST_CHUNK,
    MESSAGES,
    OK,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    Api,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    answer,
    chunk,
    each_request,
    eventually,
    json_answer,
    proxy,
    request,
)
from .kit_ollama import SAID, Yagna, yagna
from .real import MODEL, Child, row, slots_busy, stopped
from .test_inference_route import ask, read
from .test_ollama_client import client as ollama_client

pytest_plugins = ["tests.real", "tests.kit_ollama"]

GOLEM = {"provider": "golem"}
PROMPT = {"model": MODEL, "prompt": "Say hello.", "max_tokens": 8, "temperature": 0}
HI = [{"role": "user", "content": "Hi"}]


def kind_of(p: Proxy, name: str = "b0") -> str:
    """What the proxy holds a backend for right now."""
    (kind,) = (c.backend.kind for c in p.app.fleet.candidates() if c.backend.name == name)
    return str(kind)


async def found(p: Proxy, kind: str) -> None:
    """Wait for the first round of checks to tell."""
    await eventually(lambda: kind_of(p) == kind, 5.0)
    assert p.events("backend.identified")[0]["kind"] == kind


async def providers(p: Proxy) -> list[dict[str, Any]]:
    async with RawClient(p.port) as client:
        got = await client.ask(b"GET /providers HTTP/1.1\r\nHost: h\r\n\r\n")
    said: list[dict[str, Any]] = got.json["providers"]
    return said


async def infer(p: Proxy, **body: Any) -> tuple[dict[str, Any], list[str]]:
    """The last word of a POST to /inference, and the texts of the lines before it."""
    body = {**PROMPT, **body}
    fields = [("Content-Type", "application/json")]
    async with RawClient(p.port) as client:
        got = await client.ask(
            request("POST", "/inference", fields, json.dumps(body).encode()), "POST", timeout=60
        )
    lines = [json.loads(line) for line in got.body.splitlines()]
    assert got.complete
    return lines[-1], [line["response"] for line in lines[:-1]]


# -- llama.cpp -----------------------------------------------------------------------------------


async def test_llama_cpp_when_kind_is_auto_is_found_and_answers_on_every_route(
    llama: Child,
) -> None:
    async with proxy({**row(llama), **GOLEM}) as p:
        await found(p, "openai")
        (shown,) = await providers(p)
        assert shown["warmth"] == "warm"
        assert [canonical_model(name) for name in shown["models"]] == [canonical_model(MODEL)]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{p.port}") as session:
            body = {"model": MODEL, "messages": HI, "max_tokens": 8}
            async with session.post("/v1/chat/completions", json=body) as got:
                said = (await got.json())["choices"][0]["message"]["content"]
            async with session.post("/v1/chat/completions", json={**body, "stream": True}) as got:
                assert got.content_type == "text/event-stream"
                streamed = await got.text()
        whole, none = await infer(p)
        last, texts = await infer(p, stream=True)
    assert said
    assert streamed.endswith("data: [DONE]\n\n")
    assert (whole["success"], bool(whole["response"]), none) == (True, True, [])
    assert (last["success"], last["done"], "".join(texts)) == (True, True, whole["response"])
    assert whole["metadata"]["tokens_generated"] == last["metadata"]["tokens_generated"] == 8


async def test_llama_cpp_when_the_client_leaves_mid_stream_has_its_slot_back(llama: Child) -> None:
    async with proxy({**row(llama), **GOLEM}) as p:
        async with RawClient(p.port) as client:
            await client.send(endless())
            await client.read_until(b'"content":"', 30)
            assert await slots_busy(llama) == 1
        await stopped(llama, p)
        (line,) = await p.exchanges(1)
    assert line["end"] == "client_closed"


def endless() -> bytes:
    """A stream that goes on for longer than any test."""
    body = {"model": MODEL, "messages": HI, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    fields = [("Content-Type", "application/json")]
    return request("POST", "/v1/chat/completions", fields, json.dumps(body).encode())


async def test_beacon_s_own_route_behind_golem_then_inference_is_passed_as_it_is(
    llama: Child,
) -> None:
    """The plain kind: what speaks `/inference` here is another instance of this proxy."""
    async with proxy(row(llama)) as behind:
        url = f"http://127.0.0.1:{behind.port}"
        async with proxy({**GOLEM, "url": url, "kind": "inference"}) as p:
            whole, _ = await infer(p)
            last, texts = await infer(p, stream=True)
        paths = [line["path"] for line in behind.events("exchange.done")]
    assert whole["success"] is True
    assert whole["response"]
    assert "".join(texts) == whole["response"]
    assert (last["done"], last["metadata"]["tokens_generated"]) == (True, 8)
    assert [path for path in paths if path == "/inference"] == ["/inference"] * 2
    assert "/v1/chat/completions" not in paths


# -- Ollama --------------------------------------------------------------------------------------


async def journal(url: str) -> list[str]:
    """The paths that the stand-in was asked for by POST, oldest first."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/__aimock/journal") as got:
        rows = await got.json()
    return [entry["path"] for entry in rows if entry["method"] == "POST"]


@pytest.mark.parametrize(
    ("kind", "path"), [("ollama", "/api/generate"), ("auto", "/v1/chat/completions")]
)
async def test_ollama_when_it_is_asked_for_inference_is_asked_in_the_words_of_its_kind(
    ollama_url: str, kind: str, path: str
) -> None:
    """It speaks both; but without `/api/version` it does not show that it is an Ollama."""
    async with proxy({**GOLEM, "url": ollama_url, "kind": kind, "models": ["m"]}) as p:
        before = len(await journal(ollama_url))
        whole, _ = await infer(p, model="m")
        last, texts = await infer(p, model="m", stream=True)
        asked = (await journal(ollama_url))[before:]
    assert (whole["response"], "".join(texts)) == (SAID, SAID)
    assert (whole["success"], last["success"]) == (True, True)
    assert asked == [path, path]


async def test_ollama_when_its_own_client_asks_gets_every_line(ollama_url: str) -> None:
    async with proxy({**GOLEM, "url": ollama_url, "kind": "ollama", "models": ["m"]}) as p:
        async with ollama_client(f"http://127.0.0.1:{p.port}") as client:
            parts = [part async for part in await client.chat("m", HI, stream=True)]
            whole = await client.generate("m", "Hi")
        lines = await p.exchanges(2)
    assert "".join(part.message.content or "" for part in parts) == SAID == whole.response
    assert len(parts) > 2
    assert [line["end"] for line in lines] == ["complete", "complete"]


class ScriptedOllama:
    """A stand-in of Ollama by its docs/api.md, to the byte where it matters: it loads its model.

    The first request after `loaded` is emptied finds the model unloaded and is told so in
    `load_duration` (ns) of the last line; afterwards `/api/ps` lists it.
    """

    LOAD, WARM = 12_345_000_000, 31_000_000  # ns

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.asked: list[str] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        if request.path == "/api/version":
            return web.json_response({"version": "0.12.0"})
        if request.path == "/v1/models":
            model = {"id": "m:latest", "object": "model", "created": 1, "owned_by": "library"}
            return web.json_response({"object": "list", "data": [model]})
        if request.path in ("/api/tags", "/api/ps"):
            names = self.loaded if request.path == "/api/ps" else ["m:latest"]
            return web.json_response({"models": [{"name": n, "model": n} for n in names]})
        if request.path not in ("/api/chat", "/api/generate"):
            return web.Response(status=404, text="404 page not found")
        body = await request.json()
        said, self.loaded = self.said(request.path, bool(self.loaded)), ["m:latest"]
        if body.get("stream") is False:
            return web.json_response(said)
        lines = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await lines.prepare(request)
        first = {key: said[key] for key in said if key in ("model", "message", "response")}
        last = said | (
            {"message": {"role": "assistant", "content": ""}}
            if "message" in said
            else {"response": ""}
        )
        for line in ({**first, "done": False}, last):
            await lines.write(json.dumps(line).encode() + b"\n")
        return lines

    def said(self, path: str, warm: bool) -> dict[str, Any]:
        text: dict[str, Any] = {"response": "hello"}
        if path == "/api/chat":
            text = {"message": {"role": "assistant", "content": "hello"}}
        load = self.WARM if warm else self.LOAD
        counts = {"prompt_eval_count": 5, "eval_count": 1}
        return {
            "model": "m:latest",
            **text,
            "done": True,
            "done_reason": "stop",
            "total_duration": load + 10**9,
            "load_duration": load,
            **counts,
        }

    def unload(self) -> None:
        self.loaded = []


@asynccontextmanager
async def scripted_ollama() -> AsyncIterator[tuple[str, ScriptedOllama]]:
    stand_in = ScriptedOllama()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stand_in.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.port}", stand_in


@pytest.mark.parametrize("api", [OLLAMA_CHAT, OLLAMA_GENERATE], ids=lambda api: api.path)
@pytest.mark.parametrize("stream", [True, False])
async def test_ollama_when_it_had_to_load_the_model_tells_what_the_start_cost(
    api: Api, stream: bool
) -> None:
    async with scripted_ollama() as (url, stand_in), proxy({**GOLEM, "url": url}) as p:
        await found(p, "ollama")
        await eventually(lambda: p.app.fleet.candidates()[0].live.hot is not None)
        (cold,) = await providers(p)
        for _ in range(2):
            async with RawClient(p.port) as client:
                got = await client.ask(api.request(stream=stream), "POST")
            assert (got.status, got.complete) == (200, True)
        (warm,) = await providers(p)
        starts = p.events("backend.started")
        (live,) = (c.live for c in p.app.fleet.candidates())
    assert (cold["warmth"], cold["cold_start_p50"], cold["models"]) == ("cold", None, ["m:latest"])
    assert (warm["warmth"], warm["cold_start_p50"], warm["cold_start_p95"]) == (
        "warm",
        12.345,
        12.345,
    )
    assert len(live.cold_starts) == 1, "the second found it in memory"
    assert [(e["backend"], e["seconds"]) for e in starts] == [("b0", 12.345)]
    assert [line for line in stand_in.asked if line.startswith("POST")] == [f"POST {api.path}"] * 2


async def test_ollama_when_it_is_found_is_asked_for_inference_in_its_own_words() -> None:
    """Its OpenAI route would answer as well, but not say what loading the model cost."""
    async with scripted_ollama() as (url, stand_in), proxy({**GOLEM, "url": url}) as p:
        await found(p, "ollama")
        said = read(await ask(p))
        (line,) = await p.exchanges(1)
        (shown,) = await providers(p)
    assert (said["response"], said["metadata"]["tokens_generated"]) == ("hello", 1)
    assert [line for line in stand_in.asked if line.startswith("POST")] == ["POST /api/generate"]
    assert shown["cold_start_p50"] == 12.345
    assert line["attempts"][0]["backend"] == "b0"


async def test_ollama_when_its_first_content_limit_is_short_has_longer_for_a_cold_start() -> None:
    """Its cold load happens inside the request: no byte comes until the model is loaded."""
    row = {**GOLEM, "kind": "ollama", "timeouts": {"first_content": 0.2, "document": 0.2}}
    lines = b"".join(chunk(event) for event in OLLAMA_CHAT.events)

    async def loads_then_hangs(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            if len(backend.requests) > 1:
                await conn.wait_closed()
                return
            await asyncio.sleep(0.6)
            await conn.send(OLLAMA_CHAT.head + lines + LAST_CHUNK)

    async with (
        RawBackend(loads_then_hangs) as backend,
        proxy({**row, "url": backend}) as p,
        RawClient(p.port) as client,
    ):
        cold = await client.ask(OLLAMA_CHAT.request(stream=True), "POST")
        stuck = await client.ask(OLLAMA_CHAT.request(stream=True), "POST")
        first, second = await p.exchanges(2)
    assert (cold.status, cold.complete, first["end"]) == (200, True, "complete")
    assert stuck.status == 504
    assert second["attempts"][0]["fault"] == "timeout", "warm by now: the usual limit"


# -- through yagna -------------------------------------------------------------------------------

KEYED = {**GOLEM, "api_key": Yagna.APP_KEY}


def gated(api: Api, gate: asyncio.Event) -> Any:
    """A server that sends the first content and goes on only once the gate is open."""

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(api.head)
            for event in (*api.quiet, api.content[0]):
                await conn.send(chunk(event))
            await gate.wait()
            for event in (*api.content[1:], *api.end):
                await conn.send(chunk(event))
            await conn.send(LAST_CHUNK)

    return script


@pytest.mark.parametrize(
    "api", [CHAT, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE], ids=lambda a: a.path
)
async def test_yagna_when_a_stream_is_asked_for_tokens_come_as_they_are_made(api: Api) -> None:
    """The server waits until the client has its first content: who buffers would wait for ever.

    Another backend stands ready, so nothing is passed on unjudged.
    """
    gate = asyncio.Event()
    async with RawBackend(gated(api, gate)) as behind, RawBackend(answer(OK)) as other:
        async with (
            yagna(behind.url) as (url, tunnel),
            proxy({**KEYED, "url": url}, other) as p,
            RawClient(p.port) as client,
        ):
            await eventually(lambda: p.app.fleet.candidates()[0].live.check is not None)
            tunnel.accepts.clear()
            await client.send(api.request(stream=True, headers=[("Accept", "*/*")]))
            head = await client.head()
            early = await client.read_until(b"hello")
            gate.set()
            rest = await client.read_until(LAST_CHUNK)
            (line,) = await p.exchanges(1)
        (got,) = (each for each in behind.requests if each.method == "POST")
    stream_type = "text/event-stream" if api in (CHAT, MESSAGES) else "application/octet-stream"
    assert tunnel.accepts == [stream_type]
    assert (head.status, head.header("content-type")) == (200, [stream_type.encode()])
    assert api.end[-1] in early + rest
    assert (line["end"], line["backend"]) == ("complete", "b0")
    assert (got.target, got.header("authorization")) == (api.path.encode(), [b"Bearer app-key"])


async def test_yagna_when_no_stream_is_asked_for_passes_the_document(llama: Child) -> None:
    data = json.dumps({"model": MODEL, "messages": HI, "max_tokens": 4}).encode()
    fields = [("Content-Type", "application/json"), ("Accept", "application/json")]
    async with (
        yagna(llama.llama_url) as (url, tunnel),
        proxy({**KEYED, "url": url, "models": [MODEL]}) as p,
        RawClient(p.port) as client,
    ):
        await found(p, "openai")
        whole, _ = await infer(p)
        tunnel.accepts.clear()
        asked = request("POST", "/v1/chat/completions", fields, data)
        got = await client.ask(asked, "POST", timeout=30)
    assert whole["success"] is True
    assert whole["response"]
    assert (got.status, got.header("content-type")) == (200, [b"application/json; charset=utf-8"])
    assert got.json["usage"]["completion_tokens"] == 4
    assert tunnel.accepts == ["application/json"]


async def test_yagna_before_llama_cpp_when_the_client_leaves_mid_stream_the_slot_is_free(
    llama: Child,
) -> None:
    """Its first token is here while the model still works, so nobody waited for the end."""
    async with (
        yagna(llama.llama_url) as (url, tunnel),
        proxy({**KEYED, "url": url, "models": [MODEL]}) as p,
    ):
        await found(p, "openai")
        tunnel.accepts.clear()
        async with RawClient(p.port) as client:
            await client.send(endless())
            await client.read_until(b'"content":"', 30)
            assert await slots_busy(llama) == 1
        await stopped(llama, p)
    assert tunnel.accepts == ["text/event-stream"]


async def test_yagna_before_ollama_then_lines_and_inference_are_whole(ollama_url: str) -> None:
    row = {**KEYED, "kind": "ollama", "models": ["m"]}
    async with yagna(ollama_url) as (url, tunnel), proxy({**row, "url": url}) as p:
        await eventually(lambda: p.app.fleet.candidates()[0].live.check is not None, 5.0)
        tunnel.accepts.clear()
        async with ollama_client(f"http://127.0.0.1:{p.port}") as client:
            parts = [part async for part in await client.chat("m", HI, stream=True)]
            whole = await client.chat("m", HI)
        last, texts = await infer(p, model="m", stream=True)
        lines = await p.exchanges(3)
    assert "".join(part.message.content or "" for part in parts) == SAID == whole.message.content
    assert len(parts) > 2
    assert (last["success"], "".join(texts), len(texts) > 2) == (True, SAID, True)
    octets = "application/octet-stream"
    assert tunnel.accepts == [octets, "application/json", octets]
    assert [line["end"] for line in lines] == ["complete"] * 3


async def test_yagna_when_the_activity_has_ended_the_next_backend_answers() -> None:
    async with RawBackend(json_answer(CHAT.document)) as other, yagna(other.url) as (url, tunnel):
        ended = url.replace(Yagna.ACTIVITY, "ended")
        async with proxy({**KEYED, "url": ended}, other) as p, RawClient(p.port) as client:
            got = await client.ask(CHAT.request(stream=False), "POST")
            (line,) = await p.exchanges(1)
            await eventually(lambda: p.events("probe.failed"))
            failed = p.events("probe.failed")[0]
    assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
    assert [(a["backend"], a["fault"]) for a in line["attempts"]] == [("b0", "gone"), ("b1", None)]
    assert (failed["backend"], failed["fault"]) == ("b0", "gone")
    assert tunnel.accepts == []


async def test_yagna_when_the_app_key_is_wrong_the_next_backend_answers() -> None:
    async with RawBackend(json_answer(CHAT.document)) as other, yagna(other.url) as (url, _):
        row = {**GOLEM, "url": url, "api_key": "old"}
        async with proxy(row, other) as p, RawClient(p.port) as client:
            got = await client.ask(CHAT.request(stream=False), "POST")
            (line,) = await p.exchanges(1)
    assert got.header("x-beacon-backend") == [b"b1"]
    assert line["attempts"][0]["fault"] == "unauthorized"
