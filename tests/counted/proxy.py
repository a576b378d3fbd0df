"""The proxy's own process: the whole App, and a counter in the thread of its loop.

It is told what to do by lines over a socket that it inherits: `count` begins a count, `time` one of
seconds, `stop` ends either and answers with what was found, as JSON.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType, ModuleType
from typing import Any

import uvloop

from beacon_proxy.app import App
from beacon_proxy.config import load_settings
from beacon_proxy.plugins import Plugins
from tests.kit_proxy import plugins, written

from .dear import Dear

HOPS = 50  # turns of the loop until nothing is left to do


class Counter:
    """Counts by function what the thread that starts it does."""

    def __init__(self) -> None:
        self._python: dict[CodeType, list[int]] = {}  # calls, opcodes, opcodes with callees
        self._builtin: dict[str, int] = {}
        self._tracers: dict[CodeType, Callable[..., Any]] = {}
        self._opcodes = 0
        self._entered: list[int] = []  # opcodes before each frame that runs

    def start(self) -> None:
        sys.setprofile(self._profile)
        sys.settrace(self._trace)

    def stop(self) -> list[Any]:
        """By function: name, calls, opcodes, opcodes with those of what it calls."""
        sys.settrace(None)
        sys.setprofile(None)
        rows = [(_name(code), *counts) for code, counts in self._python.items()]
        return [*rows, *((name, calls, 0, 0) for name, calls in self._builtin.items())]

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        code = frame.f_code
        tracer = self._tracers.get(code)
        if tracer is None:
            tracer = self._tracers[code] = self._tracer(code)
        self._python[code][0] += 1
        self._entered.append(self._opcodes)
        return tracer

    def _tracer(self, code: CodeType) -> Callable[..., Any]:
        counts = self._python[code] = [0, 0, 0]

        def tracer(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            if event == "opcode":
                self._opcodes += 1
                counts[1] += 1
            elif event == "return":  # or yield, or an exception that leaves
                counts[2] += self._opcodes - self._entered.pop()
            return tracer

        return tracer

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            name = _builtin_name(arg)
            self._builtin[name] = self._builtin.get(name, 0) + 1


class Timer:
    """Seconds by function, as cProfile sees them."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile()

    def start(self) -> None:
        self._profile.enable()

    def stop(self) -> list[Any]:
        """By function: name, own seconds."""
        self._profile.disable()
        return [(_name(row.code), row.inlinetime) for row in self._profile.getstats()]


def _name(code: CodeType | str) -> str:
    if isinstance(code, str):
        return code
    if code.co_filename == "<string>":
        # Made by dataclass, and all of one name: their fields tell them apart.
        return f"{code.co_name}({', '.join(code.co_varnames[:4])}, …)"
    path = Path(code.co_filename)
    for base in sorted(sys.path, key=len, reverse=True):
        if base and path.is_relative_to(base):
            path = path.relative_to(base)
            break
    return f"{path}:{code.co_firstlineno} {code.co_qualname}"


def _builtin_name(function: Any) -> str:
    """The name that cProfile has for it."""
    owner, name = getattr(function, "__self__", None), function.__name__
    if owner is None or isinstance(owner, ModuleType):
        return f"<built-in method {function.__module__}.{name}>"
    method = getattr(type(owner), name, None)
    return f"<built-in method {name}>" if method is None else repr(method)


class Control:
    """Carries out what the socket says."""

    def __init__(self, sock: socket.socket, ended: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._ended = ended
        self._counter: Counter | Timer | None = None
        self._loop.add_reader(sock, self._told)

    def _told(self) -> None:
        word = self._sock.recv(16).strip()
        if not word:
            self._loop.remove_reader(self._sock)
            self._ended.set()
            return
        self._settle(HOPS, {b"count": self._count, b"time": self._time, b"stop": self._stop}[word])

    def _settle(self, hops: int, then: Callable[[], None]) -> None:
        if hops:
            self._loop.call_soon(self._settle, hops - 1, then)
        else:
            then()

    def _count(self) -> None:
        self._start(Counter())

    def _time(self) -> None:
        self._start(Timer())

    def _start(self, counter: Counter | Timer) -> None:
        self._counter = counter
        self._sock.sendall(b"{}\n")
        counter.start()

    def _stop(self) -> None:
        assert self._counter is not None
        self._sock.sendall(json.dumps(self._counter.stop()).encode() + b"\n")


def _plugins() -> Plugins:
    found = plugins()
    return Plugins(found.providers, {**found.middleware, "dear": Dear})


async def _serve(document: dict[str, Any], control: socket.socket, folder: str) -> None:
    # As by default, but for the place, and for the interval: in one so long the loop never has to
    # wake the ledger's thread; how often it had to would depend on the clock.
    ledger = {"path": str(Path(folder, "beacon.db")), "flush_interval": 3600}
    with written({**document, "ledger": ledger}) as path:
        settings = load_settings(path, {}, _plugins())
    app = App(settings, _plugins(), env={})
    await app.start()
    ended = asyncio.Event()
    control.sendall(json.dumps(app.port).encode() + b"\n")
    Control(control, ended)
    await ended.wait()
    await app.stop(0)


if __name__ == "__main__":
    with (
        TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        control = socket.socket(fileno=int(sys.argv[1]))
        runner.run(_serve(json.loads(sys.argv[2]), control, folder))
