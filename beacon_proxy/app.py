"""The composition root: settings and plugins in, a running proxy out."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from . import __version__
from .alerts.watch import Watch
from .api.admin import Admin
from .api.cors import Cors
from .api.inference import PATHS, Inference
from .api.protocol import HEAD_TIMEOUT, ClientServer
from .api.server import Api
from .config import Settings, resolve_backends
from .fleet.fleet import Fleet
from .fleet.load import Load
from .ops.performance import Performance
from .ops.telemetry import Telemetry
from .parts import (
    make_alerts,
    make_discovery,
    make_ledger,
    make_middlewares,
    make_remembering,
    make_scaler,
)
from .plugins import Plugins, build_provider
from .routing.attempt import Wire
from .routing.chain import Chain
from .routing.pipeline import Pipeline
from .spending.budgets import Budgets
from .wire.carried import Carriers
from .wire.pool import Pool
from .wire.upload import BodyLimits, Kept
from .wire.wheel import Wheel

BACKLOG = 1024  # connections the kernel holds while the loop is busy


class App:
    """One proxy in one event loop.

    Attributes:
        port: the port it listens on, once started.
        draining: it takes no new connections and waits for open exchanges.
        cutting: it has waited long enough and ends those that are left.
        fleet, telemetry, budgets, pipeline: its parts, the last once started.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        *,
        env: Mapping[str, str] | None = None,
        log: Any = None,
        head_timeout: float = HEAD_TIMEOUT,
    ) -> None:
        """`log` is a structlog logger, by default JSON lines on stdout; `head_timeout` in s."""
        self._settings = settings
        self._plugins = plugins
        self._env = os.environ if env is None else env
        self._head_timeout = head_timeout
        self._stack = AsyncExitStack()
        self._server: asyncio.Server | None = None
        self._http: ClientServer | None = None
        self._wheel: Wheel | None = None
        self._pool: Pool | None = None
        self.port = 0
        self.draining = self.cutting = False
        self.started_unix = time.time()
        self.backends = resolve_backends(settings, plugins)
        self.telemetry = Telemetry(
            region=settings.server.region,
            access_log=settings.server.access_log,
            tenants=settings.limits.tenant_header is not None,
            log=log,
        )
        self._carriers = Carriers(self.telemetry.notify)
        self.fleet = Fleet(
            self.backends,
            {name: build_provider(cls) for name, cls in plugins.providers.items()},
            notify=self.telemetry.notify,
            version=__version__,
        )
        self.fleet.on_forgotten = self.telemetry.forget
        self.budgets = Budgets(
            settings.budgets,
            self.fleet.estimates.usd,
            max_price=settings.limits.max_price_per_request,
            clock=self.fleet.now,
            notify=self.telemetry.notify,
        )
        self._refresher = make_discovery(settings, self.fleet, self.telemetry)
        self._ledger = make_ledger(settings, self.telemetry)
        self.pipeline: Pipeline
        self._load: Load
        self._watch: Watch | None = None

    async def start(self) -> None:
        """Bind first, probe after: a platform that waits for the port is not kept waiting.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        settings, telemetry = self._settings, self.telemetry
        server = settings.server
        self._wheel = Wheel(loop)
        self._pool = Pool(loop, self._wheel)
        self._pool.keeps, self.fleet.on_left = self.fleet.keeps, self._pool.forget
        performance = Performance(telemetry.windows, telemetry.notify)
        # Last: who finds no room on a backend must not hold money for it, nor write what none took.
        budgets = [self.budgets] if self.budgets.bounded else []
        ledger = [] if self._ledger is None else [self._ledger]
        middlewares = make_middlewares(settings, self._plugins, telemetry)
        chain = Chain.of([*middlewares, performance, *budgets, *ledger])
        # No rule reads those by region: to make them again for every look is work for nothing.
        watched = tuple(gauges for gauges in chain.gauges if gauges != performance.gauges)
        self._watch = watch = make_alerts(
            settings, self.fleet, chain, watched, telemetry, self._refresher
        )
        wire = Wire(loop, self._wheel, self._pool, self._carriers)
        self.pipeline = Pipeline(self.fleet, chain, wire, self.telemetry, self.budgets)
        self._load = Load(self.fleet, chain.limits)
        core = (self._load.gauges, self.pipeline.queue.gauges, watch.gauges)
        telemetry.sources = (*chain.gauges, *core)
        self._http = ClientServer(
            self._api(loop), loop, self._wheel, head_timeout=self._head_timeout
        )
        remembering = make_remembering(settings, self.budgets, telemetry)
        if remembering is not None:  # before the ledger takes a row of this process
            self._stack.callback(remembering.close)
            await remembering.begin()
        self._server = await loop.create_server(
            self._http, server.host, server.port, backlog=BACKLOG, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._stack.push_async_callback(self.fleet.close)
        if self._refresher is not None:
            self._stack.push_async_callback(self._refresher.close)
            self._refresher.start()
        waiting = self.pipeline.waiting
        scaler = make_scaler(settings, self.backends, self.fleet, waiting, telemetry)
        if scaler is not None:
            telemetry.sources += (scaler.gauges,)
            await self._stack.enter_async_context(scaler.lifespan())
        for lifespan in chain.lifespans:
            await self._stack.enter_async_context(lifespan(self.fleet))
        self._stack.push_async_callback(watch.close)  # before what it looks at
        watch.start()
        for warning in settings.warnings:
            telemetry.notify("config.ignored", warning=warning)
        telemetry.notify(
            "server.started", port=self.port, backends=len(self.backends), version=__version__
        )

    def _api(self, loop: asyncio.AbstractEventLoop) -> Api:
        settings = self._settings
        admin = Admin(
            settings=settings,
            fleet=self.fleet,
            telemetry=self.telemetry,
            providers=self.fleet.providers,
            load=self._load,
            env=self._env,
            version=__version__,
            state=self,
            ledger=self._ledger,
        )
        inference = Inference(self.pipeline, self.fleet)
        return Api(
            self.pipeline,
            self.telemetry,
            admin.routes,
            dict.fromkeys(PATHS, inference),
            BodyLimits(settings.server.max_body_size, settings.timeouts.idle, Kept()),
            Cors(settings.server.cors_origins),
            self,
            time.monotonic,
            loop,
            settings.limits.tenant_header,
        )

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that are active."""
        return [] if self._watch is None else self._watch.active()

    def hurry(self) -> None:
        """Let a drain under way wait no longer."""
        self.cutting = True
        if self._watch is not None:
            self._watch.hurry()

    async def stop(self, drain: float | None = None) -> None:
        """Stop accepting, let open exchanges finish for `drain` seconds, then cut the rest.

        `drain` is by default `server.drain_timeout`. Safe to call twice.
        """
        self.draining = True
        if self._server is None or self._http is None:
            return
        server, self._server = self._server, None
        seconds = self._settings.server.drain_timeout if drain is None else drain
        self.telemetry.notify("server.draining", seconds=seconds)
        server.close()
        deadline = time.monotonic() + seconds
        self._http.close_idle()
        while self._http.connections and time.monotonic() < deadline and not self.cutting:
            await asyncio.sleep(0.02)
            self._http.close_idle()
        self.cutting = True
        self._http.cut()
        await asyncio.sleep(0.01)  # for them to end as what they are
        self._http.abort()
        await asyncio.sleep(0)  # for the transports to tell so
        await self._carriers.close()  # jobs are still being stopped
        await self._stack.aclose()
        if self._pool is not None and self._wheel is not None:
            self._pool.close()
            self._wheel.close()
        self.telemetry.notify("server.stopped")
        self.telemetry.close()


def run(settings: Settings, plugins: Plugins) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status.

    A second signal stops at once. Raises OSError where the address cannot be listened on.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(App(settings, plugins)))


async def _serve(app: App) -> int:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def tell() -> None:
        if told.is_set():
            app.hurry()
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
    await app.start()
    # What stands now stays for good, and requests leave no cycles (tests/test_garbage.py): the
    # collector has little to find, and looking for it took 6 us a request and 120 ms at a time.
    gc.freeze()
    gc.set_threshold(10_000, 100, 10)
    await told.wait()
    await app.stop()
    return 0
