"""The ledger's file as its writer sees it: all of a batch is in it, or none.

WAL with `synchronous = NORMAL`: what a transaction has written survives the end of this process,
however it ends. The loss of power may take the last transactions, and leaves the file whole.
(https://www.sqlite.org/pragma.html#pragma_synchronous)
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Container, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from time import monotonic, sleep

from .moved import Identity, identity, is_left, log_of, take_away
from .rows import COLUMNS, NULLABLE, RARE, Row, mended
from .schema import LedgerError, prepare

BUSY = 1.0  # s to wait for another process that writes
# Bytes that the log keeps once it is written back, which it is at 4 MB if nobody is reading then.
WAL_KEPT = 16 << 20

# Each call of SQLite lets go of Python's lock and takes it back four times, and a busy event loop
# is in no hurry to return it. More rows a call than the most here make no difference.
_SIZES = (64, 8, 1)


class _Insert:
    """The statements for rows of these columns, one for each number of rows at once."""

    def __init__(self, columns: Sequence[str], nullable: Container[str] = ()) -> None:
        marks = ", ".join("nullif(?, '')" if name in nullable else "?" for name in columns)
        into = f"INSERT INTO attempts ({', '.join(columns)}) VALUES"
        self._by_size = [(n, f"{into} {', '.join([f'({marks})'] * n)}") for n in _SIZES]

    def run(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        start = 0
        for size, statement in self._by_size:
            while len(rows) - start >= size:
                values = tuple(chain.from_iterable(rows[start : start + size]))
                connection.execute(statement, values)
                start += size


_USUAL, _RARE = _Insert(COLUMNS), _Insert((*COLUMNS, *RARE), NULLABLE)
_TRIM = """
DELETE FROM attempts WHERE id IN
  (SELECT id FROM attempts WHERE ended_unix < ? ORDER BY ended_unix LIMIT ?)"""

_SIZE = """
SELECT page_count, freelist_count, page_size
FROM pragma_page_count, pragma_freelist_count, pragma_page_size"""

# What a value is to blame for, and not the file.
_UNFIT = (
    *(sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(TypeError, ValueError, OverflowError),
)


class Store:
    """One connection, of one thread. After an error it is closed; the next call opens it anew."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # wherever this process may go
        self._connection: sqlite3.Connection | None = None
        self._file: Identity | None = None
        self._log: Identity | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def write(self, rows: Sequence[Row]) -> list[Exception]:
        """Add rows in one transaction; without any only see to it that the file is open.

        Returns:
            Of each row that SQLite cannot take, however mended, why. All others are in the file.

        Raises:
            LedgerError: none of them is in the file.
        """
        unfit: list[Exception] = []
        try:
            connection = self._connection or self._open()
            if rows:
                self._is_still_there()
                try:
                    _insert(connection, rows)
                except _UNFIT:
                    connection.execute("ROLLBACK")
                    unfit = _insert_each(connection, rows)
                self._is_still_there()
        except (sqlite3.Error, LedgerError) as error:
            self.close()
            raise LedgerError.of(error) if isinstance(error, sqlite3.Error) else error from error
        return unfit

    def trim(self, before_unix: float, most: int) -> int:
        """Delete at most so many of the oldest rows that ended before a time; how many it were.

        Raises:
            LedgerError: none was.
        """
        try:
            connection = self._connection or self._open()
            self._is_still_there()
            return connection.execute(_TRIM, (before_unix, most)).rowcount
        except sqlite3.Error as error:
            self.close()
            raise LedgerError.of(error) from error

    def size(self) -> int:
        """Bytes of the file that hold something; what was deleted is not among it.

        Raises:
            LedgerError: it cannot be read.
        """
        try:
            connection = self._connection or self._open()
            ((pages, free, each),) = connection.execute(_SIZE)
        except sqlite3.Error as error:
            self.close()
            raise LedgerError.of(error) from error
        return int(pages - free) * int(each)

    def close(self) -> str:
        """Close the file; says what became of the log of one that has another name now."""
        connection, self._connection = self._connection, None
        if connection is None:
            return ""
        # Before the file is let go of: as long as it is open no other can have its inode.
        said = "" if identity(self.path) == self._file else self._take_away()
        with suppress(sqlite3.Error):  # what an open transaction held is still the caller's
            connection.close()  # SQLite itself leaves the log of a file alone that was moved
        return said

    def _take_away(self) -> str:
        try:
            said = take_away(self.path, self._file, self._log)
        except OSError as error:
            return f"its log cannot be taken away: {error.strerror}"
        self._file = self._log = None
        return said

    def _open(self) -> sqlite3.Connection:
        if is_left(self.path, self._file, self._log):
            raise LedgerError("deleted", f"there is a log without its file; {self._take_away()}")
        connection = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
        try:
            prepare(connection)  # first: a file that is not ours stays as it is
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
            connection.execute(
                "SELECT count(*) FROM sqlite_master"
            )  # who reads first makes the log
            self._file, self._log = identity(self.path), identity(log_of(self.path))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _is_still_there(self) -> None:
        """A file that was deleted or moved can be written to, and who looks for it finds another.

        Asked before rows are written, so that they are in one file alone; and after, so that none
        is in one that is no more.
        """
        if identity(self.path) != self._file:
            raise LedgerError("deleted", f"the file was moved, deleted or replaced; {self.close()}")


def _insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    usual = len(COLUMNS)
    rare = [row for row in rows if len(row) != usual]
    connection.execute("BEGIN IMMEDIATE")
    _USUAL.run(connection, [row for row in rows if len(row) == usual] if rare else rows)
    _RARE.run(connection, rare)
    connection.execute("COMMIT")


def _insert_each(connection: sqlite3.Connection, rows: Sequence[Row]) -> list[Exception]:
    """Add those that fit, mended where they have to be; returns why the others do not."""
    unfit: list[Exception] = []
    connection.execute("BEGIN IMMEDIATE")
    for row in rows:
        insert = _USUAL if len(row) == len(COLUMNS) else _RARE
        try:
            insert.run(connection, [mended(row)])
        except _UNFIT as error:
            unfit.append(error)
    connection.execute("COMMIT")
    return unfit


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the log, for which SQLite does not wait as it does for any other lock."""
    until = monotonic() + BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() >= until:
                raise
        sleep(0.005)
