"""The sink of a translated answer: back into text, and on to the client where it streams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from ..contracts import Backend, Fault, Headers, Provider, Reading, Usage
from ..routing.judge import fault_in, loads, read_document
from ..wire.answer import Answer
from ..wire.relay import ClientSink
from ..wire.usage import told_of

ANSWER_CAP = 16 << 20  # bytes of a backend's answer
EVENT_CAP = 4 << 20  # bytes of one event; Ollama's last has a number for each token of the context
_LINE_MOST = 500  # bytes of an error's words
JSON = (b"Content-Type", b"application/json")
_NDJSON = (b"Content-Type", b"application/x-ndjson")


class Reader:
    """The sink of a translated answer: reads it back, and passes the text on where it streams.

    Attributes:
        reading: what the answer says: text (but of a stream that was passed on), counts, receipts.
        problem: why the answer is no good, where it is not; fault: the same for the code.
    """

    def __init__(self, sink: ClientSink, stream: bool) -> None:
        self._sink = sink
        self._stream = stream
        self._events = False
        self._late = False  # the answer was passed on before its provider could read all of it
        self._rest = bytearray()  # the answer, or of its events the line that has not ended
        self._added = b""
        self._texts: list[str] = []
        self._size = 0
        self._backend: Backend | None = None
        self._provider: Provider | None = None
        self._answer: Answer | None = None  # while it runs: it holds this object
        self.status: int | None = None
        self.reading = Reading()
        self.problem: str | None = None
        self.fault: Fault | None = None

    def join(self, backend: Backend, provider: Provider) -> None:
        self._backend, self._provider = backend, provider

    def start(self, answer: Answer, added: bytes) -> None:
        self._answer, self.status = answer, answer.status
        self._added = added
        self._rest, self.problem, self.fault, self.reading = bytearray(), None, None, Reading()
        self._texts, self._size = [], 0
        good = (answer.status or 0) < 300
        self._events = good and answer.head is not None and answer.head.events
        self._late = good and (self._events or not answer.complete)

    def write(self, data: bytes) -> None:
        self._size += len(data)
        whole = 0 if self._stream else self._size
        most = EVENT_CAP if self._events else ANSWER_CAP
        if (whole > ANSWER_CAP or len(self._rest) > most) and self._answer is not None:
            self._refuse(Fault.MALFORMED, "the answer is too large")
            self._answer.cut(Fault.MALFORMED, "the answer is too large")
            return
        self._rest += data
        if self._events and b"\n" in data:  # else a long line would be looked through each time
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._event(bytes(line.strip()))

    def _event(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            line = line[5:].strip()
        elif not line.startswith(b"{"):
            return  # a comment, an event's name, a blank line
        if line in (b"", b"[DONE]") or self.problem is not None:
            return
        read = self._read(line)
        if read is None or read.error is not None:
            self._refuse_as(read)
            return
        if not self._stream:
            self._texts.append(read.text)
        said = self.reading
        extra = {**said.extra, **read.extra} if read.extra else said.extra
        self.reading = Reading(
            "", read.done or said.done, _both(said.usage, read.usage), None, extra
        )
        self._tell(self._answer)
        if self._stream and read.text:
            self._line({"response": read.text, "done": False})

    def _read(self, data: bytes) -> Reading | None:
        assert self._backend is not None
        assert self._provider is not None
        return read_document(self._backend, self._provider, data)

    def _tell(self, answer: Answer | None) -> None:
        """Tell the counts as the provider reads them: some families have names of their own."""
        usage = self.reading.usage
        if usage is not None and answer is not None:
            answer.told = told_of(usage)

    def _refuse_as(self, read: Reading | None) -> None:
        """By what was read: an error, nothing, or no JSON at all."""
        fault, detail = fault_in(read)
        if fault is not None:
            words = read.error if read is not None else None
            self._refuse(fault, words or f"the backend's answer is no good: {detail}")

    def _refuse(self, fault: Fault, problem: str) -> None:
        self.fault, self.problem = fault, problem

    def finish(self, trailers: Headers) -> None:
        answer, self._answer = self._answer, None
        if self._events:
            if rest := bytes(self._rest.strip()):
                self._event(rest)  # the last line, where nothing ends it
            self._tell(answer)
            self.reading = replace(self.reading, text="".join(self._texts))
        elif self.problem is None:
            body = bytes(self._rest)
            read = self._read(body)
            self.reading = read or Reading()
            self._tell(answer)
            if self.status is not None and self.status >= 300:
                self.problem = self.reading.error or _words(body, self.status)
            else:
                self._refuse_as(read)
        self._rest = bytearray()
        if self._late and self.fault is not None and answer is not None:
            answer.fault, answer.detail = self.fault, "found once it was passed on"

    def flush(self) -> None:
        """Nothing is held back: each line goes out as it is made."""

    def moved(self) -> bool:
        return self._sink.moved()

    def fail(self, event: bytes | None) -> None:
        self._answer = None
        self.problem = self.problem or "the backend's answer broke off"
        self._rest = bytearray()

    def _line(self, content: Mapping[str, Any]) -> None:
        if not self._sink.status:
            self._sink.begin_own(200, (_NDJSON, (b"X-Accel-Buffering", b"no")), self._added)
        self._sink.write(_dumps(content) + b"\n")

    def send(self, content: dict[str, Any], *, broken: bool) -> None:
        """Send the last word: the whole answer, or the last line of a stream."""
        if not self._stream:
            body = _dumps(content)
            self._sink.send_own(200, (JSON,), body, self._added)
            return
        if self.problem is None and self.reading.text and not self._events:
            self._line({"response": self.reading.text, "done": False})
        self._line({**content, "response": "", "done": True})
        if broken:
            self._sink.fail(None)
        else:
            self._sink.finish(())


def _words(body: bytes, status: int) -> str:
    """What an error says that is none of a dialect known: a plain line, or FastAPI's `detail`."""
    try:
        document = loads(body)
    except (ValueError, RecursionError):
        line = body.lstrip()[:_LINE_MOST].partition(b"\n")[0].decode(errors="replace").strip()
        said = line if line.isprintable() and not line.startswith("<") else ""
    else:
        told = document if isinstance(document, dict) else {}
        told = error if isinstance(error := told.get("error"), dict) else told
        keys = ("message", "detail", "error")
        said = next((told[key] for key in keys if isinstance(told.get(key), str)), "")
    return said.strip()[:_LINE_MOST] or f"the backend answered {status}"


def _both(told: Usage | None, new: Usage | None) -> Usage | None:
    """Counts of a stream add up: Anthropic tells the prompt's first, and the rest at the end."""
    if told is None or new is None:
        return new or told
    whole = new if new.input else told  # who says the input says with it what it is made of
    return Usage(
        whole.input,
        new.output or told.output,
        cached=whole.cached,
        cache_written=whole.cache_written,
    )


def _dumps(content: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(content)
    except TypeError:  # half a surrogate, or a number too long, in what a backend said
        return json.dumps(content).encode()
