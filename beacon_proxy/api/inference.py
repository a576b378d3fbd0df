"""`POST /inference`: the one route that is translated, for clients that know no dialect.

The request runs through the same pipeline as any other; only its ends differ. Each provider makes
up what its backend is asked, and reads the answer, or each event of it, back into text. A failure
of the backends is told inside a 200, because that is where this route's clients look for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from time import time
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..contracts import Backend, Dialect, End, Exchange, Fault, Headers, Prompt, Provider, Reading
from ..errors import Limited, ModelNotFound, NoBackend, Overloaded, ProxyError, UpstreamError
from ..ops.telemetry import cost_usd
from ..regions import canonical_region
from ..routing.attempt import Attempt
from ..routing.chooser import Run
from ..routing.fleet import Fleet
from ..routing.pipeline import Pipeline
from ..wire.answer import Answer
from ..wire.expect import is_event_stream
from ..wire.headers import find
from ..wire.relay import ClientSink
from ..wire.request import Translated
from .naming import answered_by

PATHS = ("/inference", "/v1/inference", "/api/inference", "/api/v1/inference")
ANSWER_WITHIN = 290.0  # s; the oldest clients give up at 300 and post again
ANSWER_CAP = 16 << 20  # bytes of a backend's answer, and of one event
TRACE_ID = r"^[!-~]{1,128}$"  # it becomes a header field
_OPTIONAL_TEXTS = ("region_preference", "trace_id")
_JSON = (b"Content-Type", b"application/json")
_NDJSON = (b"Content-Type", b"application/x-ndjson")


class Request(BaseModel):
    """What a client sends; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(min_length=1)
    prompt: str
    temperature: float = Field(default=0.1, ge=0, le=100)
    max_tokens: int = Field(default=512, ge=1, le=10_000_000)
    region_preference: str | None = None
    cost_priority: bool | None = None
    stream: bool = False
    trace_id: str | None = Field(default=None, pattern=TRACE_ID)

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, content: Any) -> Any:
        """null, and a blank text where a text is optional, are as good as left out."""
        if not isinstance(content, dict):
            return content
        return {
            key: value
            for key, value in content.items()
            if value is not None and not (key in _OPTIONAL_TEXTS and str(value).strip() == "")
        }


