"""What an answer says about its backend, and whether another may be asked.

Four classes of failure, never mixed (`contracts.Verdict`): the caller's fault, back-pressure, a
strike, and nothing at all.
"""

from __future__ import annotations

import json
import re
import zlib
from datetime import UTC
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, NamedTuple

import orjson

from ..contracts import Backend, Candidate, Exchange, Fault, Finding, Provider, Reading, Verdict
from ..wire.answer import Answer
from ..wire.expect import HOLD_CAP
from ..wire.headers import AnswerHead, find
from ..wire.usage import NOTHING, load_of, told_by, told_of

_VERDICTS = {
    Fault.BUSY: Verdict.BUSY,
    Fault.LOADING: Verdict.BUSY,
    Fault.DEADLINE: Verdict.NEUTRAL,
    Fault.CLIENT_CLOSED: Verdict.NEUTRAL,
}
_NO_MODEL = re.compile(
    rb"model_not_found|model\b.{0,200}\bnot (?:found|exist)|not_found_error.{0,80}model\b",
    re.IGNORECASE | re.DOTALL,
)
_DIGITS = re.compile("[0-9]+")  # str.isdigit takes a superscript, too
_WAIT_MOST = 1e9  # s; a number of any length is one
_BUSY_STATUSES = (429, 503, 529)
_BUSY_WORDS = ("overloaded", "rate_limit", "unavailable", "busy")


class Judgement(NamedTuple):
    """The reading of one answer, as far as it was held."""

    verdict: Verdict
    fault: Fault | None = None
    retry_after: float | None = None  # s
    detail: str = ""
    elsewhere: bool = False  # another backend may do better with the same request
    lacks_model: bool = False  # it said so, and no operator had said that it serves it


_GOOD = Judgement(Verdict.GOOD)


def of_fault(fault: Fault, detail: str = "") -> Judgement:
    """Judge what never became an answer."""
    verdict = _VERDICTS.get(fault, Verdict.STRIKE)
    return Judgement(verdict, fault, detail=detail, elsewhere=verdict is not Verdict.NEUTRAL)


def judge(
    exchange: Exchange, candidate: Candidate, provider: Provider, answer: Answer
) -> Judgement:
    """Judge a held answer: by its fault, its provider's own words, its status, its body."""
    if answer.fault is not None:
        return of_fault(answer.fault, answer.detail)
    backend, head, body = candidate.backend, answer.head, answer.body()
    status = head.status if head is not None else 0
    if status == 101:
        return _GOOD
    if status >= 300 or exchange.inference:
        headers = head.headers if head is not None else ()
        found = provider.judge(backend, status, headers, body)
        if found is not None:
            return _of_finding(found, answer)
        if exchange.prompt is not None and status < 400 and head is not None:
            unasked = _judge_unasked(status, head)
            if unasked is not None:
                return unasked
    if status >= 400:
        asked = backend.models is None  # and what it said may be out of date
        if status == 404 and exchange.inference and asked and _lacks_model(answer):
            return Judgement(Verdict.CALLER, Fault.STATUS, elsewhere=True, lacks_model=True)
        return _judge_status(answer, status)
    if not exchange.inference or status >= 300 or not answer.readable:
        return _GOOD
    if answer.watch is not None:
        return _judge_stream(answer)
    judgement = _judge_document(answer, body)
    if exchange.prompt is not None and judgement is _GOOD and answer.complete:
        return _judge_reading(backend, provider, answer, body)
    return judgement


def _of_finding(found: Fault | Finding, answer: Answer) -> Judgement:
    if not isinstance(found, Finding):
        found = Finding(found)
    verdict, wait = _VERDICTS.get(found.fault, Verdict.STRIKE), _retry_after(answer)
    wait = found.retry_after if wait is None else wait
    return Judgement(verdict, found.fault, wait, found.detail, elsewhere=True)


def _judge_unasked(status: int, head: AnswerHead) -> Judgement | None:
    """On the translated route nobody goes where a redirect points, and no coding was offered."""
    if status >= 300:
        return Judgement(Verdict.STRIKE, Fault.STATUS, detail="redirects", elsewhere=True)
    if head.coding is not None and head.coding.lower() != b"identity":
        detail = "a content coding that was not asked for"
        return Judgement(Verdict.STRIKE, Fault.MALFORMED, detail=detail, elsewhere=True)
    return None


def _lacks_model(answer: Answer) -> bool:
    try:
        body = _decoded(answer.body(), answer.head.coding if answer.head is not None else None)
    except zlib.error:
        return False
    return body is not None and _NO_MODEL.search(body) is not None


def _judge_status(answer: Answer, status: int) -> Judgement:
    if status in _BUSY_STATUSES:
        return Judgement(Verdict.BUSY, Fault.BUSY, _retry_after(answer), elsewhere=True)
    if status >= 500:
        return Judgement(Verdict.STRIKE, Fault.STATUS, _retry_after(answer), elsewhere=True)
    return Judgement(Verdict.CALLER, Fault.STATUS)


