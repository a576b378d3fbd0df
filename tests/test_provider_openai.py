"""openai: recorded answers in, verdicts out; its checks run against a real server on loopback.

The server plays what llama.cpp, vLLM, Ollama and SGLang answer, as it was recorded; the number in a
test's id is the section of that record. It plays nothing else, and notes every question it gets.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Call,
    Check,
    Dialect,
    Fault,
    Prompt,
    Provider,
    Reading,
    Usage,
    Verdict,
    Warmth,
)
from providers.checking import hot_models, plain
from providers.openai import OpenAI, join_target, url_problem
from providers.reading import read_answer

PROVIDER: Provider = OpenAI()
BACKEND = Backend(
    name="b", provider="openai", url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1
)
KEYED = replace(BACKEND, api_key="k-1")
PROMPT = Prompt("llama3.2:1b", "Why is the sky blue? ☀", temperature=0.2, max_tokens=64)

LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
NO_SLOT = b'{"error":{"code":503,"message":"no slot available","type":"unavailable_error"}}'
BAD_KEY = b'{"error":{"message":"Invalid API Key","type":"authentication_error","code":401}}'
VLLM_BUSY = (
    b'{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try'
    b' again later or on a different instance.","type":"Service Unavailable","param":null,'
    b'"code":503}}'
)
OLLAMA_BUSY = b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
TGI_BUSY = b'{"error":"Model is overloaded","error_type":"overloaded"}'
VLLM_NO_MODEL = (
    b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model",'
    b'"code":404}}'
)


def test_provider_when_it_stands_alone_has_the_defaults_of_its_family() -> None:
    assert PROVIDER.name == "openai"
    assert (PROVIDER.pool, PROVIDER.price_per_second) == ("burst", 0.0)
    assert (PROVIDER.kinds, PROVIDER.environment) == (("auto",), ())
    assert PROVIDER.from_environment({"OPENAI_API_KEY": "k"}, "us-east") == []


# What goes out


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        ("", b"/v1/models", b"/v1/models"),
        ("/llm", b"/v1/models?x=%2F", b"/llm/v1/models?x=%2F"),
        ("/v1", b"/v1/chat/completions", b"/v1/chat/completions"),
        ("/v1", b"/v1", b"/v1"),
        ("/v1", b"/v1?x=1", b"/v1?x=1"),
        ("/v1", b"/v1beta/models", b"/v1/v1beta/models"),
        ("/v1", b"/chat/completions", b"/v1/chat/completions"),
        ("/v1", b"/api/chat", b"/api/chat"),
        ("/llm/v1", b"/v1/v1", b"/llm/v1/v1"),
        ("/apiv1", b"/v1/models", b"/apiv1/v1/models"),
        ("/llm", b"//a/%2e%2e/b?", b"/llm//a/%2e%2e/b?"),
        ("/llm", b"*", b"*"),
    ],
)
def test_target_when_base_path_is_set_puts_it_first_and_doubles_no_v1(
    base: str, target: bytes, expected: bytes
) -> None:
    assert PROVIDER.target(replace(BACKEND, base_path=base), target) == expected


@given(st.sampled_from(["", "/v1", "/a/v1", "/a", "/openai"]), st.binary())
def test_target_when_bytes_are_any_they_are_kept(base: str, rest: bytes) -> None:
    assert join_target(base, b"/" + rest).endswith(b"/" + rest)
    assert join_target(base, b"/" + rest).startswith(base.removesuffix("/v1").encode())


def test_credentials_when_backend_has_a_key_replace_both_of_the_client() -> None:
    """Guards against a client's key reaching a backend that has its own."""
    assert PROVIDER.credentials(KEYED) == (
        (b"Authorization", b"Bearer k-1"),
        (b"X-Api-Key", b"k-1"),
    )
    assert PROVIDER.credentials(BACKEND) == ()


@pytest.mark.parametrize("stream", [False, True])
def test_ask_when_prompt_is_given_makes_one_chat(stream: bool) -> None:
    call = PROVIDER.ask(replace(BACKEND, base_path="/v1"), replace(PROMPT, stream=stream))
    assert call == Call(b"/v1/chat/completions", call.body, Dialect.OPENAI)
    assert call.headers == ((b"Content-Type", b"application/json"),)
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    assert json.loads(call.body) == usage | {
        "model": "llama3.2:1b",
        "messages": [{"role": "user", "content": "Why is the sky blue? ☀"}],
        "temperature": 0.2,
        "max_tokens": 64,
        "stream": stream,
    }


