"""The shape of `autoscale`: which providers are told how many workers to keep."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from .values import Count, Name, NotNegative, Positive, Region, Section


class Scaled(Section):
    """One backend whose provider is told."""

    backend: Name = Field(description="name of the backend")
    min: Annotated[int, Field(ge=0)] = Field(
        default=0, description="workers kept, and paid for, when nobody asks"
    )
    max: Count = Field(description="workers at most")
    per_worker: Count = Field(default=1, description="requests that one worker serves at once")
    target: Annotated[Positive, Field(le=1.0)] = Field(
        default=0.7, description="share of per_worker that a worker should be at, 0..1"
    )
    cooldown: NotNegative = Field(default=60.0, description="s between two changes")
    scale_down_after: NotNegative = Field(
        default=300.0, description="s for which fewer must do before any is taken away"
    )
    instance: Region | None = Field(
        default=None,
        description="region of the one instance that does it; default: the backend's own",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError("must have min <= max")
        return self


class Autoscale(Section):
    """Who is told, and whether in earnest."""

    dry_run: bool = Field(
        default=True, description="only say in log and metrics what would be told"
    )
    interval: Positive = Field(default=15.0, description="s between two looks")
    backends: list[Scaled] = Field(
        default=[],
        description="the backends; needs a provider that can: runpod, modal",
        examples=[[{"backend": "runpod-eu", "max": 3}]],
    )
