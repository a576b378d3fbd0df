"""What servers say when they are full, or still load their model, through the whole proxy.

The answers are the recorded ones (facts 4.1 to 4.5 and 5), in the framing of their servers. Of one
backend alone such an answer is the client's; where another stands ready it is never seen. Either
way it is back-pressure: no strike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from .kit import (
    CHAT,
    MESSAGES,
    OLLAMA_CHAT,
    RESPONSES,
    Api,
    BackendConn,
    Proxy,
    RawBackend,
    Script,
    answer,
    chunk,
    event,
    eventually,
    proxy,
)
from .kit_faults import Ending, ask, good, pieces, sized, whole

# One strike would eject, so that none goes unseen; no probe says anything beside.
HEALTH = {"probe_interval": 0, "consecutive_failures": 1, "base_ejection_time": 60}
CHAIN: list[Any] = [{"health": HEALTH}, "region", {"cost": {"default": "cost"}}, "capacity"]
CHAIN += ["failover"]


@dataclass(frozen=True)
class Said:
    """One recorded answer; `rest` is what it asks for, s, else the proxy's own second."""

    name: str
    status: str
    body: str
    api: Api = CHAT
    kind: str = "application/json"
    fields: tuple[str, ...] = ()
    fault: str = "busy"
    rest: float = 1.0

    @property
    def raw(self) -> bytes:
        return sized(self.status, self.kind, self.body.encode(), *self.fields)


VLLM = (
    '{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try'
    ' again later or on a different instance.","type":"Service Unavailable","param":null,'
    '"code":503}}'
)
LOADING = '{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
NO_SLOT = '{"error":{"code":503,"message":"no slot available","type":"unavailable_error"}}'
OLLAMA = '{"error":"server busy, please try again.  maximum pending requests exceeded"}'
SGLANG = '{"object":"error","message":"The request queue is full.","type":"503","code":503}'
TGI = '{"error":"Model is overloaded","error_type":"overloaded"}'
ANTHROPIC = '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
UTF8 = "application/json; charset=utf-8"
CLOSES = ("Connection: close", "Server: llama.cpp")
FULL = "503 Service Unavailable"

ANSWERS = [
    Said("4.1 Ollama is full", FULL, OLLAMA, OLLAMA_CHAT, UTF8),
    Said("4.2 llama.cpp has no slot", FULL, NO_SLOT, CHAT, UTF8, CLOSES),
    Said("4.2 llama.cpp loads", FULL, LOADING, CHAT, UTF8, CLOSES, "loading"),
    Said(
        "4.2 llama.cpp loads, asked for a message", FULL, LOADING, MESSAGES, UTF8, CLOSES, "loading"
    ),
    Said("4.3 vLLM is full", FULL, VLLM, fields=("server: uvicorn",)),
    Said("4.3 vLLM is full, asked for a response", FULL, VLLM, RESPONSES),
    Said("4.4 SGLang is full", FULL, SGLANG, fields=("server: uvicorn",)),
    Said("4.5 TGI is full", "429 Too Many Requests", TGI),
    Said("5 Anthropic is overloaded", "529 Overloaded", ANTHROPIC, MESSAGES),
    Said("a limit of requests", "429 Too Many Requests", "{}", fields=("Retry-After: 7",), rest=7),
    Said("a 503 without a word", FULL, "", kind="text/plain", fields=("Retry-After: 3",), rest=3),
]
answers = pytest.mark.parametrize("said", ANSWERS, ids=lambda said: said.name)
both_modes = pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])


def state(p: Proxy) -> Any:
    return p.app.fleet.candidates()[0].live


def check_no_strike(p: Proxy, said: Said) -> None:
    live = state(p)
    assert (live.success, live.ejected_until, p.events("backend.ejected")) == (1.0, 0.0, [])
    rest = live.resting_until - p.app.fleet.now()
    assert said.rest - 1.0 < rest <= said.rest
    assert live.warmth == ("warming" if said.fault == "loading" else "unknown")


@both_modes
@answers
async def test_answer_of_the_only_backend_is_relayed_as_it_is_and_is_no_strike(
    said: Said, stream: bool
) -> None:
    async with (
        RawBackend(answer(said.raw, close=CLOSES[0] in said.fields)) as only,
        proxy(only, middleware=CHAIN) as p,
    ):
        _, got = await ask(p.port, said.api, stream)
        (told,) = await p.exchanges(1)
        check_no_strike(p, said)
        assert len(only.requests) == 1
    assert (got.status, got.complete, got.body) == (int(said.status[:3]), True, said.body.encode())
    assert got.header("content-type") == [said.kind.encode()]
    for field in said.fields:
        name, _, value = field.partition(": ")
        assert got.header(name) == [value.encode()] or name == "Connection"
    assert [attempt["fault"] for attempt in told["attempts"]] == [said.fault]


