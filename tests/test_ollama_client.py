"""Ollama's own client through the proxy: NDJSON, piece by piece, from a real model.

llama.cpp has no `/api/*`, so the backend is the demo's: the same server with Ollama's voice beside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import ollama
import pytest

from beacon_proxy.contracts import canonical_model

from .kit import Proxy, proxy
from .real import MODEL, Child, stopped, working

pytest_plugins = ["tests.real"]

SHORT: Any = {"temperature": 0, "seed": 1, "num_predict": 12}
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name three colours."},
]


@dataclass
class Doors:
    """The same backend twice."""

    direct: str
    through: str
    proxy: Proxy
    child: Child

    async def same(self, ask: Callable[[ollama.AsyncClient], Awaitable[Any]]) -> Any:
        """Ask at both doors; return what both said."""
        async with client(self.direct) as one, client(self.through) as other:
            direct, through = await ask(one), await ask(other)
        assert direct == through
        assert direct, "the model said nothing"
        return through


@asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[ollama.AsyncClient]:
    made = ollama.AsyncClient(url, **options)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def doors(llama: Child) -> AsyncIterator[Doors]:
    async with proxy({"url": llama.url, "provider": "golem", "models": [MODEL]}) as p:
        yield Doors(llama.url, f"http://127.0.0.1:{p.port}", p, llama)


async def test_ollama_chat_is_the_same(doors: Doors) -> None:
    async def ask(to: ollama.AsyncClient) -> Any:
        said = await to.chat(MODEL, MESSAGES, options=SHORT)
        return said.message.content, said.done, said.done_reason, said.eval_count

    text, done, reason, count = await doors.same(ask)
    assert (done, reason, count) == (True, "length", 12)
    assert "colours" in text


async def test_ollama_chat_stream_has_the_same_lines(doors: Doors) -> None:
    async def ask(to: ollama.AsyncClient) -> Any:
        stream = await to.chat(MODEL, MESSAGES, options=SHORT, stream=True)
        return [(part.message.content, part.done) async for part in stream]

    lines = await doors.same(ask)
    assert [done for _, done in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 10


@pytest.mark.parametrize("stream", [False, True])
async def test_ollama_generate_is_the_same(doors: Doors, stream: bool) -> None:
    async def ask(to: ollama.AsyncClient) -> Any:
        said: Any = await to.generate(
            MODEL, "Say hello.", system="Be brief.", options=SHORT, stream=stream
        )
        if stream:
            return [(part.response, part.done) async for part in said]
        return said.response, said.done_reason

    await doors.same(ask)


async def test_ollama_stream_comes_as_it_is_made(doors: Doors) -> None:
    """A proxy that gathers lines gives the same text, but all of it at the end."""
    options = {**SHORT, "num_predict": 150}
    messages = [{"role": "user", "content": "Write a long story about a dog."}]
    times = []
    async with client(doors.through) as to:
        async for _ in await to.chat(MODEL, messages, options=options, stream=True):
            times.append(time.monotonic())
    assert len(times) > 100, "seconds of work: what was gathered in a pause is a part of it"
    assert sum(later - earlier > 0.001 for earlier, later in pairwise(times)) > 5


async def test_ollama_list_and_version_answer(doors: Doors) -> None:
    async with client(doors.through) as to:
        (model,) = (await to.list()).models
    assert canonical_model(str(model.model)) == canonical_model(MODEL)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{doors.through}/api/version") as answer,
    ):
        assert answer.headers["X-Beacon-Provider"] == "golem"
        assert "version" in await answer.json()


async def test_ollama_unknown_model_reads_as_not_found(doors: Doors) -> None:
    async with client(doors.through) as to:
        with pytest.raises(ollama.ResponseError) as refused:
            await to.chat("no-such-model", MESSAGES)
    assert refused.value.status_code == 404
    assert "no-such-model" in refused.value.error


async def test_ollama_error_of_the_backend_is_the_same(doors: Doors) -> None:
    async def ask(to: ollama.AsyncClient) -> Any:
        with pytest.raises(ollama.ResponseError) as refused:
            await to.chat(MODEL, MESSAGES, tools=[{"type": "function"}])
        return refused.value.status_code, refused.value.error

    status, _ = await doors.same(ask)
    assert status == 400


async def test_ollama_empty_request_loads_the_model(doors: Doors) -> None:
    """An answer without a word is right here; the proxy must not take it for a failure."""
    async with client(doors.through) as to:
        said = await to.generate(MODEL)
    assert (said.done, said.done_reason, said.response) == (True, "load", "")


@pytest.mark.parametrize("stream", [False, True])
async def test_ollama_client_leaves_then_the_model_stops(doors: Doors, stream: bool) -> None:
    endless = {"num_predict": 1000, "temperature": 2, "seed": 3}
    async with client(doors.through) as to:
        if stream:
            answer = await to.chat(MODEL, MESSAGES, options=endless, stream=True)
            await anext(answer)
            await answer.aclose()
        else:
            asking = asyncio.create_task(to.chat(MODEL, MESSAGES, options=endless))
            await working(doors.child)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await stopped(doors.child, doors.proxy)
    (line,) = await doors.proxy.exchanges(1)
    assert line["end"] == "client_closed"
