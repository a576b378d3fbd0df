"""TGT: the backend sees the very bytes of the client's request-target.

A target is opaque to a relay (RFC 9110 7.7): decoding `%2F`, folding `//` or resolving `..` changes
which resource is asked for, and where two hops do it differently, an access rule is passed by. What
is no target at all is refused; nothing in between.
"""

from __future__ import annotations

from typing import Any

import pytest

from .kit import (
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    Received,
    answer,
    eventually,
    header,
    proxy,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def ask(raw: bytes, *rows: dict[str, str]) -> tuple[Answer, list[Received]]:
    """Send `raw`, and return the answer with what the backend received for it."""
    async with RawBackend(answer(OK)) as backend:
        based = [row | {"url": backend.url + row["url"]} for row in rows]
        asked: list[Any] = based or [backend]
        async with proxy(*asked) as p, RawClient(p.port) as client:
            await client.send(raw)
            return await client.response(), backend.requests


def get(target: bytes, host: bytes = b"client.example") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"//a//b///c", id="TGT-01 double slashes"),
        pytest.param(b"/a//", id="TGT-02 double slash at the end"),
        pytest.param(b"/v1/%41%62c", id="TGT-03 escaped unreserved characters"),
        pytest.param(b"/v1/models/meta%2Fllama%2f3", id="TGT-04 escaped slashes in either case"),
        pytest.param(b"/a%20b+c", id="TGT-05 %20 and + in the path"),
        pytest.param(b"/a?", id="TGT-06 empty query"),
        pytest.param(b"/a?x=1+2&y=1%2B2&z=1%202", id="TGT-07 + and %2B and %20 in the query"),
        pytest.param(b"/a?x=1&x=2&b&=c&&x=0", id="TGT-08 repeats, order and holes in the query"),
        pytest.param(b"/a?x=/b/../c?d=e//", id="TGT-09 second ? and / in the query"),
        pytest.param(b"/a?x=1;y=2", id="TGT-10 semicolon in the query"),
        pytest.param(b"/a?x=%00&y=%0d%0aHost:%20evil", id="TGT-11 escaped NUL and CRLF"),
        pytest.param(b"/caf%C3%A9/%e2%82%ac", id="TGT-12 escaped UTF-8 in either case"),
        pytest.param(b"/v1/threads/", id="TGT-13 trailing slash"),
        pytest.param(b"/v1/threads", id="TGT-14 no trailing slash"),
        pytest.param(b"/a/./b/../c", id="TGT-15 plain dot segments"),
        pytest.param(b"/a/%2e%2e/%2E/b", id="TGT-16 escaped dot segments"),
        pytest.param(b"/v1/models/a:b@c", id="TGT-17 colon and @ in the last segment"),
        pytest.param(b"/llama3.2:1b@main", id="TGT-18 colon and @ in the first segment"),
        pytest.param(b"/a;v=1/b;c,d=e/!$&'()*+~-._", id="TGT-19 parameters and sub-delimiters"),
        pytest.param(b"/a?redirect=http%3A%2F%2Fevil.example%2F", id="TGT-28 escaped URL"),
        pytest.param(b"/", id="TGT-29 the root"),
        pytest.param(b"/?x", id="TGT-30 the root with a query"),
        pytest.param(b"//evil.example/x", id="TGT-32 a path that looks like an authority"),
        pytest.param(b"/a?u=http://x/", id="TGT-34 a URL in the query"),
        pytest.param(b"/" + b"a" * 7900, id="TGT-36 8000 bytes (RFC 9110 4.1)"),
        pytest.param(b"/%68ealth", id="TGT-38 escaped spelling of an own route is no own route"),
        pytest.param(b"//health", id="TGT-39 doubled slash before an own route"),
        pytest.param(b"/v1/models/", id="TGT-40 own route with a trailing slash"),
        pytest.param(b"/METRICS", id="TGT-41 own route in capitals"),
    ],
)
async def test_target_when_valid_reaches_the_backend_unchanged(target: bytes) -> None:
    got, received = await ask(get(target))
    assert (got.status, got.body) == (200, b"ok")
    assert [request.target for request in received] == [target]


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b'/a?x=[]{}|^`"', id="TGT-20 delimiters that should be escaped"),
        pytest.param(b"/a\\..\\b", id="TGT-21 backslashes"),
        pytest.param(b"/a%zz%", id="TGT-22 broken escape"),
        pytest.param("/caf\xe9/€".encode(), id="TGT-23 raw UTF-8"),
        pytest.param(b"/a\xff\xfe", id="TGT-25 raw bytes that are no UTF-8"),
        pytest.param(b"/a\x01b", id="TGT-26 control byte"),
        pytest.param(b"/a\x7fb", id="TGT-27 DEL"),
        pytest.param(b"/a<b>", id="TGT-42 angle brackets"),
    ],
)
async def test_target_when_dubious_is_verbatim_or_refused(target: bytes) -> None:
    """RFC 9112 3.2: answer 400 or leave it alone; correcting it is what opens a bypass."""
    got, received = await ask(get(target))
    if got.status == 200:
        assert [request.target for request in received] == [target]
    else:
        assert (got.status, received) == (400, [])


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"/a\x00b", id="TGT-43 NUL"),
        pytest.param(b"/a\rb", id="TGT-44 bare CR"),
        pytest.param(b"/a\tb", id="TGT-45 tab"),
        pytest.param(b"a/b", id="TGT-46 no leading slash"),
        pytest.param(b"", id="TGT-47 empty"),
    ],
)
async def test_target_when_it_is_none_is_refused(target: bytes) -> None:
    got, received = await ask(get(target))
    assert (got.status, received) == (400, [])


