"""Routing faults that a review found: each of these failed once, and must not come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from beacon_proxy.api import inference
from beacon_proxy.contracts import (
    Backend,
    Candidates,
    Check,
    Exchange,
    Live,
    Outcome,
    Permit,
    QueueLimits,
    Stage,
    Verdict,
)
from beacon_proxy.fleet.fleet import Fleet
from beacon_proxy.plugins import Plugins
from beacon_proxy.routing import queue as queue_module
from beacon_proxy.routing.chain import Chain
from beacon_proxy.routing.chooser import Choice, Chooser, Run
from beacon_proxy.routing.queue import Place, Queue
from middleware.capacity import Capacity
from providers.openai import OpenAI

from . import kit_proxy
from .kit import (
    SSE_HEAD,
    Answer,
    BackendConn,
    Proxy,
    RawBackend,
    RawClient,
    answer,
    chat,
    chat_events,
    chunk,
    closed_port,
    each_request,
    eventually,
    header,
    json_answer,
    json_bytes,
    plugins,
    proxy,
    request,
)
from .test_cases_ext import silent
from .test_cases_ext_routing import CHEAPEST, GOOD, ask, backend_of, chain, queued, row
from .test_inference_route import SAID, post
from .test_inference_route import ask as infer
from .test_inference_route import read as read_inference

BROKEN = {"error": {"message": "CUDA error", "type": "server_error"}}
EASILY_EJECTED = {"consecutive_failures": 1, "base_ejection_time": 60, "probe_interval": 0}
NEVER = 60.0  # s; longer than any test waits


@pytest.fixture
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in the queue is woken by a release or not at all."""
    monkeypatch.setattr(queue_module, "RECHECK", NEVER)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, type]]:
    """Plugins of a test's own, beside the built-in ones."""
    known = plugins()
    more = {"providers": dict(known.providers), "middleware": dict(known.middleware)}
    monkeypatch.setattr(
        kit_proxy, "plugins", lambda: Plugins(more["providers"], more["middleware"])
    )
    return more


def live(p: Proxy, number: int = 0) -> Live:
    state: Live = p.app.fleet.candidates()[number].live
    return state


def attempts_of(got: Answer) -> list[bytes]:
    return header(got.headers, "X-Beacon-Attempts")


# -- 1: a 404 of a backend that was only assumed to serve the model

NO_MODEL = {
    "vllm": {
        "object": "error",
        "message": "The model `m` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    },
    "openai": {
        "error": {
            "message": "no access",
            "type": "invalid_request_error",
            "code": "model_not_found",
        }
    },
    "ollama": {"error": 'model "m" not found, try pulling it first'},
    "sglang": {"error": {"message": "Model 'm' not found. Available: ['n']", "code": 404}},
}


@pytest.mark.parametrize("said", NO_MODEL.values(), ids=NO_MODEL)
async def test_404_of_an_assumed_model_asks_the_next_backend_and_is_no_strike(said: Any) -> None:
    """The 404 was relayed, though the next backend had the model; and so for ever after."""
    async with (
        RawBackend(json_answer(said, 404)) as lacking,
        RawBackend(json_answer(GOOD)) as other,
        proxy(row(lacking, 0.001), row(other, 0.1), middleware=chain(health=EASILY_EJECTED)) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.json, backend_of(got)) == (200, GOOD, "b1")
        assert attempts_of(got) == [b"2"]
        got = await ask(p, chat(headers=[CHEAPEST]))
        assert (backend_of(got), attempts_of(got)) == ("b1", [b"1"])
        assert len(lacking.requests) == 1
        await ask(p, chat(model="n", headers=[CHEAPEST]))
        assert [received.json["model"] for received in lacking.requests] == ["m", "n"]
        assert (live(p).success, live(p).healthy) == (1.0, True)
        assert not p.events("backend.ejected")


async def test_404_of_an_assumed_model_fails_over_on_the_translated_route_too() -> None:
    """/inference told its client REQUEST_REJECTED, not transient."""
    async with (
        RawBackend(json_answer(NO_MODEL["ollama"], 404)) as lacking,
        RawBackend(json_answer(SAID)) as other,
        proxy(row(lacking, 0.001), row(other, 0.1)) as p,
    ):
        said = read_inference(await infer(p, cost_priority=True))
        assert (said["success"], said["provider_used"]) == (True, "b1")


async def test_404_of_another_kind_is_relayed_at_once() -> None:
    """Guards the mend: a route that a server has not got is the caller's fault as before."""
    said = {"detail": "Not Found"}
    async with (
        RawBackend(json_answer(said, 404)) as first,
        RawBackend(json_answer(GOOD)) as second,
        proxy(row(first, 0.001), row(second, 0.1)) as p,
    ):
        for _ in range(2):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.json, backend_of(got)) == (404, said, "b0")
        assert (len(first.requests), second.requests) == (2, [])


