"""Budgets, limits and tenants through the whole proxy.

Until an answer was seen an attempt is expected to take 5 s: at 0.01 USD a second it holds 0.05.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from beacon_proxy.contracts import OTHER_POST, Outcome, Typical, Verdict

from .kit import (
    CHAT,
    LAST_CHUNK,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    SSE_HEAD,
    Answer,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    chat,
    chat_events,
    chunk,
    closed_port,
    each_request,
    eventually,
    header,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .test_budgets import Past
from .test_cases_upg import HANDSHAKE, SWITCH, switch
from .test_inference_route import ask as ask_inference
from .test_inference_route import read

pytestmark = pytest.mark.usefixtures("mid_window")

DOCS = Path(__file__).parent.parent / "docs" / "budgets.md"
GOOD = json_answer(CHAT.document)
ACME = "822b33ad87c148a0"  # printf %s acme | sha256sum | cut -c1-16
USD = 0.01  # a second
HELD = 5 * USD  # while no answer was seen
ROLE, *SAYS = chat_events("hello", 2)


def row(backend: RawBackend | str, **more: Any) -> dict[str, Any]:
    return {"url": backend, "price_per_second": USD, "max_in_flight": 200, **more}


def budget(usd: float, scope: str = "all", name: str = "daily", per: str = "day") -> dict[str, Any]:
    return {"name": name, "scope": scope, "per": per, "usd": usd}


def gated(go: asyncio.Event) -> Script:
    """Begin each stream at once, and end it when told to."""

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(SSE_HEAD + chunk(ROLE) + chunk(SAYS[0]))
            await go.wait()
            await conn.send(b"".join(map(chunk, SAYS[1:])) + LAST_CHUNK)

    return script


async def ask(p: Proxy, data: bytes | None = None, method: str = "POST") -> Answer:
    async with RawClient(p.port) as client:
        return await client.ask(chat() if data is None else data, method)


def gauge(p: Proxy, name: str, of: str = "daily") -> float:
    for each in p.app.budgets.gauges():
        if each.name == f"budget_{name}" and each.labels == (("budget", of),):
            return float(each.value)
    raise AssertionError(name)


def expect(p: Proxy, seconds: float, model: str = "m") -> None:
    """What came before took so long."""
    for candidate in p.app.fleet.candidates():
        candidate.live.typical[model] = Typical(billed=seconds)


class Later:
    """Makes it `seconds` later for the budgets."""

    def __init__(self, p: Proxy) -> None:
        self.seconds = 0.0
        p.app.budgets._clock = lambda: time.monotonic() + self.seconds


def refused(got: Answer, budget: str = "daily") -> bool:
    if got.status == 429:
        assert got.complete
        assert f"the budget '{budget}' has no room" in got.body.decode()
        assert int(got.header("retry-after")[0]) >= 1
    return got.status == 429


# -- what a client sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(CHAT.request(stream=False), id="openai"),
        pytest.param(CHAT.request(stream=True), id="openai stream"),
        pytest.param(RESPONSES.request(stream=True), id="responses"),
        pytest.param(MESSAGES.request(stream=True), id="anthropic"),
        pytest.param(OLLAMA_CHAT.request(stream=True), id="ollama"),
        pytest.param(OLLAMA_GENERATE.request(stream=False), id="ollama generate"),
        pytest.param(request("POST", "/tokenize", (), b"{}"), id="no dialect"),
    ],
)
async def test_429_when_a_budget_has_no_room_is_that_of_the_docs(data: bytes) -> None:
    async with RawBackend(GOOD) as b, proxy(row(b), budgets=[budget(0.01)]) as p:
        got = await ask(p, data)
        (line,) = await p.exchanges(1)
        assert b.requests == []
    assert refused(got)
    assert got.header("content-type") == [b"application/json"]
    assert 1 <= int(got.header("retry-after")[0]) <= 86400
    assert f"```json\n{got.body.decode()}\n```" in DOCS.read_text()
    assert (line["status"], line["reason"], line["cost_usd"]) == (429, "budget_exceeded", 0.0)
    assert line["level"] == "info"


async def test_inference_when_a_budget_has_no_room_tells_it_inside_its_200() -> None:
    async with RawBackend(GOOD) as b, proxy(row(b), budgets=[budget(0.01)]) as p:
        said = read(await ask_inference(p))
        streamed = await ask_inference(p, stream=True)
        (line, _) = await p.exchanges(2)
    assert said["error"] == "the budget 'daily' has no room for this request"
    assert said["error_code"] == "BUDGET_EXCEEDED"
    failure = said["failure"]
    assert (failure["transient"], failure["component"]) == (True, "router")
    assert 0 < failure["retry_after"] <= 86400
    (last,) = map(json.loads, streamed.body.splitlines())
    assert (last["done"], last["error_code"]) == (True, "BUDGET_EXCEEDED")
    assert line["reason"] == "budget_exceeded"


async def test_docs_when_they_show_a_configuration_it_is_a_valid_one() -> None:
    _, text = DOCS.read_text().split("```yaml\n", 1)
    shown = yaml.safe_load(text.split("```")[0])
    async with RawBackend(GOOD) as b, proxy(row(b), **shown) as p:
        told = [event["warning"] for event in p.events("config.ignored")]
        assert [line for line in told if "ledger" not in line] == []
        got = await ask(p)
        assert got.status == 429
        assert "limits.max_price_per_request" in got.body.decode()


# -- room ----------------------------------------------------------------------------------------


async def test_streams_when_a_hundred_ask_at_once_take_no_more_than_there_is() -> None:
    """Twenty fit. What they did cost is in the log, in the budget, and within it."""
    go = asyncio.Event()
    async with (
        RawBackend(gated(go)) as b,
        proxy(row(b), budgets=[budget(20 * HELD)]) as p,
        AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(RawClient(p.port)) for _ in range(100)]
        for client in clients:
            await client.send(chat(stream=True))
        heads = await asyncio.gather(*(client.head() for client in clients))
        assert sorted(head.status for head in heads) == [200] * 20 + [429] * 80
        assert len(b.requests) == p.in_flight() == 20
        assert gauge(p, "reserved_usd") == pytest.approx(20 * HELD)
        assert gauge(p, "used_ratio") == pytest.approx(1.0)
        waits = {header(head.headers, "retry-after")[0] for head in heads if head.status == 429}
        assert all(1 <= int(wait) <= 5 for wait in waits)  # only what runs is in the way
        go.set()
        pairs = zip(clients, heads, strict=True)
        answers = await asyncio.gather(*(c.body(head, "POST") for c, head in pairs))
        assert all(got.complete for got in answers)
        assert all(refused(got) for got in answers if got.status != 200)
        lines = await p.exchanges(100)
        assert p.app.budgets._running == {}
        assert gauge(p, "reserved_usd") == 0.0
        cost = sum(line["cost_usd"] for line in lines)
        assert gauge(p, "spent_usd") == pytest.approx(cost, abs=1e-6)
        assert 0 < cost <= 20 * HELD
        (told,) = p.events("budget.exhausted")
        assert (told["budget"], told["scope"], told["level"]) == ("daily", "all", "warning")
        assert 0 < told["begins_anew_s"] <= 86400
        assert (await ask(p, chat(stream=True))).status == 200  # there is room again


async def test_stream_when_it_runs_on_beyond_its_estimate_keeps_others_out() -> None:
    go = asyncio.Event()
    async with (
        RawBackend(gated(go)) as b,
        proxy(row(b), budgets=[budget(1.5 * HELD)]) as p,
        RawClient(p.port) as client,
    ):
        later = Later(p)
        expect(p, 1.0)  # fits several times over
        await client.send(chat(stream=True))
        head = await client.head()
        assert USD <= gauge(p, "reserved_usd") < HELD
        later.seconds = 6.0
        assert gauge(p, "reserved_usd") >= 6 * USD
        expect(p, 5.0)
        assert refused(await ask(p))
        go.set()
        assert (await client.body(head, "POST")).complete
        (_, line) = await p.exchanges(2)
        assert gauge(p, "spent_usd") == pytest.approx(line["cost_usd"], abs=1e-6)
        assert spent_is_logged(p)


async def test_stream_when_tokens_are_billed_holds_its_estimate_however_long_it_runs() -> None:
    go = asyncio.Event()
    async with (
        RawBackend(gated(go)) as b,
        proxy(
            {"url": b, "price_per_million_tokens": {"input": 1.0, "output": 2.0}},
            budgets=[budget(1.0)],
        ) as p,
        RawClient(p.port) as client,
    ):
        later = Later(p)
        await client.send(chat(stream=True))
        head = await client.head()
        later.seconds = 3600.0
        assert gauge(p, "reserved_usd") == pytest.approx(200e-6 + 2 * 200e-6)
        go.set()
        assert (await client.body(head, "POST")).complete
        await p.exchanges(1)
        assert 0 < gauge(p, "spent_usd") < 200e-6


async def test_budget_of_a_pool_when_it_is_spent_leaves_the_other_pool_to_ask() -> None:
    """The dear one is nearer, and would be asked first."""
    async with (
        RawBackend(GOOD) as dear,
        RawBackend(GOOD) as cheap,
        proxy(
            row(dear, pool="burst", region="eu-west"),
            row(cheap, pool="baseline", price_per_second=USD / 2),
            budgets=[budget(0.0, "pool:burst")],
        ) as p,
    ):
        near = ("X-Beacon-Region", "eu-west")
        got = await ask(p, chat(headers=[near]))
        assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
        required = [near, ("X-Beacon-Region-Mode", "require")]
        assert refused(await ask(p, chat(headers=required)))
        elsewhere = [("X-Beacon-Region", "asia-pacific"), ("X-Beacon-Region-Mode", "require")]
        assert (await ask(p, chat(headers=elsewhere))).status == 503  # money is not why
        assert dear.requests == []


async def test_budget_of_nothing_when_a_node_is_rented_lets_its_work_in() -> None:
    rented = {"provider": "golem", "price_model": "rented", "price_per_hour": 1.0}
    async with (
        RawBackend(GOOD) as own,
        RawBackend(GOOD) as dear,
        proxy({**rented, "url": own}, row(dear), budgets=[budget(0.0)]) as p,
    ):
        for _ in range(3):
            got = await ask(p)
            assert (got.status, got.header("x-beacon-backend")) == (200, [b"b0"])
        assert (gauge(p, "spent_usd"), gauge(p, "used_ratio")) == (0.0, 0.0)
        assert dear.requests == []


async def test_estimate_when_a_model_is_spelled_in_many_ways_is_one() -> None:
    """64 spellings, each asked for once and cheaply, fixed every later estimate."""
    name = "llama3.2:1b"
    spellings = {name[:n].upper() + name[n:].replace(":", sep) for n in range(11) for sep in ":-"}
    async with RawBackend(GOOD) as b, proxy(row(b, models=[name])) as p:
        for spelling in sorted(spellings):
            assert (await ask(p, chat(model=spelling))).status == 200
        (candidate,) = p.app.fleet.candidates()
        assert set(candidate.live.typical) == {"llama3.2-1b"}
        expect(p, 3.0, "llama3.2-1b")
        for limit, status in (("0.029", 429), ("0.031", 200)):
            limited = chat(model="LLAMA3.2-1b", headers=[("X-Beacon-Max-Price", limit)])
            assert (await ask(p, limited)).status == status


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(request("GET", "/v1/files"), id="list"),
        pytest.param(request("POST", "/api/show", (), b'{"model":"m"}'), id="names a model"),
    ],
)
async def test_budget_when_it_is_spent_lets_in_what_counts_no_tokens(data: bytes) -> None:
    """By the token it costs nothing, yet it was held to take what an answer takes."""
    counted = {**CHAT.document, "usage": {"prompt_tokens": 1000, "completion_tokens": 1000}}
    prices = {"input": 1.0, "output": 1.0}
    async with (
        RawBackend(json_answer(counted)) as b,
        proxy({"url": b, "price_per_million_tokens": prices}, budgets=[budget(0.002)]) as p,
    ):
        assert [(await ask(p)).status for _ in range(2)] == [200, 429]
        assert gauge(p, "spent_usd") == pytest.approx(0.002)
        assert [(await ask(p, data)).status for _ in range(2)] == [200, 200]
        assert gauge(p, "spent_usd") == pytest.approx(0.002)


OTHER_PATHS = ["/v1/audio/transcriptions", "//v1/chat/completions"]


@pytest.mark.parametrize("path", OTHER_PATHS)
async def test_budget_when_a_path_is_not_known_holds_what_such_answers_cost(path: str) -> None:
    """Their estimate never learnt: a hundred at once passed a budget by fifteen times."""
    go, asked = asyncio.Event(), 0

    async def script(conn: BackendConn) -> None:
        nonlocal asked
        async for _ in each_request(conn):
            asked += 1
            if asked > 1:
                await go.wait()
            counted = {"prompt_tokens": 200_000, "completion_tokens": 50_000}
            await conn.send(json_bytes({"text": "x", "usage": counted}))

    post = request("POST", path, [("Content-Type", "application/json")], b"{}")
    async with (
        RawBackend(script) as b,
        proxy(
            {"url": b, "price_per_million_tokens": {"input": 1, "output": 1}, "max_in_flight": 200},
            budgets=[budget(1.0)],
        ) as p,
    ):
        assert (await ask(p, post)).status == 200
        assert gauge(p, "spent_usd") == pytest.approx(0.25)
        all_at_once = [asyncio.create_task(ask(p, post)) for _ in range(20)]
        await p.exchanges(1 + 17)
        assert gauge(p, "reserved_usd") == pytest.approx(0.75)
        go.set()
        statuses = sorted([(await task).status for task in all_at_once])
        assert statuses == [200] * 3 + [429] * 17
        assert gauge(p, "spent_usd") == pytest.approx(1.0)
        # What they took says nothing of what runs no model, nor of inference.
        limited = [("X-Beacon-Max-Price", "0.001")]
        listed = await ask(p, request("GET", "/v1/files", limited), "GET")
        assert listed.status == 200
        live = p.app.fleet.candidates()[0].live
        assert (set(live.typical), live.usual) == ({OTHER_POST, None}, None)


@pytest.mark.parametrize("path", OTHER_PATHS)
async def test_limit_when_a_path_is_not_known_goes_by_what_such_answers_cost(path: str) -> None:
    """A cheap one was refused for ever, as if each answer were the first that nobody has seen."""
    post = request("POST", path, [("Content-Type", "application/json")], b"{}")
    async with (
        RawBackend(GOOD) as b,
        proxy(row(b), limits={"max_price_per_request": HELD / 2}) as p,
    ):
        later = Later(p)
        assert (await ask(p, post)).status == 429
        later.seconds = 400.0
        assert (await ask(p, post)).status == 200
        later.seconds = 0.0
        assert (await ask(p, post)).status == 200


async def test_estimate_of_a_model_when_its_prompts_are_counted_stays_that_of_its_answers() -> None:
    """Anthropic's clients count before they ask: a model looked as quick as its counting."""
    asked = b'{"model":"m"}'
    count = request("POST", "/v1/messages/count_tokens", (), asked)
    async with RawBackend(json_answer({"input_tokens": 9})) as b, proxy(row(b)) as p:
        expect(p, 3.0)
        for _ in range(20):
            assert (await ask(p, count)).status == 200
        (candidate,) = p.app.fleet.candidates()
        assert candidate.live.typical["m"] == Typical(billed=3.0)
        assert (set(candidate.live.typical), candidate.live.usual) == ({"m", None}, None)
        assert candidate.live.typical[None].billed < 3.0


