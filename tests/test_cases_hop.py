"""HOP: connection-level fields stop at the proxy; framing, Host and credentials survive any token.

RFC 9110 7.6.1. `Connection` names fields for the next hop alone, and a client that could name any
field could take away what the backend's safety rests on.
"""

from __future__ import annotations

import pytest

from .kit import (
    RawBackend,
    RawClient,
    Received,
    Seen,
    answer,
    chat,
    json_answer,
    proxy,
    request,
    through,
)

DOCUMENT = {"choices": [{"message": {"role": "assistant", "content": "hello"}}]}


async def arrives(*headers: tuple[str, str]) -> Received:
    seen = await through(request("GET", "/x", headers))
    assert (seen.answer.status, seen.answer.body) == (200, b"ok")
    return seen.got


@pytest.mark.parametrize(
    "connection",
    [
        pytest.param("X-Hop", id="HOP-01 named alone"),
        pytest.param("x-HOP", id="HOP-02 in another case"),
        pytest.param("close, X-Hop", id="HOP-02 in a list"),
        pytest.param(" ,, X-Hop\t,close", id="HOP-02 in a list with holes"),
        pytest.param("keep-alive,X-Hop,X-Other", id="HOP-02 without spaces"),
    ],
)
async def test_hop_01_and_02_field_named_in_connection_is_removed(connection):
    received = await arrives(("X-Hop", "1"), ("Connection", connection), ("X-End", "2"))
    assert received.header("x-hop") == []
    assert received.header("x-end") == [b"2"]
    assert b"x-hop" not in b",".join(received.header("connection")).lower()


async def test_hop_03_same_over_two_connection_lines():
    received = await arrives(
        ("Connection", "X-One"), ("X-One", "1"), ("X-Two", "2"), ("Connection", "X-Two, x")
    )
    assert received.header("x-one") == received.header("x-two") == []


async def test_hop_04_connection_itself_says_nothing_of_the_client():
    """`close` is about the client's connection; told to the backend it would end the pooled one."""
    received = await arrives(("Connection", "close"))
    assert received.header("connection") in ([], [b"keep-alive"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("Proxy-Connection", "keep-alive", id="HOP-05 Proxy-Connection"),
        pytest.param("Keep-Alive", "timeout=5, max=100", id="HOP-06 Keep-Alive"),
        pytest.param("Proxy-Authorization", "Basic cHJveHk6cHc=", id="HOP-14 Proxy-Authorization"),
        pytest.param("Proxy-Authenticate", "Basic", id="HOP-14 Proxy-Authenticate"),
    ],
)
async def test_hop_05_06_and_14_field_of_the_connection_is_removed(name, value):
    received = await arrives((name, value), ("X-Kept", "1"))
    assert received.header(name) == []
    assert received.header("x-kept") == [b"1"]


@pytest.mark.parametrize("value", ["gzip", "gzip;q=0.5, deflate", "trailers, gzip"])
async def test_hop_07_te_other_than_trailers_is_removed(value):
    received = await arrives(("TE", value), ("Connection", "TE"))
    assert received.header("te") in ([], [b"trailers"])


async def test_hop_08_te_trailers_passes_as_its_own_hop_or_not_at_all():
    """RFC 9110 10.1.4: who sends TE names it in Connection."""
    received = await arrives(("TE", "trailers"), ("Connection", "TE"))
    if received.header("te"):
        assert received.header("te") == [b"trailers"]
        assert b"te" in b",".join(received.header("connection")).lower().split(b",")


async def test_hop_08b_te_that_connection_does_not_name_stops_here():
    received = await arrives(("TE", "trailers"))
    if received.header("te"):
        assert b"te" in b",".join(received.header("connection")).lower().split(b",")


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(
            [
                ("Upgrade", "h2c"),
                ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
                ("Connection", "Upgrade, HTTP2-Settings"),
            ],
            id="h2c",
        ),
        pytest.param([("Upgrade", "TLS/1.3"), ("Connection", "Upgrade")], id="TLS"),
        pytest.param([("Upgrade", "websocket")], id="websocket that Connection does not name"),
        pytest.param([("Connection", "Upgrade")], id="no Upgrade at all"),
    ],
)
async def test_hop_09_upgrade_that_is_no_websocket_is_removed(headers):
    received = await arrives(*headers)
    assert received.header("upgrade") == []
    assert b"upgrade" not in b",".join(received.header("connection")).lower()
    assert received.header("http2-settings") == []


@pytest.mark.parametrize("token", ["Content-Length", "content-length, close", "Content-Type"])
async def test_hop_10_connection_cannot_remove_the_framing(token):
    """Without its length the body would be the next request on the backend's connection."""
    body = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
    fields = [("Connection", token), ("Content-Type", "text/plain")]
    seen = await through(request("POST", "/x", fields, body))
    if seen.answer.status == 200:
        assert seen.got.body == body
        assert seen.got.complete
        assert seen.got.header("content-type") == [b"text/plain"]
    else:
        assert (seen.answer.status, seen.requests) == (400, [])


