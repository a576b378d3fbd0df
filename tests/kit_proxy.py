"""The whole proxy, in this process and on a real port, built from configuration rows."""

# A wait that a test writes names its own limit: `timeout` is the plain word for it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import json
import logging
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import structlog

from .kit_backend import RawBackend, Received, Script, held_port
from .kit_client import Answer, RawClient
from .kit_scripts import answer as scripted

MIDDLEWARE = {
    "health": "Health",
    "region": "Region",
    "cost": "Cost",
    "capacity": "Capacity",
    "failover": "Failover",
}
PROVIDERS = {"openai": "OpenAI", "golem": "Golem", "modal": "Modal", "runpod": "RunPod"}
SERVER = {"host": "127.0.0.1", "port": 0, "region": "us-east", "drain_timeout": 1}
# Short enough that a hang fails a test, long enough for a busy machine.
TIMEOUTS = {"connect": 4, "first_content": 5, "document": 10, "idle": 5, "total": 0}
SOON = 4.0  # s; by then none of these limits has brought about what a test waits for


async def eventually(predicate: Callable[[], object], timeout: float = SOON) -> None:
    """Poll until `predicate` holds. Raises AssertionError when it never does.

    Time in which this process stood still is no time to wait: it has looked often enough, too.
    """
    deadline, looks = time.monotonic() + timeout, 0
    while not predicate():
        over = time.monotonic() > deadline and looks > timeout * 100
        assert not over, f"not true after {timeout} s: {predicate}"
        looks += 1
        await asyncio.sleep(0.005)


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections and that nobody else can take meanwhile.

    A server of the test's own can, if it asks to reuse the address.
    """
    with held_port() as sock:
        yield sock.getsockname()[1]


@asynccontextmanager
async def blackhole() -> AsyncIterator[int]:
    """A port whose connections never come about: neither accepted nor refused.

    Linux drops the SYN once the backlog of a listener that accepts nothing is full.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        await asyncio.sleep(0.01)
        try:
            yield port
        finally:
            for filler in fillers:
                filler.close()


@cache
def plugins() -> Any:
    """The built-in plugins by import, so that the tests run without an installed package too."""
    from beacon_proxy.plugins import Plugins

    return Plugins(
        providers={n: getattr(import_module(f"providers.{n}"), c) for n, c in PROVIDERS.items()},
        middleware={n: getattr(import_module(f"middleware.{n}"), c) for n, c in MIDDLEWARE.items()},
    )


class Recorder:
    """A structlog processor that keeps every event and prints none."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
        self.events.append({"level": level, **event})
        raise structlog.DropEvent

    def logger(self) -> Any:
        wrapper = structlog.make_filtering_bound_logger(logging.INFO)
        return structlog.wrap_logger(None, processors=[self], wrapper_class=wrapper)


def _observer(outcomes: list[Any]) -> type:
    @dataclass
    class Observer:
        def observe(self, exchange: Any, outcome: Any) -> None:
            outcomes.append(outcome)

    return Observer


class Proxy:
    """A running proxy, as a test sees it."""

    def __init__(self, app: Any, recorder: Recorder) -> None:
        self.app = app
        self.log = recorder.events

    @property
    def port(self) -> int:
        return int(self.app.port)

    def in_flight(self) -> int:
        return sum(c.live.in_flight for c in self.app.fleet.candidates())

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log events of that name, oldest first."""
        return [event for event in self.log if event["event"] == name]

    async def exchanges(self, count: int, timeout: float = SOON) -> list[dict[str, Any]]:
        """The canonical lines, once there are `count` of them."""
        await eventually(lambda: len(self.events("exchange.done")) >= count, timeout)
        return self.events("exchange.done")


def _row(number: int, backend: RawBackend | dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"url": backend} if isinstance(backend, RawBackend) else dict(backend)
    if isinstance(row.get("url"), RawBackend):
        row["url"] = row["url"].url
    return {"name": f"b{number}", "provider": "openai", "region": "us-east", **row}


@contextmanager
def written(document: dict[str, Any]) -> Iterator[Path]:
    """`document` as a beacon.yaml (JSON is YAML)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "beacon.yaml")
        path.write_text(json.dumps(document))
        yield path


@asynccontextmanager
async def proxy(
    *backends: RawBackend | dict[str, Any],
    env: dict[str, str] | None = None,
    leaks: bool = False,
    head_timeout: float = 75.0,
    providers: dict[str, type] | None = None,
    outcomes: list[Any] | None = None,
    **overrides: Any,
) -> AsyncIterator[Proxy]:
    """Run the proxy before `backends`, rows of beacon.yaml (a `url` may be a RawBackend) or
    RawBackends alone: provider openai, region us-east, named b0, b1, ….

    `providers` are plugins beside the built-in ones. `outcomes` gets that of each attempt, told to
    a middleware at the end of the chain. `overrides` are top-level keys of beacon.yaml; `server`
    and `timeouts` are merged into the kit's own; without a `ledger` none is kept. At the end every
    permit must be back, unless `leaks` says that the test looks itself.
    """
    from beacon_proxy.app import App
    from beacon_proxy.config import load_settings

    document = {
        "ledger": {"path": ""},
        **overrides,
        "server": {**SERVER, **overrides.get("server", {})},
        "timeouts": {**TIMEOUTS, **overrides.get("timeouts", {})},
        "backends": [_row(number, backend) for number, backend in enumerate(backends)],
    }
    known = plugins()
    if providers:
        known = replace(known, providers={**known.providers, **providers})
    if outcomes is not None:
        known = replace(known, middleware={**known.middleware, "observer": _observer(outcomes)})
        chain = document.get("middleware") or [{name: {}} for name in MIDDLEWARE]
        document["middleware"] = [*chain, {"observer": {}}]
    with written(document) as path:
        settings = load_settings(path, env or {}, known)
    recorder = Recorder()
    app = App(settings, known, env=env or {}, log=recorder.logger(), head_timeout=head_timeout)
    await app.start()
    running = Proxy(app, recorder)
    try:
        yield running
        if not leaks:
            await eventually(lambda: running.in_flight() == 0)
    finally:
        await app.stop(0)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Seen:
    """What both sides saw of one request."""

    answer: Answer
    requests: list[Received]
    connections: int  # of the backend
    log: list[dict[str, Any]]

    @property
    def got(self) -> Received:
        """The one request that reached the backend."""
        assert len(self.requests) == 1, self.requests
        return self.requests[0]


async def through(
    data: bytes, script: Script | None = None, *, method: str = "GET", **overrides: Any
) -> Seen:
    """Send `data` through a proxy with one backend and read the one answer.

    `method` is that of the request, for the answer's framing; `overrides` as of `proxy`.
    """
    async with RawBackend(script or scripted(OK)) as backend:
        async with proxy(backend, **overrides) as p, RawClient(p.port) as client:
            got = await client.ask(data, method)
        return Seen(got, backend.requests, backend.connections, p.log)
