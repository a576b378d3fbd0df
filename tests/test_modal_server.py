"""Modal Servers through the whole proxy: a 503 means that one is starting.

The edge is the stub of `kit_modal`.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from beacon_proxy.api import inference

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    chat_events,
    chunk,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .kit_modal import Server, said

DOCUMENT = {
    "object": "chat.completion",
    "choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
}
READY = json_bytes(DOCUMENT)
STREAM = b"".join((SSE_HEAD, *map(chunk, chat_events("hello ", 3)), LAST_CHUNK))
CHEAPEST = ("X-Beacon-Cost-Priority", "true")
BUSY = json_bytes({"error": {"message": "The engine is currently busy"}}, 503)
LOADING = json_bytes({"error": {"code": 503, "message": "Loading model"}}, 503)
OWN_503 = json_bytes({"detail": "closed on Sundays"}, 503)


def row(edge: Server, **more: Any) -> dict[str, Any]:
    return {"name": "modal", "provider": "modal", "url": edge.url, "kind": "server", **more}


def dearer(edge: Server, other: RawBackend) -> tuple[dict[str, Any], dict[str, Any]]:
    """Modal first, and another backend behind it."""
    return row(edge, price_per_second=0), {"url": other, "price_per_second": 1}


async def ask(p: Proxy, data: bytes) -> Answer:
    async with RawClient(p.port) as client:
        return await client.ask(data, "POST", timeout=10)


def warmth(p: Proxy) -> str:
    live = p.app.fleet.candidates()[0].live
    return str(live.warmth_at(p.app.fleet.now()))


def unspoilt(p: Proxy) -> bool:
    """No strike was held against the Server."""
    return bool(p.app.fleet.candidates()[0].live.success == 1.0)


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_server_when_it_is_starting_is_asked_until_it_answers(stream: bool) -> None:
    edge = Server(STREAM if stream else READY, needs=2)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(stream=stream))
        assert (got.status, got.complete, got.header("x-beacon-attempts")) == (200, True, [b"1"])
        assert unspoilt(p)
        assert warmth(p) == "warm"
    assert len(edge.backend.requests) == 3
    bodies = {each.body for each in edge.backend.requests}
    assert len(bodies) == 1
    assert [each.method for each in edge.backend.requests] == ["POST"] * 3


async def test_server_when_it_is_starting_is_shown_as_warming_meanwhile() -> None:
    edge = Server(READY, needs=None)
    async with edge, proxy(row(edge)) as p, RawClient(p.port) as client:
        await client.send(chat())
        await eventually(lambda: edge.refused == 1)
        await eventually(lambda: warmth(p) == "warming")
        async with RawClient(p.port) as operator:
            told = (await operator.ask(request("GET", "/providers"))).json["providers"][0]
    assert told["warmth"] == "warming"


async def test_server_when_asked_by_inference_is_waited_for_too() -> None:
    edge = Server(READY, needs=1)
    body = json.dumps({"model": "m", "prompt": "Hi"}).encode()
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, request("POST", "/inference", body=body))
    assert (got.json["success"], got.json["response"]) == (True, "hello")
    assert got.json["metadata"]["attempts"] == 1


async def test_server_when_another_is_warm_that_one_answers_and_no_strike_is_held() -> None:
    """503 is not an answer, and no reason to wait, while somebody else stands ready."""
    edge, other = Server(READY, needs=None), RawBackend(json_answer(DOCUMENT))
    async with edge, other, proxy(*dearer(edge, other)) as p:
        for _ in range(7):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
            p.app.fleet.candidates()[0].live.resting_until = 0.0  # as if a second had passed
        assert unspoilt(p)
        assert p.events("backend.ejected") == []
    assert edge.refused == 7


async def test_server_when_another_is_starting_too_waits_where_it_is() -> None:
    edge, other = Server(READY, needs=1), Server(READY, needs=None)
    async with edge, other:
        rows = row(edge, price_per_second=0), row(other, name="far", price_per_second=1)
        async with proxy(*rows) as p:
            got = await ask(p, chat(headers=[CHEAPEST]))
    assert (got.status, got.header("x-beacon-backend")) == (200, [b"modal"])
    assert other.backend.requests == []


async def test_server_when_asked_by_inference_leaves_half_of_the_time_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The half counts from the first request on, not anew with each; and it is no strike."""
    monkeypatch.setattr(inference, "ANSWER_WITHIN", 2.0)
    body = json.dumps({"model": "m", "prompt": "Hi", "cost_priority": True}).encode()
    edge, other = Server(READY, needs=None), Server(READY)  # of which nobody knows that it is warm
    async with edge, other:
        rows = row(edge, price_per_second=0), row(other, name="far", price_per_second=1)
        async with proxy(*rows) as p:
            got = await ask(p, request("POST", "/inference", body=body))
            (done,) = await p.exchanges(1)
            assert unspoilt(p)
    assert (got.json["success"], got.json["provider_used"]) == (True, "far")
    assert [each["fault"] for each in done["attempts"]] == ["loading", None]
    assert done["duration_s"] < 2.0


