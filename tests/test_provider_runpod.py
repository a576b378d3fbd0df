"""runpod: recorded answers in, verdicts out; its control plane is played without a socket.

The number in a test's id is the section of the record. The counters of `/health` are as independent
clients logged them; no answer of the load balancer was recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aioresponses import aioresponses
from yarl import URL

from beacon_proxy.contracts import (
    Backend,
    Capacity,
    Check,
    Dialect,
    Fault,
    Hop,
    Prompt,
    Provider,
    Reading,
    Usage,
    Verdict,
    Warmth,
)
from beacon_proxy.errors import ConfigError
from providers.runpod import RunPod

RUNPOD = RunPod(retry_delay=0.0)
PROVIDER: Provider = RUNPOD
ENDPOINT = Backend(
    name="r",
    provider="runpod",
    url="https://api.runpod.ai/v2/ep1",
    scheme="https",
    host="api.runpod.ai",
    port=443,
    base_path="/v2/ep1",
    api_key="rpa_1",
)
BALANCER = replace(
    ENDPOINT, url="https://ep1.api.runpod.ai", host="ep1.api.runpod.ai", base_path=""
)
LOCAL = replace(
    ENDPOINT, url="http://127.0.0.1:1", scheme="http", host="127.0.0.1", port=1, base_path=""
)


def test_provider_when_it_stands_alone_has_the_defaults_of_its_family() -> None:
    assert PROVIDER.name == "runpod"
    assert (PROVIDER.pool, PROVIDER.price_per_second) == ("burst", 0.00025)
    assert PROVIDER.kinds == ("auto", "queue", "openai", "load_balancing")
    assert PROVIDER.environment == ("RUNPOD_API_BASE", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID")


# What the environment gives


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("", "https://api.runpod.ai/v2/ep1"),
        (" http://127.0.0.1:9/v2/ ", "http://127.0.0.1:9/v2/ep1"),
        ("https://api.runpod.ai/v2/ep1", "https://api.runpod.ai/v2/ep1"),
        ("https://ep1.api.runpod.ai", "https://ep1.api.runpod.ai"),
    ],
)
def test_environment_when_endpoint_is_named_makes_one_row(base: str, url: str) -> None:
    env = {"RUNPOD_API_BASE": base, "RUNPOD_API_KEY": "rpa_1\n", "RUNPOD_ENDPOINT_ID": " ep1"}
    assert PROVIDER.from_environment(env, "sin") == [
        {
            "name": "runpod-asia-pacific",
            "provider": "runpod",
            "url": url,
            "region": "asia-pacific",
            "api_key": "rpa_1",
        }
    ]


@pytest.mark.parametrize("url", ["https://ep1.api.runpod.ai", "http://127.0.0.1:1"])
def test_problem_when_a_check_would_wake_the_endpoint_names_the_key(url: str) -> None:
    """19: its /health would be a request like any other."""
    named = BALANCER if url == BALANCER.url else replace(LOCAL, kind="load_balancing")
    at = named.origin + named.base_path
    assert str(RUNPOD.problem(replace(named, control_url=at))).startswith("control_url: ")
    other = replace(named, control_url="https://api.runpod.ai/v2/ep1")
    assert RUNPOD.problem(other) is None


NOT_FOUND = b'{"detail":"Not Found"}'


def test_auto_when_a_clients_path_is_unknown_stays_what_it_is() -> None:
    """vLLM says of a wrong path what an endpoint without the route says of every path."""
    runpod = RunPod()
    runpod.hop(ENDPOINT, 404, (), NOT_FOUND, b"/v1/nonsense", 0)
    assert runpod.judge(ENDPOINT, 404, (), NOT_FOUND) is None
    assert runpod.judge(ENDPOINT, 200, (), b"{}") is None
    runpod.hop(ENDPOINT, 404, (), NOT_FOUND, b"/v1/chat/completions", 0)
    assert not runpod.carries(ENDPOINT), "the route has answered before"


def test_auto_when_it_was_found_to_be_a_queue_is_so_of_these_settings_alone() -> None:
    runpod = RunPod()
    hop = runpod.hop(ENDPOINT, 404, (), NOT_FOUND, b"/v1/chat/completions?x=1", 0)
    assert hop == Hop(starting=False)
    assert runpod.hop(ENDPOINT, 404, (), NOT_FOUND, b"/v1/chat/completions", 1) is None
    assert runpod.carries(ENDPOINT)
    assert not runpod.carries(replace(ENDPOINT, kind="openai")), "an operator's word is believed"
    for other in ({"url": "https://api.runpod.ai/v2/ep2"}, {"joined": 5.0}):
        assert not runpod.carries(replace(ENDPOINT, **other))  # type: ignore[arg-type]
    for number in range(3000):
        each = replace(ENDPOINT, name=f"r{number}")
        runpod.hop(each, 404, (), NOT_FOUND, b"/v1/chat/completions", 0)
    assert len(runpod._routeless) <= 1000


def test_environment_when_there_is_no_key_makes_a_row_without_one() -> None:
    (row,) = PROVIDER.from_environment({"RUNPOD_ENDPOINT_ID": "ep1"}, "us-east")
    assert "api_key" not in row


def test_environment_when_endpoint_is_not_named_waits_for_it() -> None:
    """fly.toml sets the base and secrets arrive one by one: neither may stop the start."""
    env = {"RUNPOD_API_BASE": "https://api.runpod.ai/v2", "RUNPOD_API_KEY": "rpa_1"}
    assert PROVIDER.from_environment(env, "us-east") == []


@pytest.mark.parametrize(
    ("base", "endpoint", "place"),
    [
        ("", "ep1|EU", "eu-west"),
        ("https://api.runpod.ai/v2 | EU", "ep1", "eu-west"),
        ("https://api.runpod.ai/v2/|europe", " ep1 | eu ", "eu-west"),
        ("|EU", "ep1", "eu-west"),
        ("|", "ep1|", "us-east"),
    ],
)
def test_environment_when_a_region_is_said_believes_it(
    base: str, endpoint: str, place: str
) -> None:
    env = {"RUNPOD_API_BASE": base, "RUNPOD_ENDPOINT_ID": endpoint}
    (row,) = PROVIDER.from_environment(env, "us-east")
    assert (row["name"], row["region"]) == (f"runpod-{place}", place)
    assert row["url"] == "https://api.runpod.ai/v2/ep1"


def test_environment_when_two_regions_are_said_refuses_to_choose() -> None:
    env = {
        "RUNPOD_API_BASE": "https://api.runpod.ai/v2|us",
        "RUNPOD_ENDPOINT_ID": "ep1|eu",
    }
    with pytest.raises(ConfigError, match=r"^RUNPOD_ENDPOINT_ID: must name the same region"):
        PROVIDER.from_environment(env, "us-east")


def test_environment_when_values_are_bad_names_each_variable() -> None:
    env = {"RUNPOD_API_BASE": "api.runpod.ai", "RUNPOD_ENDPOINT_ID": "ep1/run"}
    with pytest.raises(ConfigError) as caught:
        PROVIDER.from_environment(env, "us-east")
    first, second = caught.value.problems
    assert first.startswith("RUNPOD_API_BASE: must be http://")
    assert second.startswith("RUNPOD_ENDPOINT_ID: must be letters")


@pytest.mark.parametrize(
    ("kind", "path", "words"),
    [
        ("auto", "/v2/ep1", None),
        ("openai", "/v2/ep1/openai/v1", None),
        ("load_balancing", "", None),
        ("queue", "/v2/ep1", None),
        ("queue", "", None),
        ("auto", "/v2/ep1/runsync", "url: must end with the endpoint id"),
        ("auto", "/v2/ep1/status/x", "url: must end with the endpoint id"),
    ],
)
def test_problem_when_backend_cannot_be_served_names_the_key(
    kind: str, path: str, words: str | None
) -> None:
    problem = RUNPOD.problem(replace(ENDPOINT, kind=kind, base_path=path))
    assert problem is None if words is None else str(problem).startswith(words)


# What goes out


@pytest.mark.parametrize(
    ("kind", "path", "target", "expected"),
    [
        ("auto", "/v2/ep1", b"/v1/models?x=%41", b"/v2/ep1/openai/v1/models?x=%41"),
        ("auto", "/v2/ep1/openai", b"/v1/models", b"/v2/ep1/openai/v1/models"),
        ("auto", "/v2/ep1/openai/v1", b"/v1/models", b"/v2/ep1/openai/v1/models"),
        ("auto", "/v2/ep1", b"/openai/v1/models", b"/v2/ep1/openai/v1/models"),
        ("auto", "/v2/ep1/openai", b"/openai/v1/models", b"/v2/ep1/openai/v1/models"),
        ("auto", "/v2/ep1", b"/purge-queue", b"/v2/ep1/openai/purge-queue"),
        ("auto", "/v2/v1", b"/v1/models", b"/v2/v1/openai/v1/models"),
        ("auto", "/mock/v2/ep1", b"/v1/models", b"/mock/v2/ep1/openai/v1/models"),
        ("openai", "", b"/v1/models", b"/openai/v1/models"),
        ("openai", "/a/openai/v1", b"/v1/models", b"/a/openai/v1/models"),
        ("load_balancing", "/v2/ep1", b"/v1/models", b"/v2/ep1/v1/models"),
        ("auto", "", b"/v1/models", b"/v1/models"),
        ("auto", "/v1", b"/v1/models", b"/v1/models"),
        ("auto", "/v2", b"/generate", b"/v2/generate"),
    ],
)
def test_target_when_route_is_openai_adds_it_exactly_once(
    kind: str, path: str, target: bytes, expected: bytes
) -> None:
    assert PROVIDER.target(replace(ENDPOINT, kind=kind, base_path=path), target) == expected


def test_credentials_when_backend_has_a_key_replace_the_clients() -> None:
    """The account's key goes out once; the client's other key not at all."""
    expected = ((b"Authorization", b"Bearer rpa_1"), (b"X-Api-Key", b""))
    assert PROVIDER.credentials(ENDPOINT) == expected
    assert PROVIDER.credentials(replace(ENDPOINT, api_key="")) == ()


def test_ask_when_route_is_openai_or_balanced_is_a_chat_there() -> None:
    prompt = Prompt("m", "Hi", stream=True)
    on_route, balanced = PROVIDER.ask(ENDPOINT, prompt), PROVIDER.ask(BALANCER, prompt)
    assert on_route.target == b"/v2/ep1/openai/v1/chat/completions"
    assert balanced.target == b"/v1/chat/completions"
    assert on_route.dialect is balanced.dialect is Dialect.OPENAI
    assert json.loads(on_route.body)["messages"] == [{"role": "user", "content": "Hi"}]


# What an answer means


def job(**fields: Any) -> bytes:
    return json.dumps({"id": "sync-1", **fields}).encode()


CRASH = json.dumps(
    {"error_type": "<class 'ValueError'>", "error_message": "boom", "error_traceback": "…"}
)
WORKER_ERROR = {"message": "vLLM returned HTTP 400: …", "type": "worker_error", "code": None}
SAYS_FAILED = json.dumps({"choices": [{"message": {"content": '"status": "FAILED"'}}]}).encode()


@pytest.mark.parametrize(
    ("backend", "status", "body", "fault"),
    [
        pytest.param(
            ENDPOINT, 200, job(status="FAILED", error=CRASH), Fault.ERROR_BODY, id="1.5 crashed"
        ),
        pytest.param(
            LOCAL, 200, job(status="FAILED", error="x"), Fault.ERROR_BODY, id="1.5 handler's error"
        ),
        pytest.param(ENDPOINT, 200, job(status="TIMED_OUT"), Fault.ERROR_BODY, id="1.1 timed out"),
        pytest.param(
            ENDPOINT,
            200,
            job(status="COMPLETED", output=[{"error": WORKER_ERROR}]),
            Fault.ERROR_BODY,
            id="1.5 worker-vllm's error",
        ),
        pytest.param(
            ENDPOINT,
            200,
            job(status="COMPLETED", output={"error": "x"}),
            Fault.ERROR_BODY,
            id="1.5 error in a plain output",
        ),
        pytest.param(
            ENDPOINT,
            200,
            job(status="COMPLETED", output=[{"token": "a"}]),
            None,
            id="1.5 completed",
        ),
        pytest.param(ENDPOINT, 200, job(status="COMPLETED", output="a"), None, id="1.1 text"),
        pytest.param(ENDPOINT, 200, job(status="IN_QUEUE"), None, id="1.1 queued"),
        pytest.param(ENDPOINT, 200, job(status="CANCELLED"), None, id="1.1 a cancel that worked"),
        pytest.param(ENDPOINT, 200, b'{"status":"FAILED"}', None, id="an app's own status"),
        pytest.param(ENDPOINT, 200, b'[{"status":"FAILED"}]', None, id="a list"),
        pytest.param(
            ENDPOINT,
            200,
            job(status="ok", inner={"status": "FAILED"}),
            None,
            id="a status further in",
        ),
        pytest.param(
            ENDPOINT, 200, job(status="FAILED")[:-1], None, id="the beginning of something longer"
        ),
        pytest.param(ENDPOINT, 200, SAYS_FAILED, None, id="a text about it"),
        pytest.param(BALANCER, 400, b"no workers available", Fault.BUSY, id="1.3 no worker"),
        pytest.param(BALANCER, 400, b'{"error":"bad request"}', None, id="1.3 the app's own 400"),
        pytest.param(BALANCER, 429, b"", Fault.BUSY, id="1.1 over the limit"),
        pytest.param(BALANCER, 502, b"", Fault.STATUS, id="1.3 wrong port"),
        pytest.param(BALANCER, 524, b"<html>", Fault.TIMEOUT, id="1.3 too long"),
        pytest.param(ENDPOINT, 401, b"", Fault.UNAUTHORIZED, id="1.1 our key"),
        pytest.param(replace(ENDPOINT, api_key=""), 401, b"", None, id="1.1 the client's key"),
        pytest.param(
            BALANCER,
            503,
            b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
            Fault.LOADING,
            id="4.2 llama.cpp in the worker",
        ),
    ],
)
def test_judge_when_runpod_answers_sees_through_its_200(
    backend: Backend, status: int, body: bytes, fault: Fault | None
) -> None:
    """Guards against a failed job that is taken for an answer."""
    assert PROVIDER.judge(backend, status, (), body) is fault


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(
            {"id": "sync-1", "status": "COMPLETED", "output": "Hi", "executionTime": 3391},
            Reading("Hi"),
            id="1.1 text",
        ),
        pytest.param(
            {"status": "COMPLETED", "output": [{"token": "a"}, {"token": " b"}]},
            Reading("a b"),
            id="1.5 tokens of a generator",
        ),
        pytest.param(
            {
                "status": "COMPLETED",
                "output": [
                    {"choices": [{"tokens": ["a", " b"]}], "usage": {"input": 3, "output": 2}},
                    {"choices": [{"tokens": [" c"]}], "usage": {"input": 3, "output": 3}},
                ],
            },
            Reading("a b c", usage=Usage(3, 3)),
            id="1.2 batches of worker-vllm",
        ),
        pytest.param(
            {"status": "FAILED", "error": CRASH}, Reading(error="boom"), id="1.5 crash, unwrapped"
        ),
        pytest.param(
            {"status": "COMPLETED", "output": [{"error": WORKER_ERROR}]},
            Reading(error="vLLM returned HTTP 400: …"),
            id="1.5 error inside",
        ),
        pytest.param({"status": "CANCELLED"}, Reading(error="CANCELLED"), id="1.1 cancelled"),
        pytest.param(
            {"id": "x", "status": "IN_QUEUE"},
            Reading(error="the job is still IN_QUEUE"),
            id="1.1 queued",
        ),
        pytest.param(
            {"status": "IN_PROGRESS", "output": "so far"}, Reading("so far"), id="1.1 partial"
        ),
        pytest.param(
            {"status": "IN_PROGRESS", "error": "lost"}, Reading(error="lost"), id="1.1 lost"
        ),
    ],
)
def test_read_when_document_is_a_job_finds_what_came_of_it(
    document: dict[str, Any], expected: Reading
) -> None:
    """Guards against IN_QUEUE taken for success, with an empty text and a price."""
    assert replace(PROVIDER.read(ENDPOINT, document), extra={}) == expected


# What a check finds

HEALTH = "https://api.runpod.ai/v2/ep1/health"


class Sent:
    """What aiohttp 3.14 asks of the request behind an answer."""

    output_size = 0


class Answered(aiohttp.ClientResponse):
    """An answer that aioresponses 0.7.9 can make: it does not know aiohttp 3.14's `stream_writer`.

    https://github.com/pnuckowski/aioresponses/issues/289
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"stream_writer": Sent()} | kwargs))


