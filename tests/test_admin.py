"""The own routes over a real socket, on a fleet written down by hand."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType, web
from aiohttp.test_utils import RawTestServer, TestClient

from beacon_proxy.api.admin import Admin
from beacon_proxy.api.admin.answers import prefers_text
from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Check,
    End,
    Exchange,
    Fault,
    Live,
    Outcome,
    Stage,
    Usage,
    Verdict,
    canonical_model,
)
from beacon_proxy.ops.telemetry import MAX_LISTENERS, Telemetry

from .kit import eventually

NOW, UNIX = 5_000.0, 1_700_000_000.5
ALERT = {"rule": "queue", "subject": "queue", "severity": "warning", "since": "2023-11-14T22:13Z"}
ENV = {"PORT": "8080", "RUNPOD_API_KEY": "rp-secret", "EMPTY": "", "HOME": "/home/x"}


class Quiet:
    """A logger whose lines nobody reads."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = error = info


class HandFleet:
    def __init__(self, *rows: tuple[Backend, Live]) -> None:
        self.rows = rows

    def candidates(self) -> list[Candidate]:
        return [Candidate(backend, live) for backend, live in self.rows]

    def draining(self) -> list[Candidate]:
        return []

    def now(self) -> float:
        return NOW


def backend(name: str, provider: str, region: str, price: float, **more: Any) -> Backend:
    return Backend(
        name,
        provider,
        "http://10.1.2.3:11434",
        "http",
        "10.1.2.3",
        11434,
        region=region,
        pool="baseline" if provider == "golem" else "burst",
        price_per_second=price,
        api_key="sk-backend-secret",
        **more,
    )


def live(*names: str, **more: Any) -> Live:
    if not names:
        return Live(**more)
    return Live(model_names=names, models=frozenset(map(canonical_model, names)), **more)


def three() -> HandFleet:
    """Two well, one set aside; one model spelled in two ways, one backend that told nothing."""
    return HandFleet(
        (
            backend("golem-1", "golem", "us-east", 0.0001),
            live("llama3.2:1b", "qwen", latency=0.5, success=0.9, last_check=UNIX - 3, in_flight=2),
        ),
        (
            backend("runpod-eu", "runpod", "eu-west", 0.00025),
            live("llama3.2-1b", ejected_until=NOW + 20, healthy=False),
        ),
        (backend("modal-eu", "modal", "eu-west", 0.0003), live()),
    )


