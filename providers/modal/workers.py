"""The number of containers of a Modal function, by the optional package `modal`; see `stats`."""

from __future__ import annotations

import asyncio

from beacon_proxy.contracts import Workers

from .stats import imported, named, reason_of


async def set_containers(control_url: str, workers: Workers, seconds: float) -> None:
    """Override the function's own autoscaler until it is deployed anew.

    Raises:
        ValueError: Modal says no, or does not answer in time.
    """
    where = named(control_url)
    assert where is not None, "the configuration was not checked"
    bounds = {"min_containers": workers.min, "max_containers": workers.max}
    try:
        async with asyncio.timeout(seconds):
            modal = await asyncio.wrap_future(imported())
            function = modal.Function.from_name(
                where.app, where.function, environment_name=where.environment
            )
            # `autoscaler` since 1.6, where `update_autoscaler` warns of its end.
            manager = getattr(function, "autoscaler", None)
            update = function.update_autoscaler if manager is None else manager.update
            await update.aio(**bounds)
    except TimeoutError:
        raise ValueError("Modal's control plane gave no answer in time") from None
    except Exception as exc:  # the package's own errors, and those of the gRPC below it
        raise ValueError(reason_of(type(exc).__name__)) from None
