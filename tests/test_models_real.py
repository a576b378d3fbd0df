"""Models against a real llama.cpp: what it says it holds, and another name for it."""

from __future__ import annotations

import json
from typing import Any

from beacon_proxy.contracts import Warmth

from .kit import CHAT, RawClient, eventually, proxy, request
from .real import MODEL, Child

pytest_plugins = ["tests.real"]


async def test_llama_cpp_when_it_runs_says_that_it_holds_its_model(llama: Child) -> None:
    """Free questions alone: it is not asked for a token, nor for /slots, which wakes it."""
    async with proxy({"url": llama.llama_url}) as p:
        live = p.app.fleet.candidates()[0].live
        await eventually(lambda: live.models is not None, 5.0)
        assert live.warmth is Warmth.WARM
        assert live.hot == live.models


async def test_llama_cpp_when_it_has_an_alias_answers_for_the_clients_name(llama: Child) -> None:
    """Its answer names the model as it was asked for: not as configured, but as it lists it."""
    body: dict[str, Any] = {"model": "small", "max_tokens": 1, "messages": CHAT.ask["messages"]}
    data = request(
        "POST", CHAT.path, [("Content-Type", "application/json")], json.dumps(body).encode()
    )
    async with (
        proxy({"url": llama.llama_url, "aliases": {"small": MODEL}}) as p,
        RawClient(p.port) as client,
    ):
        live = p.app.fleet.candidates()[0].live
        await eventually(lambda: live.models is not None, 5.0)
        got = await client.ask(data, "POST", timeout=20.0)
    assert (got.status, got.json["model"]) == (200, MODEL.replace(":", "-"))
