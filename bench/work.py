"""What the load asks and the mock backend answers, as bytes made beforehand.

No two requests are alike: each carries a number of its own in a header and in its body, the bodies
differ in length and text, and so do the answers. Nothing can be won by remembering bytes. An answer
repeats the number of its request, and is known from it to the last byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from .framing import END_OF_HEAD

MODEL = "mock-7b"
KEY = "sk-proj-T3BlbkFJmQ4vZk1uY2hNYXJr0aB9cD8eF7gH6iJ5kL4mN3oP2qR1sT0"  # made up
DIGITS = 12
MARK = b"bench-"  # then the number, in DIGITS digits
NUMBER_0 = MARK + b"0" * DIGITS
STAMP = b'"content":" t'  # then the backend's clock, in STAMP_DIGITS digits of microseconds
STAMP_DIGITS = 14
TOTAL = b'"content":" all '  # then how many tokens came before, in DIGITS digits

# What openai-python sends besides, in its order.
_HEADERS = """\
Host: {host}\r
Accept-Encoding: gzip, deflate\r
Connection: keep-alive\r
Accept: application/json\r
Content-Type: application/json\r
User-Agent: OpenAI/Python 2.8.1\r
X-Stainless-Lang: python\r
X-Stainless-Package-Version: 2.8.1\r
X-Stainless-OS: Linux\r
X-Stainless-Arch: x64\r
X-Stainless-Runtime: CPython\r
X-Stainless-Runtime-Version: 3.12.11\r
Authorization: Bearer {key}\r
X-Stainless-Async: async:asyncio\r
X-Client-Request-Id: {number}\r
x-stainless-retry-count: 0\r
x-stainless-read-timeout: 600\r
"""
_TEXT = (
    "the of a to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will "
    "no more if out so what up said about than into them can only other time new some could these"
)
_WORDS = _TEXT.split()


class Requests:
    """Chat requests without end, of one client; `next` gives the number and the bytes."""

    def __init__(
        self, host: str, first: int, step: int = 1, *, stream: bool = False, texts: int = 16
    ) -> None:
        """Its requests are numbered `first`, `first` + `step`, …, and have so many texts."""
        self._number, self._step = first - step, step
        rng = random.Random(first)
        self._made = [_request(host, rng, stream=stream) for _ in range(texts)]

    def next(self) -> tuple[int, bytes]:
        self._number = number = self._number + self._step
        digits = b"%0*d" % (DIGITS, number)
        before, between, after = self._made[number // self._step % len(self._made)]
        return number, b"".join((before, digits, between, digits, after))


def _request(host: str, rng: random.Random, *, stream: bool) -> tuple[bytes, ...]:
    """The bytes before, between and after the two places of the number."""
    turns = [{"role": "system", "content": "You are a helpful assistant."}]
    for turn in range(rng.choice((1, 1, 1, 3, 5))):
        role = "assistant" if turn % 2 else "user"
        turns.append({"role": role, "content": text(rng, rng.randint(5, 60))})
    mark = NUMBER_0.decode()
    turns[-1]["content"] += f" {mark}"
    document: dict[str, Any] = {"messages": turns, "model": MODEL, "max_tokens": 64}
    document |= {"temperature": 0.7, "stream": stream}
    body = json.dumps(document, separators=(",", ":")).encode()
    head = _HEADERS.format(host=host, key=KEY, number=mark)
    whole = (
        f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    before, between, after = whole.split(NUMBER_0)
    return before + MARK, between + MARK, after


def plain_head(line: str, host: str, length: int | None = None) -> bytes:
    """The head of a request that is no chat request, `line` its method and target."""
    head = f"{line} HTTP/1.1\r\n" + _HEADERS.format(host=host, key=KEY, number=NUMBER_0.decode())
    if length is not None:
        head += f"Content-Length: {length}\r\n"
    return head.encode() + b"\r\n"


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words))


def number_in(data: bytes) -> int | None:
    """The number that a request's body carries."""
    at = data.find(MARK)
    if at < 0:
        return None
    digits = data[at + len(MARK) : at + len(MARK) + DIGITS]
    return int(digits) if digits.isdigit() else None


class Answers:
    """The document that answers each number: 0.7 kB, more or less."""

    def __init__(self, size: int = 700) -> None:
        rng = random.Random(size)
        self._made = [_answer(rng, size + rng.randint(-100, 100)) for _ in range(64)]

    def body(self, number: int) -> bytes:
        before, after = self._made[number % len(self._made)]
        return before + b"%0*d" % (DIGITS, number) + after

    def whole(self, number: int) -> bytes:
        """Head and body."""
        body = self.body(number)
        return head("application/json", len(body)) + body


def _answer(rng: random.Random, size: int) -> tuple[bytes, ...]:
    message = {"role": "assistant", "content": NUMBER_0.decode()}
    document = {
        "id": f"chatcmpl-{rng.getrandbits(96):024x}",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 100, "total_tokens": 150},
    }
    missing = size - len(json.dumps(document))
    message["content"] += (" " + text(rng, missing // 3))[:missing]
    before, after = json.dumps(document, separators=(",", ":")).encode().split(NUMBER_0)
    return before + MARK, after


def head(content_type: str, length: int | None, status: str = "200 OK") -> bytes:
    """The head of an answer as uvicorn writes it, under vLLM and SGLang."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"HTTP/1.1 {status}\r\ndate: Thu, 09 Oct 2025 08:53:20 GMT\r\nserver: uvicorn\r\n"
        f"{framing}\r\ncontent-type: {content_type}"
    ).encode() + END_OF_HEAD


class Events:
    """The events of one stream, one chunk each: an empty role, tokens, their total, the end."""

    __slots__ = ("_after", "_before", "_name")

    def __init__(self, number: int) -> None:
        self._name = f"chatcmpl-{MARK.decode()}{number:0{DIGITS}d}"
        before, after = self._event({"content": " t" + "0" * STAMP_DIGITS}).split(
            b"0" * STAMP_DIGITS + b'"'
        )
        self._before, self._after = before, b'"' + after

    def first(self) -> bytes:
        role = self._event({"role": "assistant", "content": ""})
        return head("text/event-stream; charset=utf-8", None) + role

    def token(self, microseconds: int) -> bytes:
        return b"%b%0*d%b" % (self._before, STAMP_DIGITS, microseconds, self._after)

    def last(self, tokens: int) -> bytes:
        usage = {"prompt_tokens": 50, "completion_tokens": tokens, "total_tokens": 50 + tokens}
        total = self._event({"content": f" all {tokens:0{DIGITS}d}"})
        end = self._event({}, finish="stop", usage=usage)
        return total + end + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _event(
        self,
        delta: Mapping[str, str],
        finish: str | None = None,
        usage: Mapping[str, int] | None = None,
    ) -> bytes:
        document: dict[str, Any] = {
            "id": self._name,
            "object": "chat.completion.chunk",
            "created": 1760000000,
            "model": MODEL,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        }
        if usage is not None:
            document["usage"] = usage
        return _chunk(b"data: %b\n\n" % json.dumps(document, separators=(",", ":")).encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
