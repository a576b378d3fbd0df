"""Cross-origin requests from browsers: off unless origins are configured (WHATWG Fetch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

_EXPOSED = (
    "X-Beacon-Backend, X-Beacon-Provider, X-Beacon-Region, X-Beacon-Attempts, X-Request-Id,"
    " Retry-After"
)


class Cors:
    """The origins that may read answers; falsy where there are none."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def allows(self, origin: str | None) -> bool:
        return origin is not None and (origin in self._origins or "*" in self._origins)

    def may_listen(self, origin: str | None, host: str) -> bool:
        """Whether a page of `origin` may open a WebSocket: browsers ask no one before they do."""
        return origin is None or self.allows(origin) or urlsplit(origin).netloc == host

    def preflight(self, method: str, headers: Mapping[str, str]) -> bool:
        """Whether this is a preflight that the proxy answers: one of a configured origin."""
        asked = method == "OPTIONS" and "Access-Control-Request-Method" in headers
        return asked and self.allows(headers.get("Origin"))

    def fields(self, origin: str | None) -> dict[str, str]:
        """Header fields for any answer to `origin`; empty where it is not allowed."""
        if origin is None or not self.allows(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "*, Authorization",
            "Access-Control-Expose-Headers": _EXPOSED,
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }
