"""The four dialects' streams and documents, as their own servers write them.

Each stream is cut where commit is decided: `quiet` events that say nothing yet, `content`, and the
`end` that the dialect asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .kit_client import Text, request
from .kit_scripts import SSE_HEAD, chat_events, event

NDJSON_HEAD = SSE_HEAD.replace(b"text/event-stream", b"application/x-ndjson")


@dataclass(frozen=True)
class Api:
    """One inference route: what a client sends and what a good backend answers."""

    name: str
    path: str
    ask: dict[str, Any]
    head: bytes  # of a streamed answer
    quiet: tuple[bytes, ...]
    content: tuple[bytes, ...]
    end: tuple[bytes, ...]
    error: bytes  # an error event inside a stream
    document: dict[str, Any]

    @property
    def events(self) -> tuple[bytes, ...]:
        return self.quiet + self.content + self.end

    def body(self, *, stream: bool) -> bytes:
        return json.dumps({**self.ask, "stream": stream}).encode()

    def request(self, *, stream: bool, headers: Iterable[tuple[Text, Text]] = ()) -> bytes:
        fields = [("Content-Type", "application/json"), *headers]
        return request("POST", self.path, fields, self.body(stream=stream))


def named(obj: dict[str, Any]) -> bytes:
    """An SSE event with its `event:` line, as Anthropic and the Responses API write it."""
    return b"event: %b\n%b" % (str(obj["type"]).encode(), event(obj))


def line(obj: Any) -> bytes:
    """One line of NDJSON."""
    return json.dumps(obj, separators=(",", ":")).encode() + b"\n"


_MESSAGES = [{"role": "user", "content": "hi"}]
_ROLE, *_CHAT = chat_events("hello ", 3)


def _completion(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return event({"id": "cmpl-1", "object": "text_completion", "choices": [choice]})


def _ollama(key: str, text: str, done: bool = False) -> bytes:
    said: Any = {"role": "assistant", "content": text} if key == "message" else text
    counts = {"done_reason": "stop", "prompt_eval_count": 5, "eval_count": 3} if done else {}
    return line(
        {"model": "m", "created_at": "2026-01-01T00:00:00Z", key: said, "done": done, **counts}
    )


def _response(status: str) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "output": []}


CHAT = Api(
    name="chat",
    path="/v1/chat/completions",
    ask={"model": "m", "messages": _MESSAGES},
    head=SSE_HEAD,
    quiet=(_ROLE,),
    content=tuple(_CHAT[:3]),
    end=tuple(_CHAT[3:]),
    error=event({"error": {"message": "boom", "type": "server_error", "code": 500}}),
    document={
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    },
)
COMPLETIONS = Api(
    name="completions",
    path="/v1/completions",
    ask={"model": "m", "prompt": "hi"},
    head=SSE_HEAD,
    quiet=(),
    content=(_completion("hello "),) * 3,
    end=(_completion("", "length"), b"data: [DONE]\n\n"),
    error=event({"error": {"message": "boom", "type": "server_error", "code": 500}}),
    document={
        "id": "cmpl-1",
        "object": "text_completion",
        "choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}],
    },
)
RESPONSES = Api(
    name="responses",
    path="/v1/responses",
    ask={"model": "m", "input": "hi"},
    head=SSE_HEAD,
    quiet=(
        named({"type": "response.created", "response": _response("in_progress")}),
        named({"type": "response.in_progress", "response": _response("in_progress")}),
        named({"type": "response.output_item.added", "item": {"type": "message", "content": []}}),
    ),
    content=(named({"type": "response.output_text.delta", "delta": "hello "}),) * 3,
    end=(named({"type": "response.completed", "response": _response("completed")}),),
    error=named({"type": "error", "code": "server_error", "message": "boom", "param": None}),
    document={
        **_response("completed"),
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "hello"}]}],
    },
)
MESSAGES = Api(
    name="messages",
    path="/v1/messages",
    ask={"model": "m", "max_tokens": 9, "messages": _MESSAGES},
    head=SSE_HEAD,
    quiet=(
        named(
            {
                "type": "message_start",
                "message": {"id": "msg_1", "content": [], "usage": {"input_tokens": 5}},
            }
        ),
        named(
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            }
        ),
        named({"type": "ping"}),
    ),
    content=(
        named(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": "hello "},
            }
        ),
    )
    * 3,
    end=(
        named({"type": "content_block_stop", "index": 0}),
        named(
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": 3},
            }
        ),
        named({"type": "message_stop"}),
    ),
    error=named({"type": "error", "error": {"type": "overloaded_error", "message": "boom"}}),
    document={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "output_tokens": 3},
    },
)
OLLAMA_CHAT = Api(
    name="ollama-chat",
    path="/api/chat",
    ask={"model": "m", "messages": _MESSAGES},
    head=NDJSON_HEAD,
    quiet=(),
    content=(_ollama("message", "hello "),) * 3,
    end=(_ollama("message", "", done=True),),
    error=line({"error": "boom"}),
    document={"model": "m", "message": {"role": "assistant", "content": "hello"}, "done": True},
)
OLLAMA_GENERATE = Api(
    name="ollama-generate",
    path="/api/generate",
    ask={"model": "m", "prompt": "hi"},
    head=NDJSON_HEAD,
    quiet=(),
    content=(_ollama("response", "hello "),) * 3,
    end=(_ollama("response", "", done=True),),
    error=line({"error": "boom"}),
    document={"model": "m", "response": "hello", "done": True},
)
APIS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE)
