"""The provider against a Conveyor of the tests, without a proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from beacon_provider_conveyor.provider import CHAT, Conveyor
from conveyor_service import TOKEN, Service, serving

from beacon_proxy.contracts import (
    Backend,
    Dialect,
    Fault,
    Headers,
    Prompt,
    Submission,
    Usage,
    Warmth,
)

PROVIDER = Conveyor()
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Recorded:
    """A `contracts.Reply` that writes down what it is told."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = ()
        self.pieces: list[bytes] = []
        self.ended = self.woken = False
        self.spoke = asyncio.Event()
        self.fault: Fault | None = None
        self.cold: float | None = None
        self.bills: list[tuple[float, bool]] = []

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def piece(self, data: bytes) -> None:
        assert self.status, "a piece before the head"
        self.pieces.append(data)
        self.spoke.set()

    def end(self) -> None:
        self.ended = True

    def fail(self, fault: Fault, detail: str = "") -> None:
        self.fault = fault

    async def room(self) -> None: ...

    def waking(self) -> None:
        self.woken = True

    def started_cold(self, seconds: float) -> None:
        self.cold = seconds

    def billed(self, seconds: float, *, running: bool = False) -> None:
        self.bills.append((seconds, running))


@dataclass
class Place:
    service: Service
    backend: Backend
    session: aiohttp.ClientSession

    def begin(self, submission: Submission) -> tuple[Recorded, asyncio.Task[None]]:
        reply = Recorded()
        carry = PROVIDER.carry(self.backend, submission, reply, self.session)
        return reply, asyncio.create_task(carry)

    async def carry(self, submission: Submission) -> Recorded:
        reply, carrying = self.begin(submission)
        await carrying
        return reply


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with serving() as (service, url), aiohttp.ClientSession() as session:
        port = int(url.rpartition(":")[2])
        backend = Backend("c-1", "conveyor", url, "http", "127.0.0.1", port, api_key=TOKEN)
        yield Place(service, backend, session)


def chat(body: Any = ASKED, *, stream: bool = True, **more: Any) -> Submission:
    """A client's chat request, as the core hands it over."""
    given: dict[str, Any] = {
        "id": "x-1",
        "method": "POST",
        "path": CHAT,
        "target": CHAT.encode(),
        "headers": (),
        "body": json.dumps(body).encode(),
        "dialect": Dialect.OPENAI,
        "stream": stream,
        "prompt": None,
        "deadline": inf,
        "patience": inf,
    }
    return Submission(**given | more)


