"""Models: what is served under which name, how that is kept up to date, and what each backend gets.

A backend here is a script on a real socket; where it is asked what it serves, it answers as Ollama
does (facts 4.1).
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, ClassVar

import aiohttp
import pytest

from beacon_proxy.api.intake import look
from beacon_proxy.contracts import (
    Backend,
    Check,
    Exchange,
    Headers,
    Reply,
    Submission,
    Verdict,
)
from beacon_proxy.errors import ConfigError
from beacon_proxy.plugins import Plugins
from beacon_proxy.wire.upload import Upload
from providers.openai import OpenAI

from . import kit_proxy
from .kit import (
    APIS,
    CHAT,
    Api,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    chat,
    eventually,
    header,
    json_answer,
    json_bytes,
    plugins,
    proxy,
    request,
)
from .test_cases_ext_routing import CHEAPEST, ask, backend_of, chain
from .test_inference_route import ask as infer
from .test_inference_route import read as read_inference

ALIAS, TARGET = "llama3.2:1b", "meta-llama/Llama-3.2-1B-Instruct"
TO_TARGET = {ALIAS: TARGET}
QUIET: dict[str, Any] = {"middleware": chain(health={"probe_interval": 0})}
BROKEN = {"error": {"message": "CUDA error", "type": "server_error"}}
GOOD = CHAT.document


def asks(body: bytes, path: str = CHAT.path, *fields: tuple[str, str]) -> bytes:
    return request("POST", path, [CHEAPEST, *fields], body)


def chunked(*pieces: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


class Ollama:
    """Lists its models, answers those and has a 404 for the others, in Ollama's words."""

    def __init__(self, *models: str) -> None:
        self.models = list(models)
        self.hot: list[str] = []
        self.asked: list[str] = []  # models of requests
        self.looks = 0  # at its list
        self.slow = 0.0  # s before the list

    async def script(self, conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            if received.target == b"/v1/models":
                self.looks += 1
                await asyncio.sleep(self.slow)
                rows = [{"id": name, "owned_by": "library"} for name in self.models]
                await conn.send(json_bytes({"object": "list", "data": rows}))
            elif received.target == b"/api/ps":
                await conn.send(json_bytes({"models": [{"name": name} for name in self.hot]}))
            else:
                model = received.json["model"]
                self.asked.append(model)
                lacks = {"error": f'model "{model}" not found, try pulling it first'}
                known = model in self.models
                await conn.send(json_bytes(GOOD) if known else json_bytes(lacks, 404))

    def backend(self) -> RawBackend:
        return RawBackend(self.script, eager=True)


def chat_for(model: str) -> bytes:
    return asks(json.dumps({"model": model, "messages": []}).encode())


async def get(p: Proxy, path: str) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{p.port}{path}") as answer,
    ):
        return await answer.json()


async def names(p: Proxy) -> set[str]:
    return {row["id"] for row in (await get(p, "/v1/models"))["data"]}


