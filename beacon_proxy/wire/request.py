"""What goes out to a backend: the client's request as it came, or one that a provider made up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..contracts import (
    Backend,
    Candidate,
    Dialect,
    Exchange,
    Fault,
    Headers,
    Live,
    Prompt,
    Provider,
    Stage,
    Submission,
    canonical_model,
)
from ..errors import BadRequest, UpstreamError
from .dialects import Route, Shape
from .headers import (
    Added,
    RequestHead,
    field_lines,
    find,
    forwarded_lines,
    passing,
    request_bytes,
)
from .rename import LOOK_CAP, Renaming, Span, model_spans
from .upload import REPLAY_CAP, Upload

CREDENTIALS = (
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-goog-api-key",
    b"modal-key",
    b"modal-secret",
)
_OF_BODY = frozenset({b"content-type", b"content-length", b"content-encoding", b"content-language"})
_DIGESTS = (b"content-digest", b"repr-digest", b"digest", b"content-md5")  # of other bytes
_NOT_OF_A_GET = _OF_BODY.union(_DIGESTS)
_DEFAULT_PORTS = {"http": 80, "https": 443}
FieldsOf = Callable[[Backend, Exchange], Headers]


class Outgoing(NamedTuple):
    """One request, ready for one backend."""

    head: bytes
    body: bytes | None  # None: it comes from the upload
    shape: Shape
    stream: bool
    renaming: Renaming | None = None  # of what comes from the upload


class Source(Protocol):
    """Makes the request of an exchange anew for each backend."""

    upload: Upload | None
    upgrade: bool

    def outgoing(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None
    ) -> Outgoing:
        """The request as this backend gets it; `fields_of` is the provider's `fields`, if any."""
        ...

    def following(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None, target: bytes
    ) -> Outgoing:
        """A GET of `target` on the same backend, where the answer is to be had; see `is_target`."""
        ...

    def submission(
        self, candidate: Candidate, body: bytes, deadline: float, patience: float
    ) -> Submission:
        """The request for a provider that takes it there by itself; see `contracts.Submission`."""
        ...

    @property
    def shape(self) -> Shape:
        """Of the answer that such a provider puts together."""
        ...


@lru_cache(maxsize=1024)
def host_of(scheme: str, host: str, port: int) -> bytes:
    """The Host field for a backend, as RFC 9112 3.2 spells it."""
    host = f"[{host}]" if ":" in host else host
    if port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return host.encode("ascii")


