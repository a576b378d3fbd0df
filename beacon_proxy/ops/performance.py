"""How each region and provider does of late: told to rankers (`Live.recent`) and to Prometheus.

It stands at the end of the chain, after the middlewares, and takes no part in a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from ..contracts import Fleet, Gauge, Notify, Recent, tell_nobody
from .totals import Totals
from .windows import SPANS, Windows

_RECENT = 5  # minutes, as `contracts.Recent` says
_PAUSE = 5.0  # s between two looks: a ranker need not know sooner
_PERCENTILES = (50, 95, 99)


class Performance:
    """Keeps the windows settled and `Live.recent` of every backend, and shows gauges."""

    def __init__(
        self, windows: Windows, notify: Notify = tell_nobody, *, pause: float = _PAUSE
    ) -> None:
        """`pause` is in s."""
        self._windows = windows
        self._notify = notify
        self._pause = pause

    @asynccontextmanager
    async def lifespan(self, fleet: Fleet) -> AsyncIterator[None]:
        task = asyncio.create_task(self._keep(fleet), name="performance.recent")
        task.add_done_callback(self._stopped)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _keep(self, fleet: Fleet) -> None:
        while True:
            for _ in self._windows.settle():
                await asyncio.sleep(0)
            self.tell(fleet)
            # At once when a minute is over: who asks then finds it added up already.
            await asyncio.sleep(min(self._pause, self._windows.left()))

    def tell(self, fleet: Fleet) -> None:
        """Write to every backend what its region and provider did; None: nothing was tried."""
        places = self._windows.places(_RECENT)
        recent = {tuple(place): _recent(totals) for place, totals in places.items()}
        for candidate in fleet.candidates():
            backend = candidate.backend
            candidate.live.recent = recent.get((backend.region, backend.provider))

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._notify("performance.stopped", error=repr(task.exception()))

    def gauges(self) -> Iterator[Gauge]:
        """What was measured; a place and window without a measurement shows nothing."""
        for minutes in SPANS:
            for place, totals in self._windows.places(minutes).items():
                where = ("region", place.region), ("provider", place.provider)
                labels = *where, ("window", f"{minutes}m")
                for name, text, number in _NUMBERS:
                    value = number(totals)
                    if value is not None:
                        yield Gauge(f"region_{name}", text, value, labels)
                for name, text, quantile in _SKETCHES:
                    for percent in _PERCENTILES:
                        value = quantile(totals, percent / 100)
                        if value is not None:
                            # `quantile` is a label of summaries, whose counts never fall.
                            its = *labels, ("percentile", str(percent))
                            yield Gauge(f"region_{name}", text, value, its)


def _recent(totals: Totals) -> Recent:
    return Recent(
        ttft_p50=totals.ttft_quantile(0.5),
        ttft_p95=totals.ttft_quantile(0.95),
        duration_p50=totals.duration_quantile(0.5),
        success=totals.success_rate(),
        tokens_per_second=totals.tokens_per_second(),
    )


# The end of each name and its help; all are over the last `window` and the begun minute.
_NUMBERS: tuple[tuple[str, str, Callable[[Totals], float | None]], ...] = (
    ("attempts", "Attempts that ended in the window.", lambda totals: totals.attempts),
    ("busy", "Attempts that were pushed back (429, 503).", lambda totals: totals.busy),
    (
        "success_ratio",
        "Good attempts, of those that say something about their backend.",
        Totals.success_rate,
    ),
    ("tokens_per_second", "How fast good answers came.", Totals.tokens_per_second),
    ("usd_per_second", "Paid for a billed second, over all attempts.", Totals.cost_per_second),
    (
        "usd_per_million_tokens",
        "Paid for a million tokens, in or out, over all attempts.",
        Totals.cost_per_million_tokens,
    ),
    ("estimated_ratio", "Of all tokens, those no backend counted.", Totals.estimated_share),
)
_SKETCHES: tuple[tuple[str, str, Callable[[Totals, float], float | None]], ...] = (
    (
        "ttft_seconds",
        "From an attempt's start to first content, of good ones, less a cold start.",
        Totals.ttft_quantile,
    ),
    (
        "duration_seconds",
        "From an attempt's start to its end, of good ones, less a cold start.",
        Totals.duration_quantile,
    ),
    ("cold_start_seconds", "What cold starts took.", Totals.start_quantile),
)
