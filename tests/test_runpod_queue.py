"""runpod queues through the whole proxy: what becomes a job, each way it can end, which kind it is.

The control plane is the kit's, and the test plays the worker; with the SDK's real one:
tests/test_runpod_real.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from .kit import RawBackend, RawClient, chat, chat_events, eventually, json_answer, proxy, request
from .kit_jobs import (
    CHAT,
    CRASH,
    JSON,
    SOON,
    TRACE,
    VLLM_400,
    ends,
    never,
    post,
    prompt,
    ran,
    runs_on,
    yields,
)
from .kit_runpod import KEY, Job, Play, control_plane, queue_row

# What goes out


async def test_request_when_it_becomes_a_job_keeps_its_body_byte_for_byte() -> None:
    body = (
        b'{ "model":"m",\t"messages": [{"role":"user","content":"h\\u00e9 \xc3\xa9"}], "n": 1.0 }'
    )
    async with control_plane(ends([CHAT])) as control:
        seen = await ran(control, post("/v1/chat/completions?x=1", body))
        job, call = control.last, control.calls[-1]
    assert seen.answer.status == 200
    assert b'{"openai_route":"/v1/chat/completions","openai_input":%b}' % body in job.body
    assert (call.operation, call.query) == ("runsync", "wait=1000")
    assert call.authorization == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/completions", "/v1/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/embeddings", "/v1/embeddings"),
        ("/v1/messages?beta=true", "/v1/messages"),
    ],
)
async def test_request_when_its_path_is_of_openai_or_anthropic_names_the_servers_route(
    path: str, route: str
) -> None:
    async with control_plane(ends({"any": "thing"})) as control:
        await ran(control, post(path, {"model": "m"}))
        assert control.last.input == {"openai_route": route, "openai_input": {"model": "m"}}


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[1]",
        b'{"a":1},"webhook":"https://thief.example/"',
        b'{"a":1}}',
        b'{"a":NaN}',
        b'{"a":"\xff"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"[" * 50_000,
        b"",
    ],
)
async def test_request_when_its_body_is_no_json_object_never_becomes_a_job(body: bytes) -> None:
    """It is embedded as it is, so it could say more than `input`."""
    async with control_plane(ends([CHAT])) as control:
        seen = await ran(control, post("/v1/chat/completions", body))
        assert control.jobs == {}
    assert seen.answer.status == 400
    assert seen.answer.json["error"]["type"] == "invalid_request_error"
    assert seen.proxy.app.fleet.candidates()[0].live.success == 1.0


async def test_prompt_when_it_becomes_a_job_is_what_plain_handlers_read() -> None:
    async with control_plane(ends({"text": "yes"})) as control:
        await ran(control, prompt(temperature=0.5, max_tokens=9))
        assert control.last.input == {
            "prompt": "hi",
            "model": "m",
            "temperature": 0.5,
            "max_tokens": 9,
            "sampling_params": {"temperature": 0.5, "max_tokens": 9},
            "stream": False,
        }


@pytest.mark.parametrize(
    ("given", "passed"), [("Bearer client", "Bearer client"), ("Bearer caf\xe9", "")]
)
async def test_key_when_the_backend_has_none_is_the_clients(given: str, passed: str) -> None:
    fields = [("Authorization", given), *JSON]
    async with control_plane(ends([CHAT])) as control:
        raw = post("/v1/chat/completions", {"model": "m"}, fields)
        seen = await ran(control, raw, row={"api_key": None})
        (call,) = [c for c in control.calls if c.operation == "runsync"]
    assert call.authorization == passed
    assert seen.answer.status == 401
    assert seen.attempt["fault"] == "status", "it is the client's own key"


@pytest.mark.parametrize(
    ("named", "run", "life"),
    [("20", (24, 25), (24, 25)), ("1", (5.9, 6), (10, 10)), (None, (605, 605), (1205, 1205))],
)
async def test_policy_when_the_client_names_a_deadline_follows_it(
    named: str | None, run: tuple[float, float], life: tuple[float, float]
) -> None:
    """RunPod takes 5 s at least for a run, and 10 s for a job's life."""
    fields = [*JSON, *([("X-Beacon-Timeout", named)] if named else [])]
    limits = {"first_content": 120, "document": 600}
    async with control_plane(ends([CHAT])) as control:
        await ran(control, post("/v1/chat/completions", {"model": "m"}, fields), timeouts=limits)
        policy = control.last.policy
    assert run[0] * 1000 <= policy["executionTimeout"] <= run[1] * 1000
    assert life[0] * 1000 <= policy["ttl"] <= life[1] * 1000


