"""One client request, its attempts, and what is taken for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Protocol, TypeVar, dataclass_transform

from .backend import Backend
from .words import Dialect, Fault, Headers, Stage, Verdict

_T = TypeVar("_T")

# The `Exchange.work` of every POST on a path that we do not know. One for all, for clients make up
# paths; no model has it, for canonical names are in lower case.
OTHER_POST = "POST"


@dataclass_transform(frozen_default=True)
def _fact(cls: type[_T]) -> type[_T]:
    """Make a slotted dataclass that type checkers hold to be frozen.

    At run time it is not: a frozen one costs a call for each field of each new object, 2 us for an
    outcome, and there is one for every attempt.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@_fact
class Usage:
    """Tokens, as the backend itself counted them where it does."""

    input: int = 0  # all of the prompt, from a cache or not
    output: int = 0
    estimated: bool = False  # one of them was not told: counted from what passed
    # Parts of the input, together never more than it: a price of their own may hold for them.
    cached: int = 0  # from the backend's prompt cache
    cache_written: int = 0  # put there


@_fact
class Outcome:
    """The record of one attempt, made when it ends, whatever its end."""

    backend: Backend
    number: int  # 1 for the first attempt of the exchange
    verdict: Verdict
    stage: Stage
    fault: Fault | None = None
    status: int | None = None  # of the backend's answer, where one came
    retry_after: float | None = None  # s, as the backend asked
    sent: bool = False  # some byte of the request may have reached the backend
    committed: bool = False
    repeatable: bool = False  # the rules of HTTP and of the route allow another attempt
    started: float = 0.0  # monotonic s
    ttft: float | None = None  # s from the start to the first content
    duration: float = 0.0  # s
    bytes_in: int = 0  # body bytes of the answer
    usage: Usage | None = None
    detail: str = ""  # for the log; no body, no credential
    cold_start: float | None = None  # s that the backend took to start, where it had to
    billed: float = 0.0  # s that are paid for: as the provider reports, else by our clock
    usd: float = 0.0  # what it cost, by `billed` or by `usage`
    expected_usd: float = 0.0  # what it was expected to cost before it was made


@dataclass(frozen=True, slots=True)
class Prompt:
    """A validated `/inference` request."""

    model: str
    prompt: str
    temperature: float = 0.1
    max_tokens: int = 512
    stream: bool = False


@dataclass(slots=True)
class Exchange:
    """One client request, from its head to its end."""

    id: str
    method: str
    target: bytes  # the request-target as it came
    path: str  # the target up to `?`, not normalised
    headers: Headers
    started: float  # monotonic s
    client: str = ""  # address
    dialect: Dialect = Dialect.UNKNOWN
    inference: bool = False  # a route whose request may be repeated: no side effect but cost
    model: str | None = None  # as the client spells it
    stream: bool = False  # the client asked for a stream
    body: bytes | None = None  # whole; None while it streams or once it is past the replay cap
    region: str | None = None  # preferred, canonical
    region_mode: str | None = None  # prefer | require; None: as configured
    cost_priority: bool | None = None
    deadline: float | None = None  # monotonic s
    max_price: float | None = None  # USD
    trace_id: str | None = None
    tenant: str | None = None  # who asks, hashed, where `limits.tenant_header` says how it is told
    session: str | None = None  # what the client calls its conversation, for affinity
    prompt: Prompt | None = None  # set on the translated route alone
    # What its cost and time are compared with: inference by the canonical model, "" where that is
    # not known; `OTHER_POST` where a path that we do not know may run a model; None: it runs none.
    # Set by the core after `prepare`.
    work: str | None = None
    deadline_is_ours: bool = False  # set by the proxy, not by the client
    attempts: list[Outcome] = field(default_factory=list)
    answered: Backend | None = None  # whose answer was committed
    spare: int = 0  # candidates that stand ready beside the current one

    def ends_on(self, backend: Backend) -> float:
        """When it must be over if `backend` answers it; monotonic s, inf: never."""
        total = backend.timeouts.total
        own = self.started + total if total else inf
        return own if self.deadline is None else min(own, self.deadline)

    @property
    def safe(self) -> bool:
        """Whether the method only reads (RFC 9110 9.2.1)."""
        return self.method in _SAFE

    @property
    def may_repeat(self) -> bool:
        """Whether a request that was sent, and got no answer, may be sent again (9.2.2)."""
        return self.inference or self.method in _IDEMPOTENT


_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PROPFIND"})
_IDEMPOTENT = _SAFE | {"PUT", "DELETE"}


class Permit(Protocol):
    """A taken slot."""

    def release(self) -> None:
        """Give the slot back. Called once, synchronously, on every path out of an attempt."""
        ...


class _NoSlot:
    __slots__ = ()

    def release(self) -> None:
        """Give back nothing."""


NO_SLOT: Permit = _NoSlot()  # what an admit returns that lets in without taking anything
