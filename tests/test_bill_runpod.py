"""What a RunPod job is charged for: `executionTime`, and of `delayTime` a worker's start.

The control plane is the kit's stand-in; the SDK's real worker is in tests/test_runpod_real.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from beacon_proxy.contracts import Backend, Fault, Outcome
from providers.checking import Answer
from providers.runpod import RunPod
from providers.runpod.bill import Bill
from providers.runpod.endpoint import Endpoint
from providers.runpod.health import read_health
from providers.runpod.job import Job as Told
from providers.runpod.pace import Operation

from .kit import (
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    blackhole,
    chat,
    chat_events,
    closed_port,
    eventually,
    proxy,
)
from .kit_jobs import CHAT, SOON
from .kit_runpod import ControlPlane, Job, control_plane, queue_row

DOLLAR: Any = {"price_per_second": 1.0}
BACKEND = Backend("r", "runpod", "http://x/v2/ep", "http", "x", 80)


@asynccontextmanager
async def billing(control: ControlPlane) -> AsyncIterator[tuple[Proxy, list[Outcome]]]:
    outcomes: list[Outcome] = []
    async with proxy(queue_row(control, **DOLLAR), outcomes=outcomes) as p:
        yield p, outcomes


def takes(*seconds: tuple[int, Any], **end: Any) -> Any:
    """Jobs that ran so long: ms in the queue and of the execution, as RunPod tells them."""
    left = list(seconds)

    async def play(job: Job) -> None:
        delay, job.ran = left.pop(0) if len(left) > 1 else left[0]
        job.start(delay)
        job.end(**end or {"output": [CHAT]})

    return play


async def test_document_is_charged_for_its_execution_and_the_start_that_it_waited_for() -> None:
    async with (
        control_plane(takes((4000, 2500), (3000, 1500), (200, 700))) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            assert (await client.ask(chat())).status == 200
        await p.exchanges(3)
    assert [each.billed for each in outcomes] == [6.5, 1.5, 0.7]
    assert [each.cold_start for each in outcomes] == [4.0, None, None], "the second only queued"
    assert [each.usd for each in outcomes] == [6.5, 1.5, 0.7]


async def test_document_when_it_waited_for_less_than_a_second_was_no_start() -> None:
    async with (
        control_plane(takes((900, 2500))) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(chat())
        await p.exchanges(1)
    assert [(each.billed, each.cold_start) for each in outcomes] == [(2.5, None)]


@pytest.mark.parametrize(
    "end",
    [
        {"error": "CUDA out of memory"},
        {"status": "TIMED_OUT"},
        {"status": "CANCELLED"},
        {"output": None},
    ],
)
async def test_job_that_fails_is_charged_for_its_execution(end: dict[str, Any]) -> None:
    async with (
        control_plane(takes((0, 2500), **end)) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status >= 500
        await p.exchanges(1)
    assert [(each.billed, each.usage) for each in outcomes] == [(2.5, None)]


@pytest.mark.parametrize("ran", [-1, 1e15, True, "2500", None])
async def test_execution_time_that_is_none_leaves_it_to_our_clock(ran: Any) -> None:
    async def play(job: Job) -> None:
        job.start()
        job.end([CHAT])
        job.ran = ran

    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
    assert 0 <= outcomes[0].billed <= outcomes[0].duration


async def test_stream_when_the_job_is_over_is_charged_as_its_status_says() -> None:
    async def play(job: Job) -> None:
        job.start()
        job.ran = 2500
        job.say(*(piece.decode() for piece in chat_events("a", 2)))
        job.end()

    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat(stream=True))).complete
        await p.exchanges(1)
        assert control.count("status") == 1
    (outcome,) = outcomes
    assert outcome.billed == 2.5
    assert outcome.usage is not None
    assert outcome.usage.output == 2


async def test_stream_when_the_job_goes_on_behind_its_end_is_charged_by_our_clock() -> None:
    """`[DONE]` has passed: nobody waits to hear what RunPod will say."""

    async def play(job: Job) -> None:
        job.start()
        job.ran = 9000
        job.say(*(piece.decode() for piece in chat_events("a", 2)))
        await ended.wait()
        job.end()

    ended = asyncio.Event()
    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat(stream=True))).complete
        await p.exchanges(1)
        ended.set()
    assert 0 <= outcomes[0].billed <= outcomes[0].duration


async def test_stream_when_the_client_leaves_is_charged_from_when_the_job_ran() -> None:
    async def play(job: Job) -> None:
        if len(control.jobs) > 1:
            await asyncio.sleep(0.3)
        job.start()
        job.say(chat_events("a", 1)[1].decode())
        if len(control.jobs) == 1:
            job.end()

    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
    ):
        for _ in range(2):
            async with RawClient(p.port) as client:
                await client.send(chat(stream=True))
                await client.read_until(b'"content":"a"')
                await asyncio.sleep(0.05)
        await p.exchanges(2)
        await eventually(lambda: control.last.cancelled_at is not None)
    outcome = outcomes[1]
    assert outcome.usage is not None
    assert outcome.usage.output == 1
    assert 0.048 <= outcome.billed <= outcome.duration - 0.2, "the wait in the queue is free"


@pytest.mark.parametrize("warm", [False, True])
async def test_queue_when_the_client_leaves_it_is_charged_for_a_start_alone(warm: bool) -> None:
    """Where nothing has run here of late, it is a worker's start that the job waits for."""

    async def play(job: Job) -> None:
        if warm and len(control.jobs) == 1:
            job.start()
            job.end([CHAT])

    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
    ):
        if warm:
            async with RawClient(p.port) as client:
                assert (await client.ask(chat())).status == 200
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await eventually(lambda: control.count("stream") >= 2)
        await p.exchanges(2 if warm else 1)
    outcome = outcomes[-1]
    assert (outcome.billed == 0.0) is warm
    assert outcome.billed <= outcome.duration
    assert outcome.usage is not None
    assert outcome.usage.output == 0


