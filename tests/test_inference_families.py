"""`/inference` through every family: one answer, whatever the backend speaks, and one failure.

Each backend plays what facts/providers.md has recorded of its family. The whole proxy runs.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from beacon_proxy.api.reader import EVENT_CAP, Reader
from beacon_proxy.api.told import code_of
from beacon_proxy.contracts import Fault
from beacon_proxy.wire.relay import ClientSink

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    answer,
    chunk,
    closed_port,
    each_request,
    event,
    json_answer,
    json_bytes,
    line,
    proxy,
    request,
)
from .kit_apis import NDJSON_HEAD

MODEL = "llama3.2:1b"
RECEIPT = {"id": "r-1", "node": "0xabc", "signature": "…"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def piece(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "model": MODEL, "choices": [choice], **more})


def chat(**more: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": said, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], **more}


ROLE = piece({"role": "assistant", "content": ""})
COUNTS = event({"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
SAID = (piece({"content": "hel"}), piece({"content": "lo"}))


def generated(text: str, **more: Any) -> bytes:
    return line({"model": MODEL, "created_at": "2026-11-23T00:00:00Z", "response": text, **more})


OLLAMA_LAST = {
    "done": True,
    "done_reason": "stop",
    "total_duration": 91_000_000,
    "load_duration": 12_000_000,
    "prompt_eval_count": 5,
    "eval_count": 3,
}
ROUTER = {
    "success": True,
    "error": None,
    "failure": None,
    "provider_used": "local",
    "inference_time": 0.2,
    "metadata": {"tokens_generated": 3, "tokens_prompt": 5, "receipt": RECEIPT},
}


@dataclass(frozen=True)
class Family:
    """How one kind of backend is asked, and what it answers to the same prompt."""

    provider: str
    kind: str
    target: bytes
    document: dict[str, Any]
    events: Sequence[bytes]
    head: bytes = SSE_HEAD
    path: str = ""  # of the configured url
    receipt: Any = None
    more: dict[str, Any] = field(default_factory=dict)  # of the row

    def row(self, backend: RawBackend, **more: Any) -> dict[str, Any]:
        url = backend.url + self.path
        named = {"provider": self.provider, "kind": self.kind, "region": "eu-west", "url": url}
        return {**named, **self.more, **more}


CHAT = b"/v1/chat/completions"
VLLM_STREAM = (ROLE, *SAID, piece({}, "stop"), COUNTS, DONE)
LLAMA_STREAM = (ROLE, *SAID, piece({}, "stop", timings={"predicted_n": 3}), COUNTS, DONE)
FAMILIES = {
    "openai, llama.cpp": Family(
        "openai", "auto", CHAT, chat(usage=USAGE, timings={"predicted_n": 3}), LLAMA_STREAM
    ),
    "openai, vLLM below a path": Family(
        "openai", "auto", b"/app" + CHAT, chat(usage=USAGE), VLLM_STREAM, path="/app/v1"
    ),
    "golem, found out": Family("golem", "auto", CHAT, chat(usage=USAGE), VLLM_STREAM),
    "golem, ollama": Family(
        "golem",
        "ollama",
        b"/api/generate",
        {"model": MODEL, "response": "hello", **OLLAMA_LAST},
        (
            generated("hel", done=False),
            generated("lo", done=False),
            generated("", **OLLAMA_LAST),
        ),
        NDJSON_HEAD,
    ),
    "golem, openai": Family(
        "golem", "openai", CHAT, chat(usage=USAGE, system_fingerprint="fp_ollama"), VLLM_STREAM
    ),
    "golem, inference": Family(
        "golem",
        "inference",
        b"/inference",
        {**ROUTER, "response": "hello"},
        (
            line({"response": "hel", "done": False}),
            line({"response": "lo", "done": False}),
            line({**ROUTER, "response": "", "done": True}),
        ),
        NDJSON_HEAD,
        receipt=RECEIPT,
    ),
    "modal, function": Family(
        "modal",
        "function",
        CHAT,
        {
            "status": "success",
            "output": "hello",
            "usage": {"input_tokens": 5, "output_tokens": 3},
            "receipt": RECEIPT,
        },
        (*VLLM_STREAM[:-1], event({"choices": [], "receipt": RECEIPT}), DONE),
        receipt=RECEIPT,
    ),
    "modal, server": Family("modal", "server", CHAT, chat(usage=USAGE), VLLM_STREAM),
    "runpod, openai": Family(
        "runpod", "openai", b"/v2/ep/openai" + CHAT, chat(usage=USAGE), VLLM_STREAM, path="/v2/ep"
    ),
    "runpod, load_balancing": Family(
        "runpod", "load_balancing", CHAT, chat(usage=USAGE), LLAMA_STREAM
    ),
    # The runpod queue kind brings its answer by itself: tests/test_runpod_queue.py.
}
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def sends(head: bytes, events: Sequence[bytes], end: bytes = LAST_CHUNK) -> Script:
    return answer(head + b"".join(map(chunk, events)) + end, close=end != LAST_CHUNK)


def plays(family: Family, stream: bool) -> Script:
    """A good backend of the family."""
    return sends(family.head, family.events) if stream else json_answer(family.document)


@dataclass
class Told:
    """What a client was told: the last word, and the text with it."""

    last: dict[str, Any]
    text: str
    complete: bool

    @property
    def failure(self) -> dict[str, Any]:
        failure: dict[str, Any] = self.last["failure"]
        assert self.last["metadata"]["failure"] == failure
        assert (self.last["success"], self.last["response"]) == (False, "")
        assert (self.last["error"], self.last["error_code"]) == (
            failure["message"],
            failure["code"],
        )
        return failure

    def code(self) -> tuple[str, bool, int | None]:
        failure = self.failure
        return failure["code"], failure["transient"], failure.get("http_status")


async def ask(p: Proxy, stream: bool, *headers: tuple[str, str]) -> Told:
    body = json.dumps({"model": MODEL, "prompt": "Say hello.", "stream": stream}).encode()
    asked = request("POST", "/inference", [("Content-Type", "application/json"), *headers], body)
    async with RawClient(p.port) as client:
        got = await client.ask(asked, "POST")
    assert got.status == 200, got
    if not stream:
        return Told(got.json, got.json["response"], got.complete)
    *said, last = [json.loads(each) for each in got.body.splitlines()]
    assert all(each == {"response": each["response"], "done": False} for each in said)
    assert (last["done"], last["response"]) == (True, "")
    return Told(last, "".join(each["response"] for each in said), got.complete)


@ALL
@BOTH
async def test_family_when_all_is_well_gives_the_same_fields(family: Family, stream: bool) -> None:
    async with RawBackend(plays(family, stream)) as backend:
        async with proxy(family.row(backend)) as p:
            told = await ask(p, stream)
            (line,) = await p.exchanges(1)
        (sent,) = backend.requests
    said = told.last
    assert (sent.target, sent.header("accept-encoding")) == (family.target, [b"identity"])
    assert (told.complete, told.text, line["end"]) == (True, "hello", "complete")
    assert (said["success"], said["error"], said["error_code"], said["failure"]) == (
        True,
        None,
        None,
        None,
    )
    assert (said["provider_used"], said["inference_time"] > 0) == ("b0", True)
    expected = {
        "provider_type": family.provider,
        "region": "eu-west",
        "model": MODEL,
        "attempts": 1,
        "tokens_generated": 3,
        "tokens_prompt": 5,
    }
    assert said["metadata"] == expected | ({"receipt": family.receipt} if family.receipt else {})


@ALL
@BOTH
async def test_family_when_it_breaks_off_is_a_failure_and_no_text_of_its_own(
    family: Family, stream: bool
) -> None:
    if stream:
        script = sends(family.head, family.events[:2], end=b"")
    else:
        whole = json_bytes(family.document)
        script = answer(whole[: len(whole) // 2 + 20], close=True)
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, stream)
        (line,) = await p.exchanges(1)
    assert told.code() == ("CONNECTION_FAILED", True, 200)
    assert (told.complete, line["end"]) == (not (stream and told.text), "error")
    assert (told.failure["provider"], told.failure["region"]) == ("b0", "eu-west")


@ALL
async def test_family_when_a_stream_ends_without_its_marker_is_incomplete(family: Family) -> None:
    script = sends(family.head, family.events[:2])
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, True)
    assert told.text in ("hel", "hello")
    assert not told.complete
    assert told.code() == ("INCOMPLETE_RESPONSE", True, 200)


@ALL
@BOTH
async def test_family_when_it_answers_an_error_behind_a_200_is_a_failure(
    family: Family, stream: bool
) -> None:
    broken = {"error": {"message": "CUDA error", "type": "server_error", "code": 500}}
    said = line(broken) if family.head == NDJSON_HEAD else event(broken)
    script = sends(family.head, [*family.events[:2], said]) if stream else json_answer(broken)
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, stream)
        (line_told,) = await p.exchanges(1)
    assert told.code() == ("PROVIDER_ERROR", True, 200)
    assert told.failure["message"] == "CUDA error"
    assert line_told["attempts"][-1]["fault"] == "error_body"


# -- the failures that each family has of its own, as they were recorded


def text(status: int, body: bytes, *fields: bytes) -> Script:
    lines = (b"Content-Type: text/plain", b"Content-Length: %d" % len(body), *fields)
    head = b"HTTP/1.1 %d Status\r\n%b\r\n\r\n" % (status, b"\r\n".join(lines))
    return answer(head + body)


def error(status: int, message: str, kind: str, *fields: tuple[str, str]) -> Script:
    return json_answer(
        {"error": {"message": message, "type": kind, "code": status}}, status, fields
    )


JOB = {"id": "sync-1-u1", "delayTime": 824, "executionTime": 3391}
KEY = {"api_key": "k-1"}
SOON = {"timeouts": {"first_content": 0.2, "cold_start": 0.2}}
FAILURES: dict[str, tuple[str, dict[str, Any], Script, tuple[str, bool, int | None], str]] = {
    # name: family, more of its row, what the backend says, the failure, its words
    "a text 500": (
        "openai, llama.cpp",
        {},
        text(500, b"Internal Server Error"),
        ("PROVIDER_ERROR", True, 500),
        "Internal Server Error",
    ),
    "a page of HTML": (
        "openai, llama.cpp",
        {},
        text(502, b"<html><h1>502 Bad Gateway</h1></html>"),
        ("PROVIDER_ERROR", True, 502),
        "the backend answered 502",
    ),
    "a redirect": (
        "openai, llama.cpp",
        {},
        text(308, b"", b"Location: https://h.example/"),
        ("REDIRECTED", False, 308),
        "the backend answered 308",
    ),
    "a 303": (
        "openai, llama.cpp",
        {},
        text(303, b"", b"Location: /result/1"),
        ("RESULT_PENDING", True, 303),
        "the backend answered 303",
    ),
    "a key that the server refuses": (
        "openai, llama.cpp",
        KEY,
        error(401, "Invalid API Key", "authentication_error"),
        ("PROVIDER_UNAUTHORIZED", False, 401),
        "Invalid API Key",
    ),
    "a client's key that it refuses": (
        "openai, llama.cpp",
        {},
        json_answer({"error": "Unauthorized"}, 401),
        ("REQUEST_UNAUTHORIZED", False, 401),
        "Unauthorized",
    ),
    "llama.cpp loading": (
        "openai, llama.cpp",
        {},
        error(503, "Loading model", "unavailable_error"),
        ("PROVIDER_WARMING", True, 503),
        "Loading model",
    ),
    "vLLM full": (
        "openai, vLLM below a path",
        {},
        error(503, "The engine is currently busy and cannot accept", "Service Unavailable"),
        ("PROVIDER_BUSY", True, 503),
        "The engine is currently busy",
    ),
    "vLLM without the model": (
        "openai, vLLM below a path",
        {"models": [MODEL]},
        error(404, "The model `x` does not exist.", "NotFoundError"),
        ("NOT_FOUND", False, 404),
        "The model `x` does not exist.",
    ),
    "vLLM, context too long": (
        "openai, vLLM below a path",
        {},
        error(400, "This model's maximum context length is 1024 tokens", "BadRequestError"),
        ("REQUEST_REJECTED", False, 400),
        "This model's maximum",
    ),
    "no such route, in FastAPI's words": (
        "openai, vLLM below a path",
        {"models": [MODEL]},
        json_answer({"detail": "Not Found"}, 404),
        ("NOT_FOUND", False, 404),
        "Not Found",
    ),
    "SGLang's flat error": (
        "openai, llama.cpp",
        {},
        json_answer({"object": "error", "message": "too long", "code": 400}, 400),
        ("REQUEST_REJECTED", False, 400),
        "too long",
    ),
    "TGI overloaded": (
        "openai, llama.cpp",
        {},
        json_answer({"error": "Model is overloaded", "error_type": "overloaded"}, 429),
        ("RATE_LIMITED", True, 429),
        "Model is overloaded",
    ),
    "TGI, generation failed": (
        "openai, llama.cpp",
        {},
        json_answer({"error": "Request failed during generation", "error_type": "generation"}, 424),
        ("PROVIDER_ERROR", True, 424),
        "Request failed during generation",
    ),
    "Ollama busy": (
        "golem, ollama",
        {},
        json_answer({"error": "server busy, please try again.  maximum pending requests"}, 503),
        ("PROVIDER_BUSY", True, 503),
        "server busy, please try again.",
    ),
    "Ollama without the model": (
        "golem, ollama",
        {"models": [MODEL]},
        json_answer({"error": f'model "{MODEL}" not found, try pulling it first'}, 404),
        ("NOT_FOUND", False, 404),
        f'model "{MODEL}" not found',
    ),
    "another router's failure": (
        "golem, inference",
        {},
        json_answer({"success": False, "response": "", "failure": {"message": "no GPU left"}}),
        ("PROVIDER_ERROR", True, 200),
        "no GPU left",
    ),
    "another router's queue": (
        "golem, inference",
        {},
        json_answer({"id": "a-u1", "status": "IN_QUEUE"}),
        ("PROVIDER_ERROR", True, 200),
        "the job is still IN_QUEUE",
    ),
    "Modal, app stopped": (
        "modal, function",
        {},
        text(404, b"modal-http: app for invoked web endpoint is stopped"),
        ("PROVIDER_GONE", False, 404),
        "modal-http: app for invoked web endpoint is stopped",
    ),
    "Modal, workspace disabled": (
        "modal, server",
        {},
        text(404, b"modal-http: workspace ac-1 is disabled"),
        ("PROVIDER_GONE", False, 404),
        "modal-http: workspace ac-1 is disabled",
    ),
    "Modal, no proxy token": (
        "modal, server",
        {},
        text(401, b"modal-http: missing credentials for proxy authorization"),
        ("PROVIDER_UNAUTHORIZED", False, 401),
        "modal-http: missing credentials",
    ),
    "Modal, spend limit": (
        "modal, function",
        {},
        text(429, b"modal-http: Webhook failed: workspace billing cycle spend limit reached"),
        ("RATE_LIMITED", True, 429),
        "modal-http: Webhook failed: workspace billing cycle spend limit",
    ),
    "Modal, container died": (
        "modal, function",
        {},
        text(500, b"modal-http: internal error: function was terminated by signal"),
        ("PROVIDER_ERROR", True, 500),
        "modal-http: internal error: function was terminated",
    ),
    "Modal server, scaled to zero": (
        "modal, server",
        SOON,
        text(503, b"no ready container"),
        ("PROVIDER_WARMING", True, 503),
        "no ready container",
    ),
    "RunPod, failed job": (
        "runpod, openai",
        {},
        json_answer({**JOB, "status": "FAILED", "error": json.dumps({"error_message": "boom"})}),
        ("PROVIDER_ERROR", True, 200),
        "boom",
    ),
    "RunPod, error in a completed job": (
        "runpod, openai",
        {},
        json_answer(
            {**JOB, "status": "COMPLETED", "output": [{"error": {"message": "HTTP 400: x"}}]}
        ),
        ("PROVIDER_ERROR", True, 200),
        "HTTP 400: x",
    ),
    "RunPod, still in the queue": (
        "runpod, openai",
        {},
        json_answer({"id": "sync-1-u1", "status": "IN_QUEUE"}),
        ("PROVIDER_ERROR", True, 200),
        "the job is still IN_QUEUE",
    ),
    "RunPod, too many requests": (
        "runpod, openai",
        KEY,
        text(429, b"too many requests", b"Retry-After: 9"),
        ("RATE_LIMITED", True, 429),
        "too many requests",
    ),
    "RunPod, key refused": (
        "runpod, openai",
        KEY,
        text(401, b""),
        ("PROVIDER_UNAUTHORIZED", False, 401),
        "the backend answered 401",
    ),
    "RunPod, no worker in time": (
        "runpod, load_balancing",
        {},
        text(400, b"no workers available"),
        ("PROVIDER_BUSY", True, 400),
        "no workers available",
    ),
    "RunPod, worker's port is wrong": (
        "runpod, load_balancing",
        {},
        text(502, b""),
        ("PROVIDER_ERROR", True, 502),
        "the backend answered 502",
    ),
    "RunPod, over 5.5 minutes": (
        "runpod, load_balancing",
        {},
        text(524, b"error code: 524"),
        ("TIMEOUT", True, 524),
        "error code: 524",
    ),
}


@pytest.mark.parametrize(
    ("name", "row", "script", "code", "words"), FAILURES.values(), ids=FAILURES
)
@BOTH
async def test_failure_when_a_family_tells_it_has_its_code_and_its_words(
    name: str,
    row: dict[str, Any],
    script: Script,
    code: tuple[str, bool, int | None],
    words: str,
    stream: bool,
) -> None:
    """A text 500, a 303 and a stopped app were all a parse error and `not transient`."""
    family = FAMILIES[name]
    async with RawBackend(script) as backend, proxy(family.row(backend, **row)) as p:
        told = await ask(p, stream)
    assert told.code() == code
    assert told.failure["message"].startswith(words)
    assert (told.failure["provider_type"], told.failure["model"]) == (family.provider, MODEL)
    assert told.text == ""


async def test_failure_when_the_backend_says_how_long_to_wait_passes_it_on() -> None:
    family = FAMILIES["runpod, openai"]
    script = text(429, b"too many requests", b"Retry-After: 9")
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        assert (await ask(p, False)).failure["retry_after"] == 9


# -- every fault and every status has its code

WHATEVER_STATUS = {
    Fault.DNS: ("CONNECTION_FAILED", True),
    Fault.REFUSED: ("CONNECTION_FAILED", True),
    Fault.TLS: ("CONNECTION_FAILED", True),
    Fault.RESET: ("CONNECTION_FAILED", True),
    Fault.CLOSED: ("CONNECTION_FAILED", True),
    Fault.TIMEOUT: ("TIMEOUT", True),
    Fault.DEADLINE: ("TIMEOUT", True),
    Fault.MALFORMED: ("INVALID_RESPONSE", True),
    Fault.NOT_JSON: ("INVALID_RESPONSE", True),
    Fault.EMPTY: ("INVALID_RESPONSE", True),
    Fault.TRUNCATED: ("INCOMPLETE_RESPONSE", True),
    Fault.ERROR_BODY: ("PROVIDER_ERROR", True),
    Fault.LOADING: ("PROVIDER_WARMING", True),
    Fault.UNAUTHORIZED: ("PROVIDER_UNAUTHORIZED", False),
    Fault.GONE: ("PROVIDER_GONE", False),
    Fault.CLIENT_CLOSED: ("CLIENT_CLOSED", True),
}
BY_STATUS = {
    None: ("PROVIDER_ERROR", True),
    200: ("PROVIDER_ERROR", True),
    301: ("REDIRECTED", False),
    302: ("REDIRECTED", False),
    303: ("RESULT_PENDING", True),
    307: ("REDIRECTED", False),
    308: ("REDIRECTED", False),
    400: ("REQUEST_REJECTED", False),
    401: ("REQUEST_UNAUTHORIZED", False),
    402: ("PAYMENT_REQUIRED", False),
    403: ("REQUEST_UNAUTHORIZED", False),
    404: ("NOT_FOUND", False),
    405: ("NOT_SUPPORTED", False),
    408: ("TIMEOUT", True),
    413: ("REQUEST_REJECTED", False),
    415: ("REQUEST_REJECTED", False),
    422: ("REQUEST_REJECTED", False),
    424: ("PROVIDER_ERROR", True),
    425: ("RATE_LIMITED", True),
    429: ("RATE_LIMITED", True),
    499: ("PROVIDER_ERROR", True),
    500: ("PROVIDER_ERROR", True),
    501: ("NOT_SUPPORTED", False),
    502: ("PROVIDER_ERROR", True),
    503: ("PROVIDER_BUSY", True),
    504: ("TIMEOUT", True),
    520: ("PROVIDER_ERROR", True),
    524: ("TIMEOUT", True),
    529: ("PROVIDER_BUSY", True),
}


def test_code_when_any_fault_meets_any_status_is_the_one_of_the_table() -> None:
    for status, by_status in BY_STATUS.items():
        busy = ("RATE_LIMITED" if status == 429 else "PROVIDER_BUSY", True)
        expected = {
            **WHATEVER_STATUS,
            Fault.BUSY: busy,
            Fault.STATUS: by_status,
        }
        assert expected.keys() == set(Fault), "a new fault needs a code of its own"
        assert {fault: code_of(fault, status) for fault in Fault} == expected, status
        assert code_of(None, status) == by_status


# -- who is told of, where several were asked


async def test_failure_when_the_first_error_is_passed_on_names_who_said_it() -> None:
    """The code and the name were those of the last attempt, the words those of the first."""
    script = error(500, "CUDA out of memory", "server_error")
    with closed_port() as port:
        async with RawBackend(script) as near:
            rows = (
                {"url": near, "provider": "golem"},
                {"url": f"http://127.0.0.1:{port}", "region": "eu-west"},
            )
            async with proxy(*rows) as p:
                told = await ask(p, False)
    failure, metadata = told.failure, told.last["metadata"]
    assert told.code() == ("PROVIDER_ERROR", True, 500)
    assert failure["message"] == "CUDA out of memory"
    assert (failure["provider"], told.last["provider_used"]) == ("b0", "b0")
    assert (failure["region"], metadata["region"], metadata["attempts"]) == ("us-east",) * 2 + (2,)


@pytest.mark.parametrize("refused_first", [True, False])
async def test_failure_when_one_backend_is_only_busy_is_transient(refused_first: bool) -> None:
    stopped = text(404, b"modal-http: app for invoked web endpoint is stopped")
    busy = error(429, "try again", "overloaded")
    first, second = (stopped, busy) if refused_first else (busy, stopped)
    async with RawBackend(first) as one, RawBackend(second) as two:
        rows = [
            {"url": one, "provider": "modal" if refused_first else "golem", "pool": "baseline"},
            {"url": two, "provider": "golem" if refused_first else "modal", "region": "eu-west"},
        ]
        async with proxy(*rows) as p:
            told = await ask(p, False)
        assert (len(one.requests), len(two.requests)) == (1, 1)
    assert told.failure["transient"], "the busy one may have room when it is asked again"


async def test_redirect_when_another_backend_stands_ready_goes_there() -> None:
    good = FAMILIES["openai, llama.cpp"]
    moved = text(301, b"", b"Location: https://h.example/")
    async with (
        RawBackend(moved) as one,
        RawBackend(json_answer(good.document)) as two,
        proxy(one, {"url": two, "region": "eu-west"}) as p,
    ):
        told = await ask(p, False)
    assert (told.text, told.last["provider_used"]) == ("hello", "b1")


# -- a start, and receipts


@BOTH
async def test_metadata_when_the_model_was_loaded_first_tells_the_cold_start(stream: bool) -> None:
    """Ollama's load_duration (ns): seconds where the model was loaded, else milliseconds."""
    cold = {**OLLAMA_LAST, "load_duration": 6_250_000_000}
    family = FAMILIES["golem, ollama"]
    events = [*family.events[:2], generated("", **cold)]
    document = {**family.document, **cold}
    script = sends(NDJSON_HEAD, events) if stream else json_answer(document)
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, stream)
    assert told.last["metadata"]["cold_start"] == 6.25


