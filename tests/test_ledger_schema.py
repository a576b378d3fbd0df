"""The ledger's file: how it is made, brought to a newer shape, refused, and read."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy.ledger import LedgerError, Place, Spent, spent_since
from beacon_proxy.ledger.reading import reading
from beacon_proxy.ledger.reports import report
from beacon_proxy.ledger.schema import APPLICATION_ID, STEPS, VERSION, check, prepare
from beacon_proxy.ledger.store import Store

LATER = (*STEPS, ("ALTER TABLE attempts ADD COLUMN carbon_g REAL NOT NULL DEFAULT 0",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "beacon.db"


@pytest.fixture
def file(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connected(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        yield connection


def connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def insert(connection: sqlite3.Connection, **given: Any) -> None:
    row: dict[str, Any] = {
        "ended_unix": 1_700_000_000.0,
        "exchange_id": "e",
        "attempt": 1,
        "backend": "b0",
        "provider": "golem",
        "region": "us-east",
        "pool": "baseline",
        "path": "/v1/chat/completions",
        "stream": 0,
        "verdict": "good",
        "stage": "done",
        "duration_s": 1.0,
        "billed_s": 1.0,
        "usd": 0.5,
        "expected_usd": 0.5,
        **given,
    }
    marks = ", ".join("?" * len(row))
    connection.execute(
        f"INSERT INTO attempts ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
    )


def value(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def test_prepare_when_the_file_is_new_makes_the_table_and_marks_it(
    file: sqlite3.Connection,
) -> None:
    prepare(file)
    check(file)
    assert value(file, "PRAGMA user_version") == VERSION
    assert value(file, "PRAGMA application_id") == APPLICATION_ID
    prepare(file)  # and finds nothing to do
    assert value(file, "SELECT count(*) FROM attempts") == 0


def test_prepare_when_the_file_is_older_takes_the_steps_it_lacks_and_keeps_its_rows(
    file: sqlite3.Connection,
) -> None:
    prepare(file)
    insert(file, usd=0.25)
    prepare(file, LATER)
    assert value(file, "PRAGMA user_version") == VERSION + 1
    assert file.execute("SELECT usd, carbon_g FROM attempts").fetchall() == [(0.25, 0.0)]


# What version 1 had made, as it was released: its step is never to change.
FIRST = """
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY,
  ended_unix REAL NOT NULL,
  exchange_id TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  trace_id TEXT,
  tenant TEXT,
  backend TEXT NOT NULL,
  provider TEXT NOT NULL,
  region TEXT NOT NULL,
  pool TEXT NOT NULL,
  model TEXT,
  path TEXT NOT NULL,
  stream INTEGER NOT NULL,
  status INTEGER,
  verdict TEXT NOT NULL,
  stage TEXT NOT NULL,
  fault TEXT,
  duration_s REAL NOT NULL,
  billed_s REAL NOT NULL,
  ttft_s REAL,
  cold_start_s REAL,
  tokens_in INTEGER,
  tokens_out INTEGER,
  tokens_estimated INTEGER,
  usd REAL NOT NULL,
  expected_usd REAL NOT NULL
);
CREATE INDEX attempts_ended_unix ON attempts (ended_unix);
PRAGMA application_id = 1111834947;
PRAGMA user_version = 1;
"""


def of_version_1(path: Path) -> Path:
    """A file with one row, as a proxy of version 1 left it."""
    with closing(connected(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FIRST)
        insert(connection, ended_unix=time.time(), usd=0.25, tokens_in=33, tokens_out=5)
    return path


CACHE = "SELECT tokens_in, tokens_cached, tokens_cache_written FROM attempts ORDER BY id"


def test_first_step_makes_what_version_1_made(path: Path, file: sqlite3.Connection) -> None:
    prepare(file, STEPS[:1])
    query = "SELECT name, sql FROM sqlite_master ORDER BY name"
    with closing(connected(of_version_1(path.with_name("first.db")))) as first:
        assert file.execute(query).fetchall() == [
            (name, sql.strip()) for name, sql in first.execute(query)
        ]


def test_file_of_version_1_when_a_proxy_opens_it_keeps_its_rows_and_takes_further_ones(
    path: Path,
) -> None:
    usual = ("e", 1, "b0", "golem", "us-east", "baseline", "m", "/v1/x", 0, 200, "good", "done")
    row = (time.time(), *usual, 1.0, 1.0, 0.5, 33, 5, 0, 0.5, 0.5)
    of_version_1(path)
    with closing(Store(path)) as store:
        assert (
            store.write([row, (*row, "", "", "", "", 30, ""), (*row, "", "", "", "", "", 2)]) == []
        )
    with reading(path) as connection:
        assert value(connection, "PRAGMA user_version") == VERSION == 2
        assert connection.execute(CACHE).fetchall() == [
            (33, None, None),
            (33, None, None),
            (33, 30, None),
            (33, None, 2),
        ]
    assert report(path, "1h", "backend").total.tokens_cached == 30


def test_file_of_version_1_when_another_process_reads_it_is_brought_up_beside_it(
    path: Path,
) -> None:
    with reading(of_version_1(path), oldest=1) as connection:
        connection.execute("BEGIN")
        assert value(connection, "SELECT count(*) FROM attempts") == 1
        with closing(Store(path)) as store:
            assert store.write([]) == []
        assert value(connection, "SELECT usd FROM attempts") == 0.25
        connection.execute("COMMIT")
        assert connection.execute(CACHE).fetchall() == [(33, None, None)]


def test_file_of_version_1_until_a_proxy_opened_it_says_so_and_is_left_alone(path: Path) -> None:
    of_version_1(path)
    with pytest.raises(LedgerError, match="a proxy of this version brings it to 2") as caught:
        report(path, "1h", "backend")
    assert caught.value.kind == "older"
    with closing(connected(path)) as connection:
        assert value(connection, "PRAGMA user_version") == 1


def test_spent_since_of_a_file_of_version_1_is_known_before_a_proxy_opened_it(path: Path) -> None:
    ((_, spent),) = spent_since(of_version_1(path), [0.0])
    assert spent == Spent([Place("baseline", "golem", "b0", "us-east", 0.25)], [])


def test_prepare_when_a_step_fails_leaves_the_file_as_it_was(file: sqlite3.Connection) -> None:
    prepare(file)
    insert(file)
    with pytest.raises(sqlite3.OperationalError):
        prepare(file, (*LATER, ("CREATE TABLE more (a)", "CREATE NONSENSE")))
    assert value(file, "PRAGMA user_version") == VERSION
    assert value(file, "SELECT count(*) FROM sqlite_master WHERE name = 'more'") == 0
    check(file)
    assert value(file, "SELECT count(*) FROM attempts") == 1


def test_prepare_when_another_process_was_faster_finds_nothing_to_do(
    path: Path, file: sqlite3.Connection
) -> None:
    """Both saw an empty file; the second one waits for the lock, and must look again."""

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "BEGIN IMMEDIATE":
                prepare(file)
            return super().execute(sql, *args)

    with closing(sqlite3.connect(path, isolation_level=None, factory=Slow)) as second:
        prepare(second)
        check(second)


def test_file_of_a_newer_version_is_left_alone(path: Path, file: sqlite3.Connection) -> None:
    prepare(file, LATER)
    insert(file)
    for refuses in (prepare, check):
        with pytest.raises(LedgerError, match=f"knows {VERSION} at most") as caught:
            refuses(file)
        assert caught.value.kind == "newer"
    with pytest.raises(LedgerError, match=f"knows {VERSION}"), reading(path):
        pass
    assert value(file, "PRAGMA user_version") == VERSION + 1


@pytest.mark.parametrize(
    "makes",
    ["CREATE TABLE notes (text)", "PRAGMA user_version = 3", "PRAGMA application_id = 5"],
)
def test_file_of_another_program_is_left_alone(file: sqlite3.Connection, makes: str) -> None:
    file.execute(makes)
    before = file.execute("SELECT * FROM sqlite_master").fetchall()
    with pytest.raises(LedgerError, match="another program") as caught:
        prepare(file)
    assert caught.value.kind == "foreign"
    assert file.execute("SELECT * FROM sqlite_master").fetchall() == before


def test_reading_when_a_writer_is_in_the_middle_sees_what_was_committed(
    path: Path, file: sqlite3.Connection
) -> None:
    prepare(file)
    insert(file)
    file.execute("BEGIN IMMEDIATE")
    insert(file)
    with reading(path) as connection:
        assert value(connection, "SELECT count(*) FROM attempts") == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM attempts")


def test_reading_when_nobody_writes_leaves_nothing_beside_the_file(path: Path) -> None:
    with closing(connected(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        prepare(connection)
        insert(connection)
    assert [each.name for each in path.parent.iterdir()] == ["beacon.db"]
    with reading(path) as connection:
        assert value(connection, "SELECT count(*) FROM attempts") == 1
    assert [each.name for each in path.parent.iterdir()] == ["beacon.db"]


def test_reading_when_it_takes_too_long_ends_as_slow(path: Path, file: sqlite3.Connection) -> None:
    prepare(file)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    with pytest.raises(LedgerError) as caught, reading(path, 0.02) as connection:
        connection.execute(endless).fetchall()
    assert caught.value.kind == "slow"


@pytest.mark.parametrize("content", [None, b"", b"this is no database, " * 500])
def test_reading_when_there_is_no_ledger_says_why(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LedgerError) as caught, reading(path):
        pass
    assert caught.value.kind == ("sqlite_notadb" if content else "missing")
    assert path.exists() is (content is not None)


def test_spent_since_adds_up_by_where_it_went_and_who_asked(
    path: Path, file: sqlite3.Connection
) -> None:
    prepare(file)
    insert(file, ended_unix=99.0)
    insert(file, ended_unix=100.0, usd=0.25, tenant="t1")
    insert(file, ended_unix=101.0, usd=0.5, tenant="t1")
    insert(file, ended_unix=101.0, usd=1.0)
    insert(file, ended_unix=101.0, usd=2.0, backend="m", provider="modal", pool="burst")
    ((since, spent),) = spent_since(path, [100.0], most_tenants=5)
    assert since == 100.0
    assert sorted(spent.places, key=lambda each: each.usd) == [
        Place("baseline", "golem", "b0", "us-east", 1.75),
        Place("burst", "modal", "m", "us-east", 2.0),
    ]
    assert spent.tenants == [("t1", 0.75), (None, 3.0)]


def test_spent_since_when_there_are_more_tenants_than_wanted_tells_of_those_who_spent_most(
    path: Path, file: sqlite3.Connection
) -> None:
    """In each window by what they spent in all of it, wherever; the places have all tenants'."""
    prepare(file)
    for n in range(40):
        insert(file, ended_unix=100.0 + n, usd=1.0 + n, tenant=f"t{n}", backend=f"b{n % 2}")
        insert(file, ended_unix=50.0, usd=100.0 - 2.0 * n, tenant=f"t{n}")
    late, early = spent_since(path, [100.0, 0.0], most_tenants=3)
    assert late[1].tenants == [("t37", 38.0), ("t38", 39.0), ("t39", 40.0)]
    assert early[1].tenants == [("t2", 99.0), ("t1", 100.0), ("t0", 101.0)]
    assert sum(each.usd for each in late[1].places) == 820.0
    assert sum(each.usd for each in early[1].places) == 820.0 + 2440.0


