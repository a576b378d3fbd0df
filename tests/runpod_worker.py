"""A RunPod worker for the tests: the SDK's own loop, or its local server, around one handler.

Run by the interpreter of the parts (the `runpod` SDK), never imported. The handler does what
worker-vllm does, before any server that speaks OpenAI's API: it passes `openai_input` on to
`openai_route` and yields the events as text, or the document, or the error in words. `prompt`
becomes a completion. `--plain` is a handler of one's own instead: a function that returns a text.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import runpod

SERVER = os.environ["SERVER_URL"]


def asked(task: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Route and body; no body: a GET."""
    if "openai_route" in task:
        return task["openai_route"], task.get("openai_input") or None
    body = {"prompt": task["prompt"], "stream": task.get("stream", False)}
    return "/v1/completions", {**body, **task.get("sampling_params", {})}


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    route, body = asked(job["input"])
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.request("POST" if body else "GET", SERVER + route, json=body) as answer,
        ):
            if answer.status >= 400:
                message = f"vLLM returned HTTP {answer.status}: {await answer.text()}"
                yield {"error": {"message": message, "type": "worker_error", "code": None}}
            elif body and body.get("stream"):
                async for piece in answer.content.iter_any():
                    yield piece.decode()
            else:
                yield await answer.json()
    except asyncio.CancelledError:
        print("stopped", job["id"], flush=True)
        raise


def plain(job: dict[str, Any]) -> Any:
    prompt = job["input"]["prompt"]
    if prompt == "raise":
        raise ValueError("boom")
    return {"error": "too long"} if prompt == "refuse" else {"text": f"you said {prompt}"}


if __name__ == "__main__":
    chosen = plain if "--plain" in sys.argv else handler
    if chosen is plain:
        sys.argv.remove("--plain")
    runpod.serverless.start(
        {
            "handler": chosen,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda current: 4,
        }
    )
