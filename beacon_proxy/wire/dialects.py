"""What a path speaks: its error shape, its first content, its end marker, its usage.

A 200 head says little: vLLM sends it with an empty role chunk while the request still queues, and
a cut stream looks like a short one. So a `Watch` reads an answer as it passes and tells three
moments: the first *content*, an *error* said inside the answer, and the dialect's *end* marker. It
keeps a few kilobytes at most, whatever the length of the stream, and never changes a byte.

Before the first content each event is parsed; after it only literals are searched for. They cannot
be forged by generated text, since inside a JSON string quotes and line ends are escaped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from ..contracts import Dialect, Usage

_LINE_MAX = 1 << 20  # bytes; a line longer than this is no notice, whatever it says
_TAIL = 2048  # bytes kept for markers that a piece boundary splits, and for usage at the end


class Shape(StrEnum):
    """The event format of a dialect's streams."""

    CHAT = "chat"  # OpenAI chat and completions
    RESPONSES = "responses"
    MESSAGES = "messages"
    OLLAMA = "ollama"
    DOCUMENT = "document"  # never streamed as events we know


@dataclass(frozen=True, slots=True)
class Route:
    """What is known of a path before its request is read."""

    dialect: Dialect
    shape: Shape
    streams: bool = False  # the answer is a stream unless the request says `"stream": false`


_CHAT = Route(Dialect.OPENAI, Shape.CHAT)
_DOCUMENT = Route(Dialect.OPENAI, Shape.DOCUMENT)
_OLLAMA = Route(Dialect.OLLAMA, Shape.OLLAMA, streams=True)
_OLLAMA_DOCUMENT = Route(Dialect.OLLAMA, Shape.DOCUMENT)

# POST to one of these has no side effect but cost, and its good answers are JSON or event streams.
INFERENCE_ROUTES: dict[str, Route] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _CHAT,
    "/v1/responses": Route(Dialect.OPENAI, Shape.RESPONSES),
    "/v1/messages": Route(Dialect.ANTHROPIC, Shape.MESSAGES),
    "/v1/messages/count_tokens": Route(Dialect.ANTHROPIC, Shape.DOCUMENT),
    "/v1/embeddings": _DOCUMENT,
    "/v1/rerank": _DOCUMENT,
    "/v1/score": _DOCUMENT,
    "/v1/moderations": _DOCUMENT,
    "/chat/completions": _CHAT,
    "/completions": _CHAT,
    "/embeddings": _DOCUMENT,
    "/responses": Route(Dialect.OPENAI, Shape.RESPONSES),
    "/rerank": _DOCUMENT,
    "/api/chat": _OLLAMA,
    "/api/generate": _OLLAMA,
    "/api/embed": _OLLAMA_DOCUMENT,
    "/api/embeddings": _OLLAMA_DOCUMENT,
}


def dialect_of(path: str) -> Dialect:
    """The dialect in which errors on this path are told."""
    route = INFERENCE_ROUTES.get(path)
    if route is not None:
        return route.dialect
    if path.startswith("/api/"):
        return Dialect.OLLAMA
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI if path.startswith("/v1/") else Dialect.UNKNOWN


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(dialect: Dialect, status: int, message: str, code: str) -> bytes:
    """An error of the proxy's own making, as a client of this dialect reads it."""
    shape: dict[str, Any]
    if dialect is Dialect.OLLAMA:
        shape = {"error": message}
    elif dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        shape = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
        if status == 429:
            kind = "rate_limit_error"
        param = "model" if code == "model_not_found" else None
        shape = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return orjson.dumps(shape)


def error_event(shape: Shape, message: str, code: str) -> bytes:
    """The same for a stream that has begun: one event, to be sent at an event boundary only."""
    if shape is Shape.OLLAMA:
        return error_body(Dialect.OLLAMA, 502, message, code) + b"\n"
    if shape is Shape.MESSAGES:
        return b"event: error\ndata: " + error_body(Dialect.ANTHROPIC, 502, message, code) + b"\n\n"
    if shape is Shape.RESPONSES:
        event = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + error_body(Dialect.OPENAI, 502, message, code) + b"\n\n"


class Sign(StrEnum):
    """What one event of a stream says."""

    NOTHING = "nothing"  # role chunks, pings, queue notices
    CONTENT = "content"
    END = "end"
    ERROR = "error"


def _filled(value: Any) -> bool:
    """Whether any leaf under `value` holds something to show, the role aside."""
    if isinstance(value, dict):
        return any(_filled(item) for key, item in value.items() if key != "role")
    return bool(value)


def _read_chat(event: dict[str, Any]) -> Sign:
    choices = event.get("choices")
    if not isinstance(choices, list):
        return Sign.NOTHING if "usage" in event else Sign.CONTENT
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("finish_reason"):
            return Sign.CONTENT
        if _filled(choice.get("delta")) or choice.get("text"):
            return Sign.CONTENT
    return Sign.NOTHING


_RESPONSES_NOTHING = {"created", "queued", "in_progress", "output_item.added", "content_part.added"}


def _read_responses(event: dict[str, Any]) -> Sign:
    kind = str(event.get("type", "")).removeprefix("response.")
    if kind in ("error", "failed"):
        return Sign.ERROR
    return Sign.NOTHING if kind in _RESPONSES_NOTHING else Sign.CONTENT


def _read_messages(event: dict[str, Any]) -> Sign:
    kind = event.get("type")
    if kind == "error":
        return Sign.ERROR
    return (
        Sign.NOTHING if kind in ("message_start", "ping", "content_block_start") else Sign.CONTENT
    )


