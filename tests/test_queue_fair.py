"""The queue is fair between tenants: in turn, in order inside each, and nobody is locked out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Exchange, QueueLimits
from beacon_proxy.errors import Overloaded
from beacon_proxy.routing import queue as queue_module
from beacon_proxy.routing.chooser import Run
from beacon_proxy.routing.queue import Place, Queue
from middleware.capacity import Capacity

from . import kit_proxy
from .kit import (
    Answer,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    each_request,
    eventually,
    header,
    json_bytes,
    proxy,
)
from .test_chooser import Scene, backend, exchange, release

GOOD = {"object": "chat.completion", "choices": [{"message": {"content": "whole"}}]}
NEVER = 1e6
TENANTS = st.sampled_from(["a", "b", "c", None])


class Bench:
    """A queue on a clock of its own; who is woken takes the slot, and has left."""

    def __init__(self, size: int = 1000) -> None:
        self.now = 0.0
        self.queue = Queue(QueueLimits(size, NEVER), lambda depth: None, lambda: self.now)
        self.waiting: list[Place] = []

    def join(self, tenant: str | None = None, wants: str = "b") -> Place:
        place = self.queue.join(frozenset(wants), tenant)
        place.wake = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        self.waiting = [each for each in self.waiting if not each.displaced]
        return place

    def release(self, name: str = "b") -> None:
        self.queue.released(name)

    def owed(self) -> list[Place]:
        """Who was woken, in the order in which the loop runs them."""
        owed = [place for place in self.waiting if place.owed is not None]
        return sorted(owed, key=lambda place: place.offer)

    def take(self, place: Place) -> Place:
        self.queue.tried(place, place.owed)
        self.queue.leave(place)
        self.waiting.remove(place)
        return place

    def serve(self, name: str = "b") -> Place | None:
        """Release one slot and let it be taken; None where nobody was woken."""
        self.release(name)
        owed = self.owed()
        assert len(owed) <= 1
        return self.take(owed[0]) if owed else None

    def places(self) -> Counter[str | None]:
        return Counter(place.tenant for place in self.waiting)


async def test_slots_go_round_the_tenants_and_in_order_inside_each() -> None:
    bench = Bench()
    joined = [bench.join(tenant) for tenant in "aaaaabbc"]
    served = [bench.serve() for _ in joined]
    assert [place and place.tenant for place in served] == list("abcabaaa")
    by_tenant = [[x for x in joined if x.tenant == t] for t in "abc"]
    assert [[x for x in served if x and x.tenant == t] for t in "abc"] == by_tenant


async def test_without_tenants_who_came_first_is_first() -> None:
    bench = Bench()
    joined = [bench.join() for _ in range(9)]
    assert [bench.serve() for _ in joined] == joined


async def test_one_that_comes_again_each_time_gets_its_turn_and_no_more() -> None:
    """Who has but one request at a time neither starves nor goes before all others."""
    bench = Bench()
    for _ in range(20):
        bench.join("many")
    served = []
    for _ in range(20):
        if not bench.places()["one"]:
            bench.join("one")
        place = bench.serve()
        served.append(place and place.tenant)
    assert served == ["many", "one"] * 10


async def test_slots_released_at_once_go_to_different_tenants() -> None:
    """The second release comes before the first one woken has run."""
    bench = Bench()
    for tenant in "aaabb":
        bench.join(tenant)
    for _ in range(4):
        bench.release()
    assert Counter(place.tenant for place in bench.owed()) == {"a": 2, "b": 2}


async def test_tenant_that_wants_another_backend_is_passed_over_and_keeps_its_turn() -> None:
    bench = Bench()
    other = bench.join("a", wants="x")
    bench.join("b")
    bench.join("b")
    assert [place and place.tenant for place in (bench.serve(), bench.serve())] == ["b", "b"]
    assert bench.serve() is None
    assert bench.serve("x") is other


async def test_refused_slot_goes_round_once_and_to_nobody_twice() -> None:
    """Two slots on offer, refused in turn by all, would go round for ever."""
    bench = Bench()
    places = [bench.join(tenant) for tenant in "abc"]
    bench.release()
    bench.release()
    for _ in range(50):
        owed = bench.owed()
        if not owed:
            break
        place = owed[0]
        bench.queue.tried(place)
        place.wake = asyncio.get_running_loop().create_future()
    assert bench.queue.owed == 0
    assert [place.refused for place in places] == [{"b": 2}] * 3
    assert bench.serve() in places, "a new slot is offered to them again"


STEPS = st.lists(
    st.tuples(st.sampled_from("jjjrrt"), TENANTS, st.sampled_from(["x", "y", "xy"])), max_size=120
)


@settings(deadline=None)
@given(steps=STEPS)
def test_no_slot_lies_idle_while_somebody_waits_for_it(
    steps: list[tuple[str, str | None, str]],
) -> None:
    async def play() -> None:
        bench, idle = Bench(), Counter[str]()
        for what, tenant, wants in steps:
            if what == "j":
                if not any(idle[name] for name in wants):  # else it would take that one at once
                    bench.join(tenant, wants)
            elif what == "r":
                owed = bench.queue.owed
                bench.release(wants[0])
                idle[wants[0]] += bench.queue.owed == owed
            elif bench.owed():
                bench.take(bench.owed()[0])
            asleep = [p for p in bench.waiting if p.owed is None]
            assert not any(idle[name] for place in asleep for name in place.wants)
        while bench.owed():
            bench.take(bench.owed()[0])
        assert bench.queue.owed == 0

    asyncio.run(play())


@settings(deadline=None)
@given(
    before=st.lists(TENANTS, max_size=30),
    backlog=st.permutations(["a"] * 30 + ["b"] * 20 + ["c"] * 12),
    at_once=st.integers(1, 4),
)
def test_shares_differ_by_one_at_most_while_all_are_backlogged(
    before: list[str | None], backlog: list[str], at_once: int
) -> None:
    async def play() -> None:
        bench = Bench()
        for tenant in before:  # a past of any kind, over by then
            bench.join(tenant)
        while bench.serve() is not None:
            pass
        for tenant in backlog:
            bench.join(tenant)
        served = Counter(dict.fromkeys("abc", 0))
        while min(bench.places()[tenant] for tenant in "abc") >= at_once:
            for _ in range(at_once):
                bench.release()
            for place in bench.owed():
                served[str(bench.take(place).tenant)] += 1
            assert max(served.values()) - min(served.values()) <= 1
        assert sum(served.values()) >= 36 - 4 * at_once

    asyncio.run(play())


@settings(deadline=None)
@given(floods=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=80))
def test_nobody_waits_longer_than_one_turn_of_all_the_others(floods: list[str]) -> None:
    """Whatever the others send, and whenever: also those who come back at once."""

    async def play() -> None:
        bench = Bench()
        for tenant in "abcdef":
            bench.join(tenant)
        mine = bench.join("mine")
        turns = 0
        for tenant in floods:
            bench.join(tenant)
            if mine in bench.waiting:
                turns += bench.serve() is not mine
        assert turns <= 6

    asyncio.run(play())


# -- a full queue


async def test_newcomer_takes_the_newest_place_of_the_tenant_with_most() -> None:
    bench = Bench(size=4)
    a = [bench.join("a") for _ in range(3)]
    b = bench.join("b")
    assert not bench.queue.has_place("a")
    assert bench.queue.has_place("c")
    bench.join("c")
    assert [place.displaced for place in (*a, b)] == [False, False, True, False]
    assert a[2].wake is not None
    assert a[2].wake.done(), "it is told at once"
    assert (len(bench.queue), bench.places()) == (4, {"a": 2, "b": 1, "c": 1})
    bench.queue.leave(a[2])  # as its exchange does on its way out
    assert len(bench.queue) == 4


async def test_newcomer_displaces_nobody_where_the_two_would_only_change_sides() -> None:
    bench = Bench(size=3)
    for tenant in "aab":
        bench.join(tenant)
    assert not bench.queue.has_place("b")
    assert bench.queue.has_place("c")


async def test_full_queue_without_tenants_refuses_as_ever() -> None:
    bench = Bench(size=2)
    bench.join()
    bench.join()
    assert not bench.queue.has_place(None)
    assert not Bench(size=0).queue.has_place("a")


async def test_place_that_is_promised_a_slot_is_not_displaced() -> None:
    bench = Bench(size=3)
    a = [bench.join("a") for _ in range(3)]
    for _ in range(2):
        bench.release()
    bench.join("b")
    assert [place.displaced for place in a] == [False, False, True]
    assert len(bench.owed()) == 2


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(TENANTS, max_size=60))
def test_full_queue_stays_bounded_and_no_tenant_loses_its_last_place(
    size: int, joins: list[str | None]
) -> None:
    async def play() -> None:
        bench = Bench(size)
        for tenant in joins:
            before = bench.places()
            if not bench.queue.has_place(tenant):
                assert len(bench.queue) == size
                assert before[tenant] + 2 > max(before.values())
                continue
            bench.join(tenant)
            assert len(bench.queue) == sum(bench.places().values()) <= size
            assert all(bench.places()[each] for each in before if before[each])
        while bench.serve() is not None:
            pass
        assert len(bench.queue) == 0
        assert (bench.queue._lines, bench.queue._wanted) == ({}, {})

    asyncio.run(play())


# -- Retry-After, and what is shown


async def test_retry_after_is_the_time_that_all_who_wait_take_at_the_pace_of_now() -> None:
    bench = Bench()
    assert bench.queue.retry_after() == 1.0
    for _ in range(30):
        bench.join()
    bench.now = 4.0
    assert bench.queue.retry_after() == 4.0, "nobody was served in 4 s"
    for bench.now in (5.0, 6.0, 7.0, 8.0, 9.0, 10.0):
        bench.serve()
    assert bench.queue.retry_after() == pytest.approx(25 * 10 / 6)
    bench.now = 1000.0
    assert bench.queue.retry_after() == 60.0


async def test_retry_after_forgets_the_pace_of_an_earlier_queue() -> None:
    bench = Bench()
    for _ in range(200):
        bench.join()
    for _ in range(200):
        bench.now += 0.01
        bench.serve()
        assert 1.0 <= bench.queue.retry_after() <= 2.1
    bench.now = 500.0
    for _ in range(10):
        bench.join()
    bench.now = 510.0
    assert bench.queue.retry_after() == 10.0


async def test_gauge_tells_how_long_the_oldest_has_waited() -> None:
    bench = Bench()
    bench.join("a")
    bench.now = 3.0
    bench.join("b")
    bench.now = 5.0

    def oldest() -> float:
        (gauge,) = bench.queue.gauges()
        assert (gauge.name, gauge.labels) == ("queue_oldest_seconds", ())
        return gauge.value

    assert oldest() == 5.0
    bench.serve()
    assert oldest() == 2.0
    bench.serve()
    assert oldest() == 0.0


# -- by the chooser


async def test_choose_when_its_place_goes_to_another_tenant_is_overloaded_at_once() -> None:
    scene = Scene(backend(max_in_flight=1), chain=(Capacity(max_queue=2, queue_timeout=NEVER),))
    first = scene.chooser.try_now(exchange(), None, ())
    assert first is not None
    runs = {name: Run() for name in ("a1", "a2", "b1", "b2")}

    def come(name: str) -> asyncio.Task[Any]:
        asked = exchange(tenant=name[0])
        waiting = scene.chooser.choose(asked, None, (), runs[name], patient=True)
        return asyncio.create_task(waiting, name=name)

    tasks = {}
    for name in runs:
        tasks[name] = come(name)
        await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="its share of the queue") as displaced:
        await tasks["a2"]
    assert (displaced.value.status, displaced.value.retry_after) == (503, 1.0)
    with pytest.raises(Overloaded, match="and so is the queue"):
        await tasks["b2"]
    assert runs["a2"].queued > 0
    release(first.permits)
    scene.queue.released("b")
    second = await tasks["a1"]
    release(second.permits)
    scene.queue.released("b")
    await tasks["b1"]
    assert (len(scene.queue), scene.queue.owed) == (0, 0)


# -- through the proxy


@dataclass(slots=True)
class Tenants:
    """Tells tenants by a header, as `limits.tenant_header` does, but in plain."""

    header: str = field(default="X-Tenant")

    def prepare(self, exchange: Exchange) -> None:
        told = dict(exchange.headers).get(self.header.encode())
        exchange.tenant = None if told is None else told.decode()


@pytest.fixture
def with_tenants(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A chain that knows tenants; nobody in the queue is woken but by a release."""
    known = kit_proxy.plugins()
    more = replace(known, middleware={**known.middleware, "tenants": Tenants})
    monkeypatch.setattr(kit_proxy, "plugins", lambda: more)
    monkeypatch.setattr(queue_module, "RECHECK", NEVER)
    names = ("health", "region", "cost", "tenants", "failover")
    return [{name: {}} for name in names]


