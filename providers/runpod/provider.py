"""RunPod Serverless: load-balancing endpoints, the OpenAI route of queue endpoints, queues.

The first two carry a request verbatim. A queue takes jobs: `queue` brings a request there
and its answer back. `kind: auto` goes by the URL:

    https://ENDPOINT_ID.api.runpod.ai                    load balancing
    https://api.runpod.ai/v2/ENDPOINT_ID[/openai[/v1]]   the OpenAI route
    any other                                            load balancing, unless `control_url` names
                                                         it too and its /health counts jobs

An endpoint that turns out to have no OpenAI route (its server's own 404 to the first chat that it
is sent, so nothing has run) is a queue from that very request on. A 200 from RunPod may be a failed
job, and a check asks the control plane, for a request to the endpoint itself would start a worker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import (
    Backend,
    Call,
    Check,
    Dialect,
    Exchange,
    Fault,
    Headers,
    Hop,
    Prompt,
    Reading,
    Reply,
    Submission,
    Workers,
)
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from ..checking import LOOK, bounded, judge_server, plain
from ..openai import CHAT, join_target, setting, url_problem
from ..reading import ask_chat, load, read_answer
from .health import NOT_FOUND, is_queue, read_health
from .queue import Queue
from .workers import kept_workers, problem_of, set_workers

if TYPE_CHECKING:
    import aiohttp
    from aiohttp_retry import RetryClient

_BASE, _KEY, _ID = "RUNPOD_API_BASE", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID"
_DEFAULT_BASE = "https://api.runpod.ai/v2"
_LOAD_BALANCER = "api.runpod.ai"  # below an endpoint's own name
_ENDPOINT = re.compile(r"(?P<job>.*/v2/[^/]+)(?:/openai)?(?:/v1)?")
_OPERATION = re.compile(r".*/v2/[^/]+/(?:run|runsync|stream|status|health)(?:/.*)?")
_JOB = re.compile(rb'"status"\s*:\s*"(?:FAILED|TIMED_OUT|COMPLETED)"')
_FAULTS = {502: Fault.STATUS, 524: Fault.TIMEOUT}
_QUEUED = (Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.BEACON)  # what a job can be made of
_PLAIN_CODINGS = (b"", b"identity")
_CHATS = (b"/v1/chat/completions", b"/v1/completions", b"/inference")
_KNOWN_MOST = 1000
Key = tuple[str, str, float | None]


class RunPod:
    """The provider `runpod`."""

    name = "runpod"
    price_per_second = 0.00025
    pool = "burst"
    kinds: tuple[str, ...] = ("auto", "queue", "openai", "load_balancing")
    environment: tuple[str, ...] = (_BASE, _KEY, _ID)
    cold_start = 600.0  # s; minutes for an image that a host has not seen yet
    stays_warm = 5.0  # s, RunPod's default idle timeout

    def __init__(self, retry_delay: float = 0.1) -> None:
        """`retry_delay`: s before a question to the control plane is put a second time."""
        self._retry_delay = retry_delay
        self._queue = Queue()
        # Backends of kind `auto` whose OpenAI route has answered, and those that have none.
        self._routed: dict[Key, None] = {}
        self._routeless: dict[Key, None] = {}

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
        balanced = backend.host.endswith(f".{_LOAD_BALANCER}")
        if backend.kind == "queue" and balanced:
            return "url: a queue is at https://api.runpod.ai/v2/ENDPOINT_ID"
        own = backend.control_url == backend.origin + backend.base_path
        if own and (balanced or backend.kind == "load_balancing"):
            # Each check would be a request that starts a worker, and keeps it.
            return "control_url: must not be the endpoint itself, which each check would wake"
        if _OPERATION.fullmatch(backend.base_path):
            return "url: must end with the endpoint id, as in https://api.runpod.ai/v2/ENDPOINT_ID"
        return None

    def target(self, backend: Backend, target: bytes) -> bytes:
        """Everything goes below `/openai` on that route: beside it are the purge and the cancel."""
        if not _speaks_openai(backend):
            return join_target(backend.base_path, target)
        job = _job_path(backend)
        return join_target(job if target.startswith(b"/openai/") else f"{job}/openai", target)

    def credentials(self, backend: Backend) -> Headers:
        if not backend.api_key:
            return ()
        # The key is the account's: the edge reads it, and the app behind need not see it twice.
        return ((b"Authorization", b"Bearer " + backend.api_key.encode()), (b"X-Api-Key", b""))

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        if status == 200:
            if backend.kind == "auto" and _key(backend) not in self._routed:
                _remember(self._routed, _key(backend))
            return Fault.ERROR_BODY if _is_failed_job(body) else None
        if status == 400 and b"no workers available" in body[:LOOK].lower():
            return Fault.BUSY
        return _FAULTS.get(status) or judge_server(backend, status, body)

    def hop(
        self, backend: Backend, status: int, headers: Headers, body: bytes, target: bytes, hops: int
    ) -> Hop | None:
        """Make a job of a chat that met a 404: `auto` took a plain queue for one with that route.

        Unless the route has answered before. To any other path it says nothing of the endpoint:
        vLLM answers a client's mistake in the same words.
        """
        if status != 404 or backend.kind != "auto" or not _speaks_openai(backend):
            return None
        if self.carries(backend):
            return None  # the queue's own word
        asked, key = target.partition(b"?")[0], _key(backend)
        if asked in _CHATS and key not in self._routed and load(body) == NOT_FOUND:
            _remember(self._routeless, key)
            return Hop(starting=False)
        return None

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        url = _health_url(backend)
        if url is None:
            return None
        headers = plain(self.credentials(backend))
        client = _retrying(session, self._retry_delay)
        async with client.get(url, headers=headers, allow_redirects=False) as response:
            answer = await bounded(response)
        check = read_health(backend, answer)
        if self.carries(backend):
            self._queue.learn(_queue_url(backend), check)
        if backend.kind == "auto" and (self.carries(backend) or _is_own_control(backend)):
            return replace(check, kind="queue") if is_queue(answer) else check
        return check

    # -- a queue's own transport -----------------------------------------------------------------

    def carries(self, backend: Backend) -> bool:
        if backend.kind == "auto" and self._routeless:
            return _key(backend) in self._routeless
        return backend.kind == "queue"

    def takes(self, backend: Backend, exchange: Exchange) -> bool:
        """A job is made of JSON for an inference route; anything else goes to other backends."""
        if not self.carries(backend):
            return True
        if not exchange.inference or exchange.dialect not in _QUEUED:
            return False
        if exchange.prompt is not None:
            return True
        fields = {name.lower(): value.strip().lower() for name, value in exchange.headers}
        if fields.get(b"content-encoding", b"") not in _PLAIN_CODINGS:
            return False
        return b"json" in fields.get(b"content-type", b"json")

    async def carry(
        self,
        backend: Backend,
        submission: Submission,
        reply: Reply,
        session: aiohttp.ClientSession,
    ) -> None:
        headers = plain((*_authorization(submission), *self.credentials(backend), *backend.headers))
        headers["Content-Type"] = "application/json"
        url = _queue_url(backend)
        await self._queue.carry(url, headers, backend, submission, reply, session)

    # -- its workers -----------------------------------------------------------------------------

    def scalable(self, backend: Backend) -> str | None:
        return problem_of(backend)

    async def kept(self, backend: Backend, session: aiohttp.ClientSession, seconds: float) -> int:
        return await kept_workers(backend, session, seconds)

    async def scale(
        self, backend: Backend, workers: Workers, session: aiohttp.ClientSession, seconds: float
    ) -> None:
        await set_workers(backend, workers, session, seconds)

    # -- the translated route --------------------------------------------------------------------

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return read_answer(document)


def _retrying(session: aiohttp.ClientSession, delay: float) -> RetryClient:
    """A client that asks again, once, where the connection failed; the session stays ours."""
    # Not above: each command loads each provider, and most have no RunPod backend to ask.
    from aiohttp import ClientConnectionError
    from aiohttp_retry import ExponentialRetry, RetryClient

    retries = ExponentialRetry(
        attempts=2,
        start_timeout=delay,
        factor=1.0,
        exceptions={ClientConnectionError},
        retry_all_server_errors=False,
    )
    return RetryClient(session, retry_options=retries)


def _key(backend: Backend) -> Key:
    """A backend of these very settings: another may come by its name, or to its place."""
    return backend.name, backend.url, backend.joined


def _remember(known: dict[Key, None], key: Key) -> None:
    """The last ones are enough: what is forgotten is found out again."""
    if len(known) >= _KNOWN_MOST:
        del known[next(iter(known))]
    known[key] = None


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


def _job_path(backend: Backend) -> str:
    """Below this are `/run`, `/health` and `/openai`."""
    found = _ENDPOINT.fullmatch(backend.base_path)
    return found["job"] if found else backend.base_path.removesuffix("/v1").removesuffix("/openai")


def _queue_url(backend: Backend) -> str:
    return backend.origin + _job_path(backend)


def _authorization(submission: Submission) -> Headers:
    """The client's own, where the backend has no key; what is not ASCII cannot be a key."""
    return tuple(
        (name, value)
        for name, value in submission.headers
        if name.lower() == b"authorization" and value.isascii()
    )


def _is_own_control(backend: Backend) -> bool:
    """Whether the URL tells no kind, and its own /health is where `control_url` says."""
    if backend.host.endswith(f".{_LOAD_BALANCER}") or _speaks_openai(backend):
        return False
    return backend.control_url == backend.origin + backend.base_path


def _health_url(backend: Backend) -> str | None:
    if backend.control_url:
        return f"{backend.control_url}/health"
    if backend.kind == "queue":
        return f"{_queue_url(backend)}/health"
    found = _ENDPOINT.fullmatch(backend.base_path)
    if found and _speaks_openai(backend):
        return f"{backend.origin}{found['job']}/health"
    endpoint, _, domain = backend.host.partition(".")
    if domain == _LOAD_BALANCER:
        return f"{_DEFAULT_BASE}/{endpoint}/health"
    return None
