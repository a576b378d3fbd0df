"""Capacity: slots are counted exactly, and given back once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Check,
    Exchange,
    Fault,
    Live,
    Outcome,
    Permit,
    QueueLimits,
    Stage,
    Verdict,
)
from beacon_proxy.routing.chain import Chain
from middleware.capacity import Adaptive, Capacity

EXCHANGE = Exchange(id="x", method="POST", target=b"/", path="/", headers=(), started=0.0)


def backend(name: str = "b", max_in_flight: int = 2) -> Backend:
    return Backend(
        name=name,
        provider="openai",
        url="http://127.0.0.1:1",
        scheme="http",
        host="127.0.0.1",
        port=1,
        max_in_flight=max_in_flight,
    )


def test_admit_when_backend_is_full_refuses_and_lets_others_in() -> None:
    capacity = Capacity()
    full, free = backend("full", 2), backend("free", 1)
    assert capacity.admit(EXCHANGE, full)
    assert capacity.admit(EXCHANGE, full)
    assert capacity.admit(EXCHANGE, full) is None
    assert capacity.admit(EXCHANGE, free)
    assert (capacity.in_flight("full"), capacity.in_flight("free")) == (2, 1)


def test_admit_when_slot_was_released_takes_it_again() -> None:
    capacity, one = Capacity(), backend(max_in_flight=1)
    permit = capacity.admit(EXCHANGE, one)
    assert permit is not None
    assert capacity.admit(EXCHANGE, one) is None
    permit.release()
    assert capacity.in_flight("b") == 0
    assert capacity.admit(EXCHANGE, one)


def test_release_when_called_twice_frees_only_its_own_slot() -> None:
    """Guards against counters that drift: a second release must not free a stranger's slot."""
    capacity, two = Capacity(), backend(max_in_flight=2)
    mine, other = capacity.admit(EXCHANGE, two), capacity.admit(EXCHANGE, two)
    assert mine is not None
    assert other is not None
    mine.release()
    mine.release()
    assert capacity.in_flight("b") == 1
    assert capacity.admit(EXCHANGE, two)
    assert capacity.admit(EXCHANGE, two) is None


def test_in_flight_when_backend_is_unknown_is_zero() -> None:
    assert Capacity().in_flight("nobody") == 0


def test_release_when_last_slot_goes_forgets_the_name() -> None:
    """Guards against growth: discovered backends come and go under ever new names."""
    capacity = Capacity()
    for n in range(50):
        permit = capacity.admit(EXCHANGE, backend(f"node-{n}"))
        assert permit is not None
        permit.release()
    assert capacity._in_flight == {}


def test_queue_tells_the_configured_limits() -> None:
    assert Capacity().queue() == QueueLimits(size=100, timeout=10.0)
    assert Capacity(max_queue=0, queue_timeout=0).queue() == QueueLimits(size=0, timeout=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queue": -1}, "max_queue: must be >= 0, got -1"),
        ({"queue_timeout": -0.5}, "queue_timeout: must be >= 0 and finite, got -0.5"),
        ({"queue_timeout": math.inf}, "queue_timeout: must be >= 0 and finite, got inf"),
        ({"queue_timeout": math.nan}, "queue_timeout: must be >= 0 and finite, got nan"),
    ],
)
def test_options_when_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Capacity(**options)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    limits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 20)), max_size=80),
)
def test_permits_whatever_the_order_never_exceed_and_return_to_zero(
    limits: list[int], steps: list[tuple[int, bool, int]]
) -> None:
    capacity = Capacity()
    backends = [backend(f"b{n}", limit) for n, limit in enumerate(limits)]
    held: list[tuple[str, Permit]] = []
    for which, take, pick in steps:
        chosen = backends[which % len(backends)]
        if take:
            before = capacity.in_flight(chosen.name)
            permit = capacity.admit(EXCHANGE, chosen)
            assert (permit is None) == (before == chosen.max_in_flight)
            if permit is not None:
                held.append((chosen.name, permit))
        elif held:
            held.pop(pick % len(held))[1].release()
        for each in backends:
            running = sum(name == each.name for name, _ in held)
            assert capacity.in_flight(each.name) == running <= each.max_in_flight
    for _, permit in held:
        permit.release()
    assert all(capacity.in_flight(each.name) == 0 for each in backends)


# Slow start


def test_slow_start_when_a_backend_joins_its_room_grows_evenly_to_the_whole() -> None:
    clock = [1000.0]
    capacity = Capacity(slow_start=30.0, clock=lambda: clock[0])
    joined = replace(backend(max_in_flight=7), joined=1000.0)
    rooms = []
    for clock[0] in (1000.0, 1004.9, 1005.0, 1015.0, 1029.9, 1030.0, 9000.0):
        permits = []
        while (permit := capacity.admit(EXCHANGE, joined)) is not None:
            permits.append(permit)
        rooms.append(len(permits))
        for permit in permits:
            permit.release()
    assert rooms == [1, 1, 2, 4, 6, 7, 7]
    assert capacity.in_flight("b") == 0


