"""Modal's web functions through the whole proxy: 303 at 150 s, and what a client sees of it.

The edge is the stub of `kit_modal`, with its 150 s shortened. What is counted at it matters most:
work that is paid for begins with a POST, and there is never a second one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from beacon_proxy.routing import follow

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
from .kit_modal import (
    BAD_REDIRECT,
    DISABLED,
    KILLED,
    LOST,
    NO_CALL,
    NO_PORT,
    RESULT,
    SPENT,
    STOPPED,
    Call,
    Function,
    answers,
    said,
)

DOCUMENT = {
    "object": "chat.completion",
    "choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 3},
}
STREAM = b"".join((SSE_HEAD, *map(chunk, chat_events("hello ", 3)), LAST_CHUNK))
TOKEN = (b"wk-abc", b"ws-def")
CHEAPEST = ("X-Beacon-Cost-Priority", "true")


def row(edge: Function, **more: Any) -> dict[str, Any]:
    return {"name": "modal", "provider": "modal", "url": edge.url, "kind": "function", **more}


async def ask(p: Proxy, data: bytes, method: str = "POST") -> Answer:
    async with RawClient(p.port) as client:
        return await client.ask(data, method, timeout=10)


def dearer(edge: Function, other: RawBackend) -> tuple[dict[str, Any], dict[str, Any]]:
    """Modal first, and another backend behind it."""
    return row(edge, price_per_second=0), {"url": other, "price_per_second": 1}


def strikes(p: Proxy) -> list[bool]:
    """Of each backend, whether a strike was held against it; a deadline costs half of one."""
    return [candidate.live.success < 0.85 for candidate in p.app.fleet.candidates()]


def inference(**more: Any) -> bytes:
    body = json.dumps({"model": "m", "prompt": "Say hello.", **more}).encode()
    return request("POST", "/inference", [("Content-Type", "application/json")], body)


async def silent(call: Call) -> None:
    """An app that never answers."""
    await asyncio.Event().wait()


def once(edge: Function, gets: int) -> None:
    """The work was begun once, and its result asked for by GET alone."""
    assert [each.method for each in edge.posts] == ["POST"]
    assert [each.method for each in edge.gets] == ["GET"] * gets
    assert len(edge.calls) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_function_when_it_starts_cold_for_320_s_gives_the_client_one_plain_200(
    stream: bool,
) -> None:
    """Two 303s, at 150 and 300 s; the first router threw the result away."""
    answer = STREAM if stream else json_bytes(DOCUMENT)
    edge = Function(answers(answer, cuts=2), token=TOKEN)
    async with edge, proxy(row(edge, api_key="wk-abc:ws-def")) as p:
        got = await ask(p, chat(stream=stream))
        (done,) = await p.exchanges(1)
    assert (got.status, got.complete, got.interim) == (200, True, [])
    assert got.header("x-beacon-attempts") == [b"1"]
    assert got.header("location") == []
    if stream:
        assert got.body == b"".join(chat_events("hello ", 3))
    else:
        assert got.json == DOCUMENT
    once(edge, gets=2)
    assert done["end"] == "complete"


async def test_function_when_its_result_is_asked_for_keeps_credentials_and_drops_the_body() -> None:
    edge = Function(answers(json_bytes(DOCUMENT), cuts=1), token=TOKEN)
    async with edge, proxy(row(edge, api_key="wk-abc:ws-def", headers={"X-Team": "r"})) as p:
        asked = chat(headers=[("Authorization", "Bearer client"), ("X-Mine", "1")])
        assert (await ask(p, asked)).status == 200
    (get,) = edge.gets
    assert get.target == b"/v1/chat/completions?" + RESULT + b"fc-1"
    assert get.header("modal-key") == [b"wk-abc"]
    assert get.header("modal-secret") == [b"ws-def"]
    assert get.header("authorization") == []
    assert (get.header("x-mine"), get.header("x-team")) == ([b"1"], [b"r"])
    assert get.body == b""
    assert get.header("content-type") == get.header("content-length") == []


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_function_when_asked_by_inference_answers_as_if_it_had_been_warm(
    stream: bool,
) -> None:
    answer = STREAM if stream else json_bytes(DOCUMENT)
    edge = Function(answers(answer, cuts=2))
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, inference(stream=stream))
    assert (got.status, got.complete) == (200, True)
    lines = [json.loads(each) for each in got.body.splitlines()]
    told = lines[-1]
    assert told["success"] is True
    assert told["metadata"]["attempts"] == 1
    text = "".join(each["response"] for each in lines[:-1]) if stream else told["response"]
    assert text == ("hello hello hello " if stream else "hello")
    once(edge, gets=2)


async def test_function_when_it_streams_past_the_cut_is_not_cut() -> None:
    """An answer that has begun goes on for as long as it takes."""
    events = chat_events("hello ", 6)

    async def slow(call: Call) -> None:
        await call.until_cut(1)
        call.answer(SSE_HEAD)
        for each in events:
            call.answer(chunk(each))
            await asyncio.sleep(edge.cut / 3)
        call.answer(LAST_CHUNK)

    edge = Function(slow, cut=0.09)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(stream=True))
    assert (got.status, got.complete, got.body) == (200, True, b"".join(events))
    once(edge, gets=1)


async def test_function_when_it_says_one_event_each_turn_of_the_loop_loses_none() -> None:
    """The edge sends while more is said, in whatever turn of the loop that happens."""
    events = chat_events("hello ", 40)

    async def quick(call: Call) -> None:
        for each in (SSE_HEAD, *map(chunk, events), LAST_CHUNK):
            call.answer(each)
            await asyncio.sleep(0)

    edge = Function(quick)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(stream=True))
    assert (got.status, got.complete, got.body) == (200, True, b"".join(events))
    once(edge, gets=0)


async def test_function_when_the_path_is_no_inference_follows_all_the_same() -> None:
    """A GET may always be sent, and the POST is not repeated: so it holds on any path."""
    edge = Function(answers(json_bytes({"done": 1}), cuts=1))
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, request("POST", "/jobs?a=b", body=b"work"))
    assert (got.status, got.json) == (200, {"done": 1})
    once(edge, gets=1)
    assert edge.gets[0].target == b"/jobs?a=b&" + RESULT + b"fc-1"


# The first breaks the connection of the POST, which lay idle: that is made good at once.
@pytest.mark.parametrize("breaks", [1, 2])
async def test_function_when_the_connection_breaks_asks_for_the_result_again(breaks: int) -> None:
    """Another backend would do the same paid work a second time."""
    edge = Function(answers(json_bytes(DOCUMENT), cuts=1), breaks=breaks)
    async with edge, RawBackend(json_answer(DOCUMENT)) as other:
        async with proxy(*dearer(edge, other)) as p:
            got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.header("x-beacon-backend")) == (200, [b"modal"])
        assert other.requests == []
    once(edge, gets=breaks + 1)


async def test_function_when_the_connection_never_holds_gives_up_and_asks_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work goes on at Modal and is paid for: elsewhere it would be done a second time."""
    monkeypatch.setattr(follow, "BROKEN_MOST", 1)  # three in a row take 8 s
    edge = Function(answers(json_bytes(DOCUMENT), cuts=1), breaks=99)
    async with edge, RawBackend(json_answer(DOCUMENT)) as other:
        async with proxy(*dearer(edge, other)) as p:
            got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.header("x-beacon-attempts")) == (502, [b"1"])
        assert "the result could not be had" in got.json["error"]["message"]
        assert other.requests == []
    once(edge, gets=3)


