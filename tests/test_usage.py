"""Tokens of a stream or a document, as the wire reads them; what is told is never guessed.

The streams are cut anywhere: where a piece ends says nothing about where an event does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.wire.dialects import Shape
from beacon_proxy.wire.usage import NOTHING, Ends, Told, guess_input, load_of, text_size, told_by
from beacon_proxy.wire.watch import Watch

from .kit import event, line, named

DONE = b"data: [DONE]\n\n"
FINISH = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
COUNTS = {"prompt_tokens": 33, "completion_tokens": 5, "total_tokens": 38}
TIMINGS = {"cache_n": 32, "prompt_n": 1, "prompt_ms": 3.2, "predicted_n": 5, "predicted_ms": 1.5}
CACHED = {"prompt_tokens_details": {"cached_tokens": 30}}  # OpenAI's
FORGED: dict[str, Any] = {
    "usage": {
        "prompt_tokens": 99,
        "completion_tokens": 99,
        "input_tokens": 99,
        "prompt_tokens_details": {"cached_tokens": 98},
        "cache_read_input_tokens": 98,
    },
    "timings": {"prompt_n": 99, "predicted_n": 99, "cache_n": 98},
    "prompt_tokens_details": {"cached_tokens": 98},
    "cached_tokens": 98,
    "prompt_eval_count": 99,
    "eval_count": 99,
    "prompt_tokens": 99,
    "output_tokens": 99,
}


def said(text: str, index: int = 0, **more: Any) -> bytes:
    delta = {"index": index, "delta": {"content": text}, "finish_reason": None}
    return event({"choices": [delta], **more})


def finish(index: int, **more: Any) -> bytes:
    return event({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}], **more})


def counted(**counts: Any) -> bytes:
    return event({"choices": [], "usage": counts})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
TOKENS = (said("a"),) * 3
TOOLS = event(
    {
        "choices": [
            {"index": 0, "delta": {"tool_calls": [{"function": {"arguments": json.dumps(FORGED)}}]}}
        ]
    }
)


def message(kind: str, **fields: Any) -> bytes:
    return named({"type": kind, **fields})


def delta(text: str) -> bytes:
    return message("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


START = message(
    "message_start",
    message={
        "content": [],
        "usage": {
            "input_tokens": 1,
            "cache_read_input_tokens": 30,
            "cache_creation_input_tokens": 2,
            "output_tokens": 1,
        },
    },
)
STOP = message("message_stop")


def response(kind: str, text: str = "", **more: Any) -> bytes:
    done = {"id": "resp_1", "output": [{"content": [{"text": text}]}], **more}
    return named({"type": f"response.{kind}", "response": done})


def ollama(text: str, **more: Any) -> bytes:
    return line({"model": "m", "message": {"content": text, **more.pop("message", {})}, **more})


# Last lines of Ollama: `context` stands before the counts (api/types.go), or wherever it likes.
CONTEXT = {"context": list(range(900))}
LAST: dict[str, Any] = {
    "done": True,
    "total_duration": 9,
    "load_duration": 2_500_000_000,
    "prompt_eval_count": 33,
    "eval_duration": 4,
    "eval_count": 5,
}

Counts = tuple[int | None, int | None] | Told  # without a cache, or with it


def full(counts: Counts) -> Told:
    return counts if len(counts) == 4 else (*counts, 0, 0)


TOLD: dict[str, tuple[Shape, Sequence[bytes], Counts]] = {
    "chat, include_usage": (
        Shape.CHAT,
        (ROLE, *TOKENS, FINISH, counted(**COUNTS), DONE),
        (33, 5),
    ),
    "chat, null in every other chunk": (
        Shape.CHAT,
        (ROLE, *(said("a", usage=None),) * 3, finish(0, usage=None), counted(**COUNTS), DONE),
        (33, 5),
    ),
    "chat, choices null beside the usage": (
        Shape.CHAT,
        (ROLE, *TOKENS, FINISH, event({"choices": None, "usage": COUNTS}), DONE),
        (33, 5),
    ),
    "chat, usage in the chunk that finishes": (
        Shape.CHAT,
        (ROLE, *TOKENS, finish(0, usage=COUNTS), DONE),
        (33, 5),
    ),
    "chat, no finish_reason": (Shape.CHAT, (*TOKENS, counted(**COUNTS), DONE), (33, 5)),
    "chat, no [DONE]": (Shape.CHAT, (*TOKENS, FINISH, counted(**COUNTS)), (33, 5)),
    "chat, spaced as json.dumps does": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            b"data: " + json.dumps({"choices": [], "usage": COUNTS}).encode() + b"\n\n",
            DONE,
        ),
        (33, 5),
    ),
    "chat, CRLF": (
        Shape.CHAT,
        tuple(each.replace(b"\n", b"\r\n") for each in (*TOKENS, FINISH, counted(**COUNTS), DONE)),
        (33, 5),
    ),
    "llama.cpp without include_usage": (
        Shape.CHAT,
        (ROLE, *TOKENS, finish(0, timings=TIMINGS), DONE),
        (33, 5, 32, 0),
    ),
    "llama.cpp, both": (
        Shape.CHAT,
        (*TOKENS, FINISH, event({"choices": [], "usage": COUNTS, "timings": TIMINGS}), DONE),
        (33, 5, 32, 0),
    ),
    "llama.cpp, both, with details": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            event({"choices": [], "usage": {**COUNTS, **CACHED}, "timings": TIMINGS}),
            DONE,
        ),
        (33, 5, 30, 0),
    ),
    "chat, a cache": (
        Shape.CHAT,
        (ROLE, *TOKENS, FINISH, counted(**COUNTS, **CACHED), DONE),
        (33, 5, 30, 0),
    ),
    "chat, a cache that is written (OpenRouter)": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            counted(
                **COUNTS, prompt_tokens_details={"cached_tokens": 20, "cache_write_tokens": 10}
            ),
            DONE,
        ),
        (33, 5, 20, 10),
    ),
    "chat, a cache by DeepSeek's name": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            counted(**COUNTS, prompt_cache_hit_tokens=30, prompt_cache_miss_tokens=3),
            DONE,
        ),
        (33, 5, 30, 0),
    ),
    "chat, details null (vLLM)": (
        Shape.CHAT,
        (*TOKENS, FINISH, counted(**COUNTS, prompt_tokens_details=None), DONE),
        (33, 5),
    ),
    "chat, details that are none": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            counted(
                **COUNTS,
                prompt_tokens_details={"cached_tokens": True, "cache_write_tokens": -1},
                prompt_cache_hit_tokens="30",
            ),
            DONE,
        ),
        (33, 5),
    ),
    "chat, more from a cache than there is": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            counted(**COUNTS, prompt_tokens_details={"cached_tokens": 34}),
            DONE,
        ),
        (33, 5, 33, 0),
    ),
    "chat, more from and to a cache than there is": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            counted(
                **COUNTS, prompt_tokens_details={"cached_tokens": 30, "cache_write_tokens": 20}
            ),
            DONE,
        ),
        (33, 5, 13, 20),
    ),
    "chat, a cache of a prompt that is not counted": (
        Shape.CHAT,
        (*TOKENS, FINISH, counted(completion_tokens=5, **CACHED), DONE),
        (None, 5),
    ),
    "vLLM, continuous, a cache told at the end": (
        Shape.CHAT,
        (
            *(said("a", usage={"prompt_tokens": 33, "completion_tokens": n}) for n in (1, 2)),
            *(FINISH, counted(**COUNTS, **CACHED), DONE),
        ),
        (33, 5, 30, 0),
    ),
    "llama.cpp, two choices, a cache": (
        Shape.CHAT,
        (
            *(said("a", 1), said("b"), finish(1)),
            counted(**COUNTS, prompt_tokens_details={"cached_tokens": 32}),
            *(finish(0), counted(**COUNTS, **CACHED), DONE),
        ),
        (33, 10, 30, 0),
    ),
    "llama.cpp, two choices": (
        Shape.CHAT,
        (
            *(said("a", 1), said("b")),
            *(finish(1), counted(**COUNTS), said("b")),
            *(finish(0), counted(**{**COUNTS, "completion_tokens": 7}), DONE),
        ),
        (33, 12),
    ),
    "llama.cpp, two choices without include_usage": (
        Shape.CHAT,
        (said("a", 1), finish(1, timings=TIMINGS), said("b"), finish(0, timings=TIMINGS), DONE),
        (33, 10, 32, 0),
    ),
    "vLLM, continuous": (
        Shape.CHAT,
        (
            *(said("a", usage={"prompt_tokens": 33, "completion_tokens": n}) for n in (1, 2, 3)),
            finish(0, usage={"prompt_tokens": 33, "completion_tokens": 4}),
            counted(**COUNTS),
            DONE,
        ),
        (33, 5),
    ),
    "vLLM, continuous, two choices": (
        Shape.CHAT,
        (
            *(finish(n, usage={"prompt_tokens": 33, "completion_tokens": n}) for n in (0, 1)),
            counted(**COUNTS),
            DONE,
        ),
        (33, 5),
    ),
    "continuous, but for the end": (
        Shape.CHAT,
        (
            *(said("a", usage={"prompt_tokens": 33, "completion_tokens": n}) for n in (1, 5)),
            *(FINISH, DONE),
        ),
        (33, 5),
    ),
    "counts in the first chunk alone": (
        Shape.CHAT,
        (
            said("a", usage={"prompt_tokens": 33, "completion_tokens": 1}),
            *(*TOKENS, FINISH, DONE),
        ),
        (33, None),
    ),
    "vLLM, continuous, cut": (
        Shape.CHAT,
        tuple(said("a", usage={"prompt_tokens": 33, "completion_tokens": n}) for n in (1, 2, 3)),
        (33, 3),
    ),
    "chat, said again": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH, counted(prompt_tokens=33, completion_tokens=4)),
            *(b": ping\n\n", counted(**COUNTS), DONE),
        ),
        (33, 5),
    ),
    "chat, tool arguments with counts": (
        Shape.CHAT,
        (ROLE, TOOLS, FINISH, counted(**COUNTS), TOOLS, DONE),
        (33, 5),
    ),
    "chat, only tool arguments have counts": (Shape.CHAT, (ROLE, TOOLS, FINISH, DONE), NOTHING),
    "chat, not a word": (Shape.CHAT, (ROLE, *TOKENS, FINISH, DONE), NOTHING),
    "messages": (
        Shape.MESSAGES,
        (
            *(START, delta("a"), delta(json.dumps(FORGED))),
            *(message("message_delta", delta={}, usage={"output_tokens": 5}), STOP),
        ),
        (33, 5, 30, 2),
    ),
    "messages, cumulative": (
        Shape.MESSAGES,
        (
            *(START, delta("a")),
            message("message_delta", delta={}, usage={"output_tokens": 2}),
            message("message_delta", delta={}, usage={"input_tokens": 40, "output_tokens": 5}),
            STOP,
        ),
        (40, 5),
    ),
    "messages, a cache, cumulative": (
        Shape.MESSAGES,
        (
            *(START, delta("a")),
            message(
                "message_delta",
                delta={},
                usage={
                    "input_tokens": 3,
                    "cache_read_input_tokens": 40,
                    "cache_creation_input_tokens": 7,
                    "output_tokens": 5,
                },
            ),
            STOP,
        ),
        (50, 5, 40, 7),
    ),
    "messages, tool input with counts": (
        Shape.MESSAGES,
        (
            START,
            message("content_block_start", content_block={"type": "tool_use", "input": FORGED}),
            message("content_block_delta", delta={"partial_json": json.dumps(FORGED)}),
            message("message_delta", delta={"usage": FORGED}, usage={"output_tokens": 5}),
            STOP,
        ),
        (33, 5, 30, 2),
    ),
    "messages, cut": (Shape.MESSAGES, (START, delta("a")), (33, None, 30, 2)),
    "responses": (
        Shape.RESPONSES,
        (
            response("created", usage=None),
            message("response.output_text.delta", delta=json.dumps(FORGED)),
            response("completed", "a", usage={"input_tokens": 33, "output_tokens": 5}),
        ),
        (33, 5),
    ),
    "responses, a cache": (
        Shape.RESPONSES,
        (
            message("response.output_text.delta", delta="a"),
            response(
                "completed",
                usage={
                    "input_tokens": 33,
                    "input_tokens_details": {"cached_tokens": 30},
                    "output_tokens": 5,
                },
            ),
        ),
        (33, 5, 30, 0),
    ),
    "responses, incomplete": (
        Shape.RESPONSES,
        (
            message("response.output_text.delta", delta="a"),
            response("incomplete", usage={"input_tokens": 33, "output_tokens": 5}),
        ),
        (33, 5),
    ),
    "responses, failed": (
        Shape.RESPONSES,
        (response("failed", usage={"input_tokens": 33, "output_tokens": 0}),),
        (33, 0),
    ),
    "responses, one huge event": (
        Shape.RESPONSES,
        (
            message("response.output_text.delta", delta="a"),
            response(
                "completed",
                json.dumps(FORGED) * 9000,
                tools=[{"parameters": FORGED}],
                usage={
                    "input_tokens": 33,
                    "input_tokens_details": {"cached_tokens": 30},
                    "output_tokens": 5,
                },
                metadata=FORGED,
            ),
        ),
        (33, 5, 30, 0),
    ),
    "ollama": (Shape.OLLAMA, (ollama("a"), ollama("", **LAST)), (33, 5)),
    "ollama, context before": (Shape.OLLAMA, (ollama("a"), line({**CONTEXT, **LAST})), (33, 5)),
    "ollama, context behind": (Shape.OLLAMA, (ollama("a"), line({**LAST, **CONTEXT})), (33, 5)),
    "ollama, a huge context before": (
        Shape.OLLAMA,
        (ollama("a"), line({"done": True, "context": list(range(100_000)), **LAST})),
        (33, 5),
    ),
    "ollama, a huge context behind": (
        Shape.OLLAMA,
        (ollama("a"), line({**LAST, "context": list(range(100_000))})),
        (33, 5),
    ),
    "ollama, no newline at the end": (
        Shape.OLLAMA,
        (ollama("a"), ollama("", **LAST).rstrip()),
        (33, 5),
    ),
    "ollama, tool arguments with counts": (
        Shape.OLLAMA,
        (
            ollama("", message={"tool_calls": [{"function": {"arguments": FORGED}}]}),
            ollama(
                "", message={"tool_calls": [{"function": {"arguments": FORGED}}]}, **LAST, x=FORGED
            ),
        ),
        (33, 5),
    ),
    "ollama, counts in tool arguments alone": (
        Shape.OLLAMA,
        (ollama("", message={"tool_calls": [{"function": {"arguments": FORGED}}]}, done=True),),
        NOTHING,
    ),
    "numbers that are none": (
        Shape.CHAT,
        (
            *(*TOKENS, FINISH),
            event({"choices": [], "usage": {"prompt_tokens": True, "completion_tokens": -1}}),
            event({"choices": [], "usage": {"prompt_tokens": 1 << 24, "completion_tokens": "5"}}),
            DONE,
        ),
        NOTHING,
    ),
}


def watched(shape: Shape, pieces: Sequence[bytes]) -> Watch:
    watch = Watch(shape)
    for piece in pieces:
        watch.feed(piece)
    return watch


def cut(data: bytes, where: Sequence[int]) -> list[bytes]:
    places = sorted({at % (len(data) + 1) for at in where})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


@pytest.mark.parametrize("name", TOLD)
def test_counts_of_a_stream_when_backend_says_them_are_those(name: str) -> None:
    shape, pieces, told = TOLD[name]
    whole = b"".join(pieces)
    for how in (pieces, [whole], [whole[at : at + 700] for at in range(0, len(whole), 700)]):
        watch = watched(shape, how)
        assert watch.whole or name.endswith("cut")
        assert watch.told() == full(told)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([name for name in TOLD if "huge" not in name]),
    where=st.lists(st.integers(0, 1 << 16), max_size=40),
)
def test_counts_when_stream_is_cut_anywhere_are_the_same(name: str, where: list[int]) -> None:
    shape, pieces, told = TOLD[name]
    data = b"".join(pieces)
    watch, whole = watched(shape, cut(data, where)), watched(shape, [data])
    assert watch.whole is whole.whole
    assert watch.told() == whole.told() == full(told)
    assert watch.events == whole.events


@pytest.mark.parametrize("name", [name for name in TOLD if "huge" not in name])
def test_counts_when_fed_byte_by_byte_are_the_same(name: str) -> None:
    shape, pieces, told = TOLD[name]
    data = b"".join(pieces)
    watch = watched(shape, [data[at : at + 1] for at in range(len(data))])
    assert watch.whole or name.endswith("cut")
    assert watch.told() == full(told)
    assert watch.events == watched(shape, [data]).events


WORDS = st.text(max_size=20) | st.sampled_from([json.dumps(FORGED), '"usage":{"prompt_tokens":9}'])
EVENTS = {
    Shape.CHAT: (ROLE, said, (FINISH, DONE)),
    Shape.MESSAGES: (START, delta, (message("message_delta", delta={}), STOP)),
    Shape.RESPONSES: (
        response("created"),
        lambda text: message("response.output_text.delta", delta=text),
        (response("completed"),),
    ),
    Shape.OLLAMA: (b"", ollama, (line({"done": True}),)),
}


LAST_WORDS: dict[
    str, Counts
] = {  # of what is kept, where all events of the dialect would have said another thing
    "llama.cpp, two choices": (33, 7),
    "llama.cpp, two choices without include_usage": (33, 5, 32, 0),
    "llama.cpp, two choices, a cache": (33, 5, 30, 0),
    "counts in the first chunk alone": (33, 1),
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("size", [None, 1000])
def test_counts_of_a_stream_when_its_dialect_is_not_known_are_its_last_word(
    name: str, size: int | None
) -> None:
    _, pieces, told = TOLD[name]
    ends, stream = Ends(), b"".join(pieces)
    for at in range(0, len(stream), size or len(stream)):
        ends.feed(stream[at : at + (size or len(stream))])
    assert ends.last_word() == full(LAST_WORDS.get(name, told))


@pytest.mark.parametrize("name", ["chat, include_usage", "messages", "responses", "ollama"])
def test_counts_of_a_long_stream_when_its_dialect_is_not_known_are_its_last_word(name: str) -> None:
    """Of Anthropic's the input is told at one end, and the output at the other."""
    _, (first, *rest), told = TOLD[name]
    ends = Ends(first)
    for _ in range(20_000):
        ends.feed(b": nothing to count\n\n" if name != "ollama" else ollama("a"))
    for piece in rest:
        ends.feed(piece)
    assert ends.last_word() == full(told)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(list(EVENTS)),
    words=st.lists(WORDS.filter(bool), min_size=1, max_size=30),
    where=st.lists(st.integers(0, 1 << 16), max_size=20),
    ended=st.booleans(),
)
def test_events_when_nobody_counts_are_those_with_content(
    shape: Shape, words: list[str], where: list[int], ended: bool
) -> None:
    """Whatever the model says: a mark or a count in its words is none."""
    first, content, last = EVENTS[shape]
    pieces = [first, *map(content, words), *(last if ended else ())]
    watch = watched(shape, cut(b"".join(pieces), where))
    assert (watch.events, watch.ended) == (len(words), ended)
    assert watch.told() == ((33, None, 30, 2) if shape is Shape.MESSAGES else NOTHING)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([name for name in TOLD if not name.endswith("cut")]),
    text=st.text(max_size=300),
    times=st.integers(1, 300),
)
def test_watch_when_stream_is_long_keeps_an_event_and_a_piece(
    name: str, text: str, times: int
) -> None:
    shape, pieces, _ = TOLD[name]
    content = EVENTS[shape][1](json.dumps(FORGED) + text)
    watch = watched(shape, pieces[:1])
    for _ in range(times):
        watch.feed(content * 3)
        held = (getattr(watch, slot) for slot in Watch.__slots__)
        assert sum(len(each) for each in held if isinstance(each, bytes)) < 9 * len(content) + 8192


