"""EXT-46, EXT-47: TLS towards a backend is verified, and never falls back to plain text.

The certificates are made for each run by an authority of the test's own.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme

from .kit import OK, BackendConn, RawBackend, RawClient, header, proxy, request

GET = request("GET", "/x", [("Authorization", "Bearer secret")])


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA) -> Iterator[str]:
    with authority.cert_pem.tempfile() as path:
        yield path


def context_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


class TlsBackend:
    """Answers each request it reads; counts connections and keeps the bytes it could read."""

    def __init__(self) -> None:
        self.port = 0
        self.heads: list[bytes] = []
        self.names: list[str | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"\nUser-Agent: beacon-proxy/" not in head:
                    self.heads.append(head)
                writer.write(OK)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def backend_with(context: ssl.SSLContext) -> AsyncIterator[TlsBackend]:
    backend = TlsBackend()
    context.sni_callback = lambda _, name, __: backend.names.append(name)
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0, ssl=context)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()


def row(backend: Any, host: str = "localhost", **tls: Any) -> dict[str, Any]:
    return {"url": f"https://{host}:{backend.port}", "tls": tls}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_ext_46_backend_with_a_trusted_certificate_is_reached(
    authority: trustme.CA, ca_file: str, host: str
) -> None:
    context = context_of(authority.issue_cert(host))
    async with (
        backend_with(context) as backend,
        proxy(row(backend, host, ca_file=ca_file)) as p,
        RawClient(p.port) as client,
    ):
        for _ in range(3):
            got = await client.ask(GET)
            assert (got.status, got.body) == (200, b"ok")
        assert len(backend.heads) == 3
        assert set(backend.names) == ({"localhost"} if host == "localhost" else {None})
        assert b"\r\nHost: %b:%d\r\n" % (host.encode(), backend.port) in backend.heads[0]


def expired(authority: trustme.CA) -> trustme.LeafCert:
    past = datetime.now(UTC) - timedelta(days=3)
    return authority.issue_cert("localhost", not_before=past, not_after=past + timedelta(days=1))


def not_yet(authority: trustme.CA) -> trustme.LeafCert:
    then = datetime.now(UTC) + timedelta(days=3)
    return authority.issue_cert("localhost", not_before=then, not_after=then + timedelta(days=1))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda ca: ca.issue_cert("other.example"), id="EXT-46 wrong name"),
        pytest.param(lambda ca: ca.issue_cert("127.0.0.1"), id="EXT-46 an address for a name"),
        pytest.param(lambda ca: ca.issue_cert("x.localhost"), id="EXT-46 a name below"),
        pytest.param(expired, id="EXT-46 expired"),
        pytest.param(not_yet, id="EXT-46 not yet valid"),
        pytest.param(
            lambda ca: trustme.CA().issue_cert("localhost"), id="EXT-46 another authority"
        ),
    ],
)
async def test_certificate_that_is_not_accepted_gives_502_and_sends_nothing(
    authority: trustme.CA, ca_file: str, make: Any
) -> None:
    async with (
        backend_with(context_of(make(authority))) as backend,
        proxy(row(backend, ca_file=ca_file)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(GET)
        assert (got.status, got.complete) == (502, True)
        assert backend.heads == []
        (line,) = await p.exchanges(1)
        assert [attempt["fault"] for attempt in line["attempts"]] == ["tls"]
        assert b"secret" not in got.raw


async def test_ext_46_self_signed_certificate_is_not_accepted_by_default(
    authority: trustme.CA,
) -> None:
    """Without any `tls` key: verification is what one gets for nothing."""
    context = context_of(authority.issue_cert("localhost"))
    async with backend_with(context) as backend:
        url = f"https://localhost:{backend.port}"
        async with proxy({"url": url}) as p, RawClient(p.port) as client:
            assert (await client.ask(GET)).status == 502
            assert backend.heads == []


async def test_ext_46_verification_can_be_switched_off_for_one_backend(
    authority: trustme.CA,
) -> None:
    context = context_of(expired(authority))
    async with backend_with(context) as one, backend_with(context) as two:
        rows = [
            {**row(one, verify=False), "price_per_second": 0.1},
            {**row(two), "price_per_second": 0.01},
        ]
        async with proxy(*rows) as p, RawClient(p.port) as client:
            for _ in range(3):
                fields = [("X-Beacon-Cost-Priority", "true")]
                got = await client.ask(request("GET", "/x", fields))
                assert got.status == 200
                assert header(got.headers, b"X-Beacon-Backend") == [b"b0"]
            assert (len(one.heads), two.heads) == (3, [])


async def test_ext_47_plain_backend_behind_an_https_url_never_sees_the_request() -> None:
    async def plain(conn: BackendConn) -> None:
        await conn.wire.some()
        await conn.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    async with (
        RawBackend(plain, eager=True) as backend,
        proxy(row(backend)) as p,
        RawClient(p.port) as client,
    ):
        got = await client.ask(GET)
        assert (got.status, got.complete) == (502, True)
        assert b"secret" not in b"".join(conn.raw for conn in backend.conns)


async def test_ext_47_tls_backend_behind_an_http_url_gives_502(authority: trustme.CA) -> None:
    context = context_of(authority.issue_cert("localhost"))
    async with backend_with(context) as backend:
        url = f"http://localhost:{backend.port}"
        async with proxy({"url": url}) as p, RawClient(p.port) as client:
            assert (await client.ask(GET)).status == 502
            assert backend.heads == []


async def test_ext_47_handshake_that_never_ends_runs_into_the_connect_limit() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        url = f"https://localhost:{port}"
        async with (
            proxy({"url": url}, timeouts={"connect": 0.2}) as p,
            RawClient(p.port) as client,
        ):
            got = await client.ask(GET, timeout=2)
            assert (got.status, got.complete) == (504, True)
    finally:
        server.close()