class Site:
    """The routes behind a real server, and everything they look at."""

    def __init__(self, fleet: HandFleet) -> None:
        self.telemetry = Telemetry(
            region="us-east", access_log=False, log=Quiet(), clock=lambda: NOW, unix=lambda: UNIX
        )
        self.state = SimpleNamespace(
            draining=False, started_unix=UNIX - 60, alerts=lambda: [dict(ALERT)]
        )
        self.admin = Admin(
            settings=SimpleNamespace(server=SimpleNamespace(region="us-east")),  # type: ignore[arg-type]
            fleet=fleet,
            telemetry=self.telemetry,
            providers={
                "runpod": SimpleNamespace(environment=("RUNPOD_API_KEY", "EMPTY")),  # type: ignore[dict-item]
                "golem": SimpleNamespace(environment=("GOLEM_PROVIDER_ENDPOINTS",)),  # type: ignore[dict-item]
            },
            env=ENV,
            version="9.9.9",
            state=self.state,
        )
        self.client: TestClient[Any, Any]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.admin.routes[request.path](request)

    async def get(self, path: str, **headers: str) -> Any:
        async with self.client.get(path, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "application/json"
            return await response.json()

    def attempt(self, at: Backend, model: str = "llama3.2:1b", **fields: Any) -> None:
        given: dict[str, Any] = {
            "verdict": Verdict.GOOD,
            "stage": Stage.DONE,
            "sent": True,
            "ttft": 0.25,
            "duration": 10.0,
            "usage": Usage(5, 50),
        }
        exchange = Exchange("id", "POST", b"/", "/", (), 0.0, model=model)
        made = {"usd": at.price_per_second * 10.0, **given, **fields}
        self.telemetry.attempt(exchange, Outcome(at, 1, **made))


class Patient(RawTestServer):
    """A server that does not cancel the handler of a client that left."""

    async def _make_runner(self, **options: Any) -> web.ServerRunner:  # type: ignore[override]
        return await super()._make_runner(**{**options, "handler_cancellation": False})


@asynccontextmanager
async def site(fleet: HandFleet | None = None, *, cancels: bool = True) -> AsyncIterator[Site]:
    """`cancels`: a handler is cancelled when its client leaves, as in production."""
    made = Site(fleet or three())
    async with (
        (RawTestServer if cancels else Patient)(made.handle) as server,
        TestClient(server) as made.client,
    ):
        yield made


# -- health --------------------------------------------------------------------------------------


async def test_health_when_one_is_set_aside_is_degraded_and_still_200() -> None:
    async with site() as s:
        assert await s.get("/health") == {
            "status": "degraded",
            "service": "hybrid-router",
            "version": "9.9.9",
            "timestamp": UNIX,
            "region": "us-east",
            "providers_total": 3,
            "providers_healthy": 2,
            "regions": ["us-east", "eu-west"],
            "alerts": [ALERT],
        }


async def test_health_when_all_are_well_is_healthy() -> None:
    async with site(HandFleet((backend("a", "golem", "us-east", 0.1), live()))) as s:
        assert (await s.get("/health"))["status"] == "healthy"


@pytest.mark.parametrize(
    ("rows", "status", "word"),
    [
        ([Live()], 200, "ok"),
        ([Live(healthy=False, ejected_until=NOW + 5), Live()], 200, "ok"),
        ([Live(healthy=False, ejected_until=NOW + 5)], 503, "no_backend"),
        ([Live(healthy=False)], 503, "no_backend"),
        # Due for a trial: if /ready said no, no request would ever come to try it.
        ([Live(healthy=False, ejected_until=NOW - 5)], 200, "ok"),
        ([], 503, "no_backend"),
    ],
)
async def test_ready_needs_one_backend_that_may_be_asked(
    rows: list[Live], status: int, word: str
) -> None:
    fleet = HandFleet(
        *((backend(f"b{n}", "golem", "us-east", 0.1), row) for n, row in enumerate(rows))
    )
    async with site(fleet) as s, s.client.get("/ready") as response:
        assert response.status == status
        assert (await response.json())["status"] == word


async def test_ready_when_draining_is_503_and_health_stays_200() -> None:
    async with site() as s:
        s.state.draining = True
        async with s.client.get("/ready") as response:
            assert response.status == 503
            assert (await response.json())["status"] == "draining"
        await s.get("/health")


@pytest.mark.parametrize("path", ["/status", "/modal-health"])
async def test_old_monitors_get_their_status(path: str) -> None:
    async with site() as s:
        answer = await s.get(path)
    assert answer == {"status": "healthy", "timestamp": UNIX, "service": "hybrid-router"}


# -- fleet ---------------------------------------------------------------------------------------


async def test_providers_tell_the_eight_old_fields_with_their_types() -> None:
    """The portal and the monitor parse these; a float that turns int or null breaks them."""
    async with site() as s:
        golem, runpod, modal = (await s.get("/providers"))["providers"]
    types = {
        "name": str,
        "type": str,
        "region": str,
        "healthy": bool,
        "cost_per_second": float,
        "avg_latency": float,
        "success_rate": float,
        "last_health_check": float,
    }
    for entry in (golem, runpod, modal):
        assert {name: type(entry[name]) for name in types} == types
    assert golem["avg_latency"] == 0.5
    assert golem["success_rate"] == 0.9
    assert golem["last_health_check"] == UNIX - 3
    assert (modal["avg_latency"], modal["success_rate"]) == (0.0, 1.0)
    assert modal["last_health_check"] == 0.0


async def test_providers_tell_state_and_quantiles() -> None:
    fleet = three()
    async with site(fleet) as s:
        s.attempt(fleet.rows[0][0])
        golem, runpod, modal = (await s.get("/providers"))["providers"]
    assert (golem["pool"], golem["in_flight"], golem["max_in_flight"]) == ("baseline", 2, 8)
    assert golem["models"] == ["llama3.2:1b", "qwen"]
    assert golem["ttft_p50"] == pytest.approx(0.25, rel=0.1)
    assert golem["ejected_until"] is None
    assert (runpod["healthy"], runpod["ejected_until"]) == (False, UNIX + 20)
    assert (modal["models"], modal["ttft_p95"]) == (None, None)


async def test_providers_tell_what_steers_traffic_away() -> None:
    refused = Check(Verdict.STRIKE, fault=Fault.REFUSED, detail="no connection")
    fleet = HandFleet(
        (backend("resting", "golem", "us-east", 0.1), live(resting_until=NOW + 8)),
        (backend("rested", "golem", "us-east", 0.1), live(resting_until=NOW - 8)),
        (backend("refusing", "golem", "us-east", 0.1), live(check=refused)),
    )
    async with site(fleet) as s:
        resting, rested, refusing = (await s.get("/providers"))["providers"]
    assert (resting["resting_until"], resting["last_check_result"]) == (UNIX + 8, None)
    assert resting["healthy"] is True, "as ever: it is well, it only wants no requests"
    assert rested["resting_until"] is None
    assert refusing["last_check_result"] == {
        "verdict": "strike",
        "fault": "refused",
        "detail": "no connection",
    }


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["golem-1", "runpod-eu", "modal-eu"]),
        ("?region=", ["golem-1", "runpod-eu", "modal-eu"]),
        ("?region=US", ["golem-1"]),
        ("?region=europe-west4", ["runpod-eu", "modal-eu"]),
        ("?region=mars", []),
        ("?region=%FF", []),
    ],
)
async def test_providers_by_region_understand_every_alias(query: str, names: list[str]) -> None:
    async with site() as s:
        providers = (await s.get("/providers" + query))["providers"]
    assert [entry["name"] for entry in providers] == names


