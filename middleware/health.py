"""Health: which backends may be asked, by what their answers and the probes say.

    READY ---- `consecutive_failures` strikes in a row ----> EJECTED <--+
      ^                                                        |        | a strike: longer
      |                                                  its time is up |
      |                                                        v        |
      +------------- a good answer ------------------------- TRIAL -----+

RESTING lies across: a backend that pushed back (busy, loading) is left alone until its time is up
and gets no strike for it. A caller's fault and a client that left change nothing. Where the client
brought its own credential, a 429 is about that client's quota: it steers the others away for a
moment at most.

Rule 1: an attempt or probe that began before the ejection says nothing new, however it ends. So the
    twenty streams that die with a backend are one ejection, and their stragglers spoil no trial.
Rule 2: on TRIAL one exchange at a time sees the backend, in its usual place: behind the healthy
    ones it would never be tried, and failover protects the client. The permit of that exchange is a
    lease; it ends by itself, so that a trial nobody reports cannot lock the backend out.
Rule 3: an ejection lasts base * n, n growing with each and falling by one for each
    `base_ejection_time` of good time since (Envoy's outlier detection does it by its interval).
Rule 4: a probe proves only what it exercises: that the server accepts and answers. It lifts an
    ejection, or forgives strikes, only where every strike came from probes or from the connect. And
    a probe that gets no answer in time proves nothing while the backend serves clients: some wait
    there, and one got a good answer within two rounds, or within twice what its answers take. Else
    who accepts and says nothing would be kept in by those who wait for it in vain.
Rule 5: if nothing stands ready, all are offered as a last resort, the least bad first (resting
    before ejected, soonest back, fewest strikes): a guess beats a certain 503. A lease refuses
    nobody then.
Rule 6: `live.healthy` is what operators see: false while ejected or loading, true again once a
    trial may begin. It steers nothing here.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from beacon_proxy.contracts import (
    NO_SLOT,
    Backend,
    Candidate,
    Candidates,
    Check,
    Clock,
    Exchange,
    Fault,
    Fleet,
    Live,
    Notify,
    Outcome,
    Permit,
    Stage,
    Verdict,
    tell_nobody,
)

_GOOD, _BUSY = (
    Verdict.GOOD,
    Verdict.BUSY,
)  # looked up once: a member of an enumeration is slow to reach
_REST = 1.0  # s, for a backend that pushed back without saying for how long
_LONG = 5.0  # s of rest that an operator is told of
_PANIC_PAUSE = 10.0  # s between two words of panic
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_AT_ONCE = 16  # probes side by side
_ROUND_JITTER = 0.1  # of the interval either way: instances must not probe in step
_EJECTION_JITTER = 0.1  # upwards: backends that fell together must not come back together
_SERVES = 2  # intervals, or usual times of an answer, for which a good one says that it works
_STALE = 10  # intervals after which a busy backend is probed all the same: its models may be new


@dataclass(slots=True)
class Health:
    """Keep back what fails, and find out when it is well again."""

    probe_interval: float = field(
        default=30.0, metadata={"help": "s between two rounds of free health checks; 0: none"}
    )
    probe_timeout: float = field(default=5.0, metadata={"help": "s a health check may take"})
    consecutive_failures: int = field(
        default=5, metadata={"help": "strikes in a row until a backend is ejected"}
    )
    base_ejection_time: float = field(
        default=30.0, metadata={"help": "s of the first ejection; the n-th in a row lasts n times"}
    )
    max_ejection_time: float = field(
        default=300.0, metadata={"help": "s an ejection, or a rest asked for, lasts at most"}
    )
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    rng: random.Random = field(
        default_factory=random.Random, metadata={"injected": True}, repr=False
    )
    notify: Notify = field(default=tell_nobody, metadata={"injected": True}, repr=False)
    _records: dict[str, _Record] = field(default_factory=dict, init=False, repr=False)
    _panic: str | None = field(default=None, init=False, repr=False)
    _panicked_at: float = field(default=-math.inf, init=False, repr=False)  # monotonic s

    def __post_init__(self) -> None:
        if not 0 <= self.probe_interval < math.inf:
            raise ValueError(f"probe_interval: must be >= 0 and finite, got {self.probe_interval}")
        for name in ("probe_timeout", "base_ejection_time", "max_ejection_time"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be > 0 and finite, got {value}")
        if self.consecutive_failures < 1:
            raise ValueError(f"consecutive_failures: must be >= 1, got {self.consecutive_failures}")
        if self.max_ejection_time < self.base_ejection_time:
            raise ValueError(
                f"max_ejection_time: must be >= base_ejection_time ({self.base_ejection_time}),"
                f" got {self.max_ejection_time}"
            )

    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Keep those that stand ready, in their order; if none does, all as a last resort.

        Where the exchange itself requires a region, the rest of the world does not count as ready.
        """
        if exchange.region and exchange.region_mode == "require":
            candidates = [
                c
                for c in candidates
                if c.backend.region == exchange.region and not c.backend.region_assumed
            ]
        now = self.clock()
        if candidates and self._all_well(candidates, now):
            self._panic = None
            return candidates
        ready = [c for c in candidates if self._stands_ready(c, now)]
        self._panic = None if ready else exchange.id
        if ready:
            return ready
        for candidate in candidates:
            candidate.last_resort = True
        if candidates and now - self._panicked_at >= _PANIC_PAUSE:
            self._panicked_at = now
            self.notify("fleet.panicked", backends=[c.backend.name for c in candidates])
        return sorted(candidates, key=self._badness)

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        """Take the lease of a backend on trial; any other is let through."""
        record = self._records.get(backend.name)
        if record is None or not record.live.ejected_until:
            return NO_SLOT
        now = self.clock()
        if record.live.ejected_until > now:
            return NO_SLOT  # ejected and asked all the same: a last resort
        if record.leased(now):
            # The core plans and admits in one synchronous stretch, so the last plan is its own.
            return NO_SLOT if self._panic == exchange.id else None
        lease = _Lease(record, now + self.probe_timeout + self.base_ejection_time)
        record.lease = lease
        return lease

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        record, verdict = self._records.get(outcome.backend.name), outcome.verdict
        if record is None:
            return
        if verdict is _BUSY:
            if outcome.started >= record.joined:
                self._push_back(record, exchange, outcome)
        elif outcome.started < record.ejected_at:
            return
        elif verdict is _GOOD:
            record.good_at = self.clock()
            self._good(record)
        elif verdict is Verdict.STRIKE:
            deep = outcome.stage is not Stage.CONNECT
            self._strike(record, outcome.started, outcome.fault, outcome.stage, deep=deep)

    @asynccontextmanager
    async def lifespan(self, fleet: Fleet) -> AsyncIterator[None]:
        """Probe the fleet from now on; the first round starts at once and delays nobody."""
        tasks = [asyncio.create_task(self._follow(fleet), name="health.newcomers")]
        if self.probe_interval:
            tasks.append(asyncio.create_task(self._probe(fleet), name="health.probes"))
        for task in tasks:
            task.add_done_callback(self._stopped)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _all_well(self, candidates: Candidates, now: float) -> bool:
        """Whether all are known and nothing is held against any: the usual case, told quickly."""
        records = self._records
        for candidate in candidates:
            live = candidate.live
            record = records.get(candidate.backend.name)
            if record is None or record.live is not live:
                return False
            if live.ejected_until or live.resting_until > now:
                return False
        return True

    def _stands_ready(self, candidate: Candidate, now: float) -> bool:
        live = candidate.live
        record = self._record(candidate)
        if live.resting_until > now or live.ejected_until > now:
            return False
        return not (live.ejected_until and record.leased(now))

    def _badness(self, candidate: Candidate) -> tuple[bool, float, int]:
        live = candidate.live
        until = max(live.ejected_until, live.resting_until)
        return live.ejected_until > 0, until, self._record(candidate).strikes

    def _record(self, candidate: Candidate) -> _Record:
        name = candidate.backend.name
        record = self._records.get(name)
        # Another `live` under the same name is another backend: nothing of the old one holds.
        if record is None or record.live is not candidate.live:
            joined = candidate.backend.joined
            record = _Record(name, candidate.live, joined=joined, ejected_at=joined or -math.inf)
            self._records[name] = record
        return record

    def _push_back(self, record: _Record, exchange: Exchange, outcome: Outcome) -> None:
        now, seconds = self.clock(), outcome.retry_after
        if outcome.status == 429 and _by_own_credential(exchange, outcome.backend):
            seconds = _REST if seconds is None else min(seconds, _REST)
        before = record.live.resting_until - now
        self._rest(record, seconds)
        rest = record.live.resting_until - now
        if before <= _LONG < rest:
            self.notify(
                "backend.rested",
                backend=record.name,
                seconds=round(rest, 3),
                status=outcome.status,
                fault=outcome.fault,
                detail=outcome.detail,
            )

    def _rest(self, record: _Record, seconds: float | None) -> None:
        until = self.clock() + min(_REST if seconds is None else seconds, self.max_ejection_time)
        record.live.resting_until = max(record.live.resting_until, until)

    def _good(self, record: _Record) -> None:
        live = record.live
        record.strikes, record.deep, live.healthy = 0, False, True
        if record.loading:
            record.loading, live.resting_until = False, 0.0
        if live.ejected_until:
            live.ejected_until, record.lease, record.restored_at = 0.0, None, self.clock()
            self.notify("backend.restored", backend=record.name)

    def _strike(
        self, record: _Record, started: float, fault: Fault | None, stage: str, *, deep: bool
    ) -> None:
        record.strikes += 1
        record.deep = record.deep or deep
        ejected_until = record.live.ejected_until
        if ejected_until > started:
            return  # asked as a last resort: it serves its time, no more
        if not ejected_until:
            if record.strikes < self.consecutive_failures:
                return
            good_time = self.clock() - record.restored_at
            record.ejections -= min(record.ejections, int(good_time // self.base_ejection_time))
        self._eject(record, fault, stage)

    def _eject(self, record: _Record, fault: Fault | None, stage: str) -> None:
        # Counting on above the longest time would only make the way back down longer.
        most = math.ceil(self.max_ejection_time / self.base_ejection_time)
        record.ejections = min(record.ejections + 1, most)
        stretched = self.base_ejection_time * self.rng.uniform(1.0, 1.0 + _EJECTION_JITTER)
        seconds = min(stretched * record.ejections, self.max_ejection_time)
        record.ejected_at, record.lease = self.clock(), None
        record.live.ejected_until = record.ejected_at + seconds
        record.live.healthy = False
        self.notify(
            "backend.ejected",
            backend=record.name,
            seconds=round(seconds, 3),
            ejections=record.ejections,
            fault=fault,
            stage=stage,
        )

    async def _probe(self, fleet: Fleet) -> None:
        while True:
            await self._round(fleet)
            stretch = self.rng.uniform(1.0 - _ROUND_JITTER, 1.0 + _ROUND_JITTER)
            await asyncio.sleep(self.probe_interval * stretch)

    async def _follow(self, fleet: Fleet) -> None:
        """Forget at once who leaves, and ask at once who joins."""
        seen = 0
        while True:
            seen = await fleet.changed(seen)
            candidates = self._remembered(fleet)
            if self.probe_interval:
                unasked = [c for c in candidates if self._record(c).probed_at == -math.inf]
                await self._ask_all(fleet, unasked)

    def _remembered(self, fleet: Fleet) -> list[Candidate]:
        """The fleet of now; those that left it are forgotten."""
        candidates = fleet.candidates()
        self._records = {c.backend.name: self._record(c) for c in candidates}
        return candidates

    async def _round(self, fleet: Fleet) -> None:
        now = self.clock()
        candidates = self._remembered(fleet)
        await self._ask_all(
            fleet, [c for c in candidates if self._wants_probe(self._record(c), now)]
        )

    async def _ask_all(self, fleet: Fleet, candidates: Candidates) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for candidate in candidates:
                record = self._record(candidate)
                name = f"health.probe.{record.name}"
                group.create_task(self._ask(fleet, candidate, record, gate), name=name)

    def _wants_probe(self, record: _Record, now: float) -> bool:
        """Real traffic outranks probes: who answers clients well is not asked whether it does."""
        proven = not record.strikes and now - record.good_at < self.probe_interval
        return not proven or now - record.probed_at >= self.probe_interval * _STALE

    async def _ask(
        self, fleet: Fleet, candidate: Candidate, record: _Record, gate: asyncio.Semaphore
    ) -> None:
        async with gate:
            record.probed_at = self.clock()
            check = await fleet.check(candidate, self.probe_timeout)
        if self._records.get(record.name) is not record:
            return  # it left meanwhile
        if check is not None:
            self._tell(record, check)
        self._learn(record, check or _CANNOT_TELL, record.probed_at)

    def _tell(self, record: _Record, check: Check) -> None:
        """Tell the operator of a verdict that is new, and not good."""
        before, record.verdict = record.verdict, check.verdict
        if check.verdict in (Verdict.GOOD, before):
            return
        event = "backend.loading" if check.verdict is Verdict.BUSY else "probe.failed"
        self.notify(
            event,
            backend=record.name,
            verdict=check.verdict,
            fault=check.fault,
            detail=check.detail,
        )

    def _learn(self, record: _Record, check: Check, started: float) -> None:
        live = record.live
        if started < record.ejected_at:
            return
        slow = check.fault is Fault.TIMEOUT and self._serves(record)
        if check.verdict is Verdict.STRIKE and not slow:
            self._strike(record, started, check.fault, "probe", deep=False)
        elif check.verdict is Verdict.BUSY:
            # Until the next round has asked again, and that may be a late one.
            next_round = self.probe_interval * (1.0 + _ROUND_JITTER) + self.probe_timeout
            self._rest(record, next_round if check.retry_after is None else check.retry_after)
            record.loading, live.healthy = True, False
        elif check.verdict is Verdict.GOOD and not record.deep:
            self._good(record)
        elif live.ejected_until <= self.clock() and not record.loading:
            live.healthy = True  # on trial: it may be asked

    def _serves(self, record: _Record) -> bool:
        """Whether it is at work, and answers come of it: see rule 4."""
        live = record.live
        usual = 0.0 if live.usual is None else live.usual.billed
        lately = _SERVES * max(self.probe_interval, usual)
        return live.in_flight > 0 and self.clock() - record.good_at <= lately

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.notify("probes.stopped", error=repr(task.exception()))


def _by_own_credential(exchange: Exchange, backend: Backend) -> bool:
    """Whether the backend knew the client by the client's own key."""
    configured = any(name.lower() in _CREDENTIALS for name, _ in backend.headers)
    if backend.api_key or configured:
        return False
    return any(name.lower() in _CREDENTIALS for name, _ in exchange.headers)


@dataclass(slots=True)
class _Record:
    """What health remembers of a backend beside what `live` shows."""

    name: str
    live: Live
    joined: float = 0.0  # monotonic s; what began before was another backend's
    strikes: int = 0  # in a row
    deep: bool = False  # one of them came after the connect, where no probe looks
    ejections: int = 0  # of the present run, the multiplier of its time
    ejected_at: float = -math.inf  # monotonic s
    restored_at: float = 0.0  # monotonic s
    loading: bool = False  # the rest was asked for by a probe, so a probe may end it
    good_at: float = -math.inf  # monotonic s, last good answer to a client
    probed_at: float = -math.inf  # monotonic s
    verdict: Verdict | None = None  # of the last probe
    lease: _Lease | None = None

    def leased(self, now: float) -> bool:
        return self.lease is not None and self.lease.until > now


@dataclass(slots=True)
class _Lease:
    """The permit of a trial."""

    record: _Record
    until: float  # monotonic s

    def release(self) -> None:
        if self.record.lease is self:
            self.record.lease = None


_CANNOT_TELL = Check(Verdict.NEUTRAL)
