"""HDR: a header field reaches the backend with the bytes it came with, and none is made up.

What a gateway adds is bounded and known: X-Forwarded-*, Via, X-Request-Id. What it takes away is
its own routing hints, and the hop-by-hop fields (see HOP).
"""

from __future__ import annotations

import pytest

from .kit import (
    OK,
    RawBackend,
    RawClient,
    Received,
    answer,
    chat,
    header,
    json_answer,
    proxy,
    request,
    through,
)

# A gateway's own marks; everything else that arrives must have been sent.
ADDED = {
    b"host",
    b"via",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-request-id",
}
DOCUMENT = {"choices": [{"message": {"role": "assistant", "content": "hello"}}]}


async def arrives(*headers: tuple[str, str | bytes], method: str = "GET") -> Received:
    """What the backend gets for a request with these fields; it must have been answered 200."""
    seen = await through(request(method, "/x", headers), method=method)
    assert (seen.answer.status, seen.answer.complete) == (200, True)
    return seen.got


def names(received: Received) -> set[bytes]:
    return {name.lower() for name, _ in received.headers}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Accept-Encoding", id="HDR-01 Accept-Encoding"),
        pytest.param("User-Agent", id="HDR-02 User-Agent"),
        pytest.param("Accept", id="HDR-03 Accept"),
        pytest.param("Content-Type", id="HDR-04 Content-Type"),
        pytest.param("Cookie", id="HDR-06 Cookie"),
        pytest.param("Authorization", id="HDR-07 Authorization"),
        pytest.param("Cache-Control", id="HDR-08 Cache-Control"),
    ],
)
@pytest.mark.parametrize("body", [None, b"{}"], ids=["GET", "POST"])
async def test_hdr_01_to_08_field_that_was_not_sent_is_not_invented(name, body):
    method = "GET" if body is None else "POST"
    seen = await through(request(method, "/x", body=body))
    assert seen.got.header(name) == []


async def test_hdr_05_bodyless_get_gets_no_framing():
    received = await arrives()
    assert received.header("content-length") == received.header("transfer-encoding") == []


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_hdr_05b_length_zero_is_kept_as_it_came(method):
    seen = await through(request(method, "/x", body=b""))
    assert seen.got.header("content-length") == [b"0"]
    assert seen.got.header("transfer-encoding") == []


async def test_hdr_05c_post_without_body_and_length_stays_bodyless():
    seen = await through(request("POST", "/x"))
    assert seen.got.header("transfer-encoding") == []
    assert seen.got.header("content-length") in ([], [b"0"])


async def test_hdr_09_nothing_arrives_but_what_was_sent_and_the_marks_of_a_gateway():
    received = await arrives(("X-One", "1"), ("X-Two", "2"))
    assert names(received) - ADDED == {b"x-one", b"x-two"}
    assert len(names(received)) == len(received.headers), "each added field once"


