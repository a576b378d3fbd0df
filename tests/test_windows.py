"""The last hour in memory, against sums over all attempts kept whole."""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Outcome, Stage, Usage, Verdict, canonical_model
from beacon_proxy.ops.totals import Totals
from beacon_proxy.ops.windows import Key, Site, Windows


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
    whole = Totals()
    for totals in windows.places(minutes).values():
        whole.add(totals)
    return whole


def settle(windows: Windows) -> None:
    for _ in windows.settle():
        pass


def shown(totals: Totals) -> dict[str, Any]:
    """Every number of it; of the sketches, quantiles that no two of the tests' histories share."""
    sketches = {name: getattr(totals, name) for name in ("ttft", "duration", "starts")}
    told = {name: getattr(totals, name) for name in Totals.__slots__ if name not in sketches}
    for name, sketch in sketches.items():
        if sketch is not None:
            told[name] = [len(sketch), *map(sketch.quantile, (0.0, 0.3, 0.5, 0.95, 1.0))]
    return told


def by_model(windows: Windows) -> dict[str, int]:
    groups = windows.totals(60, "model")
    return {model: totals.attempts for model, totals in groups.items()}


def test_totals_when_attempts_differ_sums_each_number() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=0.1, duration=2.0, usage=Usage(3, 5), usd=0.5), "m")
    windows.add(outcome(Verdict.STRIKE, duration=0.25), "m")
    windows.add(outcome(Verdict.CALLER, duration=0.5, usd=0.25), "m")
    windows.add(outcome(Verdict.NEUTRAL), "m")
    windows.add(outcome(Verdict.BUSY, duration=0.0), "m")
    found = total(windows)
    assert (found.attempts, found.good, found.strikes, found.busy) == (5, 1, 1, 1)
    assert (found.seconds, found.usd) == (3.75, 0.75)
    assert (found.tokens_in, found.tokens_out) == (3, 5)
    assert found.success_rate() == 0.5


def test_totals_when_grouped_keeps_groups_apart() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(at=backend("a", "us-east"), usd=1.0), "m")
    windows.add(outcome(at=backend("b", "eu-west"), usd=2.0), "m")
    windows.add(outcome(at=backend("c", "eu-west"), usd=4.0), "m")
    groups = windows.totals(60, "region")
    assert {region: totals.usd for region, totals in groups.items()} == {
        "us-east": 1.0,
        "eu-west": 6.0,
    }


def test_totals_when_nothing_happened_has_no_rate_and_no_quantile() -> None:
    found = total(Windows(FakeClock()))
    assert found.success_rate() is None
    assert found.ttft_quantile(0.5) is None


PLACES = [backend("a", "us-east"), backend("b", "us-east"), backend("c", "eu-west")]
Entry = tuple[float, Backend, float, float]  # s of the clock, where, USD, TTFT


def sums_of(log: list[Entry]) -> dict[str, tuple[int, float, float | None, float | None]]:
    """Attempts, USD and two quantiles by region, from a log kept whole."""
    found = {}
    for region in sorted({at.region for _, at, _, _ in log}):
        rows = [(usd, ttft) for _, at, usd, ttft in log if at.region == region]
        ranked = sorted(ttft for _, ttft in rows)
        p50, p95 = (ranked[math.ceil(q * len(ranked)) - 1] for q in (0.5, 0.95))
        found[region] = (len(rows), pytest.approx(sum(usd for usd, _ in rows)), p50, p95)
    return found