@pytest.mark.parametrize(
    "raw",
    [
        post("/api/chat", {"model": "m", "messages": [], "stream": False}),
        request("GET", "/v1/files"),
        post("/v1/audio/transcriptions", b"--x", [("Content-Type", "multipart/form-data")]),
        post("/v1/chat/completions", b"x", [*JSON, ("Content-Encoding", "gzip")]),
    ],
)
async def test_request_when_no_job_can_be_made_of_it_goes_to_another_backend(raw: bytes) -> None:
    async with control_plane(ends([CHAT])) as control, RawBackend(json_answer({"x": 1})) as other:
        # The cheapest first, so that the queue is the first choice for what it takes.
        row = {"url": other, "price_per_second": 1.0, "name": "other"}
        seen = await ran(control, raw, row, row={"price_per_second": 0.1})
        assert control.jobs == {}
    assert seen.answer.header("X-Beacon-Backend") == [b"other"]


# Documents


@pytest.mark.parametrize(
    "output",
    [[CHAT], CHAT, [json.dumps(CHAT)]],
    ids=["of a generator", "of a function", "as text"],
)
async def test_document_when_the_server_made_it_is_passed_on(output: Any) -> None:
    async with control_plane(ends(output)) as control:
        seen = await ran(control, chat())
        assert control.count("cancel") == 0
    assert (seen.answer.status, seen.answer.json) == (200, CHAT)
    assert seen.answer.header("Content-Type") == [b"application/json"]
    assert seen.line["end"] == "complete"


