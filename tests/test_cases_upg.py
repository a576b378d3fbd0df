"""UPG: a tunnel only after a matching 101; otherwise the connection stays parsed HTTP.

A tunnel is the one place where a relay stops looking, so what opens one is narrow: the client asked
for `websocket`, and the backend said 101 to just that (RFC 9110 7.8). `h2c` would let a client talk
HTTP/2 past every rule of the proxy.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from .kit import (
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    closed_port,
    each_request,
    eventually,
    header,
    proxy,
    request,
)

ASK = [
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Protocol", "realtime, openai-beta.realtime-v1"),
    ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
]
HANDSHAKE = request("GET", "/v1/realtime?model=%6d", ASK)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
    b"Sec-WebSocket-Protocol: realtime\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
# Frames that any HTTP parser would choke on, and a request that it would run.
FRAMES = [b"\x81\x85\x00\x00\x00\x00Hello", b"\x00\xff\r\n\r\n", b"GET /hidden HTTP/1.1\r\n\r\n"]
NOISE = random.Random(1).randbytes(2_000_000)


def switch(*after: bytes) -> Script:
    """Say 101 with `after` in the same segment, then send back whatever comes."""

    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(SWITCH + b"".join(after))
        while data := await conn.wire.some():
            await conn.send(data)

    return script


async def test_upg_01_bytes_pass_both_ways_unchanged() -> None:
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        for frame in FRAMES:
            await client.send(frame)
            assert await client.read_until(frame) == frame
        assert len(backend.requests) == 1


async def test_upg_02_bytes_right_behind_the_101_reach_the_client() -> None:
    first = b"".join(FRAMES)
    async with (
        RawBackend(switch(first)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        assert await client.read_until(FRAMES[-1]) == first


async def test_upg_03_bytes_sent_along_with_the_handshake_reach_the_backend() -> None:
    """RFC 6455 has a client wait for the 101, but to lose bytes is worse than to pass them."""
    first = b"".join(FRAMES)
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE + first)
        assert (await client.response()).status == 101
        assert await client.read_until(FRAMES[-1]) == first
        assert len(backend.requests) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(b"403 Forbidden", id="UPG-04 403"),
        pytest.param(b"400 Bad Request", id="UPG-05 400"),
        pytest.param(b"401 Unauthorized", id="UPG-05 401"),
        pytest.param(b"404 Not Found", id="UPG-05 404"),
        pytest.param(b"426 Upgrade Required", id="UPG-05 426"),
        pytest.param(b"200 OK", id="UPG-05 200"),
        pytest.param(b"503 Service Unavailable", id="UPG-05 503"),
    ],
)
async def test_refused_upgrade_passes_and_the_connection_stays_http(refusal: bytes) -> None:
    raw = b"HTTP/1.1 " + refusal + b"\r\nX-Why: no\r\nContent-Length: 9\r\n\r\nno tunnel"
    async with (
        RawBackend(answer(raw)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for target in ("/v1/realtime", "/again"):
            await client.send(request("GET", target, ASK))
            got = await client.response()
            assert b"%d " % got.status == refusal[:4]
            assert (got.body, header(got.headers, b"X-Why")) == (b"no tunnel", [b"no"])
        assert [x.target for x in backend.requests] == [b"/v1/realtime", b"/again"]


async def agree(conn: BackendConn) -> None:
    """A backend that says 101 to any Upgrade it sees, and serves the tunnel as HTTP."""
    async for received in each_request(conn):
        wanted = header(received.headers, b"Upgrade")
        if wanted:
            head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "
            await conn.send(head + wanted[0] + b"\r\n\r\n")
        else:
            await conn.send(OK)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            [
                ("Connection", "Upgrade, HTTP2-Settings"),
                ("Upgrade", "h2c"),
                ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"),
            ],
            id="UPG-06 h2c",
        ),
        pytest.param([("Connection", "Upgrade"), ("Upgrade", "H2C")], id="UPG-06 H2C"),
        pytest.param([("Connection", "Upgrade"), ("Upgrade", "TLS/1.2")], id="UPG-13 TLS"),
        pytest.param([("Connection", "Upgrade"), ("Upgrade", "own/1")], id="UPG-13 unknown"),
        pytest.param([("Upgrade", "websocket")], id="UPG-13 without Connection"),
        pytest.param(
            [("Connection", "keep-alive"), ("Upgrade", "websocket")],
            id="UPG-13 not named by Connection",
        ),
    ],
)
async def test_upgrade_that_is_no_websocket_is_not_tunnelled(fields: list[tuple[str, str]]) -> None:
    """The client's next bytes are still read as HTTP, by the proxy, as an exchange of their own."""
    async with RawBackend(agree) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for target in (b"/first", b"/second"):
            await client.send(request("GET", target, fields))
            got = await client.response()
            if got.status != 200:
                assert got.status == 400
                return
            assert len(await p.exchanges(len(backend.requests))) == len(backend.requests)
        assert [x.target for x in backend.requests] == [b"/first", b"/second"]
        for received in backend.requests:
            assert header(received.headers, b"Upgrade") == []
            assert header(received.headers, b"HTTP2-Settings") == []


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([("Upgrade", "websocket, h2c")], id="UPG-06 list"),
        pytest.param([("Upgrade", "h2c, websocket")], id="UPG-06 list, h2c first"),
        pytest.param([("Upgrade", "websocket"), ("Upgrade", "h2c")], id="UPG-06 two lines"),
        pytest.param([("Upgrade", "h2c"), ("Upgrade", "websocket")], id="UPG-06 h2c first"),
    ],
)
async def test_h2c_beside_websocket_never_reaches_the_backend(lines: list[tuple[str, str]]) -> None:
    """To choose `websocket` from the list is right, and so is to choose nothing."""
    async with RawBackend(agree) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/x", [("Connection", "Upgrade"), *lines]))
        assert (await client.response()).status in (101, 200, 400)
        for received in backend.requests:
            assert b"h2c" not in received.raw_head.lower()


