"""What the blend and the bound on the price promise, over any traffic: docs/blend.md.

The chooser, the fleet and the middlewares are the real ones; the attempts are made up, so that they
end in any order. `python -m tests.test_blend_properties` writes the table of an outage into the
page.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Candidates,
    Exchange,
    Live,
    Outcome,
    Stage,
    TokenPrice,
    Usage,
    Verdict,
)
from beacon_proxy.errors import NoBackend
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.routing.chain import Chain
from beacon_proxy.routing.chooser import Choice, Chooser
from beacon_proxy.routing.queue import Queue
from beacon_proxy.spending.bill import price_of
from middleware.capacity import Capacity
from middleware.cost import Blend, Cost
from middleware.cost.bound import _MEMORY
from providers.openai import OpenAI

PAGE = Path(__file__).parent.parent / "docs" / "blend.md"
MADE = "<!-- made by `python -m tests.test_blend_properties` -->\n"
END = "<!-- end of what is made -->\n"
NOW = 1000.0  # s; nothing here depends on time
ROOMY = 1_000_000
WARMING_UP = 20  # requests, so that either pool has served before an outage begins
# Without shrinking: its examples are long, and a seed says all there is to say.
PHASES = (Phase.explicit, Phase.generate)
few = settings(max_examples=40, deadline=None, database=None, derandomize=True, phases=PHASES)
seeds = st.integers(0, 1 << 32)
shares = st.integers(1, 19).map(lambda n: n / 20)


def backend(name: str, pool: str, price: float = 0.0001, room: int = ROOMY, **more: Any) -> Backend:
    return Backend(
        name,
        "openai",
        "http://127.0.0.1:1",
        "http",
        "127.0.0.1",
        1,
        pool=pool,
        price_per_second=price,
        max_in_flight=room,
        **more,
    )


def fleet_of(each: int, room: int = ROOMY) -> list[Backend]:
    """So many backends in each pool."""
    baseline = [backend(f"golem{n}", "baseline", 0.0001, room) for n in range(each)]
    return baseline + [backend(f"modal{n}", "burst", 0.0003, room) for n in range(each)]


@dataclass(slots=True)
class Away:
    """Leaves out pools, as health does those that are ejected and region those ruled out."""

    pools: frozenset[str] = frozenset()

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        return [c for c in candidates if c.backend.pool not in self.pools]


@dataclass(slots=True, eq=False)
class Try:
    """One attempt, in the order in which they were begun."""

    exchange: Exchange
    choice: Choice
    tried: tuple[str, ...]
    held: float  # the mean amount of its pool when it was begun
    excess: float  # expected, USD above the bound
    begun: int
    ended: int = ROOMY
    amount: float | None = None  # None: it served nobody, or the blend did not decide it

    @property
    def pool(self) -> str:
        return self.choice.candidate.backend.pool


@dataclass
class Traffic:
    """Requests through the real chooser, fleet and middlewares, in steps."""

    cost: Cost
    backends: list[Backend]
    running: list[Try] = field(default_factory=list)
    tries: list[Try] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.away = Away()
        chain = Chain.of((self.away, self.cost, Capacity()))
        self.fleet = Fleet(self.backends, {"openai": OpenAI()}, clock=lambda: NOW)
        self.chooser = Chooser(self.fleet, chain, Queue(chain.queue, lambda depth: None))
        self.observers = chain.observers

    def begin(self, wish: bool | None = None) -> Try | None:
        """A new request; None: nobody had room for it."""
        asked = Exchange(
            "x", "POST", b"/", "/", (), NOW, inference=True, work="", cost_priority=wish
        )
        return self._begin(asked, ())

    def _begin(self, asked: Exchange, tried: tuple[str, ...]) -> Try | None:
        try:
            choice = self.chooser.try_now(asked, None, tried)
        except NoBackend:
            return None
        if choice is None:
            return None
        where = choice.candidate
        pool = self.cost._ledger.pools[where.backend.pool]
        account = self.cost._account
        excess = 0.0 if account is None else account._excess.get(where.backend.name, 0.0)
        # Its own advance has not moved the mean: only an end does.
        made = Try(asked, choice, (*tried, where.backend.name), pool.mean, excess, self._step())
        where.live.in_flight += 1
        where.live.picked += 1
        self.running.append(made)
        self.tries.append(made)
        return made

    def end(
        self,
        made: Try,
        *,
        good: bool = True,
        sent: bool = True,
        billed: float = 1.0,
        usage: Usage | None = None,
    ) -> Outcome:
        """The attempt ends; where it failed its request goes on to another, as the core does it."""
        self.running.remove(made)
        where, asked = made.choice.candidate, made.exchange
        where.live.in_flight -= 1
        for permit in made.choice.permits:
            permit.release()
        seconds = billed if sent else 0.0
        outcome = Outcome(
            where.backend,
            len(made.tried),
            Verdict.GOOD if good else Verdict.STRIKE,
            Stage.DONE,
            sent=sent,
            billed=seconds,
            usage=usage,
            usd=price_of(where.backend, seconds, usage) if sent else 0.0,
        )
        self.fleet.note(asked, outcome, where.live)
        for observe in self.observers:
            observe(asked, outcome)
        made.ended = self._step()
        if good and asked.cost_priority is None:
            by = self.cost.blend.by
            made.amount = 1.0 if by == "requests" else seconds if by == "seconds" else outcome.usd
        if not good and len(made.tried) < 3:
            self._begin(asked, made.tried)
        return outcome

    def _step(self) -> int:
        self.steps += 1
        return self.steps

    def serve(self, times: int, away: Iterable[str] = ()) -> None:
        """So many, one by one."""
        self.away.pools = frozenset(away)
        for _ in range(times):
            made = self.begin()
            assert made is not None
            self.end(made)
        self.away.pools = frozenset()

    def drain(self) -> None:
        while self.running:
            self.end(self.running[-1])

    def served(self, since: int = 0) -> list[Try]:
        """What the blend decided and was served, in the order in which it was begun."""
        return [made for made in self.tries if made.amount is not None and made.begun > since]

    def debt(self) -> float:
        """Owed to baseline; below zero: to burst."""
        owed = {
            dict(gauge.labels)["pool"]: gauge.value
            for gauge in self.cost.gauges()
            if gauge.name == "blend_debt"
        }
        return owed["baseline"] - owed["burst"]


def worst(served: list[Try], share: float, length: int) -> float:
    """How far baseline's part of any `length` requests in a row is off, in requests."""
    sums = [0.0, *accumulate((made.pool == "baseline") - share for made in served)]
    assert len(sums) > length
    return max(abs(sums[at + length] - sums[at]) for at in range(len(sums) - length))


