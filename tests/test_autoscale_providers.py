"""What RunPod and Modal are told: their APIs as they are published, over stand-ins of them.

RunPod's is an HTTP server that follows its REST reference (EndpointUpdateInput: a PATCH changes the
fields that it names, and answers with the endpoint); it is not RunPod. Modal's is the stand-in of
kit_modal_control under the real `modal` client.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from beacon_proxy.config import resolve_backends
from beacon_proxy.contracts import Backend, Workers
from beacon_proxy.errors import ConfigError
from beacon_proxy.fleet.control import Control
from providers.modal import Modal
from providers.runpod import RunPod
from providers.runpod.workers import rest_of

from .config_fakes import load
from .kit import RawBackend, RawClient, chat, eventually, json_answer, proxy
from .kit_modal_control import ControlPlane
from .kit_proxy import plugins
from .test_inference_route import SAID
from .test_modal_stats import told

ROOT = Path(__file__).parent.parent
KEY = "rp-secret"


class Rest:
    """RunPod's REST API with one endpoint, whose OpenAI route answers once `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked: list[dict[str, Any]] = []  # by PATCH
        self.read = 0  # times
        self.status = 200
        self.deaf = False  # it answers 200, and changes nothing
        self.endpoint = {"id": "e1", "name": "llm", "workersMin": 0, "workersMax": 3}
        app = web.Application()
        app.router.add_get("/v1/endpoints/{id}", self._get)
        app.router.add_patch("/v1/endpoints/{id}", self._patch)
        app.router.add_post("/v2/e1/openai/v1/chat/completions", self._chat)
        self.server = TestServer(app)

    async def _chat(self, request: web.Request) -> web.Response:
        await self.gate.wait()
        return web.json_response({"choices": [{"message": {"content": "hi"}}]})

    async def _get(self, request: web.Request) -> web.Response:
        self.read += 1
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.Response(status=401)
        if self.status != 200:
            return web.Response(status=self.status, text=f"no, {KEY}")
        return web.json_response(self.endpoint)

    async def _patch(self, request: web.Request) -> web.Response:
        self.asked.append(
            {
                "id": request.match_info["id"],
                "key": request.headers.get("Authorization"),
                **await request.json(),
            }
        )
        if self.status != 200:
            return web.Response(status=self.status, text=f"no, {KEY}")
        if not self.deaf:
            self.endpoint |= await request.json()
        return web.json_response(self.endpoint)

    async def __aenter__(self) -> Rest:
        await self.server.start_server()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/v2/e1"


def runpod(url: str, **more: Any) -> Backend:
    row = {"name": "r", "provider": "runpod", "url": url, "api_key": KEY, **more}
    (made,) = resolve_backends(load(json.dumps({"backends": [row]}), among=plugins()), plugins())
    return made


async def scaled(backend: Backend, provider: Any) -> None:
    async with aiohttp.ClientSession() as session:
        await provider.scale(backend, Workers(2, 5), session, 5.0)


async def kept(backend: Backend, provider: Any) -> int:
    async with aiohttp.ClientSession() as session:
        number: int = await provider.kept(backend, session, 5.0)
        return number


async def test_runpod_when_asked_says_what_it_keeps() -> None:
    async with Rest() as rest:
        rest.endpoint["workersMin"] = 3
        assert await kept(runpod(rest.url), RunPod()) == 3
        assert rest.asked == []
        rest.endpoint["workersMin"] = None
        with pytest.raises(ValueError, match="does not say how many workers"):
            await kept(runpod(rest.url), RunPod())


async def test_runpod_when_told_patches_the_two_fields_with_its_key() -> None:
    async with Rest() as rest:
        await scaled(runpod(rest.url), RunPod())
        assert rest.asked == [
            {"id": "e1", "key": f"Bearer {KEY}", "workersMin": 2, "workersMax": 5}
        ]
        assert rest.endpoint["name"] == "llm"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "RunPod refuses the api_key"),
        (404, "RunPod knows no such endpoint"),
        (400, "RunPod answers 400"),
        (500, "RunPod answers 500"),
    ],
)
async def test_runpod_when_it_says_no_the_reason_holds_no_key(status: int, words: str) -> None:
    async with Rest() as rest:
        rest.status = status
        with pytest.raises(ValueError, match=f"^{words}$"):
            await scaled(runpod(rest.url), RunPod())
        with pytest.raises(ValueError, match=f"^{words}$"):
            await kept(runpod(rest.url), RunPod())


async def test_runpod_when_it_answers_with_other_numbers_is_not_believed() -> None:
    async with Rest() as rest:
        rest.deaf = True
        with pytest.raises(ValueError, match="other workers than it was told"):
            await scaled(runpod(rest.url), RunPod())


@pytest.mark.parametrize(
    ("url", "rest"),
    [
        ("https://api.runpod.ai/v2/e1", "https://rest.runpod.io/v1"),
        ("https://api.runpod.ai/v2/e1/openai/v1", "https://rest.runpod.io/v1"),
        ("https://e1.api.runpod.ai", "https://rest.runpod.io/v1"),
        ("http://127.0.0.1:9/v2/e1", "http://127.0.0.1:9/v1"),
    ],
)
def test_runpod_rest_api_is_its_own_or_beside_that_of_a_stand_in(url: str, rest: str) -> None:
    backend = runpod(url)
    assert rest_of(backend) == rest
    assert RunPod().scalable(backend) is None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"provider": "runpod", "url": "http://127.0.0.1:9", "api_key": KEY},
            "url: must name the endpoint, as https://api.runpod.ai/v2/ENDPOINT_ID does",
        ),
        (
            {"provider": "runpod", "url": "https://api.runpod.ai/v2/e1"},
            "api_key: is needed to scale it",
        ),
        (
            {"provider": "modal", "url": "https://x.modal.run"},
            "control_url: must be modal://APP/FUNCTION to scale it",
        ),
    ],
)
def test_config_when_a_backend_lacks_what_scaling_needs_says_so_at_start(
    row: dict[str, str], problem: str
) -> None:
    document = {
        "backends": [{"name": "r", **row}],
        "autoscale": {"backends": [{"backend": "r", "max": 2, "instance": "us-east"}]},
    }
    settings = load(json.dumps(document), among=plugins())
    with pytest.raises(ConfigError) as caught:
        resolve_backends(settings, plugins())
    assert caught.value.problems == (f"autoscale.backends[0]: backend r: {problem}",)


