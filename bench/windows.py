"""What the last hour in memory costs the event loop: the longest piece of work of each kind, in ms.

    PYTHONPATH=. python bench/windows.py [BACKENDS MODELS ATTEMPTS_PER_SECOND]

CPU time. An hour of attempts is counted as the proxy does it, settled every 5 s; nobody asks.
"First ever" is what each reader then takes. In the next ten minutes each asks after every look, and
after that ("not settled") one a minute, just before the minute that is over is settled. "add" is
the longest of one look.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from beacon_proxy.api.admin import views
from beacon_proxy.contracts import Backend, Candidate, Live, Outcome, Stage, Usage, Verdict
from beacon_proxy.ops.performance import Performance
from beacon_proxy.ops.telemetry import Telemetry

_LOOK = 5  # s
_PROVIDERS = "openai", "golem", "modal", "runpod"


class Site:
    """A fleet and what was counted of it, on a clock of its own."""

    def __init__(self, backends: int, models: int, rate: int) -> None:
        self.now, self.models, self.rate = 0.0, models, rate
        self.dice = random.Random(1)
        self.telemetry = Telemetry(
            region="", access_log=False, log=object(), clock=lambda: self.now
        )
        self.windows = self.telemetry.windows
        self.performance = Performance(self.windows)
        self.telemetry.sources = (self.performance.gauges,)
        self.rows = [
            Candidate(
                Backend(
                    f"b{n}",
                    _PROVIDERS[n % 4],
                    "http://127.0.0.1:1",
                    "http",
                    "127.0.0.1",
                    1,
                    region=f"r{n // 4 % 6}",
                ),
                Live(),
            )
            for n in range(backends)
        ]
        self.longest: dict[str, list[float]] = defaultdict(list)

    def candidates(self) -> list[Candidate]:
        return self.rows

    async def changed(self, seen: int) -> int:
        raise NotImplementedError

    async def check(self, candidate: Candidate, seconds: float) -> None:
        raise NotImplementedError

    def serve(self, told: bool) -> None:
        """All that ends until the next look."""
        dice, begun, longest = self.dice, self.now, 0.0
        for number in range(_LOOK * self.rate):
            self.now = begun + number / self.rate
            outcome = Outcome(
                self.rows[dice.randrange(len(self.rows))].backend,
                1,
                Verdict.GOOD,
                Stage.DONE,
                ttft=dice.lognormvariate(-1, 0.8),
                duration=2.0 + dice.random(),
                usage=Usage(10, 100),
                billed=2.0,
                usd=0.001,
            )
            model = f"m{dice.randrange(self.models)}"
            since = time.thread_time()
            self.windows.add(outcome, model, stream=True)
            longest = max(longest, time.thread_time() - since)
        self.now = begun + _LOOK
        if told:
            self.longest["add"].append(longest * 1e3)

    def settle(self, told: bool) -> None:
        pieces = [0.0]
        work = self.windows.settle()
        while True:
            since = time.thread_time()
            more = next(work, self) is None
            pieces.append((time.thread_time() - since) * 1e3)
            if not more:
                break
        if told:
            self.longest["settle, a piece"].append(max(pieces))
            self.longest["settle, all"].append(sum(pieces))

    def ask(self, what: str, work: Callable[[], object]) -> None:
        since = time.thread_time()
        work()
        self.longest[what].append((time.thread_time() - since) * 1e3)

    def providers(self) -> None:
        totals = self.windows.totals(60, "backend")
        for each in totals.values():
            each.ttft_quantile(0.5)
            each.ttft_quantile(0.95)

    def costs(self, by: str) -> None:
        for each in self.windows.totals(60, by).values():
            views.sums(each)


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def main(sizes: Iterable[str]) -> None:
    backends, models, rate = map(int, [*sizes] or ["24", "3", "333"])
    gc.disable()  # the proxy has it look seldom
    before = _resident()
    site = Site(backends, models, rate)
    for look in range(3660 // _LOOK):
        site.serve(told=False)
        if look % 7:  # an hour in which nobody asked
            site.settle(told=False)
    print(f"{backends} backends, {models} models, {rate}/s: {_resident() - before:.1f} MiB")
    reads: dict[str, Callable[[], object]] = {
        "/providers": site.providers,
        "/costs by backend": lambda: site.costs("backend"),
        "/costs by model": lambda: site.costs("model"),
        "/regions": lambda: views.regions(site.rows, 0.0, site.windows),
        "gauges": lambda: list(site.performance.gauges()),
        "/metrics": lambda: site.telemetry.render(site.rows),
        "tell": lambda: site.performance.tell(site),
    }
    for what, work in reads.items():
        site.ask(f"{what}, first ever", work)
    for _ in range(600 // _LOOK):
        site.serve(told=True)
        site.settle(told=True)
        for what, work in reads.items():
            site.ask(what, work)
    site.longest.update({f"{what}, not settled": [] for what in reads})
    for minute in range(10 * len(reads)):
        for _ in range(60 // _LOOK - 1):
            site.serve(told=False)
            site.settle(told=False)
        site.serve(told=False)
        what = [*reads][minute % len(reads)]
        site.ask(f"{what}, not settled", reads[what])
        site.settle(told=False)
    for what, times in site.longest.items():
        print(f"{what:32} mean {fmean(times):7.2f}  worst {max(times):7.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
