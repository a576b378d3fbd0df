"""What the ledger holds against what a real server says, in every dialect, streamed or not.

llama.cpp says it in three places: in the answer itself, whose bytes the client has; in `/metrics`,
whose counters grow; and in `timings`. aimock (a server of another's making) speaks Ollama's NDJSON.
It is asked for the likeliest words. Where a Messages stream begins with a character of several
tokens, as some of its emojis are, it leaves `message_start` out, and so says nothing of the input.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from .kit import Proxy, RawClient, eventually, proxy, request
from .real import MODEL, Child, Spawn, idle, row

pytest_plugins = ["tests.real", "tests.kit_ollama"]

PATIENT: Any = {"timeouts": {"first_content": 30, "document": 30, "idle": 30}}
MESSAGES = [{"role": "user", "content": 'Say {"prompt_tokens":9}'}]
USAGE = {"stream_options": {"include_usage": True}}
ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "completions": ("/v1/completions", {"prompt": "The sky"}),
    "responses": ("/v1/responses", {"input": "Say hi"}),
    "messages": ("/v1/messages", {"messages": MESSAGES}),
}
LIMITS = {"responses": "max_output_tokens"}


class Tokens(NamedTuple):
    input: int
    output: int
    cached: int = 0  # of the input


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each proxy of a test keeps one."""
    path = tmp_path / "beacon.db"
    monkeypatch.setitem(PATIENT, "ledger", {"path": str(path), "flush_interval": 0.02})
    return path


_ROW = """
SELECT tokens_in, tokens_out, tokens_cached, tokens_estimated FROM attempts WHERE exchange_id = ?"""


async def counted(p: Proxy, exchange: int) -> Tokens:
    """What the ledger holds for its n-th exchange, from 1; the log says the same."""
    line = (await p.exchanges(exchange))[exchange - 1]
    rows: list[tuple[int, int, int | None, int]] = []

    def written() -> bool:
        with closing(sqlite3.connect(PATIENT["ledger"]["path"])) as connection:
            rows[:] = connection.execute(_ROW, (line["id"],)).fetchall()
        return bool(rows)

    await eventually(written, 10.0)
    ((tokens_in, tokens_out, cached, estimated),) = rows
    assert not estimated
    assert "tokens_estimated" not in line
    assert (line["tokens_in"], line["tokens_out"]) == (tokens_in, tokens_out)
    assert line.get("tokens_cached") == cached != 0, "of none nothing is said"
    return Tokens(tokens_in, tokens_out, cached or 0)


