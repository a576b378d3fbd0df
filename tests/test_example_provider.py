"""The packages of examples/, installed as a stranger's are and used by the whole proxy.

The guide, docs/writing-a-provider.md, shows nothing that does not stand in them.
"""

from __future__ import annotations

import ast
import asyncio
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import yaml

from beacon_proxy.config import load_settings, resolve_backends
from beacon_proxy.contracts import Backend, Candidate, Exchange, Fault, Live
from beacon_proxy.plugins import Plugins
from beacon_proxy.wire.faults import fault_of

from .kit import (
    Answer,
    RawBackend,
    RawClient,
    chat,
    eventually,
    json_answer,
    request,
)
from .kit_proxy import written

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CONVEYOR, SMALL = EXAMPLES / "beacon-provider-conveyor", EXAMPLES / "beacon-small-plugins"
GUIDE = (ROOT / "docs" / "writing-a-provider.md").read_text()
GROUPS = ("beacon_proxy.middleware", "beacon_proxy.providers")
STARTS = 60.0  # s, a fresh interpreter on a busy machine
ALLOWED = {"beacon_proxy.contracts", "beacon_proxy.errors", "beacon_proxy.regions", "aiohttp"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both packages, installed by pip without a network; and this tree's own entry points."""
    place = tmp_path_factory.mktemp("site")
    copies = [
        shutil.copytree(each, place.parent / each.name, ignore=shutil.ignore_patterns("*.egg-info"))
        for each in (CONVEYOR, SMALL)
    ]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-index", "--no-deps", "--no-build-isolation", "--target", place, *copies),
        ],
        check=True,
        timeout=120,
    )
    info = place / "beacon_proxy-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: beacon-proxy\nVersion: 0\n")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = [f"[{group}]{setup['options.entry_points'][group]}\n" for group in GROUPS]
    (info / "entry_points.txt").write_text("".join(points))
    return place


@pytest.fixture(scope="module")
def played() -> ModuleType:
    """The small Conveyor of the example's own tests."""
    path = CONVEYOR / "tests" / "conveyor_service.py"
    spec = importlib.util.spec_from_file_location("conveyor_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def environment(*sites: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    path = os.pathsep.join(map(str, [*sites, ROOT]))
    return {**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def check(config: Path, *sites: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beacon_proxy", "check", "--config", config],
        capture_output=True,
        text=True,
        timeout=STARTS,
        env=environment(*sites),
    )


@dataclass
class Running:
    """A proxy in a process of its own."""

    port: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    async def read(self, stdout: asyncio.StreamReader) -> None:
        async for line in stdout:
            event = json.loads(line)
            self.log.append(event)
            if event["event"] == "server.started":
                self.port = event["port"]

    def done(self) -> list[dict[str, Any]]:
        return [event for event in self.log if event["event"] == "exchange.done"]


@asynccontextmanager
async def served(site: Path, *rows: dict[str, Any], **more: Any) -> AsyncIterator[Running]:
    document = {
        "server": {"host": "127.0.0.1", "port": 0, "region": "us-east", "drain_timeout": 0},
        "backends": list(rows),
        "ledger": {"path": ""},
        **more,
    }
    with written(document) as config:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "beacon_proxy", "serve", "--config", config),
            stdout=asyncio.subprocess.PIPE,
            env=environment(site),
        )
        running = Running()
        assert process.stdout is not None
        reading = asyncio.create_task(running.read(process.stdout))
        try:
            await eventually(lambda: running.port or process.returncode is not None, STARTS)
            yield running
        finally:
            if process.returncode is None:
                process.terminate()
            assert await asyncio.wait_for(process.wait(), STARTS) == 0
            await reading


def row(url: str, token: str, **more: Any) -> dict[str, Any]:
    return {"name": "c", "provider": "conveyor", "url": url, "api_key": token, **more}


def prompt(stream: bool) -> bytes:
    body = json.dumps({"model": "m", "prompt": "Say hello.", "stream": stream}).encode()
    return request("POST", "/inference", [("Content-Type", "application/json")], body)


async def ask(port: int, data: bytes) -> Answer:
    async with RawClient(port) as client:
        return await client.ask(data, "POST", timeout=STARTS)


def words(got: Answer) -> str:
    events = [json.loads(event) for event in re.findall(rb"data: (\{.*\})", got.body)]
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events)


# -- installed, checked, run


def test_example_when_installed_is_valid_configuration(site: Path) -> None:
    rows = [row("http://127.0.0.1:9", "t"), {**row("http://127.0.0.1:9", "t"), "name": "a"}]
    rows[1]["provider"] = "acme"
    with written({"backends": rows, "middleware": ["health", {"quiet_hours": {"end": 7}}]}) as path:
        done = check(path, site)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "configuration is valid; backends: c, a; middleware: health, quiet_hours\n"
    )