# -- another name: the bytes of the value, and no others


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"models": [TARGET], "aliases": TO_TARGET}, id="alias of a configured model"),
        pytest.param({"models": [ALIAS], "aliases": TO_TARGET}, id="configured as clients say it"),
        pytest.param({"aliases": TO_TARGET}, id="alias, models not known"),
        pytest.param({"models": [TARGET], "aliases": {"LLAMA3.2-1b": TARGET}}, id="other spelling"),
    ],
)
async def test_rename_when_a_backend_has_an_alias_changes_the_value_and_no_other_byte(
    row: dict[str, Any],
) -> None:
    before = b'{ "messages" : [{"role":"user","content":"\\u2600 \\"model\\": \\"llama3.2:1b\\""}],'
    before += b'\n"tools":[{"model":"llama3.2:1b"}], "metadata":{"model":"llama3.2:1b"},"model"\t: '
    after = b' ,"temperature":1.0,"n":1e0 }\n'
    body = before + b'"llama3.2\\u003a1b"' + after
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, **row}, **QUIET) as p:
            got = await ask(p, asks(body, CHAT.path, ("X-Other", "kept")))
        (received,) = backend.requests
    assert got.status == 200
    assert received.body == before + json.dumps(TARGET).encode() + after
    assert received.header("content-length") == [b"%d" % len(received.body)]
    assert received.header("x-other") == [b"kept"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
async def test_rename_works_on_every_route(api: Api, stream: bool) -> None:
    async with RawBackend(json_answer(api.document)) as backend:
        async with (
            proxy({"url": backend, "aliases": {"m": TARGET}}, **QUIET) as p,
            RawClient(p.port) as client,
        ):
            await client.ask(api.request(stream=stream), "POST")
        (received,) = backend.requests
    assert received.json == {**json.loads(api.body(stream=stream)), "model": TARGET}


async def test_rename_when_a_route_is_none_of_inference_works_too() -> None:
    async with RawBackend(json_answer({"tokens": []})) as backend:
        async with proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p:
            await ask(p, asks(b'{"model":"llama3.2:1b"}', "/tokenize"))
        assert backend.requests[0].json == {"model": TARGET}


async def test_rename_when_the_name_is_right_or_unknown_leaves_body_and_fields_alone() -> None:
    """The digest stays with the bytes that it is of, and goes where they change."""
    digest = ("Content-Digest", "sha-256=:AAAA:")
    async with (
        RawBackend(json_answer(GOOD)) as backend,
        proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p,
    ):
        for body in (b'{ "model":"%b"}' % TARGET.encode(), b'{"model" :"other"}', b'{"x":1}'):
            await ask(p, asks(body, CHAT.path, digest))
            assert backend.requests[-1].body == body
            assert backend.requests[-1].header("content-digest") == [b"sha-256=:AAAA:"]
        await ask(p, asks(b'{"model":"llama3.2:1b"}', CHAT.path, digest))
        assert backend.requests[-1].header("content-digest") == []


async def test_rename_when_attempts_fail_gives_each_backend_its_own_name_of_the_clients() -> None:
    async with AsyncExitStack() as stack:
        scripts = [json_answer(BROKEN, 500)] * 2 + [json_answer(GOOD)]
        one, two, three = [await stack.enter_async_context(RawBackend(s)) for s in scripts]
        rows = [
            {"url": one, "price_per_second": 0.001, "aliases": {"m": "first/m"}},
            {"url": two, "price_per_second": 0.002, "models": ["m"]},
            {"url": three, "price_per_second": 0.003, "aliases": {"M": "third-m"}},
        ]
        p = await stack.enter_async_context(proxy(*rows, **QUIET))
        body = b'{"model" : "m", "n":1}'
        got = await ask(p, asks(body))
        assert (got.status, header(got.headers, "X-Beacon-Attempts")) == (200, [b"3"])
    said = [backend.requests[0].body for backend in (one, two, three)]
    assert said == [body.replace(b'"m"', b'"%b"' % name) for name in (b"first/m", b"m", b"third-m")]


@pytest.mark.parametrize("pieces", [1, 7])
async def test_rename_when_the_body_is_chunked_frames_it_anew(pieces: int) -> None:
    body = b'{"messages":[],"model":"llama3.2:1b","stream":false}'
    size = -(-len(body) // pieces)
    data = chunked(*(body[at : at + size] for at in range(0, len(body), size)))
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p:
            got = await ask(p, data)
        (received,) = backend.requests
    assert (got.status, received.complete) == (200, True)
    assert received.body == body.replace(ALIAS.encode(), TARGET.encode())
    assert received.header("content-length") == []


IMAGE = b'{"messages":[{"content":"%b","model":"x"}]'


@pytest.mark.parametrize("frame", ["length", "chunked"])
@pytest.mark.parametrize(
    ("size", "at", "renamed"),
    [
        pytest.param(1 << 20, "end", True, id="1 MiB, model behind the messages"),
        pytest.param(1 << 20, "start", True, id="1 MiB, model before them"),
        pytest.param(5 << 20, "start", True, id="past the replay cap, model before"),
        pytest.param(5 << 20, "end", False, id="past the replay cap, model behind: not seen"),
    ],
)
async def test_rename_when_the_body_is_large_replaces_what_was_looked_at(
    size: int, at: str, renamed: bool, frame: str
) -> None:
    model = b'"model":"llama3.2:1b"'
    messages = IMAGE[1:] % (b"A" * size)
    body = b"{%b,%b}" % ((model, messages) if at == "start" else (messages, model))
    pieces = [body[i : i + 60_000] for i in range(0, len(body), 60_000)]
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p:
            got = await ask(p, chunked(*pieces) if frame == "chunked" else asks(body))
        (received,) = backend.requests
    expected = body.replace(b"llama3.2:1b", TARGET.encode()) if renamed else body
    assert (got.status, received.complete) == (200, True), received.fault
    assert received.body == expected


@pytest.mark.parametrize("body", [b'{"model":"llama3.2:1b",}', b'{"model":"llama3.2:1b"', b"\xff"])
async def test_rename_when_body_is_malformed_leaves_it_to_the_backend(body: bytes) -> None:
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p:
            await ask(p, asks(body))
        assert backend.requests[0].body == body


async def test_rename_when_inference_is_asked_follows_the_same_rule() -> None:
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, "aliases": TO_TARGET}, **QUIET) as p:
            said = read_inference(await infer(p, model="llama3.2-1b"))
        assert said["success"]
        assert backend.requests[0].json["model"] == TARGET


