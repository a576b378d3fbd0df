"""What the proxy tells: one canonical line an exchange, events, metrics, and who listens live.

Rule 1: no body, no query, no credential is ever told; text that a client makes up is cut to size.
Rule 2: telling never harms an exchange. A log that cannot be written loses lines and counts them, a
listener that is slow loses events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..contracts import Backend, Candidates, Clock, End, Exchange, Gauge, Outcome
from ..errors import Overloaded, told
from .canonical import Canonical
from .lines import JsonLines, Line, encode, through
from .live import Listener
from .metrics import Metrics
from .windows import Windows
from .writer import LineWriter

MAX_LISTENERS = 32  # each costs every exchange a little

# Of every other event: info. A warning is for a human who may act, an error for one who should.
LEVELS = {
    "alert.began": "warning",
    "alerts.failed": "error",
    "autoscale.failed": "warning",
    "autoscale.stopped": "error",
    "backend.ejected": "warning",
    "budget.exhausted": "warning",
    "budget.forgot": "error",
    "carry.failed": "error",
    "check.failed": "warning",
    "config.ignored": "warning",
    "discovery.clashed": "warning",
    "discovery.failed": "warning",
    "discovery.skipped": "warning",
    "discovery.unplaced": "warning",
    "discovery.stopped": "error",
    "fleet.panicked": "warning",
    "gauges.failed": "error",
    "job.left_behind": "warning",
    "ledger.clock_moved": "warning",
    "ledger.failed": "error",
    "ledger.shortened": "warning",
    "ledger.skipped": "error",
    "observe.failed": "error",
    "performance.stopped": "error",
    "probe.failed": "warning",
    "probes.stopped": "error",
    "retry.refused": "warning",
    "server.failed": "error",
    "webhook.failed": "warning",
    "webhook.overflowed": "warning",
}

# What a listener on the public /ws has no business to know.
_PRIVATE = frozenset(
    {"client", "detail", "error", "host", "path", "problems", "source", "tenant", "trace_id", "url"}
)
_TAKEN = frozenset(
    {"event", "level", "method_name", "self", "ts"}
)  # names that structlog and we use


Sources = tuple[Callable[[], Iterable[Gauge]], ...]


class Telemetry:
    """The one place that events, metrics and the last hour go through.

    Attributes:
        log: the structlog logger that every line goes to.
        metrics, windows: the numbers behind /metrics, /costs and /regions.
        region: where this instance runs.
        sources: who shows gauges of their own.
        clock, unix: monotonic and unix seconds.
    """

    def __init__(
        self,
        *,
        region: str,
        access_log: bool,
        tenants: bool = False,
        log: Any = None,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
    ) -> None:
        """`tenants`: the canonical line says whose an exchange was."""
        self.region, self.clock, self.unix = region, clock, unix
        self.metrics = Metrics(region, clock)
        self._writer = LineWriter() if log is None else None
        lines = None if self._writer is None else JsonLines(self._writer, unix)
        self.log = log if lines is None else lines.logger
        self._write = through(log) if lines is None else lines.write
        self._canonical = Canonical(tenants=tenants)
        self.windows = Windows(clock)
        self._access_log = access_log
        self._listeners: list[Listener] = []
        self.sources: Sources = ()

    def attempt(self, exchange: Exchange, outcome: Outcome) -> None:
        """Count an attempt that has ended. Once for each, whatever its end."""
        self.metrics.attempt(outcome)
        self.windows.add(outcome, exchange.model, exchange.stream)

    def exchange(
        self,
        exchange: Exchange,
        end: End,
        *,
        status: int,
        reason: str | None,
        bytes_in: int,
        bytes_out: int,
        ttft: float | None,
        duration: float,
        queued: float,
    ) -> None:
        """Tell an exchange that has ended: its canonical line `exchange.done`. Once for each.

        `queued` is all waiting, for room and between attempts. A client that left counts as 499,
        whatever it was sent before.
        """
        if end is End.CLIENT_CLOSED:
            status = 499
        self.metrics.exchange(exchange, end, status, reason, duration, queued)
        if not self._access_log and not self._listeners:
            return
        line = self._canonical.line(
            exchange, end, status, reason, bytes_in, bytes_out, ttft, duration, queued
        )
        if self._access_log:
            self._tell(line)
        if self._listeners:
            self._publish(line)

    def notify(self, event: str, /, **fields: Any) -> None:
        """Tell the operator: a log line, and a live event. See `contracts.Notify`."""
        if event == "backend.ejected":
            backend = fields.get("backend")
            self.metrics.ejections[str(getattr(backend, "name", backend))] += 1
        told = {f"{name}_" if name in _TAKEN else name: value for name, value in fields.items()}
        level = LEVELS.get(event, "info")
        if level == "warning" and fields.get("severity") == "critical":
            level = "error"
        line: Line = {"ts": None, "level": level, "event": event, **told}
        self._tell(line)
        if self._listeners:
            self._publish(line)

    def forget(self, backend: Backend) -> None:
        """A backend is gone, and nobody has its name now: its numbers go, too.

        What it cost in the last hour stays in `windows` for that hour.
        """
        self.metrics.forget(backend.name)

    def queue_depth(self, n: int) -> None:
        """Note how many exchanges wait for room now."""
        self.metrics.queue_depth = n

    def close(self, timeout: float = 1.0) -> None:
        """Write what the log still holds, within `timeout` s; later lines are lost.

        A logger of the caller's own stays as it is.
        """
        if self._writer is not None:
            self._writer.close(timeout)

    def gauges(self, sources: Sources | None = None) -> Iterator[Gauge]:
        """What each of `sources` shows of itself now; None: everybody."""
        for source in self.sources if sources is None else sources:
            try:
                yield from source()
            except Exception as exc:  # a plugin's fault must not take the other numbers away
                self.notify("gauges.failed", error=told(exc))

    def render(self, candidates: Candidates, accept: str = "") -> tuple[bytes, str]:
        """The metrics and their content type, in the Prometheus format that `accept` prefers."""
        self.metrics.measured = list(self.gauges())
        if self._writer is not None:
            self.metrics.lines_unwritten = self._writer.lost
        return self.metrics.render(candidates, accept)

    @property
    def lines_lost(self) -> int:
        """Log lines that could not be written."""
        unwritten = 0 if self._writer is None else self._writer.lost
        return self.metrics.lines_lost + unwritten

    def subscribe(self) -> Listener:
        """Start to receive live events.

        Raises:
            Overloaded: enough listen already.
        """
        if len(self._listeners) >= MAX_LISTENERS:
            raise Overloaded("too many listeners", retry_after=60)
        listener = Listener()
        self._listeners.append(listener)
        return listener

    def unsubscribe(self, listener: Listener) -> None:
        """Stop. A listener that is already gone is fine."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _tell(self, line: Line) -> None:
        try:
            self._write(line)
        except (OSError, ValueError):  # who reads our stdout is gone, its disk full, it is closed
            self.metrics.lines_lost += 1

    def _publish(self, line: Line) -> None:
        told = _public(line)
        del told["ts"], told["level"]
        event = told.pop("event")
        text = encode({"type": event, "timestamp": self.unix(), **told}) + b"\n"
        for listener in self._listeners:
            listener.put(event, text)


def _public(fields: dict[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in fields.items() if name not in _PRIVATE}
    if isinstance(tries := told.get("attempts"), list):
        told["attempts"] = [_public(tried) for tried in tries]
    return told
