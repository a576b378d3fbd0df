"""What a command loads before it does anything: the start is nearly all imports.

Counted instead of timed. A module costs about 0.7 ms and 0.1 MB; `python -X importtime -m
beacon_proxy serve` shows which.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
    each_request,
    eventually,
    json_bytes,
    request,
)

ROOT = Path(__file__).resolve().parent.parent
STARTS = 30.0  # s, a fresh interpreter on a busy machine
DOCUMENT = json_bytes({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
STREAM = b"".join((SSE_HEAD, *map(chunk, chat_events("hello", 2)), LAST_CHUNK))

# Runs a command as `python -m beacon_proxy` does, and tells on stderr which modules are loaded: at
# its end, and whenever SIGUSR1 asks.
TELLING = """
import atexit, json, signal, sys

def tell(*_):
    print(json.dumps(sorted(sys.modules)), file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, tell)
atexit.register(tell)
from beacon_proxy.cli import main
sys.exit(main())
"""

# Of `serve`: modules that are not Python's own, those of the proxy included. A package that is
# needed raises this number in the commit that brings it; an innocent import does not.
MODULES = 362

OTHERS = {
    "anthropic": "of the tests",
    "beacon_proxy.alerts.receiver": "is loaded where a webhook is configured",
    "beacon_proxy.discovery": "is loaded where it is configured",
    "dns": "282 modules; only discovery by DNS needs it",
    "httpx": "of the tests and of other packages; the proxy has aiohttp",
    "importlib_metadata": "Python has it",
    "modal": "asks Modal's control plane, where that is configured; brings grpclib and protobuf",
    "multiprocessing": "the proxy is one process",
    "numpy": "of the tests",
    "openai": "for the demo's user",
    "pkg_resources": "importlib.metadata finds the plugins in a fiftieth of the time",
    "pydantic.networks": "a URL of beacon.yaml is judged by `values.split_url`",
    "pydantic.v1": "pydantic's past, 24 modules",
    "requests": "of other packages; the proxy has aiohttp",
    "setuptools": "130 ms; an installed package needs it no more",
    "unittest": "of the tests",
    "xml.etree": "nothing here is XML",
    "beacon_proxy.schema": "makes two files of the repository",
}
DEMO = {
    "beacon_proxy.demo": "another command's",
    "xllamacpp": "the demo's backends",
}
DATA_PATH = {
    "aiohttp": "140 ms, 50 of them for the certificates of a client that asks nobody",
    "aiohttp_retry": "of aiohttp",
    "httptools": "parses requests and answers",
    "orjson": "for bodies and log lines",
    "prometheus_client": "for /metrics",
    "structlog": "for the log",
    "sqlite3": "for the ledger",
    "uvloop": "there is no loop",
    "beacon_proxy.alerts": "watches what serves",
    "beacon_proxy.api": "faces clients",
    "beacon_proxy.app": "composes what serves",
    "beacon_proxy.ledger": "records what was served",
    "beacon_proxy.ops": "tells of exchanges",
    "beacon_proxy.routing": "decides for exchanges",
    "beacon_proxy.wire": "moves bytes",
}
CHECKING = {
    "asyncio": "half of what is left",
    "beacon_proxy.config": "there is none to read",
    "beacon_proxy.plugins": "there are none to find",
    "dataclasses": "brings inspect and ast",
    "importlib.metadata": "there are no plugins to find",
    "pydantic": "100 ms",
    "yaml": "there is no file to read",
}
NOT_YET = {
    "serve": {**OTHERS, **DEMO, "aiohttp_retry": "asks RunPod's control plane, which few have"},
    "check": {**OTHERS, **DEMO, **DATA_PATH},
    "--version": {**OTHERS, **DEMO, **DATA_PATH, **CHECKING},
}


class Told:
    """A command as a process, and what it says on stderr of its modules, oldest first."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = 0
        self._modules: list[set[str]] = []

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self._modules.append(set(json.loads(line)))

    async def modules(self) -> set[str]:
        """Ask what is loaded now."""
        known = len(self._modules)
        self.process.send_signal(signal.SIGUSR1)
        await eventually(lambda: len(self._modules) > known, STARTS)
        return self._modules[-1]

    async def ended(self) -> set[str]:
        """What was loaded at the end."""
        async with asyncio.timeout(STARTS):
            status = await self.process.wait()
        assert status == 0
        await eventually(lambda: self._modules, STARTS)
        return self._modules[-1]


@asynccontextmanager
async def running(folder: Path, *args: str) -> AsyncIterator[Told]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("PORT", None)  # it would win over the file
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TELLING, *args),
        cwd=folder,
        env=env,
        stdout=pipe,
        stderr=pipe,
        limit=1 << 20,
    )
    told = Told(process)
    reader = asyncio.create_task(told.read(), name=f"stderr of {args[0]}")
    try:
        yield told
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