class Longest(random.Random):
    """Chance that takes the longest wait each time."""

    def uniform(self, a: float, b: float) -> float:
        return b


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_server_when_the_limit_of_a_cold_start_passes_gives_its_own_503(stream: bool) -> None:
    limits = {"first_content": 0.2, "document": 5, "cold_start": 1.5}
    edge = Server(READY, needs=None)
    async with edge, proxy(row(edge, timeouts=limits)) as p:
        # Waits of 0.5 and 1.0 s: it is asked for the last time long before the limit.
        p.app.fleet.providers["modal"]._rng = Longest()
        got = await ask(p, chat(stream=stream))
        (done,) = await p.exchanges(1)
        assert unspoilt(p)
    assert got.status == 503
    assert done["attempts"][0]["fault"] == "loading"
    assert edge.refused == 2


async def test_server_when_the_deadline_would_pass_asks_no_more() -> None:
    edge = Server(READY, needs=None)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(headers=[("X-Beacon-Timeout", "0.2")]))
        assert unspoilt(p)
    assert got.status == 503
    assert edge.refused == 1


async def test_server_when_it_says_retry_after_is_not_asked_sooner() -> None:
    edge = Server(READY, needs=1, refuses=said(503, b"", b"Retry-After: 1"))
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat())
        (done,) = await p.exchanges(1)
    assert got.status == 200
    assert done["duration_s"] >= 0.998  # a timer of the loop counts in ms


async def test_server_when_the_client_leaves_during_a_wait_is_not_asked_again() -> None:
    edge = Server(READY, needs=None)
    async with edge, proxy(row(edge)) as p, RawClient(p.port) as client:
        await client.send(chat())
        await eventually(lambda: edge.refused == 1)
        client.close()
        (done,) = await p.exchanges(1)
        assert (done["end"], p.in_flight()) == ("client_closed", 0)
        assert edge.refused == 1
        assert unspoilt(p)


@pytest.mark.parametrize(
    ("kind", "refuses", "asked"),
    [
        pytest.param("server", said(503, b""), 2, id="server, empty"),
        pytest.param("server", OWN_503, 2, id="server, a document"),
        pytest.param("server", LOADING, 2, id="server, llama.cpp loads"),
        pytest.param("server", BUSY, 1, id="server, vLLM is busy"),
        pytest.param("auto", said(503, b""), 1, id="auto, at no host of Modal's, empty"),
        pytest.param("auto", said(503, b"upstream failed"), 1, id="auto, at none, words"),
        pytest.param("auto", OWN_503, 1, id="auto, the app's own"),
        pytest.param("auto", LOADING, 2, id="auto, llama.cpp loads"),
        pytest.param("function", said(503, b""), 1, id="function"),
        pytest.param("function", LOADING, 2, id="function, llama.cpp loads"),
    ],
)
async def test_503_by_kind_and_words_is_waited_out_or_an_answer(
    kind: str, refuses: bytes, asked: int
) -> None:
    edge = Server(READY, needs=1, refuses=refuses)
    async with edge, proxy(row(edge, kind=kind)) as p:
        got = await ask(p, chat())
        assert unspoilt(p)
    assert len(edge.backend.requests) == asked
    assert got.status == (200 if asked == 2 else 503)


async def test_server_when_the_request_may_not_be_repeated_gives_its_own_503() -> None:
    edge = Server(READY, needs=1)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, request("POST", "/jobs", body=b"work"))
    assert got.status == 503
    assert edge.refused == 1


@pytest.mark.parametrize(
    ("kind", "headers", "expected"),
    [
        pytest.param("server", [("Modal-Session-ID", "my chat")], b"my chat", id="its own"),
        pytest.param("function", [("Modal-Session-ID", "my chat")], b"my chat", id="at a function"),
        pytest.param("server", [], None, id="none"),
    ],
)
async def test_session_when_the_client_names_it_to_modal_itself_passes_unchanged(
    kind: str, headers: list[tuple[str, str]], expected: bytes | None
) -> None:
    edge = Server(READY)
    async with edge, proxy(row(edge, kind=kind)) as p:
        assert (await ask(p, chat(headers=headers))).status == 200
    (got,) = edge.backend.requests
    assert got.header("modal-session-id") == ([] if expected is None else [expected])