# -- the split ------------------------------------------------------------------------------------


@few
@given(
    share=shares,
    width=st.sampled_from([1, 2, 7, 50, 200]) | st.integers(1, 200),
    each=st.integers(1, 3),
    failing=st.sampled_from([0.0, 0.02, 0.1]),
    mixed=st.sampled_from([0.0, 0.3]),
    outage=st.none() | st.tuples(st.sampled_from(["baseline", "burst"]), st.integers(1, 400)),
    seed=seeds,
)
def test_split_over_any_thousand_while_both_pools_have_room_is_within_a_point(
    share: float,
    width: int,
    each: int,
    failing: float,
    mixed: float,
    outage: tuple[str, int] | None,
    seed: int,
) -> None:
    """And so it is while an outage is being paid back.

    Who fails is tried again, three times in all: with less than three backends in its pool that
    could be where the other pool alone is left, and so spill. Where attempts fail, those that
    spilled have ended before the thousand begin: what ran at an end and failed is not promised.
    """
    rng = random.Random(seed)
    cost = Cost(blend=Blend(share, 1.0 - share))
    traffic = Traffic(cost, fleet_of(3 if failing else each))
    traffic.serve(WARMING_UP)

    def run(times: int) -> None:
        for _ in range(times):
            traffic.begin(rng.choice([True, False]) if rng.random() < mixed else None)
            while len(traffic.running) >= width:
                made = rng.choice(traffic.running)
                traffic.end(made, good=rng.random() >= failing)

    if outage is not None:
        pool, length = outage
        traffic.away.pools = frozenset({pool})
        run(length)
        traffic.away.pools = frozenset()
    spilled = tuple(traffic.running) if failing else ()
    while any(made in traffic.running for made in spilled):
        run(1)
    since = traffic.steps
    run(1700)
    traffic.drain()
    assert worst(traffic.served(since), share, 1000) < 10.001


