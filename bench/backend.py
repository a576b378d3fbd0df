"""The mock backend: one process, several listeners, one loop. It costs little and answers at once.

    python -m bench.backend '{"listeners": 5, "tokens": 300, "interval": 0.02}'

prints its ports as one line of JSON and serves until it is told to stop; SIGUSR1 ends the streams
under way, each with how many tokens it had. What it answers:

    POST /v1/chat/completions   a document, or the tokens of a stream, one each `interval` s
    GET /v1/models, /health     what health checks ask for
    GET /v1/files/N/content     N bytes
    any body of more than 1 MB  how many bytes came, and their CRC-32
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from . import bodies, work
from .bodies import Sink, Source
from .framing import END_OF_HEAD, Chunks, length_of

LARGE = 1 << 20  # bytes of a body that is not kept
SLOT = 0.001  # s; the timers of the loop know no less


@dataclass
class Spec:
    """How the backend behaves; what is not given is not done."""

    listeners: int = 5
    tokens: int = 0  # of a stream; 0: until SIGUSR1 ends all streams
    seed: int = 0  # with one, a stream has 1 to `tokens` tokens, and listeners die
    deaths: float = 40.0  # s that a listener lives, on average
    downtime: float = 3.0  # s that it is dead, at most
    interval: float = 0.02  # s between two tokens
    rate: float = 0.0  # bytes/s at which large bodies are read; 0: as they come


class Pacer:
    """Sends each stream its token every `interval` s, without a timer for each.

    A stream is put into the slot of the millisecond in which it came: the streams keep the phases
    in which their clients sent them, and none drifts.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._loop = loop
        self._slots: list[set[Stream]] = [set() for _ in range(max(1, round(interval / SLOT)))]
        self._began = loop.time()
        self._at = 0  # the slot, counted from the beginning, that was served last
        self._tick()

    def add(self, stream: Stream) -> None:
        stream.slot = self._slots[self._now() % len(self._slots)]
        stream.slot.add(stream)

    def end_all(self) -> None:
        for slot in self._slots:
            for stream in tuple(slot):
                stream.end()

    def _now(self) -> int:
        return int((self._loop.time() - self._began) / SLOT)

    def _tick(self) -> None:
        now = self._now()
        for at in range(max(self._at, now - len(self._slots)) + 1, now + 1):
            for stream in tuple(self._slots[at % len(self._slots)]):
                stream.token()
        self._at = now
        self._loop.call_later(SLOT, self._tick)


