"""Servers rented on the Golem Network, by the URL at which their requestor offers them.

Discovery and renting happen elsewhere: a backend is the URL of a tunnel to an inference server,
most often Ollama, and is judged and checked as such a server is (`providers.checking`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Call, Check, Dialect, Fault, Headers, Prompt, Reading
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from .checking import check_models, judge_server, own_key
from .openai import CHAT, join_target, setting, url_problem
from .reading import ask_chat, read_answer

if TYPE_CHECKING:
    import aiohttp

_ENDPOINTS = "GOLEM_PROVIDER_ENDPOINTS"


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

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        return judge_server(backend, status, body)

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        return await check_models(backend, session)

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
