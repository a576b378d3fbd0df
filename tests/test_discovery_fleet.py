"""Whatever sources say, and when: the fleet is what they last said, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Check, Live, Verdict
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.fleet.spelling import learn
from providers.openai import OpenAI

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    eventually,
    proxy,
    request,
)
from .test_properties import stage

TEXT = [("Accept", "text/plain")]
WHOLE = b"".join(chat_events("held", 2))


class Gate:
    """Backends stream their first event, and the rest once the gate opens."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def script(self, conn: BackendConn) -> None:
        while await conn.request() is not None:
            first, *rest = chat_events("held", 2)
            await conn.send(SSE_HEAD + chunk(first))
            await self.open.wait()
            await conn.send(b"".join(map(chunk, rest)) + LAST_CHUNK)


async def ask(p: Proxy) -> Any:
    async with RawClient(p.port) as client:
        return await client.ask(chat(stream=True), "POST")


rows = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=3).map(
    lambda found: dict(found)
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("says"), st.integers(0, 1), rows),
        st.tuples(st.just("fails"), st.integers(0, 1), st.sampled_from(["half", "gone", "object"])),
        st.tuples(st.just("ask"), st.just(0), st.just(None)),
        st.tuples(st.just("end"), st.just(0), st.just(None)),
    ),
    max_size=14,
)


def test_fleet_when_sources_answer_and_fail_in_any_order_is_their_last_good_answers() -> None:
    chain = [{"capacity": {"slow_start": 0}}, "cost", "failover"]
    with stage() as on, tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{n}.json") for n in range(2)]
        gate = Gate()
        backends = [on.enter(RawBackend(gate.script)) for _ in range(3)]
        sources = [{"provider": "openai", "file": str(each), "interval": 3600} for each in files]
        p: Proxy = on.enter(proxy(middleware=chain, discovery=sources))

        async def play(script: list[Any]) -> None:
            said: list[dict[str, int]] = [{}, {}]
            for n in range(2):
                await tell(n, "[]")
            running = []
            for what, n, content in script:
                if what == "says":
                    said[n] = content
                    listed = [{"name": k, "url": backends[v].url} for k, v in content.items()]
                    await tell(n, json.dumps(listed))
                elif what == "fails":
                    await tell(n, {"half": '[{"name', "gone": None, "object": "{}"}[content])
                elif what == "ask":
                    expected = 200 if fleet() else 503
                    busy = in_flight()
                    running.append((asyncio.create_task(ask(p), name="ask"), expected))
                    await eventually(
                        lambda busy=busy, expected=expected, task=running[-1][0]: (
                            task.done() if expected == 503 else in_flight() == busy + 1
                        )
                    )
                else:
                    await let_go()
                merged = {**said[1], **said[0]}  # of two with one name the first source's stands
                assert fleet() == {k: backends[v].url for k, v in merged.items()}
                assert all(live.in_flight for _, live in p.app.fleet.leaving)
            await let_go()
            for task, expected in running:
                answer = await task
                assert (answer.status, answer.complete) == (expected, True)
                assert expected == 503 or answer.body == WHOLE
            assert p.app.fleet.leaving == []
            chained = p.app.pipeline._chain.admits[0].__self__
            assert chained._in_flight == {}, "a permit leaked"
            assert set(p.app._pool._idle) <= set(fleet())
            async with RawClient(p.port) as client:
                told = [await client.ask(request("GET", "/metrics", TEXT)) for _ in range(2)]
            for name in set("abc") - set(fleet()):
                assert f'backend="{name}"'.encode() not in told[1].body

        async def let_go() -> None:
            gate.open.set()
            await eventually(lambda: in_flight() == 0)
            gate.open.clear()

        async def tell(n: int, content: str | None) -> None:
            if content is None:
                files[n].unlink(missing_ok=True)
            else:
                files[n].write_text(content)
            await p.app._refresher.look(p.app._refresher.sources[n])

        def fleet() -> dict[str, str]:
            return {c.backend.name: c.backend.url for c in p.app.fleet.candidates()}

        def in_flight() -> int:
            everyone = [*p.app.fleet.candidates(), *p.app.fleet.draining()]
            return sum(each.live.in_flight for each in everyone)

        @settings(max_examples=80, deadline=None, database=None, derandomize=True)
        @given(steps)
        @example([("says", 0, {"a": 0}), ("ask", 0, None), ("says", 0, {}), ("end", 0, None)])
        @example([("says", 0, {"a": 0}), ("ask", 0, None), ("says", 0, {"a": 1}), ("ask", 0, None)])
        def holds(script: list[Any]) -> None:
            on.run(play(script))

        holds()


# The fleet alone


