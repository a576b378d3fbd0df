"""Cost: three orders, and the blend held over time."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Exchange,
    Gauge,
    Live,
    Outcome,
    Permit,
    Recent,
    Stage,
    TokenPrice,
    Typical,
    Verdict,
    Warmth,
)
from beacon_proxy.spending.bill import price_of
from middleware.cost import Blend, Cost


def backend(name: str, price: float = 0.0001, pool: str = "baseline", **more: Any) -> Backend:
    return Backend(
        name=name,
        provider="openai",
        url="http://127.0.0.1:1",
        scheme="http",
        host="127.0.0.1",
        port=1,
        pool=pool,
        price_per_second=price,
        **more,
    )


GOLEM = backend("golem", 0.0001, "baseline")
RUNPOD = backend("runpod", 0.00025, "burst")
MODAL = backend("modal", 0.0003, "burst")


def exchange(cost_priority: bool | None = None) -> Exchange:
    return Exchange(
        id="x",
        method="POST",
        target=b"/",
        path="/",
        headers=(),
        started=0.0,
        cost_priority=cost_priority,
    )


def outcome(of: Backend, verdict: Verdict = Verdict.GOOD, **fields: Any) -> Outcome:
    made = {"duration": 1.0, **fields}
    made.setdefault("billed", made["duration"])
    made.setdefault("usd", price_of(of, made["billed"], made.get("usage")))
    return Outcome(of, 1, verdict, Stage.DONE, sent=True, **made)


def names(candidates: object) -> list[str]:
    return [c.backend.name for c in candidates]  # type: ignore[attr-defined]


class Scene:
    """A cost policy, a fleet with live state, and what the core does between them."""

    def __init__(self, *backends: Backend, cost: Cost | None = None) -> None:
        self.now = 5000.0
        self.cost = cost or Cost(clock=lambda: self.now)
        self.rows = [(each, Live()) for each in backends or (MODAL, RUNPOD, GOLEM)]
        self.served: Counter[str] = Counter()

    def live(self, of: Backend) -> Live:
        return dict(zip([row[0].name for row in self.rows], self.rows, strict=True))[of.name][1]

    def candidates(self) -> list[Candidate]:
        return [Candidate(each, live) for each, live in self.rows]

    def order(self, cost_priority: bool | None = None) -> list[str]:
        return names(self.cost.select(exchange(cost_priority), self.candidates()))

    def begin(
        self, cost_priority: bool | None = None, down: frozenset[str] = frozenset()
    ) -> tuple[Exchange, Backend, Permit]:
        asked = exchange(cost_priority)
        up = [c for c in self.candidates() if c.backend.pool not in down]
        best = self.cost.select(asked, up)[0]
        permit = self.cost.admit(asked, best.backend)
        assert permit is not None
        best.live.in_flight += 1
        best.live.picked += 1
        return asked, best.backend, permit

    def end(self, begun: tuple[Exchange, Backend, Permit], **fields: Any) -> None:
        asked, where, permit = begun
        permit.release()
        self.live(where).in_flight -= 1
        ended = outcome(where, **fields)
        self.cost.observe(asked, ended)
        if ended.verdict is Verdict.GOOD:
            self.served[where.pool] += 1

    def serve(self, times: int, **hints: Any) -> None:
        for _ in range(times):
            self.end(self.begin(**hints))


def test_cost_when_asked_for_cheapest_orders_by_price() -> None:
    assert Scene().order(True) == ["golem", "runpod", "modal"]
    assert Scene(cost=Cost(default="cost")).order() == ["golem", "runpod", "modal"]


def test_cost_when_priorities_differ_sorts_inside_them_only() -> None:
    for cost_priority in (True, False, None):
        near, far = Candidate(MODAL, Live()), Candidate(GOLEM, Live(), priority=1)
        assert names(Cost().select(exchange(cost_priority), [far, near])) == ["modal", "golem"]


def test_cost_when_prices_are_equal_takes_nearer_then_idler_then_less_picked() -> None:
    def row(name: str, distance: int, in_flight: int, picked: int) -> Candidate:
        live = Live(in_flight=in_flight, picked=picked, latency=1.0, last_used=0.0)
        return Candidate(backend(name), live, distance=distance)

    rows = [row("far", 1, 0, 0), row("picked", 0, 1, 9), row("busy", 0, 2, 0), row("best", 0, 1, 1)]
    for cost_priority in (True, None):
        order = names(Cost().select(exchange(cost_priority), rows))
        assert order == ["best", "picked", "busy", "far"]
    for each in rows[1:]:
        each.live.in_flight = 1
    rows[0].live.in_flight = 1
    assert names(Cost().select(exchange(False), rows)) == ["busy", "best", "picked", "far"]


def test_cost_when_backends_are_equal_gives_all_of_them_traffic() -> None:
    """RTY-01."""
    for cost_priority in (True, None):
        scene = Scene(backend("a"), backend("b"), backend("c"))
        scene.serve(30, cost_priority=cost_priority)
        assert [live.picked for _, live in scene.rows] == [10, 10, 10]


def test_select_when_last_resorts_are_offered_keeps_them_behind_in_their_order() -> None:
    for cost_priority in (True, False, None):
        rows = [
            Candidate(MODAL, Live(), last_resort=True),
            Candidate(GOLEM, Live(), last_resort=True),
            Candidate(RUNPOD, Live(), priority=7),
        ]
        order = names(Cost().select(exchange(cost_priority), rows))
        assert order == ["runpod", "modal", "golem"]


def test_blend_when_300_run_one_by_one_gives_exactly_210_to_baseline() -> None:
    scene = Scene()
    scene.serve(300)
    assert scene.served == {"baseline": 210, "burst": 90}


def test_blend_when_300_run_50_at_once_gives_210_within_3() -> None:
    for seed in range(20):
        rng, scene = random.Random(seed), Scene()
        running = []
        for _ in range(300):
            running.append(scene.begin())
            if len(running) == 50:
                scene.end(running.pop(rng.randrange(50)))
        for each in running:
            scene.end(each)
        assert abs(scene.served["baseline"] - 210) <= 3


def test_blend_when_a_burst_arrives_before_any_answer_is_split_in_advance() -> None:
    for by in ("requests", "seconds", "cost"):
        scene = Scene(cost=Cost(blend=Blend(by=by)))
        pools = Counter(scene.begin()[1].pool for _ in range(50))
        assert pools == {"baseline": 35, "burst": 15}


def test_blend_inside_a_pool_prefers_nearer_then_cheaper() -> None:
    near = Candidate(MODAL, Live())
    far = Candidate(RUNPOD, Live(), distance=1)
    assert names(Cost().select(exchange(), [far, near])) == ["modal", "runpod"]
    far.distance = 0
    assert names(Cost().select(exchange(), [far, near])) == ["runpod", "modal"]


def test_blend_when_best_pool_is_full_offers_the_next() -> None:
    """The spill is the order itself: capacity refuses the first, the core asks the second."""
    scene = Scene()
    assert scene.order() == ["golem", "runpod", "modal"]
    scene.serve(1)
    assert scene.order() == ["runpod", "modal", "golem"]


def test_blend_when_attempts_fail_counts_only_who_served() -> None:
    scene, rng = Scene(), random.Random(3)
    while scene.served.total() < 300:
        failed = rng.random() < 0.3
        scene.end(scene.begin(), verdict=Verdict.STRIKE if failed else Verdict.GOOD)
    assert abs(scene.served["baseline"] - 210) <= 1


def test_blend_when_answer_was_the_callers_fault_or_broke_off_counts_it_as_served() -> None:
    for fields in (
        {"verdict": Verdict.CALLER},
        {"verdict": Verdict.NEUTRAL, "committed": True},
        {"verdict": Verdict.STRIKE, "committed": True},
    ):
        scene = Scene()
        scene.end(scene.begin(), **fields)
        assert scene.order()[0] == "runpod"
    scene = Scene()
    scene.end(scene.begin(), verdict=Verdict.NEUTRAL)
    assert scene.order()[0] == "golem"


@pytest.mark.parametrize("away", ["baseline", "burst"])
def test_blend_when_a_pool_was_away_it_is_not_stampeded_and_the_split_recovers(away: str) -> None:
    scene = Scene()
    scene.serve(500, down=frozenset({away}))
    scene.served.clear()
    scene.serve(300)
    assert 207 <= scene.served["baseline"] <= 213
    scene.served.clear()
    scene.serve(300)
    assert 209 <= scene.served["baseline"] <= 211


def test_blend_when_others_ask_for_cost_or_speed_keeps_its_own_split() -> None:
    scene = Scene()
    scene.serve(100, cost_priority=True)
    scene.serve(100, cost_priority=False)
    scene.served.clear()
    scene.serve(300)
    assert scene.served["baseline"] == 210


@pytest.mark.parametrize("by", ["seconds", "cost"])
def test_blend_by_amount_holds_the_share_of_what_was_used(by: str) -> None:
    scene = Scene(cost=Cost(blend=Blend(0.7, 0.3, by)))  # type: ignore[arg-type]
    rng, used, running = random.Random(5), Counter[str](), []
    for _ in range(4000):
        running.append(scene.begin())
        if len(running) == 20:
            begun = running.pop(rng.randrange(20))
            duration = rng.expovariate(0.5 if begun[1].pool == "burst" else 2.0)
            scene.end(begun, duration=duration)
            rate = begun[1].price_per_second if by == "cost" else 1.0
            used[begun[1].pool] += duration * rate  # type: ignore[assignment]
    assert used["baseline"] / used.total() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("slow", [GOLEM, MODAL])
def test_blend_by_seconds_counts_what_runs_by_the_mean_of_its_own_pool(slow: Backend) -> None:
    scene = Scene(GOLEM, MODAL, cost=Cost(blend=Blend(0.5, 0.5, "seconds")))
    for _ in range(200):
        begun = scene.begin()
        scene.end(begun, duration=10.0 if begun[1] is slow else 1.0)
    pools = Counter(scene.begin()[1].pool for _ in range(55))
    assert pools[slow.pool] == pytest.approx(5, abs=1)


def test_blend_when_a_pool_has_no_share_it_is_for_spill_over_only() -> None:
    scene = Scene(cost=Cost(blend=Blend(baseline=0.0, burst=1.0)))
    scene.serve(50, down=frozenset({"burst"}))
    scene.serve(50)
    assert scene.served == {"baseline": 50, "burst": 50}


def test_blend_when_pool_is_none_of_the_two_comes_last_and_bends_nothing() -> None:
    scene = Scene(GOLEM, MODAL, backend("lab", pool="lab"))
    assert scene.order()[-1] == "lab"
    scene.serve(50, down=frozenset({"baseline", "burst"}))
    scene.served.clear()
    scene.serve(300)
    assert scene.served == {"baseline": 210, "burst": 90}


def test_release_when_called_twice_counts_once() -> None:
    scene = Scene()
    held = [scene.begin()[2] for _ in range(7)]
    scene.begin(cost_priority=True)[2].release()  # not counted, so nothing to give back
    ledger = scene.cost._ledger
    assert ledger.standing == pytest.approx(5 * -0.3 + 2 * 0.7)
    for permit in held:
        permit.release()
        permit.release()
    assert ledger.standing == pytest.approx(0.0)


@settings(deadline=None, max_examples=30)
@given(
    share=st.integers(0, 20).map(lambda n: n / 20),
    seed=st.integers(0, 10_000),
    width=st.integers(1, 60),
    failing=st.sampled_from([0.0, 0.2]),
)
def test_blend_over_any_thousand_is_within_a_point_of_its_share(
    share: float, seed: int, width: int, failing: float
) -> None:
    rng = random.Random(seed)
    scene = Scene(GOLEM, MODAL, cost=Cost(blend=Blend(share, 1.0 - share)))
    history: list[bool] = []
    running = []
    while len(history) < 1300:
        running.append(scene.begin())
        if len(running) >= width:
            begun = running.pop(rng.randrange(len(running)))
            failed = rng.random() < failing
            scene.end(begun, verdict=Verdict.STRIKE if failed else Verdict.GOOD)
            if not failed:
                history.append(begun[1].pool == "baseline")
    # What runs is split already but not served yet, so a window may cut through that many.
    slack = 10 + (width if width > 1 else 0)
    for start in range(0, 300, 50):
        assert abs(sum(history[start : start + 1000]) - 1000 * share) <= slack


def test_latency_when_asked_for_speed_orders_by_score() -> None:
    scene = Scene()
    for of, latency, success in ((GOLEM, 2.0, 1.0), (RUNPOD, 1.5, 0.5), (MODAL, 1.0, 1.0)):
        live = scene.live(of)
        live.latency, live.success, live.last_used = latency, success, scene.now
    assert scene.order(False) == ["modal", "golem", "runpod"]
    scene.cost.default = "latency"
    assert scene.order() == ["modal", "golem", "runpod"]


def test_latency_when_backend_fails_fast_and_never_answered_does_not_win() -> None:
    """A provider that failed in 5 ms once got nine of ten requests."""
    scene = Scene(GOLEM, MODAL)
    slow, broken = scene.live(GOLEM), scene.live(MODAL)
    slow.latency, slow.last_used = 20.0, scene.now
    broken.success, broken.last_used, broken.picked = 0.8, scene.now, 1
    assert scene.order(False) == ["golem", "modal"]
    broken.success = 0.0
    slow.success = 0.3
    assert scene.order(False) == ["golem", "modal"]


def test_latency_when_success_falls_never_rises_in_rank() -> None:
    scene = Scene(GOLEM, MODAL)
    for of in (GOLEM, MODAL):
        scene.live(of).latency, scene.live(of).last_used = 1.0, scene.now
    scene.live(GOLEM).success = 0.99
    assert scene.order(False) == ["modal", "golem"]


def test_latency_when_unknown_tries_it_first_but_only_once_at_a_time() -> None:
    """Guards against a burst that piles up before a GPU which is only starting."""
    scene = Scene(GOLEM, MODAL)
    scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 0.2, scene.now
    picked = [scene.begin(cost_priority=False)[1].name for _ in range(5)]
    assert picked == ["modal", "golem", "golem", "golem", "golem"]


def test_latency_when_host_has_just_booted_still_tries_the_unknown_first() -> None:
    """The monotonic clock may start near zero: never used must not look like used just now."""
    scene = Scene(GOLEM, MODAL)
    scene.now = 1.0
    scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 0.2, 1.0
    assert scene.order(False) == ["modal", "golem"]
    scene.live(MODAL).picked, scene.live(MODAL).last_used = 1, 1.0  # no longer untried
    assert scene.order(False) == ["golem", "modal"]


def test_latency_when_backend_answers_4xx_alone_gets_next_to_no_traffic() -> None:
    """A backend that refuses each request at once never looked slow, and won 19 of 20."""
    scene = Scene(GOLEM, MODAL)
    scene.live(GOLEM).latency = 0.5
    scene.live(GOLEM).picked = 1
    for _ in range(100):
        begun = scene.begin(cost_priority=False)
        refuses = begun[1] is MODAL
        scene.end(begun, verdict=Verdict.CALLER if refuses else Verdict.GOOD)
        scene.now += 1.0
        scene.live(begun[1]).last_used = scene.now
    assert scene.live(MODAL).picked == 1
    scene.now += 3000.0
    scene.live(GOLEM).last_used = scene.now
    assert scene.order(False) == ["modal", "golem"], "what is old is asked again"


def test_latency_when_all_refused_once_still_spreads_a_burst_before_staying_near() -> None:
    near, far = Candidate(GOLEM, Live()), Candidate(MODAL, Live(), distance=1)
    for each in (near, far):
        each.live.picked, each.live.last_used = 1, 5000.0
    cost, picked = Cost(clock=lambda: 5000.0), []
    for _ in range(4):
        best = cost.select(exchange(False), [near, far])[0]
        best.live.in_flight += 1
        picked.append(best.backend.name)
    assert picked == ["golem", "modal", "golem", "modal"]


def test_latency_when_all_are_unknown_spreads_a_burst() -> None:
    scene = Scene()
    picked = Counter(scene.begin(cost_priority=False)[1].name for _ in range(9))
    assert picked == {"golem": 3, "runpod": 3, "modal": 3}


def test_latency_when_estimate_is_old_tries_the_slow_one_again_with_one_exchange() -> None:
    scene = Scene(GOLEM, MODAL)
    fast, slow = scene.live(GOLEM), scene.live(MODAL)
    fast.latency, slow.latency = 1.0, 10.0
    fast.last_used, slow.last_used = scene.now, scene.now - 900.0
    assert scene.order(False) == ["golem", "modal"]
    slow.last_used = scene.now - 1100.0
    picked = [scene.begin(cost_priority=False)[1].name for _ in range(3)]
    assert picked == ["modal", "golem", "golem"]


def peers(p50: float | None, p95: float | None = None, success: float | None = None) -> Recent:
    return Recent(ttft_p50=p50, ttft_p95=p95, success=success)


def test_latency_when_one_was_never_asked_it_is_held_to_be_like_its_peers() -> None:
    for p50, success, order in (
        (0.4, 1.0, ["modal", "golem"]),
        (0.4, None, ["modal", "golem"]),
        (0.6, 1.0, ["golem", "modal"]),
        (0.4, 0.5, ["golem", "modal"]),
        (None, None, ["modal", "golem"]),  # nobody there has answered: one has to find out
    ):
        scene = Scene(GOLEM, MODAL)
        scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 0.5, scene.now
        scene.live(MODAL).recent = peers(p50, None, success)
        assert scene.order(False) == order


def test_latency_when_peers_are_fast_a_newcomer_still_gets_one_exchange_at_a_time() -> None:
    scene = Scene(GOLEM, MODAL)
    scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 0.5, scene.now
    scene.live(MODAL).recent = peers(0.1)
    picked = [scene.begin(cost_priority=False)[1].name for _ in range(4)]
    assert picked == ["modal", "golem", "golem", "golem"]


def test_latency_when_it_never_answered_well_is_not_believed_to_be_like_its_peers() -> None:
    scene = Scene(GOLEM, MODAL)
    for of in (GOLEM, MODAL):
        scene.live(of).last_used = scene.now
    scene.live(GOLEM).latency, scene.live(MODAL).recent = 20.0, peers(0.1)
    assert scene.order(False) == ["golem", "modal"]


def test_latency_when_a_cold_one_has_fast_peers_is_not_started_to_find_out() -> None:
    scene = Scene(GOLEM, MODAL)
    scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 5.0, scene.now
    scene.live(MODAL).recent = peers(0.1)
    scene.live(MODAL).learn_warmth(Warmth.COLD, math.inf)
    assert scene.order(False) == ["golem", "modal"]


def test_latency_when_the_tail_is_long_a_steady_one_goes_first() -> None:
    scene = Scene(GOLEM, MODAL)
    steady, shaky = scene.live(GOLEM), scene.live(MODAL)
    for live, latency in ((steady, 1.0), (shaky, 0.7)):
        live.latency, live.last_used = latency, scene.now
    assert scene.order(False) == ["modal", "golem"]
    steady.recent, shaky.recent = peers(1.0, 1.5), peers(0.2, 10.0)
    assert scene.order(False) == ["golem", "modal"]


# Prices by the token


PER_TOKEN = backend("tokens", 0.0, "burst", token_price=TokenPrice(0.1e-6, 0.4e-6))


def typical(billed: float, input: float = 0.0, output: float = 0.0) -> Typical:
    return Typical(billed, input, output)


def test_cost_when_nothing_is_known_a_token_price_stands_by_a_usual_request() -> None:
    """200 tokens each way are 0.0001 USD, in the 5 s that the others would take: 0.00002 a second.

    By its price per second, which is 0, it would always be first.
    """
    scene = Scene(MODAL, RUNPOD, GOLEM, PER_TOKEN)
    assert scene.order(True) == ["tokens", "golem", "runpod", "modal"]
    dear = replace(PER_TOKEN, token_price=TokenPrice(1e-6, 4e-6))
    assert Scene(MODAL, RUNPOD, GOLEM, dear).order(True) == ["golem", "tokens", "runpod", "modal"]


@pytest.mark.parametrize(
    ("tokens", "seconds", "order"),
    [
        (1000.0, 1.0, ["golem", "runpod", "modal", "tokens"]),  # 0.0005 USD where Modal's is 0.0003
        (1000.0, 2.2, ["golem", "tokens", "runpod", "modal"]),
        (1000.0, 1.9, ["golem", "runpod", "tokens", "modal"]),
        (1000.0, 9.0, ["tokens", "golem", "runpod", "modal"]),
    ],
)
def test_cost_when_requests_are_known_a_token_price_stands_by_what_they_take(
    tokens: float, seconds: float, order: list[str]
) -> None:
    scene = Scene(MODAL, RUNPOD, GOLEM, PER_TOKEN)
    scene.live(PER_TOKEN).typical["m"] = typical(0.1, tokens, tokens)
    for of in (MODAL, RUNPOD, GOLEM):
        scene.live(of).typical["m"] = typical(seconds)
        scene.live(of).typical["other"] = typical(1000.0)
    asked = exchange(True)
    asked.work = "m"
    assert names(scene.cost.select(asked, scene.candidates())) == order


def test_cost_when_one_got_long_requests_does_not_look_dearer_for_it() -> None:
    """Ranked by what it took itself it would be asked no more, and never be found out."""
    scene = Scene(MODAL, GOLEM)
    scene.live(GOLEM).typical["m"], scene.live(MODAL).typical["m"] = typical(60.0), typical(1.0)
    asked = exchange(True)
    asked.work = "m"
    assert names(scene.cost.select(asked, scene.candidates())) == ["golem", "modal"]


def test_blend_when_a_pool_has_both_prices_takes_the_cheaper_for_this_request() -> None:
    scene = Scene(RUNPOD, PER_TOKEN, cost=Cost(blend=Blend(0.0, 1.0)))
    assert scene.order() == ["tokens", "runpod"]
    scene.live(PER_TOKEN).usual = typical(1.0, 9000.0, 9000.0)
    assert scene.order() == ["runpod", "tokens"]


# The bound on the price


def test_max_blended_price_when_nothing_is_saved_goes_over_region_and_wish() -> None:
    for cost_priority in (True, False, None):
        near, far = Candidate(MODAL, Live()), Candidate(GOLEM, Live(), priority=1)
        nearest = Candidate(replace(GOLEM, name="weak"), Live(), last_resort=True)
        cost = Cost(max_blended_price=0.00016)
        order = names(cost.select(exchange(cost_priority), [nearest, near, far]))
        assert order == ["golem", "modal", "weak"]
        cost.observe(exchange(), outcome(GOLEM, duration=1000.0))
        order = names(cost.select(exchange(cost_priority), [nearest, near, far]))
        assert order == ["modal", "golem", "weak"], "what was saved may be spent"


def test_max_blended_price_when_all_are_dear_takes_the_cheapest_first() -> None:
    for cost_priority in (True, False, None):
        near = Candidate(MODAL, Live())
        rows = [near, Candidate(RUNPOD, Live(), priority=2), Candidate(GOLEM, Live(), priority=2)]
        order = names(Cost(max_blended_price=0.00005).select(exchange(cost_priority), rows))
        assert order == ["golem", "runpod", "modal"]


@pytest.mark.parametrize(
    ("of", "known", "cold", "reserved"),
    [
        (GOLEM, typical(10.0), False, 0.0),
        (MODAL, typical(10.0), False, 10 * (0.0003 - 0.00016)),
        (MODAL, None, False, 5 * (0.0003 - 0.00016)),
        (MODAL, typical(10.0), True, 50 * (0.0003 - 0.00016)),
        (PER_TOKEN, typical(1.0, 1000.0, 1000.0), False, 0.0005 - 0.00016),
        (PER_TOKEN, typical(10.0, 1000.0, 1000.0), False, 0.0),
    ],
)
def test_max_blended_price_when_one_runs_keeps_its_expected_excess_free(
    of: Backend, known: Typical | None, cold: bool, reserved: float
) -> None:
    cost, live = Cost(max_blended_price=0.00016, clock=lambda: 5000.0), Live()
    account = cost._account
    assert account is not None
    if known is not None:
        live.usual = known
    if cold:
        live.learn_warmth(Warmth.COLD, math.inf)
        live.cold_starts.note(40.0)
    cost.select(exchange(True), [Candidate(of, live)])
    permit = cost.admit(exchange(True), of)
    assert permit is not None
    assert account.reserved == pytest.approx(reserved)
    permit.release()
    permit.release()
    assert account.reserved == 0.0


def test_max_blended_price_while_average_is_above_orders_cheapest_first() -> None:
    scene = Scene(cost=Cost(max_blended_price=0.00012))
    assert scene.cost.blended_price() == 0.0
    # 30 % at 0.00025 would make 0.000145.
    scene.serve(1000)
    assert scene.cost.blended_price() == pytest.approx(0.00012, rel=0.02)
    assert 0.08 < scene.served["burst"] / 1000 < 0.2
    spent = outcome(MODAL, duration=1000.0)
    scene.cost.observe(exchange(), spent)
    for cost_priority in (True, False, None):
        assert scene.order(cost_priority) == ["golem", "runpod", "modal"]


def test_blended_price_when_nothing_was_sent_does_not_count_it() -> None:
    cost = Cost()
    cost.observe(exchange(), Outcome(MODAL, 1, Verdict.STRIKE, Stage.CONNECT, duration=2.0))
    assert cost.blended_price() == 0.0
    cost.observe(exchange(), outcome(MODAL, Verdict.STRIKE))
    assert cost.blended_price() == pytest.approx(0.0003)


def shown(cost: Cost) -> dict[tuple[str, ...], float]:
    def key(gauge: Gauge) -> tuple[str, ...]:
        return (gauge.name, *(value for _, value in gauge.labels))

    return {key(gauge): gauge.value for gauge in cost.gauges()}


def test_gauges_when_nothing_was_served_show_no_share_and_no_price() -> None:
    assert shown(Cost()) == {
        ("blend_target_share", "baseline"): 0.7,
        ("blend_target_share", "burst"): pytest.approx(0.3),
        ("blend_debt", "baseline"): 0.0,
        ("blend_debt", "burst"): 0.0,
        ("blend_served", "baseline"): 0.0,
        ("blend_served", "burst"): 0.0,
        ("blend_decided",): 0,
    }


@pytest.mark.parametrize(("by", "baseline"), [("requests", 0.5), ("seconds", 0.25), ("cost", 0.1)])
def test_gauges_when_served_show_the_share_in_the_unit_of_the_split(
    by: Any, baseline: float
) -> None:
    cost = Cost(blend=Blend(by=by), max_blended_price=0.0002)
    for _ in range(500):
        cost.observe(exchange(), outcome(GOLEM, duration=1.0))
        cost.observe(exchange(), outcome(MODAL, duration=3.0))
        cost.observe(exchange(True), outcome(GOLEM, Verdict.STRIKE, duration=0.0))
    figures = shown(cost)
    assert figures["blend_share", "baseline"] == pytest.approx(baseline, abs=0.002)
    assert figures["blend_share", "burst"] == pytest.approx(1.0 - baseline, abs=0.002)
    assert figures["blended_price_usd_per_second",] == pytest.approx(0.00025, rel=0.001)
    assert figures["blended_price_deficit_usd",] == pytest.approx(500 * (0.001 - 0.0008))


def test_gauges_when_the_share_changed_show_that_of_the_last_thousand_or_so() -> None:
    scene = Scene(GOLEM, MODAL)
    scene.serve(3000)
    scene.serve(3000, down=frozenset({"burst"}))
    figures = shown(scene.cost)
    assert figures["blend_share", "baseline"] > 0.98
    assert (figures["blend_debt", "baseline"], figures["blend_debt", "burst"]) == (
        0.0,
        pytest.approx(900.0, abs=5.0),
    )


def test_gauges_when_nothing_is_owed_show_a_zero_without_a_sign() -> None:
    for down in ("burst", "baseline"):
        scene = Scene(GOLEM, MODAL)
        scene.serve(10)
        scene.serve(20, down=frozenset({down}))
        debts = [value for (name, *_), value in shown(scene.cost).items() if name == "blend_debt"]
        assert 0.0 in debts
        assert [math.copysign(1.0, debt) for debt in debts] == [1.0, 1.0]
    assert [math.copysign(1.0, shown(Cost())["blend_debt", p]) for p in ("baseline", "burst")] == [
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("verdict", [Verdict.BUSY, Verdict.STRIKE])
def test_gauges_when_a_pool_was_asked_and_never_served_show_its_share(verdict: Verdict) -> None:
    """Its quota is used up: a fleet of one pool has no share that could be off, this one has."""
    cost = Cost()
    for _ in range(200):
        cost.observe(exchange(), outcome(GOLEM, duration=1.0))
    assert ("blend_share", "baseline") not in shown(cost)
    cost.observe(exchange(False), outcome(MODAL, verdict, duration=0.0))
    assert ("blend_share", "baseline") not in shown(cost), "the blend had no part in that"
    cost.observe(exchange(), outcome(MODAL, verdict, duration=0.0))
    assert shown(cost)["blend_share", "baseline"] == 1.0
    assert shown(cost)["blend_share", "burst"] == 0.0


def test_gauges_when_few_were_decided_show_no_share_and_how_many_there_were() -> None:
    scene = Scene(GOLEM, MODAL)
    scene.serve(99)
    figures = shown(scene.cost)
    assert figures["blend_decided",] == 99
    assert figures["blend_served", "baseline"] + figures["blend_served", "burst"] == 99.0
    assert ("blend_share", "baseline") not in figures
    scene.serve(1)
    assert shown(scene.cost)["blend_share", "baseline"] == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("default", ["cost", "latency"])
def test_gauges_when_the_blend_decides_nothing_show_none_of_it(default: Any) -> None:
    scene = Scene(cost=Cost(default=default))
    scene.serve(10)
    assert set(shown(scene.cost)) == {("blended_price_usd_per_second",)}


def test_options_when_left_out_are_the_documented_ones() -> None:
    chosen = Cost()
    assert (chosen.default, chosen.max_blended_price) == ("blend", None)
    assert chosen.blend == Blend(baseline=0.7, burst=0.3, by="requests", payback=0.0025)
    assert Blend(1.0, 0.0).baseline == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default": "fast"}, "default: must be one of blend, cost, latency, got 'fast'"),
        ({"max_blended_price": 0}, "max_blended_price: must be > 0 and finite, got 0"),
        ({"max_blended_price": math.nan}, "max_blended_price: must be > 0 and finite, got nan"),
    ],
)
def test_options_when_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Cost(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": 0.7, "burst": 0.4}, "shares: must sum to 1, got 1.1"),
        ({"baseline": 0.7, "burst": math.nan}, "shares: must be >= 0, got 0.7 and nan"),
        ({"baseline": 1.2, "burst": -0.2}, "shares: must be >= 0, got 1.2 and -0.2"),
        ({"by": "tokens"}, "by: must be one of requests, seconds, cost, got 'tokens'"),
        ({"payback": -0.1}, "payback: must be between 0 and 1, got -0.1"),
        ({"payback": math.nan}, "payback: must be between 0 and 1, got nan"),
    ],
)
def test_blend_options_when_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Blend(**options)


# Newcomers


def test_cost_when_a_newcomer_starts_where_its_peers_are_the_load_is_shared_at_once() -> None:
    old, new = (replace(GOLEM, name=name) for name in ("old", "new"))
    scene = Scene(old, new)
    for each in (old, new):
        scene.live(each).picked = 500
    picked = Counter()
    for _ in range(10):
        begun = scene.begin(cost_priority=True)
        picked[begun[1].name] += 1
        scene.end(begun)
    assert picked == {"old": 5, "new": 5}


def test_latency_when_a_newcomer_was_given_its_peers_picks_it_is_still_untried() -> None:
    """On a host that has just booted: the monotonic clock is near zero, so nothing has faded."""
    scene = Scene(GOLEM, MODAL)
    scene.now = 1.0
    scene.live(GOLEM).latency, scene.live(GOLEM).last_used = 0.2, 1.0
    scene.live(GOLEM).picked = scene.live(MODAL).picked = 500
    assert scene.order(False) == ["modal", "golem"]
