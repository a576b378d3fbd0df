"""A budget over a restart: what the ledger holds of its window is spent already."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy import remembering
from beacon_proxy.ledger import LedgerError
from beacon_proxy.ledger.reading import reading
from beacon_proxy.ledger.schema import prepare
from beacon_proxy.ledger.store import Store
from beacon_proxy.spending.budgets import Budgets

from .kit import RawBackend, RawClient, chat, eventually, json_answer, proxy
from .kit_proxy import Proxy
from .test_budgets import Terms
from .test_inference_route import SAID
from .test_ledger_schema import of_version_1

pytestmark = pytest.mark.usefixtures("mid_window")


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


PAST = 0.125  # USD that is in the ledger of `a_past`


def a_past(path: Path) -> Path:
    with closing(Store(path)) as store:
        where = ("b0", "openai", "us-east", "baseline", "m", "/v1/x", 0)
        took = (200, "good", "done", 1.0, 1.0, 0.5, 1, 1, 0)
        store.write([(time.time(), "past", 1, *where, *took, PAST, 0.0)])
    return path


async def test_budget_when_the_proxy_is_a_newer_version_goes_on_from_the_older_ones_ledger(
    tmp_path: Path,
) -> None:
    """What was spent is asked before the ledger's file is opened to be written, and brought up."""
    old = of_version_1(tmp_path / "beacon.db")
    async with (
        RawBackend(json_answer(SAID)) as backend,
        proxy({"url": backend, "price_per_second": 1.0}, **windows(old)) as p,
        RawClient(p.port) as client,
    ):
        assert spent(p) == {"hour": 0.25, "month": 0.25}
        assert (await client.ask(chat())).status == 200
        assert spent(p)["month"] > 0.25
    with reading(old) as connection:
        assert connection.execute("SELECT count(*) FROM attempts").fetchone() == (2,)


class Held:
    """The reading of a large ledger on a slow disk, which takes as long as a test wants.

    Nothing is known before `begins` is set, and nothing but the shortest window before `goes_on`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begins, self.goes_on, self.over = (threading.Event() for _ in range(3))
        self._known = remembering.spent_since
        monkeypatch.setattr(remembering, "spent_since", self._held)
        monkeypatch.setattr(remembering, "_WAITS", 0.0)

    def _held(self, *given: Any, **options: Any) -> Iterator[Any]:
        try:
            assert self.begins.wait(20)
            for each in self._known(*given, **options):
                yield each
                assert self.goes_on.wait(20)
        finally:
            self.over.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.begins.set()
    made.goes_on.set()
    assert made.over.wait(20)


def windows(path: Path) -> dict[str, Any]:
    return {
        "ledger": {"path": str(path), "flush_interval": 0.01},
        "budgets": [{"name": per, "per": per, "usd": 1000} for per in ("hour", "month")],
    }


async def test_budget_when_the_ledger_takes_long_serves_and_counts_each_once(
    tmp_path: Path, held: Held
) -> None:
    """What this process spends, and has written, before the past is known is no past."""
    path = a_past(tmp_path / "beacon.db")
    async with RawBackend(json_answer(SAID)) as backend:
        row = {"url": backend, "price_per_second": 1.0}
        async with proxy(row, **windows(path)) as p, RawClient(p.port) as client:
            (told,) = p.events("budget.restoring")
            assert sorted(told["budgets"]) == ["hour", "month"]
            assert (await client.ask(chat())).status == 200
            await p.exchanges(1)
            own = spent(p)["month"]
            assert 0 < own < PAST
            assert await asyncio.to_thread(p.app._ledger.flush, 10.0)
            held.begins.set()
            await eventually(lambda: spent(p)["hour"] > PAST, 10)
            assert spent(p)["month"] == own, "the longer window is not known yet"
            assert (await client.ask(chat())).status == 200
            await p.exchanges(2)
            own = spent(p)["month"]
            assert await asyncio.to_thread(p.app._ledger.flush, 10.0)
            held.goes_on.set()
            await eventually(lambda: p.events("budget.restored"), 10)
            assert spent(p) == pytest.approx({"hour": own + PAST, "month": own + PAST})
            assert p.events("budget.forgot") == []


async def test_budget_when_the_rest_of_the_ledger_cannot_be_read_names_what_is_not_known(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_past(tmp_path / "beacon.db")
    known = held._known

    def breaks(*given: Any, **options: Any) -> Iterator[Any]:
        yield next(known(*given, **options))
        raise LedgerError("sqlite_ioerr_read", "disk I/O error")

    held._known = breaks
    held.begins.set()
    held.goes_on.set()
    async with RawBackend(json_answer(SAID)) as backend, proxy(backend, **windows(path)) as p:
        await eventually(lambda: p.events("budget.forgot"), 10)
        (told,) = p.events("budget.forgot")
        assert told["level"] == "error"
        assert told["budgets"] == ["month"]
        assert told["error"] == "not known is what they spent before: disk I/O error"
        assert spent(p) == {"hour": PAST, "month": 0.0}


async def test_stop_when_the_ledger_is_still_read_waits_for_nothing(
    tmp_path: Path, held: Held
) -> None:
    path = a_past(tmp_path / "beacon.db")
    async with RawBackend(json_answer(SAID)) as backend:
        async with proxy(backend, **windows(path)) as p:
            pass
        assert not held.over.is_set(), "the proxy has stopped, the thread still reads"
        assert [each.daemon for each in threading.enumerate() if each.name == "ledger.past"] == [
            True
        ]
        held.begins.set()
        held.goes_on.set()
        await eventually(held.over.is_set, 10)
        assert p.events("budget.restored") == p.events("budget.forgot") == []


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
        (told,) = p.events("budget.forgot")
        assert told["budgets"] == ["b"]
        assert told["error"].endswith("file is not a database")
        assert p.events("budget.restoring") == []


ALIKE = """
INSERT INTO attempts (ended_unix, exchange_id, attempt, tenant, backend, provider, region, pool,
  path, stream, verdict, stage, duration_s, billed_s, usd, expected_usd)
