"""The whole proxy: what happens to it becomes an alert, and no alert becomes anybody's trouble."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import pytest

from beacon_proxy.alerts import view
from beacon_proxy.config.alerts import Alerts
from beacon_proxy.contracts import Gauge

from .kit import (
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    answer,
    chat,
    closed_port,
    each_request,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .kit_hooks import SECRET, Receiver, receiver

TEXT = [("Accept", "text/plain")]
DOCUMENT = {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def alerts(*hooks: Receiver, **rules: Any) -> dict[str, Any]:
    """The section with everything shortened."""
    return {
        "interval": 0.02,
        "pause": 0,
        "webhooks": [{"url": hook.url, "secret": SECRET} for hook in hooks],
        "rules": rules,
    }


FULL = {"pool_utilisation": {"for": 0.1, "clear_for": 0.1}}


async def metric(p: Proxy, name: str) -> dict[str, float]:
    """The samples of one metric by their labels, as text."""
    async with RawClient(p.port) as client:
        text = (await client.ask(request("GET", "/metrics", TEXT))).body.decode()
    found = re.findall(rf"^{name}(\{{.*\}}) (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


async def health(p: Proxy) -> Any:
    async with RawClient(p.port) as client:
        return (await client.ask(request("GET", "/health"))).json


async def test_pool_when_it_is_full_for_long_tells_the_webhook_and_when_it_is_over() -> None:
    release, whole = asyncio.Event(), json_bytes(DOCUMENT)

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await release.wait()
            await conn.send(whole)

    async with receiver() as to, RawBackend(slow) as backend:
        row = {"url": backend, "max_in_flight": 1}
        async with (
            proxy(row, alerts=alerts(to, **FULL)) as p,
            RawClient(p.port) as client,
            RawClient(p.port) as other,
        ):
            assert (await health(p))["alerts"] == []
            asking = asyncio.create_task(client.ask(chat()), name="asking")
            await eventually(lambda: backend.requests)
            await asyncio.sleep(0.3)
            assert to.taken == [], "one slot is there to be used"
            waiting = asyncio.create_task(other.ask(chat()), name="waiting")
            await eventually(lambda: to.taken)
            told = (await health(p))["alerts"]
            active = await metric(p, "beacon_alert_active")
            release.set()
            assert (await asking).status == (await waiting).status == 200
            await eventually(lambda: len(to.taken) == 2)
            over = await metric(p, "beacon_alert_active")
            subjects = await metric(p, "beacon_alert_subject_active")
            sent = await metric(p, "beacon_webhook_messages_total")
            assert (await health(p))["alerts"] == []
    began, ended = (got.json for got in to.taken)
    assert [got.signed for got in to.taken] == [True, True]
    assert (began["type"], ended["type"]) == ("alert.began", "alert.ended")
    assert re.match(
        r"WARNING pool_utilisation: pool burst is [\d.]+ % full \(alert from 80 %\) \[us-east, ",
        began["text"],
    )
    assert 0.8 <= began["data"]["value"] <= 1.0, "full, and while somebody waited"
    assert began["data"]["key"] == ended["data"]["key"]
    since = [datetime.fromisoformat(each["since"]) for each in (began["data"], told[0])]
    assert abs(since[0] - since[1]) < timedelta(seconds=5)  # two clocks, read one by one
    assert (told[0]["rule"], told[0]["subject"]) == ("pool_utilisation", "burst")
    assert active['{rule="pool_utilisation"}'] == 1.0
    assert {value for labels, value in active.items() if "pool_util" not in labels} == {0.0}
    assert set(over.values()) == {0.0}
    key = '{rule="pool_utilisation",severity="warning",subject="burst"}'
    assert subjects[key] == 0.0
    assert sent['{webhook="webhooks[0]",what="delivered"}'] == 2.0
    (logged,) = p.events("alert.began")
    assert (logged["level"], logged["subject"], logged["threshold"]) == ("warning", "burst", 0.8)
    assert p.events("alert.ended")[0]["level"] == "info"


async def test_pool_when_attempts_come_and_go_knows_how_long_each_took() -> None:
    """Also one that failed, and one that still runs: what is read of it is the integral."""
    hang = asyncio.Event()

    async def serve(conn: BackendConn) -> None:
        async for asked in each_request(conn):
            if b"hang" in asked.body:
                await hang.wait()
            await asyncio.sleep(0.01)
            await conn.send(json_bytes(DOCUMENT, 500 if b"bad" in asked.body else 200))

    began = monotonic()
    async with (
        RawBackend(serve) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
        RawClient(p.port) as other,
    ):
        for model in ("good", "bad", "good"):
            await client.ask(chat(model=model))
        done = await p.exchanges(3)
        took = sum(each["duration_s"] for line in done for each in line["attempts"])
        (candidate,) = p.app.fleet.candidates()
        live = candidate.live
        assert took - 1e-4 <= live.taken(0.0) <= monotonic() - began
        asking = asyncio.create_task(other.ask(chat(model="hang")), name="asking")
        await eventually(lambda: live.in_flight)
        now = monotonic()
        grown = live.taken(now + 100) - live.taken(now)
        assert grown == pytest.approx(100.0)
        assert took - 1e-4 <= live.taken(now) <= now - began + 1e-4
        hang.set()
        await asking
        await eventually(lambda: not live.in_flight)
        assert took <= live.taken(0.0) == live.taken(1e6) <= monotonic() - began


async def test_pool_when_it_is_small_and_refuses_for_want_of_a_queue_is_told() -> None:
    chain = ["health", "region", "cost", {"capacity": {"max_queue": 0}}, "failover"]

    async def hang(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.Event().wait()

    async with (
        RawBackend(hang) as backend,
        proxy({"url": backend, "max_in_flight": 1}, middleware=chain, alerts=alerts(**FULL)) as p,
        RawClient(p.port) as client,
        RawClient(p.port) as other,
    ):
        asking = asyncio.create_task(client.ask(chat()), name="asking")
        await eventually(lambda: backend.requests)
        await asyncio.sleep(0.3)
        assert p.events("alert.began") == []
        assert (await other.ask(chat())).status == 503
        await eventually(lambda: p.events("alert.began"))
        asking.cancel()
    assert p.events("alert.began")[0]["rule"] == "pool_utilisation"


async def test_provider_when_its_only_backend_dies_is_down_without_any_webhook() -> None:
    """Health's strikes and its ejection are the real ones; the log and the metric are enough."""
    with closed_port() as port:
        down = alerts(provider_down={"for": 0.05})
        url = f"http://127.0.0.1:{port}"
        async with proxy({"url": url}, alerts=down) as p, RawClient(p.port) as client:
            for _ in range(6):
                assert (await client.ask(chat())).status in (502, 503)
            await eventually(lambda: p.events("alert.began"))
            (logged,) = p.events("alert.began")
            assert (logged["rule"], logged["subject"]) == ("provider_down", "openai")
            assert logged["level"] == "error", "critical"
            active = await metric(p, "beacon_alert_active")
    assert active['{rule="provider_down"}'] == 1.0


