"""results.json for readers: RESULTS.md, and the table in the README. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import modes
from .contenders import ALL, ROOT
from .modes import BEACON, DIRECT, ENVOY, LITELLM, NGINX, VLLM, VLLM_RR
from .results import Results, Stat, Verdict, errors, judge, stats
from .targets import TARGETS

RESULTS = Path(__file__).parent / "RESULTS.md"
README = ROOT / "README.md"
PLOT = "cpu_per_token.png"
BEGIN = "<!-- made by `make bench` from bench/results.json -->"
END = "<!-- end of what is made -->"

# Figure -> what it is, with its unit. In this order in the tables.
FIGURES = {
    "cpu_us_per_request": "CPU per request, µs",
    "cpu_us_per_token": "CPU per token, µs",
    "added_p50_us": "added p50 over direct, µs",
    "p50_us": "p50, µs",
    "p99_us": "p99, µs",
    "core_share": "share of its core",
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "rss_mb": "RSS, MB",
    "pss_mb": "PSS, MB",
    "rss_kb_per_stream": "RSS per stream, kB",
    "growth_mb": "RSS growth, MB",
    "cpu_s": "CPU, s",
    "seconds": "time, s",
    "first_answer_s": "first answer, s",
    "streams": "streams",
    "slope_mb_per_h": "RSS slope after warm-up, MB/h",
    "exchanges": "exchanges",
    "complete": "… complete",
    "left": "… their client left",
    "broken": "… an error, or visibly broken",
    "unaccounted": "exchanges that do not add up",
    "deaths": "deaths of a backend",
    "rss_before_mb": "RSS before, MB",
    "rss_after_mb": "RSS after, MB",
    "more_fds": "descriptors, more than before",
    "more_tasks": "asyncio tasks, more than before",
    "more_threads": "threads, more than before",
    "in_flight": "permits still taken",
    "minutes": "minutes",
    "errors": "errors",
}
# The README's rows: mode, figure, what it is.
SHORT = (
    ("json", "cpu_us_per_request", "CPU per request, 0.7 kB answers, 32 connections"),
    ("paced", "cpu_us_per_token", "CPU per token, 300 streams (litellm: 5)"),
    ("lat", "added_p50_us", "added to a request, p50"),
    ("open", "rss_mb", "RSS with 2000 open streams"),
    ("start", "first_answer_s", "first answer after the start"),
)
COLUMNS = (BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX)
TIMES = "\N{MULTIPLICATION SIGN}"
UNITS = {"us": "µs", "mb": "MB", "s": "s"}


def render(results: Results) -> str:
    """RESULTS.md."""
    return "\n".join(_document(results)).rstrip("\n") + "\n"


def render_readme(readme: str, results: Results) -> str:
    """The README with the table between its two marks made anew.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks {BEGIN} … {END}")
    return before + begin + "\n" + "\n".join(_short(results)) + "\n" + end + after


def _document(results: Results) -> Iterator[str]:
    yield "# What the proxy costs, next to its peers"
    yield ""
    yield "Made by `make bench` from [results.json](results.json), which has every single run."
    yield "Load and mock backend share one core, each contender in its turn has another for itself."
    yield "CPU is that of its whole process tree. The figures are medians; in brackets stands their"
    yield "noise, (max - min) / median."
    yield ""
    for contender, note in ((c.name, c.note) for c in ALL.values() if c.name != DIRECT):
        yield f"- {contender}: {note}"
    yield from _targets(judge(results, TARGETS))
    for name in modes.ALL:
        if name in results["modes"]:
            yield from _mode(name, results["modes"][name])


def _targets(verdicts: list[Verdict]) -> Iterator[str]:
    yield from ("", "## Targets", "", "| mode | what | target | reached | |")
    yield "|---|---|---|---|---|"
    for verdict in verdicts:
        target = verdict.target
        unit = _unit(verdict)
        reached = "not measured"
        if verdict.value is not None:
            reached = f"{_value(verdict)} {unit}"
        if verdict.flawed:
            reached += ", with errors"
        if verdict.theirs is not None:
            reached += f" ({number(verdict.ours)} / {number(verdict.theirs)})"
        cells = (target.mode, target.text, f"≤ {number(target.limit)} {unit}", reached)
        yield f"| {' | '.join(cell.rstrip() for cell in cells)} | {'✓' if verdict.met else '✗'} |"


