"""`kill -9` in the middle of 200 streams: what the ledger has then, beside what backends counted.

Nothing here depends on how fast the machine is. The proxy tells when it last wrote to its ledger.
Two such times are waited for before it is killed: the write of the second one began after the first
had ended, so whatever ended before the first must be in the file.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from beacon_proxy.ledger import spent_since

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    each_request,
    event,
    eventually,
    request,
)
from .test_start import STARTS, running

STREAMS = 200
INTERVAL = 0.25  # s, the default flush_interval
GAP = 0.1  # s between two tokens
PROMPT = 9  # tokens
INPUT, OUTPUT = 1.0, 4.0  # USD a million tokens: then the money can be counted by the backend, too


class Counting:
    """A backend that notes, of each stream it has sent to its end, the tokens."""

    def __init__(self) -> None:
        self.ended: dict[str, int] = {}  # tokens by request id
        self.running = 0

    async def script(self, conn: BackendConn) -> None:
        async for received in each_request(conn):
            (name,) = received.header("x-request-id")
            tokens = 3 + sum(name) % 10
            self.running += 1
            *pieces, done = chat_events("word ", tokens)
            counts = {"prompt_tokens": PROMPT, "completion_tokens": tokens}
            usage = event({"id": "chatcmpl-1", "choices": [], "usage": counts})
            await conn.send(SSE_HEAD)
            for piece in (*pieces, usage, done):
                await conn.send(chunk(piece))
                await asyncio.sleep(GAP if piece in pieces else 0)
            await conn.send(LAST_CHUNK)
            self.running -= 1
            self.ended[name.decode()] = tokens


def configuration(folder: Path, urls: list[str], month: float | None = None) -> None:
    price = {"price_per_million_tokens": {"input": INPUT, "output": OUTPUT}}
    rows = [
        {"name": f"b{n}", "provider": "openai", "url": url, "models": ["m"], "max_in_flight": 500}
        | price
        for n, url in enumerate(urls)
    ]
    document: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": 0, "access_log": False},
        "ledger": {"path": "beacon.db", "flush_interval": INTERVAL},
        "backends": rows,
    }
    if month is not None:
        document["budgets"] = [{"name": "month", "per": "month", "usd": month}]
    (folder / "beacon.yaml").write_text(json.dumps(document))


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A proxy in a process of its own, and its port."""
    async with running(folder, "serve") as told:
        assert told.process.stdout is not None
        async with asyncio.timeout(STARTS):
            async for line in told.process.stdout:
                if (entry := json.loads(line))["event"] == "server.started":
                    break
        yield told.process, entry["port"]


class Clients:
    """Many that ask for one stream after another, until the proxy is gone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.ended: dict[str, float] = {}  # unix s at which an answer was whole, by request id

    async def one(self, who: int) -> None:
        asked = 0
        while True:
            name, asked = f"client-{who}-{asked}", asked + 1
            try:
                async with RawClient(self.port) as client:
                    data = chat(stream=True, headers=[("X-Request-Id", name)])
                    answer = await client.ask(data, timeout=60)
            except OSError:
                return
            if not answer.complete:
                return
            self.ended[name] = time.time()


async def flushed(port: int, after: float) -> float:
    """When the ledger was last written to (unix s), once that is later than `after`."""
    async with asyncio.timeout(60), RawClient(port) as client:
        while True:
            text = (await client.ask(request("GET", "/metrics", [("Accept", "text/plain")]))).body
            told = dict(line.rsplit(" ", 1) for line in text.decode().splitlines())
            at = float(told["beacon_ledger_last_flush_timestamp_seconds"])
            if at > after:
                return at
            await asyncio.sleep(0.01)


def rows_of(path: Path) -> dict[str, tuple[int, float, str]]:
    """Tokens, USD and verdict by exchange id."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("SELECT exchange_id, tokens_out, usd, verdict FROM attempts")
        found = [(name, tuple(values)) for name, *values in rows]
    assert len({name for name, _ in found}) == len(found), "no attempt is in it twice"
    return dict(found)  # type: ignore[arg-type]


def price(tokens: int) -> float:
    return (PROMPT * INPUT + tokens * OUTPUT) / 1e6


