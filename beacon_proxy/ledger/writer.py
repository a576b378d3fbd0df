"""Takes attempts from the event loop, and writes them from a thread of its own.

Rule 1: `observe` never waits. It appends to a buffer that is bounded in rows; a row that finds it
    full is lost and counted.
Rule 2: what the thread takes is its own until the file has it. A file that cannot be written (disk
    full, locked, gone) is tried again, ever more seldom; meanwhile rows wait, within the bound.
Rule 3: the thread writes all there is at once, every `flush_interval`. So a process that dies loses
    what ended in its last interval, or less. Only where it finds nothing it sleeps, and has to be
    woken by the next row.
Rule 4: one thread gives, the loop's, and one takes. So the two need no lock: the one appends to a
    list, the other takes from its front, each in one step of the interpreter; each number is
    written by one side alone, and the thread says that it sleeps before it looks for the last time.
Rule 5: it is a daemon: a disk that hangs holds up nobody, not even the end of the process.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf

from ..contracts import Clock, Exchange, Fleet, Gauge, Notify, Outcome
from ..errors import told
from .rows import LONGEST, Given, Row, Rows
from .schema import LedgerError
from .store import BUSY, Store

MAX_ROWS = 50_000  # that wait to be written, some 35 MB
_BATCH = 2_000  # rows of one transaction: another process may want to write, too
_RETRY_MOST = 5.0  # s between two tries at a file that cannot be written
_HANGS = 10.0  # s beyond its interval that a write may take
_TELL_AGAIN = 60.0  # s until the same trouble is told again
_AT_END = 2.0  # s that the end of a process waits for the last rows
_TRIM_EVERY = 60.0  # s between two looks for rows that are too old
_TRIM_STEP = 500  # rows deleted by one transaction
_TRIM_TIME = 0.05  # s of a turn that deletions may take
_TRIM_PAUSE = 0.25  # s until the next turn, at most, where there is more to delete
_DAY = 86_400.0
_TELL_SHORTER = _DAY  # until it is told again that rows went before their time
_STEPPED = 300.0  # s that the time of day may move beside the clock from look to look
_STANDS = 3600.0  # s that it must stand from then on, until rows are deleted by their age


class Ledger:
    """The last member of the chain. `lifespan` runs its thread."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flush_interval: float,
        retention_days: float,
        max_size: int | None = None,
        notify: Notify,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`clock` is that of `Outcome.started`; `max_size` is bytes, None: no bound."""
        self._store = Store(path)
        self._interval, self._retention = flush_interval, retention_days * _DAY
        self._max_size = inf if max_size is None else max_size
        self._notify = self._tell = notify
        self._clock, self._unix = clock, unix
        self._max_rows = max_rows
        self._make = Rows()
        # Written by the loop:
        self._waiting: list[Given] = []
        self._dropped = 0
        self._closed = False
        self._close_by = 0.0
        # Written by the thread:
        self._room = max_rows  # how many may wait
        self._rows: list[Row] = []  # taken, but not in the file yet
        self._failed = 0
        self._asleep = False
        self._begun = self._done = 0  # turns
        self._wanted = 0  # the turn that somebody waits for; written by who does
        self._flushed = 0.0  # unix s; 0: never
        self._trouble = _Trouble()
        self._trim_at = 0.0
        self._date = _Date(clock())
        self._size = 0  # bytes, at the last look
        self._skipped = -_TELL_AGAIN  # when it was last told that an attempt was left out
        self._shortened = -_TELL_SHORTER  # when it was last told that rows went early
        self._turned = threading.Condition()
        self._wake = threading.Event()

    @property
    def path(self) -> str:
        return os.fspath(self._store.path)

    @property
    def waiting(self) -> int:
        """Rows that are not in the file yet."""
        return len(self._waiting) + len(self._rows)

    @property
    def lost(self) -> int:
        """Rows that never will be."""
        return self._dropped + self._failed

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        """Take one attempt. The exchange itself is not kept: it holds the request's body."""
        waiting = self._waiting
        if len(waiting) >= self._room:
            self._dropped += 1
            return
        model, path = exchange.model, exchange.path
        if model is not None and len(model) > LONGEST:
            model = model[:LONGEST]
        if len(path) > LONGEST:
            path = path[:LONGEST]
        waiting.append(
            (exchange.id, exchange.trace_id, exchange.tenant, model, path, exchange.stream, outcome)
        )
        if self._asleep:
            self._asleep = False
            self._wake.set()

    def _age(self) -> float:
        """For how many s the oldest row has been waiting; a disk that hangs raises no error."""
        for row in self._rows[:1]:
            return self._unix() - float(row[0])
        try:
            outcome = self._waiting[0][-1]
        except IndexError:  # also where the thread takes it right now
            return 0.0
        return self._clock() - outcome.started - outcome.duration

    def gauges(self) -> Iterator[Gauge]:
        well = not self._trouble.lasts and self._age() < self._interval + _HANGS
        yield Gauge("ledger_healthy", "1: the ledger can be written.", float(well))
        yield Gauge("ledger_rows_waiting", "Attempts not in the ledger yet.", self.waiting)
        yield Gauge(
            "ledger_rows_lost", "Attempts that never will be in it.", self.lost, counts=True
        )
        yield Gauge("ledger_size_bytes", "What it takes, less what was deleted.", self._size)
        yield Gauge(
            "ledger_last_flush_timestamp_seconds", "When it was last written to.", self._flushed
        )

    @asynccontextmanager
    async def lifespan(self, _fleet: Fleet) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        ended = asyncio.Event()

        def in_loop(call: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the thread hung for longer than the process waited
                loop.call_soon_threadsafe(call)

        def run() -> None:
            self._run()
            in_loop(ended.set)

        self._tell = lambda event, /, **fields: in_loop(partial(self._notify, event, **fields))
        threading.Thread(target=run, name="ledger.writer", daemon=True).start()
        try:
            yield
        finally:
            await self._close(ended)

    def flush(self, timeout: float) -> bool:
        """Wait until what has ended so far is in the file; False where it is not after `timeout` s.

        For any thread but the loop's, while `lifespan` lasts.
        """
        with self._turned:
            goal = self._wanted = self._begun + 1
            self._wake.set()
            self._turned.wait_for(lambda: self._done >= goal, timeout)
            return self._done >= goal and not self._trouble.lasts

    async def _close(self, ended: asyncio.Event) -> None:
        self._close_by = self._clock() + _AT_END
        self._closed = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_AT_END + BUSY + 0.5):
                await ended.wait()
        left, self._room = self.waiting, 0
        if left:
            self._dropped += left
            self._notify(
                "ledger.failed",
                kind="ended",
                error="the process ends before they could be written",
                path=self.path,
                rows_waiting=0,
                rows_lost=self.lost,
            )

    # -- the thread's ----------------------------------------------------------------------------

    def _run(self) -> None:
        self.turn()  # opens the file, so that one that cannot be is told at the start
        while True:
            if self._has_work():
                self.turn()
            elif self._closed and not self._waiting:  # in this order: no row comes after the close
                break
            else:
                self._asleep = True
                if not self._waiting and not self._closed:
                    self._wake.wait(_TRIM_EVERY)
                self._asleep = False
                self._wake.clear()
                continue
            if self._closed and self._trouble.lasts and self._clock() >= self._close_by:
                break
            self._wake.wait(self._pause())
            self._wake.clear()
        self.close()

    def _has_work(self) -> bool:
        return bool(
            self._waiting
            or self._rows
            or self._trouble.lasts
            or self._clock() >= self._trim_at
            or self._done < self._wanted
        )

    def _pause(self) -> float:
        if self._closed:
            return 0.05 if self._trouble.lasts else 0.0
        if self._clock() >= self._trim_at and not self._trouble.lasts:
            return min(self._interval, _TRIM_PAUSE)  # else more may come than goes
        doubled = self._interval * 2.0 ** min(self._trouble.tries, 16)
        return min(doubled, max(self._interval, _RETRY_MOST))

    def turn(self) -> None:
        """Take what there is and write it, with what could not be written before.

        What the thread does every `flush_interval`; for nobody else while it runs.
        """
        with self._turned:
            self._begun += 1
        try:
            self._take()
            self._write()
            self._trim()
        except LedgerError as error:
            self._fail(error)
        except Exception as error:  # else nothing would be recorded any more, and nobody told
            self.close()
            self._fail(LedgerError(type(error).__name__.lower(), told(error)))
        with self._turned:
            self._done = self._begun
            self._turned.notify_all()

    def close(self) -> None:
        """Close the file; a further turn opens it anew. As `turn`, for nobody beside the thread."""
        self._store.close()

    def _take(self) -> None:
        waiting, count = self._waiting, len(self._waiting)
        self._room = self._max_rows - len(self._rows) - count
        offset = self._unix() - self._clock()
        given = waiting[:count]
        del waiting[:count]
        try:
            self._rows += self._make.of(given, offset)
        except Exception:  # one of them, of which all others know nothing
            for each in given:
                try:
                    self._rows += self._make.of([each], offset)
                except Exception as error:
                    self._skip(error)

    def _write(self) -> None:
        while self._rows or not self._store.is_open:
            batch = self._rows[:_BATCH]
            unfit = self._store.write(batch)
            for error in unfit:
                self._skip(error)
            del self._rows[: len(batch)]
            self._room = self._max_rows - len(self._rows)
            if batch:
                self._flushed = self._unix()
        if self._trouble.lasts:
            self._recover()

    def _skip(self, error: Exception) -> None:
        """One attempt has a value that no row can have: some plugin's, and nobody else's loss."""
        self._failed += 1
        now = self._clock()
        if now - self._skipped >= _TELL_AGAIN:
            self._skipped = now
            self._tell("ledger.skipped", error=told(error), path=self.path, rows_lost=self.lost)

    def _trim(self) -> None:
        now = self._clock()
        if now < self._trim_at:
            return
        old = self._old(now)
        while self._clock() < now + _TRIM_TIME:
            if self._store.trim(old, _TRIM_STEP) == _TRIM_STEP:
                continue  # there may be more of them
            self._size = self._store.size()
            if self._size <= self._max_size:
                self._trim_at = now + _TRIM_EVERY
                return
            self._store.trim(inf, _TRIM_STEP)
            if now - self._shortened >= _TELL_SHORTER:
                self._shortened = now
                self._tell("ledger.shortened", path=self.path, max_size=self._max_size)

    def _old(self, now: float) -> float:
        """What ended before this (unix s) is too old; nothing while the day may be wrong."""
        unix, date = self._unix(), self._date
        moved = date.look(unix, now)
        if moved and not date.told:
            date.told = True
            self._tell("ledger.clock_moved", path=self.path, seconds=round(moved, 3))
        if now - date.since < _STANDS:
            return -inf
        date.told = False
        return unix - self._retention

    def _fail(self, error: LedgerError) -> None:
        now, trouble = self._clock(), self._trouble
        if not trouble.lasts:
            trouble.since = now
        trouble.lasts = True
        trouble.tries += 1
        if now - trouble.told.get(error.kind, -_TELL_AGAIN) < _TELL_AGAIN:
            return
        trouble.told[error.kind] = now
        trouble.known = True
        self._tell(
            "ledger.failed",
            kind=error.kind,
            error=str(error),
            path=self.path,
            rows_waiting=self.waiting,
            rows_lost=self.lost,
        )

    def _recover(self) -> None:
        trouble = self._trouble
        trouble.lasts, trouble.tries = False, 0
        if trouble.known:  # of what was never told the end is no news either
            trouble.known = False
            seconds = round(self._clock() - trouble.since, 3)
            self._tell("ledger.recovered", path=self.path, seconds=seconds, rows_lost=self.lost)


class _Date:
    """Since when the time of day has gone with the clock: what is deleted by a wrong one is gone.

    A machine may start with any date and be put right, or wrong, at any time.
    """

    def __init__(self, now: float) -> None:
        self.since = now  # monotonic s
        self.told = False  # that it moved, since it last stood for long enough
        self._offset: float | None = None  # of the time of day, at the last look

    def look(self, unix: float, now: float) -> float:
        """By how many s it has moved since the last look; 0.0 where that is no step."""
        was, self._offset = self._offset, unix - now
        if was is None or abs(self._offset - was) < _STEPPED:
            return 0.0
        self.since = now
        return self._offset - was


class _Trouble:
    """What is wrong with the file, and who knows."""

    def __init__(self) -> None:
        self.lasts = False
        self.since = 0.0  # monotonic s
        self.tries = 0  # in vain, in a row
        self.known = False  # that it lasts was told
        self.told: dict[str, float] = {}  # kind: when it was last told, monotonic s
