"""Which header fields stop at the proxy, which pass, and which are added.

Rule 1: a field passes with the bytes it came with: name, case, order, repeats.
Rule 2: hop-by-hop fields end here (RFC 9110 7.6.1), whether listed below or named by `Connection`.
Rule 3: framing, Host and credentials survive any `Connection` token, so a client cannot make the
proxy drop them (hop-by-hop header abuse).
"""

from __future__ import annotations

import random
import re
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from http import HTTPStatus

from ..contracts import Headers
from ..errors import BadRequest

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NEVER_BY_CONNECTION = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"host",
        b"set-cookie",
        b"x-api-key",
    }
)
# Fields that a trailer section may not carry: RFC 9110 6.5.1.
_NOT_IN_TRAILERS = HOP_BY_HOP | _NEVER_BY_CONNECTION | {b"x-beacon-backend", b"x-request-id"}

_ids = random.Random()  # for telling exchanges apart, not for secrets: no system call each
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}\Z")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?\Z")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


# What becomes of a field, by its name. It passes as it is where nothing is to be learnt from it; up
# to _ACCEL it passes, too; the others are answered here, or made anew for each attempt.
_PLAIN, _LENGTH, _TYPE, _CODING, _ACCEL, _REBUILT, _HINT, _HOP, _DISGUISED = range(9)
_KINDS = {
    b"content-length": _LENGTH,
    b"content-type": _TYPE,
    b"content-encoding": _CODING,
    b"x-accel-buffering": _ACCEL,
    **dict.fromkeys((b"expect", b"host", b"via", b"x-request-id", b"max-forwards"), _REBUILT),
    **dict.fromkeys((b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"), _REBUILT),
    **dict.fromkeys(HOP_BY_HOP, _HOP),
    # A backend that knows `_` as `-` (WSGI, CGI) would read these as framing.
    **dict.fromkeys((b"content_length", b"transfer_encoding", b"content-length_"), _DISGUISED),
}
_TOLD = frozenset({b"x-request-id", b"x-forwarded-for"})  # by a gateway before us, anew each time
_KNOWN_MOST, _KNOWN_LONGEST = 4096, 64  # spellings remembered, bytes of each
_HARMLESS = frozenset({b"keep-alive", b"Keep-Alive", b"close"})  # values that name no field
_known: dict[bytes, int] = {}  # names are few and come again: each spelling is looked at once
_good_hosts: set[bytes] = set()
_NO_NAMES: frozenset[bytes] = frozenset()


def _kind_of(name: bytes) -> int:
    lower = name.lower()
    kind = _HINT if lower.startswith(b"x-beacon-") else _KINDS.get(lower, _PLAIN)
    if len(name) <= _KNOWN_LONGEST:
        if len(_known) >= _KNOWN_MOST:
            _known.clear()
        _known[name] = kind
    return kind


class RequestHead:
    """A client's header section, read once for the exchange.

    Attributes:
        headers: every field, less those that `Connection` names.
        parts: of the lines that pass to any backend, to be joined; of a head read anew.
        rebuilt: name to value of what is answered here or made anew; repeats joined.
        hints: x-beacon-* without the prefix, each with the values of all its fields.
        forwarded: what `forwarded_lines` made of it, kept by who called it.
        length: Content-Length.
        upgrade: `websocket`, where the client asked for it.
        plain: it says nothing that changes the state of its connection, or of itself.
    """

    __slots__ = (
        "_mould",
        "_values",
        "chunked",
        "content_type",
        "forwarded",
        "headers",
        "hints",
        "length",
        "parts",
        "plain",
        "rebuilt",
        "te_trailers",
        "upgrade",
    )

    def __init__(
        self,
        headers: Headers,
        parts: list[bytes],
        rebuilt: dict[bytes, bytes],
        hints: dict[bytes, list[bytes]],
    ) -> None:
        self.headers = headers
        self.parts = parts
        self.rebuilt = rebuilt
        self.hints = hints
        self.forwarded: bytes | None = None
        self._mould: _Mould | None = None
        self._values: Sequence[bytes] | None = None  # None: those of `headers` itself
        self.length: int | None = None
        self.content_type: bytes | None = None
        self.chunked = self.te_trailers = self.plain = False
        self.upgrade: bytes | None = None

    def mould(self, places: Sequence[int]) -> None:
        """Get ready for `again` with other values at `places`. Only of a head that is `plain`."""
        self._mould = _Mould(self.headers, places)

    def again(self, values: Sequence[bytes], digits: bytes) -> RequestHead:
        """The same head with other values at the places that `mould` was told of.

        Args:
            digits: of Content-Length.
        """
        mould = self._mould
        assert mould is not None
        headers = list(self.headers)
        for at, value in zip(mould.places, values, strict=True):
            headers[at] = (headers[at][0], value)
        rebuilt, forwarded = self.rebuilt, self.forwarded
        if mould.told:
            rebuilt, forwarded = rebuilt.copy(), None
            for _, name in mould.told:
                rebuilt.pop(name, None)
            for at, name in mould.told:
                _rebuild(rebuilt, name, headers[at][1])
        other = RequestHead(tuple(headers), self.parts, rebuilt, self.hints)
        other.length = int(digits) if digits else None
        other.content_type, other.forwarded = self.content_type, forwarded
        other.plain = True
        other._mould, other._values = mould, values
        return other

    def lines(self, dropped: frozenset[bytes]) -> list[bytes]:
        """Parts of the lines that pass, less those of the lower-case names in `dropped`."""
        if self._mould is not None and self._values is not None:
            return self._mould.lines(self._values, dropped)
        return _passing(self.headers, dropped) if dropped else self.parts


class _Mould:
    """The lines of a head that pass, joined but for the values that will differ.

    Attributes:
        places: of the fields whose values will differ.
        told: place and lower-case name of each field that tells of gateways before us, if a value
            of these will differ.
    """

    __slots__ = ("_casts", "_headers", "places", "told")

    def __init__(self, headers: Headers, places: Sequence[int]) -> None:
        self._headers = headers
        self.places = places
        self.told: list[tuple[int, bytes]] = []
        if any(headers[at][0].lower() in _TOLD for at in places):
            names = [name.lower() for name, _ in headers]
            self.told = [(at, name) for at, name in enumerate(names) if name in _TOLD]
        # For each set of names that is left out, of which there are no more than backends: the
        # joined bytes with room between them, and which value goes where.
        self._casts: dict[frozenset[bytes], tuple[list[bytes], list[tuple[int, int]]]] = {}

    def lines(self, values: Sequence[bytes], dropped: frozenset[bytes]) -> list[bytes]:
        cast = self._casts.get(dropped)
        if cast is None:
            cast = self._casts[dropped] = self._cast(dropped)
        pieces, rooms = cast[0].copy(), cast[1]
        for at, index in rooms:
            pieces[at] = values[index]
        return pieces

    def _cast(self, dropped: frozenset[bytes]) -> tuple[list[bytes], list[tuple[int, int]]]:
        pieces: list[bytes] = []
        rooms: list[tuple[int, int]] = []
        run: list[bytes] = []
        for at, (name, value) in enumerate(self._headers):
            kind = _known.get(name)
            if (_kind_of(name) if kind is None else kind) > _ACCEL or name.lower() in dropped:
                continue
            if at in self.places:
                rooms.append((len(pieces) + 1, self.places.index(at)))
                pieces += (b"".join((*run, name, b": ")), b"")
                run = [b"\r\n"]
            else:
                run += (name, b": ", value, b"\r\n")
        return [*pieces, b"".join(run)], rooms


def may_vary(name: bytes) -> bool:
    """Whether the value of a field of this name can change nothing that was read of the others."""
    return _kind_of(name) == _PLAIN or name.lower() in _TOLD


def read_request_head(headers: Headers, http11: bool) -> RequestHead:
    """Sort a client's header fields, as the strict parser let them through.

    Raises:
        BadRequest: framing or Host that two parsers could read in two ways.
    """
    parts: list[bytes] = []
    head, known = RequestHead(headers, parts, {}, {}), _known
    connection = b""
    for name, value in headers:
        kind = known.get(name)
        if kind is None:
            kind = _kind_of(name)
        if kind <= _ACCEL:
            if kind == _LENGTH:
                head.length = _read_length(head.length, value)
            elif kind == _TYPE and head.content_type is None:
                head.content_type = value
            parts += (name, b": ", value, b"\r\n")
        elif kind == _REBUILT:
            _rebuild(head.rebuilt, name.lower(), value)
        elif kind == _HOP:
            lower = name.lower()
            if lower == b"connection":
                connection = value if not connection else connection + b"," + value
            elif lower == b"transfer-encoding":
                _read_transfer_encoding(head, value, http11)
            elif lower == b"te":
                head.te_trailers = b"trailers" in value.lower()
            elif lower == b"upgrade":
                head.upgrade = value.lower()
        elif kind == _HINT:
            head.hints.setdefault(name[9:].lower(), []).append(value)
        else:
            raise BadRequest("ambiguous framing header")
    if head.chunked and head.length is not None:
        raise BadRequest("both Content-Length and Transfer-Encoding")
    host = head.rebuilt.get(b"host")
    if host is None:
        if http11:
            raise BadRequest("missing Host header")
    elif host not in _good_hosts:
        _check_host(host)
    if not http11:
        head.upgrade = None  # RFC 9110 7.8
    if not connection:
        head.upgrade, head.te_trailers = None, False
        head.plain = not head.chunked and b"max-forwards" not in head.rebuilt
    elif connection not in _HARMLESS or head.upgrade is not None or head.te_trailers:
        _obey_connection(head, connection.lower())
    else:
        head.plain = not head.chunked and b"max-forwards" not in head.rebuilt
    return head


def _rebuild(rebuilt: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    old = rebuilt.get(name)
    if old is not None:
        if name == b"host":
            raise BadRequest("more than one Host header")
        value = old + b", " + value
    rebuilt[name] = value


def _read_transfer_encoding(head: RequestHead, value: bytes, http11: bool) -> None:
    if head.chunked or not http11 or value.lower() != b"chunked":
        raise BadRequest("Transfer-Encoding must be `chunked`, once, in HTTP/1.1")
    head.chunked = True


def _read_length(known: int | None, value: bytes) -> int:
    if known is not None or not value.isdigit() or len(value) > 18:
        raise BadRequest("Content-Length must be one decimal number")
    return int(value)


def _check_host(host: bytes) -> None:
    if not _HOST.match(host):
        raise BadRequest("invalid Host header")
    if len(host) <= _KNOWN_LONGEST:
        if len(_good_hosts) >= _KNOWN_MOST:
            _good_hosts.clear()
        _good_hosts.add(host)


def _obey_connection(head: RequestHead, tokens: bytes) -> None:
    named = {token.strip() for token in tokens.split(b",")}
    if b"upgrade" not in named or head.upgrade != b"websocket":
        head.upgrade = None
    dropped = named - _NEVER_BY_CONNECTION
    if any(name.lower() in dropped for name, _ in head.headers):
        head.headers = tuple(pair for pair in head.headers if pair[0].lower() not in dropped)
        head.parts = _passing(head.headers, dropped)
    if b"te" not in named:
        head.te_trailers = False


def _passing(headers: Headers, dropped: Container[bytes]) -> list[bytes]:
    """Parts of the lines that pass, less those of the lower-case names in `dropped`."""
    parts: list[bytes] = []
    for name, value in headers:
        kind = _known.get(name)
        if (_kind_of(name) if kind is None else kind) <= _ACCEL and name.lower() not in dropped:
            parts += (name, b": ", value, b"\r\n")
    return parts


class Added:
    """Fields that replace the client's of the same names; an empty value only takes it away.

    Attributes:
        names: lower-case.
        lines: of those with a value.
    """

    __slots__ = ("fields", "lines", "names")

    def __init__(self, fields: Headers) -> None:
        """Raises BadRequest: a value that would end its line."""
        self.fields = fields
        self.names = frozenset(name.lower() for name, _ in fields)
        self.lines = field_lines(fields)


def request_bytes(
    head: RequestHead,
    method: str,
    target: bytes,
    host: bytes,
    added: Added | None,
    forwarded: bytes,
) -> bytes:
    """The request line and header section for one backend.

    Args:
        added: replace the client's fields of the same names (credentials, configured headers).
        forwarded: the last lines, the same for every attempt, and the blank line behind them.
    """
    parts = [method.encode("ascii"), b" ", target, b" HTTP/1.1\r\nHost: ", host, b"\r\n"]
    if added is None:
        parts += head.lines(_NO_NAMES)
    else:
        parts += head.lines(added.names)
        parts.append(added.lines)
    if head.chunked:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    if head.upgrade is not None:
        parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    parts.append(forwarded)
    return b"".join(parts)


def field_lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Fields of the proxy's or a plugin's own making; those without a value are left out.

    Raises:
        BadRequest: a value that would end its line.
    """
    lines = [name + b": " + value for name, value in fields if value]
    if any(_BAD_VALUE.search(line) for line in lines):
        raise BadRequest("control character in a header value")
    return b"".join([line + b"\r\n" for line in lines])


def forwarded_lines(head: RequestHead, client: str) -> bytes:
    """The fields a gateway adds, but for the id of the exchange.

    X-Forwarded-* as Caddy and Envoy write them; Via as RFC 9110 7.6.3 asks.
    """
    known = head.rebuilt
    address = client.encode("ascii", "replace")
    before = known.get(b"x-forwarded-for")
    via = known.get(b"via")
    parts = [
        b"X-Forwarded-For: ",
        address if before is None else before + b", " + address,
        b"\r\nX-Forwarded-Proto: ",
        known.get(b"x-forwarded-proto") or b"http",
        b"\r\nX-Forwarded-Host: ",
        known.get(b"x-forwarded-host") or known.get(b"host", b""),
        b"\r\nVia: ",
        b"1.1 beacon-proxy" if via is None else via + b", 1.1 beacon-proxy",
        b"\r\n",
    ]
    if b"max-forwards" in known:
        parts += [b"Max-Forwards: ", known[b"max-forwards"], b"\r\n"]
    if head.te_trailers:
        parts.append(b"TE: trailers\r\n")
        if head.upgrade is None:
            parts.append(b"Connection: TE\r\n")
    return b"".join(parts)


def request_id(given: bytes | None) -> str:
    """The client's X-Request-Id where it is sane, else a new one of 32 hex digits."""
    if given is not None and _SANE_ID.match(given):
        return given.decode("ascii")
    return _ids.getrandbits(128).to_bytes(16, "big").hex()


def _length_field(headers: Headers) -> int:
    """Where Content-Length stands."""
    return next(at for at, (name, _) in enumerate(headers) if _known.get(name) == _LENGTH)


class AnswerHead:
    """A backend's status line and header section, read once.

    Attributes:
        status: 200..999, or 101.
        headers: every field, as it came.
        length: Content-Length.
        chunked: the body is framed by chunks.
        content_type, coding: values of Content-Type and Content-Encoding.
        events: the body is a stream of events, or of JSON lines.
        line: the status line for the client.
        parts: of that and the lines that pass to the client, to be joined.
        special: some field needs a second look before the lines pass (`answer_lines`).
        accel: the backend sets X-Accel-Buffering itself.
    """

    __slots__ = (
        "_around",
        "_length_at",
        "accel",
        "chunked",
        "coding",
        "content_type",
        "events",
        "headers",
        "length",
        "line",
        "parts",
        "special",
        "status",
    )

    def __init__(self, status: int, reason: bytes, headers: Headers, http11: bool) -> None:
        """Read the fields.

        Raises:
            ValueError: framing that two parsers could read in two ways.
        """
        self.status, self.headers = status, headers
        self.length: int | None = None
        self.content_type: bytes | None = None
        self.coding: bytes | None = None
        self.chunked = self.special = self.accel = False
        self.line = b"HTTP/1.1 %d %b\r\n" % (status, reason)
        self.parts = parts = [self.line]
        self._length_at = 0  # in `parts`
        self._around: tuple[Headers, bytes, Headers, bytes, bytes] | None = None
        known = _known
        for name, value in headers:
            kind = known.get(name)
            if kind is None:
                kind = _kind_of(name)
            if kind:
                if kind >= _REBUILT:
                    if kind == _HOP:
                        self._read_hop(name.lower(), value, http11)
                        continue
                    if kind == _HINT or name.lower() == b"x-request-id":
                        continue  # these tell of this proxy's own exchange: one value only
                elif kind == _LENGTH:
                    if self.length is not None or not value.isdigit() or len(value) > 18:
                        raise ValueError("invalid Content-Length")
                    self.length = int(value)
                    self._length_at = len(parts) + 2
                elif kind == _TYPE:
                    self.content_type = self.content_type or value
                elif kind == _CODING:
                    self.coding = self.coding or value
                else:
                    self.accel = True
            parts += (name, b": ", value, b"\r\n")
        if self.chunked and self.length is not None:
            raise ValueError("both Content-Length and Transfer-Encoding")
        self.events = self.content_type is not None and is_event_stream(self.content_type)

    def again(self, digits: bytes) -> AnswerHead:
        """The same head, which is not chunked, with another Content-Length."""
        if self._around is None:
            self._around = self._cut()
        fields_before, name, fields_after, before, after = self._around
        other = AnswerHead.__new__(AnswerHead)
        other.status, other.line = self.status, self.line
        other.headers = (*fields_before, (name, digits), *fields_after)
        other.parts = [before, digits, after]
        other.length = int(digits)
        other.content_type, other.coding = self.content_type, self.coding
        other.special, other.accel, other.events = self.special, self.accel, self.events
        other.chunked = False
        return other

    def _cut(self) -> tuple[Headers, bytes, Headers, bytes, bytes]:
        """What stands around the value of Content-Length, in `headers` and in `parts`."""
        headers, parts, at = self.headers, self.parts, self._length_at
        field = _length_field(headers)
        before, after = b"".join(parts[:at]), b"".join(parts[at + 1 :])
        return headers[:field], headers[field][0], headers[field + 1 :], before, after

    def _read_hop(self, name: bytes, value: bytes, http11: bool) -> None:
        if name == b"transfer-encoding":
            if self.chunked or not http11 or value.lower() != b"chunked":
                raise ValueError("unknown or repeated Transfer-Encoding")
            self.chunked = True
        elif name == b"trailer" or (name == b"connection" and value not in _HARMLESS):
            self.special = True


@lru_cache(maxsize=256)  # of a handful of spellings
def is_event_stream(content_type: bytes) -> bool:
    kind = content_type.split(b";", 1)[0].strip().lower()
    return kind in (b"text/event-stream", b"application/x-ndjson", b"application/jsonl")


def answer_lines(headers: Headers, *, trailers_pass: bool) -> bytes:
    """A backend's header fields that pass to the client, less framing that the sink decides."""
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            named |= {token.strip().lower() for token in value.split(b",")}
    dropped = HOP_BY_HOP | (named - _NEVER_BY_CONNECTION) if named else HOP_BY_HOP
    parts = []
    for name, value in headers:
        lower = name.lower()
        if lower in dropped:
            if not (trailers_pass and lower == b"trailer"):
                continue
        elif lower == b"x-request-id" or lower.startswith(b"x-beacon-"):
            continue
        parts += [name, b": ", value, b"\r\n"]
    return b"".join(parts)


def trailer_lines(trailers: Headers) -> bytes:
    """A backend's trailer section, less fields that must not come late (RFC 9110 6.5.1)."""
    return b"".join(
        [n + b": " + v + b"\r\n" for n, v in trailers if n.lower() not in _NOT_IN_TRAILERS]
    )


def passing(headers: Headers, dropped: Container[bytes] = _NO_NAMES) -> Headers:
    """The client's fields that go to any backend, less those of the lower-case names in `dropped`.

    `headers` are a `RequestHead`'s: those that `Connection` names are gone already.
    """
    return tuple(
        pair for pair in headers if _kind_of(pair[0]) <= _ACCEL and pair[0].lower() not in dropped
    )


def is_line(name: bytes, value: bytes) -> bool:
    """Whether a field that somebody made up is one line, and no more."""
    return _TOKEN.fullmatch(name) is not None and _BAD_VALUE.search(value) is None


def phrase(status: int) -> bytes:
    """The usual reason phrase."""
    return _PHRASES.get(status, b"")


def find(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a field, by its lower-case name."""
    for field_name, value in headers:
        if field_name.lower() == name:
            return value
    return None
