"""Real backends for the tests: llama.cpp's own server with SmolLM2-135M, in processes of their own.

A test module says `pytest_plugins = ["tests.real"]` and asks for `llama` (one server for the whole
run, never killed) or `spawn` (one that the test may kill). Nothing here plays a backend.
PYTEST_DONT_REWRITE: the module is a plugin and is imported before pytest could rewrite its asserts.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.request import urlopen

import aiohttp
import pytest

from beacon_proxy.demo.backend import MODEL, Child, Options, Unavailable, find_model

from .kit import Proxy

__all__ = ["MODEL", "Child", "Spawn", "idle", "row", "slots_busy", "stopped", "working"]

Spawn = Callable[..., Child]


def _fits() -> bool:
    return sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


@pytest.fixture(scope="session")
def model_file() -> str:
    try:
        return find_model()
    except Unavailable as why:
        if _fits():
            raise  # `make test` installs it here, so that is a fault
        pytest.skip(f"no llama.cpp wheel for {sys.platform} {platform.machine()}: {why}")


@pytest.fixture(scope="session")
def llama(model_file: str) -> Iterator[Child]:
    """A server that answers the same request always the same, so that two ways compare."""
    options = Options(model_file, slots=2, embeddings=True, prompt_cache=False)
    child = Child.spawn(options)
    try:
        child.wait_ready()
        yield child
    finally:
        child.stop()


@pytest.fixture(autouse=True)
def rested(request: pytest.FixtureRequest) -> None:
    """The server is idle as a test begins: one before may have left it some work.

    A document that nobody waits for any more is written to its end.
    """
    if "llama" not in request.fixturenames:
        return
    child: Child = request.getfixturevalue("llama")
    deadline = time.monotonic() + 60.0
    while _busy(json.loads(urlopen(f"{child.llama_url}/slots", timeout=60).read())):
        assert time.monotonic() < deadline, "llama.cpp still works for a test that is over"
        time.sleep(0.02)


@pytest.fixture
def spawn(model_file: str) -> Iterator[Spawn]:
    """`spawn(slots=…)` starts a server of the test's own; it loads while the test goes on."""
    with ExitStack() as stack:

        def start(**options: Any) -> Child:
            child = Child.spawn(Options(model_file, **options))
            stack.callback(child.stop)
            return child

        yield start


def row(child: Child, **more: Any) -> dict[str, Any]:
    """The row of beacon.yaml for llama.cpp itself, without the Ollama routes beside it."""
    return {"url": child.llama_url, "models": [MODEL], **more}


async def _slots(child: Child) -> list[dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{child.llama_url}/slots") as answer,
    ):
        slots: list[dict[str, Any]] = await answer.json()
        return slots


def _busy(slots: list[dict[str, Any]]) -> int:
    return sum(slot["is_processing"] for slot in slots)


async def slots_busy(child: Child) -> int:
    """How many requests llama.cpp itself says it is working on."""
    return _busy(await _slots(child))


async def working(child: Child) -> None:
    """Wait until the model has something to do."""
    deadline = time.monotonic() + 30.0
    while not await slots_busy(child):
        assert time.monotonic() < deadline, "nothing has come to llama.cpp"
        await asyncio.sleep(0.02)


async def stopped(child: Child, proxy: Proxy) -> None:
    """Wait until no model works and no permit is out; see that the last text was broken off.

    However long that takes: llama.cpp keeps of a slot whether there was a next token to come.
    """
    await idle(child, proxy)
    last = max(await _slots(child), key=lambda slot: int(slot.get("id_task", -1)))
    assert last["next_token"][0]["has_next_token"], "the model has come to its end"


async def idle(child: Child, proxy: Proxy, within: float = 6.0) -> None:
    """Wait until the model has stopped and no permit is out, no longer than `within` s.

    The 500 tokens and more that a client leaves take longer than that.
    """
    deadline = time.monotonic() + within
    while proxy.in_flight() or await slots_busy(child):
        assert time.monotonic() < deadline, "llama.cpp still works for a client that left"
        await asyncio.sleep(0.02)