def _judge_stream(answer: Answer) -> Judgement:
    watch = answer.watch
    assert watch is not None
    if watch.error and not watch.content:
        return _judge_error(watch.error_data)
    if answer.complete and not watch.content:
        return Judgement(
            Verdict.STRIKE, Fault.EMPTY, detail="the stream said nothing", elsewhere=True
        )
    if answer.complete and not watch.whole:
        return Judgement(Verdict.STRIKE, Fault.TRUNCATED, detail="no end marker", elsewhere=True)
    return _GOOD


def _judge_document(answer: Answer, body: bytes) -> Judgement:
    """Judge a whole document, and note what it says it cost."""
    if not answer.complete:
        return _GOOD  # above the cap, or passed on because nobody else stands by
    if answer.head is not None and answer.head.coding is not None:
        try:
            decoded = _decoded(body, answer.head.coding)
        except zlib.error:
            detail = "the compressed body is broken"
            return Judgement(Verdict.STRIKE, Fault.TRUNCATED, detail=detail, elsewhere=True)
        if decoded is None:
            return _GOOD
        body = decoded
    try:
        document = loads(body)
    except RecursionError:
        return _GOOD  # deeper than any answer known; whoever asked for it may read it
    except ValueError:
        if not body.strip():
            detail = "a 200 without a body"
            return Judgement(Verdict.STRIKE, Fault.EMPTY, detail=detail, elsewhere=True)
        return Judgement(Verdict.STRIKE, Fault.NOT_JSON, detail="a 200 not JSON", elsewhere=True)
    if not isinstance(document, dict):
        return _GOOD
    if document.get("error"):
        return _judge_error(body)
    answer.told = told_by(document)
    if "load_duration" in document:
        answer.cold_start = load_of(document)
    return _GOOD


def _judge_reading(backend: Backend, provider: Provider, answer: Answer, body: bytes) -> Judgement:
    """On the translated route an answer must also be one that its provider can read."""
    reading = read_document(backend, provider, body)
    fault, detail = fault_in(reading)
    if fault is not None:
        answer.told = NOTHING  # nothing in it is believed
        return Judgement(Verdict.STRIKE, fault, detail=detail, elsewhere=True)
    if reading is not None and reading.usage is not None:
        answer.told = told_of(reading.usage)
    return _GOOD


def read_document(backend: Backend, provider: Provider, body: bytes) -> Reading | None:
    """An answer, or an event of one, as its provider reads it; None where it cannot be read.

    That is what is no JSON object, and one that its provider stumbles over.
    """
    try:
        document = loads(body)
        return provider.read(backend, document) if isinstance(document, dict) else None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def fault_in(reading: Reading | None) -> tuple[Fault | None, str]:
    """Why a whole answer is no good on the translated route, and words for the log."""
    if reading is None:
        return Fault.NOT_JSON, "the answer is no JSON object that its provider can read"
    if reading.error is not None:
        return Fault.ERROR_BODY, "an error behind a 200"
    if not (reading.text or reading.done or reading.usage):
        return Fault.EMPTY, "the answer says nothing known"
    return None, ""


def _decoded(body: bytes, coding: bytes | None) -> bytes | None:
    """The document inside a content coding; None where it cannot be read within bounds.

    Only to judge it: what the client gets is the body as it came. Raises zlib.error where the coded
    body is cut or spoilt.
    """
    if coding is None or coding.lower() == b"identity":
        return body
    if coding.lower() not in (b"gzip", b"x-gzip", b"deflate"):
        return None
    inflate = zlib.decompressobj(wbits=47)  # finds out by itself which of the two
    document = inflate.decompress(body, HOLD_CAP)
    if not inflate.eof and len(document) < HOLD_CAP:
        raise zlib.error("cut short")
    return document if inflate.eof else None


def loads(body: bytes) -> Any:
    """Parse JSON; also what Python servers write for it: NaN, Infinity, lone surrogates.

    Raises ValueError, and RecursionError where it is nested too deeply.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)


def _judge_error(data: bytes) -> Judgement:
    """An error behind a 200."""
    try:
        document: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        document = {}
    error = document.get("error") if isinstance(document, dict) else None
    words = f"{error.get('type')} {error.get('code')}" if isinstance(error, dict) else str(error)
    if any(word in words.lower() for word in _BUSY_WORDS) or words.endswith((" 429", " 503")):
        return Judgement(Verdict.BUSY, Fault.BUSY, detail="busy, behind a 200", elsewhere=True)
    return Judgement(
        Verdict.STRIKE, Fault.ERROR_BODY, detail="an error behind a 200", elsewhere=True
    )


def _retry_after(answer: Answer) -> float | None:
    """Seconds of the Retry-After field, in either of its forms (RFC 9110 10.2.3)."""
    value = find(answer.head.headers if answer.head is not None else (), b"retry-after")
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    if _DIGITS.fullmatch(text):
        return min(float(text), _WAIT_MOST)
    try:
        until = parsedate_to_datetime(text)
        if until.tzinfo is None:  # every date of HTTP is UTC, said or not
            until = until.replace(tzinfo=UTC)
        return min(max(0.0, until.timestamp() - time()), _WAIT_MOST)
    except (ValueError, TypeError, OverflowError):
        return None