@asynccontextmanager
async def serving(folder: Path, url: str) -> AsyncIterator[Told]:
    """`serve` with five backends in two regions, once it listens."""
    _write(folder, url)
    async with running(folder, "serve") as told:
        assert told.process.stdout is not None
        async with asyncio.timeout(STARTS):
            async for line in told.process.stdout:
                entry = json.loads(line)
                if entry["event"] == "server.started":
                    told.port = entry["port"]
                    break
        yield told


def _write(folder: Path, url: str) -> None:
    kinds = (("openai", "us-east"),) * 2 + (("golem", "us-east"),) + (("openai", "eu-west"),) * 2
    rows = [
        {"name": f"b{number}", "provider": provider, "url": url, "region": region, "models": ["m"]}
        for number, (provider, region) in enumerate(kinds)
    ]
    document = {"server": {"host": "127.0.0.1", "port": 0, "drain_timeout": 0}, "backends": rows}
    (folder / "beacon.yaml").write_text(json.dumps(document))


def too_early(modules: set[str], command: str) -> list[str]:
    """Each module that is loaded though `command` has no use for it yet, with the reason."""
    return sorted(
        f"{module}: {reason}"
        for module, reason in NOT_YET[command].items()
        if any(name == module or name.startswith(f"{module}.") for name in modules)
    )


# structlog takes it up where it is installed, and the tests install it: modal brings it.
_TAKEN_UP = frozenset({"rich"})


def beyond_python(modules: set[str]) -> list[str]:
    """Modules of packages; those with an underscore are how a package was installed or compiled."""
    tops = {name: name.partition(".")[0] for name in modules}
    not_ours = sys.stdlib_module_names | _TAKEN_UP
    return [n for n, top in tops.items() if top not in not_ours and top[0] != "_"]


@pytest.mark.parametrize("command", ["check", "--version"])
async def test_start_when_nothing_is_served_loads_no_data_path(
    command: str, tmp_path: Path
) -> None:
    _write(tmp_path, "http://127.0.0.1:9")
    async with running(tmp_path, command) as told:
        loaded = await told.ended()
    assert "beacon_proxy.cli" in loaded
    assert too_early(loaded, command) == []


async def document_or_stream(conn: BackendConn) -> None:
    async for received in each_request(conn):
        await conn.send(STREAM if b'"stream": true' in received.body else DOCUMENT)


async def test_start_when_it_serves_loads_what_it_needs_and_not_a_tenth_more(
    tmp_path: Path,
) -> None:
    async with RawBackend(document_or_stream) as backend, serving(tmp_path, backend.url) as told:
        loaded = await told.modules()
        assert {"aiohttp", "httptools", "beacon_proxy.wire.pool"} <= loaded
        assert too_early(loaded, "serve") == []
        counted = beyond_python(loaded)
        by_package = Counter(name.partition(".")[0] for name in counted).most_common()
        assert MODULES * 0.9 <= len(counted) <= MODULES * 1.1, by_package


async def test_start_when_requests_come_all_is_loaded_already(tmp_path: Path) -> None:
    """An import inside the first request would hold up all others for as long as it takes."""
    requests = [
        chat(),
        chat(stream=True),
        chat(model="unknown"),
        request("GET", "/health"),
        request("GET", "/providers"),
        request("GET", "/costs"),
        request("GET", "/costs?by=day"),
        request("GET", "/metrics"),
        request("GET", "/metrics", [("Accept", "text/plain")]),
        request("POST", "/inference", body=b'{"model": "m", "prompt": "hi"}'),
        request("POST", "/inference", body=b"{"),
    ]
    async with RawBackend(document_or_stream) as backend, serving(tmp_path, backend.url) as told:
        before = await told.modules()
        async with RawClient(told.port) as client:
            answers = [await client.ask(each) for each in requests]
        assert [each.status for each in answers] == [200, 200, 404, *[200] * 7, 422]
        assert answers[1].framing == "chunked"
        assert await told.modules() - before == set()


def test_too_early_when_a_part_of_a_package_is_loaded_names_the_package() -> None:
    (line,) = too_early({"multiprocessing.util", "json", "xmlrpc"}, "serve")
    assert line.startswith("multiprocessing: ")


def test_beyond_python_counts_packages_and_their_modules_alone() -> None:
    loaded = {"os", "email.utils", "aiohttp", "aiohttp.web", "_cython_3_1_4"}
    assert sorted(beyond_python(loaded)) == ["aiohttp", "aiohttp.web"]
