"""Discovery through the whole proxy: backends come and go under requests that run."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import trustme

from beacon_proxy.api.naming import answered_by
from beacon_proxy.contracts import Backend
from providers.openai import OpenAI

from .kit import (
    LAST_CHUNK,
    SSE_HEAD,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    blackhole,
    chat,
    chat_events,
    chat_stream,
    chunk,
    each_request,
    eventually,
    json_answer,
    json_bytes,
    proxy,
    request,
)
from .kit_dns import Zone

NEWS = 5.0  # s until a change must have been noticed, on a busy machine


def put(path: Path, rows: Any) -> None:
    """Put another file in the place, as editors and Kubernetes do."""
    new = path.with_suffix(".new")
    new.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    os.replace(new, path)


def by_file(path: Path, **more: Any) -> dict[str, Any]:
    return {"discovery": [{"provider": "openai", "file": str(path), "interval": 0.05, **more}]}


def row(name: str, backend: RawBackend, **more: Any) -> dict[str, Any]:
    return {"name": name, "url": backend.url, **more}


def names(p: Proxy) -> list[str]:
    return [c.backend.name for c in p.app.fleet.candidates()]


async def shown(p: Proxy) -> dict[str, dict[str, Any]]:
    async with RawClient(p.port) as client:
        answer = await client.ask(request("GET", "/providers"))
    return {each["name"]: each for each in json.loads(answer.body)["providers"]}


async def ask(p: Proxy, data: bytes = b"") -> Any:
    async with RawClient(p.port) as client:
        return await client.ask(data or chat(stream=True), "POST")


class Held:
    """A backend that streams its first event, and the rest when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def script(self, conn: BackendConn) -> None:
        while await conn.request() is not None:
            first, *rest = chat_events("held", 3)
            await conn.send(SSE_HEAD + chunk(first))
            await self.go.wait()
            await conn.send(b"".join(map(chunk, rest)) + LAST_CHUNK)


async def test_stream_when_its_backend_vanishes_ends_whole_and_new_requests_go_elsewhere(
    tmp_path: Path,
) -> None:
    held, path = Held(), tmp_path / "nodes.json"
    async with RawBackend(held.script) as old, RawBackend(chat_stream("new", 3)) as new:
        put(path, [row("old", old)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) == ["old"], NEWS)
            running = asyncio.create_task(ask(p), name="the stream")
            await eventually(lambda: p.in_flight() == 1)
            put(path, [row("new", new)])
            await eventually(lambda: names(p) == ["new"], NEWS)
            entry = (await shown(p))["old"]
            assert (entry["draining"], entry["in_flight"]) == (True, 1)
            assert (await shown(p))["new"]["draining"] is False
            other = await ask(p)
            assert (other.complete, other.header(b"X-Beacon-Backend")) == (True, [b"new"])
            assert b"new" in other.body
            held.go.set()
            whole = await running
            assert (whole.status, whole.complete) == (200, True)
            assert whole.body == b"".join(chat_events("held", 3))
            await eventually(lambda: not p.app.fleet.leaving)
            assert set(await shown(p)) == {"new"}
            assert len(old.requests) == 1
            (left,) = p.events("backend.left")
            assert (left["backend"], left["in_flight"]) == ("old", 1)


async def test_waiter_when_the_backend_it_waits_for_vanishes_goes_to_another(
    tmp_path: Path,
) -> None:
    """A place in the queue is no right to a backend: the slot that comes free is not taken."""
    held, path = Held(), tmp_path / "nodes.json"
    async with RawBackend(held.script) as old, RawBackend(chat_stream("new", 3)) as new:
        put(path, [row("old", old, max_in_flight=1)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) == ["old"], NEWS)
            first = asyncio.create_task(ask(p), name="first")
            await eventually(lambda: p.in_flight() == 1)
            second = asyncio.create_task(ask(p), name="second")
            await eventually(lambda: p.app.telemetry.metrics.queue_depth == 1)
            put(path, [row("new", new)])
            answer = await second
            assert (answer.complete, answer.header(b"X-Beacon-Backend")) == (True, [b"new"])
            held.go.set()
            assert (await first).complete
            assert len(old.requests) == 1
            queue = p.app.pipeline._queue
            assert (queue._wanted, queue._promised, queue._turned_away) == ({}, {}, set())


