"""docs/replay.md: what the runs say, and under which conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .figures import SHARE, SLICE, WINDOW, Alert, Figures, calm
from .optimum import Spent
from .trace import SPIKE, TIMES, Trace
from .world import FAMILIES, OUTAGES, SITES

FILE = Path(__file__).parent.parent / "docs" / "replay.md"
PLOT = "replay.png"
BOUND = 0.00016  # USD per second
BUDGET = 1.2  # USD
# What each run has beside the default configuration; as `runs.records` takes it.
RUNS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "bound": {"middleware": {"cost": {"max_blended_price": BOUND}}},
    "adaptive": {"middleware": {"capacity": {"adaptive": {"enabled": True}}}},
    "budget": {"budgets": [{"name": "burst", "scope": "pool:burst", "per": "hour", "usd": BUDGET}]},
}
DRAWN = ("default", "bound")

_MONEY = {
    "optimum": "the optimum at the target share",
    "blind": "not knowing which requests are short",
    "spill": "more of them at the burst pool than the target",
    "choice": "another backend of the pool than the cheapest",
    "line": "waiting inside a backend that has less room than `max_in_flight` says",
    "starts": "waiting for workers to start",
    "useless": "attempts that failed, or whose client left",
    "total": "**spent**",
}
_HOW = {
    "refuses": "refuses connections; what ran is reset",
    "stalls": "accepts, and never says a word",
    "fails": "answers 500; what ran is reset",
}


def render(trace: Trace, runs: Mapping[str, Figures]) -> str:
    """The whole document."""
    hours = trace.span / 3600
    parts = [
        _INTRODUCTION.format(count=f"{len(trace.requests):,}", hours=f"{hours:g}"),
        _settings(),
        _table("", runs, _rows(runs)),
        _OPTIMUM.format(share=f"{SHARE:.0%}"),
        _table("USD", runs, _money(runs)),
        _TOLD,
        _alerts(runs["default"].alerts),
        _WORLD.format(spikes=len(trace.spikes), times=f"{TIMES:g}", spike=f"{SPIKE:g}"),
        _sites(),
        _OUTAGES.format(calm=", ".join(f"{a:.0f} to {b:.0f} s" for a, b in calm(trace))),
        _outages(trace),
    ]
    return "\n".join(parts)


def _rows(runs: Mapping[str, Figures]) -> list[Sequence[str]]:
    def row(name: str, cell: Callable[[Figures], str]) -> Sequence[str]:
        return name, *map(cell, runs.values())

    def count(name: str, key: str, of: str) -> Sequence[str]:
        return row(name, lambda f: f"{getattr(f, of).get(key, 0):,}")

    reasons = sorted({reason for each in runs.values() for reason in each.shed})
    return [
        count("answered in full", "answered", "ends"),
        count("shed: an error instead of an answer", "shed", "ends"),
        *(count(f"… {reason}", reason, "shed") for reason in reasons),
        count("client left", "left", "ends"),
        count("broken off after it had begun", "broken", "ends"),
        row("share of the baseline pool", lambda f: f"{f.baseline:.1%}"),
        row(f"… in any {WINDOW:,} in a row, in calm", lambda f: _span(f.calm)),
        row(f"… in any {WINDOW:,} in a row at all", lambda f: _span(f.any)),
        row("realised price, USD per second", lambda f: f"{f.price:.6f}"),
        row(f"… in the dearest {SLICE / 60:g} minutes", lambda f: f"{f.dearest:.6f}"),
        row("spent, USD", lambda f: f"{f.spent.total:.3f}"),
        row("… of the optimum", lambda f: f"{f.spent.total / f.spent.optimum:.2f}"),
        row("first content of streams, p50 / p95, s", lambda f: " / ".join(map(_s, f.ttft))),
        row("waited for room", lambda f: f"{f.queued:,}"),
        row("… p95, s", lambda f: _s(f.queue_p95)),
        row("attempts", lambda f: f"{f.attempts:,}"),
        row("workers started", lambda f: f"{f.starts:,}"),
        row("burst pool: recorded, USD", lambda f: f"{f.burst_usd:.3f}"),
        row("… in its dearest hour", lambda f: f"{f.dearest_hour:.3f}"),
        row("… its workers, by the second they were up", lambda f: f"{f.workers_usd:.3f}"),
    ]


def _money(runs: Mapping[str, Figures]) -> list[Sequence[str]]:
    return [
        (_MONEY[line.name], *(f"{getattr(f.spent, line.name):.3f}" for f in runs.values()))
        for line in fields(Spent)
    ]


def _settings() -> str:
    rows = ["| run | beside the defaults |", "|---|---|"]
    for name, options in RUNS.items():
        said = {**options.get("middleware", {}), **options}
        said.pop("middleware", None)
        rows.append(_line((name, f"`{_flow(said)[1:-1]}`" if said else "nothing")))
    return "\n".join(rows) + "\n"


def _flow(value: Any) -> str:
    """As YAML writes it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:f}".rstrip("0") if isinstance(value, float) else str(value)


