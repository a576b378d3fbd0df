"""A head that was read once, and comes again, is not read again.

Who keeps a connection open says nearly the same head each time: of what SDKs and inference servers
send, Content-Length alone differs from message to message. To parse, sort and check a dozen fields
anew is a sixth of what a small exchange costs.

Theory. Let a message be *plain* if it is all in one read: a head, and a body of exactly as many
bytes as its Content-Length says (or none, where there is no such field). Let its *mould* be the
bytes of its head without the digits of that number. A mould that the strict parser and our own
reading have accepted once on this connection is accepted again with any other digits: nothing in
the reading of the other bytes depends on them, and the framing they announce is checked here.
So for a plain message whose mould is known, what was read from the first is true of this one.

Rule 1: bytes are compared, never their meaning. One bit of difference goes to the parser.
Rule 2: a mould is remembered by the connection it came on, and is forgotten with it: what one
client sends (its key, say) can never be of use to another.
Rule 3: only what was read without an exception is remembered; chunks, upgrades and whatever else
changes a connection's state never are.
Rule 4: who never repeats a head (an id in each, say) is soon not asked any more.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,9})\r\n")
_MISSES = 8  # in a row, until no more is tried

T = TypeVar("T")


class Again(Generic[T]):
    """What a connection remembers of the last plain message that came over it.

    Attributes:
        digits: the Content-Length of the message last looked at; b"": it has none.
        body_at: where its body begins.
    """

    __slots__ = ("_known", "_mould", "_new", "_tries", "body_at", "digits")

    def __init__(self) -> None:
        self._mould: bytes | None = None
        self._known: T | None = None
        self._new: bytes | None = None  # mould of the message last looked at
        self._tries = _MISSES
        self.digits = b""
        self.body_at = 0

    def look(self, data: bytes) -> T | None:
        """What is known of the head that `data` begins with, if that is a plain message."""
        self._new = None
        if not self._tries:
            return None
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        self.body_at = end = end + 4
        found = _LENGTH.search(data, 0, end)
        if found is None:
            if len(data) != end:
                return None
            self.digits, mould = b"", data
        else:
            self.digits = digits = found[1]
            if len(data) - end != int(digits):
                return None
            start, stop = found.span(1)
            mould = data[:start] + data[stop:end]
        if mould == self._mould:
            self._tries = _MISSES
            return self._known
        self._new = mould
        return None

    def learn(self, known: T) -> None:
        """Remember what was read from the message last looked at, if it is plain."""
        if self._new is not None:
            self._mould, self._known, self._new = self._new, known, None
            self._tries -= 1
