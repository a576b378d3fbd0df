"""The load: a process that asks, reads every answer to its last byte, and counts.

    python -m bench.load '{"kind": "documents", "port": 8080, "root": 4711, "connections": 32}'

prints one line of JSON: what it counted between the two ends of a window of `seconds`, with the CPU
seconds of the process tree `root` in that window. An answer that is wrong in any way is an error,
whenever it comes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

import uvloop

from . import documents, streams, transfers
from .counts import Counts, Spec

KINDS = {
    "documents": documents.load,
    "streams": streams.load,
    "upload": transfers.load,
    "download": transfers.load,
}


async def run(spec: Spec) -> dict[str, Any]:
    """Run one load; a fault of its own is an error like any other."""
    counts = Counts(spec.root)

    def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        counts.errors[f"in the load: {context.get('exception') or context['message']!r}"] += 1

    asyncio.get_running_loop().set_exception_handler(failed)
    found = await KINDS[spec.kind](spec, counts)
    if not counts.all_done and not counts.errors:
        counts.errors["no good answer at all"] += 1
    return found | {"answers": counts.all_done, "errors": dict(counts.errors)}


if __name__ == "__main__":
    given = Spec(**json.loads(sys.argv[1]))
    gc.disable()  # a load lasts seconds, and its pauses would be measured as the proxy's
    print(json.dumps(uvloop.run(run(given))), flush=True)