@few
@given(
    share=shares,
    by=st.sampled_from(["requests", "seconds", "cost"]),
    width=st.integers(1, 60),
    room=st.integers(1, 12),
    each=st.integers(1, 3),
    failing=st.sampled_from([0.0, 0.2, 0.9]),
    mixed=st.sampled_from([0.0, 0.3]),
    seed=seeds,
)
def test_books_whatever_happens_balance(
    share: float,
    by: Any,
    width: int,
    room: int,
    each: int,
    failing: float,
    mixed: float,
    seed: int,
) -> None:
    """Standing + debt is what baseline is due, less what runs: nothing is forgotten or made up.

    With pools that are full or away, and failures in any number; and the standing that decides
    never leaves its band. From this the page's bound on the split follows.
    """
    rng = random.Random(seed)
    cost = Cost(blend=Blend(share, 1.0 - share, by))
    traffic, ledger = Traffic(cost, fleet_of(each, room)), cost._ledger
    traffic.serve(WARMING_UP)
    before = ledger.standing + ledger.debt
    step = {"baseline": -(1.0 - share), "burst": share}
    due = 0.0
    for _ in range(400):
        if rng.random() < 0.01:
            traffic.away.pools = frozenset(rng.choice([(), ("baseline",), ("burst",)]))
        wish = rng.choice([True, False]) if rng.random() < mixed else None
        if traffic.begin(wish) is not None and wish is None:
            one = max(pool.mean for pool in ledger.pools.values())
            assert abs(ledger.standing) <= ledger._reach + one
        while len(traffic.running) >= width:
            made = rng.choice(traffic.running)
            # Amounts within a factor of two, so that the memory of the debt is not reached.
            traffic.end(made, good=rng.random() >= failing, billed=rng.uniform(0.7, 1.4))
            if made.amount is not None:
                due += step[made.pool] * made.amount
        runs = sum(
            step[m.pool] * m.held for m in traffic.running if m.exchange.cost_priority is None
        )
        assert abs(ledger.standing + ledger.debt - before - due - runs) < 1e-9


@pytest.mark.parametrize("away", ["baseline", "burst"])
def test_payback_after_an_outage_leans_as_configured_until_all_is_made_up_for(away: str) -> None:
    traffic = Traffic(Cost(blend=Blend(payback=0.02)), fleet_of(1))
    traffic.serve(WARMING_UP)
    traffic.serve(100, away=(away,))
    owed = abs(traffic.debt())
    share = {"baseline": 0.7, "burst": 0.3}
    assert owed == pytest.approx(100 * share[away], abs=4.0)
    since = traffic.steps
    traffic.serve(1000)
    assert owed - abs(traffic.debt()) == pytest.approx(20.0, abs=1.0), "no faster, and no slower"
    assert worst(traffic.served(since), 0.7, 100) <= 4.0 + 0.02 * 100
    traffic.serve(4000)
    assert traffic.debt() == 0.0
    served = traffic.served()
    mine = sum(made.pool == away for made in served)
    assert mine == pytest.approx(share[away] * len(served), abs=2.0), "as if there had been none"
    since = traffic.steps
    traffic.serve(1000)
    assert worst(traffic.served(since), 0.7, 1000) <= 1.0, "and then no more"


