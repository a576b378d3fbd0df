"""Failover: attempts, budget, deadline and the wait between two attempts."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Exchange, Outcome, Stage, Verdict
from middleware.failover import Failover

BACKEND = Backend(
    name="b", provider="openai", url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1
)


class Scene:
    """A failover with its clock in hand and its notices kept."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.failover = Failover(
            clock=lambda: self.now, rng=random.Random(7), notify=self._note, **options
        )

    def _note(self, event: str, /, **fields: Any) -> None:
        self.notices.append((event, fields))

    def good(self, times: int = 1) -> None:
        for _ in range(times):
            self.failover.observe(exchange(), outcome(verdict=Verdict.GOOD))

    def granted(self, times: int) -> int:
        return sum(self.ask() is not None for _ in range(times))

    def ask(self, **fields: Any) -> float | None:
        spare, deadline = fields.pop("spare", 1), fields.pop("deadline", None)
        failed = outcome(**fields)
        return self.failover.retry(exchange(failed, spare=spare, deadline=deadline), failed)


def outcome(
    *, verdict: Verdict = Verdict.STRIKE, number: int = 1, repeatable: bool = True, **fields: Any
) -> Outcome:
    return Outcome(BACKEND, number, verdict, stage=Stage.HEAD, repeatable=repeatable, **fields)


def exchange(*attempts: Outcome, spare: int = 1, deadline: float | None = None) -> Exchange:
    return Exchange(
        id="x",
        method="POST",
        target=b"/",
        path="/",
        headers=(),
        started=1000.0,
        attempts=list(attempts),
        spare=spare,
        deadline=deadline,
    )


def test_retry_when_another_candidate_stands_ready_does_not_wait() -> None:
    assert Scene().ask(retry_after=5.0) == 0.0


@pytest.mark.parametrize("verdict", [Verdict.STRIKE, Verdict.BUSY, Verdict.CALLER])
def test_retry_when_repeatable_trusts_the_core(verdict: Verdict) -> None:
    assert Scene().ask(verdict=verdict) == 0.0


@pytest.mark.parametrize("verdict", [Verdict.NEUTRAL, Verdict.GOOD])
def test_retry_when_nobody_wants_another_attempt_stops(verdict: Verdict) -> None:
    assert Scene().ask(verdict=verdict) is None


def test_retry_when_not_repeatable_stops() -> None:
    assert Scene().ask(repeatable=False) is None


def test_retry_when_attempts_are_used_up_stops() -> None:
    scene = Scene(max_attempts=2)
    assert scene.ask(number=1) == 0.0
    assert scene.ask(number=2) is None
    first, second = outcome(), outcome()
    assert scene.failover.retry(exchange(first, second), second) is None
    assert Scene(max_attempts=1).ask() is None


def test_retry_when_deadline_has_passed_stops() -> None:
    scene = Scene()
    assert scene.ask(deadline=1000.0) is None
    assert scene.ask(deadline=999.0) is None
    assert scene.ask(deadline=1000.001) == 0.0


def test_retry_when_the_wait_would_pass_the_deadline_stops_and_pays_nothing() -> None:
    scene = Scene(retry_budget=0.0, min_retries_per_second=0.1)  # one retry in the window
    for _ in range(20):
        assert scene.ask(spare=0, deadline=1000.0 + 1e-9) is None
    assert scene.ask() == 0.0


def test_retry_when_nothing_stands_ready_backs_off_with_full_jitter() -> None:
    scene = Scene(max_attempts=100, min_retries_per_second=1000.0)
    for number, bound in ((1, 0.025), (2, 0.05), (3, 0.1), (6, 0.8), (7, 1.0), (50, 1.0)):
        waits = [scene.ask(number=number, spare=0) for _ in range(200)]
        assert all(wait is not None and 0.0 <= wait <= bound for wait in waits)
        low, high = min(w or 0.0 for w in waits), max(w or 0.0 for w in waits)
        assert low < 0.1 * bound
        assert high > 0.9 * bound


@pytest.mark.parametrize(
    ("retry_after", "deadline", "waits"),
    [
        (3.0, None, True),
        (3.0, 1004.0, True),
        (3.0, 1002.0, False),  # it does not fit
        (9.0, None, True),
        (15.0, None, False),  # no client is held for a minute by who is not asked again
    ],
)
def test_retry_when_backend_asked_for_a_pause_keeps_it_where_it_fits(
    retry_after: float, deadline: float | None, waits: bool
) -> None:
    wait = Scene().ask(verdict=Verdict.BUSY, spare=0, retry_after=retry_after, deadline=deadline)
    assert wait is not None
    assert (wait == retry_after) if waits else wait <= 0.025


def test_budget_when_only_failures_come_grants_the_reserve_and_no_more() -> None:
    scene = Scene(min_retries_per_second=2.0)
    assert scene.granted(100) == 20
    scene.now += 5.0
    assert scene.granted(100) == 0