async def test_carry_when_streamed_is_events_with_an_end(place: Place) -> None:
    reply = await place.carry(chat({**ASKED, "stream_options": {"include_usage": True}}))
    events = [json.loads(e) for e in b"".join(reply.pieces).split(b"data: ")[1:-1]]
    said = [e["choices"][0]["delta"].get("content") for e in events if e["choices"]]
    assert (reply.status, reply.headers) == (200, ((b"Content-Type", b"text/event-stream"),))
    assert said == ["hel", "lo", None]
    assert events[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert reply.pieces[-1].endswith(b"data: [DONE]\n\n")
    assert reply.ended


async def test_carry_when_not_streamed_is_one_document(place: Place) -> None:
    reply = await place.carry(chat(stream=False))
    (document,) = map(json.loads, reply.pieces)
    assert document["choices"][0]["message"]["content"] == "hello"
    assert document["usage"]["completion_tokens"] == 2


async def test_carry_when_streamed_and_nothing_is_said_still_has_its_end(place: Place) -> None:
    place.service.words = []
    reply = await place.carry(chat())
    assert (reply.status, reply.ended) == (200, True)


@pytest.mark.parametrize("stream", [True, False])
async def test_carry_when_it_is_a_prompt_is_what_read_reads(place: Place, stream: bool) -> None:
    prompt = Prompt("m", "Say hello.", stream=stream)
    asked = chat(stream=stream, prompt=prompt, dialect=Dialect.BEACON)
    reply = await place.carry(replace(asked, body=b""))
    lines = b"".join(reply.pieces).splitlines()
    readings = [PROVIDER.read(place.backend, json.loads(line)) for line in lines]
    assert "".join(reading.text for reading in readings) == "hello"
    assert (readings[-1].done, readings[-1].usage) == (True, Usage(5, 2))
    assert readings[-1].extra == {"job_id": "j-1"}
    assert place.service.jobs["j-1"].asked["messages"][0]["content"] == "Say hello."


@pytest.mark.parametrize("body", [b"{nonsense", b"[]", b'{"model": "m"}'])
async def test_carry_when_the_client_errs_is_a_400_and_no_job(place: Place, body: bytes) -> None:
    reply = await place.carry(replace(chat(), body=body))
    assert (reply.status, reply.ended, place.service.jobs) == (400, True, {})


async def test_carry_when_refused_passes_status_and_wait_on(place: Place) -> None:
    full = {"message": "no room"}
    place.service.refusal = web.json_response(full, status=429, headers={"Retry-After": "7"})
    reply = await place.carry(chat())
    assert (reply.status, (b"Retry-After", b"7") in reply.headers) == (429, True)
    assert reply.bills == [(0.0, False)], "what it does not take it does not charge"


async def test_carry_when_the_job_fails_before_any_text_is_an_error(place: Place) -> None:
    place.service.words, place.service.failure = [], "CUDA error"
    reply = await place.carry(chat())
    assert (reply.status, reply.ended, reply.fault) == (500, True, None)
    assert json.loads(reply.pieces[0])["error"]["message"] == "CUDA error"


async def test_carry_when_the_job_fails_after_text_is_a_fault(place: Place) -> None:
    place.service.held, place.service.failure = asyncio.Event(), "CUDA error"
    place.service.words = ["hel"]
    reply, carrying = place.begin(chat())
    async with asyncio.timeout(5):
        await reply.spoke.wait()
    place.service.held.set()
    await carrying
    assert (reply.status, reply.ended, reply.fault) == (200, False, Fault.ERROR_BODY)


async def test_carry_when_a_worker_has_to_start_says_so(place: Place) -> None:
    place.service.cold = 6.5
    reply = await place.carry(chat())
    assert (reply.woken, reply.cold) == (True, 6.5)


async def test_carry_when_the_client_has_a_deadline_the_job_has_it_too(place: Place) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    await place.carry(chat(deadline=deadline))
    assert 10 < place.service.jobs["j-1"].asked["expires_in"] <= 20


async def test_carry_when_cancelled_takes_the_job_back(place: Place) -> None:
    place.service.held = asyncio.Event()
    reply, carrying = place.begin(chat())
    async with asyncio.timeout(5):
        await reply.spoke.wait()
    carrying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await carrying
    assert place.service.jobs["j-1"].state == "cancelled"


async def test_check_when_all_sleep_is_cold_and_wakes_nobody(place: Place) -> None:
    place.service.cold = 6.5
    check = await PROVIDER.check(place.backend, place.session)
    assert check is not None
    assert (check.warmth, check.models, place.service.jobs) == (Warmth.COLD, ("m",), {})
    assert check.capacity is not None
    assert check.capacity.idle == 1


def test_environment_when_url_and_token_are_set_gives_one_row() -> None:
    env = {"CONVEYOR_URL": "https://c.example ", "CONVEYOR_TOKEN": "t"}
    row = {"name": "conveyor-eu-west", "url": "https://c.example", "region": "eu-west"}
    assert PROVIDER.from_environment(env, "eu-west") == [{**row, "api_key": "t"}]
    assert PROVIDER.from_environment({"CONVEYOR_TOKEN": "t"}, "eu-west") == []


def test_problem_when_there_is_no_token_names_the_key() -> None:
    backend = Backend("c", "conveyor", "http://h", "http", "h", 80)
    assert str(PROVIDER.problem(backend)).startswith("api_key: ")
