"""An answer that a provider's own transport brings, put where a connection would put it.

Rule 1: it is an answer like any other: judged, held, relayed, limited by the same code. What a
provider does is between it and its backend; what a client sees is decided here.
Rule 2: nobody waits for a provider. When the answer is given up its task is cancelled and left to
stop the work at the backend by itself, for `CLEAN_UP` seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from math import inf
from time import monotonic
from typing import Any

import aiohttp

from ..contracts import CLEAN_UP, Fault, Headers, Notify, Reply, Timeouts, tell_nobody
from ..errors import told
from .answer import Answer
from .connection import ROUND
from .expect import Framing
from .faults import fault_of
from .headers import HOP_BY_HOP, AnswerHead, is_line, phrase
from .wheel import GRAIN, Wheel

_FRAMING = HOP_BY_HOP | {b"content-length"}
_BODILESS = (204, 304)
Work = Callable[[Reply], Coroutine[Any, Any, None]]


class Carriers:
    """The tasks of every provider's transport in this process."""

    def __init__(self, notify: Notify = tell_nobody) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.notify = notify

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Let those that still tell their backends to stop do so; they have been cancelled."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=CLEAN_UP)
        for task in tuple(self._tasks):
            task.cancel()


class Carried:
    """`contracts.Reply` for the provider, `answer.Flow` for the answer."""

    __slots__ = (
        "_answer",
        "_cold",
        "_loop",
        "_open",
        "_pieces_pass",
        "_room",
        "_task",
        "_tell",
        "_wheel",
        "bucket",
        "closing",
        "reading_paused",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: Wheel,
        answer: Answer,
        cold: Timeouts | None,
    ) -> None:
        """`cold`: the limits once the provider says that its backend is not warm."""
        self._loop = loop
        self._wheel = wheel
        self._cold = cold
        self._answer: Answer | None = answer
        self._task: asyncio.Task[None] | None = None
        self._tell: tuple[Notify, str] = (tell_nobody, "")
        self._room = asyncio.Event()
        self._room.set()
        self._open = False  # the head has been told
        self._pieces_pass = True  # its answer may have a body
        self.reading_paused = self.closing = False
        self.bucket: int | None = None

    def start(self, carriers: Carriers, work: Work, name: str, backend: str) -> asyncio.Task[None]:
        """Begin the answer, and let the provider's task fill it; `backend` is its name."""
        assert self._answer is not None
        self._tell = carriers.notify, backend
        self._wheel.add(self, self._loop.time() + ROUND)
        self._answer.begin(self, False)
        self._task = task = carriers.start(self._run(work, carriers.notify), name)
        return task

    async def _run(self, work: Work, notify: Notify) -> None:
        try:
            await work(self)
        except (aiohttp.ClientError, OSError) as exc:  # TimeoutError is one, too
            self.fail(*fault_of(exc))
        except Exception as exc:  # a plugin's fault: for its author, not for the client
            notify("carry.failed", error=told(exc))
            self.fail(Fault.MALFORMED, "the provider's transport failed")
        else:
            self.fail(Fault.CLOSED, "the provider brought no end of the answer")
        finally:
            self._leave()

    def _leave(self) -> None:
        self.closing = True
        self._answer = None
        self._task = None
        self._wheel.drop(self)

    # -- contracts.Reply -------------------------------------------------------------------------

    def head(self, status: int, headers: Headers) -> None:
        answer = self._answer
        if answer is None or self._open:
            return
        if not 200 <= status <= 599:
            self._refuse(f"a status that no answer has: {status}")
            return
        # The length is what the pieces add up to, whatever a provider was told by its backend.
        fields = tuple(pair for pair in headers if pair[0].lower() not in _FRAMING)
        if not all(is_line(name, value) for name, value in fields):
            self._refuse("a header field that would end its line")
            return
        self._open = True
        self._pieces_pass = not (answer.head_only or status in _BODILESS)
        framing = Framing.CHUNKED if self._pieces_pass else Framing.NONE
        answer.on_head(AnswerHead(status, phrase(status), fields, True), framing)

    def _refuse(self, detail: str) -> None:
        """Take nothing more from a provider whose answer cannot go out, and let it clean up."""
        self.fail(Fault.MALFORMED, detail)
        self.abort()

    def piece(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or not data:
            return
        assert self._open, "a piece before the head"
        if not self._pieces_pass:
            return
        answer.on_piece(data)
        if not answer.decided:
            answer.on_read()

    def end(self) -> None:
        if not self._open:
            self.fail(Fault.CLOSED, "the provider ended an answer that it had not begun")
            return
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.on_complete(())

    def fail(self, fault: Fault, detail: str = "") -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(fault, detail)

    async def room(self) -> None:
        while self.reading_paused and self._answer is not None:
            await self._room.wait()

    def waking(self) -> None:
        if self._answer is not None and self._cold is not None:
            self._answer.relax(self._cold)

    def started_cold(self, seconds: float) -> None:
        took = _duration(seconds)
        if self._answer is not None and took is not None:
            self._answer.cold_start = took

    def billed(self, seconds: float, *, running: bool = False) -> None:
        bills = _duration(seconds)
        if self._answer is not None and bills is not None:
            self._answer.billed = None if running else bills
            self._answer.billed_from = monotonic() - bills

    def left_behind(self, what: str) -> None:
        notify, backend = self._tell
        notify("job.left_behind", backend=backend, what=what[:200])

    # -- answer.Flow -----------------------------------------------------------------------------

    def pause_reading(self) -> None:
        self.reading_paused = True
        self._room.clear()

    def resume_reading(self) -> None:
        self.reading_paused = False
        if self._answer is not None:
            self._answer.touch()
        self._room.set()

    def abort(self) -> None:
        self._answer = None
        self.closing = True
        self._room.set()
        task = self._task
        if task is not None and not task.done():
            task.cancel()
            last = self._loop.call_later(CLEAN_UP, task.cancel)
            task.add_done_callback(lambda _: last.cancel())

    def ask_by(self, when: float) -> None:
        if self.bucket is None or when < self.bucket * GRAIN:
            self._wheel.add(self, when)

    def expire(self, now: float) -> float | None:
        answer = self._answer
        again = answer.expire(now) if answer is not None else inf
        return None if self.closing else min(again, now + ROUND)


def _duration(said: Any) -> float | None:
    """What a plugin says as seconds; None where it is no duration, as if it had said nothing."""
    try:
        seconds = float(said)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < inf else None
