"""Reading an answer's stream as it passes: first content, an error inside it, its end marker.

A 200 head says little: vLLM sends it with an empty role chunk while the request still queues, and
a cut stream looks like a short one. So a `Watch` reads an answer as it passes and tells three
moments: the first *content*, an *error* said inside the answer, and the dialect's *end* marker. It
keeps one event at most, whatever the length of the stream, and never changes a byte.

Before the first content each event is parsed; after it only those that hold a literal of an end or
an error. The literal alone is no proof: tool arguments may hold any JSON.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import orjson

from ..contracts import Usage
from .dialects import Shape

_LINE_MAX = 256 << 10  # bytes of one event that are kept until it is complete
_LONGEST = 32  # bytes; no hint below is longer
_TAIL = 2048  # bytes kept for the event boundary, and for usage at the end
_TRIM = _TAIL + 512  # bytes from which on the tail is cut: not at each piece


class Sign(StrEnum):
    """What one event of a stream says."""

    NOTHING = "nothing"  # role chunks, pings, queue notices
    CONTENT = "content"
    LAST = "last"  # content, or the reason why there is no more
    DONE = "done"  # `[DONE]`: the end, and no content by itself
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
    sign = Sign.NOTHING
    for choice in choices:
        if not isinstance(choice, dict):
            return Sign.CONTENT
        if choice.get("finish_reason"):
            return Sign.LAST
        if _filled(choice.get("delta")) or choice.get("text"):
            sign = Sign.CONTENT
    return sign


_RESPONSES_NOTHING = {"created", "queued", "in_progress", "output_item.added", "content_part.added"}


def _read_responses(event: dict[str, Any]) -> Sign:
    kind = str(event.get("type", "")).removeprefix("response.")
    if kind in ("error", "failed"):
        return Sign.ERROR
    if kind in ("completed", "incomplete"):
        return Sign.LAST
    return Sign.NOTHING if kind in _RESPONSES_NOTHING else Sign.CONTENT


_MESSAGES_NOTHING = {"message_start", "ping", "content_block_start"}


def _read_messages(event: dict[str, Any]) -> Sign:
    kind = event.get("type")
    if kind == "error":
        return Sign.ERROR
    if kind == "message_stop":
        return Sign.LAST
    return (
        Sign.NOTHING if kind in ("message_start", "ping", "content_block_start") else Sign.CONTENT
    )


def _read_ollama(event: dict[str, Any]) -> Sign:
    if event.get("done") is True:
        return Sign.LAST
    if "message" not in event and "response" not in event:
        return Sign.CONTENT
    filled = _filled(event.get("message")) or event.get("response") or event.get("thinking")
    return Sign.CONTENT if filled else Sign.NOTHING


_READERS = {
    Shape.CHAT: _read_chat,
    Shape.RESPONSES: _read_responses,
    Shape.MESSAGES: _read_messages,
    Shape.OLLAMA: _read_ollama,
}
# A line that holds none of the four is neither an end nor an error; one that does is parsed.
_HINTS = {
    Shape.CHAT: (b'"finish_reason":"', b'"finish_reason": "', b"[DONE]", b'"error"'),
    Shape.RESPONSES: (b".completed", b".incomplete", b".failed", b'"error"'),
    Shape.MESSAGES: (b'"message_stop"', b'"error"', b'"error"', b'"error"'),
    Shape.OLLAMA: (b'"done":true', b'"done": true', b'"error"', b'"error"'),
}

_INPUT = re.compile(rb'"(?:prompt_tokens|input_tokens|prompt_eval_count)"\s*:\s*(\d+)')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens|eval_count)"\s*:\s*(\d+)')


_LOAD = re.compile(rb'"load_duration"\s*:\s*(\d+)')
_LOADED = 1.0  # s; Ollama tells of milliseconds where the model was in memory already


def load_in(tail: bytes | bytearray) -> float | None:
    """Seconds that Ollama spent on loading the model, by the last part of its answer.

    None where it had not to (docs/api.md: `load_duration`, in ns).
    """
    found = _LOAD.findall(tail)
    seconds = int(found[-1]) / 1e9 if found else 0.0
    return seconds if seconds >= _LOADED else None


def usage_in(tail: bytes | bytearray) -> Usage | None:
    """Tokens as the last part of an answer counts them; None where it does not say."""
    output = _OUTPUT.findall(tail)
    if not output:
        return None
    given = _INPUT.findall(tail)
    return Usage(int(given[-1]) if given else 0, int(output[-1]))


def usage_of(document: dict[str, Any]) -> Usage | None:
    """Tokens as a whole answer counts them; None where it does not say."""
    counts = document.get("usage")
    if not isinstance(counts, dict):
        counts = document  # Ollama's
    for given_name, output_name in _COUNTS:
        output = counts.get(output_name)
        if type(output) is int:  # a bool is none
            given = counts.get(given_name)
            return Usage(given if type(given) is int else 0, output)
    return None


# Names of the counts of input and output: OpenAI's, Anthropic's, Ollama's.
_COUNTS = (
    ("prompt_tokens", "completion_tokens"),
    ("input_tokens", "output_tokens"),
    ("prompt_eval_count", "eval_count"),
)


def sign_of(shape: Shape, data: bytes) -> Sign:
    """Classify one event's data, or one NDJSON line."""
    if data == b"[DONE]":
        return Sign.DONE
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return Sign.CONTENT  # not ours to judge
    if not isinstance(event, dict):
        return Sign.CONTENT
    if event.get("error") and (shape is not Shape.MESSAGES or event.get("type") == "error"):
        return Sign.ERROR
    return _READERS[shape](event)