def test_budget_when_the_window_has_passed_grants_again() -> None:
    scene = Scene(min_retries_per_second=1.0)
    assert scene.granted(100) == 10
    scene.now += 9.0
    assert scene.granted(1) == 0
    scene.now += 1.0
    assert scene.granted(100) == 10
    scene.now += 12345.0
    assert scene.granted(100) == 10


def test_budget_when_attempts_succeed_grants_their_share() -> None:
    scene = Scene(min_retries_per_second=0.0, retry_budget=0.2)
    assert scene.granted(1) == 0
    scene.good(50)
    assert scene.granted(100) == 10
    scene.good(5)
    assert scene.granted(100) == 1


def test_budget_when_deposits_are_old_forgets_them() -> None:
    scene = Scene(min_retries_per_second=0.0)
    scene.good(50)
    scene.now += 10.0
    assert scene.granted(1) == 0


def test_budget_when_outcomes_are_not_good_deposits_nothing() -> None:
    scene = Scene(min_retries_per_second=0.0)
    for verdict in (Verdict.CALLER, Verdict.BUSY, Verdict.STRIKE, Verdict.NEUTRAL):
        for _ in range(50):
            scene.failover.observe(exchange(), outcome(verdict=verdict))
    assert scene.granted(1) == 0


def test_budget_of_a_good_attempt_lasts_for_a_window_from_when_it_came() -> None:
    """Deposits look at the clock too, where no retry is asked for in between."""
    scene = Scene(min_retries_per_second=0.0, retry_budget=1.0)
    scene.good()
    scene.now += 5.0
    scene.good()
    scene.now += 7.0
    assert scene.granted(5) == 1


def test_budget_when_empty_tells_the_operator_once_a_window() -> None:
    scene = Scene(min_retries_per_second=0.0)
    scene.granted(50)
    scene.now += 5.0
    scene.granted(50)
    assert scene.notices == [("retry.refused", {"reason": "budget", "window_s": 10.0})]
    scene.now += 5.0
    scene.granted(50)
    assert len(scene.notices) == 2


def test_budget_when_half_of_all_requests_fail_for_a_minute_prevents_a_storm() -> None:
    """EXT-31: at 200 requests a second, half of them failing at each attempt."""
    scene = Scene(min_retries_per_second=10.0, retry_budget=0.2, max_attempts=3)
    rng, requests, attempts, good = random.Random(1), 12_000, 0, 0
    for _ in range(requests):
        scene.now += 0.005
        for number in (1, 2, 3):
            attempts += 1
            if rng.random() < 0.5:
                scene.good()
                good += 1
                break
            if scene.ask(number=number) is None:
                break
    # The reserve is granted once for each of the six windows.
    assert attempts <= requests + 0.2 * good + 6 * 100
    assert attempts > requests + 0.15 * good


def test_options_when_left_out_are_the_documented_ones() -> None:
    chosen = Failover()
    assert (chosen.max_attempts, chosen.retry_budget, chosen.min_retries_per_second) == (3, 0.2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "max_attempts: must be >= 1, got 0"),
        ({"retry_budget": -1.0}, "retry_budget: must be >= 0 and finite, got -1.0"),
        ({"retry_budget": math.nan}, "retry_budget: must be >= 0 and finite, got nan"),
        (
            {"min_retries_per_second": math.inf},
            "min_retries_per_second: must be >= 0 and finite, got inf",
        ),
    ],
)
def test_options_when_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Failover(**options)


@settings(deadline=None)
@given(max_attempts=st.integers(1, 6), spares=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_attempts_whatever_stands_ready_never_exceed_the_limit(
    max_attempts: int, spares: list[int]
) -> None:
    scene = Scene(max_attempts=max_attempts)
    made = exchange()
    for spare in spares:
        failed = outcome(number=len(made.attempts) + 1)
        made.attempts.append(failed)
        made.spare = spare
        if scene.failover.retry(made, failed) is None:
            break
    assert len(made.attempts) == max_attempts


@settings(deadline=None)
@given(
    ratio=st.sampled_from([0.0, 0.1, 0.2, 1.0]),
    least=st.sampled_from([0.0, 0.5, 3.0]),
    steps=st.lists(st.tuples(st.booleans(), st.floats(0.0, 4.0, allow_nan=False)), max_size=150),
)
def test_budget_whatever_comes_never_grants_more_than_reserve_and_share(
    ratio: float, least: float, steps: list[tuple[bool, float]]
) -> None:
    scene = Scene(retry_budget=ratio, min_retries_per_second=least)
    retries: deque[float] = deque()
    goods: list[float] = []
    for good, pause in steps:
        scene.now += pause
        if good:
            scene.good()
            goods.append(scene.now)
        elif scene.ask() is not None:
            retries.append(scene.now)
            # Nine whole slots and a part of the tenth are what the window surely covers.
            recent = sum(1 for at in retries if at > scene.now - 9.0)
            paid = sum(1 for at in goods if at > scene.now - 20.0)
            assert recent <= least * 10.0 + ratio * paid + 0.01
