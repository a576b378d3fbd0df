"""Runs the load against the proxy's process and makes figures of what that counted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .load import LIMIT, Backends, Client

ROOT = Path(__file__).parents[2]
PLACES = (  # five backends in two regions, both pools in each
    ("golem", "us-east"),
    ("golem", "us-east"),
    ("openai", "us-east"),
    ("golem", "eu-west"),
    ("openai", "eu-west"),
)


class Count(NamedTuple):
    """What one function did, or all together."""

    calls: float
    opcodes: float
    inclusive: float  # opcodes with those of what it calls

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(self, other, strict=True)))

    def __truediv__(self, n: int) -> Count:
        return Count(*(a / n for a in self))


NOTHING = Count(0, 0, 0)
Counted = dict[str, Count]  # by function


class Mode(NamedTuple):
    """A kind of work, and how much of it makes a count."""

    unit: str  # what its figures are of
    units: int
    base: int | None = None  # units that are taken off, of a work that has more to it than units


MODES = {
    "json": Mode("request", 20),
    "connect": Mode("request and connection", 20),
    "exchange": Mode("streamed exchange", 20),
    "token": Mode("token", 100, base=0),
    "upload": Mode("piece of 16 KiB", 20, base=1),
}


class Proxy:
    """The proxy's process, and the load beside it."""

    def __init__(self, control: socket.socket, backends: Backends) -> None:
        self._control = control
        self._file = control.makefile()
        self.client = Client(json.loads(self._file.readline()), backends)

    def warm(self, mode: str) -> None:
        """Do the work once, uncounted: what happens only once is then done."""
        self._work(mode, MODES[mode].units)

    def count(self, mode: str) -> Counted:
        """What one unit costs, by function."""
        _, units, base = MODES[mode]
        whole = self._count(mode, units)
        without = self._count(mode, base)
        return {
            name: (count - without.get(name, NOTHING)) / (units - (base or 0))
            for name, count in whole.items()
        }

    def seconds(self, mode: str) -> dict[str, float]:
        """Own seconds a unit, by function; cProfile's, whose own work is in them."""
        units = MODES[mode].units
        self._tell("time")
        self._work(mode, units)
        rows: list[tuple[str, float]] = self._tell("stop")["seconds"]
        return {name: seconds / units for name, seconds in rows}

    def _count(self, mode: str, units: int | None) -> Counted:
        self._tell("count")
        self._work(mode, units)
        rows = self._tell("stop")["functions"]
        return {name: Count(*counts) for name, *counts in rows}

    def _work(self, mode: str, units: int | None) -> None:
        if units is not None:
            getattr(self.client, mode)(units)

    def _tell(self, word: str) -> Any:
        self._control.sendall(word.encode())
        return json.loads(self._file.readline())


def document(urls: list[str]) -> dict[str, Any]:
    """The default configuration before these backends."""
    rows = [
        {"name": f"b{number}", "provider": provider, "url": url, "region": region}
        for number, (url, (provider, region)) in enumerate(zip(urls, PLACES, strict=True))
    ]
    return {"server": {"host": "127.0.0.1", "port": 0, "region": "us-east"}, "backends": rows}


@contextmanager
def proxy() -> Iterator[Proxy]:
    """Start the proxy, and end it at the end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT)
    with Backends(len(PLACES)) as backends, ours, theirs:
        spec = json.dumps(document(backends.urls))
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.counted.proxy", str(theirs.fileno()), spec],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        try:
            running = Proxy(ours, backends)
            for _ in PLACES:
                backends.probed.acquire(timeout=LIMIT)
            yield running
            running.client.close()
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            try:
                child.wait(LIMIT)
            finally:
                child.kill()