@given(
    st.lists(
        st.tuples(
            # s since the last one: seconds, a turn of the minute, hours of suspension
            st.floats(0, 90) | st.sampled_from([60.0, 300.0, 600.0, 3600.0, 3660.0, 86400.0]),
            st.sampled_from(PLACES),
            st.floats(0, 100),
            st.floats(0, 100),
            st.sampled_from(["", "", "read", "read an hour", "settle", "begin to settle"]),
        ),
        max_size=60,
    ),
    st.sampled_from([1, 5, 60]),
)
def test_totals_and_places_equal_a_whole_log_over_any_history(
    history: list[tuple[float, Backend, float, float, str]], minutes: int
) -> None:
    """A minute that is forgotten too late or too early, or of which is kept what was told before it
    was over, shows here: it is read and settled between the attempts, too."""
    clock = FakeClock()
    windows = Windows(clock)
    log: list[Entry] = []
    for pause, at, usd, ttft, then in history:
        clock.now += pause
        windows.add(outcome(at=at, usd=usd, ttft=ttft, duration=ttft), None)
        log.append((clock.now, at, usd, ttft))
        if then.startswith("read"):
            windows.places(minutes if then == "read" else 60)
        elif then == "settle":
            settle(windows)
        elif then:
            next(windows.settle(), None)
    since = clock.now // 60 - minutes
    expected = sums_of([entry for entry in log if entry[0] // 60 >= since])
    by_region = windows.totals(minutes, "region")
    for groups in (by_region, {place.region: it for place, it in windows.places(minutes).items()}):
        assert {
            region: (it.attempts, it.usd, it.ttft_quantile(0.5), it.ttft_quantile(0.95))
            for region, it in groups.items()
        } == expected


def test_places_when_a_minute_is_over_count_it_once_however_often_they_are_asked() -> None:
    clock = FakeClock(6_000.0)
    windows = Windows(clock)
    for minute in range(3):
        clock.now = 6_000.0 + 60 * minute
        for _ in range(700):  # more than a sketch keeps as they are
            windows.add(outcome(ttft=0.5, duration=1.0), "m")
        for _ in range(3):
            (found,) = windows.places(5).values()
            assert (found.attempts, len(found.ttft)) == (700 * (minute + 1),) * 2
            assert found.ttft_quantile(0.5) == 0.5


def added(work: Callable[[], object]) -> int:
    """How many sums it adds to another: what takes the time."""
    count, code = 0, Totals.add.__code__

    def profile(frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is code

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def busy(windows: Windows, clock: FakeClock, backends: int, models: int, minutes: int) -> None:
    """Each model on each backend in each minute; all is settled but the last look."""
    for minute in range(minutes):
        clock.now = 6_000.0 + 60 * minute
        for n in range(backends):
            for m in range(models):
                windows.add(outcome(at=backend(f"b{n}", f"r{n % 5}"), ttft=0.1, usd=1.0), f"m{m}")
        if minute < minutes - 1:
            settle(windows)


def test_reading_an_hour_adds_up_little_where_it_was_settled() -> None:
    """It is on the loop: to merge each cell of an hour took 400 ms, with as many as here 100."""
    clock = FakeClock(6_000.0)
    windows = Windows(clock)
    busy(windows, clock, 24, 3, 61)
    in_last_look = 24 * 3 * 3  # cells; each is collected for its backend, model and site
    assert added(lambda: windows.totals(60, "backend")) < in_last_look + 24 * 20, "first ever"
    assert added(lambda: windows.totals(60, "backend")) <= 24 * 2
    assert added(lambda: windows.places(60)) < 5 * 20
    assert added(lambda: windows.places(60)) <= 5 * 2
    clock.now += 60
    assert added(lambda: windows.totals(60, "backend")) < 24 * 20, "a minute is over"
    settle(windows)
    assert added(lambda: windows.places(60)) <= 5 * 2, "and was settled"
    assert {it.attempts for it in windows.totals(60, "backend").values()} == {180}
    assert {it.attempts for it in windows.totals(60, "model").values()} == {24 * 60}


def test_settling_of_any_number_of_backends_comes_in_pieces_of_one_size() -> None:
    pieces = []
    for backends in (25, 200):
        clock = FakeClock(6_000.0)
        windows = Windows(clock)
        busy(windows, clock, backends, 1, 10)
        settle(windows)
        windows.places(60), windows.totals(60, "backend")  # from now on it is kept ready
        clock.now = 6_600.0  # ten more minutes are over
        piece = partial(next, windows.settle(), None)
        pieces.append(max(added(piece) for _ in range(backends // 8 + 2)))
    assert 8 * 10 <= pieces[0] == pieces[1] < 8 * 40


def test_memory_grows_with_backends_and_models_not_with_their_product() -> None:
    """A client that may choose among 100 names on 30 backends filled 180 000 cells in an hour."""
    clock = FakeClock(6_000.0)
    windows = Windows(clock)

    def sums() -> int:
        return sum(isinstance(it, Totals) for it in gc.get_objects())

    gc.collect()
    before = sums()
    for minute in range(4):
        clock.now = 6_000.0 + 60 * minute
        for n in range(30):
            for m in range(100):
                windows.add(outcome(at=backend(f"b{n}"), ttft=0.1), f"m{m}")
                assert len(windows._cells) <= 1024
    assert sums() - before <= 1024 + 4 * (30 + 100 + 1)
    assert {it.attempts for it in windows.totals(60, "backend").values()} == {400}
    assert by_model(windows) == {f"m{m}": 120 for m in range(100)}
    clock.now += 7200
    assert total(windows).attempts == 0
    assert sums() <= before, "what is older than an hour is dropped, whoever has left the fleet"


def test_totals_when_the_clock_goes_back_lose_nothing() -> None:
    """No monotonic clock does; one that is given to a simulation might."""
    clock = FakeClock(6_000.0)
    windows = Windows(clock)
    windows.add(outcome(usd=1.0), "m")
    clock.now -= 600
    windows.add(outcome(usd=2.0), "m")
    assert total(windows, 1).usd == 3.0
    clock.now += 660
    windows.add(outcome(usd=4.0), "m")
    assert total(windows, 1).usd == 7.0


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


def test_quantiles_are_of_good_attempts_alone() -> None:
    """A backend that fails in 5 ms must not look fast."""
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=0.4, duration=2.0), "m")
    for verdict in (Verdict.STRIKE, Verdict.CALLER, Verdict.BUSY, Verdict.NEUTRAL):
        windows.add(outcome(verdict, ttft=0.005, duration=0.005), "m")
    found = total(windows)
    assert (len(found.ttft), len(found.duration)) == (1, 1)
    assert (found.ttft_quantile(0.01), found.duration_quantile(0.01)) == (0.4, 2.0)


def test_cold_start_when_it_is_a_part_of_the_wait_is_taken_out_of_both_times() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=30.5, duration=33.0, cold_start=30.0), "m")
    found = total(windows)
    assert (found.ttft_quantile(0.5), found.duration_quantile(0.5)) == (0.5, 3.0)
    assert (found.start_quantile(0.5), found.starts and len(found.starts)) == (30.0, 1)
    assert found.seconds == 33.0


def test_cold_start_when_all_of_the_wait_was_one_says_nothing_of_speed() -> None:
    """By our own clock it is the whole time to first content: how much was work is not known."""
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=30.5, duration=33.0, cold_start=30.5, usage=Usage(1, 50)), "m")
    found = total(windows)
    assert (found.good, found.start_quantile(0.5)) == (1, 30.5)
    assert (found.ttft_quantile(0.5), found.duration_quantile(0.5)) == (None, None)
    assert (found.tokens_per_second(), found.tokens_out) == (None, 50)


