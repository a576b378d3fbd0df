"""Heads that come again (`wire/again.py`): what is remembered must never show.

Whatever runs of requests and answers a connection carries, each must look on the other side as it
would on a connection of its own, where nothing can be remembered.
"""

from __future__ import annotations

import asyncio
import random
import re
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_proxy.wire.again import Again

from .kit import (
    BackendConn,
    RawBackend,
    RawClient,
    Received,
    each_request,
    json_answer,
    proxy,
    request,
)

CHAT = "/v1/chat/completions"
HEAD = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nA: b\r\n\r\n"
_IDS = re.compile(rb"(?<=X-Request-Id: )[0-9a-f]{32}|(?<=X-Beacon-Backend: )b\d")


def message(body: bytes, head: bytes = HEAD) -> bytes:
    return head % len(body) + body


def learn(again: Again[str], data: bytes, known: str = "first") -> bool:
    """Let `again` learn what a strict parser reads from `data`."""
    head, _, _ = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    pairs = [line.partition(b":") for line in lines]
    fields = tuple((name, value.strip(b" \t")) for name, _, value in pairs)
    length = next((int(v) for n, v in fields if n.lower() == b"content-length"), None)
    return again.learn(known, first, fields, length)


def known(first: bytes, second: bytes) -> bool:
    """Whether what is learnt from the one message is taken for the other."""
    again: Again[str] = Again()
    assert again.look(first) is None
    assert learn(again, first)
    return again.look(second) == "first"


def test_head_with_another_length_is_known_again() -> None:
    again: Again[str] = Again()
    again.look(message(b"one"))
    assert learn(again, message(b"one"))
    data = message(b"eleven bytes")
    assert again.look(data) == "first"
    assert (again.digits, data[again.body_at :]) == (b"12", b"eleven bytes")


def test_head_without_a_body_is_known_again() -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    assert known(head, head)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(message(b"one").replace(b"A: b", b"A: c"), id="another value"),
        pytest.param(message(b"one").replace(b"A: b", b"a: b"), id="another case"),
        pytest.param(message(b"one").replace(b"/x", b"/y"), id="another target"),
        pytest.param(message(b"one").replace(b"POST", b"PUT"), id="another method"),
        pytest.param(message(b"one").replace(b"A: b", b"A: b\r\nA: b"), id="one more field"),
        pytest.param(message(b"one")[:-1], id="cut short"),
        pytest.param(message(b"one") + b"G", id="a byte behind it"),
        pytest.param(message(b"one") * 2, id="two of them"),
        pytest.param(message(b"one").replace(b": 3", b": +3"), id="a signed length"),
        pytest.param(message(b"one").replace(b": 3", b": 0x3"), id="a length in hex"),
        pytest.param(message(b"one").replace(b": 3", b":  3"), id="more space"),
        pytest.param(message(b"one").replace(b": 3", b": 3, 3"), id="a list of lengths"),
        pytest.param(
            message(b"one").replace(b"A: b", b"Content-Length: 3\r\nA: b"), id="two lengths"
        ),
        pytest.param(
            message(b"one").replace(b"A: b", b"Transfer-Encoding: chunked"), id="chunked, too"
        ),
        pytest.param(b"\r\n" + message(b"one"), id="an empty line ahead"),
    ],
)
def test_head_that_differs_otherwise_is_not_known(second: bytes) -> None:
    assert not known(message(b"one"), second)


def test_memory_of_who_never_repeats_is_given_up() -> None:
    """To look costs a little each time, and a client that numbers its requests never gains."""
    again: Again[str] = Again()
    for n in range(50):
        data = message(b"one", HEAD.replace(b"A: b", b"A: %d" % n))
        again.look(data)
        learn(again, data)
    for _ in range(2):
        assert again.look(message(b"one")) is None
        assert not learn(again, message(b"one"))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(message(b"one").replace(b": 3", b":3"), id="no space"),
        pytest.param(message(b"one").replace(b": 3", b": 3 "), id="space behind"),
        pytest.param(message(b"one").replace(b": 3", b": 03"), id="a zero ahead"),
        pytest.param(message(b"one").replace(b"A: b", b"A:b"), id="another field without a space"),
        pytest.param(message(b"one")[:-1], id="a byte short"),
        pytest.param(message(b"one") + b"!", id="a byte more"),
    ],
)
def test_spelling_of_its_own_is_not_learnt(data: bytes) -> None:
    again: Again[str] = Again()
    again.look(data)
    assert not learn(again, data)