async def test_tgt_24_fragment_is_refused_kept_or_dropped() -> None:
    got, received = await ask(get(b"/a?b#frag"))
    if got.status == 200:
        assert received[0].target in (b"/a?b", b"/a?b#frag")
    else:
        assert (got.status, received) == (400, [])


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"http://good.example/a?b", id="TGT-31 http"),
        pytest.param(b"HTTP://GOOD.example:80/a?b", id="TGT-31 capitals and a port"),
        pytest.param(b"http://user:word@good.example/a?b", id="TGT-31 userinfo"),
        pytest.param(b"https://good.example/a?b", id="TGT-31 https"),
    ],
)
async def test_tgt_31_authority_of_an_absolute_target_beats_host(target: bytes) -> None:
    """RFC 9112 3.2.2: the Host beside an absolute-form target is to be ignored."""
    got, received = await ask(get(target, host=b"evil.example"))
    if got.status != 200:
        assert (got.status, received) in ((400, []), (421, []))
        return
    (request,) = received
    assert request.target in (b"/a?b", target)
    assert len(header(request.headers, b"Host")) == 1
    assert b"evil.example" not in request.raw_head


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"http://good.example", id="TGT-37 no path"),
        pytest.param(b"http://good.example?q", id="TGT-37 no path but a query"),
    ],
)
async def test_tgt_37_absolute_target_without_a_path_asks_for_the_root(target: bytes) -> None:
    got, received = await ask(get(target, host=b"good.example"))
    if got.status != 200:
        assert (got.status, received) == (400, [])
        return
    assert received[0].target in (target, b"/", b"/?q")


async def test_tgt_48_absolute_target_never_makes_it_an_open_proxy() -> None:
    """The authority of a target picks no backend: another listener on this host hears nothing."""
    async with RawBackend(answer(OK)) as other:
        _, received = await ask(get(b"http://127.0.0.1:%d/a" % other.port, host=b"x.example"))
        assert other.connections == 0
        assert len(received) <= 1


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n", id="TGT-49 authority"),
        pytest.param(b"CONNECT /x:%d HTTP/1.1\r\nHost: x\r\n\r\n", id="TGT-49 origin form"),
    ],
)
async def test_tgt_49_connect_opens_no_tunnel(raw: bytes) -> None:
    async with (
        RawBackend(answer(OK)) as other,
        RawBackend(answer(OK)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.send(raw % other.port)
        assert (await client.response(method="CONNECT")).status in (400, 403, 405, 501)
        assert other.connections == 0
        assert backend.requests == []


async def test_tgt_33_get_asterisk_is_refused_or_harmless() -> None:
    """RFC 9112 3.2.4: `*` is for OPTIONS alone."""
    got, received = await ask(get(b"*"))
    if got.status == 200:
        assert [request.target for request in received] == [b"*"]
    else:
        assert (got.status, received) == (400, [])


async def test_tgt_50_options_asterisk_is_answered_or_passed() -> None:
    got, received = await ask(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    assert got.status in (200, 204, 400)
    assert [request.target for request in received] in ([], [b"*"])


async def test_tgt_35_target_of_64_kb_gets_an_answer() -> None:
    target = b"/" + b"a" * 65_536
    async with (
        RawBackend(answer(OK)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
        RawClient(p.port) as other,
    ):
        await client.send(get(target))
        got = await client.response()
        if got.status == 200:
            assert [request.target for request in backend.requests] == [target]
        else:
            assert got.status in (400, 414, 431)
            assert backend.requests == []
            assert await client.closed()
        await other.send(get(b"/after"))
        assert (await other.response()).status == 200


@pytest.mark.parametrize(
    ("base", "target", "seen"),
    [
        pytest.param("/base", b"/a%2Fb?c", b"/base/a%2Fb?c", id="TGT-51 base path"),
        pytest.param("/base/", b"//a/b", b"/base//a/b", id="TGT-51 base path with a slash"),
        pytest.param("/b%20c", b"/%41", b"/b%20c/%41", id="TGT-51 escaped base path"),
        pytest.param("/", b"/a", b"/a", id="TGT-51 a lone slash is no base path"),
    ],
)
async def test_tgt_51_base_path_of_the_backend_comes_first(
    base: str, target: bytes, seen: bytes
) -> None:
    row = {"name": "based", "provider": "openai", "region": "us-east", "url": base}
    got, received = await ask(get(target), row)
    assert got.status == 200
    assert [request.target for request in received] == [seen]


async def test_tgt_52_every_attempt_asks_for_the_same_target() -> None:
    target = b"/v1/%41?x=%2f+"

    async def hang_up(conn: BackendConn) -> None:
        await conn.request()

    async with (
        RawBackend(hang_up) as one,
        RawBackend(hang_up) as two,
        proxy(one, two) as p,
        RawClient(p.port) as client,
    ):
        await client.send(get(target))
        assert (await client.response()).status == 502
        await eventually(lambda: len(one.requests) + len(two.requests) >= 2)
        assert {request.target for request in (*one.requests, *two.requests)} == {target}
