"""Runs the work against a proxy in a process of its own, and makes figures of what that counted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from tests.kit import eventually

from .load import MODES, Load, Mode

ROOT = Path(__file__).parents[2]
PLACES = (  # five backends in two regions, either pool in both
    ("golem", "us-east"),
    ("golem", "us-east"),
    ("openai", "us-east"),
    ("golem", "eu-west"),
    ("openai", "eu-west"),
)
LIMIT = 30.0  # s for one count; only what hangs takes so long
REPEATS = 5


class Count(NamedTuple):
    """What one function did a unit."""

    calls: float = 0.0
    opcodes: float = 0.0
    inclusive: float = 0.0  # opcodes with those of what it calls


class Figure(NamedTuple):
    """What all functions together did a unit."""

    calls: float
    opcodes: float


class Proxy:
    """A proxy that counts, and the load on it."""

    def __init__(
        self, load: Load, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._load, self._reader, self._writer = load, reader, writer

    async def start(self) -> None:
        """Learn the port, and wait until the backends have been asked for their models."""
        self._load.port = await self.answer()
        await eventually(lambda: self._load.probed == len(PLACES), LIMIT)

    async def figure(self, mode: str) -> Figure:
        """What a unit costs, with the least work by the clock that any count had."""
        await self.warm(mode)
        work = MODES[mode]
        whole = _least([await self._counted(work, work.units) for _ in range(REPEATS)])
        rest = _least([await self._counted(work, work.base) for _ in range(REPEATS)])
        units = work.units - work.base
        return Figure((whole.calls - rest.calls) / units, (whole.opcodes - rest.opcodes) / units)

    async def warm(self, mode: str) -> None:
        """Count once for nothing: what happens only once is then done.

        From Python 3.12 on that includes the first call of each function: its bytecode is made to
        be counted while it runs, and seen from the second call on.
        """
        await self._counted(MODES[mode], MODES[mode].units)

    async def count(self, mode: str) -> dict[str, Count]:
        """Count once; what a unit costs, by function."""
        work = MODES[mode]
        whole = await self._counted(work, work.units)
        rest = await self._counted(work, work.base)
        units = work.units - work.base
        none = Count()
        return {
            name: Count(
                *((a - b) / units for a, b in zip(count, rest.get(name, none), strict=True))
            )
            for name, count in whole.items()
        }

    async def seconds(self, mode: str) -> dict[str, float]:
        """Own seconds a unit by function, of several runs the least; cProfile's work is in them."""
        work = MODES[mode]
        least: dict[str, float] = {}
        for _ in range(REPEATS):
            await self._tell("time")
            await self._work(work, work.units)
            spent: dict[str, float] = {}
            for name, seconds in await self._tell("stop"):
                spent[name] = spent.get(name, 0.0) + seconds / work.units
            least = {name: min(s, least.get(name, s)) for name, s in spent.items()}
        return least

    async def _counted(self, work: Mode, units: int) -> dict[str, Count]:
        await self._tell("count")
        await self._work(work, units)
        counts: dict[str, Count] = {}
        for name, *found in await self._tell("stop"):  # functions may share a name
            before = counts.get(name, Count())
            counts[name] = Count(*(a + b for a, b in zip(before, found, strict=True)))
        return counts

    async def _work(self, work: Mode, units: int) -> None:
        if units:
            async with asyncio.timeout(LIMIT):
                await work.work(self._load, units)

    async def _tell(self, word: str) -> Any:
        self._writer.write(word.encode())
        return await self.answer()

    async def answer(self) -> Any:
        async with asyncio.timeout(LIMIT):
            line = await self._reader.readline()
        if not line:
            raise RuntimeError("the proxy that is counted has ended; stderr says why")
        return json.loads(line)


def _least(counts: list[dict[str, Count]]) -> Figure:
    return Figure(
        min(sum(function.calls for function in count.values()) for count in counts),
        min(sum(function.opcodes for function in count.values()) for count in counts),
    )


@asynccontextmanager
async def proxy(*middleware: dict[str, Any]) -> AsyncIterator[Proxy]:
    """Run the proxy; `middleware` stands in its chain behind the default one's."""
    ours, theirs = socket.socketpair()
    unread, log = _stalled()
    async with aclosing(Load()) as load:
        with theirs, log:
            spec = json.dumps(document(await load.listen(len(PLACES)), middleware))
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.counted.proxy", str(theirs.fileno()), spec),
                pass_fds=[theirs.fileno()],
                stdout=log,
                cwd=ROOT,
                env=_environment(),
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        try:
            running = Proxy(load, reader, writer)
            await running.start()
            yield running
        finally:
            writer.close()  # which ends it
            unread.close()
            await _ended(child)


async def _ended(child: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(child.wait(), 5)
    except TimeoutError:
        child.kill()
        await child.wait()
        raise


def _stalled() -> tuple[FileIO, FileIO]:
    """A pipe for the access log, full already, and the end at which nobody reads.

    The thread that writes the log hangs on it, so the loop never has to wake that thread; how often
    it had to would depend on the clock.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while os.write(writer, bytes(size)):
                pass
    os.set_blocking(writer, True)
    return FileIO(reader), FileIO(writer, "w")


def document(urls: list[str], middleware: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """The default configuration before these backends."""
    rows = [
        {"name": f"b{number}", "provider": provider, "url": url, "region": region}
        for number, (url, (provider, region)) in enumerate(zip(urls, PLACES, strict=True))
    ]
    for row in rows:
        if row["provider"] == "golem":
            row["kind"] = "openai"  # else it is asked what it is, beside the work that is counted
    chosen: dict[str, Any] = {"server": {"host": "127.0.0.1", "port": 0}, "backends": rows}
    if middleware:
        default = ("health", "region", "cost", "capacity", "failover")
        chosen["middleware"] = [*default, *middleware]
    return chosen


def _environment() -> dict[str, str]:
    """This one's, without what makes Python itself work differently."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
