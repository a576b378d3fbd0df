"""What a second costs: by the request, or by the hour whether busy or idle."""

from __future__ import annotations

from datetime import UTC, datetime
from math import inf
from typing import Any

import pytest

from beacon_proxy.config import resolve_backends
from beacon_proxy.contracts import Backend, Candidate, Exchange, Live, Outcome, Stage, Verdict
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.spending.bill import price_of
from middleware.cost import Blend, Cost

from .config_fakes import FAKES, load, problems
from .kit import CHAT, RawBackend, RawClient, json_answer, proxy
from .test_inference_route import SAID, ask, read

NOON = "2026-12-01T12:00:00Z"
NOON_UNIX = datetime(2026, 12, 1, 12, tzinfo=UTC).timestamp()
RATES = "rates: {GLM: 0.25}"


def made(row: str, more: str = "") -> Backend:
    text = f"backends: [{{name: a, provider: cloud, url: 'http://h:1', {row}}}]\n{more}"
    (backend,) = resolve_backends(load(text), FAKES)
    return backend


def refused(row: str, more: str = "") -> list[str]:
    found = problems(f"backends: [{{name: a, provider: cloud, url: 'http://h:1', {row}}}]\n{more}")
    return [line.removeprefix("backends[0].") for line in found]


# -- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "more", "busy", "idle"),
    [
        ("price_per_second: 0.5", "", 0.5, 0.0),
        ("price_model: serverless", "", 0.25, 0.0),  # the provider's default
        ("price_model: rented, price_per_hour: 7.2", "", 0.0, 0.002),
        ("price_model: rented, price_per_hour: 0", "", 0.0, 0.0),  # one's own machine
        ("price_model: rented, price_glm_per_hour: 2", RATES, 0.0, 2 * 0.25 / 3600),
        ("price_model: rented, price_per_second: 0.001", "", 0.0, 0.001),
    ],
)
def test_price_when_it_is_resolved_is_usd_per_second(
    row: str, more: str, busy: float, idle: float
) -> None:
    backend = made(row, more)
    assert backend.price_per_second == pytest.approx(busy)
    assert backend.idle_price_per_second == pytest.approx(idle)
    assert backend.price_model == ("rented" if "rented" in row else "serverless")
    assert backend.rented_until_unix == inf
    assert (
        load(f"backends: [{{name: a, provider: cloud, url: 'http://h', {row}}}]\n{more}").warnings
        == []
    )


@pytest.mark.parametrize(
    "given",
    [
        f"'{NOON}'",
        "'2026-12-01T13:00:00+01:00'",
        "'2026-12-01 12:00+00:00'",
        f"{NOON_UNIX:.0f}",
        f"'{NOON_UNIX:.1f}'",  # as a ${VARIABLE} puts it in
    ],
)
def test_rented_until_when_it_is_a_time_is_that_moment(given: str) -> None:
    backend = made(f"price_model: rented, price_per_hour: 1, rented_until: {given}")
    assert backend.rented_until_unix == NOON_UNIX


@pytest.mark.parametrize(
    "given",
    [
        "'2026-12-01T12:00:00'",  # whose noon?
        "'2026-12-01'",
        "20261201",
        f"{NOON_UNIX * 1000:.0f}",  # ms
        "soon",
        "true",
        ".nan",
        "''",
        "-1",
        "[1]",
    ],
)
def test_rented_until_when_it_could_be_misread_is_refused(given: str) -> None:
    (line,) = refused(f"price_model: rented, price_per_hour: 1, rented_until: {given}")
    assert line.startswith("rented_until: must be a time with its zone, as 2026-12-01T12:00:00Z")


