"""What an attempt is expected to cost: the nearest past counts, and other work says nothing."""

from __future__ import annotations

from typing import Any

import pytest

from beacon_proxy.contracts import (
    OTHER_POST,
    Backend,
    Live,
    Outcome,
    Stage,
    TokenPrice,
    Usage,
    Verdict,
    canonical_model,
)
from beacon_proxy.spending.bill import price_of
from beacon_proxy.spending.estimates import Estimates

PRICE = TokenPrice(input=1e-6, output=2e-6)


def fact(name: str = "a", **more: Any) -> Backend:
    return Backend(name, "openai", "http://h", "http", "h", 80, **more)


def note(
    estimates: Estimates,
    live: Live,
    work: str | None,
    billed: float,
    usage: Usage | None = None,
    backend: Backend | None = None,
) -> None:
    at = backend or fact(price_per_second=1.0)
    done = Outcome(at, 1, Verdict.GOOD, Stage.DONE, billed=billed, usage=usage, sent=True)
    estimates.note(live, work, done)


def test_estimate_when_only_other_work_was_seen_does_not_go_by_it() -> None:
    """A list of models takes milliseconds: a burst behind it was let in at next to nothing."""
    estimates, live, backend = Estimates(), Live(), fact(price_per_second=1.0)
    note(estimates, live, None, 0.002)
    assert estimates.usd(backend, live, "m", 0.0) >= 1.0
    assert estimates.usd(backend, Live(), "m", 0.0) >= 1.0
    assert estimates.usd(backend, live, None, 0.0) == pytest.approx(0.002)
    note(estimates, live, "n", 3.0)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(3.0)


