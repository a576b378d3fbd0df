"""How regions and providers do: /regions, the gauges, and what rankers are told of it."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from beacon_proxy.api.admin.views import regions, sums
from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Live,
    Outcome,
    Recent,
    Stage,
    Usage,
    Verdict,
)
from beacon_proxy.ops.performance import Performance
from beacon_proxy.ops.totals import Totals
from beacon_proxy.ops.windows import Windows

from .kit import Proxy, RawBackend, RawClient, chat, eventually, json_answer, proxy, request
from .real import MODEL, Child, row

pytest_plugins = ["tests.real"]

DOCS = Path(__file__).parent.parent / "docs" / "regions.md"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


def backend(name: str, provider: str = "golem", region: str = "us-east") -> Backend:
    return Backend(name, provider, "http://127.0.0.1:1", "http", "127.0.0.1", 1, region=region)


US, EU, MODAL = backend("us"), backend("eu", region="eu-west"), backend("m", "modal", "eu-west")


SOME = Usage(50, 150)


def outcome(
    at: Backend,
    verdict: Verdict = Verdict.GOOD,
    *,
    ttft: float | None = 0.5,
    duration: float = 2.5,
    usage: Usage | None = SOME,
    usd: float = 0.002,
    cold_start: float | None = None,
) -> Outcome:
    return Outcome(
        at,
        1,
        verdict,
        Stage.DONE,
        ttft=ttft,
        duration=duration,
        usage=usage,
        usd=usd,
        billed=duration,
        cold_start=cold_start,
    )


class Rows:
    """A fleet of rows that are written down, for `Performance`."""

    def __init__(self, *backends: Backend) -> None:
        self.rows = [(each, Live()) for each in backends]

    def candidates(self) -> list[Candidate]:
        return [Candidate(each, live) for each, live in self.rows]

    async def changed(self, seen: int) -> int:
        raise AssertionError("nobody asks")

    async def check(self, candidate: Candidate, seconds: float) -> None:
        raise AssertionError("nobody asks")

    def recent(self) -> dict[str, Recent | None]:
        return {each.name: live.recent for each, live in self.rows}


class FakeClock:
    def __init__(self) -> None:
        self.now = 6_000.0

    def __call__(self) -> float:
        return self.now


# -- the numbers ---------------------------------------------------------------------------------


def test_sums_when_nothing_was_attempted_are_null_or_a_true_zero() -> None:
    found = sums(Totals())
    zero = {name for name, value in found.items() if value == 0}
    assert zero == {
        *("attempts", "good", "strikes", "busy", "seconds", "billed_seconds", "usd"),
        *("tokens_in", "tokens_out", "cold_starts"),
    }
    assert {value for name, value in found.items() if name not in zero} == {None}


def test_sums_of_attempts_show_each_number_once() -> None:
    windows = Windows(FakeClock())
    windows.add(outcome(US), "m", stream=True)
    windows.add(outcome(US, Verdict.STRIKE, ttft=None, usage=None), "m")
    windows.add(outcome(US, ttft=9.0, duration=11.5, cold_start=8.5, usage=None, usd=0.006), "m")
    (totals,) = windows.places(60).values()
    assert sums(totals) == {
        "attempts": 3,
        "good": 2,
        "strikes": 1,
        "busy": 0,
        "success_rate": 0.6667,
        "seconds": 16.5,
        "billed_seconds": 16.5,
        "usd": 0.01,
        "cost_per_second": 0.000606061,
        "cost_per_million_tokens": 50.0,
        "tokens_in": 50,
        "tokens_out": 150,
        "estimated_share": 0.0,
        "tokens_per_second": 74.5,
        "ttft_p50": 0.5,
        "ttft_p95": 0.5,
        "ttft_p99": 0.5,
        "duration_p50": 2.5,
        "duration_p95": 3.0,
        "duration_p99": 3.0,
        "cold_starts": 1,
        "cold_start_p50": 8.5,
        "cold_start_p95": 8.5,
        "cold_start_p99": 8.5,
    }


def test_regions_of_a_region_merge_what_its_providers_did() -> None:
    """A region's percentile is that of all its answers, not a mean of its providers'."""
    windows = Windows(FakeClock())
    for n in range(1_000):
        windows.add(outcome(EU, ttft=0.1 + n / 10_000, duration=1.0), "m")
    for n in range(100):
        windows.add(outcome(MODAL, ttft=5.0 + n / 100, duration=10.0), "m")
    whole = regions([Candidate(EU, Live())], 0.0, windows)["eu-west"]
    assert whole["providers"].keys() == {"golem", "modal"}
    told = whole["windows"]["5"]
    assert told["attempts"] == 1_100
    assert told["ttft_p50"] == pytest.approx(0.155, abs=0.002)
    assert told["ttft_p95"] == pytest.approx(5.45, abs=0.05)
    assert whole["providers"]["golem"]["5"]["ttft_p95"] == pytest.approx(0.195, abs=0.001)


def test_regions_over_one_and_five_minutes_forget_what_the_hour_still_holds() -> None:
    clock = FakeClock()
    windows = Windows(clock)
    windows.add(outcome(US), "m")
    clock.now += 4 * 60
    windows.add(outcome(US), "m")
    clock.now += 3 * 60
    told = regions([], 0.0, windows)["us-east"]["windows"]
    assert {span: it["attempts"] for span, it in told.items()} == {"1": 0, "5": 1, "60": 2}
    assert told["1"]["ttft_p50"] is None


# -- what rankers are told -----------------------------------------------------------------------


def test_recent_is_that_of_all_backends_of_its_region_and_provider() -> None:
    windows, fleet = Windows(FakeClock()), Rows(US, EU, MODAL, backend("eu2", region="eu-west"))
    windows.add(outcome(EU, ttft=0.4), "m", stream=True)
    windows.add(outcome(fleet.rows[3][0], ttft=0.8), "m", stream=True)
    windows.add(outcome(MODAL, Verdict.STRIKE, ttft=None), "m")
    Performance(windows).tell(fleet)
    recent = fleet.recent()
    assert recent["us"] is None
    assert recent["eu"] == recent["eu2"]
    assert recent["eu"] == Recent(0.4, 0.8, 2.5, 1.0, pytest.approx(298 / 3.8))
    assert recent["m"] == Recent(success=0.0)


def test_recent_when_five_minutes_are_over_is_not_known_any_more() -> None:
    clock = FakeClock()
    windows, fleet = Windows(clock), Rows(US)
    windows.add(outcome(US), "m")
    performance = Performance(windows)
    for minutes, known in ((0, True), (5, True), (6, False)):
        clock.now = 6_000.0 + 60 * minutes
        performance.tell(fleet)
        assert (fleet.recent()["us"] is not None) is known, minutes


async def test_recent_while_the_process_lives_is_kept_and_ends_with_it() -> None:
    windows, fleet = Windows(FakeClock()), Rows(US)
    async with Performance(windows, pause=0.01).lifespan(fleet):
        windows.add(outcome(US), "m")
        await eventually(lambda: fleet.recent()["us"])
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "performance.recent"]


async def test_windows_while_the_process_lives_are_settled_as_soon_as_a_minute_is_over() -> None:
    """Not with the next look, seconds later: who asks before it would have all of it to do."""
    clock, fleet = FakeClock(), Rows(US)
    windows = Windows(clock)
    windows.add(outcome(US), "m")
    clock.now = 6_059.9
    async with Performance(windows, pause=30).lifespan(fleet):
        await eventually(lambda: not windows._cells)
        clock.now = 6_060.0
        await eventually(lambda: windows._settled == 101)


async def test_recent_when_it_cannot_be_kept_says_so() -> None:
    class Broken(Rows):
        def candidates(self) -> list[Candidate]:
            raise RuntimeError("no rows")

    told: list[tuple[str, Any]] = []
    performance = Performance(
        Windows(FakeClock()), lambda event, **fields: told.append((event, fields))
    )
    async with performance.lifespan(Broken()):
        await eventually(lambda: told)
    assert told == [("performance.stopped", {"error": "RuntimeError('no rows')"})]


# -- Prometheus ----------------------------------------------------------------------------------


def test_gauges_show_what_was_measured_and_nothing_else() -> None:
    clock = FakeClock()
    windows = Windows(clock)
    windows.add(outcome(US, Verdict.STRIKE, ttft=None, usage=None, usd=0.0), "m")
    clock.now += 120  # out of the one minute
    found = {(gauge.name, gauge.labels): gauge.value for gauge in Performance(windows).gauges()}
    where = ("region", "us-east"), ("provider", "golem")
    assert found == {
        (name, (*where, ("window", window))): value
        for window in ("5m", "60m")
        for name, value in (
            ("region_attempts", 1),
            ("region_busy", 0),
            ("region_success_ratio", 0.0),
            ("region_usd_per_second", 0.0),
        )
    }


async def seen(p: Proxy, path: str, *headers: tuple[str, str]) -> bytes:
    async with RawClient(p.port) as client:
        answer = await client.ask(request("GET", path, headers))
    assert answer.status == 200
    return bytes(answer.body)


async def test_metrics_of_a_proxy_that_answered_are_valid_and_labelled_by_place() -> None:
    async with RawBackend(json_answer(DOCUMENT)) as one, proxy(one, NOBODY) as p:
        async with RawClient(p.port) as client:
            for _ in range(3):
                assert (await client.ask(chat())).status == 200
        await p.exchanges(3)
        text = (await seen(p, "/metrics", ("Accept", "text/plain"))).decode()
        openmetrics = (await seen(p, "/metrics", ("Accept", OPENMETRICS))).decode()
    families = {
        family.name: family
        for family in parse_openmetrics(openmetrics)
        if family.name.startswith("beacon_region")
    }
    assert families.keys() == {
        family.name for family in parse_text(text) if family.name.startswith("beacon_region")
    }
    # What `promtool check metrics` refuses.
    for family in parse_openmetrics(openmetrics):
        names = {name for sample in family.samples for name in sample.labels}
        assert "quantile" not in names, family.name
        assert family.type == "histogram" or "le" not in names, family.name
    ttft = families["beacon_region_ttft_seconds"]
    assert ttft.type == "gauge"
    assert {
        (s.labels["region"], s.labels["provider"], s.labels["window"], s.labels["percentile"])
        for s in ttft.samples
    } == {
        ("us-east", "openai", window, percentile)
        for window in ("1m", "5m", "60m")
        for percentile in ("50", "95", "99")
    }
    assert [s.value for s in families["beacon_region_attempts"].samples] == [3, 3, 3]
    assert [s.value for s in families["beacon_region_success_ratio"].samples] == [1, 1, 1]
    assert len({name for name in families if "cold" not in name}) == len(families) == 9
    values = [sample.value for family in families.values() for sample in family.samples]
    assert all(map(math.isfinite, values)), values
    durations = [s.value for s in families["beacon_region_duration_seconds"].samples]
    assert all(0 < seconds < 10 for seconds in durations)


async def test_live_recent_of_a_running_proxy_is_told_to_every_backend() -> None:
    async with RawBackend(json_answer(DOCUMENT)) as one, proxy(one, NOBODY) as p:
        async with RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
        # The task tells it every 5 s: what it would say next.
        Performance(p.app.telemetry.windows).tell(p.app.fleet)
        recent = [candidate.live.recent for candidate in p.app.fleet.candidates()]
        running = {task.get_name() for task in asyncio.all_tasks()}
    assert "performance.recent" in running
    assert recent[0] is not None
    assert recent[0].success == 1.0
    assert recent[1] is None


USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
DOCUMENT = {
    "object": "chat.completion",
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
NOBODY = {"url": "http://127.0.0.1:9", "region": "eu-west", "price_per_second": 1.0}


# -- the whole, and its document -----------------------------------------------------------------


async def test_regions_answer_has_the_keys_that_the_document_shows() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    shown = json.loads(example)
    async with RawBackend(json_answer(DOCUMENT)) as one, proxy(one) as p:
        async with RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
        told = json.loads(await seen(p, "/regions"))
    assert told.keys() == shown.keys()
    assert shown["minutes"] == told["minutes"] == [1, 5, 60]
    for answer in (told, shown):
        for region in answer["regions"].values():
            assert region.keys() == told["regions"]["us-east"].keys()
            for spans in (region["windows"], *region["providers"].values()):
                assert spans.keys() == {"1", "5", "60"} or answer is shown
                for numbers in spans.values():
                    assert numbers.keys() == sums(Totals()).keys()


async def test_regions_before_a_real_backend_tell_times_and_paces_that_can_be(
    llama: Child,
) -> None:
    """Two streams and a document of llama.cpp, against what the log says of them."""
    async with proxy(row(llama, name="near", price_per_second=0.001)) as p:
        url = f"http://127.0.0.1:{p.port}/v1"
        client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)
        asked: Any = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Count to ten."}],
            "max_tokens": 12,
            "extra_body": {"ignore_eos": True},
        }
        async with client:
            for _ in range(2):
                stream = await client.chat.completions.create(
                    **asked, stream=True, stream_options={"include_usage": True}
                )
                async for _ in stream:
                    pass
            await client.chat.completions.create(**asked)
        lines = await p.exchanges(3)
        told = json.loads(await seen(p, "/regions"))["regions"]["us-east"]
    (numbers,) = {json.dumps(spans["60"]) for spans in told["providers"].values()}
    hour = json.loads(numbers)
    assert hour == told["windows"]["60"]
    assert (hour["attempts"], hour["good"], hour["tokens_out"]) == (3, 3, 3 * 12)
    assert hour["tokens_in"] > 3 * 5
    times = sorted(line["attempts"][0]["duration_s"] for line in lines)
    assert hour["duration_p50"] == pytest.approx(times[1], abs=0.001)
    assert hour["duration_p99"] == pytest.approx(times[2], abs=0.001)
    assert 0 < hour["ttft_p50"] < hour["duration_p99"]
    assert 11 / times[-1] < hour["tokens_per_second"] < 10_000
    assert hour["cost_per_second"] == pytest.approx(0.001)
    spent = 1e6 * hour["usd"] / (hour["tokens_in"] + hour["tokens_out"])
    assert hour["cost_per_million_tokens"] == pytest.approx(spent, rel=1e-4)