def _alerts(alerts: Sequence[Alert]) -> str:
    rows = ["| from | to | rule | what the log says |", "|---|---|---|---|"]
    for alert in alerts:
        end = "the end" if alert.ends is None else f"{alert.ends:.0f} s"
        rows.append(_line((f"{alert.begins:.0f} s", end, alert.rule, alert.text)))
    return "\n".join(rows) + "\n"


def _sites() -> str:
    rows = [
        "| backend | region | models | `max_in_flight` | real room | start, median | stays up |",
        "|---|---|---|---|---|---|---|",
    ]
    for site in SITES:
        family = FAMILIES[site.provider]
        room = f"{site.workers} x {site.slots}" if site.workers > 1 else f"{site.slots}"
        cells = (
            site.name,
            site.region,
            len(site.models),
            site.max_in_flight,
            room,
            f"{family.start:g} s",
            f"{family.idle:g} s",
        )
        rows.append(_line(map(str, cells)))
    return "\n".join(rows) + "\n"


def _outages(trace: Trace) -> str:
    rows = ["| when | backends | what happens |", "|---|---|---|"]
    for outage in OUTAGES:
        when = f"{outage.begin * trace.span:.0f} to {outage.end * trace.span:.0f} s"
        rows.append(_line((when, ", ".join(outage.sites), _HOW[outage.how])))
    return "\n".join(rows) + "\n"


def _table(corner: str, runs: Mapping[str, Figures], rows: Sequence[Sequence[str]]) -> str:
    lines = [_line((corner, *runs))]
    lines.append("|---|" + "---:|" * len(runs))
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[arg-type]


def _span(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1%} to {pair[1]:.1%}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f}"


_INTRODUCTION = """\
# The replay

`make replay` runs the whole proxy on a simulated clock: {count} requests in {hours} simulated
hours, through its real server, loop, middlewares and providers, to simulated backends. It takes
a minute, and the same seed gives the same figures to the last digit. This file is made by
it; a test makes it again and compares.

The requests are synthetic (`replay/trace.py`): a wave like a day's, a load that switches between
calm and busy, spikes, lognormal lengths, two models, clients that name a region or a deadline,
clients that lose patience. The backends (`replay/world.py`) count their own requests, seconds and
money; all of it agrees with what the proxy recorded, attempt by attempt.

![Share, price and what was shed, over time](replay.png)

## What came of it
"""
_OPTIMUM = """\
The share is of the exchanges that the blend decides; those with `X-Beacon-Cost-Priority` go where
they want. *In calm* is outside of spikes and outages and the two minutes after each, when both
pools have room. *Realised price* is all that was paid by all seconds that were billed, cold
starts and failed attempts included. What the burst pool's workers cost is another sum, for a
provider bills a worker while it is up, and the proxy sees its requests: two at a time on one
worker count twice, an idle worker counts nothing.

## What was spent, against a computed optimum

The optimum is for the requests that were answered: each goes once to a backend that serves its
model (in the region that it requires), takes there what it takes on a warm backend with room, and
of all of them {share} go to the burst pool. Nothing that answers the same requests at that share
can cost less. It knows no starts, faults, waits or limits of room, so it is a bound from below,
not a goal that anybody could reach: it sends the short requests to the dear pool, and nobody
knows beforehand which they are. Who chooses without looking pays the first two lines together on
average. The other lines say where the rest went.
"""
_TOLD = """\
## What the operator was told

The alerts of the default run, by the default rules.
"""
_WORLD = """\
## The backends

Speeds, starts and the times of the outages are made up; how each family starts, queues, refuses
and bills is as its provider says (docs/providers.md). Prices are the providers' defaults. On top
of the wave there are {spikes} spikes of {times} times the load for {spike} s.
"""
_OUTAGES = """\
`golem-eu-2` and `runpod-eu` have less room than their operator believes: the one lets a request
wait without a word, the other says 429. Now and then a request fails on any backend, before or
after its first content.

Calm: {calm}.
"""
