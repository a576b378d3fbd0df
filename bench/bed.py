"""The test bed: backend and load on one core, a contender on another, and one run with them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import work
from .contenders import HOST, ROOT, Contender, free_port
from .counts import Spec
from .framing import Broken, read
from .processes import Failed, running, stop, tail

CORES = sorted(os.sched_getaffinity(0))
LOAD_CORE, PROXY_CORE = CORES[0], CORES[-1]
OUTPUT, BACKEND_LOG = "output.log", "backend.log"
_READY = 10.0  # s until the backend must listen


@dataclass
class Bed:
    """A contender that answers, before backends that do.

    Attributes:
        port: of the contender; of the first backend where there is none.
        root: leader of its process tree; 0 where there is none.
        backend: the process that is the backend.
        folder: its configuration and logs.
        first_answer: s from its start to its first answer.
        process: the leader; None where there is none.
    """

    contender: Contender
    port: int
    root: int
    backend: subprocess.Popen[bytes]
    folder: Path
    first_answer: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    def load(self, **spec: Any) -> dict[str, Any]:
        """Run a load (see `counts.Spec`) and return what it found.

        Raises:
            Failed: it did not end as it should.
        """
        given: dict[str, Any] = {"port": self.port, "root": self.root, "backend": self.backend.pid}
        given |= {"exact": self.contender.exact, **spec}
        allowed = Spec(**given)
        return self.run("bench.load", given, allowed.warm + allowed.seconds + 2 * allowed.limit)

    def run(self, module: str, spec: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Run a module on the core of the load; it has `seconds`, and some to start and to end."""
        log = self.folder / "load.log"
        command = [sys.executable, "-m", module, json.dumps(spec)]
        with running(command, core=LOAD_CORE, log=log, env=_environment(), cwd=ROOT) as process:
            try:
                status = process.wait(seconds + 30)
            except subprocess.TimeoutExpired:
                raise Failed(f"the load does not end: {tail(log)}") from None
        if status:
            raise Failed(f"the load failed: {tail(log)}")
        if self.backend.poll() is not None:
            raise Failed(f"the backend died: {tail(self.folder / BACKEND_LOG)}")
        found: dict[str, Any] = json.loads(log.read_text())
        return found

    def log(self) -> Path | None:
        """Stop the contender and return its access log, now whole; None: it writes none."""
        if self.process is None:
            return None
        stop(self.process)
        return self.contender.access_log(self.folder, self.folder / OUTPUT)


@contextmanager
def bed(
    contender: Contender,
    backend: Mapping[str, Any] | None = None,
    env: Callable[[Path], Mapping[str, str]] = lambda folder: {},
) -> Iterator[Bed]:
    """Start a backend as `backend.Spec` says and the contender before it; stop both at the end.

    `env` gives the contender more environment, which may name its folder.

    Raises:
        Failed: the contender does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with _backend(folder, backend or {}) as (mock, ports):
            if contender.name == "direct":
                yield Bed(contender, ports[0], 0, mock, folder)
                return
            port = free_port()
            command = contender.command(folder, port, ports)
            output = folder / OUTPUT
            variables = {**contender.environment(folder), **env(folder)}
            began = time.monotonic()
            with running(command, core=PROXY_CORE, log=output, env=variables, cwd=ROOT) as process:
                _wait_for_answer(contender, port, process, output)
                took = time.monotonic() - began
                yield Bed(contender, port, process.pid, mock, folder, took, process)


@contextmanager
def _backend(
    folder: Path, spec: Mapping[str, Any]
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    log = folder / BACKEND_LOG
    command = [sys.executable, "-m", "bench.backend", json.dumps(spec)]
    with running(command, core=LOAD_CORE, log=log, env=_environment(), cwd=ROOT) as process:
        deadline = time.monotonic() + _READY
        while not log.read_bytes().endswith(b"\n"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the backend does not start: {tail(log)}")
            time.sleep(0.01)
        first, _, _ = log.read_text().partition("\n")
        yield process, json.loads(first)["ports"]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}


def _wait_for_answer(
    contender: Contender, port: int, process: subprocess.Popen[bytes], output: Path
) -> None:
    """Ask until the first good answer to a chat request has come through it."""
    deadline = time.monotonic() + contender.patience
    _, request = work.Requests(f"{HOST}:{port}", 0, texts=1).next()
    said = b""  # the last answer
    while not said.startswith(b"HTTP/1.1 200"):
        if process.poll() is not None or time.monotonic() > deadline:
            last = said[:500].decode("utf-8", "replace")
            raise Failed(f"{contender.name} does not answer: {last} {tail(output)}")
        time.sleep(0.002)
        said = _ask(port, request)


def _ask(port: int, request: bytes) -> bytes:
    """The answer to one request, as it came; nothing where none came."""
    said = b""
    try:
        with socket.create_connection((HOST, port), timeout=5) as sock:
            sock.sendall(request)
            while read(said) is None:
                piece = sock.recv(1 << 16)
                if not piece:
                    break
                said += piece
    except (OSError, Broken):
        return b""
    return said