async def test_404_of_a_model_that_is_configured_is_relayed_at_once() -> None:
    """Guards the mend: what an operator said is not given up so easily."""
    async with (
        RawBackend(json_answer(NO_MODEL["vllm"], 404)) as first,
        RawBackend(json_answer(GOOD)) as second,
        proxy(
            row(first, 0.001, models=["m"]),
            row(second, 0.1),
            middleware=chain(health={"probe_interval": 0}),
        ) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST]))
        assert (got.status, got.json, second.requests) == (404, NO_MODEL["vllm"], [])


async def test_404_when_every_backend_lacks_the_model_and_then_nobody_is_asked() -> None:
    """Each of them was asked again and again for a model that it had said it lacks."""
    async with (
        RawBackend(json_answer(NO_MODEL["vllm"], 404)) as one,
        RawBackend(json_answer(NO_MODEL["ollama"], 404)) as two,
        proxy(row(one, 0.001), row(two, 0.1)) as p,
    ):
        first = await ask(p, chat(headers=[CHEAPEST]))
        assert (first.status, attempts_of(first)) == (404, [b"2"])
        second = await ask(p, chat(headers=[CHEAPEST]))
        assert (second.status, second.json["error"]["code"]) == (404, "model_not_found")
        assert (len(one.requests), len(two.requests)) == (1, 1)


def fact(name: str = "b", **more: Any) -> Backend:
    return Backend(
        name, "openai", url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1, **more
    )


def test_lacking_is_forgotten_after_about_five_minutes() -> None:
    """A model may be pulled meanwhile."""
    now = 1000.0
    fleet = Fleet([fact("a"), fact("b")], {}, clock=lambda: now)
    fleet.lacks(fleet.candidates()[0].live, "m")

    def serving(model: str) -> list[str]:
        return [candidate.backend.name for candidate in fleet.serving(model, set())]

    assert (serving("m"), serving("n")) == (["b"], ["a", "b"])
    now += 240
    assert serving("m") == ["b"]
    fleet.lacks(fleet.candidates()[1].live, "m")
    assert not fleet.knows("m")
    now += 120
    assert serving("m") == ["a"]
    now += 240
    assert serving("m") == ["a", "b"]


def test_lacking_is_overruled_by_what_a_check_finds() -> None:
    """Known beats assumed: the model was pulled, and the next check lists it."""
    fleet = Fleet([fact()], {}, clock=lambda: 1000.0)
    state = fleet.candidates()[0].live
    fleet.lacks(state, "m")
    assert not fleet.knows("m")
    state.models = frozenset({"m"})
    assert fleet.knows("m")


def test_lacking_stays_bounded_whatever_clients_ask_for() -> None:
    """Names of models come from clients: they must not pile up for ever."""
    fleet = Fleet([fact()], {}, clock=lambda: 1000.0)
    state = fleet.candidates()[0].live
    for number in range(5000):
        fleet.lacks(state, f"m{number}")
    assert len(state.lacking) <= 1000
    assert not fleet.knows("m4999")


# -- 2: an answer of an earlier attempt


async def test_page_in_place_of_an_answer_is_never_relayed_when_the_others_are_down() -> None:
    """A captive portal's page, held as the best there was, went out as a 200."""
    page = b"<html>sign in</html>"
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b"
    with closed_port() as dead:
        async with (
            RawBackend(answer(raw % (len(page), page))) as portal,
            proxy(row(portal, 0.001), row(f"http://127.0.0.1:{dead}", 0.1)) as p,
        ):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.complete) == (502, True)
            assert got.json["error"]["code"] == "upstream_error"
            assert b"sign in" not in got.raw
            assert len(portal.requests) == 1


async def test_log_line_names_the_backend_whose_answer_was_relayed() -> None:
    """It named the last one tried, which had not answered at all."""
    with closed_port() as dead:
        async with (
            RawBackend(json_answer(BROKEN, 500)) as first,
            proxy(
                row(first, 0.001, region="us-east"),
                row(f"http://127.0.0.1:{dead}", 0.1, region="eu-west"),
            ) as p,
        ):
            got = await ask(p, chat(headers=[CHEAPEST]))
            assert (got.status, got.json, backend_of(got)) == (500, BROKEN, "b0")
            (told,) = await p.exchanges(1)
    assert (told["backend"], told["region"], told["end"]) == ("b0", "us-east", "error")
    assert [tried["backend"] for tried in told["attempts"]] == ["b0", "b1"]


# -- 3: whose time ran out