VERBATIM = {
    "10 Authorization": ("Authorization", "Bearer sk-Ab.c_d-e/f+g=="),
    "10b Authorization with two spaces": ("Authorization", "Basic  dXNlcjpwYXNz"),
    "11 User-Agent": ("User-Agent", "OpenAI/Python 1.99 (x; y) z/0"),
    "12 Accept-Encoding": ("Accept-Encoding", "br;q=1.0, gzip;q=0.5 , *;q=0"),
    "12b Accept-Encoding identity": ("Accept-Encoding", "identity"),
    "13 Content-Type with parameters": ("Content-Type", 'text/plain;Charset="UTF-8" ; x=y'),
    "14 empty value": ("X-Empty", ""),
    "16 obs-text": ("X-Latin", b"caf\xe9 \xa0\x85 \xff"),
    "16b UTF-8": ("X-Utf8", "Grüße 世界".encode()),
    "18 inner spaces, tabs and quotes": ("X-Spaces", "a  b\t\tc \"d  e\" 'f'"),
    "18b punctuation": ("X-Punctuation", "!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
    "19 8 KB of cookie": ("Cookie", "a=" + "x" * 7000),
    "20 Range": ("Range", "bytes=0-0, -1"),
    "21 If-None-Match": ("If-None-Match", 'W/"a", "b"'),
    "21b If-Modified-Since": ("If-Modified-Since", "Sat, 29 Oct 1994 19:43:31 GMT"),
    "22 underscore in the name": ("X_Under_Score", "1"),
    "23 every token character in the name": ("X-!#$%&'*+.^_`|~09", "1"),
    "26 Accept": ("Accept", "text/event-stream, application/json;q=0.9, */*"),
    "27 Referer": ("Referer", "https://a.example/b?c=%20d"),
    "28 name that looks like a hint": ("XBeacon-Region", "eu-west"),
    "29 Origin null": ("Origin", "null"),
    "30 traceparent": ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    "30b baggage": ("baggage", "a=1;p, b=%20"),
    "35 Content-Encoding": ("Content-Encoding", "zstd"),
    "36 Priority": ("Priority", "u=1, i"),
    "37 X-Trace-Id": ("X-Trace-Id", "trace 1"),
}


@pytest.mark.parametrize(
    ("name", "value"), VERBATIM.values(), ids=["HDR-" + case for case in VERBATIM]
)
async def test_hdr_10_to_37_field_arrives_with_its_bytes(name, value):
    received = await arrives((name, value))
    expected = value.encode() if isinstance(value, str) else value
    assert (name.encode(), expected) in received.headers
    assert len(received.header(name)) == 1


@pytest.mark.parametrize("raw", [b"X-A:b", b"X-A:   b", b"X-A:\tb", b"X-A: b  ", b"X-A: b \t "])
async def test_hdr_14b_space_around_a_value_is_not_part_of_it(raw):
    """RFC 9112 5.1; it may be kept or dropped, the value stays."""
    seen = await through(b"GET /x HTTP/1.1\r\nHost: a\r\n" + raw + b"\r\n\r\n")
    assert seen.got.header("x-a") == [b"b"]


async def test_hdr_15_repeated_lines_keep_their_order_and_are_not_joined():
    sent = [("X-A", "1"), ("X-B", "x"), ("x-a", "2, 3"), ("X-A", ""), ("X-A", "1")]
    received = await arrives(*sent)
    kept = [(n, v) for n, v in received.headers if n.lower() in (b"x-a", b"x-b")]
    assert kept == [(n.encode(), v.encode()) for n, v in sent]


async def test_hdr_17_case_of_a_name_is_kept():
    """HTTP does not care; backends that read raw lines do, and signatures do."""
    received = await arrives(("x-lower", "1"), ("X-UPPER", "2"), ("x-MiXeD", "3"))
    assert {b"x-lower", b"X-UPPER", b"x-MiXeD"} <= {name for name, _ in received.headers}


async def test_hdr_24_via_is_extended_at_its_end():
    received = await arrives(("Via", "1.0 fred"), ("Via", "1.1 p.example"))
    joined = b", ".join(received.header("via"))
    assert joined.startswith(b"1.0 fred, 1.1 p.example")
    assert joined.removeprefix(b"1.0 fred, 1.1 p.example") in (b"", b", 1.1 beacon-proxy")


async def test_hdr_25_forwarded_is_passed_and_extended_at_the_end_at_most():
    old = 'for="[2001:db8::1]:4711";proto=https, for=192.0.2.43'
    received = await arrives(("Forwarded", old))
    assert b", ".join(received.header("forwarded")).startswith(old.encode())


async def test_hdr_31_two_cookie_lines_both_arrive():
    received = await arrives(("Cookie", "a=1"), ("Cookie", "b=2; c=3"))
    assert b"; ".join(received.header("cookie")) == b"a=1; b=2; c=3"


async def test_hdr_32_eighty_fields_arrive_in_their_order():
    sent = [(f"X-{n * 7 % 80}", f"{n}") for n in range(80)]
    received = await arrives(*sent)
    kept = [(n, v) for n, v in received.headers if n.lower() not in ADDED]
    assert kept == [(n.encode(), v.encode()) for n, v in sent]


async def test_hdr_33_x_forwarded_for_is_appended_to():
    received = await arrives(("X-Forwarded-For", "203.0.113.7, 10.0.0.1"))
    assert b", ".join(received.header("x-forwarded-for")) == b"203.0.113.7, 10.0.0.1, 127.0.0.1"


async def test_hdr_33b_x_forwarded_for_over_two_lines_keeps_both():
    received = await arrives(("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-For", "10.0.0.1"))
    assert b", ".join(received.header("x-forwarded-for")) == b"203.0.113.7, 10.0.0.1, 127.0.0.1"


async def test_hdr_34_x_forwarded_names_the_client_its_host_and_scheme():
    received = await arrives()
    assert received.header("x-forwarded-for") in ([], [b"127.0.0.1"])
    assert received.header("x-forwarded-host") in ([], [b"beacon.test"])
    assert received.header("x-forwarded-proto") in ([], [b"http"])


@pytest.mark.parametrize("route", [request("GET", "/x", host="a.example:8080"), chat()])
async def test_hdr_39_exactly_one_host_line_reaches_the_backend(route):
    seen = await through(route, json_answer(DOCUMENT))
    (host,) = seen.got.header("host")
    assert host, "an empty Host is for targets without an authority"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(b"Host: a\r\nHost: b\r\n", id="two that differ"),
        pytest.param(b"Host: a\r\nHost: a\r\n", id="twice the same"),
        pytest.param(b"Host: a\r\nhost: b\r\n", id="in another case"),
        pytest.param(b"X: y\r\n", id="none in HTTP/1.1"),
        pytest.param(b"Host: a b\r\n", id="with a space"),
        pytest.param(b"Host: a, b\r\n", id="a list"),
        pytest.param(b"Host: a/b@c\r\n", id="with a path"),
    ],
)
async def test_hdr_40_host_that_two_parsers_could_read_in_two_ways_gives_400(lines):
    seen = await through(b"GET /x HTTP/1.1\r\n" + lines + b"\r\n")
    assert (seen.answer.status, seen.answer.complete) == (400, True)
    assert seen.requests == []


