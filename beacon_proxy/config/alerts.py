"""The shape of `alerts`: who is told, and when an alert begins and ends."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    model_validator,
)

from ..plugins import no_flag
from .values import Count, Hook, NotNegative, Positive, Secret, Section

KEY_LEAST = 24  # bytes; the standard recommends 24 to 64

_NUMBER = BeforeValidator(no_flag)
Share = Annotated[float, Field(gt=0, le=1), _NUMBER]
Points = Annotated[float, Field(gt=0, lt=100), _NUMBER]
Factor = Annotated[float, Field(gt=1), _NUMBER]
Multiple = Annotated[float, Field(ge=1), _NUMBER]


def signing_key(secret: str) -> bytes:
    """The key that a secret stands for: base64, with or without `whsec_` and its padding.

    Nothing else is taken, for the libraries read anything as base64, and none would read the same.
    Source: Standard Webhooks 1.0.0, "Signature scheme", and its libraries.

    Raises:
        ValueError: it is no base64, or of nothing.
    """
    coded = secret.removeprefix("whsec_")
    try:
        key = base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        key = b""
    if not key:
        raise ValueError("must be base64, with or without whsec_ before it")
    return key


def _signs(value: SecretStr) -> SecretStr:
    signing_key(value.get_secret_value())
    return value


class Webhook(Section):
    """Where alerts are sent."""

    url: Hook = Field(description="URL that takes the POST; kept secret")
    secret: Annotated[Secret, AfterValidator(_signs)] | None = Field(
        default=None,
        description="key of the signature (Standard Webhooks), best as ${VARIABLE}: base64, with or"
        " without whsec_ before it",
    )
    format: Literal["standard", "text"] = Field(
        default="standard",
        description='standard: text, type, timestamp and data; text: {"text": …} alone, for'
        " receivers that refuse or misread other keys (Google Chat, Mattermost)",
    )


class _Switch:
    """`false` switches a rule off, `true` is the rule with its defaults."""

    @staticmethod
    def put(value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def __get_pydantic_json_schema__(
        self, core: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        made = handler(core)
        made["anyOf"].append({"enum": [True, False]})
        return made


_SWITCH = (BeforeValidator(_Switch.put), _Switch())


def _lasts(seconds: float) -> Any:
    return Field(default=seconds, alias="for", description="s that it lasts until the alert begins")


def _over(seconds: float) -> Any:
    return Field(default=seconds, description="s that it is over until the alert ends")


class _Above(Section):
    """A rule about a value that is too high: the mark below which it ends.

    Its sections have `above` and `clear`.
    """

    @model_validator(mode="after")
    def _in_order(self) -> _Above:
        above, clear = getattr(self, "above"), getattr(self, "clear")  # noqa: B009
        if clear is not None and clear > above:
            raise ValueError("clear: must be <= above")
        return self


class PoolUtilisation(_Above):
    """The share of a pool's slots that was taken over the last `for` seconds, on average."""

    above: Share = Field(default=0.8, description="share of the pool's room that is taken, 0..1")
    clear: NotNegative | None = Field(
        default=None, description="share at which it is over; default: nine tenths of above"
    )
    for_: NotNegative = Field(default=60.0, alias="for", description="s that the mean is of")
    clear_for: NotNegative = _over(60.0)


class ProviderDown(Section):
    """No backend of a provider is up: each is ejected or found down."""

    for_: NotNegative = _lasts(30.0)
    clear_for: NotNegative = _over(30.0)


class ProviderRefuses(Section):
    """A provider in a region gave no good answer over the last 5 minutes, and pushed back."""

    min_attempts: Count = Field(
        default=5,
        description="attempts that failed or were pushed back (429, 503); with fewer nothing is"
        " said, unless none of its backends may be asked",
    )
    for_: NotNegative = _lasts(60.0)
    clear_for: NotNegative = _over(60.0)


class SuccessRate(Section):
    """The share of good attempts of a provider in a region over the last 5 minutes."""

    below: Share = Field(default=0.9, description="share of good attempts, 0..1")
    clear: Share | None = Field(
        default=None,
        description="share at which it is over; default: half way from below to 1",
    )
    min_attempts: Count = Field(
        default=20,
        description="attempts that say something of a backend; with fewer nothing is said",
    )
    for_: NotNegative = _lasts(60.0)
    clear_for: NotNegative = _over(120.0)

    @model_validator(mode="after")
    def _in_order(self) -> SuccessRate:
        if self.clear is not None and self.clear < self.below:
            raise ValueError("clear: must be >= below")
        return self