def test_payback_when_it_is_0_forgets_the_outage() -> None:
    traffic = Traffic(Cost(blend=Blend(payback=0.0)), fleet_of(1))
    traffic.serve(WARMING_UP)
    traffic.serve(500, away=("baseline",))
    assert traffic.debt() == 0.0
    since = traffic.steps
    traffic.serve(1000)
    assert worst(traffic.served(since), 0.7, 1000) <= 3.0


def test_debt_when_an_outage_is_long_is_remembered_up_to_1000_requests() -> None:
    traffic = Traffic(Cost(), fleet_of(1))
    traffic.serve(WARMING_UP)
    traffic.serve(1600, away=("baseline",))
    assert traffic.debt() == pytest.approx(1000.0, abs=1.0)
    traffic.serve(2000, away=("burst",))
    # What goes the other way makes up for it as it comes.
    assert traffic.debt() == pytest.approx(1000.0 - 2000 * 0.3, abs=5.0)


def test_debt_when_a_pool_has_never_served_is_not_made() -> None:
    """A fleet of one pool owes nothing to the other, and its split is not off."""
    traffic = Traffic(Cost(), [backend("golem", "baseline")])
    traffic.serve(300)
    assert traffic.debt() == 0.0
    assert "blend_share" not in {gauge.name for gauge in traffic.cost.gauges()}


@pytest.mark.parametrize("burst", [0.0, 1.0])
def test_debt_when_a_pool_has_no_share_is_not_made(burst: float) -> None:
    """It could never be paid back: the other way everything goes already."""
    traffic = Traffic(Cost(blend=Blend(1.0 - burst, burst)), fleet_of(1))
    whole, none = ("burst", "baseline") if burst else ("baseline", "burst")
    traffic.serve(10)
    traffic.serve(100, away=(whole,))
    assert traffic.debt() == 0.0
    since = traffic.steps
    traffic.serve(100)
    assert {made.pool for made in traffic.served(since)} == {whole}
    assert none != whole


def test_outage_when_it_ends_under_load_sends_no_stampede() -> None:
    """What spilled still runs, and counts, but what it owes is debt at once."""
    traffic = Traffic(Cost(), fleet_of(1))
    traffic.serve(WARMING_UP)
    traffic.away.pools = frozenset({"baseline"})
    for _ in range(150):
        traffic.begin()
    traffic.away.pools = frozenset()
    pools = [made.pool for _ in range(100) if (made := traffic.begin()) is not None]
    assert pools.count("baseline") == pytest.approx(70, abs=4)
    assert "burst" in pools[:10]


# -- the bound on the price -----------------------------------------------------------------------

BOUND = 0.00016
PER_TOKEN = TokenPrice(0.1e-6, 0.4e-6)


def market(room: int) -> list[Backend]:
    """Each way of billing: below the bound, above it, and such as may be either."""
    return [
        backend("rented", "baseline", 0.0, room, price_model="rented"),
        backend("golem", "baseline", 0.0001, room),
        backend("runpod", "burst", 0.00025, room),
        backend("modal", "burst", 0.0003, room),
        backend("tokens", "burst", 0.0, room, token_price=PER_TOKEN),
    ]


@dataclass
class Books:
    """The account of docs/blend.md, kept anew, with what its inequality is made of."""

    traffic: Traffic
    paid: float = 0.0  # excess of all attempts, USD: sum(usd) - bound x sum(billed)
    lowest: float = 0.0  # that `paid` ever was
    deficit: float = 0.0
    forgotten: float = 0.0
    allowed: float = 0.0  # spilled + overrun since the last dear attempt that was no spill

    def began(self, made: Try, reserved: float) -> None:
        """`reserved`: the expected excess of the dear ones that ran before it."""
        if made.excess <= 0.0:
            return
        if self.deficit + reserved + made.excess > 1e-12:
            self.allowed += made.excess
            account = self.traffic.cost._account
            assert account is not None
            for row, live in self.traffic.fleet.rows:
                needs_leave = row.name in account._excess or row.name in made.tried
                assert needs_leave or live.in_flight >= row.max_in_flight, "a spill by need"
        else:
            self.allowed = 0.0

    def ended(self, made: Try, outcome: Outcome) -> None:
        if outcome.sent:
            excess = outcome.usd - BOUND * outcome.billed
            self.paid += excess
            self.deficit += excess
            self.allowed += max(0.0, excess - made.excess)
            most = _MEMORY * BOUND
            self.forgotten += max(0.0, self.deficit - most)
            self.deficit = min(max(self.deficit, -most), most)
        self.lowest = min(self.lowest, self.paid)
        slack = 1e-9 + self.allowed + self.forgotten
        assert self.paid <= slack, "from the start"
        assert self.paid - self.lowest <= _MEMORY * BOUND + slack, "over any stretch"
        shown = {gauge.name: gauge.value for gauge in self.traffic.cost.gauges()}
        assert shown["blended_price_deficit_usd"] == pytest.approx(self.deficit, abs=1e-9)