def added_fields(backend: Backend, provider: Provider, special: Headers = ()) -> Added | None:
    """Fields that replace the client's, if there are any; `special` ones of this request alone."""
    own = provider.credentials(backend)
    added = _added(own, backend.headers) if own or backend.headers else None
    if not special:
        return added
    names = {name.lower() for name, _ in special}
    others = () if added is None else added.fields
    return Added(special + tuple(pair for pair in others if pair[0].lower() not in names))


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

    __slots__ = ("_exchange", "_forwarded", "_head", "_route", "_spans", "upgrade", "upload")

    def __init__(
        self, exchange: Exchange, head: RequestHead, upload: Upload, route: Route | None
    ) -> None:
        self._exchange = exchange
        self._head = head
        self._route = route
        self.upload: Upload | None = upload
        self.upgrade = head.upgrade is not None
        self._spans: list[Span] | None = None  # of the model's values, once looked for
        if head.forwarded is None:
            head.forwarded = forwarded_lines(head, exchange.client)
        self._forwarded = b"%bX-Request-Id: %b\r\n\r\n" % (
            head.forwarded,
            exchange.id.encode("ascii"),
        )

    @property
    def shape(self) -> Shape:
        return self._route.shape if self._route is not None else Shape.DOCUMENT

    def outgoing(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None
    ) -> Outgoing:
        exchange, upload, backend = self._exchange, self.upload, candidate.backend
        special = fields_of(backend, exchange) if fields_of else ()
        edit: Renaming | None = None
        model, names = exchange.model, candidate.live.names
        if model is not None and names and names.get(model) != model:
            edit = self._renaming(candidate)
            if edit is not None:
                special = (*special, *self._length(edit))
        if (backend.base_path or backend.api_key) and climbs(exchange.target):
            raise BadRequest("dot segments are not taken to a backend with a base path or a key")
        head = request_bytes(
            self._head,
            exchange.method,
            provider.target(backend, exchange.target),
            host_of(backend.scheme, backend.host, backend.port),
            added_fields(backend, provider, special),
            self._forwarded,
        )
        assert upload is not None
        if edit is None:
            return Outgoing(head, upload.body, self.shape, exchange.stream)
        body = upload.body
        renamed = None if body is None else edit.apply(body)
        return Outgoing(head, renamed, self.shape, exchange.stream, edit)

    def _renaming(self, candidate: Candidate, body: bytes | None = None) -> Renaming | None:
        """What the backend needs another name for; None: nothing. From the client's own bytes."""
        model, upload = self._exchange.model, self.upload
        assert model is not None
        name = spelled(candidate.live, model)
        if name == model or upload is None:
            return None
        spans = self._spans
        if spans is None:
            spans = self._spans = self._model_spans(upload.body if body is None else body)
        return Renaming(spans, name) if spans else None

    def _model_spans(self, body: bytes | None) -> list[Span]:
        """Where the model stands in a body, as far as it may be looked at."""
        if body is None:
            assert self.upload is not None
            return model_spans(self.upload.beginning(LOOK_CAP), False)
        if len(body) > REPLAY_CAP:  # whole in memory for a provider: to parse it holds up the loop
            return model_spans(body[:LOOK_CAP], False)
        return model_spans(body, True)

    def _length(self, edit: Renaming) -> Headers:
        """The fields that speak of the body's bytes."""
        gone = tuple((name, b"") for name in _DIGESTS)
        length = self._head.length
        if length is None:
            return gone
        return ((b"Content-Length", b"%d" % (length + edit.growth)), *gone)

    def following(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None, target: bytes
    ) -> Outgoing:
        exchange, backend = self._exchange, candidate.backend
        special = fields_of(backend, exchange) if fields_of else ()
        added = added_fields(backend, provider, special)
        dropped = _NOT_OF_A_GET if added is None else _NOT_OF_A_GET | added.names
        head = b"GET %b HTTP/1.1\r\nHost: %b\r\n%b%b%b" % (
            target,
            host_of(backend.scheme, backend.host, backend.port),
            field_lines(passing(self._head.headers, dropped)),
            b"" if added is None else added.lines,
            self._forwarded,
        )
        return Outgoing(head, b"", self.shape, exchange.stream)

    def submission(
        self, candidate: Candidate, body: bytes, deadline: float, patience: float
    ) -> Submission:
        exchange, headers = self._exchange, passing(self._head.headers)
        edit = None if exchange.model is None else self._renaming(candidate, body)
        if edit is not None:
            body = edit.apply(body)
            fields = self._length(edit)
            headers = passing(headers, frozenset(name.lower() for name, _ in fields))
            headers = (*headers, *(field for field in fields if field[1]))
        return Submission(
            id=exchange.id,
            method=exchange.method,
            path=exchange.path,
            target=exchange.target,
            headers=headers,
            body=body,
            dialect=exchange.dialect,
            stream=exchange.stream,
            prompt=None,
            deadline=deadline,
            patience=patience,
        )


_SHAPES = {
    Dialect.OPENAI: Shape.CHAT,
    Dialect.ANTHROPIC: Shape.MESSAGES,
    Dialect.OLLAMA: Shape.OLLAMA,
    Dialect.BEACON: Shape.OLLAMA,  # NDJSON with `done`, too
    Dialect.UNKNOWN: Shape.DOCUMENT,
}
_TARGET = re.compile(rb"/[^\x00-\x20\x7f#]*")
_SEPARATORS = re.compile(rb"/|\\|%2f|%5c", re.IGNORECASE)


