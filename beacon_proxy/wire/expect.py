"""How an answer is framed, and how long to hold what comes of it."""

from __future__ import annotations

from enum import Enum, StrEnum

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
    if not head.events:
        if shape is not _OLLAMA or head.length is not None or head.content_type != _BYTES:
            return _WHOLE
        head.events = True
    if shape is _DOCUMENT or head.coding:
        return _BYTE  # events that cannot be read
    return _CONTENT


# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_BYTE, _CONTENT, _WHOLE = Hold.BYTE, Hold.CONTENT, Hold.WHOLE
_DOCUMENT, _OLLAMA = Shape.DOCUMENT, Shape.OLLAMA
# Between a gateway and its client lines of JSON may lose their name: Golem's yagna calls a stream
# that is not SSE so (core/activity/src/http_proxy.rs).
_BYTES = b"application/octet-stream"