async def test_own_routes_tell_no_address_and_no_secret() -> None:
    async with site() as s:
        for path in s.admin.routes:
            for accept in ("*/*", "text/plain"):
                async with s.client.get(path, headers={"Accept": accept}) as response:
                    text = await response.text()
                assert "secret" not in text, path
                assert "10.1.2.3" not in text, path


# -- models --------------------------------------------------------------------------------------


async def test_models_when_spelled_in_two_ways_are_one_entry() -> None:
    async with site() as s:
        assert await s.get("/models") == {
            "models": {
                "llama3.2:1b": {
                    "name": "llama3.2:1b",
                    "regions": ["us-east", "eu-west"],
                    "providers": ["golem-1", "runpod-eu"],
                    "provider_types": ["golem", "runpod"],
                },
                "qwen": {
                    "name": "qwen",
                    "regions": ["us-east"],
                    "providers": ["golem-1"],
                    "provider_types": ["golem"],
                },
            },
            "total_models": 2,
            "regions_available": ["us-east", "eu-west"],
            "providers_by_region": {"us-east": ["golem-1"], "eu-west": ["runpod-eu", "modal-eu"]},
        }


async def test_models_when_configured_are_those_alone_as_their_backends_spell_them() -> None:
    configured = frozenset({"llama3.2-1b", "other"})
    fleet = HandFleet(
        (backend("a", "golem", "us-east", 0.1, models=configured), live()),
        (backend("b", "golem", "us-east", 0.1, models=configured), live("llama3.2:1b", "hidden")),
    )
    async with site(fleet) as s:
        assert list((await s.get("/models"))["models"]) == ["llama3.2:1b", "other"]


async def test_v1_models_speak_openai() -> None:
    async with site() as s:
        answer = await s.get("/v1/models")
    assert answer["object"] == "list"
    assert answer["data"] == [
        {
            "id": "llama3.2:1b",
            "object": "model",
            "created": int(UNIX - 60),
            "owned_by": "golem,runpod",
        },
        {"id": "qwen", "object": "model", "created": int(UNIX - 60), "owned_by": "golem"},
    ]


