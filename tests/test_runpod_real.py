"""runpod, with the SDK's real parts: its worker loop, and its client.

A llama.cpp server stands behind the handler; the control plane between is the kit's stand-in.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from beacon_proxy.contracts import Usage
from providers.runpod.pace import Pace

from .kit import RawClient, eventually, proxy, request
from .kit_runpod import (
    KEY,
    STARTS,
    ControlPlane,
    control_plane_beside,
    parts_python,
    queue_row,
    worker,
)
from .real import MODEL, Child, slots_busy

pytest_plugins = ["tests.real"]

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ENDLESS: Any = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the queue's worker lives, and its log."""
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def queue(llama: Child, home: Path) -> Iterator[ControlPlane]:
    """A queue endpoint with one real worker, four jobs at once."""
    with control_plane_beside() as control, worker(home, llama.llama_url, control=control):
        end = time.monotonic() + STARTS
        while not control.pings:
            assert time.monotonic() < end, (home / "worker.log").read_text()
            time.sleep(0.05)
        yield control


def client_of(port: int) -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)


PATIENT: Any = {"timeouts": {"first_content": 30, "document": 30, "idle": 30}}


async def test_stream_when_a_queue_worker_serves_it_comes_token_by_token(
    queue: ControlPlane,
) -> None:
    """The first token is taken up by the first look after the worker yielded it."""
    async with proxy(queue_row(queue), **PATIENT) as p, client_of(p.port) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=24, stream=True, **ENDLESS
        )
        first, finish, text = 0.0, None, ""
        async for chunk in stream:
            first = first or time.monotonic()
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    job = queue.last
    assert (finish, bool(text)) == ("length", True)
    said = "".join(job.pieces)
    told = [json.loads(line[6:]) for line in said.split("\n") if line.startswith("data: {")]
    assert text == "".join(e["choices"][0]["delta"].get("content") or "" for e in told)
    content = next(n for n, piece in enumerate(job.pieces) if '"content":"' in piece)
    yielded, ended = job.yielded_at[content], job.yielded_at[-1]
    looks = [c.at for c in queue.calls if c.operation == "stream" and c.id == job.id]
    assert sum(yielded <= at <= first for at in looks) <= 2, "a look left behind what lay there"
    assert first - yielded < Pace.QUEUED_MOST, "longer than the longest wait between two looks"
    print(f"first token {1000 * (first - yielded):.0f} ms after the worker yielded it")
    gaps = [later - at for at, later in pairwise(looks) if yielded <= later <= ended]
    assert len(gaps) >= 2, "it came at once"
    assert min(gaps) < Pace.RUNNING_MOST
    assert job.id not in queue.stopped


