"""Draws share, price and what was shed over time; run by the Python that has matplotlib.

    python plot.py replay.png < drawn.json

`drawn.json`: {"runs": {name: [[s, share, price, shed], …]}, "spikes": [[from, to], …], "outages":
[[from, to, what], …], "share": 0..1, "bound": USD per second, "width": s of a slice}. A share or a
price that is null is none: nobody was served.
"""

from __future__ import annotations

import json
import math
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = ("#2c6fbb", "#c0392b", "#3a9a5b")


def _times(factor: float, value: float | None) -> float:
    return math.nan if value is None else factor * value


def main() -> None:
    drawn = json.load(sys.stdin)
    figure, panels = pyplot.subplots(
        3, 1, figsize=(9, 8), dpi=130, sharex=True, height_ratios=(3, 3, 1.4)
    )
    share, price, shed = panels
    width = drawn["width"] / 60 / (len(drawn["runs"]) + 1)
    for number, (name, slices) in enumerate(drawn["runs"].items()):
        color, label = COLORS[number % len(COLORS)], name
        at, shares, prices, lost = zip(*slices, strict=True)
        minutes = [each / 60 for each in at]
        share.plot(minutes, [_times(100, each) for each in shares], color=color, label=label)
        price.plot(minutes, [_times(1e6, each) for each in prices], color=color, label=label)
        shift = (number - (len(drawn["runs"]) - 1) / 2) * width
        shed.bar([each + shift for each in minutes], lost, width, color=color, label=label)
    share.axhline(100 * drawn["share"], color="black", linewidth=0.8, linestyle=":")
    price.axhline(1e6 * drawn["bound"], color="black", linewidth=0.8, linestyle=":")
    share.set_ylabel("share of the baseline pool, %")
    price.set_ylabel("realised price, USD per 1 000 000 s")
    shed.set_ylabel("shed")
    shed.set_xlabel("simulated minutes (grey: outages; orange: spikes of load)")
    for panel in panels:
        for begin, end in drawn["spikes"]:
            panel.axvspan(begin / 60, end / 60, color="#e67e22", alpha=0.35, linewidth=0)
        for begin, end, _ in drawn["outages"]:
            panel.axvspan(begin / 60, end / 60, color="#888888", alpha=0.2, linewidth=0)
        panel.grid(visible=True, alpha=0.3)
    top = share.get_ylim()[1]
    for begin, end, what in drawn["outages"]:
        share.text((begin + end) / 120, top, what, ha="center", va="bottom", fontsize=8)
    price.legend(loc="lower right", fontsize=8)
    share.set_title("10 000 requests on a simulated clock, in slices of five minutes", pad=18)
    figure.tight_layout()
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
