"""runpod queues: what a worker says, and what of it is an answer, an error, or stays here."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

import beacon_proxy.contracts as c
from providers.runpod import queue
from providers.runpod.answer import NoAnswer
from providers.runpod.events import Events
from providers.runpod.job import failure_of

from .kit import RawClient, chat, chat_events, proxy
from .kit_jobs import VLLM_400, ends, post, prompt, ran, runs_on, yields
from .kit_runpod import KEY, Job, control_plane, queue_row
from .test_runpod_streams import data_of, text_of

HOST = "pod-7.runpod.internal"
LEAK = f"HTTPConnectionPool(host='{HOST}', port=8000): /v1/x?api_key=sk-secret Max retries"
TEXT = "data: 3 apples\nevent: the concert"


@pytest.mark.parametrize(
    "error",
    [
        LEAK,
        f"see {HOST}/x",
        f"vLLM returned HTTP 500: {json.dumps({'error': HOST})}",
        {"message": f"vLLM returned HTTP 502: {HOST}", "type": "worker_error"},
        {"message": f"Cannot connect to host {HOST}", "type": "server_error"},
        {"error_type": f"<class '{HOST} sk-secret'>"},
    ],
)
@pytest.mark.parametrize("raw", [chat(), chat(stream=True), prompt()])
async def test_error_when_a_worker_speaks_of_itself_names_no_host(error: Any, raw: bytes) -> None:
    async with control_plane(ends([{"error": error}])) as control:
        seen = await ran(control, raw)
    told = seen.answer.body.decode() + json.dumps(seen.line)
    assert "internal" not in told
    assert "secret" not in told


async def test_handler_when_it_refuses_the_request_is_no_strike_and_asked_once() -> None:
    words = "prompt is too long for this model"
    async with control_plane(ends(error=words)) as control:
        rows = [queue_row(control, name="a"), queue_row(control, name="b")]
        async with proxy(*rows) as p, RawClient(p.port) as client:
            for _ in range(6):
                answer = await client.ask(chat(), "POST")
            assert p.events("backend.ejected") == []
        anthropic = await ran(control, post("/v1/messages", {"model": "m"}))
        assert len(control.jobs) == 7, "nobody pays twice for what nobody would take"
    assert (answer.status, answer.json["error"]["message"]) == (400, words)
    assert anthropic.answer.json["type"] == "error"


@pytest.mark.parametrize("words", ["CUDA out of memory", "job timed out after 1 retries", ""])
def test_handler_when_it_speaks_of_its_worker_blames_no_caller(words: str) -> None:
    assert failure_of(words).status == 0


async def test_text_when_it_looks_like_an_event_stream_is_a_text() -> None:
    async with control_plane(ends(TEXT)) as control:
        document = await ran(control, chat())
    async with control_plane(yields(TEXT)) as control:
        stream = await ran(control, chat(stream=True))
    assert document.answer.json["choices"][0]["message"]["content"] == TEXT
    assert text_of(data_of(stream.answer)) == TEXT


@pytest.mark.parametrize(
    "bad",
    [
        {"status": "error", "message": "CUDA oom"},
        {"success": False, "detail": "oom"},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]},
    ],
)
async def test_stream_when_a_piece_says_that_it_failed_must_not_look_whole(bad: Any) -> None:
    async with control_plane(yields("Hel", bad, gap=0.1)) as control:
        seen = await ran(control, chat(stream=True))
    assert not seen.answer.complete
    assert b"[DONE]" not in seen.answer.body


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, b""), (200, {"status": "FAILED", "error": "lost", "stream": []}), (200, b"<html>")],
)
async def test_stream_when_the_last_look_fails_must_not_look_whole(status: int, body: Any) -> None:
    async with control_plane(runs_on) as control:
        control.answers("stream", 200, {"status": "COMPLETED", "stream": [{"output": "Hel"}]})
        control.answers("stream", status, body)
        seen = await ran(control, chat(stream=True))
    assert b"[DONE]" not in seen.answer.body
    assert not seen.answer.complete


async def test_stream_when_one_of_its_choices_is_cut_must_not_look_whole() -> None:
    def event(index: int, delta: Any, finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    begun = [event(0, {"content": "a"}), event(1, {"content": "b"}), event(0, {}, "stop")]
    for pieces in (begun, [*begun, event(1, {}, "stop")[:30]]):
        async with control_plane(yields(*pieces)) as control:
            seen = await ran(control, post("/v1/chat/completions", {"stream": True, "n": 2}))
        assert b"[DONE]" not in seen.answer.body


async def test_stream_when_its_job_failed_without_a_word_asks_for_the_reason() -> None:
    error = {"message": f"vLLM returned HTTP 400: {json.dumps(VLLM_400)}", "type": "worker_error"}
    async with control_plane(ends(error=json.dumps(error))) as control:
        seen = await ran(control, chat(stream=True))
        assert control.count("status") == 1
    assert (seen.answer.status, seen.answer.json) == (400, VLLM_400)


async def test_stream_when_its_job_waited_for_a_worker_tells_how_long() -> None:
    async def play(job: Job) -> None:

        await asyncio.sleep(1)
        job.start(delay=2500)
        job.say(*(event.decode() for event in chat_events("a", 1)))
        job.end([])

    async with control_plane(play) as control:
        seen = await ran(control, chat(stream=True))
    assert [event["seconds"] for event in seen.proxy.events("backend.started")] == [2.5]


async def test_document_when_it_holds_no_choice_is_none() -> None:
    async with control_plane(ends([{"id": "x", "choices": []}])) as control:
        seen = await ran(control, chat())
    assert seen.answer.status == 502


def test_event_when_its_type_would_be_lines_is_refused() -> None:

    asked = c.Submission(
        "i", "POST", "/v1/messages", b"", (), b"{}", c.Dialect.ANTHROPIC, True, None, 1e9, 1e9
    )
    with pytest.raises(NoAnswer):
        Events(asked).feed({"type": "ping\n\nevent: message_stop\ndata: {}"})


async def test_looks_when_each_is_refused_at_once_keep_a_second_apart() -> None:
    limits = {"first_content": 2, "cold_start": 2}
    async with control_plane(runs_on) as control:
        control.answers("stream", 429, times=1000, Retry_After="0")
        await ran(control, chat(stream=True), row={"timeouts": limits, "api_key": KEY})
        assert control.count("stream") <= 4


async def test_output_when_it_is_large_does_not_hold_up_the_loop() -> None:

    threads = set()
    made = queue.document_of

    def noted(*args: Any) -> bytes:
        threads.add(threading.current_thread() is threading.main_thread())
        return made(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "document_of", noted)
        async with control_plane(ends(["tok "] * 300_000)) as control:
            seen = await ran(control, chat())
    assert seen.answer.json["choices"][0]["message"]["content"] == "tok " * 300_000
    assert threads == {False}
