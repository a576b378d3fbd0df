"""golem: URLs from the environment, and what each kind of backend is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from beacon_proxy.contracts import (
    Backend,
    Call,
    Check,
    Dialect,
    Exchange,
    Fault,
    Prompt,
    Provider,
    Reading,
    Usage,
    Verdict,
    Warmth,
)
from beacon_proxy.errors import ConfigError
from providers.golem import Golem

from .kit import RawBackend, answer

PROVIDER = Golem()
AS_THE_CORE_SEES_IT: Provider = PROVIDER
BACKEND = Backend(
    name="g", provider="golem", url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1
)
PROMPT = Prompt("llama3.2:1b", "Hi", temperature=0.5, max_tokens=9)
ENDPOINTS = "GOLEM_PROVIDER_ENDPOINTS"


def row(number: int, url: str, region: str) -> dict[str, str]:
    return {"name": f"golem-{number}", "provider": "golem", "url": url, "region": region}


def test_provider_when_it_stands_alone_has_the_defaults_of_its_family() -> None:
    assert PROVIDER.name == "golem"
    assert (PROVIDER.pool, PROVIDER.price_per_second) == ("baseline", 0.0001)
    assert PROVIDER.kinds == ("auto", "ollama", "openai", "inference")
    assert PROVIDER.environment == (ENDPOINTS,)


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ("", []),
        (" , ,", []),
        ("http://127.0.0.1:11434", [row(1, "http://127.0.0.1:11434", "us-east")]),
        (
            " http://a:1 ,, http://b/v1 | EU \n,http://c|mars_2",
            [
                row(1, "http://a:1", "us-east"),
                row(2, "http://b/v1", "eu-west"),
                row(3, "http://c", "mars-2"),
            ],
        ),
        ("http://a|", [row(1, "http://a", "us-east")]),
    ],
)
def test_environment_when_urls_are_listed_makes_one_row_each(
    value: str, rows: list[dict[str, str]]
) -> None:
    assert PROVIDER.from_environment({ENDPOINTS: value}, "iad") == rows


def test_environment_when_nothing_is_set_gives_nothing() -> None:
    assert PROVIDER.from_environment({"MODAL_API_BASE": "http://m"}, "us-east") == []


def test_environment_when_urls_are_bad_names_variable_and_each_of_them_but_no_secret() -> None:
    value = "127.0.0.1:11434, http://good, http://u:s3cret@h | EU"
    with pytest.raises(ConfigError) as caught:
        PROVIDER.from_environment({ENDPOINTS: value}, "us-east")
    first, second = caught.value.problems
    assert first.startswith(f"{ENDPOINTS} (URL 1): must be http://")
    assert second.startswith(f"{ENDPOINTS} (URL 3): must hold no user")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "stream", "target", "dialect", "body"),
    [
        (
            "auto",
            True,
            b"/t/v1/chat/completions",
            Dialect.OPENAI,
            {
                "messages": [{"role": "user", "content": "Hi"}],
                "temperature": 0.5,
                "max_tokens": 9,
                "stream_options": {"include_usage": True},
            },
        ),
        (
            "openai",
            False,
            b"/t/v1/chat/completions",
            Dialect.OPENAI,
            {
                "messages": [{"role": "user", "content": "Hi"}],
                "temperature": 0.5,
                "max_tokens": 9,
            },
        ),
        (
            "ollama",
            False,
            b"/t/api/generate",
            Dialect.OLLAMA,
            {"prompt": "Hi", "options": {"temperature": 0.5, "num_predict": 9}},
        ),
        (
            "inference",
            True,
            b"/t/inference",
            Dialect.BEACON,
            {"prompt": "Hi", "temperature": 0.5, "max_tokens": 9},
        ),
    ],
)
def test_ask_when_kind_is_set_speaks_what_the_backend_does(
    kind: str, stream: bool, target: bytes, dialect: Dialect, body: dict[str, Any]
) -> None:
    backend = replace(BACKEND, kind=kind, base_path="/t")
    call = PROVIDER.ask(backend, replace(PROMPT, stream=stream))
    assert call == Call(target, call.body, dialect)
    assert json.loads(call.body) == {"model": "llama3.2:1b", "stream": stream, **body}


def test_target_when_url_ends_in_v1_does_not_double_it() -> None:
    assert PROVIDER.target(replace(BACKEND, base_path="/v1"), b"/v1/models") == b"/v1/models"


def test_credentials_when_backend_has_a_key_are_its_own() -> None:
    keyed = replace(BACKEND, api_key="k")
    assert dict(PROVIDER.credentials(keyed))[b"Authorization"] == b"Bearer k"
    assert PROVIDER.credentials(BACKEND) == ()


def test_judge_when_server_is_busy_or_loads_tells_them_apart() -> None:
    """4.1, 4.2: what mostly runs on Golem is Ollama or llama.cpp."""
    busy = b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
    loading = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
    assert PROVIDER.judge(BACKEND, 503, (), busy) is Fault.BUSY
    assert PROVIDER.judge(BACKEND, 503, (), loading) is Fault.LOADING
    assert PROVIDER.judge(BACKEND, 400, (), b'{"error":"bad"}') is None


def test_read_when_backend_is_ollama_finds_text_and_counts() -> None:
    line = {"response": "Hi", "done": True, "prompt_eval_count": 2, "eval_count": 1}
    assert PROVIDER.read(BACKEND, line) == Reading("Hi", True, Usage(2, 1))


# -- what it speaks, found out by free questions -------------------------------------------------

Answers = dict[str, tuple[int, str, dict[str, str]]]  # by "METHOD /path"; 404 for all else
NOT_FOUND = (404, '{"detail":"Not Found"}', {})
OLLAMA: Answers = {
    "GET /": (200, "Ollama is running", {}),
    "GET /api/version": (200, '{"version":"0.12.0"}', {}),
    "GET /api/tags": (200, '{"models":[{"name":"qwen2:0.5b","model":"qwen2:0.5b"}]}', {}),
    "GET /api/ps": (200, '{"models":[{"name":"qwen2:0.5b","model":"qwen2:0.5b"}]}', {}),
    "GET /v1/models": (
        200,
        '{"object":"list","data":[{"id":"qwen2:0.5b","owned_by":"library"}]}',
        {},
    ),
}
LISTS_TAGS: Answers = {"GET /api/tags": OLLAMA["GET /api/tags"]}
SGLANG: Answers = {  # 4.4: Ollama's routes, too, but neither /api/version nor /api/ps
    "GET /v1/models": (200, '{"data":[{"id":"m","owned_by":"sglang"}]}', {}),
    "GET /ready": (200, "", {}),
    "GET /api/tags": (200, '{"models":[{"name":"m"}]}', {}),
}
LLAMA_SWAP: Answers = {  # says its version where Ollama does, and is none
    "GET /api/version": (200, '{"version":"v171"}', {}),
    "GET /v1/models": (200, '{"data":[{"id":"m","owned_by":"llama-swap"}]}', {}),
}
NAMES_ITS_VERSION: Answers = {"GET /api/version": LLAMA_SWAP["GET /api/version"]}
VLLM_LOCKED: Answers = {"GET /v1/models": (401, '{"error":"Unauthorized"}', {})}
PLAIN: Answers = {"OPTIONS /inference": (405, '{"detail":"Method Not Allowed"}', {"Allow": "POST"})}
PLAIN_BY_FLASK: Answers = {"OPTIONS /inference": (200, "", {"Allow": "OPTIONS, POST"})}
CHAT_WITHOUT_LIST: Answers = {
    "OPTIONS /v1/chat/completions": (200, "POST", {"Allow": "POST"}),
    "OPTIONS /inference": (200, "POST", {"Allow": "POST"}),
}
CORS_EVERYWHERE: Answers = {
    "OPTIONS /v1/chat/completions": (204, "", {"Access-Control-Allow-Methods": "GET, POST"}),
    "OPTIONS /inference": (204, "", {"Access-Control-Allow-Methods": "GET, POST"}),
}
BEHIND_A_WALL: Answers = {
    "OPTIONS /inference": (401, "", {"Allow": "POST"}),
    "OPTIONS /v1/chat/completions": (404, "", {"Allow": "GET, POST"}),
}


@asynccontextmanager
async def server(
    answers: Answers, otherwise: Any = NOT_FOUND
) -> AsyncIterator[tuple[Backend, list[str]]]:
    """A backend that says what it is told to, and what it was asked."""
    asked: list[str] = []

    async def say(request: web.BaseRequest) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        status, text, headers = answers.get(asked[-1], otherwise)
        return web.Response(status=status, text=text, headers=headers)

    async with RawTestServer(say, host="127.0.0.1") as listening:
        yield replace(BACKEND, port=listening.port or 0), asked


async def checked(backend: Backend) -> Check:
    async with aiohttp.ClientSession() as session:
        check = await PROVIDER.check(backend, session)
    assert check is not None
    return check


@pytest.mark.parametrize(
    ("answers", "kind", "models"),
    [
        (OLLAMA, "ollama", ("qwen2:0.5b",)),
        (LISTS_TAGS, "ollama", ("qwen2:0.5b",)),
        ({"GET /api/tags": (200, '{"models":null}', {})}, "ollama", ()),  # none pulled yet
        (SGLANG, "openai", ("m",)),
        (LLAMA_SWAP, "openai", ("m",)),
        (VLLM_LOCKED, "openai", None),
        (PLAIN, "inference", None),
        (PLAIN_BY_FLASK, "inference", None),
        (CHAT_WITHOUT_LIST, "openai", None),
    ],
)
async def test_check_when_kind_is_auto_finds_out_what_it_speaks(
    answers: Answers, kind: str, models: tuple[str, ...] | None
) -> None:
    """And never by a POST: a question must not cost a token."""
    async with server(answers) as (backend, asked):
        check = await checked(backend)
    assert (check.verdict, check.kind, check.models) == (Verdict.GOOD, kind, models)
    assert {line.partition(" ")[0] for line in asked} <= {"GET", "OPTIONS"}
    assert len(asked) <= 7


@pytest.mark.parametrize(
    ("answers", "otherwise", "verdict"),
    [
        ({}, NOT_FOUND, Verdict.GOOD),  # as before: it goes on as an OpenAI chat
        (CORS_EVERYWHERE, NOT_FOUND, Verdict.GOOD),
        (BEHIND_A_WALL, NOT_FOUND, Verdict.GOOD),
        ({}, (400, "", {}), Verdict.NEUTRAL),  # 3.1: nothing is up behind the tunnel
        ({}, (200, "<html>log in</html>", {}), Verdict.NEUTRAL),
        ({}, (401, "", {}), Verdict.GOOD),
        ({}, (302, "", {"Location": "/login"}), Verdict.NEUTRAL),
        ({}, (502, "", {}), Verdict.STRIKE),
        ({}, (503, '{"error":{"message":"Loading model"}}', {}), Verdict.BUSY),
        ({"GET /api/version": (200, '"0.12"', {})}, NOT_FOUND, Verdict.GOOD),
        ({"GET /api/version": (200, '{"version":3}', {})}, NOT_FOUND, Verdict.GOOD),
        (NAMES_ITS_VERSION, NOT_FOUND, Verdict.GOOD),
        (NAMES_ITS_VERSION, (502, "", {}), Verdict.STRIKE),
        ({"GET /v1/models": (200, "[]", {})}, NOT_FOUND, Verdict.NEUTRAL),
        ({"GET /v1/models": (500, "", {})}, NOT_FOUND, Verdict.STRIKE),
    ],
)
async def test_check_when_it_answers_strangely_leaves_the_kind_open(
    answers: Answers, otherwise: Any, verdict: Verdict
) -> None:
    async with server(answers, otherwise) as (backend, _):
        check = await checked(backend)
    assert (check.kind, check.verdict) == (None, verdict)


async def test_check_when_the_tunnel_closes_without_a_word_is_a_transport_error() -> None:
    """3.1: golem-js ends the connection where yagna refuses its WebSocket with a 400."""
    async with RawBackend(answer(b"", close=True)) as silent:
        with pytest.raises(aiohttp.ClientError):
            await checked(replace(BACKEND, port=silent.port))


@pytest.mark.parametrize("kind", ["ollama", "openai", "inference"])
async def test_check_when_the_kind_is_known_asks_no_more_than_it_must(kind: str) -> None:
    async with server(OLLAMA) as (backend, asked):
        check = await checked(replace(backend, kind=kind))
    assert (check.verdict, check.models, check.kind) == (Verdict.GOOD, ("qwen2:0.5b",), None)
    assert asked == ["GET /v1/models", "GET /api/ps"]


@pytest.mark.parametrize(
    ("ps", "warmth", "hot"),
    [
        (OLLAMA["GET /api/ps"], Warmth.WARM, ("qwen2:0.5b",)),
        ((200, '{"models":[]}', {}), Warmth.COLD, ()),
        (NOT_FOUND, None, None),
    ],
)
async def test_check_when_ollama_tells_what_is_loaded_is_warm_or_cold_by_that(
    ps: Any, warmth: Warmth | None, hot: tuple[str, ...] | None
) -> None:
    async with server({**OLLAMA, "GET /api/ps": ps}) as (backend, _):
        check = await checked(backend)
    assert (check.kind, check.warmth, check.hot) == ("ollama", warmth, hot)


async def test_check_when_the_url_ends_in_v1_asks_the_server_not_the_api() -> None:
    async with server(OLLAMA) as (backend, asked):
        check = await checked(replace(backend, base_path="/v1"))
    assert check.kind == "ollama"
    assert asked[0] == "GET /api/version"


def test_provider_when_its_model_must_be_loaded_has_time_for_it() -> None:
    """3.1, 4.1: a cold load happens inside the request; keep_alive is 5 minutes."""
    assert (Golem.cold_start, Golem.stays_warm) == (300.0, 300.0)


# -- yagna's tunnel ------------------------------------------------------------------------------

THROUGH_YAGNA = replace(
    BACKEND, base_path="/activity-api/v1/activity/a1/proxy-http", api_key="app-key"
)


def asking(
    dialect: Dialect = Dialect.OPENAI,
    stream: bool = True,
    accept: bytes = b"application/json",
    prompt: Prompt | None = None,
) -> Exchange:
    return Exchange(
        "x",
        "POST",
        b"/v1/chat/completions",
        "/v1/chat/completions",
        ((b"accept", accept),),
        0.0,
        dialect=dialect,
        inference=True,
        stream=stream,
        prompt=prompt,
    )


@pytest.mark.parametrize(
    ("exchange", "kind", "accept"),
    [
        (asking(), "auto", b"text/event-stream"),
        (asking(Dialect.ANTHROPIC), "openai", b"text/event-stream"),
        (asking(Dialect.UNKNOWN), "auto", b"text/event-stream"),
        (asking(Dialect.OLLAMA), "openai", b"application/octet-stream"),
        (asking(Dialect.BEACON, prompt=PROMPT), "auto", b"text/event-stream"),
        (asking(Dialect.BEACON, prompt=PROMPT), "openai", b"text/event-stream"),
        (asking(Dialect.BEACON, prompt=PROMPT), "ollama", b"application/octet-stream"),
        (asking(Dialect.BEACON, prompt=PROMPT), "inference", b"application/octet-stream"),
        (asking(stream=False), "auto", None),
        (asking(stream=False, accept=b"text/event-stream, */*"), "auto", None),
        # yagna would call its one document a stream
        (asking(stream=False, accept=b"text/event-stream"), "auto", b"*/*"),
        (replace(asking(stream=False, accept=b"text/event-stream"), inference=False), "auto", None),
    ],
)
def test_fields_when_it_goes_through_yagna_ask_for_what_the_client_did(
    exchange: Exchange, kind: str, accept: bytes | None
) -> None:
    expected = () if accept is None else ((b"Accept", accept),)
    assert PROVIDER.fields(replace(THROUGH_YAGNA, kind=kind), exchange) == expected


@pytest.mark.parametrize("base", ["", "/v1", "/proxy-http", "/activity-api/v1/activity/a1/exec"])
def test_fields_when_it_goes_elsewhere_are_the_client_s(base: str) -> None:
    assert PROVIDER.fields(replace(THROUGH_YAGNA, base_path=base), asking()) == ()


def test_target_when_it_goes_through_yagna_follows_its_prefix() -> None:
    prefix = b"/activity-api/v1/activity/a1/proxy-http"
    for base in ("", "/v1"):
        backend = replace(THROUGH_YAGNA, base_path=THROUGH_YAGNA.base_path + base)
        target = PROVIDER.target(backend, b"/v1/chat/completions")
        assert target == prefix + b"/v1/chat/completions"
        assert PROVIDER.fields(backend, asking()) == ((b"Accept", b"text/event-stream"),)


def test_judge_when_yagna_knows_no_such_activity_is_gone() -> None:
    """core/activity/src/error.rs: yagna's errors are JSON with a message, and nothing around it."""
    gone = b'{"message":"Not found: activity"}'
    assert PROVIDER.judge(THROUGH_YAGNA, 404, (), gone) is Fault.GONE
    assert PROVIDER.judge(THROUGH_YAGNA, 401, (), b"") is Fault.UNAUTHORIZED
    assert PROVIDER.judge(BACKEND, 404, (), gone) is None
    unknown = b'{"error":"model \'x\' not found"}'
    assert PROVIDER.judge(THROUGH_YAGNA, 404, (), unknown) is None


@pytest.mark.parametrize("kind", ["auto", "ollama"])
async def test_check_when_yagna_knows_no_such_activity_is_a_strike(kind: str) -> None:
    """Else a 404 for every question would be taken for a server that lists no models."""
    async with server({}, (404, '{"message":"Not found: activity"}', {})) as (backend, asked):
        there = replace(THROUGH_YAGNA, port=backend.port, kind=kind)
        check = await checked(there)
    assert (check.verdict, check.fault, check.kind) == (Verdict.STRIKE, Fault.GONE, None)
    assert asked == ["GET /activity-api/v1/activity/a1/proxy-http/api/version"]
