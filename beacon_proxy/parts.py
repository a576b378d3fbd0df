"""The parts that only some configurations ask for, made of their sections.

What most have no use for is imported here inside its function: a start is its imports.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from . import __version__
from .alerts.view import MINUTES, Sources
from .alerts.watch import Watch
from .config import Settings
from .contracts import Backend
from .errors import Overloaded
from .fleet.fleet import Fleet
from .ops.telemetry import Sources as Gauges
from .ops.telemetry import Telemetry
from .plugins import Plugins, build_middleware
from .routing.chain import Chain
from .spending.budgets import Budgets

if TYPE_CHECKING:
    from .discovery.refresh import Refresher
    from .ledger import Ledger
    from .remembering import Remembering
    from .scaling.scaler import Scaler


def make_middlewares(settings: Settings, plugins: Plugins, telemetry: Telemetry) -> list[object]:
    """The chain as configured."""
    return [
        build_middleware(
            plugins.middleware[entry.name],
            entry.options,
            clock=time.monotonic,
            rng=random.Random(),
            region=settings.server.region,
            notify=telemetry.notify,
        )
        for entry in settings.middleware
    ]


def make_discovery(settings: Settings, fleet: Fleet, telemetry: Telemetry) -> Refresher | None:
    """Who looks for backends; None: they are all configured."""
    if not settings.discovery:
        return None
    from .discovery.refresh import Refresher
    from .discovery.sources import source_of

    return Refresher(
        [source_of(row, __version__) for row in settings.discovery],
        settings,
        fleet.providers,
        fleet,
        clock=time.monotonic,
        rng=random.Random(),
        notify=telemetry.notify,
    )


def make_ledger(settings: Settings, telemetry: Telemetry) -> Ledger | None:
    """Who writes attempts down; None: it is off."""
    options = settings.ledger
    if not options.path:
        return None
    from .ledger import Ledger  # brings SQLite

    return Ledger(
        options.path,
        flush_interval=options.flush_interval,
        retention_days=options.retention_days,
        max_size=options.max_size,
        notify=telemetry.notify,
    )


def make_remembering(
    settings: Settings, budgets: Budgets, telemetry: Telemetry
) -> Remembering | None:
    """Who lets budgets go on where the last process stopped; None: there is nothing to know."""
    path = settings.ledger.path
    if not path or not settings.budgets:
        return None
    from .remembering import Remembering  # brings SQLite

    return Remembering(path, budgets, unix=telemetry.unix, notify=telemetry.notify)


def make_alerts(
    settings: Settings,
    fleet: Fleet,
    chain: Chain,
    gauges: Gauges,
    telemetry: Telemetry,
    refresher: Refresher | None,
) -> Watch:
    """Who looks whether something is wrong; every few seconds at all of `gauges`."""
    sender = None
    if settings.alerts.webhooks:
        from .alerts.webhooks import Webhooks

        sender = Webhooks(
            settings.alerts.webhooks,
            version=__version__,
            unix=telemetry.unix,
            rng=random.Random(),
            notify=telemetry.notify,
        )
    sources = Sources(
        candidates=fleet.candidates,
        gauges=lambda: telemetry.gauges(gauges),
        recent=lambda: {
            (where.region, where.provider): sums
            for where, sums in telemetry.windows.places(MINUTES).items()
        },
        queue=lambda: (telemetry.metrics.queue_depth, chain.queue.size),
        shed=lambda: sum(
            count
            for (_, _, reason), count in telemetry.metrics.exchanges.items()
            if reason == Overloaded.reason
        ),
        lines_lost=lambda: telemetry.lines_lost,
        discovery=dict if refresher is None else refresher.answering,
        limits=chain.limits,
        tenant_budgets={each.name for each in settings.budgets if each.scope == "tenant"},
    )
    return Watch(
        settings.alerts,
        sources,
        region=telemetry.region,
        clock=telemetry.clock,
        unix=telemetry.unix,
        notify=telemetry.notify,
        sender=sender,
    )


def make_scaler(
    settings: Settings,
    backends: Iterable[Backend],
    fleet: Fleet,
    waiting: Callable[[str], int],
    telemetry: Telemetry,
) -> Scaler | None:
    """Who scales the backends that are this instance's to scale; None: there are none."""
    homes = {backend.name: backend.region for backend in backends}
    here = [
        row
        for row in settings.autoscale.backends
        if (row.instance or homes.get(row.backend)) == settings.server.region
    ]
    if not here:
        return None
    from .scaling.plan import Bounds
    from .scaling.scaler import Scaler

    return Scaler(
        {row.backend: Bounds(**row.model_dump(exclude={"backend", "instance"})) for row in here},
        interval=settings.autoscale.interval,
        dry_run=settings.autoscale.dry_run,
        fleet=fleet,
        waiting=waiting,
        clock=time.monotonic,
        notify=telemetry.notify,
    )
