"""Health: ejection, rest, trial, panic and probes, with the clock in hand."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    Stage,
    Typical,
    Verdict,
)
from middleware.health import Health

GOOD, BUSY, STRIKE = Check(Verdict.GOOD), Check(Verdict.BUSY), Check(Verdict.STRIKE)
SLOW = Check(Verdict.STRIKE, fault=Fault.TIMEOUT, detail="no answer in 5.0 s")


def backend(name: str, region: str = "us-east") -> Backend:
    return Backend(
        name=name,
        provider="openai",
        url="http://127.0.0.1:1",
        scheme="http",
        host="127.0.0.1",
        port=1,
        region=region,
    )


def exchange(name: str = "x", **fields: Any) -> Exchange:
    return Exchange(
        id=name, method="POST", target=b"/", path="/", headers=(), started=0.0, **fields
    )


class Scene:
    """Health, a fleet of named backends, and what the core does between them."""

    def __init__(self, *rows: str | Backend, **options: Any) -> None:
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        options = {"probe_interval": 30.0, "consecutive_failures": 2, **options}
        self.health = Health(
            clock=lambda: self.now, rng=random.Random(4), notify=self._note, **options
        )
        self.backends = {b.name: b for b in (backend(r) if isinstance(r, str) else r for r in rows)}
        self.lives = {name: Live() for name in self.backends}
        self.answers: dict[str, Check | None] = {}
        self.asked: list[str] = []
        self.rounds = self.number = 0
        self.widest = self.open = 0
        self.during: Callable[[], None] = lambda: None

    def _note(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    def names(self, event: str) -> list[str]:
        return [fields["backend"] for name, fields in self.events if name == event]

    # what the core does

    def plan(self, asked: Exchange | None = None, without: str = "") -> list[Candidate]:
        rows = [Candidate(b, self.lives[b.name]) for b in self.backends.values()]
        given_ones = [c for c in rows if c.backend.name != without]
        return list(self.health.select(asked or exchange(), given_ones))

    def ready(self, asked: Exchange | None = None, without: str = "") -> list[str]:
        chosen = self.plan(asked, without)
        assert not any(c.last_resort for c in chosen)
        return [c.backend.name for c in chosen]

    def panic(self, asked: Exchange | None = None, without: str = "") -> list[str]:
        chosen = self.plan(asked, without)
        assert all(c.last_resort for c in chosen)
        return [c.backend.name for c in chosen]

    def admit(self, name: str, asked: Exchange | None = None) -> Permit | None:
        return self.health.admit(asked or exchange(), self.backends[name])

    def end(
        self,
        name: str,
        verdict: Verdict = Verdict.STRIKE,
        stage: Stage = Stage.HEAD,
        started: float | None = None,
        **fields: Any,
    ) -> None:
        at = self.now if started is None else started
        outcome = Outcome(self.backends[name], 1, verdict, stage, started=at, **fields)
        self.health.observe(exchange(), outcome)

    def eject(self, name: str, stage: Stage = Stage.HEAD) -> None:
        """Plan once and strike until it is out."""
        self.plan()
        for _ in range(self.health.consecutive_failures):
            self.end(name, stage=stage, fault=Fault.CLOSED)
        assert self.lives[name].ejected_until > self.now

    def serve_time(self, name: str) -> None:
        self.now = self.lives[name].ejected_until

    # what the fleet does

    def candidates(self) -> list[Candidate]:
        self.rounds += 1
        return [Candidate(b, self.lives[b.name]) for b in self.backends.values()]

    async def changed(self, seen: int) -> int:
        while self.number == seen:  # noqa: ASYNC110 - as `eventually` below
            await asyncio.sleep(0)
        return self.number

    async def check(
        self,
        candidate: Candidate,
        timeout: float,  # noqa: ASYNC109 - the contract's name
    ) -> Check | None:
        assert timeout == self.health.probe_timeout
        self.asked.append(candidate.backend.name)
        self.open += 1
        self.widest = max(self.widest, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        self.during()
        return self.answers.get(candidate.backend.name)

    async def probe(self, **answers: Check | None) -> None:
        """Run one round of probes: the first of a life span comes at once."""
        self.answers = answers
        before = self.rounds
        async with self.health.lifespan(self):
            await eventually(lambda: self.rounds > before and not tasks("health.probe."))
        assert not tasks("health.")


def tasks(prefix: str) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith(prefix)]


async def eventually(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(2.0):
        while not predicate():  # noqa: ASYNC110 - nothing tells when a round is over
            await asyncio.sleep(0)


# Ejection


def test_select_when_all_is_well_keeps_all_in_their_order() -> None:
    scene = Scene("c", "a", "b")
    assert scene.ready() == ["c", "a", "b"]
    permit = scene.admit("a")
    assert permit is not None
    permit.release()


def test_select_when_nobody_is_left_is_empty() -> None:
    assert Scene().panic() == []


def test_ejection_when_strikes_come_in_a_row_keeps_the_backend_back() -> None:
    scene = Scene("a", "b", consecutive_failures=3)
    scene.plan()
    for _ in range(2):
        scene.end("a")
    assert scene.ready() == ["a", "b"]
    scene.end("a", stage=Stage.CONTENT, fault=Fault.TRUNCATED)
    assert scene.ready() == ["b"]
    live = scene.lives["a"]
    assert not live.healthy
    assert 30.0 <= live.ejected_until - scene.now <= 33.0
    (event, fields), *rest = scene.events
    assert not rest
    assert event == "backend.ejected"
    assert fields == {
        "backend": "a",
        "seconds": pytest.approx(live.ejected_until - scene.now, abs=1e-3),
        "ejections": 1,
        "fault": Fault.TRUNCATED,
        "stage": Stage.CONTENT,
    }


def test_ejection_when_a_good_answer_comes_between_counts_anew() -> None:
    scene = Scene("a", "b")
    scene.plan()
    for _ in range(10):
        scene.end("a")
        scene.end("a", Verdict.GOOD)
    assert scene.ready() == ["a", "b"]


@pytest.mark.parametrize("verdict", [Verdict.CALLER, Verdict.NEUTRAL])
def test_ejection_when_the_caller_is_at_fault_or_left_says_nothing(verdict: Verdict) -> None:
    """A caller's 4xx must neither trip the breaker nor mend it."""
    scene = Scene("a", "b")
    scene.plan()
    for _ in range(20):
        scene.end("a", verdict, retry_after=60.0)
    assert scene.ready() == ["a", "b"]
    scene.end("a")
    scene.end("a", verdict)
    scene.end("a")
    assert scene.ready() == ["b"]


