"""The last hour in memory, against sums over all attempts kept whole."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Outcome, Stage, Usage, Verdict, canonical_model
from beacon_proxy.ops.windows import Key, Totals, Windows


class FakeClock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def backend(
    name: str = "b0", region: str = "us-east", models: frozenset[str] | None = None
) -> Backend:
    return Backend(
        name, "golem", "http://127.0.0.1:1", "http", "127.0.0.1", 1, region=region, models=models
    )


ONE = backend()


def outcome(
    verdict: Verdict = Verdict.GOOD,
    *,
    at: Backend | None = None,
    ttft: float | None = None,
    duration: float = 1.0,
    usage: Usage | None = None,
    usd: float = 0.0,
    billed: float = 0.0,
    cold_start: float | None = None,
) -> Outcome:
    return Outcome(
        at or ONE,
        1,
        verdict,
        Stage.DONE,
        ttft=ttft,
        duration=duration,
        usage=usage,
        usd=usd,
        billed=billed,
        cold_start=cold_start,
    )


def total(windows: Windows, minutes: int = 60) -> Totals:
    return windows.totals(minutes, by=lambda _: "all").get("all", Totals())


def shown(totals: Totals) -> dict[str, Any]:
    """Every number of it; of the sketches, quantiles that no two of the tests' histories share."""
    sketches = {name: getattr(totals, name) for name in ("ttft", "duration", "starts")}
    told = {name: getattr(totals, name) for name in Totals.__slots__ if name not in sketches}
    for name, sketch in sketches.items():
        if sketch is not None:
            told[name] = [len(sketch), *map(sketch.quantile, (0.0, 0.3, 0.5, 0.95, 1.0))]
    return told


def by_model(windows: Windows) -> dict[str, int]:
    groups = windows.totals(60, by=lambda key: key.model)
    return {model: totals.attempts for model, totals in groups.items()}


def test_totals_when_attempts_differ_sums_each_number() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=0.1, duration=2.0, usage=Usage(3, 5), usd=0.5), "m")
    windows.add(outcome(Verdict.STRIKE, duration=0.25), "m")
    windows.add(outcome(Verdict.CALLER, duration=0.5, usd=0.25), "m")
    windows.add(outcome(Verdict.NEUTRAL), "m")
    found = total(windows)
    assert (found.attempts, found.good, found.strikes) == (4, 1, 1)
    assert (found.seconds, found.usd) == (3.75, 0.75)
    assert (found.tokens_in, found.tokens_out) == (3, 5)
    assert found.success_rate() == 0.5


def test_totals_when_grouped_keeps_groups_apart() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(at=backend("a", "us-east"), usd=1.0), "m")
    windows.add(outcome(at=backend("b", "eu-west"), usd=2.0), "m")
    windows.add(outcome(at=backend("c", "eu-west"), usd=4.0), "m")
    groups = windows.totals(60, by=lambda key: key.region)
    assert {region: totals.usd for region, totals in groups.items()} == {
        "us-east": 1.0,
        "eu-west": 6.0,
    }


def test_totals_when_nothing_happened_has_no_rate_and_no_quantile() -> None:
    found = total(Windows(FakeClock()))
    assert found.success_rate() is None
    assert found.ttft_quantile(0.5) is None


@given(
    st.lists(st.tuples(st.floats(0, 600), st.floats(0, 100)), max_size=60),
    st.sampled_from([1, 5, 60]),
)
def test_totals_equal_a_whole_log_over_any_history(
    history: list[tuple[float, float]], minutes: int
) -> None:
    """A ring that forgets to clear a minute, or clears one too early, shows here."""
    clock = FakeClock()
    windows = Windows(clock)
    log: list[tuple[float, float]] = []
    for pause, usd in history:
        clock.now += pause
        windows.add(outcome(usd=usd), None)
        log.append((clock.now, usd))
    since = clock.now // 60 - minutes
    kept = [usd for at, usd in log if at // 60 >= since]
    found = total(windows, minutes)
    assert found.attempts == len(kept)
    assert found.usd == pytest.approx(sum(kept))


def test_totals_keep_the_sixtieth_full_minute_while_a_new_one_begins() -> None:
    clock = FakeClock(6_000.0)
    windows = Windows(clock)
    windows.add(outcome(usd=1.0), "m")
    clock.now += 3600
    windows.add(outcome(usd=2.0), "m")
    assert total(windows).usd == 3.0
    clock.now += 60
    assert total(windows).usd == 2.0


def test_totals_when_idle_for_hours_are_empty() -> None:
    clock = FakeClock()
    windows = Windows(clock)
    windows.add(outcome(usd=1.0), "m")
    clock.now += 7200
    assert total(windows).attempts == 0


def test_covered_in_a_young_process_is_its_age() -> None:
    clock = FakeClock(6_000.0)
    windows = Windows(clock)
    clock.now += 90
    assert windows.covered(60) == 90
    assert windows.covered(1) == 90  # the begun minute and the full one before it
    clock.now += 7200
    assert windows.covered(1) == 60 + 30
    assert windows.covered(60) == 3600 + 30


def test_model_when_spelled_differently_is_one() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(), "llama3.2:1b")
    windows.add(outcome(), "Llama3.2-1b")
    assert by_model(windows) == {"llama3.2-1b": 2}


