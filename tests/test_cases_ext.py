"""EXT: limits, time, and what is told of it: the cases beyond plain relaying.

Left out of the family, for the proxy does not offer them: EXT-10 (HTTP/2 towards the client) and
EXT-37 (a new configuration while streams run). `test_cases_ext_routing` has the choice of backends,
`test_cases_ext_tls` TLS towards them.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from beacon_proxy.contracts import Backend, Timeouts
from beacon_proxy.wire.pool import Pool
from beacon_proxy.wire.wheel import Wheel

from .kit import (
    LAST_CHUNK,
    OK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat,
    chat_stream,
    chunk,
    closed_port,
    each_request,
    event,
    eventually,
    header,
    json_answer,
    proxy,
    request,
    sse,
)

GOOD = {"choices": [{"message": {"content": "hi"}}]}
GET = request("GET", "/x")


async def silent(conn: BackendConn) -> None:
    """Read a request and never answer."""
    await conn.request()
    await conn.wait_closed()


def begins(*pieces: bytes) -> Script:
    """Read a request, write `pieces`, then say no more."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        for piece in pieces:
            await conn.send(piece)
        await conn.wait_closed()

    return script


@contextmanager
def unanswered_port() -> Iterator[int]:
    """A port whose queue of connections is full: a connect to it neither succeeds nor fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


# -- clients that are slow, or too large


async def test_ext_01_head_that_comes_too_slowly_is_cut_off() -> None:
    """The limit is over the whole head: a byte now and then must not stretch it (slowloris)."""

    async with RawBackend(answer(OK)) as backend, proxy(backend, head_timeout=0.3) as p:
        async with RawClient(p.port) as slow:
            began = time.monotonic()
            for byte in GET.rstrip() * 20:
                await slow.send(bytes([byte]))
                if await slow.closed(0.03):
                    break
            assert time.monotonic() - began < 5, "all of it would take twenty"
            if slow.wire.buffer:
                assert (await slow.response()).status == 408
        async with RawClient(p.port) as other:
            assert (await other.ask(GET)).status == 200
        assert len(backend.requests) == 1


async def test_ext_01_slow_heads_harm_no_other_client() -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        slow = [RawClient(p.port) for _ in range(50)]
        try:
            for client in slow:
                await client.__aenter__()
                await client.send(GET[:-3])
            async with RawClient(p.port) as client:
                for _ in range(10):
                    assert (await client.ask(GET, timeout=4)).status == 200
            assert len(backend.requests) == 10
            assert p.in_flight() == 0
        finally:
            for client in slow:
                await client.__aexit__(None, None, None)


@pytest.mark.parametrize("path", ["/files", "/v1/chat/completions"])
async def test_ext_02_body_that_stops_coming_ends_in_408(path: str) -> None:
    async with (
        RawBackend(answer(OK)) as backend,
        proxy(backend, timeouts={"idle": 0.2}) as p,
        RawClient(p.port) as client,
    ):
        raw = request("POST", path, [("Content-Type", "application/json")], body=b"x" * 100)
        await client.send(raw[:-95])
        got = await client.response("POST", timeout=2)
        assert (got.status, got.complete) in ((408, True), (0, False))
        assert header(got.headers, b"Connection") == [b"close"] or await client.closed()
        await eventually(lambda: p.in_flight() == 0)
        assert not any(received.complete for received in backend.requests)


@pytest.mark.parametrize(
    ("raw", "statuses"),
    [
        pytest.param(
            request("GET", "/x", [("A", "")] * 10_000), (400, 431), id="EXT-12 10 000 lines"
        ),
        pytest.param(
            request("GET", "/x", [("X-A", "a" * 100_000)]), (400, 431), id="EXT-13 a long value"
        ),
        pytest.param(
            request("GET", "/x", [("X-" + "a" * 100_000, "1")]), (400, 431), id="EXT-13 a long name"
        ),
        pytest.param(
            request("GET", "/x", [(f"X-{n}", "a" * 1000) for n in range(200)]),
            (400, 431),
            id="EXT-13 many lines of middle size",
        ),
        pytest.param(request("M" * 100_000, "/x"), (400, 414, 431, 501), id="EXT-14 a long method"),
        pytest.param(
            request("GET", "/x", version="HTTP/1." + "1" * 100_000),
            (400, 414, 431, 505),
            id="EXT-14 a long version",
        ),
    ],
)
async def test_head_that_is_too_large_is_refused_at_little_cost(
    raw: bytes, statuses: tuple[int, ...]
) -> None:
    async with (
        RawBackend(answer(OK)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
        RawClient(p.port) as other,
    ):
        began = time.process_time()
        await client.send(raw)
        got = await client.response(timeout=4)
        assert got.status in statuses
        assert await client.closed()
        assert time.process_time() - began < 0.5
        assert backend.requests == []
        assert (await other.ask(GET)).status == 200


async def test_ext_15_head_of_a_usual_size_passes() -> None:
    """Browsers and SDKs behind a gateway send such: 100 fields, a cookie of 8 kB."""
    fields = [(f"X-{n}", "a" * 100) for n in range(100)] + [("Cookie", "c" * 8000)]
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        assert (await client.ask(request("GET", "/x", fields))).status == 200
        assert len(header(backend.requests[0].headers, b"Cookie")[0]) == 8000


async def test_ext_16_head_of_an_answer_that_never_ends_is_cut_off() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await conn.send(b"X-More: " + b"a" * 1000 + b"\r\n")

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(GET)
        assert (got.status, got.complete) == (502, True)
        await backend.closed.wait()
        assert backend.conns[0].sent < 8_000_000


async def test_ext_17_interim_answers_without_end_are_no_answer() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        while True:
            await conn.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            await asyncio.sleep(0.001)

    async with (
        RawBackend(script) as backend,
        proxy(backend, timeouts={"first_content": 0.3}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(GET, timeout=3)
        assert got.status in (502, 504)
        await backend.closed.wait()


# -- time


STREAM = chat(stream=True)


@pytest.mark.parametrize(
    ("raw", "limit"),
    [
        pytest.param(GET, "first_content", id="EXT-03 any path"),
        pytest.param(request("POST", "/x", body=b"y"), "first_content", id="EXT-03 POST"),
        pytest.param(STREAM, "first_content", id="EXT-03 stream"),
        pytest.param(chat(), "document", id="EXT-03 document"),
    ],
)
async def test_silent_backend_gives_504_is_cancelled_and_counts_as_failed(
    raw: bytes, limit: str
) -> None:
    async with (
        RawBackend(silent) as backend,
        proxy(backend, timeouts={limit: 0.2}) as p,
        RawClient(p.port) as client,
    ):
        began = time.monotonic()
        got = await client.ask(raw, "POST")
        assert (got.status, got.complete) == (504, True)
        assert 0.1 < time.monotonic() - began < 4, "that of no other limit"
        await backend.closed.wait(timeout=4)
        (line,) = await p.exchanges(1)
        (attempt,) = line["attempts"]
        assert (line["end"], line["status"], attempt["fault"]) == ("error", 504, "timeout")
        (candidate,) = p.app.fleet.candidates()
        assert candidate.live.success < 1.0


async def test_ext_03_stream_that_stays_at_its_role_chunk_gives_no_complete_answer() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    async with (
        RawBackend(begins(SSE_HEAD, chunk(role))) as backend,
        proxy(backend, timeouts={"first_content": 0.3, "idle": 0.3}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(STREAM, "POST")
        assert (got.status, got.complete) in ((504, True), (200, False))
        await backend.closed.wait(timeout=4)


async def test_ext_04_connection_that_is_never_taken_gives_504() -> None:
    with unanswered_port() as port:
        async with (
            proxy({"url": f"http://127.0.0.1:{port}"}, timeouts={"connect": 0.2}) as p,
            RawClient(p.port) as client,
        ):
            got = await client.ask(request("POST", "/x", body=b"y"), "POST")
            assert (got.status, got.complete) == (504, True)


async def test_ext_05_stream_is_not_cut_by_any_limit_but_the_total() -> None:
    """Each piece renews the idle limit; no other limit counts once content has come."""
    pieces = [b"data: %d\n\n" % n for n in range(20)]
    limits = {"first_content": 0.6, "document": 0.6, "idle": 0.9, "connect": 0.6}
    async with (
        RawBackend(sse(pieces, gap=0.065)) as backend,
        proxy(backend, timeouts=limits) as p,
        RawClient(p.port) as client,
    ):
        began = time.monotonic()
        got = await client.ask(GET)
        assert time.monotonic() - began > 1.2
        assert (got.body, got.complete) == (b"".join(pieces), True)


@pytest.mark.parametrize("raw", [GET, STREAM], ids=["EXT-06 any path", "EXT-06 stream"])
async def test_stream_that_falls_silent_is_cut_visibly(raw: bytes) -> None:
    first = event({"choices": [{"index": 0, "delta": {"content": "one"}}]})
    async with (
        RawBackend(begins(SSE_HEAD, chunk(first))) as backend,
        proxy(backend, timeouts={"idle": 0.2}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(raw, "POST")
        assert (got.status, got.complete) == (200, False)
        assert got.body.startswith(first)
        await backend.closed.wait(timeout=4)
        assert (await p.exchanges(1))[0]["end"] == "error"


@pytest.mark.parametrize("hint", [True, False], ids=["EXT-11 of the client", "EXT-11 configured"])
async def test_total_time_cuts_a_stream_that_never_ends(hint: bool) -> None:
    async def endless(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(chunk(b"data: x\n\n"))
            await asyncio.sleep(0.01)

    fields = [("X-Beacon-Timeout", "0.3")] if hint else []
    async with (
        RawBackend(endless) as backend,
        proxy(backend, timeouts={"total": 0 if hint else 0.3}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("GET", "/x", fields), timeout=4)
        assert (got.status, got.complete) == (200, False)
        await backend.closed.wait(timeout=4)


# -- what a proxy on the path owes


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE"])
async def test_ext_07_max_forwards_0_is_answered_by_the_proxy_itself(method: str) -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request(method, "/x", [("Max-Forwards", "0")]), method)
        assert got.complete
        assert got.status in (200, 204, 405, 501)
        assert backend.requests == []


async def test_ext_08_max_forwards_is_lowered_by_one() -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for given, seen in [("1", b"0"), ("10", b"9")]:
            await client.ask(request("OPTIONS", "/x", [("Max-Forwards", given)]))
            assert header(backend.requests[-1].headers, b"Max-Forwards") == [seen]


@pytest.mark.parametrize("value", ["", "x", "-1", "9" * 400])
async def test_ext_09_odd_max_forwards_does_no_harm(value: str) -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("OPTIONS", "/x", [("Max-Forwards", value)]))
        assert got.status in (200, 204, 400)
        assert len(backend.requests) <= 1


def resolves_to(*addresses: tuple[Any, ...]) -> Callable[..., list[tuple[Any, ...]]]:
    """A `getaddrinfo` that knows these addresses for any name."""
    kinds = [socket.AF_INET6 if ":" in address[0] else socket.AF_INET for address in addresses]
    found = [
        (kind, socket.SOCK_STREAM, 6, "", address)
        for kind, address in zip(kinds, addresses, strict=True)
    ]
    return lambda *_, **__: found


@pytest.mark.parametrize("kind", ["refuses", "never answers", "no route"])
async def test_ext_18_second_address_of_a_name_is_tried_when_the_first_is_dead(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    with closed_port() as closed, unanswered_port() as full:
        dead: dict[str, tuple[Any, ...]] = {
            "refuses": ("127.0.0.1", closed),
            "never answers": ("127.0.0.1", full),
            "no route": ("::1", closed, 0, 0),
        }
        async with RawBackend(answer(OK)) as backend:
            live = ("127.0.0.1", backend.port)
            monkeypatch.setattr(socket, "getaddrinfo", resolves_to(dead[kind], live))
            wheel = Wheel(loop)
            row = Backend("b", "openai", "", "http", "two.test", 80, timeouts=Timeouts(connect=2))
            connection = await Pool(loop, wheel).connect(row)
            assert connection.transport is not None
            assert connection.transport.get_extra_info("peername")[1] == backend.port
            connection.abort()


async def test_ext_18_backend_by_name_is_reached() -> None:
    async with (
        RawBackend(answer(OK)) as backend,
        proxy({"url": f"http://localhost:{backend.port}"}) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(GET)).status == 200
        assert header(backend.requests[0].headers, b"Host") == [b"localhost:%d" % backend.port]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this host")
async def test_ext_20_backend_by_an_ipv6_address_is_reached() -> None:
    backend = RawBackend(answer(OK), host="::1")
    async with (
        backend,
        proxy({"url": f"http://[::1]:{backend.port}"}) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(GET)).status == 200
        assert header(backend.requests[0].headers, b"Host") == [b"[::1]:%d" % backend.port]


async def accepts(port: int) -> bool:
    try:
        async with RawClient(port):
            return True
    except ConnectionError:
        return False


async def test_ext_38_drain_lets_an_open_stream_finish_and_takes_no_new_client() -> None:
    go = asyncio.Event()

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD + chunk(b"first "))
        await go.wait()
        await conn.send(chunk(b"last") + LAST_CHUNK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(GET)
        await client.read_until(b"first ")
        stopping = asyncio.ensure_future(p.app.stop(5))
        tries = 0
        while tries < 400 and await accepts(p.port):
            tries += 1
            await asyncio.sleep(0.005)
        assert tries < 400
        assert not stopping.done()
        go.set()
        await client.read_until(LAST_CHUNK)
        await asyncio.wait_for(stopping, 2)


# -- what is told


async def test_ext_39_log_line_of_a_cancelled_request() -> None:
    """It tells 499, the bytes that went out, and the attempt that was cut."""
    async with (
        RawBackend(begins(SSE_HEAD, chunk(b"data: 12345\n\n"))) as backend,
        proxy(backend) as p,
    ):
        async with RawClient(p.port) as client:
            await client.send(request("POST", "/x", body=b"12345678"))
            await client.read_until(b"12345\n\n")
        (line,) = await p.exchanges(1)
        assert (line["end"], line["status"]) == ("client_closed", 499)
        assert (line["bytes_in"], line["bytes_out"]) == (8, 13)
        (attempt,) = line["attempts"]
        assert (attempt["backend"], attempt["fault"]) == ("b0", "client_closed")
        assert line["duration_s"] > 0
        await backend.closed.wait()


async def test_ext_39_log_line_of_a_request_cancelled_before_any_answer() -> None:
    async with RawBackend(silent) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: backend.requests)
        (line,) = await p.exchanges(1)
        assert (line["end"], line["status"], line["bytes_out"]) == ("client_closed", 499, 0)
        assert [x["fault"] for x in line["attempts"]] == ["client_closed"]


async def test_ext_40_log_line_of_a_whole_answer() -> None:
    async with (
        RawBackend(chat_stream("tok", 3)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(chat(stream=True, headers=[("X-Request-Id", "mine-7")]), "POST")
        (line,) = await p.exchanges(1)
        assert (line["id"], line["end"], line["status"]) == ("mine-7", "complete", 200)
        assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
        assert (line["model"], line["backend"], line["provider"]) == ("m", "b0", "openai")
        assert line["bytes_out"] == len(got.body)
        assert 0 < line["ttft_s"] <= line["duration_s"]
        assert [x["fault"] for x in line["attempts"]] == [None]


async def test_ext_41_what_clients_make_up_never_becomes_a_metric_label() -> None:
    async with (
        RawBackend(json_answer(GOOD)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        sizes = []
        for n in range(60):
            name = f"madeup-{n}"
            await client.ask(chat(model=name, headers=[("X-Tenant", name)]), "POST")
            fields = [("X-Beacon-Region", name), ("User-Agent", name), ("X-Request-Id", name)]
            await client.ask(request("GET", f"/{name}", fields))
            async with RawClient(p.port) as other:
                assert (await other.ask(request(f"MADEUP{n}", "/x"))).status >= 400
            if n % 20 == 19:
                got = await client.ask(request("GET", "/metrics", [("Accept", "text/plain")]))
                assert b"beacon_" in got.body
                assert b"madeup" not in got.body.lower()
                sizes.append(got.body.count(b"\n"))
        assert sizes[0] == sizes[1] == sizes[2]


async def test_ext_43_credentials_and_bodies_are_never_told() -> None:
    fields = [
        ("Authorization", "Bearer s3cret-of-the-client"),
        ("X-Api-Key", "s3cret-of-the-client"),
        ("Cookie", "session=s3cret-of-the-client"),
        ("Content-Type", "application/json"),
    ]
    body = b'{"model":"m","messages":["s3cret-of-the-client"]}'
    async with (
        RawBackend(json_answer({"error": {"message": "s3cret-of-the-backend"}}, 500)) as backend,
        proxy({"url": backend, "api_key": "s3cret-of-the-operator"}) as p,
        RawClient(p.port) as client,
    ):
        target = "/v1/chat/completions?key=s3cret-of-the-client"
        await client.ask(request("POST", target, fields, body), "POST")
        (received,) = backend.requests
        assert header(received.headers, b"Authorization") == [b"Bearer s3cret-of-the-operator"]
        assert header(received.headers, b"X-Api-Key") == [b"s3cret-of-the-operator"]
        await p.exchanges(1)
        assert "s3cret" not in repr(p.log)
        for target in ("/providers", "/env", "/health", "/metrics", "/models", "/costs"):
            assert b"s3cret" not in (await client.ask(request("GET", target))).raw


async def test_ext_44_error_names_no_address_of_a_backend() -> None:
    with closed_port() as port:
        row = {"url": f"http://127.0.0.1:{port}/secret-path"}
        async with proxy(row) as p, RawClient(p.port) as client:
            got = await client.ask(chat(), "POST")
            assert got.status == 502
            assert str(port).encode() not in got.raw
            assert b"127.0.0.1" not in got.raw
            assert b"secret-path" not in got.raw


async def test_ext_48_cookie_of_one_clients_answer_is_never_sent_with_anothers_request() -> None:
    cookie = b"HTTP/1.1 200 OK\r\nSet-Cookie: session=%s\r\nContent-Length: 2\r\n\r\nok"

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            await conn.send(cookie % received.target[1:])

    async with RawBackend(script) as backend, proxy(backend) as p:
        async with RawClient(p.port) as one, RawClient(p.port) as two:
            got = await one.ask(request("GET", "/one"))
            assert header(got.headers, b"Set-Cookie") == [b"session=one"]
            await two.ask(request("GET", "/two"))
            await one.ask(request("GET", "/one", [("Cookie", "mine=1")]))
            await two.ask(request("GET", "/two"))
        cookies = [header(x.headers, b"Cookie") for x in backend.requests]
        assert cookies == [[], [], [b"mine=1"], []]
