"""The modes: what each is, who takes part, and how often and how long it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from . import runs
from .contenders import Contender
from .runs import Run

BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX, DIRECT = (
    "beacon-proxy",
    "envoy",
    "vllm-router",
    "vllm-router-rr",
    "litellm",
    "nginx",
    "direct",
)


@dataclass(frozen=True)
class Mode:
    """One kind of work.

    Attributes:
        name, text: its name, and what is done.
        contenders: who takes part.
        run: does it once, for so many seconds.
        left_out: who does not take part, and why.
        seconds: how long one run measures by default.
        repeats: how often it is run by default.
        added: it is about the time that a contender adds to the direct way.
    """

    name: str
    text: str
    contenders: tuple[str, ...]
    run: Callable[[Contender, float], Run]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 5.0
    repeats: int = 3
    added: bool = False


EVERYBODY = (BEACON, ENVOY, VLLM, VLLM_RR, LITELLM, NGINX, DIRECT)
_SLOW_START = "its default policy takes milliseconds to start a stream; round robin takes part"
_TOO_MANY = "a millisecond of CPU a token: it would need eight cores and more"
ALL: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "json",
            "32 connections, each asks again as soon as it has its answer of 0.7 kB",
            EVERYBODY,
            runs.documents(32),
        ),
        Mode(
            "lat",
            "1 connection, the same requests",
            EVERYBODY,
            runs.documents(1),
            seconds=3,
            added=True,
        ),
        Mode(
            "paced",
            "300 streams (LiteLLM: 5, more it cannot serve), a token every 20 ms on each",
            EVERYBODY,
            runs.paced,
        ),
        Mode(
            "open",
            "2000 streams, a token every 250 ms on each",
            (BEACON, ENVOY, VLLM, VLLM_RR, NGINX),
            runs.open_2000,
            {LITELLM: _TOO_MANY},
        ),
        Mode(
            "open-8000",
            "8000 streams in one process, a token every second on each",
            (BEACON, ENVOY, VLLM_RR),
            runs.open_8000,
            {LITELLM: _TOO_MANY, VLLM: _SLOW_START},
            repeats=1,
        ),
        Mode(
            "upload",
            "a body of 100 MB, to /v1/files and as a chat request; a slow backend takes 40 MB/s",
            (BEACON, ENVOY, NGINX, DIRECT),
            runs.transfers("upload", runs.UPLOADS),
            {
                LITELLM: "takes files only for providers that it knows",
                VLLM: "answers 400 to what is no JSON, and writes JSON anew, not passing it on",
            },
        ),
        Mode(
            "download",
            "an answer of 100 MB; a slow reader takes 40 MB/s",
            (BEACON, ENVOY, VLLM, NGINX, DIRECT),
            runs.transfers("download", runs.DOWNLOADS),
            {LITELLM: "gives files only of providers that it knows"},
        ),
        Mode(
            "scale",
            "the same 10 000 tokens/s, spread over 100 to 4000 streams",
            (BEACON, ENVOY, VLLM_RR),
            runs.scale,
            {LITELLM: _TOO_MANY, VLLM: _SLOW_START},
            seconds=4,
        ),
        Mode(
            "start",
            "from the start of the process to its first answer",
            (BEACON, ENVOY, VLLM, LITELLM, NGINX),
            runs.start,
            repeats=5,
        ),
        Mode(
            "soak",
            "1000 clients of streams and documents; a fifth leaves early, backends die at random",
            (BEACON,),
            runs.soak,
            seconds=600,
            repeats=1,
        ),
    )
}
