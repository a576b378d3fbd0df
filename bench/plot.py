"""Draws CPU per token over the number of streams; run by the Python that has matplotlib.

    python plot.py cpu_per_token.png < series.json

`series.json` has for each contender a list of [streams, median, lowest, highest], in microseconds.
"""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"beacon-proxy": "#c0392b", "envoy": "#2c6fbb", "vllm-router-rr": "#3a9a5b"}


def main() -> None:
    series = json.load(sys.stdin)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), dpi=150)
    for name, points in series.items():
        streams, middle, lowest, highest = zip(*points, strict=True)
        below = [m - low for m, low in zip(middle, lowest, strict=True)]
        above = [high - m for m, high in zip(middle, highest, strict=True)]
        axes.errorbar(
            streams,
            middle,
            yerr=[below, above],
            label=name,
            marker="o",
            capsize=3,
            color=COLORS.get(name),
            linewidth=2.2 if name == "beacon-proxy" else 1.4,
        )
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * max(point[3] for points in series.values() for point in points))
    axes.set_xlabel("open streams (log scale), always the same tokens a second in all")
    axes.set_ylabel("CPU of the process tree, µs per token")
    axes.set_title("CPU per token over the number of streams")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
