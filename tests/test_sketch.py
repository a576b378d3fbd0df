"""The sketch against all the values kept: what docs/regions.md says of its error holds here."""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.ops.sketch import EXACT, Sketch

# Share by which the rank of what is told may be off, as docs/regions.md says: as much as the widest
# centroid holds there.
ERRORS = {0.5: 0.01, 0.95: 0.0035, 0.99: 0.0015}

# Seconds as routers see them. Each takes the dice and returns one value.
SHAPES: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda dice: dice.lognormvariate(math.log(0.4), 0.8),
    "warm or slow": lambda dice: dice.gauss(*((0.2, 0.02) if dice.random() < 0.93 else (30, 3))),
    "heavy tail": lambda dice: 0.05 * dice.paretovariate(1.1),
    "all the same": lambda _dice: 0.25,
}


def sketch_of(values: Iterable[float]) -> Sketch:
    """As Windows makes one: fold once in 512 values."""
    sketch = Sketch()
    for number, value in enumerate(values, 1):
        sketch.waiting.append(value)
        if not number % EXACT:
            sketch.fold()
    return sketch


def merged(sketches: Iterable[Sketch]) -> Sketch:
    whole = Sketch()
    for sketch in sketches:
        whole.merge(sketch)
    return whole


def rank_error(ranked: list[float], q: float, value: float) -> float:
    """How far the share of values up to `value` is from `q`; equal values share their ranks."""
    low = bisect_left(ranked, value) / len(ranked)
    high = bisect_right(ranked, value) / len(ranked)
    return max(low - q, q - high, 0.0)


def check(sketch: Sketch, values: list[float]) -> None:
    ranked = sorted(values)
    assert len(sketch) == len(values)
    for q, error in ERRORS.items():
        told = sketch.quantile(q)
        assert told is not None
        off = rank_error(ranked, q, told)
        assert off <= error + 1 / len(values), f"p{q * 100:g} is off by {off:.4f}"


def cut(values: list[float], dice: random.Random, pieces: int) -> list[list[float]]:
    """The values in cells of very different sizes, none lost."""
    ends = sorted(dice.choices(range(len(values) + 1), k=pieces - 1))
    return [values[a:b] for a, b in zip([0, *ends], [*ends, len(values)], strict=True)]


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=EXACT),
    st.floats(0, 1),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_quantile_of_up_to_512_values_is_exact_however_they_came_together(
    values: list[float], q: float, pieces: int, dice: random.Random
) -> None:
    whole = merged(map(sketch_of, cut(values, dice, pieces)))
    assert whole.quantile(q) == sorted(values)[max(math.ceil(q * len(values)), 1) - 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "pieces"), [(1_500, 3), (20_000, 366), (60_000, 40)])
def test_quantile_of_many_merged_cells_is_off_by_no_more_than_is_written(
    shape: str, count: int, pieces: int
) -> None:
    """366 cells are six backends over an hour; merged in any order they say the same."""
    dice = random.Random(f"{shape} {count}")
    values = [SHAPES[shape](dice) for _ in range(count)]
    cells = list(map(sketch_of, cut(values, dice, pieces)))
    check(merged(cells), values)
    dice.shuffle(cells)
    check(merged(cells), values)
    tens = [merged(cells[n : n + 10]) for n in range(0, pieces, 10)]
    for ten in tens:
        ten.pack()
    check(merged(tens), values)
    check(sketch_of(values), values)


@given(st.integers(0, 2**32), st.integers(600, 4_000), st.integers(1, 60))
def test_quantile_of_any_cut_is_off_by_no_more_than_is_written(
    seed: int, count: int, pieces: int
) -> None:
    dice = random.Random(seed)
    shape = dice.choice(list(SHAPES.values()))
    values = [shape(dice) for _ in range(count)]
    check(merged(map(sketch_of, cut(values, dice, pieces))), values)


def test_quantile_of_values_in_coarse_steps_is_within_a_step() -> None:
    """A centroid between two heaps of equal values lies between them, whatever their ranks."""
    dice = random.Random(2)
    values = [round(SHAPES["lognormal"](dice), 1) for _ in range(20_000)]
    told, ranked = merged(map(sketch_of, cut(values, dice, 100))), sorted(values)
    for q in ERRORS:
        assert told.quantile(q) == pytest.approx(ranked[math.ceil(q * 20_000) - 1], abs=0.1)


def test_merge_when_done_leaves_the_other_as_it_was() -> None:
    """A cell is merged again for every answer: one that grew by it would count twice."""
    dice = random.Random(1)
    values = [SHAPES["lognormal"](dice) for _ in range(2_000)]
    cell = sketch_of(values)
    for _ in range(3):
        merged([cell, cell, sketch_of(values[:700])])
    check(cell, values)


def test_merge_into_one_that_goes_on_keeps_the_other_apart() -> None:
    few, many = sketch_of([1.0, 2.0]), sketch_of([3.0] * 1_000)
    whole = merged([many, few])
    whole.waiting.append(9.0)
    assert (len(few), len(many), len(whole)) == (2, 1_000, 1_003)
    assert (few.quantile(1.0), many.quantile(1.0), whole.quantile(1.0)) == (2.0, 3.0, 9.0)


def test_sketch_when_values_pour_in_keeps_no_more_than_1024_of_them() -> None:
    sketch, most = Sketch(), 0
    for number in range(1, 50_001):
        sketch.waiting.append(number / 1000)
        most = max(most, len(sketch.waiting))
        if not number % EXACT:
            sketch.fold()
    assert most == 2 * EXACT
    check(sketch, [number / 1000 for number in range(1, 50_001)])


def test_pack_takes_in_what_waits_for_a_digest_and_leaves_a_few_values_exact() -> None:
    few, many = sketch_of([3.0, 1.0, 2.0]), sketch_of([1.0] * 1_030)
    few.pack()
    many.pack()
    assert (list(few.waiting), len(few), few.quantile(0.5)) == ([3.0, 1.0, 2.0], 3, 2.0)
    assert (len(many.waiting), len(many), many.quantile(0.5)) == (0, 1_030, 1.0)


def test_quantile_of_nothing_is_none() -> None:
    assert Sketch().quantile(0.5) is None
    assert merged([Sketch(), Sketch()]).quantile(0.5) is None
