"""The live view of every backend: what probes and outcomes say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

import aiohttp

from ..contracts import (
    Backend,
    Candidate,
    Candidates,
    Check,
    Clock,
    Exchange,
    Fault,
    Live,
    Notify,
    Outcome,
    Provider,
    Verdict,
    Warmth,
    tell_nobody,
)
from ..wire.faults import fault_of
from ..wire.pool import IDLE_LIMIT, tls_context
from .hooks import Hooks
from .spelling import learn, learn_again, new_live

# Looked up once: a member of an enumeration is slow to reach.
_GOOD, _LOADING = Verdict.GOOD, Fault.LOADING
_WARM, _WARMING = Warmth.WARM, Warmth.WARMING
WARMING_TIME = 600.0  # s that "it is starting" is believed without further news
_TOLD_START = 1.0  # s; a start longer than this is worth a line in the log
_LACKING_TIME = 300.0  # s that a model stays unlikely on a backend that said it has not got it
_LACKING_MOST = 256  # models remembered so, a backend
_FIRST_GUESS = 5.0  # s, for the price of an answer while none has been seen
_WEIGHT = 0.2  # of the newest outcome in the moving averages: about the last ten count
_LOOK_PAUSE = 5.0  # s between two looks for a model that nobody serves
_LOOK_TIME = 2.0  # s that such a look takes at most

_Row = tuple[Backend, Live]
_Trust = tuple[bool, bool, str | None]  # https, verify, file of authorities
CONNECT_LIMIT = 10.0  # s, of the control plane


def _trust(backend: Backend) -> _Trust:
    return (backend.scheme == "https", backend.tls_verify, backend.tls_ca_file)


def _server(backend: Backend) -> tuple[str, str, str, int, str]:
    """Where two are the same, what was learnt of the one holds for the other."""
    return backend.provider, backend.scheme, backend.host, backend.port, backend.base_path


def _nobody(_: Backend) -> None:
    """Hear nothing."""


class Fleet:
    """Every backend with its live state: those of the configuration, then those that were found.

    One that was found and is gone takes no new attempt from that moment. While exchanges run on it
    it is *leaving*; found again meanwhile, it comes back with its past. Then it is forgotten.

    Attributes:
        now: its clock.
        providers: by the name that a backend gives as its own; hooks: likewise.
        choosy: some provider's backends cannot take every request.
        reads_sessions: some provider wants to know what the client calls its conversation.
        has_totals: some backend limits the whole time of an exchange.
        leaving: rows that left and whose exchanges still run.
        unasked: sources of backends that have not answered yet.
        on_left: hears of a backend to which no idle connection is of use any more.
        on_forgotten: hears of a backend whose name nobody has now.
    """

    def __init__(
        self,
        backends: Iterable[Backend],
        providers: Mapping[str, Provider],
        *,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        version: str = "",
        notify: Notify = tell_nobody,
    ) -> None:
        self.now = clock
        self._unix = unix
        self._version = version
        self._notify = notify
        self._rows: list[_Row] = [(b, new_live(b)) for b in backends]
        self._found: dict[str, Backend] = {}  # as given to `follow`, by name
        self.leaving: list[_Row] = []
        self.unasked = 0
        self.on_left: Callable[[Backend], None] = _nobody
        self.on_forgotten: Callable[[Backend], None] = _nobody
        self._number = 0  # of the fleet that it is now
        self._changed = asyncio.Event()
        self.providers = providers
        self.hooks = {name: Hooks.of(each, self._carriage) for name, each in providers.items()}
        self.choosy = self.has_totals = self.reads_sessions = False
        self._rent_ends: float | None = None
        self._survey()
        self._asking: dict[str, asyncio.Task[Check | None]] = {}
        self._looking = asyncio.Lock()
        self._look_again = 0.0
        self._sessions: dict[_Trust, aiohttp.ClientSession] = {}
        self._carriages: dict[_Trust, aiohttp.ClientSession] = {}

    def candidates(self) -> list[Candidate]:
        """One new candidate a backend."""
        if self._rent_ends is not None and self._unix() >= self._rent_ends:
            self._end_rents()
        return [Candidate(backend, live) for backend, live in self._rows]

    def serving(self, model: str | None, tried: Collection[str]) -> list[Candidate]:
        """Candidates that serve `model` (a canonical name; None: any) and were not tried yet.

        A backend whose models are not known may serve any.
        """
        if self._rent_ends is not None and self._unix() >= self._rent_ends:
            self._end_rents()
        found = []
        for backend, live in self._rows:
            if tried and backend.name in tried:
                continue
            models = live.models if backend.models is None else backend.models
            # The usual cases without a call: it lists the model, or never said that it lacks one.
            usual = not live.lacking if models is None else model in models
            if usual or model is None or self._serves(backend, live, model):
                found.append(Candidate(backend, live))
        return found

    def _next_end_of_rent(self) -> float | None:
        """When the price of some backend changes next; unix s, None: never."""
        ends = [row.rented_until_unix for row, _ in self._rows if row.idle_price_per_second]
        return None if min(ends, default=inf) == inf else min(ends)

    def _end_rents(self) -> None:
        """Price those whose agreement is over as what they cost from now on."""
        now = self._unix()
        for at, (row, live) in enumerate(self._rows):
            if row.idle_price_per_second and row.rented_until_unix <= now:
                self._rows[at] = (row.unrented(), live)
                self._notify("backend.rent_ended", backend=row.name)
        self._survey()

    def taking(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Those whose provider can take this very request."""
        hooks = self.hooks
        return [
            c
            for c in candidates
            if (takes := hooks[c.backend.provider].takes) is None or takes(c.backend, exchange)
        ]

    def knows(self, model: str) -> bool:
        """Whether some backend serves, or may serve, the model."""
        for backend, live in self._rows:
            if self._serves(backend, live, model):
                return True
        return not self._rows or self.unasked > 0  # who is still to be found may serve it

    async def finds(self, model: str) -> bool:
        """Whether some backend serves the model after all, by asking those that tell.

        It may be new there since they were last asked. One look at a time, and not soon again: who
        comes meanwhile waits for it, and learns from it.
        """
        async with self._looking:
            if self.knows(model):
                return True
            if self.now() < self._look_again:
                return False
            now = self.now()
            self._look_again = now + _LOOK_PAUSE
            async with asyncio.TaskGroup() as group:
                for candidate in self.candidates():
                    backend = candidate.backend
                    if backend.models is None and candidate.live.ejected_until <= now:
                        group.create_task(
                            self.check(candidate, _LOOK_TIME), name=f"look {backend.name}"
                        )
        return self.knows(model)

    def typical_duration(self) -> float:
        """Seconds a good attempt took of late, over all backends; a guess before the first."""
        known = [live.duration for _, live in self._rows if live.duration]
        return sum(known) / len(known) if known else _FIRST_GUESS

    def note(self, exchange: Exchange, outcome: Outcome, live: Live) -> None:
        """Learn latency and success from one attempt."""
        live.last_used = now = self.now()
        if outcome.verdict is _GOOD:
            live.warmth = _WARM
            live.warmth_until = live.cold_from = now + outcome.backend.stays_warm
            live.success += _WEIGHT * (1.0 - live.success)
            live.duration += (_WEIGHT if live.duration else 1.0) * (
                outcome.duration - live.duration
            )
            ttft = outcome.ttft
            if outcome.cold_start is not None:
                # How fast it answers is another question than how long it takes to start.
                ttft = self._note_start(outcome.backend, live, outcome.cold_start, ttft)
            if ttft is not None:
                old = live.latency
                live.latency = ttft if old is None else old + _WEIGHT * (ttft - old)
        elif outcome.verdict is Verdict.STRIKE:
            live.success -= _WEIGHT * live.success
        elif outcome.fault is _LOADING:
            live.learn_warmth(_WARMING, now + WARMING_TIME)
        elif outcome.fault is Fault.DEADLINE and outcome.sent:
            # No strike, for the client chose how long to wait; but no sign of health either.
            live.success -= _WEIGHT / 2 * live.success

    def _note_start(
        self, backend: Backend, live: Live, seconds: float, ttft: float | None
    ) -> float | None:
        """Remember a cold start. Returns `ttft` without it, None where that is not known."""
        live.cold_starts.note(seconds)
        if seconds >= _TOLD_START:
            self._notify("backend.started", backend=backend.name, seconds=round(seconds, 3))
        return ttft - seconds if ttft is not None and ttft > seconds else None

    def lacks(self, live: Live, model: str) -> None:
        """A backend whose models were only assumed said that it has not got this one."""
        if len(live.lacking) >= _LACKING_MOST:
            live.lacking.clear()
        live.lacking[model] = self.now() + _LACKING_TIME

    def ask_soon(self, candidate: Candidate) -> None:
        """Ask a backend whether what it said still holds, unless it was asked just now."""
        name = candidate.backend.name
        if name in self._asking or self._unix() - candidate.live.last_check < _LOOK_PAUSE:
            return
        task = asyncio.create_task(self.check(candidate, _LOOK_TIME), name=f"ask {name}")
        self._asking[name] = task
        task.add_done_callback(lambda _: self._asking.pop(name))

    def _serves(self, backend: Backend, live: Live, model: str) -> bool:
        models = live.models if backend.models is None else backend.models
        if models is not None:
            return model in models
        return model not in live.lacking or live.lacking[model] <= self.now()

    # -- backends that come and go ---------------------------------------------------------------

    def draining(self) -> list[Candidate]:
        """One new candidate for each backend that is leaving."""
        return [Candidate(backend, live) for backend, live in self.leaving]

    def keeps(self, backend: Backend) -> bool:
        """Whether it is, as it is, still one of the fleet: else its connections are of no use."""
        now = self._named.get(backend.name)
        return (
            now is not None and _server(now) == _server(backend) and _trust(now) == _trust(backend)
        )

    async def changed(self, seen: int) -> int:
        """See `contracts.Fleet.changed`."""
        while self._number == seen:
            await self._changed.wait()
        return self._number

    def follow(self, found: Iterable[Backend]) -> None:
        """Take the discovered backends to be these, from now on.

        Names are unique, and none is a configured one. A row keeps its place, and its live state
        as long as it is the same server; `joined` counts for one that is new.
        """
        old, self._found = self._found, {backend.name: backend for backend in found}
        new = dict(self._found)
        rows: list[_Row] = []
        moved = False
        for row in self._rows:
            was, now = old.get(row[0].name), new.pop(row[0].name, None)
            if was is None or (now is not None and replace(now, joined=was.joined) == was):
                rows.append(row)  # configured, or as it was
            elif now is not None and _server(was) == _server(now):
                rows.append(self._revised(row, was, now))
            else:
                moved = True
                self._leave(row)
                if now is not None:
                    rows.append(self._join(replace(now, joined=self.now())))
        moved = moved or bool(new)
        rows += map(self._join, new.values())
        self._rows = rows
        self._survey()
        self.sweep()
        if moved:
            self._number += 1
            self._changed.set()
            self._changed.clear()

    def sweep(self) -> None:
        """Forget those that left and are empty; asked whenever an attempt at one may have ended."""
        gone = [backend for backend, live in self.leaving if not live.in_flight]
        if not gone:
            return
        self.leaving = [row for row in self.leaving if row[1].in_flight]
        still = {backend.name for backend, _ in self.leaving}
        for backend in gone:
            if backend.name not in self._named and backend.name not in still:
                self.on_forgotten(backend)

    def _revised(self, row: _Row, was: Backend, now: Backend) -> _Row:
        """The row with other facts about the same server."""
        backend, live = row
        if _trust(was) != _trust(now):
            self.on_left(backend)
        learn_again(now, live)
        kind = backend.kind if was.kind == now.kind else now.kind  # it may have been found out
        return replace(now, kind=kind, joined=backend.joined), live

    def _leave(self, row: _Row) -> None:
        backend, live = row
        self.leaving.append(row)
        self.on_left(backend)
        self._notify("backend.left", backend=backend.name, in_flight=live.in_flight)

    def _join(self, backend: Backend) -> _Row:
        self._notify(
            "backend.joined",
            backend=backend.name,
            provider=backend.provider,
            region=backend.region,
        )
        for at, (its, live) in enumerate(self.leaving):
            if its.name == backend.name and _server(its) == _server(backend):
                del self.leaving[at]
                return replace(backend, joined=its.joined), live
        peers = [
            live.picked
            for its, live in self._rows
            if (its.pool, its.region, its.price_per_second)
            == (backend.pool, backend.region, backend.price_per_second)
        ]
        # From zero it would be the least often picked for as long as the others were there.
        live = new_live(backend)
        live.picked = min(peers, default=0)
        return backend, live

    def _survey(self) -> None:
        """Work out what holds of all rows."""
        self._named = {backend.name: backend for backend, _ in self._rows}
        used = {backend.provider for backend, _ in self._rows} & self.hooks.keys()
        self.choosy = any(self.hooks[name].takes is not None for name in used)
        self.reads_sessions = any(
            getattr(self.providers[name], "reads_session", False) for name in used
        )
        self.has_totals = any(backend.timeouts.total for backend, _ in self._rows)
        self._rent_ends = self._next_end_of_rent()

    # -- probes ----------------------------------------------------------------------------------

    def _session(self, backend: Backend) -> aiohttp.ClientSession:
        """The control plane's session, one for each way to trust; never for a client's request."""
        trust = _trust(backend)
        session = self._sessions.get(trust)
        if session is None:
            session = self._sessions[trust] = self._make(trust, "check", force_close=True, limit=32)
        return session

    def _carriage(self, backend: Backend) -> aiohttp.ClientSession:
        """The session for providers that take requests to their backends by themselves."""
        trust = _trust(backend)
        session = self._carriages.get(trust)
        if session is None:
            session = self._carriages[trust] = self._make(
                trust, "carry", limit=0, keepalive_timeout=IDLE_LIMIT
            )
        return session

    def _make(self, trust: _Trust, what: str, **options: Any) -> aiohttp.ClientSession:
        secure, verify, ca_file = trust
        # A context costs 25 ms: none where none is used.
        context = tls_context(verify, ca_file) if secure else True
        return aiohttp.ClientSession(
            headers={"User-Agent": f"beacon-proxy/{self._version} ({what})"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT),
            connector=aiohttp.TCPConnector(ssl=context, **options),
        )

    async def close(self) -> None:
        """End what is being asked, and close the sessions of the control plane."""
        asking = [*self._asking.values()]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for sessions in (self._sessions, self._carriages):
            for session in sessions.values():
                await session.close()
            sessions.clear()

    async def check(self, candidate: Candidate, seconds: float) -> Check | None:
        """See `contracts.Fleet.check`."""
        backend, live = candidate.backend, candidate.live
        wakes = self.hooks[backend.provider].wakes
        # A busy worker often takes one request at a time: beside it, too, a check would start one.
        would_start = live.in_flight > 0 or live.warmth_at(self.now()) is not _WARM
        if wakes is not None and would_start and wakes(backend):
            return None
        session = self._session(backend)
        started = self.now()
        try:
            async with asyncio.timeout(seconds):
                check = await self.providers[backend.provider].check(backend, session)
        except TimeoutError:
            check = Check(Verdict.STRIKE, fault=Fault.TIMEOUT, detail=f"no answer in {seconds} s")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            fault, detail = fault_of(exc)
            check = Check(Verdict.STRIKE, fault=fault, detail=detail)
        except Exception as exc:  # a plugin's fault must not end the probes of all others
            check = Check(Verdict.NEUTRAL, detail=f"the check itself failed: {exc!r}"[:200])
            self._notify("check.failed", backend=backend.name, error=repr(exc)[:200])
        if check is None:
            return None
        live.check = check
        live.last_check = self._unix()
        live.check_latency = check.latency if check.latency is not None else self.now() - started
        if check.warmth is not None:
            live.learn_warmth(check.warmth, self.now() + WARMING_TIME)
        elif check.fault is _LOADING:
            live.learn_warmth(_WARMING, self.now() + WARMING_TIME)
        if check.kind is not None and backend.kind != check.kind:
            self._found_kind(backend, live, check.kind)
        if check.capacity is not None:
            live.capacity = check.capacity
        learn(backend, live, check)
        return check

    def _found_kind(self, backend: Backend, live: Live, kind: str) -> None:
        """From now on it is a backend of this kind, under the same name and with the same past."""
        for at, (row, its) in enumerate(self._rows):
            if its is live:
                self._rows[at] = (replace(row, kind=kind), live)
                self._survey()
                self._notify("backend.identified", backend=backend.name, kind=kind)
