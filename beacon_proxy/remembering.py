"""Lets budgets go on where an earlier process stopped, by what the ledger holds of their windows.

Rule 1: the start waits for it a short time only: a ledger of the usual size is counted before the
    first request comes, one of millions of rows while they are served.
Rule 2: the shortest window is known first; each counts as soon as it is known.
Rule 3: nothing counts twice. What this process spends is counted as it ends. So of the ledger only
    those rows count that were there before it was served; where the file was so slow that this
    is not known, those that ended before.
Rule 4: the loop takes it in small pieces, one a step: clients make tenants up, and who is served
    waits for none of them.
Rule 5: a thread reads, which nobody waits for: neither a request, nor the end of the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import inf
from typing import TypeVar

from .contracts import Clock, Notify
from .errors import told
from .ledger import LedgerError, spent_since
from .spending.budgets import Budgets

T = TypeVar("T")

_WAITS = 1.0  # s that the start waits
_PIECE = 500  # sums that the loop takes in one step


class Remembering:
    """Reads it once, from `begin` on."""

    def __init__(self, path: str, budgets: Budgets, *, unix: Clock, notify: Notify) -> None:
        self._path, self._budgets = path, budgets
        self._unix, self._notify = unix, notify
        self._left = budgets.windows()  # that are not known yet
        self._begun_unix = unix()
        self._serves = False  # somebody may have been served already
        self._closed = False
        self._ended = asyncio.Event()
        self._steps: deque[Callable[[], None]] = deque()  # that the loop has still to take

    async def begin(self) -> None:
        """Return once all is known, or after a short time."""
        thread = threading.Thread(
            target=self._run, args=[asyncio.get_running_loop()], name="ledger.past", daemon=True
        )
        thread.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_WAITS):
                await self._ended.wait()
                return
        self._serves = True
        self._notify("budget.restoring", budgets=self._budgets.names(self._left))

    def close(self) -> None:
        """Let the thread stop where it is."""
        self._closed = True

    # -- the thread's ----------------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        def in_loop(step: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # it is closed: nobody waits
                loop.call_soon_threadsafe(self._give, step)

        error = None
        try:
            known = spent_since(
                self._path,
                self._left,
                most_tenants=self._budgets.tenants,
                until_unix=self._until,
                stopped=lambda: self._closed,
            )
            restore = self._budgets.restore
            for since, spent in known:
                for places in _pieces(spent.places):
                    in_loop(partial(restore, since, places=places))
                for tenants in _pieces(spent.tenants):
                    in_loop(partial(restore, since, tenants=tenants))
                in_loop(partial(self._left.remove, since))
        except Exception as exc:  # whatever it is, the operator is told
            error = exc
        in_loop(partial(self._end, error))

    def _until(self) -> float:
        return self._begun_unix if self._serves else inf

    # -- the loop's ------------------------------------------------------------------------------

    def _give(self, step: Callable[[], None]) -> None:
        self._steps.append(step)
        if len(self._steps) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        step = self._steps.popleft()
        if self._steps:
            asyncio.get_running_loop().call_soon(self._next)
        step()

    def _end(self, error: Exception | None) -> None:
        self._ended.set()
        if self._closed:
            return
        if error is None:
            if self._serves:
                seconds = round(self._unix() - self._begun_unix, 3)
                self._notify("budget.restored", seconds=seconds)
            return
        known = isinstance(error, LedgerError)
        self._notify(
            "budget.forgot",  # the process serves all the same
            budgets=self._budgets.names(self._left),
            error=f"not known is what they spent before: {error if known else told(error)}",
            path=self._path,
        )


def _pieces(sums: list[T]) -> Iterator[list[T]]:
    for at in range(0, len(sums), _PIECE):
        yield sums[at : at + _PIECE]
