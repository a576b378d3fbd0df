"""The number of containers of a Modal function, by the optional package `modal`; see `stats`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from beacon_proxy.contracts import Workers

from .stats import imported, named, reason_of

_Said = TypeVar("_Said")


async def kept_containers(control_url: str, seconds: float) -> int:
    """Read the least that the function keeps, by its own settings or by an override of them.

    Raises:
        ValueError: Modal says no, or does not answer in time.
    """
    settings = await _asked(control_url, seconds, lambda scaler: scaler.settings.aio())
    return settings.min_containers or 0


async def set_containers(control_url: str, workers: Workers, seconds: float) -> None:
    """Override the function's own autoscaler until it is deployed anew.

    Raises:
        ValueError: Modal says no, or does not answer in time.
    """
    bounds = {"min_containers": workers.min, "max_containers": workers.max}
    await _asked(control_url, seconds, lambda scaler: scaler.update.aio(**bounds))


async def _asked(control_url: str, seconds: float, ask: Callable[[Any], Awaitable[_Said]]) -> _Said:
    """What the function's autoscaler answers."""
    where = named(control_url)
    assert where is not None, "the configuration was not checked"
    try:
        async with asyncio.timeout(seconds):
            modal = await asyncio.wrap_future(imported())
            function = modal.Function.from_name(
                where.app, where.function, environment_name=where.environment
            )
            return await ask(function.autoscaler)
    except TimeoutError:
        raise ValueError("Modal's control plane gave no answer in time") from None
    except Exception as exc:  # the package's own errors, and those of the gRPC below it
        raise ValueError(reason_of(type(exc).__name__)) from None
