"""A head that is known is read as the parser reads it, whatever of it differs from the last."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beacon_proxy.api.protocol import ClientConnection, ClientServer, Request
from beacon_proxy.errors import ProxyError
from beacon_proxy.wire.headers import Added, forwarded_lines, read_request_head, request_bytes
from beacon_proxy.wire.upload import BodyLimits, Kept
from beacon_proxy.wire.wheel import Wheel

LINES = (
    b"Host: a.example",
    b"Content-Type: application/json",
    b"X-Trace: 0",
    b"Connection: keep-alive",
    b"X-Other: 1",
)
TWICE = b"X-Request-Id: 0\r\nX-Request-ID"
ADDED = Added(((b"Authorization", b"k"), (b"x-other", b""), (b"X-Beacon-Region", b"r")))
LIMITS = BodyLimits(1 << 20, 0.0, Kept())


class Wire(asyncio.Transport):
    """A client that takes everything and says nothing by itself."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: object) -> None: ...

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Reader:
    """Reads each request as far as a backend would see it, and notes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        server = ClientServer(self, loop, Wheel(loop))
        self.connection = ClientConnection(server)
        self.connection.connection_made(Wire())
        self.keeps = True
        self.seen: list[Any] = []

    def begin(self, connection: ClientConnection, request: Request) -> None:
        head, self.keeps = request.head, request.keep_alive
        try:
            if head is None:
                head = request.head = read_request_head(request.headers, request.http11)
            request.upload.open(LIMITS, head.length, head.chunked)
        except ProxyError as exc:
            self.seen.append(exc.message)
            return
        out = request_bytes(
            head, request.method.decode(), request.target, b"b", ADDED, forwarded_lines(head, "c")
        )
        out += request_bytes(head, "POST", b"/", b"b", None, b"")
        facts = (head.length, head.chunked, head.content_type, head.hints, head.upgrade, head.plain)
        keeps = (head.rebuilt, request.http11, request.keep_alive)
        self.seen.append((out, request.headers, head.headers, facts, keeps, request.upload.body))

    def refuse(self, connection: ClientConnection, error: ProxyError, cause: str) -> None:
        self.seen.append(error.message)

    def read(self, data: bytes) -> object:
        """What came of one read; None: nothing yet."""
        before = len(self.seen)
        self.connection.data_received(data)
        new = self.seen[before:]
        if new and not isinstance(new[-1], str):
            self.connection.served(self.keeps)
        return tuple(new)


def request(lines: tuple[bytes, ...], body: bytes, length: bytes | None, at: int) -> bytes:
    fields = list(lines)
    if length is not None:
        fields.insert(at, b"Content-Length: " + length)
    return b"POST /v1/chat HTTP/1.1\r\n" + b"\r\n".join(fields) + b"\r\n\r\n" + body


VALUE = st.one_of(
    st.from_regex(rb"[!-~]{1,20}", fullmatch=True),
    st.from_regex(rb"[ -~]{0,20}", fullmatch=True),
    st.sampled_from([b"", b"a\tb", b"a\r\nX-New: b", b"a\nb", b"a\rb", b"\xe9", b"a\x00", b" a "]),
    st.sampled_from([b"close", b"chunked", b"100-continue", b"x-trace", b"5", b"a.example"]),
    st.integers(100, 9000).map(lambda size: b"v" * size),
)
NAMES = b"""\
X-Trace X-Other x-trace X-Trace:a Host Host:a Connection Expect Content-Type X-Request-Id
Transfer-Encoding X-Beacon-Region X-Forwarded-For Authorization"""
NAME = st.sampled_from([*NAMES.split(), b" X"])


@st.composite
def changes(draw: st.DrawFn) -> tuple[tuple[bytes, ...], bytes, bytes | None, int]:
    """A request like the others, but for a few things."""
    lines = list(LINES)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        name = draw(st.one_of(st.just(lines[at].partition(b":")[0]), NAME))
        lines[at] = name + b": " + draw(VALUE)
    body = b"b" * draw(st.integers(0, 12))
    length = draw(st.sampled_from([b"%d" % len(body)] * 6 + [None, b"+1", b"00", b"1 "]))
    return tuple(lines), body, length, draw(st.sampled_from([5, 5, 5, 0, 2]))


def traced(value: bytes, name: bytes = b"X-Trace") -> tuple[tuple[bytes, ...], bytes, bytes, int]:
    return (*LINES[:2], name + b": " + value, *LINES[3:]), b"body", b"4", 5


@example([traced(b"1", TWICE), traced(b"2", TWICE), traced(b"3", TWICE), traced(b"4", TWICE)])
@example([traced(b"1"), traced(b"2"), traced(b"3"), traced(b"4\r\nX-New: 5"), traced(b"6")])
@example([traced(b"1"), traced(b"2"), traced(b"3"), traced(b"4 "), traced(b"v" * 9000)])
@given(st.lists(changes(), min_size=1, max_size=12))
@settings(deadline=None)
def test_request_on_a_connection_that_remembers_is_read_as_on_a_new_one(
    sent: list[tuple[tuple[bytes, ...], bytes, bytes | None, int]],
) -> None:
    loop = asyncio.new_event_loop()
    try:
        kept = Reader(loop)
        kept.read(request(LINES, b"", b"0", 5))
        for one in sent:
            data = request(*one)
            expected = Reader(loop).read(data)
            got = kept.read(data)
            assert got == expected
            if got == () or not kept.connection.idle:
                kept = Reader(loop)
                kept.read(request(LINES, b"", b"0", 5))
    finally:
        loop.close()


def test_request_whose_id_differs_each_time_is_known_in_the_end() -> None:
    check_known(b"X-Trace", passes=True)


@pytest.mark.parametrize("name", [b"X-Request-Id", b"x-forwarded-for"])
def test_request_of_a_gateway_that_tells_of_its_client_is_known_in_the_end(name: bytes) -> None:
    check_known(name, passes=False)


def check_known(name: bytes, *, passes: bool) -> None:
    loop = asyncio.new_event_loop()
    try:
        reader = Reader(loop)
        known = []
        for number in range(6):
            reader.read(request(*traced(b"%d" % number, name)))
            assert reader.connection._again is not None
            known.append(bool(reader.connection._again.values))
        assert known == [False, False, False, True, True, True]
        (out, headers, *_) = cast(tuple[Any, ...], reader.seen[-1])
        assert (name + b": 5\r\n" in out) is passes
        assert headers[2] == (name, b"5")
        rebuilt = reader.seen[-1][4][0]
        assert rebuilt.get(name.lower()) == (None if passes else b"5")
    finally:
        loop.close()
