"""A provider: a family of backends, and the hooks that it may have beside what it must have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .backend import Backend, Check
from .exchange import Exchange, Prompt, Usage
from .words import Dialect, Fault, Finding, Headers

if TYPE_CHECKING:
    import aiohttp


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

    def billed(self, seconds: float, *, running: bool = False) -> None:
        """The provider says how many seconds it bills for this request.

        Without it they are counted by our own clock, from when `carry` is called to the end: so say
        0.0 until the work is taken. It may be called until the answer has ended, and the last word
        holds; where the work is still `running`, our clock goes on from there.
        """
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


class Workers(NamedTuple):
    """How many workers a backend's provider may keep."""

    min: int  # kept running, and paid for, even when nobody asks
    max: int


class Scales(Protocol):
    """A provider that can be told how many workers to keep."""

    def scalable(self, backend: Backend) -> str | None:
        """What keeps this backend from being scaled, as `key: problem`; None: nothing does."""
        ...

    async def kept(self, backend: Backend, session: aiohttp.ClientSession, seconds: float) -> int:
        """How many workers it is set to keep at least, whoever set it: `Workers.min`.

        Raises as `scale`.
        """
        ...

    async def scale(
        self, backend: Backend, workers: Workers, session: aiohttp.ClientSession, seconds: float
    ) -> None:
        """Set the bounds of the backend's own autoscaler, within `seconds`.

        Raises aiohttp's errors, OSError, or `ValueError` where the provider says no: its text is
        for the log, so it holds no credential.
        """
        ...


class Provider(Protocol):
    """A family of backends. One object a process; it holds no state of a request.

    A class that inherits from this one may leave out what has a body here; one that does not needs
    all of it.

    What it may have beside, each looked up by name as the phases of a middleware are: the
    methods of `Carries`, `Hops`, `Fields`, `Takes`, `Wakes` and `Scales`, two numbers,
    `cold_start` (s that its backends may take to start) and `stays_warm` (s after an answer
    that they surely stay warm), and `scales`: where it is true, a request beside others may
    meet a worker that has yet to start, so that the limits of a cold start hold for it, however
    warm the backend is. `control_schemes` are those of a `control_url` that it understands,
    where they are not http and https. Without `reads_session` being true, `Exchange.session`
    may stay None.
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