@pytest.mark.parametrize(
    "output",
    [
        "hello",
        {"text": "hello"},
        ["hel", "lo"],
        [{"token": "hel"}, {"token": "lo"}],
        [{"choices": [{"tokens": ["hel", "lo"]}], "usage": {"input": 3, "output": 2}}],
    ],
)
async def test_document_when_a_handler_says_text_becomes_a_chat(output: Any) -> None:
    async with control_plane(ends(output)) as control:
        said = (await ran(control, chat())).answer.json
        text = (await ran(control, post("/v1/completions", {"model": "m"}))).answer.json
    assert said["object"] == "chat.completion"
    assert said["model"] == "m"
    assert said["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert text["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_document_when_the_api_has_no_streams_is_one_whatever_is_asked(stream: bool) -> None:
    vectors = {"object": "list", "data": [{"index": 0, "embedding": [0.1, 0.2]}]}
    async with control_plane(ends([vectors])) as control:
        seen = await ran(control, post("/v1/embeddings", {"model": "m", "stream": stream}))
    assert (seen.answer.status, seen.answer.json) == (200, vectors)


async def test_document_when_the_worker_keeps_no_aggregate_is_read_from_the_stream() -> None:
    """Without `return_aggregate_stream` the output of a generator's job is an empty list."""
    async with control_plane(yields(CHAT, output=[])) as control:
        seen = await ran(control, chat())
    assert seen.answer.json == CHAT


async def test_document_when_the_job_takes_longer_is_looked_for_until_it_is_there() -> None:
    async def play(job: Job) -> None:
        await eventually(lambda: control.count("status"), 10)  # `/runsync` has given up waiting
        job.start(delay=2500)
        looks = control.count("status")
        await eventually(lambda: control.count("status") > looks, 10)
        job.end([CHAT])

    async with control_plane(play) as control:
        seen = await ran(control, chat())
        assert control.count("status") >= 2
    assert seen.answer.json == CHAT
    (told,) = seen.proxy.events("backend.started")
    assert told["seconds"] == 2.5
    assert list(seen.proxy.app.fleet.candidates()[0].live.cold_starts._last) == [2.5]


FAILED = {"status": 502, "fault": "error_body"}


@pytest.mark.parametrize(
    ("play", "expected"),
    [
        pytest.param(ends(error=CRASH), FAILED, id="1.5 a handler that raised"),
        pytest.param(
            ends(error=f"handler: boom \ntraceback: {TRACE}"), FAILED, id="1.5 a generator raised"
        ),
        pytest.param(ends(status="FAILED"), FAILED, id="without a word"),
        pytest.param(
            ends([{"error": {"message": "no route to pod-7:8000", "type": "worker_error"}}]),
            FAILED,
            id="1.2 worker-vllm does not reach its server",
        ),
        pytest.param(
            ends([{"error": {"message": "vLLM returned HTTP 500: {}", "type": "worker_error"}}]),
            {"status": 500, "fault": "status"},
            id="the model's server failed",
        ),
        pytest.param(
            ends([{"error": {"message": "vLLM returned HTTP 429: slow down"}}]),
            {"status": 429, "fault": "busy"},
            id="the model's server is busy",
        ),
        pytest.param(
            ends(status="TIMED_OUT"), {"status": 504, "fault": "timeout"}, id="1.1 too slow"
        ),
        pytest.param(
            ends(status="CANCELLED"), {"status": 502, "fault": "busy"}, id="1.1 by someone else"
        ),
        pytest.param(ends(None), {"status": 502, "fault": "empty"}, id="no output"),
        pytest.param(ends({"x": 1}), {"status": 502, "fault": "malformed"}, id="no text"),
        pytest.param(
            ends(["data: {}\n\n"]), {"status": 502, "fault": "malformed"}, id="a stream instead"
        ),
    ],
)
async def test_document_when_the_job_fails_is_an_error_and_goes_elsewhere(
    play: Play, expected: dict[str, Any]
) -> None:
    """Each behind a 200 of the control plane."""
    async with control_plane(play) as control:
        seen = await ran(control, chat())
        assert control.count("cancel") == 0, "it has ended by itself"
        good = RawBackend(json_answer(CHAT))
        async with good:
            row = {"url": good, "price_per_second": 1.0, "name": "other"}
            moved = await ran(control, chat(), row, row={"price_per_second": 0.1})
    assert (seen.answer.status, seen.attempt["fault"]) == (expected["status"], expected["fault"])
    told = json.dumps(seen.line) + seen.answer.body.decode()
    for secret in ("Traceback", "handler.py", "pod-7", "w7", "boom"):
        assert secret not in told
    assert moved.answer.json == CHAT
    assert [a["backend"] for a in moved.line["attempts"]] == ["queue", "other"]


@pytest.mark.parametrize(
    "error",
    [
        {"message": f"vLLM returned HTTP 400: {json.dumps(VLLM_400)}", "type": "worker_error"},
        str({"message": f"vLLM returned HTTP 400: {json.dumps(VLLM_400)}", "code": None}),
    ],
    ids=["as yielded", "as the SDK's loop passes it on"],
)
async def test_document_when_the_model_server_refuses_is_its_own_answer(error: Any) -> None:
    play = ends([{"error": error}]) if isinstance(error, dict) else ends(error=error)
    async with control_plane(play) as control, RawBackend(json_answer(CHAT)) as other:
        row = {"url": other, "price_per_second": 1.0}
        seen = await ran(control, chat(), row, row={"price_per_second": 0.1})
    assert (seen.answer.status, seen.answer.json) == (400, VLLM_400)
    assert len(seen.line["attempts"]) == 1, "the request is at fault: nobody else would take it"


@pytest.mark.parametrize("stream", [False, True])
async def test_job_when_no_worker_comes_before_the_limit_is_cancelled(stream: bool) -> None:
    async with control_plane(never) as control:
        seen = await ran(control, chat(stream=stream), row=SOON)
        job = control.last
        await eventually(lambda: job.cancelled_at is not None, 3)
    assert (seen.answer.status, seen.attempt["fault"]) == (504, "timeout")


async def test_job_when_another_backend_answers_instead_is_cancelled() -> None:
    async with control_plane(runs_on) as control, RawBackend(json_answer(CHAT)) as other:
        row = {"url": other, "price_per_second": 1.0}
        seen = await ran(control, chat(), row, row={"price_per_second": 0.1, **SOON})
        job = control.last
        assert seen.answer.json == CHAT, "the client does not wait for the cancel"
        await eventually(lambda: job.cancelled_at is not None, 3)
        assert control.count("cancel") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_job_when_it_waits_for_a_cold_start_has_the_limits_of_one(stream: bool) -> None:
    """Believed to be warm, since it has just answered; but its worker is gone."""

    async def play(job: Job) -> None:
        if len(control.jobs) > 1:
            await asyncio.sleep(1.5)
        job.start()
        job.say(*(e.decode() for e in chat_events("a", 1)))
        job.end([CHAT])

    limits = {"timeouts": {"first_content": 0.6, "document": 1.2, "cold_start": 20}}
    async with (
        control_plane(play) as control,
        proxy(queue_row(control, **limits)) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(2):
            answer = await client.ask(chat(stream=stream), "POST", timeout=10)
            assert (answer.status, answer.complete) == (200, True)


# What the control plane says


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected", "fault"),
    [
        pytest.param(429, {"Retry_After": "7"}, {"e": 1}, 429, "busy", id="1.1 over the limit"),
        pytest.param(401, {}, b"", 401, "unauthorized", id="1.1 our key"),
        pytest.param(400, {}, {"error": "bad"}, 400, "status", id="1.1 refused"),
        pytest.param(413, {}, b"too large", 413, "status", id="1.1 over 10 MB"),
        pytest.param(500, {}, b"", 500, "status", id="1.1 its own trouble"),
        pytest.param(404, {}, b"", 502, "gone", id="1.1 no such endpoint"),
        pytest.param(302, {"Location": "/"}, b"", 502, "status", id="a redirect"),
        pytest.param(200, {}, b"<html>", 502, "not_json", id="a captive portal"),
        pytest.param(200, {}, {"ok": True}, 502, "malformed", id="no job"),
        pytest.param(200, {}, {"status": "IN_QUEUE"}, 502, "malformed", id="a job without id"),
    ],
)
async def test_submission_when_it_is_not_taken_tells_why(
    status: int, headers: dict[str, str], body: Any, expected: int, fault: str
) -> None:
    async with control_plane(never) as control:
        control.answers("run", status, body, **headers)
        control.answers("runsync", status, body, **headers)
        for stream in (False, True):
            seen = await ran(control, chat(stream=stream))
            assert (seen.answer.status, seen.attempt["fault"]) == (expected, fault)
            assert seen.answer.header("Retry-After") == [b"7"] * bool(headers.get("Retry_After"))
        assert control.count("cancel") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_look_when_the_control_plane_stumbles_or_is_busy_is_repeated(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("providers.runpod.call._PAUSE", 0.01)

    async def play(job: Job) -> None:
        job.start()
        await eventually(lambda: control.count(operation) >= 4, 10)
        job.say(*(e.decode() for e in chat_events("a", 1)))
        job.end([CHAT])

    operation = "stream" if stream else "status"
    async with control_plane(play) as control:
        control.answers(operation, 500, times=2)
        control.answers(operation, 429, Retry_After="1")
        control.answers(operation, 404)
        seen = await ran(control, chat(stream=stream))
        looks = [call.at for call in control.calls if call.operation == operation]
        assert control.count("cancel") == 0
    assert (seen.answer.status, seen.answer.complete) == (200, True)
    assert looks[3] - looks[2] >= 0.95, "it was told to wait"


@pytest.mark.parametrize(
    ("status", "times", "expected", "fault"),
    [
        pytest.param(502, 500, 504, "timeout", id="it does not recover"),
        pytest.param(404, 500, 504, "timeout", id="1.1 the ttl ran out"),
        pytest.param(403, 1, 502, "unauthorized", id="the key was withdrawn"),
    ],
)
async def test_look_when_it_stays_without_an_answer_gives_the_job_up(
    status: int,
    times: int,
    expected: int,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not before the limits are over, or 404 has been said for some seconds; then it is stopped."""
    monkeypatch.setattr("providers.runpod.call._PAUSE", 0.05)
    monkeypatch.setattr("providers.runpod.call._LOST", 0.3)
    limits = {"first_content": 2, "cold_start": 2}
    async with control_plane(runs_on) as control:
        control.answers("stream", status, times=times)
        seen = await ran(control, chat(stream=True), row={"timeouts": limits})
        job = control.last
        await eventually(lambda: job.cancelled_at is not None)
    assert (seen.answer.status, seen.attempt["fault"]) == (expected, fault)


async def test_looks_when_a_job_runs_for_long_become_rarer() -> None:
    async with control_plane(runs_on) as control:
        limits = {"first_content": 1.2, "cold_start": 1.2}
        await ran(control, chat(stream=True), row={"timeouts": limits})
        looks = [call.at for call in control.calls if call.operation == "stream"]
    assert len(looks) < 16, "no busy loop"
    assert looks[1] - looks[0] < looks[-1] - looks[-2]


# Which kind it is


async def test_auto_when_the_openai_route_is_missing_turns_to_the_queue() -> None:
    """The server's own 404: nothing has run, and that very request is a job."""
    async with control_plane(ends([CHAT])) as control:
        row = queue_row(control, kind="auto")
        health = [{"health": {"probe_interval": 0.2}}, "region", "cost", "capacity", "failover"]
        async with proxy(row, middleware=health) as p, RawClient(p.port) as client:
            first = await client.ask(chat(), "POST")
            second = await client.ask(chat(), "POST")
            await eventually(lambda: p.events("backend.identified"), 5)
            third = await client.ask(chat(stream=True), "POST")
        (told,) = p.events("backend.identified")
    assert (first.status, second.status, third.status) == (200, 200, 200)
    assert first.json == second.json == CHAT
    assert first.header("x-beacon-attempts") == [b"1"]
    assert told["kind"] == "queue"
    assert len(control.jobs) == 3, "nothing ran twice"


async def test_auto_when_the_url_tells_nothing_asks_where_control_url_says() -> None:
    async with control_plane(ends([CHAT])) as control:
        row = {"url": control.odd, "control_url": control.odd, "provider": "runpod", "api_key": KEY}
        async with proxy(row) as p, RawClient(p.port) as client:
            await eventually(lambda: p.events("backend.identified"))
            answer = await client.ask(chat(), "POST")
    assert answer.json == CHAT


async def test_check_when_an_endpoint_was_cut_to_no_workers_names_cause_and_remedy() -> None:
    async with control_plane(never) as control:
        control.workers = dict.fromkeys(("idle", "initializing", "ready", "running"), 0)
        async with proxy(queue_row(control)) as p:
            await eventually(lambda: p.events("probe.failed"))
            (told,) = p.events("probe.failed")
    assert "after 7" in told["detail"]
    assert "raise max workers" in told["detail"]


async def test_providers_when_health_tells_of_workers_shows_them() -> None:
    async with control_plane(never) as control:
        control.workers = {"idle": 2, "ready": 2, "running": 0, "throttled": 1}
        async with proxy(queue_row(control)) as p, RawClient(p.port) as client:
            await eventually(lambda: p.app.fleet.candidates()[0].live.last_check)
            (row,) = (await client.ask(request("GET", "/providers"))).json["providers"]
        assert control.jobs == {}, "a check buys nothing"
    assert row["warmth"] == "cold", "idle is scaled down"
    told = {key: row["capacity"][key] for key in ("running", "idle", "throttled", "queued")}
    assert told == {"running": 0, "idle": 2, "throttled": 1, "queued": 0}
