"""Nothing of an exchange waits for the garbage collector: references alone free all of it.

`app.run` lets the collector look seldom, since a look holds up every stream. A circle of objects,
with the bytes it holds, would stay for as long.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    closed_port,
    each_request,
    eventually,
    json_bytes,
    proxy,
    request,
)

DOCUMENT = json_bytes({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
PIECES = [chunk(each) for each in chat_events("hello", 2)]
PROMPT = b'{"model": "m", "prompt": "hi"}'
UPLOAD = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
OURS = ("beacon_proxy", "middleware", "providers")


async def backend(conn: BackendConn) -> None:
    """Does what the `X-Do` of a request says; a document by default."""
    async for received in each_request(conn):
        do = b"".join(received.header("X-Do"))
        if do == b"stream":
            await conn.send(SSE_HEAD + b"".join(PIECES) + LAST_CHUNK)
        elif do in (b"begin", b"die"):
            await conn.send(SSE_HEAD + PIECES[0] + PIECES[1])
            if do == b"die":
                conn.reset()
                return
        elif do != b"hang":
            await conn.send(DOCUMENT)


async def _asked(port: int, raw: bytes, status: int) -> None:
    async with RawClient(port) as client:
        assert (await client.ask(raw)).status == status


async def _leave(port: int, raw: bytes, *, after_head: bool) -> None:
    async with RawClient(port) as client:
        await client.send(raw)
        if after_head:
            assert (await client.head()).status == 200
        else:
            await asyncio.sleep(0.02)


def asked(raw: bytes, status: int = 200) -> Callable[[int], Awaitable[None]]:
    return lambda port: _asked(port, raw, status)


async def _ask_again(port: int) -> None:
    async with RawClient(port) as client:
        for raw in (chat(), chat(), chat(), doing("stream"), chat(), request("GET", "/health")):
            assert (await client.ask(raw, "POST")).complete


def left(raw: bytes, *, after_head: bool = False) -> Callable[[int], Awaitable[None]]:
    return lambda port: _leave(port, raw, after_head=after_head)


def doing(what: str, *, stream: bool = True) -> bytes:
    return chat(stream=stream, headers=[("X-Do", what)])


KINDS = {
    "document": asked(chat()),
    "stream": asked(doing("stream")),
    "several-over-one-connection": _ask_again,
    "unknown-model": asked(chat(model="unknown"), 404),
    "backend-dies": asked(doing("die")),
    "client-leaves-a-stream": left(doing("begin"), after_head=True),
    "client-leaves-before-the-answer": left(doing("hang")),
    "client-leaves-its-upload": left(request("POST", "/v1/x", UPLOAD) + b"5\r\nhe"),
    "malformed-request": asked(b"GET / HTTP/9.9\r\n\r\n", 400),
    "malformed-upload": asked(request("POST", "/v1/x", UPLOAD) + b"zz\r\n", 400),
    "own-route": asked(request("GET", "/health")),
    "inference": asked(request("POST", "/inference", body=PROMPT)),
    "inference-invalid": asked(request("POST", "/inference", body=b"{"), 422),
}


async def left_over(p: Proxy, act: Callable[[int], Awaitable[None]]) -> Counter[str]:
    """What only the collector would free of ours, by type, once `act` was done."""
    await act(p.port)  # what is made once
    await _settled(p)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await act(p.port)
        await _settled(p)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = [type(each) for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return Counter(k.__qualname__ for k in kinds if k.__module__.partition(".")[0] in OURS)


async def _settled(p: Proxy) -> None:
    await eventually(lambda: p.in_flight() == 0)
    await asyncio.sleep(0.02)  # for transports to tell that they are closed


@pytest.mark.parametrize("kind", KINDS)
async def test_garbage_when_an_exchange_has_ended_is_none(kind: str) -> None:
    row = {"models": ["m"]}
    async with RawBackend(backend) as one, proxy({"url": one, **row}) as p:
        assert await left_over(p, KINDS[kind]) == {}


async def test_garbage_when_backends_refuse_is_none() -> None:
    """An attempt kept its error, whose traceback kept the attempt, and the request with it."""
    with closed_port() as first, closed_port() as second:
        rows = [{"url": f"http://127.0.0.1:{port}", "models": ["m"]} for port in (first, second)]
        async with proxy(*rows, middleware=["region", "failover"]) as p:
            assert await left_over(p, asked(chat(), 502)) == {}


async def test_connections_that_died_while_they_lay_idle_are_forgotten() -> None:
    """They lay in the pool until someone wanted one: after an outage, thousands of them."""

    async def dies(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(DOCUMENT)
        await gate.wait()

    gate = asyncio.Event()
    async with RawBackend(dies) as one, proxy(one) as p:
        clients = [await RawClient(p.port).__aenter__() for _ in range(5)]
        await asyncio.gather(*(client.ask(chat(), "POST") for client in clients))
        idle = p.app._pool._idle
        assert sum(map(len, idle.values())) == 5
        gate.set()
        await eventually(lambda: not any(idle.values()))
        for client in clients:
            await client.__aexit__(None, None, None)
