"""Opens a ledger to read it, while a proxy writes to it or when none does."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic

from .schema import VERSION, LedgerError, check

_BUSY = 2.0  # s to wait for a lock; in WAL mode a reader meets one only while a file is recovered
_LOOK = 200_000  # instructions of SQLite's machine between two looks at the clock, some 5 ms


def never() -> bool:
    return False


@contextmanager
def reading(
    path: str | os.PathLike[str],
    seconds: float = 60.0,
    stopped: Callable[[], bool] = never,
    *,
    oldest: int = VERSION,
) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write, for at most `seconds`, and until somebody has it `stopped`.

    `oldest`: the first version of the file that has the columns which are to be read.

    Raises:
        LedgerError: of kind `missing` where there is no file or nothing in it, `slow` where the
            time is over, `stopped`, or why it cannot be read. What SQLite raises in the block
            becomes one, too.
    """
    file = Path(os.path.abspath(path))
    if not file.exists():
        raise LedgerError("missing", "there is no such file")
    until = monotonic() + seconds
    try:
        with closing(_open(file)) as connection:
            connection.set_progress_handler(lambda: stopped() or monotonic() > until, _LOOK)
            check(connection, oldest)
            yield connection
    except sqlite3.Error as error:
        if stopped():
            raise LedgerError("stopped", "nobody waits for it any more") from error
        if monotonic() > until:
            raise LedgerError("slow", f"it took longer than {seconds:g} s") from error
        raise LedgerError.of(error) from error


def _open(file: Path) -> sqlite3.Connection:
    # Who may write cleans up behind itself at its end; one that may not leaves two files there.
    connection = _connect(file, "mode=rw")
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        connection.close()
        if Path(f"{file}-wal").exists():
            raise
        # In a folder that we may not write, the files beside it cannot be made. Without a log there
        # is no writer, and no need of them.
        return _connect(file, "immutable=1")
    return connection


def _connect(file: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.as_uri()}?{how}", uri=True, timeout=_BUSY, isolation_level=None)
