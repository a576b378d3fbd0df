"""golem: URLs from the environment, and what each kind of backend is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from beacon_proxy.contracts import (
    Backend,
    Call,
    Dialect,
    Fault,
    Prompt,
    Provider,
    Reading,
    Usage,
    Verdict,
)
from beacon_proxy.errors import ConfigError
from providers.golem import Golem

PROVIDER: Provider = Golem()
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


async def test_check_when_backend_is_ollama_reads_its_models() -> None:
    """3.1: the tutorial's Ollama behind a TCP proxy, here one that lists its tags alone."""
    asked = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        if request.path == "/api/tags":
            return web.json_response({"models": [{"name": "qwen2:0.5b"}]})
        return web.Response(status=404)

    async with (
        RawTestServer(answer, host="127.0.0.1") as server,
        aiohttp.ClientSession() as session,
    ):
        check = await PROVIDER.check(replace(BACKEND, port=server.port or 0), session)
    assert check is not None
    assert (check.verdict, check.models) == (Verdict.GOOD, ("qwen2:0.5b",))
    assert asked == ["GET /v1/models", "GET /api/tags", "GET /api/ps"]
