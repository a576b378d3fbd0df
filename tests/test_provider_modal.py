"""modal: the words of its edge, by the table of what was seen (the number in a test's id).

Nothing here is a recording of Modal itself: there is no emulator of its edge, so codes and bodies
are those of its documentation and of reports.
"""

from __future__ import annotations

import json
from dataclasses import replace

import aiohttp
import pytest
from aioresponses import aioresponses

from beacon_proxy.contracts import (
    Backend,
    Dialect,
    Fault,
    Headers,
    Prompt,
    Provider,
    Reading,
    Usage,
)
from beacon_proxy.errors import ConfigError
from providers.modal import Modal

PROVIDER: Provider = Modal()
BACKEND = Backend(
    name="m",
    provider="modal",
    url="https://ws--app-serve.modal.run",
    scheme="https",
    host="ws--app-serve.modal.run",
    port=443,
)
KEYED = replace(BACKEND, api_key="k")
FUNCTION, SERVER = replace(BACKEND, kind="function"), replace(BACKEND, kind="server")


def test_provider_when_it_stands_alone_has_the_defaults_of_its_family() -> None:
    assert PROVIDER.name == "modal"
    assert (PROVIDER.pool, PROVIDER.price_per_second) == ("burst", 0.0003)
    assert PROVIDER.kinds == ("auto", "function", "server")
    assert PROVIDER.environment == ("MODAL_API_BASE", "MODAL_API_TOKEN")


def test_environment_when_base_and_token_are_set_makes_a_keyed_row() -> None:
    env = {"MODAL_API_BASE": " https://a.modal.run/ ", "MODAL_API_TOKEN": "wk-1:ws-2\n"}
    assert PROVIDER.from_environment(env, "ams") == [
        {
            "name": "modal-eu-west",
            "provider": "modal",
            "url": "https://a.modal.run/",
            "region": "eu-west",
            "api_key": "wk-1:ws-2",
        }
    ]


def test_environment_when_only_base_is_set_makes_a_row_without_key() -> None:
    (row,) = PROVIDER.from_environment({"MODAL_API_BASE": "https://a.modal.run"}, "us-east")
    assert row["name"] == "modal-us-east"
    assert "api_key" not in row


@pytest.mark.parametrize(
    ("base", "place"),
    [
        ("https://a.modal.run|EU", "eu-west"),
        (" https://a.modal.run | mars_2\n", "mars-2"),
        ("https://a.modal.run|", "us-east"),
    ],
)
def test_environment_when_base_says_its_region_believes_it(base: str, place: str) -> None:
    """A router in three regions before one app: each called it near, and named it differently."""
    (row,) = PROVIDER.from_environment({"MODAL_API_BASE": base}, "us-east")
    assert (row["name"], row["region"]) == (f"modal-{place}", place)
    assert row["url"] == "https://a.modal.run"


@pytest.mark.parametrize("base", ["", "  ", "|eu"])
def test_environment_when_base_is_not_set_waits_for_it(base: str) -> None:
    """Secrets arrive one by one: a token alone must not stop the start."""
    assert PROVIDER.from_environment({"MODAL_API_BASE": base, "MODAL_API_TOKEN": "k"}, "") == []


def test_environment_when_base_is_bad_names_the_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        PROVIDER.from_environment({"MODAL_API_BASE": "a.modal.run"}, "us-east")
    (problem,) = caught.value.problems
    assert problem.startswith("MODAL_API_BASE: must be http://")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param("", (), id="none"),
        pytest.param(
            "wk-a:ws-b",
            (
                (b"Modal-Key", b"wk-a"),
                (b"Modal-Secret", b"ws-b"),
                (b"Authorization", b""),
                (b"X-Api-Key", b""),
            ),
            id="2.2 proxy token",
        ),
        pytest.param(
            "a:b", ((b"Authorization", b"Bearer a:b"), (b"X-Api-Key", b"")), id="another pair"
        ),
        pytest.param(
            "wk-a", ((b"Authorization", b"Bearer wk-a"), (b"X-Api-Key", b"")), id="half of one"
        ),
        pytest.param(
            "wk-a:ws", ((b"Authorization", b"Bearer wk-a:ws"), (b"X-Api-Key", b"")), id="not quite"
        ),
    ],
)
def test_credentials_when_key_is_a_proxy_token_go_into_headers_of_their_own(
    key: str, expected: Headers
) -> None:
    """An empty value takes the client's header away: its key must not reach the app."""
    assert PROVIDER.credentials(replace(BACKEND, api_key=key)) == expected


STOPPED = b"modal-http: app for invoked web endpoint is stopped"
NO_FUNCTION = b"modal-http: invalid function call"
DISABLED = b"modal-http: workspace ac-x1 is disabled"
NO_CREDENTIALS = b"modal-http: missing credentials for proxy authorization"
SPENT = b"modal-http: Webhook failed: workspace billing cycle spend limit reached"
BAD_REDIRECT = b"modal-http: bad redirect method"
KILLED = b"modal-http: internal error: function was terminated by signal"
LOST = b"modal-http: internal error: status InternalFailure: Server has lost track of input"
EXPIRED = b"Missing request, possibly due to expiry or cancellation"
VLLM_BUSY = b'{"error":{"message":"The engine is currently busy and cannot accept new requests."}}'
RESULT = (b"Location", b"https://ws--app-serve.modal.run/?__modal_function_call_id=fc-1")