async def test_limit_of_inference_running_out_is_a_strike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hung backend was never ejected: the proxy's own limit passed for the client's."""
    monkeypatch.setattr(inference, "ANSWER_WITHIN", 0.15)
    middleware = chain(health=EASILY_EJECTED)
    async with RawBackend(silent) as hung, proxy(hung, middleware=middleware) as p:
        said = read_inference(await infer(p))
        assert (said["success"], said["error_code"]) == (False, "TIMEOUT")
        assert [event["backend"] for event in p.events("backend.ejected")] == ["b0"]
        assert live(p).success < 0.85


@pytest.mark.parametrize("where", ["global", "own"])
async def test_total_time_running_out_is_a_strike(where: str) -> None:
    """As above, for `timeouts.total`."""
    middleware = chain(health=EASILY_EJECTED)
    limits = {"total": 0.15}
    async with RawBackend(silent) as hung:
        rows = [row(hung, timeouts=limits if where == "own" else {})]
        timeouts = limits if where == "global" else {}
        async with proxy(*rows, middleware=middleware, timeouts=timeouts) as p:
            assert (await ask(p, chat())).status == 504
            assert [event["backend"] for event in p.events("backend.ejected")] == ["b0"]
            assert live(p).success < 0.85


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/inference"])
async def test_deadline_of_the_client_running_out_is_no_strike_but_lowers_success(
    path: str,
) -> None:
    """It left no trace: order by latency put a backend that hangs first, again and again."""
    hurry = ("X-Beacon-Timeout", "0.15")
    middleware = chain(health=EASILY_EJECTED)
    async with RawBackend(silent) as hung, proxy(hung, middleware=middleware) as p:
        if path == "/inference":
            said = read_inference(await infer(p, None, hurry))
            assert said["error_code"] == "TIMEOUT"
        else:
            assert (await ask(p, chat(headers=[hurry]))).status == 504
        assert not p.events("backend.ejected")
        assert 0.8 < live(p).success < 1.0


async def test_inference_leaves_half_of_its_time_to_another_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one could hang through all of the time, with others standing by."""
    monkeypatch.setattr(inference, "ANSWER_WITHIN", 1.6)
    async with (
        RawBackend(silent) as hung,
        RawBackend(json_answer(SAID)) as other,
        proxy(row(hung, 0.001), row(other, 0.1), middleware=chain(health=EASILY_EJECTED)) as p,
    ):
        said = read_inference(await infer(p, cost_priority=True))
        assert (said["success"], said["provider_used"]) == (True, "b1")
        assert said["metadata"]["attempts"] == 2
        (told,) = await p.exchanges(1)
        assert 0.75 <= told["attempts"][0]["duration_s"] < 1.6
        assert [event["backend"] for event in p.events("backend.ejected")] == ["b0"]


