"""How many workers are wanted, and who is told: the rule, and its loop over a fleet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Candidate, Live, Workers
from beacon_proxy.errors import ConfigError
from beacon_proxy.scaling.plan import Bounds, Plan
from beacon_proxy.scaling.scaler import Scaler

from .config_fakes import load, problems
from .kit import eventually
from .kit_proxy import plugins

BOUNDS = Bounds(min=1, max=5, per_worker=4, target=0.5, cooldown=60.0, scale_down_after=300.0)


@pytest.mark.parametrize(
    ("demand", "workers"), [(0, 1), (1, 1), (2, 1), (3, 2), (8, 4), (10, 5), (1000, 5)]
)
def test_wanted_keeps_each_worker_at_its_target_within_the_bounds(
    demand: int, workers: int
) -> None:
    assert BOUNDS.wanted(demand) == workers


def test_plan_when_demand_rises_tells_at_once_and_again_only_after_the_cooldown() -> None:
    plan = Plan(BOUNDS, started=0.0)
    assert plan.look(4, 0.0) == 2
    plan.tried(0.0, 2)
    assert plan.look(8, 59.0) is None
    assert plan.look(8, 60.0) == 4


def test_plan_when_demand_falls_waits_for_the_most_of_the_window() -> None:
    plan = Plan(BOUNDS, started=0.0)
    plan.look(8, 0.0)
    plan.tried(0.0, 4)
    assert plan.look(4, 100.0) is None
    assert plan.look(0, 299.0) is None
    assert plan.look(0, 300.0) == 2  # the look at 100 s still wants two
    plan.tried(300.0, 2)
    assert plan.look(0, 401.0) == 1


def test_plan_when_it_has_just_started_takes_nothing_away() -> None:
    """What the provider keeps is not known: another process may have raised it for good reason."""
    plan = Plan(BOUNDS, started=0.0)
    assert plan.look(0, 0.0) is None
    assert plan.look(0, 299.0) is None
    assert plan.look(0, 300.0) == 1


def test_plan_when_the_provider_says_no_is_not_told_and_waits_for_the_cooldown() -> None:
    plan = Plan(BOUNDS, started=0.0)
    assert plan.look(8, 0.0) == 4
    plan.tried(0.0, None)
    assert plan.told is None
    assert (plan.look(8, 59.0), plan.look(8, 60.0)) == (None, 4)


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(0, 40)), max_size=60))
def test_plan_over_any_demand_stays_in_bounds_and_never_takes_what_was_just_wanted(
    looks: list[tuple[float, int]],
) -> None:
    plan, now, last = Plan(BOUNDS, started=0.0), 0.0, float("-inf")
    history: list[tuple[float, int]] = []
    for pause, demand in looks:
        now += pause
        history.append((now, BOUNDS.wanted(demand)))
        told = plan.look(demand, now)
        if told is None:
            continue
        assert BOUNDS.min <= told <= BOUNDS.max
        assert now - last >= BOUNDS.cooldown
        assert told != plan.told
        recent = [wanted for at, wanted in history if at > now - BOUNDS.scale_down_after]
        assert told >= history[-1][1]
        if plan.told is not None and told < plan.told:
            assert told == max(recent)
        plan.tried(now, told)
        last = now


class Fleet:
    """Two backends, and a provider that takes what it is told."""

    def __init__(self) -> None:
        self.rows = [(_backend(name), Live()) for name in ("a", "b")]
        self.told: list[tuple[str, Workers]] = []
        self.problem: str | None = None
        self.hangs = False

    def candidates(self) -> list[Candidate]:
        return [Candidate(backend, live) for backend, live in self.rows]

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        if self.hangs and backend.name == "a":
            await asyncio.sleep(0.05)
            return f"no answer in {seconds} s"
        self.told.append((backend.name, workers))
        return self.problem


def _backend(name: str) -> Backend:
    return Backend(name, "cloud", "http://127.0.0.1:1", "http", "127.0.0.1", 1)


class Scene:
    def __init__(self, **options: Any) -> None:
        self.fleet = Fleet()
        self.now = 0.0
        self.waiting = {"a": 0, "b": 0}
        self.events: list[dict[str, Any]] = []
        given = {"interval": 15.0, "dry_run": False, **options}
        self.scaler = Scaler(
            {"a": BOUNDS, "b": BOUNDS},
            fleet=self.fleet,
            waiting=self.waiting.__getitem__,
            clock=lambda: self.now,
            notify=lambda event, /, **fields: self.events.append({"event": event, **fields}),
            **given,
        )


async def test_look_counts_what_runs_and_what_waits_and_tells_each_backend_its_own() -> None:
    scene = Scene()
    scene.fleet.rows[0][1].in_flight = 3
    scene.waiting["a"] = 4
    await scene.scaler.look()
    assert scene.fleet.told == [("a", Workers(4, 5))]
    assert scene.events == [
        {"event": "autoscale.scaled", "backend": "a", "workers": 4, "before": None}
    ]
    shown = {(g.name, g.labels[0][1]): g.value for g in scene.scaler.gauges()}
    assert shown == {
        ("autoscale_workers_wanted", "a"): 4,
        ("autoscale_workers_told", "a"): 4,
        ("autoscale_workers_wanted", "b"): 1,
    }


async def test_look_when_it_is_a_dry_run_says_what_it_would_tell_and_tells_nobody() -> None:
    scene = Scene(dry_run=True)
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert scene.fleet.told == []
    assert [event["workers"] for event in scene.events] == [4, 1]  # and back, at the end
    assert {event["event"] for event in scene.events} == {"autoscale.planned"}
    assert {gauge.name for gauge in scene.scaler.gauges()} == {"autoscale_workers_wanted"}


async def test_look_when_a_provider_says_no_tells_the_operator_and_the_others() -> None:
    scene = Scene()
    scene.fleet.problem = "RunPod refuses the api_key"
    scene.waiting.update(a=8, b=8)
    await scene.scaler.look()
    assert [event["event"] for event in scene.events] == ["autoscale.failed"] * 2
    assert scene.events[0]["detail"] == "RunPod refuses the api_key"
    await scene.scaler.look()
    assert len(scene.events) == 2  # not before the cooldown
    scene.now, scene.fleet.problem = 60.0, None
    await scene.scaler.look()
    assert [plan.told for plan in scene.scaler.plans.values()] == [4, 4]


async def test_look_when_one_provider_hangs_tells_the_others() -> None:
    scene = Scene()
    scene.fleet.hangs = True
    scene.waiting.update(a=8, b=8)
    await scene.scaler.look()
    assert scene.fleet.told == [("b", Workers(4, 5))]


async def test_lifespan_when_it_ends_takes_back_what_was_raised_and_no_more() -> None:
    scene = Scene()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.fleet.told)
    assert scene.fleet.told == [("a", Workers(4, 5)), ("a", Workers(1, 5))]


ROWS = """
backends:
  - {name: a, provider: cloud, url: 'http://h:1'}
