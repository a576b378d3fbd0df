"""The canonical line, events and metrics: what is told, and what is never told."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Dialect,
    End,
    Exchange,
    Fault,
    Gauge,
    Live,
    Outcome,
    Stage,
    Usage,
    Verdict,
)
from beacon_proxy.errors import Overloaded
from beacon_proxy.ops.lines import JsonLines, encode
from beacon_proxy.ops.live import MAX_WAITING
from beacon_proxy.ops.metrics import Metrics
from beacon_proxy.ops.telemetry import MAX_LISTENERS, Telemetry
from beacon_proxy.spending.bill import price_of

SECRET = "sk-very-secret"
UNIX = 1_700_000_000.25


class Recorder:
    """A structlog processor that keeps every event and prints none."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
        self.events.append({"level": level, **event})
        raise structlog.DropEvent

    def logger(self) -> Any:
        return structlog.wrap_logger(None, processors=[self])


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def backend(name: str = "golem-1", provider: str = "golem", price: float = 0.0001) -> Backend:
    return Backend(
        name,
        provider,
        "http://backend.internal:11434",
        "http",
        "backend.internal",
        11434,
        region="us-east",
        pool="baseline",
        price_per_second=price,
        api_key=SECRET,
        headers=((b"X-Team", SECRET.encode()),),
    )


def exchange(**fields: Any) -> Exchange:
    given: dict[str, Any] = {
        "id": "req-1",
        "method": "POST",
        "target": f"/v1/chat/completions?key={SECRET}".encode(),
        "path": "/v1/chat/completions",
        "headers": ((b"Authorization", f"Bearer {SECRET}".encode()),),
        "started": 100.0,
        "client": "203.0.113.9",
        "dialect": Dialect.OPENAI,
        "model": "llama3.2:1b",
        "body": f'{{"messages":"{SECRET}"}}'.encode(),
    }
    return Exchange(**{**given, **fields})


def outcome(at: Backend | None = None, number: int = 1, **fields: Any) -> Outcome:
    given: dict[str, Any] = {
        "verdict": Verdict.GOOD,
        "stage": Stage.DONE,
        "status": 200,
        "sent": True,
        "started": 100.001,
        "ttft": 0.25,
        "duration": 2.0,
        "usage": Usage(12, 30),
    }
    made = {**given, **fields}
    at = at or backend()
    made.setdefault("billed", made["duration"] if made["sent"] else 0.0)
    made.setdefault("usd", price_of(at, made["billed"], made["usage"]))
    return Outcome(backend=at, number=number, **made)


REFUSED = {
    "verdict": Verdict.STRIKE,
    "stage": Stage.CONNECT,
    "fault": Fault.REFUSED,
    "status": None,
    "sent": False,
    "ttft": None,
    "duration": 0.5,
    "usage": None,
    "detail": "connect to backend.internal failed",
}

BUSY = {"verdict": Verdict.BUSY, "stage": Stage.DONE, "fault": Fault.BUSY, "status": 503}


