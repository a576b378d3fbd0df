"""The ledger: one row for each attempt, in an SQLite file."""

from __future__ import annotations

from .schema import LedgerError
from .spent import Spent, spent_since
from .writer import Ledger

__all__ = ["Ledger", "LedgerError", "Spent", "spent_since"]
