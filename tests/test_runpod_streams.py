"""runpod queues through the whole proxy: jobs that stream, clients that leave, and `/inference`.

The control plane is the kit's, and the test plays the worker; with the SDK's real one:
tests/test_runpod_real.py.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest

from providers.runpod.pace import Pace

from .kit import Answer, RawClient, chat, chat_events, eventually, proxy
from .kit_jobs import CHAT, CRASH, VLLM_400, begins, ends, post, prompt, ran, runs_on, yields
from .kit_runpod import Job, control_plane, queue_row

# Streams


EVENTS = b"".join(chat_events("h\u00e9", 3)).decode()


@pytest.mark.parametrize(
    "pieces",
    [
        [EVENTS],
        [EVENTS[:40], EVENTS[40:41], EVENTS[41:300], EVENTS[300:]],
        [event.decode() for event in chat_events("h\u00e9", 3)],
        [": ping\n\n", EVENTS],
    ],
    ids=["all in one", "cut anywhere", "one by one", "a comment first"],
)
async def test_stream_when_the_worker_passes_events_on_keeps_every_byte(pieces: list[str]) -> None:
    async with control_plane(yields(*pieces, gap=0.06)) as control:
        seen = await ran(control, chat(stream=True))
        assert control.count("cancel") == 0
    assert seen.answer.body == "".join(pieces).encode()
    assert seen.answer.header("Content-Type") == [b"text/event-stream; charset=utf-8"]
    assert seen.answer.complete


def data_of(answer: Answer) -> list[Any]:
    """The events of a whole chat stream; its end marker is there, once."""
    lines = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    assert answer.complete, answer.fault
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(events: list[Any]) -> str:
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert choices[-1]["finish_reason"] == "stop"
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


CHUNKS = [json.loads(event[6:]) for event in chat_events("a", 2)[:-1]]


@pytest.mark.parametrize(
    ("pieces", "output", "text"),
    [
        pytest.param(CHUNKS, None, "aa", id="chunks as objects"),
        pytest.param([CHUNKS], None, "aa", id="worker-vllm's batch"),
        pytest.param([json.dumps(chunk) for chunk in CHUNKS], None, "aa", id="objects as text"),
        pytest.param(["hel", "", "lo"], None, "hello", id="1.5 plain text"),
        pytest.param([{"token": "hel"}, {"token": "lo"}], None, "hello", id="1.5 tokens"),
        pytest.param(["data"], None, "data", id="a text that is no field"),
        pytest.param(
            [{"choices": [{"tokens": ["a", " b"]}], "usage": {"input": 3, "output": 2}}],
            None,
            "a b",
            id="1.2 worker-vllm's own form",
        ),
        pytest.param([], [CHAT], "héllo", id="a document at the end"),
        pytest.param([], "hello", "hello", id="a text at the end"),
        pytest.param([], ["hel", "lo"], "hello", id="an aggregate at the end"),
        pytest.param([EVENTS[: EVENTS.rindex("data:")]], None, "hé" * 3, id="without [DONE]"),
        pytest.param([EVENTS.rstrip("\n")], None, "hé" * 3, id="without its last line end"),
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["object", "bare list"])
async def test_stream_when_the_worker_yields_otherwise_becomes_events(
    pieces: list[Any], output: Any, text: str, bare: bool
) -> None:
    async with control_plane(yields(*pieces, output=output, gap=0.02)) as control:
        control.bare = bare
        seen = await ran(control, chat(stream=True))
        assert control.count("cancel") == 0
    assert text_of(data_of(seen.answer)) == text
    assert seen.line["end"] == "complete"


async def test_stream_when_the_last_pieces_come_between_two_looks_has_them() -> None:
    """The bare list tells no status: `/stream` was empty, then `/status` says COMPLETED."""

    def finishes(job: Job) -> None:
        job.say(EVENTS)
        job.end([])

    async with control_plane(runs_on) as control:
        control.bare = True
        control.meanwhile["status"] = finishes
        seen = await ran(control, chat(stream=True))
    assert seen.answer.body == EVENTS.encode()


async def test_stream_when_tools_are_called_in_a_whole_chat_numbers_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = {**CHAT, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    async with control_plane(ends([whole])) as control:
        (event,) = data_of((await ran(control, chat(stream=True))).answer)
    (choice,) = event["choices"]
    assert choice["delta"]["tool_calls"] == [{"index": 0, **call}]
    assert (event["object"], choice["finish_reason"]) == ("chat.completion.chunk", "tool_calls")


async def test_stream_when_it_is_of_anthropic_is_passed_on() -> None:
    events = [
        {"type": "message_start", "message": {"usage": {"input_tokens": 3}}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "message_stop"},
    ]
    raw = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
    for pieces in (raw, events):
        async with control_plane(yields(*pieces)) as control:
            seen = await ran(control, post("/v1/messages", {"model": "m", "stream": True}))
        assert seen.answer.complete
        lines = seen.answer.body.decode().split("\n")
        assert [json.loads(line[6:]) for line in lines if line.startswith("data:")] == events
        assert lines[0] == "event: message_start"
        assert b"[DONE]" not in seen.answer.body


async def test_stream_when_plain_text_comes_for_anthropic_is_refused_not_shown() -> None:
    async with control_plane(yields("hello")) as control:
        seen = await ran(control, post("/v1/messages", {"model": "m", "stream": True}))
        await eventually(lambda: control.count("cancel") <= 1)
    assert (seen.answer.status, seen.attempt["fault"]) == (502, "malformed")


async def test_stream_when_the_servers_events_break_off_must_not_look_whole() -> None:
    """The handler ended well, but the server behind it had died: no `finish_reason`, no [DONE]."""
    pieces = [event.decode() for event in chat_events("a", 3)[:3]]
    async with control_plane(yields(*pieces, gap=0.02)) as control:
        seen = await ran(control, chat(stream=True))
    assert not seen.answer.complete
    assert b"[DONE]" not in seen.answer.body
    assert (seen.line["end"], seen.attempt["fault"]) == ("error", "truncated")


@pytest.mark.parametrize(
    ("more", "expected", "fault"),
    [
        ({"error": CRASH}, 502, "error_body"),
        ({"error": f"vLLM returned HTTP 400: {json.dumps(VLLM_400)}"}, 400, "status"),
        ({"status": "TIMED_OUT"}, 504, "timeout"),
        ({"status": "CANCELLED"}, 502, "busy"),
    ],
)
async def test_stream_when_the_job_fails_has_a_status_before_and_breaks_after_it_began(
    more: dict[str, Any], expected: int, fault: str
) -> None:
    async with control_plane(ends(**more)) as control:
        before = await ran(control, chat(stream=True))
    begun = [event.decode() for event in chat_events("a", 1)[:2]]
    async with control_plane(yields(*begun, gap=0.2, **more)) as control:
        after = await ran(control, chat(stream=True))
        assert control.count("cancel") == 0
    assert (before.answer.status, before.attempt["fault"]) == (expected, fault)
    assert (after.answer.status, after.answer.complete) == (200, False)
    assert after.answer.body.startswith("".join(begun).encode())
    assert after.line["end"] == "error"


async def test_stream_when_the_job_fails_amid_a_text_of_ours_must_not_look_whole() -> None:
    async with control_plane(yields("hel", gap=0.2, error=CRASH)) as control:
        seen = await ran(control, chat(stream=True))
    assert not seen.answer.complete
    assert b"stop" not in seen.answer.body
    assert seen.attempt["fault"] == "error_body"


async def test_stream_when_a_piece_is_an_error_tells_its_status() -> None:
    """1.5: the SDK's local server says COMPLETED all the same."""
    error = {"message": f"vLLM returned HTTP 400: {json.dumps(VLLM_400)}", "type": "worker_error"}
    async with control_plane(yields({"error": error})) as control:
        seen = await ran(control, chat(stream=True))
    assert (seen.answer.status, seen.answer.json) == (400, VLLM_400)