class Control(aioresponses):
    """RunPod's control plane."""

    def plays(self, url: str = HEALTH, **answer: Any) -> None:
        self.get(url, response_class=Answered, **answer)


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    with control:
        yield control


async def check(backend: Backend, provider: RunPod = RUNPOD) -> Check | None:
    async with aiohttp.ClientSession() as session:
        return await provider.check(backend, session)


def asked(control: Control) -> list[tuple[str, str, Any]]:
    return [
        (method, str(url), call.kwargs["headers"])
        for (method, url), calls in control.requests.items()
        for call in calls
    ]


def workers(jobs: dict[str, int] | None = None, **counts: int) -> dict[str, Any]:
    states = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
    usual = {"completed": 50, "failed": 8, "inProgress": 0, "inQueue": 0, "retried": 0}
    return {
        "jobs": {**usual, **(jobs or {})},
        "workers": dict.fromkeys(states, 0) | counts,
    }


WARM, COLD, WARMING = Warmth.WARM, Warmth.COLD, Warmth.WARMING
ALL = Capacity(running=0, idle=0, starting=0, throttled=0, unhealthy=0, queued=0)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        pytest.param(
            workers(idle=2, initializing=1, ready=2, running=1, throttled=1),
            Check(
                Verdict.GOOD,
                detail="workers: 1 running, 2 ready, 2 idle, 1 initializing, 1 throttled",
                warmth=WARM,
                capacity=replace(ALL, running=1, idle=2, starting=1, throttled=1),
            ),
            id="1.1 as logged",
        ),
        pytest.param(
            {"jobs": {}, "workers": {"idle": 1, "running": 0}},
            Check(
                Verdict.GOOD,
                detail="workers: 1 idle",
                warmth=COLD,
                capacity=Capacity(running=0, idle=1),
            ),
            id="1.1 as documented: idle is scaled down",
        ),
        pytest.param(
            workers(idle=1, initializing=1),
            Check(
                Verdict.GOOD,
                detail="workers: 1 idle, 1 initializing",
                warmth=WARMING,
                capacity=replace(ALL, idle=1, starting=1),
            ),
            id="1.1 starting beside another",
        ),
        pytest.param(
            workers(initializing=1),
            Check(
                Verdict.BUSY,
                fault=Fault.LOADING,
                detail="workers: 1 initializing",
                warmth=WARMING,
                capacity=replace(ALL, starting=1),
            ),
            id="1.1 starting",
        ),
        pytest.param(
            workers(throttled=3, unhealthy=1),
            Check(
                Verdict.BUSY,
                fault=Fault.BUSY,
                detail="workers: 3 throttled, 1 unhealthy",
                warmth=COLD,
                capacity=replace(ALL, throttled=3, unhealthy=1),
            ),
            id="1.1 no free GPU",
        ),
        pytest.param(
            workers(unhealthy=2),
            Check(
                Verdict.STRIKE,
                fault=Fault.STATUS,
                detail="workers: 2 unhealthy",
                warmth=COLD,
                capacity=replace(ALL, unhealthy=2),
            ),
            id="1.1 all crashed",
        ),
        pytest.param(
            workers({"inQueue": 4}, idle=1, unhealthy=2),
            Check(
                Verdict.GOOD,
                detail="workers: 1 idle, 2 unhealthy",
                warmth=COLD,
                capacity=replace(ALL, idle=1, unhealthy=2, queued=4),
            ),
            id="1.1 another stands by",
        ),
        pytest.param(
            workers({"inQueue": 4}, unhealthy=2),
            Check(
                Verdict.STRIKE,
                fault=Fault.STATUS,
                detail="workers: 2 unhealthy; 4 queued, and those that start crash",
                warmth=COLD,
                capacity=replace(ALL, unhealthy=2, queued=4),
            ),
            id="1.1 crash loop: requests wait while workers crash",
        ),
        pytest.param(
            workers({"inQueue": 4}, running=1, unhealthy=2),
            Check(
                Verdict.GOOD,
                detail="workers: 1 running, 2 unhealthy",
                warmth=WARM,
                capacity=replace(ALL, running=1, unhealthy=2, queued=4),
            ),
            id="1.1 one of three works",
        ),
        pytest.param(
            workers(),
            Check(
                Verdict.STRIKE,
                fault=Fault.BUSY,
                detail="no worker, and none on its way: RunPod sets max workers to 2 after 3 days"
                " without a request and to 0 after 7, and then jobs wait for ever; raise max"
                " workers in the endpoint's settings",
                warmth=COLD,
                capacity=ALL,
            ),
            id="1.1 cut to 0 workers",
        ),
        pytest.param(
            {"status": "ok"},
            Check(Verdict.NEUTRAL, fault=Fault.NOT_JSON, detail="tells no workers"),
            id="no counters",
        ),
        pytest.param(
            [],
            Check(Verdict.NEUTRAL, fault=Fault.NOT_JSON, detail="tells no workers"),
            id="no object",
        ),
    ],
)
async def test_check_when_health_counts_workers_reads_them(
    control: Control, payload: Any, expected: Check
) -> None:
    control.plays(payload=payload)
    assert await check(ENDPOINT) == expected
    assert asked(control) == [("GET", HEALTH, {"Authorization": "Bearer rpa_1"})]