@both_modes
@answers
async def test_answer_of_one_of_two_is_never_seen_and_it_rests(said: Said, stream: bool) -> None:
    async with (
        RawBackend(answer(said.raw, close=CLOSES[0] in said.fields)) as full,
        RawBackend(good(said.api)) as spare,
    ):
        rows = {"url": full, "price_per_second": 0.001}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p:
            for number in range(2):
                ending, got = await ask(p.port, said.api, stream)
                assert ending is Ending.COMPLETE, got
                assert got.header("x-beacon-attempts") == [b"%d" % (2 - number)]
                if not number:
                    check_no_strike(p, said)
            assert (len(full.requests), len(spare.requests)) == (1, 2)


async def test_loading_when_it_is_over_the_backend_is_warm_and_takes_its_turn() -> None:
    """llama.cpp says so for as long as it loads; the first good answer ends the rest, too."""
    loads = True

    async def script(conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            raw = b"".join(pieces(CHAT, received.json["stream"]))
            await conn.send(ANSWERS[2].raw if loads else raw)
            if loads:
                return

    async with RawBackend(script) as only, proxy(only, middleware=CHAIN) as p:
        for _ in range(3):
            _, got = await ask(p.port, CHAT, True)
            assert (got.status, got.body) == (503, LOADING.encode())
        assert state(p).warmth == "warming"
        loads = False
        ending, _ = await ask(p.port, CHAT, True)
        assert ending is Ending.COMPLETE
        await eventually(lambda: state(p).warmth == "warm")
        assert len(only.requests) == 4
        assert p.events("backend.ejected") == []


# -- an error behind a 200, inside a stream


def sse(obj: str) -> bytes:
    return event(json.loads(obj))


DONE = b"data: [DONE]\n\n"
RESPONSES_FAILED = (
    b'event: response.failed\ndata: {"type":"response.failed","response":{"id":"resp_1","object":'
    b'"response","status":"failed","error":{"code":"server_error","message":"boom"}}}\n\n'
)
OLLAMA_DIED = b'{"error":"an error was encountered while running the model: CUDA error"}\n'
SERVER_ERROR = '{"error":{"code":500,"message":"context shift failed","type":"server_error"}}'
VLLM_ERROR = '{"error":{"message":"boom","type":"InternalServerError","param":null,"code":500}}'
INSIDE = [
    pytest.param(CHAT, sse(VLLM_ERROR) + DONE, id="4.3 vLLM, and its end marker behind it"),
    pytest.param(CHAT, sse(SERVER_ERROR), id="4.2 llama.cpp"),
    pytest.param(CHAT, sse('{"error":{"message":"x","type":"Abort","code":500}}') + DONE, id="4.4"),
    pytest.param(OLLAMA_CHAT, OLLAMA_DIED, id="4.1 Ollama"),
    pytest.param(MESSAGES, b"event: error\n" + sse(ANTHROPIC), id="5 Anthropic"),
    pytest.param(RESPONSES, RESPONSES_FAILED, id="5 a response that failed"),
]


def breaks(api: Api, error: bytes, *, late: bool) -> Script:
    """The first events of a good stream, then the error, then a clean end of the message."""

    async def script(conn: BackendConn) -> None:
        await conn.request()
        before = api.quiet + (api.content[:2] if late else ())
        said = b"".join(map(chunk, (*before, error)))
        await conn.send(api.head + said + b"0\r\n\r\n")

    return script


@pytest.mark.parametrize(("api", "error"), INSIDE)
async def test_error_inside_a_stream_before_content_is_never_seen(api: Api, error: bytes) -> None:
    async with RawBackend(breaks(api, error, late=False)) as broken, RawBackend(good(api)) as spare:
        rows = {"url": broken, "price_per_second": 0.001}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p:
            ending, got = await ask(p.port, api, True)
    assert ending is Ending.COMPLETE
    assert got.header("x-beacon-attempts") == [b"2"]


@pytest.mark.parametrize(("api", "error"), INSIDE)
async def test_error_inside_a_stream_after_content_is_the_clients_and_no_other_is_asked(
    api: Api, error: bytes
) -> None:
    async with RawBackend(breaks(api, error, late=True)) as broken, RawBackend(good(api)) as spare:
        rows = {"url": broken, "price_per_second": 0.001}, {"url": spare, "price_per_second": 0.1}
        async with proxy(*rows, middleware=CHAIN) as p:
            _, got = await ask(p.port, api, True)
            (told,) = await p.exchanges(1)
            assert (spare.requests, state(p).success < 1.0) == ([], True)
    assert got.body == b"".join((*api.quiet, *api.content[:2], error))
    assert got.body != whole(api, True)
    assert (told["end"], told["attempts"][0]["fault"]) == ("error", "error_body")
