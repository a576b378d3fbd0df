"""What was spent: `beacon-proxy costs` and `GET /costs`, from real ledgers."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy.api.admin import asking as asking_module
from beacon_proxy.api.admin import costs as costs_module
from beacon_proxy.cli import main
from beacon_proxy.contracts import Backend, Exchange, Fault, Outcome, Stage, Usage, Verdict
from beacon_proxy.ledger import Ledger, LedgerError, report, seconds_of
from beacon_proxy.ledger import reports as reports_module
from beacon_proxy.ledger.formats import as_table
from beacon_proxy.ledger.reports import BY
from beacon_proxy.ledger.store import Store

from .kit import RawBackend, RawClient, chat, eventually, json_answer, proxy, request
from .test_ledger_schema import of_version_1

DAY = 86_400.0
GOLEM = Backend("golem-1", "golem", "http://h", "http", "h", 80, region="us-east", pool="baseline")
MODAL = Backend("modal-eu", "modal", "http://h", "http", "h", 80, region="eu-west", pool="burst")


class Book:
    """A ledger whose rows ended when a test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._now = time.time()  # not of the import: by then a whole run may have gone by
        self._ago = 0.0
        self.ledger = Ledger(
            path,
            flush_interval=0.25,
            retention_days=1e4,
            notify=lambda event, /, **fields: pytest.fail(f"{event} {fields}"),
            clock=lambda: 0.0,
            unix=lambda: self._now - self._ago,
        )
        self.ledger.turn()

    def date(self, ago: float) -> str:
        return datetime.fromtimestamp(self._now - ago, UTC).date().isoformat()

    def attempt(
        self,
        at: Backend = GOLEM,
        *,
        ago: float = 60.0,
        model: str | None = "m",
        tenant: str | None = None,
        **fields: Any,
    ) -> None:
        made: dict[str, Any] = {
            "verdict": Verdict.GOOD,
            "stage": Stage.DONE,
            "duration": 4.0,
            "billed": 2.0,
            "usage": Usage(100, 300),
            "usd": 0.001,
            "expected_usd": 0.002,
            **fields,
        }
        outcome = Outcome(at, 1, started=-made["duration"], **made)
        exchange = Exchange("e", "POST", b"/", "/", (), 0.0, model=model, tenant=tenant)
        self._ago = ago
        self.ledger.observe(exchange, outcome)
        self.ledger.turn()

    def report(self, since: str = "7d", by: str = "provider", **options: Any) -> dict[str, Any]:
        return report(self.path, since, by, **options).document(0.0)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    monkeypatch.chdir(tmp_path)
    made = Book(tmp_path / "beacon.db")
    yield made
    made.ledger.close()


def test_report_adds_up_and_says_what_follows(book: Book) -> None:
    cached = Usage(100, 300, cached=40, cache_written=50)
    book.attempt(MODAL, usd=0.01, billed=20.0, cold_start=12.5, usage=cached)
    book.attempt(MODAL, usage=Usage(50, 50, estimated=True))
    book.attempt(MODAL, verdict=Verdict.STRIKE, fault=Fault.CLOSED, usage=None, usd=0.0, billed=0.0)
    book.attempt(MODAL, verdict=Verdict.BUSY, fault=Fault.BUSY, usage=None, usd=0.0, billed=0.0)
    book.attempt(MODAL, verdict=Verdict.NEUTRAL, fault=Fault.CLIENT_CLOSED)
    book.attempt()
    answer = book.report()
    modal, golem = answer["rows"]
    assert modal == {
        "provider": "modal",
        "attempts": 5,
        "good": 2,
        "failed": 2,
        "strikes": 1,
        "success_rate": 0.6667,
        "seconds": 20.0,
        "billed_seconds": 24.0,
        "cold_start_seconds": 12.5,
        "tokens_in": 250,
        "tokens_out": 650,
        "tokens_cached": 40,
        "estimated_share": 0.3333,
        "usd": 0.012,
        "expected_usd": 0.01,
        "usd_per_second": 0.0005,
        "usd_per_million_tokens": 13.333333,
    }
    assert (golem["provider"], golem["usd"]) == ("golem", 0.001)
    assert answer["total"]["attempts"] == 6
    assert answer["total_usd"] == answer["total"]["usd"] == 0.013


def test_report_when_nothing_was_measured_has_null_and_no_zero_that_looks_like_a_price(
    book: Book,
) -> None:
    book.attempt(usage=None, billed=0.0, usd=0.0, verdict=Verdict.NEUTRAL)
    (row,) = book.report()["rows"]
    names = ("success_rate", "estimated_share", "usd_per_second", "usd_per_million_tokens")
    assert [row[name] for name in names] == [None] * 4