# -- what RunPod never took ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 402, 404, 429])
@pytest.mark.parametrize("stream", [False, True])
async def test_submission_when_runpod_refuses_it_costs_nothing(status: int, stream: bool) -> None:
    async with (
        control_plane() as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        control.answers("run" if stream else "runsync", status)
        assert (await client.ask(chat(stream=stream))).status >= 400
        await p.exchanges(1)
    assert [(each.billed, each.usd) for each in outcomes] == [(0.0, 0.0)]


async def test_submission_when_nobody_listens_costs_nothing() -> None:
    with closed_port() as port:
        async with control_plane() as control:
            control.port = port
            async with billing(control) as (p, outcomes), RawClient(p.port) as client:
                assert (await client.ask(chat())).status == 502
                await p.exchanges(1)
    assert [(each.billed, each.usd) for each in outcomes] == [(0.0, 0.0)]


async def test_submission_when_no_connection_comes_about_costs_nothing() -> None:
    outcomes: list[Outcome] = []
    async with blackhole() as port:
        url = f"http://127.0.0.1:{port}/v2/ep"
        row = {"url": url, "provider": "runpod", "kind": "queue", **DOLLAR, **SOON}
        async with proxy(row, outcomes=outcomes) as p, RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 504
            await p.exchanges(1)
    (outcome,) = outcomes
    assert (outcome.fault, outcome.billed, outcome.usd) == (Fault.TIMEOUT, 0.0, 0.0)
    assert outcome.duration >= 0.298


async def test_submission_while_it_waits_for_our_own_pace_costs_nothing() -> None:
    async with control_plane() as control, billing(control) as (p, outcomes):
        provider = p.app.fleet.providers["runpod"]
        assert isinstance(provider, RunPod)
        provider._queue._endpoint(control.url).budgets[Operation.RUNSYNC].rest(60)
        async with RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: len(p.app._carriers) == 1)
            await asyncio.sleep(0.03)
        await p.exchanges(1)
        assert control.jobs == {}
    assert [(each.billed, each.usd) for each in outcomes] == [(0.0, 0.0)]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"])