async def test_function_when_its_result_is_called_expired_asks_again() -> None:
    edge = Function(answers(json_bytes(DOCUMENT), cuts=1), expired=1)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat())
    assert (got.status, got.json) == (200, DOCUMENT)
    once(edge, gets=2)


@pytest.mark.parametrize(
    ("method", "path", "refused"),
    [
        ("GET", "/jobs", 503),
        ("POST", "/jobs", 503),
        ("POST", "/v1/chat/completions", 503),
        ("POST", "/inference", 200),  # says in its body that there is no backend
    ],
)
async def test_function_when_a_client_names_a_result_it_does_not_get_another_clients(
    method: str, path: str, refused: int
) -> None:
    """Our own token would have opened it."""
    edge = Function(answers(json_bytes({"of": "another"})), token=TOKEN)
    async with edge, proxy(row(edge, api_key="wk-abc:ws-def")) as p:
        assert (await ask(p, request("POST", "/jobs", body=b"work"))).json == {"of": "another"}
        named = f"{path}?{RESULT.decode()}fc-1"
        body = b'{"model": "m", "prompt": "x"}' if method == "POST" else b""
        fields = [("Content-Type", "application/json")]
        got = await ask(p, request(method, named, fields, body), method)
    assert got.status == refused
    assert b"another" not in got.body
    assert edge.gets == []
    assert len(edge.posts) == 1


