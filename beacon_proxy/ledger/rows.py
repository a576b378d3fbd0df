"""What an attempt leaves in the ledger: from an outcome to the values of a row.

A value that is not known is NULL in the file. Here it is an empty text, which the statement turns
into NULL: Python's sqlite3 takes half a microsecond for each None, as much as for five numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from ..contracts import Outcome, canonical_model

LONGEST = 128  # characters of what a client makes up
_SPELLINGS = 1024  # of models, whose canonical names are remembered
_INTEGERS = -(2**63), 2**63 - 1  # of SQLite

# exchange id, trace id, tenant, model as the client spells it, path, streamed, outcome
Given = tuple[str, str | None, str | None, str | None, str, bool, Outcome]
Row = tuple[Any, ...]  # values in the order of COLUMNS, then perhaps of RARE

COLUMNS = (
    *("ended_unix", "exchange_id", "attempt"),
    *("backend", "provider", "region", "pool", "model", "path", "stream"),
    *("status", "verdict", "stage", "duration_s", "billed_s", "ttft_s"),
    *("tokens_in", "tokens_out", "tokens_estimated"),
    *("usd", "expected_usd"),
)
# At the end of a row that has one of them, or lacks one of the others. All else is known of most
# attempts, and what is known need not be looked at for NULL.
RARE = (
    *("trace_id", "tenant", "fault", "cold_start_s"),
    *("tokens_cached", "tokens_cache_written"),
)
NULLABLE = frozenset(
    {*RARE, "model", "status", "ttft_s", "tokens_in", "tokens_out", "tokens_estimated"}
)


class Rows:
    """Makes rows of what was given; it knows the models of those before."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}

    def of(self, given: Iterable[Given], offset: float) -> list[Row]:
        """The rows; `offset` is what unix seconds are ahead of the monotonic ones."""
        models = self._models
        rows: list[Row] = []
        for exchange_id, trace_id, tenant, model, path, stream, outcome in given:
            name = "" if model is None else models.get(model) or self._name(model)
            backend, usage, status = outcome.backend, outcome.usage, outcome.status
            fault, ttft, cold_start = outcome.fault, outcome.ttft, outcome.cold_start
            duration = outcome.duration
            row: Row = (
                outcome.started + duration + offset,
                exchange_id,
                outcome.number,
                backend.name,
                backend.provider,
                backend.region,
                backend.pool,
                name,
                path,
                1 if stream else 0,
                "" if status is None else status,
                outcome.verdict._value_,
                outcome.stage._value_,
                duration,
                outcome.billed,
                "" if ttft is None else ttft,
                "" if usage is None else usage.input,
                "" if usage is None else usage.output,
                "" if usage is None else 1 if usage.estimated else 0,
                outcome.usd,
                outcome.expected_usd,
            )
            if (
                usage is None
                or ttft is None
                or status is None
                or model is None
                or fault is not None
                or cold_start is not None
                or tenant is not None
                or trace_id is not None
                or usage.cached
                or usage.cache_written
            ):
                row += (
                    trace_id or "",
                    tenant or "",
                    "" if fault is None else fault._value_,
                    "" if cold_start is None else cold_start,
                    "" if usage is None else usage.cached or "",
                    "" if usage is None else usage.cache_written or "",
                )
            money = outcome.billed + outcome.usd + outcome.expected_usd
            # An infinite number would be taken, and spoil every sum from then on.
            rows.append(row if money - money == 0.0 else mended(row))
        return rows

    def _name(self, model: str) -> str:
        if len(self._models) >= _SPELLINGS:
            self._models.clear()
        name = self._models[model] = canonical_model(model)
        return name


def mended(row: Row) -> Row:
    """A row that SQLite takes for sure, and can add up.

    Some backend counts more than its integers hold, some client has text that is no Unicode, some
    plugin has numbers of a kind of its own.

    Raises:
        TypeError, ValueError, OverflowError: a value is no number at all.
    """
    return tuple(map(_mended, row))


def _mended(value: Any) -> Any:
    if isinstance(value, int):
        return min(max(value, _INTEGERS[0]), _INTEGERS[1])
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    number = float(value)
    return number if isfinite(number) else 0.0