def test_watch_when_an_event_never_ends_keeps_no_more_than_256_kib_of_it() -> None:
    watch = watched(Shape.CHAT, TOKENS)
    for _ in range(100):
        watch.feed(b"x" * 65536)
    held = [getattr(watch, slot) for slot in Watch.__slots__]
    ends = [each for each in held if isinstance(each, Ends)]
    assert sum(len(each) for each in held if isinstance(each, bytes)) < 400_000
    assert sum(len(each._head) + len(each._tail) for each in ends) < 65_536


def test_counts_when_one_piece_ends_events_and_begins_a_huge_one_are_of_the_right_one() -> None:
    last = line({"context": list(range(100_000)), **LAST})
    watch = watched(Shape.OLLAMA, [ollama("a") + ollama("b") + last[:500_000], last[500_000:]])
    assert (watch.told(), watch.ended, watch.load) == (full((33, 5)), True, 2.5)


HUGE = "x" * 400_000


@pytest.mark.parametrize("step", [16 << 10, 1 << 20])
def test_counts_when_a_huge_event_is_not_the_last_are_those_of_the_end(step: int) -> None:
    """Each event counts so far (vLLM): what is no end of a choice is no reason to add them up."""
    usage = [{"prompt_tokens": 33, "completion_tokens": n} for n in range(1, 6)]
    pieces = (
        *(said("a", usage=usage[0]), said(HUGE, usage=usage[1])),
        *(said("a", usage=usage[2]), finish(0, usage=usage[3]), counted(**usage[4]), DONE),
    )
    watch, stream = Watch(Shape.CHAT), b"".join(pieces)
    for at in range(0, len(stream), step):
        watch.feed(stream[at : at + step])
    assert (watch.told(), watch.ended, watch.whole) == (full((33, 5)), True, True)


