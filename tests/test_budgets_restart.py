"""A budget over a restart: what the ledger holds of its window is spent already."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kit import RawBackend, RawClient, chat, json_answer, proxy
from .kit_proxy import Proxy
from .test_inference_route import SAID


def spent(running: Proxy) -> dict[str, float]:
    gauges = running.app.budgets.gauges()
    return {g.labels[0][1]: g.value for g in gauges if g.name == "budget_spent_usd"}


async def test_budget_when_the_proxy_begins_anew_goes_on_from_what_the_last_one_spent(
    tmp_path: Path,
) -> None:
    options = {
        "ledger": {"path": str(tmp_path / "beacon.db"), "flush_interval": 0.02},
        "budgets": [
            {"name": "all", "per": "month", "usd": 1000},
            {"name": "here", "scope": "backend:b0", "per": "month", "usd": 1000},
            {"name": "there", "scope": "backend:b1", "per": "month", "usd": 1000},
        ],
    }
    async with RawBackend(json_answer(SAID)) as backend:
        rows = [{"url": backend, "price_per_second": 1.0}, {"url": backend, "pool": "baseline"}]
        async with proxy(*rows, **options) as p, RawClient(p.port) as client:
            for _ in range(5):
                assert (await client.ask(chat())).status == 200
            before = spent(p)
        async with proxy(*rows, **options) as p:
            after = spent(p)
    assert before["all"] == before["here"] > 0
    assert after == pytest.approx(before)


async def test_budget_when_the_ledger_cannot_be_read_serves_and_tells(tmp_path: Path) -> None:
    path = tmp_path / "beacon.db"
    path.write_bytes(b"no database at all" * 100)
    options = {"ledger": {"path": str(path)}, "budgets": [{"name": "b", "per": "day", "usd": 1}]}
    async with (
        RawBackend(json_answer(SAID)) as backend,
        proxy(backend, **options) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        assert len(p.events("budget.forgot")) == 1
