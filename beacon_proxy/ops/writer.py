"""Writes log lines from a thread of its own: who reads them may stall, the event loop must not.

Rule 1: `msg` never waits. It appends to a buffer that is bounded in lines and in bytes; a line that
    finds it full is dropped and counted.
Rule 2: the thread takes all there is and writes it at once, at most every `PAUSE` seconds: each
    time costs some switches between threads, which a longer pause spreads over more lines. Only
    where it finds nothing it sleeps, and has to be woken by the next line.
Rule 3: one thread logs, the loop's. So the two need no lock: a deque may be used from both ends,
    each counter is written by one side alone, and the thread says that it sleeps before it looks
    for the last time.
Rule 4: the thread is a daemon and writes to the file descriptor itself. In a buffered file it would
    hold a lock while it is stuck, and the interpreter dies at its end on such a lock.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
import threading
from collections import deque
from typing import BinaryIO

PAUSE = 0.1  # s between two writes
MAX_LINES = 10_000
MAX_BYTES = 8 << 20
_AT_EXIT = 1.0  # s that the end of a process waits for who reads the log


class LineWriter:
    """A logger that structlog can wrap: lines of bytes to `file`, or stdout.

    Its thread starts with the first line. What is left is written at the end of the process, within
    a bounded time.
    """

    def __init__(
        self,
        file: BinaryIO | None = None,
        *,
        max_lines: int = MAX_LINES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._file: BinaryIO | None = file or getattr(sys.stdout, "buffer", None)
        self._max_lines, self._max_bytes = max_lines, max_bytes
        self._waiting: deque[bytes] = deque()
        self._given = self._taken = 0  # bytes, ever; counted by who logs, and by the thread
        self._dropped = self._failed = 0  # lines, likewise
        self._torn = False  # the last write ended inside a line
        self._asleep = True  # the thread: it must be woken
        self._busy = False  # the thread has taken lines that are not written yet, or is about to
        self._closed = False
        self._written = threading.Condition()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> int:
        """Lines that were not and will not be written."""
        return self._dropped + self._failed

    def msg(self, line: bytes) -> None:
        """Take one line, without its end, to be written soon."""
        waiting, size = self._waiting, len(line)
        if (
            self._closed
            or len(waiting) >= self._max_lines
            or self._given - self._taken >= self._max_bytes
        ):
            self._dropped += 1
            return
        self._given += size
        waiting.append(line)
        if self._asleep:
            self._rouse()

    log = debug = info = warning = warn = error = exception = critical = fatal = msg

    def flush(self, timeout: float = _AT_EXIT) -> bool:
        """Wait until every line so far is written; False where it took longer than `timeout` s."""
        with self._written:
            return self._written.wait_for(lambda: not (self._waiting or self._busy), timeout)

    def close(self, timeout: float = _AT_EXIT) -> bool:
        """Flush, and take no more lines: later ones are lost. Safe to call twice."""
        self._closed = True
        self._closing.set()
        self._wake.set()
        atexit.unregister(self.close)
        return self.flush(timeout)

    def _rouse(self) -> None:
        self._asleep = False
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log.writer", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def _run(self) -> None:
        waiting = self._waiting
        while True:
            if waiting:
                self._busy = True
                lines = [waiting.popleft() for _ in range(len(waiting))]
                self._taken += sum(map(len, lines))
                self._put(lines)
                with self._written:
                    self._busy = False
                    self._written.notify_all()
                self._closing.wait(PAUSE)
            elif self._closed and not waiting:  # in this order: no line comes after the close
                return
            else:
                self._asleep = True
                if not waiting and not self._closed:  # neither came before we said that we sleep
                    self._wake.wait()
                self._asleep = False
                self._wake.clear()

    def _put(self, lines: list[bytes]) -> None:
        lines.append(b"")  # the last one ends, too
        whole = b"\n".join(lines)
        done = 0
        try:
            if self._torn:
                self._torn = not self._write(memoryview(b"\n"))
            while done < len(whole):
                done += self._write(memoryview(whole)[done:])
        except (OSError, ValueError):  # who read is gone, the disk is full, the file is closed
            self._failed += whole.count(b"\n", done)
            self._torn = self._torn or (done > 0 and whole[done - 1] != ord("\n"))

    def _write(self, data: memoryview) -> int:
        if self._file is None:
            raise OSError("there is no stdout")
        try:
            number = self._file.fileno()
        except io.UnsupportedOperation:  # in memory
            self._file.write(data)
            self._file.flush()
            return len(data)
        try:
            return os.write(number, data)
        except BlockingIOError:  # someone who shares the descriptor made it so
            poll = select.poll()
            poll.register(number, select.POLLOUT)
            poll.poll()
            return 0
