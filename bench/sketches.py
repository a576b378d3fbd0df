"""Quantile sketches from PyPI side by side, each in an interpreter of its own: docs/regions.md.

    python3.11 -m venv sketches
    sketches/bin/pip install fastdigest ddsketch rddsketch crick pytdigest tdigest datasketches
    sketches/bin/python bench/sketches.py

The values are lognormal with a median of 0.4 s. Costs are us of CPU a value, a merge, a quantile,
the best of three; an error is the largest of p50, p95 and p99, as a share of the true value. The
merge is that of 366 cells, as six backends make in an hour, of 3 to 300 values each.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

COUNT = 100_000
CUTS = (0.5, 0.95, 0.99)
BATCH = 256


def array(values: list[float]) -> Any:
    return import_module("numpy").array(values)


def each(add: Callable[[float], Any], values: list[float]) -> None:
    for value in values:
        add(value)


# module: how to make one, add one value, add many, merge another into it, ask for a quantile
WAYS: dict[str, tuple[Callable[..., Any], ...]] = {
    "fastdigest": (
        lambda m: m.TDigest(200),
        lambda s: s.update,
        lambda s, values: s.batch_update(values),
        lambda s, other: s.merge_inplace(other),
        lambda s, q: s.quantile(q),
    ),
    "ddsketch": (
        lambda m: m.LogCollapsingLowestDenseDDSketch(0.01),
        lambda s: s.add,
        lambda s, values: each(s.add, values),
        lambda s, other: s.merge(other),
        lambda s, q: s.get_quantile_value(q),
    ),
    "rddsketch": (
        lambda m: m.DDSketch(0.01),
        lambda s: s.add,
        lambda s, values: each(s.add, values),
        lambda s, other: s.merge(other),
        lambda s, q: s.quantile(q),
    ),
    "crick": (
        lambda m: m.TDigest(200),
        lambda s: s.add,
        lambda s, values: s.update(values),
        lambda s, other: s.merge(other),
        lambda s, q: s.quantile(q),
    ),
    "pytdigest": (
        lambda m: m.TDigest(compression=200),
        lambda s: s.update,
        lambda s, values: s.update(array(values)),
        lambda s, other: s + other,
        lambda s, q: s.inverse_cdf(q),
    ),
    "tdigest": (
        lambda m: m.TDigest(),
        lambda s: s.update,
        lambda s, values: s.batch_update(values),
        lambda s, other: s + other,
        lambda s, q: s.percentile(q * 100),
    ),
    "datasketches": (
        lambda m: m.kll_doubles_sketch(200),
        lambda s: s.update,
        lambda s, values: s.update(array(values)),
        lambda s, other: s.merge(other),
        lambda s, q: s.get_quantile(q),
    ),
}


def cost(work: Callable[[], Any], count: int) -> float:
    """Microseconds of CPU a thing."""
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best / count * 1e6


def worst(quantile: Callable[[float], float], values: list[float]) -> float:
    """The largest error of the three percentiles, as a share of the true value."""
    ranked = sorted(values)
    exact = {q: ranked[math.ceil(q * len(ranked)) - 1] for q in CUTS}
    return max(abs(quantile(q) / exact[q] - 1) for q in CUTS)


def measure(name: str) -> str:
    before = set(sys.modules)
    started = time.perf_counter()
    module = import_module(name)
    loading, modules = time.perf_counter() - started, len(set(sys.modules) - before)
    make, adder, fill, merge, ask = WAYS[name]
    dice = random.Random(5)
    count = COUNT if name != "tdigest" else 3_000  # it takes 40 us a value
    values = [dice.lognormvariate(math.log(0.4), 0.8) for _ in range(count)]

    def batched(some: list[float]) -> Any:
        sketch = make(module)
        for at in range(0, len(some), BATCH):
            fill(sketch, some[at : at + BATCH])
        return sketch

    one = cost(lambda: each(adder(make(module)), values), count)
    many = cost(lambda: batched(values), count)
    sizes = [dice.randint(3, 300) for _ in range(366)]
    cells = [values[at : at + size] for at, size in zip(range(0, count, 270), sizes, strict=False)]
    sketches = [batched(cell) for cell in cells]

    def merged() -> Any:
        whole = make(module)
        for sketch in sketches:
            whole = merge(whole, sketch) or whole
        return whole

    whole, everything = merged(), [value for cell in cells for value in cell]
    reading = cost(lambda: [ask(whole, q) for q in CUTS * 100], 300)
    return (
        f"| {name} {version(name)} | {loading * 1e3:.0f} ms, {modules} | {one:.2f} | {many:.2f} "
        f"| {cost(merged, len(cells)):.1f} | {reading:.1f} "
        f"| {worst(lambda q: ask(batched(values), q), values):.2%} "
        f"| {worst(lambda q: ask(whole, q), everything):.2%} |"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
        sys.exit()
    print("| | import, modules | add | in batches | merge | quantile | error | merged |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in WAYS:
        subprocess.run([sys.executable, __file__, name], check=True)
