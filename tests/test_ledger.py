"""The ledger as it is written: what a row says, and what happens when the file will not have it."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import sqlite3
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import (
    Backend,
    Exchange,
    Fault,
    Outcome,
    Stage,
    Usage,
    Verdict,
)
from beacon_proxy.ledger import Ledger, LedgerError
from beacon_proxy.ledger import store as store_module
from beacon_proxy.ledger import writer as writer_module
from beacon_proxy.ledger.rows import COLUMNS, RARE, Rows
from beacon_proxy.ledger.schema import STEPS
from beacon_proxy.ledger.store import Store

from .kit import eventually

NOBODY: Any = None  # a fleet; the ledger does not look at it
DAY = 86_400.0
HERE = Backend("golem-1", "golem", "http://h", "http", "h", 80, region="us-east", pool="baseline")


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Site:
    """A ledger without its thread: a test takes the turns."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.clock, self.unix = Clock(1_000.0), Clock(1_700_001_000.0)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ledger = Ledger(
            path,
            flush_interval=0.25,
            retention_days=90,
            notify=lambda event, /, **fields: self.events.append((event, fields)),
            clock=self.clock,
            unix=self.unix,
            **options,
        )

    def attempt(self, exchange: Exchange | None = None, **fields: Any) -> None:
        self.ledger.observe(exchange or an_exchange(), an_outcome(**fields))

    def pass_by(self, seconds: float) -> None:
        self.clock.now += seconds
        self.unix.now += seconds

    def rows(self, *columns: str) -> list[Any]:
        return read(self.path, *columns)

    def told(self) -> list[str]:
        return [event if event == "ledger.recovered" else f["kind"] for event, f in self.events]

    def gauge(self, name: str) -> float:
        return {gauge.name: gauge.value for gauge in self.ledger.gauges()}[f"ledger_{name}"]


def read(path: Path, *columns: str) -> list[Any]:
    """Tuples of these columns, or plain values of a single one, in the order of the file."""
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        query = f"SELECT {', '.join(columns)} FROM attempts ORDER BY id"
        found = connection.execute(query).fetchall()
    return [row[0] for row in found] if len(columns) == 1 else found


def whole(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def an_exchange(name: str = "e1", **fields: Any) -> Exchange:
    return Exchange(name, "POST", b"/v1/x?a=b", "/v1/x", (), 990.0, **fields)


def an_outcome(**fields: Any) -> Outcome:
    made: dict[str, Any] = {
        "backend": HERE,
        "number": 1,
        "verdict": Verdict.GOOD,
        "stage": Stage.DONE,
        "status": 200,
        "started": 995.0,
        "duration": 2.0,
        "billed": 1.5,
        "ttft": 0.25,
        "usage": Usage(12, 34),
        "usd": 0.00015,
        "expected_usd": 0.0002,
        **fields,
    }
    return Outcome(**made)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "beacon.db")
    yield made
    made.ledger.close()


# -- what a row says -----------------------------------------------------------------------------


def test_row_holds_what_is_known_of_the_attempt(site: Site) -> None:
    exchange = an_exchange(
        "id-7", model="Llama3.2:1b", trace_id="t-1", tenant="abc", stream=True, body=b"secret"
    )
    site.attempt(exchange, number=2, cold_start=0.75, usage=Usage(3, 4, estimated=True))
    site.ledger.turn()
    with closing(sqlite3.connect(site.path)) as connection:
        connection.row_factory = sqlite3.Row
        (row,) = connection.execute("SELECT * FROM attempts")
    assert dict(row) == {
        "id": 1,
        "ended_unix": 1_699_999_997.0 + 1_000.0,
        "exchange_id": "id-7",
        "attempt": 2,
        "trace_id": "t-1",
        "tenant": "abc",
        "backend": "golem-1",
        "provider": "golem",
        "region": "us-east",
        "pool": "baseline",
        "model": "llama3.2-1b",
        "path": "/v1/x",
        "stream": 1,
        "status": 200,
        "verdict": "good",
        "stage": "done",
        "fault": None,
        "duration_s": 2.0,
        "billed_s": 1.5,
        "ttft_s": 0.25,
        "cold_start_s": 0.75,
        "tokens_in": 3,
        "tokens_out": 4,
        "tokens_estimated": 1,
        "tokens_cached": None,
        "tokens_cache_written": None,
        "usd": 0.00015,
        "expected_usd": 0.0002,
    }


@pytest.mark.parametrize("rare", [{}, {"fault": Fault.CLOSED}])
@pytest.mark.parametrize(
    ("cached", "written", "there"),
    [(30, 2, (30, 2)), (30, 0, (30, None)), (0, 2, (None, 2)), (0, 0, (None, None))],
)
def test_row_of_a_cached_prompt_holds_its_parts_and_no_zero(
    site: Site,
    cached: int,
    written: int,
    there: tuple[int | None, int | None],
    rare: dict[str, Any],
) -> None:
    site.attempt(
        an_exchange(model="m"), usage=Usage(33, 4, cached=cached, cache_written=written), **rare
    )
    site.ledger.turn()
    names = ("tokens_in", "tokens_cached", "tokens_cache_written")
    assert site.rows(*names) == [(33, *there)]