def test_ejection_when_many_streams_die_at_once_happens_once() -> None:
    scene = Scene("a", "b")
    scene.plan()
    began = scene.now
    scene.now += 5.0
    for _ in range(20):
        scene.end("a", stage=Stage.STREAM, started=began)
    assert scene.names("backend.ejected") == ["a"]
    scene.serve_time("a")
    scene.end("a", stage=Stage.STREAM, started=began)  # a straggler, in the midst of the trial
    scene.end("a", Verdict.GOOD, started=began)  # and one that got through
    assert scene.names("backend.ejected") == ["a"]
    assert scene.names("backend.restored") == []


def test_ejection_when_it_repeats_grows_up_to_the_longest() -> None:
    scene = Scene("a", "b", base_ejection_time=10.0, max_ejection_time=35.0)
    scene.eject("a")
    lengths = []
    for _ in range(6):
        lengths.append(scene.lives["a"].ejected_until - scene.now)
        scene.serve_time("a")
        scene.end("a")
    bounds = [(10, 11), (20, 22), (30, 33), (35, 35), (35, 35), (35, 35)]
    for length, (least, most) in zip(lengths, bounds, strict=True):
        assert least <= length <= most
    assert scene.events[-1][1]["ejections"] == 4


def test_ejection_when_good_time_has_passed_is_shorter_again() -> None:
    scene = Scene("a", "b", base_ejection_time=10.0)
    scene.eject("a")
    for _ in range(4):
        scene.serve_time("a")
        scene.end("a")
    assert scene.events[-1][1]["ejections"] == 5
    scene.serve_time("a")
    scene.end("a", Verdict.GOOD)
    scene.now += 29.0  # two full intervals
    scene.eject("a")
    assert scene.events[-1][1]["ejections"] == 4
    scene.serve_time("a")
    scene.end("a", Verdict.GOOD)
    scene.now += 1000.0
    scene.eject("a")
    assert scene.events[-1][1]["ejections"] == 1


# Rest


def test_rest_when_backend_pushes_back_lasts_as_long_as_it_asked_and_is_no_strike() -> None:
    scene = Scene("a", "b")
    scene.plan()
    for _ in range(20):
        scene.end("a", Verdict.BUSY, retry_after=7.0)
    assert scene.ready() == ["b"]
    assert scene.lives["a"].healthy
    assert scene.names("backend.ejected") == []
    scene.now += 7.0
    assert scene.ready() == ["a", "b"]