async def assert_refused_and_alive(data: bytes, *, statuses: tuple[int, ...] = (400, 431)) -> None:
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(data)
            got = await client.response()
            assert got.status in statuses or not got.status, got.status
        async with RawClient(p.port) as client:
            assert (await client.ask(request("GET", "/x"))).body == b"ok"
        assert len(backend.requests) == 1, "what is refused reaches nobody"


async def test_hdr_41_one_megabyte_of_headers_is_refused_and_the_proxy_survives():
    await assert_refused_and_alive(
        request("GET", "/evil", [(f"X-{n}", "a" * 1000) for n in range(1000)])
    )


async def test_hdr_41b_one_line_of_a_megabyte_is_refused_and_the_proxy_survives():
    await assert_refused_and_alive(request("GET", "/evil", [("X-A", "a" * 2**20)]))


async def test_hdr_41c_twenty_thousand_lines_are_refused_and_the_proxy_survives():
    await assert_refused_and_alive(request("GET", "/evil", [("a", "")] * 20_000))


async def test_hdr_41d_line_without_an_end_is_refused_and_not_kept():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(b"GET /evil HTTP/1.1\r\nHost: a\r\nX-A: ")
        for _ in range(200):
            await client.send(b"a" * 65536, timeout=2)
            if client.wire.eof:
                break
        assert await client.closed()
        assert backend.requests == []


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"X-A: a\x00b", id="NUL"),
        pytest.param(b"X-A: a\x0bb", id="vertical tab"),
        pytest.param(b"X-A: a\x7fb", id="DEL"),
        pytest.param(b"X-A: a\rb", id="bare CR"),
        pytest.param(b"X A: b", id="space in the name"),
        pytest.param(b"X-A : b", id="space before the colon"),
        pytest.param(b"X-\xe9: b", id="obs-text in the name"),
        pytest.param(b": b", id="empty name"),
        pytest.param(b"no colon", id="no colon"),
        pytest.param(b"X-A: a\r\n b", id="folded"),
        pytest.param(b" X-A: a", id="space before the first field"),
    ],
)
async def test_hdr_42_field_that_is_no_field_gives_400(line):
    seen = await through(b"GET /x HTTP/1.1\r\n" + line + b"\r\nHost: a\r\n\r\n")
    assert (seen.answer.status, seen.requests) == (400, [])


