"""What was spent since a time, for who has to go on counting where an earlier process stopped."""

from __future__ import annotations

import os
from typing import NamedTuple

from .reading import reading
from .schema import LedgerError

_SPENT = """
SELECT pool, provider, backend, region, tenant, sum(usd) FROM attempts
WHERE ended_unix >= ? GROUP BY pool, provider, backend, region, tenant"""


class Spent(NamedTuple):
    """The attempts of one backend for one tenant, added up."""

    pool: str
    provider: str
    backend: str
    region: str
    tenant: str | None  # as `Exchange.tenant`
    usd: float


def spent_since(path: str | os.PathLike[str], since_unix: float) -> list[Spent]:
    """What attempts that ended at `since_unix` (s) or later cost; nothing without a file.

    It blocks: for the start of a process, or a thread.

    Raises:
        LedgerError: there is a file, and it cannot be read.
    """
    try:
        with reading(path) as connection:
            return [Spent(*row) for row in connection.execute(_SPENT, (since_unix,))]
    except LedgerError as error:
        if error.kind == "missing":
            return []
        raise