def test_report_when_nothing_was_spent_is_empty(book: Book) -> None:
    answer = book.report()
    assert (answer["rows"], answer["total_usd"], answer["covered_seconds"]) == ([], 0.0, 0.0)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("provider", ["modal", "golem"]),
        ("region", ["eu-west", "us-east"]),
        ("model", ["big", None, "m"]),
        ("tenant", ["t1", None]),
        ("day", [3 * DAY, DAY, 0.0]),
        ("backend", ["modal-eu", "golem-1"]),
        ("pool", ["burst", "baseline"]),
    ],
)
def test_report_by_each_has_the_dearest_first_but_days_in_their_order(
    book: Book, by: str, names: list[Any]
) -> None:
    if by == "day":
        names = [book.date(ago) for ago in names]
    book.attempt(MODAL, usd=0.5, model="Big", tenant="t1", ago=3 * DAY)
    book.attempt(usd=0.1, model=None, ago=DAY)
    book.attempt(usd=0.05, ago=0.0)  # a minute ago may be the day before
    assert [row[by] for row in book.report(by=by)["rows"]] == names
    assert len(BY) == 7


def test_report_looks_back_as_far_as_asked_and_tells_how_far_there_is_something(
    book: Book,
) -> None:
    for ago in (10.0, 3_000.0, 4_200.0, 3 * DAY):
        book.attempt(ago=ago)
    assert [book.report(since)["total"]["attempts"] for since in ("15m", "1h", "2h", "1w")] == [
        1,
        2,
        3,
        4,
    ]
    assert book.report("1h")["covered_seconds"] == 3_600.0
    assert book.report("1w")["covered_seconds"] == pytest.approx(3 * DAY, abs=600)


def test_report_when_tokens_exceed_every_integer_still_adds_up(book: Book) -> None:
    """SQLite's sum() of integers fails for good once it overflows."""
    for _ in range(3):
        book.attempt(usage=Usage(2**70, 1))
    assert book.report()["total"]["tokens_in"] > 2**62


def test_report_when_clients_made_up_many_models_shows_some_and_adds_up_all(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_module, "MOST", 3)
    for n in range(5):
        book.attempt(model=f"m{n}", usd=0.001 * (n + 1))
    answer = book.report(by="model")
    assert [row["model"] for row in answer["rows"]] == ["m4", "m3", "m2"]
    assert answer["rows_left_out"] == 2
    assert answer["total_usd"] == 0.015
    assert "(2 more)" in as_table(answer)


@pytest.mark.parametrize(
    ("since", "seconds"),
    [("90", 90), ("30s", 30), ("15m", 900), ("1h", 3600), ("7d", 604_800), ("2w", 1_209_600)],
)
def test_since_is_a_number_and_a_unit(since: str, seconds: int) -> None:
    assert seconds_of(since) == seconds


@pytest.mark.parametrize(
    "since", ["", "0", "0d", "-1h", "h", "1y", "1 h", "1h ", "\u0661h", "1" * 10]
)
def test_since_when_it_is_no_time_is_none(since: str) -> None:
    assert seconds_of(since) is None


# -- the command ---------------------------------------------------------------------------------

CONFIG = """
ledger: {{path: {path}}}
backends:
  - {{name: rented, provider: golem, url: "http://127.0.0.1:9", price_model: rented,
      price_per_hour: 0.5}}
"""


@pytest.fixture
def config(book: Book, monkeypatch: pytest.MonkeyPatch) -> str:
    from beacon_proxy.plugins import Plugins

    from .kit import plugins

    monkeypatch.setattr(Plugins, "discover", lambda: plugins())
    file = book.path.with_name("beacon.yaml")
    file.write_text(CONFIG.format(path=book.path))
    return str(file)