def test_example_when_it_refuses_a_backend_is_one_line_at_its_key(site: Path) -> None:
    bad = row("http://127.0.0.1:9", "t")
    del bad["api_key"]
    with written({"backends": [bad]}) as path:
        done = check(path, site)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "backends[0].api_key: conveyor takes no job without a token\n"


def test_plugin_when_broken_is_one_clear_line(site: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Broken:\n    name = 'broken'\n")
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    points = "[beacon_proxy.providers]\nbroken = broken:Broken\n"
    (info / "entry_points.txt").write_text(points)
    with written({"backends": [row("http://127.0.0.1:9", "t")]}) as path:
        done = check(path, site, tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("plugin broken:Broken is no provider: it lacks ask, check, credentials")


async def test_example_when_served_carries_chats_and_prompts(site: Path, played: Any) -> None:
    async with played.serving() as (service, url), served(site, row(url, played.TOKEN)) as p:
        streamed, whole = await ask(p.port, chat(stream=True)), await ask(p.port, chat())
        lines, document = await ask(p.port, prompt(True)), await ask(p.port, prompt(False))
        await eventually(lambda: len(p.done()) == 4, STARTS)
        assert len(service.jobs) == 4
    assert (words(streamed), streamed.complete) == ("hello", True)
    assert streamed.body.endswith(b"data: [DONE]\n\n")
    assert streamed.header("x-beacon-provider") == [b"conveyor"]
    assert whole.json["choices"][0]["message"]["content"] == "hello"
    last = json.loads(lines.body.splitlines()[-1])
    for said in (last, document.json):
        metadata = said["metadata"]
        assert (said["success"], metadata["tokens_generated"]) == (True, 2)
        assert metadata["job_id"].startswith("j-")
    assert document.json["response"] == "hello"
    assert [each["end"] for each in p.done()] == ["complete"] * 4


async def test_example_when_streamed_each_word_comes_as_it_is_made(site: Path, played: Any) -> None:
    async with played.serving() as (service, url), served(site, row(url, played.TOKEN)) as p:
        service.held = asyncio.Event()
        async with RawClient(p.port) as client:
            await client.send(chat(stream=True))
            await client.read_until(b'"hel"', timeout=STARTS)
            assert not service.held.is_set(), "the worker has not said more yet"
            service.held.set()
            await client.read_until(b"[DONE]")


async def test_example_when_the_client_leaves_the_job_is_taken_back(
    site: Path, played: Any
) -> None:
    async with played.serving() as (service, url), served(site, row(url, played.TOKEN)) as p:
        service.held = asyncio.Event()

        async def leave_amid(asked: bytes, job: str) -> None:
            async with RawClient(p.port) as client:
                await client.send(asked)
                await eventually(lambda: job in service.jobs and service.jobs[job].text, STARTS)
            await eventually(lambda: service.jobs[job].state == "cancelled", STARTS)

        await leave_amid(chat(stream=True), "j-1")
        await leave_amid(chat(), "j-2")
        await leave_amid(prompt(True), "j-3")
        await eventually(lambda: len(p.done()) == 3, STARTS)
    assert [each["end"] for each in p.done()] == ["client_closed"] * 3


async def test_example_when_the_service_is_full_another_family_answers(
    site: Path, played: Any
) -> None:
    said = {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}
    refusal = aiohttp.web.json_response({"message": "no room"}, status=429)
    async with played.serving() as (service, url), RawBackend(json_answer(said)) as other:
        service.refusal = refusal
        acme = {"name": "a", "provider": "acme", "url": other.url, "api_key": "k-1"}
        rows = (row(url, played.TOKEN), {**acme, "region": "asia-pacific"})
        async with served(site, *rows, middleware=["region", "failover"]) as p:
            got = await ask(p.port, prompt(False))
            await eventually(p.done, STARTS)
            assert p.done()[0]["attempts"][0]["status"] == 429
        (sent,) = other.requests
    assert (got.json["response"], got.json["provider_used"]) == ("hello", "a")
    assert (sent.header("x-acme-token"), sent.header("authorization")) == ([b"k-1"], [])


async def test_example_when_checked_tells_models_and_warmth_and_starts_no_job(
    site: Path, played: Any
) -> None:
    async with played.serving() as (service, url):
        service.cold = 6.5
        async with served(site, row(url, played.TOKEN)) as p:

            async def known() -> dict[str, Any]:
                got = await ask(p.port, request("GET", "/providers"))
                (told,) = got.json["providers"]
                return told

            for _ in range(1000):
                if (told := await known())["last_health_check"]:
                    break
                await asyncio.sleep(0.02)
            assert service.jobs == {}
            got = await ask(p.port, prompt(False))
    assert (told["warmth"], told["models"]) == ("cold", ["m"])
    assert got.json["metadata"]["cold_start"] == 6.5


def test_example_when_its_own_tests_run_they_pass(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml", "-p", "no:cacheprovider"],
        cwd=site.parent / CONVEYOR.name,
        capture_output=True,
        text=True,
        timeout=STARTS,
        env=environment(site),
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- what they may import, and what the guide shows


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/src/**/*.py")), ids=lambda p: p.name)
def test_example_when_read_imports_only_the_ground_floor(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name in ALLOWED or name.partition(".")[0] in sys.stdlib_module_names, name


def blocks(kind: str) -> list[str]:
    """The fenced blocks of the guide, as they stand."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


SHOWN = {
    kind: "\n\n".join(path.read_text() for path in sorted(EXAMPLES.rglob(f"*.{end}")))
    for kind, end in (("python", "py"), ("toml", "toml"))
}


@pytest.mark.parametrize(
    ("kind", "block"),
    [(kind, block) for kind in SHOWN for block in blocks(kind)],
    ids=lambda value: value.strip().splitlines()[0][:60],
)
def test_guide_when_it_shows_code_it_stands_in_an_example(kind: str, block: str) -> None:
    """Line for line; `...` alone on a line leaves something out."""
    parts = re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE)
    at = 0
    for part in parts:
        found = SHOWN[kind].find(part.strip("\n"), at)
        assert found >= 0, f"in no file of examples/:\n{part}"
        at = found + len(part)


def test_guide_when_it_shows_configuration_it_is_valid(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site))
    plugins = Plugins.discover()
    shown = blocks("yaml")
    assert shown
    for block in shown:
        path = tmp_path / "beacon.yaml"
        path.write_text(block)
        tokens = dict.fromkeys(re.findall(r"\$\{(\w+)\}", block), "t-1")
        assert resolve_backends(load_settings(path, tokens, plugins), plugins)
        assert "backends" in yaml.safe_load(block)


def test_guide_when_a_method_is_a_providers_it_is_told() -> None:
    contracts = ast.parse((ROOT / "beacon_proxy" / "contracts" / "provider.py").read_text())
    told = ("Provider", "Carries", "Reply", "Hops", "Fields", "Takes", "Wakes", "Scales")
    names = {
        each.name
        for node in ast.walk(contracts)
        if isinstance(node, ast.ClassDef) and node.name in told
        for each in node.body
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {"ask", "carry", "hop", "fields", "takes", "wakes", "waking"} <= names
    told_of = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", GUIDE))))
    assert names - told_of == set()


# -- the small ones


@pytest.fixture
def quiet_hours(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(site))
    from beacon_small_plugins.quiet_hours import QuietHours  # type: ignore[import-not-found]

    return QuietHours


@pytest.mark.parametrize(
    ("start", "end", "quiet"),
    [(22, 6, {22, 23, 0, 1, 2, 3, 4, 5}), (1, 3, {1, 2}), (4, 4, set())],
)
def test_quiet_hours_when_it_is_night_keeps_to_the_baseline(
    quiet_hours: Any, start: int, end: int, quiet: set[int]
) -> None:
    pools = ("burst", "baseline")
    candidates = [
        Candidate(Backend(pool, "openai", "", "http", "h", 80, pool=pool), Live()) for pool in pools
    ]
    exchange = Exchange("x", "POST", b"/", "/", (), 0.0)
    rule = quiet_hours(start, end)
    found = set()
    for hour in range(24):
        rule.unix = lambda hour=hour: (24 * 19_000 + hour) * 3600.0 + 59
        left = [c.backend.pool for c in rule.select(exchange, candidates)]
        assert left in (["baseline"], ["burst", "baseline"])
        found |= {hour} if left == ["baseline"] else set()
        assert rule.select(exchange, candidates[:1]) == candidates[:1], "nobody else is there"
    assert found == quiet


def test_quiet_hours_when_an_hour_is_none_says_so(quiet_hours: Any) -> None:
    with pytest.raises(ValueError, match=r"end: must be in 0\.\.23, got 24"):
        quiet_hours(end=24)


def test_fault_when_an_answer_of_the_control_plane_is_bad_is_named_by_its_status() -> None:
    """`raise_for_status` is what a plugin writes; it was told as malformed."""
    info: Any = None
    assert fault_of(aiohttp.ClientResponseError(info, (), status=503)) == (
        Fault.STATUS,
        "the answer was 503",
    )
    assert fault_of(aiohttp.ContentTypeError(info, (), status=200))[0] is Fault.NOT_JSON