async def test_killed_in_the_middle_of_200_streams_loses_one_flush_interval_at_most(
    tmp_path: Path, record_property: Any
) -> None:
    counting = Counting()
    path = tmp_path / "beacon.db"
    async with RawBackend(counting.script) as one, RawBackend(counting.script) as two:
        configuration(tmp_path, [one.url, two.url])
        async with serving(tmp_path) as (process, port):
            clients = Clients(port)
            tasks = [asyncio.create_task(clients.one(n)) for n in range(STREAMS)]
            # Many have ended, and 200 run, but for those between two.
            await eventually(lambda: len(clients.ended) >= 2 * STREAMS, 60)
            first = await flushed(port, await flushed(port, 0.0))
            await flushed(port, first)
            await eventually(lambda: counting.running >= STREAMS * 0.8, 60)
            await asyncio.sleep(INTERVAL * random.random())  # not only just after a write
            process.send_signal(signal.SIGKILL)
            killed = time.time()
            assert await process.wait() == -signal.SIGKILL
            await asyncio.gather(*tasks)

        assert path.with_name("beacon.db-wal").stat().st_size > 0, "nobody closed it"
        rows = rows_of(path)
        counted = counting.ended
        good = {name: row for name, row in rows.items() if row[2] == "good"}
        for name, (tokens, usd, _) in good.items():
            assert tokens == counted[name], "as the backend counted"
            assert usd == pytest.approx(price(tokens))
        early = {name for name, at in clients.ended.items() if at <= first}
        assert len(early) > STREAMS
        assert early <= good.keys(), "what ended before the last write that is known of began"
        lost = counted.keys() - good.keys()
        spent = sum(usd for _, usd, _ in rows.values())
        missing = sum(price(tokens) for tokens in counted.values()) - spent
        # Of a stream whose client never had its end nobody knows when it ended: at the latest when
        # the proxy was killed, and `first` is before that.
        late = sum(price(counted[name]) for name in counted.keys() - early)
        assert 0.0 <= missing + 1e-9 <= late + 2e-9
        ages = [killed - clients.ended[name] for name in lost & clients.ended.keys()]
        record_property("lost", f"{len(lost)} of {len(counted)}, up to {max(ages, default=0):.3f}s")

        async with serving(tmp_path) as (process, port), RawClient(port) as client:
            # What was spent before still counts.
            costs = json.loads((await client.ask(request("GET", "/costs?by=pool"))).body)
            assert costs["total_usd"] == pytest.approx(spent, abs=1e-9)
            assert costs["total"]["attempts"] == len(rows)
            ((_, past),) = spent_since(path, [0.0])
            assert sum(each.usd for each in past.places) == pytest.approx(spent)
            answer = await client.ask(chat(stream=True, headers=[("X-Request-Id", "after")]))
            assert answer.complete
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 30) == 0
        assert rows_of(path).keys() == {*rows, "after"}
        assert not path.with_name("beacon.db-wal").exists(), "it was closed this time"

        spent = sum(usd for _, usd, _ in rows_of(path).values())
        configuration(tmp_path, [one.url, two.url], month=spent)
        async with serving(tmp_path) as (process, port), RawClient(port) as client:
            refused = await client.ask(chat(stream=True))
            assert refused.status == 429, "the budget still holds"
            assert "month" in refused.json["error"]["message"]
            assert len(counting.ended) == len(counted), "nobody was asked"


# Writes until it is killed; says after each turn how many rows that makes.
WRITER = """
import sys
from beacon_proxy.contracts import Backend, Exchange, Outcome, Stage, Verdict
from beacon_proxy.ledger import Ledger

def tell(event, /, **fields):
    raise SystemExit(f"{event} {fields}")

path, name = sys.argv[1:]
ledger = Ledger(path, flush_interval=0.25, retention_days=90, notify=tell)
here = Backend("b", "golem", "http://h", "http", "h", 80)
n = 0
while True:
    for _ in range(37):
        exchange = Exchange(f"{name}-{n}" + "." * (n % 90), "GET", b"/", "/", (), 0.0)
        ledger.observe(exchange, Outcome(here, 1, Verdict.GOOD, Stage.DONE))
        n += 1
    ledger.turn()
    print(n, flush=True)
"""


def test_killed_at_any_moment_keeps_the_file_whole_and_all_that_was_told(tmp_path: Path) -> None:
    """Beside one that goes on: neither may harm what the other one wrote."""
    path = tmp_path / "beacon.db"
    root = Path(__file__).parent.parent

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    told: dict[str, int] = {}
    with start("stays") as stays:
        try:
            assert stays.stdout is not None
            for turn in range(4):
                with start(f"k{turn}") as killed:
                    assert killed.stdout is not None
                    for _ in range(3 + 5 * turn):
                        told[f"k{turn}"] = int(killed.stdout.readline())
                    killed.kill()
                    for line in killed.stdout:
                        told[f"k{turn}"] = int(line)
            stays.kill()
            told["stays"] = int(stays.stdout.read().split()[-1])
        finally:
            stays.kill()
    rows = rows_of(path)
    for name, count in told.items():
        have = sum(row.startswith(f"{name}-") for row in rows)
        assert count <= have <= count + 37, name
