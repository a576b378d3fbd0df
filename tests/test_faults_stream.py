"""Faults after the first content, under load, and on connections that are used again.

A stream that has said something cannot be taken over: its client must see the break, and nobody
else may be asked for it. Everything else in this file must not be noticed at all.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest

from .kit import (
    CHAT,
    MESSAGES,
    OLLAMA_CHAT,
    RESPONSES,
    Api,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    blackhole,
    chunk,
    closed_port,
    proxy,
)
from .kit_faults import (
    FIRST,
    HOW,
    LATE,
    PATIENCE,
    QUICK,
    Ending,
    Fault,
    ask,
    asked,
    good,
    judge,
    pieces,
    settled,
    stops,
    whole,
)

CHAIN: list[Any] = [{"health": {"probe_interval": 300}}, "region", {"cost": {"default": "cost"}}]
CHAIN += ["capacity", "failover"]
FOUR = (CHAT, MESSAGES, OLLAMA_CHAT, RESPONSES)
four_apis = pytest.mark.parametrize("api", FOUR, ids=lambda api: api.name)


def spoils(name: str, spoil: bytes, *logged: str) -> Fault:
    """Two good tokens, whose client has read them, then `spoil` on the wire, then a close."""

    async def play(conn: BackendConn, api: Api) -> None:
        await asked(conn)
        await conn.send(b"".join(pieces(api, True)[: len(api.quiet) + 3]))
        await settled(conn)
        await conn.send(spoil)
        await settled(conn)

    return Fault(name, play, logged, late=True)


def ends(name: str, *lines: bytes) -> Fault:
    """Not chunked: all content, its client has read it, and a clean end without the end mark."""

    async def play(conn: BackendConn, api: Api) -> None:
        await asked(conn)
        kind = api.head.split(b"Content-Type: ")[1].split(b"\r\n")[0]
        body = b"".join(api.quiet + api.content)
        head = [b"HTTP/1.1 200 OK", b"Content-Type: " + kind, *lines]
        raw = b"\r\n".join(head).replace(b"SIZE", b"%d" % len(body)) + b"\r\n\r\n" + body
        await conn.send(raw[:-9])
        await settled(conn)
        await conn.send(raw[-9:])
        await settled(conn)

    return Fault(name, play, ("truncated",), late=True)


LATER = [stops(stage, how) for stage in LATE for how in HOW] + [
    spoils("clean end without the end mark", b"0\r\n\r\n", "truncated"),
    spoils("bad chunk size", b"zz\r\n", "malformed"),
    spoils("chunk without its line end", b"3\r\nabcdef", "malformed"),
    spoils("chunk that is cut", b"ffff\r\nabcdef", "closed"),
    spoils("garbage", b"\x00\xff\x13", "malformed"),
    spoils("last chunk cut", b"0\r\n", "closed"),
    ends("ended by the close, no end mark"),
    ends("ended by its length, no end mark", b"Content-Length: SIZE"),
]


@four_apis
@pytest.mark.parametrize("fault", LATER, ids=lambda fault: fault.name)
async def test_fault_after_content_breaks_the_stream_visibly_and_once(
    fault: Fault, api: Api
) -> None:
    async with (
        RawBackend(fault.script(api)) as faulty,
        RawBackend(good(api)) as one,
        RawBackend(good(api)) as two,
    ):
        rows = {**FIRST, "url": faulty, **fault.row}, {"url": one, "price_per_second": 0.1}
        async with proxy(*rows, {"url": two, "price_per_second": 0.2}, middleware=CHAIN) as p:
            ending, got = await ask(p.port, api, True)
            (told,) = await p.exchanges(1)
        assert ending is Ending.BROKEN, (ending, got)
        assert got.body.startswith(b"".join(api.quiet + api.content[:2])), "what was said is kept"
        assert (one.requests, two.requests) == ([], [])
    assert told["end"] == "error"
    assert [attempt["fault"] in fault.logged for attempt in told["attempts"]] == [True], told


async def test_fault_when_an_error_event_ends_the_stream_the_client_gets_it() -> None:
    """As it came: it is the backend's word, and no other may be asked any more."""

    async def script(conn: BackendConn) -> None:
        await asked(conn)
        said = b"".join(map(chunk, (*CHAT.quiet, *CHAT.content, CHAT.error)))
        await conn.send(CHAT.head + said + b"0\r\n\r\n")

    async with RawBackend(script) as faulty, RawBackend(good(CHAT)) as spare:
        rows = {**FIRST, "url": faulty}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p:
            ending, got = await ask(p.port, CHAT, True)
            (told,) = await p.exchanges(1)
        assert (ending, spare.requests) == (Ending.ERROR, [])
        assert got.body.endswith(CHAT.error)
        assert told["end"] == "error"