async def test_limit_when_a_tunnel_was_dear_still_lets_in_what_is_not() -> None:
    """A list of models was expected to last as long as the WebSocket before it."""
    outcomes: list[Outcome] = []

    async def script(conn: BackendConn) -> None:
        request = await conn.request()
        if request.header("upgrade"):
            await conn.send(SWITCH)
            await asyncio.sleep(0.05)
            return  # it ends well: by the backend, once all is said
        await conn.send(json_bytes({"data": []}))

    async with (
        RawBackend(script) as b,
        proxy(row(b, price_per_second=100.0), outcomes=outcomes) as p,
    ):
        listed = request("GET", "/v1/files")
        assert (await ask(p, listed, "GET")).status == 200
        (candidate,) = p.app.fleet.candidates()
        before = replace(candidate.live.typical[None])
        async with RawClient(p.port) as client:
            await client.send(HANDSHAKE)
            assert (await client.response()).status == 101
            assert await client.closed(2)
        await p.exchanges(2)
        assert outcomes[-1].verdict is Verdict.GOOD
        assert outcomes[-1].usd > 4.0
        assert candidate.live.typical == {None: before}


async def test_exchange_when_it_waits_for_a_slot_until_the_money_is_gone_is_429() -> None:
    """What runs before it has cost more than was thought."""
    go = asyncio.Event()
    async with (
        RawBackend(gated(go)) as b,
        proxy(row(b, max_in_flight=1), budgets=[budget(2 * HELD)]) as p,
        RawClient(p.port) as first,
        RawClient(p.port) as second,
    ):
        later = Later(p)
        await first.send(chat(stream=True))
        head = await first.head()
        await second.send(chat(stream=True))
        await eventually(lambda: p.app.telemetry.metrics.queue_depth == 1)
        later.seconds = 9.0
        assert refused(await second.response("POST"))
        (line,) = await p.exchanges(1)
        assert (line["attempts"], line["queued_s"] > 0) == ([], True)
        assert p.app.telemetry.metrics.queue_depth == 0
        go.set()
        assert (await first.body(head, "POST")).complete


