"""Errors that carry what the client must be told; the server maps them and never reads their text.

`ProxyError` is raised by the core and by plugins. A foreign exception is translated once, at the
I/O call that raised it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from .contracts import Fault, Stage


class ProxyError(Exception):
    """An error of the proxy's own making.

    Attributes:
        status: HTTP status for the client.
        reason: a slug, bounded, for `code`, logs and metric labels.
        retry_after: s, sent as `Retry-After`.
    """

    status = 500
    reason = "internal_error"

    def __init__(
        self, message: str, *, reason: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        if reason is not None:
            self.reason = reason


class BadRequest(ProxyError):
    status = 400
    reason = "invalid_request"


class RequestTimeout(ProxyError):
    status = 408
    reason = "request_timeout"


class BodyTooLarge(ProxyError):
    status = 413
    reason = "request_too_large"


class HeadTooLarge(ProxyError):
    status = 431
    reason = "request_header_too_large"


class ModelNotFound(ProxyError):
    status = 404
    reason = "model_not_found"


class MethodNotAllowed(ProxyError):
    status = 405
    reason = "method_not_allowed"


class Limited(ProxyError):
    status = 429
    reason = "rate_limited"


class BudgetExceeded(Limited):
    """No budget that covers a backend has room for what the exchange is expected to cost there."""

    reason = "budget_exceeded"


class NoBackend(ProxyError):
    """No backend may take this exchange: none healthy, or none in a required region."""

    status = 503
    reason = "no_backend"


class Overloaded(ProxyError):
    """Every backend that may take this exchange is full and the wait for room is over."""

    status = 503
    reason = "overloaded"


class UpstreamError(ProxyError):
    """An attempt failed before an answer.

    Attributes:
        fault, stage: what went wrong and how far the attempt had come.
        sent: whether some byte of the request may have reached the backend.
    """

    def __init__(self, fault: Fault, stage: Stage, detail: str = "", *, sent: bool = False) -> None:
        late = fault in (Fault.TIMEOUT, Fault.DEADLINE)
        reason = "upstream_timeout" if late else "upstream_error"
        super().__init__(detail or f"{fault} at {stage}", reason=reason)
        self.status = 504 if late else 502
        self.fault, self.stage, self.sent = fault, stage, sent


class ConfigError(Exception):
    """Configuration that cannot be used; holds every problem at once.

    Attributes:
        problems: lines such as `middleware.health.base_ejection_time: must be > 0, got -1`.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def told(exc: BaseException) -> str:
    """An exception of a plugin, or of ours, for the log: what it is and where it was raised.

    Not what it says: that may quote a key, a body or a URL.
    """
    frames = traceback.extract_tb(exc.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(exc).__name__}{where}"
