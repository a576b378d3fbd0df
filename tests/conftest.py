"""What holds for every test: production's event loop, and no word to any host but this one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import pytest
import uvloop

# Before any client is imported: litellm fetches a price table at import unless told not to, and
# httpx sends even loopback requests through a proxy that the environment names.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every coroutine test on uvloop, as `beacon-proxy serve` does."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def mid_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let now be the middle of a minute, hour, day and month of the budgets, whenever that is.

    Else a test of a whole proxy, which goes by the real time, may spend in one window and look in
    the next.
    """
    from beacon_proxy.spending import accounts

    window = accounts.window
    ahead = datetime(2026, 3, 15, 12, 30, 30, tzinfo=UTC).timestamp() - time.time()  # s

    def shifted(per: str, unix: float) -> tuple[float, float]:
        begun, ends = window(per, unix + ahead)
        return begun - ahead, ends - ahead

    monkeypatch.setattr(accounts, "window", shifted)
