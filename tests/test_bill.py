"""What an attempt is charged for: seconds and tokens, whatever its end, through the whole proxy.

Each backend bills a dollar a second, so that `usd` is `billed`, or dollars by the token.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from math import inf
from typing import Any

import pytest

from beacon_proxy.contracts import (
    OTHER_POST,
    Fault,
    Outcome,
    Stage,
    Submission,
    Typical,
    Usage,
    Verdict,
    Warmth,
)
from beacon_proxy.contracts import Reply as Replies
from beacon_proxy.wire.dialects import Shape

from .kit import (
    APIS,
    CHAT,
    LAST_CHUNK,
    MESSAGES,
    OLLAMA_CHAT,
    SSE_HEAD,
    Api,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    Script,
    chat,
    chunk,
    closed_port,
    each_request,
    event,
    eventually,
    header,
    json_answer,
    json_bytes,
    proxy,
    request,
    sse,
)
from .kit import answer as raw_answer
from .test_cases_upg import HANDSHAKE, switch
from .test_hops import Warming
from .test_transports import HOPS, JSON, SEE_OTHER, carried, document, hopping
from .test_usage import COUNTS, DOCUMENTS, FINISH, TOKENS, TOLD, delta, full

DOLLAR = {"price_per_second": 1.0}
BY_TOKENS = {"price_per_million_tokens": {"input": 1.0, "output": 10.0}}
BY_CACHE = {
    "price_per_million_tokens": {
        **BY_TOKENS["price_per_million_tokens"],
        "cached_input": 0.1,
        "cache_write": 1.25,
    }
}
PATHS = {
    Shape.CHAT: "/v1/chat/completions",
    Shape.MESSAGES: "/v1/messages",
    Shape.RESPONSES: "/v1/responses",
    Shape.OLLAMA: "/api/chat",
}
GOOD = {"choices": [{"message": {"content": "hi"}}], "usage": COUNTS}
CHEAPEST = ("X-Beacon-Cost-Priority", "true")


@asynccontextmanager
async def billing(
    *rows: RawBackend | dict[str, Any], **more: Any
) -> AsyncIterator[tuple[Proxy, list[Outcome]]]:
    """A proxy, and the outcomes of its attempts; who bills no tokens bills a dollar a second."""
    outcomes: list[Outcome] = []
    given = [{"url": row} if isinstance(row, RawBackend) else row for row in rows]
    priced = [row if "price_per_million_tokens" in row else {**DOLLAR, **row} for row in given]
    async with proxy(*priced, outcomes=outcomes, **more) as p:
        yield p, outcomes


def asks(path: str, *, stream: bool = False, size: int = 0) -> bytes:
    """A request with a body of about `size` bytes."""
    body = {"model": "m", "stream": stream, "prompt": "x" * size}
    return request("POST", path, [("Content-Type", "application/json")], json.dumps(body).encode())


def guessed(data: bytes) -> int:
    """Tokens of a request's body, by its size."""
    return -(-len(data.partition(b"\r\n\r\n")[2]) // 4)


def silent(*pieces: bytes) -> tuple[Script, asyncio.Event]:
    """A backend that says `pieces` and then nothing; the event: it was left."""
    left = asyncio.Event()

    async def script(conn: BackendConn) -> None:
        await conn.request()
        for piece in pieces:
            await conn.send(piece)
        await conn.wait_closed()
        left.set()

    return script, left


# -- tokens that the backend counts --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in TOLD if not name.endswith(("cut", "failed", "alone"))]
)
async def test_tokens_of_a_stream_when_backend_says_them_are_those(name: str) -> None:
    """And not a byte of it is another one to the client."""
    shape, pieces, told = TOLD[name]
    head = SSE_HEAD
    if shape is Shape.OLLAMA:
        head = head.replace(b"text/event-stream", b"application/x-ndjson")
    async with (
        RawBackend(sse(pieces, head=head)) as backend,
        billing({"url": backend, **BY_CACHE}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        got = await client.ask(data := asks(PATHS[shape], stream=True))
        (said,) = await p.exchanges(1)
    assert (got.complete, got.body) == (True, b"".join(pieces))
    (outcome,) = outcomes
    if None in told:
        assert outcome.usage is not None
        assert outcome.usage == Usage(guessed(data), outcome.usage.output, estimated=True)
        assert said["tokens_estimated"] is True
        return
    given, made, cached, written = full(told)
    assert given is not None
    assert made is not None
    assert outcome.usage == Usage(given, made, cached=cached, cache_written=written)
    assert (said["tokens_in"], said["tokens_out"]) == (given, made)
    assert "tokens_estimated" not in said
    assert said.get("tokens_cached", 0) == cached
    assert ("tokens_cached" in said) is (cached > 0)
    fresh = given - cached - written
    usd = fresh * 1e-6 + cached * 0.1e-6 + written * 1.25e-6 + made * 10e-6
    assert outcome.usd == pytest.approx(usd)
    assert said["cost_usd"] == pytest.approx(outcome.usd)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("how", ["held", "gzip", "large", "large, chunked", "passed on"])
async def test_tokens_of_a_document_when_backend_says_them_are_those(name: str, how: str) -> None:
    document, told = DOCUMENTS[name]
    given, made, cached, written = full(told)
    content = {**document, "choices": [{"text": "y" * (1_100_000 if "large" in how else 50)}]}
    body = raw = json.dumps(content).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    pieces = [head + b"Content-Length: %d\r\n\r\n" % len(body), body]
    if how == "gzip":
        body = gzip.compress(raw)
        coding = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        pieces = [head + coding % len(body), body]
    elif how == "large, chunked":
        pieces = [head + b"Transfer-Encoding: chunked\r\n\r\n", chunk(body), LAST_CHUNK]

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            for number, piece in enumerate(pieces):
                if how == "passed on" and number:
                    await passed.wait()
                await conn.send(piece)

    passed = asyncio.Event()
    path = "/v1/embeddings" if made is None else "/v1/completions"
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_CACHE}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(data := asks(path))
        head_got = await client.head()
        passed.set()
        got = await client.body(head_got, "POST")
        await p.exchanges(1)
    assert (got.complete, got.body) == (True, body)
    (outcome,) = outcomes
    assert outcome.usage is not None
    if given is None:
        assert outcome.usage.input == guessed(data)
        assert outcome.usage.estimated
    else:
        assert outcome.usage == Usage(given, made or 0, cached=cached, cache_written=written)
        parts = given - cached - written + cached * 0.1 + written * 1.25
        assert outcome.usd == pytest.approx((parts + (made or 0) * 10) * 1e-6)


async def test_tokens_of_embeddings_when_nobody_counts_are_those_of_the_input_alone() -> None:
    async with (
        RawBackend(json_answer({"data": [{"embedding": [0.5] * 500}]})) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(data := asks("/v1/embeddings", size=4000))
        await p.exchanges(1)
    assert [each.usage for each in outcomes] == [Usage(guessed(data), 0, estimated=True)]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(chat(), 400, id="an error"),
        pytest.param(chat(), 500, id="a failure"),
        pytest.param(asks("/v1/messages/count_tokens"), 200, id="a count of tokens, which is free"),
        pytest.param(asks("/v1/files"), 400, id="no inference"),
        pytest.param(request("GET", "/v1/models/m"), 200, id="a question"),
    ],
)
async def test_tokens_of_what_runs_no_model_are_none(data: bytes, status: int) -> None:
    async with (
        RawBackend(json_answer({"input_tokens": 9, "error": None}, status)) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(data)
        (said,) = await p.exchanges(1)
    assert [(each.usage, each.usd) for each in outcomes] == [(None, 0.0)] * len(outcomes)
    assert outcomes
    assert "tokens_in" not in said


UNKNOWN = (
    "/v1/chat/completions/",
    "//v1/chat/completions",
    "/openai/v1/chat/completions",
    "/v1/audio/transcriptions",
)


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("name", ["chat, include_usage", "messages", "responses", "ollama", ""])
async def test_tokens_on_a_path_that_we_do_not_know_are_billed_as_they_are_counted(
    path: str, name: str
) -> None:
    """And the answer goes on as it comes: nothing is held for them, no byte is another one."""
    more = asyncio.Event()
    if name:
        shape, pieces, told = TOLD[name]
        kind = b"application/x-ndjson" if shape is Shape.OLLAMA else b"text/event-stream"
    else:
        first, then = json.dumps({"text": "y" * 40_000, **GOOD}).encode().split(b"{", 1)
        pieces, told, kind = (first + b"{", then), (33, 5), b"application/json"
    given, made, cached, written = full(told)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(head % (kind, len(b"".join(pieces))) + pieces[0])
            await more.wait()
            await conn.send(b"".join(pieces[1:]))

    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(asks(path, stream=bool(name)))
        head_got = await client.head()
        more.set()
        got = await client.body(head_got, "POST")
        (line,) = await p.exchanges(1)
    assert (got.complete, got.body) == (True, b"".join(pieces))
    assert header(head_got.headers, "content-length") == [b"%d" % len(got.body)]
    assert given is not None
    assert made is not None
    expected = Usage(given, made, cached=cached, cache_written=written)
    assert [each.usage for each in outcomes] == [expected]
    assert outcomes[0].usd == pytest.approx(33e-6 + 5 * 10e-6)
    assert (line["tokens_in"], line["tokens_out"]) == (33, 5)


NO_WORD = {
    "json": (b"application/json", json.dumps({"text": "hi"}).encode(), b""),
    "text": (b"text/plain", b'{"usage": {"prompt_tokens": 1', b""),
    "gzip": (b"application/json", gzip.compress(json.dumps(GOOD).encode()), b"gzip"),
    "stream": (b"text/event-stream", b"".join((*TOKENS, FINISH)), b""),
    "nothing": (b"audio/mpeg", b"", b""),
}


@pytest.mark.parametrize("name", NO_WORD)
async def test_cost_on_a_path_that_we_do_not_know_is_what_was_expected_where_nobody_counts(
    name: str,
) -> None:
    kind, body, coding = NO_WORD[name]
    fields = b"Content-Type: %b\r\nContent-Length: %d\r\n" % (kind, len(body))
    if coding:
        fields += b"Content-Encoding: %b\r\n" % coding
    async with (
        RawBackend(raw_answer(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n" + body)) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        got = await client.ask(asks("/v1/audio/speech"))
        (line,) = await p.exchanges(1)
    assert got.body == body
    (outcome,) = outcomes
    assert outcome.usage is None
    assert outcome.usd == outcome.expected_usd == pytest.approx(200e-6 + 200 * 10e-6)
    assert line["cost_usd"] == pytest.approx(outcome.usd)


async def test_cost_on_a_path_that_we_do_not_know_is_seconds_where_those_are_billed() -> None:
    async with (
        RawBackend(json_answer(GOOD)) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(asks("/openai/v1/chat/completions"))
        await p.exchanges(1)
    assert [each.usage for each in outcomes] == [None]
    assert 0 < outcomes[0].usd == outcomes[0].billed


@pytest.mark.usefixtures("mid_window")
async def test_budget_when_a_path_is_spelt_another_way_is_spent_all_the_same() -> None:
    """The first says how dear it is; nobody gets a second one by asking elsewhere."""
    dear = {**GOOD, "usage": {"prompt_tokens": 1_000_000, "completion_tokens": 0}}
    daily = {"name": "daily", "scope": "all", "per": "day", "usd": 1.0}
    for first in UNKNOWN:
        async with (
            RawBackend(json_answer(dear)) as backend,
            billing({"url": backend, **BY_TOKENS}, budgets=[daily]) as (p, _),
            RawClient(p.port) as client,
        ):
            statuses = [
                (await client.ask(asks(path))).status for path in (first, *UNKNOWN, CHAT.path)
            ]
        assert statuses == [200] + [429] * (len(UNKNOWN) + 1)


async def test_tokens_of_a_stream_in_a_coding_are_guessed_from_its_size() -> None:
    """It cannot be read, and is passed on from its first byte."""
    coded = gzip.compress(b"".join((*TOKENS, FINISH)))
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    async with (
        RawBackend(sse([coded], head=head)) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        got = await client.ask(data := asks(CHAT.path, stream=True))
        await p.exchanges(1)
    assert got.body == coded
    expected = Usage(guessed(data), len(coded) // 13, estimated=True)
    assert [each.usage for each in outcomes] == [expected]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_the_translated_route_are_as_its_provider_reads_them(stream: bool) -> None:
    """llama.cpp's own names, which no dialect has."""
    counts = {"tokens_evaluated": 33, "tokens_predicted": 5}
    events = (event({"content": "hi"}), event({"content": "", "stop": True, **counts}))
    script = (
        sse((*events, b"data: [DONE]\n\n")) if stream else json_answer({"content": "a", **counts})
    )
    async with RawBackend(script) as backend, billing(backend) as (p, outcomes):
        async with RawClient(p.port) as client:
            await client.ask(asks("/inference", stream=stream, size=40))
        (said,) = await p.exchanges(1)
    assert [each.usage for each in outcomes] == [Usage(33, 5)]
    assert (said["tokens_in"], said["tokens_out"]) == (33, 5)


ON_THE_TRANSLATED: dict[str, tuple[list[dict[str, Any]], Usage]] = {
    "openai": (
        [
            {"choices": [{"delta": {"content": "hi"}, "message": {"content": "hi"}}]},
            {"choices": [], "usage": {**COUNTS, "prompt_tokens_details": {"cached_tokens": 30}}},
        ],
        Usage(33, 5, cached=30),
    ),
    "anthropic": (
        [
            {
                "type": "message_start",
                "message": {
                    "content": [],
                    "usage": {
                        "input_tokens": 1,
                        "cache_read_input_tokens": 30,
                        "cache_creation_input_tokens": 2,
                    },
                },
            },
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}},
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}},
        ],
        Usage(33, 5, cached=30, cache_written=2),
    ),
    "more than there is": (
        [
            {"choices": [{"delta": {"content": "hi"}, "message": {"content": "hi"}}]},
            {"choices": [], "usage": {**COUNTS, "prompt_tokens_details": {"cached_tokens": 40}}},
        ],
        Usage(33, 5, cached=33),
    ),
}


@pytest.mark.parametrize("name", ON_THE_TRANSLATED)
@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_of_the_translated_route_are_billed_as_such(
    name: str, stream: bool
) -> None:
    said, expected = ON_THE_TRANSLATED[name]
    if stream:
        script = sse((*(event(each) for each in said), b"data: [DONE]\n\n"))
    else:
        usage: dict[str, Any] = {}
        for each in said:
            usage |= each.get("usage") or each.get("message", {}).get("usage") or {}
        script = json_answer({"choices": [{"message": {"content": "hi"}}], "usage": usage})
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_CACHE}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(asks("/inference", stream=stream, size=40))
        (line,) = await p.exchanges(1)
    assert [each.usage for each in outcomes] == [expected]
    cached, written = expected.cached, expected.cache_written
    usd = (33 - cached - written) * 1e-6 + cached * 0.1e-6 + written * 1.25e-6 + 5 * 10e-6
    assert outcomes[0].usd == pytest.approx(usd)
    assert line["tokens_cached"] == cached


async def test_cost_that_is_expected_of_a_conversation_is_that_of_its_cached_prompts() -> None:
    """By the price of input it would be nine times what it costs."""
    usage = {**COUNTS, "prompt_tokens": 10_000, "prompt_tokens_details": {"cached_tokens": 9_900}}
    usd = (100 + 9_900 * 0.1 + 5 * 10) * 1e-6
    async with (
        RawBackend(json_answer({**CHAT.document, "usage": usage})) as backend,
        billing({"url": backend, **BY_CACHE}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        for number in (1, 2):
            assert (await client.ask(chat())).status == 200
            line = (await p.exchanges(number))[-1]
            assert (line["tokens_in"], line["tokens_cached"]) == (10_000, 9_900)
            assert line["cost_usd"] == pytest.approx(usd)
    assert [each.usd for each in outcomes] == pytest.approx([usd, usd])
    assert outcomes[1].expected_usd == pytest.approx(usd)


async def test_stream_of_a_cached_prompt_when_the_client_leaves_is_charged_by_its_cache() -> None:
    """Anthropic tells the input first, with what came from the cache; the output is guessed."""
    _, (start, *_), _ = TOLD["messages, cut"]
    script, left = silent(SSE_HEAD, chunk(start), chunk(delta("a")))
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_CACHE}) as (p, outcomes),
    ):
        async with RawClient(p.port) as client:
            await client.send(asks("/v1/messages", stream=True))
            await client.read_until(b"content_block_delta")
        await asyncio.wait_for(left.wait(), 5)
        await p.exchanges(1)
    (outcome,) = outcomes
    assert outcome.usage == Usage(33, 1, True, 30, 2)
    assert outcome.usd == pytest.approx((1 + 30 * 0.1 + 2 * 1.25 + 1 * 10) * 1e-6)


@pytest.mark.parametrize("wrong", [1 << 24, 10**400], ids=["too many", "no float"])
@pytest.mark.parametrize("translated", [False, True])
async def test_tokens_when_the_count_is_beyond_any_model_are_estimated(
    translated: bool, wrong: int
) -> None:
    """One wrong answer emptied the budget of a month; a longer number was no float."""
    counts = {"prompt_tokens": wrong, "completion_tokens": wrong}
    script = json_answer({**CHAT.document, "usage": counts})
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        data = asks("/inference", size=40) if translated else CHAT.request(stream=False)
        assert (await client.ask(data)).status == 200
        (said,) = await p.exchanges(1)
    (outcome,) = outcomes
    assert outcome.usage is not None
    assert outcome.usage.estimated
    assert said["cost_usd"] < 0.01


# -- a client that leaves, a stream that breaks --------------------------------------------------


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
@pytest.mark.parametrize("translated", [False, True])
async def test_stream_when_the_client_leaves_is_charged_for_what_ran(
    api: Api, translated: bool
) -> None:
    if translated and api is not CHAT:
        return  # `openai` asks every backend in the words of a chat
    script, left = silent(api.head, *map(chunk, api.quiet + api.content))
    data = asks("/inference", stream=True, size=80) if translated else api.request(stream=True)
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(data)
        for _ in range(3):
            await client.read_until(b"hello ")
        began = time.monotonic()
        await asyncio.sleep(0.03)
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        (said,) = await p.exchanges(1)
    given = 5 if api is MESSAGES else 20 if translated else guessed(data)
    (outcome,) = outcomes
    assert (outcome.verdict, outcome.fault) == (Verdict.NEUTRAL, Fault.CLIENT_CLOSED)
    assert outcome.usage == Usage(given, 3, estimated=True)
    assert outcome.usd == pytest.approx(given * 1e-6 + 3 * 10e-6)
    assert 0.028 <= outcome.billed <= outcome.duration <= time.monotonic() - began + 5
    assert said["tokens_estimated"] is True


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
async def test_document_when_the_client_leaves_is_charged_for_what_ran(api: Api) -> None:
    """What it wrote nobody knows, and nobody bills; it has read the prompt."""
    script, left = silent()
    async with (
        RawBackend(script) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(data := api.request(stream=False))
        await eventually(lambda: backend.requests)
        await asyncio.sleep(0.03)
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
    (outcome,) = outcomes
    assert outcome.usage == Usage(guessed(data), 0, estimated=True)
    assert 0.028 <= outcome.billed == outcome.usd <= outcome.duration


def teach(p: Proxy, seconds: float, output: float) -> None:
    """What answers of model m, and on paths that we do not know, took of late."""
    for candidate in p.app.fleet.candidates():
        for work in ("m", OTHER_POST):
            known = candidate.live.typical.setdefault(work, Typical())
            known.billed, known.input, known.output = seconds, 10.0, output


@asynccontextmanager
async def left_after(
    data: bytes, seconds: float, *pieces: bytes, typical: float, starts: float | None = None
) -> AsyncIterator[Outcome]:
    """The outcome of a client that left after `seconds`, by the token; 0: its time was over.

    Of late such work took `typical` s and wrote 1000 tokens; what is learnt meanwhile is not held
    against it. `starts`: s that the backend takes to start, which it has to; 0: nobody knows.
    """
    script, left = silent(*pieces)
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        teach(p, typical, 1000.0)
        (live,) = [candidate.live for candidate in p.app.fleet.candidates()]
        if starts is not None:
            live.learn_warmth(Warmth.COLD, inf)
        if starts:
            live.cold_starts.note(starts)
        await client.send(data)
        await eventually(lambda: backend.requests)
        teach(p, 1e-9, 1e6)
        if pieces:
            await client.head()
        if seconds:
            await asyncio.sleep(seconds)
            client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
        (outcome,) = outcomes
        assert outcome.verdict is Verdict.NEUTRAL
        yield outcome


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
@pytest.mark.parametrize("typical", [1e-6, 1.0, 1e9])
async def test_document_by_the_token_when_the_client_leaves_is_charged_by_its_time(
    api: Api, typical: float
) -> None:
    """25 of them, each at 0.95 s of 1 s, cost less than one whole answer."""
    data = api.request(stream=False)
    async with left_after(data, 0.05, typical=typical) as outcome:
        assert outcome.usage is not None
        assert (outcome.usage.input, outcome.usage.estimated) == (guessed(data), True)
        if typical == 1.0:
            assert 49 <= outcome.usage.output <= round(1000 * outcome.duration)
        else:
            assert outcome.usage.output == (1000 if typical < 1.0 else 0)
        paid = guessed(data) * 1e-6 + outcome.usage.output * 10e-6
        assert outcome.usd == pytest.approx(paid)


@pytest.mark.parametrize(("starts", "output"), [(0.0, 0), (100.0, 0), (0.001, 1000)])
async def test_document_by_the_token_when_its_backend_was_starting_is_charged_from_then_on(
    starts: float, output: int
) -> None:
    """Who waits for a start in vain, again and again, spends no answer each time."""
    data = chat()
    async with left_after(data, 0.05, typical=1e-6, starts=starts) as outcome:
        assert outcome.usage == Usage(guessed(data), output, estimated=True)


async def test_document_by_the_token_when_the_clients_time_is_over_is_charged_by_its_time() -> None:
    data = chat(headers=[("X-Beacon-Timeout", "0.05")])
    async with left_after(data, 0.0, typical=1e-6) as outcome:
        assert outcome.fault is Fault.DEADLINE
        assert outcome.usage == Usage(guessed(data), 1000, estimated=True)


DOCUMENT_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
)


async def test_document_by_the_token_when_only_its_head_has_come_is_charged_by_its_time() -> None:
    """Some send it at once, and blanks until they know what to say."""
    data = chat()
    async with left_after(data, 0.01, DOCUMENT_HEAD + b"  ", typical=1e-6) as outcome:
        assert outcome.usage == Usage(guessed(data), 1000, estimated=True)
    async with left_after(data, 0.01, DOCUMENT_HEAD + b" " * 8000, typical=1e9) as outcome:
        assert outcome.usage == Usage(guessed(data), 2000, estimated=True)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(asks("/v1/embeddings"), id="embeddings"),
        pytest.param(chat(stream=True), id="a stream, of which nothing has come"),
    ],
)
async def test_what_writes_nothing_unseen_when_the_client_leaves_is_charged_its_input(
    data: bytes,
) -> None:
    async with left_after(data, 0.01, typical=1e-6) as outcome:
        assert outcome.usage == Usage(guessed(data), 0, estimated=True)


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("pieces", [(), (DOCUMENT_HEAD + b"{",)], ids=["silent", "begun"])
async def test_cost_on_a_path_that_we_do_not_know_when_the_client_leaves_is_by_its_time(
    path: str, pieces: tuple[bytes, ...]
) -> None:
    """It was free until the head had come, and from then on the whole of it was paid for."""
    whole = 10e-6 + 1000 * 10e-6
    for typical in (1e-6, 1.0, 1e9):
        async with left_after(asks(path), 0.05, *pieces, typical=typical) as outcome:
            assert outcome.usage is None
            assert outcome.expected_usd == pytest.approx(whole)
            if typical == 1.0:
                assert 0.049 * whole <= outcome.usd <= outcome.duration * whole
            else:
                assert outcome.usd == pytest.approx(whole if typical < 1.0 else 0.0, abs=1e-9)


