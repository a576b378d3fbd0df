"""What RunPod tells of a job, and what its failure means.

A failed job comes behind a 200, and so does a completed one whose output is an error: worker-vllm
yields `{"error": {"message": "vLLM returned HTTP 400: …"}}`, which the SDK's loop turns into a
failed job with Python's repr of it. A refusal of the model's server is then an answer like any
other. A handler of one's own refuses a request by returning `{"error": "…"}`. Whatever else a
worker says of its failure may name hosts and keys: it stays here, but for an exception's name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from beacon_proxy.contracts import Fault

from ..reading import load

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
_ERROR_MAX = 64 << 10  # characters of a worker's error that are looked at
_SHOWN_MAX = 200
_SERVER = re.compile(r"vLLM returned HTTP (\d{3})\b[: ]*(.*)", re.DOTALL)
_CLASS = re.compile(r"[A-Za-z_][\w.]{0,99}", re.ASCII)
# What a handler, or RunPod itself, says of the worker and not of the request.
_OF_WORKER = re.compile(
    r"traceback|exception|cuda|gpu|out of memory|oom|time[d-]? ?out|connect|refused|unreachable"
    r"|retries|internal|unavailable|overload|busy|engine|worker|crash|killed|disk|no space",
    re.IGNORECASE,
)
# A sentence about the request; nothing in it can be a host, a path or a key.
_HARMLESS = re.compile(r"(?:[\w ,'\"()<>%-]|[.:](?= |$)){1,200}")
_LONG_WORD = re.compile(r"\w{21}")
_TRACE = "\ntraceback:"  # run_job_generator of the SDK


@dataclass(frozen=True, slots=True)
class Job:
    """One answer of `/run`, `/runsync`, `/status` or `/stream`."""

    id: str = ""
    status: str = ""
    output: Any = None
    pieces: tuple[Any, ...] = ()  # of `/stream`: what was yielded since the last look
    error: Any = None
    delay: float | None = None  # s in the queue; None: not told
    ran: float | None = None  # s of its execution, once it is over
    large: bool = False  # to be read in a thread

    @classmethod
    def read(cls, document: Any, *, large: bool = False) -> Job | None:
        """Read one; None where it is none.

        `/stream` answers with an object or, as the documentation prints it, with the bare list of
        pieces, which tells no status.
        """
        if isinstance(document, list):
            return cls(pieces=tuple(_outputs(document)), large=large)
        if not isinstance(document, Mapping) or not isinstance(document.get("status"), str):
            return None
        identity = document.get("id")
        stream = document.get("stream")
        return cls(
            id=identity if isinstance(identity, str) else "",
            status=document["status"],
            output=document.get("output"),
            pieces=tuple(_outputs(stream)) if isinstance(stream, list) else (),
            error=document.get("error"),
            delay=_seconds(document.get("delayTime")),
            ran=_seconds(document.get("executionTime")),
            large=large,
        )

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def queued(self) -> bool:
        return self.status == "IN_QUEUE"

    def failure(self) -> Failure | None:
        """Why there is no good output; None: there is, or it is still to come."""
        if self.status == "TIMED_OUT":
            return Failure(Fault.TIMEOUT, "the job ran out of its executionTimeout")
        if self.status == "CANCELLED":
            # By somebody's hand: that says nothing against the endpoint.
            return Failure(Fault.BUSY, "the job was cancelled at RunPod")
        if self.status == "FAILED" or self.error:
            return failure_of(self.error)
        if self.status == "COMPLETED":
            return error_in(self.output)
        return None


def _seconds(value: Any) -> float | None:
    """Of a number of ms."""
    return value / 1000 if type(value) in (int, float) else None


def _outputs(items: list[Any]) -> Iterable[Any]:
    return (item["output"] for item in items if isinstance(item, Mapping) and "output" in item)


@dataclass(frozen=True, slots=True)
class Failure:
    """A job without a good answer.

    Attributes:
        fault, detail: for the log; the client may be told, so it names no host and no traceback.
        status, body: what the model's server, or the handler, answered to the request, where it was
            that; status 0: it was not. Without a body `detail` is all that was said.
    """

    fault: Fault
    detail: str
    status: int = 0
    body: bytes = b""


class Failed(Exception):
    """There is no answer, or no more of it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def error_in(output: Any) -> Failure | None:
    """The failure in what a worker yielded; None where it is none."""
    items = output if isinstance(output, list) else [output]
    for item in items:
        if isinstance(item, Mapping) and item.get("error") and not item.get("choices"):
            return failure_of(item["error"])
    return None


def failure_of(error: Any) -> Failure:
    """What a worker's error means: an object, a text, or a text that holds one."""
    told, kind = _opened(error), None
    if isinstance(told, Mapping):
        if raised := told.get("error_type"):  # run_job of the SDK, with host and traceback
            return _raised(str(raised).removeprefix("<class '").removesuffix("'>"))
        kind = told.get("type")
        told = next((told[k] for k in ("message", "detail") if isinstance(told.get(k), str)), "")
    text = told if isinstance(told, str) else ""
    if found := _SERVER.search(text[:_ERROR_MAX]):
        return _of_server(int(found[1]), found[2])
    if kind == "worker_error":  # worker-vllm's words for an exception of its own
        return Failure(Fault.ERROR_BODY, "the job failed: worker_error")
    text, trace, lines = text.partition(_TRACE)
    if trace:
        return _raised(lines.strip().rpartition("\n")[2].partition(":")[0])
    if told is not error or not text.strip() or _OF_WORKER.search(text[:_ERROR_MAX]):
        return Failure(Fault.ERROR_BODY, "the job failed")
    words = text.strip()
    if not _HARMLESS.fullmatch(words) or _LONG_WORD.search(words):
        words = "the worker says that the request is at fault"
    return Failure(Fault.STATUS, words, 400)


def _raised(name: str) -> Failure:
    shown = name if _CLASS.fullmatch(name) else "an exception"
    return Failure(Fault.ERROR_BODY, f"the worker raised {shown}")


def _opened(error: Any) -> Any:
    """The object inside a text: JSON, or Python's repr of a dict (handle_job of the SDK)."""
    if not isinstance(error, str) or not error.startswith("{") or len(error) > _ERROR_MAX:
        return error
    document = load(error.encode(errors="replace"))
    if document is None:
        try:
            document = ast.literal_eval(error)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return error
    return document


def _of_server(status: int, said: str) -> Failure:
    """An answer of the model's server, told by worker-vllm in words."""
    detail = f"the model's server answers {status}"
    if not 400 <= status < 600:
        return Failure(Fault.ERROR_BODY, detail)
    document: Any = None
    if status >= 500:  # its own failure: in whatever words, they are not for clients
        document = {"error": {"message": detail, "type": "server_error", "code": None}}
        return Failure(Fault.STATUS, detail, status, json.dumps(document).encode())
    start = said.find("{")
    if start >= 0:
        try:
            document, _ = json.JSONDecoder().raw_decode(said[start:])
        except (ValueError, RecursionError):
            document = None  # cut short, or no JSON
    if not isinstance(document, Mapping):
        message = said.strip()[:_SHOWN_MAX] or detail
        kind = "invalid_request_error"
        document = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return Failure(Fault.STATUS, detail, status, json.dumps(document).encode())
