"""The free questions: whether a server answers, what it serves, and what its errors mean.

Rule 1: a check asks only for lists and flags. It never asks for a token, not even by a detour:
SGLang's `/health` generates one, so SGLang is asked for `/ready`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Check, Fault, Headers, Verdict, Warmth

from .reading import load

if TYPE_CHECKING:
    import aiohttp


def own_key(backend: Backend) -> Headers:
    """The backend's own key, in both places where clients of these APIs put theirs.

    OpenAI's and Ollama's clients send `Authorization`, Anthropic's `X-Api-Key`. Both are replaced,
    whichever the server reads, so that no client's key reaches a backend that has its own.
    """
    if not backend.api_key:
        return ()
    key = backend.api_key.encode()
    return ((b"Authorization", b"Bearer " + key), (b"X-Api-Key", key))


def _has_own_key(backend: Backend) -> bool:
    """Whether the key that a backend is shown is the operator's, be it one of its `headers`."""
    return bool(backend.api_key) or any(name.lower() in _KEYS for name, _ in backend.headers)


_KEYS = (b"authorization", b"x-api-key", b"api-key")
LOOK = 4096  # bytes of an error answer that are looked at
_BUSY = (b"currently busy", b"server busy", b"no slot available", b"overloaded")


def judge_server(backend: Backend, status: int, body: bytes) -> Fault | None:
    """Tell loading, busy and a refused key of ours from other errors; see `Provider.judge`.

    The words are those of llama.cpp ("Loading model", "no slot available"), vLLM ("The engine is
    currently busy"), Ollama ("server busy") and TGI ("Model is overloaded"); 529 is Anthropic's.
    """
    if status in (401, 403):
        return Fault.UNAUTHORIZED if _has_own_key(backend) else None
    if status in (429, 529):
        return Fault.BUSY
    if status == 503:
        said = body[:LOOK].lower()
        if b"loading" in said:
            return Fault.LOADING
        if any(words in said for words in _BUSY):
            return Fault.BUSY
    return None