class Reader:
    """The sink of a translated answer: reads it back, and passes the text on where it streams.

    Attributes:
        reading: the last thing read: of a document all of it.
        problem: why the answer is no good, where it is not.
    """

    def __init__(self, sink: ClientSink, stream: bool) -> None:
        self._sink = sink
        self._stream = stream
        self._events = False
        self._rest = b""
        self._added = b""
        self._texts: list[str] = []
        self._size = 0
        self.attempt: Attempt | None = None
        self.provider: Provider | None = None
        self.answer: Answer | None = None
        self.reading = Reading()
        self.problem: str | None = None

    def join(self, attempt: Attempt, provider: Provider) -> None:
        self.attempt, self.provider = attempt, provider

    def start(self, answer: Answer, added: bytes) -> None:
        self.answer = answer
        self._added = added
        self._rest, self.problem, self.reading = b"", None, Reading()
        self._texts, self._size = [], 0
        good = (answer.status or 0) < 300
        self._events = good and is_event_stream(find(answer.headers, b"content-type") or b"")

    def write(self, data: bytes) -> None:
        self._size += len(data)
        held = self._size if not self._stream else len(self._rest)
        if held > ANSWER_CAP and self.attempt is not None and self.attempt.answer is not None:
            self.problem = "the answer is too large"
            self.attempt.answer.cut(Fault.MALFORMED, self.problem)
            return
        self._rest += data
        if self._events:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._event(line.strip())

    def _event(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            line = line[5:].strip()
        elif not line.startswith(b"{"):
            return  # a comment, an event's name, a blank line
        if line == b"[DONE]":
            return
        read = self._read(line)
        usage = read.usage or self.reading.usage
        if not self._stream:
            self._texts.append(read.text)
        self.reading = Reading("", read.done, usage, read.error, read.extra or self.reading.extra)
        if read.error is not None:
            self.problem = read.error
        if self._stream and read.text:
            self._line({"response": read.text, "done": False})

    def _read(self, data: bytes) -> Reading:
        assert self.attempt is not None
        assert self.provider is not None
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            return Reading(error="the backend's answer is not a JSON object")
        return self.provider.read(self.attempt.backend, document)

    def finish(self, trailers: Headers) -> None:
        if self._events:
            self.reading = replace(self.reading, text="".join(self._texts))
        elif self.problem is None:
            self.reading = self._read(self._rest)
            self.problem = self.reading.error
        self._rest = b""

    def moved(self) -> bool:
        return self._sink.moved()

    def fail(self, event: bytes | None) -> None:
        self.problem = self.problem or "the backend's answer broke off"

    def _line(self, content: Mapping[str, Any]) -> None:
        if not self._sink.status:
            self._sink.begin_own(200, (_NDJSON, (b"X-Accel-Buffering", b"no")), self._added)
        self._sink.write(orjson.dumps(content) + b"\n")

    def send(self, content: dict[str, Any], *, broken: bool) -> None:
        """Send the last word: the whole answer, or the last line of a stream."""
        if not self._stream:
            body = orjson.dumps(content)
            self._sink.send_own(200, (_JSON,), body, self._added)
            return
        if self.problem is None and self.reading.text and not self._events:
            self._line({"response": self.reading.text, "done": False})
        self._line({**content, "response": "", "done": True})
        if broken:
            self._sink.fail(None)
        else:
            self._sink.finish(())


class _Client:
    """`pipeline.Client` of a translated exchange."""

    def __init__(self, exchange: Exchange, fleet: Fleet, sink: ClientSink, reader: Reader) -> None:
        self._exchange, self._fleet, self._sink, self._reader = exchange, fleet, sink, reader
        self._stream = exchange.stream

    def commit(self, attempt: Attempt, attempts: int) -> None:
        backend = attempt.backend
        answer = attempt.answer
        assert answer is not None
        self._reader.join(attempt, self._fleet.providers[backend.provider])
        self._exchange.answered = backend
        answer.commit(self._reader, answered_by(backend, attempts))
        if self._stream and not answer.ended:
            self._sink.flow_from(attempt.flow)


class Inference:
    """The handler of `PATHS`."""

    def __init__(self, pipeline: Pipeline, fleet: Fleet) -> None:
        self._pipeline = pipeline
        self._fleet = fleet

    async def run(self, exchange: Exchange, body: bytes, sink: ClientSink, run: Run) -> None:
        """Answer one request: always with a 200, but for a request that is itself invalid."""
        exchange.dialect = Dialect.BEACON
        exchange.inference = True
        try:
            request = Request.model_validate_json(body)
        except ValidationError as exc:
            run.end, run.reason = End.ERROR, "invalid_request"
            sink.send_own(422, (_JSON,), _invalid(exc))
            return
        self._fill(exchange, request)
        reader = Reader(sink, request.stream)
        client = _Client(exchange, self._fleet, sink, reader)
        error: ProxyError | None = None
        try:
            await self._pipeline.run(exchange, Translated(exchange), client, run)
        except ProxyError as exc:
            error = exc
        failure = _failure(exchange, reader, error)
        if run.end is not End.CLIENT_CLOSED:
            run.end = End.COMPLETE if failure is None else End.ERROR
        begun = bool(sink.status)
        reader.send(_content(exchange, reader, failure), broken=failure is not None and begun)

    def _fill(self, exchange: Exchange, request: Request) -> None:
        exchange.prompt = Prompt(
            request.model, request.prompt, request.temperature, request.max_tokens, request.stream
        )
        exchange.model, exchange.stream = request.model, request.stream
        if request.region_preference is not None:
            exchange.region = canonical_region(request.region_preference)
        if request.cost_priority is not None:
            exchange.cost_priority = request.cost_priority
        given = (find(exchange.headers, b"x-trace-id") or b"").decode("latin-1")
        exchange.trace_id = request.trace_id or (given if re.match(TRACE_ID, given) else None)
        if exchange.deadline is None:
            exchange.deadline = exchange.started + ANSWER_WITHIN
            exchange.deadline_is_ours = True


def _invalid(exc: ValidationError) -> bytes:
    """FastAPI's shape: the old router's clients parse it."""
    detail = [
        {
            "type": error["type"],
            "loc": ["body", *error["loc"]],
            "msg": error["msg"],
            "input": error["input"]
            if isinstance(error["input"], str | int | float | dict)
            else None,
        }
        for error in exc.errors(include_url=False, include_context=False)
    ]
    return json.dumps({"detail": detail}).encode()  # orjson refuses the numbers that are refused


_CODES: dict[type[ProxyError], str] = {
    NoBackend: "PROVIDER_UNAVAILABLE",
    Overloaded: "CAPACITY_EXCEEDED",
    ModelNotFound: "MODEL_NOT_FOUND",
    Limited: "LIMIT_EXCEEDED",
}
_FAULT_CODES = {
    Fault.TIMEOUT: "TIMEOUT",
    Fault.DEADLINE: "TIMEOUT",
    Fault.DNS: "CONNECTION_FAILED",
    Fault.REFUSED: "CONNECTION_FAILED",
    Fault.TLS: "CONNECTION_FAILED",
    Fault.RESET: "CONNECTION_FAILED",
    Fault.CLOSED: "CONNECTION_FAILED",
    Fault.MALFORMED: "INVALID_RESPONSE",
    Fault.NOT_JSON: "INVALID_RESPONSE",
    Fault.EMPTY: "INVALID_RESPONSE",
    Fault.TRUNCATED: "INCOMPLETE_RESPONSE",
    Fault.BUSY: "RATE_LIMITED",
    Fault.LOADING: "PROVIDER_WARMING",
    Fault.UNAUTHORIZED: "PROVIDER_UNAUTHORIZED",
    Fault.GONE: "PROVIDER_GONE",
}
# Asking again later may help: not where the credential, the app or the request is at fault.
_LASTING = frozenset({Fault.UNAUTHORIZED, Fault.GONE})


def _failure(exchange: Exchange, reader: Reader, error: ProxyError | None) -> dict[str, Any] | None:
    """What went wrong, as the portal shows it; None where nothing did."""
    last = exchange.attempts[-1] if exchange.attempts else None
    status = reader.answer.status if reader.answer is not None else None
    refused = status is not None and status >= 400
    if error is None and reader.problem is None and not refused:
        return None
    backend = last.backend if last is not None else None
    fault = last.fault if last is not None else None
    code, transient = _FAULT_CODES.get(fault, "PROVIDER_ERROR") if fault else "PROVIDER_ERROR", True
    message = reader.problem or "the backend failed"
    if error is not None:
        message = error.message
        if not isinstance(error, UpstreamError):
            code = _CODES.get(type(error), "PROVIDER_ERROR")
            transient = not isinstance(error, ModelNotFound)
    elif refused and status is not None and status < 500 and status not in (408, 429):
        code, transient = "REQUEST_REJECTED", False
    if fault in _LASTING and not isinstance(error, NoBackend | Overloaded):
        transient = False
    failure: dict[str, Any] = {
        "code": code,
        "stage": str(last.stage) if last is not None else "queue",
        "component": "provider" if last is not None else "router",
        "message": message,
        "provider": backend.name if backend else None,
        "provider_type": backend.provider if backend else None,
        "region": backend.region if backend else exchange.region,
        "model": exchange.model,
        "transient": transient,
        "timestamp": time(),
    }
    if last is not None and last.status is not None:
        failure["http_status"] = last.status
    wait = error.retry_after if error is not None else last.retry_after if last else None
    if wait is not None:
        failure["retry_after"] = wait
    return failure


def _content(exchange: Exchange, reader: Reader, failure: dict[str, Any] | None) -> dict[str, Any]:
    attempts = exchange.attempts
    last = attempts[-1] if attempts else None
    backend: Backend | None = last.backend if last is not None else None
    metadata: dict[str, Any] = {
        **reader.reading.extra,
        "provider_type": backend.provider if backend else None,
        "region": backend.region if backend else None,
        "model": exchange.model,
        "attempts": len(attempts),
    }
    usage = reader.reading.usage
    if usage is not None:
        metadata["tokens_generated"] = usage.output
        metadata["tokens_prompt"] = usage.input
    if failure is not None:
        metadata["failure"] = failure
    return {
        "success": failure is None,
        "response": reader.reading.text if failure is None else "",
        "error": failure["message"] if failure else None,
        "error_code": failure["code"] if failure else None,
        "failure": failure,
        "provider_used": backend.name if backend else None,
        "inference_time": last.duration if last is not None else 0.0,
        "cost_estimate": sum([cost_usd(outcome) for outcome in attempts], 0.0),
        "metadata": metadata,
    }
