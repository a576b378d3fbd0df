"""What RunPod's control plane counts of an endpoint: a question that is free and wakes nothing.

`GET /v2/ENDPOINT_ID/health` answers `{"jobs": {…}, "workers": {…}}`. `idle` workers are scaled
down: nothing is paid for them, and their next request waits for a start. `running` ones are paid
for and have the model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beacon_proxy.contracts import Backend, Capacity, Check, Fault, Verdict, Warmth

from ..checking import Answer

_STATES = ("running", "ready", "idle", "initializing", "throttled", "unhealthy")
NOT_FOUND: Any = {"detail": "Not Found"}  # of FastAPI: the SDK's local server has no such route
CUT = (
    "no worker, and none on its way: RunPod sets max workers to 2 after 3 days without a request"
    " and to 0 after 7, and then jobs wait for ever; raise max workers in the endpoint's settings"
)


def read_health(backend: Backend, answer: Answer) -> Check:
    """What one answer of `/health` says of the backend."""
    document = answer.document()
    if answer.status != 200:
        return _without_counts(backend, answer, document)
    workers = document.get("workers") if isinstance(document, Mapping) else None
    if not isinstance(workers, Mapping):
        return Check(Verdict.NEUTRAL, fault=Fault.NOT_JSON, detail="tells no workers")
    jobs = document.get("jobs")
    return _by_counts(workers, jobs if isinstance(jobs, Mapping) else {})


def is_queue(answer: Answer) -> bool:
    """Whether it is the health of a queue: it counts jobs as well as workers."""
    document = answer.document()
    if answer.status != 200 or not isinstance(document, Mapping):
        return False
    return all(isinstance(document.get(key), Mapping) for key in ("jobs", "workers"))


def _without_counts(backend: Backend, answer: Answer, document: Any) -> Check:
    status = answer.status
    if status == 404 and document == NOT_FOUND:
        detail = "no /health there; RunPod has one, the SDK's local server has none"
        return Check(Verdict.NEUTRAL, fault=Fault.STATUS, detail=detail)
    if status == 404:
        detail = "RunPod knows no such endpoint"
        return Check(Verdict.STRIKE, fault=Fault.GONE, detail=detail)
    if status == 401 and backend.api_key:
        detail = "RunPod refuses the configured api_key"
        return Check(Verdict.STRIKE, fault=Fault.UNAUTHORIZED, detail=detail)
    # Trouble of the control plane, or a key that may not read there, is no trouble of the workers.
    detail = f"the control plane says {status}"
    return Check(Verdict.NEUTRAL, fault=Fault.STATUS, detail=detail)


def _by_counts(workers: Mapping[str, Any], jobs: Mapping[str, Any]) -> Check:
    told = {state: _count(workers.get(state)) for state in _STATES}
    counts = {state: count or 0 for state, count in told.items()}
    queued = _count(jobs.get("inQueue"))
    capacity = Capacity(
        running=told["running"],
        idle=told["idle"],
        starting=told["initializing"],
        throttled=told["throttled"],
        unhealthy=told["unhealthy"],
        queued=queued,
    )
    detail = "workers: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    verdict, fault, warmth = Verdict.GOOD, None, Warmth.COLD
    startable = counts["ready"] or counts["idle"]
    if counts["running"]:
        warmth = Warmth.WARM
    elif counts["unhealthy"] and queued and not counts["initializing"] and not startable:
        # runpod/runpod-mcp PR 62: not a lack of capacity, the workers crash as they start.
        verdict, fault = Verdict.STRIKE, Fault.STATUS
        detail += f"; {queued} queued, and those that start crash"
    elif counts["initializing"]:
        warmth = Warmth.WARMING
        if not startable:
            verdict, fault = Verdict.BUSY, Fault.LOADING
    elif startable:
        pass
    elif counts["throttled"]:
        verdict, fault = Verdict.BUSY, Fault.BUSY
    elif counts["unhealthy"]:
        verdict, fault = Verdict.STRIKE, Fault.STATUS
    else:
        verdict, fault, detail = Verdict.STRIKE, Fault.BUSY, CUT
    return Check(verdict, fault=fault, detail=detail, warmth=warmth, capacity=capacity)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
