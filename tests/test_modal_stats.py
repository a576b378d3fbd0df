"""The extra `[modal]`: the real `modal` client against a stand-in of its control plane."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from modal_proto import api_pb2

from beacon_proxy.contracts import Capacity, Fault, Verdict, Warmth
from beacon_proxy.errors import ConfigError
from providers.modal import stats as stats_module
from providers.modal.stats import check_stats

from .kit import RawBackend, RawClient, answer, eventually, json_bytes, proxy, request
from .kit_modal_control import ControlPlane

ROOT = Path(__file__).resolve().parent.parent
URL = "modal://llm/serve"
PATIENCE = 20.0  # s, for the import of modal on a busy machine


@asynccontextmanager
async def told(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The `modal` package of this process, with `plane` for Modal."""
    import modal

    monkeypatch.setenv("MODAL_SERVER_URL", plane.url)
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-secret")
    client = await modal.Client.from_env.aio()
    try:
        yield
    finally:
        await client.close.aio()


@pytest.mark.parametrize(
    ("stats", "warmth", "capacity"),
    [
        pytest.param({}, Warmth.COLD, Capacity(running=0, queued=0, room=0), id="scaled to zero"),
        pytest.param(
            {"backlog": 3}, Warmth.WARMING, Capacity(running=0, queued=3, room=0), id="starting"
        ),
        pytest.param(
            {"backlog": 1, "num_total_tasks": 2, "num_running_inputs": 5, "input_headroom": 4},
            Warmth.WARM,
            Capacity(running=2, queued=1, room=4),
            id="running",
        ),
    ],
)
async def test_stats_when_asked_tell_warmth_and_capacity(
    stats: dict[str, int],
    warmth: Warmth,
    capacity: Capacity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ControlPlane() as plane, told(plane, monkeypatch):
        plane.stats = api_pb2.FunctionStats(**stats)
        check = await check_stats(f"{URL}?environment=staging", PATIENCE)
    assert (check.verdict, check.warmth, check.capacity) == (Verdict.GOOD, warmth, capacity)
    assert plane.asked == [("FunctionGet", "staging"), ("FunctionGetCurrentStats", "fu-1")]
    assert plane.tokens == [("ak-1", "as-secret")] * 2


@pytest.mark.parametrize(
    ("status", "verdict", "fault"),
    [
        pytest.param(Status.NOT_FOUND, Verdict.STRIKE, Fault.GONE, id="no such function"),
        pytest.param(Status.UNAUTHENTICATED, Verdict.NEUTRAL, Fault.UNAUTHORIZED, id="bad token"),
        pytest.param(Status.PERMISSION_DENIED, Verdict.NEUTRAL, Fault.RESET, id="not allowed"),
        pytest.param(Status.FAILED_PRECONDITION, Verdict.NEUTRAL, Fault.RESET, id="some error"),
    ],
)
async def test_stats_when_refused_hold_it_against_the_function_only_if_there_is_none(
    status: Status, verdict: Verdict, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ControlPlane(status=status) as plane, told(plane, monkeypatch):
        check = await check_stats(URL, PATIENCE)
    assert (check.verdict, check.fault, check.warmth) == (verdict, fault, None)
    assert "as-secret" not in check.detail


async def test_stats_when_the_control_plane_hangs_give_up_in_time_and_block_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ControlPlane(hangs=True) as plane, told(plane, monkeypatch):
        asking = asyncio.create_task(check_stats(URL, 0.5))
        await eventually(lambda: plane.tokens)
        turns = 0
        while not asking.done():
            await asyncio.sleep(0.01)
            turns += 1
        check = await asking
    assert (check.verdict, check.fault) == (Verdict.NEUTRAL, Fault.TIMEOUT)
    assert turns > 3, "the loop stood still"


HANGS = """
import asyncio, sys, threading, time
sys.path.insert(0, sys.argv[1])
from providers.modal import stats as stats_module
from providers.modal.stats import check_stats

async def main():
    checks = [await check_stats("modal://a/b", 0.2) for _ in range(3)]
    assert {check.fault for check in checks} == {"timeout"}, checks
    print(threading.active_count())

asyncio.run(main())
"""


async def test_stats_when_the_import_hangs_have_one_thread_and_do_not_hold_up_the_end(
    tmp_path: Path,
) -> None:
    """Each check began another, and the process waited for all of them at its end."""
    (tmp_path / "modal.py").write_text("import time\ntime.sleep(600)\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HANGS, str(tmp_path)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(20):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, err) == (0, b"")
    assert out.strip() == b"2"  # the main thread, and the import


async def test_stats_when_the_import_fails_say_so_and_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats_module, "_importing", None)
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "modal", None)
        check = await check_stats(URL, PATIENCE)
        assert (check.verdict, check.fault) == (Verdict.NEUTRAL, Fault.RESET)
        assert check.detail.endswith("ModuleNotFoundError")
    async with ControlPlane() as plane, told(plane, monkeypatch):
        assert (await check_stats(URL, PATIENCE)).verdict is Verdict.GOOD


async def test_stats_when_there_is_no_token_say_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("modal.config._user_config", {})
    check = await check_stats(URL, PATIENCE)
    assert (check.verdict, check.fault) == (Verdict.NEUTRAL, Fault.UNAUTHORIZED)
    assert "MODAL_TOKEN_ID" in check.detail


async def test_proxy_when_control_url_names_the_function_shows_capacity_and_wakes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        ControlPlane() as plane,
        told(plane, monkeypatch),
        RawBackend(answer(json_bytes({}))) as app,
        proxy(
            {"provider": "modal", "url": app, "control_url": f"{URL}?environment=main"},
            middleware=[{"health": {"probe_interval": 0.05}}, "region", "cost", "capacity"],
        ) as p,
        RawClient(p.port) as client,
    ):
        live = p.app.fleet.candidates()[0].live
        await eventually(lambda: live.warmth is Warmth.COLD, PATIENCE)
        plane.stats = api_pb2.FunctionStats(num_total_tasks=2, input_headroom=3)
        await eventually(lambda: live.warmth is Warmth.WARM, PATIENCE)
        shown = (await client.ask(request("GET", "/providers"))).json["providers"][0]
        assert app.accepted == 0
    assert shown["warmth"] == "warm"
    assert shown["capacity"]["running"] == 2
    assert "as-secret" not in json.dumps(p.log)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(
            {"provider": "modal", "control_url": "modal://llm"},
            "backends[0].control_url: must be modal://APP/FUNCTION",
            id="no function",
        ),
        pytest.param(
            {"provider": "modal", "control_url": "https://api.modal.com"},
            "backends[0].control_url: must be modal://… for provider modal",
            id="modal, by http",
        ),
        pytest.param(
            {"provider": "runpod", "control_url": URL},
            "backends[0].control_url: must be http://… or https://… for provider runpod",
            id="another provider",
        ),
        pytest.param(
            {"provider": "modal", "control_url": "modal://ak:as@llm/serve"},
            "backends[0].control_url: must be a URL without spaces, user or password",
            id="a secret in it",
        ),
    ],
)
async def test_config_when_control_url_is_not_its_providers_says_what_it_must_be(
    row: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        async with proxy({"url": "http://127.0.0.1:9", **row}):
            raise AssertionError("it started")
    (line,) = caught.value.problems
    assert line.startswith(problem)


async def test_config_when_the_package_is_missing_is_one_line_that_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(ConfigError) as caught:
        async with proxy({"provider": "modal", "url": "http://127.0.0.1:9", "control_url": URL}):
            raise AssertionError("it started")
    assert caught.value.problems == (
        "backends[0].control_url: needs the package modal: pip install 'beacon-proxy[modal]'",
    )


@pytest.mark.parametrize("hangs", [False, True], ids=["answers", "hangs"])
async def test_serve_when_told_to_stop_ends_with_the_thread_of_modal(
    hangs: bool, tmp_path: Path
) -> None:
    """The package has a thread and a loop of its own; neither may hold up the end."""
    document = {
        "server": {"host": "127.0.0.1", "port": 0, "drain_timeout": 0},
        "backends": [
            {
                "name": "m",
                "provider": "modal",
                "url": "http://127.0.0.1:9",
                "control_url": URL,
                "models": ["m"],
            }
        ],
    }
    (tmp_path / "beacon.yaml").write_text(json.dumps(document))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "MODAL_TOKEN_ID": "ak-1",
        "MODAL_TOKEN_SECRET": "as-secret",
        "MODAL_CONFIG_PATH": str(tmp_path / "none.toml"),
    }
    env.pop("PORT", None)
    async with ControlPlane(hangs=hangs) as plane:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "beacon_proxy", "serve"),
            cwd=tmp_path,
            env={**env, "MODAL_SERVER_URL": plane.url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await eventually(lambda: len(plane.tokens) >= (1 if hangs else 2), 30.0)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(15):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0, err.decode()
    assert err == b""
    assert b"as-secret" not in out