def test_ask_when_prompt_holds_half_a_surrogate_still_makes_json() -> None:
    call = PROVIDER.ask(BACKEND, replace(PROMPT, prompt="\ud83d"))
    assert json.loads(call.body)["messages"][0]["content"] == "\ud83d"


# What an answer means


@pytest.mark.parametrize(
    ("backend", "status", "body", "fault"),
    [
        pytest.param(BACKEND, 503, LOADING, Fault.LOADING, id="4.2 llama.cpp loads"),
        pytest.param(BACKEND, 503, NO_SLOT, Fault.BUSY, id="4.2 llama.cpp is full"),
        pytest.param(BACKEND, 503, VLLM_BUSY, Fault.BUSY, id="4.3 vLLM is full"),
        pytest.param(BACKEND, 503, OLLAMA_BUSY, Fault.BUSY, id="4.1 Ollama is full"),
        pytest.param(BACKEND, 429, TGI_BUSY, Fault.BUSY, id="4.5 TGI is full"),
        pytest.param(BACKEND, 529, b"", Fault.BUSY, id="5 Anthropic is overloaded"),
        pytest.param(KEYED, 401, BAD_KEY, Fault.UNAUTHORIZED, id="4.2 our key is refused"),
        pytest.param(KEYED, 403, b"", Fault.UNAUTHORIZED, id="our key is forbidden"),
        pytest.param(BACKEND, 401, BAD_KEY, None, id="4.2 the client's key is refused"),
        pytest.param(
            BACKEND, 401, b'{"error":"Unauthorized"}', None, id="4.3 vLLM, the client's key"
        ),
        pytest.param(BACKEND, 503, b"", None, id="4.3 a bare 503 is the core's to judge"),
        pytest.param(BACKEND, 503, b" " * 4096 + LOADING, None, id="only the beginning is read"),
        pytest.param(BACKEND, 404, VLLM_NO_MODEL, None, id="4.3 vLLM, no such model"),
        pytest.param(BACKEND, 500, b"Loading model", None, id="words alone decide nothing"),
        pytest.param(BACKEND, 200, b"server busy", None, id="a good answer may say anything"),
    ],
)
def test_judge_when_server_answers_names_what_only_it_can_mean(
    backend: Backend, status: int, body: bytes, fault: Fault | None
) -> None:
    assert PROVIDER.judge(backend, status, (), body) is fault


# What a check finds


@dataclass
class Played:
    """A server on loopback with recorded answers, and what it was asked."""

    backend: Backend
    asked: list[str] = field(default_factory=list)  # METHOD target
    headers: list[Mapping[str, str]] = field(default_factory=list)


Routes = dict[str, tuple[int, bytes] | tuple[int, bytes, dict[str, str]]]


@asynccontextmanager
async def playing(routes: Routes, backend: Backend = BACKEND) -> AsyncIterator[Played]:
    played = Played(backend)

    async def answer(request: web.BaseRequest) -> web.Response:
        played.asked.append(f"{request.method} {request.path_qs}")
        played.headers.append(request.headers.copy())
        status, body, *headers = routes.get(request.path_qs, (404, b'{"detail":"Not Found"}'))
        return web.Response(status=status, body=body, headers=headers[0] if headers else None)

    async with RawTestServer(answer, host="127.0.0.1") as server:
        played.backend = replace(backend, port=server.port or 0)
        yield played


async def check(backend: Backend) -> Check:
    async with aiohttp.ClientSession(headers={"User-Agent": "beacon-proxy/0 (check)"}) as session:
        found = await PROVIDER.check(backend, session)
    assert found is not None
    assert found.latency is not None
    assert found.latency >= 0
    return replace(found, latency=None)


def listed(*names: str, owner: str) -> bytes:
    rows = [{"id": name, "object": "model", "owned_by": owner} for name in names]
    return json.dumps({"object": "list", "data": rows}).encode()


