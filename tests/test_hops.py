"""What the core makes sure of while an answer is waited for that is elsewhere, or yet to come.

`Hopping` follows a 303 and asks again after a 503 that says `warming`; see `test_transports`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy.contracts import Backend, Call, Headers, Hop, Prompt, Typical
from beacon_proxy.routing import follow

from .kit import (
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    each_request,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .test_discovery import by_file, names, put
from .test_garbage import asked, left_over
from .test_transports import ANSWER, HOPS, SEE_OTHER, WARMING, Hopping, hopping, named

GOOD = json_bytes(ANSWER)
HERE = ("X-Beacon-Region", "us-east")  # where b0 is, so that it is asked first
SHORT = {"first_content": 0.3, "document": 0.3, "cold_start": 0}


def behind(other: RawBackend, **more: Any) -> dict[str, Any]:
    """A row of the backend that is asked second."""
    return {"url": other.url, "region": "eu-west", **more}


class Warming(RawBackend):
    """Says `warming` until it is `ready`."""

    def __init__(self) -> None:
        super().__init__(self._serve)
        self.ready = asyncio.Event()

    async def _serve(self, conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(GOOD if self.ready.is_set() else WARMING)


class Slow(RawBackend):
    """Answers once it is `free`; a probe at once."""

    def __init__(self) -> None:
        super().__init__(self._serve)
        self.free = asyncio.Event()

    async def _serve(self, conn: BackendConn) -> None:
        async for got in each_request(conn):
            if got.method == "GET":
                await conn.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            await self.free.wait()
            await conn.send(GOOD)

    @property
    def asked(self) -> int:
        return sum(each.method == "POST" for each in self.requests)


# -- a backend that is starting ----------------------------------------------------------------


@asynccontextmanager
async def one_full(kind: type, cold: RawBackend, warm: Slow) -> AsyncIterator[tuple[Proxy, Any]]:
    """`cold` first, and behind it `warm`, whose only place is taken."""
    rows = ({"provider": "hopping", "url": cold.url}, behind(warm, max_in_flight=1))
    async with proxy(*rows, providers={"hopping": kind}) as p, RawClient(p.port) as first:
        await first.send(chat(headers=[("X-Beacon-Region", "eu-west")]))
        await eventually(lambda: warm.asked == 1)
        yield p, first
        warm.free.set()
        assert (await first.response("POST")).status == 200


async def test_warming_when_the_warm_one_is_full_it_is_asked_until_it_answers() -> None:
    async with (
        Warming() as cold,
        Slow() as warm,
        one_full(Hopping, cold, warm) as (p, _),
        RawClient(p.port) as client,
    ):
        await client.send(chat(headers=[HERE]))
        await eventually(lambda: len(cold.requests) >= 3)
        cold.ready.set()
        got = await client.response("POST")
        assert (got.status, named(got, "x-beacon-backend")) == (200, "b0")
        assert warm.asked == 1


async def test_warming_when_the_warm_one_gets_room_it_takes_over() -> None:
    async with (
        Warming() as cold,
        Slow() as warm,
        one_full(Hopping, cold, warm) as (p, _),
        RawClient(p.port) as client,
    ):
        await client.send(chat(headers=[HERE]))
        await eventually(lambda: len(cold.requests) >= 3)
        warm.free.set()
        got = await client.response("POST")
        assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")


class Slowly(Hopping):
    """Leaves some time between two questions."""

    def hop(self, *given: Any) -> Hop | None:
        found = super().hop(*given)
        return None if found is None else replace(found, delay=30.0)


async def test_warming_when_the_client_leaves_between_two_questions_pays_no_output() -> None:
    """All that the backend ever said is that it is starting."""
    outcomes: list[Any] = []
    prices = {"price_per_million_tokens": {"input": 1.0, "output": 1000.0}}
    async with Warming() as cold:
        row = {"provider": "hopping", "url": cold.url, "price_model": "serverless", **prices}
        async with proxy(row, providers={"hopping": Slowly}, outcomes=outcomes) as p:
            (candidate,) = p.app.fleet.candidates()
            candidate.live.typical["m"] = Typical(billed=1e-6, input=10.0, output=1000.0)
            async with RawClient(p.port) as client:
                await client.send(chat())
                await eventually(lambda: len(cold.requests) == 1)
                await asyncio.sleep(0.05)
            await eventually(lambda: outcomes)
    assert outcomes[-1].usage is None or outcomes[-1].usage.output == 0


class Loading(Hopping):
    """Says that a backend is starting, and has no way to ask it again."""

    hop = None  # type: ignore[assignment]


async def test_loading_when_the_others_are_full_waits_for_room_there() -> None:
    """That one backend is starting is no answer while another would have room in a moment."""
    async with (
        Warming() as cold,
        Slow() as warm,
        one_full(Loading, cold, warm) as (p, _),
        RawClient(p.port) as client,
    ):
        await client.send(chat(headers=[HERE]))
        await eventually(lambda: len(cold.requests) == 1)
        await asyncio.sleep(0.1)
        warm.free.set()
        got = await client.response("POST")
        assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")


async def test_warming_when_no_retry_is_granted_it_is_asked_until_it_answers() -> None:
    chain = ["region", "capacity", {"failover": {"max_attempts": 1}}]
    async with Warming() as cold, RawBackend(json_answer(ANSWER)) as warm:
        rows = (hopping(cold), behind(warm))
        async with proxy(*rows, providers=HOPS, middleware=chain) as p, RawClient(p.port) as client:
            await client.send(chat(headers=[HERE]))
            await eventually(lambda: len(cold.requests) >= 3)
            cold.ready.set()
            got = await client.response("POST")
            assert (got.status, named(got, "x-beacon-backend")) == (200, "b0")
        assert warm.requests == []


@pytest.mark.parametrize("wait", [0.02, 0.5])
async def test_warming_when_the_backend_has_left_it_is_not_asked_again(
    tmp_path: Path, wait: float
) -> None:
    """Whoever has its address now would get the body, and the key."""

    class Waiting(Hopping):
        def hop(self, *told: Any) -> Hop | None:
            hop = super().hop(*told)
            return hop and Hop(hop.target, wait)

    found = tmp_path / "nodes.json"
    async with Warming() as gone, Warming() as new:
        new.ready.set()
        put(found, [{"name": "gone", **hopping(gone)}])
        async with (
            proxy(**by_file(found), providers={"hopping": Waiting}) as p,
            RawClient(p.port) as client,
        ):
            await eventually(lambda: names(p) == ["gone"])
            await client.send(chat())
            await eventually(lambda: len(gone.requests) >= 1)
            put(found, [{"name": "new", **hopping(new)}])  # not known to be warm
            await eventually(lambda: names(p) == ["new"], 5)
            asked = len(gone.requests)
            got = await client.response("POST")
            assert (got.status, named(got, "x-beacon-backend")) == (200, "new")
            assert len(gone.requests) <= asked + 1  # one may have been under way


async def test_warming_when_it_is_asked_for_a_websocket_it_is_asked_for_one_again() -> None:
    switched = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    )

    async def script(conn: BackendConn) -> None:
        while await conn.request() is not None:
            if len(backend.requests) == 1:
                await conn.send(WARMING)
            else:
                await conn.send(switched + b"hello")
                return

    fields = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "x"),
        ("Sec-WebSocket-Version", "13"),
    ]
    async with RawBackend(script) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            await client.send(request("GET", "/socket", fields))
            assert (await client.head()).status == 101
            assert await client.read_until(b"hello")
        assert [each.header("upgrade") for each in backend.requests] == [[b"websocket"]] * 2


# -- a result ----------------------------------------------------------------------------------


class Results(RawBackend):
    """Takes work by POST, and says of its result what it was told to."""

    def __init__(self, result: bytes | None, place: bytes = SEE_OTHER) -> None:
        super().__init__(self._serve)
        self.result, self.place = result, place
        self.done = asyncio.Event()
        self.done.set()

    async def _serve(self, conn: BackendConn) -> None:
        async for got in each_request(conn):
            if got.method == "POST":
                await conn.send(self.place)
                continue
            await self.done.wait()
            if self.result is None:
                conn.reset()
                return
            await conn.send(self.result)


async def test_result_when_it_does_not_come_in_time_the_work_is_not_done_elsewhere() -> None:
    """Neither by who was to be asked next, nor does an answer from before stand for it."""
    async with Results(SEE_OTHER) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend, timeouts=SHORT), behind(other))
        async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[HERE]))
            (done,) = await p.exchanges(1)
        assert got.status == 504
        assert "result did not come in time" in got.json["error"]["message"]
        assert other.requests == []
        assert sum(each.method == "POST" for each in backend.requests) == 1
    assert [each["fault"] for each in done["attempts"]] == ["timeout"]


async def test_result_when_another_had_failed_before_its_own_end_is_what_is_told() -> None:
    async def refuse(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno")

    async with RawBackend(refuse) as first, Results(SEE_OTHER) as backend:
        rows = ({"url": first.url}, hopping(backend, region="eu-west", timeouts=SHORT))
        async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[HERE]))
            assert (got.status, named(got, "x-beacon-attempts")) == (504, "2")


async def test_result_when_no_connection_holds_the_work_is_not_done_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow, "BROKEN_PAUSE", 0.001)
    async with Results(None) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend), behind(other))
        async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[HERE]))
            inference = json.dumps({"model": "m", "prompt": "hi", "region_preference": "us-east"})
            told = await client.ask(request("POST", "/inference", [], inference.encode()))
        assert got.status == 502
        assert "the result could not be had" in got.json["error"]["message"]
        assert told.json["failure"]["code"] == "CONNECTION_FAILED"
        assert "the result could not be had" in told.json["failure"]["message"]
        assert other.requests == []


@pytest.mark.parametrize("status", [b"500 Oops", b"503 Busy", b"200 OK"])
async def test_result_when_it_says_itself_that_it_failed_another_is_asked(status: bytes) -> None:
    failed = b'{"error": {"message": "out of memory"}}'
    fields = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    result = b"HTTP/1.1 " + status + b"\r\n" + fields % (len(failed), failed)
    async with Results(result) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend), behind(other))
        async with proxy(*rows, providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[HERE]))
            assert (got.json, named(got, "x-beacon-attempts")) == (ANSWER, "2")


async def test_result_when_it_says_warming_the_work_is_not_posted_again() -> None:
    async with Results(WARMING) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat())
        assert (got.status, got.body) == (503, b"warming")
        assert [each.method for each in backend.requests] == ["POST", "GET"]


async def test_result_when_its_backend_has_left_it_is_still_asked_for(tmp_path: Path) -> None:
    """The exchange is under way there, and what it waits for is paid for."""
    found = tmp_path / "nodes.json"
    async with Results(GOOD) as backend:
        backend.done.clear()
        put(found, [{"name": "gone", **hopping(backend)}])
        async with proxy(**by_file(found), providers=HOPS) as p, RawClient(p.port) as client:
            await eventually(lambda: names(p) == ["gone"])
            await client.send(chat())
            await eventually(lambda: len(backend.requests) == 2)
            put(found, [{"name": "new", "url": "http://127.0.0.1:9"}])
            await eventually(lambda: names(p) == ["new"], 5)
            backend.result = SEE_OTHER  # once more around, then it is there
            backend.done.set()
            await eventually(lambda: len(backend.requests) > 3)
            backend.result = GOOD
            got = await client.response("POST")
            assert (got.json, named(got, "x-beacon-backend")) == (ANSWER, "gone")


async def test_result_when_the_hops_are_used_up_no_redirect_reaches_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its address is the backend's own, and the credentials for it are ours."""
    monkeypatch.setattr(follow, "HOPS_MOST", 3)
    async with Results(SEE_OTHER) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            got = await client.ask(chat())
        assert (got.status, got.header("location")) == (504, [])
        assert len(backend.requests) == 4


