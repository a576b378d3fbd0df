"""What cached tokens cost: the bill by hand, what it never is, and what such work may cost.

Prices are USD a token times a million, so that the figures are those of a price list.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import OTHER_POST, Candidate, Live, TokenPrice, Typical, Usage
from beacon_proxy.spending.bill import price_of
from beacon_proxy.spending.estimates import Estimates
from beacon_proxy.wire.usage import told_by, told_of
from middleware.cost.bound import Account
from middleware.cost.order import measure, yardstick

from .test_estimates import fact, note

ANTHROPIC = TokenPrice(3.0, 15.0, 0.3, 3.75)
OPENAI = TokenPrice(2.0, 8.0, 0.5)
PLAIN = TokenPrice(3.0, 15.0)


@pytest.mark.parametrize(
    ("price", "usage", "usd"),
    [
        (ANTHROPIC, Usage(1000, 100), 1000 * 3.0 + 1500),
        (ANTHROPIC, Usage(1000, 100, cached=1000), 300 + 1500),
        (ANTHROPIC, Usage(1000, 100, cache_written=1000), 3750 + 1500),
        # 50 x 3.0 + 900 x 0.3 + 50 x 3.75 + 100 x 15.0
        (ANTHROPIC, Usage(1000, 100, cached=900, cache_written=50), 150 + 270 + 187.5 + 1500),
        (OPENAI, Usage(1000, 0, cached=896), 208 + 448),
        (OPENAI, Usage(1000, 0, cached=896, cache_written=104), 448 + 208),
        (PLAIN, Usage(1000, 100, cached=900, cache_written=50), 1000 * 3.0 + 1500),
        (TokenPrice(3.0, 15.0, 0.0), Usage(1000, 0, cached=1000), 0.0),
        (ANTHROPIC, None, 0.0),
    ],
)
def test_bill_of_a_cached_prompt_is_each_part_by_its_price(
    price: TokenPrice, usage: Usage | None, usd: float
) -> None:
    assert price_of(fact(token_price=price), 9.0, usage) == pytest.approx(usd, rel=1e-12)


PRICES = st.floats(0, 1e6, allow_subnormal=False)
COUNTS = st.integers(0, 1 << 24)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """What a backend may say, with parts beyond the whole, as it is believed."""
    said = Usage(draw(COUNTS), draw(COUNTS), False, draw(COUNTS), draw(COUNTS))
    given, made, cached, written = told_of(said)
    return Usage(given or 0, made or 0, False, cached, written)


@given(usage=usages(), price=st.tuples(PRICES, PRICES, PRICES, PRICES))
def test_bill_is_never_negative_and_within_the_dearest_and_the_cheapest_price(
    usage: Usage, price: tuple[float, float, float, float]
) -> None:
    assert 0 <= usage.cached <= usage.cached + usage.cache_written <= usage.input
    usd = TokenPrice(*price).usd(usage)
    input, output, *parts = price
    made = usage.output * output
    low, high = min(input, *parts) * usage.input + made, max(input, *parts) * usage.input + made
    assert usd >= 0.0
    assert low * (1 - 1e-12) <= usd <= high * (1 + 1e-12)


@given(usage=usages(), input=PRICES, output=PRICES)
def test_bill_when_a_cache_costs_no_less_is_what_it_was_before(
    usage: Usage, input: float, output: float
) -> None:
    before = usage.input * input + usage.output * output
    assert TokenPrice(input, output).usd(usage) == pytest.approx(before, rel=1e-12, abs=1e-300)
    bare = Usage(usage.input, usage.output)
    assert TokenPrice(input, output, 0.0, 0.0).usd(bare) == before, "to the last bit"


@given(given=COUNTS, cached=COUNTS, written=COUNTS)
def test_parts_of_a_prompt_are_never_more_than_it(given: int, cached: int, written: int) -> None:
    """What is put into a cache, the dearer, is believed first."""
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    usage = {"prompt_tokens": given, "completion_tokens": 5, "prompt_tokens_details": details}
    told, made, *parts = told_by({"usage": usage})
    if given == 1 << 24:  # beyond any model, so it is no count: then its parts are none
        assert (told, made, *parts) == (None, 5, 0, 0)
        return
    written, cached = (0 if part == 1 << 24 else part for part in (written, cached))
    assert told == given
    assert parts == [min(cached, given - min(written, given)), min(written, given)]


def test_estimate_of_mostly_cached_work_is_what_such_work_costs() -> None:
    estimates, live, backend = Estimates(), Live(), fact(token_price=ANTHROPIC)
    usage = Usage(20_000, 100, cached=19_000, cache_written=900)
    for _ in range(30):
        note(estimates, live, "m", 1.0, usage, backend)
    usd = price_of(backend, 1.0, usage)
    assert usd == pytest.approx(100 * 3.0 + 19_000 * 0.3 + 900 * 3.75 + 1500)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(usd)
    assert estimates.usd(backend, live, "another", 0.0) == pytest.approx(usd), "of this backend"
    assert estimates.usd(backend, Live(), "m", 0.0) == pytest.approx(usd), "of the fleet"


def test_estimate_when_a_conversation_begins_to_be_cached_comes_down_to_it() -> None:
    estimates, live, backend = Estimates(), Live(), fact(token_price=TokenPrice(1.0, 0.0, 0.1))
    note(estimates, live, "m", 1.0, Usage(1000, 0), backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(1000)
    note(estimates, live, "m", 1.0, Usage(1000, 0, cached=1000), backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(0.8 * 1000 + 0.2 * 100)
    for _ in range(60):
        note(estimates, live, "m", 1.0, Usage(1000, 0, cached=1000), backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("price", [TokenPrice(1.0, 0.0, 0.0, 0.0), TokenPrice(1.0, 0.0, 0.1, 1.25)])
def test_estimate_of_work_of_any_size_is_never_below_its_cheapest_price(price: TokenPrice) -> None:
    """A first cached prompt may be far longer than all before: its average must not outgrow it."""
    rng = random.Random(7)
    estimates, live, backend = Estimates(), Live(), fact(token_price=price)
    for _ in range(20_000):
        size = rng.choice((0, 1, 10, 10_000, 200_000))
        written = rng.randint(0, size)
        cached = rng.choice((0, size - written, rng.randint(0, size - written)))
        note(estimates, live, "m", 1.0, Usage(size, 0, False, cached, written), backend)
        typical = live.typical["m"]
        assert typical.cached >= 0.0
        assert typical.cache_written >= 0.0
        assert typical.cached + typical.cache_written <= typical.input * (1 + 1e-12) + 1e-9
        usd = estimates.usd(backend, live, "m", 0.0)
        low = min(price.input, price.cached_input, price.cache_write)
        assert usd >= low * typical.input * (1 - 1e-12) if typical.input else usd >= 0.0


def test_yardstick_of_mostly_cached_work_goes_by_what_that_costs_at_each() -> None:
    """By its price of input the one with the cheap cache would be the dearer of the two."""
    cheap_cache = fact("a", token_price=TokenPrice(2.0, 0.0, 0.2))
    cheap_input = fact("b", token_price=TokenPrice(1.0, 0.0))
    second = fact("c", price_per_second=100.0)
    typical = Typical(billed=2.0, input=1000.0, cached=900.0)
    candidates = [Candidate(at, Live(usual=typical)) for at in (cheap_cache, cheap_input, second)]
    price = yardstick(candidates, "m")
    assert price(cheap_cache) == pytest.approx((100 * 2.0 + 900 * 0.2) / 2.0)
    assert price(cheap_input) == pytest.approx(1000 / 2.0)
    assert price(second) == 100.0


def test_yardstick_is_the_average_of_what_is_known() -> None:
    at = fact(token_price=ANTHROPIC)
    lives = [
        Live(usual=Typical(input=100.0, output=1.0, cached=50.0, cache_written=10.0)),
        Live(usual=Typical(input=300.0, output=3.0)),
        Live(usual=Typical(billed=1.0)),
    ]
    found = measure([Candidate(at, live) for live in lives], "m")
    assert (found.input, found.output, found.cached, found.cache_written) == (200.0, 2.0, 25.0, 5.0)


def test_work_of_which_no_tokens_were_told_is_not_held_to_be_free() -> None:
    """As an answer on a path that we do not know: it goes by the inference of its backend."""
    at = fact(token_price=TokenPrice(1.0, 1.0))
    live = Live(
        typical={OTHER_POST: Typical(billed=9.0)},
        usual=Typical(billed=1.0, input=1000.0, output=500.0),
    )
    silent = Candidate(at, live)
    assert yardstick([silent], OTHER_POST)(at) == pytest.approx(1500.0)
    assert Account(500.0).parted([silent], OTHER_POST, 0.0) == ([], [silent], [])


def test_bound_holds_cached_work_to_be_as_cheap_as_it_is() -> None:
    at = fact(token_price=TokenPrice(1.0, 0.0, 0.1))
    cached = Candidate(at, Live(usual=Typical(billed=1.0, input=1000.0, cached=1000.0)))
    fresh = Candidate(at, Live(usual=Typical(billed=1.0, input=1000.0)))
    assert Account(500.0).parted([cached], None, 0.0) == ([cached], [], [])
    assert Account(500.0).parted([fresh], None, 0.0) == ([], [fresh], [])
