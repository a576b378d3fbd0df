"""The words that every part shares: how things are called, told and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

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


def canonical_model(name: str) -> str:
    """One spelling for one model: `llama3.2:1b` and `llama3.2-1b` are the same."""
    canonical = name.strip().lower().replace(":", "-")
    return canonical.removesuffix("-latest")