@pytest.mark.parametrize("step", [16 << 10, 1 << 20])
@pytest.mark.parametrize("behind", [(), (counted(**COUNTS),)])
def test_counts_when_a_huge_event_is_the_last_are_its_own(
    step: int, behind: tuple[bytes, ...]
) -> None:
    last = event(
        {"choices": [{"delta": {"content": HUGE}, "finish_reason": "stop"}], "usage": COUNTS}
    )
    watch, stream = Watch(Shape.CHAT), b"".join((ROLE, *TOKENS, last, *behind, DONE))
    for at in range(0, len(stream), step):
        watch.feed(stream[at : at + step])
    assert (watch.told(), watch.ended) == (full((33, 5)), True)


def test_load_when_ollama_had_to_load_is_told_whatever_the_size_of_its_context() -> None:
    for size in (0, 900, 100_000):
        last = line({"context": list(range(size)), **LAST})
        watch = watched(Shape.OLLAMA, [ollama("a"), last])
        assert watch.load == 2.5, size
    assert load_of({"load_duration": 3_000_000}) is None


# -- documents

DOCUMENTS: dict[str, tuple[dict[str, Any], Counts]] = {
    "openai": (
        {"choices": [{"message": {"content": json.dumps(FORGED)}}], "usage": COUNTS},
        (33, 5),
    ),
    "openai, a cache is part of it": (
        {"usage": {**COUNTS, "prompt_tokens_details": {"cached_tokens": 32}}},
        (33, 5, 32, 0),
    ),
    "openrouter": (
        {
            "usage": {
                **COUNTS,
                "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 10},
            }
        },
        (33, 5, 20, 10),
    ),
    "deepseek": (
        {"usage": {**COUNTS, "prompt_cache_hit_tokens": 30, "prompt_cache_miss_tokens": 3}},
        (33, 5, 30, 0),
    ),
    "vLLM, details null": ({"usage": {**COUNTS, "prompt_tokens_details": None}}, (33, 5)),
    "more from a cache than there is": (
        {"usage": {**COUNTS, "prompt_tokens_details": {"cached_tokens": 1 << 20}}},
        (33, 5, 33, 0),
    ),
    "a cache beyond any model": (
        {"usage": {**COUNTS, "prompt_tokens_details": {"cached_tokens": 1 << 24}}},
        (33, 5),
    ),
    "anthropic": (
        {
            "content": [{"type": "tool_use", "input": FORGED}],
            "usage": {
                "input_tokens": 1,
                "cache_read_input_tokens": 30,
                "cache_creation_input_tokens": 2,
                "output_tokens": 5,
            },
        },
        (33, 5, 30, 2),
    ),
    "anthropic, no cache": (
        {"usage": {"cache_read_input_tokens": None, "input_tokens": 33, "output_tokens": 5}},
        (33, 5),
    ),
    "responses": ({"usage": {"input_tokens": 33, "output_tokens": 5}, "output": [FORGED]}, (33, 5)),
    "responses, a cache is part of it": (
        {
            "usage": {
                "input_tokens": 33,
                "input_tokens_details": {"cached_tokens": 30},
                "output_tokens": 5,
            }
        },
        (33, 5, 30, 0),
    ),
    "ollama": ({"message": {"tool_calls": [FORGED]}, **LAST}, (33, 5)),
    "ollama, embeddings": ({"embeddings": [[0.5]], "prompt_eval_count": 33}, (33, None)),
    "embeddings": ({"data": [], "usage": {"prompt_tokens": 33, "total_tokens": 33}}, (33, None)),
    "rerank": ({"results": [], "usage": {"total_tokens": 33}}, (33, None)),
    "llama.cpp's timings alone": ({"choices": [], "timings": TIMINGS}, (33, 5, 32, 0)),
    "llama.cpp, both": ({"usage": COUNTS, "timings": TIMINGS}, (33, 5, 32, 0)),
    "llama.cpp, both, with details": (
        {"usage": {**COUNTS, **CACHED}, "timings": TIMINGS},
        (33, 5, 30, 0),
    ),
    "nothing": ({"choices": [FORGED], "usage": None}, NOTHING),
    "a list": ({"usage": [1, 2]}, NOTHING),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("size", [0, 40_000])
@pytest.mark.parametrize("where", ["before", "behind", "around"])
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_counts_of_a_document_are_found_at_whichever_end_they_stand(
    name: str, size: int, where: str, piece: int
) -> None:
    """A long one is not kept: of 16 KiB at either end the counts are found, and proven."""
    document, told = DOCUMENTS[name]
    long = {"data": [{"embedding": [0.25] * size, "usage": FORGED}]} if size else {}
    parts = {
        "before": {**long, **document},
        "behind": {**document, **long},
        "around": {"x": FORGED, **long, **document, "created": 1},
    }[where]
    data = json.dumps(parts).encode()
    ends = Ends()
    for at in range(0, len(data), piece):
        ends.feed(data[at : at + piece])
    assert told_by(parts) == full(told)
    assert told_by(ends.document()) == full(told)
    assert ends.size == len(data)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(max_size=50),
    depth=st.integers(1, 4),
    size=st.sampled_from([0, 20_000]),
    first=st.booleans(),
)
def test_counts_when_a_document_holds_forged_ones_deeper_are_never_those(
    text: str, depth: int, size: int, first: bool
) -> None:
    forged: Any = {text: FORGED, **FORGED}
    for _ in range(depth):
        forged = {"a": [forged]}
    parts = {"forged": forged, "text": json.dumps(FORGED) + text, "long": "x" * size}
    document = parts if first else dict(reversed(parts.items()))
    ends = Ends(json.dumps(document).encode())
    assert told_by(ends.document()) == NOTHING


def test_docs_of_usage_name_tests_that_are_there() -> None:
    root = Path(__file__).parent.parent
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (root / "docs" / "usage.md").read_text())
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (root / file).read_text(), name


def test_guess_of_a_prompt_when_it_holds_pictures_counts_them_as_such() -> None:
    picture = b'{"url":"data:image/png;base64,' + b"A" * 1_000_000 + b'"},'
    assert text_size(b"x" * 4000) == 4000
    assert 8000 <= text_size(picture * 2) <= 8200
    small = b'";base64,' + b"A" * 4991
    size = text_size(small * 1500)
    assert 6_490_000 < size < 6_510_000, "1000 are looked for: more would hold up the loop"
    assert guess_input(4001) == 1001
    assert guess_input(1 << 30) == 131_072