def test_nothing_is_learnt_from_the_bytes_of_another_message() -> None:
    """What was looked at may not be what was read: an interim answer, a request ahead of it."""
    again: Again[str] = Again()
    again.look(message(b"one"))
    assert not learn(again, message(b"two", HEAD.replace(b"A: b", b"A: c")))
    again.look(b"HTTP/1.1 103 Early\r\nContent-Length: 0\r\n\r\n")
    assert not learn(again, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@given(st.lists(st.tuples(st.sampled_from([b"A: b", b"A: c"]), st.binary(max_size=40)), max_size=9))
def test_what_is_known_was_said_by_the_same_bytes(said: list[tuple[bytes, bytes]]) -> None:
    again: Again[str] = Again()
    for field, body in said:
        data = message(body, HEAD.replace(b"A: b", field))
        found = again.look(data)
        if found is None:
            learn(again, data, field.decode())
        else:
            assert (found.encode(), data[again.body_at :]) == (field, body)


# -- through the whole proxy


FIELDS = [
    ("Authorization", "Bearer k"),
    ("User-Agent", "sdk/1"),
    ("X-Stainless-Retry-Count", "0"),
    ("Connection", "keep-alive"),
    ("Cookie", "a=b; c=d"),
    ("X-Beacon-Region", "eu-west"),
    ("X-Request-Id", "mine-1"),
    ("Accept", "*/*"),
    ("Connection", "close, X-Drop"),
    ("X-Drop", "1"),
    ("Via", "1.0 other"),
    ("X-Forwarded-For", "10.0.0.1"),
    ("Content-Type", "application/json"),
    ("content-type", "text/plain"),
    ("TE", "trailers"),
    ("Max-Forwards", "5"),
]
TARGETS = [CHAT, "/files/a?b=%41", "http://other.test/files"]
BODIES = [b'{"model":"m"}', b'{"model":"a longer one"}', b"{}", b"x" * 70_000]


def some_requests(rng: random.Random) -> list[bytes]:
    """A run of requests, of which some come twice with the same head."""
    raws = []
    for _ in range(rng.randint(2, 6)):
        method, target = rng.choice(["GET", "POST", "POST"]), rng.choice(TARGETS)
        fields = rng.sample(FIELDS, rng.randint(0, 4))
        for _ in range(rng.randint(1, 3)):
            body = rng.choice(BODIES) if method == "POST" else None
            raws.append(request(method, target, fields, body))
    return raws


def seen(received: Received) -> tuple[bytes, bytes]:
    """What a backend got, less what the proxy makes up anew for each exchange."""
    return _IDS.sub(b"-", received.raw_head), received.body


async def test_requests_over_one_connection_reach_the_backend_as_over_many() -> None:
    rng = random.Random(1)
    runs = [some_requests(rng) for _ in range(60)]
    async with RawBackend(json_answer({})) as backend, proxy(backend) as p:
        for run in runs:
            client: RawClient | None = None
            for raw in run:  # over one connection, while it is kept
                client = client or await RawClient(p.port).__aenter__()
                answer = await client.ask(raw, raw[:4].decode().strip())
                assert (answer.status, answer.complete) == (200, True)
                if answer.header("Connection"):
                    await client.__aexit__(None, None, None)
                    client = None
            if client is not None:
                await client.__aexit__(None, None, None)
        together = [seen(received) for received in backend.requests]
        backend.requests.clear()
        for raw in chain.from_iterable(runs):
            async with RawClient(p.port) as alone:
                assert (await alone.ask(raw, raw[:4].decode().strip())).complete
        assert together == [seen(received) for received in backend.requests]


def some_answer(rng: random.Random) -> bytes:
    status = rng.choice([b"200 OK", b"200 OK", b"200 Fine", b"201 Made", b"404 None"])
    fields = rng.choice([b"", b"Date: then\r\n", b"X-Request-Id: a\r\n", b"Trailer: A\r\n"])
    body = rng.choice([b'{"a":1}', b'{"a":[1,2,3]}', b'{"usage":{"completion_tokens":7}}'])
    if rng.random() < 0.8:
        fields, rest = fields + b"Content-Length: %d\r\n" % len(body), body
    else:
        fields += b"Transfer-Encoding: chunked\r\n"
        rest = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%b\r\n%b" % (status, fields, rest)


async def test_answers_over_one_connection_reach_the_client_as_over_many() -> None:
    rng = random.Random(2)
    raws = [raw for _ in range(150) for raw in [some_answer(rng)] * rng.randint(1, 3)]
    alone = False

    async def script(conn: BackendConn) -> None:
        while await conn.request() is not None:
            await conn.send(raws[len(backend.requests) - 1])
            if alone:
                return

    async def round_of_all() -> list[bytes]:
        backend.requests.clear()
        got = []
        for _ in raws:
            async with RawClient(p.port) as client:
                answer = await client.ask(request("POST", CHAT, body=b"{}"), "POST")
                assert answer.complete
                got.append(_IDS.sub(b"-", answer.raw))
        return got

    async with RawBackend(script) as backend, proxy(backend) as p:
        together = await round_of_all()
        alone = True
        assert together == await round_of_all()


async def test_answer_without_a_body_after_a_known_head_is_not_waited_for() -> None:
    """The answer to a HEAD says a length and sends nothing: the same head, another framing."""
    async with (
        RawBackend(head_or_body) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for method in ("GET", "GET", "GET", "HEAD", "GET", "GET"):
            answer = await client.ask(request(method, "/files"), method)
            assert (answer.complete, answer.body) == (True, b"" if method == "HEAD" else b"ok")


async def head_or_body(conn: BackendConn) -> None:
    async for received in each_request(conn):
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        if received.method != "HEAD":
            await conn.send(b"ok")


async def test_request_ahead_lends_its_bytes_to_no_other() -> None:
    """What was looked at was learnt as the head of the request pipelined behind it: a way in."""
    fields = [("Max-Forwards", "5"), ("X-Foo", "a")]
    first = request("POST", "/slow", fields, b"12345")
    second = request("POST", "/two", [("X-Foo", "a")], b"12345")
    sneaky = b"GET /smuggled HTTP/1.1\r\nHost: v\r\n\r\n"
    async with RawBackend(json_answer({})) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            for _ in range(3):
                await client.ask(request("POST", "/slow", fields, b"1"), "POST")
                await client.send(first + second)
                for _ in range(2):
                    assert (await client.response("POST")).complete
                await client.ask(request("POST", "/slow", fields, sneaky), "POST")
        for received in backend.requests:
            [length] = received.header("Content-Length")
            assert (received.target != b"/two") or length == b"5"
            assert int(length) == len(received.body)
            assert received.target != b"/smuggled"


@pytest.mark.parametrize("line", ["Content-Length:%d", "CONTENT-LENGTH: %d", "content-length: 0%d"])
async def test_length_in_a_spelling_of_its_own_still_has_a_body(line: str) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nHost: v\r\n\r\n"
    head = f"POST /up HTTP/1.1\r\nHost: h\r\n{line % len(body)}\r\n\r\n".encode()
    async with RawBackend(json_answer({})) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            for _ in range(4):
                await client.send(head)  # in a segment of its own
                await asyncio.sleep(0.02)
                assert (await client.ask(body, "POST")).complete
        assert [(seen.target, seen.body) for seen in backend.requests] == [(b"/up", body)] * 4


INTERIM = [
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("before", [*INTERIM, b""])
@pytest.mark.parametrize("line", [b"Content-Length: 2", b"content-length:2", b"Content-Length: 2 "])
async def test_answers_in_any_segments_and_spelling_are_each_their_own(
    before: bytes, line: bytes
) -> None:
    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            for piece in (before, b"HTTP/1.1 200 OK\r\n%b\r\nX-For: " % line):
                await conn.send(piece)
                await asyncio.sleep(0.005)
            await conn.send(received.target + b"\r\n\r\n")
            await asyncio.sleep(0.005)
            await conn.send(b"ok")

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for n in range(6):
            answer = await client.ask(request("GET", f"/{n}"), timeout=2)
            assert (answer.header("X-For"), answer.body) == ([b"/%d" % n], b"ok")