# -- retries -------------------------------------------------------------------------------------

CHEAPEST = ("X-Beacon-Cost-Priority", "true")


def broken(status: int) -> Script:
    return json_answer({"error": {"message": "broken"}}, status)


async def test_failover_when_the_next_one_is_over_the_budget_leaves_the_answer_there_is() -> None:
    async with (
        RawBackend(broken(500)) as cheap,
        RawBackend(GOOD) as dear,
        proxy(
            row(cheap, price_per_second=USD / 10),
            row(dear, pool="baseline"),
            budgets=[budget(HELD / 2)],
        ) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.json["error"]["message"]) == (500, "broken")
        assert got.header("x-beacon-attempts") == [b"1"]
        assert dear.requests == []


async def test_failover_when_the_next_one_is_over_the_budget_leaves_the_error_there_is() -> None:
    async with RawBackend(GOOD) as dear:
        with closed_port() as port:
            async with proxy(
                row(f"http://127.0.0.1:{port}", price_per_second=USD / 10),
                row(dear),
                budgets=[budget(HELD / 2)],
            ) as p:
                got = await ask(p, chat(headers=[CHEAPEST]))
                assert got.status == 502
                assert got.json["error"]["code"] == "upstream_error"
                assert dear.requests == []


async def test_failover_when_a_connection_was_refused_has_the_room_that_it_held() -> None:
    """What never ran cost nothing, so that the same money is there for the next."""
    async with RawBackend(GOOD) as b:
        with closed_port() as port:
            rows = (row(f"http://127.0.0.1:{port}", price_per_second=USD * 0.9), row(b))
            async with proxy(*rows, budgets=[budget(1.5 * HELD)]) as p:
                got = await ask(p, chat(headers=[CHEAPEST]))
                assert (got.status, got.header("x-beacon-attempts")) == (200, [b"2"])
                (line,) = await p.exchanges(1)
                assert gauge(p, "spent_usd") == pytest.approx(line["cost_usd"], abs=1e-8)