@pytest.mark.parametrize(
    ("row", "more", "lines"),
    [
        (
            "price_model: rented, price_glm_per_hour: 1",
            "rates: {EUR: 1.1}",
            ["price_glm_per_hour: needs rates: {GLM: USD per GLM}"],
        ),
        (
            "price_model: rented",
            "",
            ["price_model: rented needs price_per_hour or price_glm_per_hour"],
        ),
        (
            "price_model: rented, price_per_hour: 1, price_glm_per_hour: 1, price_per_second: 1",
            RATES,
            [
                "price_glm_per_hour: must not stand beside price_per_hour: a rent has one price",
                "price_per_second: must not stand beside price_per_hour: a rent has one price",
            ],
        ),
        (
            "price_model: rented, price_per_hour: 1,"
            " price_per_million_tokens: {input: 1, output: 1}",
            "",
            ["price_per_million_tokens: a rented backend bills hours, not tokens"],
        ),
        (
            "price_per_second: 0.01, price_per_million_tokens: {input: 1, output: 1}",
            "",
            ["price_per_second: must not stand beside price_per_million_tokens: tokens are billed"],
        ),
    ],
)
def test_price_when_it_contradicts_itself_says_where(row: str, more: str, lines: list[str]) -> None:
    assert refused(row, more) == lines


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("price_per_hour", "1", ""),
        ("price_glm_per_hour", "1", RATES),
        ("rented_until", f"'{NOON}'", ""),
    ],
)
def test_price_when_a_rent_is_given_for_a_serverless_one_warns(
    key: str, value: str, more: str
) -> None:
    text = f"backends: [{{name: a, provider: cloud, url: 'http://h:1', {key}: {value}}}]\n{more}"
    settings = load(text)
    assert settings.warnings == [f"backends[0].{key}: has no effect without price_model: rented"]


# -- the end of an agreement ---------------------------------------------------------------------


def fact(name: str, **fields: Any) -> Backend:
    return Backend(
        name=name, provider="p", url="", scheme="http", host="127.0.0.1", port=1, **fields
    )


def rented(name: str = "rented", until: float = inf, rent: float = 0.001) -> Backend:
    return fact(
        name,
        pool="baseline",
        price_model="rented",
        idle_price_per_second=rent,
        rented_until_unix=until,
    )


def test_agreement_when_it_ends_the_next_plan_sees_the_rent_as_the_price() -> None:
    """And each at its own end, once, told to the operator; the live state stays."""
    now, told = [99.0], []

    def notify(event: str, /, **fields: Any) -> None:
        told.append((event, fields))

    rows = [rented("first", 100.0), rented("second", 200.0), fact("other", price_per_second=0.5)]
    fleet = Fleet(rows, {}, unix=lambda: now[0], notify=notify)

    def prices() -> list[tuple[float, float]]:
        return [
            (c.backend.price_per_second, c.backend.idle_price_per_second)
            for c in fleet.serving(None, ())
        ]

    before = fleet.candidates()[0].live
    assert prices() == [(0.0, 0.001), (0.0, 0.001), (0.5, 0.0)]
    now[0] = 100.0
    assert prices() == [(0.001, 0.0), (0.0, 0.001), (0.5, 0.0)]
    now[0] = 500.0
    assert [c.backend.price_per_second for c in fleet.candidates()] == [0.001, 0.001, 0.5]
    now[0] = 600.0
    assert prices()[0] == (0.001, 0.0)
    assert fleet.candidates()[0].live is before
    assert told == [
        ("backend.rent_ended", {"backend": "first"}),
        ("backend.rent_ended", {"backend": "second"}),
    ]


def test_agreement_when_none_ends_no_clock_is_read() -> None:
    def unix() -> float:
        raise AssertionError("read for a fleet without an end of rent")

    fleet = Fleet([rented(), fact("other")], {}, unix=unix)
    assert len(fleet.serving(None, ())) == len(fleet.candidates()) == 2


# -- who is asked first --------------------------------------------------------------------------

GOLEM = fact("golem", price_per_second=0.0001, pool="baseline")
RUNPOD = fact("runpod", price_per_second=0.00025, pool="burst")
MODAL = fact("modal", price_per_second=0.0003, pool="burst")


def exchange(cost: bool | None = None) -> Exchange:
    return Exchange("x", "POST", b"/", "/", (), 0.0, cost_priority=cost)


