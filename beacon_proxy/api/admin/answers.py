"""How an own route answers: JSON of this moment, errors in the dialect of the path."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ...errors import MethodNotAllowed, ProxyError
from ...ops.lines import encode
from ...wire.dialects import dialect_of, error_body

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
View = Callable[[web.BaseRequest], web.Response]

# A shared cache must not hold what is true only now.
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def json_answer(content: Any, status: int = 200) -> web.Response:
    headers = {**HEADERS, "Content-Type": "application/json"}
    return web.Response(body=encode(content), status=status, headers=headers)


def problem(request: web.BaseRequest, error: ProxyError) -> web.Response:
    """The answer that tells `error`."""
    headers = {**HEADERS, "Content-Type": "application/json"}
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = "GET, HEAD"
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    body = error_body(dialect_of(request.path), error.status, error.message, error.reason)
    return web.Response(body=body, status=error.status, headers=headers)


def handler(view: View) -> Handler:
    """Wrap a view: GET and HEAD alone, and its `ProxyError`s told to the client."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{request.path} answers GET and HEAD alone")
            return view(request)
        except ProxyError as error:
            return problem(request, error)

    return handle


_KINDS = {"application/json": False, "text/plain": True, "application/openmetrics-text": True}
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 12.4.2


def prefers_text(accept: str) -> bool:
    """Whether an Accept header asks for Prometheus text rather than for JSON.

    The higher `q` wins, the earlier of equals: browser libraries send `application/json,
    text/plain, */*` and want JSON.
    """
    best, best_q = "", 0.0
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        q = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if kind in _KINDS and q > best_q:
            best, best_q = kind, q
    return _KINDS.get(best, False)


def _quality(text: str) -> float:
    return float(text) if _QUALITY.fullmatch(text) else 0.0
