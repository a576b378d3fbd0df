"""runpod queues: no job runs on that nobody waits for, and what may is told."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from providers.runpod.queue import Queue

from .kit import RawClient, chat, chat_events, eventually, proxy
from .kit_jobs import CHAT, begins, ends, post, ran, runs_on
from .kit_runpod import Job, control_plane, queue_row


def left(p: Any) -> list[str]:
    return [event["what"] for event in p.events("job.left_behind")]


async def test_client_when_it_leaves_and_the_id_comes_late_has_its_job_cancelled() -> None:
    """Later than the core waits for a provider's task."""
    async with control_plane(runs_on) as control, proxy(queue_row(control)) as p:
        control.hold = asyncio.Event()
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await eventually(lambda: len(control.jobs) == 1)
        await p.exchanges(1)
        await eventually(lambda: len(p.app._carriers) == 0, 10)
        assert left(p) == ["a job whose id never came"], "it may run: the process might stop now"
        control.hold.set()
        await eventually(lambda: control.last.cancelled_at is not None)
        assert len(left(p)) == 1


@pytest.mark.parametrize(("status", "calls"), [(500, 3), (429, 3), (401, 1), (403, 1)])
async def test_cancel_when_it_fails_is_repeated_where_that_helps_else_told(
    status: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("providers.runpod.call._PAUSE", 0.05)
    async with control_plane(begins) as control, proxy(queue_row(control)) as p:
        control.answers("cancel", status, times=2)
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.read_until(b'"content":"a"')
        job = control.last
        await eventually(lambda: job.final or left(p), 10)
        at = [call.at for call in control.calls if call.operation == "cancel"]
        assert len(at) == calls
        if calls == 1:
            assert left(p) == [f"job {job.id}"]
        else:
            assert left(p) == []
            gaps = [later - earlier for earlier, later in pairwise(at)]
            # A timer of the loop counts in ms, and may end a moment early by another clock.
            assert gaps[0] > 0.05 - 0.005, "it waits"
            assert gaps[1] > 0.1 - 0.005, "and then twice as long"


@pytest.mark.parametrize(
    ("status", "body"), [(502, b""), (524, b""), (200, b'{"id":"sync-1-u1","sta'), (200, b"<html>")]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_submission_when_its_answer_is_lost_is_told(
    status: int, body: bytes, stream: bool
) -> None:
    """The job may have been taken; without its id nobody can stop it."""
    async with control_plane(runs_on) as control:
        control.answers("run" if stream else "runsync", status, body)
        seen = await ran(control, chat(stream=stream))
    assert left(seen.proxy) == ["a job whose id never came"]


@pytest.mark.parametrize("status", [400, 401, 429])
async def test_submission_when_it_is_refused_leaves_nothing(status: int) -> None:
    async with control_plane(runs_on) as control:
        control.answers("runsync", status)
        seen = await ran(control, chat())
    assert left(seen.proxy) == []


async def test_job_when_it_runs_on_after_its_end_marker_is_cancelled() -> None:
    async def play(job: Job) -> None:
        job.start()
        job.say(*(event.decode() for event in chat_events("a", 2)))

    async with control_plane(play) as control, proxy(queue_row(control)) as p:
        async with RawClient(p.port) as client:
            assert (await client.ask(chat(stream=True), "POST")).complete
        await eventually(lambda: control.last.cancelled_at is not None, 8)


async def test_control_plane_when_it_is_away_for_seconds_loses_no_job() -> None:
    async def play(job: Job) -> None:
        job.start()
        await asyncio.sleep(2)
        job.end([CHAT])

    async with control_plane(play) as control, control_plane(ends([CHAT])) as other:
        control.answers("status", 502, times=5)
        cheap = queue_row(control, name="a", price_per_second=0.00001)
        async with proxy(cheap, queue_row(other, name="b")) as p, RawClient(p.port) as client:
            answer = await client.ask(chat(), "POST", timeout=30)
        assert answer.json == CHAT
        assert (len(control.jobs), len(other.jobs)) == (1, 0)


async def test_process_when_it_stops_ends_or_tells_every_job() -> None:
    """As many as RunPod's limit allows in the time there is."""
    many = 85
    async with control_plane(runs_on) as control:
        clients = []
        row = queue_row(control, max_in_flight=1000)
        async with proxy(row, leaks=True, server={"drain_timeout": 0}) as p:
            for _ in range(many):
                client = RawClient(p.port)
                await client.__aenter__()
                clients.append(client)
                await client.send(post("/v1/chat/completions", {"model": "m", "stream": True}))
            await eventually(lambda: len(control.jobs) == many, 20)
        for client in clients:
            await client.__aexit__(None, None, None)
        ended = {f"job {job.id}" for job in control.jobs.values() if job.final}
        assert len(ended) >= 72
        assert ended | set(left(p)) == {f"job {name}" for name in control.jobs}


async def test_endpoints_when_they_are_no_longer_asked_are_forgotten() -> None:
    queue = Queue()
    for number in range(20):
        queue._endpoint(f"http://127.0.0.1:9/v2/{number}")
    assert len(queue._endpoints) == 1
    queue._endpoint("http://127.0.0.1:9/v2/19").calls += 1
    queue._endpoint("http://127.0.0.1:9/v2/20")
    assert len(queue._endpoints) == 2, "it is still asked"
