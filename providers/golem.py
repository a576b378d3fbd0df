"""Servers rented on the Golem Network, by the URL at which their requestor offers them.

Discovery and renting happen elsewhere: a backend is the URL of a tunnel to an inference server,
most often Ollama, and is judged and checked as such a server is (`providers.checking`). What it
speaks is found out by questions that cost nothing (`Golem.check`).

**yagna's own tunnel** (golemfactory/yagna, core/activity/src/http_proxy.rs) is a URL that ends in
`/activity-api/v1/activity/{id}/proxy-http`. It passes an answer on piece by piece only where
`Accept` is exactly one of two values, and names that value as the Content-Type of the answer; any
other answer it collects whole, and it must be UTF-8. It drops the query of a request. Its app-key
is the `api_key`; it goes on to the provider's machine with the other fields, so it should be one
that is good for nothing else.
"""

from __future__ import annotations

import json
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
    Prompt,
    Reading,
    Verdict,
)
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from .checking import LOOK, Answer, bounded, check_models, judge_server, own_key, plain
from .openai import CHAT, join_target, setting, url_problem
from .reading import ask_chat, read_answer

if TYPE_CHECKING:
    import aiohttp

_ENDPOINTS = "GOLEM_PROVIDER_ENDPOINTS"
_YAGNA = re.compile(r"/activity-api/v1/activity/[^/]+/proxy-http(?:/|\Z)")
_EVENTS, _BYTES = b"text/event-stream", b"application/octet-stream"
_LINES = (Dialect.OLLAMA, Dialect.BEACON)  # these stream lines of JSON


class Golem:
    """The provider `golem`.

    `kind` says what `/inference` is turned into: an OpenAI chat (`auto`, `openai`; Ollama takes it,
    too), Ollama's own `/api/generate`, or the same `/inference` on the backend.
    """

    name = "golem"
    price_per_second = 0.0001
    pool = "baseline"
    kinds: tuple[str, ...] = ("auto", "ollama", "openai", "inference")
    environment: tuple[str, ...] = (_ENDPOINTS,)
    cold_start = 300.0  # s, to load a model into a GPU of one's own
    stays_warm = 300.0  # s; Ollama's keep_alive is 5 minutes

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        """One row for each `url` or `url|region` of the list, golem-1 first."""
        items = [item for part in setting(env, _ENDPOINTS).split(",") if (item := part.strip())]
        rows, problems = [], []
        for number, item in enumerate(items, start=1):
            url, _, place = (part.strip() for part in item.partition("|"))
            if problem := url_problem(url):
                problems.append(f"{_ENDPOINTS} (URL {number}): {problem}")
            rows.append(
                {
                    "name": f"golem-{number}",
                    "provider": self.name,
                    "url": url,
                    "region": canonical_region(place or region),
                }
            )
        if problems:
            raise ConfigError(problems)
        return rows

    def target(self, backend: Backend, target: bytes) -> bytes:
        return join_target(backend.base_path, target)

    def credentials(self, backend: Backend) -> Headers:
        return own_key(backend)

    def fields(self, backend: Backend, exchange: Exchange) -> Headers:
        """Ask yagna for a stream where the client asked for one, and only there."""
        if not backend.base_path or not _is_yagna(backend):
            return ()
        if exchange.stream:
            return ((b"Accept", _BYTES if _streams_lines(backend, exchange) else _EVENTS),)
        if exchange.inference and _accepts_only_streams(exchange.headers):
            return ((b"Accept", b"*/*"),)  # else yagna would call its one document a stream
        return ()

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        if status == 404 and _is_yagna(backend) and _is_by_yagna(body):
            return Fault.GONE
        return judge_server(backend, status, body)

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        """Ask for models and readiness, and as long as its kind is not known for that, too."""
        if backend.kind != "auto" and not _is_yagna(backend):
            return await check_models(backend, session)
        version, _ = await _ask(backend, session, "/api/version")
        if version.status == 404 and _is_yagna(backend) and _is_by_yagna(version.body):
            detail = "yagna knows no such activity (any more)"
            return Check(Verdict.STRIKE, fault=Fault.GONE, detail=detail)
        kind = backend.kind
        if kind == "auto":
            kind = await _kind_of(backend, session, version) or kind
        check = await check_models(backend, session)
        if kind != "auto":
            return replace(check, kind=kind)
        if check.verdict is Verdict.GOOD and check.models is None and version.status == 400:
            # No server says so to a GET: a tunnel whose other end is not up. No sign of health.
            return replace(check, verdict=Verdict.NEUTRAL)
        return check

    def problem(self, backend: Backend) -> str | None:
        return None

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        if backend.kind == "ollama":
            return self._generate(backend, prompt)
        if backend.kind == "inference":
            return self._inference(backend, prompt)
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return read_answer(document)

    def _generate(self, backend: Backend, prompt: Prompt) -> Call:
        body = {
            "model": prompt.model,
            "prompt": prompt.prompt,
            "stream": prompt.stream,  # Ollama streams unless told not to
            "options": {"temperature": prompt.temperature, "num_predict": prompt.max_tokens},
        }
        target = self.target(backend, b"/api/generate")
        return Call(target, json.dumps(body).encode(), Dialect.OLLAMA)

    def _inference(self, backend: Backend, prompt: Prompt) -> Call:
        body = {
            "model": prompt.model,
            "prompt": prompt.prompt,
            "temperature": prompt.temperature,
            "max_tokens": prompt.max_tokens,
            "stream": prompt.stream,
        }
        target = self.target(backend, b"/inference")
        return Call(target, json.dumps(body).encode(), Dialect.BEACON)


