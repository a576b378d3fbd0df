"""Faults that a review found in which request reaches which backend, and with what."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from beacon_proxy.wire import names as wire_names

from .kit import (
    OK,
    RawBackend,
    RawClient,
    answer,
    chat,
    eventually,
    json_answer,
    proxy,
    request,
    through,
)
from .test_regressions_inference import in_turn

DOCUMENT = {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}
NO_PROBES = [{"health": {"probe_interval": 0}}, {"region": {}}, {"capacity": {}}, {"failover": {}}]


@pytest.mark.parametrize("key", ["base path", "api_key"])
@pytest.mark.parametrize(
    "target",
    [
        "/../x",
        "/v1/..",
        "/./x",
        "/%2e%2e/x",
        "/.%2E/x",
        "/a/..%2fb",
        "/a%2F..%2fb",
        "/\\..\\x",
        "/a%5c..%5Cb",
    ],
)
async def test_dot_segments_towards_a_guarded_backend_are_refused(target: str, key: str) -> None:
    """A path that climbs left the backend's base path, or took its key where it is not meant."""
    async with RawBackend(answer(OK)) as backend:
        row: dict[str, Any] = {"url": f"{backend.url}/app/v1"}
        if key == "api_key":
            row = {"url": backend, "api_key": "k"}
        async with proxy(row) as p, RawClient(p.port) as client:
            got = await client.ask(request("GET", target))
        assert got.status == 400
        assert backend.requests == []


@pytest.mark.parametrize(
    "target", [b"/../x", b"/%2e%2e/x", b"/a/..%2fb", b"/\\..\\x", b"/a?b=/../c"]
)
async def test_dot_segments_towards_a_bare_backend_pass_verbatim(target: bytes) -> None:
    """There is nothing to guard, and a proxy that tidies paths up breaks signed ones."""
    seen = await through(request("GET", target))
    assert (seen.answer.status, seen.got.target) == (200, target)


@pytest.mark.parametrize("target", ["/a..b/.well-known/x..", "/a?b=/../c", "/v1.1/...", "/%2ex"])
async def test_dots_that_do_not_climb_towards_a_guarded_backend_pass(target: str) -> None:
    async with RawBackend(answer(OK)) as backend:
        async with proxy({"url": f"{backend.url}/app"}) as p, RawClient(p.port) as client:
            assert (await client.ask(request("GET", target))).status == 200
        (got,) = backend.requests
        assert got.target == b"/app" + target.encode()


@pytest.mark.parametrize("path", ["/health", "/health?x=1"])
async def test_absolute_form_of_an_own_path_is_answered_by_the_proxy(path: str) -> None:
    """The whole URL was looked up as a path, so the request went to a backend."""
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        whole = await client.ask(request("GET", f"http://beacon.test{path}"))
        plain = await client.ask(request("GET", path))
        assert backend.requests == []
    assert whole.status == plain.status
    assert whole.json.keys() == plain.json.keys()


@pytest.mark.parametrize("seconds", ["1e308", "1e18", "86401"])
async def test_timeout_hint_without_bounds_is_harmless(seconds: str) -> None:
    """Its deadline overflowed the wheel, and with it every other limit on it."""
    headers = [("X-Beacon-Timeout", seconds)]
    alone = dict.fromkeys(("first_content", "document", "idle", "total"), 0)  # no nearer limit
    async with RawBackend(json_answer(DOCUMENT)) as backend, proxy(backend, timeouts=alone) as p:
        async with RawClient(p.port) as client:
            for _ in range(2):
                assert (await client.ask(chat(headers=headers), "POST")).status == 200
            assert (await client.ask(chat(), "POST")).status == 200
        assert not p.events("server.failed")


def refusal(status: int) -> bytes:
    return b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status


@pytest.mark.parametrize(
    ("method", "status", "asked"),
    [("PUT", 500, 1), ("DELETE", 500, 1), ("PUT", 503, 2), ("DELETE", 503, 2), ("GET", 500, 2)],
)
async def test_request_with_effects_when_answered_500_is_not_run_elsewhere(
    method: str, status: int, asked: int
) -> None:
    """An error may come after the deed; only a refusal for want of room surely has not."""
    script = in_turn(refusal(status), OK)
    body = b"x" if method == "PUT" else None
    async with RawBackend(script) as one, RawBackend(script) as two, proxy(one, two) as p:
        async with RawClient(p.port) as client:
            got = await client.ask(request(method, "/thing", body=body))
        assert len(one.requests) + len(two.requests) == asked
    assert got.status == (status if asked == 1 else 200)