def test_model_when_absent_is_unknown() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(), None)
    assert by_model(windows) == {"unknown": 1}


def test_model_when_configured_is_kept_without_a_good_answer() -> None:
    windows = Windows(FakeClock())
    configured = backend(models=frozenset({"m"}))
    windows.add(outcome(Verdict.STRIKE, at=configured), "m")
    assert by_model(windows) == {"m": 1}


def test_model_when_never_answered_well_is_other() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(Verdict.CALLER), "made-up")
    windows.add(outcome(Verdict.GOOD), "real")
    windows.add(outcome(Verdict.STRIKE), "real")
    assert by_model(windows) == {"other": 1, "real": 2}


def test_model_when_answered_well_at_last_is_known_from_then_on() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(Verdict.CALLER), "late")
    windows.add(outcome(Verdict.GOOD), "late")
    assert by_model(windows) == {"other": 1, "late": 1}


NAMES = ["m", " M ", "m-latest", "n:1b", "n-1b", "other", "unknown", "x" * 130, "x" * 140]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 0, 0, 30, 61]),  # s
            st.sampled_from([backend(), backend(region="eu-west"), backend("b1")]),
            st.none() | st.sampled_from(NAMES),
            st.sampled_from([Verdict.GOOD, Verdict.CALLER, Verdict.STRIKE]),
            st.none() | st.floats(0, 100),
        ),
        max_size=40,
    )
)
def test_cells_of_any_attempts_are_those_found_without_a_short_cut(
    history: list[tuple[int, Backend, str | None, Verdict, float | None]],
) -> None:
    """The way to a cell is kept for a minute: over its end, and past a name that becomes known."""
    clock = FakeClock()
    windows = Windows(clock)
    known: set[str] = set()
    expected: dict[Key, Totals] = {}
    for pause, at, model, verdict, ttft in history:
        clock.now += pause
        windows.add(outcome(verdict, at=at, ttft=ttft, usd=0.5), model)
        name = canonical_model(model[:128]) if model else "unknown"
        if model and verdict is Verdict.GOOD:
            known.add(name)
        if model and name not in known:
            name = "other"
        fresh = Windows(clock)  # knows no short cut, and every model is as good as any
        fresh.add(outcome(verdict, at=at, ttft=ttft, usd=0.5), None)
        key = Key(at.name, at.provider, at.region, at.pool, name)
        expected.setdefault(key, Totals()).add(total(fresh))
    found = windows.totals(60, by=lambda key: key)
    assert {key: shown(it) for key, it in found.items()} == {
        key: shown(it) for key, it in expected.items()
    }


def test_spellings_when_a_client_makes_up_thousands_stay_bounded() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(), "m")
    tracemalloc.start()
    for n in range(20_000):
        windows.add(outcome(), "m" + " " * (n % 200) + "\t" * (n // 200))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert by_model(windows) == {"m": 20_001}
    assert grown < 200_000  # all of them are over 4 MB


def test_models_when_a_client_makes_up_thousands_stay_bounded() -> None:
    """A backend that takes any name must not let a client fill our memory."""
    windows = Windows(FakeClock())
    for n in range(5000):
        windows.add(outcome(), f"m{n}" + "x" * 1000)
    models = by_model(windows)
    assert len(models) <= 129
    assert sum(models.values()) == 5000
    assert max(map(len, models)) <= 128


def test_key_names_what_costs_may_be_grouped_by() -> None:
    assert Key._fields == ("backend", "provider", "region", "pool", "model")
