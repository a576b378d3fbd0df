"""What one event of a stream says, by its dialect: nothing, content, the end or an error."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from .dialects import Shape


class Sign(StrEnum):
    """What one event of a stream says."""

    NOTHING = "nothing"  # role chunks, pings, queue notices
    CONTENT = "content"
    LAST = "last"  # content, or the reason why there is no more
    DONE = "done"  # `[DONE]`: the end, and no content by itself
    ERROR = "error"


# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_QUIET, _CONTENT, _LAST, _, _ERROR = Sign
_CHAT, _RESPONSES = Shape.CHAT, Shape.RESPONSES
_MESSAGES, _OLLAMA = Shape.MESSAGES, Shape.OLLAMA


def _filled(value: Any) -> bool:
    """Whether any leaf under `value` holds something to show, the role aside."""
    if isinstance(value, dict):
        return any(_filled(item) for key, item in value.items() if key != "role")
    return bool(value)


def _read_chat(event: dict[str, Any]) -> Sign:
    choices = event.get("choices")
    if not isinstance(choices, list):
        return _QUIET if "usage" in event else _CONTENT
    sign = _QUIET
    for choice in choices:
        if not isinstance(choice, dict):
            return _CONTENT
        if choice.get("finish_reason"):
            return _LAST
        if _filled(choice.get("delta")) or choice.get("text"):
            sign = _CONTENT
    return sign


_RESPONSES_NOTHING = {"created", "queued", "in_progress", "output_item.added", "content_part.added"}


def _read_responses(event: dict[str, Any]) -> Sign:
    kind = str(event.get("type", "")).removeprefix("response.")
    if kind in ("error", "failed"):
        return _ERROR
    if kind in ("completed", "incomplete"):
        return _LAST
    return _QUIET if kind in _RESPONSES_NOTHING else _CONTENT


_MESSAGES_NOTHING = {"message_start", "ping", "content_block_start", "message_delta"}


def _read_messages(event: dict[str, Any]) -> Sign:
    kind = event.get("type")
    if kind == "error":
        return _ERROR
    if kind == "message_stop":
        return _LAST
    return _QUIET if kind in _MESSAGES_NOTHING else _CONTENT


def _read_ollama(event: dict[str, Any]) -> Sign:
    if event.get("done") is True:
        return _LAST
    if "message" not in event and "response" not in event:
        return _CONTENT
    filled = _filled(event.get("message")) or event.get("response") or event.get("thinking")
    return _CONTENT if filled else _QUIET


_READERS = {
    _CHAT: _read_chat,
    _RESPONSES: _read_responses,
    _MESSAGES: _read_messages,
    _OLLAMA: _read_ollama,
}


def sign_of(shape: Shape, event: dict[str, Any]) -> Sign:
    """Classify one event, or one line of NDJSON."""
    if event.get("error") and (shape is not _MESSAGES or event.get("type") == "error"):
        return _ERROR
    return _READERS[shape](event)
