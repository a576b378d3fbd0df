"""The words that every part of beacon-proxy shares, and the shapes of its plugins.

An *exchange* is one client request. It makes one or more *attempts*, each at one *backend*; the
record of an attempt is its *outcome*. A *candidate* is a backend still in the running for the next
attempt, a *permit* a slot taken on a backend, and *commit* the moment the first content of an
answer goes to the client: from there on nothing is retried.

Rule 1: this module imports the standard library and multidict alone, so that a plugin outside this
tree depends on nothing but it and `errors`.
Rule 2: plugins decide, the core moves bytes. No phase sees a body piece of an answer.
Rule 3: times are float seconds of the monotonic clock unless a name says `unix`; sizes are int
bytes; money is USD.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, dataclass_transform

if TYPE_CHECKING:
    import aiohttp

_T = TypeVar("_T")
Clock = Callable[[], float]
Headers = tuple[tuple[bytes, bytes], ...]  # as on the wire: order, case and repeats kept


class Notify(Protocol):
    def __call__(self, event: str, /, **fields: Any) -> None:
        """Tell the operator: one log line, and a live event for who listens on /ws.

        `event` is `noun.verb-past`, e.g. `backend.ejected`; fields carry their unit in their name.
        """
        ...


def tell_nobody(event: str, /, **fields: Any) -> None:
    """The `Notify` of a plugin that stands alone, as in its own test."""


class Dialect(StrEnum):
    """The API family that a path speaks; it fixes error shape, first content and end marker."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"
    BEACON = "beacon"  # the translated /inference route
    UNKNOWN = "unknown"


class Verdict(StrEnum):
    """What an outcome says about its backend; the four classes of failure are never mixed."""

    GOOD = "good"
    CALLER = "caller"  # a 4xx: the request is at fault, nothing is learnt about the backend
    BUSY = "busy"  # back-pressure (429, 503): step aside for `retry_after`, no strike
    STRIKE = "strike"  # 5xx, transport, stall, malformed
    NEUTRAL = "neutral"  # the client left, or its deadline passed


class Stage(StrEnum):
    """How far an attempt had come when it ended."""

    QUEUE = "queue"
    CONNECT = "connect"
    SEND = "send"
    HEAD = "head"  # sent, no answer head yet
    CONTENT = "content"  # head seen, first content not yet
    STREAM = "stream"  # committed
    DONE = "done"


class Fault(StrEnum):
    """Why an attempt did not end well; bounded, so it may be a metric label."""

    DNS = "dns"
    REFUSED = "refused"
    TLS = "tls"
    TIMEOUT = "timeout"
    RESET = "reset"
    CLOSED = "closed"  # an orderly close where more had to come
    MALFORMED = "malformed"  # not HTTP, or framing that cannot be trusted
    TRUNCATED = "truncated"  # the message ended, its dialect's end marker never came
    EMPTY = "empty"  # a 200 that says nothing
    NOT_JSON = "not_json"  # e.g. a captive portal's 200
    ERROR_BODY = "error_body"  # an error behind a 200
    STATUS = "status"  # the backend answered with an error status
    BUSY = "busy"  # it answered that it has no room
    LOADING = "loading"  # it answered that its model is not ready yet
    UNAUTHORIZED = "unauthorized"  # it refused the credential that this proxy holds for it
    GONE = "gone"  # the app or endpoint behind the URL does not exist (any more)
    DEADLINE = "deadline"  # the client's own deadline, or the total time, ran out
    CLIENT_CLOSED = "client_closed"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault, with what its provider knows of it beside."""

    fault: Fault
    detail: str = ""  # for the log, and a client that gets no answer; no body, no credential
    retry_after: float | None = None  # s, where the answer itself does not say


class Warmth(StrEnum):
    """Whether a backend has its model in memory, as far as that is known without asking for it."""

    WARM = "warm"
    COLD = "cold"  # scaled to zero or unloaded: the next request pays for a start
    WARMING = "warming"  # it said that it is starting
    UNKNOWN = "unknown"


class End(StrEnum):
    """How an exchange ended: exactly one of these, always."""

    COMPLETE = "complete"
    ERROR = "error"  # an explicit error, or a visibly broken stream
    CLIENT_CLOSED = "client_closed"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of one attempt; 0 switches one off."""

    connect: float = 2.0  # s, TCP and TLS
    first_content: float = 120.0  # s, from sending to the first content of a stream, or to any head
    document: float = 600.0  # s, a whole answer that is not streamed
    idle: float = 60.0  # s, between two pieces, either way
    total: float = 0.0  # s, the whole exchange
    cold_start: float = 0.0  # s, first_content while not known to be warm; 0: no other limit

    def while_cold(self) -> Timeouts:
        """The limits of an attempt at a backend that may have to start first."""
        if not self.cold_start:
            return self
        longer = {
            name: max(getattr(self, name), self.cold_start) if getattr(self, name) else 0.0
            for name in ("first_content", "document")
        }
        return replace(self, **longer)