async def test_failover_when_the_first_attempt_was_dear_is_within_the_requests_own_limit() -> None:
    """What it cost counts: a second one of the same price would pass the limit."""

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.sleep(0.02)
            await conn.send(json_bytes({"error": "broken"}, 500))

    for limit, asked in ((2.0, 1), (2000.0, 2)):
        async with (
            RawBackend(slow) as one,
            RawBackend(slow) as other,
            proxy(
                row(one, price_per_second=100.0),
                row(other, price_per_second=100.0),
                limits={"max_price_per_request": limit},
            ) as p,
        ):
            expect(p, 0.015)  # 1.5 USD
            got = await ask(p)
            assert got.status == 500
            assert len(one.requests) + len(other.requests) == asked


async def test_limit_when_it_is_configured_holds_beside_the_header() -> None:
    async with (
        RawBackend(GOOD) as b,
        proxy(row(b), limits={"max_price_per_request": HELD / 2}) as p,
    ):
        for headers in ([], [("X-Beacon-Max-Price", "1")]):
            got = await ask(p, chat(headers=headers))
            assert (got.status, got.json["error"]["code"]) == (429, "rate_limited")
            assert "limits.max_price_per_request" in got.json["error"]["message"]
        got = await ask(p, chat(headers=[("X-Beacon-Max-Price", "0.001")]))
        assert "X-Beacon-Max-Price" in got.json["error"]["message"]
        assert b.requests == []
        assert p.events("budget.exhausted") == []