def test_slow_start_when_another_server_had_the_name_its_exchanges_take_no_room() -> None:
    """Long streams on the one that was replaced must not keep the new one from working."""
    capacity = Capacity(clock=lambda: 1000.0)
    old, new = backend(max_in_flight=2), replace(backend(max_in_flight=2), joined=1000.0)
    streams = [capacity.admit(EXCHANGE, old) for _ in range(2)]
    permit = capacity.admit(EXCHANGE, new)
    assert permit is not None
    assert capacity.in_flight("b") == 3
    assert capacity.admit(EXCHANGE, new) is None
    for each in (*streams, permit):
        assert each is not None
        each.release()
    assert capacity.in_flight("b") == 0
    assert capacity._in_flight == {}


@pytest.mark.parametrize(("slow_start", "joined"), [(0.0, 1000.0), (30.0, 0.0)])
def test_slow_start_when_it_is_off_or_the_backend_was_there_gives_all_room(
    slow_start: float, joined: float
) -> None:
    capacity = Capacity(slow_start=slow_start, clock=lambda: 1000.0)
    here = replace(backend(max_in_flight=3), joined=joined)
    assert sum(capacity.admit(EXCHANGE, here) is not None for _ in range(9)) == 3


@pytest.mark.parametrize("slow_start", [-1.0, math.inf, math.nan])
def test_slow_start_when_it_is_no_time_is_refused(slow_start: float) -> None:
    with pytest.raises(ValueError, match="slow_start: must be >= 0 and finite"):
        Capacity(slow_start=slow_start)


# What is found out


def test_observe_is_no_phase_while_nothing_is_to_be_learnt() -> None:
    """Else each attempt would pay for an option that is off."""
    assert Chain.of([Capacity()]).observers == ()
    assert len(Chain.of([Capacity(adaptive=Adaptive(enabled=True))]).observers) == 1


def refused(backend: Backend, started: float) -> Outcome:
    return Outcome(
        backend, 1, Verdict.BUSY, Stage.DONE, fault=Fault.BUSY, status=503, started=started
    )


def full(capacity: Capacity, backend: Backend) -> list[Permit]:
    permits = []
    while (permit := capacity.admit(EXCHANGE, backend)) is not None:
        permits.append(permit)
    return permits


def test_adaptive_limit_is_below_max_in_flight_and_slow_start_and_given_back_exactly() -> None:
    clock = [1000.0]
    capacity = Capacity(adaptive=Adaptive(enabled=True), clock=lambda: clock[0])
    assert capacity.observe is not None
    sixteen = backend(max_in_flight=16)
    permits = full(capacity, sixteen)
    assert len(permits) == 16
    for permit in permits:
        permit.release()
        permit.release()
    assert capacity.in_flight("b") == 0
    clock[0] += 1.0
    capacity.observe(EXCHANGE, refused(sixteen, started=1000.0))
    assert capacity.concurrency_limit(sixteen) == len(full(capacity, sixteen)) == 12
    assert capacity.concurrency_limit(replace(sixteen, max_in_flight=4)) == 4
    joined = replace(sixteen, joined=1001.0)
    assert capacity.concurrency_limit(joined) == 1, (
        "another server: it starts slowly, and nothing is known"
    )


class Here:
    """A fleet of the backends that are there now."""

    def __init__(self, *backends: Backend) -> None:
        self.backends = backends

    def candidates(self) -> list[Candidate]:
        return [Candidate(each, Live()) for each in self.backends]

    async def changed(self, seen: int) -> int:
        raise AssertionError("nobody waits here")

    async def check(self, candidate: Candidate, seconds: float) -> Check | None:
        raise AssertionError("nobody asks here")


async def test_adaptive_when_backends_come_and_go_keeps_and_shows_those_that_are_there() -> None:
    """Guards against growth, and a gauge of a backend that is long gone."""
    capacity = Capacity(adaptive=Adaptive(enabled=True))
    fleet = Here()
    async with capacity.lifespan(fleet):
        for number in range(50):
            here = replace(backend(f"node-{number}", 9), joined=1.0)
            fleet.backends = (here,)
            permit = capacity.admit(EXCHANGE, here)
            assert permit is not None
            if number != 20:
                permit.release()
        assert set(capacity._learners) == {("node-20", 1.0), ("node-49", 1.0)}
        (gauge,) = capacity.gauges()
        assert (gauge.name, gauge.labels) == ("concurrency_limit", (("backend", "node-49"),))
        assert gauge.value == 9
    assert list(Capacity().gauges()) == []


def test_chain_takes_what_can_be_called_alone_for_a_phase() -> None:
    """An option of a plugin may have the name of a phase that it does not have."""

    class Plugin:
        concurrency_limit = 3
        observe = None

    chain = Chain.of([Plugin(), Capacity()])
    assert (chain.observers, len(chain.limits)) == ((), 1)