# -- providers with a transport of their own, and what a client calls its conversation


class Carrier(OpenAI):
    """A provider that takes requests to its backends itself, and keeps what it was given."""

    name = "carrier"
    seen: list[Submission] = []  # noqa: RUF012 - of the class, for the object is the core's

    def carries(self, backend: Backend) -> bool:
        return True

    async def carry(
        self, backend: Backend, submission: Submission, reply: Reply, session: Any
    ) -> None:
        self.seen.append(submission)
        reply.head(200, ((b"Content-Type", b"application/json"),))
        reply.piece(json.dumps(GOOD).encode())
        reply.end()


class Affine(OpenAI):
    """A provider that tells its backends which conversation a request belongs to."""

    name = "affine"
    reads_session = True

    def fields(self, backend: Backend, exchange: Exchange) -> Headers:
        return ((b"X-Told", exchange.session.encode()),) if exchange.session else ()


@pytest.fixture
def more_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    known = plugins()
    providers = {**known.providers, "carrier": Carrier, "affine": Affine}
    monkeypatch.setattr(kit_proxy, "plugins", lambda: Plugins(providers, known.middleware))
    Carrier.seen.clear()


@pytest.mark.usefixtures("more_providers")
@pytest.mark.parametrize("size", [10, 5 << 20], ids=["small", "past the replay cap"])
async def test_rename_when_a_provider_carries_the_request_it_gets_the_new_body(size: int) -> None:
    body = b'{"messages":["%b"], "model" : "llama3.2:1b","n":1}' % (b"a" * size)
    if size > 1000:
        body = b'{"model" : "llama3.2:1b", %b' % body[1:].replace(b"model", b"other")
    row = {"url": "http://127.0.0.1:1", "provider": "carrier", "aliases": TO_TARGET}
    async with proxy(row, **QUIET) as p:
        got = await ask(p, asks(body))
    (submission,) = Carrier.seen
    assert got.json == GOOD
    end = body.rindex(b'"other"') if size > 1000 else len(body)
    assert submission.body == body[:end].replace(ALIAS.encode(), TARGET.encode()) + body[end:]
    lengths = header(list(submission.headers), "content-length")
    assert lengths == [b"%d" % len(submission.body)]


ID = "sess-1"


