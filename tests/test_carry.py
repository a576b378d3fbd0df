"""What the core holds against a provider's own transport: its heads, its bodies, its limits."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import weakref
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy import app as app_module
from beacon_proxy.contracts import Reply, Submission
from beacon_proxy.wire.pool import tls_context
from beacon_proxy.wire.upload import REPLAY_CAP, Kept

from .kit import RawBackend, RawClient, chat, chat_events, eventually, json_answer, proxy, request
from .test_garbage import asked, left_over
from .test_transports import ANSWER, JSON, SSE, Carrying, carried, document


async def raw_answer(port: int, data: bytes) -> bytes:
    """All that comes back, until the proxy closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


CLOSE = [("Connection", "close")]


@pytest.mark.parametrize("status", [204, 304])
async def test_carry_when_a_status_has_no_body_none_goes_out_nor_a_framing(status: int) -> None:
    work = document(ANSWER, status, (*JSON, (b"ETag", b'"1"')))
    async with carried(work) as (p, _):
        got = await raw_answer(p.port, request("GET", "/x", CLOSE))
        head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"transfer-encoding" not in head.lower()
    assert b'ETag: "1"' in head
    assert body == b""


async def test_carry_when_the_method_is_head_the_pieces_stay_here() -> None:
    async with carried(document(ANSWER)) as (p, _):
        got = await raw_answer(p.port, request("HEAD", "/x", CLOSE))
        head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert body == b""


async def test_carry_when_a_head_was_answered_the_connection_serves_on() -> None:
    async with carried(document(ANSWER)) as (p, _), RawClient(p.port) as client:
        assert (await client.ask(request("HEAD", "/x"), "HEAD")).status == 200
        assert (await client.ask(chat())).json == ANSWER


@pytest.mark.parametrize("status", [-1, 0, 42, 100, 101, 199, 600, 1000])
async def test_carry_when_a_status_is_none_of_an_answer_the_task_is_stopped(status: int) -> None:
    """It may have a job that costs money: nobody would ever take what it says."""

    async def work(submission: Submission, reply: Reply) -> None:
        reply.head(status, JSON)
        reply.piece(b"{}")
        await asyncio.Event().wait()

    async with carried(work) as (p, kind), RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x"))
        assert got.status == 502
        await eventually(lambda: kind.cancelled)
        (done,) = await p.exchanges(1)
    assert [each["fault"] for each in done["attempts"]] == ["malformed"]


async def test_carry_when_it_ends_what_it_never_began_that_is_a_broken_answer() -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        reply.end()

    async with carried(work) as (p, _), RawClient(p.port) as client:
        got = await client.ask(chat())
        assert got.status == 502
        (done,) = await p.exchanges(1)
        assert p.events("server.failed") == []
    assert [each["fault"] for each in done["attempts"]] == ["closed"]


async def test_carry_when_two_tasks_wait_for_room_both_go_on() -> None:
    passed: list[int] = []
    waiting = 0

    async def work(submission: Submission, reply: Reply) -> None:
        nonlocal waiting
        reply.head(200, SSE)
        event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 65536)
        while True:  # until the client's buffers are full
            task = asyncio.create_task(reply.room())
            await asyncio.sleep(0.005)
            if not task.done():
                break
            reply.piece(event)

        async def one(number: int) -> None:
            nonlocal waiting
            waiting += 1
            await reply.room()
            passed.append(number)

        await asyncio.gather(task, one(1), one(2))
        reply.piece(chat_events("", 1)[-1])
        reply.end()

    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(chat(stream=True))
        await eventually(lambda: waiting == 2, 10)
        assert passed == []
        await client.read_until(b"[DONE]\n\n")
    assert sorted(passed) == [1, 2]


async def test_carry_when_its_task_has_cleaned_up_nothing_holds_it_any_longer() -> None:
    """A timer that outlived the task would hold it, and the body that it was given."""
    tasks: list[weakref.ref[asyncio.Task[Any]]] = []

    async def work(submission: Submission, reply: Reply) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(weakref.ref(task))
        del task
        await asyncio.Event().wait()

    async with carried(work) as (p, kind):
        async with RawClient(p.port) as client:
            await client.send(chat())
            await eventually(lambda: tasks)
        await eventually(lambda: kind.cancelled)
        await eventually(lambda: tasks[0]() is None)  # `CLEAN_UP` is longer than this waits


# -- the body ----------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """The count of kept bodies of the proxy to come, which holds less than usual."""
    kept = Kept(3 * REPLAY_CAP)
    monkeypatch.setattr(app_module, "Kept", lambda: kept)
    return kept


def large(size: int, *, stream: bool = False, more: bytes = b"") -> bytes:
    image = b"a" * size
    told = b"true" if stream else b"false"
    body = b'{"model":"nick","stream":%b,"messages":["%b"]%b}' % (told, image, more)
    fields = [("Content-Type", "application/json"), ("X-Beacon-Region", "us-east")]
    return request("POST", "/v1/chat/completions", fields, body)