def order(cost: Cost, backends: list[Backend], priority: bool | None) -> list[str]:
    candidates = [Candidate(backend, Live()) for backend in backends]
    return [c.backend.name for c in cost.select(exchange(priority), candidates)]


def test_cost_order_when_one_is_rented_asks_it_before_golem_runpod_and_modal() -> None:
    fleet = [MODAL, RUNPOD, GOLEM, rented()]
    assert order(Cost(), fleet, True) == ["rented", "golem", "runpod", "modal"]
    over = rented(rent=0.00028).unrented()
    assert order(Cost(), [MODAL, RUNPOD, over, GOLEM], True) == [
        "golem",
        "runpod",
        "rented",
        "modal",
    ]


def test_cost_order_when_two_are_rented_asks_the_idle_one_first() -> None:
    busy, idle = Candidate(rented("busy"), Live()), Candidate(rented("idle"), Live())
    busy.live.in_flight = 1
    ranked = Cost().select(exchange(True), [busy, idle])
    assert [c.backend.name for c in ranked] == ["idle", "busy"]


def test_latency_order_when_one_is_rented_does_not_look_at_money() -> None:
    slow, quick = (
        Candidate(rented(), Live(latency=2.0, picked=1)),
        Candidate(MODAL, Live(latency=0.1, picked=1)),
    )
    ranked = Cost(default="latency").select(exchange(), [slow, quick])
    assert [c.backend.name for c in ranked] == ["modal", "rented"]


@pytest.mark.parametrize(("by", "share"), [("requests", 0.7), ("seconds", 0.7), ("cost", 1.0)])
def test_blend_when_baseline_is_rented_splits_what_it_is_told_to(by: Any, share: float) -> None:
    """By cost a rented pool takes all: whatever it serves, it adds nothing to its part."""
    cost = Cost(blend=Blend(by=by))
    served = dict.fromkeys(("rented", "modal"), 0)
    for _ in range(1000):
        asked = exchange()
        first = cost.select(asked, [Candidate(MODAL, Live()), Candidate(rented(), Live())])[0]
        permit = cost.admit(asked, first.backend)
        assert permit is not None
        served[first.backend.name] += 1
        permit.release()
        cost.observe(
            asked,
            Outcome(
                first.backend, 1, Verdict.GOOD, Stage.DONE, sent=True, duration=1.0, billed=1.0
            ),
        )
    assert served["rented"] / 1000 == pytest.approx(share, abs=0.01)


def test_average_price_when_rented_ones_served_counts_what_was_paid_for_the_work() -> None:
    cost = Cost(max_blended_price=0.0002)
    for backend in (rented(), MODAL):
        usd = price_of(backend, 10.0, None)
        done = Outcome(
            backend, 1, Verdict.GOOD, Stage.DONE, sent=True, duration=10.0, billed=10.0, usd=usd
        )
        cost.observe(exchange(), done)
    assert cost.blended_price() == pytest.approx(0.00015, rel=0.01)


# -- through the whole proxy ---------------------------------------------------------------------

RENT = {"provider": "golem", "price_model": "rented"}


async def test_rented_when_it_answers_the_estimate_is_nothing_and_providers_tell_the_rent() -> None:
    row = {**RENT, "price_glm_per_hour": 2.0, "rented_until": "2099-01-01T00:00:00Z"}
    async with (
        RawBackend(json_answer(SAID)) as b,
        proxy({**row, "url": b}, b, rates={"GLM": 0.25}) as p,
    ):
        said = read(await ask(p))
        async with RawClient(p.port) as client:
            shown = (await client.ask(b"GET /providers HTTP/1.1\r\nHost: h\r\n\r\n")).json
            ranges = (await client.ask(METRICS)).json
        (line,) = p.events("exchange.done")
    golem, other = shown["providers"]
    assert (said["provider_used"], said["cost_estimate"]) == ("b0", 0.0)
    assert line["attempts"][0]["backend"] == "b0"
    assert (golem["price_model"], golem["cost_per_second"]) == ("rented", 0.0)
    assert golem["idle_cost_per_second"] == pytest.approx(2 * 0.25 / 3600)
    assert golem["rented_until"] == datetime(2099, 1, 1, tzinfo=UTC).timestamp()
    assert (other["price_model"], other["idle_cost_per_second"]) == ("serverless", 0.0)
    assert other["rented_until"] is None
    assert ranges["cost_range"] == {"min": 0.0, "max": 0.0}