# -- what it speaks ------------------------------------------------------------------------------

_NO_ROUTE = (404, 405, 501)


async def _kind_of(backend: Backend, session: aiohttp.ClientSession, version: Answer) -> str | None:
    """What a backend speaks, by questions that are free; None: it does not show (yet).

    Nothing is concluded from silence: a tunnel whose service is not up, a portal, a gateway that
    wants a key for everything each leave it open. An Ollama speaks OpenAI, too; it is asked in its
    own words, for there the answer tells what loading the model cost (`load_duration`).

    Args:
        version: what it answered to `/api/version`. Ollama has that, and so have servers that are
            none (llama-swap): it is one if `/api/tags` lists, too.
    """
    said = version.document() if version.status == 200 else None
    if isinstance(said, Mapping) and isinstance(said.get("version"), str):
        tags, _ = await _ask(backend, session, "/api/tags")
        if _lists(tags, "models"):
            return "ollama"
        if tags.status not in _NO_ROUTE:
            return None
    elif version.status not in _NO_ROUTE:
        return None
    models, _ = await _ask(backend, session, "/v1/models")
    if _lists(models, "data") or models.status in (401, 403):  # by itself: the first was refused
        return "openai"
    if models.status not in _NO_ROUTE:
        return None
    tags, _ = await _ask(backend, session, "/api/tags")
    if _lists(tags, "models"):
        return "ollama"
    # Whoever lists nothing may still say what a path is for (RFC 9110 9.3.7 and 10.2.1). A server
    # that allows everything everywhere is asked for a chat, as before.
    for path, kind in (("/v1/chat/completions", "openai"), ("/inference", "inference")):
        options, allowed = await _ask(backend, session, path, "OPTIONS")
        if "POST" in allowed and (options.status < 300 or options.status == 405):
            return kind
    return None


async def _ask(
    backend: Backend, session: aiohttp.ClientSession, path: str, method: str = "GET"
) -> tuple[Answer, set[str]]:
    """The answer to a free question, and the methods that it allows."""
    url = backend.origin + backend.base_path.removesuffix("/v1") + path
    headers = plain(own_key(backend) + backend.headers)
    async with session.request(method, url, headers=headers, allow_redirects=False) as response:
        allowed = ",".join(response.headers.getall("Allow", ())).upper().split(",")
        return await bounded(response), {name.strip() for name in allowed}


def _lists(answer: Answer, key: str) -> bool:
    """Whether it is a list of models under that key; Ollama says null where it has none."""
    document = answer.document() if answer.status == 200 else None
    return (
        isinstance(document, Mapping) and key in document and isinstance(document[key] or [], list)
    )


# -- yagna ---------------------------------------------------------------------------------------


def _is_yagna(backend: Backend) -> bool:
    return _YAGNA.search(backend.base_path) is not None


def _is_by_yagna(body: bytes) -> bool:
    """Whether an error is of yagna itself: servers behind it say `error` or `detail`."""
    return body[:LOOK].lstrip().startswith(b'{"message":')


def _streams_lines(backend: Backend, exchange: Exchange) -> bool:
    if exchange.prompt is not None:
        return backend.kind in ("ollama", "inference")
    return exchange.dialect in _LINES


def _accepts_only_streams(headers: Headers) -> bool:
    return any(name.lower() == b"accept" and value in (_EVENTS, _BYTES) for name, value in headers)
