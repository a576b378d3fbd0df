"""The composition root: settings and plugins in, a running proxy out."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import uvloop

from . import __version__
from .alerts.view import MINUTES, Sources
from .alerts.watch import Watch
from .api.admin import Admin
from .api.cors import Cors
from .api.inference import PATHS, Inference
from .api.protocol import HEAD_TIMEOUT, ClientServer
from .api.server import Api
from .config import Settings, resolve_backends
from .errors import told
from .fleet.fleet import Fleet
from .fleet.load import Load
from .ops.performance import Performance
from .ops.telemetry import Telemetry
from .plugins import Plugins, build_middleware, build_provider
from .routing.attempt import Wire
from .routing.chain import Chain
from .routing.pipeline import Pipeline
from .spending.budgets import Budgets
from .wire.carried import Carriers
from .wire.pool import Pool
from .wire.upload import BodyLimits, Kept
from .wire.wheel import Wheel

if TYPE_CHECKING:
    from .discovery.refresh import Refresher
    from .ledger import Ledger
    from .scaling.scaler import Scaler

_REMEMBERS = 20.0  # s that the start waits for what was spent before
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
        self._refresher = self._discovery() if settings.discovery else None
        self._ledger = self._make_ledger() if settings.ledger.path else None
        self.pipeline: Pipeline
        self._load: Load
        self._watch: Watch | None = None

    async def start(self) -> None:
        """Bind first, probe after: a platform that waits for the port is not kept waiting.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        server = self._settings.server
        self._wheel = Wheel(loop)
        self._pool = Pool(loop, self._wheel)
        self._pool.keeps, self.fleet.on_left = self.fleet.keeps, self._pool.forget
        performance = Performance(self.telemetry.windows, self.telemetry.notify)
        # Last: who finds no room on a backend must not hold money for it, nor write what none took.
        budgets = [self.budgets] if self._settings.budgets else []
        ledger = [] if self._ledger is None else [self._ledger]
        chain = Chain.of([*self._middlewares(), performance, *budgets, *ledger])
        self._watch = watch = self._alerts(chain)
        wire = Wire(loop, self._wheel, self._pool, self._carriers)
        self.pipeline = Pipeline(self.fleet, chain, wire, self.telemetry, self.budgets)
        self._load = Load(self.fleet, chain.limits)
        core = (self._load.gauges, self.pipeline.queue.gauges, watch.gauges)
        self.telemetry.sources = (*chain.gauges, *core)
        self._http = ClientServer(
            self._api(loop), loop, self._wheel, head_timeout=self._head_timeout
        )
        await self._remember_spending()
        self._server = await loop.create_server(
            self._http, server.host, server.port, backlog=BACKLOG, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._stack.push_async_callback(self.fleet.close)
        if self._refresher is not None:
            self._stack.push_async_callback(self._refresher.close)
            self._refresher.start()
        if (scaler := self._scaler()) is not None:
            self.telemetry.sources += (scaler.gauges,)
            await self._stack.enter_async_context(scaler.lifespan())
        for lifespan in chain.lifespans:
            await self._stack.enter_async_context(lifespan(self.fleet))
        self._stack.push_async_callback(watch.close)  # before what it looks at
        watch.start()
        for warning in self._settings.warnings:
            self.telemetry.notify("config.ignored", warning=warning)
        self.telemetry.notify(
            "server.started", port=self.port, backends=len(self.backends), version=__version__
        )

    async def _remember_spending(self) -> None:
        """Let budgets go on from what the ledger holds of their windows, before all else."""
        if self._ledger is None or not self._settings.budgets:
            return
        from .ledger import LedgerError, spent_since

        path = self._settings.ledger.path
        try:
            async with asyncio.timeout(_REMEMBERS):
                for since in self.budgets.windows():
                    self.budgets.restore(since, await asyncio.to_thread(spent_since, path, since))
        except (LedgerError, TimeoutError) as exc:  # it serves all the same; the operator is told
            self.telemetry.notify("budget.forgot", error=told(exc))

    def _scaler(self) -> Scaler | None:
        """Who scales the backends that are this instance's to scale; None: there are none."""
        settings = self._settings
        homes = {backend.name: backend.region for backend in self.backends}
        here = [
            row
            for row in settings.autoscale.backends
            if (row.instance or homes.get(row.backend)) == settings.server.region
        ]
        if not here:
            return None
        # Not above: most have no use for it, and a start is its imports.
        from .scaling.plan import Bounds
        from .scaling.scaler import Scaler

        return Scaler(
            {
                row.backend: Bounds(**row.model_dump(exclude={"backend", "instance"}))
                for row in here
            },
            interval=settings.autoscale.interval,
            dry_run=settings.autoscale.dry_run,
            fleet=self.fleet,
            waiting=self.pipeline.waiting,
            clock=time.monotonic,
            notify=self.telemetry.notify,
        )

    def _discovery(self) -> Refresher:
        # Not above: most have no use for it, and a start is its imports.
        from .discovery.refresh import Refresher
        from .discovery.sources import source_of

        return Refresher(
            [source_of(row, __version__) for row in self._settings.discovery],
            self._settings,
            self.fleet.providers,
            self.fleet,
            clock=time.monotonic,
            rng=random.Random(),
            notify=self.telemetry.notify,
        )

    def _alerts(self, chain: Chain) -> Watch:
        settings, telemetry, refresher = self._settings.alerts, self.telemetry, self._refresher
        sender = None
        if settings.webhooks:
            from .alerts.webhooks import Webhooks

            sender = Webhooks(
                settings.webhooks,
                version=__version__,
                unix=telemetry.unix,
                rng=random.Random(),
                notify=telemetry.notify,
            )
        sources = Sources(
            candidates=self.fleet.candidates,
            gauges=lambda: telemetry.gauges(chain.gauges),
            recent=lambda: telemetry.windows.totals(
                MINUTES, lambda key: (key.region, key.provider)
            ),
            queue=lambda: (telemetry.metrics.queue_depth, chain.queue.size),
            lines_lost=lambda: telemetry.lines_lost,
            discovery=dict if refresher is None else refresher.answering,
        )
        return Watch(
            settings,
            sources,
            region=telemetry.region,
            clock=telemetry.clock,
            unix=telemetry.unix,
            notify=telemetry.notify,
            sender=sender,
        )

    def _make_ledger(self) -> Ledger:
        from .ledger import Ledger  # brings SQLite

        options = self._settings.ledger
        return Ledger(
            options.path,
            flush_interval=options.flush_interval,
            retention_days=options.retention_days,
            notify=self.telemetry.notify,
        )

    def _middlewares(self) -> list[object]:
        return [
            build_middleware(
                self._plugins.middleware[entry.name],
                entry.options,
                clock=time.monotonic,
                rng=random.Random(),
                region=self._settings.server.region,
                notify=self.telemetry.notify,
            )
            for entry in self._settings.middleware
        ]

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
