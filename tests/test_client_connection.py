"""The client's connection (`api/protocol.py`): turns, bodies nobody takes, guests, and its end."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest

from beacon_proxy.api import protocol
from beacon_proxy.wire.wheel import Wheel

from .kit import (
    OK,
    BackendConn,
    RawBackend,
    RawClient,
    answer,
    chat,
    each_request,
    eventually,
    json_answer,
    proxy,
    request,
)

GOOD = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
BIG = b"x" * 2_000_000


async def test_requests_of_all_kinds_sent_at_once_are_answered_in_order() -> None:
    """Own routes are answered by another protocol on the same connection: it must take turns."""
    kinds = {
        "/health": b"hybrid-router",
        "/v1/chat/completions": b"hi",
        "/files": b"hi",
        "/metrics": b"total_providers",
        "/v1/models": b'"list"',
    }
    turns = list(kinds) * 4
    raws = [chat() if "chat" in path else request("GET", path) for path in turns]
    async with RawBackend(json_answer(GOOD)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(b"".join(raws))
            for path in turns:
                got = await client.response("POST" if "chat" in path else "GET")
                assert (got.status, got.complete) == (200, True)
                assert kinds[path] in got.body
        assert len(backend.requests) == 8


async def test_more_requests_than_are_read_ahead_are_all_answered() -> None:
    count = protocol.AHEAD_MOST * 40
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(b"".join(request("GET", f"/{n}") for n in range(count)))
            for _ in range(count):
                assert (await client.response()).complete
        assert [seen.target for seen in backend.requests] == [b"/%d" % n for n in range(count)]


async def test_large_body_behind_a_slow_request_arrives_whole() -> None:
    """Not to read a client whose turn has not come must not keep its body away when it has."""
    gate = asyncio.Event()

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            if received.target == b"/slow":
                await gate.wait()
            await conn.send(OK)

    ahead = b"".join(request("GET", f"/{n}") for n in range(protocol.AHEAD_MOST * 2))
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        upload = request("POST", "/files", [("Content-Type", "text/plain")], BIG)
        sending = asyncio.create_task(client.send(request("GET", "/slow") + ahead + upload))
        await eventually(lambda: backend.requests)
        gate.set()
        for _ in range(protocol.AHEAD_MOST * 2 + 1):
            assert (await client.response()).complete
        assert (await client.response("POST")).complete
        await sending
        assert backend.requests[-1].body == BIG


async def test_head_that_is_too_large_is_refused_when_it_was_read_ahead() -> None:
    fields = [(f"X-{n}", "a" * 900) for n in range(90)]
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(request("GET", "/first") + request("GET", "/second", fields))
            assert (await client.response()).status == 200
            assert (await client.response()).status == 431
            assert await client.closed()
        assert [seen.target for seen in backend.requests] == [b"/first"]


async def test_malformed_request_behind_a_good_one_does_not_spoil_it() -> None:
    async with RawBackend(json_answer(GOOD)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(chat() + b"GET / HTTP/1.1\r\nHost: h\r\nA b: c\r\n\r\n")
            assert (await client.response("POST")).json == GOOD
            got = await client.response()
            assert (got.status, got.complete, got.header("Connection")) == (400, True, [b"close"])
            assert await client.closed()
        assert len(backend.requests) == 1


# -- bodies that nobody takes


async def test_body_for_an_own_route_passes_before_the_next_request() -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        first = request("GET", "/health", body=BIG)
        assert (await client.ask(first + request("GET", "/files"), timeout=10)).status == 200
        assert (await client.response()).body == b"ok"


async def test_body_for_an_own_route_that_breaks_off_ends_the_connection() -> None:
    head = b"POST /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(head + b"3\r\nabc\r\nGET /hidden HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await client.response("POST")).complete
        assert await client.read_all() == b""
        assert backend.requests == []


async def test_body_that_never_ends_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER", 0.3)
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/health", body=b"x" * 100)[:-50])
        assert (await client.response()).status == 200
        assert await client.closed()
        await eventually(lambda: not p.app._http.connections)


async def test_refusal_reaches_a_client_that_is_still_sending() -> None:
    """To close under bytes that are on their way resets the connection, and the answer is lost."""
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        for _ in range(20):
            async with RawClient(p.port) as client:
                bad = b"POST /files HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nA b: c\r\n\r\n"
                sending = asyncio.create_task(client.send(bad + BIG))
                got = await client.response("POST")
                assert (got.status, got.complete) == (400, True)
                await sending
        assert backend.requests == []


async def test_client_that_hears_the_end_and_sends_on_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER", 0.3)
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(b"nonsense\r\n\r\n")
        assert (await client.response()).status == 400
        for _ in range(100):
            client.wire.write(b"more")
            if not p.app._http.connections:
                break
            await asyncio.sleep(0.02)
        assert not p.app._http.connections


# -- other protocols on the connection


async def test_upgrade_that_is_not_offered_leaves_what_is_behind_it_a_request() -> None:
    """h2c: its request is answered as any other (RFC 9110 7.8), and so is the next."""
    fields = [("Upgrade", "h2c"), ("Connection", "Upgrade"), ("HTTP2-Settings", "AAMAAABk")]
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(request("GET", "/first", fields) + request("GET", "/second"))
            for _ in range(2):
                assert (await client.response()).body == b"ok"
            assert (await client.ask(request("GET", "/third"))).body == b"ok"
        assert [seen.target for seen in backend.requests] == [b"/first", b"/second", b"/third"]


def masked(text: bytes) -> bytes:
    """A WebSocket text frame as a client sends it."""
    mask = os.urandom(4)
    body = bytes(byte ^ mask[n % 4] for n, byte in enumerate(text))
    return bytes([0x81, 0x80 | len(text)]) + mask + body


async def test_websocket_that_speaks_in_the_segment_of_its_handshake_is_heard() -> None:
    fields = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", base64.b64encode(os.urandom(16)).decode()),
    ]
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        before = await client.ask(request("GET", "/health"))
        assert before.status == 200
        await client.send(request("GET", "/ws", fields) + masked(b"early"))
        assert (await client.head()).status == 101
        await client.read_until(b'"data":"early"')
        await client.send(masked(b"later"))
        await client.read_until(b'"data":"later"')


async def test_websocket_that_is_refused_leaves_the_connection_to_the_next_request() -> None:
    fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Origin", "http://evil.test")]
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/ws", fields) + request("GET", "/files"))
        assert (await client.response()).status == 403
        assert (await client.response()).body == b"ok"


# -- its end


async def test_connection_that_waits_is_closed_after_its_time() -> None:
    async with (
        RawBackend(answer(OK)) as backend,
        proxy(backend, head_timeout=1.0) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            await asyncio.sleep(0.4)  # a request sets the limit back
            assert (await client.ask(request("GET", "/files"))).body == b"ok"
        assert await client.closed(4.0)


async def test_exchange_that_takes_longer_than_a_connection_may_wait_is_left_alone() -> None:
    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.sleep(1.5)
            await conn.send(OK)

    async with (
        RawBackend(slow) as backend,
        proxy(backend, head_timeout=0.8) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(request("GET", "/files"))).body == b"ok"


# -- what a review found


@pytest.mark.parametrize("size", [132_000, 140_000, 180_000])
async def test_body_larger_than_may_wait_does_not_leave_the_client_unread(size: int) -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(request("POST", "/health", body=b"x" * size))).complete
        assert (await client.ask(request("GET", "/files"), timeout=2)).body == b"ok"


async def test_client_that_takes_no_answers_is_not_asked_for_more_requests() -> None:
    """Whole answers were written whatever waited: 60 kB of memory for each 50 bytes asked."""
    body = b"a" * 60_000
    large = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with (
        RawBackend(answer(large)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        client.hold()
        raw = b"".join(request("GET", f"/{n}") for n in range(400))
        sending = asyncio.create_task(client.send(raw))
        await asyncio.sleep(0.5)
        [connection] = p.app._http.connections
        assert connection.transport.get_write_buffer_size() < 1_000_000
        assert len(backend.requests) < 300
        client.unhold()
        for _ in range(400):
            assert len((await client.response()).body) == len(body)
        await sending


@pytest.mark.parametrize("count", [1, 12])
async def test_client_that_leaves_is_noticed_whatever_it_sent_ahead(count: int) -> None:
    async def mute(conn: BackendConn) -> None:
        await conn.request()
        await conn.wait_closed()

    async with RawBackend(mute) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(b"".join(request("GET", f"/{n}") for n in range(count)))
            await eventually(lambda: backend.requests)
        await eventually(lambda: p.in_flight() == 0)


async def test_trailers_of_a_request_are_kept_nowhere() -> None:
    head = b"POST /files HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(head + b"%x\r\n%b\r\n0\r\n" % (len(BIG), BIG))
        await client.send((b"A: " + b"b" * 1000 + b"\r\n") * 500)
        await eventually(lambda: backend.requests)
        [connection] = p.app._http.connections
        assert connection._fields == []
        await client.send(b"\r\n")
        assert (await client.response("POST")).complete


async def test_good_request_between_a_body_nobody_takes_and_garbage_is_answered() -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/health", body=b"x" * 100)[:-50])
        assert (await client.response()).status == 200
        await client.send(b"x" * 50 + request("GET", "/good") + b"garbage\r\n\r\n")
        assert (await client.response()).body == b"ok"
        assert (await client.response()).status == 400
        assert [seen.target for seen in backend.requests] == [b"/good"]


async def test_limit_that_fails_costs_no_other_its_own() -> None:
    """The wheel forgot what lay in the same bucket as a thing that raised."""

    class Thing:
        def __init__(self, asked: list[Thing], *, raises: bool) -> None:
            self.bucket: int | None = None
            self.asked, self.raises = asked, raises

        def expire(self, now: float) -> float | None:
            self.asked.append(self)
            if self.raises:
                raise RuntimeError("no limit")
            return None

    loop = asyncio.get_running_loop()
    told: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    wheel, asked = Wheel(loop), list[Thing]()
    things = [Thing(asked, raises=n % 2 == 0) for n in range(6)]
    when = loop.time() + 0.01
    for thing in things:
        wheel.add(thing, when)
    await eventually(lambda: len(asked) == 6)
    assert len(told) == 3
    wheel.close()