@dataclass(frozen=True, slots=True)
class Backend:
    """One GPU server as configured: facts, no state."""

    name: str
    provider: str
    url: str  # as configured, for messages to the operator only
    scheme: str  # http | https
    host: str  # no brackets around an IPv6 address
    port: int
    base_path: str = ""  # no trailing slash
    region: str = ""  # canonical
    region_assumed: bool = False  # nobody said where it runs: `region` is that of this instance
    pool: str = "burst"  # baseline | burst
    price_model: str = "serverless"  # serverless | rented
    price_per_second: float = 0.0  # USD that a second of work costs more than a second of none
    idle_price_per_second: float = 0.0  # USD, paid busy or idle (rented)
    rented_until_unix: float = inf  # s: who uses a rented one beyond that hires it anew
    max_in_flight: int = 8
    models: frozenset[str] | None = None  # canonical, as configured, aliases too; None: ask
    model_names: tuple[str, ...] = ()  # the same as configured, less the aliases
    api_key: str = field(default="", repr=False)
    kind: str = "auto"
    headers: Headers = field(default=(), repr=False)  # added to each request to this backend
    timeouts: Timeouts = Timeouts()
    cold_timeouts: Timeouts | None = None  # while not known to be warm; None: as `timeouts`
    stays_warm: float = inf  # s after an answer; from then on it is held to be cold
    tls_verify: bool = True
    tls_ca_file: str | None = None
    control_url: str = ""  # where free health lives; "": derived by the provider
    aliases: tuple[tuple[str, str], ...] = ()  # a client's name of a model: this backend's
    joined: float = 0.0  # monotonic s at which discovery found it; 0: it was there from the start

    def unrented(self) -> Backend:
        """What it is once its agreement is over: a second of work costs what the rent did."""
        return replace(self, price_per_second=self.idle_price_per_second, idle_price_per_second=0.0)

    @property
    def origin(self) -> str:
        """Scheme, host and port as a URL begins, for questions to the backend."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}" + ("" if usual else f":{self.port}")


class ColdStarts:
    """What the last cold starts of one backend took."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=64)

    def __len__(self) -> int:
        return len(self._last)

    def note(self, seconds: float) -> None:
        self._last.append(seconds)

    def quantile(self, q: float) -> float | None:
        """Seconds, by the nearest rank; None while none was seen."""
        ranked = sorted(self._last)
        return ranked[min(int(q * len(ranked)), len(ranked) - 1)] if ranked else None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a provider tells of a backend's workers; None: it does not say."""

    running: int | None = None  # workers with the model in memory
    idle: int | None = None  # scaled down: free of cost, and to be started
    starting: int | None = None
    throttled: int | None = None  # wanted, but their host has no free GPU
    unhealthy: int | None = None
    queued: int | None = None  # requests that wait for a worker
    room: int | None = None  # further requests that would run at once


