"""Budgets without a network: windows, room, holds, tenants, and how far they may be passed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.api.intake import tenant_of
from beacon_proxy.contracts import (
    NO_SLOT,
    Backend,
    Candidate,
    Exchange,
    Live,
    Outcome,
    Permit,
    Stage,
    Typical,
    Verdict,
)
from beacon_proxy.errors import BudgetExceeded, Limited
from beacon_proxy.spending import accounts
from beacon_proxy.spending.accounts import window
from beacon_proxy.spending.budgets import Budgets

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
HAIR = 1e-9  # USD


class Terms(NamedTuple):
    name: str = "daily"
    scope: str = "all"
    per: str = "day"
    usd: float = 1.0


class Past(NamedTuple):
    """The shape of what the ledger tells."""

    pool: str
    provider: str
    backend: str
    region: str
    usd: float


def fact(name: str = "a", price: float = 1.0, **more: Any) -> Backend:
    where = {"pool": "burst", "region": "us-east", **more}
    return Backend(name, "openai", "http://h", "http", "h", 80, price_per_second=price, **where)


@dataclass
class Running:
    exchange: Exchange
    backend: Backend
    permit: Permit
    started: float
    estimate: float


@dataclass(eq=False)
class Scene:
    """Budgets with a clock in hand; an attempt is expected to take `seconds`."""

    terms: tuple[Terms, ...] = (Terms(),)
    max_price: float | None = None
    now: float = 1000.0  # monotonic s
    unix: float = NOON
    seconds: float = 0.25
    look_pause: float = 1.0
    told: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.budgets = Budgets(
            self.terms,
            lambda backend, live, model, now: self.seconds * backend.price_per_second,
            max_price=self.max_price,
            clock=lambda: self.now,
            unix=lambda: self.unix,
            notify=self.tell,
            look_pause=self.look_pause,
        )

    def tell(self, event: str, /, **fields: Any) -> None:
        self.told.append({"event": event, **fields})

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.unix += seconds

    def exchange(self, tenant: str | None = None, **more: Any) -> Exchange:
        self.number += 1
        return Exchange(str(self.number), "POST", b"/", "/", (), self.now, tenant=tenant, **more)

    def fits(self, exchange: Exchange, *backends: Backend) -> list[str]:
        """Who is left of `backends`, as a plan has them."""
        rows = [Candidate(each, Live()) for each in backends or (fact(),)]
        fitting, refused = self.budgets.part(exchange, rows)
        assert len(fitting) + len(refused) == len(rows)
        return [candidate.backend.name for candidate in fitting]

    def refusal(self, exchange: Exchange, *backends: Backend) -> Limited:
        rows = [Candidate(each, Live()) for each in backends or (fact(),)]
        fitting, refused = self.budgets.part(exchange, rows)
        assert not fitting
        return self.budgets.limited(exchange, refused)

    def begin(
        self,
        backend: Backend | None = None,
        exchange: Exchange | None = None,
        tenant: str | None = None,
    ) -> Running | None:
        """As the chooser: plan and admit in one step; None where there is no room."""
        asked, at = exchange or self.exchange(tenant), backend or fact()
        if not self.fits(asked, at):
            return None
        permit = self.budgets.admit(asked, at)
        return Running(asked, at, permit, self.now, self.seconds * at.price_per_second)

    def end(self, running: Running, usd: float | None = None) -> float:
        """As the pipeline: release and record in one step. Returns what it cost."""
        cost = (self.now - running.started) * running.backend.price_per_second
        usd = cost if usd is None else usd
        running.permit.release()
        asked = running.exchange
        number = len(asked.attempts) + 1
        done = Outcome(running.backend, number, Verdict.GOOD, Stage.DONE, sent=True, usd=usd)
        asked.attempts.append(done)
        self.budgets.observe(asked, done)
        return usd

    def gauge(self, name: str, budget: str = "daily") -> float:
        return self.gauges()[name, budget]

    def gauges(self) -> dict[tuple[str, str], float]:
        return {
            (gauge.name, dict(gauge.labels)["budget"]): gauge.value
            for gauge in self.budgets.gauges()
        }

    @property
    def spent(self) -> float:
        return self.gauge("budget_spent_usd")

    @property
    def held(self) -> float:
        return self.gauge("budget_reserved_usd")


def begun(running: Running | None) -> Running:
    assert running is not None
    return running


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "at", "start", "end"),
    [
        ("minute", "2026-03-31T12:34:56", "2026-03-31T12:34:00", "2026-03-31T12:35:00"),
        ("hour", "2026-03-31T12:34:56", "2026-03-31T12:00:00", "2026-03-31T13:00:00"),
        ("day", "2026-03-31T23:59:59", "2026-03-31T00:00:00", "2026-04-01T00:00:00"),
        ("month", "2026-03-31T12:34:56", "2026-03-01T00:00:00", "2026-04-01T00:00:00"),
        ("month", "2028-02-29T00:00:00", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
        ("month", "2026-12-01T00:00:00", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
    ],
)
def test_window_when_asked_is_the_one_of_the_calendar_in_utc(
    per: str, at: str, start: str, end: str
) -> None:
    moment, first, last = (
        datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() for text in (at, start, end)
    )
    assert window(per, moment) == (first, last)


@given(
    st.sampled_from(["minute", "hour", "day", "month"]),
    st.floats(0, 4e9, allow_nan=False, allow_infinity=False),
)
def test_windows_when_one_ends_the_next_begins(per: str, unix: float) -> None:
    start, end = window(per, unix)
    assert start <= unix < end
    assert window(per, end)[0] == end
    assert window(per, start) == (start, end)


def test_budget_when_its_window_is_over_begins_anew_and_still_holds_what_runs() -> None:
    scene = Scene((Terms(per="hour"),))
    scene.end(begun(scene.begin()), usd=0.9)
    assert scene.begin() is None
    scene.pass_by(3599)
    assert scene.begin() is None
    scene.pass_by(1)
    assert scene.spent == 0
    across = begun(scene.begin())
    scene.end(begun(scene.begin()), usd=0.1)
    scene.pass_by(3600)
    assert (scene.spent, scene.held) == (0, 3600)  # it has run on
    scene.end(across)
    assert (scene.spent, scene.held) == (3600, 0)


def test_budget_when_an_attempt_outlasts_its_window_counts_in_the_one_it_ends_in() -> None:
    """Though nobody asked in between; and what was spent before stays behind."""
    scene = Scene((Terms(per="hour", usd=9.0),))
    across = begun(scene.begin())
    scene.end(begun(scene.begin()), usd=0.5)
    assert scene.spent == 0.5
    scene.pass_by(3600)
    scene.end(across, usd=0.75)
    assert scene.spent == 0.75


@pytest.mark.parametrize(("back", "kept"), [(1800.0, True), (3600.0, True), (8 * 3600.0, False)])
def test_budget_when_the_clock_is_set_back_forgets_nothing_but_for_a_long_way(
    back: float, kept: bool
) -> None:
    """A step of an NTP daemon must not give the money twice; a wrong year must not bind it."""
    scene = Scene((Terms(per="hour"),))
    scene.end(begun(scene.begin()), usd=0.5)
    scene.unix -= back
    assert scene.spent == (0.5 if kept else 0.0)


@pytest.mark.parametrize("per", ["minute", "hour", "day", "month"])
@pytest.mark.parametrize("windows", [1, 3, -1, -30])
def test_budget_when_the_clock_is_wrong_for_a_moment_has_spent_the_same_after(
    per: str, windows: int
) -> None:
    """A day ahead it began anew, and once right again it was still as good as new."""
    scene = Scene((Terms(per=per, scope="tenant", usd=10.0),), seconds=1.0)
    scene.unix += 20.0
    across = begun(scene.begin(tenant="b"))
    scene.end(begun(scene.begin(tenant="a")), usd=9.5)
    right = scene.unix
    scene.unix += windows * 31 * 86_400.0
    if windows != -1:
        assert (scene.spent, scene.held) == (0.0, 1.0)
    scene.unix = right
    assert (scene.spent, scene.gauge("budget_used_ratio")) == (9.5, 0.95)
    assert scene.begin(tenant="a") is None
    assert scene.begin(tenant="c") is not None
    scene.end(across, usd=9.75)
    assert scene.spent == 9.75


def test_budget_when_money_was_spent_while_the_clock_was_ahead_knows_it_when_that_day_comes() -> (
    None
):
    scene = Scene((Terms(usd=10.0),))
    scene.end(begun(scene.begin()), usd=9.5)
    scene.unix += 86_400.0
    scene.end(begun(scene.begin()), usd=4.0)
    assert scene.spent == 4.0
    scene.unix -= 86_400.0
    scene.end(begun(scene.begin()), usd=0.25)
    assert scene.spent == 9.75
    scene.unix += 86_400.0
    assert scene.spent == 4.0
    scene.unix += 86_400.0
    assert scene.spent == 0.0


def test_event_when_the_clock_was_ahead_for_a_moment_is_not_told_again() -> None:
    scene = Scene((Terms(usd=0.1),))
    scene.refusal(scene.exchange())
    scene.unix += 86_400.0
    scene.gauges()
    scene.unix -= 86_400.0
    scene.refusal(scene.exchange())
    assert len(scene.told) == 1


# -- room ----------------------------------------------------------------------------------------


def test_room_when_it_is_exactly_filled_lets_in_no_more() -> None:
    """Ten tenths are one, whatever floats make of them."""
    scene = Scene(seconds=0.1)
    running = [begun(scene.begin()) for _ in range(10)]
    assert scene.begin() is None
    assert scene.held == pytest.approx(1.0)
    for each in running:
        scene.end(each, usd=0.1)
    assert scene.begin() is None
    assert (scene.spent, scene.held) == (pytest.approx(1.0), 0.0)


def test_room_when_the_dear_one_has_none_is_left_for_cheaper_ones() -> None:
    scene = Scene((Terms(usd=0.3),), seconds=1.0)
    dear, cheap, free = fact("dear", 0.5), fact("cheap", 0.2), fact("free", 0.0)
    assert scene.fits(scene.exchange(), dear, cheap, free) == ["cheap", "free"]
    begun(scene.begin(cheap))
    assert scene.fits(scene.exchange(), dear, cheap, free) == ["free"]


@pytest.mark.parametrize("usd", [0.0, 0.5])
def test_room_when_nothing_is_left_is_there_for_what_costs_nothing(usd: float) -> None:
    """A rented backend's work is free, even where what ran has cost more than there was."""
    scene = Scene((Terms(usd=usd),))
    if usd:
        scene.end(begun(scene.begin()), usd=3.0)
    free = fact("rented", 0.0)
    assert scene.fits(scene.exchange(), fact(), free) == ["rented"]
    running = begun(scene.begin(free))
    assert running.permit is NO_SLOT
    assert scene.gauge("budget_used_ratio") == (6.0 if usd else 0.0)


