"""The sink of a translated answer: back into text, and on to the client where it streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from ..contracts import Backend, Fault, Headers, Provider, Reading
from ..wire.answer import Answer
from ..wire.relay import ClientSink

ANSWER_CAP = 16 << 20  # bytes of a backend's answer, and of one event
JSON = (b"Content-Type", b"application/json")
_NDJSON = (b"Content-Type", b"application/x-ndjson")


class Reader:
    """The sink of a translated answer: reads it back, and passes the text on where it streams.

    Attributes:
        reading: the last thing read: of a document all of it.
        problem: why the answer is no good, where it is not.
    """

    def __init__(self, sink: ClientSink, stream: bool) -> None:
        self._sink = sink
        self._stream = stream
        self._events = False
        self._rest = b""
        self._added = b""
        self._texts: list[str] = []
        self._size = 0
        self._backend: Backend | None = None
        self._provider: Provider | None = None
        self._answer: Answer | None = None  # while it runs: it holds this object
        self.status: int | None = None
        self.reading = Reading()
        self.problem: str | None = None

    def join(self, backend: Backend, provider: Provider) -> None:
        self._backend, self._provider = backend, provider

    def start(self, answer: Answer, added: bytes) -> None:
        self._answer, self.status = answer, answer.status
        self._added = added
        self._rest, self.problem, self.reading = b"", None, Reading()
        self._texts, self._size = [], 0
        good = (answer.status or 0) < 300
        self._events = good and answer.head is not None and answer.head.events

    def write(self, data: bytes) -> None:
        self._size += len(data)
        held = self._size if not self._stream else len(self._rest)
        if held > ANSWER_CAP and self._answer is not None:
            self.problem = "the answer is too large"
            self._answer.cut(Fault.MALFORMED, self.problem)
            return
        self._rest += data
        if self._events:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._event(line.strip())

    def _event(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            line = line[5:].strip()
        elif not line.startswith(b"{"):
            return  # a comment, an event's name, a blank line
        if line == b"[DONE]":
            return
        read = self._read(line)
        usage = read.usage or self.reading.usage
        if not self._stream:
            self._texts.append(read.text)
        self.reading = Reading("", read.done, usage, read.error, read.extra or self.reading.extra)
        if read.error is not None:
            self.problem = read.error
        if self._stream and read.text:
            self._line({"response": read.text, "done": False})

    def _read(self, data: bytes) -> Reading:
        assert self._backend is not None
        assert self._provider is not None
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            return Reading(error="the backend's answer is not a JSON object")
        return self._provider.read(self._backend, document)

    def finish(self, trailers: Headers) -> None:
        self._answer = None
        if self._events:
            self.reading = replace(self.reading, text="".join(self._texts))
        elif self.problem is None:
            self.reading = self._read(self._rest)
            self.problem = self.reading.error
        self._rest = b""

    def flush(self) -> None:
        """Nothing is held back: each line goes out as it is made."""

    def moved(self) -> bool:
        return self._sink.moved()

    def fail(self, event: bytes | None) -> None:
        self._answer = None
        self.problem = self.problem or "the backend's answer broke off"

    def _line(self, content: Mapping[str, Any]) -> None:
        if not self._sink.status:
            self._sink.begin_own(200, (_NDJSON, (b"X-Accel-Buffering", b"no")), self._added)
        self._sink.write(orjson.dumps(content) + b"\n")

    def send(self, content: dict[str, Any], *, broken: bool) -> None:
        """Send the last word: the whole answer, or the last line of a stream."""
        if not self._stream:
            body = orjson.dumps(content)
            self._sink.send_own(200, (JSON,), body, self._added)
            return
        if self.problem is None and self.reading.text and not self._events:
            self._line({"response": self.reading.text, "done": False})
        self._line({**content, "response": "", "done": True})
        if broken:
            self._sink.fail(None)
        else:
            self._sink.finish(())