class Stream:
    """One answer of tokens under way."""

    __slots__ = ("_events", "_sent", "_tokens", "_transport", "slot")

    def __init__(self, transport: asyncio.Transport, number: int, tokens: int) -> None:
        self._transport = transport
        self._events = work.Events(number)
        self._tokens, self._sent = tokens, 0
        self.slot: set[Stream] = set()
        transport.write(self._events.first())

    def token(self) -> None:
        self._transport.write(self._events.token(time.monotonic_ns() // 1000))
        self._sent += 1
        if self._sent == self._tokens:
            self.end()

    def end(self) -> None:
        self._transport.write(self._events.last(self._sent))
        self.stop()

    def stop(self) -> None:
        self.slot.discard(self)


@dataclass
class House:
    """What the connections share."""

    spec: Spec
    pacer: Pacer
    answers: work.Answers = field(default_factory=work.Answers)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.spec.seed) if self.spec.seed else None

    def stream(self, transport: asyncio.Transport, body: bytes) -> Stream:
        tokens = self.spec.tokens
        length = self.rng.randint(1, tokens) if self.rng else tokens
        stream = Stream(transport, work.number_in(body) or 0, length)
        self.pacer.add(stream)
        stream.token()  # the first comes at once
        return stream

    def answer(self, head: bytes, body: bytes) -> bytes:
        """The whole answer to what is no stream."""
        if head.startswith(b"post /v1/chat/completions "):
            number = work.number_in(body)
            if number is not None:
                return self.answers.whole(number)
            return _json({"error": {"message": "no number in this request"}}, "400 Bad Request")
        if head.startswith(b"get /v1/models "):
            row = {"id": work.MODEL, "object": "model", "created": 0, "owned_by": "bench"}
            return _json({"object": "list", "data": [row]})
        if head.startswith(b"get /health "):
            return _json({})
        return _json({"error": {"message": "no such route"}}, "404 Not Found")


def _json(document: Any, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    return work.head("application/json", len(body), status) + body


class Conversation(asyncio.Protocol):
    """One connection: a request, its answer, the next."""

    def __init__(self, house: House, listener: Listener) -> None:
        self._house, self._listener = house, listener
        self._rest = b""
        self._stream: Stream | None = None
        self._upload: tuple[Sink, int] | None = None  # and how many bytes it will be
        self._source: Source | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._listener.transports.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.transports.discard(self._transport)
        if self._stream is not None:
            self._stream.stop()

    def pause_writing(self) -> None:
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        if self._source is not None:
            self._source.resume()

    def data_received(self, data: bytes) -> None:
        if self._upload is not None:
            self._take(data)
            return
        self._rest = data = self._rest + data if self._rest else data
        end = data.find(END_OF_HEAD)
        if end < 0:
            return
        head = data[:end].lower()
        data = data[end + 4 :]
        length = _length(head)
        if length is not None and length > LARGE:
            self._rest = b""
            self._upload = (Sink(self._transport, self._house.spec.rate), length)
            self._take(data)
        elif (body := _body(length, data)) is not None:
            self._rest = b""
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        house = self._house
        if head.startswith(b"post") and (b'"stream":true' in body or b'"stream": true' in body):
            self._stream = house.stream(self._transport, body)
        elif head.startswith(b"get /v1/files/"):
            size = int(head.split(b"/")[3])
            self._transport.write(work.head("application/octet-stream", size))
            self._source = Source(self._transport, bodies.blocks(size))
        else:
            self._transport.write(house.answer(head, body))

    def _take(self, data: bytes) -> None:
        assert self._upload is not None
        sink, length = self._upload
        sink.feed(data)
        if sink.size >= length:
            self._upload = None
            self._transport.write(_json({"object": "upload", "size": sink.size, "crc": sink.crc}))


def _length(head: bytes) -> int | None:
    """How long the body of a request is; None: it is chunked."""
    framed = b"\r\ncontent-length:" in head or b"\r\ntransfer-encoding:" in head
    return length_of(head) if framed else 0


def _body(length: int | None, data: bytes) -> bytes | None:
    """The body of a request; None: it is not whole."""
    if length is not None:
        return data if len(data) == length else None
    chunks = Chunks()
    body = chunks.feed(data)
    return body if chunks.done else None


class Listener:
    """One backend as the proxy sees it: a port, and the connections to it.

    A socket that never listens holds the port while the backend is dead, else somebody else's
    connection may get it.
    """

    def __init__(self, house: House) -> None:
        self._house = house
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.port = int(self._holder.getsockname()[1])
        self.transports: set[asyncio.Transport] = set()

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Conversation(self._house, self),
            "127.0.0.1",
            self.port,
            backlog=4096,
            reuse_port=True,
        )

    async def live_and_die(self, rng: random.Random) -> None:
        """Die now and then, with every connection, and come back."""
        spec = self._house.spec
        while True:
            await asyncio.sleep(rng.expovariate(1 / spec.deaths))
            self._server.close()
            for transport in tuple(self.transports):
                transport.abort()
            print(json.dumps({"died": self.port}), flush=True)
            await asyncio.sleep(rng.uniform(0.1, spec.downtime))
            await self.listen()


async def serve(spec: Spec) -> None:
    loop = asyncio.get_running_loop()
    house = House(spec, Pacer(loop, spec.interval))
    loop.add_signal_handler(signal.SIGUSR1, house.pacer.end_all)
    listeners = [Listener(house) for _ in range(spec.listeners)]
    for listener in listeners:
        await listener.listen()
    print(json.dumps({"ports": [listener.port for listener in listeners]}), flush=True)
    if not spec.seed:
        await asyncio.Event().wait()
    async with asyncio.TaskGroup() as group:
        for number, listener in enumerate(listeners):
            group.create_task(listener.live_and_die(random.Random(spec.seed + number)))


if __name__ == "__main__":
    uvloop.run(serve(Spec(**json.loads(sys.argv[1]))))
