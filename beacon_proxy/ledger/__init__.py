"""The ledger: one row for each attempt, in an SQLite file."""

from __future__ import annotations

from .reports import BY, Report, rent_per_hour, report, seconds_of
from .schema import LedgerError
from .spent import Place, Spent, spent_since
from .writer import Ledger

__all__ = [
    "BY",
    "Ledger",
    "LedgerError",
    "Place",
    "Report",
    "Spent",
    "rent_per_hour",
    "report",
    "seconds_of",
    "spent_since",
]
