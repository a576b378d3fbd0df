"""`beacon-proxy serve` as a process: what a signal does to it, and to the streams that are open."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    eventually,
    json_bytes,
)

ROOT = Path(__file__).resolve().parent.parent
EVENTS = chat_events("hello ", 3)
DOCUMENT = json_bytes({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
STARTS = 20.0  # s, a fresh interpreter on a busy machine


class Process:
    """A running `serve`; its log as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []
        self.port = 0

    def told(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["event"] == name]

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self.log.append(json.loads(raw))

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def draining(self) -> None:
        await eventually(lambda: self.told("server.draining"), 5)

    async def ended(self, within: float) -> None:
        """It exits with 0, in time, and has nothing to complain of."""
        async with asyncio.timeout(within):
            status = await self.process.wait()
        assert self.process.stderr is not None
        assert (status, await self.process.stderr.read()) == (0, b"")


def _document(backends: list[RawBackend], drain: float, port: int) -> str:
    rows = [
        {"name": f"b{number}", "provider": "openai", "url": one.url}
        for number, one in enumerate(backends)
    ]
    server = {"host": "127.0.0.1", "port": port, "drain_timeout": drain}
    return json.dumps({"server": server, "backends": rows})


async def launch(folder: Path, document: str) -> asyncio.subprocess.Process:
    (folder / "beacon.yaml").write_text(document)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("PORT", None)  # it would win over the file
    command = (sys.executable, "-m", "beacon_proxy", "serve", "--config", "beacon.yaml")
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=env, stdout=pipe, stderr=pipe
    )


@asynccontextmanager
async def serve(folder: Path, *backends: RawBackend, drain: float = 20) -> AsyncIterator[Process]:
    running = Process(await launch(folder, _document(list(backends), drain, 0)))
    reader = asyncio.create_task(running.read(), name="log of serve")
    try:
        await eventually(lambda: running.told("server.started"), STARTS)
        running.port = running.told("server.started")[0]["port"]
        yield running
    finally:
        if running.process.returncode is None:
            running.process.kill()
        await running.process.wait()
        await reader


class Gate:
    """A backend that begins each answer and ends it when told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def script(self, conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            if not received.json["stream"]:
                await self._or_gone(conn)
                await conn.send(DOCUMENT)
                continue
            await conn.send(SSE_HEAD + b"".join(map(chunk, EVENTS[:2])))
            await self._or_gone(conn)
            await conn.send(b"".join(map(chunk, EVENTS[2:])) + LAST_CHUNK)

    async def _or_gone(self, conn: BackendConn) -> None:
        go = asyncio.create_task(self.go.wait())
        gone = asyncio.create_task(conn.wait_closed(30))
        await asyncio.wait((go, gone), return_when=asyncio.FIRST_COMPLETED)
        for task in (go, gone):
            task.cancel()
        await asyncio.gather(go, gone, return_exceptions=True)


async def stream_begun(client: RawClient) -> None:
    await client.send(chat(stream=True))
    await client.read_until(b'"hello "')


async def refuses(port: int) -> bool:
    try:
        async with RawClient(port):
            return False
    except ConnectionError:
        return True


async def closes_its_port(port: int) -> None:
    for _ in range(500):
        if await refuses(port):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it goes on accepting")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_when_told_to_stop_lets_open_answers_finish(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A stream and a document: both whole, the new client is refused, and the exit is 0."""
    gate = Gate()
    async with RawBackend(gate.script) as backend, serve(tmp_path, backend) as running:
        async with RawClient(running.port) as one, RawClient(running.port) as two:
            await stream_begun(one)
            await two.send(chat())
            await eventually(lambda: len(backend.requests) == 2)
            running.signal(number)
            await running.draining()
            await closes_its_port(running.port)
            assert running.process.returncode is None
            gate.go.set()
            rest = await one.read_all()
            document = await two.response()
        await running.ended(within=5)
    assert rest.endswith(LAST_CHUNK)
    assert rest.count(b'"hello "') == 2
    assert EVENTS[-1] in rest
    assert (document.status, document.complete) == (200, True)
    assert [entry["end"] for entry in running.told("exchange.done")] == ["complete"] * 2
    assert running.told("server.stopped")


async def test_serve_when_drained_idle_clients_do_not_keep_it(tmp_path: Path) -> None:
    gate = Gate()
    gate.go.set()
    async with (
        RawBackend(gate.script) as backend,
        serve(tmp_path, backend) as running,
        RawClient(running.port) as idle,
        RawClient(running.port),
    ):
        assert (await idle.ask(chat(), "POST")).complete
        running.signal()
        assert await idle.closed(10)
        await running.ended(within=10)


async def test_serve_when_the_drain_time_is_over_cuts_what_is_open_visibly(tmp_path: Path) -> None:
    gate = Gate()
    async with RawBackend(gate.script) as backend, serve(tmp_path, backend, drain=0.3) as running:
        async with RawClient(running.port) as client:
            await stream_begun(client)
            started = time.monotonic()
            running.signal()
            rest = await client.read_all()
            took = time.monotonic() - started
        await backend.closed.wait(timeout=10)
        await running.ended(within=10)
    assert not rest.endswith(LAST_CHUNK), "a clean end"
    assert took >= 0.25, "it was given its time"
    (told,) = running.told("exchange.done")
    assert told["end"] == "error", "the client had not left"


async def test_serve_when_told_twice_stops_at_once(tmp_path: Path) -> None:
    gate = Gate()
    async with RawBackend(gate.script) as backend, serve(tmp_path, backend) as running:
        async with RawClient(running.port) as client:
            await stream_begun(client)
            running.signal()
            await running.draining()
            running.signal()
            started = time.monotonic()
            rest = await client.read_all()
            await running.ended(within=10)
            assert time.monotonic() - started < 10, "the drain time is 20 s"
        await backend.closed.wait(timeout=10)
    assert not rest.endswith(LAST_CHUNK), "a clean end"
    assert len(running.told("exchange.done")) == 1, "it is told like any other"


async def test_serve_when_its_port_is_taken_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with RawBackend(Gate().script) as backend:
            process = await launch(tmp_path, _document([backend], 1, port))
            out, err = await asyncio.wait_for(process.communicate(), STARTS)
    assert process.returncode == 1
    assert err.count(b"\n") == 1
    assert b"Traceback" not in out + err
    assert b"%d" % port in err
