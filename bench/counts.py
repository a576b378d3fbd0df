"""What a load is told, and what it counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .processes import Tree


@dataclass
class Spec:
    """What to ask, of whom, and for how long."""

    kind: str  # documents, streams, upload or download
    port: int
    root: int = 0  # leader of the process tree that is measured; 0: none
    connections: int = 32
    warm: float = 1.0  # s before the window, at least
    seconds: float = 5.0  # of the window
    limit: float = 30.0  # s until all streams must have begun, and until the last answer ends
    backend: int = 0  # process that ends the streams at SIGUSR1; 0: they end by themselves
    exact: bool = True  # answers must be the backend's to the byte
    size: int = 0  # bytes of an upload or download
    rate: float = 0.0  # bytes/s at which a download is read; 0: as they come
    body: str = "file"  # of an upload: see bodies.BODIES


@dataclass
class Counts:
    """What was seen; `errors` from the beginning, all else since `begin`."""

    root: int
    errors: Counter[str] = field(default_factory=Counter)
    done: int = 0  # answers
    tokens: int = 0
    times: list[float] = field(default_factory=list)  # s of an answer, or of a token's way
    all_done: int = 0  # answers since the start of the load, good ones

    def begin(self) -> None:
        self.done = self.tokens = 0
        self.times.clear()
        self._began = time.perf_counter()
        self._cpu = Tree(self.root).cpu() if self.root else 0.0

    def end(self) -> dict[str, Any]:
        """The figures of the window."""
        seconds = time.perf_counter() - self._began
        cpu = Tree(self.root).cpu() if self.root else 0.0  # first of all: it works on meanwhile
        found: dict[str, Any] = {"seconds": seconds, "done": self.done, "tokens": self.tokens}
        found |= quantiles(self.times)
        if self.root:
            tree = Tree(self.root)
            found["cpu"] = cpu - self._cpu
            memory = tree.memory()
            found |= {"rss": memory.rss, "pss": memory.pss, "peak": memory.peak}
        return found


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p50 and p99, by the nearest rank; none where there is no time."""
    ordered = sorted(times)
    ranks = {"p50": 0.5, "p99": 0.99}
    return {n: ordered[int(q * (len(ordered) - 1) + 0.5)] for n, q in ranks.items() if ordered}
