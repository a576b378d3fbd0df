"""The shape of beacon.yaml: every key, its type, bounds, default and what it means.

These models are the one source: beacon.schema.json and beacon.example.yaml are made from them
(`python -m beacon_proxy.schema --write`). The options of a middleware belong to its plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from .alerts import KEY_LEAST, Alerts, signing_key
from .autoscale import Autoscale
from .backends import BackendSettings, Discovery
from .money import Budget, Ledger, Limits
from .values import Count, NotNegative, Origin, Port, Positive, Region, Section, Text


class Server(Section):
    """How this instance listens."""

    host: Text = Field(default="0.0.0.0", description="address to listen on")
    port: Port = Field(
        default=8080, description="TCP port; 0: any free one; env PORT wins over the file"
    )
    region: Region = Field(
        default="us-east",
        description="region of this instance; default: from env FLY_REGION, else us-east",
    )
    drain_timeout: NotNegative = Field(
        default=30.0, description="s that open exchanges may take to finish after SIGTERM"
    )
    max_body_size: Count = Field(
        default=104857600, description="bytes of a request body; above: 413"
    )
    access_log: bool = Field(default=True, description="one JSON line an exchange on stdout")
    cors_origins: list[Origin] = Field(
        default=[],
        description="origins that browsers may call from; off when empty",
        examples=[["https://portal.example"]],
    )


class TimeoutSettings(Section):
    """Limits of one attempt; 0 switches one off."""

    connect: NotNegative = Field(default=2.0, description="s to connect, TLS included; 0: none")
    first_content: NotNegative = Field(
        default=120.0,
        description="s from sending to the first content of a stream, or any head; 0: none",
    )
    document: NotNegative = Field(
        default=600.0, description="s for a whole answer that is not streamed; 0: none"
    )
    idle: NotNegative = Field(default=60.0, description="s between two pieces, either way; 0: none")
    total: NotNegative = Field(default=0.0, description="s for the whole exchange; 0: none")
    cold_start: NotNegative | None = Field(
        default=None,
        description="s to the first content while a backend is not known to be warm; default by"
        " provider: modal and runpod 600, golem 300; 0: no other limit",
    )


class MiddlewareEntry(Section):
    """One link of the chain: the name of a plugin and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """Accept `health` and `{health: {…}}`, as beacon.yaml has them."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            return {"name": name, "options": options or {}}
        return value


class Settings(Section):
    """The configuration of beacon-proxy."""

    server: Server = Field(default=Server(), description="how this instance listens")
    timeouts: TimeoutSettings = Field(
        default=TimeoutSettings(), description="limits of one attempt; a backend may override each"
    )
    backends: list[BackendSettings] = Field(
        default=[], description="the GPU servers; left out: those of the environment"
    )
    middleware: list[MiddlewareEntry] = Field(
        default=[],
        description="the chain, in order; left out: health, region, cost, capacity, failover",
    )
    discovery: list[Discovery] = Field(
        default=[], description="sources of backends that come and go"
    )
    ledger: Ledger = Field(default=Ledger(), description="the record of what was spent")
    budgets: list[Budget] = Field(default=[], description="limits on what may be spent")
    limits: Limits = Field(default=Limits(), description="limits for a single request")
    alerts: Alerts = Field(default=Alerts(), description="who is told what")
    autoscale: Autoscale = Field(
        default=Autoscale(), description="which providers are told how many workers to keep"
    )
    rates: dict[Text, Positive] = Field(
        default={},
        description="USD per unit of a currency, for price_glm_per_hour",
        examples=[{"GLM": 0.25}],
    )

    @property
    def warnings(self) -> list[str]:
        """What is set, and valid, but has less effect than it seems to, and why; one line a key."""
        others = (self._of_budgets(), self._of_autoscale(), self._of_webhooks())
        return [*_nowhere(self.ledger), *chain.from_iterable(others)] + [
            f"backends[{index}].{key}: has no effect without price_model: rented"
            for index, row in enumerate(self.backends)
            if row.price_model != "rented"
            for key in _OF_RENT
            if getattr(row, key) is not None
        ]

    def _covers(self, scope: str) -> bool:
        """Whether a budget's scope has a backend; a pool by default is the provider's to say."""
        kind, _, name = scope.partition(":")
        if kind not in ("provider", "region"):
            return True
        here = self.server.region
        return any(
            (row.provider if kind == "provider" else row.region or here) == name
            for row in self.backends
        )

    def _of_autoscale(self) -> Iterator[str]:
        """What this instance leaves to another."""
        homes = {row.name: row.region for row in self.backends}
        for index, row in enumerate(self.autoscale.backends):
            where = row.instance or homes.get(row.backend)
            if where != self.server.region:
                yield (
                    f"autoscale.backends[{index}]: left to the instance in {where}, and this one is"
                    f" in {self.server.region}; `instance` names another"
                )

    def _of_budgets(self) -> Iterator[str]:
        """What makes budgets hold less than they seem to."""
        if self.budgets and not self.ledger.path:
            yield "budgets: begin anew at each restart, as the ledger is off"
        for index, budget in enumerate(self.budgets):
            if not self.discovery and not self._covers(budget.scope):
                yield f"budgets[{index}].scope: no backend is under {budget.scope}"
        if self.limits.tenant_header is None:
            for index, budget in enumerate(self.budgets):
                if budget.scope == "tenant":
                    yield (
                        f"budgets[{index}].scope: without limits.tenant_header all clients are one"
                        " tenant"
                    )

    def _of_webhooks(self) -> Iterator[str]:
        """Keys that are short, as a password is that was never meant to be base64."""
        for index, row in enumerate(self.alerts.webhooks):
            secret = row.secret
            if secret is not None and len(signing_key(secret.get_secret_value())) < KEY_LEAST:
                yield (
                    f"alerts.webhooks[{index}].secret: read as base64 it is a key of fewer than"
                    f" {KEY_LEAST} bytes; openssl rand -base64 32 makes a good one"
                )


_OF_RENT = ("price_per_hour", "price_glm_per_hour", "rented_until")


def _nowhere(ledger: Ledger) -> list[str]:
    """That nothing will be recorded, where that is plain before the start."""
    folder = Path(ledger.path).parent
    if not ledger.path or folder.is_dir():
        return []
    return [f"ledger.path: nothing is recorded while there is no folder {folder}"]