async def test_inference_stream_that_has_begun_may_take_more_than_half_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards the mend: half is for the beginning of an answer, not for all of it."""
    monkeypatch.setattr(inference, "ANSWER_WITHIN", 2.0)
    role, word, *end = chat_events("hello ", 1)

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            until = time.monotonic() + 1.2
            await conn.send(SSE_HEAD + chunk(role))
            while time.monotonic() < until:
                await conn.send(chunk(word))
                await asyncio.sleep(0.03)
            await conn.send(b"".join(map(chunk, end)) + b"0\r\n\r\n")

    async with (
        RawBackend(slow) as first,
        RawBackend(json_answer(SAID)) as second,
        proxy(row(first, 0.001), row(second, 0.1)) as p,
        RawClient(p.port) as client,
    ):
        asked = {"model": "m", "prompt": "hi", "stream": True, "cost_priority": True}
        got = await client.ask(post(asked), "POST")
        assert (got.status, got.complete, backend_of(got)) == (200, True, "b0")
        assert b'"success":true' in got.body.splitlines()[-1]
        assert second.requests == []


# -- 4: required regions

REQUIRED = {
    "asked without a region": ([("X-Beacon-Region-Mode", "require")], "prefer"),
    "configured": ([], "require"),
    "configured, region named": ([("X-Beacon-Region", "US")], "require"),
}
required = pytest.mark.parametrize(("hints", "mode"), REQUIRED.values(), ids=REQUIRED)
Hints = list[tuple[str, str]]


@required
async def test_require_means_this_instances_region_where_none_is_named(
    hints: Hints, mode: str
) -> None:
    """Without a region `require` required nothing."""
    async with (
        RawBackend(json_answer(GOOD)) as far,
        RawBackend(json_answer(GOOD)) as near,
        proxy(
            row(far, 0.001, region="eu-west"),
            row(near, 0.1, region="us-east"),
            middleware=chain(region={"mode": mode}),
        ) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST, *hints]))
        assert (got.status, backend_of(got), far.requests) == (200, "b1", [])


@required
async def test_require_without_a_backend_there_is_503_and_names_the_region(
    hints: Hints, mode: str
) -> None:
    """It was answered from another region."""
    async with (
        RawBackend(json_answer(GOOD)) as far,
        proxy(row(far, region="eu-west"), middleware=chain(region={"mode": mode})) as p,
    ):
        got = await ask(p, chat(headers=hints))
        assert (got.status, far.requests) == (503, [])
        assert "us-east" in got.json["error"]["message"]
        assert header(got.headers, "Retry-After")


@required
async def test_required_backend_that_is_ejected_is_tried_as_a_last_resort(
    hints: Hints, mode: str
) -> None:
    """Backends of other regions counted as well, so that the only one was never offered."""
    turns = iter([json_bytes(BROKEN, 500)])

    async def recovers(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            await conn.send(next(turns, json_bytes(GOOD)))

    middleware = chain(health=EASILY_EJECTED, region={"mode": mode})
    async with (
        RawBackend(recovers) as near,
        RawBackend(json_answer(GOOD)) as far,
        proxy(row(near, region="us-east"), row(far, region="eu-west"), middleware=middleware) as p,
    ):
        assert (await ask(p, chat(headers=hints))).status == 500
        assert p.events("backend.ejected")
        got = await ask(p, chat(headers=hints))
        assert (got.status, got.json, backend_of(got)) == (200, GOOD, "b0")
        assert far.requests == []


@required
async def test_last_resort_of_a_required_region_that_fails_is_503_and_names_the_region(
    hints: Hints, mode: str
) -> None:
    """The message said only that there was no healthy backend, with two of them well."""
    middleware = chain(health=EASILY_EJECTED, region={"mode": mode})
    with closed_port() as dead:
        async with (
            RawBackend(json_answer(GOOD)) as far,
            proxy(
                row(f"http://127.0.0.1:{dead}", region="us-east"),
                row(far, region="eu-west"),
                middleware=middleware,
            ) as p,
        ):
            assert (await ask(p, chat(headers=hints))).status == 502
            got = await ask(p, chat(headers=hints))
            assert (got.status, attempts_of(got)) == (503, [b"1"])
            assert "us-east" in got.json["error"]["message"]
            assert header(got.headers, "Retry-After")
            assert far.requests == []


# -- 5: a check that fails by itself


class Faulty(OpenAI):
    """A provider plugin with a fault."""

    name = "faulty"

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        raise KeyError("models")


async def test_check_that_raises_ends_no_probe_of_another_backend(
    install: dict[str, dict[str, type]],
) -> None:
    """One KeyError in a plugin ended all probes, for good."""
    install["providers"]["faulty"] = Faulty
    middleware = chain(health={**EASILY_EJECTED, "probe_interval": 0.03})
    async with RawBackend(json_answer(GOOD)) as one, RawBackend(json_answer(GOOD)) as two:
        rows = [row(one, 0.001, provider="faulty"), row(two, 0.1)]
        async with proxy(*rows, middleware=middleware) as p:
            await eventually(lambda: two.probes >= 6)  # a round asks twice
            (told, *_) = p.events("check.failed")
            assert told["backend"] == "b0"
            assert "KeyError" in told["error"]
            assert not p.events("probes.stopped")
            assert not p.events("backend.ejected")
            assert backend_of(await ask(p, chat(headers=[CHEAPEST]))) == "b0"


# -- 6: a client's price limit

LIMIT = ("X-Beacon-Max-Price", "0.01")


async def test_price_limit_excludes_dear_backends_before_any_answer_was_seen() -> None:
    """What took no time yet was expected to cost nothing."""
    async with (
        RawBackend(json_answer(GOOD)) as dear,
        RawBackend(json_answer(GOOD)) as cheap,
        proxy(row(dear, 0.1, region="eu-west"), row(cheap, 0.0001, region="us-east")) as p,
    ):
        got = await ask(p, chat(headers=[LIMIT, ("X-Beacon-Region", "eu-west")]))
        assert (got.status, backend_of(got), dear.requests) == (200, "b1", [])


async def test_price_limit_that_nobody_meets_is_429_with_retry_after() -> None:
    """The dear backend was asked; and where it was not, no word told when to try again."""
    async with RawBackend(json_answer(GOOD)) as dear, proxy(row(dear, 0.1)) as p:
        got = await ask(p, chat(headers=[LIMIT]))
        assert (got.status, got.complete, dear.requests) == (429, True, [])
        (wait,) = header(got.headers, "Retry-After")
        assert 1 <= int(wait) <= 300
        assert "X-Beacon-Max-Price" in got.json["error"]["message"]


async def test_price_limit_goes_by_what_answers_take_once_some_were_seen() -> None:
    """Guards the mend: the guess ends with the first answer of any backend."""
    async with (
        RawBackend(json_answer(GOOD)) as dear,
        RawBackend(json_answer(GOOD)) as cheap,
        proxy(row(dear, 0.01, region="eu-west"), row(cheap, 0.0001, region="us-east")) as p,
    ):
        data = chat(headers=[LIMIT, ("X-Beacon-Region", "eu-west")])
        assert [backend_of(await ask(p, data)) for _ in range(2)] == ["b1", "b0"]


def test_estimate_is_a_guess_first_and_then_the_mean_of_all_backends() -> None:
    """Two ends of the estimate; an unknown backend is taken for an average one."""
    fleet = Fleet([fact(name, price_per_second=1.0) for name in "abc"], {}, clock=lambda: 1000.0)
    one, two, unknown = fleet.candidates()

    def expected() -> float:
        return fleet.estimates.usd(unknown.backend, unknown.live, "m", 1000.0)

    assert expected() >= 1.0
    exchange = made(model="n", inference=True, work="n")
    for candidate in (one, one, one, two):
        seconds = 2.0 if candidate is one else 4.0
        outcome = Outcome(candidate.backend, 1, Verdict.GOOD, Stage.DONE, billed=seconds)
        fleet.note(exchange, outcome, candidate.live)
    assert 2.0 < expected() < 4.0


# -- 7: limits of one backend


async def test_total_time_of_a_backend_may_be_longer_than_the_global_one() -> None:
    """The global one was put on the exchange, and cut every backend."""

    async def slow(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            for _ in range(6):
                await asyncio.sleep(0.04)
            await conn.send(json_bytes(GOOD))

    async with RawBackend(slow) as patient, RawBackend(slow) as usual:
        rows = [
            row(patient, region="us-east", timeouts={"total": 5}),
            row(usual, region="eu-west"),
        ]
        async with proxy(*rows, timeouts={"total": 0.1}) as p:
            statuses = {
                region: (await ask(p, chat(headers=[("X-Beacon-Region", region)]))).status
                for region in ("us-east", "eu-west")
            }
            assert statuses == {"us-east": 200, "eu-west": 504}


# -- 8: the queue, from outside


class Doors:
    """A backend that holds each answer until its door opens; a request's model is its name."""

    def __init__(self) -> None:
        self._doors: dict[str, asyncio.Event] = {}

    def _door(self, name: str) -> asyncio.Event:
        return self._doors.setdefault(name, asyncio.Event())

    def open(self, *names: str) -> None:
        for name in names:
            self._door(name).set()

    async def script(self, conn: BackendConn) -> None:
        async for received in each_request(conn):
            await self._door(received.json["model"]).wait()
            await conn.send(json_bytes(GOOD))


