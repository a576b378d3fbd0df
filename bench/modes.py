"""The modes: what each runs, with whom, and the figures it takes from a run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import soak
from .bed import BACKEND_LOG, bed
from .contenders import Contender

MB = 1e6  # bytes
US = 1e6  # in a second

BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX, DIRECT = (
    "beacon-proxy",
    "envoy",
    "vllm-router",
    "vllm-router-rr",
    "litellm",
    "nginx",
    "direct",
)


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


@dataclass(frozen=True)
class Mode:
    """One kind of work.

    Attributes:
        name, text: its name, and what is done.
        contenders: who takes part.
        run: does it once, for so many seconds.
        left_out: who does not take part, and why.
        seconds: how long one run measures by default.
        repeats: how often it is run by default.
        added: it is about the time that a contender adds to the direct way.
    """

    name: str
    text: str
    contenders: tuple[str, ...]
    run: Callable[[Contender, float], Run]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 5.0
    repeats: int = 3
    added: bool = False


def _documents(connections: int) -> Callable[[Contender, float], Run]:
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
SLOW = 20_000_000  # bytes/s of a slow side


def _transfers(kind: str, variants: Mapping[str, dict[str, Any]]) -> Callable[..., Run]:
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


def _paced(contender: Contender, seconds: float) -> Run:
    # LiteLLM needs a millisecond of its core for a token: more streams than these it cannot serve.
    return stream(contender, 5 if contender.name == LITELLM else 300, 0.02, seconds)


def _open(contender: Contender, seconds: float) -> Run:
    return stream(contender, 2000, 0.25, seconds, warm=4)


def _open_8000(contender: Contender, seconds: float) -> Run:
    return stream(contender, 8000, 1.0, seconds, warm=12)


SCALE = (100, 400, 1200, 4000)  # streams
SCALE_RATE = 10_000  # tokens/s of all of them


def _scale(contender: Contender, seconds: float) -> Run:
    run = Run()
    for streams in SCALE:
        once = stream(contender, streams, streams / SCALE_RATE, seconds, warm=1 + streams / 800)
        run.errors.update(once.errors)
        for name in ("cpu_us_per_token", "rss_mb", "p50_us", "p99_us"):
            if name in once.figures:
                run.figures[f"{name}@{streams}"] = once.figures[name]
    return run


def _start(contender: Contender, seconds: float) -> Run:
    with bed(contender) as under:
        return Run({"first_answer_s": under.first_answer})


def _soak(contender: Contender, seconds: float) -> Run:
    backend = {"interval": 0.25, "tokens": 100, "seed": 1}
    with bed(contender, backend, probing) as under:
        record = under.folder / "sent.json"
        spec = soak.Spec(
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
        sent = soak.read_record(record)
        totals, faults = soak.account(sent, exchanges(log), found["metrics"])
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
        "in_flight": soak.in_flight(found["metrics"]),
    }


EVERYBODY = (BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX, DIRECT)
_TOO_MANY = "a millisecond of CPU a token: it would need eight cores and more"
ALL: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "json",
            "32 connections, each asks again as soon as it has its answer of 0.7 kB",
            EVERYBODY,
            _documents(32),
        ),
        Mode(
            "lat",
            "1 connection, the same requests",
            EVERYBODY,
            _documents(1),
            seconds=3,
            added=True,
        ),
        Mode(
            "paced",
            "300 streams (LiteLLM: 5, more it cannot serve), a token every 20 ms on each",
            EVERYBODY,
            _paced,
        ),
        Mode(
            "open",
            "2000 streams, a token every 250 ms on each",
            (BEACON, ENVOY, VLLM, NGINX),
            _open,
            {LITELLM: _TOO_MANY, VLLM_RR: "as vllm-router: the policy is of no weight here"},
        ),
        Mode(
            "open-8000",
            "8000 streams in one process, a token every second on each",
            (BEACON, ENVOY, VLLM),
            _open_8000,
            {LITELLM: _TOO_MANY},
            repeats=1,
        ),
        Mode(
            "upload",
            "a body of 100 MB, to /v1/files and as a chat request; a slow backend takes 20 MB/s",
            (BEACON, ENVOY, NGINX, DIRECT),
            _transfers("upload", UPLOADS),
            {
                LITELLM: "takes files only for providers that it knows",
                VLLM: "answers 400 to what is no JSON, and writes JSON anew, not passing it on",
            },
        ),
        Mode(
            "download",
            "an answer of 100 MB; a slow reader takes 20 MB/s",
            (BEACON, ENVOY, VLLM, NGINX, DIRECT),
            _transfers("download", DOWNLOADS),
            {LITELLM: "gives files only of providers that it knows"},
        ),
        Mode(
            "scale",
            "the same 10 000 tokens/s, spread over 100 to 4000 streams",
            (BEACON, ENVOY, VLLM),
            _scale,
            {LITELLM: _TOO_MANY},
            seconds=4,
        ),
        Mode(
            "start",
            "from the start of the process to its first answer",
            (BEACON, ENVOY, VLLM, LITELLM, NGINX),
            _start,
            repeats=5,
        ),
        Mode(
            "soak",
            "1000 clients of streams and documents; a fifth leaves early, backends die at random",
            (BEACON,),
            _soak,
            seconds=600,
            repeats=1,
        ),
    )
}