@pytest.mark.parametrize("told", [math.inf, math.nan, -1.0, 1e300])
def test_cold_start_when_a_provider_tells_nonsense_harms_no_number(told: float) -> None:
    windows = Windows(FakeClock())
    for _ in range(2 * 512 + 1):  # past the point where they are folded
        windows.add(outcome(ttft=0.5, duration=1.0, cold_start=told), "m")
        windows.add(outcome(ttft=0.5, duration=1.0), "m")
    found = total(windows)
    assert found.good == 2050
    numbers = [found.ttft_quantile(0.5), found.duration_quantile(0.5), found.start_quantile(0.5)]
    assert all(number is None or math.isfinite(number) for number in numbers)
    assert numbers[:2] == [0.5, 1.0]


def test_pace_of_a_stream_is_that_of_the_tokens_after_its_first_content() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=1.0, duration=3.0, usage=Usage(9, 101)), "m", stream=True)
    assert total(windows).tokens_per_second() == 50.0


def test_pace_of_a_document_is_that_of_all_tokens_in_all_the_time() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=2.0, duration=2.001, usage=Usage(9, 100)), "m")
    assert total(windows).tokens_per_second() == pytest.approx(50.0, rel=0.001)


def test_pace_of_a_stream_that_was_held_back_and_came_at_once_is_that_of_a_document() -> None:
    """A proxy in front of the backend that buffers would else show a million tokens a second."""
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=2.0, duration=2.0001, usage=Usage(9, 100)), "m", stream=True)
    assert total(windows).tokens_per_second() == pytest.approx(50.0, rel=0.001)


