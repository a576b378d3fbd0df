"""The route /costs: what was spent, from the ledger; without one, from the last hour in memory.

The ledger is read in a thread. Who may ask, and what is asked next, is in `asking`.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from aiohttp import web

from ...contracts import Candidate
from ...errors import BadRequest, MethodNotAllowed, Overloaded, ProxyError
from ...ledger import BY, Ledger, LedgerError, rent_per_hour, report, seconds_of
from ...ledger.reports import SCOPE
from ...ops.telemetry import Telemetry
from ...ops.windows import MINUTES, Key
from . import views
from .answers import json_answer, problem
from .asking import Asking, Document, Question, rounded

_LIMIT = 10.0  # s that a question may take
_FLUSH = 1.0  # s that it waits for what is not in the file yet


class Fleet(Protocol):
    def candidates(self) -> list[Candidate]: ...


class Costs:
    """Answers the route."""

    def __init__(self, fleet: Fleet, telemetry: Telemetry, ledger: Ledger | None) -> None:
        self._fleet, self._telemetry, self._ledger = fleet, telemetry, ledger
        self._asking = Asking(self._ask, telemetry.clock)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{request.path} answers GET and HEAD alone")
            return json_answer(await self._answer(request))
        except ProxyError as error:
            return problem(request, error)

    async def _answer(self, request: web.BaseRequest) -> Document:
        since, by = request.query.get("since", "1h"), request.query.get("by", "provider")
        seconds, ledger = seconds_of(since), self._ledger
        known = tuple(BY) if ledger is not None else Key._fields
        if by not in known:
            why = "" if by not in BY else ", as no ledger is kept"
            raise BadRequest(f"by: must be one of {', '.join(known)}{why}, got {by[:40]!r}")
        if seconds is None:
            raise BadRequest(
                f"since: must be a time such as 30s, 15m, 1h or 7d, got {since[:40]!r}"
            )
        if ledger is None:
            return self._of_memory(since, seconds, by, "")
        try:
            answer = await self._asking.answer(Question(rounded(seconds), by))
            return {**answer, "since": since}
        except LedgerError as error:
            if error.kind == "slow":
                raise Overloaded(
                    f"to add up {since} took more than {_LIMIT:g} s; ask for a shorter time",
                    retry_after=60,
                ) from error
            why = f"; the ledger cannot be read: {error}"
            if by not in Key._fields:
                raise Overloaded(f"by {by}{why}", retry_after=60) from error
            return self._of_memory(since, seconds, by, why)

    def _of_memory(self, since: str, seconds: int, by: str, why: str) -> Document:
        minutes = min(math.ceil(seconds / 60), MINUTES)
        windows = self._telemetry.windows
        groups = windows.totals(minutes, by)
        rows = [{by: name, **views.sums(totals)} for name, totals in groups.items()]
        return {
            "since": since,
            "by": by,
            "rows": sorted(rows, key=lambda row: (-row["usd"], row[by])),
            "total_usd": round(sum(totals.usd for totals in groups.values()), 9),
            "rent_usd_per_hour": self._rent(),
            "covered_seconds": round(windows.covered(minutes), 1),
            "scope": f"this process, since its start, at most one hour, in whole minutes{why}",
            "timestamp": self._telemetry.unix(),
        }

    def _rent(self) -> float:
        backends = [candidate.backend for candidate in self._fleet.candidates()]
        return rent_per_hour(backends, self._telemetry.unix())

    def _ask(self, question: Question) -> asyncio.Future[Document]:
        assert self._ledger is not None
        return in_thread(partial(_ask, self._ledger, question, self._rent()))


def _ask(ledger: Ledger, question: Question, rent: float) -> Document:
    """In a thread: first have written what has ended so far."""
    scope = SCOPE
    if not ledger.flush(_FLUSH):
        scope += f"; {ledger.waiting} of this one are not in it yet, for it cannot be written"
    found = report(ledger.path, f"{question.seconds}s", question.by, _LIMIT)
    return found.document(rent, scope=scope)


def in_thread(call: Callable[[], Document]) -> asyncio.Future[Document]:
    """What `call` returns or raises, from a thread that the end of the process does not wait for.

    The loop's own executor would be waited for.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Document] = loop.create_future()

    def run() -> None:
        try:
            document, error = call(), None
        except Exception as exc:  # whatever it is, it is the asker's
            document, error = {}, exc
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, document, error)

    def settle(document: Document, error: Exception | None) -> None:
        if error is None:
            answer.set_result(document)
        else:
            answer.set_exception(error)

    threading.Thread(target=run, name="ledger.reader", daemon=True).start()
    return answer
