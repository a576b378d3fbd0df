"""The clients' own routes through every family: the same bytes, as they come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    BackendConn,
    RawBackend,
    RawClient,
    Script,
    answer,
    chunk,
    eventually,
    json_bytes,
    proxy,
)
from .kit_apis import APIS, CHAT, COMPLETIONS, MESSAGES, RESPONSES, Api

EVERY = APIS
OF_WORKER = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)  # what worker-vllm's route takes


@dataclass(frozen=True)
class Family:
    provider: str
    kind: str
    apis: tuple[Api, ...] = EVERY
    path: str = ""  # of the configured url
    below: bytes = b""  # where a client's path goes on the backend

    def row(self, backend: RawBackend) -> dict[str, Any]:
        url = backend.url + self.path
        return {"provider": self.provider, "kind": self.kind, "url": url, "models": ["m"]}


FAMILIES = {
    "openai": Family("openai", "auto"),
    "golem": Family("golem", "auto"),
    "golem-ollama": Family("golem", "ollama"),
    "modal-function": Family("modal", "function"),
    "modal-server": Family("modal", "server"),
    "runpod-openai": Family("runpod", "openai", OF_WORKER, "/v2/ep", b"/v2/ep/openai"),
    "runpod-load_balancing": Family("runpod", "load_balancing"),
}
EACH = pytest.mark.parametrize(
    ("family", "api"),
    [
        pytest.param(family, api, id=f"{name}-{api.name}")
        for name, family in FAMILIES.items()
        for api in family.apis
    ],
)
ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def streams(api: Api) -> Script:
    return answer(api.head + b"".join(map(chunk, api.events)) + LAST_CHUNK)


@EACH
async def test_request_and_document_of_a_dialect_pass_byte_for_byte(
    family: Family, api: Api
) -> None:
    document = json_bytes(api.document)
    async with RawBackend(answer(document)) as backend, proxy(family.row(backend)) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(api.request(stream=False), "POST")
        (sent,) = backend.requests
    assert (sent.target, sent.body) == (
        family.below + api.path.encode(),
        api.body(stream=False),
    )
    assert (got.status, got.body) == (200, document.partition(b"\r\n\r\n")[2])


@EACH
async def test_stream_of_a_dialect_passes_byte_for_byte(family: Family, api: Api) -> None:
    async with RawBackend(streams(api)) as backend, proxy(family.row(backend)) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(api.request(stream=True), "POST")
        (told,) = await p.exchanges(1)
    assert (got.complete, got.body, told["end"]) == (True, b"".join(api.events), "complete")
    assert got.header("x-beacon-provider") == [family.provider.encode()]


@ALL
async def test_stream_of_a_family_comes_piece_by_piece(family: Family) -> None:
    """The backend says the next only once the client has the last."""
    taken = asyncio.Semaphore(0)

    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(CHAT.head + b"".join(map(chunk, CHAT.quiet)))
        for piece in CHAT.content:
            await conn.send(chunk(piece))
            await taken.acquire()
        await conn.send(b"".join(map(chunk, CHAT.end)) + LAST_CHUNK)

    async with (
        RawBackend(script) as backend,
        proxy(family.row(backend)) as p,
        RawClient(p.port) as client,
    ):
        await client.send(CHAT.request(stream=True))
        for _ in CHAT.content:
            await client.read_until(b"hello ")
            taken.release()
        await client.read_until(b"[DONE]")


@ALL
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
async def test_client_that_leaves_has_its_connection_to_the_family_closed(
    family: Family, stream: bool
) -> None:
    """What the family makes of that is its own affair; docs/providers.md says what is known."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        if stream:
            await conn.send(CHAT.head + b"".join(map(chunk, CHAT.quiet + CHAT.content)))
        await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        async with RawClient(p.port) as client:
            await client.send(CHAT.request(stream=stream))
            if stream:
                await client.read_until(b"hello ")
            else:
                await eventually(lambda: backend.requests and backend.requests[0].complete)
        await backend.closed.wait(timeout=5)
        (told,) = await p.exchanges(1)
    assert told["end"] == "client_closed"
