"""Any server that speaks OpenAI's, Anthropic's or Ollama's API.

llama.cpp, vLLM, SGLang, Ollama and TGI get the client's request as it is. What they may mean by an
answer and how they are asked (`checking`), and how their text is read back (`reading`), are
functions, so that a family that runs the same servers behind an edge of its own composes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from beacon_proxy.contracts import Backend, Call, Check, Fault, Headers, Prompt, Reading

from .checking import check_models, judge_server, own_key
from .reading import ask_chat, read_answer

if TYPE_CHECKING:
    import aiohttp


class OpenAI:
    """The provider `openai`; its price is 0 unless the backend names one."""

    name = "openai"
    price_per_second = 0.0
    pool = "burst"
    kinds: tuple[str, ...] = ("auto",)
    environment: tuple[str, ...] = ()

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        return []

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
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return read_answer(document)


CHAT = b"/v1/chat/completions"
_API_ROOT = re.compile(rb"/(?:v1|api)(?:[/?]|\Z)")


def join_target(base_path: str, target: bytes) -> bytes:
    """Put a base path before a request-target; the bytes of the target are kept.

    A base URL such as `http://host/v1`, as OpenAI's clients are given it, names the API rather than
    the server: its `/v1` is not repeated before `/v1/…`, nor put before Ollama's `/api/…`.
    """
    if not base_path or not target.startswith(b"/"):
        return target  # `*` and absolute-form have no room for a base path
    if base_path.endswith("/v1") and _API_ROOT.match(target):
        base_path = base_path.removesuffix("/v1")
    return base_path.encode() + target


def setting(env: Mapping[str, str], name: str) -> str:
    """A variable without the space around it (secrets are often stored with a line end)."""
    return env.get(name, "").strip()


def url_problem(url: str) -> str | None:
    """Why a URL cannot be a backend's; the words never quote it, for it may hold a secret."""
    if not url.isascii() or any(char <= " " or char in "\\\x7f" for char in url):
        return "must hold no spaces, control, non-ASCII characters or backslashes"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "must be a URL with a valid host and port"
    if parts.scheme not in ("http", "https") or not host or port == 0:
        return "must be http://host[:port][/path] or https://host[:port][/path]"
    if "@" in parts.netloc:
        return "must hold no user or password"
    if "?" in url or "#" in url:
        return "must have no query and no fragment"
    return None
