"""The modes: what each runs, with whom, and the figures it takes from a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .bed import bed
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
        main: the figures to show first, the rest follow.
    """

    name: str
    text: str
    contenders: tuple[str, ...]
    run: Callable[[Contender, float], Run]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 5.0
    repeats: int = 3


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
        _check_log(run, under.lines, found["answers"] + 1)
        return run

    return once


def _memory(found: Mapping[str, Any]) -> dict[str, float]:
    return {f"{name}_mb": found[name] / MB for name in ("rss", "pss")}


def _check_log(run: Run, lines: int | None, answers: int) -> None:
    """An access log that lacks lines was not on."""
    if lines is not None and lines < answers:
        run.errors["lines that the access log lacks"] += answers - lines


def stream(
    contender: Contender, streams: int, interval: float, seconds: float, warm: float = 1.0
) -> Run:
    """So many streams at once, a token every `interval` s on each."""
    run = Run()
    with bed(contender, {"interval": interval}) as under:
        found = under.load(kind="streams", connections=streams, warm=warm, seconds=seconds)
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
    _check_log(run, under.lines, found["answers"] + 1)
    return run


def _paced(contender: Contender, seconds: float) -> Run:
    # LiteLLM needs a millisecond of its core for a token: more streams than these it cannot serve.
    return stream(contender, 5 if contender.name == LITELLM else 300, 0.02, seconds)


EVERYBODY = (BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX, DIRECT)
ALL: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "json",
            "32 connections, each asks again as soon as it has its answer of 0.7 kB",
            EVERYBODY,
            _documents(32),
        ),
        Mode("lat", "1 connection, the same requests", EVERYBODY, _documents(1)),
        Mode("paced", "300 streams, a token every 20 ms on each", EVERYBODY, _paced),
    )
}