def routed(*names_and_states: str) -> bytes:
    rows = [
        {"id": name, "object": "model", "owned_by": "llamacpp", "status": {"value": state}}
        for name, state in zip(names_and_states[::2], names_and_states[1::2], strict=True)
    ]
    return json.dumps({"object": "list", "data": rows}).encode()


LLAMA_CPP = json.dumps(
    {
        "models": [{"name": "tiny", "model": "tiny", "capabilities": ["completion"]}],
        "object": "list",
        "data": [
            {"id": "tiny", "object": "model", "owned_by": "llamacpp", "meta": {"n_ctx": 4096}}
        ],
    }
).encode()
TAGS = json.dumps(
    {"models": [{"name": "llama3.2:1b", "model": "llama3.2:1b"}, {"model": "qwen2:0.5b"}]}
).encode()
OLLAMA = listed("llama3.2:1b", owner="library")
HOT = b'{"models":[{"name":"llama3.2:1b","model":"llama3.2:1b","size_vram":1324}]}'
MODELS, GET_MODELS, GET_PS = "/v1/models", "GET /v1/models", "GET /api/ps"


@pytest.mark.parametrize(
    ("routes", "backend", "asked", "expected"),
    [
        pytest.param(
            {MODELS: (200, LLAMA_CPP), "/props": (200, b'{"total_slots":2,"is_sleeping":false}')},
            BACKEND,
            [GET_MODELS, "GET /props"],
            Check(Verdict.GOOD, models=("tiny",), warmth=Warmth.WARM, hot=("tiny",)),
            id="4.2 llama.cpp",
        ),
        pytest.param(
            {MODELS: (200, LLAMA_CPP), "/props": (200, b'{"total_slots":2,"is_sleeping":true}')},
            BACKEND,
            [GET_MODELS, "GET /props"],
            Check(Verdict.GOOD, models=("tiny",), warmth=Warmth.COLD, hot=()),
            id="4.2 llama.cpp sleeps; /slots would wake it",
        ),
        pytest.param(
            {MODELS: (200, routed("a", "unloaded", "b", "loaded", "c", "sleeping"))},
            BACKEND,
            [GET_MODELS, "GET /props"],
            Check(Verdict.GOOD, models=("a", "b", "c"), warmth=Warmth.WARM, hot=("b",)),
            id="4.2 llama.cpp as a router of models",
        ),
        pytest.param(
            {MODELS: (200, routed("a", "unloaded", "b", "loading"))},
            BACKEND,
            [GET_MODELS, "GET /props"],
            Check(Verdict.GOOD, models=("a", "b"), warmth=Warmth.COLD, hot=()),
            id="4.2 llama.cpp as a router that holds none",
        ),
        pytest.param(
            {MODELS: (503, LOADING)},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.BUSY, fault=Fault.LOADING, detail="says 503"),
            id="4.2 llama.cpp loads",
        ),
        pytest.param(
            {MODELS: (200, LLAMA_CPP), "/props": (503, LOADING)},
            BACKEND,
            [GET_MODELS, "GET /props"],
            Check(
                Verdict.BUSY,
                models=("tiny",),
                fault=Fault.LOADING,
                detail="llamacpp is not ready (/props says 503)",
            ),
            id="4.2 llama.cpp lists its model and loads it",
        ),
        pytest.param(
            {MODELS: (401, BAD_KEY)},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.GOOD, detail="alive; lists its models for a key (401)"),
            id="4.2 llama.cpp with a key that only clients have",
        ),
        pytest.param(
            {MODELS: (401, BAD_KEY)},
            KEYED,
            [GET_MODELS],
            Check(
                Verdict.NEUTRAL,
                fault=Fault.UNAUTHORIZED,
                detail="alive, but refuses the configured key (401)",
            ),
            id="4.2 llama.cpp refuses our key",
        ),
        pytest.param(
            {MODELS: (200, listed("tiny", "lora", owner="vllm")), "/health": (200, b"")},
            BACKEND,
            [GET_MODELS, "GET /health"],
            Check(
                Verdict.GOOD,
                models=("tiny", "lora"),
                warmth=Warmth.WARM,
                hot=("tiny", "lora"),
            ),
            id="4.3 vLLM",
        ),
        pytest.param(
            {MODELS: (200, listed("tiny", owner="vllm")), "/health": (503, b"")},
            BACKEND,
            [GET_MODELS, "GET /health"],
            Check(
                Verdict.STRIKE,
                models=("tiny",),
                fault=Fault.STATUS,
                detail="vllm is not ready (/health says 503)",
            ),
            id="4.3 vLLM with a dead engine",
        ),
        pytest.param(
            {MODELS: (200, listed("tiny", owner="sglang")), "/ready": (200, b"")},
            BACKEND,
            [GET_MODELS, "GET /ready"],
            Check(Verdict.GOOD, models=("tiny",), warmth=Warmth.WARM, hot=("tiny",)),
            id="4.4 SGLang, whose /health would generate",
        ),
        pytest.param(
            {MODELS: (200, listed("tiny", owner="sglang"))},
            BACKEND,
            [GET_MODELS, "GET /ready"],
            Check(Verdict.GOOD, models=("tiny",), warmth=Warmth.WARM, hot=("tiny",)),
            id="4.4 an SGLang without /ready",
        ),
        pytest.param(
            {MODELS: (200, OLLAMA), "/api/ps": (200, HOT)},
            BACKEND,
            [GET_MODELS, GET_PS],
            Check(Verdict.GOOD, models=("llama3.2:1b",), warmth=Warmth.WARM, hot=("llama3.2:1b",)),
            id="4.1 Ollama with its model in memory",
        ),
        pytest.param(
            {MODELS: (200, OLLAMA), "/api/ps": (200, b'{"models":[]}')},
            BACKEND,
            [GET_MODELS, GET_PS],
            Check(Verdict.GOOD, models=("llama3.2:1b",), warmth=Warmth.COLD, hot=()),
            id="4.1 Ollama with nothing in memory",
        ),
        pytest.param(
            {MODELS: (200, OLLAMA)},
            BACKEND,
            [GET_MODELS, GET_PS],
            Check(Verdict.GOOD, models=("llama3.2:1b",)),
            id="4.1 an Ollama of before /api/ps",
        ),
        pytest.param(
            {MODELS: (200, OLLAMA), "/api/ps": (500, b"boom")},
            BACKEND,
            [GET_MODELS, GET_PS],
            Check(Verdict.GOOD, models=("llama3.2:1b",)),
            id="4.1 an Ollama whose /api/ps fails",
        ),
        pytest.param(
            {
                MODELS: (200, listed("hf.co/me/x-GGUF:Q4_K_M", "me/y:latest", owner="hf.co/me")),
                "/api/ps": (200, HOT),
            },
            BACKEND,
            [GET_MODELS, GET_PS],
            Check(
                Verdict.GOOD,
                models=("hf.co/me/x-GGUF:Q4_K_M", "me/y:latest"),
                warmth=Warmth.WARM,
                hot=("llama3.2:1b",),
            ),
            id="4.1 Ollama with models of others, known by their tags",
        ),
        pytest.param(
            {MODELS: (200, listed("google/gemma", "openai/gpt:free", owner="system"))},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.GOOD, models=("google/gemma", "openai/gpt:free")),
            id="a service that is none of these is asked nothing else",
        ),
        pytest.param(
            {MODELS: (200, b'{"object":"list","data":null}')},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.GOOD, models=()),
            id="4.1 Ollama without a model",
        ),
        pytest.param(
            {"/api/tags": (200, TAGS)},
            BACKEND,
            [GET_MODELS, "GET /api/tags", GET_PS],
            Check(Verdict.GOOD, models=("llama3.2:1b", "qwen2:0.5b")),
            id="4.1 an Ollama of before /v1/models",
        ),
        pytest.param(
            {MODELS: (501, b""), "/api/tags": (405, b"")},
            BACKEND,
            [GET_MODELS, "GET /api/tags"],
            Check(Verdict.GOOD, detail="alive; lists no models (405)"),
            id="a server that lists nothing",
        ),
        pytest.param(
            {MODELS: (429, TGI_BUSY, {"Retry-After": "7"})},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.BUSY, fault=Fault.BUSY, retry_after=7.0, detail="says 429"),
            id="4.5 TGI is full",
        ),
        pytest.param(
            {MODELS: (503, b"maintenance", {"Retry-After": "30"})},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.BUSY, fault=Fault.BUSY, retry_after=30.0, detail="says 503"),
            id="a 503 that says when to come back",
        ),
        pytest.param(
            {MODELS: (503, b"", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.STRIKE, fault=Fault.STATUS, detail="says 503"),
            id="a bare 503",
        ),
        pytest.param(
            {MODELS: (502, b"<html>")},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.STRIKE, fault=Fault.STATUS, detail="says 502"),
            id="a gateway without its server",
        ),
        pytest.param(
            {"/api/tags": (500, b'{"error":"boom"}')},
            BACKEND,
            [GET_MODELS, "GET /api/tags"],
            Check(Verdict.STRIKE, fault=Fault.STATUS, detail="says 500"),
            id="4.1 an Ollama that fails",
        ),
        pytest.param(
            {MODELS: (302, b"", {"Location": "/login"}), "/login": (200, LLAMA_CPP)},
            BACKEND,
            [GET_MODELS],
            Check(
                Verdict.NEUTRAL,
                fault=Fault.STATUS,
                detail="redirects (302); is the url the right one?",
            ),
            id="a redirect is not followed",
        ),
        pytest.param(
            {MODELS: (400, b"The plain HTTP request was sent to HTTPS port")},
            BACKEND,
            [GET_MODELS],
            Check(Verdict.GOOD, detail="alive; lists no models (400)"),
            id="a server that finds fault with the question",
        ),
    ],
)
async def test_check_when_server_plays_a_record_asks_what_is_free_and_reads_it(
    routes: Routes, backend: Backend, asked: list[str], expected: Check
) -> None:
    async with playing(routes, backend) as played:
        assert await check(played.backend) == expected
        assert played.asked == asked


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"<html>Sign in to the network</html>", id="captive portal"),
        pytest.param(b'{"status":"ok"}', id="other JSON"),
        pytest.param(b'{"data":{"id":"x"}}', id="data that is no list"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"[" * 200_000, id="too deep"),
        pytest.param(b'{"data":[' + b'"x",' * 300_000 + b'"x"]}', id="longer than 1 MiB"),
    ],
)
async def test_check_when_a_200_is_no_list_of_models_learns_nothing(body: bytes) -> None:
    """Guards against a portal's 200 that makes a dead backend look healthy."""
    async with playing({MODELS: (200, body)}) as played:
        found = await check(played.backend)
    assert (found.verdict, found.models, found.fault) == (Verdict.NEUTRAL, None, Fault.NOT_JSON)


