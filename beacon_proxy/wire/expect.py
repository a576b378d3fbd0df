"""How an answer is framed, and how long to hold what comes of it."""

from __future__ import annotations

from enum import Enum, StrEnum
from functools import lru_cache

from .dialects import Shape
from .headers import AnswerHead

HOLD_CAP = 1 << 20  # bytes held before an answer is passed on unjudged
GRACE = 0.2  # s after the head


class Framing(StrEnum):
    NONE = "none"  # HEAD, 204, 304
    LENGTH = "length"
    CHUNKED = "chunked"
    EOF = "eof"
    TUNNEL = "tunnel"  # 101


class Hold(Enum):
    BYTE = 1  # until the first body byte
    CONTENT = 2  # until the dialect's first content
    WHOLE = 3  # until the message is complete


def hold_for(head: AnswerHead, shape: Shape, inference: bool) -> Hold:
    """How long to hold the answer with this head."""
    status = head.status
    if head.length is not None and head.length > HOLD_CAP:
        return _BYTE
    if status >= 400:
        return _WHOLE
    if not inference or status >= 300:
        return _BYTE
    if head.content_type is None or not is_event_stream(head.content_type):
        return _WHOLE
    if shape is Shape.DOCUMENT or head.coding:
        return _BYTE  # events that cannot be read
    return _CONTENT


# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_BYTE, _CONTENT, _WHOLE = Hold.BYTE, Hold.CONTENT, Hold.WHOLE


@lru_cache(maxsize=256)  # asked twice an answer, of a handful of spellings
def is_event_stream(content_type: bytes) -> bool:
    kind = content_type.split(b";", 1)[0].strip().lower()
    return kind in (b"text/event-stream", b"application/x-ndjson", b"application/jsonl")
