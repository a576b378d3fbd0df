"""The whole output of a RunPod job as the document that the client's API expects.

worker-vllm yields what the model's server answered, and that is passed on. A handler of one's own
says its text in whatever shape; it becomes a chat or a completion, read by the same tolerant reader
as every other family's. An output that can be neither is never shown as an answer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from beacon_proxy.contracts import Dialect, Fault, Reading, Submission, Usage

from ..reading import load, read_answer
from .input import route_of
from .job import Failed, Failure

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TEXTS = (CHAT, COMPLETIONS)  # what a bare text can be made into
STREAMS = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
# The beginning of an event stream of these APIs (WHATWG HTML 9.2.5): comments and other fields,
# then a JSON object; a text may begin with "data: 3 apples".
SSE = re.compile(r"(?:(?:(?:event|id|retry)?:[^\n]*|\r)?\n)*data:\s*(?:\{|\[DONE\])")
# The same, of which only a piece has come so far.
BEGINS = re.compile(SSE.pattern + r"|(?::[^\n]*\n\s*)+\Z|data:\s*\Z")
# Where no text can be meant, any field is one.
FIELD = re.compile(r"\s*(?:(?:data|event|id|retry):|:[^\n]*\n)")


IN_OUTPUT = Failure(Fault.ERROR_BODY, "the output is an error")


class NoAnswer(Exception):
    """The output says nothing that this API's answer could be made of."""


def document_of(submission: Submission, output: Any) -> bytes:
    """The output of a completed job as one JSON document.

    Raises:
        NoAnswer: it cannot be.
        Failed: it is an error.
    """
    items = output if isinstance(output, list) else [output]
    if any(isinstance(item, str) and SSE.match(item) for item in items):
        raise NoAnswer("the output is a stream where a document was asked for")
    if len(items) == 1:
        output = items[0]  # worker-vllm is a generator that yields once
    if submission.dialect is Dialect.BEACON:
        return dumped(output if isinstance(output, Mapping) else {"output": output})
    opened = load(output.encode(errors="replace")) if isinstance(output, str) else output
    route = route_of(submission.path)
    if isinstance(opened, Mapping) and is_document(route, opened):
        return dumped(opened)
    if route not in TEXTS:
        if isinstance(opened, Mapping | list) and route not in STREAMS:
            return dumped(opened)  # embeddings and the like: nothing is known of them but JSON
        raise NoAnswer("the output is no answer of this API")
    reading = read(output)
    if reading.error is not None:
        raise Failed(IN_OUTPUT)
    if not reading.text:
        raise NoAnswer("the output holds no text")
    return dumped(chat_of(submission, reading.text, reading.usage))


def read(output: Any) -> Reading:
    """Read any output: under the reader's own word for it where it is no object."""
    return read_answer(output if isinstance(output, Mapping) else {"output": output})


def is_document(route: str, document: Mapping[str, Any]) -> bool:
    """Whether it is a whole answer of the route's API."""
    if route == CHAT:
        return bool(document.get("choices")) and _all_choices(document, "message")
    if route == COMPLETIONS:
        return bool(document.get("choices")) and _all_choices(document, "text")
    if route == MESSAGES:
        return document.get("type") == "message"
    return route == RESPONSES and document.get("object") == "response"


def is_event(route: str, document: Mapping[str, Any]) -> bool:
    """Whether it is one event of a stream of the route's API."""
    if route == CHAT:
        return _all_choices(document, "delta")
    if route == COMPLETIONS:
        return _all_choices(document, "text")
    return route in (MESSAGES, RESPONSES) and isinstance(document.get("type"), str)


def _all_choices(document: Mapping[str, Any], part: str) -> bool:
    choices = document.get("choices")
    return isinstance(choices, list) and all(isinstance(c, Mapping) and part in c for c in choices)


def chat_of(submission: Submission, text: str, usage: Usage | None) -> dict[str, Any]:
    """A text as the whole chat, or completion, that was asked for."""
    said = {"message": {"role": "assistant", "content": text}}
    return _made(submission, "", said, text, "stop", usage)


def chunk_of(
    submission: Submission, delta: dict[str, Any], finish: str | None, usage: Usage | None = None
) -> dict[str, Any]:
    """One chunk of such a chat; `delta` as OpenAI words it."""
    text = delta.get("content", "")
    return _made(submission, ".chunk", {"delta": delta}, text, finish, usage)


def _made(
    submission: Submission,
    part: str,
    said: dict[str, Any],
    text: str,
    finish: str | None,
    usage: Usage | None,
) -> dict[str, Any]:
    chat = route_of(submission.path) == CHAT
    asked = load(submission.body)
    made = {
        "id": ("chatcmpl-" if chat else "cmpl-") + submission.id,
        "object": f"chat.completion{part}" if chat else "text_completion",
        "created": int(time.time()),
        "model": asked.get("model") if isinstance(asked, Mapping) else None,
        "choices": [{"index": 0, **(said if chat else {"text": text}), "finish_reason": finish}],
    }
    if usage is not None:
        made["usage"] = {
            "prompt_tokens": usage.input,
            "completion_tokens": usage.output,
            "total_tokens": usage.input + usage.output,
        }
    return made


def dumped(document: Any) -> bytes:
    """JSON as RunPod's own servers write it: compact, in UTF-8."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")  # a lone surrogate is no UTF-8
