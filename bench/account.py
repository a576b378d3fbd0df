"""Holds what the soak's clients saw against the log and the metrics of the proxy."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "soak-"  # of the ids of our requests


@dataclass
class Sent:
    """What became of one request, as its client saw it.

    Attributes:
        result: complete, left, cut (lost in the middle of an answer), silent (lost before it),
            answered (another status than 200), wrong (looks whole and is not), or unsent.
        status: of the answer; 0: no head came.
        heard: whether any byte came.
    """

    id: str
    result: str = "unsent"
    status: int = 0
    heard: bool = False
    detail: str = ""


# What a line of the log may say of a request, by what its client saw. A client that leaves may just
# miss the end of its answer, or the death of its backend.
_AGREE = {
    "complete": {"complete"},
    "left": {"client_closed", "complete", "error"},
    "cut": {"error"},
    "silent": {"error"},
    "answered": {"error"},
}
_SAMPLE = re.compile(r"^(beacon_\w+?)(?:_total)?(?:\{(.*)\})? ([-+.\deE]+)$", re.MULTILINE)


def account(
    sent: Iterable[Sent], lines: Iterable[Mapping[str, Any]], metrics: str
) -> tuple[dict[str, int], list[str]]:
    """Hold what the clients saw against the lines `exchange.done` and the metrics at the end.

    Returns how many requests ended how, and what does not add up, a text for each.
    """
    logged: dict[str, list[Mapping[str, Any]]] = {}
    ends: Counter[str] = Counter()
    attempts = 0
    for line in lines:
        logged.setdefault(line["id"], []).append(line)
        ends[line["end"]] += 1
        attempts += len(line["attempts"])
    totals: Counter[str] = Counter()
    faults = []
    for each in sent:
        totals[each.result] += 1
        if fault := _compare(each, logged.pop(each.id, [])):
            faults.append(fault)
    faults += [f"{id}: logged, never sent" for id in logged if id.startswith(PREFIX)]
    faults += _against_metrics(ends, attempts, metrics)
    return dict(totals), faults


def _compare(sent: Sent, lines: Sequence[Mapping[str, Any]]) -> str | None:
    if sent.result not in _AGREE:
        return f"{sent.id}: {sent.result} {sent.detail}"
    if not lines and sent.result == "left" and not sent.heard:
        return None  # gone before the proxy could read the request
    if len(lines) != 1:
        return f"{sent.id}: {sent.result}, logged {len(lines)} times"
    line = lines[0]
    if line["end"] not in _AGREE[sent.result]:
        return f"{sent.id}: {sent.result}, logged as {line['end']}"
    if sent.result in ("complete", "answered") and line["status"] != sent.status:
        return f"{sent.id}: status {sent.status}, logged as {line['status']}"
    return None


def _against_metrics(ends: Mapping[str, int], attempts: int, metrics: str) -> list[str]:
    counted: Counter[str] = Counter()
    for name, labels, value in _SAMPLE.findall(metrics):
        end = re.search(r'end="(\w+)"', labels)
        if name == "beacon_exchanges" and end:
            counted[end[1]] += int(float(value))
        elif name in ("beacon_attempts", "beacon_queue_depth", "beacon_log_lines_lost"):
            counted[name] += int(float(value))
    rows = {end: (counted[end], ends.get(end, 0)) for end in ("complete", "error", "client_closed")}
    rows["beacon_attempts"] = (counted["beacon_attempts"], attempts)
    rows["beacon_queue_depth"] = (counted["beacon_queue_depth"], 0)
    rows["beacon_log_lines_lost"] = (counted["beacon_log_lines_lost"], 0)
    return [
        f"{name}: {was} counted, {is_} logged" for name, (was, is_) in rows.items() if was != is_
    ]


def in_flight(metrics: str) -> int:
    """Permits that are taken, of all backends."""
    rows = _SAMPLE.findall(metrics)
    return sum(int(float(value)) for name, _, value in rows if name == "beacon_in_flight")


def write_record(path: Path, sent: Iterable[Sent]) -> None:
    path.write_text(json.dumps([[s.id, s.result, s.status, s.heard, s.detail] for s in sent]))


def read_record(path: Path) -> list[Sent]:
    return [Sent(*row) for row in json.loads(path.read_text())]