async def test_submission_when_its_answer_is_lost_is_charged_by_our_clock(answer: bytes) -> None:
    """The job may run. It went out with its length, as the SDK sends it."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await asyncio.sleep(0.03)
        await conn.send(answer)
        conn.close()

    outcomes: list[Outcome] = []
    async with RawBackend(script) as backend:
        row = {"url": f"{backend.url}/v2/ep", "provider": "runpod", "kind": "queue", **DOLLAR}
        async with proxy(row, outcomes=outcomes) as p, RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 502
            await p.exchanges(1)
        (received,) = backend.requests
    (outcome,) = outcomes
    assert 0.028 <= outcome.billed == outcome.usd <= outcome.duration
    assert (received.framing.kind, received.framing.length) == ("length", len(received.body))


# -- what nobody saw, and what was no start -------------------------------------------------------


async def test_looks_when_they_bring_nothing_the_job_is_charged_from_when_it_last_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The endpoint is warm, so its wait is free; but from then on the job ran."""
    monkeypatch.setattr("providers.runpod.bill._LATE", 0.02)

    async def play(job: Job) -> None:
        if len(control.jobs) > 1:
            control.answers("stream", 500, times=100)
            await eventually(lambda: control.count("stream"))
        job.start()
        if len(control.jobs) == 1:
            job.end([CHAT])

    outcomes: list[Outcome] = []
    async with (
        control_plane(play) as control,
        proxy(queue_row(control, **DOLLAR, **SOON), outcomes=outcomes) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        assert (await client.ask(chat(stream=True))).status == 504
        await p.exchanges(2)
        started = control.last.started
    outcome = outcomes[-1]
    assert started is not None
    ran = outcome.started + outcome.duration - started
    assert ran > 0.1
    assert ran <= outcome.billed <= outcome.duration


async def test_job_when_no_worker_can_start_costs_nothing_while_it_waits() -> None:
    """All are throttled: RunPod bills none of them."""
    async with control_plane() as control:
        control.workers = {"idle": 0, "ready": 0, "running": 0, "throttled": 2}
        async with billing(control) as (p, outcomes):
            async with RawClient(p.port) as client:
                await eventually(lambda: p.app.fleet.candidates()[0].live.last_check)
                await client.send(chat(stream=True))
                await eventually(lambda: control.count("stream") >= 3)
            await p.exchanges(1)
    assert [(each.billed, each.cold_start) for each in outcomes] == [(0.0, None)]


async def test_job_when_it_is_cancelled_in_the_queue_costs_nothing_and_was_no_start() -> None:
    async def play(job: Job) -> None:
        await eventually(lambda: control.count("stream") >= 2)
        job.delay = 1_200_000
        job.end(status="CANCELLED")

    async with (
        control_plane(play) as control,
        billing(control) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat(stream=True))).status == 502
        await p.exchanges(1)
    assert [(each.billed, each.cold_start) for each in outcomes] == [(0.0, None)]


async def test_job_when_others_keep_a_worker_up_has_not_waited_for_a_start() -> None:
    async with control_plane(takes((4000, 2500))) as control:
        control.workers = {"idle": 1, "ready": 1, "running": 1}
        async with billing(control) as (p, outcomes), RawClient(p.port) as client:
            await eventually(lambda: p.app.fleet.candidates()[0].live.last_check)
            assert (await client.ask(chat())).status == 200
            await p.exchanges(1)
    assert [(each.billed, each.cold_start) for each in outcomes] == [(2.5, None)]


class Notes:
    """A reply that notes what it is told of money."""

    def __init__(self) -> None:
        self.told: list[tuple[float, bool]] = []
        self.starts: list[float] = []

    def billed(self, seconds: float, *, running: bool = False) -> None:
        self.told.append((seconds, running))

    def started_cold(self, seconds: float) -> None:
        self.starts.append(seconds)


