"""Real backends that are killed with SIGKILL, before and while they answer."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import openai
import pytest

from .kit import Proxy, eventually, proxy
from .real import MODEL, Child, Spawn, row

pytest_plugins = ["tests.real"]

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ENDLESS: Any = {"extra_body": {"ignore_eos": True}}
NEAR, FAR = {"name": "near", "region": "us-east"}, {"name": "far", "region": "eu-west"}


def client_of(p: Proxy) -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{p.port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)


async def content(stream: Any) -> list[str]:
    """The pieces of text of a whole stream; raises what the client raises where it broke."""
    pieces, finish = [], None
    async for chunk in stream:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert finish is not None, "a clean end without a finish_reason"
    return pieces


@pytest.mark.parametrize("stream", [False, True])
async def test_backend_killed_before_then_another_answers_whole(
    llama: Child, spawn: Spawn, stream: bool
) -> None:
    """It had served already, so its idle connection is in the pool when it dies."""
    doomed = spawn()
    doomed.wait_ready()
    async with proxy(row(doomed, **NEAR), row(llama, **FAR)) as p, client_of(p) as client:
        first = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=MESSAGES, max_tokens=2
        )
        assert first.headers["x-beacon-backend"] == "near"
        doomed.kill()
        said: Any = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=8, stream=stream
        )
        text = "".join(await content(said)) if stream else said.choices[0].message.content
        assert text
        _, line = await p.exchanges(2)
    assert (line["end"], line["backend"]) == ("complete", "far")
    assert [attempt["backend"] for attempt in line["attempts"]] == ["near", "far"]
    assert line["attempts"][0]["fault"] in ("refused", "closed", "reset")


async def test_backend_killed_mid_stream_then_the_client_sees_it_broken(
    llama: Child, spawn: Spawn
) -> None:
    """Half an answer from one and half from another would be worse than an error."""
    doomed = spawn()
    doomed.wait_ready()
    async with proxy(row(doomed, **NEAR), row(llama, **FAR)) as p, client_of(p) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=1000,
            stream=True,
            **ENDLESS,
        )
        for _ in range(4):  # the role, then content
            await anext(stream)
        doomed.kill()
        with pytest.raises(openai.APIError) as broken:
            await content(stream)
        (line,) = await p.exchanges(1)
        assert p.in_flight() == 0
    assert "near" not in str(broken.value), "the client is not told how the backends are named"
    assert line["end"] == "error"
    (attempt,) = line["attempts"]
    assert (attempt["backend"], attempt["stage"]) == ("near", "stream")
    assert attempt["fault"] in ("closed", "reset", "truncated")


async def test_backend_killed_while_it_computes_a_document_then_another_answers(
    llama: Child, spawn: Spawn
) -> None:
    doomed = spawn()
    doomed.wait_ready()
    async with proxy(row(doomed, **NEAR), row(llama, **FAR)) as p, client_of(p) as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, **ENDLESS)
        )
        await eventually(lambda: p.in_flight() == 1)
        await asyncio.sleep(0.05)
        doomed.kill()
        said = await asked
        (line,) = await p.exchanges(1)
    assert said.usage is not None
    assert said.usage.completion_tokens == 40
    assert [attempt["backend"] for attempt in line["attempts"]] == ["near", "far"]


async def test_backend_that_hangs_then_stream_breaks_and_the_next_goes_elsewhere(
    llama: Child, spawn: Spawn
) -> None:
    """Stopped, not killed: the kernel still accepts its connections and nothing ever comes."""
    doomed = spawn()
    doomed.wait_ready()
    limits = {"first_content": 1, "idle": 0.5}
    rows = row(doomed, **NEAR, timeouts=limits), row(llama, **FAR)
    async with proxy(*rows) as p, client_of(p) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=200, stream=True, **ENDLESS
        )
        for _ in range(4):
            await anext(stream)
        os.kill(doomed.pid, signal.SIGSTOP)
        try:
            with pytest.raises(openai.APIError):
                await content(stream)
            again = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=4, stream=True
            )
            assert await content(again)
        finally:
            os.kill(doomed.pid, signal.SIGCONT)
        broken, moved = await p.exchanges(2)
    assert (broken["end"], broken["attempts"][0]["stage"]) == ("error", "stream")
    assert broken["attempts"][0]["fault"] == "timeout"
    assert (moved["end"], moved["backend"]) == ("complete", "far")
    assert moved["attempts"][0]["fault"] == "timeout"


async def test_one_of_three_killed_under_fifty_streams_then_no_unbegun_answer_fails(
    spawn: Spawn,
) -> None:
    """Who had no content yet gets a whole answer; who had sees a break; the log tells each."""
    fleet = [spawn(slots=4, context=256) for _ in range(3)]
    for child in fleet:
        child.wait_ready()
    rows = [row(child, name=f"b{number}", max_in_flight=17) for number, child in enumerate(fleet)]
    patient: Any = {
        "middleware": ["health", "region", "cost", {"capacity": {"queue_timeout": 60}}, "failover"],
        "timeouts": {"first_content": 60, "idle": 20},
    }
    begun = asyncio.Event()

    async def one(client: openai.AsyncOpenAI) -> tuple[str, bool]:
        """How it ended and whether content had come before."""
        pieces = 0
        try:
            stream = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=8, stream=True
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    pieces += 1
                    begun.set()
                if chunk.choices and chunk.choices[0].finish_reason:
                    return "complete", True
        except openai.APIError:
            return "error", pieces > 0
        return "silently short", pieces > 0

    async with proxy(*rows, **patient) as p, client_of(p) as client:
        streams = [asyncio.create_task(one(client)) for _ in range(50)]
        await begun.wait()
        await eventually(lambda: any(e["end"] for e in p.events("exchange.done")), 20)
        fleet[0].kill()
        ends = await asyncio.gather(*streams)
        lines = await p.exchanges(50)
        assert p.in_flight() == 0
    assert not [end for end in ends if end[0] == "silently short"]
    assert not [end for end in ends if end == ("error", False)], "an answer that had not begun"
    broken = sum(end[0] == "error" for end in ends)
    assert broken <= 4, "no more than the dead backend had slots"
    assert sum(line["end"] == "error" for line in lines) == broken
    moved = [line for line in lines if len(line["attempts"]) > 1]
    assert moved, "nobody had to move: it was not killed under load"
    for line in moved:
        first, last = line["attempts"][0], line["attempts"][-1]
        assert first["backend"] == "b0"
        assert first["fault"] is not None
        assert (last["backend"] != "b0", line["end"]) == (True, "complete")