class Watch:
    """Reads the stream of one answer as it passes.

    Attributes:
        content: the first content has passed.
        error: an error event has passed.
        ended: the end marker, or an error event, has passed.
        error_data: the error event, at most 4 KiB of it.
    """

    __slots__ = (
        "_given",
        "_hints",
        "_rest",
        "_shape",
        "_tail",
        "content",
        "ended",
        "error",
        "error_data",
    )

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._hints = _HINTS[shape]
        self._rest = b""  # the line not yet complete
        self._tail = bytearray()
        self.content = self.ended = self.error = False
        self.error_data = b""
        self._given = 0  # input tokens, told ahead of the content

    def feed(self, piece: bytes) -> None:
        """Look at the next piece."""
        tail = self._tail
        tail += piece
        if len(tail) > _TRIM:
            del tail[:-_TAIL]
        if self.ended:
            return
        window = self._rest + piece if self._rest else piece
        end = window.rfind(b"\n") + 1
        if end != len(window):
            self._rest = window[end:]
            if len(self._rest) > _LINE_MAX:
                self._give_up_line()
        elif self._rest:
            self._rest = b""
        if not end:
            return
        if self.content:
            # Unrolled, and faster than `in`: this runs for each token. A hint in the line that is
            # not complete costs a look at the others, and no more.
            find = window.find
            one, two, three, four = self._hints
            if find(one) < 0 and find(two) < 0 and find(three) < 0 and find(four) < 0:
                return
        for line in window[:end].split(b"\n"):
            self._read_line(line)

    def _give_up_line(self) -> None:
        """A line too long to be kept is content; an end mark inside it is believed as it stands."""
        self.content = True
        self.ended = self.ended or any(hint in self._rest for hint in self._hints)
        self._rest = self._rest[-_LONGEST:]

    def _read_line(self, line: bytes) -> None:
        data = line.strip()
        if self._shape is not Shape.OLLAMA:
            if not data.startswith(b"data:"):
                return
            data = data[5:].strip()
        if not data or self.ended:
            return
        sign = sign_of(self._shape, data)
        if sign is Sign.ERROR:
            self.error = self.ended = True
            self.error_data = data[:4096]
        elif sign in (Sign.LAST, Sign.DONE):
            self.ended = True
            self.content = self.content or sign is Sign.LAST
        elif sign is Sign.CONTENT:
            self.content = True
        elif self._shape is Shape.MESSAGES and (found := _INPUT.search(data)):
            self._given = int(found[1])

    @property
    def fresh(self) -> bool:
        """Whether the stream stands at an event boundary."""
        tail = self._tail
        if self._shape is Shape.OLLAMA:
            return not tail or tail.endswith(b"\n")
        return not tail or tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))

    @property
    def whole(self) -> bool:
        """Whether the stream may end here: its end marker has passed, in an event that is complete.

        A reader drops an event that its blank line does not end, and with it the marker.
        """
        if self._rest and not self.ended:
            rest, self._rest = self._rest, b""
            if self._shape is Shape.OLLAMA or rest.strip().endswith(b"[DONE]"):
                self._read_line(rest)
                return self.ended
        if self._shape is Shape.OLLAMA:
            return self.ended
        return self.ended and (self.fresh or self._tail.rstrip().endswith(b"[DONE]"))

    def load(self) -> float | None:
        """Seconds that loading the model took, once the end has passed; see `load_in`."""
        return load_in(self._tail) if self._shape is Shape.OLLAMA else None

    def usage(self) -> Usage | None:
        """Tokens, once the end has passed."""
        usage = usage_in(self._tail[-_TAIL:])
        if usage is not None and not usage.input:
            return Usage(self._given, usage.output)
        return usage
