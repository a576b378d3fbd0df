"""The live view of every backend: what probes and outcomes say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
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
from .spelling import learn, new_live

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

_Trust = tuple[bool, bool, str | None]  # https, verify, file of authorities
CONNECT_LIMIT = 10.0  # s, of the control plane


def _trust(backend: Backend) -> _Trust:
    return (backend.scheme == "https", backend.tls_verify, backend.tls_ca_file)


class Fleet:
    """Every backend with its live state, in the order of the configuration.

    Attributes:
        now: its clock.
        providers: by the name that a backend gives as its own; hooks: likewise.
        choosy: some provider's backends cannot take every request.
        reads_sessions: some provider may put what the client calls its conversation into a field.
        has_totals: some backend limits the whole time of an exchange.
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
        self._rows = [(b, new_live(b)) for b in backends]
        self._rent_ends = self._next_end_of_rent()
        self.providers = providers
        self.hooks = {name: Hooks.of(each, self._carriage) for name, each in providers.items()}
        used = {backend.provider for backend, _ in self._rows} & self.hooks.keys()
        self.choosy = any(self.hooks[name].takes is not None for name in used)
        self.reads_sessions = any(self.hooks[name].fields is not None for name in used)
        self.has_totals = any(backend.timeouts.total for backend, _ in self._rows)
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
        self._rent_ends = self._next_end_of_rent()

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
        for backend, live in self._rows:  # noqa: SIM110 - any() takes three times as long
            if self._serves(backend, live, model):
                return True
        return False

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
                self._notify("backend.identified", backend=backend.name, kind=kind)
