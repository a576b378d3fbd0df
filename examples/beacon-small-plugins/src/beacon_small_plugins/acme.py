"""Acme, a made-up GPU cloud: OpenAI's API behind a header of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from beacon_proxy.contracts import Backend, Call, Dialect, Headers, Prompt, Provider, Reading


class Acme(Provider):
    """The provider `acme`."""

    name = "acme"
    price_per_second = 0.0002  # USD, where a backend names no other
    pool = "burst"

    def credentials(self, backend: Backend) -> Headers:
        return ((b"X-Acme-Token", backend.api_key.encode()),) if backend.api_key else ()

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        body = {
            "model": prompt.model,
            "messages": [{"role": "user", "content": prompt.prompt}],
            "temperature": prompt.temperature,
            "max_tokens": prompt.max_tokens,
            "stream": prompt.stream,
        }
        target = self.target(backend, b"/v1/chat/completions")
        return Call(target, json.dumps(body).encode(), Dialect.OPENAI)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        if document.get("error"):
            return Reading(error=str(document["error"]))
        choice = next(iter(document.get("choices") or [{}]))
        said = choice.get("message") or choice.get("delta") or {}
        return Reading(said.get("content") or "", done=bool(choice.get("finish_reason")))
