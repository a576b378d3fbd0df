"""Where the `model` of a JSON body stands, and its replacement there and nowhere else.

A body is never written anew from what was parsed: every byte around the value stays as it came.
Only the outermost object counts; a `model` in a tool, in metadata or in a message is another's.

Rule 1: what is no JSON is left alone, as far as it is parsed at all: up to `LOOK_CAP`. Of a larger
    one, and of one that holds more than `TURNS_MOST` things, the beginning is believed; it goes as
    it is if its model does not stand there. By the same look its backend was chosen.
Rule 2: where the key stands twice, both values are replaced: parsers differ in which they take.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

LOOK_CAP = 256 << 10  # bytes looked at of a body that streams; and of others the most parsed
Span = tuple[int, int]  # from, to: offsets in the body

TURNS_MOST = 12_000  # members, brackets and strings looked at, about 25 ms; a long chat has 5000

_VALUE_MOST = 64 << 10  # bytes

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_KEY = re.compile(rb"[ \t\n\r]*+(%b)[ \t\n\r]*+:[ \t\n\r]*+" % _STRING, re.DOTALL)
_TEXT = re.compile(_STRING, re.DOTALL)
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]++")
_MARK = re.compile(rb'["{}\[\]]')
_NEXT = re.compile(rb"[ \t\n\r]*+([,}])")
_OPEN = re.compile(rb"[ \t\n\r]*+\{")


def members(body: bytes, names: Sequence[str]) -> tuple[dict[str, list[Span]], bool]:
    """Where the values of these members of the outermost object stand, as far as `body` goes.

    A value that the end of `body` cuts is not among them, nor one behind what is no JSON. Beside
    it: whether that is all; False: there was too much to look at.
    """
    found: dict[str, list[Span]] = {name: [] for name in names}
    start = _OPEN.match(body)
    at = start.end() if start is not None else len(body)
    turns = TURNS_MOST
    while turns > 0 and (key := _KEY.match(body, at)) is not None:
        begin = key.end()
        end, turns = _value_end(body, begin, turns - 1)
        after = _NEXT.match(body, end) if end > begin else None
        if after is None:
            break
        name = _text(key[1])
        if name in found:
            found[name].append((begin, end))
        if after[1] == b"}":
            return found, True
        at = after.end()
    return found, turns > 0


def _text(raw: bytes) -> str | None:
    try:
        return str(orjson.loads(raw)) if b"\\" in raw else raw[1:-1].decode()
    except ValueError:
        return None


def _value_end(body: bytes, at: int, turns: int) -> tuple[int, int]:
    """Where the value that begins at `at` ends, and the turns left; -1: it does not, here."""
    depth, search = 0, _MARK.search
    if (first := body[at : at + 1]) not in (b'"', b"{", b"["):
        scalar = _SCALAR.match(body, at)
        return (scalar.end() if scalar is not None else -1), turns
    while turns > 0 and (mark := search(body, at)) is not None:
        at, turns, first = mark.end(), turns - 1, mark[0]
        if first == b'"':
            at = _string_end(body, at - 1)
            if at < 0:
                break
        else:
            depth += 1 if first in b"{[" else -1
        if depth <= 0:
            return at, turns
    return -1, turns


def _string_end(body: bytes, at: int) -> int:
    """Where the string that begins at `at` ends; -1: it does not."""
    end = body.find(b'"', at + 1)
    if end < 0 or body[end - 1] != _BACKSLASH:
        return end + 1 or -1  # an image is a megabyte without an escape: ten times as fast
    text = _TEXT.match(body, at)
    return text.end() if text is not None else -1


_BACKSLASH = ord("\\")


def value(body: bytes, span: Span) -> Any:
    """The JSON value there; None where it is none, or longer than a name or a set of them."""
    if span[1] - span[0] > _VALUE_MOST:
        return None
    try:
        return orjson.loads(body[slice(*span)])
    except orjson.JSONDecodeError:
        return None


class Renaming:
    """Another name for the model of one body: which bytes are cut out, and what is put there.

    Attributes:
        growth: bytes that the body becomes longer; below 0: shorter.
    """

    __slots__ = ("_name", "_spans", "growth")

    def __init__(self, spans: Sequence[Span], name: str) -> None:
        self._spans = spans
        self._name = json.dumps(name).encode()  # orjson refuses half a surrogate
        self.growth = sum(len(self._name) - (end - begin) for begin, end in spans)

    def apply(self, body: bytes) -> bytes:
        """The body, or its beginning up to the last of the spans and beyond, with the new name."""
        parts: list[bytes] = []
        at = 0
        for begin, end in self._spans:
            parts += (body[at:begin], self._name)
            at = end
        return b"".join((*parts, body[at:]))

    async def applied(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same while the body streams; waits for no more of it than the spans need."""
        held, needed = bytearray(), self._spans[-1][1]
        async for data in pieces:
            if needed:
                held += data
                if len(held) < needed:
                    continue
                data, needed = self.apply(bytes(held)), 0
            yield data
        if needed and held:  # it ended before: then nothing is certain, and nothing is changed
            yield bytes(held)


def model_spans(body: bytes, whole: bool) -> list[Span]:
    """Where the values stand that another name is put in place of.

    Args:
        body: all of it, or its beginning.
    """
    found, all_of_it = members(body, ("model",))
    spans = found["model"]
    if spans and whole and all_of_it and len(body) <= LOOK_CAP and not _is_json(body):
        return []
    return spans


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
