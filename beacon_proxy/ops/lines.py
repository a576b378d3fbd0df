"""JSON for logs, live events and own routes, and the lines of the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from math import inf
from typing import Any, BinaryIO

import orjson
import structlog

from ..contracts import Clock
from .writer import LineWriter

# Without PASSTHROUGH orjson would write a dataclass with every field, `Backend.api_key` too.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_UTC_Z


def encode(value: Any) -> bytes:
    """Make JSON of `value`, whatever it holds: a field that is no JSON is named, never dumped."""
    try:
        return orjson.dumps(value, default=_plain, option=_OPTIONS)
    except TypeError:  # a str that is not UTF-8 (a path, a header), an int past 64 bits, odd keys
        text = json.dumps(value, default=_plain, ensure_ascii=False, skipkeys=True)
        return text.encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else f"<{type(value).__name__}>"


_DIGITS = tuple(f"{n:03}" for n in range(1000))  # to look up is half of the time to format

Line = dict[str, Any]  # first `ts` (None until it is written), `level` and `event`; then its fields
Write = Callable[[Line], None]


class JsonLines:
    """Log lines as JSON: to a file at once, or to a writer that never waits.

    Complete in itself: structlog's global configuration is neither read nor changed.

    Attributes:
        logger: a structlog logger of these lines; info and above.
    """

    def __init__(self, to: BinaryIO | LineWriter, unix: Clock = time.time) -> None:
        self._sink: Any = to if isinstance(to, LineWriter) else structlog.BytesLogger(to)
        self._unix = unix
        self._second, self._prefix = -inf, ""  # unix s, and how its time stamps begin
        self.logger: Any = structlog.wrap_logger(
            self._sink,
            processors=[structlog.processors.format_exc_info, self._process],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
            context_class=dict,
            cache_logger_on_first_use=True,
        ).bind()  # bound once: the lazy proxy costs a lookup a line

    def write(self, line: Line) -> None:
        """Write the line that `logger` would write; sets its `ts`.

        The way of the canonical line: through `logger` its twenty fields would be copied five
        times as keyword arguments, which takes longer than making JSON of them.
        """
        now = self._unix()
        rest = now - self._second
        if 0.000001 <= rest < 0.999999:
            micros = int(rest * 1e6 + 0.5)
            line["ts"] = f"{self._prefix}{_DIGITS[micros // 1000]}{_DIGITS[micros % 1000]}Z"
        else:
            line["ts"] = self._begin(now)
        self._sink.msg(encode(line))

    def _begin(self, now: float) -> datetime:
        self._second = now // 1
        self._prefix = f"{datetime.fromtimestamp(self._second, UTC):%Y-%m-%dT%H:%M:%S}."
        return datetime.fromtimestamp(now, UTC)

    def _process(self, _logger: Any, level: str, event: MutableMapping[str, Any]) -> bytes:
        stamp = datetime.fromtimestamp(self._unix(), UTC)
        return encode({"ts": stamp, "level": level, "event": event.pop("event", None), **event})


def through(log: Any) -> Write:
    """The same for a structlog logger of the caller's own."""

    def write(line: Line) -> None:
        fields = dict(line)
        del fields["ts"]
        getattr(log, fields.pop("level"))(fields.pop("event"), **fields)

    return write
