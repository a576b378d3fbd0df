"""What `/inference` tells of an exchange: its fields, and what a failure is called."""

from __future__ import annotations

from time import time
from typing import Any

from ..contracts import Backend, Exchange, Fault, Outcome, Verdict
from ..errors import (
    BudgetExceeded,
    Limited,
    ModelNotFound,
    NoBackend,
    Overloaded,
    ProxyError,
    UpstreamError,
)
from .reader import Reader

_CODES: dict[type[ProxyError], str] = {
    NoBackend: "PROVIDER_UNAVAILABLE",
    Overloaded: "CAPACITY_EXCEEDED",
    ModelNotFound: "MODEL_NOT_FOUND",
    Limited: "LIMIT_EXCEEDED",
    BudgetExceeded: "BUDGET_EXCEEDED",
}
# What each fault is called, and whether asking again later may help: not where a credential, an
# app or an address is wrong. A status is only looked at where the fault says nothing better.
_FAULT_CODES: dict[Fault, tuple[str, bool]] = {
    Fault.DNS: ("CONNECTION_FAILED", True),
    Fault.REFUSED: ("CONNECTION_FAILED", True),
    Fault.TLS: ("CONNECTION_FAILED", True),
    Fault.RESET: ("CONNECTION_FAILED", True),
    Fault.CLOSED: ("CONNECTION_FAILED", True),
    Fault.TIMEOUT: ("TIMEOUT", True),
    Fault.DEADLINE: ("TIMEOUT", True),
    Fault.MALFORMED: ("INVALID_RESPONSE", True),
    Fault.NOT_JSON: ("INVALID_RESPONSE", True),
    Fault.EMPTY: ("INVALID_RESPONSE", True),
    Fault.TRUNCATED: ("INCOMPLETE_RESPONSE", True),
    Fault.ERROR_BODY: ("PROVIDER_ERROR", True),
    Fault.LOADING: ("PROVIDER_WARMING", True),
    Fault.UNAUTHORIZED: ("PROVIDER_UNAUTHORIZED", False),
    Fault.GONE: ("PROVIDER_GONE", False),
    Fault.CLIENT_CLOSED: ("CLIENT_CLOSED", True),
}
_STATUS_CODES: dict[int, tuple[str, bool]] = {
    303: ("RESULT_PENDING", True),  # still at work where it was followed to (Modal, after 150 s)
    401: ("REQUEST_UNAUTHORIZED", False),  # the client's own credential
    402: ("PAYMENT_REQUIRED", False),
    403: ("REQUEST_UNAUTHORIZED", False),
    404: ("NOT_FOUND", False),  # the model, or the route
    405: ("NOT_SUPPORTED", False),
    408: ("TIMEOUT", True),
    424: ("PROVIDER_ERROR", True),  # TGI: the generation failed
    425: ("RATE_LIMITED", True),
    429: ("RATE_LIMITED", True),
    499: ("PROVIDER_ERROR", True),  # Ollama: cancelled, but not by us
    501: ("NOT_SUPPORTED", False),
    503: ("PROVIDER_BUSY", True),
    504: ("TIMEOUT", True),
    524: ("TIMEOUT", True),  # Cloudflare's, before RunPod
    529: ("PROVIDER_BUSY", True),  # Anthropic's
}


def code_of(fault: Fault | None, status: int | None) -> tuple[str, bool]:
    """What a failed attempt is called, and whether asking again later may help."""
    if fault is Fault.BUSY:
        return ("RATE_LIMITED" if status == 429 else "PROVIDER_BUSY"), True
    if fault in _FAULT_CODES:
        return _FAULT_CODES[fault]
    if status in _STATUS_CODES:
        return _STATUS_CODES[status]
    if status is not None and 300 <= status < 400:
        return "REDIRECTED", False  # its url is not the right one
    if status is not None and 400 <= status < 500:
        return "REQUEST_REJECTED", False
    return "PROVIDER_ERROR", True


def failure_of(
    exchange: Exchange, reader: Reader, error: ProxyError | None
) -> dict[str, Any] | None:
    """What went wrong, as the portal shows it; None where nothing did."""
    if error is None and reader.problem is None:
        return None
    shown = _shown(exchange)
    backend = shown.backend if shown is not None else None
    code, transient = "PROVIDER_ERROR", True
    message = reader.problem or "the backend failed"
    if shown is not None:
        code, transient = code_of(reader.fault or shown.fault, shown.status)
        if not transient and shown.verdict is not Verdict.CALLER:
            transient = any(code_of(each.fault, each.status)[1] for each in exchange.attempts)
    if error is not None:
        message = error.message
        if not isinstance(error, UpstreamError):
            code, transient = _own_code(error)
        elif shown is None:
            code, transient = code_of(error.fault, None)
    failure: dict[str, Any] = {
        "code": code,
        "stage": str(shown.stage) if shown is not None else "queue",
        "component": "provider" if shown is not None else "router",
        "message": message,
        "provider": backend.name if backend else None,
        "provider_type": backend.provider if backend else None,
        "region": backend.region if backend else exchange.region,
        "model": exchange.model,
        "transient": transient,
        "timestamp": time(),
    }
    if shown is not None and shown.status is not None:
        failure["http_status"] = shown.status
    waits = (error.retry_after if error else None, shown.retry_after if shown else None)
    wait = next((wait for wait in waits if wait is not None), None)
    if wait is not None:
        failure["retry_after"] = wait
    return failure


def _shown(exchange: Exchange) -> Outcome | None:
    """The attempt that is told of: whose answer was passed on, else the last."""
    attempts = exchange.attempts
    told = [each for each in attempts if each.backend is exchange.answered] or attempts
    return told[-1] if told else None


def _own_code(error: ProxyError) -> tuple[str, bool]:
    """Of an error that is no backend's."""
    if type(error) in _CODES:
        return _CODES[type(error)], not isinstance(error, ModelNotFound)
    refused = 400 <= error.status < 500 and error.status not in (408, 429)
    return ("REQUEST_REJECTED", False) if refused else ("PROVIDER_ERROR", True)


def content_of(
    exchange: Exchange, reader: Reader, failure: dict[str, Any] | None
) -> dict[str, Any]:
    attempts = exchange.attempts
    shown = _shown(exchange)
    backend: Backend | None = shown.backend if shown is not None else None
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
    if shown is not None and shown.cold_start is not None:
        metadata["cold_start"] = shown.cold_start  # s
    if failure is not None:
        metadata["failure"] = failure
    return {
        "success": failure is None,
        "response": reader.reading.text if failure is None else "",
        "error": failure["message"] if failure else None,
        "error_code": failure["code"] if failure else None,
        "failure": failure,
        "provider_used": backend.name if backend else None,
        "inference_time": shown.duration if shown is not None else 0.0,
        "cost_estimate": sum([outcome.usd for outcome in attempts], 0.0),
        "metadata": metadata,
    }
