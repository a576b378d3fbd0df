"""The replay: its clock, its trace, its optimum; and what 10 000 requests say of the proxy.

What the runs say is computed anew here, and is what docs/replay.md says: `make replay` writes it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from math import inf
from typing import Any

import pytest

import beacon_proxy  # noqa: F401 - what `install` refuses to come after
from replay import report
from replay.clock import START, Clock, Loop, install
from replay.figures import SHARE, Figures, burst_hours, calm, figures
from replay.optimum import average, optimum
from replay.runs import COUNT, SEED, records
from replay.trace import SPIKE, Trace, generate

pytestmark = pytest.mark.timeout(600)  # half a minute where nobody else is at work

# -- the clock


def simulated(work: Callable[[Loop], Coroutine[Any, Any, None]]) -> Clock:
    clock = Clock()
    loop = Loop(clock)
    try:
        loop.run_until_complete(work(loop))
    finally:
        loop.close()
    return clock


def test_loop_when_all_wait_jumps_to_the_next_timer() -> None:
    woken = []

    async def sleep(seconds: float, loop: Loop) -> None:
        await asyncio.sleep(seconds)
        woken.append((seconds, loop.time() - START))

    async def work(loop: Loop) -> None:
        await asyncio.gather(*(sleep(seconds, loop) for seconds in (86_400.0, 0.25, 3_600.0)))

    begun = time.monotonic()
    clock = simulated(work)
    assert woken == [(0.25, 0.25), (3_600.0, 3_600.0), (86_400.0, 86_400.0)]
    assert clock.now == START + 86_400.0
    assert time.monotonic() - begun < 60


def test_loop_when_nothing_can_ever_happen_says_so() -> None:
    async def work(loop: Loop) -> None:
        with pytest.raises(asyncio.CancelledError):
            await loop.create_future()

    clock = Clock()
    loop = Loop(clock)
    task = loop.create_task(work(loop))
    with pytest.raises(RuntimeError, match="somebody still waits"):
        loop.run_until_complete(task)
    task.cancel()
    loop.run_until_complete(task)
    loop.close()


def test_connection_when_the_client_leaves_takes_nothing_more() -> None:
    heard: list[str] = []

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

        def connection_lost(self, exc: Exception | None) -> None:
            heard.append("server lost")
            self.transport.write(b"too late")

    class Peer:
        def heard(self, data: bytes) -> None:
            heard.append(data.decode())

        def lost(self) -> None:
            heard.append("client lost")

    async def work(loop: Loop) -> None:
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        connection = loop.connect(server.sockets[0].getsockname()[1], Peer())
        connection.send(b"hello")
        await asyncio.sleep(1)
        connection.leave()
        connection.send(b"hello?")
        await asyncio.sleep(1)

    simulated(work)
    assert heard == ["hello", "server lost"]


def test_install_when_the_proxy_is_there_already_changes_nothing() -> None:
    before = time.monotonic, time.time, random.Random
    with pytest.raises(RuntimeError, match="the clock must be there before"):
        install()
    assert (time.monotonic, time.time, random.Random) == before


# -- the trace


def test_trace_when_the_seed_is_the_same_is_the_same() -> None:
    assert generate(500, 7) == generate(500, 7)
    assert generate(500, 7).requests != generate(500, 8).requests


def test_trace_in_a_spike_has_ten_times_the_requests_around_it() -> None:
    trace = generate(COUNT, SEED)
    times = [request.at for request in trace.requests]
    assert len(times) == COUNT
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= trace.span
    inside = around = 0
    for begin, end in trace.spikes:
        inside += sum(begin <= at < end for at in times)
        around += sum(begin - SPIKE <= at < begin or end <= at < end + SPIKE for at in times)
    assert inside / (around / 2) == pytest.approx(10, rel=0.25)


def test_calm_when_a_spike_comes_leaves_out_what_it_leaves_behind() -> None:
    stretches = calm(generate(COUNT, SEED))
    assert all(end > begin for begin, end in stretches)
    assert stretches == sorted(stretches)
    for begin, end in generate(COUNT, SEED).spikes:
        assert not any(a < end + 60 and begin < b for a, b in stretches)


# -- the optimum


def test_optimum_is_the_least_of_all_ways_to_share_and_average_their_mean() -> None:
    rng = random.Random(3)
    for _ in range(200):
        costs = [(rng.uniform(0, 2), rng.uniform(0, 3)) for _ in range(6)]
        for at in rng.sample(range(6), rng.randrange(3)):
            costs[at] = rng.choice(((inf, costs[at][1]), (costs[at][0], inf)))
        burst = rng.randrange(7)
        ways = [
            (sum(way), sum(cost[at] for cost, at in zip(costs, way, strict=True)))
            for way in itertools.product((0, 1), repeat=6)
        ]
        possible = [(count, usd) for count, usd in ways if usd < inf]
        most = max(count for count, _ in possible)
        enough = [usd for count, usd in possible if count >= min(burst, most)]
        assert optimum(costs, burst) == pytest.approx(min(enough))
        forced = min(count for count, _ in possible)
        exactly = [usd for count, usd in possible if count == min(max(burst, forced), most)]
        assert average(costs, burst) == pytest.approx(sum(exactly) / len(exactly))


# -- the runs


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(COUNT, SEED)


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """The records of each run of docs/replay.md."""
    return dict(zip(report.RUNS, records(COUNT, SEED, *report.RUNS.values()), strict=True))


@pytest.fixture(scope="module")
def found(trace: Trace, runs: Mapping[str, Any]) -> dict[str, Figures]:
    return {name: figures(trace, run) for name, run in runs.items()}


def test_run_when_hashes_differ_is_the_same_to_the_last_digit() -> None:
    [one], [other] = (records(1_000, 5, {}, env={"PYTHONHASHSEED": seed}) for seed in ("1", "2"))
    assert one == other


def test_runs_end_each_request_exactly_once_for_its_client_and_in_the_log(
    trace: Trace, runs: Mapping[str, Any]
) -> None:
    for run in runs.values():
        assert sorted(got["id"] for got in run["clients"]) == [r.id for r in trace.requests]
        assert {got["ends"] for got in run["clients"]} == {1}
        lines = {line["id"]: line for line in run["exchanges"]}
        assert len(lines) == len(run["exchanges"]) == COUNT
        assert run["running"] == 0
        pairs = Counter((got["end"], lines[got["id"]]["end"]) for got in run["clients"])
        # A whole answer is `complete`, or an error that says so; a break is told as an error.
        assert set(pairs) <= {
            ("whole", "complete"),
            ("whole", "error"),
            ("broken", "error"),
            ("left", "client_closed"),
        }
        for got in run["clients"]:
            line = lines[got["id"]]
            assert (got["end"], got["status"]) != ("whole", 200) or line["end"] == "complete"
            assert got["end"] == "left" or got["status"] == line["status"]


def test_runs_have_the_attempts_and_the_money_that_the_backends_counted(
    runs: Mapping[str, Any],
) -> None:
    for run in runs.values():
        visits = {(visit["id"], visit["site"]): visit for visit in run["visits"]}
        attempts = {(a["id"], a["backend"]): a for a in run["attempts"] if a["sent"]}
        assert len(visits) == len(run["visits"])
        assert attempts.keys() == visits.keys()
        assert len(attempts) == sum(attempt["sent"] for attempt in run["attempts"])
        for key, visit in visits.items():
            assert attempts[key]["billed"] == pytest.approx(visit["billed"], abs=1e-9), key
            assert attempts[key]["usd"] == pytest.approx(visit["usd"], abs=1e-12), key
        assert not any(a["usd"] for a in run["attempts"] if not a["sent"])


def test_runs_have_the_tokens_of_every_answer_that_ended(
    trace: Trace, runs: Mapping[str, Any]
) -> None:
    requests = {request.id: request for request in trace.requests}
    for run in runs.values():
        good = [attempt for attempt in run["attempts"] if attempt["verdict"] == "good"]
        assert len(good) > 9_000
        for attempt in good:
            request = requests[attempt["id"]]
            assert attempt["tokens"] == [request.input, request.output]


def test_blend_when_both_pools_have_room_is_within_a_point_over_any_thousand(
    found: Mapping[str, Figures],
) -> None:
    least, most = found["default"].calm
    assert 1 - SHARE - 0.01 <= least <= most <= 1 - SHARE + 0.01


def test_bound_holds_the_average_price_of_the_whole(found: Mapping[str, Figures]) -> None:
    assert found["bound"].price <= report.BOUND


def test_adaptive_gate_finds_out_who_takes_less_than_was_said(found: Mapping[str, Figures]) -> None:
    busy = {name: each.shed.get("429 busy", 0) for name, each in found.items()}
    assert busy["adaptive"] <= busy["default"] / 10


def test_budget_is_passed_by_no_more_than_an_estimate_each(
    runs: Mapping[str, Any], found: Mapping[str, Figures]
) -> None:
    run = runs["budget"]
    pools = {row["name"]: row["pool"] for row in run["backends"]}
    burst = [attempt for attempt in run["attempts"] if pools[attempt["backend"]] == "burst"]
    hours = burst_hours(run)
    assert max(hours) > report.BUDGET * 0.95  # else nothing was held back
    assert found["default"].dearest_hour > 2 * report.BUDGET
    for hour, usd in enumerate(hours):
        begin, end = run["start"] + 3600 * hour, run["start"] + 3600 * (hour + 1)
        last = max((a["started"] for a in burst if begin <= a["started"] < end), default=end)
        held = [a for a in burst if a["started"] <= last < a["started"] + a["duration"]]
        assert usd <= report.BUDGET + sum(a["expected_usd"] for a in held)


def test_money_is_all_accounted_for_and_no_less_than_the_optimum(
    found: Mapping[str, Figures], runs: Mapping[str, Any]
) -> None:
    for name, each in found.items():
        spent = each.spent
        assert spent.total == pytest.approx(sum(a["usd"] for a in runs[name]["attempts"]))
        lines = (spent.optimum, spent.blind, spent.spill, spent.choice, spent.line)
        assert sum(lines) + spent.starts + spent.useless == pytest.approx(spent.total)
        assert spent.total > spent.optimum > 0
        # More may be answered by whom it costs nothing to wait: none of these can be a gain.
        assert min(spent.blind, spent.line, spent.starts, spent.useless) > -1e-9


def test_document_says_what_the_runs_say(trace: Trace, found: Mapping[str, Figures]) -> None:
    assert report.FILE.read_text() == report.render(trace, found), "make replay writes it anew"
