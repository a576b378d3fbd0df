"""Clients that people use, against a real model: only their base URL changes.

Each call is made twice, at llama.cpp itself and through the proxy, with the same seed and no
randomness; what the client hands to its caller must be equal.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import litellm
import openai
import pytest
from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

from beacon_proxy.contracts import canonical_model

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    chat_events,
    chunk,
    proxy,
)
from .real import MODEL, Child, row, slots_busy, stopped

pytest_plugins = ["tests.real"]

ASKED: Any = [{"role": "user", "content": "Name three colours."}]
BRIEF = "Be brief."  # in place of the model's own, longer system message
MESSAGES: Any = [{"role": "system", "content": BRIEF}, *ASKED]
FIXED: Any = {"temperature": 0, "seed": 1}
LONG: Any = {"model": MODEL, "messages": ASKED, "max_tokens": 1000}
ENDLESS: Any = {"extra_body": {"ignore_eos": True}}


@dataclass
class Doors:
    """The same backend twice."""

    direct: str
    through: str
    proxy: Proxy
    child: Child

    async def same(self, ask: Callable[[str], Awaitable[Any]]) -> Any:
        """Ask at both doors; return what both said."""
        direct, through = await ask(self.direct), await ask(self.through)
        assert direct == through
        assert direct, "the model said nothing"
        return through


@pytest.fixture
async def doors(llama: Child) -> AsyncIterator[Doors]:
    async with proxy(row(llama)) as p:
        yield Doors(llama.llama_url, f"http://127.0.0.1:{p.port}", p, llama)


def of_openai(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


def of_anthropic(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="unused", max_retries=0, timeout=30)


# -- openai


async def test_openai_chat_is_the_same_text_and_usage(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            said = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=24, **FIXED
            )
        assert said.usage is not None
        choice = said.choices[0]
        return choice.message.content, choice.finish_reason, said.usage.model_dump(), said.model

    text, *_ = await doors.same(ask)
    assert "blue" in text


async def test_openai_chat_stream_has_the_same_pieces(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
                **FIXED,
            )
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        return [
            [(c.delta.content, c.delta.role, c.finish_reason) for c in chunk.choices]
            for chunk in chunks
        ], chunks[-1].usage.completion_tokens

    pieces, tokens = await doors.same(ask)
    assert tokens > 10
    assert len(pieces) > tokens, "one piece a token, not one block"


async def test_openai_answer_names_backend_and_attempts(doors: Doors) -> None:
    async with of_openai(doors.through) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=MESSAGES, max_tokens=2
        )
    assert raw.headers["x-beacon-backend"] == "b0"
    assert raw.headers["x-beacon-provider"] == "openai"
    assert raw.headers["x-beacon-region"] == "us-east"
    assert raw.headers["x-beacon-attempts"] == "1"
    assert raw.headers["x-request-id"]
    assert raw.headers["server"] == "llama.cpp", "the backend's own headers stay"


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_completions_is_the_same(doors: Doors, stream: bool) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            said = await client.completions.create(
                model=MODEL, prompt="The sky is", max_tokens=12, stream=stream, **FIXED
            )
            if isinstance(said, openai.AsyncStream):
                return [[c.text for c in chunk.choices] async for chunk in said]
        return said.choices[0].text

    await doors.same(ask)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_responses_is_the_same(doors: Doors, stream: bool) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            said = await client.responses.create(
                model=MODEL,
                input="Name three colours.",
                max_output_tokens=12,
                temperature=0,
                stream=stream,
            )
            if isinstance(said, openai.AsyncStream):
                events = [(e.type, getattr(e, "delta", None)) async for e in said]
                assert events[-1][0] == "response.completed"
                return events
        return said.output_text

    await doors.same(ask)


async def test_openai_embeddings_are_the_same_numbers(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            said = await client.embeddings.create(model=MODEL, input=["a cat", "a dog"])
        return [one.embedding for one in said.data]

    first, second = await doors.same(ask)
    assert len(first) == 576
    assert first != second


async def test_openai_error_of_the_backend_is_the_same(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_openai(url) as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model=MODEL, messages="no list")  # type: ignore
        return refused.value.status_code, refused.value.body

    await doors.same(ask)


async def test_openai_unknown_model_is_not_found(doors: Doors) -> None:
    async with of_openai(doors.through) as client:
        with pytest.raises(openai.NotFoundError) as refused:
            await client.chat.completions.create(model="no-such-model", messages=MESSAGES)
        assert refused.value.code == "model_not_found"
        models = await client.models.list()
    assert [canonical_model(model.id) for model in models.data] == [canonical_model(MODEL)]


async def test_openai_other_spelling_of_the_model_is_served(doors: Doors) -> None:
    async with of_openai(doors.through) as client:
        said = await client.chat.completions.create(
            model="smollm2-135m", messages=MESSAGES, max_tokens=2
        )
    assert said.choices[0].message.content


# -- anthropic


async def test_anthropic_messages_is_the_same(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_anthropic(url) as client:
            said = await client.messages.create(
                model=MODEL, system=BRIEF, messages=ASKED, max_tokens=16, extra_body=FIXED
            )
        return [block.model_dump() for block in said.content], said.usage.model_dump()

    content, _ = await doors.same(ask)
    assert content[0]["text"]


async def test_anthropic_stream_has_the_same_events(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with (
            of_anthropic(url) as client,
            client.messages.stream(
                model=MODEL, system=BRIEF, messages=ASKED, max_tokens=16, extra_body=FIXED
            ) as stream,
        ):
            events = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert events[-1] == "message_stop"
        return events, [block.model_dump() for block in final.content], final.stop_reason

    await doors.same(ask)


async def test_anthropic_count_tokens_is_the_same(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        async with of_anthropic(url) as client:
            said = await client.messages.count_tokens(model=MODEL, messages=ASKED)
        return said.input_tokens

    assert await doors.same(ask) > 5


async def test_anthropic_unknown_model_reads_as_not_found(doors: Doors) -> None:
    async with of_anthropic(doors.through) as client:
        with pytest.raises(anthropic.NotFoundError) as refused:
            await client.messages.create(model="none", messages=ASKED, max_tokens=1)
    body: Any = refused.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"


# -- litellm


@pytest.mark.filterwarnings("ignore:Item .* using the `ReadOnly` qualifier:UserWarning")
@pytest.mark.parametrize("stream", [False, True])
async def test_litellm_is_the_same(doors: Doors, stream: bool) -> None:
    async def ask(url: str) -> Any:
        said: Any = await litellm.acompletion(
            model=f"openai/{MODEL}",
            api_base=f"{url}/v1",
            api_key="unused",
            messages=MESSAGES,
            max_tokens=12,
            stream=stream,
            **FIXED,
        )
        if stream:
            return [chunk.choices[0].delta.content async for chunk in said]
        return said.choices[0].message.content

    try:
        await doors.same(ask)
    finally:
        await close_litellm_async_clients()  # it keeps them for a process with one loop


# -- curl


async def _curl(*arguments: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--noproxy", "*", *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out


def _sse_shape(raw: bytes) -> list[bytes]:
    """The events less what differs from run to run: ids, times and speeds."""
    raw = re.sub(rb'"timings":\{[^}]*\}', b'"timings":{}', raw)
    raw = re.sub(rb'"(id|created|system_fingerprint)":("[^"]*"|\d+)', rb'"\1":0', raw)
    return raw.split(b"\n\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_stream_is_the_same_bytes(doors: Doors) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "stream": True, **FIXED}

    async def ask(url: str) -> Any:
        arguments = ("-N", "-H", "Content-Type: application/json", "-d", json.dumps(body))
        return _sse_shape(await _curl(*arguments, f"{url}/v1/chat/completions"))

    events = await doors.same(ask)
    assert events[-2:] == [b"data: [DONE]", b""]
    assert len(events) > 12


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_sees_the_backends_status_and_headers(doors: Doors) -> None:
    async def ask(url: str) -> Any:
        head = (await _curl("-D", "-", "-o", "/dev/null", f"{url}/no/such?path=%41")).decode()
        status, *lines = head.lower().strip().splitlines()
        names = {line.partition(":")[0] for line in lines} - {"connection", "keep-alive"}
        return status, {name for name in names if not name.startswith("x-")}

    status, _ = await doors.same(ask)
    assert "404" in status


# -- clients that leave


async def test_openai_client_closes_after_done_then_it_counts_as_complete() -> None:
    """The client closes on reading [DONE], often before the last chunk: nothing was missed."""
    events = chat_events("hello", 2)

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD + b"".join(map(chunk, events)))
        if not await conn.wait_closed(2):
            await conn.send(LAST_CHUNK)

    async with (
        RawBackend(script) as backend,
        proxy({"url": backend, "models": [MODEL]}) as p,
        of_openai(f"http://127.0.0.1:{p.port}") as client,
    ):
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, stream=True)
        async for _ in stream:
            pass
        await stream.close()
        (line,) = await p.exchanges(1)
    assert (line["end"], line["attempts"][0]["fault"]) == ("complete", None)


async def test_openai_client_leaves_mid_stream_then_the_model_stops(doors: Doors) -> None:
    async with of_openai(doors.through) as client:
        stream = await client.chat.completions.create(**LONG, **ENDLESS, stream=True)
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        assert await slots_busy(doors.child) == 1
        await stream.close()
        await stopped(doors.child, doors.proxy)
    (line,) = await doors.proxy.exchanges(1)
    assert line["end"] == "client_closed"


async def test_openai_client_gives_up_waiting_then_nothing_is_held(doors: Doors) -> None:
    """Not streamed: llama.cpp itself goes on to the end, so here the proxy's side alone counts."""
    async with of_openai(doors.through) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=200, timeout=0.5, **ENDLESS
            )
    (line,) = await doors.proxy.exchanges(1)
    assert line["end"] == "client_closed"
    assert doors.proxy.in_flight() == 0


async def test_anthropic_client_leaves_mid_stream_then_the_model_stops(doors: Doors) -> None:
    async with of_anthropic(doors.through) as client:
        async with client.messages.stream(**LONG, **ENDLESS) as stream:
            async for _ in stream.text_stream:
                break
        await stopped(doors.child, doors.proxy)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_is_killed_mid_stream_then_the_model_stops(doors: Doors) -> None:
    body = json.dumps({**LONG, "stream": True, "ignore_eos": True})
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sSN", "--noproxy", "*", "-H", "Content-Type: application/json", "-d", body),
        f"{doors.through}/v1/chat/completions",
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.kill()
    await process.communicate()
    await stopped(doors.child, doors.proxy)