_BODY_MAX = 1 << 20  # bytes; no list of models is longer
_NO_ROUTE = (404, 405, 501)
_SECONDS = re.compile(r"[0-9]{1,6}")
# By `owned_by` of the first model: a flag that is free to ask, and what its 503 means.
_READINESS = {
    # Not /slots: that wakes a llama.cpp which sleeps. /props tells that it does.
    "llamacpp": ("/props", Verdict.BUSY, Fault.LOADING),
    "vllm": ("/health", Verdict.STRIKE, Fault.STATUS),  # its engine is dead
    "sglang": ("/ready", Verdict.BUSY, Fault.LOADING),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a question of our own."""

    status: int
    body: bytes  # cut after 1 MiB
    retry_after: float | None = None  # s

    def document(self) -> Any:
        """The JSON in the body; None where there is none."""
        return load(self.body)


async def check_models(backend: Backend, session: aiohttp.ClientSession) -> Check:
    """Ask for the models, and whether they are in memory; see `Provider.check`.

    Two GETs, one after the other; three of an Ollama of before /v1/models.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    answer = await _ask(backend, session, "/v1/models")
    latency = loop.time() - started
    tags = answer.status in _NO_ROUTE
    if tags:
        answer = await _ask(backend, session, "/api/tags")
    if answer.status != 200:
        return _without_models(backend, answer, latency)
    document = answer.document()
    models, owner = _listed(document)
    if models is None:
        # Some other service, a captive portal, or a proxy before the backend: nothing is learnt.
        detail = "answers 200 with something that is no list of models"
        return Check(Verdict.NEUTRAL, latency, fault=Fault.NOT_JSON, detail=detail)
    if owner not in _READINESS:
        hot = await hot_models(backend, session) if tags or _is_ollama(models, owner) else None
        return Check(Verdict.GOOD, latency, models, warmth=_warmth(hot), hot=hot)
    path, verdict, fault = _READINESS[owner]
    answer = await _ask(backend, session, path)
    if answer.status == 503:
        detail = f"{owner} is not ready ({path} says 503)"
        return Check(verdict, latency, models, fault, answer.retry_after, detail)
    hot = _held(document, models, answer.document() if answer.status == 200 else None)
    return Check(Verdict.GOOD, latency, models, warmth=_warmth(hot), hot=hot)


def _is_ollama(models: tuple[str, ...], owner: str) -> bool:
    """By the shape of its list: a namespace for owner, and each name with a tag."""
    return owner == "library" or (bool(models) and all(":" in name for name in models))


def _held(document: Any, models: tuple[str, ...], state: Any) -> tuple[str, ...]:
    """Which models a server that starts with its models holds: all, unless it says otherwise."""
    if isinstance(state, Mapping) and state.get("is_sleeping") is True:
        return ()
    rows = [row for row in document.get("data") or () if isinstance(row, Mapping)]
    states = {row.get("id"): row["status"] for row in rows if isinstance(row.get("status"), dict)}
    if not states:
        return models
    # llama.cpp as a router of models
    return tuple(name for name in models if states.get(name, {}).get("value") == "loaded")


def _warmth(hot: tuple[str, ...] | None) -> Warmth | None:
    if hot is None:
        return None
    return Warmth.WARM if hot else Warmth.COLD


async def hot_models(backend: Backend, session: aiohttp.ClientSession) -> tuple[str, ...] | None:
    """Which models an Ollama has in memory, as it spells them; asking loads none.

    None: this server does not say. One GET of at most a second; it never raises.
    """
    return _listed(await _ask_aside(backend, session, "/api/ps"))[0]


_ASIDE = 1.0  # s that a server may take for what is only good to know


async def _ask_aside(backend: Backend, session: aiohttp.ClientSession, path: str) -> Any:
    """The document behind a path that a server may have; None where there is none."""
    from aiohttp import ClientError  # by now it is loaded; `beacon-proxy check` does without it

    try:
        async with asyncio.timeout(_ASIDE):
            answer = await _ask(backend, session, path)
    except (ClientError, OSError):  # TimeoutError is one
        return None
    return answer.document() if answer.status == 200 else None


async def _ask(backend: Backend, session: aiohttp.ClientSession, path: str) -> Answer:
    url = backend.origin + backend.base_path.removesuffix("/v1") + path
    headers = plain(own_key(backend) + backend.headers)
    async with session.get(url, headers=headers, allow_redirects=False) as response:
        return await bounded(response)


def _without_models(backend: Backend, answer: Answer, latency: float) -> Check:
    status = answer.status
    if status in (401, 403):
        if _has_own_key(backend):
            detail = f"alive, but refuses the configured key ({status})"
            return Check(Verdict.NEUTRAL, latency, fault=Fault.UNAUTHORIZED, detail=detail)
        return Check(Verdict.GOOD, latency, detail=f"alive; lists its models for a key ({status})")
    fault = judge_server(backend, status, answer.body)
    if fault is None and status == 503 and answer.retry_after is not None:
        fault = Fault.BUSY
    if fault is not None:
        return Check(Verdict.BUSY, latency, None, fault, answer.retry_after, f"says {status}")
    if status >= 500 and status not in _NO_ROUTE:
        return Check(Verdict.STRIKE, latency, fault=Fault.STATUS, detail=f"says {status}")
    if 300 <= status < 400:
        detail = f"redirects ({status}); is the url the right one?"
        return Check(Verdict.NEUTRAL, latency, fault=Fault.STATUS, detail=detail)
    return Check(Verdict.GOOD, latency, detail=f"alive; lists no models ({status})")


def listed_models(document: Any) -> tuple[str, ...] | None:
    """The models of an OpenAI or Ollama list; None: it is no list."""
    return _listed(document)[0]


def _listed(document: Any) -> tuple[tuple[str, ...] | None, str]:
    """The models of an OpenAI or Ollama list, and who owns the first; None: it is no list."""
    if not isinstance(document, Mapping):
        return None, ""
    for key in ("data", "models"):  # llama.cpp sends both
        # Ollama without a model says null.
        rows = document[key] or [] if key in document else None
        if isinstance(rows, list):
            found = [row for row in rows if isinstance(row, Mapping)]
            names = [row.get("id") or row.get("name") or row.get("model") for row in found]
            owner = found[0].get("owned_by") if found else ""
            return tuple(name for name in names if isinstance(name, str)), str(owner)
    return None, ""


async def bounded(response: aiohttp.ClientResponse) -> Answer:
    """Read an answer, but no more than a list of models may hold."""
    body = bytearray()
    async for piece in response.content.iter_chunked(1 << 16):
        body += piece
        if len(body) > _BODY_MAX:
            break
    said = response.headers.get("Retry-After", "")
    wait = float(said) if _SECONDS.fullmatch(said) else None  # a date is not worth a clock
    return Answer(response.status, bytes(body), wait)


def plain(headers: Headers) -> dict[str, str]:
    """Headers as aiohttp takes them, the last of a name; an empty value leaves one out."""
    return {name.decode("latin-1").title(): value.decode() for name, value in headers if value}