MANY = """
INSERT INTO attempts (ended_unix, exchange_id, attempt, backend, provider, region, pool, path,
  stream, verdict, stage, duration_s, billed_s, usd, expected_usd)
WITH RECURSIVE k (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i < ?1 - 1)
SELECT ?2 + i * ?3 + (i % 7 - 3) * 50 * ?3, 'e' || i, 1, 'b' || i % 3, 'golem', 'us-east',
  'baseline', '/v1/x', 0, 'good', 'done', 1.0, 1.0, 0.0001, 0.0 FROM k"""


def test_spent_since_of_a_large_ledger_is_the_same_for_each_window_latest_first(
    path: Path, file: sqlite3.Connection
) -> None:
    """Ids follow times but roughly: each row is beside others that ended before and after it."""
    prepare(file)
    file.execute(MANY, (300_000, 1_000_000.0, 1.0))
    times = [1_000_100.0, 1_299_990.0, 1_150_000.5, 1_290_000.0, 2_000_000.0]
    found = list(spent_since(path, times))
    assert [since for since, _ in found] == sorted(times, reverse=True)
    for since, spent in found:
        query = "SELECT backend, sum(usd) FROM attempts WHERE ended_unix >= ? GROUP BY backend"
        right = dict(file.execute(query, (since,)).fetchall())
        assert {each.backend: each.usd for each in spent.places} == pytest.approx(right)
    assert found[0][1] == Spent([], [])