async def test_upg_20_upgrade_from_http_1_0_is_ignored() -> None:
    """RFC 9110 7.8: a server must ignore Upgrade in an HTTP/1.0 request."""
    async with RawBackend(agree) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/x", ASK, version="HTTP/1.0"))
        assert (await client.response()).status in (200, 400)


@pytest.mark.parametrize(
    ("raw", "reply"),
    [
        pytest.param(request("GET", "/x"), SWITCH, id="UPG-07 not asked for"),
        pytest.param(
            request("POST", "/v1/chat/completions", body=b'{"model":"m"}'),
            SWITCH,
            id="UPG-07 not asked for by an inference",
        ),
        pytest.param(
            HANDSHAKE, SWITCH.replace(b": websocket", b": h2c"), id="UPG-14 another protocol"
        ),
        pytest.param(
            HANDSHAKE, SWITCH.replace(b"Upgrade: websocket\r\n", b""), id="UPG-25 without Upgrade"
        ),
    ],
)
async def test_101_that_does_not_match_is_malformed(raw: bytes, reply: bytes) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(reply + b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled")
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(raw)
        got = await client.response("POST")
        assert (got.status, got.complete) == (502, True)
        assert b"smuggled" not in got.raw
        await backend.closed.wait()


@pytest.mark.parametrize("how", ["close", "reset", "finish"])
async def test_upg_08_client_that_leaves_ends_the_backends_side(how: str) -> None:
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        await client.send(b"ping")
        await client.read_until(b"ping")
        assert p.in_flight() == 1
        getattr(client, how)()
        await backend.closed.wait(timeout=4)
        await eventually(lambda: p.in_flight() == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_upg_09_backend_that_leaves_ends_the_clients_side(how: str) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(SWITCH + b"last words")
        await conn.wire.exactly(4)
        getattr(conn, how)()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        assert await client.read_until(b"last words") == b"last words"
        await client.send(b"bye.")
        assert await client.closed(1)
        await eventually(lambda: p.in_flight() == 0)


async def test_upg_10_client_that_leaves_during_the_handshake_ends_the_backends_side() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        await eventually(lambda: backend.requests)
        client.close()
        await backend.closed.wait(timeout=4)
        await eventually(lambda: p.in_flight() == 0)


async def test_upg_11_megabytes_pass_both_ways_at_once() -> None:
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        sending = asyncio.ensure_future(client.send(NOISE))
        got = bytearray()
        while len(got) < len(NOISE):
            got += await client.read_some()
        await sending
        assert got == NOISE


async def test_upg_12_client_that_reads_nothing_stops_the_backend() -> None:
    """Else a tunnel would be a way to fill the memory of the proxy."""

    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(SWITCH)
        while True:
            await conn.send(NOISE[:65_536])

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        await client.head()
        client.hold()
        last = -1
        while (now := backend.conns[0].sent) != last:
            last = now
            await asyncio.sleep(0.05)
            assert now < 24_000_000


async def test_upg_15_fields_of_the_handshake_pass_both_ways() -> None:
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        got = await client.response()
        assert header(got.headers, b"Upgrade") == [b"websocket"]
        assert [x.lower() for x in header(got.headers, b"Connection")] == [b"upgrade"]
        assert header(got.headers, b"Sec-WebSocket-Accept") == [b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]
        assert header(got.headers, b"Sec-WebSocket-Protocol") == [b"realtime"]
        assert header(got.headers, b"Content-Length") == []
        (received,) = backend.requests
        assert received.target == b"/v1/realtime?model=%6d"
        assert header(received.headers, b"Upgrade") == [b"websocket"]
        assert [x.lower() for x in header(received.headers, b"Connection")] == [b"upgrade"]
        for name, value in ASK[2:]:
            assert header(received.headers, name) == [value.encode()]


async def test_upg_16_tunnels_side_by_side_do_not_mix() -> None:
    async with (
        RawBackend(switch()) as backend,
        proxy(backend) as p,
        RawClient(p.port) as one,
        RawClient(p.port) as two,
    ):
        for client in (one, two):
            await client.send(HANDSHAKE)
            assert (await client.response()).status == 101
        for n in range(20):
            await one.send(b"<one %d>" % n)
            await two.send(b"<two %d>" % n)
            assert await two.read_until(b">") == b"<two %d>" % n
            assert await one.read_until(b">") == b"<one %d>" % n


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            [("upgrade", "WebSocket"), ("connection", "keep-alive, Upgrade"), *ASK[2:]],
            id="UPG-21 as Firefox writes it",
        ),
        pytest.param(
            [("UPGRADE", "websocket"), ("CONNECTION", "UPGRADE"), *ASK[2:]], id="UPG-21 capitals"
        ),
        pytest.param(
            [("Connection", "keep-alive"), ("Connection", "upgrade"), *ASK[:1], *ASK[2:]],
            id="UPG-21 two Connection lines",
        ),
    ],
)
async def test_upgrade_is_understood_in_any_spelling(fields: list[tuple[str, str]]) -> None:
    async with RawBackend(switch()) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("GET", "/v1/realtime", fields))
        assert (await client.response()).status == 101
        await client.send(b"ping")
        assert await client.read_until(b"ping") == b"ping"


