"""The client and the backends: blocking sockets in threads, so that lock-step is plain to read."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

LIMIT = 60.0  # s that a socket or a turn may take; only what hangs takes that long
PIECE = 16384  # bytes of an upload that are sent at once
MODEL = "llama3.2:1b"
END = b"\r\n\r\n"

HEADERS = (
    "Host: proxy.test\r\n"
    "User-Agent: OpenAI/Python 2.8.1\r\n"
    "Accept: application/json\r\n"
    "Accept-Encoding: gzip, deflate\r\n"
    "Authorization: Bearer sk-of-the-client\r\n"
    "X-Stainless-Lang: python\r\n"
)


def _answer(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + END + body


def _chat(kind: str, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    return {
        "id": "chatcmpl-1",
        "object": kind,
        "created": 1,
        "model": MODEL,
        "choices": choices,
        **more,
    }


_USAGE = {"prompt_tokens": 21, "completion_tokens": 64, "total_tokens": 85}
_SAID = {"role": "assistant", "content": "all that was asked " * 20}
DOCUMENT = _answer(  # 0.7 kB
    json.dumps(
        _chat("chat.completion", {"message": _SAID, "finish_reason": "stop"}, usage=_USAGE)
    ).encode()
)
MODELS = _answer(json.dumps({"data": [{"id": MODEL, "owned_by": "counted"}]}).encode())
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked" + END
)


def _event(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _token(text: str, finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text}, "finish_reason": finish}
    return _event(json.dumps(_chat("chat.completion.chunk", choice)))


class Broken(Exception):
    """The proxy did not do what every count relies on."""


class Wire:
    """A blocking socket and what has been read of it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.data = bytearray()

    def more(self) -> None:
        piece = self.sock.recv(1 << 18)
        if not piece:
            raise EOFError
        self.data += piece

    def until(self, mark: bytes) -> bytes:
        """Read up to `mark`, and take it with what is before it."""
        while (found := self.data.find(mark)) < 0:
            self.more()
        return self.take(found + len(mark))

    def take(self, size: int) -> bytes:
        while len(self.data) < size:
            self.more()
        taken = bytes(self.data[:size])
        del self.data[:size]
        return taken


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise Broken(f"a head without Content-Length: {head!r}")


class Backends:
    """Some backends, each on a port of its own and with a thread a connection.

    `turn` is released by who has received a piece, and makes the other side send the next one.
    """

    def __init__(self, count: int) -> None:
        self.turn = threading.Semaphore(0)
        self.probed = threading.Semaphore(0)
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        self._open: list[socket.socket] = []

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in self._listeners]

    def __enter__(self) -> Self:
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in [*self._listeners, *self._open]:
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed
                return
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(Wire(sock),), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        try:
            while True:
                head = wire.until(END)
                target = head.split(b" ", 2)[1]
                if target == b"/v1/models":
                    wire.sock.sendall(MODELS)
                    self.probed.release()
                elif target == b"/v1/files":
                    self._upload(wire, _length(head))
                else:
                    self._chat(wire, json.loads(wire.take(_length(head))))
        except (EOFError, OSError):
            wire.sock.close()

    def _chat(self, wire: Wire, asked: dict[str, Any]) -> None:
        if not asked["stream"]:
            wire.sock.sendall(DOCUMENT)
            return
        # The proxy holds a stream until its first content, so nobody can wait for what is before it.
        wire.sock.sendall(STREAM + _token("") + _token("first"))
        for number in range(asked["max_tokens"]):
            self._wait()
            wire.sock.sendall(_token(f" word{number}"))
        self._wait()
        wire.sock.sendall(_token("", "stop"))
        self._wait()
        wire.sock.sendall(_event("[DONE]") + b"0" + END)

    def _upload(self, wire: Wire, left: int) -> None:
        while left:
            left -= len(wire.take(min(left, PIECE)))
            self.turn.release()
        wire.sock.sendall(_answer(b'{"id": "file-1"}'))

    def _wait(self) -> None:
        if not self.turn.acquire(timeout=LIMIT):
            raise OSError("the client did not get the token before")


class Client:
    """The one client: what it asks, and how it waits for each piece."""

    def __init__(self, port: int, backends: Backends) -> None:
        self._port = port
        self._backends = backends
        self._number = 0
        self._wire: Wire | None = None

    def json(self, count: int) -> None:
        """`count` documents over one connection."""
        for _ in range(count):
            self._document(self._connection())

    def connect(self, count: int) -> None:
        """`count` documents, each over a connection of its own."""
        for _ in range(count):
            self.close()
            self._document(self._connection())
        self.close()

    def exchange(self, count: int) -> None:
        """`count` streams of a single token."""
        for _ in range(count):
            self._stream(0)

    def token(self, count: int) -> None:
        """One stream of `count` tokens."""
        self._stream(count)

    def upload(self, count: int) -> None:
        """One request with a body of `count` pieces of 16 KiB."""
        wire = self._connection()
        self._send(wire, "/v1/files", count * PIECE, b"")
        for _ in range(count):
            wire.sock.sendall(bytes(PIECE))
            if not self._backends.turn.acquire(timeout=LIMIT):
                raise Broken("the backend did not get a piece of the upload")
        self._read(wire)

    def close(self) -> None:
        if self._wire is not None:
            self._wire.sock.close()
        self._wire = None

    def _connection(self) -> Wire:
        if self._wire is None:
            self._wire = Wire(socket.create_connection(("127.0.0.1", self._port), LIMIT))
        return self._wire

    def _send(self, wire: Wire, target: str, size: int, body: bytes) -> None:
        length = f"Content-Type: application/json\r\nContent-Length: {size}"
        head = f"POST {target} HTTP/1.1\r\n{HEADERS}{length}"
        wire.sock.sendall(head.encode() + END + body)

    def _ask(self, wire: Wire, stream: bool, tokens: int) -> None:
        self._number += 1  # no two bodies are alike
        messages = [{"role": "user", "content": f"What is {self._number} times two?"}]
        body = {"model": MODEL, "messages": messages, "stream": stream, "max_tokens": tokens}
        sent = json.dumps(body).encode()
        self._send(wire, "/v1/chat/completions", len(sent), sent)

    def _document(self, wire: Wire) -> None:
        self._ask(wire, False, 64)
        self._read(wire)

    def _read(self, wire: Wire) -> None:
        head = wire.until(END)
        body = wire.take(_length(head))
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Broken(f"not answered: {head!r} {body!r}")

    def _stream(self, tokens: int) -> None:
        wire = self._connection()
        self._ask(wire, True, tokens)
        head = wire.until(END)
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Broken(f"not answered: {head!r}")
        wire.until(b"\n\n")
        for _ in range(tokens + 2):  # the first content, the tokens, the finish
            wire.until(b"\n\n")
            self._backends.turn.release()
        wire.until(b"[DONE]")
        wire.until(b"0" + END)
