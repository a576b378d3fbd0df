"""docs/costs.md: what it says of columns, keys and gauges is so, and its examples work."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from beacon_proxy.config import Settings
from beacon_proxy.contracts import Fault, Stage, Usage, Verdict
from beacon_proxy.ledger import BY
from beacon_proxy.ledger.reports import COLUMNS
from beacon_proxy.ledger.writer import MAX_ROWS

from .test_ledger import Running, Site, an_exchange, read, whole

PAGE = (Path(__file__).parent.parent / "docs" / "costs.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose head begins with `heading`, less that and the rule."""
    lines = PAGE.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    site = Site(tmp_path / "beacon.db")
    site.unix.now = 4e9  # far ahead: within the last day whenever this runs
    site.attempt(an_exchange("e1"), verdict=Verdict.STRIKE, stage=Stage.STREAM, fault=Fault.CLOSED)
    site.attempt(an_exchange("e1", model="m"), number=2, cold_start=0.5, usage=Usage(1, 2))
    site.ledger.turn()
    site.ledger.close()
    return site.path


def test_columns_are_those_of_the_table(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        found = connection.execute("PRAGMA table_info(attempts)").fetchall()
    there = {
        name: kind if required or key else f"{kind} or NULL"
        for _, name, kind, required, _, key in found
    }
    said = {names(cells[0])[0]: cells[1] for cells in table("column | type")}
    assert said == there


def test_keys_are_those_of_a_report() -> None:
    assert [name for cells in table("key (JSON, CSV)") for name in names(cells[0])] == [
        name for name in COLUMNS if name != "rent_usd_per_hour"
    ]


def test_ways_to_group_are_those_that_there_are() -> None:
    assert f"`--by {'|'.join(BY)}`" in PAGE


def test_gauges_are_those_that_there_are(tmp_path: Path) -> None:
    site = Site(tmp_path / "beacon.db")
    assert [names(cells[0])[0] for cells in table("in `/metrics`")] == [
        f"beacon_{gauge.name}" + "_total" * gauge.counts for gauge in site.ledger.gauges()
    ]


def test_bound_is_the_one_in_force() -> None:
    assert f"{MAX_ROWS:,}".replace(",", " ") + " attempts wait in memory" in PAGE


def test_configuration_is_the_default() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert Settings.model_validate(yaml.safe_load(text)).ledger == Settings().ledger


@pytest.mark.parametrize("query", QUERIES)
def test_query_runs_and_finds_something(query: str, ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        rows = connection.execute(query).fetchall()
    assert rows
    assert None not in rows[0]


async def test_copy_while_a_proxy_writes_is_whole_and_it_goes_on(tmp_path: Path) -> None:
    """VACUUM INTO as the page has it; the shell's .backup is the call that Python has, too."""
    (vacuum,) = re.findall(r'sqlite3 beacon\.db "(VACUUM INTO .*)"', PAGE)
    async with Running(tmp_path / "beacon.db") as running:
        for name in ("september.db", "october.db"):
            for _ in range(500):
                running.attempt(name)
            assert await asyncio.to_thread(running.ledger.flush, 10.0)
            running.attempt("meanwhile")
            with closing(sqlite3.connect(running.path, timeout=5)) as connection:
                if name == "september.db":
                    connection.execute(vacuum.replace(name, f"{tmp_path}/{name}"))
                else:
                    with closing(sqlite3.connect(tmp_path / name)) as copy:
                        connection.backup(copy)
        assert await asyncio.to_thread(running.ledger.flush, 10.0)
        assert len(read(running.path, "id")) == 1_002
    for name, least in (("september.db", 500), ("october.db", 1_001)):
        assert whole(tmp_path / name)
        assert least <= len(read(tmp_path / name, "id")) <= least + 1
    assert running.events == []


def test_queries_are_found() -> None:
    assert len(QUERIES) == 5
