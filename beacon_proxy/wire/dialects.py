"""What a path speaks: which route it is, and how an error is told in its dialect."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from ..contracts import Dialect


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

# POST to one of these runs no model, on the servers that have it: Ollama, llama.cpp, vLLM, OpenAI,
# Anthropic. A count of tokens is an inference route in all else: what it says is judged as such.
RUNS_NOTHING = frozenset(
    {
        *("/api/show", "/api/pull", "/api/push", "/api/create", "/api/copy"),
        *("/tokenize", "/detokenize", "/apply-template", "/v1/files", "/v1/uploads"),
        "/v1/messages/count_tokens",
    }
)


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
