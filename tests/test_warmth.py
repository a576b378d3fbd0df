"""Warmth: what is learnt of cold starts from real traffic, and what is done with it."""

from __future__ import annotations

import asyncio
import json
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Check,
    ColdStarts,
    Exchange,
    Fault,
    Live,
    Outcome,
    Stage,
    Timeouts,
    Verdict,
    Warmth,
)
from beacon_proxy.fleet.fleet import Fleet
from middleware.cost import Cost

from .kit import (
    LAST_CHUNK,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    chunk,
    each_request,
    eventually,
    json_bytes,
    proxy,
    request,
)

ANSWER = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
WHERE: dict[str, Any] = {
    "url": "http://127.0.0.1:1",
    "scheme": "http",
    "host": "127.0.0.1",
    "port": 1,
}


def backend(name: str, **fields: Any) -> Backend:
    return Backend(name=name, provider="openai", **{**WHERE, **fields})


def exchange(cost_priority: bool | None = None) -> Exchange:
    return Exchange("x", "POST", b"/", "/", (), 0.0, cost_priority=cost_priority)


def good(of: Backend, **fields: Any) -> Outcome:
    return Outcome(of, 1, Verdict.GOOD, Stage.DONE, sent=True, **{"duration": 1.0, **fields})


class Clocked:
    """A fleet of one backend on a clock of its own."""

    def __init__(self, **fields: Any) -> None:
        self.now = 1000.0
        self.told: list[str] = []
        self.backend = backend("b", **fields)
        self.fleet = Fleet(
            [self.backend], {}, clock=lambda: self.now, notify=lambda e, /, **_: self.told.append(e)
        )
        (candidate,) = self.fleet.candidates()
        self.live = candidate.live

    def note(self, outcome: Outcome) -> None:
        self.fleet.note(exchange(), outcome, self.live)


def test_warmth_when_nothing_is_known_is_unknown() -> None:
    assert Live().warmth_at(0.0) is Warmth.UNKNOWN


def test_warmth_when_it_answered_is_warm_until_its_family_lets_go() -> None:
    scene = Clocked(stays_warm=60.0)
    scene.note(good(scene.backend))
    assert scene.live.warmth_at(1059.0) is Warmth.WARM
    assert scene.live.warmth_at(1061.0) is Warmth.COLD
    for_good = Clocked()
    for_good.note(good(for_good.backend))
    assert for_good.live.warmth_at(1e9) is Warmth.WARM


def test_warmth_when_it_said_that_it_is_loading_is_warming_for_a_while() -> None:
    scene = Clocked()
    scene.note(Outcome(scene.backend, 1, Verdict.BUSY, Stage.HEAD, Fault.LOADING, 503))
    assert scene.live.warmth_at(1001.0) is Warmth.WARMING
    assert scene.live.success == 1.0
    assert scene.live.warmth_at(5000.0) is Warmth.UNKNOWN
    scene.note(good(scene.backend))
    assert scene.live.warmth_at(scene.now) is Warmth.WARM


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=200), st.floats(0, 1))
def test_cold_starts_when_asked_give_one_that_was_seen_of_the_last_sixty_four(
    seconds: list[float], q: float
) -> None:
    starts = ColdStarts()
    for each in seconds:
        starts.note(each)
    assert len(starts) == min(len(seconds), 64)
    value = starts.quantile(q)
    assert value in seconds[-64:]
    below, last = starts.quantile(0.0), starts.quantile(1.0)
    assert below == min(seconds[-64:])
    assert last == max(seconds[-64:])


def test_cold_starts_when_none_was_seen_are_not_known() -> None:
    assert ColdStarts().quantile(0.5) is None


def test_latency_when_a_start_came_before_it_is_that_of_the_answer_alone() -> None:
    scene = Clocked()
    scene.note(good(scene.backend, ttft=41.0, cold_start=40.0))
    assert scene.live.latency == pytest.approx(1.0)
    assert scene.live.cold_starts.quantile(0.5) == 40.0
    assert scene.told == ["backend.started"]
    scene.note(good(scene.backend, ttft=0.5, cold_start=0.5))  # by our own clock: all of it
    assert scene.live.latency == pytest.approx(1.0)
    assert scene.told == ["backend.started"]  # half a second is no news