def seen(backend: RawBackend) -> list[str]:
    return [received.json["model"] for received in backend.requests if received.complete]


async def reaches(backend: RawBackend, name: str) -> None:
    await eventually(lambda: seen(backend)[-1:] == [name])


class Nothing:
    def release(self) -> None:
        """There is nothing to give back."""


@dataclass(slots=True)
class Barred:
    """A rule of an operator's own, which has nothing to do with room."""

    tenant: str = field(default="barred")

    def admit(self, exchange: Exchange, backend: Backend) -> Permit | None:
        return None if exchange.model == self.tenant else Nothing()


Come = Callable[..., Awaitable[None]]


@asynccontextmanager
async def crowd(
    p: Proxy, *backends: RawBackend
) -> AsyncIterator[tuple[Come, dict[str, asyncio.Task[Answer]]]]:
    """Ask under a name and wait until it is seen or queued: so the order is certain."""
    tasks: dict[str, asyncio.Task[Answer]] = {}

    async def come(*names: str) -> None:
        for name in names:
            arrived = sum(len(seen(backend)) for backend in backends) + queued(p) + 1

            def there(count: int = arrived) -> bool:
                return sum(len(seen(backend)) for backend in backends) + queued(p) == count

            tasks[name] = asyncio.create_task(ask(p, chat(model=name)), name=name)
            await eventually(there)

    try:
        yield come, tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


BARRED = {
    "before capacity": ["health", "barred", "capacity", "failover"],
    "after capacity": ["health", "capacity", "barred", "failover"],
}


@pytest.mark.usefixtures("no_recheck")
@pytest.mark.parametrize("order", BARRED.values(), ids=BARRED)
async def test_queue_when_one_tenant_is_refused_serves_those_behind_in_order(
    order: list[str], install: dict[str, dict[str, type]]
) -> None:
    """Who was refused for another reason than room held up everybody, newcomers too."""
    install["middleware"]["barred"] = Barred
    doors = Doors()
    async with RawBackend(doors.script) as backend:
        rows = [row(backend, max_in_flight=1)]
        middleware: list[dict[str, Any]] = [{name: {}} for name in order]
        async with proxy(*rows, middleware=middleware) as p, crowd(p, backend) as (come, tasks):
            await come("first", "barred", "second", "third")
            assert (seen(backend), queued(p)) == (["first"], 3)
            doors.open("first")
            await eventually(lambda: seen(backend) == ["first", "second"])
            doors.open("second")
            await eventually(lambda: seen(backend) == ["first", "second", "third"])
            doors.open("third", "newcomer")
            assert (await tasks["third"]).status == 200
            await eventually(lambda: p.in_flight() == 0)
            await come("newcomer")
            assert (await tasks["newcomer"]).status == 200
            assert (queued(p), "barred" in seen(backend)) == (1, False)


