"""Plugins for the tests of the configuration: a provider and a middleware of no use otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from beacon_proxy.config import Settings, make_settings
from beacon_proxy.contracts import Backend, Call, Dialect, Prompt, Provider, Reading
from beacon_proxy.errors import ConfigError
from beacon_proxy.plugins import Plugins

ROW = "backends: [{name: a, provider: cloud, url: 'http://h:1'}]"


class Cloud(Provider):
    """A provider with a price, a pool and kinds of its own."""

    name = "cloud"
    price_per_second = 0.25
    pool = "baseline"
    kinds = ("auto", "queue")
    environment = ("CLOUD_URL",)

    def problem(self, backend: Backend) -> str | None:
        return "url: not this one" if backend.host == "refused.example" else None

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        if env.get("CLOUD_URL") == "refuse":
            raise ConfigError("CLOUD_URL: must be better, got refuse")
        if "CLOUD_URL" not in env:
            return []
        return [{"name": f"cloud-{region}", "url": env["CLOUD_URL"], "region": region}]

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        return Call(b"/", prompt.prompt.encode(), Dialect.OPENAI)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return Reading(str(document.get("text", "")))


@dataclass
class Gate:
    """A middleware whose own checks go beyond its types."""

    low: int = field(default=1, metadata={"help": "requests"})
    high: int = field(default=9, metadata={"help": "requests"})
    label: str = ""

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError(f"low: must be >= 0, got {self.low}")
        if self.high < self.low:
            raise ValueError(f"high: must be >= low, got {self.high}")
        if self.label.startswith("bad"):
            raise ValueError(f"must not be called {self.label}")


CHAIN = dict.fromkeys(("health", "region", "cost", "capacity", "failover", "gate"), Gate)
FAKES = Plugins(providers={"cloud": Cloud}, middleware=CHAIN)


def load(text: str, env: Mapping[str, str] | None = None, *, among: Plugins = FAKES) -> Settings:
    return make_settings(yaml.safe_load(text) or {}, env or {}, among)


def problems(text: str, env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, env)
    return list(caught.value.problems)