def backend(name: str, **more: Any) -> Backend:
    port = more.pop("port", 1)
    row = Backend(name, "openai", f"http://h:{port}", "http", "h", port)
    return replace(row, **more)


class Told:
    """A fleet and what it tells."""

    def __init__(self, *configured: Backend) -> None:
        self.now = 1000.0
        self.left: list[str] = []
        self.forgotten: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.fleet = Fleet(configured, {}, clock=lambda: self.now, notify=self._note)
        self.fleet.on_left = lambda b: self.left.append(b.name)
        self.fleet.on_forgotten = lambda b: self.forgotten.append(b.name)

    def _note(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    def live(self, name: str) -> Live:
        return next(c.live for c in self.fleet.candidates() if c.backend.name == name)

    def names(self) -> list[str]:
        return [c.backend.name for c in self.fleet.candidates()]


def test_follow_when_rows_come_in_another_order_keeps_every_place() -> None:
    told = Told(backend("own"))
    told.fleet.follow([backend("a"), backend("b"), backend("c")])
    told.fleet.follow([backend("c"), backend("d"), backend("a"), backend("b")])
    assert told.names() == ["own", "a", "b", "c", "d"]
    told.fleet.follow([backend("d"), backend("b")])
    assert told.names() == ["own", "b", "d"]
    assert told.forgotten == ["a", "c"]
    assert [event for event, _ in told.events].count("backend.joined") == 4


def test_follow_when_nothing_changed_wakes_nobody_and_tells_nothing() -> None:
    told = Told()
    told.fleet.follow([backend("a", joined=5.0)])
    rows, count = told.fleet.candidates(), len(told.events)
    told.fleet.follow([backend("a", joined=9.0)])
    (again,) = told.fleet.candidates()
    assert (again.backend, again.live) == (rows[0].backend, rows[0].live)
    assert again.backend.joined == 5.0
    assert (len(told.events), told.left) == (count, [])


def test_follow_when_a_newcomer_has_peers_it_is_picked_as_often_as_they_were() -> None:
    """From zero it would win every tie for as long as the others have been there."""
    told = Told(backend("own"))
    told.fleet.follow([backend("a"), backend("far", region="eu")])
    told.live("own").picked, told.live("a").picked, told.live("far").picked = 700, 600, 3
    told.fleet.follow([backend("a"), backend("far", region="eu"), backend("new", joined=1000.0)])
    assert told.live("new").picked == 600
    told.fleet.follow([backend("dear", price_per_second=1.0)])
    assert told.live("dear").picked == 0


def test_follow_when_the_way_to_trust_changes_keeps_what_was_learnt_but_no_connection() -> None:
    told = Told()
    told.fleet.follow([backend("a", scheme="https")])
    before = told.live("a")
    told.fleet.follow([backend("a", scheme="https", tls_verify=False)])
    assert told.live("a") is before
    assert told.left == ["a"]
    assert not told.fleet.keeps(backend("a", scheme="https"))
    assert told.fleet.keeps(backend("a", scheme="https", tls_verify=False))


def test_follow_when_a_kind_was_found_out_it_stays_until_the_row_says_another() -> None:
    told = Told()
    told.fleet.follow([backend("a", kind="auto")])
    told.fleet.found_kind(told.live("a"), "ollama")
    told.fleet.follow([backend("a", kind="auto", price_per_second=1.0)])
    (candidate,) = told.fleet.candidates()
    assert (candidate.backend.kind, candidate.backend.price_per_second) == ("ollama", 1.0)
    told.fleet.follow([backend("a", kind="openai")])
    assert told.fleet.candidates()[0].backend.kind == "openai"


def test_follow_when_aliases_change_the_names_that_clients_may_use_do() -> None:
    told = Told()
    told.fleet.follow([backend("a", aliases=(("small", "qwen"),))])
    live = told.live("a")
    learn(told.fleet.candidates()[0].backend, live, Check(Verdict.GOOD, models=("qwen",)))
    live.check = Check(Verdict.GOOD, models=("qwen",))
    assert (live.names["small"], live.models) == ("qwen", {"qwen", "small"})
    told.fleet.follow([backend("a", aliases=(("tiny", "qwen"),))])
    assert (live.names["tiny"], "small" in live.names) == ("qwen", False)
    assert live.models == {"qwen", "tiny"}
    told.fleet.follow([backend("a", model_names=("llama",), models=frozenset({"llama"}))])
    assert told.live("a") is live
    assert live.model_names == ("llama",)


def test_follow_when_the_last_check_failed_what_it_had_listed_holds_under_new_aliases() -> None:
    told = Told()
    told.fleet.follow([backend("a", model_names=("QWEN",), models=frozenset({"qwen"}))])
    live = told.live("a")
    learn(told.fleet.candidates()[0].backend, live, Check(Verdict.GOOD, models=("qwen", "x")))
    live.check = Check(Verdict.STRIKE)
    learn(told.fleet.candidates()[0].backend, live, live.check)
    told.fleet.follow([backend("a", aliases=(("tiny", "qwen"),))])
    assert told.live("a") is live
    assert live.model_names == ("qwen", "x")
    assert (live.names["tiny"], live.models) == ("qwen", {"qwen", "x", "tiny"})
    assert told.fleet.serving("tiny", ())


def test_follow_when_a_row_stops_listing_models_its_names_go() -> None:
    told = Told()
    told.fleet.follow([backend("a", model_names=("qwen",), models=frozenset({"qwen"}))])
    live = told.live("a")
    assert live.model_names == ("qwen",)
    told.fleet.follow([backend("a")])
    assert told.live("a") is live
    assert (live.model_names, live.names, live.models) == ((), {}, None)


def test_follow_when_a_backend_comes_back_with_other_names_they_are_those_of_its_row() -> None:
    told = Told()
    told.fleet.follow([backend("a", model_names=("qwen",), models=frozenset({"qwen"}))])
    live = told.live("a")
    live.in_flight = 1
    told.fleet.follow([])
    told.fleet.follow([backend("a", model_names=("llama",), aliases=(("tiny", "llama"),))])
    assert told.live("a") is live
    assert (live.model_names, live.names["tiny"]) == (("llama",), "llama")


def test_follow_when_a_rent_is_over_the_same_answer_does_not_begin_it_again() -> None:
    unix = [100.0]
    told = Told()
    told.fleet._unix = lambda: unix[0]
    rented = backend("a", price_model="rented", idle_price_per_second=0.1, rented_until_unix=200.0)
    told.fleet.follow([rented])
    assert told.fleet.candidates()[0].backend.price_per_second == 0.0
    unix[0] = 200.0
    assert told.fleet.candidates()[0].backend.price_per_second == 0.1
    told.fleet.follow([rented])
    assert told.fleet.candidates()[0].backend.price_per_second == 0.1
    told.fleet.follow([replace(rented, rented_until_unix=300.0)])
    assert told.fleet.candidates()[0].backend.price_per_second == 0.0, "its agreement goes on"


def test_follow_when_limits_come_and_go_with_the_rows_the_fleet_knows() -> None:
    told = Told()
    assert not told.fleet.has_totals
    limited = backend("a")
    told.fleet.follow([replace(limited, timeouts=replace(limited.timeouts, total=5.0))])
    assert told.fleet.has_totals
    told.fleet.follow([limited])
    assert not told.fleet.has_totals


def test_follow_when_a_name_goes_to_another_server_twice_forgets_it_only_at_the_end() -> None:
    told = Told()
    lives = []
    for port in (1, 2, 3):
        told.fleet.follow([backend("a", port=port)])
        lives.append(told.live("a"))
        lives[-1].in_flight = 1
    assert [c.backend.port for c in told.fleet.draining()] == [1, 2]
    told.fleet.follow([])
    for live in lives:
        assert told.forgotten == []
        live.in_flight = 0
        told.fleet.sweep()
    assert told.forgotten == ["a"]


async def test_changed_when_the_fleet_moves_wakes_whoever_saw_it_before() -> None:
    told = Told()
    waiting = asyncio.create_task(told.fleet.changed(0), name="waiting")
    await asyncio.sleep(0)
    assert not waiting.done()
    told.fleet.follow([backend("a")])
    assert await waiting == 1
    told.fleet.follow([backend("a", price_per_second=1.0)])  # other facts, nobody new
    told.fleet.follow([])
    assert await told.fleet.changed(1) == 2


@pytest.mark.parametrize("unasked", [0, 1])
def test_knows_when_a_source_has_not_answered_yet_cannot_say_no(unasked: int) -> None:
    told = Told(backend("own", models=frozenset({"m"})))
    told.fleet.unasked = unasked
    assert told.fleet.knows("m")
    assert told.fleet.knows("other") == bool(unasked)


async def test_check_when_its_row_is_revised_meanwhile_learns_for_the_row_as_it_is() -> None:
    gate = asyncio.Event()

    class Waiting(OpenAI):
        async def check(self, backend: Backend, session: Any) -> Check:
            await gate.wait()
            return Check(Verdict.GOOD, models=("real",))

    fleet = Fleet([], {"openai": Waiting()})
    fleet.follow([backend("a")])
    (candidate,) = fleet.candidates()
    checking = asyncio.create_task(fleet.check(candidate, 5.0), name="check")
    await asyncio.sleep(0)
    fleet.follow([backend("a", aliases=(("nick", "real"),))])
    gate.set()
    await checking
    assert [c.backend.name for c in fleet.serving("nick", ())] == ["a"]
    await fleet.close()
