"""Cross-origin rules, over the proxy's own routes and a relayed answer."""

from __future__ import annotations

import pytest

from .kit import RawBackend, RawClient, answer, proxy, request

PORTAL = "https://portal.example"
OURS = answer(b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: 2\r\n\r\nok")
HANDSHAKE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
]


async def test_cors_when_off_passes_the_backends_own_words() -> None:
    async with RawBackend(OURS) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x", [("Origin", PORTAL)]))
    assert got.header("access-control-allow-origin") == [b"*"]


@pytest.mark.parametrize("path", ["/x", "/health"])
async def test_cors_when_the_origin_is_configured_speaks_for_every_route_once(path: str) -> None:
    """A browser refuses an answer with two values."""
    async with (
        RawBackend(OURS) as backend,
        proxy(backend, server={"cors_origins": [PORTAL]}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("GET", path, [("Origin", PORTAL)]))
        other = await client.ask(request("GET", path, [("Origin", "https://evil.example")]))
    assert got.header("access-control-allow-origin") == [PORTAL.encode()]
    assert got.header("vary") == [b"Origin"]
    assert PORTAL.encode() not in other.header("access-control-allow-origin")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/inference", "/providers"])
async def test_cors_preflight_of_a_configured_origin_is_answered_here(path: str) -> None:
    fields = [("Origin", PORTAL), ("Access-Control-Request-Method", "POST")]
    async with (
        RawBackend(OURS) as backend,
        proxy(backend, server={"cors_origins": [PORTAL]}) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(request("OPTIONS", path, fields))
        assert (got.status, backend.requests) == (204, [])
    assert got.header("access-control-allow-origin") == [PORTAL.encode()]


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 101), (PORTAL, 101), ("https://evil.example", 403), ("http://h", 101)],
)
async def test_ws_when_a_page_of_another_origin_listens_is_refused(
    origin: str | None, status: int
) -> None:
    """Browsers apply no CORS to WebSockets: any page could read the live events."""
    fields = [*HANDSHAKE, *([("Origin", origin)] if origin else [])]
    async with (
        RawBackend(OURS) as backend,
        proxy(backend, server={"cors_origins": [PORTAL]}) as p,
        RawClient(p.port) as client,
    ):
        raw = request("GET", "/ws", fields).replace(b"Host: ", b"Host: h\r\nX-Was: ", 1)
        await client.send(raw)
        assert (await client.head()).status == status
