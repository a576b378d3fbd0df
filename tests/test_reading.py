"""`providers.reading`: any server's answer back as text, and never an error as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Reading, Usage
from providers.reading import read_answer

CHUNK = {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}
COUNTED = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
# One piece of a worker's output holds one event or several (facts 1.5).
PIECES = [
    f"data: {json.dumps(CHUNK)}\n\n",
    f"data: {json.dumps(LAST)}\n\ndata: {json.dumps(COUNTED)}\n\ndata: [DONE]\n\n",
]
JOB = {"id": "sync-79164ff4-u1", "delayTime": 824, "executionTime": 3391, "status": "COMPLETED"}
BATCHES = [
    {"choices": [{"tokens": ["Hel"]}], "usage": {"input": 5, "output": 1}},
    {"choices": [{"tokens": ["l", "o"]}], "usage": {"input": 5, "output": 3}},
]
RECEIPT = {"id": "r-1", "signature": "…"}
FLAT = {"text": "Hello"}

SHAPES: dict[str, tuple[dict[str, Any], Reading]] = {
    "worker-vllm's batches": (
        {**JOB, "output": BATCHES},
        Reading("Hello", False, Usage(5, 3), extra={"job_id": JOB["id"]}),
    ),
    "worker-vllm's stream, aggregated": (
        {**JOB, "output": PIECES},
        Reading("Hello", True, Usage(5, 2), extra={"job_id": JOB["id"]}),
    ),
    "an OpenAI answer as a job's output": (
        {**JOB, "output": {"object": "chat.completion", **LAST, "usage": COUNTED["usage"]}},
        Reading("lo", True, Usage(5, 2), extra={"job_id": JOB["id"]}),
    ),
    "text that only begins like an event": ({"output": "data: {so}"}, Reading("data: {so}")),
    "Responses": (
        {
            "id": "resp_1",
            "object": "response",
            "status": "completed",
            "error": None,
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]},
            ],
            "usage": {"input_tokens": 5, "output_tokens": 3},
        },
        Reading("Hello", usage=Usage(5, 3)),
    ),
    "Anthropic's message": (
        {
            "type": "message",
            "content": [{"type": "text", "text": "Hello"}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 5, "output_tokens": 3},
        },
        Reading("Hello", True, Usage(5, 3)),
    ),
    "Anthropic's cache": (
        {
            "content": [{"type": "text", "text": "Hello"}],
            "usage": {
                "input_tokens": 1,
                "cache_read_input_tokens": 30,
                "cache_creation_input_tokens": 2,
                "output_tokens": 3,
            },
        },
        Reading("Hello", usage=Usage(33, 3, cached=30, cache_written=2)),
    ),
    "OpenAI's cache": (
        {
            "choices": [{"message": {"content": "Hello"}}],
            "usage": {
                "prompt_tokens": 33,
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 2},
            },
        },
        Reading("Hello", usage=Usage(33, 3, cached=30, cache_written=2)),
    ),
    "the cache of Responses": (
        {
            "output": [{"content": [{"type": "output_text", "text": "Hello"}]}],
            "usage": {
                "input_tokens": 33,
                "output_tokens": 3,
                "input_tokens_details": {"cached_tokens": 30},
            },
        },
        Reading("Hello", usage=Usage(33, 3, cached=30)),
    ),
    "DeepSeek's cache": (
        {
            "choices": [{"message": {"content": "Hello"}}],
            "usage": {
                "prompt_tokens": 33,
                "completion_tokens": 3,
                "prompt_cache_hit_tokens": 30,
                "prompt_tokens_details": None,
            },
        },
        Reading("Hello", usage=Usage(33, 3, cached=30)),
    ),
    "Anthropic's start": (
        {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 5}}},
        Reading(usage=Usage(5, 0)),
    ),
    "TGI's last event repeats the whole": (
        {
            "token": {"id": 9, "text": "lo", "special": False},
            "generated_text": "Hello",
            "details": {"finish_reason": "length", "generated_tokens": 2, "input_length": 5},
        },
        Reading("lo", True, Usage(5, 2)),
    ),
    "TGI's end of text is no text": (
        {"token": {"id": 2, "text": "</s>", "special": True}, "generated_text": None},
        Reading(),
    ),
    "llama.cpp's own": (
        {"content": "Hello", "stop": True, "tokens_evaluated": 5, "tokens_predicted": 3},
        Reading("Hello", usage=Usage(5, 3)),
    ),
    "the old router's": (
        {
            "success": True,
            "response": "Hello",
            "provider_used": "golem-1",
            "metadata": {"tokens_generated": 3, "tokens_prompt": 5, "receipt": RECEIPT},
        },
        Reading("Hello", usage=Usage(5, 3), extra={"receipt": RECEIPT}),
    ),
    "status and output": (
        {"status": "success", "output": "Hello", "usage": {"output_tokens": 3}},
        Reading("Hello", usage=Usage(0, 3)),
    ),
    "nested": ({"output": {"response": {"message": {"content": "Hello"}}}}, Reading("Hello")),
    "list of texts": ({"text": ["Hel", "lo"]}, Reading("Hello")),
    "receipt beside": ({**FLAT, "receipt": "r-1"}, Reading("Hello", extra={"receipt": "r-1"})),
    "one of receipts": (
        {**FLAT, "receipts": [RECEIPT]},
        Reading("Hello", extra={"receipts": [RECEIPT], "receipt": RECEIPT}),
    ),
    "receipt of a job": (
        {**JOB, "output": {**FLAT, "metadata": {"receipt": RECEIPT}}},
        Reading("Hello", extra={"receipt": RECEIPT, "job_id": JOB["id"]}),
    ),
}


@pytest.mark.parametrize(("document", "expected"), SHAPES.values(), ids=SHAPES)
def test_read_when_the_shape_is_a_familys_finds_text_counts_and_receipts(
    document: dict[str, Any], expected: Reading
) -> None:
    assert read_answer(document) == expected


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "in a completed job": (
        {**JOB, "output": [{"error": {"message": "vLLM returned HTTP 400: x", "code": None}}]},
        "vLLM returned HTTP 400: x",
    ),
    "behind the events of a job": (
        {**JOB, "output": [PIECES[0], {"error": {"message": "worker lost"}}]},
        "worker lost",
    ),
    "inside an event of a job": (
        {**JOB, "output": [PIECES[0], 'data: {"error": {"message": "CUDA"}}\n\n']},
        "CUDA",
    ),
    "the SDK's, with its traceback": (
        {**JOB, "status": "FAILED", "error": '{"error_type": "T", "error_message": "boom"}'},
        "boom",
    ),
    "a handler's own word": ({**JOB, "output": {"status": "error", "message": "no"}}, "no"),
    "a handler's success": ({**JOB, "output": {"success": False, "detail": "no"}}, "no"),
    "a choice's": ({"choices": [{"error": {"code": 502, "message": "up"}, "text": "x"}]}, "up"),
    "finish_reason": (
        {"choices": [{"text": "Hel", "finish_reason": "abort"}]},
        "the generation ended with: abort",
    ),
    "status as a number": ({"status": 500, "message": "boom", "text": "x"}, "boom"),
    "FastAPI's detail": ({"status": "error", "detail": [{"msg": "Field required"}]}, "Field requ"),
    "failure alone": ({"failure": {"message": "no GPU"}, "response": "x"}, "no GPU"),
    "in the queue": ({"id": "a-u1", "status": "IN_QUEUE"}, "the job is still IN_QUEUE"),
    "in progress": ({"id": "a-u1", "status": "IN_PROGRESS"}, "the job is still IN_PROGRESS"),
    "in progress, counted": (
        {"id": "a", "status": "running", "usage": {"output_tokens": 3}},
        "the job is still running",
    ),
    "two outputs deep": ({**JOB, "output": {"output": {"error": "boom", "text": "Trace"}}}, "boom"),
    "in a message": ({"message": {"content": "x", "error": {"message": "boom"}}}, "boom"),
    "in a part of the content": (
        {"content": [{"type": "text", "text": "so far"}, {"type": "error", "message": "boom"}]},
        "boom",
    ),
    "a list in a list": ({**JOB, "output": ["so far", [{"output": {"error": "boom"}}]]}, "boom"),
    "code as a number": ({"text": "x", "message": "boom", "code": 500}, "boom"),
    "not ok": ({"text": "x", "detail": "boom", "ok": False}, "boom"),
    "finish_reason, of whoever was stopped": (
        {"choices": [{"text": "Hel", "finish_reason": "cancelled"}]},
        "the generation ended with: cancelled",
    ),
    "finish_reason, in an output": (
        {**JOB, "output": [{"text": "Hel", "finish_reason": "ABORT"}]},
        "the generation ended with: ABORT",
    ),
    "cancelling": ({**JOB, "status": "CANCELLING", "output": "Hel"}, "CANCELLING"),
    "rejected": ({"response": "x", "status": "rejected"}, "rejected"),
    "timed out": ({**JOB, "status": "TIMED_OUT", "output": "Hel"}, "TIMED_OUT"),
}


@pytest.mark.parametrize(("document", "words"), ERRORS.values(), ids=ERRORS)
def test_read_when_the_answer_is_an_error_has_its_words_and_no_text(
    document: dict[str, Any], words: str
) -> None:
    reading = read_answer(document)
    assert reading.error is not None
    assert reading.error.startswith(words)
    assert reading.text == ""


@pytest.mark.parametrize(
    "said",
    [
        {"code": 200, "message": "OK"},
        {"code": 10_000, "message": "success"},
        {"code": "500"},
        {"ok": True},
        {"error": None},
        {"status": "completed", "code": 0},
        {"finish_reason": "stop"},
        {"finish_reason": {"type": "stop"}},
    ],
)
def test_read_when_a_gateway_says_that_all_is_well_has_the_text(said: dict[str, Any]) -> None:
    reading = read_answer({"text": "hello", **said})
    assert (reading.text, reading.error) == ("hello", None)


# Names and values that mean something somewhere, so that nonsense is near to sense.
_WORDS = """choices message delta response output text content token tokens generated_text error
    status success usage metadata failure finish_reason done type object input prompt_tokens
    eval_count receipt receipts id details special stop_reason detail msg code"""
_NAMES = st.sampled_from(_WORDS.split()) | st.text(max_size=4)
_LEAVES = st.sampled_from(
    [
        *(None, True, False, 0, 7, -1, 500, 2.5, "", "a", "{", "{}", "[", "error", "FAILED"),
        *("IN_QUEUE", "data: {", 'data: {"error": 1}\n\n', "\ud800", "abort", "thinking"),
    ]
) | st.text(max_size=6)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=14,
)
_DOCUMENTS = st.dictionaries(_NAMES, _JSON, max_size=6)


def texts(value: Any) -> list[str]:
    """Every string that stands in a document as a value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in texts(each)]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(_DOCUMENTS)