async def test_count_of_tokens_when_the_client_leaves_is_charged_none() -> None:
    script, left = silent()
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(asks("/v1/messages/count_tokens"))
        await eventually(lambda: backend.requests)
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
    assert [(each.usage, each.usd) for each in outcomes] == [(None, 0.0)]


async def test_document_when_the_client_leaves_inside_it_is_charged_for_what_came() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
    script, left = silent(head, b"{" + b" " * 3999)
    async with (
        RawBackend(script) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(data := chat())
        assert (await client.head()).status == 200
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
    assert [each.usage for each in outcomes] == [Usage(guessed(data), 1000, estimated=True)]


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_stream_when_it_breaks_is_charged_for_what_ran(api: Api, how: str) -> None:
    async def script(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(api.head + b"".join(map(chunk, api.quiet + api.content)))
        await shown.wait()
        getattr(conn, how)()

    shown = asyncio.Event()
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **BY_TOKENS}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(data := api.request(stream=True))
        await client.read_until(b"hello ")
        shown.set()
        await p.exchanges(1)
    (outcome,) = outcomes
    assert (outcome.verdict, outcome.stage) == (Verdict.STRIKE, Stage.STREAM)
    given = 5 if api is MESSAGES else guessed(data)
    assert outcome.usage == Usage(given, 3, estimated=True)
    assert outcome.billed > 0


async def test_stream_when_each_chunk_counts_and_the_client_leaves_is_charged_by_the_last() -> None:
    """vLLM's continuous_usage_stats: what it says, nobody need guess."""
    _, pieces, _ = TOLD["vLLM, continuous, cut"]
    script, left = silent(SSE_HEAD, *map(chunk, pieces))
    async with (
        RawBackend(script) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(chat(stream=True))
        await client.read_until(b'"completion_tokens":3}')
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
    assert [each.usage for each in outcomes] == [Usage(33, 3)]


async def test_picture_when_the_client_leaves_is_not_charged_as_text() -> None:
    url = "data:image/png;base64," + "A" * 400_000
    picture = {"type": "image_url", "image_url": {"url": url}}
    body = json.dumps({"messages": [{"role": "user", "content": [picture]}]}).encode()
    script, left = silent()
    async with (
        RawBackend(script) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        fields = [("Content-Type", "application/json")]
        await client.send(request("POST", CHAT.path, fields, body))
        await eventually(lambda: backend.requests)
        client.close()
        async with asyncio.timeout(2):
            await left.wait()
        await p.exchanges(1)
    (outcome,) = outcomes
    assert outcome.usage is not None
    assert 1000 <= outcome.usage.input <= 1100


@pytest.mark.parametrize("path", [CHAT.path, "/v1/audio/transcriptions"])
@pytest.mark.parametrize("price", [DOLLAR, BY_TOKENS], ids=["seconds", "tokens"])
async def test_upload_when_the_client_leaves_in_it_is_charged_seconds_and_no_tokens(
    path: str, price: dict[str, Any]
) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path.encode()
    size = 6 << 20  # past the replay cap, so it goes out as it comes

    async def script(conn: BackendConn) -> None:
        await conn.head_only()
        asked.set()
        await conn.wait_closed()

    asked = asyncio.Event()
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, **price}) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(head + b"Content-Length: %d\r\n\r\n{" % size + b" " * (5 << 20))
        async with asyncio.timeout(5):
            await asked.wait()
        await asyncio.sleep(0.03)
        client.close()
        await p.exchanges(1)
    (outcome,) = outcomes
    assert (outcome.usage, outcome.stage) == (None, Stage.SEND)
    assert outcome.billed >= 0.028
    assert outcome.usd == (outcome.billed if price is DOLLAR else 0.0)


# -- seconds -------------------------------------------------------------------------------------


def takes(seconds: float, answer: bytes = json_bytes(GOOD)) -> Script:
    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await asyncio.sleep(seconds)
            await conn.send(answer)

    return script


async def test_seconds_when_a_connection_is_made_or_used_again_are_those_of_the_work() -> None:
    async with (
        RawBackend(takes(0.03)) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        for _ in range(2):
            assert (await client.ask(chat())).status == 200
        await p.exchanges(2)
        posts = [each for each in backend.requests if each.method == "POST"]
    assert len(posts) == 2
    for outcome in outcomes:
        assert 0.028 <= outcome.billed == outcome.usd <= outcome.duration
        assert outcome.cold_start is None


async def test_seconds_when_the_idle_connection_was_stale_are_paid_once() -> None:
    """The same request goes out again on a fresh one: still one attempt."""

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            asked.append(conn)
            if conn is not asked[0]:
                await asyncio.sleep(0.03)
            elif len(asked) > 1:
                await asyncio.sleep(0.05)
                conn.close()
                return
            await conn.send(json_bytes(GOOD))

    asked: list[BackendConn] = []
    quiet: Any = {"middleware": [{"failover": {}}]}
    async with (
        RawBackend(script) as backend,
        billing({"url": backend, "models": ["m"]}, **quiet) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        asked.clear()
        for _ in range(2):
            assert (await client.ask(chat())).status == 200
        await p.exchanges(2)
    assert [each.number for each in outcomes] == [1, 1]
    assert 0.077 <= outcomes[1].billed <= outcomes[1].duration, "what it did before it closed, too"


async def test_seconds_when_one_fails_and_another_answers_are_paid_at_both() -> None:
    async with (
        RawBackend(takes(0.03, json_bytes({"error": {"message": "x"}}, 500))) as bad,
        RawBackend(takes(0.03)) as good,
        billing({"url": bad, "price_per_second": 0.5}, {"url": good, "price_per_second": 2.0}) as (
            p,
            outcomes,
        ),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat(headers=[CHEAPEST]))).status == 200
        (said,) = await p.exchanges(1)
    first, second = outcomes
    assert (first.status, first.usage, second.status) == (500, None, 200)
    assert first.usd == pytest.approx(0.5 * first.billed)
    assert second.usd == pytest.approx(2.0 * second.billed)
    assert min(first.billed, second.billed) >= 0.028
    assert said["cost_usd"] == pytest.approx(first.usd + second.usd)
    assert sum(each.billed for each in outcomes) < said["duration_s"]


async def test_seconds_when_nothing_was_sent_are_none() -> None:
    with closed_port() as port:
        row = {"url": f"http://127.0.0.1:{port}", "models": ["m"]}
        async with billing(row) as (p, outcomes), RawClient(p.port) as client:
            assert (await client.ask(chat())).status == 502
            await p.exchanges(1)
    (outcome,) = outcomes
    assert (outcome.billed, outcome.usd, outcome.usage) == (0.0, 0.0, None)
    assert outcome.duration > 0


async def test_seconds_when_the_result_is_elsewhere_are_paid_until_it_has_come() -> None:
    async def script(conn: BackendConn) -> None:
        async for got in each_request(conn):
            await asyncio.sleep(0.02)
            await conn.send(SEE_OTHER if got.method == "POST" else json_bytes(GOOD))

    async with (
        RawBackend(script) as backend,
        billing(hopping(backend), providers=HOPS) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
    (outcome,) = outcomes
    assert 0.037 <= outcome.billed == outcome.usd <= outcome.duration
    assert outcome.usage == Usage(33, 5)


async def test_seconds_of_a_cold_start_are_paid_and_told_apart() -> None:
    """By our clock; a provider's own word is in tests/test_bill_runpod.py."""
    async with (
        Warming() as backend,
        billing(hopping(backend), providers=HOPS) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(chat())
        await eventually(lambda: len(backend.requests) >= 3)
        backend.ready.set()
        assert (await client.response("POST")).status == 200
        await client.ask(chat())
        await p.exchanges(2)
    cold, warm = outcomes
    assert cold.cold_start is not None
    assert 0.037 <= cold.cold_start <= cold.duration, "two waits of 0.02 s"
    assert 0.037 <= cold.billed <= cold.duration
    assert warm.cold_start is None


async def test_seconds_of_a_load_are_told_as_ollama_counts_them() -> None:
    last = {"message": {"content": ""}, "done": True, "load_duration": 2_500_000_000}
    counts = {"prompt_eval_count": 33, "eval_count": 5}
    pieces = (*OLLAMA_CHAT.content, json.dumps({**last, **counts}).encode() + b"\n")
    async with (
        RawBackend(sse(pieces, head=OLLAMA_CHAT.head)) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.ask(OLLAMA_CHAT.request(stream=True))
        await p.exchanges(1)
    assert [(each.cold_start, each.usage) for each in outcomes] == [(2.5, Usage(33, 5))]


async def test_seconds_of_a_tunnel_are_paid_until_it_is_closed() -> None:
    async with (
        RawBackend(switch()) as backend,
        billing(backend) as (p, outcomes),
        RawClient(p.port) as client,
    ):
        await client.send(HANDSHAKE)
        assert (await client.response()).status == 101
        await asyncio.sleep(0.03)
        client.close()
        await p.exchanges(1)
    (outcome,) = outcomes
    assert 0.028 <= outcome.billed == outcome.usd
    assert (outcome.usage, outcome.status) == (None, 101)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan"), "soon", None, 10**400])
async def test_seconds_that_are_none_are_no_word_of_a_provider(seconds: Any) -> None:
    async def work(submission: Submission, reply: Replies) -> None:
        reply.billed(seconds)
        reply.started_cold(seconds)
        reply.head(200, JSON)
        reply.piece(json.dumps(GOOD).encode())
        reply.end()

    outcomes = list[Outcome]()
    async with carried(work, outcomes=outcomes) as (p, _), RawClient(p.port) as client:
        assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
    assert 0 < outcomes[0].billed <= outcomes[0].duration
    assert outcomes[0].cold_start is None


async def test_seconds_that_are_numbers_of_another_kind_are_understood() -> None:
    said: Any = Decimal("1.5")  # as JSON may be read

    async def work(submission: Submission, reply: Replies) -> None:
        reply.billed(said)
        reply.started_cold(said)
        await document(GOOD)(submission, reply)

    outcomes = list[Outcome]()
    async with carried(work, outcomes=outcomes) as (p, _), RawClient(p.port) as client:
        assert (await client.ask(chat())).status == 200
        await p.exchanges(1)
    found = outcomes[0].billed, outcomes[0].cold_start
    assert found == (1.5, 1.5)
    assert {type(each) for each in found} == {float}


async def test_seconds_when_a_provider_says_that_the_work_runs_our_clock_goes_on() -> None:
    async def work(submission: Submission, reply: Replies) -> None:
        reply.billed(100.0, running=True)
        begun.set()
        await asyncio.Event().wait()

    begun, outcomes = asyncio.Event(), list[Outcome]()
    async with carried(work, outcomes=outcomes) as (p, _):
        async with RawClient(p.port) as client:
            await client.send(chat())
            await begun.wait()
            await asyncio.sleep(0.03)
        await p.exchanges(1)
    assert 100.028 <= outcomes[0].billed <= 100.0 + outcomes[0].duration


@pytest.mark.parametrize("end", ["answer", "leave"])
async def test_seconds_that_a_provider_reports_take_the_place_of_our_clock(end: str) -> None:
    async def work(submission: Submission, reply: Replies) -> None:
        reply.billed(9.0)
        reply.head(200, JSON)
        reply.piece(json.dumps(GOOD).encode())
        reply.billed(2.5)
        begun.set()
        if end == "leave":
            await asyncio.Event().wait()
        reply.end()

    begun, outcomes = asyncio.Event(), list[Outcome]()
    async with carried(work, outcomes=outcomes) as (p, _):
        async with RawClient(p.port) as client:
            await client.send(chat())
            await begun.wait()
            if end == "answer":
                assert (await client.response("POST")).status == 200
        await p.exchanges(1)
    (outcome,) = outcomes
    assert outcome.billed == 2.5
    assert outcome.usd == pytest.approx(2.5 * outcome.backend.price_per_second)