async def test_result_when_it_is_asked_for_no_digest_of_the_body_goes_along() -> None:
    digests = ("Content-Digest", "Repr-Digest", "Digest", "Content-MD5")
    async with Results(GOOD) as backend:
        async with proxy(hopping(backend), providers=HOPS) as p, RawClient(p.port) as client:
            asked = chat(headers=[(name, "sha-256=:x:") for name in digests])
            assert (await client.ask(asked)).status == 200
        post, get = backend.requests
    assert all(post.header(name) for name in digests)
    assert not any(get.header(name) for name in digests)


BAD_TARGETS = [
    b"/a HTTP/1.1\r\nX-Evil: 1\r\nX: ",
    b"/a\tb",
    b"/a#b",
    b"/v1/../admin",
    b"/v1/%2e%2E/admin",
    b"http://127.0.0.1/a",
    b"*",
    b"",
]


@pytest.mark.parametrize("target", BAD_TARGETS)
async def test_result_when_its_address_is_no_target_it_is_not_asked_for(target: bytes) -> None:
    class Astray(Hopping):
        def hop(self, backend: Backend, status: int, headers: Headers, *told: Any) -> Hop | None:
            return Hop(target) if status == 303 else None

    async with Results(GOOD) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend), behind(other))
        plugins = {"hopping": Astray}
        async with proxy(*rows, providers=plugins) as p, RawClient(p.port) as client:
            got = await client.ask(chat(headers=[HERE]))
            assert (got.status, named(got, "x-beacon-backend")) == (200, "b1")
            (done,) = await p.exchanges(1)
        assert [each.method for each in backend.requests] == ["POST"]
    assert done["attempts"][0]["fault"] == "malformed"