@pytest.mark.parametrize("moved", [b"127.0.0.1:1", b"other.modal.run", b"u@127.0.0.1"])
async def test_function_when_its_result_is_at_another_host_is_not_followed(moved: bytes) -> None:
    """Whoever is there would be given the credentials."""
    edge = Function(silent, cut=0.02, token=TOKEN, moved=moved)
    async with edge, proxy(row(edge, api_key="wk-abc:ws-def")) as p:
        got = await ask(p, chat())
        (done,) = await p.exchanges(1)
    assert got.status == 303
    once(edge, gets=0)
    assert "another host" in json.dumps(done)
    assert "ws-def" not in json.dumps(p.log)


async def test_function_when_a_foreign_result_stands_fails_over_and_counts_a_strike() -> None:
    edge, other = Function(silent, moved=b"other.modal.run"), RawBackend(json_answer(DOCUMENT))
    async with edge, other, proxy(*dearer(edge, other)) as p:
        got = await ask(p, chat(headers=[CHEAPEST]))
        struck = strikes(p)
    assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
    assert struck == [True, False]


async def test_function_when_the_deadline_passes_is_a_timeout_over_all_hops_together() -> None:
    edge = Function(silent, cut=0.6)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(headers=[("X-Beacon-Timeout", "1")]))
        await eventually(lambda: edge.backend.open_connections == 0)
        (done,) = await p.exchanges(1)
        assert strikes(p) == [False]  # the client chose how long to wait
    assert got.status == 504
    assert got.header("location") == []
    assert done["duration_s"] >= 0.95
    once(edge, gets=1)


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_function_when_the_limit_of_a_cold_start_passes_counts_all_hops(stream: bool) -> None:
    """The limit is counted from the first request, not anew with each hop."""
    limits = {"first_content": 0.1, "document": 0.1, "cold_start": 0.5}
    edge = Function(silent, cut=0.15)
    async with edge, proxy(row(edge, timeouts=limits)) as p:
        got = await ask(p, chat(stream=stream))
        (done,) = await p.exchanges(1)
    assert got.status == 504
    assert done["attempts"][0]["fault"] == "timeout"
    assert done["duration_s"] >= 0.4
    assert 1 <= len(edge.gets) <= 3
    once(edge, gets=len(edge.gets))


async def test_function_when_303s_come_at_once_are_not_followed_in_a_circle_without_rest() -> None:
    edge = Function(silent, cut=0.0)
    async with edge, proxy(row(edge)) as p:
        got = await ask(p, chat(headers=[("X-Beacon-Timeout", "1")]))
    assert got.status == 504
    assert len(edge.gets) <= 8


@pytest.mark.parametrize("cuts", [0, 1])
async def test_function_when_the_client_leaves_its_connection_is_closed(cuts: int) -> None:
    """While the first request waits, and while its result does."""
    edge = Function(silent, cut=60.0)
    async with edge, proxy(row(edge)) as p, RawClient(p.port) as client:
        edge.cut = 0.02 if cuts else 60.0
        await client.send(chat())
        await eventually(lambda: len(edge.calls) == 1)  # its limit is that of now
        edge.cut = 60.0
        await eventually(lambda: len(edge.gets) == cuts)
        await asyncio.sleep(0.02)
        assert edge.backend.open_connections == 1
        client.close()
        await eventually(lambda: edge.backend.open_connections == 0)
        (done,) = await p.exchanges(1)
        assert done["end"] == "client_closed"
    once(edge, gets=cuts)


async def test_function_when_the_client_leaves_between_two_hops_nothing_more_is_asked() -> None:
    edge = Function(silent, cut=0.01, expired=99)
    async with edge, proxy(row(edge)) as p, RawClient(p.port) as client:
        await client.send(chat())
        await eventually(lambda: len(edge.gets) == 2)
        client.close()
        await p.exchanges(1)
        asked = len(edge.gets)
        await asyncio.sleep(0.05)
        assert len(edge.gets) == asked
        assert edge.backend.open_connections == 0 or p.in_flight() == 0


