"""What there is to see at one look: the fleet, the last minutes, and gauges by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..contracts import Backend, Candidate, Clock, Gauge

MINUTES = 5  # that "recent" is: whole ones, and the begun one
RECENT = 30.0  # s that what was read of them stands: with a thousand backends it takes some ms


Limit = Callable[[Backend], int]
Place = tuple[str, str]  # region, provider


class Sums(Protocol):
    """Sums over some attempts, as `ops.windows` has them."""

    @property
    def good(self) -> int: ...

    @property
    def strikes(self) -> int: ...

    @property
    def busy(self) -> int: ...

    @property
    def ttft(self) -> Sized: ...

    def success_rate(self) -> float | None: ...

    def ttft_quantile(self, q: float) -> float | None: ...


class Reading(NamedTuple):
    """One value of this moment."""

    subject: str  # from a bounded set
    value: float | None  # None: there is nothing to say
    says: str  # one line for a person
    minor: bool = False  # it is no more than a warning, whatever its value


@dataclass(slots=True)
class View:
    """One look.

    Attributes:
        now: monotonic s.
        limits: of what may run at once on a backend, beside its `max_in_flight`.
        gauges: by name.
        recent: attempts of the last `MINUTES`.
        recent_at: when those were read; monotonic s.
        queue: how many exchanges wait for room, and how many may.
        shed: exchanges that were refused for want of room, since the start.
        lines_lost: log lines that could not be written, since the start.
        sources: of backends, by name; whether each answers.
        tenant_budgets: names of the budgets of which each tenant has one.
    """

    now: float
    candidates: Iterable[Candidate] = ()
    limits: Sequence[Limit] = ()
    gauges: Mapping[str, list[Gauge]] = field(default_factory=dict)
    recent: Mapping[Place, Sums] = field(default_factory=dict)
    recent_at: float = 0.0
    queue: tuple[int, int] = (0, 0)
    shed: int = 0
    lines_lost: int = 0
    sources: Mapping[str, bool] = field(default_factory=dict)
    tenant_budgets: Set[str] = frozenset()

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The values of a gauge by one of its labels; the highest, where several have it."""
        found: dict[str, float] = {}
        for gauge in self.gauges.get(name, ()):
            key = dict(gauge.labels).get(label, "")
            found[key] = max(gauge.value, found.get(key, gauge.value))
        return found

    def one(self, name: str) -> float | None:
        """The value of a gauge that has no labels; None: nobody shows it."""
        return next((gauge.value for gauge in self.gauges.get(name, ())), None)


@dataclass(frozen=True, slots=True)
class Sources:
    """Who is asked for what a view shows. Every few seconds, so none may take long."""

    candidates: Callable[[], Iterable[Candidate]]
    gauges: Callable[[], Iterable[Gauge]]
    recent: Callable[[], Mapping[Place, Sums]]
    queue: Callable[[], tuple[int, int]]
    shed: Callable[[], int]
    lines_lost: Callable[[], int]
    discovery: Callable[[], Mapping[str, bool]]
    limits: Sequence[Limit] = ()
    tenant_budgets: Set[str] = frozenset()


class Eyes:
    """Looks again and again."""

    def __init__(self, sources: Sources, clock: Clock) -> None:
        self._sources, self._clock = sources, clock
        self._recent: Mapping[Place, Sums] = {}
        self._recent_at: float | None = None

    def look(self) -> View:
        now, sources = self._clock(), self._sources
        if self._recent_at is None or now - self._recent_at >= RECENT:
            self._recent = sources.recent()
            self._recent_at = now
        gauges: dict[str, list[Gauge]] = {}
        for gauge in sources.gauges():
            gauges.setdefault(gauge.name, []).append(gauge)
        return View(
            now=now,
            candidates=sources.candidates(),
            limits=sources.limits,
            gauges=gauges,
            recent=self._recent,
            recent_at=self._recent_at,
            queue=sources.queue(),
            shed=sources.shed(),
            lines_lost=sources.lines_lost(),
            sources=sources.discovery(),
            tenant_budgets=sources.tenant_budgets,
        )