def test_pace_over_several_is_all_tokens_by_all_seconds() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(ttft=1.0, duration=2.0, usage=Usage(0, 11)), "m", stream=True)
    windows.add(outcome(ttft=0.0, duration=9.0, usage=Usage(0, 190)), "m")
    windows.add(outcome(Verdict.STRIKE, ttft=1.0, duration=2.0, usage=Usage(0, 500)), "m")
    windows.add(outcome(ttft=1.0, duration=100.0), "m")
    assert total(windows).tokens_per_second() == 20.0


def test_costs_are_by_what_was_billed_and_hold_what_failed() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(usd=0.002, billed=8.0, duration=10.0, usage=Usage(100, 300)), "m")
    windows.add(outcome(Verdict.STRIKE, usd=0.001, billed=2.0, duration=2.0), "m")
    found = total(windows)
    assert (found.billed, found.seconds) == (10.0, 12.0)
    assert found.cost_per_second() == pytest.approx(0.0003)
    assert found.cost_per_million_tokens() == pytest.approx(7.5)


def test_estimated_share_is_of_all_tokens() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(usage=Usage(10, 50)), "m")
    windows.add(outcome(Verdict.NEUTRAL, usage=Usage(5, 15, estimated=True)), "m")
    assert total(windows).estimated_share() == 0.25


def test_rates_when_nothing_was_measured_are_none() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(Verdict.NEUTRAL, duration=0.0), "m")
    windows.add(outcome(Verdict.NEUTRAL, duration=0.0, billed=math.nan, usd=math.nan), "m")
    found = total(windows)
    assert found.success_rate() is None
    assert found.tokens_per_second() is None
    assert found.cost_per_second() is None
    assert found.cost_per_million_tokens() is None
    assert found.estimated_share() is None


def test_memory_when_one_backend_answers_all_day_stays_bounded() -> None:
    clock = FakeClock()
    windows = Windows(clock)
    for n in range(30_000):
        clock.now += 0.001
        windows.add(outcome(ttft=0.001 * n, duration=0.001 * n), "m")
    (found,) = windows.totals(60, "backend").values()
    assert found.attempts == 30_000
    kept = [it for it in gc.get_objects() if isinstance(it, Totals)]
    assert max(len(it.ttft.waiting) for it in kept) <= 1024


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
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_cells_of_any_attempts_are_those_found_without_a_short_cut(
    history: list[tuple[int, Backend, str | None, Verdict, float | None, bool]],
) -> None:
    """The way to a cell is kept for a while: over its end, and past a name that becomes known."""
    clock = FakeClock()
    windows = Windows(clock)
    known: set[str] = set()
    expected: dict[Key, Totals] = {}
    for pause, at, model, verdict, ttft, collect in history:
        clock.now += pause
        windows.add(outcome(verdict, at=at, ttft=ttft, usd=0.5), model)
        if collect:
            settle(windows)
        name = canonical_model(model[:128]) if model else "unknown"
        if model and verdict is Verdict.GOOD:
            known.add(name)
        if model and name not in known:
            name = "other"
        fresh = Windows(clock)  # knows no short cut, and every model is as good as any
        fresh.add(outcome(verdict, at=at, ttft=ttft, usd=0.5), None)
        key = Key(at.name, at.provider, at.region, at.pool, name)
        expected.setdefault(key, Totals()).add(total(fresh))
    for by in Key._fields:
        sums: dict[str, Totals] = {}
        for key, totals in expected.items():
            sums.setdefault(getattr(key, by), Totals()).add(totals)
        found = windows.totals(60, by)
        assert {group: shown(it) for group, it in found.items()} == {
            group: shown(it) for group, it in sums.items()
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
    assert {*Site._fields, "backend", "model"} == {*Key._fields}
