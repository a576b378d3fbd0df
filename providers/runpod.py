"""RunPod Serverless: the OpenAI route of queue endpoints, and load-balancing endpoints.

Both carry a request verbatim. The job API of queue endpoints (`/run`, `/runsync`) does not: its
body is another one. `kind: auto` goes by the URL: `…/v2/ENDPOINT_ID` is the OpenAI route, anything
else is load balancing. A 200 from RunPod may be a failed job, and a check asks the control plane,
for a request to the endpoint itself would start a worker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Call, Check, Fault, Headers, Prompt, Reading, Verdict
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from .checking import LOOK, Answer, bounded, judge_server, origin, plain
from .openai import CHAT, join_target, setting, url_problem
from .reading import ask_chat, load, read_answer

if TYPE_CHECKING:
    import aiohttp
    from aiohttp_retry import RetryClient

_BASE, _KEY, _ID = "RUNPOD_API_BASE", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID"
_DEFAULT_BASE = "https://api.runpod.ai/v2"
_LOAD_BALANCER = "api.runpod.ai"  # below an endpoint's own name
_ENDPOINT = re.compile(r"(?P<job>.*/v2/[^/]+)(?:/openai)?(?:/v1)?")
_OPERATION = re.compile(r".*/v2/[^/]+/(?:run|runsync|stream|status|health)(?:/.*)?")
_JOB = re.compile(rb'"status"\s*:\s*"(?:FAILED|TIMED_OUT|COMPLETED)"')
_PENDING = ("IN_QUEUE", "IN_PROGRESS", "RUNNING")
_FAULTS = {502: Fault.STATUS, 524: Fault.TIMEOUT}


class RunPod:
    """The provider `runpod`."""

    name = "runpod"
    price_per_second = 0.00025
    pool = "burst"
    kinds: tuple[str, ...] = ("auto", "queue", "openai", "load_balancing")
    environment: tuple[str, ...] = (_BASE, _KEY, _ID)

    def __init__(self, retry_delay: float = 0.1) -> None:
        """`retry_delay`: s before a question to the control plane is put a second time."""
        self._retry_delay = retry_delay

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        """One row once the endpoint is named; a key alone waits for it.

        The endpoint or the base may say its region, as in `ENDPOINT_ID|eu-west`; without one it is
        that of this instance.
        """
        key = setting(env, _KEY)
        endpoint, _, place = (part.strip() for part in setting(env, _ID).partition("|"))
        if not endpoint:
            return []
        base, _, base_place = (part.strip() for part in setting(env, _BASE).partition("|"))
        base = (base or _DEFAULT_BASE).rstrip("/")
        problem = url_problem(base)
        problems = [f"{_BASE}: {problem}"] if problem else []
        if not re.fullmatch(r"[A-Za-z0-9_-]+", endpoint):
            problems.append(f"{_ID}: must be letters, digits, '_' or '-' only")
        if place and base_place and canonical_region(place) != canonical_region(base_place):
            problems.append(f"{_ID}: must name the same region as {_BASE}, or only one of them any")
        if problems:
            raise ConfigError(problems)
        whole = base.endswith(f"/{endpoint}") or f"//{endpoint}.{_LOAD_BALANCER}" in base
        place = canonical_region(place or base_place or region)
        row = {
            "name": f"runpod-{place}",
            "provider": self.name,
            "url": base if whole else f"{base}/{endpoint}",
            "region": place,
        }
        return [row | ({"api_key": key} if key else {})]

    def problem(self, backend: Backend) -> str | None:
        """Why this backend cannot be served, as `key: message`; asked once, at start."""
        if backend.kind == "queue":
            return (
                "kind: queue endpoints cannot take requests verbatim; use openai (worker-vllm at"
                " …/v2/ENDPOINT_ID) or load_balancing (https://ENDPOINT_ID.api.runpod.ai)"
            )
        if _OPERATION.fullmatch(backend.base_path):
            return "url: must end with the endpoint id, as in https://api.runpod.ai/v2/ENDPOINT_ID"
        return None

    def target(self, backend: Backend, target: bytes) -> bytes:
        """Everything goes below `/openai` on that route: beside it are the purge and the cancel."""
        if not _speaks_openai(backend):
            return join_target(backend.base_path, target)
        found = _ENDPOINT.fullmatch(backend.base_path)
        path = backend.base_path.removesuffix("/v1").removesuffix("/openai")
        job = found["job"] if found else path
        return join_target(job if target.startswith(b"/openai/") else f"{job}/openai", target)

    def credentials(self, backend: Backend) -> Headers:
        if not backend.api_key:
            return ()
        # The key is the account's: the edge reads it, and the app behind need not see it twice.
        return ((b"Authorization", b"Bearer " + backend.api_key.encode()), (b"X-Api-Key", b""))

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        if status == 200:
            return Fault.ERROR_BODY if _is_failed_job(body) else None
        if status == 400 and b"no workers available" in body[:LOOK].lower():
            return Fault.BUSY
        return _FAULTS.get(status) or judge_server(backend, status, body)

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        url = _health_url(backend)
        if url is None:
            return None
        headers = plain(self.credentials(backend))
        client = _retrying(session, self._retry_delay)
        async with client.get(url, headers=headers, allow_redirects=False) as response:
            answer = await bounded(response)
        if answer.status != 200:
            return _without_counts(backend, answer)
        document = answer.document()
        workers = document.get("workers") if isinstance(document, Mapping) else None
        if not isinstance(workers, Mapping):
            return Check(Verdict.NEUTRAL, fault=Fault.NOT_JSON, detail="tells no workers")
        return _by_workers(workers)

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        reading = read_answer(document)
        status = document.get("status")
        if status in _PENDING and not reading.text and reading.error is None:
            # Taken for an answer, it would be an empty text at a price.
            return replace(reading, error=f"the job is still {status}")
        return reading


def _retrying(session: aiohttp.ClientSession, delay: float) -> RetryClient:
    """A client that asks again, once, where the connection failed; the session stays ours."""
    # Not above: each command loads each provider, and most have no RunPod backend to ask.
    from aiohttp import ClientConnectionError
    from aiohttp_retry import ExponentialRetry, RetryClient

    retries = ExponentialRetry(
        attempts=2, start_timeout=delay, factor=1.0, exceptions={ClientConnectionError}
    )
    return RetryClient(session, retry_options=retries)


def _speaks_openai(backend: Backend) -> bool:
    if backend.kind == "auto":
        return _ENDPOINT.fullmatch(backend.base_path) is not None
    return backend.kind == "openai"


def _is_failed_job(body: bytes) -> bool:
    """Whether a 200 is a job that failed, or worker-vllm's completed one with an error inside."""
    if not _JOB.search(body):
        return False
    job = load(body)  # None for the beginning of a longer one: not a bare failure, then
    if not isinstance(job, Mapping) or "id" not in job:
        return False
    if job.get("status") != "COMPLETED":
        return job.get("status") in ("FAILED", "TIMED_OUT")
    output = job.get("output")
    items = output if isinstance(output, list) else [output]
    return any(isinstance(item, Mapping) and item.get("error") for item in items)


