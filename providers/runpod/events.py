"""What a RunPod job yields, piece by piece, as the stream that the client's API expects.

worker-vllm yields the model server's events as text, several or half of one in a piece: those bytes
are the stream. Objects become events, plain text becomes chunks of a chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from beacon_proxy.contracts import Dialect, Headers, Submission, Usage

from ..reading import load
from .answer import (
    BEGINS,
    CHAT,
    FIELD,
    IN_OUTPUT,
    STREAMS,
    TEXTS,
    NoAnswer,
    chunk_of,
    dumped,
    is_document,
    is_event,
    read,
)
from .input import route_of
from .job import Failed

_DONE = b"data: [DONE]\n\n"
_TYPE = re.compile(r"[\w.]+", re.ASCII)  # it becomes a line of its own


class Stream(Protocol):
    """Takes what a job yields and gives what the client is sent."""

    headers: Headers
    ended: bool  # the dialect's end marker has passed: nothing more will come

    def feed(self, piece: Any) -> bytes:
        """What one yielded piece is to the client.

        Raises:
            NoAnswer: it cannot be made anything of this API.
            Failed: it is an error.
        """
        ...

    def finish(self) -> bytes:
        """What is missing at the end of a job that completed.

        Nothing, where the worker passed on a server's stream that has not said that it is over: it
        broke there, and must not look whole here.
        """
        ...


def is_stream(submission: Submission) -> bool:
    """Whether a stream is asked for, of an API that has them: `stream` means nothing elsewhere."""
    streams = submission.dialect is Dialect.BEACON or route_of(submission.path) in STREAMS
    return submission.stream and streams


def stream_for(submission: Submission) -> Stream:
    return Lines() if submission.dialect is Dialect.BEACON else Events(submission)


class Events:
    """Server-sent events of OpenAI's and Anthropic's APIs."""

    headers: Headers = (
        (b"Content-Type", b"text/event-stream; charset=utf-8"),
        (b"Cache-Control", b"no-cache"),
    )

    def __init__(self, submission: Submission) -> None:
        self._submission = submission
        self._route = route_of(submission.path)
        self._raw = False  # the pieces are the stream itself
        self._begun = False
        self._text = False  # the chunks are ours, and so is the last one
        self._usage: Usage | None = None
        self._line: list[bytes] = []  # of the stream, the beginning of one
        self._between = True  # the last line was empty: no event is cut here
        self._done = False  # [DONE] has passed
        self._choices: dict[int, bool] = {}  # that have begun: whether each has finished
        self.ended = False

    def feed(self, piece: Any) -> bytes:
        if isinstance(piece, str) and (self._raw or self._begins(piece)):
            self._raw = True
            made = piece.encode(errors="replace")
        elif isinstance(piece, list):  # worker-vllm's batches
            return b"".join(map(self.feed, piece))
        else:
            made = self._event_of(piece)
        if made:
            self._begun = True
            self._look(made)
        return made

    def _begins(self, piece: str) -> bool:
        mark = BEGINS if self._route in TEXTS else FIELD
        return not self._begun and mark.match(piece) is not None

    def _event_of(self, piece: Any) -> bytes:
        document = piece
        if isinstance(piece, str) and piece.startswith("{"):
            document = load(piece.encode(errors="replace"))
        if self._route in TEXTS and isinstance(document, Mapping) and read(document).error:
            raise Failed(IN_OUTPUT)
        if isinstance(document, Mapping):
            if is_event(self._route, document):
                return self._event(document)
            if self._route == CHAT and is_document(CHAT, document):
                return self._event(_as_chunk(document))
        if self._route not in TEXTS:
            raise NoAnswer("the output is no event of this API")
        reading = read(piece)
        self._usage = reading.usage or self._usage
        if not reading.text:
            return b""
        role = {} if self._text else {"role": "assistant"}
        self._text = True
        return self._event(chunk_of(self._submission, {**role, "content": reading.text}, None))

    def _event(self, document: Mapping[str, Any]) -> bytes:
        named = b""
        if self._route not in TEXTS:
            if not _TYPE.fullmatch(document["type"]):
                raise NoAnswer("the output is no event of this API")
            named = b"event: %b\n" % document["type"].encode()
        return named + b"data: " + dumped(document) + b"\n\n"

    def _look(self, made: bytes) -> None:
        """See what the client has been told; a line may lie across several pieces."""
        if self._route not in TEXTS:
            return
        head, found, rest = made.rpartition(b"\n")
        if found:
            for line in b"".join((*self._line, head)).split(b"\n"):
                self._between = not line.strip()
                if line.startswith(b"data:"):
                    self._note(line[5:].strip())
            self._line.clear()
        self._line += [rest] * bool(rest)
        self.ended = self._done and self._between and not self._line

    def _note(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        document = load(data)
        choices = document.get("choices") if isinstance(document, Mapping) else None
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, Mapping):
                continue
            index = choice.get("index")
            index = index if isinstance(index, int) else 0
            finished = isinstance(choice.get("finish_reason"), str)
            if finished and read({"choices": [choice]}).error is not None:
                finished = False  # "abort" and the like: it broke off
            self._choices[index] = finished or self._choices.get(index, False)

    def finish(self) -> bytes:
        if self._route not in TEXTS or self.ended:
            return b""
        if self._text and not any(self._choices.values()):
            last = chunk_of(self._submission, {}, "stop", self._usage)
            return self._event(last) + _DONE
        if self._done or b"".join(self._line).strip() in (b"data: [DONE]", b"data:[DONE]"):
            return b"\n" if self._done and not self._line else b"\n\n"  # only its end is missing
        finished = bool(self._choices) and all(self._choices.values())
        return _DONE if finished and self._between and not self._line else b""


def _as_chunk(document: Mapping[str, Any]) -> dict[str, Any]:
    """A whole chat as the one chunk of a stream: `delta` for `message`, tool calls numbered."""
    choices = []
    for choice in document["choices"]:
        delta = dict(choice["message"]) if isinstance(choice["message"], Mapping) else {}
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            held = [call for call in calls if isinstance(call, Mapping)]
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(held)]
        rest = {key: value for key, value in choice.items() if key != "message"}
        finish = rest.get("finish_reason") or "stop"
        choices.append({**rest, "delta": delta, "finish_reason": finish})
    return {**document, "object": "chat.completion.chunk", "choices": choices}


class Lines:
    """NDJSON for the translated route: `{"response", "done"}`."""

    headers: Headers = ((b"Content-Type", b"application/x-ndjson"),)

    def __init__(self) -> None:
        self._raw = False
        self._begun = False
        self._rest = ""  # of a line that is not complete
        self._over = False  # the server's stream has said so
        self._last: dict[str, Any] = {"response": "", "done": True}
        self.ended = False

    def feed(self, piece: Any) -> bytes:
        if isinstance(piece, str) and (self._raw or (not self._begun and BEGINS.match(piece))):
            self._raw = True
            *lines, self._rest = (self._rest + piece).split("\n")
            return b"".join(map(self._event, lines))
        self._begun = True
        return self._line(piece)

    def _event(self, line: str) -> bytes:
        data = line.strip()
        if not data.startswith("data:"):
            return b""
        data = data[5:].strip()
        if data == "[DONE]":
            self._over = True
            return b""
        return self._line(load(data.encode(errors="replace")))

    def _line(self, piece: Any) -> bytes:
        reading = read(piece)
        if reading.error is not None:
            raise Failed(IN_OUTPUT)
        self._over = self._over or reading.done
        self._last |= reading.extra
        if reading.usage is not None:
            counts = {"prompt_eval_count": reading.usage.input, "eval_count": reading.usage.output}
            self._last |= counts
        if not reading.text:
            return b""
        return dumped({"response": reading.text, "done": False}) + b"\n"

    def finish(self) -> bytes:
        if self._raw and not self._over:
            return b""
        return dumped(self._last) + b"\n"