# Who leaves


async def test_client_when_it_leaves_a_stream_has_its_job_cancelled() -> None:
    async with control_plane(begins) as control, proxy(queue_row(control)) as p:
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.read_until(b'"content":"a"')
        job = control.last
        await eventually(lambda: job.cancelled_at is not None)
        (line,) = await p.exchanges(1)
        looks = control.count("stream")
        await asyncio.sleep(4 * Pace.RUNNING_MOST)
        assert control.count("stream") <= looks + 1, "nobody looks at it any more"
        assert control.count("cancel") == 1
    assert line["end"] == "client_closed"


@pytest.mark.parametrize("stream", [False, True])
async def test_client_when_it_leaves_before_the_id_is_known_has_its_job_cancelled(
    stream: bool,
) -> None:
    async with control_plane(runs_on) as control, proxy(queue_row(control)) as p:
        control.hold = asyncio.Event()
        async with RawClient(p.port) as client:
            await client.send(chat(stream=stream))
            await eventually(lambda: len(control.jobs) == 1)
        await p.exchanges(1)
        assert control.count("cancel") == 0
        control.hold.set()
        await eventually(lambda: control.last.cancelled_at is not None)


async def test_cancel_when_it_fails_is_tried_once_more() -> None:
    async with control_plane(begins) as control, proxy(queue_row(control)) as p:
        control.answers("cancel", 502)
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.read_until(b'"content":"a"')
        await eventually(lambda: control.last.cancelled_at is not None)
        assert control.count("cancel") == 2