class TtftP95(Section):
    """A provider's TTFT p95 in a region over 5 minutes, against its own over the hour before."""

    factor: Factor = Field(default=2.0, description="times the hour before")
    clear: Multiple | None = Field(
        default=None,
        description="times the hour before at which it is over; default: half way from 1 to factor",
    )
    at_least: NotNegative = Field(default=1.0, description="s; a p95 below is never slow")
    min_attempts: Count = Field(
        default=50, description="attempts with a TTFT; with fewer nothing is said"
    )
    for_: NotNegative = _lasts(120.0)
    clear_for: NotNegative = _over(120.0)

    @model_validator(mode="after")
    def _in_order(self) -> TtftP95:
        if self.clear is not None and self.clear > self.factor:
            raise ValueError("clear: must be <= factor")
        return self


class BudgetUsed(Section):
    """How much of a budget is used up; that of a single tenant is a warning at most."""

    warning: Positive | None = Field(default=0.8, description="share used, 0..1; null: none")
    critical: Positive | None = Field(default=1.0, description="share used, 0..1; null: none")
    for_: NotNegative = _lasts(0.0)
    clear_for: NotNegative = _over(60.0)


class BlendOffTarget(_Above):
    """How much too small a pool's share of what the blend decides is, over 5 minutes and longer."""

    above: Points = Field(default=10.0, description="percentage points")
    clear: NotNegative | None = Field(
        default=None, description="points at which it is over; default: half of above"
    )
    min_attempts: Count = Field(
        default=100,
        description="requests that the blend decided in the last 5 minutes; with fewer nothing is"
        " said",
    )
    for_: NotNegative = _lasts(300.0)
    clear_for: NotNegative = _over(120.0)


class LedgerTrouble(Section):
    """The ledger cannot be written, or has lost rows in the last 5 minutes."""

    for_: NotNegative = _lasts(10.0)
    clear_for: NotNegative = _over(60.0)


class QueueLong(_Above):
    """The share of `max_queue` that waits for room."""

    above: Share = Field(default=0.5, description="share of max_queue, 0..1")
    clear: NotNegative | None = Field(
        default=None, description="share at which it is over; default: half of above"
    )
    for_: NotNegative = _lasts(30.0)
    clear_for: NotNegative = _over(60.0)


class DiscoveryStale(Section):
    """A source of backends cannot be asked, so what it said last still stands."""

    for_: NotNegative = _lasts(300.0)
    clear_for: NotNegative = _over(0.0)


class LogLinesLost(Section):
    """Log lines that could not be written in the last 5 minutes."""

    above: NotNegative = Field(default=0.0, description="lines")
    for_: NotNegative = _lasts(0.0)
    clear_for: NotNegative = _over(60.0)


class Rules(Section):
    """The alerts that there are; each may be `false`."""

    pool_utilisation: Annotated[PoolUtilisation | None, *_SWITCH] = Field(
        default=PoolUtilisation(),
        description="in-flight share of a pool's room, on average; false: off",
    )
    provider_down: Annotated[ProviderDown | None, *_SWITCH] = Field(
        default=ProviderDown(), description="no backend of a provider is up"
    )
    provider_refuses: Annotated[ProviderRefuses | None, *_SWITCH] = Field(
        default=ProviderRefuses(),
        description="a provider that answers nothing but 429 and 503 over 5 minutes",
    )
    success_rate: Annotated[SuccessRate | None, *_SWITCH] = Field(
        default=SuccessRate(), description="a provider's good attempts over 5 minutes"
    )
    ttft_p95: Annotated[TtftP95 | None, *_SWITCH] = Field(
        default=TtftP95(), description="a provider's TTFT over 5 minutes against the hour before"
    )
    budget: Annotated[BudgetUsed | None, *_SWITCH] = Field(
        default=BudgetUsed(), description="how much of a budget is used up"
    )
    blend_off_target: Annotated[BlendOffTarget | None, *_SWITCH] = Field(
        default=BlendOffTarget(), description="a pool's share of the traffic against its target"
    )
    ledger: Annotated[LedgerTrouble | None, *_SWITCH] = Field(
        default=LedgerTrouble(), description="the ledger cannot be written, or lost rows"
    )
    queue: Annotated[QueueLong | None, *_SWITCH] = Field(
        default=QueueLong(), description="exchanges that wait for room"
    )
    discovery: Annotated[DiscoveryStale | None, *_SWITCH] = Field(
        default=DiscoveryStale(), description="a source of backends cannot be asked"
    )
    log_lines_lost: Annotated[LogLinesLost | None, *_SWITCH] = Field(
        default=LogLinesLost(), description="log lines that could not be written in 5 minutes"
    )


class Alerts(Section):
    """Who is told what."""

    webhooks: list[Webhook] = Field(default=[], description="receivers of alerts")
    interval: Positive = Field(default=5.0, description="s between two looks at all rules")
    pause: NotNegative = Field(
        default=60.0, description="s between two messages of one alert, at least"
    )
    rules: Rules = Field(default=Rules(), description="when an alert begins")