async def test_api_tags_speak_ollama() -> None:
    async with site() as s:
        first, second = (await s.get("/api/tags"))["models"]
    assert (first["name"], first["model"], second["name"]) == ("llama3.2:1b", "llama3.2:1b", "qwen")
    assert first["modified_at"] == "2023-11-14T22:12:20.500000+00:00"
    assert len(first["digest"]) == 64  # `ollama list` cuts it to 12 and would crash on less
    assert first["digest"] != second["digest"]
    assert first["details"]["families"] == []


# -- spend and performance -----------------------------------------------------------------------


async def test_costs_sum_by_what_is_asked_dearest_first() -> None:
    fleet = three()
    async with site(fleet) as s:
        s.attempt(fleet.rows[0][0])
        s.attempt(fleet.rows[0][0], model="qwen")
        s.attempt(fleet.rows[2][0], verdict=Verdict.STRIKE, ttft=None, usage=None)
        answer = await s.get("/costs")
        assert (answer["since"], answer["by"]) == ("1h", "provider")
        assert answer["total_usd"] == pytest.approx(0.005)
        assert answer["covered_seconds"] == 0.0
        assert "at most one hour" in answer["scope"]
        modal, golem = answer["rows"]
        assert (modal["provider"], modal["usd"], modal["strikes"]) == ("modal", 0.003, 1)
        assert (golem["provider"], golem["usd"], golem["attempts"]) == ("golem", 0.002, 2)
        assert (golem["seconds"], golem["tokens_in"], golem["tokens_out"]) == (20.0, 10, 100)
        assert (golem["success_rate"], modal["success_rate"]) == (1.0, 0.0)
        for by, first in (
            ("region", "eu-west"),
            ("model", "llama3.2-1b"),
            ("backend", "modal-eu"),
            ("pool", "burst"),
        ):
            assert (await s.get(f"/costs?by={by}&since=90s"))["rows"][0][by] == first


@pytest.mark.parametrize(
    "query", ["since=1y", "since=", "since=0", "since=-5m", "since=h", "by=tenant", "by=_fields"]
)
async def test_costs_when_a_query_value_is_unknown_is_400_in_openai_shape(query: str) -> None:
    async with site() as s, s.client.get("/costs?" + query) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert error["message"].startswith(query.partition("=")[0])


async def test_costs_when_more_than_an_hour_is_asked_answer_with_what_there_is() -> None:
    async with site() as s:
        answer = await s.get("/costs?since=7d")
    assert (answer["since"], answer["rows"], answer["total_usd"]) == ("7d", [], 0.0)


async def test_regions_show_three_spans_for_each_provider() -> None:
    fleet = three()
    async with site(fleet) as s:
        s.attempt(fleet.rows[1][0])
        s.attempt(fleet.rows[2][0], verdict=Verdict.STRIKE, ttft=None)
        answer = await s.get("/regions")
    assert (answer["region"], answer["minutes"]) == ("us-east", [1, 5, 60])
    eu, us = answer["regions"]["eu-west"], answer["regions"]["us-east"]
    assert (eu["providers_total"], eu["providers_healthy"]) == (2, 1)
    assert us["in_flight"] == 2
    for span in ("1", "5", "60"):
        assert (eu["windows"][span]["attempts"], eu["windows"][span]["success_rate"]) == (2, 0.5)
        assert eu["providers"]["runpod"][span]["good"] == 1
        assert eu["providers"]["modal"][span]["strikes"] == 1
        assert us["windows"][span]["attempts"] == 0
        assert us["providers"]["golem"][span]["success_rate"] is None


async def test_env_tells_names_and_never_a_value() -> None:
    async with site() as s:
        assert await s.get("/env") == {
            "PORT": "set",
            "FLY_REGION": None,
            "EMPTY": None,
            "GOLEM_PROVIDER_ENDPOINTS": None,
            "RUNPOD_API_KEY": "set",
        }


# -- metrics -------------------------------------------------------------------------------------