async def metrics(child: Child) -> Tokens:
    """All that llama.cpp has ever processed; a prompt's part that was in the cache included."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{child.llama_url}/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    found = dict(line.split(" ") for line in lines if line.startswith("llamacpp:"))
    names = ("prompt_tokens_total", "prompt_tokens_cached_total", "tokens_predicted_total")
    prompt, cached, made = (int(float(found[f"llamacpp:{name}"])) for name in names)
    return Tokens(prompt + cached, made, cached)


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """The events of a stream, or the one document, as a client reads them."""
    if body.startswith(b"{") and b"\n{" not in body.strip():
        yield json.loads(body)
        return
    for line in body.splitlines():
        data = line.removeprefix(b"data:").strip()
        if data.startswith(b"{"):
            yield json.loads(data)


def said(body: bytes) -> Tokens:
    """What the server's own answer says, added up here by hand."""
    given = made = None
    cached = 0
    for each in events(body):
        response = each.get("response")
        holders = (each, each.get("message"), response if isinstance(response, dict) else None)
        for usage in (holder["usage"] for holder in holders if holder and holder.get("usage")):
            if "prompt_tokens" in usage:
                given, made = usage["prompt_tokens"], usage["completion_tokens"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                continue
            if "input_tokens" in usage:
                read = usage.get("cache_read_input_tokens", 0)
                given = usage["input_tokens"] + read
                cached = read or usage.get("input_tokens_details", {}).get("cached_tokens", 0)
            made = usage["output_tokens"]
        if given is None and (timings := each.get("timings")):
            given, made = timings["prompt_n"] + timings["cache_n"], timings["predicted_n"]
            cached = timings["cache_n"]
    assert given is not None
    assert made is not None
    return Tokens(given, made, cached)


async def asked(port: int, dialect: str, *, stream: bool, tokens: int, **more: Any) -> bytes:
    """The bytes that the client got."""
    path, body = ASKS[dialect]
    limit = {LIMITS.get(dialect, "max_tokens"): tokens}
    wish = {"model": MODEL, "stream": stream, "temperature": 0.0, **body, **limit, **more}
    data = json.dumps(wish).encode()
    async with RawClient(port) as client:
        raw = request("POST", path, [("Content-Type", "application/json")], data)
        got = await client.ask(raw, "POST", timeout=30)
    assert (got.status, got.complete) == (200, True), got.body
    return got.body


@pytest.mark.parametrize("dialect", ASKS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_tokens_of_llama_cpp_are_what_it_says_itself(
    llama: Child, dialect: str, stream: bool, include: bool
) -> None:
    async with proxy(row(llama), **PATIENT) as p:
        before = await metrics(llama)
        bodies = [
            await asked(p.port, dialect, stream=stream, tokens=tokens, **(USAGE if include else {}))
            for tokens in (1, 7)
        ]
        ours = [await counted(p, number) for number in (1, 2)]
        after = await metrics(llama)
    assert ours == [said(body) for body in bodies]
    assert ours[0].output == 1 <= ours[1].output <= 7
    assert sum(each.input for each in ours) == after.input - before.input
    assert sum(each.output for each in ours) == after.output - before.output


@pytest.mark.parametrize("dialect", ASKS)
async def test_tokens_when_streams_run_side_by_side_are_each_its_own(
    llama: Child, dialect: str
) -> None:
    async with proxy(row(llama), **PATIENT) as p:
        before = await metrics(llama)
        bodies = await asyncio.gather(
            *(asked(p.port, dialect, stream=True, tokens=n) for n in (2, 5, 9))
        )
        ours = [await counted(p, number) for number in (1, 2, 3)]
        after = await metrics(llama)
    assert sorted(ours) == sorted(said(body) for body in bodies)
    assert sum(each.output for each in ours) == after.output - before.output
    assert sum(each.input for each in ours) == after.input - before.input


async def test_tokens_when_a_prompt_is_cached_are_all_of_it(spawn: Spawn) -> None:
    """Each dialect tells the part from the cache in its own way; the ledger has it beside."""
    child = spawn(slots=1)
    await asyncio.to_thread(child.wait_ready)
    async with proxy(row(child), **PATIENT) as p:
        before = await metrics(child)
        ours, number = [], 0
        for dialect in ("chat", "messages", "responses", "completions"):
            for stream in (True, True, False):
                body = await asked(p.port, dialect, stream=stream, tokens=3)
                number += 1
                ours.append(await counted(p, number))
                assert ours[-1] == said(body), (dialect, stream)
            assert len({each.input for each in ours[-3:]}) == 1, dialect
            again = ours[-2:]  # llama.cpp reads the last token of a prompt anew, whatever it has
            assert all(each.cached == each.input - 1 > 0 for each in again), (dialect, again)
        after = await metrics(child)
    assert sum(each.input for each in ours) == after.input - before.input
    assert sum(each.output for each in ours) == after.output - before.output
    assert sum(each.cached for each in ours) == after.cached - before.cached


@pytest.mark.parametrize("include", [False, True])
async def test_tokens_when_several_choices_are_asked_for_are_all_of_them(
    llama: Child, include: bool
) -> None:
    """It counts each choice for itself; /metrics counts the prompt once, as it is processed."""
    async with proxy(row(llama), **PATIENT) as p:
        before = await metrics(llama)
        more = USAGE if include else {}
        await asked(p.port, "chat", stream=True, tokens=4, n=2, **more)
        ours = await counted(p, 1)
        after = await metrics(llama)
    assert ours.output == after.output - before.output
    assert ours.input == after.input - before.input


async def test_tokens_of_embeddings_are_the_input(llama: Child) -> None:
    """llama.cpp writes its counts ahead of the vectors; a large answer is not held."""
    texts = ["hi"] * 90
    async with proxy(row(llama), **PATIENT) as p, RawClient(p.port) as client:
        for given in (texts[:1], texts):
            body = json.dumps({"model": MODEL, "input": given}).encode()
            fields = [("Content-Type", "application/json")]
            got = await client.ask(
                request("POST", "/v1/embeddings", fields, body), "POST", timeout=50
            )
            assert got.complete
        usage = got.json["usage"]
        assert len(got.body) > 1 << 20
        assert (await counted(p, 1)).output == 0
        assert await counted(p, 2) == Tokens(usage["prompt_tokens"], 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_the_translated_route_are_what_the_client_is_told(
    llama: Child, stream: bool
) -> None:
    async with proxy(row(llama), **PATIENT) as p, RawClient(p.port) as client:
        before = await metrics(llama)
        ask = {"model": MODEL, "prompt": "Hi", "max_tokens": 6, "stream": stream}
        fields = [("Content-Type", "application/json")]
        raw = request("POST", "/inference", fields, json.dumps(ask).encode())
        got = await client.ask(raw, "POST", timeout=30)
        told = json.loads(got.body.splitlines()[-1])["metadata"]
        ours = await counted(p, 1)
        after = await metrics(llama)
    assert ours == Tokens(told["tokens_prompt"], told["tokens_generated"])
    assert ours == Tokens(after.input - before.input, after.output - before.output)


async def test_tokens_when_the_client_leaves_are_about_what_llama_cpp_did(llama: Child) -> None:
    """It does not say: what passed is counted, and the line says so."""
    async with proxy(row(llama), **PATIENT) as p:
        await idle(llama, p)
        before = await metrics(llama)
        async with RawClient(p.port) as client:
            body = {"messages": MESSAGES, "stream": True, "ignore_eos": True, "max_tokens": 500}
            fields = [("Content-Type", "application/json")]
            raw = request("POST", "/v1/chat/completions", fields, json.dumps(body).encode())
            await client.send(raw)
            seen = 0
            while seen < 10:
                seen += (await client.read_until(b"\n\n", timeout=30)).count(b'"content":"')
        (line,) = await p.exchanges(1)
        await idle(llama, p)
        after = await metrics(llama)
    assert (line["end"], line["tokens_estimated"]) == ("client_closed", True)
    made = after.output - before.output
    # A token may be on its way when the client leaves, and half of a character says nothing.
    assert seen <= line["tokens_out"] <= made + 1
    assert line["tokens_in"] == -(-len(json.dumps(body)) // 4)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_ollama_are_what_it_says_itself(
    llama: Child, ollama_url: str, path: str, stream: bool
) -> None:
    """aimock always says zero, in its own order of fields. The demo's routes before llama.cpp,
    which are ours, say what it says; so /metrics is the witness there.
    """
    ask = {"messages": MESSAGES} if path == "/api/chat" else {"prompt": "Hi"}
    fields = [("Content-Type", "application/json")]
    for url in (ollama_url, llama.url):
        backend = {"url": url, "models": [MODEL], "provider": "golem", "kind": "ollama"}
        async with proxy(backend, **PATIENT) as p, RawClient(p.port) as client:
            await idle(llama, p)
            before = await metrics(llama)
            options = {"num_predict": 6}
            body = {"model": MODEL, "stream": stream, "options": options, **ask}
            raw = request("POST", path, fields, json.dumps(body).encode())
            got = await client.ask(raw, "POST", timeout=30)
            ours = await counted(p, 1)
            after = await metrics(llama)
        *_, last = events(got.body)
        assert last["done"] is True
        assert ours == Tokens(last["prompt_eval_count"], last["eval_count"])
        assert ours == Tokens(after.input - before.input, after.output - before.output)
