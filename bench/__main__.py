"""`python -m bench`: run modes, one contender after the other, and write what they gave."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from . import contenders, modes
from .processes import Failed, raise_descriptor_limit


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    raise_descriptor_limit()
    bad = 0
    for name in args.modes:
        mode = modes.ALL[name]
        chosen = [c for c in mode.contenders if not args.contenders or c in args.contenders]
        for repeat in range(args.repeats or mode.repeats):
            for contender in chosen:
                try:
                    run = mode.run(contenders.ALL[contender], args.seconds or mode.seconds)
                except Failed as exc:
                    print(f"{name} {contender}: {exc}", file=sys.stderr)
                    bad += 1
                    continue
                figures = "  ".join(f"{k}={v:.4g}" for k, v in run.figures.items())
                errors = f"  ERRORS {dict(run.errors)}" if run.errors else ""
                print(f"{name} {repeat + 1} {contender:13}{figures}{errors}", flush=True)
                bad += run.errors.total()
    return 1 if bad else 0


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--modes", type=_names(modes.ALL), default=list(modes.ALL))
    parser.add_argument("--contenders", type=_names(contenders.ALL), default=[])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float)
    return parser


if __name__ == "__main__":
    sys.exit(main())