@pytest.mark.usefixtures("more_providers")
@pytest.mark.parametrize(
    ("fields", "body", "told"),
    [
        ([("Modal-Session-ID", ID)], {"user": "u"}, ID),
        ([("x-session-id", f" {ID} ")], {"user": "u"}, ID),
        ([("Modal-Session-ID", ID), ("X-Session-Id", "other")], {}, ID),
        ([], {"prompt_cache_key": ID, "user": "u"}, ID),
        ([], {"session_id": ID, "metadata": {"user_id": "u"}}, ID),
        ([], {"user": ID}, ID),
        ([], {"metadata": {"user_id": ID}}, ID),
        ([], {"user": "", "metadata": {"user_id": ID}}, ID),
        ([], {"user": 5, "metadata": "x", "session_id": ["s"]}, None),
        ([], {"user": "u" * 1025}, None),
        ([], {"messages": [{"user": "u"}]}, None),
    ],
)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
async def test_session_when_a_provider_tells_it_is_what_the_client_calls_its_conversation(
    fields: list[tuple[str, str]], body: dict[str, Any], told: str | None, large: bool
) -> None:
    document = {"model": "m", **body, **({"pad": "a" * 300_000} if large else {})}
    async with RawBackend(json_answer(GOOD)) as backend:
        async with proxy({"url": backend, "provider": "affine"}, **QUIET) as p:
            await ask(p, asks(json.dumps(document).encode(), CHAT.path, *fields))
        (received,) = backend.requests
    assert received.header("x-told") == ([told.encode()] if told else [])


async def test_session_when_no_provider_tells_it_is_not_read() -> None:
    exchange = Exchange("i", "POST", b"/x", "/x", (), 0.0, body=b'{"model":"m","user":"u"}')
    look(exchange, None, Upload(None, exchange.body), False)  # type: ignore[arg-type]
    assert (exchange.model, exchange.session) == ("m", None)


# -- what is served


async def test_lists_when_there_are_aliases_hold_both_names() -> None:
    async with Ollama("qwen2:0.5b").backend() as asked, RawBackend(json_answer(GOOD)) as other:
        rows = [
            {"url": asked, "aliases": {"small": "qwen2-0.5b", "gone": "llama2"}},
            {"url": other, "models": [TARGET], "aliases": TO_TARGET},
            {"url": other, "provider": "modal", "aliases": {"big": "unasked"}},
        ]
        async with proxy(*rows) as p:
            await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
            listed = {"qwen2:0.5b", "small", TARGET, ALIAS, "big"}
            assert await names(p) == listed
            assert set((await get(p, "/models"))["models"]) == listed
            assert {row["name"] for row in (await get(p, "/api/tags"))["models"]} == listed
            shown = {
                row["name"]: row["models"] for row in (await get(p, "/providers"))["providers"]
            }
            assert shown == {"b0": ["qwen2:0.5b", "small"], "b1": [ALIAS, TARGET], "b2": None}


async def test_alias_when_the_backend_lists_its_models_holds_only_for_one_of_them() -> None:
    server = Ollama("qwen2:0.5b")
    async with server.backend() as backend:
        row = {"url": backend, "aliases": {"small": "QWEN2-0.5b", "gone": "llama2"}}
        async with proxy(row) as p:
            await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
            assert (await ask(p, chat_for("Small"))).status == 200
            got = await ask(p, chat_for("gone"))
            assert (got.status, got.json["error"]["code"]) == (404, "model_not_found")
    assert server.asked == ["qwen2:0.5b"], "as it spells it itself"


async def test_alias_when_names_collide_goes_before_what_the_backend_calls_its_own() -> None:
    server = Ollama("a", "b")
    async with (
        server.backend() as backend,
        proxy({"url": backend, "aliases": {"a": "b", "b": "a"}}) as p,
    ):
        await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
        for model in ("a", "B", "a"):
            assert (await ask(p, chat_for(model))).status == 200
    assert server.asked == ["b", "a", "b"]


async def test_spelling_when_the_backend_tells_its_own_goes_before_the_configured() -> None:
    """Else the client's right name would be replaced by one that Ollama has not got."""
    server = Ollama("llama3.2:1b", "other:1b")
    async with (
        server.backend() as backend,
        proxy({"url": backend, "models": ["Llama3.2-1b", "Later:7b"]}) as p,
    ):
        await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
        for model in ("llama3.2:1b", "llama3.2-1b", "LLAMA3.2:1b"):
            assert (await ask(p, chat_for(model))).status == 200
        assert (await ask(p, chat_for("other:1b"))).status == 404, "not configured"
        assert await names(p) == {"llama3.2:1b", "Later:7b"}
    assert server.asked == ["llama3.2:1b"] * 3


