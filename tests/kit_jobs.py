"""Jobs of a RunPod queue for the tests: how a worker may deal with one, and what came of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from .kit import Answer, Proxy, RawClient, chat_events, eventually, proxy, request
from .kit_runpod import ControlPlane, Job, Play, queue_row

CHAT: dict[str, Any] = {
    "id": "chatcmpl-9",
    "object": "chat.completion",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "héllo"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
VLLM_400 = {
    "error": {
        "message": "'max_tokens' is \"too large\":\n5000 > 2048",
        "type": "BadRequestError",
        "code": 400,
    }
}
TRACE = 'Traceback (most recent call last):\n  File "/src/handler.py", line 3\nValueError: boom'
CRASH = json.dumps(
    {
        "error_type": "<class 'ValueError'>",
        "error_message": "boom at pod-7.runpod.internal",
        "error_traceback": TRACE,
        "hostname": "pod-7.runpod.internal",
        "worker_id": "w7",
        "runpod_version": "1.12.0",
    }
)
JSON = [("Content-Type", "application/json")]
SOON: Any = {"timeouts": {"first_content": 0.3, "document": 0.3, "cold_start": 0.3}}


def ends(output: Any = None, **more: Any) -> Play:
    """A worker that takes the job and ends it at once."""

    async def play(job: Job) -> None:
        job.start()
        job.end(output, **more)

    return play


def yields(*pieces: Any, output: Any = None, gap: float = 0.0, **more: Any) -> Play:
    """A generator as the handler; `more` is how it ends.

    With a `gap` each piece is taken before it yields the next or ends, and so much later at least.
    """

    async def play(job: Job) -> None:
        job.start()
        for piece in pieces:
            job.say(piece)
            await asyncio.sleep(gap)
            if gap:
                await eventually(lambda: job.final or not job.unread, 30)
        job.end(output, **more)

    return play


async def never(job: Job) -> None:
    """No worker comes."""


async def runs_on(job: Job) -> None:
    """It works, and says nothing."""
    job.start()


async def begins(job: Job) -> None:
    """Some of a stream, and no end."""
    job.start()
    job.say(*(e.decode() for e in chat_events("a", 2)[:3]))


def prompt(**more: Any) -> bytes:
    body = {"model": "m", "prompt": "hi", **more}
    return request("POST", "/inference", JSON, json.dumps(body).encode())


def post(path: str, body: Any, fields: list[tuple[str, str]] = JSON) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, fields, raw)


class Ran:
    """One request and what came of it."""

    def __init__(self, answer: Answer, p: Proxy, line: dict[str, Any]) -> None:
        self.answer, self.proxy, self.line = answer, p, line
        self.attempt: dict[str, Any] = line["attempts"][-1]


async def ran(control: ControlPlane, raw: bytes, *others: Any, **more: Any) -> Ran:
    rows = [queue_row(control, name="queue", **more.pop("row", {})), *others]
    async with proxy(*rows, **more) as p, RawClient(p.port) as client:
        answer = await client.ask(raw, "POST", timeout=10)
        (line,) = await p.exchanges(1)
        return Ran(answer, p, line)