CREDENTIALS = [
    "Authorization",
    "X-Api-Key",
    "Api-Key",
    "X-Goog-Api-Key",
    "Modal-Key",
    "Modal-Secret",
]


@pytest.mark.parametrize("provider", ["openai", "golem", "modal", "runpod"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_clients_credentials_reach_no_backend_that_has_its_own(
    provider: str, method: str
) -> None:
    """Only the fields that the backend's key stands in were replaced."""
    headers = [(name, f"client-{number}") for number, name in enumerate(CREDENTIALS)]
    data = request("GET", "/v1/x", headers) if method == "GET" else chat(headers=headers)
    async with RawBackend(json_answer(DOCUMENT)) as backend:
        row = {"url": backend, "provider": provider}
        async with proxy({**row, "api_key": "own"}) as p, RawClient(p.port) as client:
            assert (await client.ask(data, method)).status == 200
        async with proxy(row) as p, RawClient(p.port) as client:
            assert (await client.ask(data, method)).status == 200
        keyed, bare = backend.requests
    assert b"client-" not in keyed.raw_head
    assert keyed.header("authorization") == [b"Bearer own"]
    for name, value in headers:
        assert bare.header(name) == [value.encode()]


async def test_204_with_a_length_is_passed_without_it_and_the_client_stays() -> None:
    """A client that believes the length takes the next answer's head for a body (RFC 9110 8.6)."""
    script = in_turn(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", OK)
    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        none = await client.ask(request("DELETE", "/x"))
        assert (none.status, none.header("content-length")) == (204, [])
        assert none.header("connection") == []
        after = await client.ask(request("GET", "/y"))
    assert (after.status, after.body, after.complete) == (200, b"ok", True)


class Names:
    """Stands in for the system's resolver: one name hangs, the others are this host."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if not name.endswith(".invalid"):
            return self._real(host, port, *args, **more)
        self.asked.append(name)
        if name.startswith("hangs"):
            self.go.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return self._real("127.0.0.1", port, *args, **more)


@pytest.mark.parametrize("host", ["a..b", "a" * 64, ".", f"x.{'b' * 70}"])
async def test_name_that_is_none_is_told_to_whoever_asks(host: str) -> None:
    """`getaddrinfo` raises UnicodeError for it: nobody heard, and all waited for ever."""
    names = wire_names.Names(asyncio.get_running_loop())
    for _ in range(2):
        async with asyncio.timeout(5):
            with pytest.raises(socket.gaierror, match="is no host name"):
                await names.resolve(host, 80)


async def test_name_when_there_is_no_thread_to_look_it_up_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What had been asked for without a thread was waited for by all who came later."""
    names = wire_names.Names(asyncio.get_running_loop())
    monkeypatch.setattr(threading, "Thread", _NoThread)
    async with asyncio.timeout(5):
        with pytest.raises(OSError, match="can't start new thread"):
            await names.resolve("localhost", 80)
        monkeypatch.undo()
        assert await names.resolve("localhost", 80)


class _NoThread(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


async def test_name_that_does_not_resolve_holds_up_no_other_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each lookup that hung kept one of the few threads that all lookups shared."""
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names)
    async with RawBackend(json_answer(DOCUMENT)) as backend:
        rows = [
            {"url": f"http://hangs.invalid:{backend.port}", "models": ["slow"]},
            {"url": f"http://fine.invalid:{backend.port}", "models": ["fast"]},
        ]
        limits = {"connect": 1.0}
        async with proxy(*rows, timeouts=limits, middleware=NO_PROBES) as p:
            _, fine = p.app.fleet.candidates()
            try:
                clients = [RawClient(p.port) for _ in range(12)]
                for client in clients:
                    await client.__aenter__()
                    await client.send(chat(model="slow"))
                await eventually(lambda: p.in_flight() == len(clients) - 4)
                async with RawClient(p.port) as other:
                    got = await other.ask(chat(model="fast"), "POST")
                assert got.header("x-beacon-backend") == [b"b1"]
                assert not any(client.wire.received for client in clients), "before their limit"
                for client in clients:
                    assert (await client.response("POST")).status in (502, 503, 504)
                assert names.asked.count("hangs.invalid") == 1, "one lookup at a time"
                assert not fine.live.ejected_until
            finally:
                names.go.set()
                for client in clients:
                    await client.__aexit__(None, None, None)