@pytest.mark.parametrize("token", ["Transfer-Encoding", "Trailer, transfer-encoding"])
async def test_hop_10b_connection_cannot_remove_chunked_framing(token):
    body = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
    seen = await through(request("POST", "/x", [("Connection", token)], body, chunked=True))
    if seen.answer.status == 200:
        assert (seen.got.complete, seen.got.body) == (True, body)
    else:
        assert (seen.answer.status, seen.requests) == (400, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("Host", None, id="HOP-11 Host"),
        pytest.param("Authorization", "Bearer sk-1", id="HOP-12 Authorization"),
        pytest.param("Cookie", "session=1", id="HOP-12 Cookie"),
        pytest.param("x-api-key", "sk-2", id="HOP-12 x-api-key"),
        pytest.param("Content-Encoding", "gzip", id="HOP-12 Content-Encoding"),
    ],
)
async def test_hop_11_and_12_connection_cannot_drop_a_credential_in_silence(name, value):
    fields = [("Connection", name)] + ([] if value is None else [(name, value)])
    seen = await through(request("GET", "/x", fields))
    if seen.answer.status == 200:
        assert len(seen.got.header(name)) == 1
        assert value is None or seen.got.header(name) == [value.encode()]
    else:
        assert (seen.answer.status, seen.requests) == (400, [])


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Proto", "Via", "X-Request-Id"])
async def test_hop_13_connection_cannot_drop_the_gateways_own_marks(name):
    """An address check at the backend rests on X-Forwarded-For."""
    received = await arrives(("Connection", f"close, {name}"))
    assert len(received.header(name)) == 1


async def test_hop_13b_connection_cannot_drop_the_backends_own_key():
    async with RawBackend(json_answer(DOCUMENT)) as backend:
        row = {"url": backend, "api_key": "${KEY}", "headers": {"X-Team": "research"}}
        async with proxy(row, env={"KEY": "secret-1"}) as p, RawClient(p.port) as client:
            fields = [("Connection", "Authorization, X-Team"), ("Authorization", "Bearer mine")]
            assert (await client.ask(chat(headers=fields))).status in (200, 400)
        for received in backend.requests:
            assert received.header("authorization") == [b"Bearer secret-1"]
            assert received.header("x-team") == [b"research"]


async def answered(*lines: bytes, status: bytes = b"200 OK") -> Seen:
    raw = b"HTTP/1.1 " + status + b"\r\n" + b"".join(line + b"\r\n" for line in lines)
    return await through(request("GET", "/x"), answer(raw + b"Content-Length: 2\r\n\r\nok"))


async def test_hop_15_keep_alive_of_the_backend_is_not_passed_on():
    got = (await answered(b"Connection: keep-alive", b"Keep-Alive: timeout=5, max=3")).answer
    assert (got.status, got.body) == (200, b"ok")
    assert got.header("keep-alive") == []


@pytest.mark.parametrize("connection", [b"X-Hop", b"close, x-hop", b"keep-alive,X-Hop"])
async def test_hop_16_field_named_in_the_backends_connection_is_not_passed_on(connection):
    got = (await answered(b"X-Hop: 1", b"Connection: " + connection, b"X-End: 2")).answer
    assert got.header("x-hop") == []
    assert got.header("x-end") == [b"2"]
    assert b"x-hop" not in b",".join(got.header("connection")).lower()


async def test_hop_16b_backends_connection_cannot_remove_framing_or_cookies():
    got = (await answered(b"Connection: Content-Length, Set-Cookie", b"Set-Cookie: a=1")).answer
    assert (got.complete, got.body) == (True, b"ok")
    assert got.header("set-cookie") == [b"a=1"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Proxy-Authenticate: Basic", id="Proxy-Authenticate"),
        pytest.param(b"Upgrade: h2c", id="Upgrade"),
        pytest.param(
            b"Upgrade: websocket\r\nConnection: Upgrade", id="Upgrade named in Connection"
        ),
        pytest.param(b"Proxy-Connection: keep-alive", id="Proxy-Connection"),
        pytest.param(b"TE: trailers", id="TE"),
    ],
)
async def test_hop_17_connection_level_fields_of_a_200_are_not_passed_on(line):
    got = (await answered(line)).answer
    assert (got.status, got.complete, got.body) == (200, True, b"ok")
    assert got.header(line.partition(b":")[0]) == []
    assert b"upgrade" not in b",".join(got.header("connection")).lower()


async def test_hop_18_www_authenticate_is_end_to_end():
    """The neighbour of Proxy-Authenticate that must pass."""
    seen = await answered(b'WWW-Authenticate: Bearer realm="x"', status=b"401 Unauthorized")
    assert seen.answer.status == 401
    assert seen.answer.header("www-authenticate") == [b'Bearer realm="x"']


async def test_hop_19_transfer_encoding_of_the_backend_is_its_own_hops():
    """Either framing is right for the client; both at once, or the backend's twice, is not."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    got = (await through(request("GET", "/x"), answer(raw))).answer
    assert (got.complete, got.body) == (True, b"ok")
    assert len(got.header("transfer-encoding") + got.header("content-length")) == 1


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Content-Length: 50", id="Content-Length"),
        pytest.param(b"Transfer-Encoding: gzip", id="Transfer-Encoding"),
        pytest.param(b"Set-Cookie: a=1", id="Set-Cookie"),
        pytest.param(b"Connection: close", id="Connection"),
        pytest.param(b"X-Beacon-Backend: fake", id="X-Beacon-Backend"),
    ],
)
async def test_hop_20_trailer_cannot_set_what_was_already_read(line):
    """RFC 9110 6.5.1; a late framing field is dropped, or breaks the message for all to see."""
    raw = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        b"2\r\nok\r\n0\r\n" + line + b"\r\nX-Sum: 7\r\n\r\n"
    )
    data = request("GET", "/x", [("TE", "trailers"), ("Connection", "TE")])
    got = (await through(data, answer(raw))).answer
    assert got.body == b"ok"
    assert got.trailers in ([], [(b"X-Sum", b"7")])
    if not line.startswith((b"Content-Length", b"Transfer-Encoding")):
        assert got.complete