@pytest.mark.parametrize(
    ("status", "key", "verdict", "fault"),
    [
        pytest.param(404, "k", Verdict.STRIKE, Fault.GONE, id="1.1 no such endpoint"),
        pytest.param(401, "k", Verdict.STRIKE, Fault.UNAUTHORIZED, id="1.1 our key"),
        pytest.param(401, "", Verdict.NEUTRAL, Fault.STATUS, id="1.1 no key to ask with"),
        pytest.param(403, "k", Verdict.NEUTRAL, Fault.STATUS, id="a key that may only infer"),
        pytest.param(429, "k", Verdict.NEUTRAL, Fault.STATUS, id="1.1 asked too often"),
        pytest.param(302, "k", Verdict.NEUTRAL, Fault.STATUS, id="a redirect"),
    ],
)
async def test_check_when_control_plane_refuses_blames_the_backend_only_for_its_own(
    control: Control, status: int, key: str, verdict: Verdict, fault: Fault
) -> None:
    control.plays(status=status, headers={"Location": "https://elsewhere.example/"})
    found = await check(replace(ENDPOINT, api_key=key))
    assert found is not None
    assert (found.verdict, found.fault) == (verdict, fault)
    assert len(asked(control)) == 1


RUNNING = Check(
    Verdict.GOOD,
    detail="workers: 1 running",
    warmth=WARM,
    capacity=replace(ALL, running=1),
)