@dataclass(slots=True)
class Live:
    """What is known of one backend right now. The core writes traffic, health writes health."""

    in_flight: int = 0
    picked: int = 0  # attempts begun, ever: the round-robin tie-break
    healthy: bool = True
    ejected_until: float = 0.0  # monotonic s; 0: not ejected
    resting_until: float = 0.0  # monotonic s: it asked to be left alone (Retry-After)
    last_check: float = 0.0  # unix s; 0: never
    check: Check | None = None  # the last one
    check_latency: float | None = None  # s
    models: frozenset[str] | None = None  # canonical, as found, with aliases; None: not known
    model_names: tuple[str, ...] = ()  # the same as the backend spells them
    listed: tuple[str, ...] | None = None  # what it last listed itself; None: it never did
    names: dict[str, str] = field(default_factory=dict)  # a client's name of a model: its own
    hot: frozenset[str] | None = None  # canonical names it has in memory; None: not known
    capacity: Capacity | None = None  # as its provider last told
    warmth: Warmth = Warmth.UNKNOWN  # as last learnt; `warmth_at` says what holds now
    warmth_until: float = inf  # monotonic s: how long that is believed
    cold_from: float = inf  # monotonic s; before it nobody need ask `cold_at`
    cold_starts: ColdStarts = field(default_factory=ColdStarts)
    lacking: dict[str, float] = field(default_factory=dict)  # model it said it lacks: until (s)
    latency: float | None = None  # s, moving average of the first-content time of good attempts
    duration: float = 0.0  # s, moving average of the whole time of good attempts
    success: float = 1.0  # 0..1, moving average over good attempts and strikes
    last_used: float = 0.0  # monotonic s of the last outcome

    def learn_warmth(self, warmth: Warmth, until: float) -> None:
        """Note what was learnt, and until when (monotonic s) it is to be believed."""
        self.warmth, self.warmth_until = warmth, until
        if warmth is Warmth.WARM:
            self.cold_from = until
        else:
            self.cold_from = inf if warmth is Warmth.UNKNOWN else 0.0

    def cold_at(self, now: float) -> bool:
        """Whether it is held to have to start first; for rankers, behind a look at `cold_from`."""
        warmth = self.warmth_at(now)
        return warmth is Warmth.COLD or warmth is Warmth.WARMING

    def warmth_at(self, now: float) -> Warmth:
        """Whether it is warm now: who was warm and heard nothing for long is held to be cold."""
        if now < self.warmth_until:
            return self.warmth
        return Warmth.COLD if self.warmth is Warmth.WARM else Warmth.UNKNOWN


@dataclass(slots=True)
class Candidate:
    """A backend in the running for one attempt. Made anew for each plan: a select may write it."""

    backend: Backend
    live: Live
    priority: int = 0  # 0 first; higher ones are for spill-over
    distance: int = 0  # between regions; breaks ties inside a priority
    last_resort: bool = False  # offered only because nothing better is left (panic)


Candidates = Sequence[Candidate]  # best first


@dataclass_transform(frozen_default=True)
def _fact(cls: type[_T]) -> type[_T]:
    """Make a slotted dataclass that type checkers hold to be frozen.

    At run time it is not: a frozen one costs a call for each field of each new object, 2 us for an
    outcome, and there is one for every attempt.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@_fact
class Usage:
    """Tokens as the backend itself counted them."""

    input: int = 0
    output: int = 0


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
    session: str | None = None  # what the client calls its conversation, for affinity
    prompt: Prompt | None = None  # set on the translated route alone
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


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How long and how many may wait when every admit refuses."""

    size: int = 100  # exchanges
    timeout: float = 10.0  # s


@dataclass(frozen=True, slots=True)
class Check:
    """What a free question to a backend found out."""

    verdict: Verdict  # GOOD: answers; BUSY: alive, not ready; STRIKE: down; NEUTRAL: cannot tell
    latency: float | None = None  # s
    models: tuple[str, ...] | None = None  # as the backend spells them; None: it did not say
    fault: Fault | None = None
    retry_after: float | None = None  # s
    detail: str = ""
    warmth: Warmth | None = None  # None: it cannot tell
    capacity: Capacity | None = None
    hot: tuple[str, ...] | None = None  # models in memory, as the backend spells them
    kind: str | None = (
        None  # which of its provider's kinds a backend of kind `auto` was found to be
    )


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


