"""The chooser's immediate path, and that it is one logic with the waiting one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    NO_SLOT,
    Backend,
    Candidates,
    Exchange,
    Fault,
    Permit,
    QueueLimits,
    Timeouts,
)
from beacon_proxy.errors import Limited, NoBackend, Overloaded, UpstreamError
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.routing import queue as queue_module
from beacon_proxy.routing.chain import Chain
from beacon_proxy.routing.chooser import Choice, Chooser, Run
from beacon_proxy.routing.queue import Queue
from middleware.capacity import Capacity
from middleware.cost import Cost
from middleware.health import Health
from middleware.region import Region
from providers.openai import OpenAI


def backend(name: str = "b", **more: Any) -> Backend:
    return Backend(
        name, "openai", url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1, **more
    )


def exchange(**more: Any) -> Exchange:
    asked = Exchange(id="x", method="POST", target=b"/", path="/", headers=(), started=monotonic())
    for name, value in more.items():
        setattr(asked, name, value)
    return asked


class Scene:
    """A chooser over real middlewares."""

    def __init__(self, *backends: Backend, chain: tuple[object, ...] | None = None) -> None:
        given_ones = (Health(), Region(region="us-east"), Cost(), Capacity())
        self.chain = Chain.of(given_ones if chain is None else chain)
        self.queue = Queue(self.chain.queue, lambda depth: None)
        self.fleet = Fleet(backends, {"openai": OpenAI()})
        self.chooser = Chooser(self.fleet, self.chain, self.queue)

    def choose(self, asked: Exchange) -> Choice:
        """What `choose` says to who is not patient."""
        waiting = self.chooser.choose(asked, None, (), Run(), patient=False)
        try:
            waiting.send(None)
        except StopIteration as done:
            choice: Choice = done.value
            return choice
        raise AssertionError("it waits")


def release(permits: list[Permit]) -> None:
    for permit in permits:
        permit.release()


def test_try_now_when_one_is_full_takes_the_next_and_none_when_all_are() -> None:
    scene = Scene(backend("a", max_in_flight=1), backend("b", max_in_flight=1))
    chosen = [scene.chooser.try_now(exchange(), None, ()) for _ in range(3)]
    assert [choice and choice.candidate.backend.name for choice in chosen] == ["a", "b", None]
    assert chosen[0] is not None
    release(chosen[0].permits)
    again = scene.chooser.try_now(exchange(), None, ())
    assert again is not None
    assert (again.candidate.backend.name, again.spare) == ("a", True)
    assert again.provider is scene.fleet.providers["openai"]


def test_try_now_leaves_out_those_that_were_tried_or_lack_the_model() -> None:
    scene = Scene(backend("a"), backend("b", models=frozenset({"n"})), backend("c"))
    choice = scene.chooser.try_now(exchange(), "m", {"a"})
    assert choice is not None
    assert (choice.candidate.backend.name, choice.spare) == ("c", False)


@dataclass(slots=True)
class Refuses:
    """Lets nobody in, after all others have."""

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        return None


def test_try_now_when_a_later_rule_refuses_gives_back_what_the_earlier_ones_took() -> None:
    capacity, cost = Capacity(), Cost()
    scene = Scene(backend("a"), backend("b"), chain=(cost, capacity, Refuses()))
    assert scene.chooser.try_now(exchange(), None, ()) is None
    assert (capacity.in_flight("a"), capacity.in_flight("b")) == (0, 0)
    assert cost._ledger.standing == pytest.approx(0.0)


def test_try_now_when_nothing_was_taken_holds_no_permit() -> None:
    """Health lets in without a slot, and so does cost where the blend does not decide."""
    scene = Scene(backend(), chain=(Health(), Cost()))
    choice = scene.chooser.try_now(exchange(cost_priority=True), None, ())
    assert choice is not None
    assert choice.permits == []
    NO_SLOT.release()  # and who releases it all the same does no harm


def late(scene: Scene) -> Exchange:
    return exchange(deadline=monotonic() - 1)


def past_the_total(scene: Scene) -> Exchange:
    return exchange(started=monotonic() - 60)


def too_dear(scene: Scene) -> Exchange:
    return exchange(max_price=1e-9)


def elsewhere(scene: Scene) -> Exchange:
    return exchange(region="eu-west", region_mode="require")


def full(scene: Scene) -> Exchange:
    assert scene.chooser.try_now(exchange(), None, ()) is not None
    return exchange()


@pytest.mark.parametrize(
    ("prepare", "error", "fault"),
    [
        pytest.param(late, UpstreamError, Fault.DEADLINE, id="deadline"),
        pytest.param(past_the_total, UpstreamError, Fault.DEADLINE, id="total"),
        pytest.param(too_dear, Limited, None, id="price"),
        pytest.param(elsewhere, NoBackend, None, id="region"),
        pytest.param(full, Overloaded, None, id="full"),
    ],
)
def test_try_now_raises_as_choose_does_but_for_want_of_room(
    prepare: Callable[[Scene], Exchange], error: type[Exception], fault: Fault | None
) -> None:
    limits = {"timeouts": Timeouts(total=30.0), "price_per_second": 1.0}
    scene = Scene(backend(max_in_flight=1, region="us-east", **limits))
    asked = prepare(scene)
    if error is Overloaded:
        assert scene.chooser.try_now(asked, None, ()) is None
    else:
        with pytest.raises(error) as now:
            scene.chooser.try_now(asked, None, ())
        assert getattr(now.value, "fault", None) == fault
    with pytest.raises(error) as waiting:
        scene.choose(asked)
    assert getattr(waiting.value, "fault", None) == fault


@pytest.mark.parametrize("totals", [(0.0, 30.0), (30.0, 0.0)])
def test_try_now_when_the_total_of_one_has_run_out_asks_the_other(
    totals: tuple[float, float],
) -> None:
    a, b = (Timeouts(total=total) for total in totals)
    scene = Scene(backend("a", timeouts=a), backend("b", timeouts=b))
    choice = scene.chooser.try_now(exchange(started=monotonic() - 60), None, ())
    assert choice is not None
    assert choice.candidate.backend.timeouts.total == 0
    assert choice.spare is False


class _Marked:
    """Marks some as a last resort and changes nothing else."""

    def __init__(self, marks: list[bool]) -> None:
        self._marks = marks

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        for candidate, mark in zip(candidates, self._marks, strict=True):
            candidate.last_resort = mark
        return candidates


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_spare_says_whether_another_stands_ready(marks: list[bool]) -> None:
    backends = [backend(f"b{n}", max_in_flight=1) for n in range(len(marks))]
    scene = Scene(*backends, chain=(_Marked(marks), Capacity()))
    for n in range(len(marks)):
        choice = scene.chooser.try_now(exchange(), None, ())
        assert choice is not None
        assert choice.candidate.backend.name == f"b{n}"
        assert choice.spare is any(not mark for at, mark in enumerate(marks) if at != n)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["us-east", "eu-west", "moon"]),
            st.sampled_from(["baseline", "burst"]),
            st.sampled_from([0.0, 0.001, 0.002]),
            st.integers(0, 3),  # in flight
            st.integers(0, 2),  # picked
        ),
        min_size=1,
        max_size=5,
    ),
    region=st.none() | st.sampled_from(["us-east", "eu-west"]),
    cost_priority=st.none() | st.booleans(),
)
def test_try_now_and_choose_take_the_same(
    rows: list[tuple[str, str, float, int, int]], region: str | None, cost_priority: bool | None
) -> None:
    backends = [
        backend(f"b{n}", region=where, pool=pool, price_per_second=price)
        for n, (where, pool, price, _, _) in enumerate(rows)
    ]
    chosen = []
    for immediate in (True, False):
        scene = Scene(*backends)
        for candidate, (_, _, _, in_flight, picked) in zip(
            scene.fleet.candidates(), rows, strict=True
        ):
            candidate.live.in_flight, candidate.live.picked = in_flight, picked
        asked = exchange(region=region, cost_priority=cost_priority)
        choice = scene.chooser.try_now(asked, None, ()) if immediate else scene.choose(asked)
        assert choice is not None
        chosen.append((choice.candidate.backend.name, choice.spare, len(choice.permits)))
    assert chosen[0] == chosen[1]


async def test_try_now_does_not_take_a_slot_that_was_promised_to_who_waits() -> None:
    scene = Scene(backend(max_in_flight=1), chain=(Capacity(),))
    first = scene.chooser.try_now(exchange(), None, ())
    assert first is not None
    waiter = asyncio.create_task(
        scene.chooser.choose(exchange(), None, (), Run(), patient=True), name="waiter"
    )
    await asyncio.sleep(0)  # it runs up to its place in the queue
    assert len(scene.queue) == 1
    release(first.permits)
    scene.queue.released("b")
    assert scene.queue.owed == 1
    assert scene.chooser.try_now(exchange(), None, ()) is None
    second = await waiter
    assert scene.queue.owed == 0
    release(second.permits)
    assert scene.chooser.try_now(exchange(), None, ()) is not None


@dataclass(slots=True)
class Rises:
    """A limit that changes by itself; and one tenant that it never lets in."""

    limit: int = 0
    barred: str | None = "barred"

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        if self.limit == 0 or exchange.tenant == self.barred:
            return None
        self.limit -= 1
        return _Given(self)

    def queue(self) -> QueueLimits:
        return QueueLimits(9, 60.0)


class _Given:
    def __init__(self, of: Rises) -> None:
        self._of = of

    def release(self) -> None:
        self._of.limit += 1


def waiting(scene: Scene, **more: Any) -> asyncio.Task[Choice]:
    choosing = scene.chooser.choose(exchange(**more), None, (), Run(), patient=True)
    return asyncio.create_task(choosing, name="waiter")


@pytest.mark.parametrize("tenants", [(None, None), ("a", "b")])
async def test_try_now_when_a_limit_has_risen_leaves_the_room_to_who_waits(
    monkeypatch: pytest.MonkeyPatch, tenants: tuple[str | None, ...]
) -> None:
    monkeypatch.setattr(queue_module, "RECHECK", 60.0)
    rises = Rises()
    scene = Scene(backend(), chain=(rises,))
    waiters = [waiting(scene, tenant=tenant) for tenant in tenants]
    await asyncio.sleep(0)
    rises.limit = 3
    assert scene.chooser.try_now(exchange(), None, ()) is None
    assert (scene.queue.owed, rises.limit) == (1, 3)
    newcomer = waiting(scene)
    assert [len((await asyncio.wait_for(each, 2)).permits) for each in waiters] == [1, 1]
    assert len((await asyncio.wait_for(newcomer, 2)).permits) == 1, "and so does the newcomer"
    assert (scene.queue.owed, len(scene.queue), rises.limit) == (0, 0, 0)


async def test_try_now_when_who_waits_will_not_have_the_room_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who is refused for another reason than room holds up nobody."""
    monkeypatch.setattr(queue_module, "RECHECK", 60.0)
    rises = Rises()
    scene = Scene(backend(), chain=(rises,))
    barred = waiting(scene, tenant="barred")
    await asyncio.sleep(0)
    rises.limit = 3
    taken = await asyncio.wait_for(waiting(scene), 2)
    assert len(taken.permits) == 1
    for _ in range(2):
        assert scene.chooser.try_now(exchange(), None, ()) is not None, "it was offered once"
    assert len(scene.queue) == 1
    barred.cancel()
    await asyncio.gather(barred, return_exceptions=True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("jwrtly"), st.integers(0, 5)), max_size=60))