@pytest.mark.parametrize(
    "given", ["req-1", "0af7651916cd43dd8448eb211c80319c", "a:b/c+d=e@f.g_h-i"]
)
async def test_hdr_44_request_id_of_the_client_is_kept_one_value_only(given):
    seen = await through(request("GET", "/x", [("X-Request-Id", given)]))
    assert seen.got.header("x-request-id") == [given.encode()]
    assert seen.answer.header("x-request-id") == [given.encode()]
    assert [line["id"] for line in seen.log if line["event"] == "exchange.done"] == [given]


async def test_hdr_45_request_id_is_made_echoed_and_forwarded_and_each_its_own():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        echoed = [(await client.ask(request("GET", "/x"))).header("x-request-id") for _ in range(3)]
        forwarded = [received.header("x-request-id") for received in backend.requests]
        told = [[line["id"].encode()] for line in await p.exchanges(3)]
        assert echoed == forwarded == told
        assert len({id for (id,) in echoed}) == 3


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([("X-Request-Id", "a b")], id="a space"),
        pytest.param([("X-Request-Id", "")], id="empty"),
        pytest.param([("X-Request-Id", "x" * 5000)], id="5000 bytes"),
        pytest.param([("X-Request-Id", b"\xff\xfe")], id="not ASCII"),
        pytest.param([("X-Request-Id", '{"$x":1}')], id="made for a log's reader"),
        pytest.param([("X-Request-Id", "a"), ("X-Request-Id", "b")], id="two of them"),
    ],
)
async def test_hdr_46_request_id_that_is_not_sane_is_replaced(lines):
    seen = await through(request("GET", "/x", lines))
    (forwarded,) = seen.got.header("x-request-id")
    assert seen.answer.header("x-request-id") == [forwarded]
    assert forwarded.isalnum()
    assert len(forwarded) == 32


async def test_hdr_46b_request_id_of_the_backend_does_not_come_twice():
    raw = b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\nok"
    seen = await through(request("GET", "/x", [("X-Request-Id", "mine")]), answer(raw))
    assert seen.answer.header("x-request-id") == [b"mine"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Beacon-Region", "us-east"),
        ("X-Beacon-Region-Mode", "prefer"),
        ("X-Beacon-Cost-Priority", "true"),
        ("X-Beacon-Timeout", "20"),
        ("X-Beacon-Max-Price", "1000"),
        ("x-bEaCoN-rEgIoN", "US"),
    ],
)
async def test_hdr_47_routing_hints_are_removed(name, value):
    received = await arrives((name, value), ("X-Kept", "1"))
    assert received.header(name) == []
    assert received.header("x-kept") == [b"1"]


NUMBERS = "X-Beacon-Max-Price", "X-Beacon-Timeout"


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        *("1_000", "+1", "-0", "-1", "0x1", "1,2", "1 2", "1e", "e1", ".", "", "nan", "1e309"),
        pytest.param(b"\xef\xbc\x91", id="wide"),
        pytest.param("1" * 7_000 + "x", id="long"),
    ],
)
async def test_hdr_47b_hint_that_is_no_decimal_number_gives_400(name, value):
    seen = await through(request("GET", "/x", [(name, value)]))
    assert (seen.answer.status, seen.requests) == (400, [])


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["20", "20.0", "20.", ".5e2", "5e+01", "0.2E3", "020", "9" * 300])
async def test_hdr_47c_hint_in_any_spelling_of_a_decimal_number_is_read(name, value):
    assert (await through(request("GET", "/x", [(name, value)]))).answer.status == 200


