"""Backends from a file."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from typing import Any

from .answer import SIZE_MOST, NoAnswer, parsed

_GLANCE = 0.5  # s between two looks at a file's stamp
_Stamp = tuple[int, int, int, int]  # device, inode, size, time of the last change (ns)


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class File:
    """A file, looked at as soon as its stamp changes.

    Editors and Kubernetes put another file in its place; the stamp is that of what the path leads
    to now. One that is written twice within a tick of the file system's clock may keep its stamp:
    so it is read at each interval all the same.
    """

    def __init__(self, path: str) -> None:
        self.name = f"file {path}"
        self._path = path
        self._data: bytes | None = None  # the last good answer, as it was read
        self._seen: _Stamp | None = None  # None: there was none, or it could not be told
        self._working: asyncio.Future[Any] | None = None

    async def look(self) -> list[Any] | None:
        self._seen, data, answer = await self._beside(lambda: _read(self._path, self._data))
        if isinstance(answer, NoAnswer):
            raise answer
        self._data = data
        rows: list[Any] | None = answer
        return rows

    async def rest(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            await asyncio.sleep(min(left, _GLANCE))
            if await self._beside(lambda: _stamp_of(self._path)) != self._seen:
                return

    async def _beside(self, work: Callable[[], Any]) -> Any:
        """Do `work` in a thread; while one hangs, on a dead mount, there is no second one."""
        if self._working is not None:
            await asyncio.wait([self._working])  # whatever came of it
        self._working = asyncio.get_running_loop().run_in_executor(None, work)
        result = await asyncio.shield(self._working)
        self._working = None
        return result

    async def close(self) -> None:
        """There is nothing to close."""


def _stamp_of(path: str) -> _Stamp | None:
    try:
        return _stamp(os.stat(path))
    except (OSError, ValueError):
        return None


def _read(
    path: str, last: bytes | None
) -> tuple[_Stamp | None, bytes | None, list[Any] | NoAnswer | None]:
    """The stamp of a file, taken before it is read, its bytes, and the answer in it.

    Or why there is none; None, where the bytes are the `last` ones.
    """
    seen: _Stamp | None = None
    try:
        # Else the open of a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            seen = _stamp(status)
            if not stat.S_ISREG(status.st_mode):
                raise NoAnswer("is no regular file")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(SIZE_MOST + 1)
        finally:
            os.close(descriptor)
        if len(data) > SIZE_MOST:
            raise NoAnswer(f"is longer than {SIZE_MOST} bytes")
        return seen, data, None if data == last else parsed(data)
    except NoAnswer as exc:
        return seen, None, exc.with_traceback(None)
    except (OSError, ValueError) as exc:  # a path may hold what no path can
        return seen, None, NoAnswer(f"cannot be read: {getattr(exc, 'strerror', exc)}")
