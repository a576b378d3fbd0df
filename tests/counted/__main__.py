"""The command line; see `tests.counted`."""

from __future__ import annotations

import argparse
import asyncio

import uvloop

from . import kept
from .count import proxy
from .load import MODES

COLUMNS = ("calls", "opcodes", "inclusive", "us")


async def show(keep: bool) -> None:
    """Print each mode's figure beside the kept one; with `keep` it takes its place."""
    python, before = kept.read()
    async with proxy() as running:
        figures = {mode: await running.figure(mode) for mode in MODES}
    print("             calls            opcodes")
    for mode, figure in figures.items():
        cells = ["", ""]
        if python == kept.PYTHON and mode in before:
            cells = [f"{change:+.1%}" for change in kept.changes(before[mode], figure)]
        row = (mode, figure.calls, cells[0], figure.opcodes, cells[1], MODES[mode].unit)
        print("{:10}{:8.1f} {:7}{:10.1f} {:7}  a {}".format(*row))
    if keep:
        kept.write(figures)
        print(f"kept, as those of Python {kept.PYTHON}: {kept.FILE}")
    elif python != kept.PYTHON:
        print(f"nothing to compare with: those kept are of Python {python}, this is {kept.PYTHON}")


async def profile(mode: str, by: str, top: int) -> None:
    """Print the functions of a mode, the dearest first, with what they do a unit."""
    async with proxy() as running:
        await running.warm(mode)
        counts, seconds = await running.count(mode), await running.seconds(mode)
    rows = [(*count, seconds.get(name, 0.0) * 1e6, name) for name, count in counts.items()]
    rows.sort(key=lambda row: row[COLUMNS.index(by)], reverse=True)
    calls = sum(count.calls for count in counts.values())
    opcodes = sum(count.opcodes for count in counts.values())
    print(f"{mode}: {calls:.1f} calls, {opcodes:.1f} opcodes a {MODES[mode].unit}")
    print("  calls  opcodes  inclusive    us  function")
    for row in rows[:top]:
        print("{:7.1f}{:9.1f}{:11.1f}{:6.1f}  {}".format(*row))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.counted",
        description="What a request and a token cost the proxy, counted instead of timed.",
    )
    parser.add_argument("--keep", action="store_true", help="keep the figures in kept.json")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser(
        "profile",
        help="the functions behind the figure of a mode",
        description="calls and opcodes are the function's own; inclusive: opcodes with those of"
        " what it calls; us: its own time by cProfile, the least of several uncounted runs.",
    )
    command.add_argument("mode", choices=MODES)
    command.add_argument("--by", choices=COLUMNS, default="calls", help="default: calls")
    command.add_argument("--top", type=int, default=60, metavar="N", help="rows; default: 60")
    args = parser.parse_args()
    work = profile(args.mode, args.by, args.top) if args.command else show(args.keep)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