def test_row_of_a_prompt_without_a_cache_is_no_longer_than_before() -> None:
    """What is rare is not written, nor looked at for NULL, in the row of a usual attempt."""
    given = [
        ("e", None, None, "m", "/v1/x", False, an_outcome(usage=usage))
        for usage in (Usage(12, 34), Usage(12, 34, cached=1), Usage(12, 34, cache_written=1))
    ]
    usual, cached, written = Rows().of(given, 0.0)
    assert len(usual) == len(COLUMNS) == 21
    assert len(cached) == len(written) == len(COLUMNS) + len(RARE)


def test_row_when_something_is_not_known_has_null_there_and_no_zero(site: Site) -> None:
    """Both ways that a row is written: with one of the rare values, and without."""
    unknown = {"status": None, "ttft": None, "usage": None, "usd": 0.0, "billed": 0.0}
    site.attempt(**unknown)
    refused = {"verdict": Verdict.STRIKE, "stage": Stage.CONNECT, "fault": Fault.REFUSED}
    site.attempt(**unknown, **refused)
    site.ledger.turn()
    names = ("trace_id", "tenant", "model", "status", "ttft_s", "cold_start_s", "tokens_in")
    more = ("tokens_out", "tokens_estimated", "fault", "verdict", "stage", "usd")
    assert site.rows(*names, *more) == [
        (*[None] * 9, None, "good", "done", 0.0),
        (*[None] * 9, "refused", "strike", "connect", 0.0),
    ]


def test_row_when_a_client_makes_up_long_text_is_cut(site: Site) -> None:
    long = "x" * 5000
    site.attempt(
        Exchange("e", "GET", b"/", "/" + long, (), 0.0, model=long), verdict=Verdict.CALLER
    )
    site.ledger.turn()
    ((model, path),) = site.rows("model", "path")
    assert (len(model), len(path)) == (128, 128)


def test_row_when_no_number_of_sqlite_holds_it_is_mended_and_costs_no_other_row(
    site: Site,
) -> None:
    """A backend that counts 2**70 tokens must not keep every later row out of the file."""
    one = an_exchange(model="m")
    site.attempt(one)
    site.attempt(one, usage=Usage(2**70, 5), usd=math.nan, expected_usd=-math.inf)
    site.attempt(an_exchange(model="lone \ud800 surrogate"))
    site.attempt(one)
    site.ledger.turn()
    assert site.rows("tokens_in", "tokens_out", "usd", "expected_usd", "model") == [
        (12, 34, 0.00015, 0.0002, "m"),
        (2**63 - 1, 5, 0.0, 0.0, "m"),
        (12, 34, 0.00015, 0.0002, "lone ? surrogate"),
        (12, 34, 0.00015, 0.0002, "m"),
    ]
    assert site.ledger.lost == 0
    assert site.events == []


def test_row_when_a_sum_would_be_infinite_is_mended(site: Site) -> None:
    """SQLite takes an infinite number, and no sum over it would ever say anything again."""
    site.attempt(usd=math.inf, billed=math.inf)
    site.ledger.turn()
    assert site.rows("usd", "billed_s") == [(0.0, 0.0)]


def test_row_with_a_number_of_another_kind_is_written_as_that_number(site: Site) -> None:
    site.attempt(cold_start=Decimal("1.5"))
    site.attempt(ttft=Fraction(1, 8), cold_start=Decimal("nan"))
    site.ledger.turn()
    assert site.rows("cold_start_s", "ttft_s") == [(1.5, 0.25), (0.0, 0.125)]
    assert (site.events, site.ledger.lost) == ([], 0)


def test_row_that_cannot_be_written_is_left_out_counted_and_told_and_no_other_is(
    site: Site,
) -> None:
    """One odd value of some plugin once kept every later row out of the file."""
    for n in range(300):
        odd = {100: {"cold_start": object()}, 150: {"usd": "dear"}, 200: {"ttft": b"x"}}
        site.attempt(an_exchange(str(n)), **odd.get(n, {}))
    site.ledger.turn()
    site.attempt(an_exchange("300"))
    site.ledger.turn()
    left = sorted({*range(301)} - {100, 150, 200})
    assert sorted(map(int, site.rows("exchange_id"))) == left
    assert (site.ledger.lost, site.ledger.waiting, site.gauge("healthy")) == (3, 0, 1.0)
    ((event, told),) = site.events
    assert (event, told["path"]) == ("ledger.skipped", str(site.path))
    assert told["error"].startswith("TypeError at rows.py:")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 64, 65, 137, 2001])
def test_rows_however_many_there_are_all_come_once(site: Site, count: int) -> None:
    for n in range(count):
        site.attempt(an_exchange(str(n)), fault=Fault.CLOSED if n % 3 == 0 else None)
    site.ledger.turn()
    assert sorted(map(int, site.rows("exchange_id"))) == list(range(count))
    assert (site.ledger.waiting, site.ledger.lost) == (0, 0)


