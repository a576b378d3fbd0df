"""A prompt as a chat, and any server's answer back as text: shared by every family.

One tolerant reader: what servers of these families call their text, their counts and their errors
differs, and none of the names means anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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
    "token",  # TGI's own stream, whose last event repeats all of it as generated_text
    "generated_text",  # TGI's own
    "tokens",  # worker-vllm
)
_FAILED = frozenset(
    {
        *("failed", "failure", "error", "aborted", "expired", "rejected", "terminated"),
        *("cancelled", "canceled", "cancelling", "canceling", "timed_out", "timeout"),
    }
)
_PENDING = frozenset({"in_queue", "in_progress", "running", "queued", "pending", "starting"})
_JOB = _PENDING | {"completed", "failed", "cancelled", "timed_out"}
# Reasons to finish that are none: OpenRouter's, SGLang's, and what others call it.
_BROKEN = ("error", "abort", "aborted", "cancelled", "canceled", "failed")
_HTTP_ERRORS = range(400, 600)  # by other numbers some gateways say that all is well
_COUNTS = (
    ("prompt_tokens", "completion_tokens"),
    ("input_tokens", "output_tokens"),
    ("tokens_prompt", "tokens_generated"),  # /inference
    ("prompt_eval_count", "eval_count"),  # Ollama
    ("tokens_evaluated", "tokens_predicted"),  # llama.cpp's own
    ("input_length", "generated_tokens"),  # TGI's own
)
# What of a prompt came from a cache, and was put there: Anthropic counts it apart.
_BESIDE = {"input_tokens": ("cache_read_input_tokens", "cache_creation_input_tokens")}
_INSIDE = ("cached_tokens", "cache_write_tokens")  # OpenAI, OpenRouter
_WORKER = (("input", "output"),)  # worker-vllm, inside `usage` alone
_RECEIPTS = ("receipt", "receipts")
_MESSAGE_MAX = 500  # characters


def read_answer(document: Mapping[str, Any]) -> Reading:
    """Read the text, the counts and the error of an answer or of one of its events.

    One reader for all, since gateways mix the shapes. `text` is `""` where there is none or where
    the answer is an error; a job that is not done yet is one. `done` may come before the event that
    carries the usage. `extra` has `receipt` (and `receipts`), and the `job_id` of a job object.
    """
    events = _events_in(document.get("output"))
    if events is not None:
        document = {**document, "output": events}
    error = _error_in(document)
    text = "" if error else _text_in(document)
    if error is None and not text and _state(document) in _PENDING:
        # Taken for an answer, it would be an empty text at a price.
        error = f"the job is still {document['status']}"
    return Reading(text, _is_done(document), _usage_in(document), error, _extra_in(document))


def _text_in(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth > _DEPTH:
        return ""
    if isinstance(value, list):
        return "".join([_text_in(item, depth + 1) for item in value])
    if not isinstance(value, Mapping) or _is_no_text(value):
        return ""
    for key in _TEXT:
        held = _first_choice(value) if key == "choices" else value.get(key)
        if not held or (key == "message" and isinstance(held, str)):
            continue  # a message that is a string is a remark about the answer
        if text := _text_in(held, depth + 1):
            return text
    return ""


def _is_no_text(part: Mapping[str, Any]) -> bool:
    """A thought, or a token that is a mark of the model's own, such as its end."""
    kind = part.get("type")
    thought = isinstance(kind, str) and kind.startswith(("reasoning", "thinking"))
    return thought or part.get("special") is True


def _is_done(document: Mapping[str, Any]) -> bool:
    return (
        document.get("done") is True
        or any(_first_choice(each).get("finish_reason") for each in _holders(document))
        or isinstance(document.get("stop_reason"), str)  # Anthropic
        or ("token" in document and isinstance(document.get("generated_text"), str))  # TGI
    )


