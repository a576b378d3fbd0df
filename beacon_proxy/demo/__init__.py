"""`beacon-proxy demo`: real local backends, the proxy before them, three lines to try.

Three llama.cpp servers with a small model play Golem, Modal and RunPod in three regions. Where they
cannot be installed, an Ollama on this host plays all three.
"""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from ..app import App
from ..config import Settings, load_settings
from ..errors import ConfigError
from ..plugins import Plugins
from .backend import MODEL, Child, Options, Unavailable, find_model
from .words import examples, missing, readable_log

OLLAMA = "http://127.0.0.1:11434"
SLOTS = 2  # requests at once that a backend of the demo has room for
ANSWER = 160  # tokens; so small a model does not always find an end
PORTS = 100  # how far to look for a free one

# name, provider, kind, region
CAST = (
    ("golem-us", "golem", "auto", "us-east"),
    ("modal-eu", "modal", "server", "eu-west"),
    ("runpod-asia", "runpod", "load_balancing", "asia-pacific"),
)


def run_demo(port: int = 8080, *, ollama: str = OLLAMA) -> int:
    """Run until Ctrl-C or SIGTERM; return the exit code.

    The proxy listens on 127.0.0.1:`port`, or on the next free one. Every backend process has ended
    when this returns, and ends by itself if this process is killed.
    """
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    children: list[Child] = []
    try:
        model = _start(children, ollama)
        plugins = Plugins.discover()
        urls = [child.url for child in children] or [ollama] * len(CAST)
        # A ledger as in earnest, so that /costs answers from one; nothing is left behind.
        with tempfile.TemporaryDirectory() as folder:
            settings = _settings(urls, model, _free(port), Path(folder, "beacon.db"), plugins)
            app = App(settings, plugins, env={}, log=readable_log())
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(app, model, began, children))
    except (Unavailable, ConfigError, OSError) as error:
        print(f"beacon-proxy demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            child.stop()
    print("stopped; no backend is left running", flush=True)
    return 0


def _start(children: list[Child], ollama: str) -> str:
    """Start the backends into `children`, or find an Ollama instead; return the model's name."""
    try:
        options = Options(find_model(), slots=SLOTS, answer=ANSWER)
    except Unavailable as why:
        model = _ollama_model(ollama)
        if model is None:
            raise Unavailable(missing(why, ollama, MODEL)) from why
        print(f"beacon-proxy demo: the Ollama at {ollama} plays Golem, Modal and RunPod\n")
        return model
    print("beacon-proxy demo: three llama.cpp servers play Golem, Modal and RunPod")
    print("loading SmolLM2-135M three times ...\n", flush=True)
    children.extend(Child.spawn(options) for _ in CAST)  # they load side by side
    for child, (name, provider, _, region) in zip(children, CAST, strict=True):
        seconds = child.wait_ready()
        about = f"{child.url}  {provider} in {region}, process {child.pid}"
        print(f"  {name:<11}  ready after {seconds:.1f} s  {about}", flush=True)
    return MODEL


def _ollama_model(url: str) -> str | None:
    """The first model of the Ollama at `url`; None where none answers or it has no model."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/tags", timeout=2) as answer:
            return str(json.load(answer)["models"][0]["name"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _free(port: int) -> int:
    """`port`, or the next one that nobody listens on, saying so."""
    for candidate in range(port, min(port + PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
        if candidate != port:
            print(f"  port {port} is not free: the proxy takes {candidate}")
        return candidate
    raise Unavailable(f"no free port from {port} on; try --port")


def _settings(
    urls: Sequence[str], model: str, port: int, ledger: Path, plugins: Plugins
) -> Settings:
    """What a beacon.yaml for these backends says."""
    document: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": port, "region": "us-east"},
        "ledger": {"path": str(ledger)},
        "backends": [
            {"name": name, "provider": provider, "kind": kind, "region": region, "url": url}
            | {"models": [model], "max_in_flight": SLOTS}
            for url, (name, provider, kind, region) in zip(urls, CAST, strict=True)
        ],
        # small machines are slow, and in a demo nobody minds to wait
        "middleware": ["health", "region", "cost", {"capacity": {"queue_timeout": 60}}, "failover"],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "beacon.yaml")
        path.write_text(json.dumps(document))  # JSON is YAML
        return load_settings(path, {}, plugins)


async def _serve(app: App, model: str, began: float, children: Sequence[Child]) -> None:
    """Run the proxy until a signal comes; a second one cuts what is still open."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    await app.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        url = f"http://127.0.0.1:{app.port}"
        print(f"  {'the proxy':<11}  ready after {time.monotonic() - began:.1f} s  {url}")
        print(examples(url, model, children[0].pid if children else None), flush=True)
        await stop.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.default_int_handler)
        await app.stop(drain=2)