class Steps:
    """A backend that ends one answer each time it is told to."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._step = asyncio.Semaphore(0)

    async def script(self, conn: BackendConn) -> None:
        async for received in each_request(conn):
            self.names.append(received.json["model"])
            await self._step.acquire()
            await conn.send(json_bytes(GOOD))

    def end(self, count: int = 1) -> None:
        for _ in range(count):
            self._step.release()


async def ask(p: Proxy, name: str) -> Answer:
    async with RawClient(p.port) as client:
        return await client.ask(chat(model=name, headers=[("X-Tenant", name.split("-")[0])]))


def queued(p: Proxy) -> int:
    return int(p.app.telemetry.metrics.queue_depth)


@asynccontextmanager
async def crowd(p: Proxy) -> AsyncIterator[dict[str, asyncio.Task[Answer]]]:
    tasks: dict[str, asyncio.Task[Answer]] = {}
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def test_tenant_that_floods_the_queue_delays_another_by_one_turn(
    with_tenants: list[dict[str, Any]],
) -> None:
    steps = Steps()
    middleware = [*with_tenants, {"capacity": {"max_queue": 6, "queue_timeout": 60}}]
    row = {"max_in_flight": 1}
    async with (
        RawBackend(steps.script) as server,
        proxy({"url": server, **row}, middleware=middleware) as p,
        crowd(p) as tasks,
    ):
        for number in range(7):
            tasks[f"loud-{number}"] = asyncio.create_task(ask(p, f"loud-{number}"))
            await eventually(lambda n=number: queued(p) + len(steps.names) == n + 1)
        refused = await ask(p, "loud-7")
        assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
        for name in ("quiet-1", "quiet-2"):
            tasks[name] = asyncio.create_task(ask(p, name))
        displaced = [await tasks["loud-6"], await tasks["loud-5"]]
        assert [got.status for got in displaced] == [503, 503]
        assert all(1 <= int(header(got.headers, b"Retry-After")[0]) <= 60 for got in displaced)
        await eventually(lambda: queued(p) == 6)
        for served in range(2, 8):
            steps.end()
            await eventually(lambda n=served: len(steps.names) == n)
        steps.end()
        assert [name.split("-")[0] for name in steps.names] == [
            *("loud", "loud", "quiet", "loud", "quiet", "loud", "loud")
        ]
        answers = await asyncio.gather(*(tasks[name] for name in steps.names))
        assert [got.status for got in answers] == [200] * 7
