"""Replay the trace and write docs/replay.md and its picture: `python -m replay`.

--no-write        print the document, keep nothing
--requests N      a shorter trace, printed only
--seed N          another one, printed only
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench import peers
from bench.processes import Failed

from . import report
from .figures import SHARE, SLICE, Figures, figures
from .runs import COUNT, SEED, records
from .trace import Trace, generate
from .world import OUTAGES


def main() -> int:
    args = _parser().parse_args()
    trace = generate(args.requests, args.seed)
    taken = records(args.requests, args.seed, *report.RUNS.values())
    runs = {name: figures(trace, each) for name, each in zip(report.RUNS, taken, strict=True)}
    document = report.render(trace, runs)
    if args.no_write or (args.requests, args.seed) != (COUNT, SEED):
        print(document)
        return 0
    report.FILE.write_text(document)
    return _draw(trace, runs)


def _draw(trace: Trace, runs: Mapping[str, Figures]) -> int:
    outages: dict[tuple[float, float], str] = {}
    for outage in OUTAGES:
        when = outage.begin * trace.span, outage.end * trace.span
        providers = {site.partition("-")[0] for site in outage.sites}
        outages[when] = f"{' and '.join(sorted(providers))} down"
    drawn = {
        "runs": {
            name: [[s.at, s.baseline, s.price, s.shed] for s in runs[name].slices]
            for name in report.DRAWN
        },
        "spikes": trace.spikes,
        "outages": [[*when, what] for when, what in outages.items()],
        "share": 1 - SHARE,
        "bound": report.BOUND,
        "width": SLICE,
    }
    target = report.FILE.with_name(report.PLOT)
    try:
        command = [peers.find("plot", "python"), Path(__file__).parent / "plot.py", target]
        subprocess.run(command, input=json.dumps(drawn).encode(), check=True, timeout=120)
    except (Failed, subprocess.SubprocessError) as exc:
        print(f"the document is written, but there is no picture: {exc}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replay", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--requests", type=int, default=COUNT, metavar="N")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
