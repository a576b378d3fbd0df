"""What must be reached, said in this place only: figures, and ratios of two of the same run."""

from __future__ import annotations

from dataclasses import dataclass

from .modes import BEACON, ENVOY, LITELLM, VLLM, VLLM_RR
from .runs import DOWNLOADS, SCALE, UPLOADS


@dataclass(frozen=True)
class Target:
    """`figure` of the proxy in `mode`, divided by `over`'s if there is one, is at most `limit`.

    Attributes:
        text: what it is about.
        unit: of the limit where nothing is divided.
        over: the contender whose figure is the measure.
        over_figure: another figure than the same one.
    """

    mode: str
    figure: str
    text: str
    limit: float
    over: str | None = None
    over_figure: str | None = None
    unit: str = ""


TARGETS = (
    Target("json", "cpu_us_per_request", "CPU per request", 1.0, ENVOY),
    Target("json", "cpu_us_per_request", "CPU per request", 0.8, VLLM),
    Target("json", "cpu_us_per_request", "CPU per request", 0.8, VLLM_RR),
    Target("json", "cpu_us_per_request", "CPU per request", 0.01, LITELLM),
    Target("paced", "cpu_us_per_token", "CPU per token", 0.85, ENVOY),
    Target("paced", "cpu_us_per_token", "CPU per token", 1.0, VLLM),
    Target("paced", "cpu_us_per_token", "CPU per token", 1.0, VLLM_RR),
    Target("lat", "added_p50_us", "added p50 over direct", 1.0, VLLM),
    Target("lat", "added_p50_us", "added p50 over direct", 1.0, VLLM_RR),
    Target("lat", "added_p50_us", "added p50 over direct", 1.15, ENVOY),
    Target("open", "rss_mb", "RSS with 2000 streams", 0.4, VLLM),
    Target("open", "rss_mb", "RSS with 2000 streams", 0.4, VLLM_RR),
    Target("open-8000", "errors", "errors with 8000 streams", 0, unit="errors"),
    *(
        Target(mode, f"growth_mb@{variant}", f"RSS growth, {variant}", 8, unit="MB")
        for mode, variants in (("upload", UPLOADS), ("download", DOWNLOADS))
        for variant in variants
    ),
    Target(
        "scale",
        f"cpu_us_per_token@{SCALE[-1]}",
        f"CPU per token with {SCALE[-1]} streams",
        1.3,
        BEACON,
        f"cpu_us_per_token@{SCALE[0]}",
    ),
    Target("start", "first_answer_s", "first answer after the start", 1.0, unit="s"),
    Target("soak", "slope_mb_per_h", "RSS slope after warm-up", 1.0, unit="MB/h"),
    Target("soak", "more_fds", "descriptors more than at the start", 0, unit=""),
    Target("soak", "more_tasks", "tasks more than at the start", 0, unit=""),
    Target("soak", "in_flight", "permits still taken", 0, unit=""),
    Target("soak", "unaccounted", "exchanges that do not add up", 0, unit=""),
)
