"""What the ledger is asked next, for whom, and what it is not asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from beacon_proxy.api.admin.asking import (
    MOST_OPEN,
    MOST_WAITING,
    SLOW_HOLDS,
    WORTH,
    Asking,
    Question,
    rounded,
)
from beacon_proxy.errors import Overloaded
from beacon_proxy.ledger import LedgerError

HOUR, DAY = 3_600, 86_400


class Desk:
    """Somebody who is asked, and answers when the test says."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.asked: list[Question] = []
        self._answer: asyncio.Future[dict[str, Any]]
        self.asking = Asking(self._ask, lambda: self.now)

    def _ask(self, question: Question) -> asyncio.Future[dict[str, Any]]:
        self.asked.append(question)
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    async def wants(self, seconds: int, by: str = "pool") -> asyncio.Task[dict[str, Any]]:
        task = asyncio.create_task(self.asking.answer(Question(seconds, by)))
        await asyncio.sleep(0)
        return task

    async def answers(self, took: float = 0.0, error: Exception | None = None) -> None:
        self.now += took
        if error is None:
            self._answer.set_result({"of": self.asked[-1]})
        else:
            self._answer.set_exception(error)
        for _ in range(4):
            await asyncio.sleep(0)


SLOW = LedgerError("slow", "it took longer than 10 s")


@pytest.mark.parametrize(
    ("seconds", "grid"),
    [
        (1, 60),
        (90, 120),
        (HOUR, HOUR),
        (90 * 60, 90 * 60),
        (2 * HOUR + 1, 3 * HOUR),
        (7 * DAY, 7 * DAY),
        (7 * DAY + 1, 8 * DAY),
        (30 * DAY, 30 * DAY),
        (10**14, 3_650 * DAY),
    ],
)
def test_time_is_rounded_up_to_what_is_asked_for(seconds: int, grid: int) -> None:
    assert rounded(seconds) == grid


def test_times_are_few_however_many_spellings_they_have() -> None:
    assert len({rounded(seconds) for seconds in range(1, 40 * DAY, 7)}) < 400


async def test_shortest_time_is_asked_next_and_once_for_all_who_want_it() -> None:
    desk = Desk()
    tasks = [await desk.wants(days * DAY) for days in (30, 20, 90)]
    tasks += [await desk.wants(HOUR) for _ in range(3)]
    order = [30 * DAY, HOUR, 20 * DAY, 90 * DAY]
    for n in range(4):
        assert [each.seconds for each in desk.asked] == order[: n + 1]
        await desk.answers()
    found = [(await task)["of"].seconds for task in tasks]
    assert found == [30 * DAY, 20 * DAY, 90 * DAY, HOUR, HOUR, HOUR]


async def test_answer_holds_for_as_long_as_it_was_worth() -> None:
    desk = Desk()
    task = await desk.wants(HOUR)
    await desk.answers(took=4.0)
    first = await task
    desk.now += 4.0 * WORTH - 0.1
    assert await (await desk.wants(HOUR)) is first
    desk.now += 0.2
    task = await desk.wants(HOUR)
    assert len(desk.asked) == 2
    await desk.answers()
    assert (await task) is not first


async def test_what_took_too_long_is_not_tried_again_nor_what_goes_back_further() -> None:
    desk = Desk()
    tasks = [await desk.wants(days * DAY) for days in (30, 30, 90)]
    other = await desk.wants(60 * DAY, "day")
    await desk.answers(took=10.0, error=SLOW)
    for task in tasks:
        with pytest.raises(LedgerError):
            await task
    assert desk.asked[1:] == [(60 * DAY, "day")], "what is told apart otherwise may be faster"
    await desk.answers()
    await other
    for days in (30, 400):
        with pytest.raises(Overloaded) as caught:
            await (await desk.wants(days * DAY))
        assert caught.value.retry_after == SLOW_HOLDS
    assert len(desk.asked) == 2
    shorter = await desk.wants(29 * DAY)
    await desk.answers()
    assert await shorter
    desk.now += SLOW_HOLDS
    again = await desk.wants(30 * DAY)
    await desk.answers()
    assert await again


async def test_room_when_it_is_full_is_for_the_shorter_times() -> None:
    desk = Desk()
    first = await desk.wants(200 * DAY)
    many = [await desk.wants((100 + n) * DAY) for n in range(MOST_OPEN - 1)]
    with pytest.raises(Overloaded):
        await (await desk.wants(150 * DAY))
    short = await desk.wants(HOUR)
    with pytest.raises(Overloaded):
        await many[-1]
    await desk.answers()
    assert desk.asked[-1].seconds == HOUR
    await desk.answers()
    assert await first
    assert await short
    for task in many:
        task.cancel()


async def test_question_that_too_many_want_to_know_turns_further_ones_away() -> None:
    desk = Desk()
    tasks = [await desk.wants(HOUR) for _ in range(MOST_WAITING)]
    with pytest.raises(Overloaded):
        await (await desk.wants(HOUR))
    await desk.answers()
    assert len(await asyncio.gather(*tasks)) == MOST_WAITING


async def test_question_that_nobody_waits_for_any_more_is_not_asked() -> None:
    desk = Desk()
    first = await desk.wants(HOUR)
    left = await desk.wants(DAY)
    left.cancel()
    last = await desk.wants(2 * DAY)
    await desk.answers()
    await desk.answers()
    assert [each.seconds for each in desk.asked] == [HOUR, 2 * DAY]
    assert await first
    assert await last


async def test_error_is_told_to_who_asked_and_the_next_is_asked() -> None:
    desk = Desk()
    failed, next_one = await desk.wants(HOUR), await desk.wants(DAY)
    await desk.answers(error=LedgerError("sqlite_corrupt", "no database"))
    with pytest.raises(LedgerError, match="no database"):
        await failed
    await desk.answers()
    assert await next_one
    again = await desk.wants(HOUR)
    await desk.answers()
    assert await again, "only what is slow is not tried again"
