"""The requests of a replay, generated from a seed: synthetic, no recording of anybody's traffic.

A wave like a day's, at eight times its pace, under it a load that switches between calm and busy,
and on top of both four minutes of ten times as much. Given how many requests there are, the
arrivals of a Poisson process of that rate are independent draws from it, which is how they are
made. Lengths are lognormal, as those of public traces of LLM traffic are by shape; their medians
here are made up.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

SECONDS_EACH = 1.08  # s of simulated time for each request: 10 000 take three hours
SPIKES = (0.14, 0.42, 0.56, 0.88)  # when each begins, as a part of the whole
SPIKE = 60.0  # s
TIMES = 10.0  # as many requests as without it
SMALL, LARGE = "llama3.1:8b", "qwen2.5:32b"


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and how its client behaves."""

    id: str
    at: float  # s from the start
    model: str
    input: int  # tokens
    output: int
    stream: bool
    region: str | None  # X-Beacon-Region
    required: bool  # X-Beacon-Region-Mode: require
    cheap: bool | None  # X-Beacon-Cost-Priority
    timeout: float | None  # s, X-Beacon-Timeout
    patience: float  # s that the client waits for the first byte of an answer
    leaves: float | None  # s after that at which it leaves, whatever came; None: it stays
    effort: float  # times the usual seconds that it takes, on every backend


@dataclass(frozen=True, slots=True)
class Trace:
    """All requests, by time."""

    span: float  # s
    requests: tuple[Request, ...]

    @property
    def spikes(self) -> tuple[tuple[float, float], ...]:
        """From and until when, s."""
        return tuple((begin * self.span, begin * self.span + SPIKE) for begin in SPIKES)


def generate(count: int, seed: int) -> Trace:
    """Make `count` requests over `count * SECONDS_EACH` s."""
    rng = random.Random(seed)
    span = count * SECONDS_EACH
    whole = list(accumulate(_rates(span, rng)))  # by the second
    times = sorted(rng.random() * whole[-1] for _ in range(count))
    requests = []
    for number, mark in enumerate(times):
        second = bisect_left(whole, mark)
        before = whole[second - 1] if second else 0.0
        at = second + (mark - before) / (whole[second] - before)
        requests.append(_request(f"r{number:05}", round(at, 3), rng))
    return Trace(span, tuple(requests))


def _rates(span: float, rng: random.Random) -> list[float]:
    """How many requests come in each second, but for a common factor."""
    rates, load, until = [], 1.0, 0.0
    for second in range(math.ceil(span)):
        if second >= until:
            load = 1.4 if load < 1.0 else 0.7
            until = second + rng.expovariate(1 / 300.0)
        wave = 1.0 - 0.5 * math.cos(2 * math.pi * second / span)
        spike = any(begin * span <= second < begin * span + SPIKE for begin in SPIKES)
        rates.append(wave * load * (TIMES if spike else 1.0))
    return rates


def _request(name: str, at: float, rng: random.Random) -> Request:
    region = rng.choices((None, "us-east", "eu-west"), (60, 25, 15))[0]
    return Request(
        id=name,
        at=at,
        model=rng.choices((SMALL, LARGE), (85, 15))[0],
        input=_length(rng, 400, 1.0, 8, 8_000),
        output=_length(rng, 150, 0.9, 1, 1_500),
        stream=rng.random() < 0.75,
        region=region,
        required=region is not None and rng.random() < 0.05,
        cheap=rng.choices((None, True, False), (96, 2, 2))[0],
        timeout=rng.choices((None, 30.0, 60.0), (80, 10, 10))[0],
        patience=round(min(max(rng.lognormvariate(math.log(60), 0.6), 12.0), 300.0), 3),
        leaves=round(rng.uniform(0.5, 4.0), 3) if rng.random() < 0.02 else None,
        effort=round(rng.lognormvariate(0.0, 0.15), 3),
    )


def _length(rng: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(max(round(rng.lognormvariate(math.log(median), sigma)), least), most)
