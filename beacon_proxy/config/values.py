"""The kinds of value that beacon.yaml holds, each with what makes one valid.

A validator says what a value must be and never quotes it: `problems` knows what may be shown.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    WithJsonSchema,
    model_validator,
)

from ..plugins import no_flag
from ..regions import canonical_region

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REGION = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# What frames a message or belongs to one connection (RFC 9110 7.6.1): the core alone writes these.
_OURS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NAMED = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")
_SCOPE = re.compile(r"all|tenant|(pool|provider|backend|region):\S+")


def split_url(url: str, instead: str = "; use api_key") -> tuple[str, str, int, str]:
    """Split a backend's URL into scheme, host, port and base path without a trailing slash.

    `instead` ends what is said of a URL that holds a password.

    Raises:
        ValueError: saying what the URL must be; never quoting it, for it may hold a secret.
    """
    if not url.isascii() or any(ord(c) <= 0x20 or ord(c) == 0x7F or c == "\\" for c in url):
        raise ValueError("must hold no spaces, control, non-ASCII characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ValueError("must be a URL with a valid host and port") from exc
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must be http://host[:port][/path] or https://host[:port][/path]")
    if "@" in parts.netloc:
        raise ValueError(f"must hold no user or password{instead}")
    if "?" in url or "#" in url:
        raise ValueError("must have no query and no fragment")
    if not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise ValueError("must have a host whose labels are 1 to 63 characters long")  # RFC 1035
    if port == 0:
        raise ValueError("must have a port in 1..65535")
    return (
        parts.scheme,
        host,
        port or (443 if parts.scheme == "https" else 80),
        parts.path.rstrip("/"),
    )


def _url(value: str) -> str:
    split_url(value)
    return value


def _url_with_query(value: str) -> str:
    split_url(value.partition("?")[0], instead="")  # neither a source nor a webhook has a key
    return value


def _control_url(value: str) -> str:
    if value.startswith(("http:", "https:")):
        return _url(value)
    if not _NAMED.fullmatch(value) or "@" in value:
        raise ValueError("must be a URL without spaces, user or password")
    return value  # whether it means something, its provider knows


def _hook(value: SecretStr) -> SecretStr:
    _url_with_query(value.get_secret_value())
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            "must be 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    return value


def _region(value: str) -> str:
    """The one spelling of a region; it stands in a header of every answer."""
    region = canonical_region(value)
    if not _REGION.fullmatch(region):
        raise ValueError(
            "must be 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    return region


def _token(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError("must be a header name")
    return value


def _secret(value: SecretStr) -> SecretStr:
    plain = value.get_secret_value()
    if not plain.strip():
        raise ValueError("must not be empty")
    if _CONTROL.search(plain):
        raise ValueError("must hold no control characters; is there a line end at its end?")
    return value


def _header_name(value: str) -> str:
    if _token(value).lower() in _OURS:
        raise ValueError("must not be set: the proxy writes it itself")
    return value


def _header_value(value: SecretStr) -> SecretStr:
    if _CONTROL.search(value.get_secret_value()):
        raise ValueError("must hold no control characters")
    return value


def _scope(value: str) -> str:
    if not _SCOPE.fullmatch(value):
        raise ValueError("must be all, tenant, pool:…, provider:…, backend:… or region:…")
    kind, _, name = value.partition(":")
    return f"region:{canonical_region(name)}" if kind == "region" else value


def _moment(value: Any) -> float:
    """Unix seconds of a time, which may be given as such."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                given = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(_NO_MOMENT) from None
            if given.tzinfo is None:  # this instance's own zone is nothing to rely on
                raise ValueError(_NO_MOMENT) from None
            return given.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(_NO_MOMENT)
    if not _MOMENTS[0] <= value <= _MOMENTS[1]:
        raise ValueError(_NO_MOMENT)
    return float(value)


_NO_MOMENT = "must be a time with its zone, as 2026-12-01T12:00:00Z, or unix seconds"
_MOMENTS = (1e9, 1e11)  # unix s, 2001 to 5138: neither a date without dashes nor milliseconds


def _origin(value: str) -> str:
    if value != "*":
        scheme, _, _, path = split_url(value)
        if path or value.endswith("/") or not scheme:
            raise ValueError("must be scheme://host[:port] without a path, or *")
    return value


# The bounds stand before `no_flag`, else the JSON schema would not know them.
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(no_flag)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(no_flag)]
Moment = Annotated[
    float,
    BeforeValidator(_moment),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]}),
]
Port = Annotated[int, Field(ge=0, le=65535), BeforeValidator(no_flag)]
Count = Annotated[int, Field(ge=1), BeforeValidator(no_flag)]
Size = Annotated[int, Field(ge=1 << 20), BeforeValidator(no_flag)]
Text = Annotated[str, Field(min_length=1)]
Region = Annotated[str, Field(min_length=1), AfterValidator(_region)]
Url = Annotated[str, AfterValidator(_url)]
ControlUrl = Annotated[str, AfterValidator(_control_url)]
Source = Annotated[str, AfterValidator(_url_with_query)]
Hook = Annotated[SecretStr, AfterValidator(_hook)]  # some services put the credential into the URL
Name = Annotated[str, AfterValidator(_name)]
Token = Annotated[str, AfterValidator(_token)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[SecretStr, AfterValidator(_header_value)]
Scope = Annotated[str, AfterValidator(_scope)]
Origin = Annotated[str, AfterValidator(_origin)]
Pool = Literal["baseline", "burst"]


class Section(BaseModel):
    """A mapping of beacon.yaml: unknown keys are errors, and no error quotes its input.

    A key that holds a list or a mapping may stay empty, as when all under it is commented out.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or cls._plain(key)}

    @classmethod
    def _plain(cls, key: object) -> bool:
        """Whether null is a value of this key, or an error, rather than an empty section."""
        field = cls.model_fields.get(key) if isinstance(key, str) else None
        return field is None or not isinstance(field.default, (list, dict, BaseModel))