async def test_carry_when_bodies_are_past_the_replay_cap_they_are_counted_up_to_a_503(
    kept: Kept,
) -> None:
    seen: list[int] = []
    go = asyncio.Event()

    async def work(submission: Submission, reply: Reply) -> None:
        seen.append(len(submission.body))
        await go.wait()
        await document(ANSWER)(submission, reply)

    size = REPLAY_CAP + (1 << 20)
    async with carried(work) as (p, _):
        async with RawClient(p.port) as one, RawClient(p.port) as two, RawClient(p.port) as three:
            await one.send(large(size))
            await two.send(large(size))
            await eventually(lambda: len(seen) == 2, 10)
            assert kept.used == sum(seen)
            refused = await three.ask(large(size))
            assert (refused.status, len(seen)) == (503, 2)
            assert refused.header("retry-after") == [b"1"]
            go.set()
            for client in (one, two):
                assert (await client.response("POST")).status == 200
            assert (await three.ask(large(size))).status == 200
        await eventually(lambda: kept.used == 0)


async def test_carry_when_a_large_request_fails_the_next_candidate_gets_it_whole(
    kept: Kept,
) -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        raise KeyError("a bug")

    data = large(REPLAY_CAP + (1 << 20))
    async with RawBackend(json_answer(ANSWER)) as other:
        row = {"url": other.url, "region": "eu-west"}
        async with carried(work, row) as (p, _), RawClient(p.port) as client:
            got = await client.ask(data)
            assert (got.json, got.header("x-beacon-attempts")) == (ANSWER, [b"2"])
            await eventually(lambda: kept.used == 0)
        assert [each.body for each in other.requests] == [data.partition(b"\r\n\r\n")[2]]


async def test_carry_when_it_streams_the_body_is_counted_until_its_task_is_over(
    kept: Kept,
) -> None:
    """The provider's task still holds it, however much of the answer has gone out."""
    go = asyncio.Event()
    events = chat_events("one two", 2)

    async def work(submission: Submission, reply: Reply) -> None:
        reply.head(200, SSE)
        for each in events[:-1]:
            reply.piece(each)
        await go.wait()
        reply.piece(events[-1])
        reply.end()
        await asyncio.sleep(0.05)

    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(large(1 << 20, stream=True))
        await client.read_until(events[1])
        assert kept.used > 1 << 20
        go.set()
        await client.read_until(b"0\r\n\r\n")
        assert kept.used > 1 << 20
        await eventually(lambda: kept.used == 0)


async def test_carry_when_the_body_drips_past_the_deadline_it_is_a_504() -> None:
    began: list[str] = []

    async def work(submission: Submission, reply: Reply) -> None:
        began.append(submission.id)

    fields = [("X-Beacon-Timeout", "0.3"), ("Content-Length", "100000")]
    async with carried(work) as (p, _), RawClient(p.port) as client:
        await client.send(request("POST", "/x", fields))

        async def drip() -> None:
            while True:
                await client.send(b"a")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        try:
            assert (await client.response("POST", timeout=8)).status == 504
        finally:
            dripping.cancel()
        await eventually(lambda: p.in_flight() == 0)
        (done,) = await p.exchanges(1)
    assert began == []
    assert [each["fault"] for each in done["attempts"]] == ["deadline"]


@pytest.mark.parametrize(("size", "named"), [(1 << 10, "nick"), (REPLAY_CAP + 1, "real")])
async def test_carry_when_a_body_is_past_the_replay_cap_only_its_beginning_is_read(
    size: int, named: str
) -> None:
    """A small one is parsed to its end, and one that is no JSON there is left as it came."""
    seen: list[bytes] = []

    async def work(submission: Submission, reply: Reply) -> None:
        seen.append(submission.body)
        await document(ANSWER)(submission, reply)

    kind = type("Kind", (Carrying,), {"work": staticmethod(work), "cancelled": []})
    row = {"provider": "carrying", "url": "http://127.0.0.1:9"}
    row |= {"models": ["real"], "aliases": {"nick": "real"}}
    async with proxy(row, providers={"carrying": kind}) as p, RawClient(p.port) as client:
        data = large(size, more=b",nonsense")
        assert (await client.ask(data)).status == 200
    (body,) = seen
    assert body.startswith(b'{"model":"%b",' % named.encode())
    assert body.endswith(b'a"],nonsense}')


async def test_carry_when_the_authorities_of_a_backend_have_gone_the_next_is_asked(
    tmp_path: Path,
) -> None:
    usual = ssl.get_default_verify_paths().cafile
    assert usual is not None
    authorities = tmp_path / "ca.pem"
    shutil.copy(usual, authorities)
    kind = type("Kind", (Carrying,), {"work": staticmethod(document(ANSWER)), "cancelled": []})
    row = {"provider": "carrying", "url": "https://127.0.0.1:9"}
    row |= {"tls": {"ca_file": str(authorities)}}
    plugins = {"carrying": kind}
    async with RawBackend(json_answer(ANSWER)) as other:
        for rows, status in (((row,), 502), ((row, other), 200)):
            shutil.copy(usual, authorities)
            async with proxy(*rows, providers=plugins) as p, RawClient(p.port) as client:
                authorities.unlink()
                tls_context.cache_clear()
                got = await client.ask(chat())
                (done,) = await p.exchanges(1)
                assert got.status == status
                assert p.events("server.failed") == []
            assert status == 200 or done["attempts"][0]["fault"] == "tls"
    assert json.loads(got.body) == ANSWER


async def test_garbage_when_a_carried_answer_was_refused_is_none() -> None:
    async def work(submission: Submission, reply: Reply) -> None:
        reply.head(101, JSON)
        await asyncio.Event().wait()

    async with carried(work) as (p, _):
        assert await left_over(p, asked(chat(), 502)) == {}