async def test_check_when_rows_are_strange_keeps_what_can_be_read() -> None:
    rows: list[Any] = [{"id": "a", "owned_by": None}, "b", {"id": 3}, {"name": "c"}, {}]
    async with playing({MODELS: (200, json.dumps({"data": rows}).encode())}) as played:
        assert await check(played.backend) == Check(Verdict.GOOD, models=("a", "c"))


async def test_check_when_url_ends_in_v1_asks_beside_it() -> None:
    backend = replace(BACKEND, base_path="/llm/v1")
    routes: Routes = {"/llm/v1/models": (200, LLAMA_CPP), "/llm/props": (200, b"{}")}
    async with playing(routes, backend) as played:
        assert (await check(played.backend)).verdict is Verdict.GOOD
        assert played.asked == ["GET /llm/v1/models", "GET /llm/props"]


async def test_check_when_backend_has_key_and_headers_sends_them_with_each_question() -> None:
    backend = replace(KEYED, headers=((b"X-Team", b"research"), (b"x-api-key", b"other")))
    async with playing({MODELS: (200, LLAMA_CPP)}, backend) as played:
        await check(played.backend)
    assert len(played.headers) == 2
    for headers in played.headers:
        assert headers["Authorization"] == "Bearer k-1"
        assert headers["X-Api-Key"] == "other"
        assert headers["X-Team"] == "research"
        assert headers["User-Agent"] == "beacon-proxy/0 (check)"


