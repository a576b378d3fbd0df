"""The adaptive limit before a real llama.cpp, which lets wait what it cannot run yet."""

from __future__ import annotations

import asyncio
from typing import Any

from .kit import Proxy, eventually, proxy
from .real import MODEL, Child, row
from .test_real_failover import client_of, content

pytest_plugins = ["tests.real"]

PATIENT = {"first_content": 60, "document": 60, "idle": 60}  # on a busy machine it is slow


def limit_of(p: Proxy) -> float:
    (limit,) = [g.value for g in p.app.telemetry.gauges() if g.name == "concurrency_limit"]
    return float(limit)


async def test_adaptive_limit_comes_down_to_the_slots_of_a_real_server(llama: Child) -> None:
    """It runs two at once and was said to run five; never a 429, only later first contents."""
    capacity = {"adaptive": {"enabled": True}, "queue_timeout": 60}
    middleware: list[Any] = ["health", "cost", {"capacity": capacity}, "failover"]
    async with (
        proxy(row(llama, max_in_flight=5), middleware=middleware, timeouts=PATIENT) as p,
        client_of(p) as client,
    ):
        assert limit_of(p) == 5

        async def ask(number: int) -> None:
            while True:
                said = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"Say {number}"}],
                    max_tokens=3,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                await content(said)

        tasks = [asyncio.create_task(ask(number), name=f"client {number}") for number in range(6)]
        try:
            await eventually(lambda: limit_of(p) <= 3 or any(t.done() for t in tasks), 100.0)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [e for e in ends if not isinstance(e, asyncio.CancelledError)] == []
        assert 1 <= limit_of(p) <= 3
        assert {x["status"] for x in p.events("exchange.done") if x["end"] == "complete"} == {200}
