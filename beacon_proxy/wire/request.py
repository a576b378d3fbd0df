"""What goes out to a backend: the client's request as it came, or one that a provider made up."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..contracts import (
    Backend,
    Candidate,
    Dialect,
    Exchange,
    Headers,
    Prompt,
    Provider,
    canonical_model,
)
from ..errors import BadRequest
from .dialects import Route, Shape
from .headers import Added, RequestHead, field_lines, find, forwarded_lines, request_bytes
from .upload import Upload

CREDENTIALS = (
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-goog-api-key",
    b"modal-key",
    b"modal-secret",
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Outgoing(NamedTuple):
    """One request, ready for one backend."""

    head: bytes
    body: bytes | None  # None: it comes from the upload
    shape: Shape
    stream: bool


class Source(Protocol):
    """Makes the request of an exchange anew for each backend."""

    upload: Upload | None
    upgrade: bool

    def outgoing(self, candidate: Candidate, provider: Provider) -> Outgoing: ...


@lru_cache(maxsize=1024)
def host_of(scheme: str, host: str, port: int) -> bytes:
    """The Host field for a backend, as RFC 9112 3.2 spells it."""
    host = f"[{host}]" if ":" in host else host
    if port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return host.encode("ascii")


def added_fields(backend: Backend, provider: Provider) -> Added | None:
    """Fields that replace the client's, if there are any."""
    own = provider.credentials(backend)
    return _added(own, backend.headers) if own or backend.headers else None


@lru_cache(maxsize=1024)
def _added(own: Headers, configured: Headers) -> Added:
    """Credentials of a backend, but configured fields first."""
    named = {name.lower() for name, _ in configured}
    own = tuple(pair for pair in own if pair[0].lower() not in named)
    known = named.union(name.lower() for name, _ in own)
    # A client's key must not reach a backend that has one of its own, whatever field it stands in.
    bare = tuple((name, b"") for name in CREDENTIALS if name not in known) if own else ()
    return Added(own + configured + bare)


class Verbatim:
    """The client's own request."""

    __slots__ = ("_exchange", "_forwarded", "_head", "_route", "upgrade", "upload")

    def __init__(
        self, exchange: Exchange, head: RequestHead, upload: Upload, route: Route | None
    ) -> None:
        self._exchange = exchange
        self._head = head
        self._route = route
        self.upload: Upload | None = upload
        self.upgrade = head.upgrade is not None
        if head.forwarded is None:
            head.forwarded = forwarded_lines(head, exchange.client)
        self._forwarded = b"%bX-Request-Id: %b\r\n\r\n" % (
            head.forwarded,
            exchange.id.encode("ascii"),
        )

    def outgoing(self, candidate: Candidate, provider: Provider) -> Outgoing:
        exchange, upload, backend = self._exchange, self.upload, candidate.backend
        if (backend.base_path or backend.api_key) and climbs(exchange.target):
            raise BadRequest("dot segments are not taken to a backend with a base path or a key")
        head = request_bytes(
            self._head,
            exchange.method,
            provider.target(backend, exchange.target),
            host_of(backend.scheme, backend.host, backend.port),
            added_fields(backend, provider),
            self._forwarded,
        )
        shape = self._route.shape if self._route is not None else Shape.DOCUMENT
        assert upload is not None
        return Outgoing(head, upload.body, shape, exchange.stream)


_SHAPES = {
    Dialect.OPENAI: Shape.CHAT,
    Dialect.ANTHROPIC: Shape.MESSAGES,
    Dialect.OLLAMA: Shape.OLLAMA,
    Dialect.BEACON: Shape.OLLAMA,  # NDJSON with `done`, too
    Dialect.UNKNOWN: Shape.DOCUMENT,
}
_SEPARATORS = re.compile(rb"/|\\|%2f|%5c", re.IGNORECASE)


def climbs(target: bytes) -> bool:
    """Whether a path segment is `.` or `..`, in any spelling that some server decodes."""
    path = target.partition(b"?")[0]
    if b"." not in path and b"%2" not in path:
        return False
    segments = _SEPARATORS.split(path)
    return any(re.sub(b"(?i)%2e", b".", segment) in (b".", b"..") for segment in segments)


class Translated:
    """An `/inference` request in the words of each backend."""

    __slots__ = ("_exchange", "upgrade", "upload")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.upload: Upload | None = None
        self.upgrade = False

    def outgoing(self, candidate: Candidate, provider: Provider) -> Outgoing:
        exchange, backend = self._exchange, candidate.backend
        assert exchange.prompt is not None
        call = provider.ask(backend, _spelled(exchange.prompt, candidate))
        added = added_fields(backend, provider)
        fields: list[tuple[bytes, bytes]] = [
            *call.headers,
            *(() if added is None else added.fields),
            (b"Content-Length", b"%d" % len(call.body)),
            (b"X-Request-Id", exchange.id.encode("ascii")),
            (b"Via", b"1.1 beacon-proxy"),
        ]
        given = find(exchange.headers, b"authorization")
        if given is not None and not any(name.lower() == b"authorization" for name, _ in fields):
            fields.append((b"Authorization", given))
        if exchange.trace_id is not None:
            fields.append((b"X-Trace-Id", exchange.trace_id.encode("ascii")))
        host, lines = host_of(backend.scheme, backend.host, backend.port), field_lines(fields)
        head = b"POST %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (call.target, host, lines)
        return Outgoing(head, call.body, _SHAPES[call.dialect], exchange.prompt.stream)


def _spelled(prompt: Prompt, candidate: Candidate) -> Prompt:
    """The prompt with the model's name as this backend spells it, where that is known."""
    wanted = canonical_model(prompt.model)
    for name in candidate.live.model_names:
        if name != prompt.model and canonical_model(name) == wanted:
            return replace(prompt, model=name)
    return prompt
