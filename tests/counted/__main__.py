"""`python -m tests.counted profile json`: which functions a request's cost lies in."""

from __future__ import annotations

import argparse

from .count import MODES, Counted, proxy

COLUMNS = ("calls", "opcodes", "inclusive", "us")


def profile(mode: str, by: str, top: int) -> None:
    """Print the functions of a mode, the dearest first, a unit's worth each."""
    with proxy() as running:
        running.warm(mode)
        counted, seconds = running.count(mode), running.seconds(mode)
    rows = [
        (count.calls, count.opcodes, count.inclusive, seconds.get(name, 0.0) * 1e6, name)
        for name, count in counted.items()
    ]
    rows.sort(key=lambda row: row[COLUMNS.index(by)], reverse=True)
    calls, opcodes = total(counted)
    print(f"{mode}: {calls:.1f} calls, {opcodes:.1f} opcodes a {MODES[mode].unit}")
    print("  calls  opcodes  inclusive    us  function")
    for row in rows[:top]:
        print("{:7.1f}{:9.1f}{:11.1f}{:6.1f}  {}".format(*row))


def total(counted: Counted) -> tuple[float, float]:
    """Calls and opcodes of all functions."""
    counts = counted.values()
    return sum(count.calls for count in counts), sum(count.opcodes for count in counts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.counted")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("profile", help="the functions behind the figures of a mode")
    command.add_argument("mode", choices=MODES)
    command.add_argument("--by", choices=COLUMNS, default="calls")
    command.add_argument("--top", type=int, default=60)
    args = parser.parse_args()
    profile(args.mode, args.by, args.top)


if __name__ == "__main__":
    main()