WITH RECURSIVE k (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i < ?2 - 1)
SELECT ?1, 'e' || i, 1, 't' || (i / 2), 'b' || (i % 3), 'golem', 'us-east', 'baseline', '/v1/x', 0,
  'good', 'done', 1.0, 1.0, 0.001 * (1 + i / 2), 0.0 FROM k"""


class Counting(Budgets):
    """Notes how much each step brings, and in which turn of the loop it is."""

    def __init__(self) -> None:
        places = Terms("all"), Terms("b1", "backend:b1")
        tenants = Terms("each", "tenant"), Terms("month", "tenant", "month")
        super().__init__([*places, *tenants], lambda *_: 0.0)
        self.turn = 0
        self.steps: list[tuple[float, int, int]] = []  # window, turn, sums

    def restore(self, since_unix: float, places: Any = (), tenants: Any = ()) -> None:
        self.steps.append((since_unix, self.turn, len(places) + len(tenants)))
        super().restore(since_unix, places, tenants)


async def test_budget_when_clients_made_up_many_tenants_takes_them_over_in_small_steps(
    tmp_path: Path,
) -> None:
    """What the loop does is bounded by the tenants that are remembered, not by those there were."""
    path, tenants, most = tmp_path / "beacon.db", 12_000, 10_000
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        prepare(file)
        file.execute(ALIKE, (time.time(), 2 * tenants))
    budgets = Counting()

    async def turning() -> None:
        while True:
            budgets.turn += 1
            await asyncio.sleep(0)

    told: list[str] = []
    known = remembering.Remembering(
        str(path), budgets, unix=time.time, notify=lambda event, /, **_: told.append(event)
    )
    turns = asyncio.create_task(turning())
    await known.begin()
    await eventually(known._ended.is_set, 20)
    turns.cancel()
    assert "budget.forgot" not in told

    windows = budgets.windows()
    for since in windows:
        sums = [count for window, _, count in budgets.steps if window == since]
        assert max(sums) <= 500
        assert most < sum(sums) <= most + 3
    in_turns = [turn for _, turn, _ in budgets.steps]
    assert len(set(in_turns)) == len(in_turns), "others had their turn between any two"

    all_usd = sum(2 * 0.001 * (1 + n) for n in range(tenants))
    spent = {g.labels[0][1]: g.value for g in budgets.gauges() if g.name == "budget_spent_usd"}
    assert spent["all"] == pytest.approx(all_usd)
    assert spent["b1"] == pytest.approx(sum(0.001 * (1 + i // 2) for i in range(1, 24_000, 3)))
    assert spent["each"] == spent["month"] == pytest.approx(2 * 0.001 * tenants)
    for each in budgets._budgets[2:]:
        for n in (tenants - most, tenants - 1):
            assert each.look(f"t{n}").spent == pytest.approx(2 * 0.001 * (1 + n))
        assert each.look(f"t{tenants - most - 1}").spent == 0.0