async def test_metrics_without_accept_are_json() -> None:
    async with site() as s:
        exchange = Exchange("id", "GET", b"/", "/", (), 0.0)
        s.telemetry.exchange(
            exchange,
            End.ERROR,
            status=503,
            reason="overloaded",
            bytes_in=0,
            bytes_out=0,
            ttft=None,
            duration=1.0,
            queued=1.0,
        )
        s.telemetry.queue_depth(4)
        answer = await s.get("/metrics")
    assert answer == {
        "total_providers": 3,
        "healthy_providers": 2,
        "avg_latency": 0.5,
        "avg_success_rate": pytest.approx(2.9 / 3),
        "cost_range": {"min": 0.0001, "max": 0.0003},
        "in_flight": 2,
        "queue_depth": 4,
        "exchanges": {"complete": 0, "error": 1, "client_closed": 0},
        "utilisation": {
            "backend": {"golem-1": 0.25, "runpod-eu": 1.0, "modal-eu": 0.0},
            "pool": {"baseline": 0.25, "burst": 0.0},
            "region": {"us-east": 0.25, "eu-west": 0.0},
        },
    }


async def test_metrics_when_text_is_asked_for_are_prometheus() -> None:
    async with site() as s:
        for accept, kind in (
            ("text/plain", "text/plain"),
            ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
        ):
            async with s.client.get("/metrics", headers={"Accept": accept}) as response:
                assert response.content_type == kind
                text = await response.text()
            assert 'beacon_in_flight{backend="golem-1"} 2.0' in text
            assert 'beacon_backend_healthy{backend="runpod-eu"} 0.0' in text


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ("", False),
        ("*/*", False),
        ("text/html, */*", False),
        ("text/plain", True),
        ("TEXT/PLAIN; version=0.0.4", True),
        ("application/json, text/plain, */*", False),  # axios
        ("text/plain, application/json", True),
        ("application/json;q=0.5, text/plain;q=0.9", True),
        ("text/plain;q=0", False),
        ("text/plain;q=x", False),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
            True,
        ),
    ],
)
def test_accept_decides_between_json_and_text(accept: str, text: bool) -> None:
    assert prefers_text(accept) is text


# -- methods -------------------------------------------------------------------------------------


async def test_head_is_get_without_a_body() -> None:
    async with site() as s:
        for path in s.admin.routes:
            async with s.client.get(path) as got, s.client.head(path) as head:
                assert head.status == got.status
                assert head.headers["Content-Type"] == got.headers["Content-Type"]
                assert head.headers["Cache-Control"] == "no-store"
                assert await head.read() == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"])
async def test_other_methods_are_405_in_the_dialect_of_the_path(method: str) -> None:
    async with site() as s:
        for path in s.admin.routes:
            async with s.client.request(method, path, data=b'{"model":"x"}') as response:
                assert response.status == 405, path
                assert response.headers["Allow"] == "GET, HEAD"
                error = (await response.json())["error"]
            if path == "/api/tags":
                assert isinstance(error, str)
            else:
                assert error["code"] == "method_not_allowed"


# -- live events ---------------------------------------------------------------------------------


HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def test_ws_when_head_asks_to_upgrade_answers_as_without() -> None:
    async with site() as s, s.client.head("/ws", headers=HANDSHAKE) as response:
        assert response.status == 200


async def test_ws_without_upgrade_says_how_to_connect() -> None:
    async with site() as s:
        answer = await s.get("/ws")
    assert answer["status"] == "ok"
    assert "WebSocket" in answer["message"]


