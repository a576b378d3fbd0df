"""What `/inference` tells of an exchange: its fields, and what a failure is called."""

from __future__ import annotations

from time import time
from typing import Any

from ..contracts import Backend, Exchange, Fault
from ..errors import Limited, ModelNotFound, NoBackend, Overloaded, ProxyError, UpstreamError
from ..ops.telemetry import cost_usd
from .reader import Reader

_CODES: dict[type[ProxyError], str] = {
    NoBackend: "PROVIDER_UNAVAILABLE",
    Overloaded: "CAPACITY_EXCEEDED",
    ModelNotFound: "MODEL_NOT_FOUND",
    Limited: "LIMIT_EXCEEDED",
}
_FAULT_CODES = {
    Fault.TIMEOUT: "TIMEOUT",
    Fault.DEADLINE: "TIMEOUT",
    Fault.DNS: "CONNECTION_FAILED",
    Fault.REFUSED: "CONNECTION_FAILED",
    Fault.TLS: "CONNECTION_FAILED",
    Fault.RESET: "CONNECTION_FAILED",
    Fault.CLOSED: "CONNECTION_FAILED",
    Fault.MALFORMED: "INVALID_RESPONSE",
    Fault.NOT_JSON: "INVALID_RESPONSE",
    Fault.EMPTY: "INVALID_RESPONSE",
    Fault.TRUNCATED: "INCOMPLETE_RESPONSE",
    Fault.BUSY: "RATE_LIMITED",
    Fault.LOADING: "PROVIDER_WARMING",
    Fault.UNAUTHORIZED: "PROVIDER_UNAUTHORIZED",
    Fault.GONE: "PROVIDER_GONE",
}
# Asking again later may help: not where the credential, the app or the request is at fault.
_LASTING = frozenset({Fault.UNAUTHORIZED, Fault.GONE})


def failure_of(
    exchange: Exchange, reader: Reader, error: ProxyError | None
) -> dict[str, Any] | None:
    """What went wrong, as the portal shows it; None where nothing did."""
    last = exchange.attempts[-1] if exchange.attempts else None
    status = reader.status
    refused = status is not None and status >= 400
    if error is None and reader.problem is None and not refused:
        return None
    backend = last.backend if last is not None else None
    fault = last.fault if last is not None else None
    code, transient = _FAULT_CODES.get(fault, "PROVIDER_ERROR") if fault else "PROVIDER_ERROR", True
    message = reader.problem or "the backend failed"
    if error is not None:
        message = error.message
        if not isinstance(error, UpstreamError):
            code = _CODES.get(type(error), "PROVIDER_ERROR")
            transient = not isinstance(error, ModelNotFound)
    elif refused and status is not None and status < 500 and status not in (408, 429):
        code, transient = "REQUEST_REJECTED", False
    if fault in _LASTING and not isinstance(error, NoBackend | Overloaded):
        transient = False
    failure: dict[str, Any] = {
        "code": code,
        "stage": str(last.stage) if last is not None else "queue",
        "component": "provider" if last is not None else "router",
        "message": message,
        "provider": backend.name if backend else None,
        "provider_type": backend.provider if backend else None,
        "region": backend.region if backend else exchange.region,
        "model": exchange.model,
        "transient": transient,
        "timestamp": time(),
    }
    if last is not None and last.status is not None:
        failure["http_status"] = last.status
    wait = error.retry_after if error is not None else last.retry_after if last else None
    if wait is not None:
        failure["retry_after"] = wait
    return failure


def content_of(
    exchange: Exchange, reader: Reader, failure: dict[str, Any] | None
) -> dict[str, Any]:
    attempts = exchange.attempts
    last = attempts[-1] if attempts else None
    backend: Backend | None = last.backend if last is not None else None
    metadata: dict[str, Any] = {
        **reader.reading.extra,
        "provider_type": backend.provider if backend else None,
        "region": backend.region if backend else None,
        "model": exchange.model,
        "attempts": len(attempts),
    }
    usage = reader.reading.usage
    if usage is not None:
        metadata["tokens_generated"] = usage.output
        metadata["tokens_prompt"] = usage.input
    if failure is not None:
        metadata["failure"] = failure
    return {
        "success": failure is None,
        "response": reader.reading.text if failure is None else "",
        "error": failure["message"] if failure else None,
        "error_code": failure["code"] if failure else None,
        "failure": failure,
        "provider_used": backend.name if backend else None,
        "inference_time": last.duration if last is not None else 0.0,
        "cost_estimate": sum([cost_usd(outcome) for outcome in attempts], 0.0),
        "metadata": metadata,
    }
