"""What was spent since a time, for who has to go on counting where an earlier process stopped.

Rows are added up by their ids, some thousand at a time: they lie in the file in that order, and a
sum over few rows needs no sorting on disk. A time only says, by the index, between which ids to
look. Ids follow the times of rows but roughly, so either is asked of each row.
"""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from heapq import nlargest
from math import inf
from operator import itemgetter
from typing import NamedTuple

from .reading import never, reading
from .schema import LedgerError

_CHUNK = 5_000  # ids of one query; with ten times as many each row takes twice as long

# Its columns are as old as the file. A proxy that was brought to a newer version asks this before
# it opens the file to write, which brings that up: the budgets must not forget meanwhile.
_OLDEST = 1

_SLICE = """
SELECT min(id), max(id) FROM attempts WHERE ended_unix >= ? AND ended_unix < ? AND id <= ?"""

_SPENT = """
SELECT pool, provider, backend, region, tenant, sum(usd) FROM attempts
WHERE id > ? AND id <= ? AND ended_unix >= ? AND ended_unix < ?
GROUP BY backend, tenant, region, provider, pool"""  # soon told apart: a quarter less time


class Place(NamedTuple):
    """The attempts of one backend, added up."""

    pool: str
    provider: str
    backend: str
    region: str
    usd: float


class Spent(NamedTuple):
    """All attempts, added up in two ways."""

    places: list[Place]
    tenants: list[tuple[str | None, float]]  # as `Exchange.tenant`, USD; who spent least is first


class _Sums:
    """USD of the attempts that were read so far."""

    def __init__(self, most_tenants: int) -> None:
        self._most_tenants = most_tenants
        self._places: defaultdict[tuple[str, str, str, str], float] = defaultdict(float)
        self._tenants: defaultdict[str | None, float] = defaultdict(float)

    def add(self, rows: Iterable[tuple[str, str, str, str, str | None, float]]) -> None:
        """Add what `_SPENT` found."""
        places, tenants, each_tenant = self._places, self._tenants, self._most_tenants > 0
        for pool, provider, backend, region, tenant, usd in rows:
            places[pool, provider, backend, region] += usd
            if each_tenant:
                tenants[tenant] += usd

    def spent(self) -> Spent:
        # Clients make tenants up. To sort them all would keep Python's lock the whole time.
        tenants = nlargest(self._most_tenants, self._tenants.items(), itemgetter(1))
        tenants.reverse()
        return Spent([Place(*where, usd) for where, usd in self._places.items()], tenants)


def spent_since(
    path: str | os.PathLike[str],
    since_unix: Iterable[float],
    *,
    most_tenants: int = 0,
    until_unix: Callable[[], float] = lambda: inf,
    stopped: Callable[[], bool] = never,
) -> Iterator[tuple[float, Spent]]:
    """What attempts that ended at each time (unix s) or later cost; the latest time first.

    `most_tenants`: of so many tenants, those that spent most, it is told what each did.
    Only what is in the file when this begins counts, and of that what ended before `until_unix`,
    which is asked right then. Without a file nothing was spent. It blocks, for as long as
    `stopped` says nothing else: for a thread.

    Raises:
        LedgerError: there is a file, and it cannot be read; of kind `stopped`.
    """
    times = sorted(set(since_unix), reverse=True)
    sums = _Sums(most_tenants)
    try:
        with reading(path, inf, stopped, oldest=_OLDEST) as connection:
            ((last,),) = connection.execute("SELECT max(id) FROM attempts")
            until = until_unix()
            for since in times:
                _add(connection, sums, since, until, last or 0)
                yield since, sums.spent()
                until = since
    except LedgerError as error:
        if error.kind != "missing":
            raise
        yield from ((since, Spent([], [])) for since in times)


def _add(
    connection: sqlite3.Connection,
    sums: _Sums,
    since: float,
    until: float,
    last: int,
) -> None:
    """Add what ended from `since` until before `until`, of the rows up to the id `last`."""
    ((first, high),) = connection.execute(_SLICE, (since, until, last))
    while first is not None and high >= first:
        low = max(high - _CHUNK, first - 1)
        sums.add(connection.execute(_SPENT, (low, high, since, until)).fetchall())
        high = low
