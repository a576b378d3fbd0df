"""The shape of the ledger's file, and how an older file gets it.

`PRAGMA user_version` says how many of `STEPS` a file has behind it, `PRAGMA application_id` that it
is a ledger at all. A step, once released, is never changed: a new shape is a further step.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

APPLICATION_ID = 0x42454143  # "BEAC"

_TABLE = """
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY,
  ended_unix REAL NOT NULL,
  exchange_id TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  trace_id TEXT,
  tenant TEXT,
  backend TEXT NOT NULL,
  provider TEXT NOT NULL,
  region TEXT NOT NULL,
  pool TEXT NOT NULL,
  model TEXT,
  path TEXT NOT NULL,
  stream INTEGER NOT NULL,
  status INTEGER,
  verdict TEXT NOT NULL,
  stage TEXT NOT NULL,
  fault TEXT,
  duration_s REAL NOT NULL,
  billed_s REAL NOT NULL,
  ttft_s REAL,
  cold_start_s REAL,
  tokens_in INTEGER,
  tokens_out INTEGER,
  tokens_estimated INTEGER,
  usd REAL NOT NULL,
  expected_usd REAL NOT NULL
)"""

# Every question begins with a time, the deletion of what is too old as well. No other index: each
# costs a tenth of what it takes to write a row.
_INDEX = "CREATE INDEX attempts_ended_unix ON attempts (ended_unix)"

Steps = Sequence[Sequence[str]]
# Of attempts before it they are not known: NULL, as where there is nothing to tell.
_CACHE = (
    "ALTER TABLE attempts ADD COLUMN tokens_cached INTEGER",
    "ALTER TABLE attempts ADD COLUMN tokens_cache_written INTEGER",
)

STEPS: Steps = ((_TABLE, _INDEX), _CACHE)
VERSION = len(STEPS)


class LedgerError(Exception):
    """A file that cannot be used as a ledger.

    Attributes:
        kind: a slug: SQLite's own name of the error in lower case (`sqlite_full`), or `newer`,
            `older`, `foreign`, `missing`, `deleted`, `slow`, `stopped`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @classmethod
    def of(cls, error: sqlite3.Error) -> LedgerError:
        """What SQLite says. No statement of ours quotes a value, so its text holds none."""
        name = getattr(error, "sqlite_errorname", None)
        return cls(name.lower() if name else type(error).__name__.lower(), str(error))


def prepare(connection: sqlite3.Connection, steps: Steps = STEPS) -> None:
    """Bring a file to the newest shape; one that has it already is only read.

    All steps that are missing are one transaction, in which a second process finds nothing to do.

    Raises:
        LedgerError: it belongs to a newer version, or to another program; it was left as it is.
        sqlite3.Error: it cannot be read or written; it has the shape that it had.
    """
    if _version(connection, len(steps)) == len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[_version(connection, len(steps)) :]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check(connection: sqlite3.Connection, oldest: int = VERSION) -> None:
    """Raise LedgerError unless the file is of this version, or one from `oldest` on."""
    version = _version(connection, VERSION)
    if version == 0:
        raise LedgerError("missing", "it is empty: nothing was recorded yet")
    if version < oldest:
        raise LedgerError(
            "older", f"it is of version {version}; a proxy of this version brings it to {VERSION}"
        )


def _version(connection: sqlite3.Connection, known: int) -> int:
    """How many steps a file has behind it; 0: it is empty."""
    own = not connection.in_transaction
    if own:
        connection.execute("BEGIN")  # else another process may make the file in between
    try:
        ((owner,),) = connection.execute("PRAGMA application_id")
        ((version,),) = connection.execute("PRAGMA user_version")
        ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
    finally:
        if own and connection.in_transaction:
            connection.execute("COMMIT")
    if owner != APPLICATION_ID:
        if owner or version or tables:
            raise LedgerError("foreign", "it is the database of another program")
        return 0
    if version > known:
        raise LedgerError(
            "newer", f"it is of version {version}, this beacon-proxy knows {known} at most"
        )
    return int(version)