def test_estimate_when_tokens_are_billed_but_none_were_told_is_not_free() -> None:
    """The first answer without usage made every later one look free of cost."""
    estimates, live, backend = Estimates(), Live(), fact(token_price=PRICE)
    first = estimates.usd(backend, live, "m", 0.0)
    note(estimates, live, "m", 1.0, backend=backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(first)
    note(estimates, live, "m", 1.0, Usage(10, 100), backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(210e-6)
    assert estimates.usd(backend, live, "other", 0.0) == pytest.approx(210e-6)


def test_estimate_when_some_models_told_no_tokens_goes_by_those_that_did() -> None:
    estimates, live, backend = Estimates(), Live(), fact(token_price=PRICE)
    note(estimates, live, "silent", 1.0, backend=backend)
    for model, output in (("short", 100), ("long", 300)):
        note(estimates, live, model, 1.0, Usage(0, output), backend)
    assert 200e-6 < estimates.usd(backend, live, "new", 0.0) < 600e-6
    assert estimates.usd(backend, live, "silent", 0.0) < 600e-6


def test_estimate_when_clients_make_up_models_still_learns_the_real_one() -> None:
    """Once 64 names were known, no other one was learnt, and none of them was forgotten."""
    estimates, live, backend = Estimates(), Live(), fact(price_per_second=1.0)
    for number in range(1000):
        note(estimates, live, f"made-up-{number}", 0.05)
    for _ in range(40):
        note(estimates, live, "real", 60.0)
    assert len(live.typical) <= 64
    assert estimates.usd(backend, live, "real", 0.0) == pytest.approx(60.0)
    for number in range(63):
        note(estimates, live, f"another-{number}", 0.05)
        note(estimates, live, "real", 60.0)
    assert estimates.usd(backend, live, "real", 0.0) == pytest.approx(60.0)
    assert len(live.typical) <= 64


@pytest.mark.parametrize("work", ["", "new", "n" * 200])
def test_estimate_when_the_model_is_new_is_what_inference_took_on_this_backend(work: str) -> None:
    """Look-up and learning went by two different things."""
    estimates, live, other = Estimates(), Live(), Live()
    backend = fact(price_per_second=1.0)
    for _ in range(40):
        note(estimates, live, "m", 2.0)
        note(estimates, live, None, 0.002)
        note(estimates, other, "m", 8.0)
    assert estimates.usd(backend, live, work, 0.0) == pytest.approx(2.0)
    assert estimates.usd(backend, other, work, 0.0) == pytest.approx(8.0)
    assert estimates.usd(backend, Live(), work, 0.0) == pytest.approx(5.0), "the fleet's average"
    for _ in range(40):
        note(estimates, live, work, 4.0)
    assert estimates.usd(backend, live, work, 0.0) == pytest.approx(4.0, rel=0.001)


def test_estimate_when_it_is_no_inference_counts_no_tokens_until_some_were_counted() -> None:
    """A list of models was held to take 200 tokens either way."""
    estimates, live, backend = Estimates(), Live(), fact(token_price=PRICE)
    note(estimates, live, "m", 1.0, Usage(10, 100), backend)
    assert estimates.usd(backend, live, None, 0.0) == 0.0
    note(estimates, live, None, 1.0, None, backend)
    assert estimates.usd(backend, live, None, 0.0) == 0.0
    note(estimates, live, None, 1.0, Usage(10, 0), backend)
    assert estimates.usd(backend, live, None, 0.0) == pytest.approx(10e-6)
    note(estimates, live, None, 1.0, None, backend)
    assert estimates.usd(backend, live, None, 0.0) == pytest.approx(8e-6)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(210e-6)


def test_estimate_when_it_is_no_inference_and_none_was_seen_is_not_free_by_the_second() -> None:
    """It may be a tunnel, or any path: what was never seen is not held to be short."""
    estimates, live, backend = Estimates(), Live(), fact(price_per_second=1.0)
    assert estimates.usd(backend, live, None, 0.0) == pytest.approx(5.0)
    note(estimates, live, "m", 3.0)
    assert estimates.usd(backend, live, None, 0.0) == pytest.approx(3.0)


def test_estimate_of_a_post_on_an_unknown_path_learns_from_such_alone_and_teaches_nobody_else() -> (
    None
):
    """It was asked under one name and learnt under another, so it stood where it began for ever."""
    estimates, live, backend = Estimates(), Live(), fact(token_price=PRICE)
    assert estimates.usd(backend, live, OTHER_POST, 0.0) == pytest.approx(600e-6), "the guess"
    note(estimates, live, "m", 1.0, Usage(10, 100), backend)
    assert estimates.usd(backend, Live(), OTHER_POST, 0.0) == pytest.approx(210e-6), "the fleet's"
    assert estimates.usd(backend, live, OTHER_POST, 0.0) == pytest.approx(210e-6), "any inference"
    note(estimates, live, OTHER_POST, 8.0, None, backend)
    assert estimates.usd(backend, live, OTHER_POST, 0.0) == pytest.approx(210e-6), "none were told"
    note(estimates, live, OTHER_POST, 8.0, Usage(100_000, 50_000), backend)
    assert estimates.usd(backend, live, OTHER_POST, 0.0) == pytest.approx(0.2)
    for work in ("m", "", "new"):
        assert estimates.usd(backend, live, work, 0.0) == pytest.approx(210e-6)
    assert estimates.usd(backend, live, None, 0.0) == 0.0
    seconds = fact(price_per_second=1.0)
    assert estimates.usd(seconds, live, OTHER_POST, 0.0) == pytest.approx(8.0)
    assert estimates.usd(seconds, live, "new", 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [OTHER_POST, "post", "Post:latest"])
def test_name_of_other_posts_is_one_that_no_model_has(name: str) -> None:
    assert canonical_model(name) != OTHER_POST


def test_estimate_when_it_is_of_a_known_model_comes_near_to_what_is_paid() -> None:
    estimates, live = Estimates(), Live()
    backend = fact(price_per_second=0.5)
    for _ in range(30):
        note(estimates, live, "m", 2.0, backend=backend)
    assert estimates.usd(backend, live, "m", 0.0) == pytest.approx(price_of(backend, 2.0, None))
