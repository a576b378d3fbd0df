"""The commands: what they print, where, and how they end."""

from __future__ import annotations

import asyncio
import configparser
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from beacon_proxy import __version__
from beacon_proxy.cli import main

from .kit import closed_port
from .kit_hooks import SECRET, receiver

ROOT = Path(__file__).parent.parent
GROUPS = ("beacon_proxy.middleware", "beacon_proxy.providers")
VARIABLES = (
    "PORT FLY_REGION GOLEM_PROVIDER_ENDPOINTS MODAL_API_BASE MODAL_API_TOKEN"
    " RUNPOD_API_BASE RUNPOD_API_KEY RUNPOD_ENDPOINT_ID"
)
GOOD = "backends: [{name: here, provider: openai, url: 'http://127.0.0.1:9'}]\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and environment, with the built-in plugins installed."""
    site, work = tmp_path / "site", tmp_path / "work"
    info = site / "beacon_proxy-0.dist-info"
    info.mkdir(parents=True)
    work.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: beacon-proxy\nVersion: 0\n")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = [f"[{group}]{setup['options.entry_points'][group]}\n" for group in GROUPS]
    (info / "entry_points.txt").write_text("".join(points))
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(site), str(ROOT))))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(work)
    return work


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beacon_proxy", *args], capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that `serve` would run, which it here does not."""
    ran: list[Any] = []
    app: Any = ModuleType("beacon_proxy.app")
    app.run = lambda settings, plugins: ran.append(settings) or 0
    monkeypatch.setitem(sys.modules, "beacon_proxy.app", app)
    return ran


def refusing(error: OSError) -> Callable[[Any, Any], int]:
    def run(settings: Any, plugins: Any) -> int:
        raise error

    return run


def test_check_when_all_is_well_exits_0_and_says_what_it_found(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "beacon.yaml").write_text(GOOD)
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "configuration is valid; backends: here;"
        " middleware: health, region, cost, capacity, failover\n"
    )
    assert err == ""


def test_check_when_a_setting_does_less_than_it_seems_to_warns_and_exits_0(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "beacon.yaml").write_text(
        GOOD + "budgets: [{name: b, scope: tenant, per: day, usd: 1}]"
    )
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("configuration is valid, 1 warning above; backends: here;")
    assert err == (
        "beacon-proxy: warning: budgets[0].scope: without limits.tenant_header all clients are one"
        " tenant\n"
    )


