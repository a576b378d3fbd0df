"""runpod: how often it is asked, by a clock of the test's own; and nothing that stays behind."""

from __future__ import annotations

import asyncio

import pytest

from providers.runpod.pace import Budget, Operation, Pace

from .kit import RawClient, chat, eventually, proxy
from .kit_jobs import CHAT, CRASH, begins, ends, yields
from .kit_runpod import Play, control_plane, queue_row
from .test_garbage import asked, left_over

# Requests in 10 s, as RunPod publishes them (operation-reference).
PUBLISHED = {"run": 1000, "runsync": 2000, "status": 2000, "stream": 2000, "cancel": 100}


class Time:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("operation", list(Operation))
async def test_budget_when_asked_without_end_stays_below_its_part_of_the_limit(
    operation: Operation,
) -> None:
    time = Time()
    budget = Budget(operation, time, time.sleep)
    at = []
    for _ in range(2000):
        await budget.take()
        at.append(time.now)
    share = 0.9 if operation is Operation.CANCEL else 0.25
    most = PUBLISHED[operation] * share
    busiest = max(sum(start <= each < start + 10 for each in at) for start in at[::7])
    assert busiest <= most + 1
    assert busiest >= most * 0.95, "what is allowed is used"


async def test_budget_when_it_is_seldom_asked_never_waits() -> None:
    time = Time()
    budget = Budget(Operation.STREAM, time, time.sleep)
    for _ in range(500):
        before = time.now
        await budget.take()
        assert time.now == before
        time.now += 0.05


async def test_budget_when_runpod_asks_for_rest_lets_nothing_out_before() -> None:
    time = Time()
    budget = Budget(Operation.STATUS, time, time.sleep)
    budget.rest(7.0)
    await budget.take()
    assert 1007.0 <= time.now < 1007.1


async def test_budget_when_those_who_waited_have_left_does_not_count_them() -> None:
    time = Time()
    budget = Budget(Operation.RUN, time)
    tasks = [asyncio.create_task(budget.take()) for _ in range(1000)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    after = Budget(Operation.RUN, time, time.sleep)
    after._due = budget._due
    await after.take()
    assert time.now < 1000.1


def test_pace_when_nothing_comes_slows_down_and_news_make_it_fast_again() -> None:
    pace = Pace()
    waits = [pace.next(queued=False) for _ in range(20)]
    assert waits[0] == 0.05
    assert waits == sorted(waits)
    assert waits[-1] == Pace.RUNNING_MOST
    assert [pace.next(queued=True) for _ in range(20)][-1] == Pace.QUEUED_MOST
    pace.news()
    assert pace.next(queued=False) == 0.05


@pytest.mark.parametrize(
    ("play", "stream"),
    [
        (ends([CHAT]), False),
        (ends(error=CRASH), False),
        (ends({"x": 1}), False),
        (yields("hello"), True),
        (ends(error=CRASH), True),
        (begins, True),
    ],
    ids=["document", "failed", "unreadable", "stream", "failed stream", "the client leaves"],
)
async def test_garbage_when_a_job_is_over_is_none(play: Play, stream: bool) -> None:
    async with control_plane(play) as control, proxy(queue_row(control)) as p:

        async def act(port: int) -> None:
            async with RawClient(port) as client:
                await client.send(chat(stream=stream))
                if play is begins:
                    await client.read_until(b'"content":"a"')
                else:
                    await client.response("POST")
            await eventually(lambda: len(p.app._carriers) == 0)

        assert await left_over(p, act) == {}


async def test_garbage_when_no_job_is_taken_is_none() -> None:
    async with control_plane() as control, proxy(queue_row(control)) as p:
        control.answers("runsync", 400, times=4)
        assert await left_over(p, asked(chat(), 400)) == {}
