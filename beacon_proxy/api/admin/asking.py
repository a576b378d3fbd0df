"""Who asks the ledger what: one question at a time, each for all who ask it.

Rule 1: a time is rounded up, so that its many spellings are few questions.
Rule 2: the shortest time is asked for next. Who asks for an hour waits for the question that is
    asked already, however many others want to know of a year.
Rule 3: an answer is given again for as long as it is worth: the longer it took to find, the longer.
Rule 4: what took too long is not tried again for a while, nor what goes back as far or further.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from ...contracts import Clock
from ...errors import Overloaded
from ...ledger import LedgerError

HOLDS = 1.0  # s that an answer is given again, at least
WORTH = 5.0  # times as long as it took to find
SLOW_HOLDS = 300.0  # s that what took too long is not tried again
MOST_WAITING = 32  # who want to know the same
MOST_OPEN = 32  # questions that are not answered yet
_MOST_KNOWN = 64  # answers that are kept

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
# Up to so many s: in whole such units.
_STEPS = ((2 * _HOUR, _MINUTE), (7 * _DAY, _HOUR), (3_650 * _DAY, _DAY))

Document = dict[str, Any]


class Question(NamedTuple):
    """What was spent; they are in order of how much there is to add up."""

    seconds: int
    by: str


def rounded(seconds: int) -> int:
    """A time in s, rounded up to what questions are asked for; at most ten years."""
    for most, unit in _STEPS:
        if seconds <= most:
            return -(-seconds // unit) * unit
    return _STEPS[-1][0]


class _Open:
    """A question that is not answered yet."""

    def __init__(self) -> None:
        self.waiting = 0
        self.answer: asyncio.Future[Document] = asyncio.get_running_loop().create_future()
        # Also where nobody waits any more.
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())


class Asking:
    """Asks what it is given to ask with."""

    def __init__(self, ask: Callable[[Question], asyncio.Future[Document]], clock: Clock) -> None:
        self._ask, self._clock = ask, clock
        self._open: dict[Question, _Open] = {}
        self._asked: Question | None = None  # of these, the one that is asked now
        self._known: dict[Question, tuple[float, Document]] = {}  # and until when
        self._slow: dict[str, tuple[int, float]] = {}  # by `by`: from how many s on, until when

    async def answer(self, question: Question) -> Document:
        """What `ask` returns or raises.

        Raises:
            Overloaded: too many ask, or it is known that it would take too long.
        """
        now = self._clock()
        until, document = self._known.get(question, (now, {}))
        if now < until:
            return document
        self._refuse_slow(question, now)
        place = self._open.get(question) or self._place(question)
        if place.waiting >= MOST_WAITING:
            raise Overloaded("enough ask for the costs already", retry_after=HOLDS)
        place.waiting += 1
        try:
            self._next()
            return await asyncio.shield(place.answer)  # who leaves spoils it for nobody
        finally:
            place.waiting -= 1
            if not place.waiting and question != self._asked and self._open.get(question) is place:
                del self._open[question]

    def _refuse_slow(self, question: Question, now: float) -> None:
        seconds, until = self._slow.get(question.by, (0, now))
        if now < until and question.seconds >= seconds:
            raise Overloaded(
                "to add that up took too long a moment ago; ask for a shorter time, or with"
                " `beacon-proxy costs`",
                retry_after=until - now,
            )

    def _place(self, question: Question) -> _Open:
        if len(self._open) >= MOST_OPEN:
            last = max(each for each in (*self._open, question) if each != self._asked)
            full = Overloaded(
                "enough is asked of the ledger already; ask for a shorter time", retry_after=HOLDS
            )
            if last == question:
                raise full
            self._open.pop(last).answer.set_exception(full)
        place = self._open[question] = _Open()
        return place

    def _next(self) -> None:
        if self._asked is None and self._open:
            question, began = min(self._open), self._clock()
            asking = self._ask(question)
            self._asked = question
            asking.add_done_callback(lambda done: self._learn(question, began, done))

    def _learn(self, question: Question, began: float, done: asyncio.Future[Document]) -> None:
        now, self._asked = self._clock(), None
        place, error = self._open.pop(question), done.exception()
        if error is None:
            until = now + max(HOLDS, WORTH * (now - began))
            self._known = {key: it for key, it in self._known.items() if now < it[0]}
            if len(self._known) >= _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[question] = until, done.result()
            place.answer.set_result(done.result())
        else:
            place.answer.set_exception(error)
            if isinstance(error, LedgerError) and error.kind == "slow":
                self._slow[question.by] = question.seconds, now + SLOW_HOLDS
                for other in [each for each in self._open if each.by == question.by]:
                    if other.seconds >= question.seconds:
                        self._open.pop(other).answer.set_exception(error)
        self._next()