# -- a death under load


async def begun(client: RawClient, api: Api) -> None:
    await client.send(api.request(stream=True))
    await client.read_until(b"hello ")


@four_apis
async def test_fault_when_a_backend_dies_under_twenty_streams_each_client_sees_it(api: Api) -> None:
    async def script(conn: BackendConn) -> None:
        await asked(conn)
        await conn.send(b"".join(pieces(api, True)[: len(api.quiet) + 2]))
        await conn.wait_closed(PATIENCE)

    async with AsyncExitStack() as stack:
        doomed = await stack.enter_async_context(RawBackend(script))
        spares = [await stack.enter_async_context(RawBackend(good(api))) for _ in range(2)]
        rows = [{"url": one, "price_per_second": 0.1, "max_in_flight": 20} for one in spares]
        first = {**FIRST, "url": doomed, "max_in_flight": 20}
        p = await stack.enter_async_context(proxy(first, *rows, middleware=CHAIN))
        clients = [await stack.enter_async_context(RawClient(p.port)) for _ in range(20)]
        await asyncio.gather(*(begun(client, api) for client in clients))
        assert len(doomed.requests) == 20
        await doomed.stop()
        ends = await asyncio.gather(*(client.read_all() for client in clients))
        assert all(not end.endswith(b"0\r\n\r\n") for end in ends), "a clean end"
        await p.exchanges(20)
        assert [one.requests for one in spares] == [[], []], "asked again after content"
        new = await asyncio.gather(*(ask(p.port, api, True) for _ in range(20)))
        assert [ending for ending, _ in new] == [Ending.COMPLETE] * 20
        lines = await p.exchanges(40)
    assert Counter(str(told["end"]) for told in lines) == {"error": 20, "complete": 20}


