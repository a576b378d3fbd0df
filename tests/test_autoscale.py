"""How many workers are wanted, and who is told: the rule, and its loop over a fleet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Candidate, Live, Workers
from beacon_proxy.errors import ConfigError
from beacon_proxy.scaling import scaler as scaler_module
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


def plan_of(kept: int | None = None) -> Plan:
    """One whose provider has said at 0 s what it keeps."""
    plan = Plan(BOUNDS, started=0.0)
    if kept is not None:
        plan.heard(kept, 0.0)
    return plan


def due(plan: Plan, demand: int, now: float) -> int | None:
    """What is told at a look, if the provider keeps what it did, and takes what it is told."""
    if not plan.look(demand, now):
        return None
    assert plan.kept is not None
    plan.heard(plan.kept, now)
    workers = plan.order(now)
    if workers is not None:
        plan.tells(now)
        plan.told(workers, now)
    return workers


def test_plan_when_demand_rises_tells_at_once_and_again_only_after_the_cooldown() -> None:
    plan = plan_of(1)
    assert due(plan, 4, 0.0) == 2
    assert due(plan, 8, 59.0) is None
    assert due(plan, 8, 60.0) == 4


def test_plan_when_demand_falls_waits_for_the_most_of_the_window() -> None:
    plan = plan_of(1)
    assert due(plan, 8, 0.0) == 4
    assert due(plan, 4, 100.0) is None
    assert due(plan, 0, 299.0) is None
    assert due(plan, 0, 300.0) == 2  # the look at 100 s still wants two
    assert due(plan, 0, 401.0) == 1


@pytest.mark.parametrize("demand", [0, 3, 4])
def test_plan_when_it_has_just_started_takes_nothing_away(demand: int) -> None:
    """Another process may have raised it for good reason: this one's predecessor, in a burst."""
    plan = plan_of(4)
    assert due(plan, demand, 0.0) is None
    assert due(plan, demand, 299.0) is None
    assert due(plan, demand, 300.0) == BOUNDS.wanted(demand)


def test_plan_when_it_has_just_started_adds_to_what_is_there() -> None:
    plan = plan_of(3)
    assert due(plan, 8, 0.0) == 4
    assert due(plan_of(0), 0, 0.0) == 1, "min is what the operator pays for"


def test_plan_when_nothing_is_known_asks_and_tells_nothing_until_it_is() -> None:
    plan = plan_of()
    assert plan.look(8, 0.0)
    assert plan.order(0.0) is None
    plan.failed(0.0)
    assert (plan.look(8, 59.0), plan.look(8, 60.0)) == (False, True)
    plan.heard(5, 60.0)
    assert plan.order(60.0) is None


def test_plan_when_an_order_had_no_good_answer_does_not_know_what_is_kept() -> None:
    plan = plan_of(1)
    assert plan.look(8, 0.0)
    plan.tells(0.0)
    plan.failed(30.0)
    assert (plan.kept, plan.raised) == (None, True)
    assert (plan.look(8, 89.0), plan.look(8, 90.0)) == (False, True)


def test_plan_when_what_is_kept_was_changed_elsewhere_sees_it_and_tells_again() -> None:
    plan = plan_of(1)
    assert due(plan, 8, 0.0) == 4
    assert [plan.look(8, now) for now in (60.0, 299.0, 300.0)] == [False, False, True]
    plan.heard(4, 300.0)
    assert plan.order(300.0) is None, "nothing has changed"
    assert (plan.look(8, 599.0), plan.look(8, 600.0)) == (False, True)
    for kept in (0, 9):  # a deployment, a person
        plan.heard(kept, 600.0)
        assert plan.order(600.0) == 4


@pytest.mark.parametrize(("demand", "raised"), [(0, False), (3, True)])
def test_plan_when_what_it_needs_was_there_is_to_take_it_back(demand: int, raised: bool) -> None:
    """Left by a predecessor that was killed: nobody else would."""
    plan = plan_of(4)
    assert due(plan, demand, 0.0) is None
    assert plan.raised is raised


