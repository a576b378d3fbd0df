"""A prompt as a chat, and any server's answer back as text: shared by every family.

One tolerant reader: what servers of these families call their text, their counts and their errors
differs, and none of the names means anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from beacon_proxy.contracts import Call, Dialect, Prompt, Reading, Usage


def ask_chat(target: bytes, prompt: Prompt) -> Call:
    """Put a prompt as a chat of one message, which every server of this family takes."""
    body: dict[str, Any] = {
        "model": prompt.model,
        "messages": [{"role": "user", "content": prompt.prompt}],
        "temperature": prompt.temperature,
        "max_tokens": prompt.max_tokens,
        "stream": prompt.stream,
    }
    if prompt.stream:
        body["stream_options"] = {"include_usage": True}
    return Call(target, json.dumps(body).encode(), Dialect.OPENAI)


_DEPTH = 8  # levels of a document that may lead to its text
# The first that holds text is taken.
_TEXT = (
    "choices",  # OpenAI
    "message",  # OpenAI, Ollama's chat
    "delta",
    "response",  # Ollama's generate, /inference
    "output",  # RunPod
    "text",
    "content",  # Anthropic, llama.cpp's own
    "generated_text",  # TGI's own
    "tokens",  # worker-vllm
    "token",  # TGI's own stream
)
_FAILED = frozenset({"failed", "error", "failure", "cancelled", "timed_out"})
_COUNTS = (
    ("prompt_tokens", "completion_tokens"),
    ("input_tokens", "output_tokens"),
    ("input", "output"),  # worker-vllm
    ("prompt_eval_count", "eval_count"),  # Ollama
)
_MESSAGE_MAX = 500  # characters


def read_answer(document: Mapping[str, Any]) -> Reading:
    """Read the text, the counts and the error of an answer or of one of its events.

    One reader for all, since gateways mix the shapes. `text` is `""` where there is none or where
    the answer is an error. `done` may come before the event that carries the usage.
    """
    metadata = _mapping(document.get("metadata"))
    receipt = document.get("receipt") or metadata.get("receipt")
    extra = {"receipt": receipt} if receipt else {}
    done = document.get("done") is True or bool(_first_choice(document).get("finish_reason"))
    usage = _usage_in(document) or _counted({"eval_count": metadata.get("tokens_generated")})
    error = _error_in(document)
    return Reading("" if error else _text_in(document), done, usage, error, extra)


def _text_in(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth > _DEPTH:
        return ""
    if isinstance(value, list):
        return "".join(_text_in(item, depth + 1) for item in value)
    if not isinstance(value, Mapping) or _is_thought(value):
        return ""
    for key in _TEXT:
        held = _first_choice(value) if key == "choices" else value.get(key)
        if not held or (key == "message" and isinstance(held, str)):
            continue  # a message that is a string is a remark about the answer
        if text := _text_in(held, depth + 1):
            return text
    return ""


def _is_thought(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind.startswith(("reasoning", "thinking"))


def _first_choice(document: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = document.get("choices")  # some send null beside the usage
    return _mapping(choices[0]) if isinstance(choices, list) and choices else {}


def _error_in(document: Mapping[str, Any]) -> str | None:
    if error := document.get("error"):
        return _message(error)
    status = document.get("status")
    failed = status is False or (isinstance(status, str) and status.lower() in _FAILED)
    if failed or document.get("success") is False:
        return _message(document.get("failure") or document)
    if "error" in (document.get("object"), document.get("type")):  # SGLang's flat shape
        return _message(document)
    # worker-vllm hides an error in the output of a completed job.
    errors = (item.get("error") for item in _items(document.get("output")))
    return next((_message(error) for error in errors if error), None)


def _message(error: Any) -> str:
    if isinstance(error, str) and error.startswith("{"):
        error = load(error.encode(errors="replace")) or error  # the runpod SDK, with its traceback
    if isinstance(error, Mapping):
        keys = ("message", "error_message", "detail", "code", "status")
        error = next((error[key] for key in keys if isinstance(error.get(key), str)), None)
    said = error.strip() if isinstance(error, str) else ""
    return said[:_MESSAGE_MAX] or "the backend reported an error without a message"


def _usage_in(document: Mapping[str, Any]) -> Usage | None:
    # worker-vllm counts in the batches of its output, on from one to the next.
    usage = None
    for holder in (*_items(document.get("output")), document):
        usage = _counted(_mapping(holder.get("usage")) or holder) or usage
    return usage


def _counted(counts: Mapping[str, Any]) -> Usage | None:
    for given, made in _COUNTS:
        pair = (_count(counts.get(given)), _count(counts.get(made)))
        if pair != (None, None):
            return Usage(pair[0] or 0, pair[1] or 0)
    return None


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and value >= 0 else None


def _items(output: Any) -> Iterable[Mapping[str, Any]]:
    listed = output if isinstance(output, list) else [output]
    return (item for item in listed if isinstance(item, Mapping))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def load(body: bytes) -> Any:
    """Parse JSON from outside; None where it is none, or nested too deeply to be meant."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
