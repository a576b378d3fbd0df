"""A backend: the facts as configured, and what is known of it right now."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple, Protocol, Self

from .words import Fault, Headers, Verdict, Warmth

WARMING_TIME = 600.0  # s that "it is starting" is believed without further news


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


class Tokens(Protocol):
    """What tokens are paid for: a `Usage` as it was counted, or the averages of a `Typical`."""

    @property
    def input(self) -> float: ...

    @property
    def output(self) -> float: ...

    @property
    def cached(self) -> float: ...

    @property
    def cache_written(self) -> float: ...


class _Prices(NamedTuple):
    input: float  # USD a token
    output: float
    cached_input: float  # of the input, what the backend took from its prompt cache
    cache_write: float  # of the input, what it put there


class TokenPrice(_Prices):
    """A price by tokens instead of seconds; of a cache it is that of input, where none is named."""

    __slots__ = ()

    def __new__(
        cls,
        input: float,
        output: float,
        cached_input: float | None = None,
        cache_write: float | None = None,
    ) -> Self:
        cached_input = input if cached_input is None else cached_input
        cache_write = input if cache_write is None else cache_write
        return super().__new__(cls, input, output, cached_input, cache_write)

    def usd(self, tokens: Tokens) -> float:
        """What they cost; the one place where tokens become money."""
        cached, written = tokens.cached, tokens.cache_written
        fresh = tokens.input - cached - written
        if fresh < 0.0:  # averages are rounded, so they may be a hair above their sum
            fresh = 0.0
        return (
            fresh * self.input
            + cached * self.cached_input
            + written * self.cache_write
            + tokens.output * self.output
        )


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
    token_price: TokenPrice | None = None  # where tokens are billed; a second then costs nothing
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


@dataclass(slots=True)
class Typical:
    """What a good attempt took of late: moving averages."""

    billed: float = 0.0  # s, without a cold start
    input: float = 0.0  # tokens
    output: float = 0.0
    cached: float = 0.0  # tokens of the input that came from the backend's prompt cache
    cache_written: float = 0.0  # tokens of the input that were put there
    at: float = inf  # monotonic s: when the newest ended; inf: it is no news of ours
    # s that about the quickest one in a thousand took in all, without a cold start. It begins far
    # below, so that little is claimed before some thousand were seen; 0: none was.
    quickest: float = 0.0
    risked: float = -inf  # monotonic s: when one that had less time was last let through


@dataclass(frozen=True, slots=True)
class Recent:
    """How the backends of one region and provider did over the last five minutes."""

    ttft_p50: float | None = None  # s; None: no good answer
    ttft_p95: float | None = None
    duration_p50: float | None = None  # s
    success: float | None = None  # 0..1; None: nothing that says
    tokens_per_second: float | None = None  # output tokens, by seconds after the first content


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


@dataclass(slots=True)
class Live:
    """What is known of one backend right now. The core writes traffic, health writes health."""

    in_flight: int = 0
    occupied: float = 0.0  # s: the ends of its attempts less their starts; see `taken`
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
    typical: dict[str | None, Typical] = field(default_factory=dict)  # by `Exchange.work`
    usual: Typical | None = None  # the same of all inference, whatever its model
    recent: Recent | None = None  # of its region and provider; None: not known yet
    success: float = 1.0  # 0..1, moving average over good attempts and strikes
    last_used: float = 0.0  # monotonic s of the last outcome

    def taken(self, now: float) -> float:
        """Seconds that its attempts took until now (monotonic s), those that run among them.

        What it grew by is the integral of `in_flight`.
        """
        return self.occupied + self.in_flight * now

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
