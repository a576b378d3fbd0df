"""The shape of `ledger`, `budgets` and `limits`: what may be spent, and its record."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .values import Name, NotNegative, Positive, Scope, Section, Size, Token


class Ledger(Section):
    """The record of what was spent."""

    path: str = Field(default="beacon.db", description='SQLite file; "": off')
    flush_interval: Positive = Field(default=0.25, description="s between two writes")
    retention_days: Positive = Field(default=90.0, description="days that an attempt is kept")
    max_size: Size | None = Field(
        default=None,
        description="bytes it may take, the oldest attempts go first; left out: no bound",
        examples=[1073741824],
    )


class Budget(Section):
    """A limit on what may be spent."""

    name: Name = Field(description="unique name, told to who runs into it")
    scope: Scope = Field(
        default="all",
        description="all, tenant, pool:burst, provider:modal, backend:NAME or region:eu-west",
    )
    per: Literal["minute", "hour", "day", "month"] = Field(description="minute, hour, day or month")
    usd: NotNegative = Field(description="USD that may be spent in that time")


class Limits(Section):
    """Limits for a single request and who is asking."""

    max_price_per_request: NotNegative | None = Field(
        default=None,
        description="USD that one request may cost, by the estimate",
        examples=[0.01],
    )
    tenant_header: Token | None = Field(
        default=None,
        description="header that names the tenant",
        examples=["X-Tenant"],
    )
