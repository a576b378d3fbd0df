"""Ask a running router everything its users ask of it, and say what it answered.

    python tests/test_hybrid_router.py [BASE_URL] [--model NAME] [--max-tokens N]

prints one line a question and exits 1 if any answer was wrong; BASE_URL is by default
http://127.0.0.1:8080. It needs aiohttp alone. Under pytest the same questions go to a proxy of the
test's own, before a real model that plays three providers in three regions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

pytest_plugins = ["tests.real"]

REGIONS = {
    "us-east": ("US", "us", "iad", "us-east-1"),
    "eu-west": ("EU", "eu", "ams", "eu-west-1", "europe-west4"),
    "asia-pacific": ("ASIA", "APAC", "asia", "sin", "ap-southeast-1", "asia-southeast"),
}
PATHS = ("/inference", "/v1/inference", "/api/inference", "/api/v1/inference")
ANSWER = {
    "success": bool,
    "response": str,
    "inference_time": float,
    "cost_estimate": float,
    "provider_used": str,
    "metadata": dict,
}
PROVIDER = {
    "name": str,
    "type": str,
    "region": str,
    "healthy": bool,
    "cost_per_second": float,
    "avg_latency": float,
    "success_rate": float,
    "last_health_check": float,
}


@dataclass
class Router:
    """The router asked, and what to ask it for."""

    session: aiohttp.ClientSession
    base: str
    model: str | None = None  # None: the first it serves
    max_tokens: int = 100

    async def get(self, path: str, status: int = 200, **headers: str) -> Any:
        async with self.session.get(self.base + path, headers=headers) as answer:
            assert answer.status == status, f"GET {path}: {answer.status}, not {status}"
            return await answer.json()

    async def post(self, path: str, body: Any, status: int = 200) -> Any:
        async with self.session.post(self.base + path, json=body) as answer:
            assert answer.status == status, f"POST {path}: {answer.status}, not {status}"
            return await answer.json()

    async def question(self, **more: Any) -> dict[str, Any]:
        """The body of an inference."""
        if self.model is None:
            served = (await self.get("/models"))["models"]
            self.model = next(iter(served), "llama3.2:1b")
        asked = {"model": self.model, "prompt": "What is artificial intelligence?"}
        return {**asked, "temperature": 0.1, "max_tokens": self.max_tokens, **more}

    async def infer(self, path: str = "/inference", **more: Any) -> dict[str, Any]:
        """A whole inference that must succeed."""
        data: dict[str, Any] = await self.post(path, await self.question(**more))
        has(data, ANSWER)
        assert data["success"], f"failed: {data.get('error')!r}"
        assert data["response"].strip(), "a success without a word"
        assert data["error"] is None
        return data


def has(data: Any, fields: dict[str, type]) -> None:
    """Check that each field is there with its type."""
    for name, kind in fields.items():
        assert name in data, f"no {name!r} in {sorted(data)}"
        value = data[name]
        whole = kind is float and isinstance(value, int) and not isinstance(value, bool)
        assert isinstance(value, kind) or whole, f"{name} is {value!r}, not {kind.__name__}"


def said(data: dict[str, Any]) -> str:
    """One line about an inference."""
    text = data.get("response", "")[:100].replace("\n", " ")
    where = f"{data['provider_used']} in {data['metadata']['region']}"
    return f"{where}, {data['inference_time']:.2f} s, {data['cost_estimate']:.7f} USD: {text!r}"


async def health(router: Router) -> str:
    data = await router.get("/health")
    has(data, {"version": str, "region": str, "regions": list, "timestamp": (float | str)})
    assert data["status"] in ("healthy", "degraded")
    assert data["service"] == "hybrid-router"
    assert 0 <= data["providers_healthy"] <= data["providers_total"]
    return f"{data['status']}, {data['providers_healthy']} of {data['providers_total']} providers"


async def ready(router: Router) -> str:
    data = await router.get("/ready")
    assert data["status"] == "ok"
    return "ok"


async def providers(router: Router) -> str:
    rows = (await router.get("/providers"))["providers"]
    assert rows, "no provider at all"
    for row in rows:
        has(row, PROVIDER)
        assert 0 <= row["success_rate"] <= 1
    return ", ".join(f"{row['name']} ({row['type']}, {row['region']})" for row in rows)


async def providers_by_region(router: Router) -> str:
    counts = {}
    for region, aliases in REGIONS.items():
        names = []
        for word in (region, *aliases):
            rows = (await router.get(f"/providers?region={word}"))["providers"]
            assert all(row["region"] == region for row in rows), f"region={word}"
            names.append([row["name"] for row in rows])
        assert all(found == names[0] for found in names), f"an alias of {region} differs"
        counts[region] = len(names[0])
    return ", ".join(f"{region}: {count}" for region, count in counts.items())


async def models(router: Router) -> str:
    data = await router.get("/models")
    assert data["total_models"] == len(data["models"])
    for model in data["models"].values():
        has(model, {"name": str, "regions": list, "providers": list})
    assert set(data["providers_by_region"]) <= set(data["regions_available"])
    by_openai = {model["id"] for model in (await router.get("/v1/models"))["data"]}
    by_ollama = {model["name"] for model in (await router.get("/api/tags"))["models"]}
    assert set(data["models"]) == by_openai == by_ollama
    return ", ".join(data["models"]) or "none known"


async def metrics(router: Router) -> str:
    data = await router.get("/metrics")
    has(data, {"total_providers": int, "healthy_providers": int})
    has(data, {"avg_latency": float, "avg_success_rate": float})
    has(data["cost_range"], {"min": float, "max": float})
    return f"success rate {data['avg_success_rate']:.2f}, latency {data['avg_latency']:.2f} s"


async def metrics_as_text(router: Router) -> str:
    headers = {"Accept": "text/plain"}
    async with router.session.get(f"{router.base}/metrics", headers=headers) as answer:
        text = await answer.text()
        assert answer.content_type == "text/plain"
    lines = [line for line in text.splitlines() if line.startswith("beacon_")]
    assert lines
    return f"{len(lines)} samples"


async def old_monitors(router: Router) -> str:
    for path in ("/status", "/modal-health"):
        assert (await router.get(path))["status"] == "healthy"
    assert (await router.get("/ws"))["status"] == "ok"
    assert set((await router.get("/env")).values()) <= {"set", None}, "a value of the environment"
    return "status, modal-health, ws, env"


async def costs_and_regions(router: Router) -> str:
    await router.get("/costs")
    await router.get("/regions")
    return "answered"


async def inference_cost_first(router: Router) -> str:
    return said(await router.infer(cost_priority=True))


async def inference_latency_first(router: Router) -> str:
    return said(await router.infer(cost_priority=False))


async def inference_by_region(router: Router) -> str:
    rows = (await router.get("/providers"))["providers"]
    present = {row["region"] for row in rows if row["healthy"]}
    lines = []
    for region, aliases in REGIONS.items():
        for word in (region, aliases[0]):
            data = await router.infer(region_preference=word)
            ran = data["metadata"]["region"]
            assert ran == region or region not in present, f"{word} ran in {ran}"
        lines.append(f"{region} ran in {ran}")
    return ", ".join(lines)


async def inference_paths(router: Router) -> str:
    for path in PATHS:
        await router.infer(path)
    return ", ".join(PATHS)


async def inference_stream(router: Router) -> str:
    question = await router.question(stream=True)
    async with router.session.post(f"{router.base}/inference", json=question) as answer:
        assert answer.status == 200
        lines = [json.loads(line) async for line in answer.content]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    has(lines[-1], ANSWER)
    assert lines[-1]["success"]
    return f"{len(lines)} lines"


async def inference_refuses_bad_input(router: Router) -> str:
    good = await router.question()
    bad = [
        {"model": good["model"]},
        {"prompt": good["prompt"]},
        {**good, "temperature": "hot"},
        {**good, "max_tokens": "many"},
        {**good, "prompt": None},
        [good],
    ]
    for body in bad:
        data = await router.post("/inference", body, status=422)
        for problem in data["detail"]:
            has(problem, {"type": str, "loc": list, "msg": str})
            assert "input" in problem
    return f"{len(bad)} bodies, each 422"


Check = Callable[[Router], Awaitable[str]]
CHECKS: tuple[Check, ...] = (
    health,
    ready,
    providers,
    providers_by_region,
    models,
    metrics,
    metrics_as_text,
    old_monitors,
    costs_and_regions,
    inference_refuses_bad_input,
)
INFERENCES: tuple[Check, ...] = (
    inference_cost_first,
    inference_latency_first,
    inference_by_region,
    inference_paths,
    inference_stream,
)


# -- under pytest


def pytest_generate_tests(metafunc: Any) -> None:
    checks = [*CHECKS, *INFERENCES]
    metafunc.parametrize("check", checks, ids=[check.__name__ for check in checks])


async def test_router_answers(llama: Any, check: Check) -> None:
    from .kit import proxy
    from .real import MODEL

    cast = (
        ("golem", "auto", "us-east"),
        ("modal", "server", "eu-west"),
        ("runpod", "load_balancing", "asia-pacific"),
    )
    rows = [
        {"name": f"{p}-1", "provider": p, "kind": k, "region": r, "url": llama.url}
        | {"models": [MODEL]}
        for p, k, r in cast
    ]
    async with proxy(*rows) as p, aiohttp.ClientSession() as session:
        assert await check(Router(session, f"http://127.0.0.1:{p.port}", MODEL, max_tokens=6))


# -- as a program


async def report(base: str, model: str | None, max_tokens: int) -> int:
    """Ask everything, print a line each; return how many answers were wrong."""
    wrong = 0
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        router = Router(session, base.rstrip("/"), model, max_tokens)

        async def ask(check: Check) -> int:
            started = time.monotonic()
            try:
                good, line = True, await check(router)
            except (AssertionError, KeyError, aiohttp.ClientError, TimeoutError) as error:
                good, line = False, f"{type(error).__name__}: {error}".partition("\n")[0]
            name = check.__name__.replace("_", " ")
            print(f"{'ok   ' if good else 'WRONG'} {name:<28} {line}", end="")
            print(f"  [{time.monotonic() - started:.2f} s]", flush=True)
            return not good

        print(f"asking {router.base}")
        try:
            healthy = (await router.get("/health")).get("providers_healthy", 0)
        except (AssertionError, aiohttp.ClientError, TimeoutError) as error:
            print(f"WRONG no router: {error or type(error).__name__}")
            return 1
        for check in (*CHECKS, *(INFERENCES if healthy else ())):
            wrong += await ask(check)
        if not healthy:
            print("no healthy provider: no inference asked")
    print("all answers right" if not wrong else f"{wrong} answers wrong")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("base", nargs="?", default="http://127.0.0.1:8080", metavar="BASE_URL")
    parser.add_argument("--model", help="default: the first that the router serves")
    parser.add_argument("--max-tokens", type=int, default=100)
    arguments = parser.parse_args()
    return bool(asyncio.run(report(arguments.base, arguments.model, arguments.max_tokens)))


if __name__ == "__main__":
    sys.exit(main())