@given(
    st.integers(0, 7),
    st.lists(st.tuples(st.floats(0, 400), st.integers(0, 40)), max_size=60),
)
def test_plan_over_any_demand_stays_in_bounds_and_never_takes_what_was_just_wanted(
    kept: int, looks: list[tuple[float, int]]
) -> None:
    plan, now, last = plan_of(kept), 0.0, float("-inf")
    history: list[tuple[float, int]] = []
    for pause, demand in looks:
        now += pause
        history.append((now, BOUNDS.wanted(demand)))
        before = plan.kept
        assert before is not None
        told = due(plan, demand, now)
        if told is None:
            continue
        assert BOUNDS.min <= told <= BOUNDS.max
        assert now - last >= BOUNDS.cooldown
        assert told != before
        recent = [wanted for at, wanted in history if at > now - BOUNDS.scale_down_after]
        assert told >= history[-1][1]
        if told < before:
            assert told == max(recent)
            assert now >= BOUNDS.scale_down_after
        last = now


class Fleet:
    """Two backends, and a provider that does what it is told.

    Attributes:
        told: orders, in the order they came.
        kept: what each backend keeps.
        problem: why orders are answered badly, though they are done.
        deaf: why it does not say what it keeps.
        answers: cleared, `a` is not answered.
        under_way: calls for each backend that have no answer yet.
    """

    def __init__(self) -> None:
        self.rows = [(_backend(name), Live()) for name in ("a", "b")]
        self.told: list[tuple[str, Workers]] = []
        self.kept_by = {"a": 1, "b": 1}
        self.asked: list[str] = []
        self.problem: str | None = None
        self.deaf: str | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.under_way = {"a": 0, "b": 0}

    def candidates(self) -> list[Candidate]:
        return [Candidate(backend, live) for backend, live in self.rows]

    async def kept(self, backend: Backend, seconds: float) -> int | str:
        self.asked.append(backend.name)
        return self.deaf or self.kept_by[backend.name]

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        self.told.append((backend.name, workers))
        self.kept_by[backend.name] = workers.min
        self.under_way[backend.name] += 1
        assert self.under_way[backend.name] == 1, "two orders at once"
        try:
            if backend.name == "a":
                await self.answers.wait()
        finally:
            self.under_way[backend.name] -= 1
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

    async def look(self) -> None:
        for name in self.scaler.plans:
            await self.scaler.look(name)


async def test_look_counts_what_runs_and_what_waits_and_tells_each_backend_its_own() -> None:
    scene = Scene()
    scene.fleet.rows[0][1].in_flight = 3
    scene.waiting["a"] = 4
    await scene.look()
    assert scene.fleet.told == [("a", Workers(4, 5))]
    assert scene.events == [
        {"event": "autoscale.scaled", "backend": "a", "workers": 4, "before": 1}
    ]
    shown = {(g.name, g.labels[0][1]): g.value for g in scene.scaler.gauges()}
    assert shown == {
        ("autoscale_workers_wanted", "a"): 4,
        ("autoscale_workers_told", "a"): 4,
        ("autoscale_workers_wanted", "b"): 1,
        ("autoscale_workers_told", "b"): 1,
    }


async def test_look_when_it_is_a_dry_run_says_what_it_would_tell_and_asks_and_tells_nobody() -> (
    None
):
    scene = Scene(dry_run=True)
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.events)
        for now in range(0, 3600, 15):
            scene.now = float(now)
            await scene.look()
    assert (scene.fleet.told, scene.fleet.asked) == ([], [])
    assert [event["workers"] for event in scene.events] == [4, 1]  # and back, at the end
    assert {event["event"] for event in scene.events} == {"autoscale.planned"}
    assert {gauge.name for gauge in scene.scaler.gauges()} == {"autoscale_workers_wanted"}


async def test_look_when_a_provider_says_no_tells_the_operator_and_asks_it_again() -> None:
    scene = Scene()
    scene.fleet.problem = "RunPod refuses the api_key"
    scene.waiting.update(a=8, b=8)
    await scene.look()
    assert [event["event"] for event in scene.events] == ["autoscale.failed"] * 2
    assert scene.events[0]["detail"] == "RunPod refuses the api_key"
    assert [plan.kept for plan in scene.scaler.plans.values()] == [None, None]
    assert {g.name for g in scene.scaler.gauges()} == {"autoscale_workers_wanted"}, "not known"
    scene.fleet.problem, scene.fleet.kept_by = None, {"a": 1, "b": 4}
    await scene.look()
    assert len(scene.events) == 2  # not before the cooldown
    scene.now = 60.0
    await scene.look()
    assert [plan.kept for plan in scene.scaler.plans.values()] == [4, 4]
    assert [name for name, _ in scene.fleet.told] == ["a", "b", "a"], "b has done it all the same"