def climbs(target: bytes) -> bool:
    """Whether a path segment is `.` or `..`, in any spelling that some server decodes."""
    path = target.partition(b"?")[0]
    if b"." not in path and b"%2" not in path:
        return False
    segments = _SEPARATORS.split(path)
    return any(re.sub(b"(?i)%2e", b".", segment) in (b".", b"..") for segment in segments)


def is_target(target: bytes) -> bool:
    """Whether what a provider, or its backend, names is one request-target in origin form.

    (RFC 9112 3.2.1.) Anything else could end its line, or leave what the key is for.
    """
    return _TARGET.fullmatch(target) is not None and not climbs(target)


class Translated:
    """An `/inference` request in the words of each backend."""

    __slots__ = ("_exchange", "upgrade", "upload")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.upload: Upload | None = None
        self.upgrade = False

    @property
    def shape(self) -> Shape:
        return Shape.OLLAMA

    def outgoing(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None
    ) -> Outgoing:
        exchange, backend = self._exchange, candidate.backend
        assert exchange.prompt is not None
        call = provider.ask(backend, _spelled(exchange.prompt, candidate))
        if not is_target(call.target):
            detail = "the provider made up a target that cannot be asked for"
            raise UpstreamError(Fault.MALFORMED, Stage.SEND, detail)
        special = fields_of(backend, exchange) if fields_of else ()
        length = (b"Content-Length", b"%d" % len(call.body))
        lines = self._lines(backend, provider, special, (*call.headers, length))
        host = host_of(backend.scheme, backend.host, backend.port)
        head = b"POST %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (call.target, host, lines)
        return Outgoing(head, call.body, _SHAPES[call.dialect], exchange.prompt.stream)

    def following(
        self, candidate: Candidate, provider: Provider, fields_of: FieldsOf | None, target: bytes
    ) -> Outgoing:
        exchange, backend = self._exchange, candidate.backend
        assert exchange.prompt is not None
        special = fields_of(backend, exchange) if fields_of else ()
        shape = _SHAPES[provider.ask(backend, _spelled(exchange.prompt, candidate)).dialect]
        lines = self._lines(backend, provider, special, ())
        host = host_of(backend.scheme, backend.host, backend.port)
        head = b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, host, lines)
        return Outgoing(head, b"", shape, exchange.prompt.stream)

    def submission(
        self, candidate: Candidate, body: bytes, deadline: float, patience: float
    ) -> Submission:
        exchange = self._exchange
        assert exchange.prompt is not None
        return Submission(
            id=exchange.id,
            method=exchange.method,
            path=exchange.path,
            target=exchange.target,
            headers=self._authorization(),
            body=b"",
            dialect=Dialect.BEACON,
            stream=exchange.prompt.stream,
            prompt=_spelled(exchange.prompt, candidate),
            deadline=deadline,
            patience=patience,
        )

    def _authorization(self) -> Headers:
        given = find(self._exchange.headers, b"authorization")
        return () if given is None else ((b"Authorization", given),)

    def _lines(
        self, backend: Backend, provider: Provider, special: Headers, of_body: Headers
    ) -> bytes:
        exchange = self._exchange
        added = added_fields(backend, provider, special)
        fields: list[tuple[bytes, bytes]] = [
            *of_body,
            *(() if added is None else added.fields),
            (b"X-Request-Id", exchange.id.encode("ascii")),
            (b"Via", b"1.1 beacon-proxy"),
        ]
        named = {name.lower() for name, _ in fields}
        if b"authorization" not in named:
            fields += self._authorization()
        if b"accept-encoding" not in named:
            fields.append((b"Accept-Encoding", b"identity"))  # the answer is read here
        if exchange.trace_id is not None:
            fields.append((b"X-Trace-Id", exchange.trace_id.encode("ascii")))
        return field_lines(fields)


def spelled(live: Live, model: str) -> str:
    """The name that a backend has for a model of this name; the same where it is not known."""
    return live.names.get(model) or live.names.get(canonical_model(model)) or model


def _spelled(prompt: Prompt, candidate: Candidate) -> Prompt:
    name = spelled(candidate.live, prompt.model)
    return prompt if name == prompt.model else replace(prompt, model=name)
