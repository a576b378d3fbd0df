"""Who answered, as header lines."""

from __future__ import annotations

import re
from functools import lru_cache

_NOT_OF_A_LINE = re.compile(r"[^\x20-\x7e]")


@lru_cache(maxsize=4096)
def answered_by(backend: str, provider: str, region: str, attempts: int) -> bytes:
    """Name the backend and the number of the attempt that answered.

    Whatever the names are, these are four lines: a character that no line may hold is a `?`.
    """
    fields = {"Backend": backend, "Provider": provider, "Region": region, "Attempts": attempts}
    return "".join(
        f"X-Beacon-{name}: {_NOT_OF_A_LINE.sub('?', str(value))}\r\n"
        for name, value in fields.items()
    ).encode("ascii")
