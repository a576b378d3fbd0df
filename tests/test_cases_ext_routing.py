"""EXT, second part: which backend is asked, the wait for it, and that its slot comes back."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    OK,
    SSE_HEAD,
    Answer,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    answer,
    chat,
    chat_events,
    chat_stream,
    chunk,
    closed_port,
    each_request,
    event,
    eventually,
    header,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .test_cases_ext import silent, unanswered_port

GOOD = {"choices": [{"message": {"content": "hi"}}]}
BROKEN = {"error": {"message": "CUDA error", "type": "server_error"}}
BUSY = {"error": {"message": "slow down", "type": "rate_limit_error"}}
GET = request("GET", "/x")
CHEAPEST = ("X-Beacon-Cost-Priority", "true")


def chain(**options: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("health", "region", "cost", "capacity", "failover")
    return [{name: options.get(name, {})} for name in names]


def row(url: RawBackend | str, price: float = 0.001, **more: Any) -> dict[str, Any]:
    return {"url": url, "price_per_second": price, **more}


def backend_of(got: Answer) -> str:
    return header(got.headers, b"X-Beacon-Backend")[0].decode()


class Gate:
    """A backend that holds every answer until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def script(self, conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await self.open.wait()
            await conn.send(json_bytes(GOOD))


async def ask(p: Proxy, data: bytes, patience: float = 5.0) -> Answer:
    """One request on a connection of its own."""
    async with RawClient(p.port) as client:
        return await client.ask(data, "POST", timeout=patience)


# -- backends that come and go


async def test_ext_21_backend_that_flaps_costs_no_client_its_answer() -> None:
    """Every other answer fails; what clients see is whole answers, and nothing else."""
    turns = itertools.count()

    async def flapping(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            turn = next(turns) % 4
            if turn == 1:
                await conn.send(json_bytes(BROKEN, 500))
            elif turn == 3:
                await conn.send(json_bytes(GOOD)[:-5])
                conn.reset()
            else:
                await conn.send(json_bytes(GOOD))

    async with (
        RawBackend(flapping) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(row(bad, 0.001), row(good, 0.1)) as p,
    ):
        for _ in range(40):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.json) == (200, GOOD)
        assert len(bad.requests) > 10


async def test_ext_21_backend_is_ejected_after_its_strikes_and_comes_back() -> None:
    options = {"consecutive_failures": 2, "base_ejection_time": 1.0, "probe_interval": 0}
    async with (
        RawBackend(json_answer(GOOD)) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(row(bad, 0.001), row(good, 0.1), middleware=chain(health=options)) as p,
    ):
        data = chat(headers=[CHEAPEST])
        assert backend_of(await ask(p, data)) == "b0"
        await bad.stop()
        attempts = [header((await ask(p, data)).headers, b"X-Beacon-Attempts") for _ in range(4)]
        assert attempts == [[b"2"], [b"2"], [b"1"], [b"1"]]
        assert p.events("backend.ejected")
        await bad.listen()
        deadline = time.monotonic() + 10
        while backend_of(await ask(p, data)) != "b0":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert p.events("backend.restored")


async def test_ext_22_death_of_a_backend_under_open_streams_is_one_ejection() -> None:
    """Each stream breaks visibly; new requests go elsewhere at once."""
    go = asyncio.Event()

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(SSE_HEAD + b"".join(map(chunk, chat_events("tok", 2)[:2])))
        await go.wait()

    options = {"consecutive_failures": 5}
    async with RawBackend(script) as bad, RawBackend(chat_stream("good", 2)) as good:
        rows = [row(bad, 0.001, max_in_flight=20), row(good, 0.1, max_in_flight=20)]
        async with proxy(*rows, middleware=chain(health=options)) as p:
            data = chat(stream=True, headers=[CHEAPEST])
            running = [asyncio.ensure_future(ask(p, data)) for _ in range(20)]
            await eventually(lambda: len(bad.requests) == 20)
            await eventually(
                lambda: all(x.live.in_flight == 20 for x in p.app.fleet.candidates()[:1])
            )
            await asyncio.sleep(0.05)
            await bad.stop()
            for got in await asyncio.gather(*running):
                assert (got.status, got.complete) == (200, False)
            got = await ask(p, data)
            assert (backend_of(got), got.complete) == ("b1", True)
            assert len(p.events("backend.ejected")) == 1


async def test_ext_23_all_backends_down_gives_503_with_retry_after_quickly() -> None:
    with closed_port() as one, closed_port() as two:
        rows = [row(f"http://127.0.0.1:{port}") for port in (one, two)]
        options = {"consecutive_failures": 1}
        async with proxy(*rows, middleware=chain(health=options)) as p:
            assert (await ask(p, chat())).status in (502, 503)
            began, cpu = time.monotonic(), time.process_time()
            for _ in range(5):
                got = await ask(p, chat())
                assert (got.status, got.complete) == (503, True)
                (wait,) = header(got.headers, b"Retry-After")
                assert 1 <= int(wait) <= 300
                assert got.json["error"]["code"] == "no_backend"
            assert time.monotonic() - began < 10
            assert time.process_time() - cpu < 3, "no wait for one of them is spent in a loop"


# -- the queue


@pytest.mark.parametrize(
    ("size", "wait"),
    [
        pytest.param(10, 0.2, id="EXT-24 the wait is over"),
        pytest.param(0, 60, id="EXT-26 the queue is full at once"),
    ],
)
async def test_no_room_gives_503_with_retry_after(size: int, wait: float) -> None:
    gate = Gate()
    options = {"max_queue": size, "queue_timeout": wait}
    async with RawBackend(gate.script) as backend:
        rows = [row(backend, max_in_flight=1)]
        async with proxy(*rows, middleware=chain(capacity=options)) as p:
            first = asyncio.ensure_future(ask(p, chat()))
            await eventually(lambda: backend.requests)
            got = await ask(p, chat())
            assert (got.status, got.complete) == (503, True)
            assert int(header(got.headers, b"Retry-After")[0]) >= 1
            gate.open.set()
            assert (await first).status == 200
            assert len(backend.requests) == 1


async def test_ext_24_who_waits_is_served_in_order_as_room_comes() -> None:
    async with (
        RawBackend(json_answer(GOOD)) as backend,
        proxy(row(backend, max_in_flight=1)) as p,
    ):
        answers = await asyncio.gather(*(ask(p, chat()) for _ in range(10)))
        assert [got.status for got in answers] == [200] * 10
        assert len(backend.requests) == 10


async def test_ext_25_client_that_leaves_the_queue_frees_its_place_and_is_never_sent() -> None:
    gate = Gate()
    options = {"max_queue": 1, "queue_timeout": 5}
    async with RawBackend(gate.script) as backend:
        rows = [row(backend, max_in_flight=1)]
        async with proxy(*rows, middleware=chain(capacity=options)) as p:
            first = asyncio.ensure_future(ask(p, chat()))
            await eventually(lambda: backend.requests)
            async with RawClient(p.port) as leaving:
                await leaving.send(request("POST", "/v1/embeddings", body=b'{"model":"leaving"}'))
                await eventually(lambda: queued(p) == 1)
                assert (await ask(p, chat())).status == 503
            await eventually(lambda: queued(p) == 0)
            last = asyncio.ensure_future(ask(p, chat()))
            await eventually(lambda: queued(p) == 1)
            gate.open.set()
            assert [(await first).status, (await last).status] == [200, 200]
            assert len(backend.requests) == 2
            assert not any(b"leaving" in received.body for received in backend.requests)
            gone = [x for x in p.events("exchange.done") if x["end"] == "client_closed"]
            assert [(x["status"], x["attempts"]) for x in gone] == [(499, [])]


def queued(p: Proxy) -> int:
    return int(p.app.telemetry.metrics.queue_depth)


# -- slots


def half(conn_pieces: list[bytes]) -> Script:
    """The first connection gets `conn_pieces` and then silence, each later one a whole answer."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        if conn.number > 1:
            await conn.send(json_bytes(GOOD))
            return
        for piece in conn_pieces:
            await conn.send(piece)
        await conn.wait_closed()

    return script


EVENTS = chat_events("tok", 2)
DYING = [
    pytest.param([], chat(), b"", id="EXT-27 while the head is waited for"),
    pytest.param([b"HTTP/1.1 200"], chat(), b"", id="EXT-27 inside the head"),
    pytest.param(
        [SSE_HEAD, chunk(EVENTS[0])], chat(stream=True), b"", id="EXT-27 behind the role chunk"
    ),
    pytest.param(
        [SSE_HEAD, chunk(EVENTS[0]), chunk(EVENTS[1])],
        chat(stream=True),
        EVENTS[1],
        id="EXT-27 while it streams",
    ),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"],
        chat(),
        b"",
        id="EXT-27 inside a document",
    ),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"],
        GET,
        b"half",
        id="EXT-27 inside a body",
    ),
]


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(("pieces", "data", "seen"), DYING)
async def test_slot_comes_back_when_the_client_dies(
    pieces: list[bytes], data: bytes, seen: bytes, how: str
) -> None:
    """One slot: were it lost, the next client would wait for ever."""
    async with RawBackend(half(pieces)) as backend, proxy(row(backend, max_in_flight=1)) as p:
        async with RawClient(p.port) as client:
            await client.send(data)
            await eventually(lambda: backend.requests)
            if seen:
                await client.read_until(seen)
            assert p.in_flight() == 1
            getattr(client, how)()
        await backend.closed.wait(timeout=4)
        await eventually(lambda: p.in_flight() == 0)
        assert (await ask(p, chat(), patience=2)).status == 200
        assert (await p.exchanges(2))[0]["end"] == "client_closed"


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_ext_27_slot_comes_back_when_the_client_dies_during_the_connect(how: str) -> None:
    with unanswered_port() as port:
        rows = [row(f"http://127.0.0.1:{port}", max_in_flight=1)]
        async with proxy(*rows, timeouts={"connect": 5}) as p, RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: p.in_flight() == 1)
            getattr(client, how)()
            await eventually(lambda: p.in_flight() == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("path", ["/files", "/v1/chat/completions"])
async def test_ext_27_slot_comes_back_when_the_client_dies_during_its_upload(
    path: str, how: str
) -> None:
    async with RawBackend(answer(OK)) as backend, proxy(row(backend, max_in_flight=1)) as p:
        async with RawClient(p.port) as client:
            body = b'{"model":"m","pad":"' + b"x" * 5_000_000
            await client.send(request("POST", path, body=body)[:-1_000_000])
            await asyncio.sleep(0.02)
            getattr(client, how)()
        await eventually(lambda: p.in_flight() == 0)
        assert not any(received.complete for received in backend.requests)
        assert (await ask(p, request("POST", "/files", body=b"x"), patience=2)).status == 200


async def test_ext_28_clients_that_leave_at_any_moment_leave_nothing_behind() -> None:
    """80 clients, each gone after a while; then every slot is free and every stream ended."""
    rng = random.Random(28)

    async def endless(conn: BackendConn) -> None:
        received = await conn.request()
        assert received is not None
        await conn.send(SSE_HEAD)
        while True:
            await conn.send(chunk(event({"choices": [{"index": 0, "delta": {"content": "x"}}]})))
            await asyncio.sleep(0.002)

    async def leave(p: Proxy) -> None:
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True)[: None if rng.random() < 0.8 else -9])
            await asyncio.sleep(rng.random() * 0.04)
            (client.close if rng.random() < 0.5 else client.reset)()

    async with RawBackend(endless) as backend, proxy(row(backend, max_in_flight=10)) as p:
        await asyncio.gather(*(leave(p) for _ in range(80)))
        await eventually(lambda: p.in_flight() == 0 and queued(p) == 0)
        await eventually(lambda: backend.open_connections == 0)
        assert {line["end"] for line in p.events("exchange.done")} == {"client_closed"}


# -- regions


async def test_ext_29_request_goes_to_another_region_when_the_first_is_full() -> None:
    """Spill-over keeps the order of price inside the region it comes to."""
    gate = Gate()
    async with (
        RawBackend(gate.script) as near,
        RawBackend(json_answer(GOOD)) as dear,
        RawBackend(json_answer(GOOD)) as cheap,
    ):
        rows = [
            row(near, 0.5, region="us-east", max_in_flight=1),
            row(dear, 0.9, region="eu-west"),
            row(cheap, 0.1, region="eu-west"),
        ]
        async with proxy(*rows) as p:
            fields = [("X-Beacon-Region", "US"), CHEAPEST]
            first = asyncio.ensure_future(ask(p, chat(headers=fields)))
            await eventually(lambda: near.requests)
            got = await ask(p, chat(headers=fields))
            assert (got.status, backend_of(got)) == (200, "b2")
            assert header(got.headers, b"X-Beacon-Region") == [b"eu-west"]
            assert len(dear.requests) == 0
            gate.open.set()
            assert backend_of(await first) == "b0"


async def test_ext_29_retry_goes_to_another_region_when_its_own_has_no_more() -> None:
    with closed_port() as dead:
        async with RawBackend(json_answer(GOOD)) as far, RawBackend(json_answer(GOOD)) as farther:
            rows = [
                row(f"http://127.0.0.1:{dead}", region="us-east"),
                row(farther, region="asia-pacific"),
                row(far, region="eu-west"),
            ]
            async with proxy(*rows) as p:
                got = await ask(p, chat(headers=[("X-Beacon-Region", "us-east")]))
                assert (got.status, backend_of(got)) == (200, "b2")


async def test_ext_30_required_region_is_never_left_and_named_when_it_has_nobody() -> None:
    async with RawBackend(json_answer(GOOD)) as near, proxy(row(near, region="us-east")) as p:
        fields = [("X-Beacon-Region", "ASIA"), ("X-Beacon-Region-Mode", "require")]
        got = await ask(p, chat(headers=fields))
        assert (got.status, near.requests) == (503, [])
        assert "asia-pacific" in got.json["error"]["message"]
        assert header(got.headers, b"Retry-After")


# -- retries, and what they must not cost


@pytest.mark.parametrize(
    ("budget", "floor", "most"),
    [
        pytest.param(0.0, 0.0, 0, id="EXT-31 none"),
        pytest.param(0.2, 0.1, 21, id="EXT-31 a fifth and one"),
        pytest.param(0.0, 1.0, 12, id="EXT-31 the minimum alone"),
    ],
)
async def test_retries_stay_within_the_budget_however_many_requests_fail(
    budget: float, floor: float, most: int
) -> None:
    """Half of what the first backend gets fails; 100 requests make no storm."""
    turns = itertools.count()

    async def half_bad(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            good = next(turns) % 2
            await conn.send(json_bytes(GOOD) if good else json_bytes(BROKEN, 500))

    options: dict[str, dict[str, Any]] = {
        "health": {"consecutive_failures": 1000},
        "failover": {"retry_budget": budget, "min_retries_per_second": floor},
    }
    async with (
        RawBackend(half_bad) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(row(bad, 0.001), row(good, 0.1), middleware=chain(**options)) as p,
    ):
        statuses = [(await ask(p, chat(headers=[CHEAPEST]))).status for _ in range(100)]
        assert set(statuses) <= {200, 500}
        assert len(good.requests) <= most
        assert len(good.requests) > 0 or most == 0
        assert statuses.count(500) + len(good.requests) >= 40


async def test_ext_33_429_goes_to_the_other_region_and_its_sender_is_left_alone() -> None:
    limited = json_answer(BUSY, 429, [("Retry-After", "30")])
    async with RawBackend(limited) as first, RawBackend(json_answer(GOOD)) as other:
        rows = [row(first, 0.001, region="us-east"), row(other, 0.1, region="eu-west")]
        async with proxy(*rows) as p:
            for _ in range(5):
                got = await ask(p, chat(headers=[CHEAPEST]))
                assert (got.status, backend_of(got)) == (200, "b1")
            assert len(first.requests) == 1
            (candidate, _) = p.app.fleet.candidates()
            assert candidate.live.success == 1.0
            assert not p.events("backend.ejected")


async def test_ext_34_429_of_an_only_backend_is_passed_on_with_its_retry_after() -> None:
    limited = json_answer(BUSY, 429, [("Retry-After", "30")])
    async with RawBackend(limited) as only, proxy(only) as p:
        got = await ask(p, chat())
        assert (got.status, got.json) == (429, BUSY)
        assert header(got.headers, b"Retry-After") == [b"30"]
        assert header(got.headers, b"X-Beacon-Attempts") == [b"1"]
        assert len(only.requests) == 1


FIRST = [
    ("X-First", "1"),
    ("X-Both", "first"),
    ("Set-Cookie", "from=first"),
    ("Retry-After", "9"),
    ("Content-Encoding", "x-first"),
]
SECOND = [("X-Second", "2"), ("X-Both", "second")]


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_ext_35_fields_of_the_first_attempt_never_mix_with_the_seconds_answer(
    status: int,
) -> None:
    async with (
        RawBackend(json_answer({"error": {"message": "first"}}, status, FIRST)) as one,
        RawBackend(json_answer(GOOD, 201, SECOND)) as two,
        proxy(row(one, 0.001), row(two, 0.1)) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.json) == (201, GOOD)
        assert header(got.headers, b"X-Both") == [b"second"]
        assert header(got.headers, b"X-Second") == [b"2"]
        for name in ("X-First", "Set-Cookie", "Retry-After", "Content-Encoding"):
            assert header(got.headers, name) == []
        for name in ("Content-Length", "Content-Type", "X-Beacon-Backend", "X-Beacon-Attempts"):
            assert len(header(got.headers, name)) == 1


async def test_ext_36_head_and_role_chunk_of_the_first_attempt_never_show() -> None:
    events = chat_events("first", 2)
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\nX-First: 1\r\nTrailer: X-T\r\n\r\n")

    async def cut(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(head + chunk(events[0].replace(b"chatcmpl-1", b"chatcmpl-first")))

    async with (
        RawBackend(cut) as one,
        RawBackend(chat_stream("second", 2)) as two,
        proxy(row(one, 0.001), row(two, 0.1)) as p,
    ):
        got = await ask(p, chat(stream=True, headers=[CHEAPEST]))
        assert (got.status, got.body, got.complete) == (
            200,
            b"".join(chat_events("second", 2)),
            True,
        )
        assert header(got.headers, b"X-First") == header(got.headers, b"Trailer") == []
        assert got.raw.endswith(LAST_CHUNK)


async def test_ext_45_ten_at_once_over_two_backends_of_one_slot_each_all_come_whole() -> None:
    async def own(conn: BackendConn) -> None:
        async for received in each_request(conn):
            await asyncio.sleep(0.01)
            await conn.send(json_bytes({"choices": [received.json["model"]]}))

    async with (
        RawBackend(own) as one,
        RawBackend(own) as two,
        proxy(row(one, max_in_flight=1), row(two, max_in_flight=1)) as p,
    ):
        answers = await asyncio.gather(*(ask(p, chat(model=f"m{n}")) for n in range(10)))
        assert [got.json for got in answers] == [{"choices": [f"m{n}"]} for n in range(10)]
        assert min(len(one.requests), len(two.requests)) >= 3


async def test_ext_47_client_that_closed_gets_no_retry_of_its_request() -> None:
    async with (
        RawBackend(silent) as one,
        RawBackend(json_answer(GOOD)) as two,
        proxy(row(one, 0.001), row(two, 0.1), timeouts={"document": 0.3}) as p,
    ):
        async with RawClient(p.port) as client:
            await client.send(chat(headers=[CHEAPEST]))
            await eventually(lambda: one.requests)
        await p.exchanges(1)
        assert two.requests == []
