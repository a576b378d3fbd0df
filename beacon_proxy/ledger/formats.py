"""A report as text: a table for the eye, CSV and JSON for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Document = Mapping[str, Any]  # of `Report.document`

# heading of a column, the key of its value, and how that is written
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("attempts", "attempts", ",d"),
    ("good", "good", ",d"),
    ("failed", "failed", ",d"),
    ("tokens in", "tokens_in", ",d"),
    ("tokens out", "tokens_out", ",d"),
    ("estimated", "estimated_share", ".0%"),
    ("billed s", "billed_seconds", ",.1f"),
    ("USD", "usd", ",.6f"),
    ("USD/s", "usd_per_second", ".8f"),
    ("USD/M tokens", "usd_per_million_tokens", ",.4f"),
)


def as_table(document: Document) -> str:
    """Aligned columns, a line of totals, and a line on what is in them."""
    by = document["by"]
    lines = [[by, *(heading for heading, _, _ in _TABLE)]]
    lines += [[_name(row[by]), *_cells(row)] for row in document["rows"]]
    if document["rows_left_out"]:
        lines.append([f"({document['rows_left_out']} more)", *[""] * len(_TABLE)])
    lines.append(["total", *_cells(document["total"])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_line(line, widths) for line in lines]
    text.insert(1, "-" * len(text[0]))
    text.insert(-1, text[1])
    rent, covered = document["rent_usd_per_hour"], _duration(document["covered_seconds"])
    text.append("")
    text.append(f"since {document['since']}, of which the ledger holds {covered}")
    if rent is None:
        text.append("rent of backends: not known")
    elif rent:
        text.append(f"beside it rented backends cost {rent:.4f} USD an hour, busy or idle")
    return "\n".join(text) + "\n"


def _cells(sums: Document) -> list[str]:
    return ["-" if sums[key] is None else format(sums[key], how) for _, key, how in _TABLE]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    first, *others = (
        cell.rjust(width) if at else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others)).rstrip()


def _name(name: str | None) -> str:
    """As a terminal may show it: a client makes up models, and escape sequences in them."""
    if name is None:
        return "(none)"
    return name if name.isprintable() else ascii(name)[1:-1]


def as_csv(document: Document) -> str:
    """One record a row, without the totals; a value that is not known is empty."""
    text = _Lines()
    writer = csv.DictWriter(text, [document["by"], *document["total"]])
    writer.writeheader()
    writer.writerows(document["rows"])
    return "".join(text)


class _Lines(list[str]):
    """Records as the csv module writes them, less the CR at their end.

    Told to write none it would not quote one inside a cell either, where readers end the record.
    """

    def write(self, record: str) -> None:
        self.append(record.removesuffix("\r\n") + "\n")


def as_json(document: Document) -> str:
    return json.dumps(document, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Document], str]] = {
    "table": as_table,
    "json": as_json,
    "csv": as_csv,
}