@pytest.mark.parametrize("priority", [None, True, False])
def test_ranking_when_one_of_two_equals_is_cold_the_warm_one_comes_first(
    priority: bool | None,
) -> None:
    cost = Cost(clock=lambda: 100.0)
    cold, warm = (
        Candidate(backend(name, price_per_second=0.1), Live(latency=1.0, picked=1))
        for name in ("cold", "warm")
    )
    cold.distance, warm.distance = 0, 1  # a far warm one beats a near one that must start
    cold.live.learn_warmth(Warmth.COLD, inf)
    warm.live.learn_warmth(Warmth.WARM, 200.0)
    warm.live.last_used = cold.live.last_used = 100.0
    ranked = cost.select(exchange(priority), [cold, warm])
    assert [c.backend.name for c in ranked] == ["warm", "cold"]
    warm.live.learn_warmth(Warmth.WARM, 50.0)  # it let go 50 s ago
    ranked = cost.select(exchange(priority), [cold, warm])
    assert [c.backend.name for c in ranked] == ["cold", "warm"]


def test_ranking_when_the_cold_one_is_cheaper_price_still_goes_first() -> None:
    cost = Cost(clock=lambda: 100.0)
    cheap = Candidate(backend("cheap", price_per_second=0.1), Live())
    dear = Candidate(backend("dear", price_per_second=0.2), Live())
    cheap.live.learn_warmth(Warmth.COLD, inf)
    ranked = cost.select(exchange(True), [dear, cheap])
    assert [c.backend.name for c in ranked] == ["cheap", "dear"]


def test_ranking_by_latency_when_a_cold_one_was_never_tried_it_is_not_started_for_that() -> None:
    cost = Cost(clock=lambda: 100.0)
    cold, known = Candidate(backend("cold"), Live()), Candidate(backend("known"), Live())
    cold.live.learn_warmth(Warmth.COLD, inf)
    known.live.latency, known.live.picked, known.live.last_used = 2.0, 5, 100.0
    ranked = cost.select(exchange(False), [cold, known])
    assert [c.backend.name for c in ranked] == ["known", "cold"]


def test_limits_when_cold_are_longer_and_never_shorter() -> None:
    limits = Timeouts(first_content=120, document=600, cold_start=300).while_cold()
    assert (limits.first_content, limits.document) == (300, 600)
    unlimited = Timeouts(first_content=0, document=0, cold_start=300).while_cold()
    assert (unlimited.first_content, unlimited.document) == (0, 0)
    assert Timeouts().while_cold() == Timeouts()


async def test_limits_when_it_is_not_known_to_be_warm_the_cold_one_holds_then_the_usual() -> None:
    """The same wait is fine for a first answer and a strike for a later one."""

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.sleep(0.5)
            await conn.send(json_bytes(ANSWER))

    async with RawBackend(slow) as server:
        row = {"url": server.url, "timeouts": {"document": 0.25, "cold_start": 5}}
        async with proxy(row) as p, RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 200
            assert (await client.ask(chat())).status == 504


async def test_cold_start_when_ollama_tells_of_its_load_is_counted_streamed_or_not() -> None:
    last = {"response": "", "done": True, "load_duration": 2_500_000_000, "eval_count": 1}
    whole = {**last, "response": "hi"}

    async def script(conn: BackendConn) -> None:
        async for got in each_request(conn):
            if got.json["stream"]:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                lines = [{"response": "hi", "done": False}, last]
                body = b"".join(chunk(json.dumps(each).encode() + b"\n") for each in lines)
                await conn.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + body + LAST_CHUNK)
            else:
                await conn.send(json_bytes(whole))

    async with RawBackend(script) as server, proxy(server) as p, RawClient(p.port) as client:
        for stream in (True, False):
            body = json.dumps({"model": "m", "prompt": "x", "stream": stream}).encode()
            got = await client.ask(request("POST", "/api/generate", body=body))
            assert got.status == 200
        done = await p.exchanges(2)
        told = (await client.ask(request("GET", "/providers"))).json["providers"][0]
        accept = [("Accept", "text/plain")]
        text = (await client.ask(request("GET", "/metrics", accept))).body.decode()
    assert 'beacon_cold_start_seconds_count{backend="b0"} 2.0' in text
    assert [each["attempts"][0]["cold_start_s"] for each in done] == [2.5, 2.5]
    assert told["warmth"] == "warm"
    assert told["cold_start_p50"] == 2.5