class Teller:
    """A telemetry with its log at hand and a clock that stands."""

    def __init__(self, access_log: bool = True) -> None:
        self.recorder = Recorder()
        self.telemetry = Telemetry(
            region="us-east",
            access_log=access_log,
            log=self.recorder.logger(),
            clock=lambda: 1000.0,
            unix=lambda: UNIX,
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.recorder.events

    def end(self, of: Exchange, *outcomes: Outcome, end: End = End.COMPLETE, **fields: Any) -> None:
        for one in outcomes:
            of.attempts.append(one)
            self.telemetry.attempt(of, one)
        given: dict[str, Any] = {
            "status": 200,
            "reason": None,
            "bytes_in": 64,
            "bytes_out": 512,
            "ttft": 0.251,
            "duration": 2.002,
            "queued": 0.0,
        }
        self.telemetry.exchange(of, end, **{**given, **fields})

    def samples(self, *candidates: Candidate) -> dict[tuple[str, tuple[str, ...]], float]:
        """Every metric sample, by its name and its label values in order of their names."""
        body, _ = self.telemetry.render(candidates)
        return {
            (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in parse_text(body.decode())
            for sample in family.samples
        }


# -- the canonical line --------------------------------------------------------------------------


def test_exchange_when_complete_writes_one_line_with_every_field() -> None:
    teller = Teller()
    teller.end(exchange(trace_id="t-1"), outcome(), queued=0.0000014)
    assert teller.events == [
        {
            "level": "info",
            "event": "exchange.done",
            "id": "req-1",
            "end": "complete",
            "method": "POST",
            "path": "/v1/chat/completions",
            "dialect": "openai",
            "model": "llama3.2:1b",
            "status": 200,
            "reason": None,
            "backend": "golem-1",
            "provider": "golem",
            "region": "us-east",
            "attempts": [
                {
                    "backend": "golem-1",
                    "region": "us-east",
                    "stage": "done",
                    "fault": None,
                    "status": 200,
                    "duration_s": 2.0,
                    "ttft_s": 0.25,
                }
            ],
            "cost_usd": 0.0002,
            "client": "203.0.113.9",
            "trace_id": "t-1",
            "tokens_in": 12,
            "tokens_out": 30,
            "ttft_s": 0.251,
            "duration_s": 2.002,
            "queued_s": 0.000001,
            "bytes_in": 64,
            "bytes_out": 512,
        }
    ]


def test_exchange_when_it_failed_over_shows_each_attempt_and_names_the_last() -> None:
    teller = Teller()
    second = outcome(backend("modal-1", "modal", 0.0003), 2)
    teller.end(exchange(), outcome(**REFUSED), second)
    (line,) = teller.events
    assert [(a["backend"], a["stage"], a["fault"]) for a in line["attempts"]] == [
        ("golem-1", "connect", "refused"),
        ("modal-1", "done", None),
    ]
    assert line["attempts"][0]["detail"] == "connect to backend.internal failed"
    assert (line["backend"], line["provider"]) == ("modal-1", "modal")
    assert line["cost_usd"] == 0.0006  # the refused one was never sent, so it costs nothing


def test_exchange_when_an_earlier_attempt_gave_the_answer_names_its_backend() -> None:
    """A 503 that was kept is passed on when the last backend could not even be reached."""
    teller = Teller()
    first = outcome(backend("modal-1", "modal"), **BUSY)
    one = exchange(answered=first.backend)
    teller.end(one, first, outcome(**{**REFUSED, "number": 2}), end=End.ERROR, status=503)
    (line,) = teller.events
    assert [tried["backend"] for tried in line["attempts"]] == ["modal-1", "golem-1"]
    assert (line["backend"], line["provider"]) == ("modal-1", "modal")


def test_exchange_when_two_attempts_were_sent_costs_both() -> None:
    """Failed tries that reached a GPU are paid for, too."""
    teller = Teller()
    broken = outcome(**{**REFUSED, "stage": Stage.HEAD, "sent": True, "duration": 3.0})
    teller.end(exchange(), broken, outcome(backend("modal-1", "modal", 0.0003), 2))
    assert teller.events[0]["cost_usd"] == pytest.approx(0.0003 + 0.0006)
    assert teller.events[0]["tokens_out"] == 30


def test_exchange_when_no_attempt_was_made_names_no_backend() -> None:
    teller = Teller()
    end = End.ERROR
    teller.end(exchange(), end=end, status=404, reason="model_not_found", ttft=None)
    (line,) = teller.events
    assert (line["status"], line["reason"], line["end"]) == (404, "model_not_found", "error")
    assert (line["backend"], line["attempts"], line["cost_usd"]) == (None, [], 0.0)
    assert line["ttft_s"] is None
    assert "tokens_in" not in line


def test_exchange_when_client_left_is_499_and_info() -> None:
    teller = Teller()
    left = {"verdict": Verdict.NEUTRAL, "stage": Stage.STREAM, "fault": Fault.CLIENT_CLOSED}
    teller.end(exchange(), outcome(**left), end=End.CLIENT_CLOSED, status=200)
    (line,) = teller.events
    assert (line["status"], line["level"], line["end"]) == (499, "info", "client_closed")


def test_exchange_when_access_log_is_off_writes_no_line_but_counts_and_notifies() -> None:
    teller = Teller(access_log=False)
    teller.end(exchange(), outcome())
    teller.telemetry.notify("backend.ejected", backend="golem-1", seconds=30.0)
    assert [event["event"] for event in teller.events] == ["backend.ejected"]
    assert teller.samples()["beacon_exchanges_total", ("complete", "", "2xx")] == 1


def test_exchange_when_texts_are_huge_cuts_them() -> None:
    teller = Teller()
    teller.end(
        exchange(method="M" * 999, path="/" + "p" * 9999, model="m" * 9999, trace_id="t" * 9999),
        outcome(detail="d" * 9999),
    )
    assert len(encode(teller.events[0])) < 1500


# Text as a client, or a careless plugin, may make it up: of any size, with lone surrogates.
odd_text = st.one_of(
    st.text(st.characters(), max_size=12),
    st.sampled_from(["", "llama3.2:1b", "/v1/x?key=1", "\ud800", '\x00\n"\\', "é" * 999]),
)
seconds = st.floats(0, 1e6)
backends = st.builds(backend, odd_text, odd_text, st.floats(0, 1))
outcomes = st.builds(
    Outcome,
    backend=backends,
    number=st.integers(1, 9),
    verdict=st.sampled_from(Verdict),
    stage=st.sampled_from(Stage),
    fault=st.none() | st.sampled_from(Fault),
    status=st.none() | st.integers(100, 599),
    sent=st.booleans(),
    ttft=st.none() | seconds,
    duration=seconds,
    usage=st.none()
    | st.builds(
        Usage,
        st.integers(0, 1 << 60),
        st.integers(0, 1 << 60),
        st.booleans(),
        st.just(0) | st.integers(0, 1 << 60),
    ),
    detail=odd_text,
)
exchanges = st.builds(
    exchange,
    id=odd_text,
    method=odd_text,
    path=odd_text,
    client=odd_text,
    dialect=st.sampled_from(Dialect),
    model=st.none() | odd_text,
    trace_id=st.none() | odd_text,
    attempts=st.lists(outcomes, max_size=3),
    answered=st.none() | backends,
)
ends = st.fixed_dictionaries(
    {
        "end": st.sampled_from(End),
        "status": st.integers(0, 599),
        "reason": st.none() | odd_text | st.sampled_from(Fault),
        "bytes_in": st.integers(0, 1 << 60),
        "bytes_out": st.integers(0, 1 << 60),
        "ttft": st.none() | seconds,
        "duration": seconds,
        "queued": seconds,
    }
)


def plainly(of: Exchange, end: dict[str, Any]) -> dict[str, Any]:
    """The canonical line as one would write it down, its order of fields included."""

    def text(value: str | None, size: int | None = None) -> str | None:
        return value if value is None else value[:size].encode("utf-8", "replace").decode()

    def number(value: float | None, digits: int = 6) -> Any:
        # One step more or less is nobody's business; more digits than that are.
        if value is None:
            return None
        return pytest.approx(round(value, digits), rel=1e-12, abs=1.1 * 10**-digits)

    def attempt(outcome: Outcome) -> dict[str, Any]:
        return {
            "backend": text(outcome.backend.name),
            "region": text(outcome.backend.region),
            "stage": outcome.stage.value,
            "fault": outcome.fault and outcome.fault.value,
            "status": outcome.status,
            "duration_s": number(outcome.duration),
            "ttft_s": number(outcome.ttft),
            **({"detail": text(outcome.detail, 200)} if outcome.detail else {}),
        }

    last = of.answered or (of.attempts[-1].backend if of.attempts else None)
    usages = [outcome.usage for outcome in of.attempts if outcome.usage]
    tokens = {
        "tokens_in": sum(usage.input for usage in usages),
        "tokens_out": sum(usage.output for usage in usages),
    }
    cached = sum(usage.cached for usage in usages)
    return {
        "level": "info",
        "event": "exchange.done",
        "id": text(of.id),
        "end": end["end"].value,
        "method": text(of.method, 32),
        "path": text(of.path.split("?")[0], 256),
        "dialect": of.dialect.value,
        "model": text(of.model, 128),
        "status": 499 if end["end"] is End.CLIENT_CLOSED else end["status"],
        "reason": text(end["reason"]),
        "backend": last and text(last.name),
        "provider": last and text(last.provider),
        "region": last and text(last.region),
        "attempts": [attempt(outcome) for outcome in of.attempts],
        "cost_usd": number(sum(outcome.usd for outcome in of.attempts), 9),
        "client": text(of.client),
        **({} if of.trace_id is None else {"trace_id": text(of.trace_id, 128)}),
        **(tokens if usages else {}),
        "ttft_s": number(end["ttft"]),
        "duration_s": number(end["duration"]),
        "queued_s": number(end["queued"]),
        "bytes_in": end["bytes_in"],
        "bytes_out": end["bytes_out"],
        **({"tokens_cached": cached} if cached else {}),
        **({"tokens_estimated": True} if any(usage.estimated for usage in usages) else {}),
    }


@given(st.lists(st.tuples(exchanges, ends), min_size=1, max_size=6))
def test_canonical_lines_of_any_exchanges_are_what_one_would_write_plainly(
    told: list[tuple[Exchange, dict[str, Any]]],
) -> None:
    """Several in a row: what one leaves in the dict that is filled again shows in the next."""
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", SimpleNamespace(buffer=file))
        telemetry = Telemetry(region="us-east", access_log=True)
        for of, end in told:
            telemetry.exchange(of, **end)
        telemetry.close()
    lines = file.getvalue().split(b"\n")
    assert lines.pop() == b""
    for (of, end), line in zip(told, lines, strict=True):
        found = json.loads(line)
        stamp = found.pop("ts")
        assert datetime.now(UTC) - datetime.fromisoformat(stamp) < timedelta(minutes=5)
        assert found == plainly(of, end)
        assert list(found) == list(plainly(of, end))
        assert len(line) < 20_000
        for times in (found, *found["attempts"]):
            for name in ("duration_s", "ttft_s", "queued_s"):
                assert len(f"{times.get(name) or 0!r}".partition(".")[2]) <= 6


@given(st.lists(st.integers(0, 1 << 54), min_size=1, max_size=20))
def test_json_lines_tell_any_time_to_the_microsecond(ticks: list[int]) -> None:
    """A clock that is put back, a second that is all but over: no stamp of the second before."""
    times = []
    for tick in ticks:
        time = tick / (1 << 23)
        times += [time // 1 + 0.9999998, time, time // 1]
    file, clock = io.BytesIO(), iter(times)
    lines = JsonLines(file, unix=lambda: next(clock))
    for _ in times:
        lines.write({"ts": None, "level": "info", "event": "x"})
    for time, line in zip(times, file.getvalue().splitlines(), strict=True):
        stamp = json.loads(line)["ts"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", stamp)
        exact = datetime.fromtimestamp(time, UTC)
        assert abs(datetime.fromisoformat(stamp) - exact) <= timedelta(microseconds=1)


async def test_telling_tells_no_body_query_or_credential() -> None:
    file = io.BytesIO()
    telemetry = Telemetry(region="us-east", access_log=True, log=JsonLines(file).logger)
    listener = telemetry.subscribe()
    one = exchange(path=f"/v1/chat/completions?key={SECRET}")
    one.attempts.append(outcome())
    telemetry.attempt(one, one.attempts[0])
    telemetry.exchange(
        one,
        End.COMPLETE,
        status=200,
        reason=None,
        bytes_in=1,
        bytes_out=1,
        ttft=0.1,
        duration=1.0,
        queued=0.0,
    )
    # What a careless plugin may hand over.
    telemetry.notify("plugin.told", backend=backend(), exchange=one, headers=one.headers)
    told = file.getvalue() + telemetry.render([Candidate(backend(), Live())])[0]
    told += (await listener.get())[1] + (await listener.get())[1]
    assert told.count(b"req-1") == 2
    assert SECRET.encode() not in told


# -- lines ---------------------------------------------------------------------------------------


def test_json_lines_write_one_json_object_a_line_in_utc() -> None:
    file = io.BytesIO()
    lines = JsonLines(file, unix=lambda: UNIX)
    lines.write(
        {"ts": None, "level": "info", "event": "exchange.done", "id": "ü\n", "end": End.COMPLETE}
    )
    lines.logger.warning("backend.ejected", seconds=30.0)
    first, second = file.getvalue().splitlines()
    assert json.loads(first) == {
        "ts": "2023-11-14T22:13:20.250000Z",
        "level": "info",
        "event": "exchange.done",
        "id": "ü\n",
        "end": "complete",
    }
    assert json.loads(second) == {
        "ts": "2023-11-14T22:13:20.250000Z",
        "level": "warning",
        "event": "backend.ejected",
        "seconds": 30.0,
    }


def test_json_lines_when_an_exception_is_logged_hold_its_traceback() -> None:
    file = io.BytesIO()
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        JsonLines(file).logger.exception("server.failed")
    line = json.loads(file.getvalue())
    assert line["level"] == "error"
    assert "RuntimeError: boom" in line["exception"]


def test_json_lines_neither_read_nor_change_the_global_configuration() -> None:
    before = structlog.get_config()
    JsonLines(io.BytesIO()).logger.info("server.started")
    Telemetry(region="us-east", access_log=True, log=structlog.wrap_logger(None))
    assert structlog.get_config() == before
    assert not structlog.is_configured()


def test_telemetry_without_a_log_writes_lines_to_stdout(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    telemetry = Telemetry(region="us-east", access_log=True)
    telemetry.notify("server.started", port=8080)
    telemetry.close()
    line = json.loads(capfdbinary.readouterr().out)
    assert (line["event"], line["port"], line["level"]) == ("server.started", 8080, "info")


@pytest.mark.parametrize(
    "path", ["/\udcff", "/\ud800x"], ids=["not utf-8 on the wire", "a lone surrogate"]
)
def test_exchange_when_its_path_is_no_utf8_still_writes_its_line(path: str) -> None:
    """orjson refuses such a str: the exchange would have ended without a line, or with a crash."""
    file = io.BytesIO()
    telemetry = Telemetry(region="us-east", access_log=True, log=JsonLines(file).logger)
    telemetry.exchange(
        exchange(path=path),
        End.ERROR,
        status=400,
        reason="invalid_request",
        bytes_in=0,
        bytes_out=0,
        ttft=None,
        duration=0.001,
        queued=0.0,
    )
    line = json.loads(file.getvalue())
    assert line["path"].startswith("/?")
    assert line["status"] == 400


def test_encode_when_a_value_is_no_json_names_it() -> None:
    told = json.loads(
        encode(
            {
                "backend": backend(),
                "names": frozenset({"b", "a"}),
                "error": ValueError("bad"),
                "path": Path("/tmp/x"),
                "huge": 1 << 70,
                "raw": b"bytes",
            }
        )
    )
    assert told == {
        "backend": "golem-1",
        "names": ["a", "b"],
        "error": "ValueError: bad",
        "path": "/tmp/x",
        "huge": 1 << 70,
        "raw": "<bytes>",
    }


def test_telling_when_the_disk_is_full_counts_lost_lines_and_harms_nobody() -> None:
    lines = JsonLines(io.BufferedWriter(FullDisk(), buffer_size=1))
    telemetry = Telemetry(region="us-east", access_log=True, log=lines.logger)
    telemetry.notify("server.started")
    telemetry.notify("server.started")
    assert telemetry.metrics.lines_lost == 2
    body, _ = telemetry.render([])
    assert b"beacon_log_lines_lost_total 2.0" in body


# -- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "level"),
    [
        ("backend.ejected", "warning"),
        ("backend.restored", "info"),
        ("backend.rested", "info"),
        ("backend.loading", "info"),
        ("fleet.panicked", "warning"),
        ("probe.failed", "warning"),
        ("observe.failed", "error"),
        ("something.new", "info"),
    ],
)
def test_notify_takes_its_level_from_the_table(event: str, level: str) -> None:
    teller = Teller()
    teller.telemetry.notify(event, backend="golem-1")
    assert teller.events == [{"level": level, "event": event, "backend": "golem-1"}]


def test_notify_when_a_field_has_a_taken_name_keeps_it_under_another() -> None:
    teller = Teller()
    teller.telemetry.notify("plugin.told", event="x", level="y", self="z")
    assert teller.events == [
        {"level": "info", "event": "plugin.told", "event_": "x", "level_": "y", "self_": "z"}
    ]


async def test_listener_receives_events_in_order_and_without_private_fields() -> None:
    teller = Teller(access_log=False)
    listener = teller.telemetry.subscribe()
    teller.telemetry.notify("backend.ejected", backend="golem-1", error="connect to 10.0.0.1")
    teller.end(exchange(trace_id="t-1"), outcome(**REFUSED), outcome(number=2))
    name, line = await listener.get()
    assert name == "backend.ejected"
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "type": "backend.ejected",
        "backend": "golem-1",
        "timestamp": UNIX,
    }
    name, line = await listener.get()
    event = json.loads(line)
    assert (name, event["type"], event["id"]) == ("exchange.done", "exchange.done", "req-1")
    assert len(event["attempts"]) == 2
    assert [event["event"] for event in teller.events] == ["backend.ejected"]
    for private in (b"203.0.113.9", b"t-1", b"backend.internal", b"/v1/chat"):
        assert private not in line


async def test_listener_when_slow_loses_the_oldest_events() -> None:
    teller = Teller()
    listener = teller.telemetry.subscribe()
    for n in range(MAX_WAITING + 3):
        teller.telemetry.notify("plugin.told", n=n)
    assert listener.dropped == 3
    assert json.loads((await listener.get())[1])["n"] == 3


async def test_listener_when_waiting_is_woken() -> None:
    teller = Teller()
    listener = teller.telemetry.subscribe()
    waiting = asyncio.ensure_future(listener.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    teller.telemetry.notify("backend.restored", backend="golem-1")
    assert (await asyncio.wait_for(waiting, 1))[0] == "backend.restored"


async def test_listener_when_unsubscribed_receives_nothing() -> None:
    teller = Teller()
    listener = teller.telemetry.subscribe()
    teller.telemetry.unsubscribe(listener)
    teller.telemetry.unsubscribe(listener)
    teller.telemetry.notify("backend.restored", backend="golem-1")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(listener.get(), 0.02)


async def test_subscribe_when_enough_listen_is_refused_until_one_leaves() -> None:
    teller = Teller()
    listeners = [teller.telemetry.subscribe() for _ in range(MAX_LISTENERS)]
    with pytest.raises(Overloaded):
        teller.telemetry.subscribe()
    teller.telemetry.unsubscribe(listeners[0])
    teller.telemetry.subscribe()


# -- metrics -------------------------------------------------------------------------------------


def test_metrics_count_exchanges_and_attempts() -> None:
    teller = Teller()
    modal = outcome(backend("modal-1", "modal", 0.0003), 2, expected_usd=0.001)
    teller.end(exchange(), outcome(**REFUSED, expected_usd=0.25), modal)
    teller.end(exchange(), end=End.ERROR, status=503, reason="overloaded", queued=10.0)
    teller.end(exchange(), outcome(expected_usd=0.5), end=End.CLIENT_CLOSED)
    teller.telemetry.queue_depth(7)
    teller.telemetry.notify("backend.ejected", backend="golem-1", seconds=30.0)
    samples = teller.samples()
    assert samples["beacon_exchanges_total", ("complete", "", "2xx")] == 1
    assert samples["beacon_exchanges_total", ("error", "overloaded", "5xx")] == 1
    assert samples["beacon_exchanges_total", ("client_closed", "", "4xx")] == 1
    # label values in the order of their names: backend, fault, stage
    assert samples["beacon_attempts_total", ("golem-1", "refused", "connect")] == 1
    assert samples["beacon_attempts_total", ("golem-1", "none", "done")] == 1
    assert samples["beacon_attempts_total", ("modal-1", "none", "done")] == 1
    assert samples["beacon_tokens_total", ("modal-1", "in")] == 12
    assert samples["beacon_tokens_total", ("golem-1", "out")] == 30
    assert samples["beacon_cost_usd_total", ("modal-1",)] == pytest.approx(0.0006)
    assert samples["beacon_expected_cost_usd_total", ("modal-1",)] == 0.001
    assert samples["beacon_expected_cost_usd_total", ("golem-1",)] == 0.75
    assert samples["beacon_ejections_total", ("golem-1",)] == 1
    assert samples["beacon_queue_depth", ()] == 7
    assert samples["beacon_queue_wait_seconds_count", ()] == 1
    assert samples["beacon_queue_wait_seconds_sum", ()] == 10
    assert samples["beacon_exchange_duration_seconds_count", ()] == 3


def test_metrics_before_anything_happened_count_from_0() -> None:
    """A counter that comes with its first 199 refusals has not risen, for Prometheus."""
    teller = Teller()
    samples = teller.samples(Candidate(backend("idle"), Live()))
    counts = {key: value for key, value in samples.items() if key[0].endswith("_total")}
    assert {v for (name, _), v in counts.items() if name.startswith("beacon")} == {0}
    for reason, hundreds in (("overloaded", 5), ("no_backend", 5), ("budget_exceeded", 4)):
        assert ("beacon_exchanges_total", ("error", reason, f"{hundreds}xx")) in counts
        assert ("beacon_exchanges_total", ("error", reason, "2xx")) in counts, "/inference"
    of_one = [name for name, values in samples if "idle" in values]
    assert {name: of_one.count(name) for name in of_one if name.endswith("_total")} == {
        "beacon_attempts_total": 4,
        "beacon_tokens_total": 2,
        "beacon_cost_usd_total": 1,
        "beacon_expected_cost_usd_total": 1,
        "beacon_ejections_total": 1,
    }
    assert len(of_one) == 17
    teller.end(exchange(), end=End.ERROR, status=503, reason="overloaded")
    teller.end(exchange(), outcome(backend("idle"), usd=0.5))
    after = teller.samples(Candidate(backend("idle"), Live()))
    assert samples.keys() <= after.keys()
    assert after["beacon_exchanges_total", ("error", "overloaded", "5xx")] == 1
    assert after["beacon_cost_usd_total", ("idle",)] == 0.5
    grown = [name for name, values in after if "idle" in values]
    assert len(grown) == 35, "and its time to first content"
    assert Teller().samples(Candidate(backend("idle"), Live())).keys() == samples.keys()


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        (None, ""),
        ("no_backend", "no_backend"),
        ("upstream_timeout", "upstream_timeout"),
        ("draining", "draining"),
        (Fault.TRUNCATED, "truncated"),
        ("made up by a plugin", "other"),
    ],
)
def test_metrics_tell_why_exchanges_ended_in_bounded_words(reason: str | None, label: str) -> None:
    teller = Teller()
    for _ in range(2):
        teller.end(exchange(), end=End.ERROR, status=503, reason=reason)
    assert teller.samples()["beacon_exchanges_total", ("error", label, "5xx")] == 2


def test_metrics_histogram_is_cumulative_and_counts_a_bound_as_below() -> None:
    teller = Teller()
    for ttft in (0.25, 0.26, 9999.0):
        teller.end(exchange(), outcome(ttft=ttft))
    samples = teller.samples()
    assert samples["beacon_ttft_seconds_bucket", ("golem-1", "0.1")] == 0
    assert samples["beacon_ttft_seconds_bucket", ("golem-1", "0.25")] == 1
    assert samples["beacon_ttft_seconds_bucket", ("golem-1", "0.5")] == 2
    assert samples["beacon_ttft_seconds_bucket", ("golem-1", "+Inf")] == 3
    assert samples["beacon_ttft_seconds_count", ("golem-1",)] == 3
    assert samples["beacon_ttft_seconds_sum", ("golem-1",)] == pytest.approx(9999.51)


def test_metrics_read_the_fleet_at_scrape() -> None:
    teller = Teller()
    well = Candidate(backend("well"), Live(in_flight=3))
    set_aside = Candidate(backend("aside"), Live(ejected_until=1030.0))
    resting = Candidate(backend("resting"), Live(resting_until=1007.0))
    rested = Candidate(backend("rested"), Live(resting_until=1000.0))
    samples = teller.samples(well, set_aside, resting, rested)
    for name, value in (("well", 0), ("aside", 0), ("resting", 1), ("rested", 0)):
        assert samples["beacon_backend_resting", (name,)] == value
    assert samples["beacon_in_flight", ("well",)] == 3
    assert samples["beacon_backend_healthy", ("well",)] == 1
    assert samples["beacon_backend_healthy", ("aside",)] == 0
    assert samples["beacon_backend_info", ("well", "baseline", "golem", "us-east")] == 1
    assert ("beacon_in_flight", ("well",)) not in teller.samples()


def test_metrics_when_others_show_numbers_tell_counters_from_gauges() -> None:
    """For a counter `rate()` and `increase()` mean something, and its name ends in `_total`."""
    teller = Teller()
    teller.telemetry.sources = (
        lambda: [
            Gauge("rows_lost", "Rows.", 3, counts=True),
            Gauge("messages", "Messages.", 5, (("what", "failed"),), counts=True),
            Gauge("waiting", "Waiting.", 7),
        ],
    )
    body, _ = teller.telemetry.render([])
    lines = body.decode().splitlines()
    assert "# TYPE beacon_rows_lost_total counter" in lines
    assert "beacon_rows_lost_total 3.0" in lines
    assert "# TYPE beacon_messages_total counter" in lines
    assert 'beacon_messages_total{what="failed"} 5.0' in lines
    assert "# TYPE beacon_waiting gauge" in lines
    assert "beacon_waiting 7.0" in lines


def test_metrics_overhead_leaves_attempts_and_waits_out() -> None:
    teller = Teller()
    # 0.5 s refused, 4 s in the queue, 0.25 s of back-off, 2 s answered: 3 ms are ours
    teller.end(exchange(), outcome(**REFUSED), outcome(number=2), duration=6.753, queued=4.25)
    samples = teller.samples()
    assert samples["beacon_overhead_seconds_sum", ()] == pytest.approx(0.003)
    assert samples["beacon_overhead_seconds_count", ()] == 1


def test_metrics_overhead_is_never_below_zero() -> None:
    """Attempts are measured on their own; together they may seem to last longer than the whole."""
    teller = Teller()
    teller.end(exchange(), outcome(), outcome(number=2), duration=3.999)
    samples = teller.samples()
    assert samples["beacon_overhead_seconds_sum", ()] == 0
    assert samples["beacon_overhead_seconds_bucket", ("5e-05",)] == 1


def test_metrics_overhead_of_an_exchange_that_broke_is_not_counted() -> None:
    teller = Teller()
    teller.end(exchange(), outcome(), end=End.CLIENT_CLOSED)
    assert teller.samples()["beacon_overhead_seconds_count", ()] == 0


def test_metrics_labels_hold_nothing_that_a_client_makes_up() -> None:
    teller = Teller()
    before = None
    for n in range(50):
        made_up = exchange(model=f"model-{n}", path=f"/p{n}", method=f"M{n}", client=f"c{n}")
        teller.end(made_up, outcome())
        before = before or teller.samples().keys()
    assert teller.samples().keys() == before


def test_metrics_of_two_telemetries_are_apart() -> None:
    one, other = Teller(), Teller()
    one.end(exchange(), outcome())
    assert ("beacon_exchanges_total", ("complete", "", "2xx")) in one.samples()
    assert other.samples()["beacon_exchanges_total", ("complete", "", "2xx")] == 0


def test_render_speaks_the_format_that_is_asked_for() -> None:
    teller = Teller()
    teller.end(exchange(), outcome())
    plain, plain_type = teller.telemetry.render([], "text/plain")
    assert plain_type.startswith("text/plain; version=0.0.4")
    assert "beacon_build_info" in {s.name for f in parse_text(plain.decode()) for s in f.samples}
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"
    openmetrics, openmetrics_type = teller.telemetry.render([], accept)
    assert openmetrics_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name for family in parse_openmetrics(openmetrics.decode())}
    assert {"beacon_exchanges", "beacon_ttft_seconds", "beacon_build"} <= families


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=x", "text/plain;version=x.1", ";,,"]
)
def test_render_when_accept_is_nonsense_falls_back_to_text(accept: str) -> None:
    body, content_type = Teller().telemetry.render([], accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"beacon_queue_depth 0.0" in body


def test_metrics_when_backends_come_and_go_unasked_hold_a_bounded_number_of_names() -> None:
    """Names of discovered backends may be addresses: without a scraper they must not pile up."""
    metrics = Metrics("us-east", lambda: 0.0)
    for n in range(2000):
        gone = backend(f"golem-10.0.{n // 256}.{n % 256}-80")
        metrics.attempt(outcome(gone, usd=0.5))
        metrics.ejections[gone.name] += 1
        metrics.forget(gone.name)
    assert len(metrics._backends) <= 257
    assert len(metrics.ejections) <= 257


def test_metrics_when_a_backend_comes_back_before_it_was_told_gone_counts_on() -> None:
    metrics = Metrics("us-east", lambda: 0.0)
    back = backend("back")
    metrics.attempt(outcome(back, usd=0.5))
    metrics.forget("back")
    candidates = [Candidate(back, Live())]
    for _ in range(2):
        text, _type = metrics.render(candidates)
        assert b'beacon_cost_usd_total{backend="back"} 0.5' in text
    metrics.forget("back")
    assert b'backend="back"' in metrics.render([])[0]
    assert b'backend="back"' not in metrics.render([])[0]
