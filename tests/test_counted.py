"""The gate: no request and no token costs a tenth more calls or bytecode than what is kept.

`tests.counted` says what is counted; nothing here is timed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import pytest
import uvloop

from .counted import kept
from .counted.count import Figure, proxy
from .counted.dear import OPCODES_A_TURN
from .counted.load import MODES

KEPT = kept.read()


async def measured(*modes: str, middleware: tuple[dict[str, Any], ...] = ()) -> dict[str, Figure]:
    async with proxy(*middleware) as running:
        return {mode: await running.figure(mode) for mode in modes}


@pytest.fixture(scope="module")
def found() -> Mapping[str, Figure]:
    """The figures of the code as it is."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measured(*MODES))


@pytest.mark.skipif(
    KEPT.python != kept.PYTHON and not os.environ.get("BEACON_CI"),
    reason=f"the figures kept are those of Python {KEPT.python}, whose bytecode is its own",
)
@pytest.mark.parametrize("mode", MODES)
def test_cost_when_counted_is_what_is_kept(mode: str, found: Mapping[str, Figure]) -> None:
    """Never skipped in CI (.ci/run): with a Python for which nothing is kept it fails."""
    assert KEPT.python == kept.PYTHON, "CI runs another Python: `make count KEEP=1` with that one"
    assert mode in KEPT.figures, "nothing is kept for it: `make count KEEP=1`"
    problems = list(kept.problems(mode, KEPT.figures[mode], found[mode]))
    assert not problems, "\n".join(problems)


def test_kept_figures_are_of_modes_that_there_are() -> None:
    assert set(KEPT.figures) <= set(MODES)


async def test_cost_when_counted_again_is_the_same(found: Mapping[str, Figure]) -> None:
    again = await measured("json", "token")
    for mode, figure in again.items():
        assert figure == pytest.approx(found[mode], rel=0.03), mode


async def test_gate_when_the_proxy_is_made_dearer_fails(found: Mapping[str, Figure]) -> None:
    """Calls are seen, and bytecode that calls nothing."""
    before = found["json"]
    extra = {"calls": before.calls * 0.15, "turns": before.opcodes * 0.15 / OPCODES_A_TURN}
    dear = {"dear": {name: round(number) for name, number in extra.items()}}
    after = (await measured("json", middleware=(dear,)))["json"]
    calls, opcodes = kept.problems("json", before, after)
    assert "calls a request" in calls
    assert "opcodes a request" in opcodes


@pytest.mark.parametrize(
    ("calls", "says"),
    [(111, "+11%"), (109, ""), (100, ""), (91, ""), (89, "keeps it")],
)
def test_gate_when_a_figure_is_more_than_a_tenth_off_says_so(calls: int, says: str) -> None:
    problems = list(kept.problems("json", Figure(100, 1000), Figure(calls, 1000)))
    assert len(problems) == bool(says)
    assert says in "".join(problems)