def test_observe_keeps_no_exchange_for_its_body_may_be_large(site: Site) -> None:
    tracemalloc.start()
    for _ in range(50):
        site.attempt(an_exchange(body=bytes(1 << 20)))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
    site.ledger.turn()


# -- a file that cannot be written ---------------------------------------------------------------


def test_locked_file_is_told_once_a_minute_and_rows_wait_until_it_is_free(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY", 0.01)
    site.attempt(an_exchange("before"))
    site.ledger.turn()
    with closing(sqlite3.connect(site.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        site.attempt(an_exchange("meanwhile"))
        for seconds in (0.0, 10.0, 49.0):
            site.clock.now += seconds
            site.ledger.turn()
        assert site.told() == ["sqlite_busy"]
        assert site.events[0][1] == {
            "kind": "sqlite_busy",
            "error": "database is locked",
            "path": str(site.path),
            "rows_waiting": 1,
            "rows_lost": 0,
        }
        assert (site.gauge("healthy"), site.gauge("rows_waiting")) == (0.0, 1.0)
        site.clock.now += 1.0
        site.ledger.turn()
        assert site.told() == ["sqlite_busy", "sqlite_busy"]
        other.execute("COMMIT")
    site.clock.now += 2.0
    site.ledger.turn()
    assert site.rows("exchange_id") == ["before", "meanwhile"]
    assert site.events[-1] == (
        "ledger.recovered",
        {"path": str(site.path), "seconds": 62.0, "rows_lost": 0},
    )
    assert (site.gauge("healthy"), site.gauge("rows_waiting")) == (1.0, 0.0)
    assert site.gauge("last_flush_timestamp_seconds") == site.unix.now


def test_trouble_that_comes_and_goes_is_told_once_a_minute(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY", 0.0)
    site.ledger.turn()
    with closing(sqlite3.connect(site.path, isolation_level=None)) as other:
        for _ in range(20):
            site.attempt()
            other.execute("BEGIN IMMEDIATE")
            site.ledger.turn()
            other.execute("COMMIT")
            site.ledger.turn()
            site.clock.now += 2.0
    assert site.told() == ["sqlite_busy", "ledger.recovered"]
    assert len(site.rows("id")) == 20


def test_full_disk_holds_rows_up_to_the_bound_and_counts_those_beyond(tmp_path: Path) -> None:
    site = Site(tmp_path / "beacon.db", max_rows=100)
    site.ledger.turn()
    with full(site):
        for n in range(90):
            site.attempt(an_exchange(f"{n}" + "x" * 100))
        site.ledger.turn()
        for n in range(90, 150):
            site.attempt(an_exchange(f"{n}" + "x" * 100))
        site.ledger.turn()
        assert site.told() == ["sqlite_full"]
        assert (site.ledger.waiting, site.ledger.lost) == (100, 50)
        assert site.gauge("rows_lost") == 50.0
        assert site.rows("id") == []
    site.ledger.turn()
    assert [int(name.strip("x")) for name in site.rows("exchange_id")] == list(range(100))
    assert site.told() == ["sqlite_full", "ledger.recovered"]
    assert site.events[-1][1]["rows_lost"] == 50
    site.attempt()
    site.ledger.turn()
    assert (len(site.rows("id")), site.ledger.lost) == (101, 50)
    site.ledger.close()


class full:
    """SQLite's own way to have no room: no connection of the ledger may make its file longer."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        site = self._site
        site.ledger.close()
        connect = sqlite3.connect

        def bounded(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            connection.execute("PRAGMA max_page_count = 1")  # it takes what there is
            return connection

        self._patch.setattr(sqlite3, "connect", bounded)

    def __exit__(self, *_: object) -> None:
        self._site.ledger.close()
        self._patch.undo()


def test_file_that_is_deleted_under_us_is_told_and_made_anew(site: Site) -> None:
    site.attempt(an_exchange("gone with the file"))
    site.ledger.turn()
    site.path.unlink()
    site.attempt(an_exchange("kept"))
    site.ledger.turn()
    assert site.told() == ["deleted"]
    site.ledger.turn()
    assert site.told() == ["deleted", "ledger.recovered"]
    assert site.rows("exchange_id") == ["kept"]


def test_file_that_is_replaced_under_us_gets_what_waits(site: Site, tmp_path: Path) -> None:
    """And nothing of the log of the file before, which still has its name."""
    other = Site(tmp_path / "other.db")
    other.attempt(an_exchange("restored"))
    other.ledger.turn()
    other.ledger.close()
    for n in range(100):
        site.attempt(an_exchange(f"gone-{n}"))
        site.ledger.turn()
    os.replace(other.path, site.path)
    site.attempt(an_exchange("kept"))
    site.ledger.turn()
    site.ledger.turn()
    assert site.rows("exchange_id") == ["restored", "kept"]
    assert whole(site.path)


def test_file_that_is_moved_away_is_whole_where_it_is_and_another_is_begun(site: Site) -> None:
    """SQLite's log stays behind under the old name: the new file once took it for its own."""
    for n in range(3):
        site.attempt(an_exchange(str(n)))
        site.ledger.turn()
    moved = site.path.with_name("september.db")
    site.path.rename(moved)
    site.attempt(an_exchange("october"))
    site.ledger.turn()
    assert site.events[0][1]["error"].endswith("what its log holds is in september.db-wal")
    site.ledger.turn()
    assert read(moved, "exchange_id") == ["0", "1", "2"]
    assert site.rows("exchange_id") == ["october"]
    assert whole(moved)
    assert whole(site.path)


def test_file_that_is_moved_away_while_somebody_reads_it_loses_nothing(site: Site) -> None:
    """What the reader does not let the log give back to its file was lost with it."""
    site.attempt(an_exchange("0"))
    site.ledger.turn()
    with closing(sqlite3.connect(site.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM attempts").fetchone() == (1,)
        site.attempt(an_exchange("1"))
        site.ledger.turn()
        moved = site.path.with_name("september.db")
        site.path.rename(moved)
        site.attempt(an_exchange("october"))
        for _ in range(2):
            site.ledger.turn()
        assert reader.execute("SELECT count(*) FROM attempts").fetchone() == (1,)
        assert read(moved, "exchange_id") == ["0", "1"]
        assert reader.execute("SELECT count(*) FROM attempts").fetchone() == (1,)
    assert read(moved, "exchange_id") == ["0", "1"]
    assert site.rows("exchange_id") == ["october"]
    assert whole(moved)
    assert whole(site.path)


def test_file_that_is_moved_out_of_the_folder_leaves_its_log_beside_for_who_wants_it(
    site: Site,
) -> None:
    site.attempt(an_exchange("september"))
    site.ledger.turn()
    moved = site.path.parent / "archive" / "beacon.db"
    moved.parent.mkdir()
    site.path.rename(moved)
    site.attempt(an_exchange("october"))
    for _ in range(2):
        site.ledger.turn()
    (log,) = site.path.parent.glob("beacon.db-wal.*")
    assert site.events[0][1]["error"].endswith(f"what its log holds is in {log.name}")
    log.rename(f"{moved}-wal")
    assert read(moved, "exchange_id") == ["september"]
    assert site.rows("exchange_id") == ["october"]


def test_file_that_is_moved_with_all_that_belongs_to_it_is_whole_there(site: Site) -> None:
    site.attempt(an_exchange("september"))
    site.ledger.turn()
    (archive := site.path.parent / "archive").mkdir()
    for each in list(site.path.parent.glob("beacon.db*")):
        each.rename(archive / each.name)
    site.attempt(an_exchange("october"))
    for _ in range(2):
        site.ledger.turn()
    assert site.events[0][1]["error"].endswith("its log is with it")
    assert read(archive / "beacon.db", "exchange_id") == ["september"]
    assert site.rows("exchange_id") == ["october"]
    assert not list(site.path.parent.glob("*-wal.*"))


def test_file_that_is_moved_away_is_not_trimmed_under_its_new_name(site: Site) -> None:
    site.attempt(an_exchange("september"))
    site.ledger.turn()
    moved = site.path.with_name("september.db")
    site.path.rename(moved)
    site.pass_by(91 * DAY)
    for _ in range(2):
        site.ledger.turn()
    assert site.told() == ["deleted", "ledger.recovered"]
    assert read(moved, "exchange_id") == ["september"]


def test_log_that_is_left_without_its_file_is_no_other_files(tmp_path: Path) -> None:
    """Its writer died before somebody moved the file away."""
    dead, site = Site(tmp_path / "dead.db"), Site(tmp_path / "beacon.db")
    dead.attempt(an_exchange("september"))
    dead.ledger.turn()
    shutil.copy(tmp_path / "dead.db-wal", tmp_path / "beacon.db-wal")
    dead.ledger.close()
    site.attempt(an_exchange("october"))
    for _ in range(2):
        site.ledger.turn()
    assert site.rows("exchange_id") == ["october"]
    assert len(list(tmp_path.glob("beacon.db-wal.*"))) == 1
    assert site.told() == ["deleted", "ledger.recovered"]
    site.ledger.close()


def test_log_that_cannot_be_taken_away_keeps_another_file_from_being_begun(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.attempt(an_exchange("september"))
    site.ledger.turn()
    moved = site.path.with_name("september.db")
    site.path.rename(moved)
    site.attempt(an_exchange("october"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        for _ in range(3):
            site.ledger.turn()
        assert not site.path.exists()
        assert site.ledger.waiting == 1
        assert site.events[0][1]["error"].endswith("cannot be taken away: Permission denied")
    for _ in range(2):
        site.ledger.turn()
    assert read(moved, "exchange_id") == ["september"]
    assert site.rows("exchange_id") == ["october"]


# Run as a child, for SQLite's locks are those of a process: writes as many rows as it is told.
SECOND = """
import sys
from pathlib import Path
from tests.test_ledger import Site, an_exchange
site, n = Site(Path(sys.argv[1])), 0
for line in sys.stdin:
    for _ in range(int(line)):
        site.attempt(an_exchange(f"second-{n}"))
        n += 1
    while site.ledger.waiting:
        site.ledger.turn()
    print(n, flush=True)
site.ledger.close()
"""


async def test_file_that_two_write_when_it_is_moved_away_loses_and_doubles_nothing(
    site: Site,
) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SECOND, str(site.path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    written: list[str] = []

    def first() -> None:
        site.attempt(an_exchange(f"first-{len(written)}"))
        written.append(f"first-{len(written)}")
        while site.ledger.waiting:
            site.ledger.turn()

    async def second() -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"1\n")
        told = await asyncio.wait_for(child.stdout.readline(), 30)
        written.append(f"second-{int(told) - 1}")

    files = [site.path.with_name(name) for name in ("august.db", "september.db")]
    for moved in files:
        for _ in range(3):
            first()
            await second()
        site.path.rename(moved)
        first()
        first()
        await second()
        first()
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), 30) == 0
    site.ledger.close()
    found = [name for path in (*files, site.path) for name in read(path, "exchange_id")]
    assert sorted(found) == sorted(written)
    assert all(whole(path) for path in (*files, site.path))


def no_database(path: Path) -> None:
    path.write_bytes(b"rows, as some other program writes them\n" * 200)


def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in (s for step in STEPS for s in step):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {0x42454143}")
        connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")


def a_folder(path: Path) -> None:
    path.mkdir()


def test_file_in_a_folder_that_is_not_there_is_tried_until_it_is(tmp_path: Path) -> None:
    site = Site(tmp_path / "later" / "beacon.db")
    site.attempt()
    site.ledger.turn()
    assert site.told() == ["sqlite_cantopen"]
    site.path.parent.mkdir()
    site.ledger.turn()
    assert len(site.rows("id")) == 1
    site.ledger.close()


@pytest.mark.parametrize(
    ("makes", "kind"),
    [
        (no_database, "sqlite_notadb"),
        (of_another_program, "foreign"),
        (newer, "newer"),
        (a_folder, "sqlite_cantopen"),
    ],
)
def test_file_that_is_none_of_ours_is_left_alone_until_it_is_away(
    site: Site, makes: Any, kind: str
) -> None:
    makes(site.path)
    before = site.path.read_bytes() if site.path.is_file() else b""
    site.attempt(an_exchange("waits"))
    for _ in range(3):
        site.ledger.turn()
    assert site.told() == [kind]
    assert [each.name for each in site.path.parent.iterdir()] == [site.path.name]
    assert (site.path.read_bytes() if site.path.is_file() else b"") == before
    if site.path.is_file():
        site.path.unlink()
    else:
        shutil.rmtree(site.path)
    site.ledger.turn()
    assert site.rows("exchange_id") == ["waits"]
    assert site.told() == [kind, "ledger.recovered"]


def test_file_that_gets_damaged_is_told_and_traffic_goes_on(site: Site) -> None:
    for _ in range(500):
        site.attempt()
    site.ledger.turn()
    site.ledger.close()
    whole = site.path.stat().st_size
    with site.path.open("r+b") as file:
        file.truncate(whole // 2)
    site.attempt()
    site.ledger.turn()
    assert site.told() == ["sqlite_corrupt"]
    assert site.ledger.waiting == 1


def test_writer_that_fails_as_nobody_foresaw_goes_on_and_tells(site: Site) -> None:
    class Odd(Exception):
        pass

    def odd() -> float:
        raise Odd("a secret")

    site.attempt()
    was, site.ledger._unix = site.ledger._unix, odd
    site.ledger.turn()
    site.ledger._unix = was
    assert site.events[0][1]["kind"] == "odd"
    assert "secret" not in str(site.events)
    site.attempt()
    site.ledger.turn()
    assert len(site.rows("id")) + site.ledger.lost == 2


ROWS, LOCK, FREE, FILL, EMPTY, TURN = "rows", "lock", "free", "fill", "empty", "turn"


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from([ROWS, ROWS, TURN, TURN, LOCK, FREE, FILL, EMPTY]), max_size=16))
def test_rows_whatever_happens_in_between_are_written_once_or_counted(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    site = Site(folder / "beacon.db", max_rows=40)
    given_rows = 0
    site.ledger.turn()
    room = full(site)
    filled = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BUSY", 0.0)
        other = sqlite3.connect(site.path, isolation_level=None)
        for step in steps:
            if step == ROWS:
                for _ in range(17):
                    site.attempt(an_exchange(str(given_rows)))
                    given_rows += 1
            elif step == TURN:
                site.ledger.turn()
            elif step == LOCK and not other.in_transaction:
                other.execute("BEGIN IMMEDIATE")
            elif step == FREE and other.in_transaction:
                other.execute("COMMIT")
            elif step == FILL and not filled:
                room.__enter__()
                filled = True
            elif step == EMPTY and filled:
                room.__exit__()
                filled = False
            assert site.ledger.waiting <= 40
        if filled:
            room.__exit__()
        if other.in_transaction:
            other.execute("COMMIT")
        other.close()
        site.ledger.turn()
    written = [int(name) for name in site.rows("exchange_id")]
    assert len(set(written)) == len(written)
    assert len(written) + site.ledger.lost == given_rows
    assert site.ledger.waiting == 0
    assert site.gauge("healthy") == 1.0
    site.ledger.close()


# -- what is too old -----------------------------------------------------------------------------


def test_old_rows_are_deleted_in_steps_and_newer_ones_stay(site: Site) -> None:
    for n in range(1_200):
        site.attempt(an_exchange(f"old-{n}"))
    site.ledger.turn()
    site.pass_by(60 * DAY)
    site.attempt(an_exchange("young"), started=site.clock.now)
    site.ledger.turn()
    site.pass_by(30.5 * DAY)
    for _ in range(3):
        site.attempt(an_exchange("new"), started=site.clock.now)
        site.ledger.turn()
    assert site.rows("exchange_id") == ["young", "new", "new", "new"]
    assert site.events == []


def turns_for(site: Site, seconds: float) -> int:
    """Let time pass by, with a turn each minute; how many rows are left."""
    for _ in range(int(seconds // 61)):
        site.pass_by(61.0)
        site.ledger.turn()
    return len(site.rows("id"))


AHEAD = 91 * DAY


@pytest.fixture
def kept(site: Site) -> Site:
    """A ledger with a row, which runs for long enough to know the day."""
    site.attempt()
    site.ledger.turn()
    assert turns_for(site, 2 * 3600.0) == 1
    return site


def test_old_rows_when_the_time_of_day_is_wrong_for_a_while_stay(kept: Site) -> None:
    kept.unix.now += AHEAD
    assert turns_for(kept, 3000.0) == 1
    kept.unix.now -= AHEAD
    assert turns_for(kept, 2 * DAY) == 1
    moved = {"path": str(kept.path), "seconds": AHEAD}
    assert kept.events == [("ledger.clock_moved", moved)], "once, as it never stood for an hour"


def test_old_rows_when_the_new_time_of_day_stands_for_an_hour_are_deleted(kept: Site) -> None:
    """So it is where it was wrong before, or the machine slept, which its clock does not count."""
    kept.unix.now += AHEAD
    assert turns_for(kept, 3500.0) == 1
    assert turns_for(kept, 300.0) == 0
    kept.unix.now -= AHEAD
    turns_for(kept, 61.0)
    assert [fields["seconds"] for _, fields in kept.events] == [AHEAD, -AHEAD], "that is news again"


def test_old_rows_when_the_time_of_day_is_wrong_from_the_start_stay_until_it_is_right(
    tmp_path: Path,
) -> None:
    """A machine without a clock of its own starts at any date, and asks for the time later."""
    path = tmp_path / "beacon.db"
    before = Site(path)
    before.attempt()
    before.ledger.turn()
    before.ledger.close()
    for wrong in (AHEAD, -1_700_000_000.0):
        site = Site(path)
        site.unix.now += wrong
        site.ledger.turn()
        assert turns_for(site, 600.0) == 1
        site.unix.now -= wrong
        assert turns_for(site, DAY) == 1
        site.ledger.close()


def test_old_rows_when_the_time_of_day_is_set_by_little_are_deleted_as_ever(kept: Site) -> None:
    kept.pass_by(90 * DAY - 4 * 3600.0)
    for _ in range(200):  # a second each minute, as a clock that runs badly is put right
        kept.unix.now += 1.0
        turns_for(kept, 61.0)
    assert kept.rows("id") == []
    assert kept.events == []


def test_rows_when_the_time_of_day_is_wrong_still_leave_for_the_size(tmp_path: Path) -> None:
    site = Site(tmp_path / "beacon.db", max_size=1 << 20)
    site.unix.now += AHEAD
    for n in range(8_000):
        site.attempt(an_exchange(f"{n:05}", model="some/model-of-70B"))
    site.ledger.turn()
    assert 3_000 < len(site.rows("id")) < 8_000
    site.ledger.close()


def test_old_rows_when_there_are_very_many_hold_up_no_turn_for_long(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3_000):
        site.attempt(an_exchange(str(n)))
    site.ledger.turn()
    site.pass_by(91 * DAY)
    trim = site.ledger._store.trim

    def slow(before: float, most: int) -> int:
        site.clock.now += 0.03
        return trim(before, most)

    monkeypatch.setattr(site.ledger._store, "trim", slow)
    left = []
    for _ in range(5):
        site.ledger.turn()
        left.append(len(site.rows("id")))
    assert left == [2000, 1000, 0, 0, 0]


def test_rows_when_the_file_may_take_no_more_leave_from_the_oldest_and_it_is_told(
    tmp_path: Path,
) -> None:
    most = 1 << 20
    site = Site(tmp_path / "beacon.db", max_size=most)
    for n in range(8_000):
        site.attempt(an_exchange(f"{n:05}", model="some/model-of-70B"))
    site.ledger.turn()
    ids = site.rows("exchange_id")
    assert ids == [f"{n:05}" for n in range(8_000 - len(ids), 8_000)]
    assert 3_000 < len(ids) < 8_000
    assert most / 2 < site.gauge("size_bytes") <= most
    assert site.events == [("ledger.shortened", {"path": str(site.path), "max_size": most})]

    size = site.path.stat().st_size
    for _ in range(5):  # what was deleted makes room for what comes
        for n in range(500):
            site.attempt(an_exchange(str(n), model="some/model-of-70B"))
        site.clock.now += 61.0
        site.ledger.turn()
    assert site.gauge("size_bytes") <= most
    assert site.path.stat().st_size <= size * 1.2
    assert len(site.events) == 1  # once a day
    assert whole(site.path)
    site.ledger.close()


def test_rows_when_the_bound_is_wide_stay(tmp_path: Path) -> None:
    site = Site(tmp_path / "beacon.db", max_size=1 << 30)
    for n in range(1_200):
        site.attempt(an_exchange(str(n)))
    site.ledger.turn()
    assert len(site.rows("id")) == 1_200
    assert (site.events, site.ledger.lost) == ([], 0)
    site.ledger.close()


# -- the thread ----------------------------------------------------------------------------------


class Running:
    """A ledger with its thread, for as long as the block lasts."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.events = path, list[tuple[str, dict[str, Any]]]()
        self.threads: set[str] = set()
        self.ledger = Ledger(
            path,
            **{"flush_interval": 0.01, "retention_days": 90, **options},
            notify=self._notify,
        )
        self._lifespan = self.ledger.lifespan(NOBODY)

    def _notify(self, event: str, /, **fields: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.events.append((event, fields))

    async def __aenter__(self) -> Running:
        await self._lifespan.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._lifespan.__aexit__(None, None, None)

    def attempt(self, name: str = "e") -> None:
        self.ledger.observe(an_exchange(name), an_outcome(started=time.monotonic() - 2.0))

    async def until(self, predicate: Any) -> None:
        await eventually(predicate, 10.0)


async def test_thread_writes_within_the_interval_and_sleeps_where_there_is_nothing(
    tmp_path: Path,
) -> None:
    async with Running(tmp_path / "beacon.db") as running:
        for n in range(3):
            running.attempt(str(n))
            await running.until(lambda: running.ledger.waiting == 0)
            assert read(running.path, "exchange_id") == [str(i) for i in range(n + 1)]
            await running.until(lambda: running.ledger._asleep)
        ((ended,),) = [read(running.path, "max(ended_unix)")]
        assert abs(ended - time.time()) < 5
    assert running.events == []
    assert os.listdir(tmp_path) == ["beacon.db"]  # closed, log and all


async def test_thread_when_there_is_more_to_delete_does_not_wait_for_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else more would come in an interval of minutes than goes in one turn."""
    monkeypatch.setattr(writer_module, "_TRIM_TIME", 0.005)
    monkeypatch.setattr(writer_module, "_TRIM_STEP", 50)
    path, most = tmp_path / "beacon.db", 1 << 19
    before = Site(path)
    for n in range(8_000):
        before.attempt(an_exchange(f"{n:05}", model="some/model-of-70B"))
    before.ledger.turn()
    assert before.gauge("size_bytes") > 2 * most
    before.ledger.close()
    async with Running(path, flush_interval=3600.0, max_size=most) as running:
        await running.until(lambda: 0 < running.ledger._size <= most)
    assert 1_000 < len(read(path, "id")) < 4_000


async def test_thread_at_the_end_writes_what_waits(tmp_path: Path) -> None:
    async with Running(tmp_path / "beacon.db", flush_interval=3600.0) as running:
        running.attempt("first")
        await running.until(lambda: running.ledger.waiting == 0)
        for _ in range(5_000):
            running.attempt()
        assert running.ledger.waiting == 5_000
    assert len(read(running.path, "id")) == 5_001
    assert not [each for each in threading.enumerate() if each.name == "ledger.writer"]


async def test_thread_at_the_end_of_a_file_that_is_locked_waits_a_bounded_time_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY", 0.01)
    monkeypatch.setattr("beacon_proxy.ledger.writer._AT_END", 0.1)
    running = Running(tmp_path / "beacon.db")
    async with running:
        await running.until(lambda: running.path.exists() and running.ledger._asleep)
        with closing(sqlite3.connect(running.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            running.attempt()
            await running.until(lambda: running.events)
            await running.__aexit__()
            other.execute("ROLLBACK")
            kinds = [fields["kind"] for _, fields in running.events]
            assert kinds == ["sqlite_busy", "ended"]
            assert running.events[-1][1]["rows_lost"] == running.ledger.lost == 1
            running._lifespan = running.ledger.lifespan(NOBODY)
            await running._lifespan.__aenter__()


async def test_thread_tells_on_the_loop_for_nothing_else_there_takes_two_threads(
    tmp_path: Path,
) -> None:
    (tmp_path / "beacon.db").write_bytes(b"no database" * 1000)
    async with Running(tmp_path / "beacon.db") as running:
        await running.until(lambda: running.events)
        (tmp_path / "beacon.db").unlink()
        await running.until(lambda: len(running.events) == 2)
    assert [event for event, _ in running.events] == ["ledger.failed", "ledger.recovered"]
    assert running.threads == {threading.main_thread().name}


async def test_flush_when_rows_wait_for_the_interval_writes_them_at_once(tmp_path: Path) -> None:
    async with Running(tmp_path / "beacon.db", flush_interval=3600.0) as running:
        for n in range(3):
            running.attempt(str(n))
            assert await asyncio.to_thread(running.ledger.flush, 10.0)
            assert len(read(running.path, "id")) == n + 1
        assert await asyncio.to_thread(running.ledger.flush, 10.0)  # with nothing to write


def test_health_when_the_disk_hangs_goes_by_how_long_the_oldest_row_waits(site: Site) -> None:
    """A write that does not come back is no error, and says nothing."""
    store, hung = site.ledger._store, []
    write = store.write
    store.write = lambda rows: hung.append(site.gauge("healthy")) or write(rows)  # type: ignore

    def wait(seconds: float) -> None:
        site.clock.now += seconds
        site.unix.now += seconds

    site.clock.now = 997.0  # as the attempt ends
    site.attempt()
    assert site.gauge("healthy") == 1.0
    wait(9.0)
    assert site.gauge("healthy") == 1.0
    wait(2.0)
    assert site.gauge("healthy") == 0.0
    site.ledger.turn()
    assert hung == [0.0], "while it is being written"
    assert site.gauge("healthy") == 1.0


async def test_flush_when_the_file_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beacon_proxy.ledger.writer._AT_END", 0.1)
    async with Running(tmp_path / "none" / "beacon.db") as running:
        running.attempt()
        assert not await asyncio.to_thread(running.ledger.flush, 10.0)
        assert running.ledger.waiting == 1


async def test_two_ledgers_on_one_file_both_write_and_neither_harms_it(tmp_path: Path) -> None:
    path = tmp_path / "beacon.db"
    async with Running(path) as one, Running(path) as two:
        for n in range(400):
            one.attempt(f"one-{n}")
            two.attempt(f"two-{n}")
            if n % 40 == 0:
                await asyncio.sleep(0.01)
    names = read(path, "exchange_id")
    assert len(names) == len(set(names)) == 800
    assert (one.events, two.events) == ([], [])
    assert whole(path)


def test_ledgers_that_begin_a_file_at_the_same_time_all_get_it(tmp_path: Path) -> None:
    """One saw no mark of ours, then a table: it took the file for another program's."""
    failed: list[LedgerError] = []

    def begin(path: Path, ready: threading.Barrier) -> None:
        store = Store(path)
        ready.wait(10)
        try:
            store.write([])
        except LedgerError as error:
            failed.append(error)
        finally:
            store.close()

    for n in range(25):
        given_to = tmp_path / f"{n}.db", threading.Barrier(3)
        threads = [threading.Thread(target=begin, args=given_to) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


async def test_log_beside_the_file_does_not_grow_without_bound(tmp_path: Path) -> None:
    async with Running(tmp_path / "beacon.db", flush_interval=3600.0) as running:
        for _ in range(5):
            for _ in range(8_000):
                running.attempt("x" * 32)
            assert await asyncio.to_thread(running.ledger.flush, 30.0)
        log = tmp_path / "beacon.db-wal"
        assert (tmp_path / "beacon.db").stat().st_size + log.stat().st_size > 6e6
        assert log.stat().st_size < 5e6


# Run as a child: a process whose files may not grow beyond some size, as on a disk that is full.
FULL = """
import resource, signal, sys, time
from tests.test_ledger import Site, an_exchange
from pathlib import Path
site = Site(Path(sys.argv[1]))
site.attempt(an_exchange("before"))
site.ledger.turn()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
for n in range(2_000):
    site.attempt(an_exchange(str(n)))
site.ledger.turn()
assert site.ledger.waiting == 2_000, site.ledger.waiting
assert site.gauge("healthy") == 0.0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
site.ledger.turn()
assert (site.ledger.waiting, site.ledger.lost) == (0, 0)
print(*site.told())
"""


async def test_disk_that_takes_no_more_bytes_holds_rows_until_it_does(tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FULL, str(tmp_path / "beacon.db")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    out, err = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 0, err.decode()
    first, last = out.decode().split()
    assert first in ("sqlite_full", "sqlite_ioerr_write")
    assert last == "ledger.recovered"
    assert len(read(tmp_path / "beacon.db", "id")) == 2_001