QUOTA = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
LISTED = {"object": "list", "data": [{"id": "m", "object": "model"}]}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("alone", [True, False])
async def test_provider_when_it_pushes_back_whatever_it_is_asked_is_told(
    status: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's quota that is used up: its models are listed, and no request is answered."""
    monkeypatch.setattr(view, "RECENT", 0.0)

    async def refuse(conn: BackendConn) -> None:
        async for asked in each_request(conn):
            listing = asked.method == "GET"
            await conn.send(json_bytes(LISTED) if listing else json_bytes(QUOTA, status))

    rules = alerts(provider_refuses={"for": 0.05}, provider_down={"for": 0})
    async with RawBackend(refuse) as backend, RawBackend(json_answer(DOCUMENT)) as other:
        rows: list[Any] = [{"url": backend.url, "api_key": "sk-ours"}]
        if not alone:
            golem = {"provider": "golem", "kind": "openai", "pool": "baseline"}
            rows.append({"url": other.url, **golem})
        async with proxy(*rows, alerts=rules) as p, RawClient(p.port) as client:

            async def asked() -> bool:
                got = (await client.ask(chat())).status
                assert got == (status if alone else 200)
                return bool(p.events("alert.began"))

            for _ in range(1500):
                if await asked():
                    break
                await asyncio.sleep(0.02)
            (logged,) = p.events("alert.began")
            shown = (await client.ask(request("GET", "/regions"))).json["regions"]["us-east"]
            listed = await metric(p, "beacon_region_busy")
    assert (logged["rule"], logged["subject"]) == ("provider_refuses", "openai/us-east")
    assert logged["level"] == "error", "critical"
    sums = shown["providers"]["openai"]["5"]
    assert sums["busy"] == sums["attempts"] >= 1
    assert (sums["good"], sums["strikes"], sums["success_rate"]) == (0, 0, None)
    assert listed['{provider="openai",region="us-east",window="5m"}'] >= 1


@pytest.mark.parametrize("key", [{"api_key": "sk"}, {"headers": {"Authorization": "Bearer sk"}}])
async def test_provider_when_it_refuses_the_operators_key_is_down(key: dict[str, Any]) -> None:
    """Be the key an `api_key` or a header of its row: no client could have done better."""
    async with RawBackend(answer(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")) as backend:
        row = {"url": backend.url, **key}
        down = alerts(provider_down={"for": 0})
        async with proxy(row, alerts=down) as p, RawClient(p.port) as client:
            for _ in range(6):
                await client.ask(chat())
            await eventually(lambda: p.events("alert.began"))
    assert p.events("alert.began")[0]["rule"] == "provider_down"
    assert p.events("backend.ejected")[0]["fault"] == "unauthorized"


@pytest.mark.usefixtures("mid_window")
async def test_budgets_when_they_refuse_by_design_wake_nobody() -> None:
    """One of nothing holds for rented nodes; one of a tenant is that tenant's trouble."""
    budgets = [
        {"name": "rented", "scope": "pool:baseline", "per": "month", "usd": 0},
        {"name": "each", "scope": "tenant", "per": "month", "usd": 0.01},
        {"name": "daily", "scope": "all", "per": "month", "usd": 0.01},
    ]
    async with RawBackend(json_answer(DOCUMENT)) as backend:
        row = {"url": backend, "price_per_second": 1.0}
        sections = {"budgets": budgets, "limits": {"tenant_header": "X-Tenant"}}
        async with (
            proxy({**row, "pool": "baseline"}, row, alerts=alerts(budget={}), **sections) as p,
            RawClient(p.port) as client,
        ):
            assert (await client.ask(chat(headers=[("X-Tenant", "acme")]))).status == 429
            await eventually(lambda: len(p.events("alert.began")) >= 3)
    told = {(each["subject"], each["severity"]) for each in p.events("alert.began")}
    assert told == {("each", "warning"), ("daily", "warning"), ("daily", "critical")}


async def test_traffic_when_alerts_pour_out_and_their_webhook_hangs_is_untouched() -> None:
    def used_up() -> Iterator[Gauge]:
        for number in range(900):
            yield Gauge("budget_used_ratio", "", 1.0, (("budget", f"b{number}"),))

    async with receiver() as to, RawBackend(json_answer(DOCUMENT)) as backend:
        to.answers.clear()
        async with proxy(backend, alerts=alerts(to)) as p, RawClient(p.port) as client:
            eyes = p.app._watch._eyes
            eyes._sources = replace(eyes._sources, gauges=used_up)
            await eventually(lambda: len(p.events("alert.began")) == 1800, 10)
            for _ in range(50):
                assert (await client.ask(chat())).status == 200
            sent = await metric(p, "beacon_webhook_messages_total")
            waiting = await metric(p, "beacon_webhook_messages_waiting")
            assert len(to.tries) == 1, "it still hangs"
            p.app.hurry()
    counts = {labels.split('"')[-2]: value for labels, value in sent.items()}
    assert counts == {"delivered": 0.0, "failed": 0.0, "dropped": 1544.0}
    assert waiting == {'{webhook="webhooks[0]"}': 256.0}
    assert len(p.events("webhook.overflowed")) == 1
    assert [line["end"] for line in p.events("exchange.done")] == ["complete"] * 50


async def test_look_at_a_proxy_reads_no_gauge_by_region() -> None:
    """They are what takes longest to read, up to 52 ms a look, and no rule is about them."""
    async with (
        RawBackend(json_answer(DOCUMENT)) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        shown = {gauge.name for gauge in p.app.telemetry.gauges()}
        looked_at = {gauge.name for gauge in p.app._watch._eyes._sources.gauges()}
    by_region = {name for name in shown if name.startswith("region_")}
    assert by_region
    assert not looked_at & by_region
    assert [name for name in looked_at if name.startswith("blend")]


async def test_alert_when_it_begins_as_the_proxy_stops_still_goes_out() -> None:
    async with receiver(503) as to, RawBackend(answer(OK)) as backend:
        async with proxy(backend, alerts=alerts(to, queue={"for": 0})) as p:
            p.app.telemetry.queue_depth(100)
            p.app._watch.look()
            assert to.taken == []
        assert len(to.taken) == 1
    assert to.taken[0].json["data"]["rule"] == "queue"
    assert p.events("webhook.failed") == []


async def test_rules_when_all_are_off_the_proxy_has_no_task_for_them() -> None:
    off = dict.fromkeys(type(Alerts().rules).model_fields, False)
    async with RawBackend(answer(OK)) as backend, proxy(backend, alerts=alerts(**off)) as p:
        assert "alerts" not in {task.get_name() for task in asyncio.all_tasks()}
        assert await metric(p, "beacon_alert_active") == {}