@dataclass(frozen=True, slots=True)
class Call:
    """A request that a provider makes up for the translated route."""

    target: bytes  # on the backend, base path included; `/…`, without dot segments
    body: bytes
    dialect: Dialect
    headers: Headers = ((b"Content-Type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Reading:
    """Text and counts read from an answer, or from one event of a streamed answer."""

    text: str = ""
    done: bool = False
    usage: Usage | None = None
    error: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # receipts and the like, for `metadata`


@dataclass(frozen=True, slots=True)
class Hop:
    """What an answer that is not yet the answer asks for; see `Hops`."""

    # Of a GET on the same backend, in origin form (`/…`, no dot segments); None: the same request
    # once more, for the backend is starting.
    target: bytes | None = None
    delay: float = 0.0  # s to wait before
    starting: bool = True  # False, without a target: nothing ran, and there is another way to it


@dataclass(frozen=True, slots=True)
class Submission:
    """One request, for a provider that takes it to its backend by an API of its own."""

    id: str
    method: str
    path: str
    target: bytes  # as the client sent it
    headers: Headers  # of the client, less hop-by-hop and hints
    body: bytes  # whole, up to `max_body_size`; to parse a large one would hold up every stream
    dialect: Dialect
    stream: bool
    prompt: Prompt | None  # of the translated route: then there is no body
    deadline: float  # monotonic s; inf: none
    patience: float  # s that it may take until the first content, a cold start included; inf: any


class Reply(Protocol):
    """The answer that a provider's own transport puts together, as HTTP would have brought it.

    It is judged, held and relayed like any other: a stream by its Content-Type (`text/event-stream`
    or `application/x-ndjson`) and by the end marker of the path's dialect. On the translated route
    it is a JSON object, or NDJSON whose last line says `"done": true`; `Provider.read` reads it.
    Exactly one of `end` and `fail` is called; after either, and once nobody wants the answer any
    more, the calls do nothing.
    """

    def head(self, status: int, headers: Headers) -> None:
        """The status, 200 to 599, and the fields, before any piece; it goes out chunked.

        Where the answer can have no body (204, 304, the answer to a HEAD) the pieces are dropped.
        Any other status, and a field that is no line, is a broken answer: the task is cancelled.
        """
        ...

    def piece(self, data: bytes) -> None: ...

    def end(self) -> None:
        """All of the answer has been told; before its head that is a broken answer."""
        ...

    def fail(self, fault: Fault, detail: str = "") -> None:
        """There is no answer, or no more of it.

        `detail` is one line for the log, and for the client where no other backend answers: the
        message of a 502 or 504. No address, no credential, nothing of a body.
        """
        ...

    async def room(self) -> None:
        """Wait while the client takes nothing; to be awaited between two pieces."""
        ...

    def waking(self) -> None:
        """The backend is not warm, as was believed: the limits of a cold start hold."""
        ...

    def started_cold(self, seconds: float) -> None:
        """The provider says how long the request waited for the backend to start."""
        ...

    def left_behind(self, what: str) -> None:
        """Work that may still run at the backend, and be paid for, though nobody waits for it.

        Told to the operator; may be called after the answer was given up.
        """
        ...


class Carries(Protocol):
    """A provider with a transport of its own, such as a queue of jobs."""

    def carries(self, backend: Backend) -> bool:
        """Whether this backend is reached by `carry`; else the core speaks HTTP to it."""
        ...

    async def carry(
        self,
        backend: Backend,
        submission: Submission,
        reply: Reply,
        session: aiohttp.ClientSession,
    ) -> None:
        """Take one request to the backend and put its answer into `reply`.

        The body is whole, however large, and counts as held until this ends. Where it fails, or is
        cancelled, another backend may be asked at once: see that the work is stopped. Cancelled
        when nobody wants the answer any more, or a limit ran out: then there are `CLEAN_UP` seconds
        to stop it at the backend before the cancellation goes on.
        aiohttp's errors and OSError may pass through; they become the fault they tell of.
        """
        ...


CLEAN_UP = 5.0  # s


class Hops(Protocol):
    """A provider whose answers may say where, or when, the real answer is to be had."""

    def hop(
        self, backend: Backend, status: int, headers: Headers, body: bytes, target: bytes, hops: int
    ) -> Hop | None:
        """What to do before this answer counts as one; None: it counts.

        Asked for answers of status 300 and above that are not yet passed on. `target` is what was
        asked for last (the client's own at first), `hops` how often in a row this request hopped on
        an answer of this status.

        A `target` says that the work has been taken, and where its result will be: it is never
        done elsewhere after that, unless the result itself says that it failed. What has not come
        when its time is over is a 504, and where no connection holds, a 502.

        Without one the same request is repeated, if it may be and the backend has not left, unless
        another candidate is known to be warm and to have room, and the retry rules let it go there.
        When its time is over the last answer stands. Where the backend is not `starting` it goes
        there at once by whatever way the provider has now: `carries` is asked anew.
        """
        ...


class Fields(Protocol):
    """A provider that adds header fields to some requests."""

    def fields(self, backend: Backend, exchange: Exchange) -> Headers:
        """Fields that replace the client's of the same names, for this request."""
        ...


class Takes(Protocol):
    """A provider whose backends cannot take every request."""

    def takes(self, backend: Backend, exchange: Exchange) -> bool:
        """Whether this backend is a candidate for the exchange at all."""
        ...


class Wakes(Protocol):
    """A provider whose `check` may reach the backend itself."""

    def wakes(self, backend: Backend) -> bool:
        """Whether `check` would start it: then it is asked only while traffic keeps it warm."""
        ...


class Provider(Protocol):
    """A family of backends. One object a process; it holds no state of a request.

    A class that inherits from this one may leave out what has a body here; one that does not needs
    all of it.

    What it may have beside, each looked up by name as the phases of a middleware are: the methods
    of `Carries`, `Hops`, `Fields`, `Takes` and `Wakes`, two numbers, `cold_start` (s that its
    backends may take to start) and `stays_warm` (s after an answer that they surely stay warm), and
    `scales`: where it is true, a request beside others may meet a worker that has yet to start, so
    that the limits of a cold start hold for it, however warm the backend is. `control_schemes` are
    those of a `control_url` that it understands, where they are not http and https. Without
    `reads_session` being true, `Exchange.session` may stay None.
    """

    name: str
    price_per_second: float  # USD, the default of its backends
    pool: str  # baseline | burst, likewise
    kinds: tuple[str, ...] = ("auto",)  # values of a backend's `kind`; the first is the default
    environment: tuple[str, ...] = ()  # variables that `from_environment` reads

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        """Backend rows (the keys of `backends` in beacon.yaml) that the environment alone gives.

        `region` is this instance's. Raises `ConfigError` naming the variable.
        """
        return []

    def target(self, backend: Backend, target: bytes) -> bytes:
        """The request-target on the backend for a client's target; its bytes are kept."""
        return backend.base_path.encode() + target

    def credentials(self, backend: Backend) -> Headers:
        """Headers that replace the client's of the same names; none without an `api_key`.

        An empty value takes the client's header away and sends none.
        """
        return ((b"Authorization", b"Bearer " + backend.api_key.encode()),) * bool(backend.api_key)

    def judge(
        self, backend: Backend, status: int, headers: Headers, body: bytes
    ) -> Fault | Finding | None:
        """Name what only this family's answers can mean; None: the core's own rules hold.

        `body` is the held beginning of the answer.
        """
        return None

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        """Ask a question that costs nothing and wakes nothing; None where there is none.

        The caller bounds the time and turns transport errors into a `Check`.
        """
        return None

    def problem(self, backend: Backend) -> str | None:
        """What makes this backend unusable as configured, as `key: problem`; None: nothing does."""
        return None

    @abstractmethod
    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        """Turn an `/inference` request into what this backend speaks."""
        ...

    @abstractmethod
    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        """Read a whole answer, or one event of a streamed one, back into text."""
        ...


def canonical_model(name: str) -> str:
    """One spelling for one model: `llama3.2:1b` and `llama3.2-1b` are the same."""
    canonical = name.strip().lower().replace(":", "-")
    return canonical.removesuffix("-latest")
