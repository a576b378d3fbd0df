"""One run in a process of its own: `python -m replay.child COUNT SEED OPTIONS`, records on stdout.

Nothing of the proxy may be imported before the clock is there.
"""

from __future__ import annotations

import json
import sys

from .clock import install

clock = install()

from .run import run  # noqa: E402


def main() -> None:
    count, seed, options = sys.argv[1:]
    records = run(clock, int(count), int(seed), json.loads(options))
    json.dump(records, sys.stdout, default=str)


if __name__ == "__main__":
    main()