def test_check_when_variables_lack_their_partner_warns_and_counts(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RunPod key alone gave no backend, and nothing said why."""
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_secret")
    monkeypatch.setenv("MODAL_API_TOKEN", "wk-1:ws-2")
    monkeypatch.setenv("MODAL_API_BASE", " ")
    assert main(["check"]) == 1
    warned = [
        "beacon-proxy: warning: environment.MODAL_API_TOKEN: is set,"
        " but gives no backend without MODAL_API_BASE",
        "beacon-proxy: warning: environment.RUNPOD_API_KEY: is set,"
        " but gives no backend without RUNPOD_ENDPOINT_ID",
    ]
    assert capsys.readouterr().err.splitlines()[:-1] == warned
    monkeypatch.setenv("GOLEM_PROVIDER_ENDPOINTS", "http://127.0.0.1:9")
    (place / "beacon.yaml").write_text("server: {port: 1}")
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == warned
    assert out.startswith("configuration is valid, 2 warnings above; backends: golem-1;")
    assert main(["check", "--config", "beacon.yaml"]) == 0
    assert capsys.readouterr().err.splitlines() == warned


def test_check_when_the_file_gives_the_backends_is_silent_of_variables(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_secret")
    (place / "beacon.yaml").write_text(GOOD)
    assert main(["check"]) == 0
    assert capsys.readouterr().err == ""


def test_check_when_partners_are_there_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_secret")
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "ep1")
    assert main(["check"]) == 0
    assert capsys.readouterr().err == ""


def test_check_when_much_is_wrong_prints_every_problem_with_its_path(place: Path) -> None:
    (place / "other.yaml").write_text(
        "server: {prot: 1}\n"
        "backends: [{name: a, provider: opnai, url: 'http://h'}]\n"
        "middleware: [health: {base_ejection_time: -1}]"
    )
    done = command("check", "--config", "other.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "server.prot",
        "middleware.health.base_ejection_time",
        "backends[0].provider",
    ]


def test_check_when_nothing_is_configured_says_how_to_add_a_backend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("backends: there is none; add one to beacon.yaml")
    assert all(name in line for name in VARIABLES.split()[2:])


def test_check_when_the_environment_is_enough_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLEM_PROVIDER_ENDPOINTS", "http://127.0.0.1:9")
    assert main(["check"]) == 0


@pytest.mark.parametrize("name", ["check", "serve"])
def test_command_when_the_file_is_not_there_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--config", "none.yaml"]) == 1
    assert capsys.readouterr().err == "none.yaml: cannot be read: No such file or directory\n"


def test_command_when_a_plugin_is_broken_is_one_line(place: Path) -> None:
    info = place.parent / "site" / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[beacon_proxy.middleware]\nbad = not_there:Bad\n")
    (place / "beacon.yaml").write_text(GOOD)
    done = command("check")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "plugin bad (beacon_proxy.middleware): not_there:Bad cannot be imported:"
        " ModuleNotFoundError: No module named 'not_there'\n"
    )


def test_serve_when_flags_are_given_they_win_over_environment_and_file(
    place: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", "2")
    (place / "beacon.yaml").write_text(GOOD + "server: {host: a, port: 1}")
    assert main(["serve"]) == 0
    assert main(["serve", "--host", "127.0.0.1", "--port", "3"]) == 0
    assert [(s.server.host, s.server.port) for s in served] == [("a", 2), ("127.0.0.1", 3)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(13, "error while attempting to bind"), "Permission denied"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
    ],
)
def test_serve_when_it_cannot_listen_is_one_line(
    place: Path,
    served: list[Any],
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    reason: str,
) -> None:
    sys.modules["beacon_proxy.app"].run = refusing(error)  # type: ignore[attr-defined]
    (place / "beacon.yaml").write_text(GOOD)
    assert main(["serve", "--host", "h", "--port", "80"]) == 1
    assert capsys.readouterr().err == f"beacon-proxy: cannot listen on h:80: {reason}\n"


def test_serve_when_the_port_is_taken_is_one_line_and_exit_1(place: Path) -> None:
    (place / "beacon.yaml").write_text(GOOD)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("serve", "--host", "127.0.0.1", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"beacon-proxy: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_when_told_to_stop_exits_0(place: Path, number: signal.Signals) -> None:
    (place / "beacon.yaml").write_text(GOOD)
    with subprocess.Popen(
        [sys.executable, "-m", "beacon_proxy", "serve", "--host", "127.0.0.1", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        started = next(line for line in process.stdout if "server.started" in line)
        assert json.loads(started)["port"] > 0
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert process.stderr.read() == ""


def test_serve_when_nobody_reads_its_log_still_serves_and_stops(place: Path) -> None:
    """One line that stdout would not take once stopped the event loop: /health and SIGTERM too."""
    (place / "beacon.yaml").write_text(GOOD)
    with subprocess.Popen(
        [sys.executable, "-m", "beacon_proxy", "serve", "--host", "127.0.0.1", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
            started = next(line for line in process.stdout if b"server.started" in line)
            url = f"http://127.0.0.1:{json.loads(started)['port']}"
            for _ in range(60):  # some 500 bytes of log each
                with pytest.raises(urllib.error.HTTPError, match=r"50[23]"):
                    urllib.request.urlopen(f"{url}/v1/chat/completions", b"{}", timeout=5)
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()  # else a failure would be waited for


def hooks(*urls: str) -> str:
    rows = ", ".join(f"{{url: '{url}', secret: hunter2}}" for url in urls)
    return f"{GOOD}alerts: {{webhooks: [{rows}]}}\n"


def test_alerts_test_when_there_is_no_webhook_says_how_to_add_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "beacon.yaml").write_text(GOOD)
    assert main(["alerts", "test"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "beacon-proxy: alerts: there is no webhook to test; add one to alerts.webhooks of"
        " beacon.yaml\n",
    )


async def test_alerts_test_when_all_take_it_exits_0(place: Path) -> None:
    async with receiver() as one, receiver() as other:
        for to in (one, other):
            to.path = "/hidden-path"
        (place / "mine.yaml").write_text(hooks(one.url, other.url).replace("hunter2", SECRET))
        done = await asyncio.to_thread(command, "alerts", "test", "--config", "mine.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "webhooks[0] (127.0.0.1): taken: 200\nwebhooks[1] (127.0.0.1): taken: 200\n"
    )
    (got,) = one.taken
    assert got.signed
    assert got.json["type"] == "alert.test"
    assert got.json["text"].startswith("TEST test: if you can read this, alerts arrive [us-east, ")


async def test_alerts_test_when_some_do_not_says_why_for_each_and_exits_1(place: Path) -> None:
    """Once each: who waits at a terminal wants to know now."""
    async with receiver(500) as broken, receiver(302) as moved, receiver() as good:
        broken.path = moved.path = good.path = "/hidden-path"
        with closed_port() as port:
            urls = (broken.url, moved.url, f"http://127.0.0.1:{port}/hidden-path", good.url)
            (place / "beacon.yaml").write_text(hooks(*urls).replace("hunter2", SECRET))
            done = await asyncio.to_thread(command, "alerts", "test")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "webhooks[0] (127.0.0.1): not taken: 500",
        "webhooks[1] (127.0.0.1): not taken: 302 (redirects are not followed)",
        "webhooks[2] (127.0.0.1): not taken: Connection refused",
        "webhooks[3] (127.0.0.1): taken: 200",
    ]
    assert len(broken.tries) == 1


def test_alerts_test_when_the_secret_is_wrong_names_its_place_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "beacon.yaml").write_text(hooks("http://127.0.0.1:9/x").replace("hunter2", "whsec_-"))
    assert main(["alerts", "test"]) == 1
    assert capsys.readouterr().err == (
        "alerts.webhooks[0].secret: must be base64, with or without whsec_ before it\n"
    )


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["alerts"],
        ["alerts", "tset"],
        ["sevre"],
        ["serve", "--port", "x"],
        ["serve", "--port", "65536"],
        ["costs", "--since", "yesterday"],
        ["costs", "--since", "0d"],
        ["costs", "--by", "colour"],
        ["costs", "--format", "xml"],
    ],
)
def test_command_when_misused_exits_2_with_its_usage(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: beacon-proxy")


def test_demo_when_called_gets_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    demo: Any = ModuleType("beacon_proxy.demo")
    demo.run_demo = lambda *, port: 0 if port == 9000 else 7
    monkeypatch.setitem(sys.modules, "beacon_proxy.demo", demo)
    assert main(["demo", "--port", "9000"]) == 0
    assert main(["demo"]) == 7


def test_command_when_interrupted_ends_quietly(
    place: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Any, plugins: Any) -> int:
        raise KeyboardInterrupt

    sys.modules["beacon_proxy.app"].run = run  # type: ignore[attr-defined]
    (place / "beacon.yaml").write_text(GOOD)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == ""


def test_version_when_asked_is_printed() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"beacon-proxy {__version__}\n")


def test_usage_when_asked_imports_nothing_heavy() -> None:
    """Start-up time: what a command needs is imported when it runs."""
    code = (
        "import sys; from beacon_proxy.cli import _parser; _parser().format_help();"
        "print(sorted({'aiohttp', 'pydantic', 'uvloop', 'yaml', 'structlog'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[]\n", "")