def test_rest_when_it_is_long_is_told_once_as_it_begins() -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", Verdict.BUSY, retry_after=5.0, status=429)
    assert scene.events == []
    scene.end("a", Verdict.BUSY, retry_after=60.0, status=429)
    scene.now += 30.0
    scene.end("a", Verdict.BUSY, retry_after=90.0, status=503)
    told = {"backend": "a", "seconds": 60.0, "status": 429, "fault": None, "detail": ""}
    assert scene.events == [("backend.rested", told)]
    scene.now += 90.0
    scene.end("a", Verdict.BUSY, retry_after=8.0, status=503)
    assert scene.events[1:] == [("backend.rested", told | {"seconds": 8.0, "status": 503})]


OPEN, KEYED = backend("a"), replace(backend("a"), api_key="ours")
HEADED = replace(backend("a"), headers=((b"AUTHORIZATION", b"Bearer ours"),))
BEARER, KEY = (b"Authorization", b"Bearer mine"), (b"X-Api-Key", b"mine")


@pytest.mark.parametrize(
    ("row", "header", "status", "asked", "rests"),
    [
        (OPEN, BEARER, 429, 3600.0, 1.0),
        (OPEN, KEY, 429, 3600.0, 1.0),
        (OPEN, KEY, 429, None, 1.0),
        (OPEN, KEY, 429, 0.5, 0.5),
        (OPEN, BEARER, 503, 60.0, 60.0),
        (OPEN, (b"Accept", b"*/*"), 429, 60.0, 60.0),
        (KEYED, BEARER, 429, 60.0, 60.0),
        (HEADED, BEARER, 429, 60.0, 60.0),
    ],
)
def test_rest_when_the_quota_is_the_clients_own_is_short(
    row: Backend, header: tuple[bytes, bytes], status: int, asked: float | None, rests: float
) -> None:
    """One client over its own quota must not take the backend from every other."""
    scene = Scene(row, "b")
    scene.plan()
    outcome = Outcome(
        row, 1, Verdict.BUSY, Stage.DONE, status=status, retry_after=asked, started=scene.now
    )
    scene.health.observe(replace(exchange(), headers=(header,)), outcome)
    assert scene.lives["a"].resting_until == scene.now + rests


@pytest.mark.parametrize(("asked", "rests"), [(None, 1.0), (0.0, 0.0), (86400.0, 300.0)])
def test_rest_when_no_sane_time_is_asked_is_bounded(asked: float | None, rests: float) -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", Verdict.BUSY, retry_after=asked)
    assert scene.lives["a"].resting_until == scene.now + rests


def test_rest_when_a_shorter_one_is_asked_later_is_not_cut() -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", Verdict.BUSY, retry_after=50.0)
    scene.end("a", Verdict.BUSY, retry_after=1.0)
    assert scene.lives["a"].resting_until == scene.now + 50.0


# Trial


def test_trial_when_time_is_served_lets_one_exchange_at_a_time_through_in_its_place() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.serve_time("a")
    assert scene.ready() == ["a", "b"]
    assert scene.ready() == ["a", "b"]  # planned, not yet picked
    lease = scene.admit("a")
    assert lease is not None
    assert scene.ready() == ["b"]
    assert scene.admit("a", exchange("stale")) is None
    assert scene.admit("b") is not None
    lease.release()  # a later admit refused, so nobody observes
    assert scene.ready() == ["a", "b"]
    assert not scene.lives["a"].healthy


def test_trial_when_good_restores() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.serve_time("a")
    lease = scene.admit("a")
    assert lease is not None
    began, scene.now = scene.now, scene.now + 2.0
    lease.release()
    scene.end("a", Verdict.GOOD, started=began)
    assert scene.ready() == ["a", "b"]
    assert (scene.lives["a"].healthy, scene.lives["a"].ejected_until) == (True, 0.0)
    assert scene.names("backend.restored") == ["a"]
    for _ in range(3):
        assert scene.admit("a") is not None
    scene.end("a")
    assert scene.ready() == ["a", "b"], "strikes count from zero again"


def test_trial_when_it_fails_ejects_at_once_and_longer() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.serve_time("a")
    lease = scene.admit("a")
    assert lease is not None
    scene.now += 1.0
    lease.release()
    scene.end("a", started=scene.now - 1.0)
    assert scene.ready() == ["b"]
    assert 60.0 <= scene.lives["a"].ejected_until - scene.now <= 66.0