class Watched:
    """One endpoint, and bills of its jobs, on a clock of the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.notes = Notes()
        self.endpoint = Endpoint("http://x", lambda: self.now)
        self.submit(100.0)

    def submit(self, at: float) -> None:
        self.now = at
        self.bill = Bill(self.endpoint, self.notes, lambda: self.now)  # type: ignore[arg-type]
        self.bill.sent()

    def check(self, at: float, **workers: int) -> None:
        self.now = at
        document = json.dumps({"jobs": {}, "workers": workers}).encode()
        self.endpoint.note(read_health(BACKEND, Answer(200, document)))

    def seen(self, at: float, status: str, **more: Any) -> tuple[float, bool]:
        """What a look at `at` makes of the bill."""
        self.now = at
        self.bill.note(Told(id="j", status=status, **more))
        return self.notes.told[-1]

    async def lost(self, at: float) -> tuple[float, bool]:
        """The same of one that fails."""
        self.now = at
        with pytest.raises(ConnectionResetError), self.bill.looking():
            raise ConnectionResetError
        return self.notes.told[-1]

    def warm(self) -> None:
        """Let a job have run just now."""
        self.endpoint.last_ran = self.now


def test_bill_while_a_job_waits_runs_and_ends_says_what_it_is_so_far() -> None:
    job = Watched()
    assert job.seen(100.0, "IN_QUEUE") == (0.0, True)
    assert job.seen(160.0, "IN_QUEUE") == (60.0, True), "a start is paid while it lasts"
    assert job.seen(170.0, "IN_PROGRESS") == (70.0, True)
    assert job.seen(175.0, "IN_PROGRESS", delay=65.0) == (70.0, True), "as RunPod counts it"
    assert job.seen(180.0, "COMPLETED", delay=65.0, ran=9.5) == (74.5, False)
    assert job.notes.starts == [65.0]

    job.submit(180.0)
    assert job.seen(190.0, "IN_QUEUE") == (0.0, False), "others run there: it only waits"
    assert job.seen(200.0, "IN_PROGRESS") == (0.0, True)
    assert job.seen(203.0, "COMPLETED", delay=20.0) == (3.0, False)
    assert job.notes.starts == [65.0]

    job.submit(300.0)  # idle for longer than a worker stays
    assert job.seen(303.0, "COMPLETED", delay=2.0, ran=1.0) == (3.0, False)
    assert job.notes.starts == [65.0, 2.0]


async def test_bill_when_looks_fail_counts_from_the_last_that_found_it_waiting() -> None:
    job = Watched()
    job.warm()
    job.submit(100.0)
    assert job.seen(101.0, "IN_QUEUE") == (0.0, False)
    assert await job.lost(400.0) == (299.0, True)
    assert job.seen(401.0, "IN_QUEUE") == (0.0, False), "it has waited all along"
    assert await job.lost(405.0) == (4.0, True)
    assert job.seen(410.0, "IN_PROGRESS") == (9.0, True), "from when nobody knows better"
    assert await job.lost(415.0) == (9.0, True), "our clock goes on by itself"
    assert job.seen(420.0, "COMPLETED", delay=305.0) == (19.0, False)


async def test_bill_when_looks_failed_and_runpod_says_how_long_it_waited_counts_from_then() -> None:
    job = Watched()
    assert job.seen(101.0, "IN_QUEUE") == (1.0, True)
    assert await job.lost(150.0) == (50.0, True)
    assert job.seen(160.0, "IN_PROGRESS", delay=20.0) == (60.0, True)
    assert job.seen(161.0, "COMPLETED", delay=20.0, ran=39.0) == (59.0, False)


@pytest.mark.parametrize("status", ["FAILED", "TIMED_OUT", "COMPLETED"])
def test_bill_when_a_job_ends_unseen_and_without_a_time_counts_from_when_it_waited(
    status: str,
) -> None:
    job = Watched()
    job.warm()
    job.submit(100.0)
    assert job.seen(101.0, "IN_QUEUE") == (0.0, False)
    assert job.seen(401.0, status) == (300.0, False)

    job.submit(402.0)
    assert job.seen(412.0, status, delay=8.0) == (2.0, False)


@pytest.mark.parametrize("ran", [0.0, None])
def test_bill_when_no_worker_ever_took_the_job_is_nothing(ran: float | None) -> None:
    job = Watched()
    for at in range(100, 1301):
        job.seen(at, "IN_QUEUE")
    assert job.seen(1300.0, "CANCELLED", delay=1200.0, ran=ran) == (0.0, False)
    assert job.notes.starts == []
    assert len(job.endpoint.starts) == 0


def test_bill_while_no_worker_can_start_is_nothing_and_a_start_counts_from_then() -> None:
    job = Watched()
    assert job.seen(110.0, "IN_QUEUE") == (10.0, True)
    job.check(130.0, throttled=2)
    assert job.seen(131.0, "IN_QUEUE") == (0.0, False)
    job.check(160.0, throttled=1, unhealthy=1)
    assert job.seen(161.0, "IN_QUEUE") == (0.0, False)
    job.check(190.0, throttled=1, idle=1)
    assert job.seen(200.0, "IN_QUEUE") == (40.0, True), "since a look that found none"
    assert job.seen(210.0, "COMPLETED", delay=108.0, ran=2.0) == (50.0, False)
    assert job.notes.starts == [48.0]


def test_bill_while_a_job_waits_is_no_more_than_starts_of_this_endpoint_take() -> None:
    job = Watched()
    job.seen(115.0, "COMPLETED", delay=12.0, ran=3.0)
    job.submit(200.0)
    assert job.seen(210.0, "IN_QUEUE") == (10.0, True)
    assert job.seen(213.0, "IN_QUEUE") == (12.0, False)
    assert job.seen(500.0, "IN_QUEUE") == (12.0, False)
    assert job.seen(501.0, "COMPLETED", delay=300.0, ran=1.0) == (301.0, False), "it was one"


def test_endpoint_when_a_worker_runs_for_nobody_here_is_warm_until_a_check_says_else() -> None:
    job = Watched()
    assert job.endpoint.cold
    job.endpoint.calls = 1
    job.check(110.0, running=1)
    assert job.endpoint.cold, "it may be the one that starts for us"
    job.endpoint.calls = 0
    job.check(140.0, running=1)
    assert not job.endpoint.cold
    assert not job.endpoint.idle, "it is remembered"
    job.now = 190.0
    assert not job.endpoint.cold
    job.check(191.0, idle=1)
    assert job.endpoint.cold
    job.check(192.0, running=1)
    job.now = 260.0
    assert job.endpoint.cold, "checks have ended"
    assert job.endpoint.idle