async def test_modal_when_told_updates_the_functions_autoscaler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ControlPlane() as plane, told(plane, monkeypatch):
        backend = Backend(
            "m",
            "modal",
            "http://h",
            "http",
            "h",
            1,
            control_url="modal://llm/serve",
        )
        assert await kept(backend, Modal()) == 0
        await scaled(backend, Modal())
        assert plane.scaled == [(2, 5)]
        assert await kept(backend, Modal()) == 2
        with pytest.raises(ValueError, match="Modal knows no such app or function"):
            await scaled(
                Backend("m", "modal", "http://h", "http", "h", 1, control_url="modal://llm/no"),
                Modal(),
            )


async def test_proxy_when_requests_run_tells_runpod_and_takes_it_back_at_the_end() -> None:
    """The whole way: beacon.yaml, the fleet's own numbers, the REST API, a stop."""
    scale = {
        "dry_run": False,
        "interval": 0.05,
        "backends": [{"backend": "r", "max": 3, "cooldown": 0}],
    }
    async with Rest() as rest:
        row = {
            "name": "r",
            "provider": "runpod",
            "url": rest.url,
            "kind": "openai",
            "api_key": KEY,
            "models": ["m"],
        }
        async with proxy(row, autoscale=scale) as p, RawClient(p.port) as client:
            asked = asyncio.create_task(client.ask(chat()))
            await eventually(lambda: rest.asked)
            rest.gate.set()
            assert (await asked).status == 200
            assert p.events("autoscale.scaled")[0]["workers"] == 2
    told_last = rest.asked[-1]
    assert (rest.asked[0]["workersMin"], told_last["workersMin"]) == (2, 0)
    assert KEY not in json.dumps(p.log, default=str)


async def test_proxy_when_the_backend_is_another_regions_leaves_it_to_that_instance() -> None:
    scale = {"interval": 0.02, "backends": [{"backend": "r", "max": 3}]}
    async with Rest() as rest, RawBackend(json_answer(SAID)) as b:
        row = {"name": "r", "provider": "runpod", "url": rest.url, "api_key": KEY}
        async with proxy({**row, "region": "eu-west"}, b, autoscale=scale) as p:
            await asyncio.sleep(0.1)
            (ignored,) = p.events("config.ignored")
            assert "left to the instance in eu-west" in ignored["warning"]
            assert not [g for g in p.app.telemetry.gauges() if g.name.startswith("autoscale")]
        async with proxy({**row, "region": "us-east"}, b, autoscale=scale) as p:
            await eventually(
                lambda: [g for g in p.app.telemetry.gauges() if g.name.startswith("autoscale")]
            )


async def test_docs_when_a_query_names_a_metric_the_proxy_tells_it() -> None:
    text = (ROOT / "docs" / "autoscaling.md").read_text()
    named = {name.removesuffix("_total") for name in re.findall(r"\bbeacon_\w+", text)}
    scale: dict[str, Any] = {"interval": 0.02, "dry_run": False}
    scale["backends"] = [{"backend": "r", "max": 3, "cooldown": 0}]
    async with Rest() as rest:
        row = {"name": "r", "provider": "runpod", "url": rest.url, "kind": "openai"}
        rest.gate.set()
        async with proxy(
            {**row, "api_key": KEY, "models": ["m"], "max_in_flight": 1}, autoscale=scale
        ) as p:
            async with RawClient(p.port) as client:
                assert (await client.ask(chat())).status == 200
            p.app.pipeline.fleet.rows[0][1].in_flight = 9
            await eventually(lambda: p.events("autoscale.scaled"))
            p.app.pipeline.fleet.rows[0][1].in_flight = 0
            told, _ = p.app.telemetry.render(p.app.fleet.candidates())
    families = set(re.findall(r"^# TYPE (\w+)", told.decode(), re.MULTILINE))
    assert named - {name.removesuffix("_total") for name in families} == set()


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (3, 3),
        (None, "says that it keeps None workers"),
        (-1, "says that it keeps -1 workers"),
        (ValueError("no"), "no"),
        (KeyError("min"), "KeyError at test_autoscale_providers.py"),
    ],
)
async def test_kept_when_a_plugin_says_what_is_no_number_it_is_not_believed(
    said: Any, heard: int | str
) -> None:
    class Own(RunPod):
        async def kept(
            self, backend: Backend, session: aiohttp.ClientSession, seconds: float
        ) -> int:
            if isinstance(said, Exception):
                raise said
            number: int = said
            return number

    control = Control({"runpod": Own()}, "0", lambda event, /, **fields: None)
    try:
        told = await control.kept(runpod("http://127.0.0.1:9/v2/e1"), 5.0)
        assert re.sub(r":\d+$", "", str(told)) == str(heard)
    finally:
        await control.close()
