"""Any server that speaks OpenAI's, Anthropic's or Ollama's API.

llama.cpp, vLLM, SGLang, Ollama and TGI get the client's request as it is. What they may mean by an
answer, how they are asked for their models and how their text is read back are functions here, so
that a family that runs the same servers behind an edge of its own (golem, modal, runpod) composes
them.

Rule 1: a check asks only for lists and flags. It never asks for a token, not even by a detour:
SGLang's `/health` generates one, so SGLang is asked for `/ready`.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from beacon_proxy.contracts import (
    Backend,
    Call,
    Check,
    Dialect,
    Fault,
    Headers,
    Prompt,
    Reading,
    Usage,
    Verdict,
)


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


def own_key(backend: Backend) -> Headers:
    """The backend's own key, in both places where clients of these APIs put theirs.

    OpenAI's and Ollama's clients send `Authorization`, Anthropic's `X-Api-Key`. Both are replaced,
    whichever the server reads, so that no client's key reaches a backend that has its own.
    """
    if not backend.api_key:
        return ()
    key = backend.api_key.encode()
    return ((b"Authorization", b"Bearer " + key), (b"X-Api-Key", key))


def ask_chat(target: bytes, prompt: Prompt) -> Call:
    """Put a prompt as a chat of one message, which every server of this family takes."""
    body: dict[str, Any] = {
        "model": prompt.model,
        "messages": [{"role": "user", "content": prompt.prompt}],
        "temperature": prompt.temperature,
        "max_tokens": prompt.max_tokens,
        "stream": prompt.stream,
    }
    if prompt.stream:
        body["stream_options"] = {"include_usage": True}
    return Call(target, json.dumps(body).encode(), Dialect.OPENAI)


LOOK = 4096  # bytes of an error answer that are looked at
_BUSY = (b"currently busy", b"server busy", b"no slot available", b"overloaded")


def judge_server(backend: Backend, status: int, body: bytes) -> Fault | None:
    """Tell loading, busy and a refused key of ours from other errors; see `Provider.judge`.

    The words are those of llama.cpp ("Loading model", "no slot available"), vLLM ("The engine is
    currently busy"), Ollama ("server busy") and TGI ("Model is overloaded"); 529 is Anthropic's.
    """
    if status in (401, 403):
        return Fault.UNAUTHORIZED if backend.api_key else None
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
    "llamacpp": ("/health", Verdict.BUSY, Fault.LOADING),
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
    """Ask for the models, and for the readiness of a server that names itself.

    At most two GETs, one after the other; see `Provider.check`.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    answer = await _ask(backend, session, "/v1/models")
    latency = loop.time() - started
    if answer.status in _NO_ROUTE:
        answer = await _ask(backend, session, "/api/tags")
    if answer.status != 200:
        return _without_models(backend, answer, latency)
    models, owner = _listed(answer.document())
    if models is None:
        # Some other service, a captive portal, or a proxy before the backend: nothing is learnt.
        detail = "answers 200 with something that is no list of models"
        return Check(Verdict.NEUTRAL, latency, fault=Fault.NOT_JSON, detail=detail)
    if owner in _READINESS:
        path, verdict, fault = _READINESS[owner]
        answer = await _ask(backend, session, path)
        if answer.status == 503:
            detail = f"{owner} is not ready ({path} says 503)"
            return Check(verdict, latency, models, fault, answer.retry_after, detail)
    return Check(Verdict.GOOD, latency, models)


async def _ask(backend: Backend, session: aiohttp.ClientSession, path: str) -> Answer:
    url = origin(backend) + backend.base_path.removesuffix("/v1") + path
    headers = plain(own_key(backend) + backend.headers)
    async with session.get(
        url, headers=headers, allow_redirects=False, ssl=tls(backend)
    ) as response:
        return await bounded(response)


def _without_models(backend: Backend, answer: Answer, latency: float) -> Check:
    status = answer.status
    if status in (401, 403):
        if backend.api_key:
            detail = f"alive, but refuses the configured api_key ({status})"
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


def load(body: bytes) -> Any:
    """Parse JSON from outside; None where it is none, or nested too deeply to be meant."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def origin(backend: Backend) -> str:
    """Scheme, host and port of a backend, as a URL begins."""
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    usual = backend.port == (443 if backend.scheme == "https" else 80)
    return f"{backend.scheme}://{host}" + ("" if usual else f":{backend.port}")


def plain(headers: Headers) -> dict[str, str]:
    """Headers as aiohttp takes them, the last of a name; an empty value leaves one out."""
    return {name.decode("latin-1").title(): value.decode() for name, value in headers if value}


def tls(backend: Backend) -> ssl.SSLContext | bool:
    """The `ssl=` of aiohttp: True verifies against the system's authorities, False not at all."""
    if backend.tls_verify and backend.tls_ca_file:
        return _authorities(backend.tls_ca_file)
    return backend.tls_verify


@lru_cache(maxsize=32)  # reading a PEM file anew for each check would block the loop
def _authorities(path: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=path)


_DEPTH = 8  # levels of a document that may lead to its text
# The first that holds text is taken.
_TEXT = (
    "choices",  # OpenAI
    "message",  # OpenAI, Ollama's chat
    "delta",
    "response",  # Ollama's generate, /inference
    "output",  # RunPod
    "text",
    "content",  # Anthropic, llama.cpp's own
    "generated_text",  # TGI's own
    "tokens",  # worker-vllm
    "token",  # TGI's own stream
)
_FAILED = frozenset({"failed", "error", "failure", "cancelled", "timed_out"})
_COUNTS = (
    ("prompt_tokens", "completion_tokens"),
    ("input_tokens", "output_tokens"),
    ("input", "output"),  # worker-vllm
    ("prompt_eval_count", "eval_count"),  # Ollama
)
_MESSAGE_MAX = 500  # characters


def read_answer(document: Mapping[str, Any]) -> Reading:
    """Read the text, the counts and the error of an answer or of one of its events.

    One reader for all, since gateways mix the shapes. `text` is `""` where there is none or where
    the answer is an error. `done` may come before the event that carries the usage.
    """
    metadata = _mapping(document.get("metadata"))
    receipt = document.get("receipt") or metadata.get("receipt")
    extra = {"receipt": receipt} if receipt else {}
    done = document.get("done") is True or bool(_first_choice(document).get("finish_reason"))
    usage = _usage_in(document) or _counted({"eval_count": metadata.get("tokens_generated")})
    error = _error_in(document)
    return Reading("" if error else _text_in(document), done, usage, error, extra)


def _text_in(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth > _DEPTH:
        return ""
    if isinstance(value, list):
        return "".join(_text_in(item, depth + 1) for item in value)
    if not isinstance(value, Mapping) or _is_thought(value):
        return ""
    for key in _TEXT:
        held = _first_choice(value) if key == "choices" else value.get(key)
        if not held or (key == "message" and isinstance(held, str)):
            continue  # a message that is a string is a remark about the answer
        if text := _text_in(held, depth + 1):
            return text
    return ""


def _is_thought(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind.startswith(("reasoning", "thinking"))


def _first_choice(document: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = document.get("choices")  # some send null beside the usage
    return _mapping(choices[0]) if isinstance(choices, list) and choices else {}


def _error_in(document: Mapping[str, Any]) -> str | None:
    if error := document.get("error"):
        return _message(error)
    status = document.get("status")
    failed = status is False or (isinstance(status, str) and status.lower() in _FAILED)
    if failed or document.get("success") is False:
        return _message(document.get("failure") or document)
    if "error" in (document.get("object"), document.get("type")):  # SGLang's flat shape
        return _message(document)
    # worker-vllm hides an error in the output of a completed job.
    errors = (item.get("error") for item in _items(document.get("output")))
    return next((_message(error) for error in errors if error), None)


def _message(error: Any) -> str:
    if isinstance(error, str) and error.startswith("{"):
        error = load(error.encode(errors="replace")) or error  # the runpod SDK, with its traceback
    if isinstance(error, Mapping):
        keys = ("message", "error_message", "detail", "code", "status")
        error = next((error[key] for key in keys if isinstance(error.get(key), str)), None)
    said = error.strip() if isinstance(error, str) else ""
    return said[:_MESSAGE_MAX] or "the backend reported an error without a message"


def _usage_in(document: Mapping[str, Any]) -> Usage | None:
    # worker-vllm counts in the batches of its output, on from one to the next.
    usage = None
    for holder in (*_items(document.get("output")), document):
        usage = _counted(_mapping(holder.get("usage")) or holder) or usage
    return usage


def _counted(counts: Mapping[str, Any]) -> Usage | None:
    for given, made in _COUNTS:
        pair = (_count(counts.get(given)), _count(counts.get(made)))
        if pair != (None, None):
            return Usage(pair[0] or 0, pair[1] or 0)
    return None


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and value >= 0 else None


def _items(output: Any) -> Iterable[Mapping[str, Any]]:
    listed = output if isinstance(output, list) else [output]
    return (item for item in listed if isinstance(item, Mapping))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