@pytest.mark.usefixtures("no_recheck")
@pytest.mark.parametrize("ahead", [[], ["barred"]], ids=["alone", "behind a refused tenant"])
async def test_queue_when_two_slots_are_freed_at_once_serves_two_at_once(
    ahead: list[str], install: dict[str, dict[str, type]]
) -> None:
    """The second slot lay idle until a recheck, with somebody waiting for it."""
    install["middleware"]["barred"] = Barred
    doors = Doors()
    async with RawBackend(doors.script) as backend:
        rows = [row(backend, max_in_flight=2)]
        middleware: list[dict[str, Any]] = [{"barred": {}}, *chain()]
        async with proxy(*rows, middleware=middleware) as p, crowd(p, backend) as (come, _):
            await come("one", "two", *ahead, "three", "four", "five")
            doors.open("one", "two")
            await eventually(lambda: len(seen(backend)) == 4)
            assert sorted(seen(backend)[2:]) == ["four", "three"]
            assert queued(p) == 1 + len(ahead)


@pytest.mark.usefixtures("no_recheck")
async def test_queue_serves_those_who_want_the_same_backend_in_the_order_they_came() -> None:
    """Guards the mend: nobody overtakes, and no slot is given to who cannot use it."""
    doors = Doors()
    names = [f"n{number}" for number in range(6)]
    async with RawBackend(doors.script) as backend, RawBackend(doors.script) as other:
        rows = [
            row(other, max_in_flight=1, models=["elsewhere", "waits-elsewhere"]),
            row(backend, max_in_flight=1, models=names),
        ]
        async with proxy(*rows) as p, crowd(p, other, backend) as (come, tasks):
            await come("elsewhere", "waits-elsewhere", *names)
            for name in names:
                await reaches(backend, name)
                assert seen(backend) == names[: len(seen(backend))]
                doors.open(name)
                assert (await tasks[name]).status == 200
            assert (seen(backend), seen(other), queued(p)) == (names, ["elsewhere"], 1)


# -- 9: an answer in hand


@pytest.mark.usefixtures("no_recheck")
async def test_answer_in_hand_is_relayed_at_once_when_the_next_backend_is_full() -> None:
    """The client waited all of `queue_timeout` for an answer that was there already."""
    doors = Doors()
    async with RawBackend(json_answer(BROKEN, 500)) as bad, RawBackend(doors.script) as full:
        rows = [
            row(bad, 0.001, region="us-east"),
            row(full, 0.1, region="eu-west", max_in_flight=1),
        ]
        middleware = chain(capacity={"queue_timeout": NEVER})
        async with proxy(*rows, middleware=middleware) as p:
            there = [("X-Beacon-Region", "eu-west")]
            first = asyncio.create_task(ask(p, chat(model="first", headers=there)))
            await eventually(lambda: seen(full) == ["first"])
            got = await ask(p, chat(headers=[CHEAPEST]), patience=2)
            assert (got.status, got.json, backend_of(got)) == (500, BROKEN, "b0")
            assert not first.done()
            doors.open("first")
            assert (await first).status == 200
            assert [line["queued_s"] for line in await p.exchanges(2)] == [0, 0]


# -- 10: the queue, from inside


