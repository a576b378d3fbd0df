"""What a check costs at Modal: any request to an app's URL is an input that keeps a GPU alive.

The edge is the stub of `kit_modal`, or a scripted answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from beacon_proxy.contracts import Backend, Check, Fault, Verdict
from providers.modal import Modal

from .kit import Proxy, RawBackend, RawClient, answer, chat, eventually, json_bytes, proxy
from .kit_modal import LOST, NO_CREDENTIALS, STOPPED, Server, said

DOCUMENT = json_bytes(
    {"choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}]}
)
MODELS = json_bytes({"object": "list", "data": [{"id": "llama", "owned_by": "vllm"}]})


@asynccontextmanager
async def asked(raw: bytes, provider: Modal, **more: Any) -> AsyncIterator[Any]:
    """A backend that answers `raw`, and the provider's own question to it as a call."""
    async with RawBackend(answer(raw)) as web, aiohttp.ClientSession() as session:
        backend = Backend(
            name="m", provider="modal", url=web.url, scheme="http", host="127.0.0.1", port=web.port
        )
        backend = replace(backend, **more)

        async def ask() -> Check | None:
            return await provider.check(backend, session)

        yield web, ask


async def test_check_when_asked_asks_for_the_models_once_an_hour_at_most() -> None:
    """2.7: so all checks together cost one scaledown window of GPU an hour, and no more."""
    now = 0.0
    provider = Modal(clock=lambda: now)
    keyed = {"api_key": "wk-1:ws-2", "headers": ((b"X-Team", b"r"),)}
    async with asked(MODELS, provider, **keyed) as (web, ask):
        first = await ask()
        assert (first.verdict, first.models) == (Verdict.GOOD, ("llama",))
        assert first.warmth is None, "a check must not renew its own reason"
        for later in (30.0, 3599.0):
            now = later
            assert await ask() is None
        assert len(web.requests) == 1
        now = 3600.0
        assert (await ask()).models == ("llama",)
    got, _ = web.requests
    assert (got.method, got.target) == ("GET", b"/v1/models")
    assert (got.header("modal-key"), got.header("modal-secret")) == ([b"wk-1"], [b"ws-2"])
    assert (got.header("authorization"), got.header("x-team")) == ([], [b"r"])


async def test_check_when_another_app_has_the_name_asks_that_one() -> None:
    """Its list was not asked for until the hour of the one before was over."""
    now = 0.0
    provider = Modal(clock=lambda: now)
    async with asked(MODELS, provider) as (_, first), asked(MODELS, provider) as (_, second):
        assert (await first()).models == (await second()).models == ("llama",)
        async with asked(MODELS, provider, joined=5.0) as (_, again):
            assert await first() is await second() is None
            assert (await again()).models == ("llama",)


@pytest.mark.parametrize(
    ("raw", "verdict", "fault"),
    [
        pytest.param(said(404, STOPPED), Verdict.STRIKE, Fault.GONE, id="2.4 stopped"),
        pytest.param(said(404, b"{}"), Verdict.GOOD, None, id="no list there"),
        pytest.param(said(401, NO_CREDENTIALS), Verdict.NEUTRAL, Fault.UNAUTHORIZED, id="2.4 key"),
        pytest.param(said(500, LOST), Verdict.NEUTRAL, Fault.STATUS, id="2.4 lost"),
        pytest.param(said(503), Verdict.NEUTRAL, Fault.LOADING, id="2.4 it starts after all"),
        pytest.param(said(303, b"", b"Location: /x"), Verdict.NEUTRAL, Fault.STATUS, id="303"),
        pytest.param(said(200, b"hello"), Verdict.NEUTRAL, None, id="no list"),
    ],
)
async def test_check_when_there_are_no_models_says_what_is_there(
    raw: bytes, verdict: Verdict, fault: Fault | None
) -> None:
    async with asked(raw, Modal(), kind="server") as (web, ask):
        check = await ask()
    assert (check.verdict, check.fault, check.warmth) == (verdict, fault, None)
    assert len(web.requests) == 1


async def test_check_when_no_answer_comes_is_no_strike(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been scaled down just now: then this is a cold start."""
    monkeypatch.setattr("providers.modal.provider._CHECK_TIME", 0.05)
    async with asked(b"", Modal()) as (_, ask):
        check = await ask()
    assert (check.verdict, check.fault) == (Verdict.NEUTRAL, Fault.TIMEOUT)


def chain(**health: float) -> list[dict[str, Any]]:
    return [{"health": health}, "region", "cost", "capacity", "failover"]


def warmth(p: Proxy) -> str:
    live = p.app.fleet.candidates()[0].live
    return str(live.warmth_at(p.app.fleet.now()))


async def test_probes_when_no_traffic_came_never_reach_the_app() -> None:
    edge = Server(DOCUMENT)
    async with edge:
        row = {"provider": "modal", "url": edge.url}
        async with proxy(row, middleware=chain(probe_interval=0.02)) as p:
            await asyncio.sleep(0.2)
            assert warmth(p) == "unknown"
    assert edge.backend.accepted == 0


async def test_probes_when_traffic_keeps_it_warm_ask_once_and_let_it_go_cold() -> None:
    """A probe each 30 s would keep a GPU for ever: none renews what is believed of it."""
    edge = Server(DOCUMENT)
    async with edge:
        row = {"provider": "modal", "url": edge.url, "stays_warm": 1.0}
        async with proxy(row, middleware=chain(probe_interval=0.02)) as p:
            async with RawClient(p.port) as client:
                assert (await client.ask(chat(), "POST")).status == 200
            assert warmth(p) == "warm"
            await eventually(lambda: edge.backend.probes == 1)
            await eventually(lambda: warmth(p) == "cold", 5.0)
            await asyncio.sleep(0.1)
    assert edge.backend.probes == 1


async def test_probes_when_a_request_is_in_flight_do_not_start_a_container_beside_it() -> None:
    """2.5: by default a container takes one input, so a probe beside it would start another."""
    edge = Server(DOCUMENT)
    async with edge:
        row = {"provider": "modal", "url": edge.url, "kind": "server"}
        async with proxy(row, middleware=chain(probe_interval=0.02)) as p:
            live = p.app.fleet.candidates()[0].live
            live.in_flight = 1
            async with RawClient(p.port) as client:
                assert (await client.ask(chat(), "POST")).status == 200
            await asyncio.sleep(0.15)
            assert (warmth(p), edge.backend.probes) == ("warm", 0)
            live.in_flight = 0
            await eventually(lambda: edge.backend.probes == 1)


async def test_check_when_the_models_are_configured_buys_no_answer_to_what_is_known() -> None:
    """Each question is a paid input. It was put all the same, once an hour."""
    async with asked(said(200, b'{"data": []}'), Modal(), models=frozenset({"m"})) as (edge, ask):
        assert await ask() is None
        assert edge.requests == []