SCOPES = [
    ("all", True),
    ("pool:burst", True),
    ("pool:baseline", False),
    ("provider:openai", True),
    ("provider:modal", False),
    ("backend:a", True),
    ("backend:b", False),
    ("region:us-east", True),
    ("region:eu-west", False),
    ("tenant", True),
]


@pytest.mark.parametrize(("scope", "covered"), SCOPES)
def test_scope_when_it_covers_a_backend_counts_what_that_costs(scope: str, covered: bool) -> None:
    scene = Scene((Terms(scope=scope, usd=0.5),), seconds=0.4)
    running = begun(scene.begin())
    assert scene.held == (0.4 if covered else 0.0)
    assert (scene.begin() is None) is covered
    scene.end(running, usd=0.3)
    assert scene.spent == (0.3 if covered else 0.0)


@pytest.mark.parametrize(("scope", "covered"), SCOPES)
def test_restore_when_it_is_told_of_the_past_counts_it_as_its_own(
    scope: str, covered: bool
) -> None:
    scene = Scene((Terms(scope=scope), Terms("monthly", per="month")))
    day, month = window("day", NOON)[0], window("month", NOON)[0]
    assert scene.budgets.windows() == [month, day]
    rows = [
        Past("burst", "openai", "a", "us-east", 0.3),
        Past("burst", "openai", "a", "us-east", 0.3),
    ]
    scene.budgets.restore(day, rows, [("t", 0.2), (None, 0.6)])
    assert scene.spent == (0.6 if covered else 0.0)
    assert scene.gauge("budget_spent_usd", "monthly") == 0.0
    scene.seconds = 0.5
    assert (scene.begin() is None) is covered