def _health_url(backend: Backend) -> str | None:
    found = _ENDPOINT.fullmatch(backend.base_path)
    if found and _speaks_openai(backend):
        return f"{origin(backend)}{found['job']}/health"
    endpoint, _, domain = backend.host.partition(".")
    if domain == _LOAD_BALANCER:
        return f"{_DEFAULT_BASE}/{endpoint}/health"
    return None


def _without_counts(backend: Backend, answer: Answer) -> Check:
    status = answer.status
    if status == 404:
        detail = "RunPod knows no such endpoint"
        return Check(Verdict.STRIKE, fault=Fault.GONE, detail=detail)
    if status == 401 and backend.api_key:
        detail = "RunPod refuses the configured api_key"
        return Check(Verdict.STRIKE, fault=Fault.UNAUTHORIZED, detail=detail)
    # Trouble of the control plane, or a key that may not read there, is no trouble of the workers.
    detail = f"the control plane says {status}"
    return Check(Verdict.NEUTRAL, fault=Fault.STATUS, detail=detail)


def _by_workers(workers: Mapping[str, Any]) -> Check:
    """Idle ones count as good: they are scaled down and wait for a request."""
    states = ("running", "ready", "idle", "initializing", "throttled", "unhealthy")
    counts = {state: workers.get(state) or 0 for state in states}
    detail = "workers: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if counts["running"] or counts["ready"] or counts["idle"]:
        return Check(Verdict.GOOD, detail=detail)
    if counts["initializing"]:
        return Check(Verdict.BUSY, fault=Fault.LOADING, detail=detail)
    if counts["throttled"]:
        return Check(Verdict.BUSY, fault=Fault.BUSY, detail=detail)
    if counts["unhealthy"]:
        return Check(Verdict.STRIKE, fault=Fault.STATUS, detail=detail)
    # After a week without requests RunPod sets max workers to 0, and jobs wait for ever.
    detail = "no worker, and none on its way; is max workers 0?"
    return Check(Verdict.STRIKE, fault=Fault.BUSY, detail=detail)
