"""From a client's request to an `Exchange`: target, hints, and a bounded look at a JSON body."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from math import inf, isfinite
from typing import Any

import orjson

from ..contracts import Exchange, Headers
from ..errors import BadRequest
from ..regions import canonical_region
from ..wire.dialects import INFERENCE_ROUTES, Route
from ..wire.headers import RequestHead
from ..wire.rename import LOOK_CAP, members, value
from ..wire.upload import Upload

LONGEST = 86_400.0  # s; a longer deadline is none

_BAD_TARGET = re.compile(rb"[\x00-\x20\x7f#]")
_ABSOLUTE = re.compile(rb"https?://(?:[^/?#@]*@)?([^/?#]*)", re.IGNORECASE)
# As JSON and any printf spell it; Python itself would also take `1_000`, `+1` and `-0`.
_NUMBER = re.compile(rb"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SESSION_FIELDS = (b"modal-session-id", b"x-session-id")
_SESSION_LENGTHS = frozenset(map(len, _SESSION_FIELDS))
_SESSIONS = ("prompt_cache_key", "session_id", "user")
_READ = ("model", "stream", *_SESSIONS, "metadata")
_SESSION_LONGEST = 1024  # characters; a longer one is no name
_TENANT_DIGITS = 16
_BOOLS = {b"true": True, b"false": False}


def read_target(method: str, target: bytes, head: RequestHead) -> bytes:
    """The request-target in origin-form, its bytes kept.

    The authority of an absolute-form target takes the place of Host (RFC 9112 3.2.2).

    Raises:
        BadRequest: a target that two parsers could read in two ways.
    """
    if target == b"*" and method == "OPTIONS":
        return target  # RFC 9112 3.2.4
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.match(target)
        if absolute is None:
            raise BadRequest("the request-target must start with /")
        head.rebuilt[b"host"] = absolute[1]
        target = target[absolute.end() :]
        if not target.startswith(b"/"):
            target = b"/" + target
    if _BAD_TARGET.search(target):
        raise BadRequest("the request-target holds a control character, a space or a fragment")
    return target


def path_of(target: bytes) -> str:
    """The path of a request-target, in whichever form it came."""
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.match(target)
        if absolute is not None:
            target = target[absolute.end() :] or b"/"
    return target.partition(b"?")[0].decode("utf-8", "surrogateescape")


def route_of(method: str, path: str) -> Route | None:
    """The inference route that this request is for, if any."""
    return INFERENCE_ROUTES.get(path) if method == "POST" else None


def read_hints(exchange: Exchange, head: RequestHead) -> None:
    """Take the `X-Beacon-*` request headers into the exchange.

    Who stands before the proxy may add its own limit to the client's: the lowest holds.

    Raises:
        BadRequest: a hint that cannot be read, or says two things; to guess would spoil somebody's
            data.
    """
    hints = head.hints
    if (regions := hints.get(b"region")) and (region := _one(regions, "X-Beacon-Region")):
        exchange.region = canonical_region(region.decode("latin-1"))
    if modes := hints.get(b"region-mode"):
        exchange.region_mode = _one(modes, "X-Beacon-Region-Mode").decode("latin-1")
        if exchange.region_mode not in ("prefer", "require"):
            raise BadRequest("X-Beacon-Region-Mode must be prefer or require")
    if priorities := hints.get(b"cost-priority"):
        exchange.cost_priority = _BOOLS.get(_one(priorities, "X-Beacon-Cost-Priority"))
        if exchange.cost_priority is None:
            raise BadRequest("X-Beacon-Cost-Priority must be true or false")
    if timeouts := hints.get(b"timeout"):
        seconds = min([_number(each, "X-Beacon-Timeout") for each in timeouts])
        exchange.deadline = exchange.started + min(seconds, LONGEST)
    if prices := hints.get(b"max-price"):
        numbers = [_number(each, "X-Beacon-Max-Price", zero=True) for each in prices]
        exchange.max_price = min(numbers)


def _one(values: list[bytes], name: str) -> bytes:
    """What all fields of a name say, in lower case."""
    said = {value.strip().lower() for value in values}
    if len(said) > 1:
        raise BadRequest(f"{name} comes twice, and says different things")
    return said.pop()


def _number(value: bytes, name: str, *, zero: bool = False) -> float:
    text = value.strip(b" \t")
    number = float(text) if _NUMBER.fullmatch(text) else inf
    if not isfinite(number) or (number == 0 and not zero):
        raise BadRequest(f"{name} must be a number {'of at least' if zero else 'above'} 0")
    return number


def look(exchange: Exchange, route: Route | None, upload: Upload, sessions: bool) -> None:
    """Read `model` and `stream` from a JSON body; anything else in it is the backend's business.

    Of a body that is too large to be kept, what there is. With `sessions` also who asks.
    """
    streams = route is not None and route.streams
    exchange.stream = streams
    body = exchange.body
    document: Any
    if body is not None and len(body) <= LOOK_CAP:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return
    else:  # not parsed, for that may take a second
        start = upload.beginning(LOOK_CAP) if body is None else body
        found, _ = members(start, _READ if sessions else _READ[:2])
        document = {name: value(start, spans[-1]) for name, spans in found.items() if spans}
    if isinstance(document, dict):
        model = document.get("model")
        exchange.model = model if isinstance(model, str) and model else None
        stream = document.get("stream")
        exchange.stream = streams if stream is None else stream is True
        if sessions and exchange.session is None:
            exchange.session = _session_in(document)


def session_of(headers: Headers) -> str | None:
    """What the client calls its conversation, where it says so in a field."""
    said: str | None = None
    for name, text in headers:
        # The length tells apart nearly all others, for less than their lower case costs.
        if len(name) in _SESSION_LENGTHS and name.lower() in _SESSION_FIELDS:
            found = _session(text.decode("latin-1").strip())
            if found is not None and (said is None or name.lower() == _SESSION_FIELDS[0]):
                said = found
    return said


def tenant_of(headers: Headers, name: bytes) -> str | None:
    """Who asks, where a field of this lower-case name says it; hashed, for it may be a key.

    `printf %s TENANT | sha256sum | cut -c1-16` gives the same. A field that comes several times is
    one with all the values (RFC 9110 5.3), so that no second one hides behind the first.
    """
    said = b", ".join([text for field, text in headers if field.lower() == name]).strip()
    return sha256(said).hexdigest()[:_TENANT_DIGITS] if said else None


def _session_in(document: Mapping[str, Any]) -> str | None:
    """The same of a JSON body: OpenAI's names, what others took over, then Anthropic's."""
    for name in _SESSIONS:
        if name in document and (said := _session(document[name])):
            return said
    metadata = document.get("metadata")
    return _session(metadata.get("user_id")) if isinstance(metadata, Mapping) else None


def _session(said: Any) -> str | None:
    return said if isinstance(said, str) and 0 < len(said) <= _SESSION_LONGEST else None


def is_json(content_type: bytes | None) -> bool:
    """Whether the body may be JSON, by its Content-Type."""
    return content_type is None or b"json" in content_type.lower()