"""


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            "[{backend: a, max: 2}]",
            "autoscale.backends[0].backend: provider cloud cannot be told how many workers to keep",
        ),
        ("[{backend: b, max: 2}]", 'autoscale.backends[0].backend: there is no backend "b"'),
        ("[{backend: a, min: 3, max: 2}]", "autoscale.backends[0]: must have min <= max"),
        ("[{backend: a, max: 2, target: 1.5}]", "autoscale.backends[0].target"),
        ("[{backend: a, max: 0}]", "autoscale.backends[0].max"),
        ("[{backend: a}]", "autoscale.backends[0].max"),
    ],
)
def test_config_when_it_cannot_be_is_refused_at_its_place(rows: str, problem: str) -> None:
    found = problems(f"{ROWS}autoscale: {{backends: {rows}}}")
    assert any(line.startswith(problem) for line in found), found


def test_warning_when_another_instance_scales_it_says_which() -> None:
    """A row that this instance leaves alone without a word looks as if it did nothing."""
    row = "{name: r, provider: runpod, url: 'https://api.runpod.ai/v2/e1', region: eu-west}"
    scale = "autoscale: {backends: [{backend: r, max: 2}]}"
    text = f"server: {{region: us-east}}\nbackends: [{row}]\n{scale}"
    (warning,) = load(text, among=plugins()).warnings
    assert warning.startswith("autoscale.backends[0]: left to the instance in eu-west, and this")
    assert load(text.replace("us-east", "eu-west"), among=plugins()).warnings == []


def test_config_when_a_backend_has_no_region_the_instance_must_be_named() -> None:
    """Else each of three instances would take it for its own."""
    row = "{name: r, provider: runpod, url: 'https://api.runpod.ai/v2/e1', api_key: k}"
    text = f"backends: [{row}]\nautoscale: {{backends: [{{backend: r, max: 2}}]}}"
    with pytest.raises(ConfigError) as caught:
        load(text, among=plugins())
    assert caught.value.problems == (
        "autoscale.backends[0].instance: must name the region of the instance that does it,"
        " as backend r has no region",
    )


@pytest.mark.parametrize("scope", ["region:eu-wst", "provider:modal"])
def test_warning_when_a_budget_covers_no_backend_says_so(scope: str) -> None:
    row = "{name: r, provider: runpod, url: 'https://api.runpod.ai/v2/e1', region: eu-west}"
    text = f"backends: [{row}]\nbudgets: [{{name: b, scope: '{scope}', per: day, usd: 1}}]"
    (warning,) = load(text, among=plugins()).warnings
    assert warning == f"budgets[0].scope: no backend is under {scope}"