async def test_upg_22_backend_that_refuses_the_connection_is_passed_over() -> None:
    with closed_port() as dead:
        async with (
            RawBackend(switch()) as backend,
            proxy(
                {"url": f"http://127.0.0.1:{dead}", "price_per_second": 0.0001},
                {"url": backend, "price_per_second": 0.1},
            ) as p,
            RawClient(p.port) as client,
        ):
            await client.send(request("GET", "/x", [*ASK, ("X-Beacon-Cost-Priority", "true")]))
            got = await client.response()
            assert (got.status, header(got.headers, b"X-Beacon-Attempts")) == (101, [b"2"])
            await client.send(b"ping")
            assert await client.read_until(b"ping") == b"ping"


async def test_upg_23_no_backend_at_all_is_an_error_and_the_connection_stays_http() -> None:
    with closed_port() as dead:
        async with proxy({"url": f"http://127.0.0.1:{dead}"}) as p, RawClient(p.port) as client:
            for _ in range(2):
                await client.send(HANDSHAKE)
                got = await client.response()
                assert (got.status, got.complete) == (502, True)


async def test_upg_26_bytes_behind_a_refused_handshake_never_run_at_the_backend_as_one() -> None:
    """What the client took for frames is HTTP after a refusal: parsed, so refused in its turn."""
    refuse = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    async with (
        RawBackend(answer(refuse)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(
            HANDSHAKE + FRAMES[0] + b"\r\n\r\nGET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert (await client.response()).status == 403
        assert await client.closed()
        assert [x.target for x in backend.requests] == [b"/v1/realtime?model=%6d"]


async def test_upg_27_log_line_of_a_tunnel_tells_its_status_and_bytes() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        await conn.send(SWITCH)
        await conn.send(await conn.wire.exactly(5))

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        await client.send(b"12345")
        await client.read_until(b"12345")
        (line,) = await p.exchanges(1)
        assert (line["status"], line["end"], line["bytes_out"]) == (101, "complete", 5)
