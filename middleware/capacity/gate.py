"""Capacity: no backend gets more exchanges at once than its `max_in_flight`.

Rule 1: a slot is taken in `admit` and given back in `Permit.release`, nowhere else.
Rule 2: giving back twice gives back once; a double release must never free a stranger's slot.
Rule 3: who finds every backend full waits in the core's queue, within the limits told here; this
plugin itself never waits.
Rule 4: `max_in_flight` is the operator's word. What is found out (`adaptive`) only lowers it.
Rule 5: a backend that joined while the proxy ran begins with one slot and has all of them
`slow_start` seconds later, growing evenly: its caches are cold, and its GPU may be, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from beacon_proxy.contracts import (
    Backend,
    Clock,
    Exchange,
    Fleet,
    Gauge,
    Outcome,
    Permit,
    QueueLimits,
)

from .adaptive import Adaptive, Learner, Taken

_Server = str | tuple[str, float]  # a name, with the time of joining where it has one


@dataclass(slots=True)
class Capacity:
    """Count what runs on each backend and refuse above its limit."""

    max_queue: int = field(
        default=100, metadata={"help": "exchanges that may wait for room; 0: none waits"}
    )
    queue_timeout: float = field(
        default=10.0, metadata={"help": "s an exchange waits for room at most; 0: not at all"}
    )
    slow_start: float = field(
        default=30.0,
        metadata={"help": "s until a backend that joined gets all its max_in_flight; 0: at once"},
    )
    adaptive: Adaptive = field(
        default_factory=Adaptive, metadata={"help": "find out what a backend really takes"}
    )
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    _in_flight: dict[_Server, int] = field(default_factory=dict, init=False, repr=False)
    _learners: dict[_Server, Learner] = field(default_factory=dict, init=False, repr=False)
    _fleet: Fleet | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_queue < 0:
            raise ValueError(f"max_queue: must be >= 0, got {self.max_queue}")
        if not 0 <= self.queue_timeout < math.inf:
            raise ValueError(f"queue_timeout: must be >= 0 and finite, got {self.queue_timeout}")
        if not 0 <= self.slow_start < math.inf:
            raise ValueError(f"slow_start: must be >= 0 and finite, got {self.slow_start}")

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        in_flight, room = self._in_flight, backend.max_in_flight
        server: _Server = backend.name
        if backend.joined:
            # Another server may have had the name, and its exchanges may still run.
            server, room = (backend.name, backend.joined), self._room(backend)
        taken = in_flight.get(server, 0)
        if self.adaptive.enabled:
            return self._admit_by_limit(exchange, server, taken, room)
        if taken >= room:
            return None
        in_flight[server] = taken + 1
        return _Slot(in_flight, server)

    def _admit_by_limit(
        self, exchange: Exchange, server: _Server, taken: int, room: int
    ) -> Permit | None:
        learner = self._learners.get(server)
        if learner is None:
            self._forget()
            learner = self._learners[server] = Learner(self.adaptive)
        if taken >= learner.bound(room):
            return None
        self._in_flight[server] = running = taken + 1
        return _WatchedSlot(self._in_flight, server, learner, learner.take(exchange, running))

    def _forget(self) -> None:
        """Keep only what was learnt of backends that are still there, or still at work."""
        if self._fleet is not None:
            here = {_server(candidate.backend) for candidate in self._fleet.candidates()}
            self._learners = {
                server: learner
                for server, learner in self._learners.items()
                if server in here or server in self._in_flight
            }

    @property
    def observe(self) -> Callable[[Exchange, Outcome], None] | None:
        """The phase, where there is something to learn; None: it is none."""
        return self._learn if self.adaptive.enabled else None

    def _learn(self, exchange: Exchange, outcome: Outcome) -> None:
        learner = self._learners.get(_server(outcome.backend))
        if learner is not None:
            learner.observe(exchange, outcome, self.clock())

    @asynccontextmanager
    async def lifespan(self, fleet: Fleet) -> AsyncIterator[None]:
        """See the fleet: what is known of a backend that has left it is not kept."""
        self._fleet = fleet
        yield
        self._fleet = None

    def concurrency_limit(self, backend: Backend) -> int:
        """How many may run on `backend` at once, as of now."""
        room = self._room(backend) if backend.joined else backend.max_in_flight
        learner = self._learners.get(_server(backend))
        return room if learner is None else learner.bound(room)

    def gauges(self) -> Iterable[Gauge]:
        if not self.adaptive.enabled or self._fleet is None:
            return
        told = "Requests at once that the backend is given, as found out."
        for candidate in self._fleet.candidates():
            backend = candidate.backend
            labels = (("backend", backend.name),)
            yield Gauge("concurrency_limit", told, self.concurrency_limit(backend), labels)

    def _room(self, backend: Backend) -> int:
        """The slots of a backend that joined."""
        age = self.clock() - backend.joined
        if age >= self.slow_start:
            return backend.max_in_flight
        return 1 + int((backend.max_in_flight - 1) * max(age, 0.0) / self.slow_start)

    def queue(self) -> QueueLimits:
        return QueueLimits(size=self.max_queue, timeout=self.queue_timeout)

    def in_flight(self, name: str) -> int:
        """Return how many slots are taken of whoever has, or had, the name."""
        counts = self._in_flight.items()
        return sum(
            count
            for server, count in counts
            if name == (server if isinstance(server, str) else server[0])
        )


def _server(backend: Backend) -> _Server:
    return (backend.name, backend.joined) if backend.joined else backend.name


class _Slot:
    """One exchange on a backend."""

    __slots__ = ("_in_flight", "_server")

    def __init__(self, in_flight: dict[_Server, int], server: _Server) -> None:
        self._in_flight = in_flight
        self._server: _Server | None = server  # None: given back

    def release(self) -> None:
        server = self._server
        if server is None:
            return
        self._server = None
        left = self._in_flight[server] - 1
        if left:
            self._in_flight[server] = left
        else:
            # Backends come and go: a name at zero must not stay for ever.
            del self._in_flight[server]


class _WatchedSlot(_Slot):
    """One whose end is told to who learns from it."""

    __slots__ = ("_learner", "_taken")

    def __init__(
        self, in_flight: dict[_Server, int], server: _Server, learner: Learner, taken: Taken
    ) -> None:
        super().__init__(in_flight, server)
        self._learner = learner
        self._taken = taken

    def release(self) -> None:
        if self._server is not None:
            self._learner.ended = self._taken
        super().release()