def busy(books: Books, rng: random.Random, width: int, times: int) -> Iterator[Try]:
    """Begin requests with any wish, at most `width` at once; yields who is to end."""
    traffic = books.traffic
    for _ in range(times):
        before = len(traffic.tries)
        reserved = sum(made.excess for made in traffic.running)
        traffic.begin(rng.choice([None, None, True, False]))
        for made in traffic.tries[before:]:
            books.began(made, reserved)
        while len(traffic.running) >= width:
            yield rng.choice(traffic.running)


@few
@given(
    mode=st.sampled_from(["blend", "cost", "latency"]),
    width=st.integers(1, 60),
    room=st.integers(1, 20),
    failing=st.sampled_from([0.0, 0.2]),
    longest=st.sampled_from([2.0, 60.0, 2000.0]),
    seed=seeds,
)
def test_price_at_any_moment_is_within_its_bound_plus_spills_and_errors_of_estimate(
    mode: Any, width: int, room: int, failing: float, longest: float, seed: int
) -> None:
    rng = random.Random(seed)
    traffic = Traffic(Cost(default=mode, max_blended_price=BOUND), market(room))
    books = Books(traffic)
    for made in busy(books, rng, width, 500):
        good, sent = rng.random() >= failing, rng.random() >= failing / 2
        usage = None
        if made.choice.candidate.backend.token_price is not None:
            usage = Usage(rng.randrange(1, 2000), rng.randrange(1, 2000))
        before = len(traffic.tries)
        reserved = sum(other.excess for other in traffic.running if other is not made)
        outcome = traffic.end(
            made,
            good=good and sent,
            sent=sent,
            billed=rng.uniform(0.01, longest),
            usage=usage,
        )
        books.ended(made, outcome)
        for again in traffic.tries[before:]:
            books.began(again, reserved)


@few
@given(
    mode=st.sampled_from(["blend", "latency"]),
    width=st.integers(1, 100),
    bound=st.sampled_from([0.00011, 0.00016, 0.00024]),
    seed=seeds,
)
def test_price_while_the_cheap_have_room_and_work_is_even_never_exceeds_its_bound(
    mode: Any, width: int, bound: float, seed: int
) -> None:
    rng = random.Random(seed)
    cost = Cost(default=mode, blend=Blend(0.1, 0.9), max_blended_price=bound)
    traffic = Traffic(cost, fleet_of(2))
    for _, live in traffic.fleet.rows:  # what is known of each already
        traffic.fleet.estimates.note(live, "", _took(traffic, live, 3.0))
    usd = seconds = 0.0
    for _ in range(800):
        traffic.begin()
        while len(traffic.running) >= width:
            outcome = traffic.end(rng.choice(traffic.running), billed=3.0)
            usd, seconds = usd + outcome.usd, seconds + outcome.billed
            assert usd <= bound * seconds + 1e-9
    if mode == "blend" and width <= 50:
        assert usd / seconds == pytest.approx(bound, rel=0.1), "and what it allows is used"


def _took(traffic: Traffic, live: Live, billed: float) -> Outcome:
    row = next(backend for backend, other in traffic.fleet.rows if other is live)
    return Outcome(row, 1, Verdict.GOOD, Stage.DONE, sent=True, billed=billed)


