"""The providers as the proxy has them, brought to simulated backends by a transport of their own.

What they know (prices, pools, how long they stay warm, how answers are judged) stays theirs. Only
what would go over the network is replaced: the request itself, and the free questions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from beacon_proxy.contracts import Backend, Check, Fault, Reply, Submission, Verdict
from providers.checking import Answer
from providers.golem import Golem
from providers.modal import Modal
from providers.runpod import RunPod
from providers.runpod.health import read_health

from .trace import Request
from .world import Place

_ROUND_TRIP = 0.05  # s, of a free question


def families(places: Mapping[str, Place], requests: Mapping[str, Request]) -> dict[str, type]:
    """The classes of the three providers, before these places; by the name in a configuration."""

    class _Carried:
        def carries(self, backend: Backend) -> bool:
            return True

        async def carry(
            self, backend: Backend, submission: Submission, reply: Reply, session: Any
        ) -> None:
            await places[backend.name].serve(requests[submission.id], reply)

    class _Golem(_Carried, Golem):
        async def check(self, backend: Backend, session: Any) -> Check | None:
            """What `/v1/models` of the node would answer."""
            place = places[backend.name]
            if place.outage == "refuses":
                return Check(Verdict.STRIKE, fault=Fault.REFUSED, detail="nobody listens there")
            if place.outage == "stalls":
                await asyncio.get_running_loop().create_future()
            await asyncio.sleep(_ROUND_TRIP)
            return Check(Verdict.GOOD, latency=_ROUND_TRIP, models=place.site.models)

    class _Modal(_Carried, Modal):
        """Its `check` asks nobody: with its models configured each question would be paid for."""

    class _RunPod(_Carried, RunPod):
        async def check(self, backend: Backend, session: Any) -> Check | None:
            await asyncio.sleep(_ROUND_TRIP)
            health = json.dumps(places[backend.name].health()).encode()
            return read_health(backend, Answer(200, health))

    return {"golem": _Golem, "modal": _Modal, "runpod": _RunPod}