def _value(verdict: Verdict) -> str:
    """Its value, with a digit more where it would look like the limit that it misses."""
    value, limit = verdict.value or 0.0, verdict.target.limit
    text = number(value)
    return f"{value:.4g}" if text == number(limit) and value != limit else text


def _unit(verdict: Verdict) -> str:
    """What its value and its limit count."""
    target = verdict.target
    if target.over is None:
        return target.unit
    if target.over_figure is not None:
        return f"{TIMES} that with {target.over_figure.partition('@')[2]}"
    return f"{TIMES} {target.over}"


def _mode(name: str, mode: Mapping[str, Any]) -> Iterator[str]:
    rows = stats(mode)
    repeats = max(len(runs) for runs in mode["runs"].values())
    machine = mode["machine"]
    text = modes.ALL[name].text
    yield from ("", f"## {name}", "", f"{text[:1].upper()}{text[1:]}.")
    yield f"{mode['date']}; runs of each: {repeats}; {mode['seconds']:g} s measured;"
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}."
    yield ""
    yield "| | " + " | ".join(rows) + " |"
    yield "|---" * (len(rows) + 1) + "|"
    versions = mode["versions"]
    yield "| version | " + " | ".join(versions.get(each) or "" for each in rows) + " |"
    figures = sorted({figure for row in rows.values() for figure in row}, key=_order)
    for figure in figures:
        cells = (_cell(row.get(figure)) for row in rows.values())
        yield f"| {label(figure)} | " + " | ".join(cells) + " |"
    notes = [f"{who} is left out: {why}." for who, why in mode["left_out"].items()]
    for who, runs in mode["runs"].items():
        notes += [f"**{who}: {what} ({count} {TIMES}).**" for what, count in errors(runs).items()]
    if notes:
        yield from ("", *notes)
    if name == "scale":
        yield from ("", f"![CPU per token over the number of streams]({PLOT})")


def _short(results: Results) -> Iterator[str]:
    yield "| | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for mode, figure, text in SHORT:
        rows = stats(results["modes"][mode]) if mode in results["modes"] else {}
        unit = UNITS[figure.rpartition("_")[2] if "per" not in figure else "us"]
        found = [rows.get(contender, {}).get(figure) for contender in COLUMNS]
        cells = ["—" if stat is None else f"{number(stat.value)} {unit}" for stat in found]
        yield f"| {text} | " + " | ".join(cells) + " |"
    verdicts = judge(results, TARGETS)
    missed = [verdict for verdict in verdicts if not verdict.met and verdict.value is not None]
    unknown = [verdict.target for verdict in verdicts if verdict.value is None]
    met = len(verdicts) - len(missed) - len(unknown)
    yield ""
    yield f"{met} of {len(verdicts)} targets are met" + (
        "; missed: " + "; ".join(_missed(verdict) for verdict in missed) + "." if missed else "."
    )
    if unknown:
        yield f"Not measured: {'; '.join(f'{target.mode} {target.text}' for target in unknown)}."
    if "json" in results["modes"]:
        mode = results["modes"]["json"]
        yield f"Medians of {max(map(len, mode['runs'].values()))} runs, {mode['date'][:10]},"
        yield f"beacon-proxy {mode['versions'].get(BEACON, '')} on {mode['machine']['python']}."


def _missed(verdict: Verdict) -> str:
    target = verdict.target
    value = f"{_value(verdict)} {_unit(verdict)}".rstrip()
    with_errors = ", with errors" if verdict.flawed else ""
    return f"{target.text} {value}{with_errors}, not {number(target.limit)}"


def _order(figure: str) -> tuple[int, str]:
    names = list(FIGURES)
    name, _, variant = figure.partition("@")
    return names.index(name), variant.rjust(6) if variant.isdigit() else variant


def label(figure: str) -> str:
    name, _, variant = figure.partition("@")
    return f"{FIGURES[name]}; {variant}" if variant else FIGURES[name]


def _cell(stat: Stat | None) -> str:
    if stat is None:
        return ""
    noise = f" ({stat.noise:.0%})" if stat.noise else ""
    return number(stat.value) + noise


def number(value: float) -> str:
    """Three digits that say something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