def test_read_when_the_document_is_any_json_never_raises_and_invents_nothing(
    document: dict[str, Any],
) -> None:
    """What is told as text stands in the document, letter for letter."""
    reading = read_answer(document)
    assert reading.error is None or (reading.error and not reading.text)
    rest = reading.text
    for text in sorted(texts(document), key=len, reverse=True):
        rest = rest.replace(text, "") if text else rest
    if not any(text.startswith("data: {") for text in texts(document)):
        assert rest == ""
    for count in (reading.usage.input, reading.usage.output) if reading.usage else ():
        assert count >= 0
    assert set(reading.extra) <= {"receipt", "receipts", "job_id"}


_SAYS_ERROR = st.sampled_from(
    [
        {"error": "boom"},
        {"error": {"message": "boom"}},
        {"status": "FAILED"},
        {"status": "error"},
        {"status": False},
        {"status": 503},
        {"success": False},
        {"failure": {"code": "X"}},
        {"object": "error"},
        {"output": {"error": "boom"}},
        {"output": [{"text": "so far"}, {"error": {"message": "boom"}}]},
        {"choices": [{"text": "so far", "finish_reason": "error"}]},
        {"choices": [{"message": {"content": "so far", "error": "boom"}}]},
        {"output": {"output": {"error": "boom", "text": "so far"}}},
        {"message": {"content": [{"text": "so far"}, {"status": "failed"}]}},
        {"code": 429, "message": "slow down"},
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(_DOCUMENTS, _SAYS_ERROR)
def test_read_when_an_error_stands_among_anything_gives_no_text(
    document: dict[str, Any], error: dict[str, Any]
) -> None:
    reading = read_answer({**document, **error})
    assert reading.text == ""
    assert reading.error