METRICS = b"GET /metrics HTTP/1.1\r\nHost: h\r\nAccept: application/json\r\n\r\n"


async def test_rented_when_its_agreement_is_over_costs_its_rent_without_a_restart() -> None:
    row = {**RENT, "price_per_hour": 360.0, "rented_until": "2020-01-01T00:00:00+00:00"}
    async with RawBackend(json_answer(SAID)) as b, proxy({**row, "url": b}) as p:
        said = read(await ask(p))
        async with RawClient(p.port) as client:
            shown = (await client.ask(b"GET /providers HTTP/1.1\r\nHost: h\r\n\r\n")).json
            ranges = (await client.ask(METRICS)).json
        assert [e["backend"] for e in p.events("backend.rent_ended")] == ["b0"]
    (golem,) = shown["providers"]
    assert 0 < said["cost_estimate"] <= said["inference_time"] * 0.1
    assert (golem["price_model"], golem["idle_cost_per_second"]) == ("rented", 0.0)
    assert golem["cost_per_second"] == pytest.approx(0.1)
    assert ranges["cost_range"]["max"] == pytest.approx(0.1)


async def test_max_price_when_only_a_rented_one_is_within_it_asks_that_one() -> None:
    """Its work costs nothing more; once its agreement is over it is as dear as the other."""
    limit = ("X-Beacon-Max-Price", "0.000001")
    dear = {"price_per_second": 1.0}
    for until, wanted in (("2099-01-01T00:00:00Z", 200), ("2020-01-01T00:00:00Z", 429)):
        row = {**RENT, "price_per_hour": 3600.0, "rented_until": until}
        async with (
            RawBackend(json_answer(CHAT.document)) as b,
            proxy({**dear, "url": b}, {**row, "url": b}) as p,
            RawClient(p.port) as client,
        ):
            got = await client.ask(CHAT.request(stream=False, headers=[limit]), "POST")
        assert got.status == wanted
        if wanted == 200:
            assert got.header("x-beacon-backend") == [b"b1"]


async def test_metrics_when_requests_were_split_show_the_blend_and_the_price() -> None:
    chain = ["health", "region", {"cost": {"max_blended_price": 1.0}}, "capacity", "failover"]
    async with (
        RawBackend(json_answer(CHAT.document)) as b,
        proxy(
            {"url": b, "pool": "baseline", "price_per_second": 0.25},
            {"url": b, "pool": "burst", "price_per_second": 0.25},
            middleware=chain,
        ) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(100):
            await client.ask(CHAT.request(stream=False), "POST")
        asked = b"GET /metrics HTTP/1.1\r\nHost: h\r\nAccept: text/plain\r\n\r\n"
        text = (await client.ask(asked)).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("beacon_blend")]
    figures = {name: float(value) for name, value in (line.split() for line in lines)}
    assert figures['beacon_blend_share{pool="baseline"}'] == pytest.approx(0.7, abs=0.01)
    assert figures['beacon_blend_share{pool="burst"}'] == pytest.approx(0.3, abs=0.01)
    assert figures['beacon_blend_target_share{pool="baseline"}'] == 0.7
    assert figures['beacon_blend_served_total{pool="baseline"}'] == pytest.approx(70, abs=1)
    assert figures["beacon_blend_decided_total"] == 100
    assert figures['beacon_blend_debt{pool="burst"}'] == 0.0
    assert figures["beacon_blended_price_usd_per_second"] == pytest.approx(0.25)
    assert figures["beacon_blended_price_deficit_usd"] < 0.0