class Busy:
    """A good backend that counts how many requests it works on at once."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.now = self.most = self.all = 0

    async def script(self, conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            self.now, self.all = self.now + 1, self.all + 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            await conn.send(b"".join(pieces(self.api, received.json["stream"])))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
@four_apis
async def test_fault_when_each_backend_has_one_slot_ten_requests_all_come_whole(
    api: Api, stream: bool
) -> None:
    async with AsyncExitStack() as stack:
        busy = [Busy(api) for _ in range(3)]
        backends = [await stack.enter_async_context(RawBackend(one.script)) for one in busy]
        rows = [{"url": one, "max_in_flight": 1} for one in backends]
        p = await stack.enter_async_context(proxy(*rows, middleware=CHAIN))
        seen = await asyncio.gather(*(ask(p.port, api, stream) for _ in range(10)))
    assert [ending for ending, _ in seen] == [Ending.COMPLETE] * 10
    assert [one.most for one in busy] == [1, 1, 1]
    assert sum(one.all for one in busy) == 10


async def test_fault_when_the_first_of_three_one_slot_backends_fails_ten_still_come_whole() -> None:
    """Its strikes eject it on the way; the queue serves everybody from the other two."""
    fault = stops("head", "reset")
    async with AsyncExitStack() as stack:
        busy = [Busy(CHAT) for _ in range(2)]
        scripts: list[Script] = [fault.script(CHAT), *(one.script for one in busy)]
        backends = [await stack.enter_async_context(RawBackend(each)) for each in scripts]
        rows = [{"url": one, "max_in_flight": 1} for one in backends]
        p = await stack.enter_async_context(
            proxy({**FIRST, **rows[0]}, *rows[1:], middleware=CHAIN)
        )
        seen = await asyncio.gather(*(ask(p.port, CHAT, True) for _ in range(10)))
        lines = await p.exchanges(10)
    assert [ending for ending, _ in seen] == [Ending.COMPLETE] * 10
    assert [one.most for one in busy] == [1, 1]
    assert sum(one.all for one in busy) == 10
    assert sum(len(told["attempts"]) for told in lines) == 10 + len(backends[0].requests)


# -- one address of two, and connections that are used again


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
async def test_fault_when_one_address_of_two_is_dead_the_other_answers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend itself answers: one dead address is no attempt lost."""
    async with (
        RawBackend(good(CHAT)) as near,
        RawBackend(good(CHAT)) as far,
        blackhole() as silent,
    ):
        with closed_port() as closed:
            dead = closed if kind == "refuses" else silent
            known: Any = socket.getaddrinfo

            def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
                if host != "two.test":
                    return known(host, *rest, **more)
                ports = (dead, near.port)
                return [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
                    for port in ports
                ]

            monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
            rows = {**FIRST, "url": "http://two.test:1"}, {"url": far, "price_per_second": 0.1}
            async with proxy(*rows, middleware=CHAIN) as p:
                ending, _ = await ask(p.port, CHAT, True)
                (told,) = await p.exchanges(1)
        assert ending is Ending.COMPLETE
        assert (len(near.requests), len(far.requests)) == (1, 0)
        assert len(told["attempts"]) == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
@four_apis
async def test_fault_when_a_kept_connection_dies_as_it_is_used_again_nobody_notices(
    api: Api, stream: bool, how: str
) -> None:
    """The keep-alive race: the same backend answers over a fresh connection, with no strike."""

    async def script(conn: BackendConn) -> None:
        received = await conn.request()
        assert received is not None
        await conn.send(b"".join(pieces(api, received.json["stream"])))
        if await conn.head_only() is None:
            return
        if how == "reset":
            conn.reset()

    async with RawBackend(script) as racy, RawBackend(good(api)) as spare:
        rows = {**FIRST, "url": racy}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p:
            seen = [await ask(p.port, api, stream) for _ in range(3)]
            lines = await p.exchanges(3)
        assert [ending for ending, _ in seen] == [Ending.COMPLETE] * 3
        assert spare.requests == []
    assert [len(told["attempts"]) for told in lines] == [1, 1, 1]


async def test_fault_when_the_client_keeps_its_connection_it_serves_after_a_fault() -> None:
    """A fault that was made good leaves the client's connection as good as before."""
    fault = stops("header", "close")
    async with RawBackend(fault.script(CHAT)) as faulty, RawBackend(good(CHAT)) as spare:
        rows = {**FIRST, "url": faulty}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p, RawClient(p.port) as client:
            for stream in (True, False, True):
                got = await client.ask(CHAT.request(stream=stream), "POST")
                assert judge(got, CHAT, stream) is Ending.COMPLETE
        assert len(faulty.requests) == 3


async def test_fault_when_all_three_fail_before_content_one_explicit_error_is_told() -> None:
    async with AsyncExitStack() as stack:
        faults = [stops("head", "close"), stops("body read", "reset"), stops("header", "stall")]
        backends = [await stack.enter_async_context(RawBackend(f.script(CHAT))) for f in faults]
        rows = [{"url": one, "timeouts": QUICK} for one in backends]
        p = await stack.enter_async_context(proxy(*rows, middleware=CHAIN))
        ending, got = await ask(p.port, CHAT, True)
        (told,) = await p.exchanges(1)
    assert (ending, got.status in (502, 504)) == (Ending.ERROR, True)
    assert [len(one.requests) for one in backends] == [1, 1, 1]
    assert got.header("x-beacon-attempts") == [b"3"]
    assert told["end"] == "error"
    assert whole(CHAT, True) not in got.raw