async def test_spelling_when_two_models_differ_in_it_alone_an_exact_name_finds_its_own() -> None:
    server = Ollama("m:1b", "m-1b")
    async with server.backend() as backend, proxy(backend) as p:
        await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
        for model in ("m:1b", "m-1b"):
            await ask(p, chat_for(model))
    assert server.asked == ["m:1b", "m-1b"]


@pytest.mark.parametrize("aliases", [{"llama3.2:1b": "a", "LLAMA3.2-1b": "b"}])
async def test_config_when_two_aliases_are_one_model_with_two_names_is_refused(
    aliases: dict[str, str],
) -> None:
    with pytest.raises(ConfigError, match="are the same model; must have one name"):
        async with proxy({"url": "http://127.0.0.1:1", "aliases": aliases}):
            pass
    async with proxy({"url": "http://127.0.0.1:1", "aliases": dict.fromkeys(aliases, "a")}):
        pass


# -- kept up to date


async def test_models_when_probes_go_on_come_and_go_as_the_backend_says() -> None:
    server = Ollama("a:1")
    health = {"probe_interval": 0.02}
    async with server.backend() as backend, proxy(backend, middleware=chain(health=health)) as p:
        live = p.app.fleet.candidates()[0].live
        await eventually(lambda: live.models == {"a-1"})
        server.models, server.hot = ["b:1"], ["b:1"]
        await eventually(lambda: live.models == {"b-1"})
        await eventually(lambda: live.hot == {"b-1"})
        assert await names(p) == {"b:1"}
        assert (await get(p, "/providers"))["providers"][0]["warmth"] == "warm"
        server.hot = []
        await eventually(lambda: live.hot == set())


async def test_model_when_it_is_new_on_a_backend_is_found_by_the_first_who_asks_for_it() -> None:
    """It was a 404 for up to ten intervals, where clients kept the probes away."""
    server, other = Ollama("a:1"), Ollama("x:1")
    async with (
        server.backend() as backend,
        other.backend() as second,
        proxy(backend, second, middleware=chain(health={"probe_interval": 300})) as p,
    ):
        fleet = p.app.fleet
        await eventually(lambda: all(c.live.models is not None for c in fleet.candidates()))
        server.models, server.slow = ["a:1", "b:1"], 0.1
        before = server.looks
        seen = await asyncio.gather(*(ask(p, chat_for("b-1")) for _ in range(8)))
        assert [got.status for got in seen] == [200] * 8
        assert server.looks == before + 1, "one look for all of them"
    assert server.asked == ["b:1"] * 8
    assert other.asked == []


async def test_model_when_nobody_has_it_is_looked_for_once_in_a_while() -> None:
    server = Ollama("a:1")
    async with server.backend() as backend, RawBackend(json_answer(GOOD)) as configured:
        rows = {"url": backend}, {"url": configured, "models": ["x"]}
        async with proxy(*rows, middleware=chain(health={"probe_interval": 300})) as p:
            fleet = p.app.fleet
            await eventually(lambda: fleet.candidates()[0].live.models is not None)
            before = server.looks
            for number in range(4):
                got = await ask(p, chat_for(f"no-{number}"))
                assert (got.status, got.json["error"]["code"]) == (404, "model_not_found")
            assert server.looks == before + 1
            server.models = ["b:1"]
            fleet.now = lambda now=fleet.now: now() + 6.0
            assert (await ask(p, chat_for("b:1"))).status == 200


async def test_model_when_the_look_takes_too_long_is_a_404_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("beacon_proxy.fleet.fleet._LOOK_TIME", 0.1)
    server = Ollama("a:1")
    async with (
        server.backend() as backend,
        proxy(backend, middleware=chain(health={"probe_interval": 300})) as p,
    ):
        await eventually(lambda: p.app.fleet.candidates()[0].live.models is not None)
        server.slow = 60.0
        assert (await ask(p, chat_for("b:1"))).status == 404
        assert (await ask(p, chat_for("a:1"))).status == 200, "what it served it serves"


