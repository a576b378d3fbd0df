"""Who waits looks again for room that comes without a release: how many do, and that none is lost.

Counted in plans, never timed: `Queue.recheck` is called by hand, and nobody is woken otherwise.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest

from beacon_proxy.contracts import Backend, Candidates, Exchange, Permit, QueueLimits
from beacon_proxy.errors import NoBackend
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.routing import queue as queue_module
from beacon_proxy.routing.chain import Chain
from beacon_proxy.routing.chooser import Choice, Chooser, Run
from beacon_proxy.routing.queue import Queue
from middleware.capacity import Capacity
from middleware.health import Health
from providers.openai import OpenAI

from .kit import eventually
from .test_chooser import backend, exchange, release

NEVER = 60.0  # s; longer than any test waits
AT_ONCE = queue_module._AT_ONCE


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "RECHECK", NEVER)


class Counts:
    """Counts who plans, and lets one tenant in nowhere."""

    def __init__(self) -> None:
        self.plans: Counter[str] = Counter()
        self.barred: str | None = None

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        self.plans[exchange.id] += 1
        return candidates

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        return None if exchange.tenant is not None and exchange.tenant == self.barred else _Free()

    def queue(self) -> QueueLimits:
        return QueueLimits(5000, NEVER)


class _Free:
    def release(self) -> None: ...


class Line:
    """A queue that stands before full backends."""

    def __init__(self, *backends: Backend) -> None:
        self.counts = Counts()
        chain = Chain.of((Health(), Capacity(), self.counts))
        self.queue = Queue(self.counts.queue(), lambda depth: None)
        self.fleet = Fleet(backends, {"openai": OpenAI()})
        self.chooser = Chooser(self.fleet, chain, self.queue)
        self.tasks: dict[str, asyncio.Task[Choice]] = {}
        self.taken: list[Choice] = []
        while backends and (choice := self.chooser.try_now(exchange(), None, ())) is not None:
            self.taken.append(choice)

    async def join(self, count: int, *, model: str | None = None, **more: Any) -> list[str]:
        names = [f"x{len(self.tasks) + n}" for n in range(count)]
        for name in names:
            asked = exchange(id=name, model=model, **more)
            waiting = self.chooser.choose(asked, model, (), Run(), patient=True)
            self.tasks[name] = asyncio.create_task(waiting, name=name)
        await settled()
        assert not any(self.tasks[name].done() for name in names)
        self.counts.plans.clear()
        return names

    def served(self) -> list[str]:
        return [name for name, task in self.tasks.items() if task.done()]

    async def recheck(self) -> int:
        """How many plans one recheck costs, with all that follows from it."""
        self.counts.plans.clear()
        self.queue.recheck()
        await settled()
        return self.counts.plans.total()


async def settled() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


@contextmanager
def line_of(*backends: Backend) -> Iterator[Line]:
    line = Line(*backends)
    try:
        yield line
    finally:
        for task in line.tasks.values():
            task.cancel()


def live(line: Line, name: str) -> Any:
    return next(c.live for c in line.fleet.candidates() if c.backend.name == name)


@pytest.mark.parametrize("waiting", [1, AT_ONCE, AT_ONCE + 1, 1000])
async def test_recheck_costs_no_more_for_a_long_queue_and_passes_nobody_over(waiting: int) -> None:
    with line_of(backend("a"), backend("b")) as line:
        await line.join(waiting)
        seen: Counter[str] = Counter()
        for _ in range(waiting // (AT_ONCE - 1) + 1):
            assert await line.recheck() == min(waiting, AT_ONCE)
            seen += line.counts.plans
        assert len(seen) == waiting
        assert (line.queue.owed, line.served()) == (0, [])


async def test_recheck_of_many_kinds_looks_at_each_in_turn() -> None:
    """Each waits for a model, and so a backend, of its own."""
    kinds = 3 * AT_ONCE
    rows = [backend(f"b{n}", models=frozenset({f"m{n}"})) for n in range(kinds)]
    with line_of(*rows) as line:
        firsts = [(await line.join(5, model=f"m{n}"))[0] for n in range(kinds)]
        seen: Counter[str] = Counter()
        for _ in range(kinds // (AT_ONCE // 2)):
            assert await line.recheck() == AT_ONCE
            seen += line.counts.plans
        assert all(seen[name] for name in firsts)


@pytest.mark.parametrize("how", ["ejected", "resting", "new"])
async def test_recheck_when_a_backend_has_come_all_of_its_room_goes_to_who_waits(how: str) -> None:
    """By one recheck, for as many plans as there are slots; a newcomer has to wait."""
    more = backend("b", max_in_flight=8)
    with line_of(backend("a", max_in_flight=1), *([] if how == "new" else [more])) as line:
        if how != "new":
            for choice in line.taken:
                if choice.candidate.backend.name == "b":
                    release(choice.permits)
            setattr(live(line, "b"), f"{how}_until", monotonic() + NEVER)
        names = await line.join(1000)
        assert line.queue.waiting("b") == 0
        if how == "new":
            line.fleet.follow([more])
        else:
            setattr(live(line, "b"), f"{how}_until", 0.0)
        assert await line.recheck() <= AT_ONCE + 8 + 1
        assert set(line.served()) <= set(names)
        assert len(line.served()) == 8
        assert (line.queue.waiting("b"), line.queue.owed) == (992, 0)
        for choice in [line.tasks[name].result() for name in line.served()[:2]]:
            release(choice.permits)  # the release itself is not told: room that just came
            assert line.chooser.try_now(exchange(), None, ()) is None, "it is promised"
            await settled()
        assert len(line.served()) == 10


@pytest.mark.parametrize("barred", [None, "first"])
async def test_recheck_when_a_limit_has_risen_all_of_it_goes_to_who_waits(
    barred: str | None,
) -> None:
    """Whoever came first may be refused for another reason than room."""
    with line_of(backend("a", max_in_flight=60)) as line:
        line.counts.barred = barred
        await line.join(3, tenant="first")
        await line.join(997, tenant="second")
        for choice in line.taken[:50]:
            release(choice.permits)  # nobody is told: as where a limit rises
        costs = [await line.recheck() for _ in range(3 if barred else 1)]
        assert len(line.served()) == 50
        assert max(costs) <= AT_ONCE + 50 + 1
        assert line.queue.owed == 0


async def test_recheck_when_room_is_found_goes_round_the_tenants_with_the_rest() -> None:
    with line_of(backend("a", max_in_flight=AT_ONCE + 6)) as line:
        await line.join(500, tenant="many")
        few = await line.join(2, tenant="few")
        for choice in line.taken:
            release(choice.permits)
        await line.recheck()
        assert len(line.served()) == AT_ONCE + 6
        assert set(few) <= set(line.served())


async def test_recheck_when_a_model_that_few_ask_for_has_room_finds_them_at_the_end() -> None:
    rows = [backend(name, models=frozenset({name}), max_in_flight=1) for name in "ab"]
    with line_of(*rows) as line:
        await line.join(1000, model="a")
        rare = await line.join(3, model="b")
        (b,) = [c for c in line.taken if c.candidate.backend.name == "b"]
        release(b.permits)
        await line.recheck()
        assert line.served() == rare[:1]


async def test_recheck_when_what_was_passed_on_is_wrong_for_some_holds_up_nobody() -> None:
    """Both kinds wait for `a` alone; the newcomer serves only one of them."""
    with line_of(backend("a", max_in_flight=1)) as line:
        others = await line.join(1, model="b")
        await line.join(500, model="m")
        await line.join(500, model="b")
        line.fleet.follow([backend("b", models=frozenset({"b"}), max_in_flight=8)])
        await line.recheck()
        for _ in range(1000 // (AT_ONCE - 2) + 1):
            await line.recheck()
        assert len(line.served()) == 8
        assert others[0] in line.served()
        assert all(int(name[1:]) > 500 for name in line.served() if name not in others)
        assert line.queue.waiting("b") == 493, "and each of them has found out what it can have"
        assert line.queue.owed == 0


async def test_recheck_when_nobody_is_left_whom_they_could_wait_for_all_hear_it() -> None:
    with line_of() as line:
        line.fleet.follow([backend("a", max_in_flight=1)])
        assert line.chooser.try_now(exchange(), None, ()) is not None
        await line.join(1000)
        line.fleet.follow([])
        assert await line.recheck() == 1000
        for task in line.tasks.values():
            with pytest.raises(NoBackend):
                task.result()
        assert (len(line.queue), line.queue.owed) == (0, 0)


async def test_queue_when_it_is_empty_again_leaves_nothing_behind() -> None:
    with line_of(backend("a"), backend("b")) as line:
        await line.join(50)
        assert line.queue._timer is not None
        for task in line.tasks.values():
            task.cancel()
        await settled()
        q = line.queue
        assert (q._timer, q._kinds, q._asleep, q._wanted, q._lines) == (None, {}, {}, {}, {})


async def test_recheck_comes_by_itself_as_long_as_somebody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue_module, "RECHECK", 0.001)
    with line_of(backend("a")) as line:
        (name,) = await line.join(1)
        await eventually(lambda: line.counts.plans[name] >= 5)
        release(line.taken[0].permits)
        assert await asyncio.wait_for(line.tasks[name], 5)


async def test_newcomer_in_the_moment_of_a_release_costs_one_look_and_not_one_for_each() -> None:
    """It was turned away for a promise: the whole queue looked whether there was more room."""
    with line_of(backend("a", max_in_flight=1)) as line:
        await line.join(1000)
        release(line.taken[0].permits)
        line.queue.released("a")
        assert line.chooser.try_now(exchange(id="newcomer"), None, ()) is None
        await settled()
        assert line.counts.plans.total() == 3, "the newcomer, who takes it, and one more"
        assert (len(line.served()), line.queue.owed) == (1, 0)
