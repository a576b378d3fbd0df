"""runpod, with the SDK's local server (`--rp_serve_api`) as the queue endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from .kit import proxy
from .kit_runpod import local_server
from .real import MODEL, Child

pytest_plugins = ["tests.real"]

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
PATIENT: Any = {"timeouts": {"first_content": 30, "document": 30, "idle": 30}}


def client_of(port: int) -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def serving(llama: Child, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_server(tmp_path_factory.mktemp("api"), llama.llama_url) as url:
        yield url


async def test_local_server_when_it_is_a_queue_serves_documents_and_streams(serving: str) -> None:
    """It takes POST alone for `/stream`, and has forgotten the job by the next question."""
    row = {"url": serving, "provider": "runpod", "kind": "queue"}
    async with proxy(row, **PATIENT) as p, client_of(p.port) as client:
        for stream in (False, True, True):
            said: Any = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=6, stream=stream
            )
            if stream:
                chunks = [chunk async for chunk in said]
                assert chunks[-1].choices[0].finish_reason or chunks[-2].choices[0].finish_reason
            else:
                assert said.choices[0].message.content
        lines = await p.exchanges(3)
        assert [line["end"] for line in lines] == ["complete"] * 3
        (told,) = p.events("probe.failed")
    assert told["verdict"] == "neutral", "a server without /health is not down"


async def test_local_server_when_it_refuses_tells_the_model_servers_own_word(serving: str) -> None:
    row = {"url": serving, "provider": "runpod", "kind": "queue"}
    async with proxy(row, **PATIENT) as p, client_of(p.port) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=[{"role": "nobody"}])  # type: ignore[list-item]


async def test_plain_handler_when_it_is_asked_to_stream_answers_all_the_same(
    tmp_path: Path,
) -> None:
    """The SDK: `Stream not supported`; `/status` still runs the job, once."""
    with local_server(tmp_path, "http://127.0.0.1:9", "--plain") as url:
        row = {"url": url, "provider": "runpod", "kind": "queue"}
        async with proxy(row, **PATIENT) as p, aiohttp.ClientSession() as session:

            async def ask(prompt: str, stream: bool) -> Any:
                body = {"model": "m", "prompt": prompt, "stream": stream}
                target = f"http://127.0.0.1:{p.port}/inference"
                async with session.post(target, json=body) as answer:
                    return [json.loads(line) for line in (await answer.text()).splitlines()]

            for stream in (False, True):
                lines = await ask("hello", stream)
                assert "".join(line["response"] for line in lines) == "you said hello"
                assert lines[-1]["success"] is True
            (raised,), (refused,) = await ask("raise", False), await ask("refuse", False)
    assert raised["failure"]["message"] == "the worker raised ValueError"
    assert refused["failure"]["message"] == "too long"
    assert "Traceback" not in json.dumps(raised)
