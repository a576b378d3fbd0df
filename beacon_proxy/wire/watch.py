"""Reading an answer's stream as it passes: first content, an error in it, its end, its tokens.

A 200 head says little: vLLM sends it with an empty role chunk while the request still queues, and
a cut stream looks like a short one. So a `Watch` reads an answer as it passes and tells three
moments: the first *content*, an *error* said inside the answer, and the dialect's *end* marker. It
keeps the last piece and one event at most, whatever the length of the stream, and never changes a
byte.

Before the first content each event is parsed; after it only those that hold a literal of an end, an
error or the counts of tokens. The literal alone is no proof: tool arguments may hold any JSON. What
passes between is only counted, in lines, for the case that nobody says how many tokens it was.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from .dialects import Shape
from .signs import Sign, sign_of
from .usage import NOTHING, Ends, Tally, Told, load_of

_LINE_MAX = 256 << 10  # bytes of one event that are kept until it is complete
_LONGEST = 32  # bytes; no hint below is longer
_BLANKS = 4  # bytes; no event is as short
_BEFORE = 4096  # bytes kept of what came before a piece that ends an event, and no more

# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_QUIET, _CONTENT, _LAST, _END, _ERROR = Sign
_CHAT, _RESPONSES = Shape.CHAT, Shape.RESPONSES
_MESSAGES, _OLLAMA = Shape.MESSAGES, Shape.OLLAMA
_DONE = b"[DONE]"
# A line that holds none of the four says nothing but content; one that does is parsed.
_HINTS = {
    _CHAT: (b'"finish_reason":"', b'"finish_reason": "', b"[DONE]", b'"error"'),
    _RESPONSES: (b".completed", b".incomplete", b".failed", b'"error"'),
    _MESSAGES: (b'"message_stop"', b'"error"', b'"message_delta"', b'"message_delta"'),
    _OLLAMA: (b'"done":true', b'"done": true', b'"error"', b'"error"'),
}
# Behind its end only OpenAI's chat says more: other choices, and the counts.
_AFTER = (b'"usage"', b'"timings"', b'"finish_reason":"', b"[DONE]")
_ANY = (b"", b"", b"", b"")
_HINTED = {
    hints: re.compile(b"|".join(map(re.escape, hints))).search
    for hints in (*_HINTS.values(), _AFTER, _ANY)
}


def _event_in(data: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


class Watch:
    """Reads the stream of one answer as it passes.

    Attributes:
        content: the first content has passed.
        error: an error event has passed.
        ended: the end marker, or an error event, has passed.
        error_data: the error event, at most 4 KiB of it.
        load: s that loading the model took, as Ollama says it at the end.
    """

    __slots__ = (
        "_counts_all",
        "_hints",
        "_idle",
        "_last",
        "_lines",
        "_long",
        "_long_ends",
        "_named",
        "_rest",
        "_shape",
        "_tally",
        "content",
        "ended",
        "error",
        "error_data",
        "load",
    )

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._hints = _HINTS[shape]
        self._rest = b""  # the line not yet complete
        self._long: Ends | None = None  # of a line too long to be kept
        self._long_ends = False  # it has an end mark
        self._last = b""  # the last whole lines
        self._lines = 0  # that ended behind the first content
        self._idle = 0  # events among them that are known to be no content
        self._named = False  # events have a line with their name
        self._tally: Tally | None = None  # while nothing has been said
        self._counts_all = shape is not _CHAT  # there only few events say anything
        self.content = self.ended = self.error = False
        self.error_data = b""
        self.load: float | None = None

    def feed(self, piece: bytes) -> None:
        """Look at the next piece."""
        window = self._rest + piece if self._rest else piece
        end = window.rfind(b"\n") + 1
        if end != len(window):
            self._rest = window[end:]
            if len(self._rest) > _LINE_MAX:
                self._rest = b""
                if end:
                    self.feed(window[:end])
                self._give_up_line(window[end:])
                return
            window = window[:end]
        elif self._rest:
            self._rest = b""
        if self.content:
            # Unrolled, and faster than `in`: this runs for each token.
            self._lines += window.count(b"\n")
            find = window.find
            one, two, three, four = self._hints
            if find(one) >= 0 or find(two) >= 0 or find(three) >= 0 or find(four) >= 0:
                self._read(window, True)
        elif end:
            self._read(window, False)
        if end > _BLANKS:
            self._last = window
        elif end:  # they do not take the place of an event
            self._last = self._last[-_BEFORE:] + window

    def _read(self, window: bytes, counted: bool) -> None:
        """Read whole lines; `counted`: the first content had passed before, so they are counted."""
        before = b""
        for line in window[:-1].split(b"\n"):
            if self.content:
                self._lines += not counted
                if not _HINTED[self._hints](line):
                    before = line if len(line) > 1 else before
                    continue
            if line:
                self._read_line(line, before)

    def _give_up_line(self, rest: bytes) -> None:
        """A line too long to be kept is content; an end mark inside it is believed as it stands."""
        if self._long is None:
            self._long = Ends(rest.removeprefix(b"data:").lstrip())
            self._long_ends = False
        else:
            self._long.feed(rest[_LONGEST:])
        self.content = True
        if any(hint in rest for hint in _HINTS[self._shape]):
            self.ended = self._long_ends = True
        self._rest = rest[-_LONGEST:]
        self._hints = _ANY  # its end is to be read

    def _data_of(self, line: bytes) -> bytes:
        """What the line says, where it says something."""
        data = line.strip()
        if self._shape is _OLLAMA:
            return data
        if data.startswith(b"data:"):
            return data[5:].strip()
        self._named = self._named or data.startswith(b"event:")
        return b""

    def _read_line(self, line: bytes, before: bytes) -> None:
        if self._long is not None:
            self._read_long(line)
            return
        data = self._data_of(line)
        if not data:
            return
        if data == _DONE:
            sign = _END
            if not self.ended:  # nobody said that a choice has finished, nor counted behind that
                self._look_back(before)
        elif (event := _event_in(data)) is None:
            sign = _CONTENT  # not ours to judge
        else:
            sign = sign_of(self._shape, event)
            counts = "usage" in event or "timings" in event
            if counts or self._counts_all:
                if sign is _LAST and not (counts or self.ended):
                    self._look_back(before)
                self._count(event, sign)
        if sign is _CONTENT:
            self.content = self.content or not self.ended
            return
        self._idle += self.content
        if sign is _QUIET or self.ended:
            return
        if sign is _ERROR:
            self.error = True
            self.error_data = data[:4096]
        self.content = self.content or sign is _LAST
        self._end()

    def _count(self, event: dict[str, Any], sign: Sign) -> None:
        """Take the counts of tokens from an event."""
        tally = self._tally
        if tally is None:
            tally = self._tally = Tally()
            self._counts_all = True
        tally.finished = tally.finished or sign is _LAST
        tally.read(self._shape, event)
        if sign is _LAST and self._shape is _OLLAMA:
            self.load = load_of(event)

    def _end(self) -> None:
        self.ended = True
        if self._shape is _CHAT:
            self._hints = _AFTER

    def _read_long(self, line: bytes) -> None:
        """Find the counts in a line that was too long to be kept, by its two ends; see above."""
        ends, self._long = self._long, None
        assert ends is not None
        ends.feed(line[_LONGEST:].rstrip())
        responses = self._shape is _RESPONSES
        event = ends.document(b"response" if responses else b"")
        if self._shape is _CHAT:
            event["choices"] = [{}]  # only what one says is as long
        if self._long_ends or any(hint in line for hint in _HINTS[self._shape]):
            self.ended = True
            self._count(event, _LAST)
        else:
            self._count(event, _CONTENT)
        after = self.ended and self._shape is _CHAT
        self._hints = _AFTER if after else _HINTS[self._shape]

    def _look_back(self, before: bytes = b"") -> None:
        """Take the counts of the event before, where each event has them (vLLM's
        `continuous_usage_stats`): it was not parsed as it passed, and those that were are out of
        date. `before`: its line; else it is among the last that were kept.
        """
        if self._shape is not _CHAT:
            return
        earlier, self._tally = self._tally, None
        for line in (before, *reversed(self._last.split(b"\n"))):
            if data := self._data_of(line):
                event = _event_in(data)
                if event is not None and ("usage" in event or "timings" in event):
                    self._count(event, _CONTENT)
                break
        if self._tally is None and earlier is not None:
            given, _, cached, written = earlier.told
            earlier.told = given, None, cached, written
            self._tally = earlier

    @property
    def fresh(self) -> bool:
        """Whether the stream stands at an event boundary."""
        if self._shape is _OLLAMA:
            return not self._rest
        end = self._last[-4:] + self._rest[-4:]
        return not end or end.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))

    @property
    def whole(self) -> bool:
        """Whether the stream may end here: its end marker has passed, in an event that is complete.

        A reader drops an event that its blank line does not end, and with it the marker.
        """
        ollama = self._shape is _OLLAMA
        if (rest := self._rest) and not self.ended and (ollama or rest.strip().endswith(_DONE)):
            self._read_line(rest, b"")
            return self.ended
        if ollama:
            return self.ended
        return self.ended and (self.fresh or (rest or self._last).rstrip().endswith(_DONE))

    def told(self) -> Told:
        """Tokens as the backend counted them, as far as it has."""
        if self._long is not None:
            self._read_long(self._rest)
        if not self.ended:
            self._look_back()
        return NOTHING if self._tally is None else self._tally.told

    @property
    def events(self) -> int:
        """How many events with content have passed, or so: comments and pings count, too."""
        if not self.content:
            return 0
        lines, blank = (1, 0) if self._shape is _OLLAMA else (3 if self._named else 2, 1)
        return max(1, 1 + (self._lines - blank + lines // 2) // lines - self._idle)