@pytest.mark.parametrize("end", ["answered", "left", "failed", "lost"])
async def test_limit_when_nothing_was_heard_for_long_tries_one_until_it_ends(end: str) -> None:
    """Of a hundred at once each was the one that is let in to find out."""
    go = asyncio.Event()

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await go.wait()
            if end == "lost":
                return
            await conn.send(json_bytes(CHAT.document, 500 if end == "failed" else 200))

    async with (
        RawBackend(script) as b,
        proxy(row(b), limits={"max_price_per_request": HELD / 2}) as p,
    ):
        for number in (1, 2, 3):
            expect(p, 5.0)
            p.app.fleet.candidates()[0].live.typical["m"].at = time.monotonic() - 1e6
            go.clear()
            async with RawClient(p.port) as client:
                await client.send(chat())
                await eventually(lambda n=number: len(b.requests) == n)
                assert [(await ask(p)).status for _ in range(5)] == [429] * 5
                if end == "left":
                    client.close()
                    await eventually(lambda: p.in_flight() == 0)
                go.set()
                if end != "left":
                    status = (await client.response("POST")).status
                    assert status == {"answered": 200, "failed": 500, "lost": 502}[end]
            assert len(b.requests) == number
            await eventually(lambda: p.in_flight() == 0)
            assert p.app.budgets._tried == {}