@pytest.mark.parametrize(
    ("refusal", "status", "code", "transient", "fault", "strike"),
    [
        pytest.param(said(404, STOPPED), 404, "PROVIDER_GONE", False, "gone", True, id="stopped"),
        pytest.param(said(404, NO_CALL), 404, "PROVIDER_GONE", False, "gone", True, id="no call"),
        pytest.param(said(404, DISABLED), 404, "PROVIDER_GONE", False, "gone", True, id="disabled"),
        pytest.param(said(429, SPENT), 429, "RATE_LIMITED", True, "busy", False, id="spent"),
        pytest.param(said(500, KILLED), 500, "PROVIDER_ERROR", True, "status", True, id="killed"),
        pytest.param(said(500, LOST), 500, "PROVIDER_ERROR", True, "status", True, id="lost"),
        pytest.param(said(500, NO_PORT), 500, "PROVIDER_ERROR", True, "status", True, id="port"),
        pytest.param(
            said(400, BAD_REDIRECT), 400, "REQUEST_REJECTED", False, "status", False, id="redirect"
        ),
        pytest.param(said(503, b""), 503, "PROVIDER_BUSY", True, "busy", False, id="503"),
    ],
)
async def test_edge_when_it_refuses_says_so_to_client_and_inference_alike(
    refusal: bytes, status: int, code: str, transient: bool, fault: str, strike: bool
) -> None:
    edge = Function(silent, refusal=refusal)
    async with edge, proxy(row(edge)) as p:
        verbatim, told = await ask(p, chat()), (await ask(p, inference())).json
        first, second = await p.exchanges(2)
        assert strikes(p) == [strike]
    assert verbatim.status == status
    assert refusal.endswith(verbatim.body)
    failure = told["failure"]
    assert (told["success"], failure["code"], failure["transient"]) == (False, code, transient)
    assert failure["http_status"] == status
    for done in (first, second):
        (attempt,) = done["attempts"]
        assert attempt["fault"] == fault
        assert ("detail" in attempt) is (strike or SPENT in refusal)


async def test_edge_when_the_proxy_token_is_wrong_is_not_transient() -> None:
    edge = Function(answers(json_bytes(DOCUMENT)), token=TOKEN)
    async with edge, proxy(row(edge, api_key="wk-abc:ws-wrong")) as p:
        told = (await ask(p, inference())).json
    assert told["failure"]["code"] == "PROVIDER_UNAUTHORIZED"
    assert told["failure"]["transient"] is False
    assert edge.calls == []


async def test_edge_when_the_spend_limit_is_reached_tells_how_long_until_tomorrow() -> None:
    edge = Function(silent, refusal=said(429, SPENT))
    async with edge, RawBackend(json_answer(DOCUMENT)) as other:
        async with proxy(*dearer(edge, other)) as p:
            first = await ask(p, chat(headers=[CHEAPEST]))
            second = await ask(p, chat(headers=[CHEAPEST]))
            (rested,) = p.events("backend.rested")
            ejected = p.events("backend.ejected")
        async with proxy(row(edge)) as p:
            told = (await ask(p, inference())).json
    assert 0 < told["failure"]["retry_after"] <= 86_400
    assert [each.header("x-beacon-backend") for each in (first, second)] == [[b"b1"]] * 2
    assert len(edge.posts) == 2  # once of each proxy
    assert 1 < rested["seconds"] <= 300  # health's own bound; the real rest is longer
    assert ejected == []


async def test_edge_when_the_app_is_stopped_health_sends_no_more_traffic_there() -> None:
    edge, other = Function(silent, refusal=said(404, STOPPED)), RawBackend(json_answer(DOCUMENT))
    async with edge, other, proxy(*dearer(edge, other)) as p:
        for _ in range(8):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.header("x-beacon-backend")) == (200, [b"b1"])
        (ejected,) = p.events("backend.ejected")
    assert ejected["fault"] == "gone"
    assert len(edge.posts) == 5


@pytest.mark.parametrize("kind", ["auto", "function"])
async def test_function_when_its_app_says_503_after_its_work_is_not_paid_twice(kind: str) -> None:
    """It was posted again until the limit of a cold start, as if a Server were starting."""
    edge = Function(answers(said(503, b"upstream failed"), cuts=0))
    async with edge, proxy(row(edge, kind=kind, timeouts={"cold_start": 4})) as p:
        got = await ask(p, chat())
    assert (got.status, got.body) == (503, b"upstream failed")
    once(edge, gets=0)


async def test_function_when_another_request_runs_waits_as_for_a_cold_start() -> None:
    """One container takes one input: beside it, a warm function starts cold all the same."""
    limits = {"first_content": 1.0, "document": 1.0, "cold_start": 10}

    async def one_at_a_time(call: Call) -> None:
        if len(edge.calls) == 2:
            await asyncio.Event().wait()
        await call.until_cut(3 if len(edge.calls) == 3 else 0)
        call.answer(json_bytes(DOCUMENT))

    edge = Function(one_at_a_time, cut=60.0)
    async with edge, proxy(row(edge, timeouts=limits)) as p:
        assert (await ask(p, chat())).status == 200  # now it is warm
        first = asyncio.create_task(ask(p, chat()))
        await eventually(lambda: len(edge.calls) == 2)
        edge.cut = 0.4
        assert (await ask(p, chat())).status == 200
        assert (await first).status == 504  # alone on a warm backend: the usual limit
