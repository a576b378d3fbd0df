"""`POST /inference`: the one route that is translated, for clients that know no dialect.

The request runs through the same pipeline as any other; only its ends differ. Each provider makes
up what its backend is asked, and reads the answer, or each event of it, back into text. A failure
of the backends is told inside a 200, because that is where this route's clients look for it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..contracts import Dialect, End, Exchange, Prompt
from ..errors import ProxyError, UpstreamError
from ..fleet.fleet import Fleet
from ..regions import canonical_region
from ..routing.attempt import Attempt
from ..routing.chooser import Run
from ..routing.pipeline import Pipeline
from ..wire.headers import find
from ..wire.relay import ClientSink
from ..wire.request import Translated
from .naming import answered_by
from .reader import JSON, Reader
from .told import content_of, failure_of

PATHS = ("/inference", "/v1/inference", "/api/inference", "/api/v1/inference")
ANSWER_WITHIN = 290.0  # s; the oldest clients give up at 300 and post again
TRACE_ID = r"^[!-~]{1,128}$"  # it becomes a header field
_OPTIONAL_TEXTS = ("region_preference", "trace_id")


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


class _Client:
    """`pipeline.Client` of a translated exchange."""

    def __init__(self, exchange: Exchange, fleet: Fleet, sink: ClientSink, reader: Reader) -> None:
        self._exchange, self._fleet, self._sink, self._reader = exchange, fleet, sink, reader
        self._stream = exchange.stream

    def commit(self, attempt: Attempt, attempts: int) -> None:
        backend = attempt.backend
        answer = attempt.answer
        assert answer is not None
        self._reader.join(backend, self._fleet.providers[backend.provider])
        self._exchange.answered = backend
        named = answered_by(backend.name, backend.provider, backend.region, attempts)
        answer.commit(self._reader, named)
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
            sink.send_own(422, (JSON,), _invalid(exc))
            return
        self._fill(exchange, request)
        reader = Reader(sink, request.stream)
        client = _Client(exchange, self._fleet, sink, reader)
        error: ProxyError | None = None
        try:
            await self._pipeline.run(exchange, Translated(exchange), client, run)
        except ProxyError as exc:
            error = exc
            if not isinstance(exc, UpstreamError):
                run.reason = exc.reason
        failure = failure_of(exchange, reader, error)
        if run.end is not End.CLIENT_CLOSED:
            run.end = End.COMPLETE if failure is None else End.ERROR
        begun = bool(sink.status)
        reader.send(content_of(exchange, reader, failure), broken=failure is not None and begun)

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
