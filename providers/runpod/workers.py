"""The number of workers of an endpoint, by RunPod's REST API.

`PATCH /v1/endpoints/ENDPOINT_ID` with `workersMin` and `workersMax` changes those two alone
(docs.runpod.io, api-reference: EndpointUpdateInput); the answer is the endpoint as it is then, as
it is to `GET`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Workers

from ..checking import bounded
from ..reading import load

if TYPE_CHECKING:
    import aiohttp

_EDGE = "api.runpod.ai"
_REST = "https://rest.runpod.io/v1"
_OF_QUEUE = re.compile(r".*/v2/(?P<id>[A-Za-z0-9_-]+)(?:/.*)?")
_SAYS = {401: "refuses the api_key", 403: "refuses the api_key", 404: "knows no such endpoint"}


def endpoint_of(backend: Backend) -> str | None:
    """The id of the endpoint behind a backend; None where its URL does not say."""
    label, _, domain = backend.host.partition(".")
    if domain == _EDGE:
        return label
    found = _OF_QUEUE.fullmatch(backend.base_path)
    return found["id"] if found else None


def rest_of(backend: Backend) -> str:
    """Where the REST API is: RunPod's own, or beside the `/v2` of another that stands in for it."""
    own = backend.host == _EDGE or backend.host.endswith(f".{_EDGE}")
    return _REST if own else f"{backend.origin}/v1"


def problem_of(backend: Backend) -> str | None:
    """Why the workers of this backend cannot be set, as `key: problem`."""
    if endpoint_of(backend) is None:
        return "url: must name the endpoint, as https://api.runpod.ai/v2/ENDPOINT_ID does"
    if not backend.api_key:
        return "api_key: is needed to scale it"
    return None


async def kept_workers(backend: Backend, session: aiohttp.ClientSession, seconds: float) -> int:
    """Read the least that the endpoint keeps; see `contracts.Scales`."""
    kept = (await _endpoint(backend, session, seconds, "GET")).get("workersMin")
    if type(kept) is not int:
        raise ValueError("RunPod does not say how many workers it keeps")
    return kept


async def set_workers(
    backend: Backend, workers: Workers, session: aiohttp.ClientSession, seconds: float
) -> None:
    """Set both bounds, and see that they are set; see `contracts.Scales`."""
    wanted = {"workersMin": workers.min, "workersMax": workers.max}
    now = await _endpoint(backend, session, seconds, "PATCH", wanted)
    if any(now.get(key) != wanted[key] for key in wanted):
        raise ValueError("RunPod answers 200, but with other workers than it was told")


async def _endpoint(
    backend: Backend,
    session: aiohttp.ClientSession,
    seconds: float,
    method: str,
    wanted: Mapping[str, int] | None = None,
) -> Mapping[str, Any]:
    """The endpoint as RunPod answers with it."""
    url = f"{rest_of(backend)}/endpoints/{endpoint_of(backend)}"
    fields = {"Authorization": f"Bearer {backend.api_key}"}
    async with (
        asyncio.timeout(seconds),
        session.request(
            method, url, headers=fields, json=wanted, allow_redirects=False
        ) as response,
    ):
        answer = await bounded(response)
    if answer.status != 200:
        said = _SAYS.get(answer.status, f"answers {answer.status}")
        raise ValueError(f"RunPod {said}")
    endpoint = load(answer.body)
    if not isinstance(endpoint, Mapping):
        raise ValueError("RunPod answers 200, but not with an endpoint")
    return endpoint