@pytest.mark.parametrize(
    ("name", "one", "other", "status"),
    [
        ("X-Beacon-Max-Price", "1", "0", 429),
        ("X-Beacon-Max-Price", "1", "nonsense", 400),
        ("X-Beacon-Timeout", "20", "0.000001", 504),
        ("X-Beacon-Timeout", "20", "0", 400),
        ("X-Beacon-Region-Mode", "prefer", "require", 400),
        ("X-Beacon-Region", "us-east", "eu-west", 400),
        ("X-Beacon-Cost-Priority", "true", "false", 400),
        ("X-Beacon-Region-Mode", "prefer", "Prefer", 200),
        ("X-Beacon-Cost-Priority", "true", "true", 200),
    ],
)
async def test_hdr_47d_hint_that_comes_twice_never_takes_a_limit_away(name, one, other, status):
    """A gateway may add its own field in front of the client's, or behind it."""
    for lines in ([(name, one), (name, other)], [(name, other), (name.lower(), one)]):
        async with RawBackend(answer(OK)) as backend:
            row = {"url": backend, "price_per_second": 0.01}
            async with proxy(row) as p, RawClient(p.port) as client:
                assert (await client.ask(request("GET", "/x", lines))).status == status


async def test_hdr_48_answer_says_where_it_came_from_once_each():
    raw = (
        b"HTTP/1.1 200 OK\r\nX-Beacon-Backend: fake\r\nX-Beacon-Attempts: 99\r\n"
        b"Content-Length: 2\r\n\r\nok"
    )
    got = (await through(request("GET", "/x"), answer(raw))).answer
    assert got.header("x-beacon-backend") == [b"b0"]
    assert got.header("x-beacon-provider") == [b"openai"]
    assert got.header("x-beacon-region") == [b"us-east"]
    assert got.header("x-beacon-attempts") == [b"1"]


async def test_hdr_49_own_key_of_a_backend_replaces_the_clients_and_goes_nowhere_else():
    async with RawBackend(json_answer(DOCUMENT)) as keyed, RawBackend(answer(OK)) as plain:
        rows = (
            {"url": keyed, "api_key": "${KEY}", "headers": {"X-Team": "research"}, "models": ["k"]},
            {"url": plain, "models": ["p"]},
        )
        async with proxy(*rows, env={"KEY": "secret-1"}) as p, RawClient(p.port) as client:
            mine = [("Authorization", "Bearer mine"), ("x-team", "sales")]
            got = await client.ask(chat(model="k", headers=mine))
            assert got.status == 200
            await client.ask(chat(model="p", headers=mine))
            told = repr(p.log)
        (to_keyed,), (to_plain,) = keyed.requests, plain.requests
        assert to_keyed.header("authorization") == [b"Bearer secret-1"]
        assert to_keyed.header("x-team") == [b"research"]
        assert to_plain.header("authorization") == [b"Bearer mine"]
        assert to_plain.header("x-team") == [b"sales"]
        assert b"secret-1" not in got.raw
        assert "secret-1" not in told
        assert "mine" not in told


async def test_hdr_50_two_clients_headers_are_never_mixed():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as a, RawClient(p.port) as b:
            for number in range(5):
                for client, name in ((a, "a"), (b, "b")):
                    only = [("Authorization", name), (f"X-Only-{name}", f"{number}")]
                    await client.ask(request("GET", f"/{name}", only))
        for received in backend.requests:
            name = received.target[1:]
            assert received.header("authorization") == [name]
            other = b"x-only-b" if name == b"a" else b"x-only-a"
            assert header(received.headers, other) == []
        assert len(backend.requests) == 10
