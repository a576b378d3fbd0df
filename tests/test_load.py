"""Load a router and say how it held: throughput, time to the first content, errors, shares.

    python tests/test_load.py [--url URL] [--requests N] [--concurrency N] [--stream]
                              [--model NAME] [--max-tokens N]

exits 1 if any answer failed or was cut short. It needs aiohttp alone. Under pytest a small load
goes through a proxy of the test's own, and the pools must have the shares that the blend promises.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CONTENT = re.compile(rb'"(?:content|text)":\s*"[^"]')
QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Load:
    """What to send, how much of it, and what came of it."""

    url: str
    model: str
    requests: int = 300
    concurrency: int = 20
    stream: bool = False
    max_tokens: int = 16
    seconds: float = 0.0
    bytes: int = 0
    first: list[float] = field(default_factory=list)  # s to the first content, of good answers
    whole: list[float] = field(default_factory=list)  # s to the end, of good answers
    errors: Counter[str] = field(default_factory=Counter)
    providers: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        numbers = iter(range(self.requests))
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        began = time.monotonic()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            lanes = [self.lane(session, numbers) for _ in range(self.concurrency)]
            await asyncio.gather(*lanes)
        self.seconds = time.monotonic() - began

    async def lane(self, session: aiohttp.ClientSession, numbers: Iterator[int]) -> None:
        """One client after another, until all requests are taken."""
        for number in numbers:
            try:
                if fault := await self.one(session, number):
                    self.errors[fault] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.errors[type(error).__name__] += 1

    async def one(self, session: aiohttp.ClientSession, number: int) -> str | None:
        """Send one request and read its answer; return why it is no good, if so."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"Say the number {number}."}],
            "max_tokens": self.max_tokens,
            "stream": self.stream,
        }
        began, first, seen = time.monotonic(), None, b""
        async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            async for piece in answer.content.iter_any():
                seen += piece
                if first is None and CONTENT.search(seen):
                    first = time.monotonic() - began
            if answer.status != 200:
                return f"status {answer.status}"
        self.bytes += len(seen)
        self.providers[answer.headers.get("X-Beacon-Provider", "(not said)")] += 1
        self.attempts[answer.headers.get("X-Beacon-Attempts", "(not said)")] += 1
        if b'"error"' in seen or first is None:
            return "an error behind a 200"
        if self.stream and b"data: [DONE]" not in seen:
            return "a stream without its end"
        self.first.append(first)
        self.whole.append(time.monotonic() - began)
        return None

    def report(self) -> str:
        """The result for a reader."""
        kind = "streams" if self.stream else "documents"
        good, failed = len(self.whole), sum(self.errors.values())
        rate = f"{good / self.seconds:.1f} requests/s, {self.bytes / self.seconds / 1000:.1f} kB/s"
        rows = [
            f"{self.requests} {kind}, {self.concurrency} at once, {self.url}, {self.model}",
            f"  throughput      {rate}, {self.seconds:.2f} s in all",
            f"  first content   {_quantiles(self.first)}",
            f"  whole answer    {_quantiles(self.whole)}",
            f"  errors          {failed} ({failed / self.requests:.2%}){_counted(self.errors)}",
            f"  per provider   {_shares(self.providers)}",
            f"  attempts       {_shares(self.attempts)}",
        ]
        return "\n".join(rows)


def _quantiles(times: list[float]) -> str:
    if not times:
        return "none"
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES]
    named = [f"p{q * 100:.0f} {1000 * t:.1f} ms" for q, t in zip(QUANTILES, at, strict=True)]
    return ", ".join(named) + f", max {1000 * ordered[-1]:.1f} ms"


def _counted(counts: Counter[str]) -> str:
    return "".join(f", {name}: {count}" for name, count in counts.most_common())


def _shares(counts: Counter[str]) -> str:
    total = counts.total() or 1
    return ",".join(f" {name} {n} ({n / total:.1%})" for name, n in counts.most_common())


# -- under pytest


async def test_load_of_documents_then_no_error_and_the_pools_have_their_shares() -> None:
    await _blend(stream=False)


async def test_load_of_streams_then_no_error_and_the_pools_have_their_shares() -> None:
    await _blend(stream=True)


async def _blend(*, stream: bool) -> None:
    """300 requests without hints over two healthy pools: 70 % to baseline."""
    from .kit import RawBackend, chat_stream, json_answer, proxy

    message = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"object": "chat.completion", "choices": [choice]}
    script = chat_stream("hello", 3) if stream else json_answer(whole)
    async with RawBackend(script) as one, RawBackend(script) as other:
        golem = {"provider": "golem", "kind": "openai", "url": one, "max_in_flight": 50}
        modal = {"provider": "modal", "kind": "server", "url": other, "max_in_flight": 50}
        async with proxy(golem | {"models": ["m"]}, modal | {"models": ["m"]}) as p:
            load = Load(f"http://127.0.0.1:{p.port}", "m", stream=stream)
            await load.run()
            await p.exchanges(300)
    print(load.report())
    assert not load.errors
    assert len(load.whole) == 300
    assert abs(load.providers["golem"] - 210) <= 3
    assert load.attempts == {"1": 300}


async def test_load_when_a_backend_fails_then_the_report_says_so() -> None:
    """A load test that cannot fail proves nothing."""
    from .kit import RawBackend, event, proxy, sse

    cut = sse([event({"choices": [{"index": 0, "delta": {"content": "a"}}]})])
    async with RawBackend(cut) as backend, proxy({"url": backend}) as p:
        load = Load(f"http://127.0.0.1:{p.port}", "m", requests=4, concurrency=2, stream=True)
        await load.run()
    assert load.errors.total() == 4
    assert "4 (100.00%)" in load.report()


# -- as a program


async def _first_model(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as answer:
        served: list[Any] = (await answer.json())["data"]
    return str(served[0]["id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=20)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--model", help="default: the first that is served")
    parser.add_argument("--max-tokens", type=int, default=16)
    given = vars(parser.parse_args())
    url = given.pop("url").rstrip("/")
    try:
        model = given.pop("model") or asyncio.run(_first_model(url))
        load = Load(url, model, **given)
        asyncio.run(load.run())
    except (aiohttp.ClientError, LookupError) as error:
        print(f"{url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(load.report())
    return bool(load.errors)


if __name__ == "__main__":
    sys.exit(main())