def test_restore_when_its_window_ended_meanwhile_counts_nothing() -> None:
    scene = Scene((Terms(per="minute"),))
    (since,) = scene.budgets.windows()
    scene.pass_by(60)
    scene.budgets.restore(since, [Past("burst", "openai", "a", "us-east", 0.3)], [(None, 0.3)])
    assert scene.spent == 0.0


def test_restore_when_tenants_have_a_past_gives_each_its_own() -> None:
    scene = Scene((Terms(scope="tenant"),), seconds=0.5)
    since = scene.budgets.windows()[0]
    for piece in ([("a" * 16, 0.5)], [("a" * 16, 0.25), (None, 0.25)]):
        scene.budgets.restore(since, tenants=piece)
    assert scene.begin(tenant="a" * 16) is None
    assert scene.begin() is not None
    assert scene.begin() is None


# -- what is told --------------------------------------------------------------------------------


def test_refusal_when_money_is_spent_names_the_budget_and_when_it_begins_anew() -> None:
    scene = Scene()
    scene.end(begun(scene.begin()), usd=1.0)
    error = scene.refusal(scene.exchange())
    assert isinstance(error, BudgetExceeded)
    assert (error.status, error.reason) == (429, "budget_exceeded")
    assert error.message == "the budget 'daily' has no room for this request"
    assert error.retry_after == 12 * 3600


def test_refusal_when_only_what_runs_is_in_the_way_asks_to_come_back_soon() -> None:
    scene = Scene((Terms(usd=0.3),))
    begun(scene.begin())
    assert scene.refusal(scene.exchange()).retry_after == 5.0
    scene.pass_by(12 * 3600 - 2)  # and the window ends even sooner
    scene.unix += 0.5
    scene.end(begun(scene.begin(fact("free", 0.0))))
    assert scene.refusal(scene.exchange()).retry_after == 1.5


def test_refusal_when_several_budgets_stand_in_the_way_is_the_first_to_let_someone_in() -> None:
    """A candidate waits for the last of its own budgets, the client for the first candidate."""
    terms = (
        Terms("all-month", "all", "month", 0.0),
        Terms("a-hour", "backend:a", "hour", 0.0),
        Terms("b-minute", "backend:b", "minute", 0.0),
    )
    scene = Scene(terms[1:])
    error = scene.refusal(scene.exchange(), fact("a"), fact("b"))
    assert ("'b-minute'" in error.message, error.retry_after) == (True, 60)
    scene = Scene(terms)
    error = scene.refusal(scene.exchange(), fact("a"), fact("b"))
    assert ("'all-month'" in error.message, error.retry_after) == (True, 12 * 3600)


def test_event_when_a_budget_refuses_is_told_once_in_each_window() -> None:
    scene = Scene((Terms(per="hour", usd=0.3), Terms("other", "pool:baseline")))
    running = begun(scene.begin())
    for _ in range(3):
        scene.refusal(scene.exchange())
    assert scene.told == [
        {
            "event": "budget.exhausted",
            "budget": "daily",
            "scope": "all",
            "per": "hour",
            "usd": 0.3,
            "spent_usd": 0.0,
            "reserved_usd": 0.25,
            "begins_anew_s": 3600.0,
        }
    ]
    scene.end(running, usd=0.0)
    scene.pass_by(3600)
    running = begun(scene.begin())
    scene.refusal(scene.exchange())
    assert [told["budget"] for told in scene.told] == ["daily", "daily"]


