"""What was spent, added up: the one answer behind `beacon-proxy costs` and `GET /costs`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..contracts import Backend, Verdict
from .reading import reading

MOST = 1_000  # rows shown; clients may make up any number of models
SCOPE = "the ledger: each attempt that ended since, of every process that writes to it"

# What attempts may be told apart by, as SQL. Days are those of UTC.
BY = {
    "provider": "provider",
    "region": "region",
    "model": "model",
    "tenant": "tenant",
    "day": "date(ended_unix, 'unixepoch')",
    "backend": "backend",
    "pool": "pool",
}

_SINCE = re.compile(r"([0-9]{1,9})([smhdw]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def seconds_of(since: str) -> int | None:
    """Seconds of a time such as 30s, 15m, 1h, 7d or 2w; None where it is none."""
    found = _SINCE.fullmatch(since)
    return int(found[1]) * _UNITS[found[2]] or None if found else None


class Sums(NamedTuple):
    """What some attempts add up to."""

    attempts: int = 0
    good: int = 0
    strikes: int = 0
    busy: int = 0
    seconds: float = 0.0  # in attempts
    billed_seconds: float = 0.0
    cold_start_seconds: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0  # of those in, what came from a prompt cache
    counted: int = 0  # attempts whose tokens are known
    estimated: int = 0  # of those, the ones that the backend did not count itself
    usd: float = 0.0
    expected_usd: float = 0.0

    def plus(self, other: Sums) -> Sums:
        return Sums._make(a + b for a, b in zip(self, other, strict=True))

    def shown(self) -> dict[str, Any]:
        """The same with what follows from it; None where nothing was measured."""
        judged, tokens = self.good + self.strikes, self.tokens_in + self.tokens_out
        return {
            "attempts": self.attempts,
            "good": self.good,
            "failed": self.strikes + self.busy,
            "strikes": self.strikes,
            "success_rate": round(self.good / judged, 4) if judged else None,
            "seconds": round(self.seconds, 3),
            "billed_seconds": round(self.billed_seconds, 3),
            "cold_start_seconds": round(self.cold_start_seconds, 3),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_cached": self.tokens_cached,
            "estimated_share": round(self.estimated / self.counted, 4) if self.counted else None,
            "usd": round(self.usd, 9),
            "expected_usd": round(self.expected_usd, 9),
            "usd_per_second": (
                round(self.usd / self.billed_seconds, 9) if self.billed_seconds > 0 else None
            ),
            "usd_per_million_tokens": round(self.usd / tokens * 1e6, 6) if tokens else None,
        }


COLUMNS = tuple(Sums().shown())  # of a report, behind what it is grouped by

_SUMS = f"""count(*),
  sum(verdict = '{Verdict.GOOD.value}'),
  sum(verdict = '{Verdict.STRIKE.value}'),
  sum(verdict = '{Verdict.BUSY.value}'),
  sum(duration_s), sum(billed_s), ifnull(sum(cold_start_s), 0.0),
  cast(total(tokens_in) AS INTEGER), cast(total(tokens_out) AS INTEGER),  -- no sum that overflows
  cast(total(tokens_cached) AS INTEGER),
  count(tokens_estimated), ifnull(sum(tokens_estimated), 0),
  sum(usd) AS spent, sum(expected_usd)"""


@dataclass(frozen=True, slots=True)
class Report:
    """Spend by what it was asked for.

    Attributes:
        since, by: as asked.
        rows: the dearest first, days in their order; of a value that is not known it is None.
        total: over all rows, those that are left out too.
        left_out: how many rows there were beyond `MOST`.
        covered: s that the rows look back, at most what was asked.
    """

    since: str
    by: str
    rows: list[tuple[str | None, Sums]]
    total: Sums
    left_out: int
    covered: float

    def document(self, rent: float | None, *, scope: str = SCOPE) -> dict[str, Any]:
        """What is told as JSON; `rent` is USD an hour, None where it is not known."""
        return {
            "since": self.since,
            "by": self.by,
            "rows": [{self.by: name, **sums.shown()} for name, sums in self.rows],
            "rows_left_out": self.left_out,
            "total": self.total.shown(),
            "total_usd": round(self.total.usd, 9),
            "rent_usd_per_hour": None if rent is None else round(rent, 9),
            "covered_seconds": round(self.covered, 1),
            "scope": scope,
            "timestamp": time.time(),
        }


def report(path: str | os.PathLike[str], since: str, by: str, seconds: float = 60.0) -> Report:
    """Add up what the ledger holds. It blocks, for at most about `seconds`.

    Raises:
        LedgerError: it cannot be read, or not in that time.
        KeyError, ValueError: `by` or `since` is none.
    """
    key, back = BY[by], seconds_of(since)
    if back is None:
        raise ValueError(f"not a time: {since!r}")
    now = time.time()
    order = "1" if by == "day" else "spent DESC, 1"
    query = f"SELECT {key}, {_SUMS} FROM attempts WHERE ended_unix >= ? GROUP BY 1 ORDER BY {order}"
    rows: list[tuple[str | None, Sums]] = []
    total, left_out, first = Sums(), 0, None
    with reading(path, seconds) as connection:
        for name, *values in connection.execute(query, (now - back,)):
            sums = Sums(*values)
            total = total.plus(sums)
            if len(rows) < MOST:
                rows.append((name, sums))
            else:
                left_out += 1
        ((first,),) = connection.execute("SELECT min(ended_unix) FROM attempts")
    covered = 0.0 if first is None else min(max(now - first, 0.0), float(back))
    return Report(since, by, rows, total, left_out, covered)


def rent_per_hour(backends: Iterable[Backend], now_unix: float) -> float:
    """USD that the rented ones cost an hour, busy or idle: no attempt's, so in no row."""
    rented = (each for each in backends if each.rented_until_unix > now_unix)
    return sum(each.idle_price_per_second for each in rented) * 3_600
