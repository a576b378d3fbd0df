"""A head that was read once, and comes again, is not read again.

Who keeps a connection open says nearly the same head each time: of what SDKs and inference servers
send, Content-Length differs from message to message, and at most an id or a trace beside it. To
parse, sort and check a dozen fields anew is a sixth of what a small exchange costs.

Theory. Let a message be *plain* if all of one read is this: the lines that the strict parser read,
each spelled `Name: value` and ended by CRLF, an empty line, and a body of exactly as many bytes as
its one Content-Length says (none, where the parser saw no such field). Let its *mould* be the
bytes of its head without the digits of that number, and without the values of some fields that
bear on nothing else (an id, a trace, whatever passes as it is). A mould that the strict parser and
our own reading have accepted once on this connection is accepted again with any other digits, and
with any other values of visible ASCII with spaces inside: nothing in the reading of the other bytes
depends on them, no parser takes such a value for anything else, and the framing they announce is
checked here.
So for a plain message whose mould is known, what was read from the first is true of this one.

Rule 1: bytes are compared, never their meaning. One bit of difference goes to the parser.
Rule 2: a mould is remembered by the connection it came on, and is forgotten with it: what one
client sends (its key, say) can never be of use to another.
Rule 3: what is remembered is written out anew from what was read, and must give the bytes that
came, to the last one. So nothing can be learnt from a spelling that the parser reads in its own
way, from an interim answer, or from bytes that belonged to another message.
Rule 4: who never repeats a head is soon not asked any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar

from ..contracts import Headers

_VALUE = re.compile(rb"[!-~](?:[ -~]*[!-~])?")
_HEAD_MOST = 8 << 10  # bytes; well below every limit of a head
_MISSES = 8  # in a row, until no more is tried

T = TypeVar("T")


class Again(Generic[T]):
    """What a connection remembers of the last plain message that came over it.

    Attributes:
        new: the read last looked at, where it may be a message worth learning.
        places: which fields are no part of the mould; the first field is 0.
        values: of these fields, in the message last looked at.
        digits: the Content-Length of the message last looked at; b"": it has none.
        body_at: where its body begins.
    """

    __slots__ = (
        "_first",
        "_known",
        "_length",
        "_lines",
        "_rest",
        "_tries",
        "_vary",
        "body_at",
        "digits",
        "new",
        "places",
        "values",
    )

    def __init__(self, vary: Callable[[bytes], bool] | None = None) -> None:
        """`vary`: whether the value of a field of this name bears on nothing else."""
        self._vary = vary
        self._lines: list[bytes] = []  # of the head that is known
        self._first = b""  # of the mould, up to the first value
        self._rest: tuple[bytes, ...] = ()  # of it, after each value
        self._length = -1  # index of Content-Length in `places`; -1: there is none
        self._known: T | None = None
        self._tries = _MISSES
        self.new: bytes | None = None
        self.places: tuple[int, ...] = ()
        self.values: list[bytes] = []
        self.digits = b""
        self.body_at = 0

    def look(self, data: bytes) -> T | None:
        """What is known of the head that `data` begins with, if that is a plain message."""
        self.new = None
        if not self._tries:
            return None
        if self._known is not None and data.startswith(self._first) and self._fits(data):
            self._tries = _MISSES
            return self._known
        if 0 <= data.find(b"\r\n\r\n") <= _HEAD_MOST:
            self.new = data
        return None

    def _fits(self, data: bytes) -> bool:
        at, length = len(self._first), self._length
        values, digits = [], b""
        for after in self._rest:
            end = data.find(after, at, _HEAD_MOST)
            if end < 0:
                return False
            values.append(data[at:end])
            at = end + len(after)
        if length >= 0:
            digits = values[length]
            if not (digits.isdigit() and len(digits) < 10):
                return False
        if len(values) > (length >= 0) and not all(map(_VALUE.fullmatch, values)):
            return False
        self.values, self.digits, self.body_at = values, digits, at
        return len(data) - at == (int(digits) if digits else 0)

    def learn(self, known: T, first: bytes, headers: Headers, length: int | None) -> bool:
        """Remember what was read from the message last looked at, if it is plain.

        Args:
            first: its first line, written out from what the parser read.
            headers: its fields, as the parser read them.
            length: its Content-Length, as our own reading has it.

        Returns whether it was learnt.
        """
        new, self.new = self.new, None
        if new is None:
            return False
        self._tries -= 1
        lines = [first, *[name + b": " + value for name, value in headers]]
        head = b"\r\n".join([*lines, b"", b""])
        at = [n for n, (name, _) in enumerate(headers) if name.lower() == b"content-length"]
        said = b"%d" % length if length is not None else b""
        spelled = [headers[n][1] for n in at] == ([said] if said else [])
        if not spelled or not new.startswith(head) or len(new) - len(head) != (length or 0):
            return False
        places = self._differing(lines)
        places.update(at)
        self._lines, self._known = lines, known
        self.places = tuple(sorted(places))
        self._length = self.places.index(at[0]) if at else -1
        self._cast()
        return True

    def _differing(self, lines: list[bytes]) -> set[int]:
        """The fields whose value may, and does, differ from that of the head that is known."""
        old, vary = self._lines, self._vary
        if vary is None or len(old) != len(lines):
            return set()
        places = set(self.places)
        places.discard(self.places[self._length] if self._length >= 0 else -1)
        for at, (line, was) in enumerate(zip(lines, old, strict=True)):
            if line != was:
                name = line.partition(b":")[0] + b": "
                if not (at and line.startswith(name) and was.startswith(name)):
                    return set()
                if vary(name[:-2]):
                    places.add(at - 1)
        return places

    def _cast(self) -> None:
        """Take the mould from the lines."""
        lines = self._lines
        pieces: list[bytes] = []
        run: list[bytes] = []
        begun = 0
        for place in self.places:
            at = place + 1
            run += lines[begun:at]
            run.append(lines[at].partition(b":")[0] + b": ")
            pieces.append(b"\r\n".join(run))
            run, begun = [b""], at + 1
        pieces.append(b"\r\n".join([*run, *lines[begun:], b"", b""]))
        self._first, self._rest = pieces[0], tuple(pieces[1:])
