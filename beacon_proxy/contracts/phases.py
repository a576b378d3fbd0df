"""The phases of a middleware: what it may do, and what it sees of the fleet."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .backend import Backend, Candidate, Candidates, Check
from .exchange import Exchange, Outcome, Permit


class Gauge(NamedTuple):
    """One number that a middleware shows in /metrics, as `beacon_<name>`."""

    name: str  # snake case, with its unit, without `_total`
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()  # name and value; from a bounded set
    counts: bool = False  # it only ever grows: shown as a counter, `beacon_<name>_total`


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How long and how many may wait when every admit refuses."""

    size: int = 100  # exchanges
    timeout: float = 10.0  # s


class Fleet(Protocol):
    """The live view of every backend, as `lifespan` sees it."""

    def candidates(self) -> list[Candidate]:
        """One new candidate a backend, in the order of the configuration."""
        ...

    async def changed(self, seen: int) -> int:
        """Wait until the fleet is not the one numbered `seen` any more; the number it has now.

        It is 0 at the start, and another each time that a backend has joined or left.
        """
        ...

    async def check(self, candidate: Candidate, seconds: float) -> Check | None:
        """Ask the backend the free question of its provider and note time and models in `live`.

        Returns None where the provider has no question that is free of cost. Never raises but
        `CancelledError`; the answer must come within `seconds`.
        """
        ...


class Prepare(Protocol):
    def prepare(self, exchange: Exchange) -> None:
        """Fill in what the client left open. Once an exchange, before the first plan."""
        ...


class Select(Protocol):
    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        """Keep, drop or reorder, best first. Before each attempt; synchronous; no I/O."""
        ...


class Admit(Protocol):
    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        """Take a slot on `backend` or refuse at once; asked best candidate first; never waits."""
        ...


class QueueRule(Protocol):
    def queue(self) -> QueueLimits:
        """How the core lets exchanges wait for room. Read once, at start."""
        ...


class Retry(Protocol):
    def retry(self, exchange: Exchange, outcome: Outcome) -> float | None:
        """Seconds to wait before another attempt, None to stop. The rule only: the core waits."""
        ...


class Observe(Protocol):
    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        """Learn from an attempt. Called once for each, after its permits are released."""
        ...


class Lifespan(Protocol):
    def lifespan(self, fleet: Fleet) -> AbstractAsyncContextManager[None]:
        """Work that lasts as long as the process: probes, refreshers."""
        ...


class Limits(Protocol):
    def concurrency_limit(self, backend: Backend) -> int:
        """How many this middleware lets run on `backend` at once, as of now.

        Asked when somebody reads, never by a request; what holds is still `admit`.
        """
        ...


class Measures(Protocol):
    def gauges(self) -> Iterable[Gauge]:
        """What this middleware shows of itself; asked when somebody reads, never by a request."""
        ...