@pytest.mark.parametrize(
    ("backend", "status", "body", "fault"),
    [
        pytest.param(BACKEND, 404, STOPPED, Fault.GONE, id="2.4 stopped"),
        pytest.param(BACKEND, 404, NO_FUNCTION, Fault.GONE, id="2.4 wrong url"),
        pytest.param(BACKEND, 404, DISABLED, Fault.GONE, id="2.4 disabled"),
        pytest.param(BACKEND, 404, b"\n" + STOPPED.upper(), Fault.GONE, id="2.4 other spelling"),
        pytest.param(BACKEND, 404, b'{"detail":"Not Found"}', None, id="2.4 the app's own 404"),
        pytest.param(BACKEND, 404, b"see modal-http: x", None, id="2.4 not at the beginning"),
        pytest.param(BACKEND, 401, NO_CREDENTIALS, Fault.UNAUTHORIZED, id="2.4 no credentials"),
        pytest.param(BACKEND, 401, b"Unauthorized", None, id="2.2 the client's key, at the app"),
        pytest.param(KEYED, 401, b"Unauthorized", Fault.UNAUTHORIZED, id="2.2 our key, at the app"),
        pytest.param(KEYED, 403, b"modal-http: no", Fault.UNAUTHORIZED, id="our key, at the edge"),
        pytest.param(BACKEND, 429, SPENT, Fault.BUSY, id="2.4 spend limit"),
        pytest.param(BACKEND, 429, b"", Fault.BUSY, id="2.5 any 429"),
        pytest.param(BACKEND, 400, BAD_REDIRECT, None, id="2.4 bad redirect method"),
        pytest.param(BACKEND, 408, EXPIRED, Fault.STATUS, id="2.4 input lost"),
        pytest.param(BACKEND, 408, b"slow client", None, id="2.4 the app's own 408"),
        pytest.param(BACKEND, 500, KILLED, Fault.STATUS, id="2.4 killed"),
        pytest.param(BACKEND, 500, LOST, Fault.STATUS, id="2.4 lost"),
        pytest.param(BACKEND, 500, b"boom", None, id="2.4 the app's own 500"),
        pytest.param(BACKEND, 503, b"", Fault.LOADING, id="2.4 warming, kind auto"),
        pytest.param(SERVER, 503, b"", Fault.LOADING, id="2.4 warming, kind server"),
        pytest.param(FUNCTION, 503, b"", None, id="2.1 a function never warms by 503"),
        pytest.param(SERVER, 503, VLLM_BUSY, Fault.BUSY, id="4.3 vLLM behind a server"),
        pytest.param(BACKEND, 200, STOPPED, None, id="good"),
    ],
)
def test_judge_when_edge_or_app_answers_tells_them_apart(
    backend: Backend, status: int, body: bytes, fault: Fault | None
) -> None:
    if status == 200:
        body = json.dumps({"choices": [{"message": {"content": body.decode()}}]}).encode()
    assert PROVIDER.judge(backend, status, (), body) is fault


@pytest.mark.parametrize(
    ("headers", "fault"),
    [
        pytest.param((RESULT,), Fault.STATUS, id="2.3 still running after 150 s"),
        pytest.param(((b"location", RESULT[1]),), Fault.STATUS, id="2.3 lower case"),
        pytest.param(((b"Location", b"/done"),), None, id="the app's own redirect"),
        pytest.param(((b"X-Was", RESULT[1]),), None, id="another header"),
        pytest.param((), None, id="no header"),
    ],
)
def test_judge_when_303_names_a_result_it_is_no_answer(
    headers: Headers, fault: Fault | None
) -> None:
    """Guards against the 303 at 150 s that was once relayed, and its result thrown away."""
    assert PROVIDER.judge(BACKEND, 303, headers, b"") is fault


async def test_check_when_asked_asks_nothing() -> None:
    """2.7: any request to the URL starts a container that costs a minute of GPU."""
    with aioresponses() as web:
        async with aiohttp.ClientSession() as session:
            assert await PROVIDER.check(KEYED, session) is None
        assert not web.requests


def test_ask_and_target_when_base_path_is_set_keep_it() -> None:
    backend = replace(BACKEND, base_path="/llm/v1")
    call = PROVIDER.ask(backend, Prompt("m", "Hi"))
    assert (call.target, call.dialect) == (b"/llm/v1/chat/completions", Dialect.OPENAI)
    assert json.loads(call.body)["messages"] == [{"role": "user", "content": "Hi"}]
    assert PROVIDER.target(backend, b"/v1/models?x") == b"/llm/v1/models?x"


def test_read_when_answer_is_a_chat_finds_text_and_counts() -> None:
    document = {
        "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    assert PROVIDER.read(BACKEND, document) == Reading("Hi", True, Usage(1, 2))
