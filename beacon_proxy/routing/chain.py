"""The phases of all middlewares, and who is told of what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..contracts import Backend, Candidates, Exchange, Gauge, Outcome, Permit, QueueLimits

PreparePhase = Callable[[Exchange], None]
SelectPhase = Callable[[Exchange, Candidates], Candidates]
AdmitPhase = Callable[[Exchange, Backend], Permit | None]
RetryPhase = Callable[[Exchange, Outcome], float | None]
ObservePhase = Callable[[Exchange, Outcome], None]


@dataclass(frozen=True, slots=True)
class Chain:
    """The phases of all middlewares, sorted once into tuples of bound methods."""

    prepares: tuple[PreparePhase, ...]
    selects: tuple[SelectPhase, ...]
    admits: tuple[AdmitPhase, ...]
    retries: tuple[RetryPhase, ...]
    observers: tuple[ObservePhase, ...]
    lifespans: tuple[Any, ...]
    gauges: tuple[Callable[[], Iterable[Gauge]], ...]
    limits: tuple[Callable[[Backend], int], ...]
    queue: QueueLimits

    @classmethod
    def of(cls, middlewares: Iterable[object]) -> Chain:
        """Sort middlewares, in the order of the chain.

        What cannot be called is no phase: one that an option switches on is None while it is off.
        """
        things = tuple(middlewares)

        def phase(name: str) -> tuple[Any, ...]:
            found = (getattr(thing, name, None) for thing in things)
            return tuple(each for each in found if callable(each))

        rules = phase("queue")
        return cls(
            phase("prepare"),
            phase("select"),
            phase("admit"),
            phase("retry"),
            phase("observe"),
            phase("lifespan"),
            phase("gauges"),
            phase("concurrency_limit"),
            rules[0]() if rules else QueueLimits(0, 0.0),
        )
