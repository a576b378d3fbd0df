"""Utilisation and room: what is shown of a backend, its pool and its region."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Candidate, Capacity, Live
from beacon_proxy.fleet.load import Load, Share
from middleware.capacity import Capacity as Gate

from .kit import RawBackend, RawClient, chat, eventually, proxy, request
from .test_chooser import backend

NOW, UNIX = 1000.0, 1_700_000_000.0


class Rows:
    """A fleet written by hand."""

    def __init__(self, *rows: tuple[Backend, Live]) -> None:
        self.rows = rows

    def candidates(self) -> list[Candidate]:
        return [Candidate(each, live) for each, live in self.rows]

    def now(self) -> float:
        return NOW


def share(live: Live, *limits: Any, **facts: Any) -> Share:
    row = (backend(**{"max_in_flight": 8, **facts}), live)
    return Load(Rows(row), limits, lambda: UNIX).of(Candidate(*row))


@pytest.mark.parametrize(
    ("live", "room", "utilisation"),
    [
        (Live(), 8, 0.0),
        (Live(in_flight=2), 6, 0.25),
        (Live(in_flight=8), 0, 1.0),
        (Live(in_flight=9), 0, 1.0),
        (Live(ejected_until=NOW + 5, healthy=False), 0, 1.0),
        (Live(in_flight=3, resting_until=NOW + 5), 0, 1.0),
        (Live(resting_until=NOW - 5), 8, 0.0),
        (Live(healthy=False), 0, 1.0),
        (Live(ejected_until=NOW - 5, healthy=False), 1, 0.0),
        (Live(ejected_until=NOW - 5, in_flight=1), 0, 1.0),
    ],
)
def test_share_of_one_backend(live: Live, room: int, utilisation: float) -> None:
    found = share(live)
    assert (found.room, found.utilisation) == (room, utilisation)


def test_share_counts_the_lowest_limit_that_anybody_sets() -> None:
    assert share(Live(in_flight=1), lambda _: 5, lambda _: 3) == Share(1, 2, 3)
    joined = replace(backend(max_in_flight=9), joined=NOW)
    gate = Gate(slow_start=30.0, clock=lambda: NOW + 15.0)
    assert share(Live(), gate.concurrency_limit, max_in_flight=9).room == 9
    assert Load(Rows(), (gate.concurrency_limit,)).of(Candidate(joined, Live())).room == 5


@pytest.mark.parametrize(
    ("capacity", "room"),
    [
        pytest.param(Capacity(), 6, id="it says nothing"),
        pytest.param(Capacity(running=2, room=1), 1, id="room for one more"),
        pytest.param(Capacity(running=2, room=0), 0, id="others use it all"),
        pytest.param(Capacity(running=0, room=0), 6, id="none runs yet: the next starts one"),
        pytest.param(Capacity(running=1, idle=1, throttled=2), 2, id="half of its workers"),
        pytest.param(Capacity(running=0, idle=0, throttled=3), 0, id="no GPU is free"),
        pytest.param(Capacity(running=0, idle=3, starting=1), 6, id="scaled down"),
        pytest.param(Capacity(running=1, unhealthy=1), 2, id="one crashes"),
    ],
)
def test_share_counts_what_the_provider_told_while_it_is_fresh(
    capacity: Capacity, room: int
) -> None:
    def told(ago: float) -> Live:
        return Live(in_flight=2, capacity=capacity, last_check=UNIX - ago)

    assert share(told(10.0)).room == room
    assert share(told(61.0)).room == 6, "too old: only our own count is left"


def test_groups_add_up_and_stand_by_kind() -> None:
    rows = Rows(
        (backend("a", pool="baseline", region="us-east", max_in_flight=4), Live(in_flight=3)),
        (backend("b", pool="burst", region="us-east", max_in_flight=4), Live(in_flight=1)),
        (backend("c", pool="burst", region="eu-west"), Live(ejected_until=NOW + 9, in_flight=2)),
    )
    load = Load(rows)
    assert [(of, name, *each) for of, name, each in load.groups()] == [
        *(("backend", "a", 3, 1, 4), ("backend", "b", 1, 3, 4), ("backend", "c", 2, 0, 0)),
        *(("pool", "baseline", 3, 1, 4), ("pool", "burst", 3, 3, 4)),
        *(("region", "us-east", 4, 4, 8), ("region", "eu-west", 2, 0, 0)),
    ]
    gauges = {(g.name, *(value for _, value in g.labels)): g.value for g in load.gauges()}
    assert gauges["utilisation", "pool", "burst"] == 0.25
    assert gauges["utilisation", "region", "eu-west"] == 1.0
    assert gauges["room", "region", "us-east"] == 4


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 12), st.booleans(), st.booleans()), max_size=6
    )
)
def test_utilisation_is_a_part_and_room_is_what_admit_would_let_in(
    rows: list[tuple[int, int, bool, bool]],
) -> None:
    made = [
        (
            backend(f"b{n}", max_in_flight=most, pool="burst" if burst else "baseline"),
            Live(in_flight=running, ejected_until=NOW + 1.0 if ejected else 0.0),
        )
        for n, (most, running, ejected, burst) in enumerate(rows)
    ]
    groups = list(Load(Rows(*made)).groups())
    for _, _, each in groups:
        assert 0.0 <= each.utilisation <= 1.0
        assert (each.utilisation == 1.0) == (each.room == 0)
    free = sum(
        max(b.max_in_flight - live.in_flight, 0) for b, live in made if not live.ejected_until
    )
    for kind in ("backend", "pool", "region"):
        assert sum(each.room for of, _, each in groups if of == kind) == free


async def test_own_routes_show_utilisation_while_streams_run() -> None:
    gate = asyncio.Event()

    async def held(conn: Any) -> None:
        while await conn.request():
            await gate.wait()
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with (
        RawBackend(held) as server,
        proxy({"url": server, "max_in_flight": 2, "pool": "baseline"}) as p,
        RawClient(p.port) as first,
        RawClient(p.port) as second,
        RawClient(p.port) as third,
        RawClient(p.port) as monitor,
    ):
        for number, client in enumerate((first, second, third)):
            await client.send(chat())
            await eventually(
                lambda n=number: p.in_flight() + p.app.telemetry.metrics.queue_depth == n + 1
            )
        (entry,) = (await monitor.ask(request("GET", "/providers"))).json["providers"]
        assert (entry["utilisation"], entry["room"], entry["in_flight"]) == (1.0, 0, 2)
        told = (await monitor.ask(request("GET", "/metrics"))).json
        assert told["utilisation"] == {
            "backend": {"b0": 1.0},
            "pool": {"baseline": 1.0},
            "region": {"us-east": 1.0},
        }
        assert (told["queue_depth"], told["in_flight"]) == (1, 2)
        text = request("GET", "/metrics", [("Accept", "text/plain")])
        lines = (await monitor.ask(text)).body.decode().splitlines()
        assert 'beacon_utilisation{name="baseline",of="pool"} 1.0' in lines
        assert 'beacon_room{name="b0",of="backend"} 0.0' in lines
        (oldest,) = [line for line in lines if line.startswith("beacon_queue_oldest_seconds ")]
        assert float(oldest.split()[1]) > 0
        gate.set()
        for client in (first, second, third):
            assert (await client.response("POST")).status == 200
