"""Measure the proxy next to its peers: `python -m bench`.

    run      run the modes; write results.json, RESULTS.md, the README's table and the picture
             (the default)
    report   write the last three from results.json

A mode that is run replaces what results.json had of it; with --contenders nothing is written.
Exit 1: an answer was wrong or missing.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import contenders, modes, peers, report, results
from .bed import CORES
from .modes import Mode
from .processes import Failed, raise_descriptor_limit
from .runs import SCALE, Run


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "report":
        _write_report(results.load())
        return 0
    if len(CORES) < 2:
        print("two cores are needed: one for the load, one for who is measured", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _leave)
    raise_descriptor_limit()
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    wrong = 0
    for name in args.modes or modes.ALL:
        if name in args.skip:
            continue
        mode = modes.ALL[name]
        entry = _run_mode(mode, args)
        wrong += sum(results.errors(runs).total() for runs in entry["runs"].values())
        if not (args.no_write or args.contenders):
            found = results.merge(results.load(), {"modes": {name: entry}})
            results.save(found)
            _write_report(found, draw=name == "scale")
    if wrong:
        print(f"{wrong} errors: see above", file=sys.stderr)
    return 1 if wrong else 0


def _run_mode(mode: Mode, args: argparse.Namespace) -> dict[str, Any]:
    """Run one mode, in rounds: every contender once, then all again."""
    seconds = args.seconds or mode.seconds
    entry: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": results.machine(),
        "seconds": seconds,
        "added": mode.added,
        "versions": {},
        "left_out": dict(mode.left_out),
        "runs": {},
    }
    for name in mode.contenders:
        if args.contenders and name not in args.contenders:
            continue
        try:
            entry["versions"][name] = contenders.ALL[name].version()
            entry["runs"][name] = []
        except contenders.Missing as exc:
            entry["left_out"][name] = str(exc)
    for number in range(args.repeats or mode.repeats):
        for name, runs in entry["runs"].items():
            run = _run_once(mode, name, seconds)
            _tell(f"{mode.name} {number + 1} {name:15}", run)
            runs.append({"figures": run.figures, "errors": dict(run.errors)})
    return entry


def _run_once(mode: Mode, name: str, seconds: float) -> Run:
    try:
        return mode.run(contenders.ALL[name], seconds)
    except Failed as exc:
        print(exc, file=sys.stderr)
        run = Run()
        run.errors[str(exc).partition(":")[0]] += 1
        return run


def _tell(what: str, run: Run) -> None:
    figures = "  ".join(f"{name}={report.number(value)}" for name, value in run.figures.items())
    errors = f"  ERRORS {dict(run.errors)}" if run.errors else ""
    print(f"{what}{figures}{errors}", flush=True)


def _write_report(found: Mapping[str, Any], *, draw: bool = True) -> None:
    report.RESULTS.write_text(report.render(dict(found)))
    readme = report.README.read_text()
    report.README.write_text(report.render_readme(readme, dict(found)))
    if draw and "scale" in found["modes"]:
        _draw(found["modes"]["scale"])


def _draw(scale: Mapping[str, Any]) -> None:
    series: dict[str, list[list[float]]] = {}
    for contender, runs in scale["runs"].items():
        for streams in SCALE:
            name = f"cpu_us_per_token@{streams}"
            values = [run["figures"][name] for run in runs if name in run["figures"]]
            if values:
                middle = results.Stat.of(values).value
                point = [streams, middle, min(values), max(values)]
                series.setdefault(contender, []).append(point)
    target = report.RESULTS.with_name(report.PLOT)
    try:
        command = [peers.find("plot", "python"), Path(__file__).parent / "plot.py", target]
        subprocess.run(command, input=json.dumps(series).encode(), check=True, timeout=120)
    except (Failed, subprocess.SubprocessError) as exc:  # the figures are worth more than it
        print(f"no picture: {exc}", file=sys.stderr)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _names(known: Mapping[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = f"of {', '.join(modes.ALL)}"
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--modes", type=_names(modes.ALL), metavar="A,B", help=known, default=[])
    parser.add_argument("--skip", type=_names(modes.ALL), metavar="A,B", default=[])
    parser.add_argument(
        "--contenders",
        type=_names(contenders.ALL),
        metavar="A,B",
        help=f"of {', '.join(contenders.ALL)}",
        default=[],
    )
    parser.add_argument("--repeats", type=_positive(int), help="of each run; default: the mode's")
    parser.add_argument("--seconds", type=_positive(float), help="of a run; default: the mode's")
    parser.add_argument("--no-write", action="store_true", help="tell the figures, keep none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