def test_trial_when_neither_good_nor_bad_is_tried_again() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.serve_time("a")
    for verdict in (Verdict.CALLER, Verdict.NEUTRAL, Verdict.BUSY):
        lease = scene.admit("a")
        assert lease is not None
        lease.release()
        scene.end("a", verdict, retry_after=3.0)
    assert scene.ready() == ["b"]
    scene.now += 3.0
    assert scene.ready() == ["a", "b"]
    assert scene.names("backend.ejected") == ["a"]


def test_trial_when_nobody_reports_its_lease_ends_by_itself() -> None:
    """The breaker must not stick half-open."""
    scene = Scene("a", "b")
    scene.eject("a")
    scene.serve_time("a")
    lost = scene.admit("a")
    assert lost is not None
    scene.now += 34.9
    assert scene.ready() == ["b"]
    scene.now += 0.1
    assert scene.ready() == ["a", "b"]
    mine = scene.admit("a")
    assert mine is not None
    lost.release()  # late: it must not free the lease of another
    assert scene.ready() == ["b"]
    mine.release()
    assert scene.ready() == ["a", "b"]


# Panic


def test_panic_when_all_are_out_offers_the_least_bad_first() -> None:
    scene = Scene("late", "soon", "rests", "rests-longer")
    scene.eject("late")
    scene.serve_time("late")
    scene.end("late")  # ejected for 60 s
    scene.eject("soon")
    scene.end("rests", Verdict.BUSY, retry_after=50.0)
    scene.end("rests-longer", Verdict.BUSY, retry_after=100.0)
    assert scene.panic() == ["rests", "rests-longer", "soon", "late"]
    for name in scene.backends:
        assert scene.admit(name) is not None


def test_panic_when_times_are_equal_offers_the_one_with_fewest_strikes() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.eject("b")
    scene.lives["b"].ejected_until = scene.lives["a"].ejected_until
    scene.end("a")
    assert scene.panic() == ["b", "a"]
    scene.end("b")
    scene.end("b")
    assert scene.panic() == ["a", "b"]


def test_panic_when_an_attempt_fails_does_not_lengthen_the_ejection() -> None:
    scene = Scene("a")
    scene.eject("a")
    until = scene.lives["a"].ejected_until
    for _ in range(10):
        scene.now += 1.0
        assert scene.panic() == ["a"]
        scene.end("a")
    assert scene.lives["a"].ejected_until == until


def test_panic_when_an_attempt_is_good_restores_at_once() -> None:
    scene = Scene("a")
    scene.eject("a")
    scene.now += 1.0
    scene.end("a", Verdict.GOOD)
    assert scene.ready() == ["a"]


def test_panic_when_a_trial_runs_refuses_nobody() -> None:
    scene = Scene("a")
    scene.eject("a")
    scene.serve_time("a")
    assert scene.ready(exchange("first")) == ["a"]
    assert scene.admit("a", exchange("first")) is not None
    second = exchange("second")
    assert scene.panic(second) == ["a"]
    assert scene.admit("a", second) is not None
    assert scene.admit("a", exchange("third")) is None, "not planned: no word of panic"


def test_panic_when_only_the_tried_one_is_well_offers_the_ejected() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    assert scene.ready() == ["b"]
    assert scene.panic(without="b") == ["a"]


def test_panic_when_a_region_is_required_does_not_count_the_rest_of_the_world() -> None:
    scene = Scene(backend("us"), backend("eu", "eu-west"))
    scene.eject("eu")
    required = exchange(region="eu-west", region_mode="require")
    assert scene.panic(required) == ["eu"]
    assert scene.ready(exchange(region="eu-west")) == ["us"]
    assert scene.plan(exchange(region="mars", region_mode="require")) == []


def test_panic_when_it_lasts_is_told_every_ten_seconds() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.plan()
    assert scene.names("backend.ejected") == ["a"]
    scene.eject("b")
    for _ in range(21):
        scene.panic()
        scene.now += 0.5
    told = [fields for event, fields in scene.events if event == "fleet.panicked"]
    assert told == [{"backends": ["a", "b"]}] * 2


def test_panic_when_there_is_no_backend_at_all_is_not_told() -> None:
    scene = Scene()
    assert scene.plan() == []
    assert scene.events == []


