"""The contenders: how an operator configures and starts each, access log on.

All have five backends, which are five ports of the mock. The limits that every one of them has on
what runs at once are raised, as an operator would who expects thousands of streams.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from . import peers, work
from .processes import Failed

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"


class Missing(Failed):
    """A contender that only the system can bring, and does not."""


class Contender:
    """One proxy.

    Attributes:
        name: in the results.
        exact: it passes answers on to the byte.
        patience: s that it may take to answer for the first time.
        note: how it is run, for who reads the results.
    """

    name = ""
    exact = True
    patience = 15.0
    note = ""

    def version(self) -> str:
        raise NotImplementedError

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        """Write its configuration into `folder`; return what starts it, listening on `port`."""
        raise NotImplementedError

    def environment(self, folder: Path) -> dict[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return keep | {"HOME": os.fspath(folder), "TMPDIR": os.fspath(folder)}

    def access_log(self, folder: Path, output: Path) -> Path | None:
        """The file that gets one line a request; None: it writes none."""
        return folder / "access.log"


class Beacon(Contender):
    name = "beacon-proxy"
    note = (
        "default but for max_in_flight and models, five backends in two regions, log and metrics on"
    )

    def version(self) -> str:
        from beacon_proxy import __version__

        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "beacon_proxy", "middleware", "providers")
        return f"{__version__} ({commit}{' changed' if changed else ''})" if commit else __version__

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        rows: list[dict[str, object]] = [
            {"name": "near-1", "provider": "golem", "kind": "openai", "region": "us-east"},
            {"name": "near-2", "provider": "openai", "region": "us-east"},
            {"name": "near-3", "provider": "openai", "region": "us-east"},
            {"name": "far-1", "provider": "golem", "kind": "openai", "region": "eu-west"},
            {"name": "far-2", "provider": "openai", "region": "eu-west"},
        ]
        for row, backend in zip(rows, backends, strict=True):
            row |= {"url": f"http://{HOST}:{backend}", "max_in_flight": 10_000}
            row |= {"models": [work.MODEL]}
        config = folder / "beacon.yaml"
        chosen = {"server": {"host": HOST, "port": port}, "backends": rows}
        ledger = {"path": os.fspath(folder / "beacon.db")}  # as by default, but for the place
        config.write_text(json.dumps(chosen | {"ledger": ledger}))
        return [sys.executable, "-m", "beacon_proxy", "serve", "--config", config]

    def access_log(self, folder: Path, output: Path) -> Path | None:
        return output


def _git(*words: str) -> str:
    """What git says of this tree; nothing where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(ROOT), *words], capture_output=True, text=True, timeout=30
        )
    except OSError:
        return ""
    return done.stdout.strip()


class Envoy(Contender):
    name = "envoy"
    note = "file access log, one worker, least request"

    def version(self) -> str:
        return peers.version("envoy")

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        config = folder / "envoy.json"
        config.write_text(json.dumps(_envoy(folder, port, backends)))
        program = peers.find("envoy", "envoy")
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
        return [program, "-c", config, *options]


def _envoy(folder: Path, port: int, backends: Sequence[int]) -> dict[str, object]:
    api = "type.googleapis.com/envoy.extensions"

    def address(number: int) -> dict[str, object]:
        return {"address": {"socket_address": {"address": HOST, "port_value": number}}}

    route = {"match": {"prefix": "/"}, "route": {"cluster": "backends", "timeout": "0s"}}
    file_log = f"{api}.access_loggers.file.v3.FileAccessLog"
    manager = {
        "@type": f"{api}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "access_log": [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {"@type": file_log, "path": os.fspath(folder / "access.log")},
            }
        ],
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{api}.filters.http.router.v3.Router"},
            }
        ],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    most = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 50_000)
    endpoints = [{"endpoint": address(backend)} for backend in backends]
    cluster = {
        "name": "backends",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [most]},
        "load_assignment": {
            "cluster_name": "backends",
            "endpoints": [{"lb_endpoints": endpoints}],
        },
    }
    listener = {**address(port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


class VllmRouter(Contender):
    name = "vllm-router"
    note = "default policy (cache_aware); it has no access log"
    patience = 60.0
    extra: tuple[str, ...] = ()

    def version(self) -> str:
        return peers.version("vllm")

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        urls = [f"http://{HOST}:{backend}" for backend in backends]
        program = peers.find("vllm", "vllm-router")
        options = ["--host", HOST, "--port", str(port), "--prometheus-port", str(free_port())]
        return [program, *options, *self.extra, "--worker-urls", *urls]

    def access_log(self, folder: Path, output: Path) -> Path | None:
        return None


class VllmRoundRobin(VllmRouter):
    name = "vllm-router-rr"
    note = "--policy round_robin, its cheapest"
    extra = ("--policy", "round_robin")


class LiteLLM(Contender):
    name = "litellm"
    note = "five deployments of one model, one worker"
    exact = False
    patience = 120.0

    def version(self) -> str:
        return peers.version("litellm")

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        rows = []
        for backend in backends:
            to = {"model": f"openai/{work.MODEL}", "api_key": "sk-none"}
            to |= {"api_base": f"http://{HOST}:{backend}/v1"}
            rows.append({"model_name": work.MODEL, "litellm_params": to})
        config = folder / "litellm.yaml"
        settings = {"master_key": work.KEY}  # it does not start without one
        config.write_text(json.dumps({"model_list": rows, "general_settings": settings}))
        program = peers.find("litellm", "litellm")
        options = ["--host", HOST, "--port", str(port), "--num_workers", "1"]
        return [program, "--config", config, *options]

    def environment(self, folder: Path) -> dict[str, str]:
        local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
        return super().environment(folder) | local

    def access_log(self, folder: Path, output: Path) -> Path | None:
        return output


class Nginx(Contender):
    name = "nginx"
    note = "access log, keep-alive to the backends, no buffering"

    def version(self) -> str:
        done = subprocess.run([_nginx(), "-v"], capture_output=True, text=True, timeout=30)
        return done.stderr.strip().rpartition("/")[2]

    def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
        config = folder / "nginx.conf"
        servers = "".join(f"server {HOST}:{backend};" for backend in backends)
        config.write_text(_NGINX.format(folder=folder, host=HOST, port=port, servers=servers))
        return [_nginx(), "-p", folder, "-c", config, "-e", folder / "error.log"]


_NGINX = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid;
user root;
worker_rlimit_nofile 20000;
events {{ worker_connections 19000; }}
http {{
  access_log {folder}/access.log combined;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  client_max_body_size 0; keepalive_requests 1000000000;
  upstream backends {{ least_conn; {servers} keepalive 64; keepalive_requests 1000000000; }}
  server {{
    listen {host}:{port} backlog=4096;
    location / {{
      proxy_pass http://backends; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $host; proxy_buffering off; proxy_request_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def _nginx() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise Missing("it is not on this system")
    return found


class Direct(Contender):
    """No proxy at all: the load asks the backend."""

    name = "direct"
    note = "no proxy"

    def version(self) -> str:
        return ""


def free_port() -> int:
    """A port that nobody listens on, and that no connection gets before the contender starts."""
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    lowest = int(text.split()[0])  # of those that the system gives to connections
    for port in random.sample(range(max(1024, lowest - 8000), max(lowest, 9024)), 100):
        with socket.socket() as sock, suppress(OSError):
            sock.bind((HOST, port))
            return port
    raise Failed("no port is free")


ALL: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Beacon(),
        Envoy(),
        VllmRouter(),
        VllmRoundRobin(),
        LiteLLM(),
        Nginx(),
        Direct(),
    )
}
