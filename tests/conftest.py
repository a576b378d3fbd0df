"""What holds for every test: production's event loop, and no word to any host but this one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import uvloop

# Before any client is imported: litellm fetches a price table at import unless told not to, and
# httpx sends even loopback requests through a proxy that the environment names.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every coroutine test on uvloop, as `beacon-proxy serve` does."""
    return {"uvloop": uvloop.new_event_loop}