async def test_look_when_the_number_cannot_be_read_tells_nothing() -> None:
    """A raise by what is assumed may be a fall: 4 left by the predecessor, 2 wanted."""
    scene = Scene()
    scene.fleet.deaf = "RunPod answers 500"
    scene.waiting["a"] = 4
    await scene.look()
    assert scene.fleet.told == []
    assert {event["detail"] for event in scene.events} == {"RunPod answers 500"}


async def test_look_after_a_start_takes_nothing_away_while_the_demand_is_less() -> None:
    """Killed in a burst and restarted it scaled 4 to 2 by its first look."""
    scene = Scene()
    scene.fleet.kept_by["a"] = 4
    scene.waiting["a"] = 4
    for now in range(0, 300, 15):
        scene.now = float(now)
        await scene.look()
    assert scene.fleet.told == []
    scene.now = 300.0
    await scene.look()
    assert scene.fleet.told == [("a", Workers(2, 5))]


async def test_look_when_the_number_was_changed_elsewhere_tells_it_again() -> None:
    """A deployment, the console, a take-back by another instance: it stayed so for ever."""
    scene = Scene()
    scene.waiting["a"] = 8
    await scene.look()
    scene.fleet.kept_by["a"] = 0
    for now in range(15, 3600, 15):
        scene.now = float(now)
        await scene.look()
    assert scene.fleet.told == [("a", Workers(4, 5))] * 2
    assert scene.fleet.asked.count("a") == 12, "once in 300 s"
    assert [e["before"] for e in scene.events] == [1, 0]


async def test_lifespan_when_one_provider_hangs_the_others_are_looked_at_all_the_same() -> None:
    """It delayed each look at the others by as long as it hung."""
    scene = Scene(interval=0.001)
    scene.fleet.answers.clear()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.fleet.told)
        for demand, now in ((4, 0.0), (8, 60.0), (0, 400.0)):
            scene.waiting["b"], scene.now = demand, now
            orders = len(scene.fleet.told)
            await eventually(lambda: len(scene.fleet.told) > orders)  # noqa: B023
        assert [name for name, _ in scene.fleet.told] == ["a", "b", "b", "b"]
        scene.fleet.answers.set()


async def test_lifespan_when_it_ends_takes_back_what_was_raised_and_no_more() -> None:
    scene = Scene()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.fleet.told)
    assert scene.fleet.told == [("a", Workers(4, 5)), ("a", Workers(1, 5))]


async def test_lifespan_when_it_ends_takes_back_an_order_that_was_answered_too_late() -> None:
    """The provider had done it: the workers stayed, and were paid for, without a word."""
    scene = Scene()
    scene.fleet.problem = "no answer in 30.0 s"
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.events)
        scene.fleet.problem = None
    assert scene.fleet.told == [("a", Workers(4, 5)), ("a", Workers(1, 5))]


async def test_lifespan_when_it_ends_lets_an_order_under_way_end_and_takes_it_back() -> None:
    scene = Scene()
    scene.fleet.answers.clear()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.fleet.told)
        asyncio.get_running_loop().call_later(0.01, scene.fleet.answers.set)
    assert scene.fleet.told == [("a", Workers(4, 5)), ("a", Workers(1, 5))]
    assert [event["workers"] for event in scene.events] == [4, 1]


async def test_lifespan_when_it_ends_and_an_order_does_not_takes_it_back_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaler_module, "_AT_END", 0.01)
    scene = Scene()
    scene.fleet.answers.clear()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.fleet.told)
        asyncio.get_running_loop().call_later(0.05, scene.fleet.answers.set)
    assert scene.fleet.told == [("a", Workers(4, 5)), ("a", Workers(1, 5))]


async def test_lifespan_when_a_take_back_fails_says_so() -> None:
    scene = Scene()
    scene.waiting["a"] = 8
    async with scene.scaler.lifespan():
        await eventually(lambda: scene.events)
        scene.fleet.problem = "RunPod answers 500"
    assert [event["event"] for event in scene.events] == ["autoscale.scaled", "autoscale.failed"]


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
