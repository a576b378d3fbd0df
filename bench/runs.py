"""One run of each kind of work with one contender, and the figures that it gives."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import account
from .bed import BACKEND_LOG, bed
from .contenders import Contender
from .soak import Spec as SoakSpec

MB = 1e6  # bytes
US = 1e6  # in a second


@dataclass
class Run:
    """What one run of one contender gave.

    Attributes:
        figures: name -> number; the names say the units.
        errors: what went wrong -> how often.
    """

    figures: dict[str, float] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def take(self, found: Mapping[str, Any]) -> None:
        self.errors.update(found["errors"])


def documents(connections: int) -> Callable[[Contender, float], Run]:
    def once(contender: Contender, seconds: float) -> Run:
        run = Run()
        with bed(contender) as under:
            found = under.load(kind="documents", connections=connections, seconds=seconds)
            run.take(found)
            if found["done"]:
                run.figures["requests_per_s"] = found["done"] / found["seconds"]
                run.figures |= {f"{q}_us": found[q] * US for q in ("p50", "p99")}
                if under.root:
                    run.figures["cpu_us_per_request"] = found["cpu"] / found["done"] * US
                    run.figures["core_share"] = found["cpu"] / found["seconds"]
                    run.figures |= _memory(found)
            _check_log(run, under.log(), found["answers"] + 1)
        return run

    return once


def _memory(found: Mapping[str, Any]) -> dict[str, float]:
    return {f"{name}_mb": found[name] / MB for name in ("rss", "pss")}


def _check_log(run: Run, log: Path | None, answers: int) -> None:
    """An access log that lacks lines was not on."""
    if log is not None and (lines := log.read_bytes().count(b"\n")) < answers:
        run.errors["lines that the access log lacks"] += answers - lines


def stream(
    contender: Contender, streams: int, interval: float, seconds: float, warm: float = 1.0
) -> Run:
    """So many streams at once, a token every `interval` s on each."""
    run = Run()
    with bed(contender, {"interval": interval}) as under:
        found = under.load(
            kind="streams", connections=streams, warm=warm, seconds=seconds, limit=30 + 5 * warm
        )
        run.take(found)
        nominal = streams / interval
        rate = found["tokens"] / found["seconds"]
        run.figures |= {"streams": streams, "tokens_per_s": rate}
        if rate < 0.95 * nominal:
            run.errors[f"fell behind: {rate:.0f} of {nominal:.0f} tokens/s"] += 1
        if found["tokens"]:
            run.figures |= {f"{q}_us": found[q] * US for q in ("p50", "p99")}
            if under.root:
                run.figures["cpu_us_per_token"] = found["cpu"] / found["tokens"] * US
                run.figures |= _memory(found)
                run.figures["rss_kb_per_stream"] = (found["rss"] - found["before"]) / streams / 1e3
        _check_log(run, under.log(), found["answers"] + 1)
    return run


SIZE = 100_000_000  # bytes of an upload or download
SLOW = 40_000_000  # bytes/s of a slow side


def transfers(kind: str, variants: Mapping[str, dict[str, Any]]) -> Callable[..., Run]:
    """One transfer a variant, each with a contender that has done nothing else yet."""

    def once(contender: Contender, seconds: float) -> Run:
        run = Run()
        for name, spec in variants.items():
            rate = spec.get("backend_rate", 0.0)
            given = {key: value for key, value in spec.items() if key != "backend_rate"}
            with bed(contender, {"rate": rate}) as under:
                found = under.load(kind=kind, size=SIZE, **given)
                run.take(found)
                run.figures[f"seconds@{name}"] = found["seconds"]
                if under.root:
                    run.figures[f"growth_mb@{name}"] = (found["peak"] - found["before"]) / MB
                    run.figures[f"cpu_s@{name}"] = found["cpu"]
        return run

    return once


UPLOADS: dict[str, dict[str, Any]] = {
    "file": {},
    "file, slow backend": {"backend_rate": SLOW},
    "chat": {"body": "chat"},
    "chat, slow backend": {"body": "chat", "backend_rate": SLOW},
}
DOWNLOADS: dict[str, dict[str, Any]] = {"file": {}, "file, slow reader": {"rate": SLOW}}


def paced(contender: Contender, seconds: float) -> Run:
    # LiteLLM needs a millisecond of its core for a token: more streams than these it cannot serve.
    return stream(contender, 5 if contender.name == "litellm" else 300, 0.02, seconds)


def open_2000(contender: Contender, seconds: float) -> Run:
    return stream(contender, 2000, 0.25, seconds, warm=4)


def open_8000(contender: Contender, seconds: float) -> Run:
    return stream(contender, 8000, 1.0, seconds, warm=12)


SCALE = (100, 400, 1200, 4000)  # streams
SCALE_RATE = 10_000  # tokens/s of all of them


def scale(contender: Contender, seconds: float) -> Run:
    run = Run()
    for streams in SCALE:
        once = stream(contender, streams, streams / SCALE_RATE, seconds, warm=1 + streams / 800)
        run.errors.update(once.errors)
        for name in ("cpu_us_per_token", "rss_mb", "p50_us", "p99_us"):
            if name in once.figures:
                run.figures[f"{name}@{streams}"] = once.figures[name]
    return run


def start(contender: Contender, seconds: float) -> Run:
    with bed(contender) as under:
        return Run({"first_answer_s": under.first_answer})


def soak(contender: Contender, seconds: float) -> Run:
    backend = {"interval": 0.25, "tokens": 100, "seed": 1}
    with bed(contender, backend, probing) as under:
        record = under.folder / "sent.json"
        spec = SoakSpec(
            under.port,
            under.root,
            str(record),
            probe=str(under.folder / PROBE),
            seconds=seconds,
            warm=min(120.0, seconds / 4),
        )
        found = under.run("bench.soak", asdict(spec), seconds + 2 * spec.limit + 2 * spec.rest)
        log = under.log()
        assert log is not None
        sent = account.read_record(record)
        totals, faults = account.account(sent, exchanges(log), found["metrics"])
        deaths = (under.folder / BACKEND_LOG).read_text().count('"died"')
    run = Run(_soaked(found, totals), Counter(found["errors"]))
    run.figures |= {"exchanges": len(sent), "deaths": deaths, "unaccounted": len(faults)}
    for fault in faults[:20]:
        print(f"soak: {fault}", file=sys.stderr)
    if faults:
        run.errors[f"exchanges that do not add up, such as {faults[0]}"] += len(faults)
    return run


def exchanges(log: Path) -> list[dict[str, Any]]:
    """The canonical lines of a log of the proxy."""
    lines = (json.loads(line) for line in log.read_bytes().splitlines())
    return [line for line in lines if line["event"] == "exchange.done"]


PROBE = "tasks.json"


def probing(folder: Path) -> dict[str, str]:
    """The environment that lets the proxy tell how many tasks it has."""
    path = Path(__file__).parent / "probe"
    return {"PYTHONPATH": str(path), "BENCH_PROBE": str(folder / PROBE)}


def _soaked(found: Mapping[str, Any], totals: Mapping[str, int]) -> dict[str, float]:
    before, after = found["before"], found["after"]
    samples = [rss for _, rss in found["samples"]]
    quarters = {f"rss_mb@{n}/4": samples[len(samples) * n // 4 - 1] / MB for n in (1, 2, 3, 4)}
    broken = sum(totals.get(each, 0) for each in ("cut", "silent", "answered", "wrong"))
    return {
        "slope_mb_per_h": found["slope"] / MB,
        "complete": totals.get("complete", 0),
        "left": totals.get("left", 0),
        "broken": broken,
        "rss_before_mb": before["rss"] / MB,
        "rss_after_mb": after["rss"] / MB,
        "more_fds": after["descriptors"] - before["descriptors"],
        "more_tasks": after["tasks"] - before["tasks"],
        "more_threads": after["threads"] - before["threads"],
        "in_flight": account.in_flight(found["metrics"]),
        **quarters,
    }