def _read_ollama(event: dict[str, Any]) -> Sign:
    if event.get("done") or ("message" not in event and "response" not in event):
        return Sign.CONTENT
    filled = _filled(event.get("message")) or event.get("response") or event.get("thinking")
    return Sign.CONTENT if filled else Sign.NOTHING


_READERS = {
    Shape.CHAT: _read_chat,
    Shape.RESPONSES: _read_responses,
    Shape.MESSAGES: _read_messages,
    Shape.OLLAMA: _read_ollama,
}
# A marker that begins with a letter stands at a line's start only: text may hold it elsewhere.
_END_MARKERS = {
    Shape.CHAT: (b'"finish_reason":"', b'"finish_reason": "', b"data: [DONE]", b"data:[DONE]"),
    Shape.RESPONSES: (b'"response.completed"', b'"response.incomplete"', b'"response.failed"'),
    Shape.MESSAGES: (b'"message_stop"',),
    Shape.OLLAMA: (b'"done":true', b'"done": true'),
}
_ERROR_MARKERS = {
    Shape.CHAT: (b'data: {"error"', b'data:{"error"'),
    Shape.RESPONSES: (b"event: error", b"event:error", b'data: {"type":"error"'),
    Shape.MESSAGES: (b"event: error", b"event:error", b'data: {"type":"error"'),
    Shape.OLLAMA: (b'{"error"',),
}
_LONGEST = 32  # of the markers
_QUOTE = ord('"')

_INPUT = re.compile(rb'"(?:prompt_tokens|input_tokens|prompt_eval_count)"\s*:\s*(\d+)')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens|eval_count)"\s*:\s*(\d+)')


def usage_in(tail: bytes) -> Usage | None:
    """Tokens as the last part of an answer counts them; None where it does not say."""
    output = _OUTPUT.findall(tail)
    if not output:
        return None
    given = _INPUT.findall(tail)
    return Usage(int(given[-1]) if given else 0, int(output[-1]))


def sign_of(shape: Shape, data: bytes) -> Sign:
    """Classify one event's data, or one NDJSON line."""
    if data == b"[DONE]":
        return Sign.END
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return Sign.CONTENT  # not ours to judge
    if not isinstance(event, dict):
        return Sign.CONTENT
    if event.get("error") and (shape is not Shape.MESSAGES or event.get("type") == "error"):
        return Sign.ERROR
    return _READERS[shape](event)


def _found(window: bytes, markers: tuple[bytes, ...], start: int) -> bool:
    """Whether a marker stands in `window` from `start` on."""
    for marker in markers:
        at = window.find(marker, start)
        while at >= 0:
            if at == 0 or marker[0] == _QUOTE or window[at - 1] in b"\r\n":
                return True
            at = window.find(marker, at + 1)
    return False


class Watch:
    """Reads the stream of one answer as it passes.

    Attributes:
        content: the first content has passed.
        error: an error event has passed.
        ended: the end marker, or an error event, has passed.
        fresh: the stream stands at an event boundary.
    """

    __slots__ = ("_rest", "_shape", "_tail", "content", "ended", "error", "error_data", "given")

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._rest = b""  # the line not yet complete, before the first content
        self._tail = b""
        self.content = self.ended = self.error = False
        self.error_data = b""
        self.given = 0  # input tokens told ahead of the content

    def feed(self, piece: bytes) -> None:
        """Look at the next piece."""
        if not self.content:
            self._read_lines(piece)
        window = self._tail + piece
        if not self.ended:
            start = max(0, len(self._tail) - _LONGEST)
            if _found(window, _END_MARKERS[self._shape], start):
                self.ended = True
            elif _found(window, _ERROR_MARKERS[self._shape], start):
                self.error = self.ended = True
        self._tail = window if len(window) <= _TAIL else window[-_TAIL:]

    def _read_lines(self, piece: bytes) -> None:
        lines = (self._rest + piece).splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        if len(self._rest) > _LINE_MAX:
            self.content, self._rest = True, b""
            return
        for line in lines:
            data = line.strip()
            if self._shape is not Shape.OLLAMA:
                if not data.startswith(b"data:"):
                    continue
                data = data[5:].strip()
            if not data:
                continue
            sign = sign_of(self._shape, data)
            if sign is Sign.ERROR:
                self.error = self.ended = True
                self.error_data = data[:4096]
                return
            if sign is Sign.CONTENT:
                self.content = True
                self._rest = b""
                return
            self._note_given(data)

    def _note_given(self, data: bytes) -> None:
        if self._shape is Shape.MESSAGES and (found := _INPUT.search(data)):
            self.given = int(found[1])

    @property
    def fresh(self) -> bool:
        tail = self._tail
        if self._shape is Shape.OLLAMA:
            return not tail or tail.endswith(b"\n")
        return not tail or tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))

    @property
    def whole(self) -> bool:
        """Whether the stream may end here: its end marker has passed, in an event that is complete.

        A reader drops an event that its blank line does not end, and with it the marker.
        """
        if not self.ended or self.fresh:
            return self.ended
        tail = self._tail.rstrip()
        return tail.endswith(b"}" if self._shape is Shape.OLLAMA else b"[DONE]")

    def usage(self) -> Usage | None:
        """Tokens, once the end has passed."""
        usage = usage_in(self._tail)
        if usage is not None and not usage.input:
            return Usage(self.given, usage.output)
        return usage