# -- what a request costs ------------------------------------------------------------------------


def spent_is_logged(p: Proxy) -> bool:
    cost = sum(line["cost_usd"] for line in p.events("exchange.done"))
    return gauge(p, "spent_usd") == pytest.approx(cost, abs=1e-8) and gauge(p, "reserved_usd") == 0


async def test_cost_when_an_attempt_failed_counts_it_and_not_the_wait_between() -> None:
    async def slow_fault(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.sleep(0.03)
            await conn.send(json_bytes({"error": "broken"}, 500, [("Retry-After", "0")]))

    async with (
        RawBackend(slow_fault) as bad,
        RawBackend(GOOD) as good,
        proxy(
            row(bad, price_per_second=1.0), row(good, price_per_second=2.0), budgets=[budget(99.0)]
        ) as p,
    ):
        assert (await ask(p, chat(headers=[CHEAPEST]))).status == 200
        (line,) = await p.exchanges(1)
        first, second = line["attempts"]
        most = first["duration_s"] + 2 * second["duration_s"]
        assert 0.028 <= line["cost_usd"] <= most + 0.03
        assert spent_is_logged(p)


def hang_up(client: RawClient) -> None:
    client.close()


def cut(client: RawClient) -> None:
    client.reset()


@pytest.mark.parametrize("leave", [hang_up, cut])
async def test_cost_when_the_client_leaves_is_what_ran(leave: Callable[[RawClient], None]) -> None:
    go = asyncio.Event()
    async with RawBackend(gated(go)) as b, proxy(row(b), budgets=[budget(HELD)]) as p:
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.head()
            assert gauge(p, "reserved_usd") == pytest.approx(HELD)
            leave(client)
            (line,) = await p.exchanges(1)
        assert line["end"] == "client_closed"
        assert line["cost_usd"] > 0
        assert spent_is_logged(p)


async def test_cost_when_it_is_a_tunnel_is_held_while_it_lasts_and_spent_after() -> None:
    async with RawBackend(switch()) as b, proxy(row(b), budgets=[budget(HELD)]) as p:
        async with RawClient(p.port) as client:
            await client.send(HANDSHAKE)
            assert (await client.response()).status == 101
            assert gauge(p, "reserved_usd") == pytest.approx(HELD)
            assert refused(await ask(p, HANDSHAKE, "GET"))
        await p.exchanges(2)
        assert gauge(p, "spent_usd") > 0
        assert spent_is_logged(p)


async def test_cost_when_the_path_is_not_known_is_held_and_spent_alike() -> None:
    async with (
        RawBackend(json_answer({"slots": []})) as b,
        proxy(row(b), budgets=[budget(HELD)]) as p,
    ):
        assert (await ask(p, request("GET", "/slots"), "GET")).status == 200
        await p.exchanges(1)
        assert gauge(p, "spent_usd") > 0
        assert spent_is_logged(p)


# -- tenants -------------------------------------------------------------------------------------

TENANT = {"tenant_header": "X-Tenant"}


def of(tenant: str | None) -> bytes:
    return chat(stream=True, headers=[] if tenant is None else [("X-Tenant", tenant)])


async def test_tenant_when_it_has_no_room_others_have_theirs() -> None:
    go = asyncio.Event()
    each = budget(HELD, "tenant", "each")
    async with (
        RawBackend(gated(go)) as b,
        proxy(row(b), budgets=[each], limits=TENANT) as p,
        AsyncExitStack() as stack,
    ):
        for tenant in ("acme", "rival", None):
            client = await stack.enter_async_context(RawClient(p.port))
            await client.send(of(tenant))
            assert (await client.head()).status == 200
            assert refused(await ask(p, of(tenant)), "each")
        (told,) = p.events("budget.exhausted")
        assert told["tenant"] == ACME
        go.set()


async def test_tenant_when_it_is_configured_is_hashed_wherever_it_is_told() -> None:
    """And passed on as it came: the backend may have a use for it."""
    limits = {**TENANT, "max_price_per_request": 0.06}
    async with RawBackend(GOOD) as b, proxy(row(b), limits=limits) as p:
        async with RawClient(p.port) as client:
            for name in ("acme", "acme", "other", None):
                fields = [] if name is None else [("X-Tenant", name)]
                assert (await client.ask(chat(headers=fields), "POST")).status == 200
        read(await ask_inference(p, None, ("X-Tenant", "acme")))
        lines = await p.exchanges(5)
        tenants = [line["tenant"] for line in lines]
        assert [tenants[0], tenants[1], tenants[3], tenants[4]] == [ACME, ACME, None, ACME]
        assert tenants[2] not in (ACME, None)
        assert len(tenants[2]) == 16
        assert "acme" not in repr(p.log)
        got = [received.header("x-tenant") for received in b.requests]
        assert got == [[b"acme"], [b"acme"], [b"other"], [], []]
        shown = await ask(p, request("GET", "/metrics", [("Accept", "text/plain")]), "GET")
        assert ACME not in shown.body.decode()


async def test_tenant_when_its_header_is_not_passed_on_is_known_all_the_same() -> None:
    """A client that hides it from the backend does not hide from its budget."""
    for name, beside in (("X-Tenant", [("Connection", "X-Tenant")]), ("X-Beacon-Team", [])):
        async with RawBackend(GOOD) as b, proxy(row(b), limits={"tenant_header": name}) as p:
            assert (await ask(p, chat(headers=[*beside, (name, "acme")]))).status == 200
            (line,) = await p.exchanges(1)
            assert line["tenant"] == ACME
            assert b.requests[0].header(name) == []


async def test_tenant_when_it_is_not_configured_is_in_no_line() -> None:
    async with RawBackend(GOOD) as b, proxy(row(b)) as p:
        assert (await ask(p, of("acme"))).status == 200
        (line,) = await p.exchanges(1)
        assert "tenant" not in line


# -- what an operator sees -----------------------------------------------------------------------


async def test_metrics_when_there_are_budgets_show_them_by_name() -> None:
    budgets = [budget(99.0), budget(0.0, "backend:b0", "none", "month")]
    async with (
        RawBackend(GOOD) as b,
        RawBackend(GOOD) as other,
        proxy(row(b), row(other), budgets=budgets) as p,
    ):
        assert (await ask(p)).header("x-beacon-backend") == [b"b1"]
        await p.exchanges(1)
        shown = await ask(p, request("GET", "/metrics", [("Accept", "text/plain")]), "GET")
    lines = dict(line.rsplit(" ", 1) for line in shown.body.decode().splitlines() if line[0] != "#")
    assert lines['beacon_budget_usd{budget="daily"}'] == "99.0"
    assert 0 < float(lines['beacon_budget_spent_usd{budget="daily"}']) < 1
    assert lines['beacon_budget_reserved_usd{budget="daily"}'] == "0.0"
    assert 0 < float(lines['beacon_budget_used_ratio{budget="daily"}']) < 0.1
    assert lines['beacon_budget_spent_usd{budget="none"}'] == "0.0"
    assert lines['beacon_budget_used_ratio{budget="none"}'] == "0.0"


async def test_metrics_when_a_budget_refuses_count_it_by_its_reason() -> None:
    async with RawBackend(GOOD) as b, proxy(row(b), budgets=[budget(0.0)]) as p:
        assert refused(await ask(p))
        shown = await ask(p, request("GET", "/metrics", [("Accept", "text/plain")]), "GET")
    text = shown.body.decode()
    assert 'beacon_exchanges_total{end="error",reason="budget_exceeded",status_class="4xx"}' in text
    assert 'beacon_budget_used_ratio{budget="daily"} 0.0' not in text


async def test_restored_spend_when_it_fills_a_budget_turns_requests_away() -> None:
    async with RawBackend(GOOD) as b, proxy(row(b), budgets=[budget(1.0)]) as p:
        assert (await ask(p)).status == 200
        (since,) = p.app.budgets.windows()
        p.app.budgets.restore(since, [Past("burst", "openai", "b0", "us-east", 1.0)])
        got = await ask(p)
        assert refused(got)
        left = since + 86_400 - time.time()
        assert abs(int(got.header("retry-after")[0]) - left) < 60
