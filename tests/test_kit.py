"""The kit proves itself: a kit that forgives would let every case pass."""

from __future__ import annotations

import asyncio
import socket

import pytest

from . import kit_backend
from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    Wire,
    answer,
    blackhole,
    chat,
    chat_events,
    chat_stream,
    chunk,
    closed_port,
    eventually,
    header,
    json_answer,
    request,
)
from .kit_runpod import News

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def told(raw: bytes, method: str = "GET", *, close: bool = True):
    """What a client makes of the answer `raw`."""
    async with RawBackend(answer(raw, close=close)) as b, RawClient(b.port) as c:
        return await c.ask(request(method, "/"), method)


async def test_answer_whole_by_length_is_complete():
    got = await told(OK)
    assert (got.status, got.reason, got.body, got.framing) == (200, b"OK", b"ok", "length")
    assert got.complete
    assert got.raw == OK


async def test_answer_whole_by_chunks_gives_body_and_trailers():
    raw = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    got = await told(raw, close=False)
    assert got.complete
    assert got.body == b"abc0123456789"
    assert got.trailers == [(b"X-Sum", b"7")]
    assert got.raw == raw


async def test_answer_ended_by_the_connection_is_complete_only_after_a_clean_close():
    got = await told(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    assert (got.framing, got.body, got.complete) == ("eof", b"all of it", True)

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(b"HTTP/1.1 200 OK\r\n\r\nall of")
        conn.reset()

    async with RawBackend(script) as b, RawClient(b.port) as c:
        assert not (await c.ask(request("GET", "/"))).complete


@pytest.mark.parametrize("method_status", [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_answer_without_a_body_ends_with_its_head(method_status):
    method, status = method_status
    got = await told(b"HTTP/1.1 %d X\r\nContent-Length: 50\r\n\r\n" % status, method, close=False)
    assert got.complete
    assert got.framing == "none"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 20",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: a\rb\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A : a\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nfour5",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nfour",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfour\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfour\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfo",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfourx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-4\r\nfour\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x4\r\nfour\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\nfour\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n4\r\nfour\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
        b"4\r\nfour\r\n0\r\n\r\n",
    ],
)
async def test_answer_cut_short_or_ambiguous_is_never_complete(raw):
    got = await told(raw)
    assert not got.complete
    assert got.fault


async def test_answer_that_never_comes_raises_timeout():
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.wait_closed()

    async with RawBackend(script) as b, RawClient(b.port) as c:
        await c.send(request("GET", "/"))
        with pytest.raises(TimeoutError):
            await c.response(timeout=0.05)


async def test_interim_answers_are_kept_apart():
    got = await told(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK)
    assert got.status == 200
    assert [a.status for a in got.interim] == [103]
    assert header(got.interim[0].headers, "link") == [b"</x>"]


async def test_pipelined_answers_are_read_one_by_one():
    async with RawBackend(answer(OK)) as b, RawClient(b.port) as c:
        await c.send(request("GET", "/1") + request("POST", "/2", body=b"abc"))
        assert [(await c.response()).body for _ in range(2)] == [b"ok", b"ok"]
        assert [(r.target, r.body) for r in b.requests] == [(b"/1", b""), (b"/2", b"abc")]
        assert b.connections == 1


async def test_request_as_received_keeps_order_case_repeats_and_bytes():
    fields = [("X-A", "1"), ("x-a", b"\xe9"), ("Empty", "")]
    async with RawBackend(answer(OK)) as b, RawClient(b.port) as c:
        sent = request("PUT", "//a%41?b", fields, b"body")
        await c.ask(sent)
    (r,) = b.requests
    assert (r.method, r.target, r.version, r.complete) == ("PUT", b"//a%41?b", "1.1", True)
    assert r.headers[1:4] == [(b"X-A", b"1"), (b"x-a", b"\xe9"), (b"Empty", b"")]
    assert r.raw_head + r.body == sent == b.conns[0].raw


async def test_request_in_chunks_gives_body_and_trailers():
    head = request("POST", "/", [("Transfer-Encoding", "chunked")])
    async with RawBackend(answer(OK)) as b, RawClient(b.port) as c:
        await c.ask(head + b"1\r\na\r\n2\r\nbc\r\n0\r\nX-T: v\r\n\r\n")
    (r,) = b.requests
    assert (r.body, r.trailers, r.complete) == (b"abc", [(b"X-T", b"v")], True)
    assert request("POST", "/", body=b"abc", chunked=True).endswith(
        b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )


async def test_request_that_is_no_clean_http_is_never_complete():
    async with RawBackend(answer(OK)) as b, RawClient(b.port) as c:
        await c.ask(request("GET", "/", [("X-A", "a\x00b")]))
    assert b.requests[0].fault
    assert not b.requests[0].complete


async def test_request_cut_short_is_listed_but_not_complete():
    async with RawBackend(answer(OK)) as b, RawClient(b.port) as c:
        await c.send(request("POST", "/", [("Content-Length", "9")]) + b"four")
        await eventually(lambda: b.requests and b.requests[0].body == b"four")
        c.close()
        await b.closed.wait()
        await eventually(lambda: b.requests[0].fault)
    assert not b.requests[0].complete
    assert b.open_connections == 0


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_client_that_leaves_is_seen_and_counted(way):
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        assert await conn.wait_closed()

    async with RawBackend(script) as b, RawClient(b.port) as c:
        await c.send(request("GET", "/"))
        assert (await c.head()).status == 200
        assert b.open_connections == 1
        assert not b.closed.is_set()
        getattr(c, way)()
        await b.closed.wait(timeout=1)
        assert b.open_connections == 0


async def test_backend_close_before_the_client_is_not_counted_as_a_client_close():
    async with RawBackend(answer(OK, close=True)) as b, RawClient(b.port) as c:
        await c.ask(request("GET", "/"))
        assert await c.closed()
        c.close()
        await eventually(lambda: all(conn.wire.lost for conn in b.conns))
    assert b.closed.count == 0


async def test_script_that_fails_fails_the_test():
    async def script(conn: BackendConn) -> None:
        await conn.request()
        raise AssertionError("from the script")

    with pytest.raises(AssertionError, match="from the script"):
        async with RawBackend(script) as b, RawClient(b.port) as c:
            await c.ask(request("GET", "/"))


async def test_probe_is_answered_by_the_kit_and_counted_apart():
    async def script(conn: BackendConn) -> None:
        raise AssertionError("a probe reached the script")

    async with RawBackend(script) as b, RawClient(b.port) as c:
        got = await c.ask(request("GET", "/health", [("User-Agent", "beacon-proxy/0.1.0 check")]))
        assert got.status == 404
        assert await c.closed()
    assert (b.probes, b.connections, b.requests) == (1, 0, [])


async def test_eager_script_may_close_before_any_byte():
    async def script(conn: BackendConn) -> None:
        conn.reset()

    async with RawBackend(script, eager=True) as b, RawClient(b.port) as c:
        got = await c.ask(request("GET", "/"))
        assert got.status == 0
        assert b.connections == 1


async def test_dead_backend_refuses_and_comes_back_on_the_same_port():
    async with RawBackend(answer(OK)) as b:
        port = b.port
        async with RawClient(port) as c:
            await c.ask(request("GET", "/"))
            await b.stop()
            assert await c.closed()
        with pytest.raises(ConnectionRefusedError):
            await RawClient(port).__aenter__()
        await b.listen()
        async with RawClient(port) as c:
            assert (await c.ask(request("GET", "/"))).body == b"ok"


async def test_dead_backend_has_cut_a_connection_that_was_just_coming(monkeypatch):
    """It is accepted when its death begins, and made only after it."""
    async with RawBackend(answer(OK)) as b:
        dying = []

        def accepted(opened):
            dying.append(asyncio.ensure_future(b.stop()))
            return Wire(opened)

        monkeypatch.setattr(kit_backend, "Wire", accepted)
        async with RawClient(b.port) as c:
            assert (await c.ask(request("GET", "/"))).status == 0
            assert await c.closed()
        await asyncio.gather(*dying)


async def test_dead_backend_keeps_its_port():
    async with RawBackend(answer(OK)) as b:
        await b.stop()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", b.port))


async def test_closed_port_refuses():
    with closed_port() as port, pytest.raises(ConnectionRefusedError):
        await RawClient(port).__aenter__()


async def test_blackhole_neither_accepts_nor_refuses():
    async with blackhole() as port:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await RawClient(port).__aenter__()


async def test_client_that_holds_stops_the_backend():
    """Back-pressure reaches the script's drain, or the BPR cases would prove nothing."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(bytes(65536))

    async with RawBackend(script) as b, RawClient(b.port) as c:
        await c.send(request("GET", "/"))
        await c.head()
        c.hold()
        before = -1

        def settled() -> bool:
            nonlocal before
            last, before = before, b.conns[0].sent
            return before > 0 and before == last

        await eventually(settled, timeout=5)
        stalled = b.conns[0].sent
        c.unhold()
        while b.conns[0].sent <= stalled:  # a stuck backend ends in the client's TimeoutError
            await c.read_some()


async def test_chat_stream_is_a_valid_openai_stream():
    async with RawBackend(chat_stream("hé", 3)) as b, RawClient(b.port) as c:
        got = await c.ask(chat(stream=True))
    assert got.complete
    assert got.body == b"".join(chat_events("hé", 3))
    assert got.body.count(b'"content":"h\\u00e9"') == 3
    assert got.body.endswith(b'"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
    assert b.requests[0].json["stream"] is True


async def test_json_answer_is_a_whole_document():
    script = json_answer({"a": 1}, 503, [("Retry-After", "2")])
    async with RawBackend(script) as b, RawClient(b.port) as c:
        got = await c.ask(request("GET", "/"))
    assert (got.status, got.json, got.header("retry-after")) == (503, {"a": 1}, [b"2"])


async def test_pieces_are_seen_as_they_come():
    async def script(conn: BackendConn) -> None:
        await conn.request()
        conn.write(SSE_HEAD)
        conn.write(chunk(b"one"))
        await asyncio.sleep(0.02)
        conn.write(chunk(b"two") + LAST_CHUNK)

    async with RawBackend(script) as b, RawClient(b.port) as c:
        await c.send(request("GET", "/"))
        head = await c.head()
        assert await c.read_until(b"one\r\n") == b"3\r\none\r\n"
        assert (await c.body(head)).body == b"two"
        assert b.requests[0].complete


async def test_news_when_another_begins_to_wait_is_not_lost():
    """An event that each clears before it waits lost what was told to one who was about to."""
    news = News()
    first = asyncio.create_task(news.wait(20))
    await asyncio.sleep(0)
    news.tell()
    await news.wait(0)
    async with asyncio.timeout(5):
        await first