# The memory of backends


def test_observe_when_backend_was_never_planned_is_ignored() -> None:
    scene = Scene("a")
    for _ in range(5):
        scene.end("a")
    assert scene.admit("a") is not None
    assert scene.ready() == ["a"]


def test_select_when_another_backend_took_the_name_forgets_the_old() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.lives["a"] = Live()
    assert scene.ready() == ["a", "b"]
    scene.end("a")
    assert scene.ready() == ["a", "b"]


def test_select_when_another_backend_took_the_name_of_a_sound_one_watches_the_new() -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.lives["a"] = Live()
    scene.eject("a")
    assert scene.ready() == ["b"]


async def test_probe_when_backends_left_the_fleet_forgets_them() -> None:
    scene = Scene("a", "b")
    scene.plan()
    del scene.backends["a"]
    await scene.probe()
    assert set(scene.health._records) == {"b"}


async def test_newcomer_when_it_joins_is_asked_at_once_and_alone() -> None:
    scene = Scene("a", "b")
    scene.answers = {"a": GOOD, "b": GOOD, "c": GOOD}
    async with scene.health.lifespan(scene):
        await eventually(lambda: scene.asked == ["a", "b"] and not tasks("health.probe."))
        scene.backends["c"], scene.lives["c"] = backend("c"), Live()
        scene.number += 1
        await eventually(lambda: len(scene.asked) > 2 and not tasks("health.probe."))
        assert scene.asked == ["a", "b", "c"], "who was asked already waits for its round"
        del scene.backends["a"]
        scene.number += 1
        await eventually(lambda: set(scene.health._records) == {"b", "c"})
    assert len(scene.asked) == 3


async def test_probe_when_its_backend_left_meanwhile_is_told_to_nobody() -> None:
    """Else an ejection would bring the name of one that is forgotten back into the metrics."""
    scene = Scene("a", "b", consecutive_failures=1)
    scene.plan()

    def leave() -> None:
        scene.backends.pop("a", None)
        scene.health._records.pop("a", None)

    scene.during = leave
    await scene.probe(a=Check(Verdict.STRIKE, fault=Fault.REFUSED), b=GOOD)
    assert scene.events == []


def test_observe_when_the_attempt_was_at_who_had_the_name_before_learns_nothing() -> None:
    """A URL that changes because its server dies must not cost the new one its first minutes."""
    scene = Scene("a", consecutive_failures=1)
    scene.backends["a"] = replace(scene.backends["a"], joined=scene.now)
    scene.plan()
    scene.end("a", started=scene.now - 1.0, fault=Fault.RESET)
    scene.end("a", Verdict.BUSY, started=scene.now - 1.0, retry_after=60.0)
    assert (scene.ready(), scene.lives["a"].resting_until) == (["a"], 0.0)
    scene.end("a", Verdict.BUSY, started=scene.now, retry_after=60.0)
    assert scene.lives["a"].resting_until == scene.now + 60.0
    scene.end("a", started=scene.now, fault=Fault.RESET)
    assert scene.lives["a"].ejected_until > scene.now


# Probes


async def test_lifespan_when_probes_are_off_asks_nobody() -> None:
    scene = Scene("a", probe_interval=0.0)
    async with scene.health.lifespan(scene):
        scene.number += 1  # and a newcomer is not asked either
        await asyncio.sleep(0.01)
        assert not tasks("health.probe")
    assert scene.asked == []
    assert not tasks("health.")


async def test_lifespan_does_not_wait_for_the_first_round_and_ends_its_task() -> None:
    """The platform kills a router whose start waits for health checks."""
    scene = Scene("a")
    async with scene.health.lifespan(scene):
        assert scene.asked == []
        assert {task.get_name() for task in tasks("health.")} == {
            "health.probes",
            "health.newcomers",
        }
        await eventually(lambda: scene.asked == ["a"])
    assert not tasks("health.")
    assert scene.events == []


async def test_lifespan_when_time_passes_probes_again_and_again() -> None:
    scene = Scene("a", "b", probe_interval=0.001)
    async with scene.health.lifespan(scene):
        await eventually(lambda: scene.rounds >= 4)
    assert scene.asked[:4] in (["a", "b"] * 2, ["a", "b", "b", "a"])


async def test_lifespan_when_a_probe_breaks_its_contract_says_so() -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    scene = Scene("a")
    scene.during = broken
    async with scene.health.lifespan(scene):
        await eventually(lambda: bool(scene.events))
    event, fields = scene.events[0]
    assert event == "probes.stopped"
    assert "a bug" in fields["error"]