@pytest.mark.parametrize("target", BAD_TARGETS)
async def test_inference_when_a_provider_makes_up_no_target_nothing_is_sent(target: bytes) -> None:
    class Astray(Hopping):
        def ask(self, backend: Backend, prompt: Prompt) -> Call:
            made = super().ask(backend, prompt)
            return Call(target, made.body, made.dialect)

    async with RawBackend(json_answer(ANSWER)) as backend:
        plugins = {"hopping": Astray}
        async with proxy(hopping(backend), providers=plugins) as p, RawClient(p.port) as client:
            asked = request("POST", "/inference", [], b'{"model": "m", "prompt": "hi"}')
            told = (await client.ask(asked)).json
            assert told["failure"]["code"] == "INVALID_RESPONSE"
            assert p.events("server.failed") == []
        assert backend.requests == []


async def test_garbage_when_a_result_was_given_up_is_none() -> None:
    async with Results(SEE_OTHER) as backend, RawBackend(json_answer(ANSWER)) as other:
        rows = (hopping(backend, timeouts=SHORT), behind(other))
        async with proxy(*rows, providers=HOPS) as p:
            assert await left_over(p, asked(chat(headers=[HERE]), 504)) == {}
    async with (
        Warming() as cold,
        RawBackend(json_answer(ANSWER)) as warm,
        proxy(hopping(cold), behind(warm), providers=HOPS) as p,
    ):
        assert await left_over(p, asked(chat(headers=[HERE]))) == {}
