"""HTTP/1.1 framing as the load and the mock backend read it: quick where all comes in one piece."""

from __future__ import annotations

END_OF_HEAD = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


class Broken(Exception):
    """Bytes that are not the HTTP/1.1 that was promised."""


def length_of(head: bytes) -> int | None:
    """The Content-Length of a head in lower case; None: it is chunked.

    Raises:
        Broken: it is neither.
    """
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        end = head.find(b"\r\n", at + 17)
        return int(head[at + 17 : end if end >= 0 else None])
    if b"\r\ntransfer-encoding: chunked" in head:
        return None
    raise Broken("an answer that ends where the connection does")


class Chunks:
    """Takes the pieces of a chunked body and gives what they carry.

    Attributes:
        done: the last chunk has come.
    """

    __slots__ = ("_left", "_rest", "done")

    def __init__(self) -> None:
        self.done = False
        self._rest = b""  # framing that is not whole yet
        self._left = 0  # bytes of the chunk, its line end included, that are still to come

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`.

        Raises:
            Broken: no size where one must stand, a chunk without its end, or bytes after the last.
        """
        if not self._left and not self._rest:  # the usual case: one whole chunk
            at = data.find(b"\r\n", 0, 18)
            if at > 0 and _size(data[:at]) + at + 4 == len(data) > at + 4:
                if not data.endswith(b"\r\n"):
                    raise Broken("a chunk that does not end where it should")
                return data[at + 2 : -2]
        return self._slowly(self._rest + data)

    def _slowly(self, data: bytes) -> bytes:
        payload = []
        self._rest = b""
        while data:
            if self.done:
                raise Broken("bytes after the last chunk")
            if self._left:
                piece = data[: self._left]
                data = data[self._left :]
                self._left -= len(piece)
                payload.append(_less_line_end(piece, self._left))
                continue
            at = data.find(b"\r\n", 0, 18)
            if at < 0:
                if len(data) > 18:
                    raise Broken("no size where a chunk must begin")
                self._rest = data
                break
            size = _size(data[:at])
            if size == 0:
                if len(data) < at + 4:
                    self._rest = data
                    break
                if data[at : at + 4] != END_OF_HEAD:
                    raise Broken("trailers")
                self.done = True
            else:
                self._left = size + 2
            data = data[at + 4 if size == 0 else at + 2 :]
        return b"".join(payload)


def _size(text: bytes) -> int:
    try:
        return int(text.partition(b";")[0], 16)
    except ValueError:
        raise Broken(f"no chunk size: {text!r}") from None


def _less_line_end(piece: bytes, left: int) -> bytes:
    """A piece of a chunk and its line end, without what of the line end is in it."""
    end = max(0, 2 - left)
    if not end:
        return piece
    at = max(0, len(piece) - end)
    if not b"\r\n"[:end].endswith(piece[at:]):
        raise Broken("a chunk that does not end where it should")
    return piece[:at]


def read(data: bytes) -> tuple[bytes, bytes] | None:
    """Head, in lower case, and body of an answer; None: it is not whole.

    Raises:
        Broken: it never will be, or more than it came.
    """
    end = data.find(END_OF_HEAD)
    if end < 0:
        return None
    head = data[:end].lower()
    length = length_of(head)
    if length is None:
        chunks = Chunks()
        body = chunks.feed(data[end + 4 :])
        return (head, body) if chunks.done else None
    missing = end + 4 + length - len(data)
    if missing < 0:
        raise Broken("more bytes than the answer has")
    return None if missing else (head, data[end + 4 :])