async def test_probe_when_fleet_is_large_is_bounded() -> None:
    scene = Scene(*(f"b{n}" for n in range(100)))
    await scene.probe()
    assert len(scene.asked) == 100
    assert scene.widest == 16


async def test_probe_when_strikes_come_in_a_row_ejects() -> None:
    scene = Scene("a", "b")
    await scene.probe(a=Check(Verdict.STRIKE, fault=Fault.REFUSED), b=GOOD)
    assert scene.ready() == ["a", "b"]
    await scene.probe(a=Check(Verdict.STRIKE, fault=Fault.REFUSED), b=GOOD)
    assert scene.ready() == ["b"]
    assert scene.events[-1][1]["stage"] == "probe"
    assert scene.events[-1][1]["fault"] is Fault.REFUSED


async def test_probe_when_good_restores_what_probes_or_connects_ejected() -> None:
    scene = Scene("a", "b", "c")
    scene.eject("a", stage=Stage.CONNECT)
    await scene.probe(b=STRIKE)
    await scene.probe(b=STRIKE)
    assert scene.ready() == ["c"]
    scene.now += 1.0
    await scene.probe(a=GOOD, b=GOOD)
    assert scene.ready() == ["a", "b", "c"]
    assert scene.names("backend.restored") == ["a", "b"]
    assert scene.lives["a"].healthy


async def test_probe_when_good_leaves_a_deeper_ejection_to_its_trial() -> None:
    """A server that answers /health and fails each inference must not come back by its word."""
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", stage=Stage.CONNECT)
    scene.end("a", stage=Stage.CONTENT)
    await scene.probe(a=GOOD)
    assert scene.ready() == ["b"]
    assert not scene.lives["a"].healthy
    scene.serve_time("a")
    await scene.probe(a=GOOD)
    assert scene.lives["a"].healthy, "else nobody who looks at /ready would send the trial"
    assert scene.names("backend.restored") == []
    assert scene.admit("a") is not None
    assert scene.ready() == ["b"]


async def test_probe_when_good_does_not_forgive_what_it_cannot_judge() -> None:
    scene = Scene("a", "b", consecutive_failures=3)
    scene.plan()
    for _ in range(2):
        scene.end("a", stage=Stage.HEAD)
        await scene.probe(a=GOOD)
    scene.end("a", stage=Stage.HEAD)
    assert scene.ready() == ["b"]


async def test_probe_when_striking_during_a_trial_ejects_longer_and_spares_the_client() -> None:
    scene = Scene("a", "b")
    scene.eject("a")
    scene.now += 1.0
    await scene.probe(a=STRIKE)
    assert scene.names("backend.ejected") == ["a"], "it serves its time, no more"
    scene.serve_time("a")
    await scene.probe(a=STRIKE)
    assert scene.events[-1][1]["ejections"] == 2
    assert scene.ready() == ["b"]


async def test_probe_when_it_began_before_the_ejection_says_nothing() -> None:
    scene = Scene("a", "b")
    scene.plan()

    def fall() -> None:
        if "a" in scene.asked and not scene.events:
            scene.now += 1.0
            scene.eject("a", stage=Stage.CONNECT)

    scene.during = fall
    await scene.probe(a=GOOD, b=None)
    assert scene.ready() == ["b"]


async def test_probe_when_backend_loads_lets_it_rest_without_a_strike() -> None:
    scene = Scene("a", "b")
    loading = Check(Verdict.BUSY, fault=Fault.LOADING, detail="says 503")
    for _ in range(5):
        await scene.probe(a=loading)
        assert scene.ready() == ["b"]
        assert not scene.lives["a"].healthy
        scene.now += 30.0 * 1.1
        assert scene.ready() == ["b"], "until the next round has asked"
    told = {"verdict": Verdict.BUSY, "fault": Fault.LOADING, "detail": "says 503"}
    assert scene.events == [("backend.loading", {"backend": "a", **told})]
    await scene.probe(a=Check(Verdict.NEUTRAL))
    assert not scene.lives["a"].healthy
    await scene.probe(a=GOOD)
    assert scene.ready() == ["a", "b"]
    assert scene.lives["a"].healthy


async def test_probe_when_backend_says_how_long_it_loads_believes_it() -> None:
    scene = Scene("a", "b")
    await scene.probe(a=Check(Verdict.BUSY, retry_after=4.0))
    assert scene.lives["a"].resting_until == scene.now + 4.0