def test_spent_since_counts_no_row_that_came_later_nor_what_ended_too_late(
    path: Path, file: sqlite3.Connection
) -> None:
    prepare(file)
    insert(file, ended_unix=50.0, usd=1.0)
    insert(file, ended_unix=100.0, usd=2.0)
    insert(file, ended_unix=200.0, usd=4.0)

    def until() -> float:
        insert(file, ended_unix=60.0, usd=8.0)  # as a writer may, while this reads
        return 200.0

    sums = spent_since(path, [100.0, 0.0], until_unix=until)
    assert [(since, [each.usd for each in spent.places]) for since, spent in sums] == [
        (100.0, [2.0]),
        (0.0, [3.0]),
    ]


def test_spent_since_when_it_is_stopped_ends_in_the_middle(
    path: Path, file: sqlite3.Connection
) -> None:
    prepare(file)
    file.execute(MANY, (100_000, 1_000_000.0, 1.0))
    known = spent_since(path, [1_099_000.0, 0.0], stopped=lambda: stopped)
    stopped = False
    assert next(known)[0] == 1_099_000.0
    stopped = True
    with pytest.raises(LedgerError) as caught:
        next(known)
    assert caught.value.kind == "stopped"


def test_spent_since_when_there_is_no_file_is_nothing_and_makes_none(path: Path) -> None:
    assert list(spent_since(path, [0.0, 1.0])) == [(since, Spent([], [])) for since in (1.0, 0.0)]
    assert not path.exists()


def test_spent_since_when_the_file_is_none_of_ours_raises(path: Path) -> None:
    path.write_bytes(b"x" * 4096)
    with pytest.raises(LedgerError, match="not a database"):
        list(spent_since(path, [0.0]))