async def test_document_when_a_queue_worker_serves_it_is_the_servers_own(
    queue: ControlPlane, llama: Child
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    outcomes: list[Any] = []
    async with (
        proxy(queue_row(queue), outcomes=outcomes, **PATIENT) as p,
        aiohttp.ClientSession() as session,
    ):
        answers = []
        for base in (f"http://127.0.0.1:{p.port}", llama.llama_url):
            async with session.post(f"{base}/v1/chat/completions", json=body) as answer:
                answers.append(await answer.json())
        (line,) = await p.exchanges(1)
    ours, theirs = answers
    assert ours["choices"] == theirs["choices"]
    assert ours["usage"] == theirs["usage"]
    assert line["end"] == "complete"
    assert queue.count("cancel") == 0
    (outcome,) = outcomes
    assert outcome.billed == queue.last.document()["executionTime"] / 1000 > 0
    assert outcome.usage == Usage(theirs["usage"]["prompt_tokens"], 8)


def long_chat(**more: Any) -> bytes:
    """Many seconds of work for the model."""
    body = {"model": MODEL, "messages": MESSAGES, "ignore_eos": True, **more}
    fields = [("Content-Type", "application/json")]
    return request("POST", "/v1/chat/completions", fields, json.dumps(body).encode())


async def test_client_when_it_leaves_a_stream_stops_the_workers_job(
    queue: ControlPlane, llama: Child, home: Path
) -> None:
    async with proxy(queue_row(queue), **PATIENT) as p:
        async with RawClient(p.port) as client:
            await client.send(long_chat(stream=True, max_tokens=1500))
            await client.read_until(b'"content"', 30)
        left = time.monotonic()
        job = queue.last
        log = home / "worker.log"
        while f"stopped {job.id}" not in log.read_text():
            assert time.monotonic() < left + 8.0, "the worker's job goes on without its client"
            await asyncio.sleep(0.02)
        took = time.monotonic() - left
        print(f"the worker's job was cancelled {took:.2f} s after the client left")
        while await slots_busy(llama):  # between two tokens, on a machine that may be busy
            assert time.monotonic() < left + 10.0, "the model still computes for nobody"
            await asyncio.sleep(0.02)
        (line,) = await p.exchanges(1)
    assert job.id in queue.stopped
    assert job.id in queue.stopped
    assert line["end"] == "client_closed"


async def test_client_when_it_leaves_a_document_stops_the_workers_job(
    queue: ControlPlane, home: Path
) -> None:
    """`/runsync` has not answered yet, so the id is not known when it leaves.

    What is seen is the worker's task, not the model: this llama.cpp computes a document to its end
    whoever has left.
    """
    known = len(queue.jobs)
    async with proxy(queue_row(queue), **PATIENT) as p:
        async with RawClient(p.port) as client:
            await client.send(long_chat(max_tokens=400))
            await eventually(lambda: len(queue.jobs) > known, 10)
            job = queue.last
            await eventually(lambda: job.id in queue.taken, 10)
        left = time.monotonic()
        stopped = f"stopped {job.id}"
        await eventually(lambda: stopped in (home / "worker.log").read_text(), 10.0)
    assert job.cancelled_at is not None
    assert job.cancelled_at - left < 6.0, "the shortest wait of `/runsync` is one second"


async def test_request_when_the_model_server_refuses_it_is_told_with_its_status(
    queue: ControlPlane,
) -> None:
    """The SDK's loop makes a failed job of it, with Python's repr of the error."""
    async with proxy(queue_row(queue), **PATIENT) as p, client_of(p.port) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "nobody"}])  # type: ignore[list-item]
        (line,) = await p.exchanges(1)
    assert queue.last.status == "FAILED"
    assert queue.last.error.startswith("{'message': 'vLLM returned HTTP 400: ")
    assert refused.value.body["code"] == 400  # type: ignore[index]
    assert line["attempts"][0]["fault"] == "status"


@pytest.mark.parametrize("stream", [False, True])
async def test_inference_when_a_queue_worker_serves_it_has_text_and_counts(
    queue: ControlPlane, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 8, "stream": stream}
    async with proxy(queue_row(queue), **PATIENT) as p, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{p.port}/inference"
        async with session.post(url, json=body) as answer:
            lines = [json.loads(line) for line in (await answer.text()).splitlines()]
    last = lines[-1]
    assert last["success"] is True, last
    text = "".join(line["response"] for line in lines)
    assert text.strip()
    if stream:
        assert last["done"] is True
        assert len(lines) > 2
    else:
        assert last["metadata"]["tokens_generated"] == 8


def test_control_plane_when_runpods_client_asks_is_understood(
    queue: ControlPlane, tmp_path: Path
) -> None:
    """A contract check of the stand-in: by the SDK, which knows the real one."""
    script = """
import json, sys, runpod
runpod.api_key = sys.argv[1]
endpoint = runpod.Endpoint("ep")
chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
route = "/v1/chat/completions"
whole = endpoint.run_sync({"input": {"openai_route": route, "openai_input": chat}})
job = endpoint.run({"input": {"openai_route": route, "openai_input": {**chat, "stream": True}}})
pieces = list(job.stream())
done = job.status()
longer = {**chat, "max_tokens": 1500, "ignore_eos": True}
left = endpoint.run({"input": {"openai_route": route, "openai_input": longer}})
cancelled = left.cancel()
health = endpoint.health()
print(json.dumps([whole, pieces, done, cancelled, left.status(), health]))
"""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    env["RUNPOD_ENDPOINT_BASE_URL"] = queue.base
    done = subprocess.run(
        [parts_python(), "-c", script, KEY],
        env=env,
        capture_output=True,
        timeout=STARTS,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    whole, pieces, status, cancelled, after, health = json.loads(done.stdout)
    assert whole[0]["choices"][0]["message"]["content"]
    assert "".join(pieces).endswith("data: [DONE]\n\n")
    assert (status, cancelled["status"], after) == ("COMPLETED", "CANCELLED", "CANCELLED")
    assert {"jobs", "workers"} <= health.keys()
