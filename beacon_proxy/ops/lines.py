"""JSON for logs, live events and own routes, and the lines of the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
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


Write = Callable[[str, str, dict[str, Any]], None]  # level, event, fields


class JsonLines:
    """Log lines as JSON: to a file at once, or to a writer that never waits.

    Complete in itself: structlog's global configuration is neither read nor changed.

    Attributes:
        logger: a structlog logger of these lines; info and above.
    """

    def __init__(self, to: BinaryIO | LineWriter, unix: Clock = time.time) -> None:
        self._sink: Any = to if isinstance(to, LineWriter) else structlog.BytesLogger(to)
        self._unix = unix
        self.logger: Any = structlog.wrap_logger(
            self._sink,
            processors=[structlog.processors.format_exc_info, self._process],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
            context_class=dict,
            cache_logger_on_first_use=True,
        ).bind()  # bound once: the lazy proxy costs a lookup a line

    def write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Write the line that `logger` would write.

        The way of the canonical line: through `logger` its twenty fields would be copied five
        times as keyword arguments, which takes longer than making JSON of them.
        """
        self._sink.msg(self._line(level, event, fields))

    def _process(self, _logger: Any, level: str, event: MutableMapping[str, Any]) -> bytes:
        return self._line(level, event.pop("event", None), event)

    def _line(self, level: str, event: str | None, fields: Mapping[str, Any]) -> bytes:
        stamp = datetime.fromtimestamp(self._unix(), UTC)
        return encode({"ts": stamp, "level": level, "event": event, **fields})


def through(log: Any) -> Write:
    """The same for a structlog logger of the caller's own."""

    def write(level: str, event: str, fields: dict[str, Any]) -> None:
        getattr(log, level)(event, **fields)

    return write
