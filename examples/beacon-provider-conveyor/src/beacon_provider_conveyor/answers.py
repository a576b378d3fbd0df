"""A job's text as the client's dialect has it: a stream of pieces with an end, or one document."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol


class Voice(Protocol):
    """One dialect."""

    stream_type: bytes  # Content-Type of a stream

    def piece(self, text: str) -> bytes: ...

    def last(self, tokens: dict[str, int]) -> bytes:
        """What ends a stream; without it the core holds the stream to be broken."""
        ...

    def document(self, text: str, tokens: dict[str, int]) -> bytes: ...


@dataclass(frozen=True)
class Chat:
    """OpenAI's chat completions."""

    job: str
    model: str
    count: bool  # the client asked for `stream_options.include_usage`
    stream_type = b"text/event-stream"

    def piece(self, text: str) -> bytes:
        return self._event([{"index": 0, "delta": {"content": text}, "finish_reason": None}])

    def last(self, tokens: dict[str, int]) -> bytes:
        end = self._event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        return end + (self._event([], _usage(tokens)) if self.count else b"") + b"data: [DONE]\n\n"

    def document(self, text: str, tokens: dict[str, int]) -> bytes:
        said = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        return self._object("chat.completion", [choice], _usage(tokens))

    def _event(self, choices: list[Any], usage: dict[str, Any] | None = None) -> bytes:
        return b"data: " + self._object("chat.completion.chunk", choices, usage) + b"\n\n"

    def _object(self, kind: str, choices: list[Any], usage: dict[str, Any] | None) -> bytes:
        said = {"id": self.job, "object": kind, "model": self.model, "choices": choices}
        return json.dumps(said | ({"usage": usage} if usage else {})).encode()


def chat_voice(job: str, chat: dict[str, Any]) -> Chat:
    """As this chat request wants to be answered."""
    options = chat.get("stream_options")
    count = isinstance(options, dict) and options.get("include_usage") is True
    return Chat(job, str(chat["model"]), count)


def _usage(tokens: dict[str, int]) -> dict[str, int]:
    given, made = tokens["input"], tokens["output"]
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


@dataclass(frozen=True)
class Lines:
    """What the core expects on its translated route, `/inference`; `Conveyor.read` reads it."""

    job: str
    stream_type = b"application/x-ndjson"

    def piece(self, text: str) -> bytes:
        return json.dumps({"response": text, "done": False}).encode() + b"\n"

    def last(self, tokens: dict[str, int]) -> bytes:
        return self.document("", tokens) + b"\n"

    def document(self, text: str, tokens: dict[str, int]) -> bytes:
        said = {"response": text, "done": True, "tokens": tokens, "job": self.job}
        return json.dumps(said).encode()