def _first_choice(document: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = document.get("choices")  # some send null beside the usage
    return _mapping(choices[0]) if isinstance(choices, list) and choices else {}


def _error_in(document: Mapping[str, Any]) -> str | None:
    # worker-vllm hides an error in the output of a completed job, handlers deeper than that.
    return next((said for each in _levels(document) if (said := _error_of(each))), None)


def _levels(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Every mapping from which a text might be taken, the outer ones first."""
    if depth > _DEPTH:
        return
    if isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping | list):
                yield from _levels(item, depth + 1)
    elif isinstance(value, Mapping):
        yield value
        for key in _TEXT:
            held = _first_choice(value) if key == "choices" else value.get(key)
            if isinstance(held, Mapping | list):
                yield from _levels(held, depth + 1)


def _error_of(document: Mapping[str, Any]) -> str | None:
    if error := document.get("error"):
        return _message(error)
    if _has_failed(document):
        return _message(document.get("failure") or document)
    reason = document.get("finish_reason")
    if isinstance(reason, str) and reason.lower() in _BROKEN:
        return f"the generation ended with: {reason}"
    return None


def _has_failed(document: Mapping[str, Any]) -> bool:
    status = document.get("status")
    return (
        status is False
        or _state(document) in _FAILED
        or ((code := _count(status)) is not None and code >= 400)
        or _count(document.get("code")) in _HTTP_ERRORS
        or document.get("success") is False
        or document.get("ok") is False
        or bool(_mapping(document.get("failure")))
        or "error" in (document.get("object"), document.get("type"))  # SGLang's flat shape
    )


def _state(document: Mapping[str, Any]) -> str:
    status = document.get("status")
    return status.lower() if isinstance(status, str) else ""


def _message(error: Any) -> str:
    if isinstance(error, str) and error.startswith("{"):
        error = load(error.encode(errors="replace")) or error  # the runpod SDK, with its traceback
    for _ in range(_DEPTH):
        if isinstance(error, list):
            error = error[0] if error else None
        elif isinstance(error, Mapping):
            keys = ("message", "error_message", "detail", "msg", "code", "status")
            told = (error[key] for key in keys if isinstance(error.get(key), str | list | Mapping))
            error = next(told, None)
    said = error.strip() if isinstance(error, str) else ""
    return said[:_MESSAGE_MAX] or "the backend reported an error without a message"


def _usage_in(document: Mapping[str, Any]) -> Usage | None:
    """The counts of the last place that has any: worker-vllm's batches count on."""
    usage = None
    metadata = _mapping(document.get("metadata"))
    inner = (_mapping(document.get(name)) for name in ("message", "details"))  # Anthropic, TGI
    for holder in (metadata, *inner, *_items(document.get("output")), document):
        usage = (
            _counted(_mapping(holder.get("usage")), _COUNTS + _WORKER)
            or _counted(holder, _COUNTS)
            or usage
        )
    return usage


def _counted(counts: Mapping[str, Any], names: Iterable[tuple[str, str]]) -> Usage | None:
    for given, made in names:
        pair = (_count(counts.get(given)), _count(counts.get(made)))
        if pair != (None, None):
            beside = [_count(counts.get(name)) or 0 for name in _BESIDE.get(given, ())]
            details = _mapping(counts.get(f"{given}_details"))  # OpenAI's: parts of the input
            inside = [_count(details.get(name)) or 0 for name in _INSIDE]
            if given == "prompt_tokens":  # DeepSeek's
                inside[0] = inside[0] or _count(counts.get("prompt_cache_hit_tokens")) or 0
            cached, written = beside if any(beside) else inside
            return Usage((pair[0] or 0) + sum(beside), pair[1] or 0, False, cached, written)
    return None


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and value >= 0 else None


def _extra_in(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a client or an operator wants to have beside the text."""
    found: dict[str, Any] = {}
    for holder in _holders(document):
        for place in (holder, _mapping(holder.get("metadata"))):
            for name in _RECEIPTS:
                if place.get(name):
                    found.setdefault(name, place[name])
    several = found.get("receipts")
    if "receipt" not in found and several:
        found["receipt"] = several[0] if isinstance(several, list) else several
    job = document.get("id")
    if isinstance(job, str) and job and _state(document) in _JOB and "object" not in document:
        found["job_id"] = job
    return found


def _events_in(output: Any) -> list[Any] | None:
    """What worker-vllm's output holds where it was asked for a stream: its events, as their text.

    One piece may hold several events, and an error stands beside them. None: it is no such output.
    """
    pieces = output if isinstance(output, list) else [output]
    said = "".join([piece for piece in pieces if isinstance(piece, str)])
    if not said.startswith("data: {"):
        return None
    found: list[Any] = []
    for line in said.splitlines():
        name, _, data = line.partition(":")
        if name == "data" and data.strip() != "[DONE]":
            found.append(load(data.encode(errors="replace")))
    if not all(isinstance(event, Mapping) for event in found):
        return None  # a text that only begins like one
    return found + [piece for piece in pieces if isinstance(piece, Mapping)]


def _holders(document: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The document, and what its job put out."""
    return (document, *_items(document.get("output")))


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
