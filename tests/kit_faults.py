"""Backends that fail in one certain way, and the judge of what a client then got.

Each `Fault` says of itself how many bytes of a good answer it lets through, whether a client had
content by then, and by which word of the log its attempt is to be found.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .kit import Answer, Api, BackendConn, RawClient, Script, chunk, eventually, json_bytes

Play = Callable[[BackendConn, Api], Awaitable[None]]

PATIENCE = 4.0  # s a client waits: more than any limit that a fault runs into
FIRST = {"price_per_second": 0.0001}  # with the cost mode `cost`: taken before the good ones
QUICK = {"first_content": 0.3, "document": 0.3, "idle": 0.3}  # s


class Ending(StrEnum):
    """What a client can tell of an answer: exactly one of these."""

    COMPLETE = "complete"
    ERROR = "explicit error"
    BROKEN = "broken"  # visibly: less than its framing promised, or no answer at all
    SHORT = "silently short"  # it looks whole and is not what a good backend says
    DOUBLED = "doubled"
    HUNG = "hung"


def whole(api: Api, stream: bool) -> bytes:
    """The body of a good backend's answer."""
    return b"".join(api.events) if stream else json.dumps(api.document).encode()


def judge(got: Answer, api: Api, stream: bool) -> Ending:
    """The ending of an answer that came to an end."""
    if got.body.count(b"hello") > (len(api.content) if stream else 1):
        return Ending.DOUBLED
    if not got.complete:
        return Ending.BROKEN
    if got.status >= 400 or _tells_an_error(got.body):
        return Ending.ERROR
    if got.status == 200 and got.body == whole(api, stream):
        return Ending.COMPLETE
    return Ending.SHORT


def _tells_an_error(body: bytes) -> bool:
    """Whether a client of any dialect would raise: by a document's `error`, or a last event's."""
    said = body.strip().rpartition(b"\n")[2].removeprefix(b"data:")
    with suppress(ValueError):
        document = json.loads(said)
        return isinstance(document, dict) and bool(
            document.get("error") or document.get("type") == "error"
        )
    return False


async def ask(
    port: int, api: Api, stream: bool, patience: float = PATIENCE
) -> tuple[Ending, Answer]:
    """Be one client, from its connection to its verdict."""
    got = Answer(0, b"", [])
    async with RawClient(port) as client:
        try:
            got = await client.ask(api.request(stream=stream), "POST", timeout=patience)
        except TimeoutError:
            return Ending.HUNG, got
    return judge(got, api, stream), got


def good(api: Api) -> Script:
    """Answer each request well, a stream or a document as it asks."""

    async def script(conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            await conn.send(b"".join(pieces(api, received.json["stream"])))

    return script


def pieces(api: Api, stream: bool) -> list[bytes]:
    """A good answer on the wire: its head, then each event as a chunk, then the last chunk."""
    if stream:
        return [api.head, *map(chunk, api.events), b"0\r\n\r\n"]
    head, _, body = json_bytes(api.document).partition(b"\r\n\r\n")
    return [head + b"\r\n\r\n", body]


# -- where in an answer a fault lies: what of it comes before


def _before(api: Api, stream: bool, stage: str) -> bytes:
    head, *rest = pieces(api, stream)
    quiet = len(api.quiet)
    if stage in ("accept", "head read", "body read"):
        return b""
    if stage == "status line":
        return b"HTTP/1.1 20"
    if stage == "header":
        return head[: len(head) - 9]
    if stage == "head":
        return head
    if not stream:
        return head + rest[0][: -1 if stage == "end" else len(rest[0]) // 2]
    if stage == "quiet events":
        return head + b"".join(rest[:quiet])
    if stage == "first event":
        return head + b"".join(rest[:quiet]) + rest[quiet][:-12]
    if stage == "tokens":
        return head + b"".join(rest[: quiet + 2])
    assert stage == "end"
    return head + b"".join(rest[:-2])  # all but the last event and the last chunk


STAGES = (
    "accept",
    "head read",
    "body read",
    "status line",
    "header",
    "head",
    "quiet events",
    "first event",
    "tokens",
    "end",
)
LATE = ("tokens", "end")  # a stream has said something by then
HOW = ("close", "reset", "stall")


@dataclass(frozen=True)
class Fault:
    """One way to fail.

    Attributes:
        play: what the backend does with one connection.
        logged: the fault of its attempt, as the log says it; any of these.
        late: the client of a stream has content by then, so that it must see a break.
        eager: it acts before anything was asked.
        row: more keys of the backend's row.
    """

    name: str
    play: Play
    logged: tuple[str, ...]
    late: bool = False
    eager: bool = False
    row: dict[str, Any] = field(default_factory=dict)

    def script(self, api: Api) -> Script:
        async def script(conn: BackendConn) -> None:
            await self.play(conn, api)

        return script


async def asked(conn: BackendConn) -> bool:
    """Read one request; whether it asks for a stream."""
    received = await conn.request()
    return received is not None and bool(received.json["stream"])


async def settled(conn: BackendConn) -> None:
    """Everything written has left: a reset would throw the rest away."""
    await eventually(
        lambda: conn.wire.lost or not conn.wire.transport.get_write_buffer_size(), PATIENCE
    )
    await asyncio.sleep(0.01)  # and is read before the reset overtakes it


def stops(stage: str, how: str) -> Fault:
    """Say what comes before `stage`, then close, reset or fall silent."""

    async def play(conn: BackendConn, api: Api) -> None:
        if stage == "head read":
            await conn.head_only()
        elif stage != "accept":
            stream = await asked(conn)
            if said := _before(api, stream, stage):
                await conn.send(said)
                await settled(conn)
        if how == "stall":
            await conn.wait_closed(PATIENCE + 1)
        elif how == "reset":
            conn.reset()

    # A close with bytes unread is a reset on the wire, and a reset may overtake what was said.
    logged = ("timeout",) if how == "stall" else ("closed", "reset")
    row = {"timeouts": QUICK} if how == "stall" else {}
    eager = stage == "accept"
    return Fault(f"{how} at {stage}", play, logged, stage in LATE, eager, row)


def makes(name: str, make: Callable[[Api, bool], bytes], *logged: str, **more: Any) -> Fault:
    """Answer with bytes made for the API, streamed or not, and close."""

    async def play(conn: BackendConn, api: Api) -> None:
        await conn.send(make(api, await asked(conn)))

    return Fault(name, play, logged, **more)


def says(name: str, raw: bytes, *logged: str, **more: Any) -> Fault:
    """Answer with these bytes whatever was asked, and close."""
    return makes(name, lambda api, stream: raw, *logged, **more)


def sized(status: str, kind: str, body: bytes, *lines: str) -> bytes:
    """A whole answer of another making."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def as_json(status: str, body: Any, *lines: str) -> bytes:
    return sized(status, "application/json", json.dumps(body).encode(), *lines)