def test_deficit_when_the_cheap_were_away_is_paid_back_by_cheap_work_but_not_without_end() -> None:
    cost = Cost(blend=Blend(0.5, 0.5), max_blended_price=BOUND)
    golem, modal = fleet_of(1)
    traffic = Traffic(cost, [golem, modal])

    def work(away: Iterable[str], billed: float = 10.0) -> str:
        traffic.away.pools = frozenset(away)
        made = traffic.begin()
        assert made is not None
        traffic.end(made, billed=billed)
        return made.pool

    def deficit() -> float:
        return {gauge.name: gauge.value for gauge in cost.gauges()}["blended_price_deficit_usd"]

    for _ in range(10):
        work(["baseline"])
    assert deficit() == pytest.approx(100 * (0.0003 - BOUND))
    for _ in range(2000):
        work(["baseline"])
    most = 3600 * BOUND
    assert deficit() == pytest.approx(most), "an hour of work at the bound is remembered"
    cheap = 0
    while work([]) == "baseline":
        cheap += 1
    hours = cheap * 10.0 / 3600
    assert hours == pytest.approx(most / (BOUND - 0.0001) / 3600, abs=0.1)
    assert hours < 3, "2.7 hours of Golem's work after any outage"


def test_blend_when_the_bound_holds_burst_back_does_not_owe_it() -> None:
    """The operator said that it costs too much; that is no outage to make up for."""
    traffic = Traffic(Cost(max_blended_price=0.00011), fleet_of(1))
    traffic.serve(2000)
    assert abs(traffic.debt()) <= 2.0
    traffic.serve(200, away=("baseline",))
    assert traffic.debt() == 0.0, "and what spilled made up for nothing"


# -- the page -------------------------------------------------------------------------------------


def outage() -> str:
    """What is split while the baseline pool is away, and after."""
    traffic = Traffic(Cost(), fleet_of(1))
    traffic.serve(1000)
    lines = [
        "| requests | baseline's part | owed to baseline after |",
        "|---|---|---|",
    ]

    def row(name: str, served: list[Try]) -> None:
        mine = sum(made.pool == "baseline" for made in served)
        lines.append(f"| {name} | {mine / len(served):.1%} | {traffic.debt():.0f} requests |")

    row("1000 before", traffic.served())
    since = traffic.steps
    traffic.serve(100, away=("baseline",))
    row("100 while the baseline pool is away", traffic.served(since))
    for first, last in ((1, 100), (101, 1000), (1001, 10_000), (10_001, 25_000), (25_001, 30_000)):
        since = traffic.steps
        traffic.serve(last - first + 1)
        row(f"{first} to {last} after", traffic.served(since))
    return "\n".join(lines) + "\n"


def options() -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for prefix, cls in (("", Cost), ("blend.", Blend)):
        made = cls()
        for option in fields(cls):
            if option.init and not option.metadata.get("injected") and option.name != "blend":
                default = getattr(made, option.name)
                shown = "null" if default is None else default
                lines.append(f"| `{prefix}{option.name}` | {shown} | {option.metadata['help']} |")
    return "\n".join(lines) + "\n"


def made_parts(text: str) -> list[str]:
    return re.findall(re.escape(MADE) + r"\n(.*?)" + re.escape(END), text, re.DOTALL)


def test_page_when_it_is_read_shows_what_the_code_does() -> None:
    assert made_parts(PAGE.read_text()) == parts()


def parts() -> list[str]:
    return [f"{options()}\n", f"{outage()}\n"]


def write() -> None:
    new = iter(parts())
    pattern = re.escape(MADE) + r"\n(.*?)" + re.escape(END)
    text = PAGE.read_text()
    PAGE.write_text(re.sub(pattern, lambda _: f"{MADE}\n{next(new)}{END}", text, flags=re.DOTALL))


if __name__ == "__main__":
    write()
    sys.exit(0)