async def test_ws_greets_echoes_and_tells_events_each_a_json_line() -> None:
    async with site() as s, s.client.ws_connect("/ws") as ws:
        frames = [await ws.receive_str()]
        await ws.send_str("hi ü")
        frames.append(await ws.receive_str())
        await ws.send_bytes(b"raw\xff")
        frames.append(await ws.receive_str())
        s.telemetry.notify("backend.restored", backend="golem-1")
        frames.append(await ws.receive_str())
    assert all(frame.endswith("\n") and frame.count("\n") == 1 for frame in frames)
    assert [json.loads(frame) for frame in frames] == [
        {"type": "connection", "status": "connected", "timestamp": UNIX},
        {"type": "echo", "data": "hi ü", "timestamp": UNIX},
        {"type": "echo", "data": "raw\ufffd", "timestamp": UNIX},
        {"type": "backend.restored", "backend": "golem-1", "timestamp": UNIX},
    ]


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_ws_when_the_client_leaves_is_unsubscribed(how: str, cancels: bool) -> None:
    """A listener that stayed subscribed would cost every exchange, for ever."""
    async with site(cancels=cancels) as s:
        for _ in range(MAX_LISTENERS + 1):  # one more than fit at once
            await eventually(lambda: len(s.telemetry._listeners) < MAX_LISTENERS)
            ws = await s.client.ws_connect("/ws")
            await ws.receive_str()
            if how == "abort":
                abort(ws)
            await ws.close()
        await eventually(lambda: not s.telemetry._listeners)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "ws.reader"]


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("blocked", ["echo", "event"])
async def test_ws_when_the_client_leaves_a_blocked_write_behind_ends_in_silence(
    blocked: str, cancels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is to be woken by the traceback of a listener that went away."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with site(cancels=cancels) as s:
        silent = await Silent.open(s.client.port)
        await eventually(lambda: s.telemetry._listeners)
        (listener,) = s.telemetry._listeners
        if blocked == "echo":
            await eventually(lambda: silent.fill())
        else:
            while not listener.dropped:  # until what waits for the socket waits in the queue
                s.telemetry.notify("plugin.told", padding="x" * 60_000)
                await asyncio.sleep(0)
        silent.reset()
        await eventually(lambda: not s.telemetry._listeners)
    await asyncio.sleep(0)
    gc.collect()
    assert complaints == []
    assert [record.getMessage() for record in caplog.records] == []


class Silent:
    """A WebSocket client on a bare socket that never reads."""

    FRAME = b"\x81\xfe" + (60_000).to_bytes(2, "big") + bytes(4) + b"x" * 60_000

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""

    @classmethod
    async def open(cls, port: int | None) -> Silent:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        lines = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
        sock.send(f"GET /ws HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        return cls(sock)

    def fill(self) -> bool:
        """Send what goes; whether the server has stopped to read, for it cannot write."""
        try:
            self.rest = self.rest or self.FRAME
            self.rest = self.rest[self.sock.send(self.rest) :]
        except BlockingIOError:
            return True
        return False

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def abort(ws: ClientWebSocketResponse[Any]) -> None:
    """Leave without a word, as a client does whose machine dies."""
    connection = ws._response.connection
    assert connection is not None
    assert connection.transport is not None
    connection.transport.abort()


async def test_ws_when_too_many_listen_is_503() -> None:
    async with site() as s:
        for _ in range(MAX_LISTENERS):
            s.telemetry.subscribe()
        async with s.client.get("/ws", headers=HANDSHAKE) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "60"
            assert (await response.json())["error"]["code"] == "overloaded"


async def test_ws_when_a_message_is_too_large_is_closed_with_1009() -> None:
    async with site() as s, s.client.ws_connect("/ws") as ws:
        await ws.receive_str()
        await ws.send_str("x" * 70_000)
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1009)


async def test_ws_when_the_server_drains_is_told_and_closed() -> None:
    """An open listener has no end of its own: the drain would wait its whole time for it."""
    async with site() as s, s.client.ws_connect("/ws") as ws:
        await ws.receive_str()
        s.telemetry.notify("server.draining", seconds=30.0)
        assert json.loads(await ws.receive_str())["type"] == "server.draining"
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        await eventually(lambda: not s.telemetry._listeners)


async def test_ws_when_the_client_does_not_read_drops_events_and_holds_up_nobody() -> None:
    async with site() as s, s.client.ws_connect("/ws") as ws:
        await ws.receive_str()
        (listener,) = s.telemetry._listeners
        started = time.monotonic()
        for n in range(3000):
            s.telemetry.notify("plugin.told", n=n, padding="x" * 10_000)
        assert listener.dropped > 2000
        assert time.monotonic() - started < 20
        first = json.loads(await ws.receive_str())
        assert first["n"] == listener.dropped
