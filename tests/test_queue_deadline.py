"""Who can no longer be answered in time leaves at once, and no GPU works for it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    OTHER_POST,
    Candidate,
    Candidates,
    Exchange,
    Fault,
    Live,
    Outcome,
    Stage,
    Timeouts,
    Typical,
    Verdict,
    Warmth,
)
from beacon_proxy.errors import Overloaded, UpstreamError
from beacon_proxy.routing import queue as queue_module
from beacon_proxy.routing.chooser import Choice, Run
from beacon_proxy.routing.hopeless import hopeful, needed, note_risk
from beacon_proxy.spending.estimates import Estimates
from middleware.capacity import Capacity

from .kit import BackendConn, RawBackend, RawClient, chat, each_request, proxy
from .kit_scripts import json_bytes
from .test_chooser import Scene, backend, exchange, release

GOOD = {"object": "chat.completion", "choices": [{"message": {"content": "whole"}}]}
NEVER = 1e6


def asked(left: float | None, **more: Any) -> Exchange:
    """An inference with so many seconds left."""
    deadline = None if left is None else monotonic() + left
    return exchange(**{"model": "m", "work": "m", "inference": True, "deadline": deadline, **more})


def taught(scene: Scene, quickest: float, *, risked: bool = True, name: str | None = None) -> None:
    """Have every backend, or one, know what its quickest answers of the model `m` took."""
    for each in scene.fleet.candidates():
        if name in (None, each.backend.name):
            when = monotonic() if risked else -inf
            each.live.typical["m"] = Typical(quickest=quickest, risked=when)


def ended(seconds: float, **more: Any) -> Outcome:
    return replace(
        Outcome(backend(), 1, Verdict.GOOD, Stage.DONE, duration=seconds, billed=seconds), **more
    )


def scene(*more: Any, **options: Any) -> Scene:
    rows = more or (backend(max_in_flight=1),)
    return Scene(*rows, chain=(Capacity(**{"queue_timeout": NEVER, **options}),))


# -- what the quickest took


def test_quickest_when_one_answer_was_seen_claims_an_eighth_of_it() -> None:
    live = Live()
    Estimates().note(live, "m", ended(8.0))
    assert live.typical["m"].quickest == pytest.approx(1.0, rel=0.02)


def test_quickest_when_a_start_was_part_of_it_counts_the_rest() -> None:
    live, estimates = Live(), Estimates()
    for _ in range(2000):
        estimates.note(live, "m", ended(12.0, cold_start=10.0))
    assert live.typical["m"].quickest == pytest.approx(2.0)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), slow=st.floats(2.0, 300.0))
def test_quickest_when_one_in_300_takes_1_s_never_demands_more(seed: int, slow: float) -> None:
    """Half of the quickest is demanded: who takes 1 s, and has no more, must pass."""
    rng, live, estimates = random.Random(seed), Live(), Estimates()
    estimates.note(live, "m", ended(slow))
    refused = seen = 0
    for _ in range(6000):
        seconds = slow * rng.uniform(0.5, 2.0)
        if rng.random() < 1 / 300:
            seconds = min(seconds, 1.0)
            refused += seen and needed(live, asked(None), 0.0) > 1.0
            seen += 1
        estimates.note(live, "m", ended(seconds))
    assert (refused, seen > 5) == (0, True)


def served(short: Exchange, candidate: Candidate, now: float) -> bool:
    """Whether it is asked at once; it begins."""
    if not hopeful(short, [candidate], now, totals=False):
        return False
    note_risk(short, candidate, now)
    return True


@pytest.mark.parametrize(
    ("others", "most"),
    [
        pytest.param(False, 0.0, id="alone"),
        pytest.param(True, 0.02, id="beside hopeless ones, which take the one in 10 s"),
    ],
)
def test_short_ones_when_they_are_one_in_a_thousand_are_hardly_ever_refused(
    others: bool, most: float
) -> None:
    """They take 1 s and have 4 s; the rest take a minute, 100 of them a second.

    What docs/capacity.md says of them is counted here.
    """
    rng, live, estimates = random.Random(1), Live(), Estimates()
    candidate, now, refused, asked_for = Candidate(backend(), live), 0.0, 0, 0
    while asked_for < 120:
        now += rng.expovariate(100.0)
        if others and rng.random() < 0.01:
            served(asked(None, started=now, deadline=now + 0.05), candidate, now)
        if rng.random() >= 0.001:
            estimates.note(live, "m", ended(60.0 * rng.uniform(0.5, 2.0)))
            continue
        asked_for += 1
        if served(asked(None, started=now, deadline=now + 4.0), candidate, now):
            estimates.note(live, "m", ended(1.0))
        else:
            refused += 1
    assert refused <= most * asked_for


def test_needed_is_half_of_the_quickest_of_that_model_and_nothing_where_none_is_known() -> None:
    live = Live(
        typical={"m": Typical(quickest=4.0), "": Typical(quickest=9.0), None: Typical(quickest=9.0)}
    )
    assert needed(live, asked(1.0), 0.0) == 2.0
    assert needed(live, asked(1.0, work="other"), 0.0) == 0.0
    live.typical[OTHER_POST] = Typical(quickest=4.0)
    assert needed(live, asked(1.0, work=OTHER_POST), 0.0) == 0.0
    assert needed(live, asked(1.0, work=""), 0.0) == 0.0
    assert needed(live, asked(1.0, work=None), 0.0) == 0.0, "a list of models takes no GPU"


@pytest.mark.parametrize(
    ("warmth", "starts", "expected"),
    [
        (Warmth.COLD, (30.0, 20.0, 40.0), 12.0),
        (Warmth.COLD, (30.0, 20.0), 2.0),
        (Warmth.WARMING, (30.0, 20.0, 40.0), 2.0),
        (Warmth.UNKNOWN, (30.0, 20.0, 40.0), 2.0),
    ],
)
def test_needed_counts_the_quickest_start_of_a_backend_that_is_told_to_be_cold(
    warmth: Warmth, starts: tuple[float, ...], expected: float
) -> None:
    live = Live(typical={"m": Typical(quickest=4.0)})
    live.learn_warmth(warmth, until=100.0)
    for seconds in starts:
        live.cold_starts.note(seconds)
    assert needed(live, asked(1.0), 50.0) == expected
    assert needed(live, asked(1.0), 100.0) == 2.0, "it is believed no more"


# -- at the choice


def test_try_now_when_too_little_is_left_asks_nobody() -> None:
    s = scene()
    taught(s, 10.0)
    with pytest.raises(UpstreamError) as error:
        s.chooser.try_now(asked(4.9), "m", ())
    assert (error.value.status, error.value.fault) == (504, Fault.DEADLINE)
    assert (error.value.stage, error.value.sent) == (Stage.QUEUE, False)
    assert s.chooser.try_now(asked(5.5), "m", ()) is not None


def test_try_now_when_nothing_is_known_lets_everybody_try() -> None:
    s = scene(backend(max_in_flight=9))
    assert s.chooser.try_now(asked(0.001), "m", ()) is not None
    taught(s, 10.0)
    assert s.chooser.try_now(asked(None), "m", ()) is not None
    assert s.chooser.try_now(asked(0.5, inference=False, work=None), "m", ()) is not None


def test_try_now_when_one_is_too_slow_asks_the_other() -> None:
    s = scene(backend("slow"), backend("quick"))
    taught(s, 60.0, name="slow")
    choice = s.chooser.try_now(asked(5.0), "m", ())
    assert choice is not None
    assert choice.candidate.backend.name == "quick"


def test_try_now_counts_the_total_time_of_a_backend_as_its_deadline() -> None:
    s = scene(backend(timeouts=Timeouts(total=30.0)))
    taught(s, 100.0)
    with pytest.raises(UpstreamError, match="too little time"):
        s.chooser.try_now(asked(None), "m", ())


def test_try_now_learns_from_good_answers_what_is_hopeless() -> None:
    s = scene(backend(max_in_flight=9))
    (candidate,) = s.fleet.candidates()
    refused = []
    for number in range(11_000):
        for typical in candidate.live.typical.values():
            typical.risked = monotonic()
        try:
            choice = s.chooser.try_now(asked(3.0), "m", ())
        except UpstreamError:
            refused.append(number)
        else:
            assert choice is not None
            release(choice.permits)
        s.fleet.note(asked(None), ended(8.0), candidate.live)
    assert refused == list(range(refused[0], 11_000)), "once it is known it stays known"
    assert 8000 < refused[0] < 10_000, "8 s are believed after some thousand answers"
    assert s.chooser.try_now(asked(4.5), "m", ()) is not None


def test_hopeful_risks_one_in_ten_seconds_so_that_it_can_be_proven_wrong() -> None:
    """A kind of request that was never let through could never be seen to be quick."""
    s = scene()
    taught(s, 10.0, risked=False)
    now, tried = monotonic(), []
    for tenths in range(250):
        at = now + tenths / 10
        late = asked(4.0, deadline=at + 4.0)
        tried += [at] * served(late, s.fleet.candidates()[0], at)
    assert [round(at - now) for at in tried] == [0, 10, 20]


def test_try_now_when_there_is_no_room_has_not_risked_anything() -> None:
    s = scene()
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 10.0, risked=False)
    assert s.chooser.try_now(asked(4.0), "m", ()) is None
    release(first.permits)
    assert s.chooser.try_now(asked(4.0), "m", ()) is not None
    with pytest.raises(UpstreamError, match="too little time"):
        s.chooser.try_now(asked(4.0), "m", ())


def test_try_now_when_the_first_that_may_be_risked_is_full_risks_the_next() -> None:
    s = scene(backend("a", max_in_flight=1), backend("b", max_in_flight=1))
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 10.0, risked=False)
    choice = s.chooser.try_now(asked(4.0), "m", ())
    assert choice is not None
    assert {each.candidate.backend.name for each in (first, choice)} == {"a", "b"}
    assert first.candidate.live.typical["m"].risked == -inf


# -- in the queue


@pytest.fixture
def _no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "RECHECK", NEVER)


def waits(s: Scene, exchange: Exchange, name: str = "waiter") -> asyncio.Task[Choice]:
    waiting = s.chooser.choose(exchange, "m", (), Run(), patient=True)
    return asyncio.create_task(waiting, name=name)


@pytest.mark.usefixtures("_no_recheck")
async def test_queue_when_a_deadline_becomes_hopeless_lets_it_go_before_the_deadline() -> None:
    s = scene()
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 19.8)
    began = monotonic()
    with pytest.raises(UpstreamError, match="too little time"):
        await waits(s, asked(10.0))
    assert 0.05 < monotonic() - began < 5.0, "10 s are left, 9.9 are needed"
    assert (len(s.queue), s.queue.owed) == (0, 0)
    release(first.permits)


@pytest.mark.usefixtures("_no_recheck")
async def test_queue_when_one_is_risked_lets_it_wait_for_room_and_no_other() -> None:
    """On a backend that is always full nobody would ever be, else."""
    s = scene()
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 10.0, risked=False)
    (candidate,) = s.fleet.candidates()
    gone = waits(s, asked(4.0), "gone")
    await asyncio.sleep(0)
    assert len(s.queue) == 1
    with pytest.raises(UpstreamError, match="too little time"):
        await waits(s, asked(4.0))
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert candidate.live.typical["m"].risked == -inf, "it was never tried"
    risked = waits(s, asked(4.0), "risked")
    await asyncio.sleep(0.05)
    assert len(s.queue) == 1
    release(first.permits)
    s.queue.released("b")
    choice = await asyncio.wait_for(risked, 2)
    assert monotonic() - candidate.live.typical["m"].risked < 2
    release(choice.permits)


@pytest.mark.usefixtures("_no_recheck")
async def test_queue_when_one_is_risked_and_gets_no_room_ends_at_its_deadline() -> None:
    s = scene()
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 10.0, risked=False)
    plans = 0
    plan = s.chooser.plan

    def counted(*args: Any) -> Candidates:
        nonlocal plans
        plans += 1
        return plan(*args)

    s.chooser.plan = counted  # type: ignore[method-assign]
    with pytest.raises(UpstreamError, match="the deadline ran out"):
        await waits(s, asked(0.1))
    assert plans < 100, "it sleeps"
    release(first.permits)


@pytest.mark.usefixtures("_no_recheck")
async def test_queue_when_who_is_woken_is_hopeless_by_then_gives_the_slot_to_the_next() -> None:
    s = scene()
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    hurried, patient = waits(s, asked(3.0), "hurried"), waits(s, asked(None), "patient")
    await asyncio.sleep(0)
    assert len(s.queue) == 2
    taught(s, 10.0)
    release(first.permits)
    s.queue.released("b")
    choice = await asyncio.wait_for(patient, 2)
    with pytest.raises(UpstreamError):
        await hurried
    assert (len(s.queue), s.queue.owed) == (0, 0)
    release(choice.permits)


async def test_queue_when_many_wait_ahead_refuses_nobody_for_a_guess() -> None:
    """How long those ahead will take is not known; only what a backend needs at least is."""
    s = scene(max_queue=50)
    first = s.chooser.try_now(asked(None), "m", ())
    assert first is not None
    taught(s, 2.0)
    crowd = [waits(s, asked(60.0)) for _ in range(50)]
    await asyncio.sleep(0)
    assert len(s.queue) == 50
    with pytest.raises(Overloaded):
        await waits(s, asked(60.0))
    for each in crowd:
        each.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    assert len(s.queue) == 0
    release(first.permits)


# -- through the proxy


async def whole(conn: BackendConn) -> None:
    async for _ in each_request(conn):
        await conn.send(json_bytes(GOOD))


@pytest.mark.parametrize("path", ["verbatim", "translated"])
async def test_proxy_when_the_deadline_is_hopeless_answers_504_and_asks_no_backend(
    path: str,
) -> None:
    async with RawBackend(whole) as server, proxy(server) as p:
        (candidate,) = p.app.fleet.candidates()
        candidate.live.typical["m"] = Typical(quickest=1000.0, risked=monotonic())
        limit = [("X-Beacon-Timeout", "20")]
        async with RawClient(p.port) as client:
            if path == "verbatim":
                got = await client.ask(chat(headers=limit))
                assert (got.status, got.json["error"]["code"]) == (504, "upstream_timeout")
            else:
                body = b'{"model": "m", "prompt": "hi"}'
                head = b"POST /inference HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                rest = b"X-Beacon-Timeout: 20\r\nContent-Length: %d\r\n\r\n" % len(body)
                got = await client.ask(head + rest + body)
                assert (got.status, got.json["success"]) == (200, False)
            assert server.requests == []
            assert (await client.ask(chat())).status == 200
        lines = await p.exchanges(2)
        assert lines[0]["attempts"] == []
        assert candidate.live.success == 1.0, "no fault of the backend"


# -- quickly


@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.floats(0.0, 20.0),  # quickest
            st.sampled_from([Warmth.WARM, Warmth.COLD, Warmth.UNKNOWN]),
        ),
        min_size=1,
        max_size=4,
    ),
    left=st.floats(-1.0, 20.0),
)
def test_hopeful_told_quickly_is_as_told_at_length(
    rows: list[tuple[float | None, Warmth]], left: float
) -> None:
    s = scene(*(backend(f"b{n}") for n in range(len(rows))))
    candidates = s.fleet.candidates()
    for candidate, (quickest, warmth) in zip(candidates, rows, strict=True):
        candidate.live.learn_warmth(warmth, until=inf)
        for seconds in (9.0, 8.0, 7.0):
            candidate.live.cold_starts.note(seconds)
        if quickest is not None:
            candidate.live.typical["m"] = Typical(quickest=quickest, risked=100.0)
    hurried = asked(None, deadline=100.0 + left)
    shortly = hopeful(hurried, candidates, 100.0, totals=False)
    assert list(shortly) == list(hopeful(hurried, candidates, 100.0, totals=True))
