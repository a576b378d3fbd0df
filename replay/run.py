"""One run, from its configuration to its records. Imported once the clock is there: `child.py`."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import structlog

from beacon_proxy.app import App
from beacon_proxy.config import Settings, load_settings
from beacon_proxy.contracts import Exchange, Outcome
from beacon_proxy.plugins import Plugins

from .clients import Clients
from .clock import Clock, Loop
from .families import families
from .trace import Trace, generate
from .world import SITES, Place

MIDDLEWARE = ("health", "region", "cost", "capacity", "failover")
_REST = 10.0  # s for what still runs once the last client has gone


def run(clock: Clock, count: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Replay `count` requests; `options` as of `runs.records`."""
    loop = Loop(clock)
    try:
        return loop.run_until_complete(_run(loop, clock, generate(count, seed), seed, options))
    finally:
        loop.close()


async def _run(
    loop: Loop, clock: Clock, trace: Trace, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    requests = {request.id: request for request in trace.requests}
    places: dict[str, Place] = {}
    middleware = {n: getattr(import_module(f"middleware.{n}"), n.title()) for n in MIDDLEWARE}
    plugins = Plugins(families(places, requests), middleware | {"witness": Witness})
    options = dict(options)
    chosen = options.pop("middleware", {})
    document = {
        "server": {"host": "127.0.0.1", "port": 0, "region": "us-east"},
        "backends": [_row(site.name) for site in SITES],
        "middleware": [*({name: chosen.get(name, {})} for name in MIDDLEWARE), "witness"],
        "ledger": {"path": ""},  # a thread, which knows of no simulated clock
        **options,
    }
    settings = _settings(document, plugins)
    log = Log(clock)
    Witness.seen.clear()
    app = App(settings, plugins, env={}, log=log.logger())
    prices = {backend.name: backend.price_per_second for backend in app.backends}
    for site in SITES:
        places[site.name] = Place(site, prices[site.name], clock, trace.span, seed)
    await app.start()
    start = clock.now
    for place in places.values():
        place.open(loop)
    clients = Clients(loop, app.port, trace)
    await clients.done
    await asyncio.sleep(_REST)
    running = sum(candidate.live.in_flight for candidate in app.fleet.candidates())
    await app.stop(0)
    for place in places.values():
        place.close()
    return {
        "start": start,
        "running": running,  # attempts that never ended
        "backends": [
            {
                "name": name,
                "pool": next(b.pool for b in app.backends if b.name == name),
                "price": place.price,
                "starts": place.starts,
                "worker_seconds": place.worker_seconds,
            }
            for name, place in places.items()
        ],
        "clients": [asdict(got) for got in clients.got],
        "exchanges": log.exchanges,
        "attempts": Witness.seen,
        "visits": [asdict(visit) for place in places.values() for visit in place.visits],
        "events": log.events,
    }


def _settings(document: dict[str, Any], plugins: Plugins) -> Settings:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "beacon.yaml")
        path.write_text(json.dumps(document))
        return load_settings(path, {}, plugins)


def _row(name: str) -> dict[str, Any]:
    site = next(site for site in SITES if site.name == name)
    kinds = {"golem": "ollama", "modal": "function", "runpod": "queue"}
    return {
        "name": name,
        "provider": site.provider,
        "kind": kinds[site.provider],
        "url": f"http://127.0.0.1:9/v2/{name}",  # nobody goes there
        "region": site.region,
        "models": list(site.models),
        "max_in_flight": site.max_in_flight,
    }


@dataclass
class Witness:
    """The last middleware of the chain: writes down each attempt that the proxy records."""

    seen: ClassVar[list[dict[str, Any]]] = []  # the proxy makes it, so it cannot be handed a list

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        usage = outcome.usage
        self.seen.append(
            {
                "id": exchange.id,
                "backend": outcome.backend.name,
                "number": outcome.number,
                "verdict": outcome.verdict,
                "stage": outcome.stage,
                "fault": outcome.fault,
                "status": outcome.status,
                "sent": outcome.sent,
                "committed": outcome.committed,
                "started": outcome.started,
                "ttft": outcome.ttft,
                "duration": outcome.duration,
                "cold_start": outcome.cold_start,
                "billed": outcome.billed,
                "usd": outcome.usd,
                "expected_usd": outcome.expected_usd,
                "tokens": None if usage is None else [usage.input, usage.output],
            }
        )


class Log:
    """A structlog processor that keeps the canonical lines, and the events beside them.

    Each event gets the time (monotonic s) as `at`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.exchanges: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def __call__(self, logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
        if event["event"] == "exchange.done":
            self.exchanges.append(dict(event))
        else:
            self.events.append({**event, "at": self._clock.now})
        raise structlog.DropEvent

    def logger(self) -> Any:
        return structlog.wrap_logger(None, processors=[self])
