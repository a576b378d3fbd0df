"""Backlog and headroom of a Modal function, from Modal's control plane; asking wakes nothing.

`control_url: modal://APP/FUNCTION[?environment=NAME]` with the optional package `modal`
(`pip install 'beacon-proxy[modal]'`), which takes its token from MODAL_TOKEN_ID and
MODAL_TOKEN_SECRET or from its own ~/.modal.toml. The package is imported by the first check, beside
the loop, and runs its gRPC in a thread and a loop of its own, which it ends by itself at exit. An
import that hangs holds up nobody: there is one of it, which all checks wait for, each for its time,
and which the process does not wait for at its end.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Future
from importlib.util import find_spec
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

from beacon_proxy.contracts import Capacity, Check, Fault, Verdict, Warmth

_NAME = r"[A-Za-z0-9._-]{1,64}"
_URL = re.compile(
    rf"modal://(?P<app>{_NAME})/(?P<function>{_NAME})(?:\?environment=(?P<environment>{_NAME}))?"
)


class _Named(NamedTuple):
    app: str
    function: str
    environment: str | None


def named(control_url: str) -> _Named | None:
    found = _URL.fullmatch(control_url)
    return _Named(*found.group("app", "function", "environment")) if found else None


def stats_problem(control_url: str) -> str | None:
    """Why a function's statistics cannot be asked for; see `Provider.problem`."""
    if named(control_url) is None:
        return "control_url: must be modal://APP/FUNCTION or modal://APP/FUNCTION?environment=NAME"
    if find_spec("modal") is None:
        return "control_url: needs the package modal: pip install 'beacon-proxy[modal]'"
    return None


async def check_stats(control_url: str, seconds: float) -> Check:
    """Ask for one function's state; at most two calls within `seconds`.

    Trouble of the control plane is no trouble of the function, but that there is no such function
    is a strike.
    """
    where = named(control_url)
    assert where is not None, "the configuration was not checked"
    try:
        async with asyncio.timeout(seconds):
            modal = await asyncio.wrap_future(imported())
            # Looked up each time: a function that is deployed anew may be another one.
            function = modal.Function.from_name(
                where.app, where.function, environment_name=where.environment
            )
            return _by_stats(await function.get_current_stats.aio())
    except TimeoutError:
        detail = "Modal's control plane gave no answer in time"
        return Check(Verdict.NEUTRAL, fault=Fault.TIMEOUT, detail=detail)
    except Exception as exc:  # the package's own errors, and those of the gRPC below it
        return _by_error(type(exc).__name__)


_importing: Future[ModuleType] | None = None


def imported() -> Future[ModuleType]:
    """The package, or its import, which goes on when whoever asked for it has given up."""
    global _importing
    if _importing is None or (_importing.done() and _importing.exception() is not None):
        _importing = Future()
        _importing.set_running_or_notify_cancel()  # from now on nobody can cancel it
        Thread(target=_import, args=(_importing,), name="import modal", daemon=True).start()
    return _importing


def _import(found: Future[ModuleType]) -> None:
    try:
        found.set_result(_package())
    except Exception as exc:
        found.set_exception(exc)


def _package() -> ModuleType:
    import modal  # a third of a second

    return modal


def _by_stats(stats: Any) -> Check:
    running, queued = stats.num_total_runners, stats.backlog
    warmth = Warmth.WARM if running else Warmth.WARMING if queued else Warmth.COLD
    capacity = Capacity(running=running, queued=queued, room=stats.input_headroom)
    return Check(Verdict.GOOD, warmth=warmth, capacity=capacity)


def _by_error(name: str) -> Check:
    verdict = Verdict.STRIKE if name == "NotFoundError" else Verdict.NEUTRAL
    fault = {"NotFoundError": Fault.GONE, "AuthError": Fault.UNAUTHORIZED}.get(name, Fault.RESET)
    return Check(verdict, fault=fault, detail=reason_of(name))


def reason_of(name: str) -> str:
    """By the error's class alone: its words may name what no log should."""
    if name == "NotFoundError":
        return "Modal knows no such app or function"
    if name == "AuthError":
        return "Modal refuses the token, or there is none: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
    return f"Modal's control plane: {name}"
