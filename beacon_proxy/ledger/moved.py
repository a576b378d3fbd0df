"""What stays behind when the file of a ledger is moved, deleted or replaced: its log.

SQLite finds a log by the name of its file, and so does whoever begins a file anew under that name:
it would take the log, and what the processes that still write to the old file agree on in shared
memory, for its own. (https://www.sqlite.org/howtocorrupt.html#unlinking_or_renaming_a_database_file_while_in_use)
So the log is taken out of the way first, with what it holds: to the file it belongs to where that
is in the same folder under another name, else to a name that no file has.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Identity = tuple[int, int]  # device and inode: what a file is, whatever it is called


def identity(path: Path) -> Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def log_of(path: Path) -> Path:
    return Path(f"{path}-wal")


def is_left(path: Path, file: Identity | None, log: Identity | None) -> bool:
    """Whether the log at the name `path` is not that of the file there.

    `file` and `log` are those that were seen there together, None where none were. A log without
    any file belongs to one that is gone.
    """
    there, left = identity(path), identity(log_of(path))
    return left is not None and (there is None or (there != file and left == log))


def take_away(path: Path, file: Identity | None, log: Identity | None) -> str:
    """Take a log that `is_left` away, if there is one; says what became of it, for the operator.

    Raises:
        OSError: the folder cannot be written.
    """
    with _alone(path.parent):
        if not is_left(path, file, log):
            return "its log is with it"
        old = log_of(path)
        if old.stat().st_size:
            now = _name_of(file, path.parent)
            goes = path.with_name(f"{old.name}.{time.time_ns()}") if now is None else log_of(now)
            old.rename(goes)
            said = f"what its log holds is in {goes.name}"
        else:
            old.unlink()
            said = "its log was empty"
        Path(f"{path}-shm").unlink(missing_ok=True)
        return said


def _name_of(file: Identity | None, folder: Path) -> Path | None:
    """How a file is called now that has a log no more; None where it is not in the folder."""
    if file is None:
        return None
    return next(
        (each for each in folder.iterdir() if identity(each) == file and not log_of(each).exists()),
        None,
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Several may find the same log at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
