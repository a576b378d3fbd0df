"""What the core holds against a provider's own transport: its heads, its bodies, its limits."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest

from beacon_proxy.contracts import Reply, Submission

from .kit import RawClient, chat, chat_events, eventually, request
from .test_transports import ANSWER, JSON, SSE, carried, document


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
