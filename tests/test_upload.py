"""Request bodies that are held: how many bytes of them in all, and that they are let go."""

from __future__ import annotations

from typing import Any

import pytest

from beacon_proxy.wire import upload

from .kit import RawBackend, RawClient, eventually, json_answer, proxy, request

GOOD = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[upload.Kept]:
    """Every counter that is made, with room for 100 kB."""
    made: list[upload.Kept] = []
    known: Any = upload.Kept.__init__

    def small(self: upload.Kept, limit: int = 100_000) -> None:
        known(self, limit)
        made.append(self)

    monkeypatch.setattr(upload.Kept, "__init__", small)
    return made


def unfinished(size: int) -> bytes:
    """A chat whose body is one byte short."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n"
    body = b'{"model":"m","messages":[{"role":"user","content":"' + b"a" * size
    return head.format(len(body) + 4).encode() + body + b'"}]'


async def test_bodies_when_too_many_are_held_are_refused_until_there_is_room(
    kept: list[upload.Kept],
) -> None:
    """Sixty unfinished posts of 4 MB, none admitted, took 236 MB: the machine has 512."""
    async with RawBackend(json_answer(GOOD)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as first, RawClient(p.port) as second:
            await first.send(unfinished(60_000))
            await eventually(lambda: kept[0].used > 60_000)
            await second.send(unfinished(60_000))
            got = await second.response("POST")
            assert (got.status, got.header("retry-after")) == (503, [b"1"])
            await eventually(lambda: kept[0].used < 100_000)
            await first.send(b"}")
            assert (await first.response("POST")).status == 200
        async with RawClient(p.port) as third:
            assert (await third.ask(unfinished(60_000) + b"}", "POST")).status == 200
        assert [len(seen.body) > 60_000 for seen in backend.requests] == [True, True]
        await eventually(lambda: kept[0].used == 0)


async def test_bodies_when_their_client_leaves_are_let_go(kept: list[upload.Kept]) -> None:
    async with RawBackend(json_answer(GOOD)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(unfinished(60_000))
            await eventually(lambda: kept[0].used > 60_000)
        await eventually(lambda: kept[0].used == 0)
        assert backend.requests == []


async def test_upload_when_there_is_no_room_to_keep_it_passes_all_the_same(
    kept: list[upload.Kept],
) -> None:
    """Outside the inference routes nothing waits for the whole body: only the replay is lost."""
    body = b"x" * 500_000
    async with RawBackend(json_answer(GOOD)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            raw = request("POST", "/upload", [("Content-Type", "text/plain")], body)
            assert (await client.ask(raw, "POST")).status == 200
        assert backend.requests[0].body == body
        await eventually(lambda: kept[0].used == 0)
