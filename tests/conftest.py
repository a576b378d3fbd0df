"""What holds for every test: production's event loop, no word to any host but this one, and that
neither the garbage of imports nor the dice of Hypothesis decide how it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import pytest
import uvloop
from hypothesis import HealthCheck, settings

# Before any client is imported: litellm fetches a price table at import unless told not to, and
# httpx sends even loopback requests through a proxy that the environment names.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"


# The same examples in each run, and none that fails for having been slow: how slow decides the
# machine. `--hypothesis-profile=default --hypothesis-seed=random` looks for new ones.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Keep all that was imported out of the collector's sight.

    It is 600 000 objects, and to look through them stops the loop for a third of a second, on a
    busy machine for seconds: then every limit of a test that is under way has passed.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


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