async def test_probe_when_good_does_not_cut_a_rest_that_traffic_was_told() -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", Verdict.BUSY, retry_after=60.0)
    await scene.probe(a=GOOD)
    assert scene.ready() == ["b"]


@pytest.mark.parametrize("answer", [None, Check(Verdict.NEUTRAL)])
async def test_probe_when_nothing_can_be_told_changes_nothing(answer: Check | None) -> None:
    scene = Scene("a", "b")
    scene.plan()
    scene.end("a", stage=Stage.CONNECT)
    await scene.probe(a=answer, b=answer)
    assert scene.lives["a"].healthy
    scene.end("a", stage=Stage.CONNECT)
    await scene.probe(a=answer, b=answer)
    assert not scene.lives["a"].healthy
    assert scene.ready() == ["b"]
    scene.serve_time("a")
    await scene.probe(a=answer, b=answer)
    assert scene.lives["a"].healthy
    assert scene.names("backend.restored") == []


async def test_probe_when_real_traffic_is_good_is_left_out_but_not_for_ever() -> None:
    scene = Scene("busy", "failing", "quiet")
    await scene.probe()
    scene.asked.clear()
    scene.end("busy", Verdict.GOOD)
    scene.end("failing", Verdict.GOOD)
    scene.end("failing")
    scene.now += 29.0
    await scene.probe()
    assert scene.asked == ["failing", "quiet"]
    scene.now += 300.0
    scene.end("busy", Verdict.GOOD)
    scene.asked.clear()
    await scene.probe()
    assert "busy" in scene.asked, "its models may have changed"


async def test_probe_when_health_flaps_loses_no_backend() -> None:
    """EXT-21: down, up, down, up … each second, while each request is answered."""
    scene = Scene("a", "b")
    for second in range(40):
        await scene.probe(a=GOOD if second % 2 else STRIKE, b=GOOD)
        assert scene.ready() == ["a", "b"]
        scene.now += 1.0
    assert set(scene.names("probe.failed")) == {"a"}
    assert scene.names("backend.ejected") == []


async def test_probe_when_its_verdict_changes_to_a_bad_one_tells_so_once() -> None:
    """A refused key or a dead name is seen when the process starts, not when clients complain."""
    scene = Scene("a", "b", consecutive_failures=99)
    refused = Check(Verdict.STRIKE, fault=Fault.REFUSED, detail="no connection")
    key = Check(Verdict.NEUTRAL, fault=Fault.UNAUTHORIZED, detail="refuses the api_key")
    for answer in (None, refused, refused, None, key, key, GOOD, refused):
        await scene.probe(a=answer, b=GOOD)
    told = [(event, fields["fault"], fields["detail"]) for event, fields in scene.events]
    assert told == [
        ("probe.failed", Fault.REFUSED, "no connection"),
        ("probe.failed", Fault.UNAUTHORIZED, "refuses the api_key"),
        ("probe.failed", Fault.REFUSED, "no connection"),
    ]


async def test_probe_when_slow_while_clients_are_served_is_no_strike() -> None:
    """A GPU that streams to eight clients may take its time over a list of models."""
    scene = Scene("a", "b")
    scene.lives["a"].in_flight = 1
    for _ in range(5):
        scene.end("a", Verdict.GOOD)
        scene.now += 55.0
        await scene.probe(a=SLOW, b=GOOD)
    assert scene.ready() == ["a", "b"]
    assert scene.lives["a"].healthy
    assert scene.names("probe.failed") == ["a"], "it is told all the same"
    for _ in range(2):
        await scene.probe(a=Check(Verdict.STRIKE, fault=Fault.REFUSED), b=GOOD)
    assert scene.ready() == ["b"], "a refused connection is news, whoever is served"