def test_owed_is_the_number_of_promises_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """The chooser asks `owed` first: a promise that it does not count would be broken."""

    async def play() -> None:
        queue = Queue(QueueLimits(10, 1.0), lambda depth: None)
        names, places = ("a", "b", "c"), []
        for what, n in steps:
            name = names[n % 3]
            if what == "j":
                place = queue.join(frozenset({name, names[(n + n // 3) % 3]}))
                place.wake = asyncio.get_running_loop().create_future()
                places.append(place)
            elif what == "r":
                queue.released(name)
            elif what == "y":
                assert queue.yields(name) == queue.promised(name, None)
            elif places:
                place = places[n % len(places)]
                if what == "w":
                    queue.want(place, frozenset({name}))
                elif what == "t":
                    queue.tried(place, name if n > 2 else None)
                else:
                    places.remove(place)
                    queue.leave(place)
            owed = sum(place.owed is not None for place in places)
            assert queue.owed == owed
            assert owed or not any(queue.promised(each, None) for each in names)

    asyncio.run(play())


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.frozensets(st.sampled_from("mn")),  # configured
            st.none() | st.frozensets(st.sampled_from("mn")),  # found
            st.frozensets(st.sampled_from("mn")),  # said to be lacking
        ),
        max_size=4,
    ),
    st.sampled_from("mnx"),
)
def test_serving_and_knows_agree_and_what_is_known_outranks_what_was_said(
    rows: list[tuple[frozenset[str] | None, frozenset[str] | None, frozenset[str]]], model: str
) -> None:
    fleet = Fleet([backend(f"b{n}", models=row[0]) for n, row in enumerate(rows)], {})
    for candidate, (_, found, lacking) in zip(fleet.candidates(), rows, strict=True):
        candidate.live.models = found
        for each in lacking:
            fleet.lacks(candidate.live, each)
    expected = []
    for n, (configured, found, lacking) in enumerate(rows):
        known = found if configured is None else configured
        if (model in known) if known is not None else model not in lacking:
            expected.append(f"b{n}")
    assert [c.backend.name for c in fleet.serving(model, ())] == expected
    assert fleet.knows(model) == bool(expected or not rows)  # of an empty fleet nobody can say
    assert len(fleet.serving(None, ())) == len(rows)