def test_costs_as_a_table_has_columns_that_line_up_and_a_total(
    book: Book, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    book.attempt(MODAL, usd=1.5, billed=1_000.0)
    book.attempt(usage=None)
    assert main(["costs", "--config", config]) == 0
    out, err = capsys.readouterr()
    head, rule, modal, golem, again, total, _, since, rent = out.splitlines()
    assert head.split()[:4] == ["provider", "attempts", "good", "failed"]
    assert len({len(line) for line in (head, rule, modal, golem, again, total)}) == 1
    numbers = "1 1 0 100 300 0% 1,000.0 1.500000 0.00150000 3,750.0000"
    assert modal.split() == ["modal", *numbers.split()]
    assert golem.split()[-5:] == ["-", "2.0", "0.001000", "0.00050000", "-"]
    assert total.split()[:2] == ["total", "2"]
    assert re.fullmatch(r"since 7d, of which the ledger holds [0-9.]+ (seconds|minutes)", since)
    assert rent == "beside it rented backends cost 0.5000 USD an hour, busy or idle"
    assert err == ""


def test_costs_as_csv_is_read_by_a_strict_reader_whatever_a_client_calls_its_model(
    book: Book, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ['a "quoted", model\nof two lines', "of\rtwo", "of\r\nthree", "=1+1", "@cf/m"]
    for n, model in enumerate(odd):
        book.attempt(model=model, usd=0.001 * (len(odd) - n))
    book.attempt(model=None, usage=None, usd=0.0)
    assert main(["costs", "--config", config, "--by", "model", "--format", "csv"]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(out, newline=""), strict=True))
    assert [row["model"] for row in rows] == [*odd, ""]
    assert (rows[4]["usd"], rows[4]["tokens_out"]) == ("0.001", "300")
    assert rows[5]["usd_per_million_tokens"] == ""
    assert out.count("\r") == 2, "no line ends with one"
    assert None not in rows[0]


def test_costs_as_json_has_stable_keys(
    book: Book, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    book.attempt()
    assert main(["costs", "--config", config, "--since", "1d", "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == [
        *("since", "by", "rows", "rows_left_out", "total", "total_usd"),
        *("rent_usd_per_hour", "covered_seconds", "scope", "timestamp"),
    ]
    assert (answer["since"], answer["by"], answer["rent_usd_per_hour"]) == ("1d", "provider", 0.5)
    assert answer["timestamp"] == pytest.approx(time.time(), abs=60)


def test_costs_when_nothing_was_spent_is_an_empty_table_and_exit_0(
    book: Book, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["costs", "--config", config, "--by", "day"]) == 0
    head, _, _, total, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("day")
    assert total.split()[:2] == ["total", "0"]


def test_costs_when_a_model_has_control_characters_shows_none(
    book: Book, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client could else colour, or overwrite, what the operator sees."""
    book.attempt(model="\x1b[2Jgone")
    assert main(["costs", "--config", config, "--by", "model"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2jgone" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ledger: {path: none.db}", "beacon-proxy: costs: none.db: there is no such file"),
        ("ledger: {path: other.db}", "beacon-proxy: costs: other.db: file is not a database"),
        ("ledger: {path: ''}", "beacon-proxy: costs: no ledger is kept, as ledger.path is empty"),
        ("ledger: {path: 5}", "ledger.path: must be text, got 5"),
        ("ledger: {path: '${NOT_SET}'}", "ledger.path: environment variable NOT_SET is not set"),
    ],
)
def test_costs_when_there_is_no_ledger_is_one_line_and_exit_1(
    book: Book, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    Path("other.db").write_bytes(b"of another program" * 99)
    Path("odd.yaml").write_text(text)
    assert main(["costs", "--config", "odd.yaml"]) == 1
    here = f"costs: {Path.cwd()}/"
    out, err = capsys.readouterr()
    assert (out, err.replace(here, "costs: ")) == ("", said + "\n")


def test_costs_when_the_ledger_is_of_an_older_version_says_who_brings_it_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = of_version_1(tmp_path / "beacon.db")
    config = tmp_path / "beacon.yaml"
    config.write_text(f"ledger: {{path: {old}}}")
    assert main(["costs", "--config", str(config)]) == 1
    out, err = capsys.readouterr()
    said = "it is of version 1; a proxy of this version brings it to 2"
    assert (out, err) == ("", f"beacon-proxy: costs: {old}: {said}\n")
    with closing(Store(old)) as store:
        store.write([])
    assert main(["costs", "--config", str(config), "--format", "json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert (total["usd"], total["tokens_in"], total["tokens_cached"]) == (0.25, 33, 0)


def test_costs_when_no_backend_is_configured_reads_a_ledger_that_was_brought_here(
    book: Book, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOLEM_PROVIDER_ENDPOINTS", "MODAL_API_BASE", "RUNPOD_ENDPOINT_ID"):
        monkeypatch.delenv(name, raising=False)
    book.attempt()
    assert main(["costs"]) == 0
    out, err = capsys.readouterr()
    assert "golem" in out
    assert "rent of backends: not known" in out
    assert "rents are not known" in err


# -- the route -----------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 11},
}


answers = json_answer(DOCUMENT)


async def ask(port: int, target: str) -> tuple[int, dict[str, Any]]:
    async with RawClient(port) as client:
        answer = await client.ask(request("GET", target))
        return answer.status, json.loads(answer.body)


async def test_route_has_what_ended_before_the_question_though_it_is_not_flushed_yet(
    tmp_path: Path,
) -> None:
    ledger = {"path": str(tmp_path / "beacon.db"), "flush_interval": 3600}
    async with RawBackend(answers) as backend:
        row = {"url": backend, "price_per_second": 0.0003}
        async with proxy(row, ledger=ledger) as p, RawClient(p.port) as client:
            for _ in range(3):
                await client.ask(chat())
            await p.exchanges(3)
            status, answer = await ask(p.port, "/costs?by=model&since=90s")
            found = report(tmp_path / "beacon.db", "90s", "model").document(0.0)
    assert status == 200
    (shown,) = answer["rows"]
    assert (shown["model"], shown["attempts"], shown["good"]) == ("m", 3, 3)
    assert (shown["tokens_in"], shown["tokens_out"]) == (21, 33)
    assert answer["scope"].startswith("the ledger")
    assert answer["total_usd"] == shown["usd"] > 0
    told = {**answer, "timestamp": 0, "covered_seconds": 0}
    assert told == {**found, "timestamp": 0, "covered_seconds": 0}, "as the command says it"


async def test_route_remembers_what_an_earlier_process_spent(tmp_path: Path) -> None:
    ledger = {"path": str(tmp_path / "beacon.db")}
    async with RawBackend(answers) as backend:
        for spent in (1, 2):
            async with proxy(backend, ledger=ledger) as p, RawClient(p.port) as client:
                await client.ask(chat())
                await p.exchanges(1)
                _, answer = await ask(p.port, "/costs")
                assert answer["total"]["attempts"] == spent


async def test_route_when_no_ledger_is_kept_answers_from_memory_and_says_so() -> None:
    async with RawBackend(answers) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.ask(chat())
        await p.exchanges(1)
        status, answer = await ask(p.port, "/costs")
        assert (status, answer["rows"][0]["attempts"]) == (200, 1)
        assert answer["scope"].startswith("this process, since its start, at most one hour")
        status, answer = await ask(p.port, "/costs?by=tenant")
        assert status == 400
        assert "no ledger is kept" in answer["error"]["message"]


async def test_route_when_the_file_cannot_be_read_answers_from_memory_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beacon_proxy.ledger.writer._AT_END", 0.05)
    path = tmp_path / "beacon.db"
    path.write_bytes(b"of another program" * 999)
    async with RawBackend(answers) as backend, proxy(backend, ledger={"path": str(path)}) as p:
        async with RawClient(p.port) as client:
            await client.ask(chat())
        await p.exchanges(1)
        status, answer = await ask(p.port, "/costs")
        assert (status, answer["rows"][0]["attempts"]) == (200, 1)
        assert answer["scope"].endswith("the ledger cannot be read: file is not a database")
        status, _ = await ask(p.port, "/costs?by=day")
        assert status == 503
        assert p.events("ledger.failed")[0]["kind"] == "sqlite_notadb"


async def test_route_when_the_file_cannot_be_written_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beacon_proxy.ledger.store.BUSY", 0.01)
    monkeypatch.setattr(asking_module, "HOLDS", 0.0)
    monkeypatch.setattr(asking_module, "WORTH", 0.0)
    path = tmp_path / "beacon.db"
    async with RawBackend(answers) as backend, proxy(backend, ledger={"path": str(path)}) as p:
        async with RawClient(p.port) as client:
            await client.ask(chat())
            await ask(p.port, "/costs")
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await client.ask(chat())
                await p.exchanges(2)
                _, answer = await ask(p.port, "/costs")
                other.execute("ROLLBACK")
        assert answer["total"]["attempts"] == 1
        assert "1 of this one are not in it yet" in answer["scope"]


async def test_route_when_many_ask_at_once_reads_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    once = costs_module._ask

    def counted(*args: Any) -> Any:
        reads.append(args[1])
        return once(*args)

    monkeypatch.setattr(costs_module, "_ask", counted)
    ledger = {"path": str(tmp_path / "beacon.db")}
    async with RawBackend(answers) as backend, proxy(backend, ledger=ledger) as p:
        targets = ["/costs", "/costs?by=day"] * 8
        found = await asyncio.gather(*(ask(p.port, target) for target in targets))
        assert {status for status, _ in found} == {200}
        assert sorted(reads) == [(3600, "day"), (3600, "provider")]


async def test_route_when_the_disk_hangs_holds_up_nobody_and_refuses_the_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(costs_module, "_ask", lambda *_: hangs.wait(20) and {})
    monkeypatch.setattr(asking_module, "MOST_WAITING", 3)
    ledger = {"path": str(tmp_path / "beacon.db")}
    async with RawBackend(answers) as backend, proxy(backend, ledger=ledger) as p:
        asking = [asyncio.create_task(ask(p.port, "/costs")) for _ in range(5)]
        refused, _ = await asyncio.wait(asking, timeout=10, return_when="FIRST_COMPLETED")
        assert {task.result()[0] for task in refused} == {503}
        async with RawClient(p.port) as client:
            began = time.monotonic()
            assert (await client.ask(chat())).status == 200
            assert time.monotonic() - began < 5
        hangs.set()
        statuses = [status for status, _ in await asyncio.gather(*asking)]
        assert sorted(statuses) == [200, 200, 200, 503, 503]


async def test_route_when_it_takes_too_long_asks_for_a_shorter_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> Any:
        raise LedgerError("slow", "it took longer than 10 s")

    monkeypatch.setattr(costs_module, "_ask", slow)
    ledger = {"path": str(tmp_path / "beacon.db")}
    async with RawBackend(answers) as backend, proxy(backend, ledger=ledger) as p:
        status, answer = await ask(p.port, "/costs?since=900d")
        assert status == 503
        assert "ask for a shorter time" in answer["error"]["message"]
        assert (await ask(p.port, "/health"))[0] == 200


async def test_route_when_strangers_ask_for_much_answers_who_asks_for_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client once kept all others from /costs: each spelling of a year was a question."""
    once, reads, goes_on = costs_module._ask, list[int](), threading.Event()
    asked = list[int]()

    def held(ledger: Ledger, question: asking_module.Question, rent: float) -> Any:
        reads.append(question.seconds)
        if question.seconds > DAY:
            assert goes_on.wait(20)
            raise LedgerError("slow", "it took longer than 10 s")
        return once(ledger, question, rent)

    def rounded(seconds: int) -> int:
        asked.append(seconds)
        return asking_module.rounded(seconds)

    monkeypatch.setattr(costs_module, "_ask", held)
    monkeypatch.setattr(costs_module, "rounded", rounded)
    ledger = {"path": str(tmp_path / "beacon.db")}
    async with RawBackend(answers) as backend, proxy(backend, ledger=ledger) as p:
        targets = [f"/costs?since={365 + n}d" for n in range(40)]
        targets += [f"/costs?since={400 * 86_400 - n}s" for n in range(40)]
        strangers = [asyncio.create_task(ask(p.port, target)) for target in targets]
        await eventually(lambda: len(asked) == 80, 10)
        operator = asyncio.create_task(ask(p.port, "/costs?since=1h&by=pool"))
        await eventually(lambda: len(asked) == 81, 10)
        goes_on.set()
        status, answer = await operator
        assert (status, answer["since"], answer["by"]) == (200, "1h", "pool")
        assert {status for status, _ in await asyncio.gather(*strangers)} == {503}
        assert reads[1] == 3600


async def test_route_tells_the_rent_beside_what_attempts_cost(tmp_path: Path) -> None:
    async with RawBackend(answers) as backend:
        row = {"url": backend, "price_model": "rented", "price_per_hour": 0.36}
        for ledger in ({"path": str(tmp_path / "beacon.db")}, {"path": ""}):
            async with proxy(row, backend, ledger=ledger) as p:
                _, answer = await ask(p.port, "/costs")
                assert answer["rent_usd_per_hour"] == pytest.approx(0.36)


async def test_gauges_tell_of_the_ledger(tmp_path: Path) -> None:
    ledger = {"path": str(tmp_path / "beacon.db"), "flush_interval": 0.01}
    async with (
        RawBackend(answers) as backend,
        proxy(backend, ledger=ledger) as p,
        RawClient(p.port) as client,
    ):
        await client.ask(chat())
        await eventually(lambda: p.app._ledger._flushed > 0)
        text = (await client.ask(request("GET", "/metrics", [("Accept", "text/plain")]))).body
    told = [line for line in text.decode().splitlines() if line.startswith("beacon_ledger")]
    values = {name: float(value) for name, value in map(str.split, told)}
    assert values["beacon_ledger_healthy"] == 1.0
    assert values["beacon_ledger_rows_lost_total"] == values["beacon_ledger_rows_waiting"] == 0.0
    assert abs(values["beacon_ledger_last_flush_timestamp_seconds"] - time.time()) < 60
