"""What the runs gave: kept in results.json, and the medians, noise and ratios that follow from it.

    {"modes": {NAME: {"date", "machine", "versions", "seconds", "added", "left_out",
                      "runs": {CONTENDER: [{"figures": {…}, "errors": {…}}, …]}}}}

Every run is kept. A mode that is run again replaces its former self as a whole, so that what is
compared always comes from the same run.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .modes import BEACON, DIRECT
from .targets import Target

Results = dict[str, Any]
FILE = Path(__file__).parent / "results.json"


@dataclass(frozen=True)
class Stat:
    """The median of some runs, and their noise: (max - min) / median."""

    value: float
    noise: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        middle = median(values)
        spread = max(values) - min(values)
        return cls(middle, spread / abs(middle) if middle else 0.0)


@dataclass(frozen=True)
class Verdict:
    """How a target stands.

    Attributes:
        value: of the figure, or of the ratio; None: it was not measured.
        ours, theirs: the figures that make it.
        flawed: answers were wrong or missing in a run that it rests on: it cannot be met.
    """

    target: Target
    value: float | None = None
    ours: float = 0.0
    theirs: float | None = None
    flawed: bool = False

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.target.limit and not self.flawed


def load(path: Path = FILE) -> Results:
    return json.loads(path.read_text()) if path.exists() else {"modes": {}}


def save(results: Results, path: Path = FILE) -> None:
    """Write all or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def merge(old: Results, new: Results) -> Results:
    """The modes of both; of a mode that both have, the new one."""
    return {**old, "modes": {**old["modes"], **new["modes"]}}


def stats(mode: Mapping[str, Any]) -> dict[str, dict[str, Stat]]:
    """Contender -> figure -> its median and noise.

    Beside what was measured: `errors`, of all runs, and where the mode is about what is `added`,
    `added_p50_us`: the time of a request less that of those that went direct in the same round.
    """
    runs: Mapping[str, list[dict[str, Any]]] = mode["runs"]
    found = {}
    for contender, ours in runs.items():
        figures = dict.fromkeys(name for run in ours for name in run["figures"])
        rows = {name: Stat.of([*_values(ours, name)]) for name in figures}
        if mode["added"] and (added := _added(ours, runs.get(DIRECT, []))):
            rows["added_p50_us"] = Stat.of(added)
        rows["errors"] = Stat(sum(errors(ours).values()), 0.0)
        found[contender] = rows
    return found


def _values(runs: Sequence[Mapping[str, Any]], figure: str) -> Iterator[float]:
    return (run["figures"][figure] for run in runs if figure in run["figures"])


def _added(ours: Sequence[Mapping[str, Any]], direct: Sequence[Mapping[str, Any]]) -> list[float]:
    if ours is direct:
        return []
    pairs = zip(ours, direct, strict=False)
    both = [(one["figures"], other["figures"]) for one, other in pairs]
    name = "p50_us"
    return [one[name] - other[name] for one, other in both if name in one and name in other]


def errors(runs: Sequence[Mapping[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for run in runs:
        total.update(run["errors"])
    return total


def judge(results: Results, targets: Sequence[Target]) -> list[Verdict]:
    """How each target stands."""
    return [_verdict(results["modes"].get(target.mode), target) for target in targets]


def _verdict(mode: Mapping[str, Any] | None, target: Target) -> Verdict:
    rows = {} if mode is None else stats(mode)
    ours = rows.get(BEACON, {})
    measured = ours.get(target.figure)
    if measured is None:
        return Verdict(target)
    value, counts_errors = measured.value, target.figure == "errors"
    if target.over is None:
        return Verdict(target, value, value, None, not counts_errors and ours["errors"].value > 0)
    theirs = rows.get(target.over, {})
    other = theirs.get(target.over_figure or target.figure)
    if other is None or other.value <= 0:
        return Verdict(target)
    flawed = ours["errors"].value + theirs["errors"].value > 0
    return Verdict(target, value / other.value, value, other.value, flawed)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"Python {sys.version}",
    }
