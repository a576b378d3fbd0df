"""Which header fields stop at the proxy, which pass, and which are added.

Rule 1: a field passes with the bytes it came with: name, case, order, repeats.
Rule 2: hop-by-hop fields end here (RFC 9110 7.6.1), whether listed below or named by `Connection`.
Rule 3: framing, Host and credentials survive any `Connection` token, so a client cannot make the
proxy drop them (hop-by-hop header abuse).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

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
# Read and answered by the proxy, or rebuilt for each attempt.
_REBUILT = frozenset(
    {b"expect", b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"}
    | {b"via", b"x-request-id", b"max-forwards"}
)
# A backend that knows `_` as `-` (WSGI, CGI) would read these as framing.
_DISGUISED = frozenset({b"content_length", b"transfer_encoding", b"content-length_"})
# Fields that a trailer section may not carry: RFC 9110 6.5.1.
_NOT_IN_TRAILERS = HOP_BY_HOP | _NEVER_BY_CONNECTION | {b"x-beacon-backend", b"x-request-id"}

_ids = random.Random()  # for telling exchanges apart, not for secrets: no system call each
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}\Z")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?\Z")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

Lines = list[tuple[bytes, bytes]]  # (lower-case name, the whole line with its CRLF)


@dataclass(slots=True)
class RequestHead:
    """A client's header section, read once for the exchange."""

    lines: Lines = field(default_factory=list)  # what passes to any backend
    rebuilt: dict[bytes, bytes] = field(default_factory=dict)  # name -> value; repeats joined
    hints: dict[bytes, bytes] = field(default_factory=dict)  # x-beacon-*, without the prefix
    length: int | None = None  # Content-Length
    chunked: bool = False
    te_trailers: bool = False
    upgrade: bytes | None = None  # `websocket`, where the client asked for it


def read_request_head(headers: Headers, http11: bool) -> RequestHead:
    """Sort a client's header fields.

    Raises:
        BadRequest: framing or Host that two parsers could read in two ways.
    """
    head = RequestHead()
    connection = b""
    for name, value in headers:
        lower = name.lower()
        if lower in _REBUILT:
            if lower == b"host" and b"host" in head.rebuilt:
                raise BadRequest("more than one Host header")
            old = head.rebuilt.get(lower)
            head.rebuilt[lower] = value if old is None else old + b", " + value
        elif lower.startswith(b"x-beacon-"):
            head.hints[lower[9:]] = value
        elif lower in HOP_BY_HOP:
            if lower == b"connection":
                connection = value if not connection else connection + b"," + value
            elif lower == b"transfer-encoding":
                _read_transfer_encoding(head, value, http11)
            elif lower == b"te":
                head.te_trailers = b"trailers" in value.lower()
            elif lower == b"upgrade":
                head.upgrade = value.lower()
        elif lower in _DISGUISED:
            raise BadRequest("ambiguous framing header")
        else:
            if lower == b"content-length":
                head.length = _read_length(head.length, value)
            head.lines.append((lower, name + b": " + value + b"\r\n"))
    if head.chunked and head.length is not None:
        raise BadRequest("both Content-Length and Transfer-Encoding")
    values = [line[:-2] for _, line in head.lines]
    if _BAD_VALUE.search(b"".join([*values, *head.rebuilt.values(), *head.hints.values()])):
        raise BadRequest("control character in a header value")
    _check_host(head, http11)
    if not http11:
        head.upgrade = None  # RFC 9110 7.8
    if connection:
        _obey_connection(head, connection.lower())
    else:
        head.upgrade, head.te_trailers = None, False
    return head


def _read_transfer_encoding(head: RequestHead, value: bytes, http11: bool) -> None:
    if head.chunked or not http11 or value.lower() != b"chunked":
        raise BadRequest("Transfer-Encoding must be `chunked`, once, in HTTP/1.1")
    head.chunked = True


def _read_length(known: int | None, value: bytes) -> int:
    if known is not None or not value.isdigit() or len(value) > 18:
        raise BadRequest("Content-Length must be one decimal number")
    return int(value)


def _check_host(head: RequestHead, http11: bool) -> None:
    host = head.rebuilt.get(b"host")
    if host is None:
        if http11:
            raise BadRequest("missing Host header")
    elif not _HOST.match(host):
        raise BadRequest("invalid Host header")


def _obey_connection(head: RequestHead, tokens: bytes) -> None:
    named = {token.strip() for token in tokens.split(b",")}
    if b"upgrade" not in named or head.upgrade != b"websocket":
        head.upgrade = None
    dropped = named - _NEVER_BY_CONNECTION
    head.lines = [pair for pair in head.lines if pair[0] not in dropped]
    if b"te" not in named:
        head.te_trailers = False


def request_bytes(
    head: RequestHead,
    *,
    method: str,
    target: bytes,
    host: bytes,
    added: Headers,
    forwarded: bytes,
) -> bytes:
    """The request line and header section for one backend.

    Args:
        added: replace the client's fields of the same names (credentials, configured headers); an
            empty value only takes the client's away.
        forwarded: the lines that `forwarded_lines` made, the same for every attempt.
    """
    lines = head.lines
    if added:
        replaced = {name.lower() for name, _ in added}
        lines = [pair for pair in lines if pair[0] not in replaced]
    parts = [method.encode("ascii"), b" ", target, b" HTTP/1.1\r\nHost: ", host, b"\r\n"]
    parts += [line for _, line in lines]
    parts.append(field_lines(added))
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


def forwarded_lines(head: RequestHead, *, request_id: bytes, client: str) -> bytes:
    """The fields a gateway adds, with the blank line that ends the section.

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
        b"\r\nX-Request-Id: ",
        request_id,
        b"\r\n",
    ]
    if b"max-forwards" in known:
        parts += [b"Max-Forwards: ", known[b"max-forwards"], b"\r\n"]
    if head.te_trailers:
        parts.append(b"TE: trailers\r\n")
        if head.upgrade is None:
            parts.append(b"Connection: TE\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def request_id(head: RequestHead) -> str:
    """The client's X-Request-Id where it is sane, else a new one of 32 hex digits."""
    given = head.rebuilt.get(b"x-request-id", b"")
    if _SANE_ID.match(given):
        return given.decode("ascii")
    return f"{_ids.getrandbits(128):032x}"


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
            continue  # these tell of this proxy's own exchange: one value only
        parts += [name, b": ", value, b"\r\n"]
    return b"".join(parts)


def trailer_lines(trailers: Headers) -> bytes:
    """A backend's trailer section, less fields that must not come late (RFC 9110 6.5.1)."""
    return b"".join(
        [n + b": " + v + b"\r\n" for n, v in trailers if n.lower() not in _NOT_IN_TRAILERS]
    )


def find(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a field, by its lower-case name."""
    for field_name, value in headers:
        if field_name.lower() == name:
            return value
    return None