class Line:
    """A queue with places in it that wait for `a`, or for what they say."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.queue = Queue(QueueLimits(3, NEVER), self.depths.append)
        self.tasks: list[asyncio.Task[None]] = []

    async def join(self, wants: str = "a") -> Place:
        place = self.queue.join(frozenset(wants))
        await self.wait(place)
        return place

    async def wait(self, place: Place) -> None:
        self.tasks.append(asyncio.create_task(self.queue.wait(place, NEVER), name="waiter"))
        await asyncio.sleep(0)


@pytest.fixture
async def waiters() -> Any:
    line = Line()
    yield line
    for task in line.tasks:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)


def woken(*places: Place) -> list[bool]:
    return [place.wake is None or place.wake.done() for place in places]


unhurried = pytest.mark.usefixtures("no_recheck")


@unhurried
async def test_release_is_promised_to_the_first_who_wants_it_and_to_nobody_else(
    waiters: Line,
) -> None:
    q = waiters.queue
    other, first, second = [await waiters.join(wants) for wants in ("b", "ab", "a")]
    assert not q.promised("a", None)
    q.released("a")
    assert woken(other, first, second) == [False, True, False]
    assert (q.promised("a", first), q.promised("a", second), q.promised("a", None)) == (
        False,
        True,
        True,
    )
    assert not q.promised("b", None)
    q.tried(first, "a")
    assert first.owed is None
    # Someone was turned away meanwhile; there may be more room than was promised: the next looks.
    assert woken(other, second) == [False, True]
    q.tried(second)
    assert not q.promised("a", None)


@unhurried
async def test_two_releases_wake_two_and_are_promised_until_both_have_tried(
    waiters: Line,
) -> None:
    q = waiters.queue
    first, second, third = [await waiters.join() for _ in range(3)]
    q.released("a")
    q.released("a")
    assert woken(first, second, third) == [True, True, False]
    q.tried(first, "a")
    assert (q.promised("a", None), q.promised("a", second)) == (True, False)
    q.tried(second, "a")
    assert woken(third) == [True]
    q.tried(third)
    assert not q.promised("a", None)


@unhurried
@pytest.mark.parametrize("took", [None, "b"], ids=["nothing", "another slot"])
async def test_slot_not_taken_is_passed_on_to_those_behind_and_ends_with_the_last(
    waiters: Line, took: str | None
) -> None:
    q = waiters.queue
    first, second, third = [await waiters.join(wants) for wants in ("ab", "b", "a")]
    q.released("a")
    q.tried(first, took)
    assert woken(second, third) == [took == "b", True], "where it found room there may be more"
    assert (third.owed, q.promised("a", third), q.promised("a", None)) == ("a", False, True)
    await waiters.wait(first)  # refused, it waits again: the slot must not come back to it
    q.tried(third)
    assert woken(first) == [False]
    assert not q.promised("a", None)


@unhurried
async def test_who_leaves_with_a_promise_passes_it_on(waiters: Line) -> None:
    """A client that goes in that moment must not take the slot with it."""
    q = waiters.queue
    first, second = [await waiters.join() for _ in range(2)]
    q.released("a")
    q.leave(first)
    assert (woken(second), second.owed, len(q)) == ([True], "a", 1)
    q.tried(second, "a")
    q.leave(second)
    assert not q.promised("a", None)
    assert waiters.depths == [1, 2, 1, 0]


@unhurried
async def test_release_that_nobody_waits_for_is_promised_to_nobody(waiters: Line) -> None:
    q = waiters.queue
    q.released("a")
    assert not q.promised("a", None)
    place = await waiters.join("b")
    q.released("a")
    assert (woken(place), q.promised("a", None)) == ([False], False)
    q.want(place, frozenset("a"))
    q.released("b")
    assert woken(place) == [False]
    q.released("a")
    assert (woken(place), place.owed) == ([True], "a")


async def test_recheck_wakes_a_waiter_and_promises_it_nothing(
    waiters: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "RECHECK", 0.01)
    place = await waiters.join()
    await asyncio.wait_for(waiters.tasks[0], 2)
    assert (place.owed, waiters.queue.promised("a", None)) == (None, False)
    waiters.queue.tried(place)
    assert not waiters.queue.promised("a", None)


async def test_queue_is_full_at_its_size(waiters: Line) -> None:
    for _ in range(3):
        assert not waiters.queue.full
        await waiters.join()
    assert waiters.queue.full


# -- 10: the chain


def made(**more: Any) -> Exchange:
    return Exchange(id="x", method="POST", target=b"/", path="/", headers=(), started=0.0, **more)


class Early:
    def __init__(self, word: str) -> None:
        self.word = word

    def prepare(self, exchange: Exchange) -> None:
        exchange.trace_id = (exchange.trace_id or "") + self.word


class Late:
    def select(self, exchange: Exchange, candidates: Candidates) -> Candidates:
        return candidates

    def queue(self) -> QueueLimits:
        return QueueLimits(7, 0.5)


def test_chain_sorts_the_phases_in_the_order_of_the_chain() -> None:
    """There was no phase before the first plan, so what it settled came too late for some."""
    first, late, second = Early("1"), Late(), Early("2")
    chained = Chain.of(iter([first, late, second]))
    exchange = made()
    for prepare in chained.prepares:
        prepare(exchange)
    assert exchange.trace_id == "12"
    assert chained.selects == (late.select,)
    assert (chained.admits, chained.retries, chained.observers, chained.lifespans) == ((),) * 4
    assert chained.queue == QueueLimits(7, 0.5)


def test_chain_without_a_queue_rule_lets_nobody_wait() -> None:
    assert Chain.of([Early("1")]).queue == QueueLimits(0, 0.0)


@dataclass(slots=True)
class Rule:
    """A retry rule that always says the same."""

    wait: float | None = field(default=None)

    def retry(self, exchange: Exchange, outcome: Outcome) -> float | None:
        return self.wait


async def retried(
    install: dict[str, dict[str, type]], waits: tuple[float | None, ...]
) -> tuple[Answer, dict[str, Any]]:
    """What a client gets, and the log line, when the first of two backends fails."""
    middleware: list[dict[str, Any]] = [{"cost": {}}]
    for number, wait in enumerate(waits):
        install["middleware"][f"rule{number}"] = Rule
        middleware.append({f"rule{number}": {"wait": wait}})
    async with (
        RawBackend(json_answer(BROKEN, 500)) as bad,
        RawBackend(json_answer(GOOD)) as good,
        proxy(row(bad, 0.001), row(good, 0.1), middleware=middleware) as p,
    ):
        got = await ask(p, chat(headers=[CHEAPEST]))
        (told,) = await p.exchanges(1)
    return got, told


@pytest.mark.parametrize("waits", [(0.0, 0.08, 0.01), (0.08, 0.0), (0.0, 0.08)])
async def test_retry_waits_as_long_as_the_rule_that_asks_for_most(
    waits: tuple[float, ...], install: dict[str, dict[str, type]]
) -> None:
    got, told = await retried(install, waits)
    assert (got.status, backend_of(got)) == (200, "b1")
    assert told["queued_s"] == pytest.approx(0.08)
    assert told["duration_s"] >= 0.07


@pytest.mark.parametrize("waits", [(None, 0.0), (0.0, None), (0.0, None, 0.08), (None,), ()])
async def test_retry_is_stopped_by_any_rule_and_by_having_none(
    waits: tuple[float | None, ...], install: dict[str, dict[str, type]]
) -> None:
    got, told = await retried(install, waits)
    assert (got.status, got.json, backend_of(got)) == (500, BROKEN, "b0")
    assert (len(told["attempts"]), told["queued_s"]) == (1, 0)


@dataclass(slots=True)
class Chooses:
    """A middleware that settles what the client left open."""

    region: str = field(default="eu-west")

    def prepare(self, exchange: Exchange) -> None:
        if exchange.region is None:
            exchange.region = self.region


async def test_prepare_runs_before_the_first_plan_wherever_it_stands_in_the_chain(
    install: dict[str, dict[str, type]],
) -> None:
    """A plugin at the end of the chain could tell the ones before it nothing."""
    install["middleware"]["chooses"] = Chooses
    async with RawBackend(json_answer(GOOD)) as one, RawBackend(json_answer(GOOD)) as two:
        rows = [row(one, 0.001, region="us-east"), row(two, 0.1, region="eu-west")]
        async with proxy(*rows, middleware=[*chain(), {"chooses": {}}]) as p:
            assert backend_of(await ask(p, chat(headers=[CHEAPEST]))) == "b1"
            named = chat(headers=[CHEAPEST, ("X-Beacon-Region", "us-east")])
            assert backend_of(await ask(p, named)) == "b0"


@pytest.mark.usefixtures("no_recheck")
async def test_newcomer_in_the_moment_of_two_releases_takes_the_slot_that_is_free() -> None:
    """It was turned away by the waiter's promise, and no release was left to wake it."""
    middleware = Chain.of([Capacity()])
    line = Queue(middleware.queue, lambda depth: None)
    fleet = Fleet([fact(max_in_flight=2)], {"openai": OpenAI()})
    chooser = Chooser(fleet, middleware, line)

    async def choose() -> Choice:
        return await chooser.choose(made(), None, set(), Run(), patient=True)

    taken = [await choose(), await choose()]
    waiter = asyncio.create_task(choose(), name="waiter")
    await asyncio.sleep(0.01)
    newcomer = asyncio.create_task(choose(), name="newcomer")  # runs before the waiter wakes
    for choice in taken:
        for permit in choice.permits:
            permit.release()
        line.released("b")
    await asyncio.wait_for(waiter, 2)
    await asyncio.wait_for(newcomer, 2)  # now: sleeps until RECHECK


async def test_total_when_it_runs_out_in_the_queue_is_no_strike_and_sends_nothing() -> None:
    """The queue knew no `total`: what was sent past its limit struck a healthy backend."""
    gate = asyncio.Event()

    async def slow(conn: BackendConn) -> None:
        while await conn.request():
            await gate.wait()
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await conn.drain()

    async with (
        RawBackend(slow) as backend,
        proxy({"url": backend, "max_in_flight": 1}, timeouts={"total": 0.3}) as p,
        RawClient(p.port) as first,
        RawClient(p.port) as second,
    ):
        # The second begins before the first and queues after it: its time is over while the slot
        # is still taken.
        raw = chat()
        await second.send(raw[:-1])
        await asyncio.sleep(0.15)
        await first.send(request("GET", "/first"))
        await eventually(lambda: backend.requests)
        await second.send(raw[-1:])
        got = await second.response("POST")
        assert got.status == 504
        assert [seen.target for seen in backend.requests] == [b"/first"]
        gate.set()
        lines = await p.exchanges(2)
    assert [line["attempts"] for line in lines if line["path"] != "/first"] == [[]]