async def test_loading_when_another_is_warm_is_neither_an_answer_nor_a_strike() -> None:
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}

    async def cold(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(json_bytes(loading, 503))

    async def warm(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(json_bytes(ANSWER))

    async with (
        RawBackend(cold) as one,
        RawBackend(warm) as two,
        proxy(one, two) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            got = await client.ask(chat())
            assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
        first = p.app.fleet.candidates()[0].live
        assert (first.success, first.ejected_until) == (1.0, 0.0)
        assert first.warmth_at(p.app.fleet.now()) is Warmth.WARMING
        told = (await client.ask(request("GET", "/providers"))).json["providers"]
        assert [each["warmth"] for each in told] == ["warming", "warm"]


async def test_check_when_it_tells_warmth_and_capacity_providers_show_them() -> None:
    from beacon_proxy.contracts import Capacity
    from providers.openai import OpenAI

    class Telling(OpenAI):
        async def check(self, backend: Backend, session: Any) -> Check:
            capacity = Capacity(running=0, idle=2, queued=1)
            return Check(Verdict.GOOD, warmth=Warmth.COLD, capacity=capacity, hot=("A:1b",))

    row = {"provider": "telling", "url": "http://127.0.0.1:9"}
    async with proxy(row, providers={"telling": Telling}) as p, RawClient(p.port) as client:
        (candidate,) = p.app.fleet.candidates()
        await p.app.fleet.check(candidate, 1.0)
        assert candidate.live.hot == {"a-1b"}
        told = (await client.ask(request("GET", "/providers"))).json["providers"][0]
        accept = [("Accept", "text/plain")]
        text = (await client.ask(request("GET", "/metrics", accept))).body.decode()
    assert 'beacon_backend_warmth{backend="b0",warmth="cold"} 1.0' in text
    assert 'beacon_backend_warmth{backend="b0",warmth="warm"} 0.0' in text
    assert 'beacon_backend_capacity{backend="b0",what="idle"} 2.0' in text
    assert told["warmth"] == "cold"
    assert told["capacity"] == {"running": 0, "idle": 2, "queued": 1}


@pytest.mark.parametrize("warmth", [Warmth.COLD, Warmth.WARMING])
def test_ranking_when_what_was_learnt_is_believed_no_more_it_ranks_as_before(
    warmth: Warmth,
) -> None:
    """Once told to be starting it ranked last for ever, though it was shown as unknown."""
    live = Live()
    live.learn_warmth(warmth, 600.0)
    assert live.cold_at(599.0)
    assert not live.cold_at(601.0)
    cost = Cost(clock=lambda: 601.0)
    one, other = Candidate(backend("one"), live), Candidate(backend("other"), Live(picked=1))
    ranked = cost.select(exchange(True), [other, one])
    assert [c.backend.name for c in ranked] == ["one", "other"]


async def test_check_when_a_server_that_was_loading_lists_its_models_it_starts_no_more() -> None:
    from providers.openai import OpenAI

    class Plain(OpenAI):
        async def check(self, backend: Backend, session: Any) -> Check:
            return Check(Verdict.GOOD, models=("m",))

    row = {"provider": "plain", "url": "http://127.0.0.1:9"}
    async with proxy(row, providers={"plain": Plain}, middleware=["capacity"]) as p:
        (candidate,) = p.app.fleet.candidates()
        candidate.live.learn_warmth(Warmth.WARMING, inf)
        await p.app.fleet.check(candidate, 1.0)
        assert candidate.live.warmth is Warmth.UNKNOWN


async def test_check_when_a_plugin_answers_nonsense_the_probes_go_on_and_keys_stay_secret() -> None:
    from providers.openai import OpenAI

    class Odd(OpenAI):
        async def check(self, backend: Backend, session: Any) -> Check:
            if backend.name == "b0":
                return Check(Verdict.GOOD, models=(5,))  # type: ignore[arg-type]
            raise RuntimeError(f"refused: {backend.api_key}")

    rows = [
        {"provider": "odd", "url": "http://127.0.0.1:9", "api_key": "sk-secret-1"},
        {"provider": "odd", "url": "http://127.0.0.1:9", "api_key": "sk-secret-2"},
    ]
    async with proxy(*rows, providers={"odd": Odd}) as p, RawClient(p.port) as client:
        await eventually(lambda: len(p.events("check.failed")) == 2)
        told = (await client.ask(request("GET", "/providers"))).json["providers"]
        assert p.events("probes.stopped") == []
        said = [each["error"].partition(" at ")[0] for each in p.events("check.failed")]
        assert sorted(said) == ["RuntimeError", "TypeError"]
        assert "sk-secret" not in json.dumps([told, p.log], default=str)


async def test_exchange_when_a_plugins_facts_are_none_the_client_is_not_left_hanging() -> None:
    """What comes after the answer raised, and the next request of the connection never began."""
    from dataclasses import replace

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(json_bytes(ANSWER))

    async with RawBackend(script) as server, proxy(server, middleware=["capacity"]) as p:
        row, live = p.app.fleet.rows[0]
        p.app.fleet.rows[0] = (replace(row, price_per_second=None), live)
        async with RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 500
            assert (await client.ask(chat())).status == 500
        assert p.events("server.failed")