def test_ratio_when_requests_are_turned_away_is_one_until_somebody_is_let_in() -> None:
    """A budget is never quite full: 100 % would never be seen."""
    scene = Scene()
    scene.end(begun(scene.begin()), usd=0.8)
    assert scene.gauge("budget_used_ratio") == 0.8
    scene.refusal(scene.exchange())
    assert scene.gauge("budget_used_ratio") == 1.0
    scene.seconds = 0.1
    begun(scene.begin())
    assert scene.gauge("budget_used_ratio") == pytest.approx(0.9)


def test_ratio_when_what_was_turned_away_would_fit_by_now_is_what_is_used() -> None:
    """A burst holds all for a moment: when it is over there is room, be it that nobody asks."""
    scene = Scene()
    running = [begun(scene.begin()) for _ in range(4)]
    scene.refusal(scene.exchange())
    shown = []
    for each in running:
        shown.append(scene.gauge("budget_used_ratio"))
        scene.end(each, usd=0.1)
    assert shown == pytest.approx([1.0, 1.0, 0.7, 0.55]), "the next one would be let in at 0.75"
    assert scene.gauge("budget_used_ratio") == pytest.approx(0.4)
    scene.seconds = 0.7
    scene.refusal(scene.exchange())
    assert scene.gauge("budget_used_ratio") == 1.0
    scene.pass_by(43_200)
    assert scene.gauge("budget_used_ratio") == 0.0, "a new window"


def test_ratio_when_several_were_turned_away_goes_by_the_least_that_still_would_be() -> None:
    scene = Scene(seconds=0.75)
    first = begun(scene.begin())
    scene.seconds = 0.5
    scene.refusal(scene.exchange())
    scene.seconds = 0.3
    scene.refusal(scene.exchange())
    scene.seconds = 0.9
    scene.refusal(scene.exchange())
    scene.end(first, usd=0.6)
    assert scene.gauge("budget_used_ratio") == pytest.approx(0.6), "one of 0.3 would fit"
    scene.refusal(scene.exchange())
    assert scene.gauge("budget_used_ratio") == 1.0, "it asks for 0.9"


def test_ratio_when_a_pool_is_closed_and_the_other_takes_all_is_one_and_told() -> None:
    """`pool:burst`, over it baseline alone: no client is turned away, yet it lets nobody in."""
    scene, cheap = Scene((Terms(scope="pool:burst"),)), fact("cheap", 0.0, pool="baseline")
    scene.end(begun(scene.begin()), usd=0.95)
    assert scene.fits(scene.exchange(), fact(), fact("small", 0.1), cheap) == ["small", "cheap"]
    assert (scene.gauge("budget_used_ratio"), scene.told) == (0.95, []), "it lets some in"
    assert scene.fits(scene.exchange(), fact(), cheap) == ["cheap"]
    assert scene.gauge("budget_used_ratio") == 1.0
    assert [told["event"] for told in scene.told] == ["budget.exhausted"]
    assert begun(scene.begin(fact("small", 0.1))).estimate == 0.025
    assert scene.gauge("budget_used_ratio") == pytest.approx(0.975)


def test_ratio_when_a_budget_of_nothing_is_closed_as_it_was_made_to_tells_nothing() -> None:
    scene = Scene((Terms(scope="pool:burst", usd=0.0),))
    free = fact("free", 0.0, pool="baseline")
    assert scene.fits(scene.exchange(), fact(), free) == ["free"]
    assert (scene.gauge("budget_used_ratio"), scene.told) == (0.0, [])
    scene.refusal(scene.exchange())
    assert scene.gauge("budget_used_ratio") == 1.0


def test_gauges_when_a_budget_is_each_tenants_are_those_of_who_used_most() -> None:
    scene = Scene((Terms("each", "tenant", usd=2.0),))
    for tenant, usd in (("a", 0.2), ("b", 0.8), ("c", 0.5)):
        scene.end(begun(scene.begin(tenant=tenant)), usd=usd)
    assert scene.gauges() == {
        ("budget_usd", "each"): 2.0,
        ("budget_spent_usd", "each"): 0.8,
        ("budget_reserved_usd", "each"): 0.0,
        ("budget_used_ratio", "each"): 0.4,
    }


def test_gauges_when_a_tenant_holds_most_are_its_own_though_it_spent_nothing_yet() -> None:
    scene = Scene((Terms("each", "tenant"),), seconds=0.75)
    scene.end(begun(scene.begin(tenant="a")), usd=0.5)
    begun(scene.begin(tenant="b"))
    assert scene.gauge("budget_reserved_usd", "each") == 0.75
    assert scene.gauge("budget_used_ratio", "each") == 0.75


# -- tenants -------------------------------------------------------------------------------------


def test_tenant_when_it_has_spent_its_own_leaves_the_others_theirs() -> None:
    scene = Scene((Terms("each", "tenant"), Terms("all", usd=1.5)))
    scene.end(begun(scene.begin(tenant="a")), usd=1.0)
    assert scene.begin(tenant="a") is None
    scene.refusal(scene.exchange("a"))
    assert scene.told[0]["tenant"] == "a"
    assert scene.begin(tenant="b") is not None
    assert scene.begin(tenant=None) is not None  # who names none is one, too
    assert scene.begin(tenant="") is None  # the same one, and now all is spent or held


