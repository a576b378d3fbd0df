"""Money and health together: who is too dear is dropped from the plan, and makes nobody well."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest

from beacon_proxy.contracts import Backend, Candidate, Exchange, Outcome, Stage, Verdict
from beacon_proxy.errors import BudgetExceeded, Limited, NoBackend
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.routing.chain import Chain
from beacon_proxy.routing.chooser import Chooser
from beacon_proxy.routing.queue import Queue
from beacon_proxy.spending.budgets import Budgets
from middleware.capacity import Capacity
from middleware.cost import Cost
from middleware.health import Health
from middleware.region import Region
from providers.openai import OpenAI

from .kit import CHAT, RawBackend, closed_port, json_answer, proxy
from .test_budgets import NOON, Terms
from .test_budgets_proxy import ask
from .test_chooser import backend, exchange, release

HELD = 5.0  # USD at a dollar a second: while no answer was seen 5 s are expected
DAY = 86_400.0
NO_BURST = Terms("burst", "pool:burst", "day", HELD / 2)


class Scene:
    """A chooser over the real middlewares, budgets and fleet; it is noon."""

    def __init__(self, *backends: Backend, terms: tuple[Terms, ...] = (NO_BURST,)) -> None:
        self.told: list[dict[str, Any]] = []
        self.fleet = Fleet(backends, {"openai": OpenAI()}, notify=self.tell)
        self.budgets = Budgets(
            terms,
            self.fleet.estimates.usd,
            clock=self.fleet.now,
            unix=lambda: NOON,
            notify=self.tell,
        )
        self.cost = Cost()
        members = (Health(notify=self.tell), Region(region="us-east"), self.cost, Capacity())
        self.chain = Chain.of((*members, *([self.budgets] if terms else [])))
        queue = Queue(self.chain.queue, lambda depth: None)
        self.chooser = Chooser(self.fleet, self.chain, queue, self.budgets)

    def tell(self, event: str, /, **fields: Any) -> None:
        self.told.append({"event": event, **fields})

    def events(self) -> list[str]:
        return [each["event"] for each in self.told]

    def candidate(self, name: str) -> Candidate:
        return next(c for c in self.fleet.candidates() if c.backend.name == name)

    def plan(self, asked: Exchange | None = None, tried: tuple[str, ...] = ()) -> list[str]:
        chosen = self.chooser.plan(exchange() if asked is None else asked, None, tried)
        return [c.backend.name for c in chosen]

    def eject(self, name: str, seconds: float = 30.0) -> None:
        self.candidate(name).live.ejected_until = monotonic() + seconds

    def rest(self, name: str, seconds: float = 3.0) -> None:
        self.candidate(name).live.resting_until = monotonic() + seconds


def dear(name: str = "dear", **more: Any) -> Backend:
    return backend(name, **{"pool": "burst", "price_per_second": 1.0, "region": "us-east", **more})


def cheap(name: str = "cheap", **more: Any) -> Backend:
    return dear(name, **{"pool": "baseline", "price_per_second": 0.001, **more})


@pytest.mark.parametrize("ill", ["eject", "rest"])
def test_plan_when_only_a_dear_one_is_well_is_refused_for_money(ill: str) -> None:
    """Neither 503 nor a request to who is ill; and the client may come when that one is back."""
    s = Scene(cheap(), dear())
    getattr(s, ill)("cheap", 7.0)
    with pytest.raises(BudgetExceeded, match="'burst' has no room") as error:
        s.plan()
    assert error.value.retry_after == pytest.approx(7.0, abs=0.5)
    assert s.events() == ["budget.exhausted"]


@pytest.mark.parametrize("ill", ["eject", "rest"])
def test_plan_when_only_a_dear_one_is_well_is_refused_by_the_clients_own_limit(ill: str) -> None:
    s = Scene(cheap(), dear(), terms=())
    getattr(s, ill)("cheap", 7.0)
    with pytest.raises(Limited, match="X-Beacon-Max-Price") as error:
        s.plan(exchange(max_price=1.0))
    assert error.value.retry_after == pytest.approx(7.0, abs=0.5)
    assert s.plan(exchange(max_price=HELD)) == ["dear"]
    assert s.events() == []


def test_plan_when_who_is_ill_is_too_dear_as_well_says_when_the_window_begins_anew() -> None:
    s = Scene(cheap(pool="burst", price_per_second=0.9), dear())
    s.eject("cheap")
    with pytest.raises(BudgetExceeded) as error:
        s.plan()
    assert error.value.retry_after == pytest.approx(DAY / 2)


def test_plan_when_nobody_is_well_asks_the_one_that_fits_as_a_last_resort() -> None:
    s = Scene(cheap(), dear())
    s.eject("cheap", 30.0)
    s.eject("dear", 20.0)
    assert s.plan() == ["cheap"]
    assert s.events() == ["fleet.panicked", "budget.exhausted"]
    s = Scene(dear())
    s.eject("dear")
    with pytest.raises(BudgetExceeded):
        s.plan()


def test_plan_when_another_is_well_and_fits_asks_that_one() -> None:
    s = Scene(cheap(), cheap("second"), dear())
    s.eject("cheap")
    assert s.plan() == ["second"]
    assert s.events() == ["budget.exhausted"], "the other pool's, which lets nobody in"


def test_plan_when_a_region_is_required_is_refused_for_money_only_by_what_is_there() -> None:
    s = Scene(cheap(region="eu-west"), dear(region="us-east"))
    there = {"region_mode": "require"}
    assert s.plan(exchange(region="eu-west", **there)) == ["cheap"]
    with pytest.raises(BudgetExceeded) as error:
        s.plan(exchange(region="us-east", **there))
    assert error.value.retry_after == pytest.approx(DAY / 2)
    s.rest("cheap")
    with pytest.raises(BudgetExceeded) as error:
        s.plan(exchange(region="us-east", **there))
    assert error.value.retry_after == pytest.approx(DAY / 2), "who is elsewhere never helps"
    assert s.plan(exchange(region="eu-west", **there)) == ["cheap"], "as a last resort"
    with pytest.raises(NoBackend):
        s.chooser.try_now(exchange(region="asia-pacific", **there), None, ())


def test_plan_when_the_nearest_is_too_dear_spills_into_the_next_region() -> None:
    s = Scene(dear(region="eu-west"), cheap(region="asia-pacific"), cheap("near", region="us-east"))
    assert s.plan(exchange(region="eu-west", region_mode="prefer")) == ["near", "cheap"]


def test_retry_when_only_a_dear_one_is_well_is_none() -> None:
    """The answer that there is stands; nobody who is ill is asked for it."""
    s = Scene(cheap(), cheap("ill"), dear())
    s.eject("ill")
    assert s.plan() == ["cheap"]
    with pytest.raises(BudgetExceeded):
        s.plan(tried=("cheap",))


def test_choice_when_others_are_too_dear_counts_only_those_that_fit() -> None:
    s = Scene(cheap(), dear(), dear("dearer"))
    choice = s.chooser.try_now(exchange(), None, ())
    assert choice is not None
    assert (choice.candidate.backend.name, choice.spare) == ("cheap", False)
    assert s.chooser.warm_elsewhere(exchange(), None, ("cheap",)) is False
    release(choice.permits)


def serve(s: Scene) -> str:
    """One good answer of 1 ms, by who is chosen."""
    asked = exchange()
    choice = s.chooser.try_now(asked, None, ())
    assert choice is not None
    release(choice.permits)
    chosen = choice.candidate.backend
    outcome = Outcome(
        chosen, 1, Verdict.GOOD, Stage.DONE, sent=True, committed=True, billed=0.001, usd=1e-9
    )
    for observe in s.chain.observers:
        observe(asked, outcome)
    return chosen.name


def test_blend_when_the_pool_that_is_due_has_no_money_spills_and_owes_it() -> None:
    """Money is no other reason than room: what burst could not serve it is owed."""
    s = Scene(cheap(max_in_flight=99), dear(max_in_flight=99), terms=(NO_BURST._replace(usd=99.0),))
    before = [serve(s) for _ in range(100)]
    assert before.count("dear") == pytest.approx(30, abs=2)
    account = s.budgets._budgets[0].account(None)
    account.spent, spent = 99.0, account.spent
    assert [serve(s) for _ in range(100)] == ["cheap"] * 100
    account.spent = spent
    after = [serve(s) for _ in range(400)]
    owed = -s.cost._ledger.debt - s.cost._ledger.standing
    assert owed == pytest.approx(30, abs=4)
    assert after.count("dear") == pytest.approx(120, abs=4), "and it is paid back by and by"


@pytest.mark.usefixtures("mid_window")
async def test_proxy_when_only_a_dear_one_is_well_answers_429_and_asks_nobody() -> None:
    """The cheap one is dead: asked until it is ejected, and not once after that."""
    async with RawBackend(json_answer(CHAT.document)) as alive:
        with closed_port() as port:
            dead = {"url": f"http://127.0.0.1:{port}", "name": "dead", "pool": "baseline"}
            budgets = [{"name": "burst", "scope": "pool:burst", "per": "day", "usd": 0.01}]
            rows = ({**dead, "price_per_second": 1e-6}, {"url": alive, "price_per_second": 0.01})
            async with proxy(*rows, budgets=budgets) as p:
                statuses = [(await ask(p)).status for _ in range(8)]
                lines = await p.exchanges(8)
                ejected = statuses.index(429)
                assert 1 <= ejected <= 5, "a probe may have found it first"
                assert statuses == [502] * ejected + [429] * (8 - ejected)
                assert [len(line["attempts"]) for line in lines] == [
                    int(status == 502) for status in statuses
                ]
                assert lines[-1]["reason"] == "budget_exceeded"
                assert len(p.events("budget.exhausted")) == 1
                assert p.events("fleet.panicked") == []
            assert alive.requests == []