@pytest.mark.parametrize(("usual", "ejected_after"), [(None, 90.0), (50.0, 120.0), (1.0, 90.0)])
async def test_probe_when_slow_and_no_answer_comes_for_long_is_a_strike(
    usual: float | None, ejected_after: float
) -> None:
    """A backend that stalled was kept in for 14 minutes by clients that waited there in vain."""
    scene = Scene("a", "b")
    scene.plan()
    live, began = scene.lives["a"], scene.now
    live.usual = None if usual is None else Typical(billed=usual)
    scene.end("a", Verdict.GOOD)
    live.in_flight = 38
    while not live.ejected_until and scene.now < began + 1000.0:
        scene.now += 30.0
        scene.end("a", Verdict.NEUTRAL, fault=Fault.CLIENT_CLOSED)
        await scene.probe(a=SLOW, b=GOOD)
    assert scene.now - began == ejected_after + 30.0, "the second strike in a row"
    assert scene.ready() == ["b"]
    scene.serve_time("a")
    await scene.probe(a=SLOW, b=GOOD)
    assert live.ejected_until > scene.now, "nor does it come back by that"
    scene.serve_time("a")
    await scene.probe(a=GOOD, b=GOOD)
    assert scene.ready() == ["a", "b"], "as soon as it answers it may be asked"


async def test_probe_when_slow_and_one_never_answered_is_a_strike_whoever_waits() -> None:
    scene = Scene("a", "b")
    scene.lives["a"].in_flight = 1
    for _ in range(2):
        await scene.probe(a=SLOW, b=GOOD)
    assert scene.ready() == ["b"]


async def test_probe_when_slow_and_nobody_is_served_is_a_strike() -> None:
    scene = Scene("a", "b")
    for _ in range(2):
        await scene.probe(a=SLOW, b=GOOD)
    assert scene.ready() == ["b"]


async def test_probe_when_rounds_follow_each_other_is_jittered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Instances that started together must not probe a backend in step."""
    pauses, sleep = [], asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    scene = Scene("a")
    async with scene.health.lifespan(scene):
        await eventually(lambda: len(pauses) >= 200)
    assert all(27.0 <= pause <= 33.0 for pause in pauses)
    assert min(pauses) < 28.0
    assert max(pauses) > 32.0


def test_options_when_left_out_are_the_documented_ones() -> None:
    chosen = Health()
    assert (chosen.probe_interval, chosen.probe_timeout) == (30.0, 5.0)
    assert chosen.consecutive_failures == 5
    assert (chosen.base_ejection_time, chosen.max_ejection_time) == (30.0, 300.0)


def test_options_when_at_the_edge_are_taken() -> None:
    scene = Scene(
        "a", consecutive_failures=1, probe_interval=0.0, base_ejection_time=9, max_ejection_time=9
    )
    scene.eject("a")
    assert scene.lives["a"].ejected_until == scene.now + 9.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_interval": -1}, "probe_interval: must be >= 0 and finite, got -1"),
        ({"probe_interval": math.inf}, "probe_interval: must be >= 0 and finite, got inf"),
        ({"probe_timeout": 0}, "probe_timeout: must be > 0 and finite, got 0"),
        ({"base_ejection_time": -1}, "base_ejection_time: must be > 0 and finite, got -1"),
        ({"max_ejection_time": math.nan}, "max_ejection_time: must be > 0 and finite, got nan"),
        ({"consecutive_failures": 0}, "consecutive_failures: must be >= 1, got 0"),
        (
            {"base_ejection_time": 60.0, "max_ejection_time": 30.0},
            r"max_ejection_time: must be >= base_ejection_time \(60.0\), got 30.0",
        ),
    ],
)
def test_options_when_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Health(**options)


STEPS = st.tuples(
    st.sampled_from("abc"),
    st.sampled_from(list(Verdict)),
    st.sampled_from([Stage.CONNECT, Stage.HEAD, Stage.STREAM]),
    st.floats(0.0, 60.0),
    st.booleans(),
)


@settings(deadline=None)
@given(steps=st.lists(STEPS, max_size=60))
def test_health_whatever_happens_offers_someone_and_comes_back(
    steps: list[tuple[str, Verdict, Stage, float, bool]],
) -> None:
    scene = Scene("a", "b", "c")
    leases = []
    for name, verdict, stage, pause, lost in steps:
        scene.now += pause
        chosen = scene.plan()
        assert chosen
        assert len({c.last_resort for c in chosen}) == 1
        permit = scene.admit(name)
        if permit is not None:
            leases.append(permit)
            if not lost:
                leases.pop().release()
        scene.end(name, verdict, stage, started=scene.now - pause / 2)
        for live in scene.lives.values():
            assert live.ejected_until - scene.now <= 300.0
            assert live.resting_until - scene.now <= 300.0
    scene.now += 335.0  # the longest ejection and a lost lease
    assert scene.ready() == ["a", "b", "c"]
    for name in "abc":
        scene.end(name, Verdict.GOOD)
    assert all(live.healthy and not live.ejected_until for live in scene.lives.values())