def test_tenants_when_clients_make_them_up_leave_a_later_one_its_own_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once there were 10 000, all later ones of the window shared one budget."""
    monkeypatch.setattr(accounts, "TENANTS", 20)
    scene = Scene((Terms(scope="tenant", per="hour"),), seconds=0.5)
    scene.end(begun(scene.begin(tenant="spent")), usd=0.6)
    across = begun(scene.begin(tenant="runs"))
    for number in range(100):
        scene.end(begun(scene.begin(tenant=f"made up {number}")), usd=0.001)
        scene.refusal(scene.exchange(f"refused {number}"), fact(price=9.0))
    (budget,) = scene.budgets._budgets
    assert len(budget._accounts) <= 20
    scene.end(begun(scene.begin(tenant="real")), usd=0.6)
    assert scene.begin(tenant="real") is None
    assert scene.begin(tenant="spent") is None, "who spent most is remembered"
    assert scene.begin(tenant="runs") is not None, "0.5 each"
    assert scene.begin(tenant="runs") is None, "and so is who holds for what runs"
    assert scene.begin(tenant="another") is not None
    scene.end(across, usd=0.1)


def test_tenants_when_more_run_than_are_remembered_are_held_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounts, "TENANTS", 3)
    scene = Scene((Terms(scope="tenant", per="hour"),), seconds=0.6)
    running = [begun(scene.begin(tenant=tenant)) for tenant in "abcdef"]
    assert [scene.begin(tenant=tenant) for tenant in "abcdef"] == [None] * 6
    for each in running:
        scene.end(each, usd=0.1)
    scene.end(begun(scene.begin(tenant="g")), usd=0.1)
    (budget,) = scene.budgets._budgets
    for tenant in "hijkl":
        scene.end(begun(scene.begin(tenant=tenant)), usd=0.1)
    assert len(budget._accounts) <= 6


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        (((b"X-Tenant", b"acme"),), "822b33ad87c148a0"),  # printf %s acme | sha256sum
        (((b"x-TENANT", b"acme"), (b"X-Other", b"1")), "822b33ad87c148a0"),
        (((b"X-Tenants", b"acme"),), None),
        (((b"X-Tenant", b""),), None),
        ((), None),
    ],
)
def test_tenant_when_its_header_names_it_is_the_beginning_of_its_hash(
    headers: tuple[tuple[bytes, bytes], ...], tenant: str | None
) -> None:
    assert tenant_of(headers, b"x-tenant") == tenant


def test_tenant_when_its_header_comes_twice_is_neither_of_the_two() -> None:
    """What a gateway adds, a client cannot hide behind a field of its own, nor the other way."""
    one, other = (b"X-Tenant", b"acme"), (b"X-Tenant", b"rival")
    seen = {tenant_of(fields, b"x-tenant") for fields in ((one,), (other,), (one, other))}
    assert len(seen) == 3


# -- holds ---------------------------------------------------------------------------------------


def test_hold_when_a_stream_runs_on_is_what_it_has_cost_so_far() -> None:
    scene = Scene(seconds=0.25)
    stream = begun(scene.begin())
    scene.pass_by(0.25)
    assert scene.held == 0.25
    assert scene.fits(scene.exchange(), fact("b", 1.0)) == ["b"]
    scene.pass_by(0.65)
    assert scene.fits(scene.exchange(), fact("b", 1.0)) == ["b"]  # looked less than a second ago
    scene.pass_by(0.35)
    assert scene.fits(scene.exchange(), fact("b", 1.0)) == []
    assert scene.held == pytest.approx(1.25)
    scene.end(stream, usd=0.5)  # its provider billed less
    assert (scene.spent, scene.held) == (0.5, 0.0)
    assert scene.fits(scene.exchange(), fact("b", 1.0)) == ["b"]


def test_hold_when_it_is_released_twice_gives_back_once() -> None:
    scene = Scene()
    one, two = begun(scene.begin()), begun(scene.begin())
    one.permit.release()
    one.permit.release()
    assert scene.held == 0.25
    two.permit.release()
    assert scene.held == 0.0


def test_hold_when_another_attempt_is_weighed_is_what_the_one_before_really_cost() -> None:
    """A connection refused costs nothing: what it still holds must not stand in its own way."""
    scene = Scene((Terms(usd=0.3),))
    asked = scene.exchange()
    first = begun(scene.begin(exchange=asked))
    assert scene.fits(asked, fact("b")) == []  # while it runs
    failed = Outcome(first.backend, 1, Verdict.STRIKE, Stage.CONNECT, usd=0.0)
    asked.attempts.append(failed)  # as the pipeline does while it asks the retry rules
    assert scene.fits(asked, fact("b")) == ["b"]
    assert scene.fits(scene.exchange(), fact("b")) == []  # but not for others
    asked.attempts[0] = Outcome(first.backend, 1, Verdict.STRIKE, Stage.STREAM, usd=0.1)
    assert scene.fits(asked, fact("b")) == []


def test_hold_when_it_was_of_another_budget_makes_no_room_in_this_one() -> None:
    scene = Scene((Terms("a", "backend:a"), Terms("b", "backend:b", usd=0.2)))
    asked = scene.exchange()
    first = begun(scene.begin(exchange=asked))
    asked.attempts.append(Outcome(first.backend, 1, Verdict.STRIKE, Stage.CONNECT, usd=0.0))
    assert scene.fits(asked, fact("b")) == []


# -- the limit of one request --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "header", "named"),
    [
        (0.2, None, "limits.max_price_per_request"),
        (None, 0.2, "X-Beacon-Max-Price"),
        (0.2, 0.9, "limits.max_price_per_request"),
        (0.9, 0.2, "X-Beacon-Max-Price"),
    ],
)
def test_limit_when_a_request_would_cost_more_is_the_lower_one(
    configured: float | None, header: float | None, named: str
) -> None:
    scene = Scene((), configured, seconds=1.0)
    asked = scene.exchange(max_price=header)
    assert scene.fits(asked, fact("dear", 0.3), fact("cheap", 0.2), fact("free", 0.0)) == [
        "cheap",
        "free",
    ]
    error = scene.refusal(asked, fact("dear", 0.3))
    assert (error.status, error.reason) == (429, "rate_limited")
    assert error.message == f"no backend is expected to answer within {named}"
    assert error.retry_after == 60.0
    assert scene.told == []


def test_limit_when_attempts_were_made_counts_what_they_cost() -> None:
    scene = Scene((), 1.0, seconds=1.0)
    asked = scene.exchange()
    assert scene.fits(asked, fact("a", 0.6)) == ["a"]
    scene.end(begun(scene.begin(fact("a", 0.6), asked)), usd=0.5)
    assert scene.fits(asked, fact("a", 0.6), fact("b", 0.5), fact("free", 0.0)) == ["b", "free"]
    scene.end(begun(scene.begin(fact("b", 0.5), asked)), usd=0.7)
    assert scene.fits(asked, fact("b", 0.1), fact("free", 0.0)) == ["free"]


def test_limit_when_a_budget_stands_in_the_way_of_one_that_is_what_waiting_helps() -> None:
    scene = Scene((Terms("b", "backend:b", usd=0.0),), 0.5, seconds=1.0)
    error = scene.refusal(scene.exchange(), fact("a", 1.0), fact("b", 0.1))
    assert "'b'" in error.message


# -- no estimate shuts a door for good -----------------------------------------------------------


def known(seconds: float, at: float) -> Live:
    return Live(typical={None: Typical(billed=seconds, at=at)})


@pytest.mark.parametrize(
    ("terms", "max_price"), [((Terms(usd=0.5),), None), ((), 0.5)], ids=["budget", "limit"]
)
def test_estimate_when_it_had_no_news_for_long_lets_one_in_that_may_correct_it(
    terms: tuple[Terms, ...], max_price: float | None
) -> None:
    """One long answer shut a model out until the process began anew: 429, and nothing was spent."""
    scene = Scene(terms, max_price, seconds=1.0)
    row = Candidate(fact("a", 1.0), known(1.0, at=scene.now))

    def fits() -> bool:
        return bool(scene.budgets.part(scene.exchange(), [row])[0])

    assert not fits()
    scene.pass_by(60.0)
    assert not fits()
    scene.pass_by(290.0)
    assert not fits()
    scene.pass_by(20.0)
    assert fits()


def test_estimate_when_it_is_above_a_budget_lets_one_in_and_not_two() -> None:
    scene = Scene((Terms(usd=0.5),), seconds=1.0)
    row = Candidate(fact("a", 1.0), known(1.0, at=scene.now - 1000.0))
    one, other = scene.exchange(), scene.exchange()
    assert scene.budgets.part(one, [row])[0]
    permit = scene.budgets.admit(one, row.backend)
    assert not scene.budgets.part(other, [row])[0]
    permit.release()
    assert scene.budgets.part(other, [row])[0]


def test_estimate_when_it_is_a_guess_is_believed_less_and_less_too() -> None:
    """Without one answer nothing else would ever be known."""
    scene = Scene((), 0.5, seconds=1.0)
    assert scene.fits(scene.exchange()) == []
    scene.pass_by(370.0)
    assert scene.fits(scene.exchange()) == ["a"]


def test_estimate_when_it_had_no_news_is_still_believed_by_the_clients_own_limit() -> None:
    """What a client says that it pays at most is no matter of whether the proxy finds out."""
    scene = Scene((Terms(usd=0.5),), 0.5, seconds=1.0)
    row = Candidate(fact("a", 1.0), known(1.0, at=scene.now - 1e6))
    assert scene.budgets.part(scene.exchange(max_price=1.0), [row])[0]
    own = scene.exchange(max_price=0.9)
    fitting, refused = scene.budgets.part(own, [row])
    assert fitting == []
    assert "X-Beacon-Max-Price" not in scene.budgets.limited(scene.exchange(), refused).message
    alone = Scene((), seconds=1.0)
    fitting, refused = alone.budgets.part(own, [row])
    assert fitting == []
    assert "X-Beacon-Max-Price" in alone.budgets.limited(own, refused).message


BY_LIMIT = pytest.mark.parametrize(
    ("terms", "max_price"),
    [
        pytest.param((Terms(usd=0.5),), None, id="budget"),
        pytest.param((Terms(usd=0.5, scope="tenant"),), None, id="of each tenant"),
        pytest.param((), 0.5, id="limit"),
        pytest.param((Terms(usd=0.5, scope="tenant"),), 0.5, id="both"),
    ],
)


@BY_LIMIT
def test_trial_when_it_lasts_shuts_out_nobody_for_long(
    terms: tuple[Terms, ...], max_price: float | None
) -> None:
    """A stream of an hour, or an open tunnel, was the one trial of a backend while it ran."""
    scene = Scene(terms, max_price, seconds=1.0)
    at = fact("a", 1.0)
    rows = [Candidate(at, known(1.0, at=scene.now - 1e6))]
    first, second = scene.exchange("t1"), scene.exchange("t2")
    assert scene.budgets.part(first, rows)[0]
    trial = scene.budgets.admit(first, at)
    fitting, refused = scene.budgets.part(second, rows)
    assert not fitting
    wait = scene.budgets.limited(second, refused).retry_after
    assert wait is not None
    assert wait <= 5.0, "it waits for the trial, not for the window's end"
    scene.pass_by(61.0)
    shared = bool(terms) and terms[0].scope == "all"  # it holds what it has cost, and has no room
    assert bool(scene.budgets.part(second, rows)[0]) is not shared
    if not shared:
        later = scene.budgets.admit(second, at)
        trial.release()
        assert not scene.budgets.part(scene.exchange("t3"), rows)[0], "the later one runs still"
        later.release()
    trial.release()
    assert scene.budgets._tried == {}
    if terms:
        assert scene.gauge("budget_used_ratio") == 0.0, "what was turned away was so for the trial"


def test_budget_when_only_a_dear_one_is_left_to_try_again_is_not_used_up() -> None:
    """The plan behind a failed attempt lacks those that fit, and says nothing of a budget."""
    scene = Scene((Terms(usd=1.0),), seconds=1.0)
    cheap, dear = fact("a", 0.02), fact("b", 2.0)
    running = begun(scene.begin(cheap))
    assert scene.fits(running.exchange, dear) == []
    scene.end(running, usd=0.0)
    scene.refusal(running.exchange, dear)
    assert (scene.told, scene.gauge("budget_used_ratio")) == ([], 0.0)
    scene.refusal(scene.exchange(), dear)
    assert [told["event"] for told in scene.told] == ["budget.exhausted"]


@BY_LIMIT
def test_estimate_when_another_fits_without_is_not_tried(
    terms: tuple[Terms, ...], max_price: float | None
) -> None:
    scene = Scene(terms, max_price, seconds=1.0)
    long_ago = known(1.0, at=scene.now - 1e6)
    dear, weak = Candidate(fact("dear", 1.0), long_ago), Candidate(fact("weak", 1.0), long_ago)
    cheap = Candidate(fact("cheap", 0.1), Live())
    weak.last_resort = True

    def fits(*rows: Candidate) -> list[str]:
        fitting, refused = scene.budgets.part(scene.exchange(), rows)
        assert len(fitting) + len(refused) == len(rows)
        return [each.backend.name for each in fitting]

    assert fits(dear, cheap) == ["cheap"]
    assert fits(dear) == ["dear"]
    cheap.last_resort = True  # it is not well: no reason to ask it before one that is
    assert fits(dear, cheap) == ["dear", "cheap"]
    assert fits(dear, weak, cheap) == ["dear", "cheap"]
    assert fits(weak, cheap) == ["cheap"]


@BY_LIMIT
def test_trial_of_an_estimate_is_one_at_a_time_whoever_asks(
    terms: tuple[Terms, ...], max_price: float | None
) -> None:
    """A hundred at once, or one of each tenant, all went to a backend known to be too dear."""
    scene = Scene(terms, max_price, seconds=1.0)
    at = fact("a", 1.0)
    live = known(1.0, at=scene.now - 1e6)
    live.typical["m"] = live.typical["n"] = Typical(billed=1.0, at=scene.now - 1e6)
    live.usual = live.typical["m"]
    alive: list[Exchange] = []  # as in the proxy, as long as their permits

    def ask(tenant: str, work: str | None = "m") -> Permit | None:
        asked = scene.exchange(tenant)
        asked.work = work
        alive.append(asked)
        if not scene.budgets.part(asked, [Candidate(at, live)])[0]:
            return None
        return scene.budgets.admit(asked, at)

    def each_once() -> list[Permit]:
        tenants = "abcdef"
        if "all" in [each.scope for each in terms]:
            permits = [ask("a")]
        else:  # each work has an estimate of its own, but for those that nobody has seen yet
            works = ("m", "n", "made-up-1", None)
            permits = [ask(tenant, work) for tenant, work in zip(tenants, works, strict=False)]
        assert all(ask(tenant) is None for tenant in tenants)
        assert all(ask(tenant, "made-up-2") is None for tenant in tenants)
        assert None not in permits
        return [each for each in permits if each is not None]

    for permit in each_once():
        permit.release()
        permit.release()
    permits = each_once()
    permits[0].release()
    again = ask("z")
    assert again is not None
    permits[0].release()  # a second time: it is another's now
    assert ask("y") is None
    for permit in [again, *permits[1:]]:
        permit.release()
    assert scene.budgets._tried == {}
    live.typical["m"].at = scene.now  # it told what it costs
    assert ask("x") is None


# -- for any interleaving ------------------------------------------------------------------------

BACKENDS = (
    fact("cheap", 0.01, pool="baseline", region="eu-west"),
    fact("dear", 0.1),
    fact("dear-eu", 0.1, region="eu-west"),
    fact("free", 0.0),
)
ANY_TERMS = st.builds(
    Terms,
    name=st.just(""),
    scope=st.sampled_from(["all", "tenant", "pool:burst", "backend:dear", "region:eu-west"]),
    per=st.sampled_from(["minute", "hour", "day"]),
    usd=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
)
BEGIN = st.tuples(
    st.just("begin"),
    st.sampled_from(BACKENDS),
    st.sampled_from([None, "a", "b"]),
    st.floats(0.0, 20.0),  # s that it is expected to take
)
END = st.tuples(st.just("end"), st.integers(0, 99), st.floats(0.0, 1.0))
PASS = st.tuples(st.just("pass"), st.sampled_from([0.1, 0.5, 1.0, 7.0, 59.0, 3599.0]))


@dataclass
class Counted:
    """An attempt, as the test itself keeps its books."""

    running: Running
    usd: float | None = None  # what it cost, once it has ended
    ended: float = 0.0  # unix s


def counted_in(
    scene: Scene, terms: Terms, each: list[Counted], key: str | None
) -> Iterator[Counted]:
    """Those that are in the window of a budget that is now, and in its account of `key`."""
    begins = window(terms.per, scene.unix)[0]
    kind, _, of = terms.scope.partition(":")
    fields = {"pool": "pool", "backend": "name", "region": "region"}
    for one in each:
        backend, tenant = one.running.backend, one.running.exchange.tenant
        ours = tenant == key if kind == "tenant" else True
        if of:
            ours = getattr(backend, fields[kind]) == of
        if ours and (one.usd is None or one.ended >= begins):
            yield one


def check_books(scene: Scene, books: list[Counted]) -> None:
    """Spent is what was paid; held is at least each estimate; both pass the budget by no more than
    what attempts cost beyond their estimates."""
    scene.gauges()  # somebody looks
    for budget, terms in zip(scene.budgets._budgets, scene.terms, strict=True):
        for key in (None, "a", "b") if terms.scope == "tenant" else (None,):
            account = budget.look(key)
            ours = list(counted_in(scene, terms, books, key))
            paid = sum(one.usd for one in ours if one.usd is not None)
            runs = [one for one in ours if one.usd is None]
            estimates = sum(one.running.estimate for one in runs)
            so_far = [
                (scene.now - one.running.started) * one.running.backend.price_per_second
                for one in runs
            ]
            most = sum(
                max(one.running.estimate, cost) for one, cost in zip(runs, so_far, strict=True)
            )
            assert account.spent == pytest.approx(paid, abs=HAIR)
            assert estimates - HAIR <= account.held <= most + HAIR
            beyond = sum(max(0.0, one.usd - one.running.estimate) for one in ours if one.usd)
            beyond += sum(
                max(0.0, cost - one.running.estimate)
                for one, cost in zip(runs, so_far, strict=True)
            )
            # One that nobody had news of for long, into a budget that nobody had touched.
            over = (one.running.estimate - terms.usd for one in ours if terms.usd)
            beyond += max([0.0, *over])
            assert account.spent + account.held <= terms.usd + beyond + HAIR


@settings(deadline=None, max_examples=200)
@given(
    st.lists(ANY_TERMS, min_size=1, max_size=3),
    st.lists(st.one_of(BEGIN, BEGIN, END, PASS), max_size=60),
)
def test_books_when_attempts_begin_and_end_in_any_order_balance(
    terms: list[Terms], steps: list[tuple[Any, ...]]
) -> None:
    scene = Scene(tuple(each._replace(name=str(n)) for n, each in enumerate(terms)))
    books: list[Counted] = []
    running: list[Counted] = []

    def end(one: Counted, share: float) -> None:
        cost = (scene.now - one.running.started) * one.running.backend.price_per_second
        one.usd, one.ended = scene.end(one.running, cost * share), scene.unix

    for step in steps:
        if step[0] == "pass":
            scene.pass_by(step[1])
        elif step[0] == "end":
            if running:
                end(running.pop(step[1] % len(running)), step[2])
        else:
            _, backend, tenant, scene.seconds = step
            if (new := scene.begin(backend, tenant=tenant)) is not None:
                books.append(Counted(new))
                running.append(books[-1])
        check_books(scene, books)
    while running:
        end(running.pop(), 1.0)
    check_books(scene, books)
    assert scene.budgets._running == {}
    assert all(value == 0.0 for (name, _), value in scene.gauges().items() if "reserved" in name)


@settings(deadline=None)
@given(
    st.integers(1, 100),
    st.floats(0.01, 1.0),
    st.lists(st.floats(0.0, 2.0), min_size=100, max_size=100),
)
def test_overshoot_when_none_costs_over_twice_its_estimate_is_one_estimate_each(
    streams: int, limit: float, shares: list[float]
) -> None:
    """A hundred ask in the same moment, and whatever each turns out to cost, up to twice."""
    scene = Scene((Terms(usd=limit),), seconds=0.01)
    running = [one for one in (scene.begin() for _ in range(streams)) if one is not None]
    assert len(running) <= limit / 0.01 + 1e-6
    assert len(running) == min(streams, int(limit / 0.01 + 1e-6))
    for one, share in zip(running, shares, strict=False):
        scene.end(one, usd=0.01 * share)
    assert scene.spent <= limit + len(running) * 0.01 + HAIR