async def test_check_when_the_connection_breaks_asks_once_more(control: Control) -> None:
    control.plays(exception=aiohttp.ServerDisconnectedError())
    control.plays(payload=workers(running=1))
    assert (await check(ENDPOINT)) == RUNNING


async def test_check_when_control_plane_is_down_tells_nothing_of_the_workers(
    control: Control,
) -> None:
    control.plays(status=500, repeat=True)
    found = await check(ENDPOINT)
    assert found == Check(Verdict.NEUTRAL, fault=Fault.STATUS, detail="the control plane says 500")
    assert len(control.requests["GET", URL(HEALTH)]) == 1, "an answer is one"


async def test_check_when_connection_breaks_twice_raises_for_the_caller_to_translate(
    control: Control,
) -> None:
    control.plays(exception=aiohttp.ServerDisconnectedError(), repeat=True)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await check(ENDPOINT)
    assert len(asked(control)) == 2


@pytest.mark.parametrize(
    ("backend", "url"),
    [
        pytest.param(replace(ENDPOINT, base_path="/v2/ep1/openai/v1"), HEALTH, id="1.2 openai"),
        pytest.param(BALANCER, HEALTH, id="1.3 load balancer"),
        pytest.param(
            replace(LOCAL, base_path="/v2/ep1"), "http://127.0.0.1:1/v2/ep1/health", id="local"
        ),
        pytest.param(
            replace(LOCAL, kind="queue"), "http://127.0.0.1:1/health", id="a queue of one's own"
        ),
        pytest.param(
            replace(LOCAL, control_url="https://api.runpod.ai/v2/ep1"), HEALTH, id="control_url"
        ),
        pytest.param(LOCAL, None, id="a stand-in without a control plane"),
        pytest.param(replace(LOCAL, base_path="/v2/ep1", kind="load_balancing"), None, id="an app"),
        pytest.param(replace(LOCAL, kind="openai"), None, id="openai without an endpoint"),
    ],
)
async def test_check_when_url_is_of_any_kind_asks_the_control_plane_alone(
    control: Control, backend: Backend, url: str | None
) -> None:
    """1.3: a request to the endpoint itself would start a worker."""
    if url is None:
        assert await check(backend) is None
        assert asked(control) == []
        return
    control.plays(url, payload=workers(running=1))
    assert await check(backend) == RUNNING
    assert [question[:2] for question in asked(control)] == [("GET", url)]