@BOTH
async def test_metadata_when_a_job_comes_back_has_its_id_and_its_receipts(stream: bool) -> None:
    said = {
        **JOB,
        "status": "COMPLETED",
        "output": [{"choices": [{"tokens": ["hel", "lo"]}], "usage": {"input": 5, "output": 3}}],
        "receipts": [RECEIPT],
    }
    family = FAMILIES["runpod, openai"]
    async with RawBackend(json_answer(said)) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, stream)
    metadata = told.last["metadata"]
    assert (told.text, metadata["tokens_generated"], metadata["tokens_prompt"]) == ("hello", 3, 5)
    assert (metadata["job_id"], metadata["receipt"]) == ("sync-1-u1", RECEIPT)


async def test_metadata_when_counts_come_in_parts_adds_them_up() -> None:
    """Anthropic's stream tells the prompt's tokens in its first event, the answer's at its end."""
    events = [
        event({"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 5}}}),
        *SAID,
        event({"type": "message_delta", "usage": {"output_tokens": 3}}),
        event({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        DONE,
    ]
    async with RawBackend(sends(SSE_HEAD, events)) as backend, proxy(backend) as p:
        metadata = (await ask(p, True)).last["metadata"]
    assert (metadata["tokens_prompt"], metadata["tokens_generated"]) == (5, 3)


# -- what could not be read was a 500, or an empty success

DEEP = b'{"response": "hi", "x": ' + b"[" * 200_000
UNREADABLE = {
    "packed, though nobody offered": (gzip.compress(b'{"response": "hi"}'), b"gzip"),
    "nested too deeply": (DEEP, b"identity"),
    "nothing known": (b"{}", b"identity"),
    "a list": (b'["hi"]', b"identity"),
}


def packed(body: bytes, coding: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: %b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (coding, len(body), body)
    )


@pytest.mark.parametrize(("body", "coding"), UNREADABLE.values(), ids=UNREADABLE)
async def test_answer_that_cannot_be_read_is_a_failure_or_the_next_ones(
    body: bytes, coding: bytes
) -> None:
    good = FAMILIES["openai, llama.cpp"]
    async with RawBackend(answer(packed(body, coding))) as one:
        async with proxy(one) as p:
            told = await ask(p, False)
        assert told.code() == ("INVALID_RESPONSE", True, 200)
        async with (
            RawBackend(json_answer(good.document)) as two,
            proxy(one, {"url": two, "region": "eu-west"}) as p,
        ):
            assert (await ask(p, False)).last["provider_used"] == "b1"


@pytest.mark.parametrize("body", [b"{}", b'{"status": "IN_QUEUE", "id": "a"}', b"[1]", b"no json"])
async def test_answer_that_was_passed_on_half_read_is_still_no_empty_success(body: bytes) -> None:
    """Nobody else stands ready, so 0.2 s after its head it is no longer held."""

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            whole = packed(body, b"identity")
            await conn.send(whole[: -len(body)])
            await asyncio.sleep(0.3)
            await conn.send(body)

    async with RawBackend(slow) as backend, proxy(backend) as p:
        told = await ask(p, False)
        (line,) = await p.exchanges(1)
    assert told.failure["code"] in ("INVALID_RESPONSE", "PROVIDER_ERROR")
    assert line["attempts"][0]["fault"] in ("empty", "error_body", "not_json")


@pytest.mark.parametrize("said", [b'"x": NaN', b'"x": "\\ud800"', b'"x": 1' + b"0" * 40])
@BOTH
async def test_answer_that_strict_parsers_refuse_is_read_as_python_means_it(
    said: bytes, stream: bool
) -> None:
    body = b'{"response": "hello \\ud83d", "done": true, "receipt": {%b}}' % said
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    async with RawBackend(answer(head % len(body) + body)) as backend, proxy(backend) as p:
        told = await ask(p, stream)
    assert told.last["success"]
    assert told.text.startswith("hello ")


async def test_verbatim_document_nested_too_deeply_to_be_judged_passes_as_it_came() -> None:
    """It was a 500 of the proxy's own."""
    body = b'{"x": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    asked = request("POST", "/v1/chat/completions", [("Content-Type", "application/json")], b"{}")
    async with RawBackend(answer(packed(body, b"identity"))) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(asked, "POST")
        assert p.events("server.failed") == []
    assert (got.status, got.body) == (200, body)


async def test_stream_when_an_event_reports_a_failure_the_attempt_is_a_strike() -> None:
    """`status: FAILED` inside a stream is no error of any dialect: only its provider knows."""
    events = [line({"response": "hel", "done": False}), line({"status": "FAILED", "done": True})]
    family = FAMILIES["golem, inference"]
    script = sends(NDJSON_HEAD, events)
    async with RawBackend(script) as backend, proxy(family.row(backend)) as p:
        told = await ask(p, True)
        (done,) = await p.exchanges(1)
    assert told.code() == ("PROVIDER_ERROR", True, 200)
    assert (done["end"], done["attempts"][0]["fault"]) == ("error", "error_body")


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        pytest.param(b"7", 7, 7, id="seconds"),
        pytest.param(b"\xb2", None, None, id="a superscript"),
        pytest.param(b"9" * 400, 1e9, 1e9, id="a number without end"),
        pytest.param(b"-5", None, None, id="less than nothing"),
        pytest.param(b"Mon, 01 Jan 0001 00:00:00 -0000", 0, 0, id="before time"),
        pytest.param(b"Mon, 01 Jan 2030 00:00:00 +99999999999999", None, None, id="no zone"),
    ],
)
async def test_failure_when_retry_after_cannot_be_read_is_the_backends_and_not_ours(
    said: bytes, least: float | None, most: float | None
) -> None:
    """It was a 500 of the proxy's own."""
    refusal = b"HTTP/1.1 503 Busy\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n" % said
    async with RawBackend(answer(refusal)) as backend, proxy(backend) as p:
        told = await ask(p, False)
        assert p.events("server.failed") == []
    assert told.code() == ("PROVIDER_BUSY", True, 503)
    wait = told.failure.get("retry_after")
    if least is None or most is None:
        assert wait is None
    else:
        assert wait is not None
        assert least <= wait <= most


# -- an answer of any size, in pieces of any size


def test_reader_when_an_answer_comes_in_very_many_pieces_copies_none_of_them_again() -> None:
    """8 MiB in pieces of 1 KiB took 22 s of the loop: each piece copied all before it."""
    found = Reader(cast(ClientSink, None), stream=False)
    first, pieces = found._rest, 1024
    for _ in range(pieces):
        found.write(b"x" * 1024)
    assert len(found._rest) == pieces * 1024
    assert found._rest is first


def in_pieces(events: Sequence[bytes], size: int) -> Script:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(SSE_HEAD)
            data = b"".join(events)
            for at in range(0, len(data), size):
                await conn.send(chunk(data[at : at + size]))
            await conn.send(LAST_CHUNK)

    return script


@BOTH
async def test_event_when_it_is_long_and_comes_in_pieces_is_read_whole(stream: bool) -> None:
    text = "word " * (200 << 10)
    script = in_pieces([piece({"content": text}), piece({}, "stop"), DONE], 16 << 10)
    async with RawBackend(script) as backend, proxy(backend) as p:
        told = await ask(p, stream)
    assert told.last["success"]
    assert told.text == text


@BOTH
async def test_event_when_it_never_ends_is_refused_before_it_fills_the_memory(stream: bool) -> None:
    script = in_pieces([*SAID, b"data: " + b"x" * (EVENT_CAP + (2 << 20)), b"\n\n", DONE], 1 << 18)
    async with RawBackend(script) as backend, proxy(backend) as p:
        told = await ask(p, stream)
        (done,) = await p.exchanges(1)
    assert not told.last["success"]
    assert "too large" in told.failure["message"]
    assert done["attempts"][0]["fault"] == "malformed"