async def test_client_when_it_leaves_at_the_end_marker_cancels_nothing() -> None:
    """It has all, and the worker has nothing left to do."""

    async def play(job: Job) -> None:
        job.start()
        job.say(EVENTS)
        await asyncio.sleep(0.5)
        job.end([])

    async with control_plane(play) as control, proxy(queue_row(control)) as p:
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.read_until(b"[DONE]")
        (line,) = await p.exchanges(1)
        await eventually(lambda: control.last.final)
        assert control.count("cancel") == 0
    assert line["end"] == "complete"


async def test_process_when_it_stops_cancels_what_still_runs() -> None:
    async with control_plane(begins) as control:
        async with proxy(queue_row(control), leaks=True, server={"drain_timeout": 0}) as p:
            client = RawClient(p.port)
            await client.__aenter__()
            await client.send(chat(stream=True))
            await client.read_until(b'"content":"a"')
        assert control.last.cancelled_at is not None
        with suppress(ConnectionError):
            await client.__aexit__(None, None, None)


async def test_client_when_it_takes_nothing_holds_up_the_looks() -> None:
    """Back-pressure ends at the control plane, which keeps what the worker yields."""

    async def play(job: Job) -> None:
        job.start()
        piece = chat_events("x" * 100_000, 1)[1].decode()
        while not job.final:
            job.say(piece)
            await asyncio.sleep(0.005)

    async with control_plane(play) as control, proxy(queue_row(control)) as p:
        async with RawClient(p.port) as client:
            client.hold()
            await client.send(chat(stream=True))
            await eventually(lambda: control.jobs)
            quiet = 0
            while quiet < 3:  # no look for so long, though there are pieces: 3 x the longest wait
                looks, lying = control.count("stream"), len(control.last.unread)
                await asyncio.sleep(Pace.RUNNING_MOST * 1.5)
                assert len(control.last.pieces) < 4000
                held = control.count("stream") == looks and len(control.last.unread) > lying
                quiet = quiet + 1 if held else 0
        await eventually(lambda: control.last.final, 3)


# The translated route


@pytest.mark.parametrize(
    ("output", "tokens"),
    [
        ({"text": "hello"}, None),
        ({"response": "hello", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, 2),
        (["hel", "lo"], None),
        ("hello", None),
        ([{"choices": [{"tokens": ["hel", "lo"]}], "usage": {"input": 3, "output": 2}}], 2),
        ([{"choices": [{"text": "hello"}], "usage": {"completion_tokens": 4}}], 4),
    ],
)
async def test_prompt_when_its_job_completes_is_the_text(output: Any, tokens: int | None) -> None:
    async with control_plane(ends(output)) as control:
        said = (await ran(control, prompt())).answer.json
    assert (said["success"], said["response"]) == (True, "hello")
    assert said["metadata"].get("tokens_generated") == tokens


async def test_prompt_when_the_output_has_a_receipt_passes_it_on() -> None:
    async with control_plane(ends({"text": "a", "receipt": {"id": 7}})) as control:
        said = (await ran(control, prompt())).answer.json
    assert said["metadata"]["receipt"] == {"id": 7}


COMPLETION = [
    'data: {"choices":[{"text":"hel","finish_reason":null}]}\n\nda',
    'ta: {"choices":[{"text":"lo","finish_reason":"stop"}]}\n\n',
    'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n',
]


@pytest.mark.parametrize(
    ("pieces", "output", "tokens"),
    [
        (COMPLETION, None, 2),
        (["hel", "lo"], None, None),
        ([{"text": "hel"}, {"text": "lo", "usage": {"input": 3, "output": 2}}], None, 2),
        ([], {"text": "hello"}, None),
    ],
    ids=["events", "text", "objects", "a document"],
)
async def test_prompt_when_it_streams_is_told_in_lines(
    pieces: list[Any], output: Any, tokens: int | None
) -> None:
    async with control_plane(yields(*pieces, output=output, gap=0.06)) as control:
        answer = (await ran(control, prompt(stream=True))).answer
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert "".join(line["response"] for line in lines) == "hello"
    assert (lines[-1]["success"], lines[-1]["done"]) == (True, True)
    assert lines[-1]["metadata"].get("tokens_generated") == tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_when_its_job_fails_says_so_inside_a_200(stream: bool) -> None:
    async with control_plane(ends(error=CRASH)) as control:
        answer = (await ran(control, prompt(stream=stream))).answer
    said = json.loads(answer.body.splitlines()[-1])
    assert (answer.status, said["success"], said["response"]) == (200, False, "")
    assert said["failure"]["message"] == "the worker raised ValueError"
    assert said["failure"]["transient"] is True


async def test_prompt_when_its_stream_breaks_off_is_no_success() -> None:
    async with control_plane(yields(COMPLETION[0], gap=0.1)) as control:
        answer = (await ran(control, prompt(stream=True))).answer
    last = json.loads(answer.body.splitlines()[-1])
    assert last["success"] is False
