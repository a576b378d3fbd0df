"""The figures that are kept, and what a new one may be beside them.

They are those of one minor version of Python, the one that CI runs: another's bytecode differs. A
figure may be a tenth off either way. Dearer is what the gate is for; one that has become cheaper is
to be kept, for it could grow back unseen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .count import Figure
from .load import MODES

FILE = Path(__file__).with_name("kept.json")
ROOM = 0.10  # of the kept figure, either way
PYTHON = "{}.{}".format(*sys.version_info)


class Kept(NamedTuple):
    """What kept.json holds."""

    python: str  # minor version
    figures: Mapping[str, Figure]  # by mode


def read() -> Kept:
    document = json.loads(FILE.read_text())
    figures = {mode: Figure(**figure) for mode, figure in document["figures"].items()}
    return Kept(document["python"], figures)


def write(figures: Mapping[str, Figure]) -> None:
    """Keep `figures`, as those of this version of Python."""
    rows = ",\n".join(
        f'    {json.dumps(mode)}: {{"calls": {figure.calls:.1f}, "opcodes": {figure.opcodes:.1f}}}'
        for mode, figure in figures.items()
    )
    FILE.write_text(f'{{\n  "python": "{PYTHON}",\n  "figures": {{\n{rows}\n  }}\n}}\n')


def changes(kept: Figure, found: Figure) -> Figure:
    """How much dearer each part of a figure is, as a share of the kept one."""
    return Figure(found.calls / kept.calls - 1, found.opcodes / kept.opcodes - 1)


def problems(mode: str, kept: Figure, found: Figure) -> Iterator[str]:
    """What is wrong with a mode's new figure, a line each."""
    for what, change in changes(kept, found)._asdict().items():
        if abs(change) <= ROOM:
            continue
        before, now = getattr(kept, what), getattr(found, what)
        if change > 0:
            advice = (
                f"`python -m tests.counted profile {mode}` shows the functions;"
                " where it has to be, say why in the commit, after `make count KEEP=1`"
            )
        else:
            advice = "`make count KEEP=1` keeps it, or it could grow back unseen"
        unit = MODES[mode].unit
        yield f"{mode}: {change:+.0%}, {now:.1f} {what} a {unit}, kept are {before:.1f}. {advice}"