async def test_model_when_a_backend_removed_it_the_next_is_asked_and_the_list_anew() -> None:
    first, second = Ollama("m:1", "n:1"), Ollama("m:1")
    async with first.backend() as one, second.backend() as two:
        rows = [{"url": one, "price_per_second": 0.001}, {"url": two, "price_per_second": 0.1}]
        async with proxy(*rows, middleware=chain(health={"probe_interval": 300})) as p:
            lives = [c.live for c in p.app.fleet.candidates()]
            await eventually(lambda: all(live.models is not None for live in lives))
            first.models = ["n:1"]
            for live in lives:
                live.last_check -= 6.0  # else they were asked just now
            got = await ask(p, chat_for("m:1"))
            assert (got.status, backend_of(got)) == (200, "b1")
            await eventually(lambda: lives[0].models == {"n-1"})
            assert (await ask(p, chat_for("m:1"))).status == 200
            assert (lives[0].healthy, lives[0].success) == (True, 1.0)
    assert (first.asked, second.asked) == (["m:1"], ["m:1", "m:1"])


async def test_model_when_the_only_backend_has_a_404_for_it_that_is_the_answer() -> None:
    """Its list says that it has the model: the request may be to blame, and the next one not."""
    server = Ollama("m:1")
    async with (
        server.backend() as backend,
        proxy(backend, middleware=chain(health={"probe_interval": 300})) as p,
    ):
        live = p.app.fleet.candidates()[0].live
        await eventually(lambda: live.models is not None)
        live.models, live.names = frozenset({"m-1", "x"}), {}
        for _ in range(2):
            got = await ask(p, chat_for("x"))
            assert got.json == {"error": 'model "x" not found, try pulling it first'}
    assert server.asked == ["x", "x"]


def test_backend_with_aliases_is_a_fact_like_any_other() -> None:
    one = Backend("b", "openai", "http://h", "http", "h", 80, aliases=(("a", "b"),))
    assert replace(one) == one
    assert hash(one) == hash(replace(one))


SPOKEN = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}


class Slow(OpenAI):
    """Lists `new` from the second question on, half a second after it was put."""

    asked = 0

    async def check(self, backend: Backend, session: Any) -> Check:
        type(self).asked += 1
        await asyncio.sleep(0.0 if self.asked == 1 else 0.3)
        return Check(Verdict.GOOD, models=("old",) if self.asked == 1 else ("old", "new"))


async def test_model_when_who_looked_for_it_leaves_the_others_still_learn_of_it() -> None:
    kind = type("Kind", (Slow,), {})
    async with RawBackend(json_answer(SPOKEN)) as server:
        row = {"provider": "slow", "url": server.url}
        kinds: dict[str, type] = {"slow": kind}
        async with proxy(row, providers=kinds) as p:
            await eventually(lambda: p.app.fleet.candidates()[0].live.models)
            async with RawClient(p.port) as first:
                await first.send(chat(model="new"))
                await eventually(lambda: kind.asked == 2)
            async with RawClient(p.port) as second:
                assert (await second.ask(chat(model="new"))).status == 200


async def test_model_when_many_backends_are_silent_it_is_found_on_the_one_that_speaks() -> None:
    class Silent(OpenAI):
        asked: ClassVar[dict[str, int]] = {}

        async def check(self, backend: Backend, session: Any) -> Check:
            count = self.asked[backend.name] = self.asked.get(backend.name, 0) + 1
            if count == 1:
                return Check(Verdict.GOOD, models=("old",))
            if backend.name != "b39":
                await asyncio.Event().wait()
            return Check(Verdict.GOOD, models=("new",))

    async with RawBackend(json_answer(SPOKEN)) as server:
        rows = [{"provider": "silent", "url": server.url} for _ in range(40)]
        async with proxy(*rows, providers={"silent": Silent}) as p, RawClient(p.port) as client:
            await eventually(lambda: all(c.live.models for c in p.app.fleet.candidates()))
            got = await client.ask(chat(model="new"))
            assert (got.status, got.header("x-beacon-backend")) == (200, [b"b39"])