async def test_hot_models_when_server_stays_silent_or_is_gone_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is only good to know must not make a strike of a good server."""
    monkeypatch.setattr("providers.checking._ASIDE", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    backend = replace(BACKEND, port=server.sockets[0].getsockname()[1])
    async with aiohttp.ClientSession() as session:
        assert await hot_models(backend, session) is None
        server.close()
        await server.wait_closed()
        assert await hot_models(backend, session) is None


async def test_check_when_nobody_listens_raises_for_the_caller_to_translate() -> None:
    async with playing({}) as played:
        backend = played.backend
    with pytest.raises(aiohttp.ClientConnectorError):
        await check(backend)


def test_plain_when_a_value_is_empty_leaves_the_header_out() -> None:
    assert plain(((b"a", b"1"), (b"B", b""), (b"A", b"2"))) == {"A": "2"}


def test_origin_when_host_is_ipv6_or_port_the_usual_one_spells_a_url() -> None:
    assert replace(BACKEND, host="::1", port=8000).origin == "http://[::1]:8000"
    assert replace(BACKEND, host="a", port=80).origin == "http://a"
    assert replace(BACKEND, scheme="https", host="a", port=443).origin == "https://a"
    assert replace(BACKEND, scheme="https", host="a", port=80).origin == "https://a:80"


# What an answer says


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(
            {
                "choices": [
                    {"finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            },
            Reading("Hi", True, Usage(3, 2)),
            id="5 chat",
        ),
        pytest.param(
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
            Reading(),
            id="4.3 role chunk",
        ),
        pytest.param(
            {"choices": [{"delta": {"content": " sky"}, "finish_reason": None}], "usage": None},
            Reading(" sky"),
            id="5 chat piece",
        ),
        pytest.param(
            {"choices": [{"delta": {"content": None, "reasoning_content": "hm"}}]},
            Reading(),
            id="5 a thought is no text",
        ),
        pytest.param(
            {"choices": [{"delta": {}, "finish_reason": "length"}]},
            Reading(done=True),
            id="5 last piece",
        ),
        pytest.param(
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
            Reading(usage=Usage(3, 9)),
            id="5 usage chunk",
        ),
        pytest.param(
            {"choices": None, "usage": {"completion_tokens": 9}},
            Reading(usage=Usage(0, 9)),
            id="5 usage chunk with choices null",
        ),
        pytest.param(
            {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]},
            Reading(),
            id="5 content null",
        ),
        pytest.param(
            {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]},
            Reading("ab"),
            id="5 content in parts",
        ),
        pytest.param({"choices": [{"text": "one"}, {"text": "two"}]}, Reading("one"), id="5 text"),
        pytest.param(
            {"message": {"role": "assistant", "content": "Hi"}, "done": False},
            Reading("Hi"),
            id="4.1 Ollama chat",
        ),
        pytest.param(
            {
                "response": "",
                "done": True,
                "done_reason": "stop",
                "load_duration": 1,
                "prompt_eval_count": 26,
                "eval_count": 290,
            },
            Reading("", True, Usage(26, 290)),
            id="4.1 Ollama's last line",
        ),
        pytest.param(
            {"error": 'model "x" not found, try pulling it first'},
            Reading(error='model "x" not found, try pulling it first'),
            id="4.1 Ollama's error",
        ),
        pytest.param(
            json.loads(VLLM_NO_MODEL),
            Reading(error="The model `x` does not exist."),
            id="4.3 vLLM's error",
        ),
        pytest.param(
            {"object": "error", "message": "too long", "type": "400", "code": 400},
            Reading(error="too long"),
            id="4.4 SGLang's flat error",
        ),
        pytest.param(
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            Reading(error="Overloaded"),
            id="5 Anthropic's error",
        ),
        pytest.param(
            {
                "type": "message",
                "content": [
                    {"type": "thinking", "thinking": "", "text": "hm"},
                    {"type": "text", "text": "Hi"},
                ],
                "usage": {"input_tokens": 4, "output_tokens": 1},
            },
            Reading("Hi", usage=Usage(4, 1)),
            id="5 Anthropic's message",
        ),
        pytest.param(
            {"token": {"id": 3, "text": " a", "special": False}, "generated_text": None},
            Reading(" a"),
            id="4.5 TGI's own stream",
        ),
        pytest.param({"generated_text": "a b"}, Reading("a b"), id="4.5 TGI's own"),
        pytest.param({"content": "a b", "stop": True}, Reading("a b"), id="4.2 llama.cpp's own"),
        pytest.param(
            {
                "success": True,
                "response": "Hi",
                "error": None,
                "failure": None,
                "metadata": {"tokens_generated": 7, "receipt": {"id": "r-1"}},
            },
            Reading("Hi", usage=Usage(0, 7), extra={"receipt": {"id": "r-1"}}),
            id="another router's answer",
        ),
        pytest.param(
            {"success": False, "response": "", "failure": {"code": "X", "message": "no GPU"}},
            Reading(error="no GPU"),
            id="another router's failure",
        ),
        pytest.param(
            {"status": "error", "detail": "out of memory", "text": "ignored"},
            Reading(error="out of memory"),
            id="status error",
        ),
        pytest.param({"status": False}, Reading(error="@none"), id="status false"),
        pytest.param({"success": False}, Reading(error="@none"), id="success false"),
        pytest.param({"error": True}, Reading(error="@none"), id="error true"),
        pytest.param({"error": {"code": 500}}, Reading(error="@none"), id="error without words"),
        pytest.param({"error": "{not json"}, Reading(error="{not json"), id="error like JSON"),
        pytest.param({"error": "x" * 900}, Reading(error="x" * 500), id="error without an end"),
        pytest.param(
            {"status": "success", "message": "queued", "output": "Hi"},
            Reading("Hi"),
            id="a remark is no text",
        ),
        pytest.param({"response": None, "text": "Hi"}, Reading("Hi"), id="null before text"),
        pytest.param(
            {"output": {"text": "Hi"}, "usage": {"input": True}}, Reading("Hi"), id="bad counts"
        ),
        pytest.param(
            {"usage": {"prompt_tokens": -1, "completion_tokens": 2.5}}, Reading(), id="worse counts"
        ),
        pytest.param({}, Reading(), id="nothing"),
    ],
)
def test_read_when_document_is_of_any_shape_finds_text_counts_and_error(
    document: dict[str, Any], expected: Reading
) -> None:
    if expected.error == "@none":
        expected = replace(expected, error="the backend reported an error without a message")
    assert PROVIDER.read(BACKEND, document) == expected


def test_read_when_text_lies_too_deep_gives_up() -> None:
    document: dict[str, Any] = {"text": "Hi"}
    for _ in range(900):
        document = {"output": document}
    assert read_answer(document) == Reading()


_KEYS = st.sampled_from(
    [
        *(
            "choices",
            "message",
            "delta",
            "response",
            "output",
            "text",
            "content",
            "tokens",
            "error",
        ),
        *("status", "success", "usage", "metadata", "failure", "finish_reason", "done", "type"),
        *("object", "input", "prompt_tokens", "eval_count", "receipt"),
    ]
)
_LEAVES: list[Any] = [None, True, False, 0, 7, -1, 2.5, "", "a", "{", "{}", "error", "FAILED"]
_JSON = st.recursive(
    st.sampled_from(_LEAVES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _JSON, max_size=6))
def test_read_when_document_is_nonsense_still_gives_text_and_whole_counts(
    document: dict[str, Any],
) -> None:
    """Guards against the null text that crashed an old client."""
    reading = read_answer(document)
    assert isinstance(reading.text, str)
    assert reading.error is None or (reading.error and not reading.text)
    if reading.usage is not None:
        assert reading.usage.input >= 0
        assert reading.usage.output >= 0


# What the environment gives


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:11434", None),
        ("https://h.example/v1/", None),
        ("http://[::1]:80", None),
        ("127.0.0.1:11434", "http://host"),
        ("ftp://h", "http://host"),
        ("http://", "http://host"),
        ("http://h:0", "http://host"),
        ("http://h:99999", "valid host and port"),
        ("http://[::1", "valid host and port"),
        ("http://u:s3cret@h", "no user or password"),
        ("http://h/?key=s3cret", "no query"),
        ("http://h/#x", "no query"),
        ("http://h/a b", "no spaces"),
        ("http://h/\n", "no spaces"),
        ("http://h\\@evil", "backslashes"),
        ("http://hé", "non-ASCII"),
    ],
)
def test_url_problem_when_url_is_bad_says_why_without_quoting_it(
    url: str, words: str | None
) -> None:
    problem = url_problem(url)
    if words is None:
        assert problem is None
    else:
        assert words in str(problem)
        assert "s3cret" not in str(problem)
