"""One run in a process of its own: `python -m replay.child COUNT SEED OPTIONS`, records on stdout.

Nothing of the proxy may be imported before the clock is there.
"""

from __future__ import annotations

import gc
import json
import sys

import orjson

from .clock import install

clock = install()

from .run import run  # noqa: E402


def main() -> None:
    count, seed, options = sys.argv[1:]
    gc.disable()  # `serve` lets it look seldom, too; here all records are kept
    records = run(clock, int(count), int(seed), json.loads(options))
    sys.stdout.buffer.write(orjson.dumps(records))


if __name__ == "__main__":
    main()
