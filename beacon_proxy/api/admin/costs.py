"""The route /costs: what was spent, from the ledger; without one, from the last hour in memory.

The ledger is read in a thread, one question at a time. What it answered holds for a second, so that
who polls it, or many who do, cost the disk little.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from aiohttp import web

from ...contracts import Candidate
from ...errors import BadRequest, MethodNotAllowed, Overloaded, ProxyError
from ...ledger import BY, Ledger, LedgerError, rent_per_hour, report, seconds_of
from ...ledger.reports import SCOPE
from ...ops.telemetry import Telemetry
from ...ops.windows import MINUTES, Key
from . import views
from .answers import json_answer, problem

HOLDS = 1.0  # s that an answer is given again
_LIMIT = 10.0  # s that a question may take
_FLUSH = 1.0  # s that it waits for what is not in the file yet
_MOST_WAITING = 32  # who want to know, at the same time

Document = dict[str, Any]


class Fleet(Protocol):
    def candidates(self) -> list[Candidate]: ...


class Costs:
    """Answers the route."""

    def __init__(self, fleet: Fleet, telemetry: Telemetry, ledger: Ledger | None) -> None:
        self._fleet, self._telemetry, self._ledger = fleet, telemetry, ledger
        self._known: dict[tuple[str, str], tuple[float, Document]] = {}
        self._asked: asyncio.Future[Document] | None = None  # what is asked now
        self._asked_for = "", ""
        self._waiting = 0

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
            return await self._of_ledger(ledger, since, by)
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

    async def _of_ledger(self, ledger: Ledger, since: str, by: str) -> Document:
        if self._waiting >= _MOST_WAITING:
            raise Overloaded("enough ask for the costs already", retry_after=HOLDS)
        self._waiting += 1
        try:
            loop, key = asyncio.get_running_loop(), (since, by)
            while True:
                at, document = self._known.get(key, (-HOLDS, {}))
                if loop.time() < at + HOLDS:
                    return document
                if self._asked is None:
                    self._asked_for = key
                    self._asked = in_thread(partial(_ask, ledger, since, by, self._rent()))
                    self._asked.add_done_callback(self._learn)
                if self._asked_for == key:
                    return await asyncio.shield(self._asked)  # who leaves spoils it for nobody
                await asyncio.wait({self._asked})
        finally:
            self._waiting -= 1

    def _learn(self, done: asyncio.Future[Document]) -> None:
        now, self._asked = done.get_loop().time(), None
        self._known = {key: it for key, it in self._known.items() if now < it[0] + HOLDS}
        if done.exception() is None:
            self._known[self._asked_for] = now, done.result()


def _ask(ledger: Ledger, since: str, by: str, rent: float) -> Document:
    """In a thread: first have written what has ended so far."""
    scope = SCOPE
    if not ledger.flush(_FLUSH):
        scope += f"; {ledger.waiting} of this one are not in it yet, for it cannot be written"
    return report(ledger.path, since, by, _LIMIT).document(rent, scope=scope)


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