async def test_start_when_no_source_has_answered_says_503_and_ready_says_no(
    tmp_path: Path,
) -> None:
    """Neither 404 for a model that nobody can know of yet, nor a start that waits."""
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend, proxy(**by_file(path)) as p:
        answer = await ask(p, chat(model="m"))
        assert (answer.status, answer.header(b"Retry-After")) == (503, [b"5"])
        assert b"discovery has not answered" in answer.body
        async with RawClient(p.port) as client:
            assert (await client.ask(request("GET", "/ready"))).status == 503
        await eventually(lambda: p.events("discovery.failed"), NEWS)
        put(path, [backend.url])
        await eventually(lambda: names(p) != [], NEWS)
        (name,) = names(p)
        assert name == f"openai-127.0.0.1-{backend.url.rpartition(':')[2]}"
        async with RawClient(p.port) as client:
            assert (await client.ask(request("GET", "/ready"))).status == 200
        assert (await ask(p, chat(model="m", stream=True))).complete
        assert len(p.events("discovery.failed")) == 1
        assert len(p.events("discovery.recovered")) == 1


async def test_start_when_the_first_answer_is_an_empty_array_says_503(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    put(path, [])
    async with proxy(**by_file(path)) as p:
        await eventually(lambda: p.app.fleet.unasked == 0, NEWS)
        assert (await ask(p, chat(model="m"))).status == 503
        assert p.events("discovery.failed") == []


async def test_file_when_it_is_half_written_keeps_the_last_good_answer(tmp_path: Path) -> None:
    """Its change is seen by its stamp: the next look would be a minute away."""
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        put(path, [row("a", backend)])
        async with proxy(**by_file(path, interval=60)) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            path.write_text('[{"name": "a", "url"')
            await eventually(lambda: p.events("discovery.failed"), NEWS)
            (failed,) = p.events("discovery.failed")
            assert (failed["level"], failed["kept"]) == ("warning", 1)
            assert names(p) == ["a"]
            assert (await ask(p)).complete
            put(path, [row("a", backend), row("b", backend)])
            await eventually(lambda: names(p) == ["a", "b"], NEWS)
            assert [e["found"] for e in p.events("discovery.recovered")] == [2]
            path.unlink()
            await eventually(lambda: len(p.events("discovery.failed")) == 2, NEWS)
            assert names(p) == ["a", "b"]
            put(path, [])
            await eventually(lambda: names(p) == [], NEWS)


async def test_file_when_a_link_to_its_folder_is_swung_is_read_anew(tmp_path: Path) -> None:
    """How Kubernetes changes a mounted ConfigMap."""
    async with RawBackend(chat_stream("hi", 3)) as backend:
        for version, name in (("v1", "a"), ("v2", "b")):
            (tmp_path / version).mkdir()
            put(tmp_path / version / "nodes.json", [row(name, backend)])
        (tmp_path / "..data").symlink_to("v1")
        (tmp_path / "nodes.json").symlink_to("..data/nodes.json")
        async with proxy(**by_file(tmp_path / "nodes.json", interval=60)) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            (tmp_path / "..next").symlink_to("v2")
            os.replace(tmp_path / "..next", tmp_path / "..data")
            await eventually(lambda: names(p) == ["b"], NEWS)


async def test_row_when_it_is_wrong_is_left_out_and_told_once(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        wrong = [
            row("b", backend, max_in_flight=0),
            {"name": "c", "url": "ftp://x"},
            {"name": "d", "url": backend.url, "prize": 1},
            row("e", backend, provider="nobody"),
            row("f", backend, api_key="${HOME}"),
            row("a", backend),
            7,
        ]
        put(path, [row("a", backend), *wrong])
        async with proxy(**by_file(path), env={"HOME": "secret-home"}) as p:
            await eventually(lambda: names(p) == ["a", "f"], NEWS)
            (told,) = p.events("discovery.skipped")
            assert told["count"] == 6
            assert told["problems"][0] == "[1].max_in_flight: must be >= 1, got 0"
            assert "[3].prize: unknown key, did you mean " in told["problems"][2]
            assert "unknown provider" in told["problems"][3]
            assert told["problems"][4] == "[6].name: must be unique, got a twice"
            assert told["problems"][5].startswith("[7].must be a mapping")
            # What comes from outside stays what it is.
            assert p.app.fleet.candidates()[1].backend.api_key == "${HOME}"
            put(path, [row("a", backend), *wrong[:1]])
            await eventually(lambda: names(p) == ["a"], NEWS)
            assert len(p.events("discovery.skipped")) == 2


async def test_row_when_its_region_holds_a_line_end_adds_no_line_to_an_answer(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        bad = row("bad", backend, region="eu\r\nset-cookie: pwned=1")
        put(path, [bad, row("good", backend, region="Europe")])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) != [], NEWS)
            answer = await ask(p)
            assert answer.header(b"X-Beacon-Region") == [b"eu-west"]
            assert answer.header(b"Set-Cookie") == []
            assert names(p) == ["good"]
            (told,) = p.events("discovery.skipped")
            assert told["problems"][0].startswith("[0].region: must be 1 to 100 letters")


def test_answered_by_when_a_name_holds_a_line_end_is_four_lines() -> None:
    lines = answered_by("b\r\nx: 1", "p\0", "süd", 2).split(b"\r\n")
    assert lines == [
        b"X-Beacon-Backend: b??x: 1",
        b"X-Beacon-Provider: p?",
        b"X-Beacon-Region: s?d",
        b"X-Beacon-Attempts: 2",
        b"",
    ]


async def test_file_of_authorities_when_a_row_names_it_is_refused_and_not_opened(
    tmp_path: Path,
) -> None:
    """A pipe would hold the loop until somebody writes; of another file it would say what it is."""
    path, pipe, bundle = tmp_path / "nodes.json", tmp_path / "pipe", tmp_path / "ca.pem"
    os.mkfifo(pipe)
    trustme.CA().cert_pem.write_to_path(bundle)
    async with RawBackend(chat_stream("hi", 3)) as backend:
        rows = [
            row("pipe", backend, tls={"ca_file": str(pipe)}),
            row("nul", backend, tls={"ca_file": "a\0b"}),
            row("secret", backend, tls={"ca_file": "/etc/no-such-file"}),
            row("usual", backend),
            row("own", backend, tls={"verify": False}),
        ]
        put(path, rows)
        usual = {"tls": {"ca_file": str(bundle)}}
        async with proxy(**by_file(path, backend=usual)) as p:
            await eventually(lambda: names(p) == ["usual", "own"], NEWS)
            files = [c.backend.tls_ca_file for c in p.app.fleet.candidates()]
            assert files == [str(bundle), None]
            (told,) = p.events("discovery.skipped")
            where = "tls.ca_file: must stand in beacon.yaml, at discovery[].backend.tls"
            assert told["problems"] == [f"[{n}].{where}" for n in range(3)]
            bundle.unlink()  # it was looked at when beacon.yaml was read, and not again
            put(path, rows[3:4])
            await eventually(lambda: names(p) == ["usual"], NEWS)


async def test_row_when_it_turns_wrong_leaves_its_backend_as_it_was(tmp_path: Path) -> None:
    """Only an answer that leaves a backend out takes it away."""
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        plain = backend.url
        put(path, [row("a", backend, region="eu"), plain, row("b", backend), row("c", backend)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: len(names(p)) == 4, NEWS)
            (derived,) = {*names(p)} - {"a", "b", "c"}
            lives = [c.live for c in p.app.fleet.candidates()]
            new = {"key_of_the_next_release": 1}
            turned = [row("b", backend, **new), row("a", backend, region="us"), {"url": plain}]
            put(path, [row("a", backend, **new), {"url": plain, **new}, *turned])
            await eventually(lambda: "c" not in names(p), NEWS)
            assert names(p) == ["a", derived, "b"]
            assert [c.live for c in p.app.fleet.candidates()] == lives[:3]
            regions = [c.backend.region for c in p.app.fleet.candidates()]
            assert regions == ["us-east"] * 3, "a row that is right goes before what was known"
            (told,) = p.events("discovery.skipped")
            assert told["count"] == 3
            put(path, [row("b", backend)])
            await eventually(lambda: names(p) == ["b"], NEWS)


async def test_answer_when_none_of_its_rows_is_right_is_a_failure(tmp_path: Path) -> None:
    """Also while the source goes on saying the same."""
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        wrong = [{"name": "x", "uri": backend.url}, {"name": "y", "uri": backend.url}]
        put(path, wrong)
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: p.events("discovery.failed"), NEWS)
            assert p.app.fleet.unasked == 1, "it may know some yet"
            put(path, [row("a", backend)])
            await eventually(lambda: names(p) == ["a"], NEWS)
            put(path, wrong)
            await eventually(lambda: len(p.events("discovery.failed")) == 2, NEWS)
            await asyncio.sleep(0.3)  # a few more looks
            assert names(p) == ["a"]
            failed = p.events("discovery.failed")
            assert [each["error"] for each in failed] == ["has rows, but none that is right"] * 2
            assert [each["kept"] for each in failed] == [0, 1]
            assert len(p.events("discovery.recovered")) == 1
            assert [each["count"] for each in p.events("discovery.skipped")] == [4, 4]
            put(path, [])
            await eventually(lambda: names(p) == [], NEWS)


class Brittle(OpenAI):
    """A provider whose own check of a backend breaks, quoting what it was given."""

    def problem(self, backend: Backend) -> str | None:
        raise KeyError(backend.api_key)


async def test_row_when_its_provider_breaks_over_it_is_left_out_and_the_source_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        bad = row("bad", backend, provider="brittle", api_key="t0ps3cret")
        put(path, [bad, row("a", backend)])
        async with proxy(**by_file(path), providers={"brittle": Brittle}) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            (told,) = p.events("discovery.skipped")
            assert told["problems"] == ["[0].cannot be checked: KeyError in Brittle.problem"]
            put(path, [bad, row("b", backend)])
            await eventually(lambda: names(p) == ["b"], NEWS)
            assert p.events("discovery.stopped") == []
            assert "t0ps3cret" not in repr(p.log)


async def test_source_when_a_look_breaks_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody had thought of ended the source until the next start."""
    path = tmp_path / "nodes.json"

    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("beacon_proxy.discovery.file.open", no_memory, raising=False)
    async with RawBackend(chat_stream("hi", 3)) as backend:
        put(path, [row("a", backend)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: p.events("discovery.failed"), NEWS)
            (failed,) = p.events("discovery.failed")
            assert failed["error"].startswith("the look itself failed: MemoryError in ")
            monkeypatch.undo()
            await eventually(lambda: names(p) == ["a"], NEWS)
            assert len(p.events("discovery.recovered")) == 1
            assert p.events("discovery.stopped") == []


async def test_rows_when_the_source_says_what_all_have_take_it_and_their_own_wins(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nodes.json"
    usual = {"region": "EU", "api_key": "${KEY}", "max_in_flight": 3, "models": ["m"]}
    async with RawBackend(chat_stream("hi", 3)) as backend:
        put(path, [backend.url, row("own", backend, region="asia", api_key=None)])
        async with proxy(**by_file(path, backend=usual), env={"KEY": "k-123456"}) as p:
            await eventually(lambda: len(names(p)) == 2, NEWS)
            one, own = (c.backend for c in p.app.fleet.candidates())
            assert (one.region, one.api_key, one.max_in_flight) == ("eu-west", "k-123456", 3)
            assert (own.region, own.api_key, own.max_in_flight) == ("asia-pacific", "", 3)
            assert one.models == own.models == {"m"}
            assert (await ask(p, chat(model="unknown"))).status == 404


async def test_name_when_it_is_a_configured_ones_the_configured_one_stands(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "nodes.json", tmp_path / "other.json"
    async with RawBackend(chat_stream("hi", 3)) as one, RawBackend(chat_stream("hi", 3)) as two:
        put(path, [row("b0", two), row("x", one)])
        put(other, [row("x", two), row("y", two)])
        sources = [*by_file(path)["discovery"], *by_file(other)["discovery"]]
        async with proxy(one, discovery=sources) as p:
            # Whichever source answers first: the order of the configuration decides in the end.
            wanted = {"b0": one.url, "x": one.url, "y": two.url}

            def settled() -> bool:
                return {c.backend.name: c.backend.url for c in p.app.fleet.candidates()} == wanted

            await eventually(settled, NEWS)
            await asyncio.sleep(0.2)  # a few more looks
            assert {tuple(e["names"]) for e in p.events("discovery.clashed")} == {("b0",), ("x",)}
            assert len(p.events("discovery.clashed")) == 2
            put(path, [])
            await eventually(
                lambda: (
                    {c.backend.url for c in p.app.fleet.candidates()} == {one.url, two.url}
                    and set(names(p)) == {"b0", "x", "y"}
                ),
                NEWS,
            )


async def test_url_when_it_changes_under_a_name_old_connections_are_not_used_again(
    tmp_path: Path,
) -> None:
    """Another server under the same name: what was learnt, and what is open, is the old one's."""
    path = tmp_path / "nodes.json"
    held = Held()
    async with RawBackend(held.script) as old, RawBackend(chat_stream("new", 3)) as new:
        put(path, [row("a", old)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            running = asyncio.create_task(ask(p), name="the stream")
            await eventually(lambda: p.in_flight() == 1)
            before = p.app.fleet.candidates()[0].live
            put(path, [row("a", new)])
            await eventually(lambda: p.app.fleet.candidates()[0].backend.url == new.url, NEWS)
            candidate = p.app.fleet.candidates()[0]
            assert candidate.live is not before
            assert candidate.backend.joined > 0
            held.go.set()
            assert (await running).complete
            await eventually(lambda: not p.app.fleet.leaving)
            await eventually(lambda: old.open_connections == 0, 2.0)  # sooner than an idle one
            for _ in range(3):
                answer = await ask(p)
                assert b"new" in answer.body
            assert (len(old.requests), len(new.requests)) == (1, 3)


async def test_hop_when_another_server_has_the_name_by_then_goes_to_its_own(
    tmp_path: Path,
) -> None:
    """A result's address means nothing to another server, and holds the old one's secret."""
    path, go = tmp_path / "nodes.json", asyncio.Event()

    async def function(conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            if received.method == "POST":
                await go.wait()
                where = b"/v1/chat/completions?__modal_function_call_id=fc-1"
                await conn.send(
                    b"HTTP/1.1 303 See Other\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % where
                )
            else:
                await conn.send(DOCUMENT)

    async with RawBackend(function) as old, RawBackend(each_answer) as new:
        put(path, [row("a", old, kind="function")])
        async with proxy(**by_file(path, provider="modal")) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            running = asyncio.create_task(ask(p, chat()), name="the call")
            await eventually(lambda: len(old.requests) == 1)
            put(path, [row("a", new, kind="function")])
            await eventually(lambda: p.app.fleet.candidates()[0].backend.url == new.url, NEWS)
            assert (await ask(p, chat())).status == 200  # and leaves an idle connection
            assert set(p.app._pool._idle) == {"a"}
            go.set()
            assert (await running).status == 200
            assert [r.method for r in old.requests] == ["POST", "GET"]
            assert [r.method for r in new.requests] == ["POST"]


DOCUMENT = json_bytes({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})


async def each_answer(conn: BackendConn) -> None:
    async for _ in each_request(conn):
        await conn.send(DOCUMENT)


async def test_row_when_its_facts_change_keeps_what_was_learnt(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    async with RawBackend(chat_stream("hi", 3)) as backend:
        put(path, [row("a", backend), row("b", backend)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) == ["a", "b"], NEWS)
            lives = [c.live for c in p.app.fleet.candidates()]
            put(path, [row("b", backend), row("a", backend, region="eu", price_per_second=0.5)])
            await eventually(
                lambda: p.app.fleet.candidates()[0].backend.price_per_second == 0.5, NEWS
            )
            assert names(p) == ["a", "b"], "a list that is turned moves nobody"
            now = p.app.fleet.candidates()
            assert [c.live for c in now] == lives
            assert (now[0].backend.region, now[0].backend.joined) == ("eu-west", 0)
            assert p.events("backend.left") == []


async def test_backend_when_it_vanishes_its_idle_connections_close_and_all_forget_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nodes.json"
    text = request("GET", "/metrics", [("Accept", "text/plain")])
    async with RawBackend(chat_stream("hi", 3)) as gone, RawBackend(chat_stream("hi", 3)) as kept:
        put(path, [row("gone", gone), row("kept", kept)])
        async with proxy(**by_file(path)) as p, RawClient(p.port) as client:
            await eventually(lambda: len(names(p)) == 2, NEWS)
            for _ in range(4):
                assert (await ask(p)).complete
            assert set(p.app._pool._idle) == {"gone", "kept"}
            put(path, [row("kept", kept)])
            await eventually(lambda: names(p) == ["kept"], NEWS)
            assert set(p.app._pool._idle) == {"kept"}
            await eventually(lambda: gone.open_connections == 0)
            assert b'backend="gone"' in (await client.ask(text)).body, "its last numbers, once"
            assert b'backend="gone"' not in (await client.ask(text)).body
            health = p.app.pipeline._chain.selects[0].__self__
            await eventually(lambda: set(health._records) == {"kept"})
            costs = json.loads((await client.ask(request("GET", "/costs?by=backend"))).body)
            assert {r["backend"] for r in costs["rows"]} == {"gone", "kept"}, "it was spent"


async def test_backend_when_it_joins_is_asked_at_once_what_it_serves(tmp_path: Path) -> None:
    """Its first free check must not wait for the next round of probes, half a minute away."""
    path = tmp_path / "nodes.json"
    put(path, [])
    async with RawBackend(chat_stream("hi", 3)) as backend, proxy(**by_file(path)) as p:
        await eventually(lambda: p.app.fleet.unasked == 0, NEWS)
        put(path, [row("a", backend)])
        await eventually(lambda: names(p) == ["a"], NEWS)
        await eventually(lambda: p.app.fleet.candidates()[0].live.last_check > 0, NEWS)
        assert p.app.fleet.candidates()[0].backend.joined > 0


async def test_backend_when_it_comes_back_before_it_is_empty_has_its_past(tmp_path: Path) -> None:
    held, path = Held(), tmp_path / "nodes.json"
    async with RawBackend(held.script) as backend:
        put(path, [row("a", backend)])
        async with proxy(**by_file(path)) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            live = p.app.fleet.candidates()[0].live
            running = asyncio.create_task(ask(p), name="the stream")
            await eventually(lambda: p.in_flight() == 1)
            put(path, [])
            await eventually(lambda: names(p) == [], NEWS)
            put(path, [row("a", backend)])
            await eventually(lambda: names(p) == ["a"], NEWS)
            back = p.app.fleet.candidates()[0]
            assert (back.live is live, back.live.in_flight, back.backend.joined) == (True, 1, 0)
            assert p.app.fleet.leaving == []
            held.go.set()
            assert (await running).complete


# The DNS and URLs, through the whole proxy


async def test_dns_when_the_srv_records_change_the_fleet_follows(tmp_path: Path) -> None:
    name = "_beacon._tcp.example"
    async with RawBackend(chat_stream("one", 3)) as one, RawBackend(chat_stream("two", 3)) as two:
        records = {
            (name, "SRV"): [f"0 0 {one.port} n.example."],
            ("n.example", "A"): ["127.0.0.1"],
        }
        async with Zone(records) as zone:
            dns = {"provider": "golem", "dns": name, "resolver": zone.address, "interval": 0.05}
            dns["backend"] = {"region": "eu"}
            async with proxy(discovery=[dns]) as p:
                await eventually(lambda: names(p) == [f"golem-127.0.0.1-{one.port}"], NEWS)
                answer = await ask(p)
                assert (answer.complete, b"one" in answer.body) == (True, True)
                assert answer.header(b"X-Beacon-Region") == [b"eu-west"]
                zone.rcodes[name] = "SERVFAIL"
                await eventually(lambda: p.events("discovery.failed"), NEWS)
                assert (await ask(p)).complete
                zone.rcodes.clear()
                zone.records[name, "SRV"] = [f"0 0 {two.port} n.example."]
                await eventually(lambda: names(p) == [f"golem-127.0.0.1-{two.port}"], NEWS)
                assert b"two" in (await ask(p)).body
                (failed,) = p.events("discovery.failed")
                assert failed["source"] == f"discovery[0] (dns {name})"
                assert "SERVFAIL" in failed["error"]


async def test_source_when_it_hangs_delays_neither_the_start_nor_another(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    async with blackhole() as port, RawBackend(chat_stream("hi", 3)) as backend:
        put(path, [row("a", backend)])
        hangs = {"provider": "openai", "url": f"http://127.0.0.1:{port}/?token=t0ps3cret"}
        sources = [{**hangs, "timeout": 0.3, "interval": 0.05}, *by_file(path)["discovery"]]
        async with proxy(discovery=sources) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            assert (await ask(p)).complete
            await eventually(lambda: p.events("discovery.failed"), NEWS)
            await asyncio.sleep(0.5)
            assert len(p.events("discovery.failed")) == 1, "once until it recovers"
            assert p.events("discovery.failed")[0]["error"] == "no answer within 0.3 s"
            assert "t0ps3cret" not in repr(p.log)


async def test_url_when_it_fails_after_an_answer_keeps_it_until_the_next(tmp_path: Path) -> None:
    answers = {"body": b"[]", "status": b"200 OK"}

    async def listed(conn: BackendConn) -> None:
        while await conn.request() is not None:
            body = answers["body"]
            head = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (answers["status"], len(body))
            await conn.send(head + body)

    async with RawBackend(listed) as source, RawBackend(chat_stream("hi", 3)) as backend:
        answers["body"] = json.dumps([row("a", backend)]).encode()
        web = {"provider": "openai", "url": f"{source.url}/nodes", "interval": 0.05}
        async with proxy(discovery=[web]) as p:
            await eventually(lambda: names(p) == ["a"], NEWS)
            for status, body in ((b"500 Oops", b"[]"), (b"200 OK", b"<html>")):
                answers["status"], answers["body"] = status, body
                failures = len(p.events("discovery.failed"))
                await eventually(lambda n=failures: len(p.events("discovery.failed")) > n, NEWS)
                assert names(p) == ["a"]
                assert (await ask(p)).complete
                answers["status"] = b"200 OK"
                answers["body"] = json.dumps([row("a", backend)]).encode()
                recovered = len(p.events("discovery.recovered"))
                await eventually(lambda n=recovered: len(p.events("discovery.recovered")) > n, NEWS)
            answers["body"] = b"[]"
            await eventually(lambda: names(p) == [], NEWS)


async def test_newcomer_when_the_proxy_runs_gets_its_room_little_by_little(
    tmp_path: Path,
) -> None:
    """Two requests at once: the second finds no room on a backend that has only just joined."""
    held, path = Held(), tmp_path / "nodes.json"
    chain = ["cost", {"capacity": {"slow_start": 3600, "queue_timeout": 0}}, "failover"]
    put(path, [])
    async with RawBackend(held.script) as backend, proxy(middleware=chain, **by_file(path)) as p:
        await eventually(lambda: p.app.fleet.unasked == 0, NEWS)
        put(path, [row("a", backend)])
        await eventually(lambda: names(p) == ["a"], NEWS)
        first = asyncio.create_task(ask(p), name="first")
        await eventually(lambda: p.in_flight() == 1)
        assert (await ask(p)).status == 503
        held.go.set()
        assert (await first).complete


async def test_events_of_a_source_are_not_shown_to_who_listens_on_ws(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    put(path, [])
    async with proxy(**by_file(path)) as p:
        await eventually(lambda: p.app.fleet.unasked == 0, NEWS)
        listener = p.app.telemetry.subscribe()
        put(path, [{"name": "x", "url": "ftp://secret-host"}])
        await eventually(lambda: p.events("discovery.skipped"), NEWS)
        put(path, "{")
        await eventually(lambda: p.events("discovery.failed"), NEWS)
        shown = [await listener.get() for _ in range(2)]
        assert [event for event, _ in shown] == ["discovery.skipped", "discovery.failed"]
        assert str(path) not in repr(shown)
        assert "secret-host" not in repr(shown)


async def test_region_when_nobody_said_it_is_shown_as_assumed_and_never_required(
    tmp_path: Path,
) -> None:
    """Two instances would each have claimed the same server for their own region."""
    path = tmp_path / "nodes.json"
    async with RawBackend(json_answer({"choices": []})) as here:
        put(path, [here.url, {"name": "placed", "url": here.url, "region": "eu-west"}])
        async with proxy(**by_file(path)) as p, RawClient(p.port) as client:
            await eventually(lambda: len(names(p)) == 2, NEWS)
            (event,) = p.events("discovery.unplaced")
            assert event["assumed"] == "us-east"
            assert [each for each in names(p) if each != "placed"] == event["names"]
            told = await shown(p)
            assumed = {name: each["region_assumed"] for name, each in told.items()}
            assert assumed == {"placed": False, event["names"][0]: True}
            for region, status in (("us-east", 503), ("eu-west", 200)):
                hints = [("X-Beacon-Region", region), ("X-Beacon-Region-Mode", "require")]
                got = await client.ask(request("GET", "/anything", hints))
                assert got.status == status
            got = await client.ask(request("GET", "/anything", [("X-Beacon-Region", "us-east")]))
            assert got.header("x-beacon-backend") == [event["names"][0].encode()]
