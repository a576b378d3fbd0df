"""modal: the words of its edge, by the table of what was seen (the number in a test's id).

Nothing here is a recording of Modal itself: there is no emulator of its edge, so codes and bodies
are those of its documentation and of reports.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from email.utils import formatdate
from hashlib import blake2b

import pytest

from beacon_proxy.contracts import (
    Backend,
    Dialect,
    Exchange,
    Fault,
    Finding,
    Headers,
    Hop,
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
DIRECT = replace(BACKEND, host="ws--app-serve.us-east.modal.direct")
OWN_DOMAIN = replace(BACKEND, host="llm.modal.run.example.org")


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


def fault_of(found: Fault | Finding | None) -> Fault | None:
    return found.fault if isinstance(found, Finding) else found


STOPPED = b"modal-http: app for invoked web endpoint is stopped"
NO_FUNCTION = b"modal-http: invalid function call"
DISABLED = b"modal-http: workspace ac-x1 is disabled"
NO_CREDENTIALS = b"modal-http: missing credentials for proxy authorization"
SPENT = b"modal-http: Webhook failed: workspace billing cycle spend limit reached"
BAD_REDIRECT = b"modal-http: bad redirect method"
KILLED = b"modal-http: internal error: function was terminated by signal"
LOST = b"modal-http: internal error: status InternalFailure: Server has lost track of input"
NO_PORT = (
    b"modal-http: internal server error: status Failure: TimeoutError('Waited too long for port"
)
EXPIRED = b"Missing request, possibly due to expiry or cancellation"
VLLM_BUSY = b'{"error":{"message":"The engine is currently busy and cannot accept new requests."}}'
RESULT = (b"Location", b"https://ws--app-serve.modal.run/?__modal_function_call_id=fc-1")


@pytest.mark.parametrize(
    ("backend", "status", "body", "fault"),
    [
        pytest.param(BACKEND, 404, STOPPED, Fault.GONE, id="2.4 stopped"),
        pytest.param(BACKEND, 404, NO_FUNCTION, Fault.GONE, id="2.4 wrong url"),
        pytest.param(BACKEND, 404, DISABLED, Fault.GONE, id="2.4 disabled"),
        pytest.param(BACKEND, 404, b"modal-http: new words", Fault.GONE, id="2.4 unheard of"),
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
        pytest.param(BACKEND, 500, NO_PORT, Fault.STATUS, id="2.4 no port"),
        pytest.param(BACKEND, 500, b"modal-http: oh", Fault.STATUS, id="2.4 another 500"),
        pytest.param(BACKEND, 500, b"boom", None, id="2.4 the app's own 500"),
        pytest.param(DIRECT, 503, b"", Fault.LOADING, id="2.1 warming, a host of Servers"),
        pytest.param(DIRECT, 503, b'{"detail":"no"}', Fault.LOADING, id="2.1 whatever it says"),
        pytest.param(BACKEND, 503, b"", None, id="2.1 kind auto, a host of functions"),
        pytest.param(OWN_DOMAIN, 503, b"", None, id="2.1 kind auto, a domain of one's own"),
        pytest.param(SERVER, 503, b"", Fault.LOADING, id="2.4 warming, kind server"),
        pytest.param(FUNCTION, 503, b"", None, id="2.1 a function never warms by 503"),
        pytest.param(BACKEND, 503, b'{"detail":"no"}', None, id="2.4 the app's own, kind auto"),
        pytest.param(SERVER, 503, b'{"detail":"no"}', Fault.LOADING, id="2.4 kind server"),
        pytest.param(FUNCTION, 503, b"Loading model", Fault.LOADING, id="4.2 llama.cpp loads"),
        pytest.param(SERVER, 503, VLLM_BUSY, Fault.BUSY, id="4.3 vLLM behind a server"),
        pytest.param(BACKEND, 200, STOPPED, None, id="good"),
    ],
)
def test_judge_when_edge_or_app_answers_tells_them_apart(
    backend: Backend, status: int, body: bytes, fault: Fault | None
) -> None:
    if status == 200:
        body = json.dumps({"choices": [{"message": {"content": body.decode()}}]}).encode()
    assert fault_of(PROVIDER.judge(backend, status, (), body)) is fault


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
    assert fault_of(PROVIDER.judge(BACKEND, 303, headers, b"")) is fault


def test_judge_when_the_spend_limit_is_reached_rests_until_the_next_midnight() -> None:
    """2.4: health cuts the rest to its own bound, a client is told the whole."""
    at_six = Modal(unix=lambda: 1_800_057_600.0 + 6 * 3600)
    found = at_six.judge(BACKEND, 429, (), SPENT)
    assert isinstance(found, Finding)
    assert (found.fault, found.retry_after) == (Fault.BUSY, 18 * 3600)
    assert fault_of(at_six.judge(BACKEND, 429, (), b"slow down")) is Fault.BUSY


def location(value: bytes) -> Headers:
    return ((b"Content-Type", b"text/plain"), (b"location", value))


AT = b"/v1/chat/completions"
PENDING = AT + b"?__modal_function_call_id=fc-1"


@pytest.mark.parametrize(
    ("value", "target"),
    [
        pytest.param(b"https://ws--app-serve.modal.run" + PENDING, PENDING, id="2.3 whole"),
        pytest.param(b"HTTPS://WS--app-serve.MODAL.run:443" + PENDING, PENDING, id="same origin"),
        pytest.param(b"//ws--app-serve.modal.run" + PENDING, PENDING, id="without scheme"),
        pytest.param(PENDING, PENDING, id="path alone"),
        pytest.param(
            b"https://ws--app-serve.modal.run/a%2Fb?x=%20&y&" + PENDING[21:],
            b"/a%2Fb?x=%20&y&" + PENDING[21:],
            id="bytes kept",
        ),
        pytest.param(
            b"https://ws--app-serve.modal.run?__modal_function_call_id=fc-1#f",
            b"/?__modal_function_call_id=fc-1",
            id="no path, a fragment",
        ),
        pytest.param(b"http://ws--app-serve.modal.run" + PENDING, None, id="without TLS"),
        pytest.param(b"https://ws--app-serve.modal.run:444" + PENDING, None, id="another port"),
        pytest.param(b"https://evil.example" + PENDING, None, id="another host"),
        pytest.param(b"//evil.example" + PENDING, None, id="another host, without scheme"),
        pytest.param(b"https://ws--app-serve.modal.run.evil.example" + PENDING, None, id="longer"),
        pytest.param(b"https://x@ws--app-serve.modal.run" + PENDING, None, id="with a user"),
        pytest.param(b"https://ws--app-serve.modal.run\\@evil.example" + PENDING, None, id="trick"),
        pytest.param(b"https://[" + PENDING, None, id="broken"),
        pytest.param(b"https://ws--app-serve.modal.run:x" + PENDING, None, id="broken port"),
        pytest.param(b"javascript:" + PENDING, None, id="another scheme"),
        pytest.param(b"x" + PENDING, None, id="relative"),
        pytest.param(b"/a b" + PENDING, None, id="a space"),
        pytest.param("/ä".encode() + PENDING, None, id="not ASCII"),
        pytest.param(b"/?call=fc-1", None, id="no result"),
        pytest.param(b"/__modal_function_call_id=fc-1", None, id="in the path"),
        pytest.param(b"", None, id="empty"),
    ],
)
def test_hop_when_303_names_a_place_goes_there_on_this_origin_alone(
    value: bytes, target: bytes | None
) -> None:
    """Another host would get the request's fields, Modal-Key and Modal-Secret among them."""
    hop = Modal().hop(BACKEND, 303, location(value), b"", AT, 0)
    assert hop == (None if target is None else Hop(target))


def test_hop_when_303s_follow_each_other_rests_between_them() -> None:
    provider = Modal(rng=random.Random(1))
    waits = []
    for hops in range(20):
        hop = provider.hop(BACKEND, 303, location(PENDING), b"", PENDING, hops)
        assert hop is not None
        waits.append(hop.delay)
    assert waits[:4] == [0.0] * 4
    assert all(0.25 <= wait <= 5.0 for wait in waits[4:])


def test_hop_when_a_result_is_expired_asks_for_it_again_some_times_only() -> None:
    provider = Modal()
    hops = [provider.hop(BACKEND, 408, (), EXPIRED, PENDING, n) for n in range(7)]
    assert [hop and hop.target for hop in hops] == [PENDING] * 5 + [None] * 2
    assert provider.hop(BACKEND, 408, (), EXPIRED, AT, 0) is None, "that would be a second POST"


@pytest.mark.parametrize(
    ("backend", "status", "body", "target"),
    [
        pytest.param(FUNCTION, 503, b"", AT, id="a function never warms by 503"),
        pytest.param(BACKEND, 503, b"upstream failed", AT, id="nor does a host of functions"),
        pytest.param(OWN_DOMAIN, 503, b"", AT, id="nor what is not known to be a Server"),
        pytest.param(SERVER, 503, VLLM_BUSY, AT, id="busy is not starting"),
        pytest.param(SERVER, 503, b"", PENDING, id="a 503 that is a result"),
        pytest.param(BACKEND, 400, BAD_REDIRECT, PENDING, id="bad redirect"),
        pytest.param(BACKEND, 404, STOPPED, PENDING, id="stopped"),
        pytest.param(BACKEND, 500, LOST, PENDING, id="lost"),
        pytest.param(BACKEND, 302, b"", AT, id="the app's own redirect"),
    ],
)
def test_hop_when_an_answer_is_one_asks_nothing_more(
    backend: Backend, status: int, body: bytes, target: bytes
) -> None:
    assert Modal().hop(backend, status, (), body, target, 0) is None


@pytest.mark.parametrize("host", [DIRECT.host, "WS--A-F.EU-WEST.MODAL.DIRECT"])
def test_hop_when_the_host_is_one_of_servers_asks_again_by_that_alone(host: str) -> None:
    hop = Modal().hop(replace(DIRECT, host=host), 503, (), b"no container", AT, 0)
    assert hop is not None
    assert hop.target is None


def test_hop_when_a_server_keeps_starting_waits_longer_up_to_a_bound() -> None:
    provider = Modal(rng=random.Random(1))
    waits = []
    for hops in range(30):
        hop = provider.hop(SERVER, 503, (), b"", AT, hops)
        assert hop is not None
        assert hop.target is None
        waits.append(hop.delay)
    assert 0.25 <= waits[0] <= 0.5
    assert all(2.5 <= wait <= 5.0 for wait in waits[4:])
    assert len(set(waits)) == len(waits)  # jittered


@pytest.mark.parametrize(
    ("value", "least"),
    [
        pytest.param(b"7", 7.0, id="seconds"),
        pytest.param(formatdate(1_000_030.0, usegmt=True).encode(), 30.0, id="a date"),
        pytest.param(b"0", 0.25, id="less than the backoff"),
        pytest.param(b"soon", 0.25, id="neither"),
        pytest.param(formatdate(1.0, usegmt=True).encode(), 0.25, id="a date gone by"),
        pytest.param(b"Mon Jan 12 13:47:10 1970", 30.0, id="a date without its zone"),
        pytest.param(b"\xb2", 0.25, id="a superscript"),
        pytest.param(b"-5", 0.25, id="less than nothing"),
        pytest.param(b"9" * 400, 86_400.0, id="a number without end"),
        pytest.param(b"Mon, 01 Jan 0001 00:00:00 -0000", 86_400.0, id="the year 1, or 2001"),
        pytest.param(b"Mon, 01 Jan 2030 00:00:00 +99999999999999", 0.25, id="no zone of ours"),
    ],
)
def test_hop_when_a_server_says_retry_after_waits_no_less(value: bytes, least: float) -> None:
    provider = Modal(unix=lambda: 1_000_000.0)
    hop = provider.hop(SERVER, 503, ((b"retry-after", value),), b"", AT, 0)
    assert hop is not None
    assert least <= hop.delay <= max(least, 0.5)


def exchange(session: str | None, headers: Headers = ()) -> Exchange:
    return Exchange(
        id="1",
        method="POST",
        target=AT,
        path=AT.decode(),
        headers=headers,
        started=0.0,
        session=session,
    )


def test_fields_when_the_client_names_a_session_names_it_by_a_hash() -> None:
    provider = Modal()
    ((name, value),) = provider.fields(SERVER, exchange("ann@example.org"))
    assert name == b"Modal-Session-ID"
    assert len(value) == 32
    assert b"ann" not in value
    assert provider.fields(SERVER, exchange("ann@example.org")) == ((name, value),)
    assert provider.fields(DIRECT, exchange("ann@example.org")) == ((name, value),)
    assert provider.fields(OWN_DOMAIN, exchange("ann@example.org")) == ((name, value),)
    assert provider.fields(BACKEND, exchange("ann@example.org")) == ()
    assert provider.fields(SERVER, exchange("bob@example.org")) != ((name, value),)
    assert provider.fields(SERVER, exchange("\udcff")) != ((name, value),)
    # Who does not know the key cannot try out addresses.
    assert provider.fields(replace(SERVER, api_key="wk-1:ws-2"), exchange("ann@example.org")) != (
        (name, value),
    )


def test_fields_when_there_is_no_key_are_hashed_by_none_that_is_known() -> None:
    """An empty key was hashed, too: whoever read this file could try out addresses."""
    ((_, value),) = Modal().fields(SERVER, exchange("ann@example.org"))
    empty = blake2b(b"").digest()
    known = blake2b(b"ann@example.org", key=empty, digest_size=16, person=b"modal-session")
    assert value != known.hexdigest().encode()


@pytest.mark.parametrize(
    "query",
    [
        b"__modal_function_call_id=fc-1",
        b"a=b&__modal_function_call_id=fc-1",
        b"a=b;__modal_function_call_id=fc-1",
        b"%5F_modal%5ffunction_call_%69d=fc-1",
        b"__MODAL_function_call_id=fc-1",
        b"__modal_function_call_id",
    ],
)
def test_takes_when_the_client_names_a_result_only_where_no_token_of_ours_opens_it(
    query: bytes,
) -> None:
    asked = replace(exchange(None), target=AT + b"?" + query)
    assert Modal().takes(BACKEND, asked)
    assert not Modal().takes(KEYED, asked)
    assert Modal().takes(KEYED, replace(asked, target=AT))
    assert Modal().takes(KEYED, replace(asked, target=AT + b"?call_id=fc-1"))


def test_fields_when_the_client_speaks_to_modal_itself_keeps_its_own() -> None:
    own = ((b"modal-session-id", b"chat 7"),)
    assert Modal().fields(SERVER, exchange("chat 7", (*own, (b"X-A", b"1")))) == own


def test_fields_when_there_is_no_session_or_no_server_adds_nothing() -> None:
    assert Modal().fields(SERVER, exchange(None)) == ()
    assert Modal().fields(FUNCTION, exchange("s")) == ()


def test_problem_when_control_url_names_no_function_says_how_one_is_named() -> None:
    for url in (
        "modal://app",
        "modal://app/",
        "modal://app/f/g",
        "modal://a b/f",
        "modal://a/f?x=1",
    ):
        problem = PROVIDER.problem(replace(BACKEND, control_url=url))
        assert problem is not None
        assert problem.startswith("control_url: must be modal://APP/FUNCTION"), url
    for url in ("", "modal://my-app/serve", "modal://app/Cls.serve?environment=main"):
        assert PROVIDER.problem(replace(BACKEND, control_url=url)) is None, url
    assert not Modal().wakes(replace(BACKEND, control_url="modal://my-app/serve"))


def test_problem_when_the_package_is_missing_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "modal", None)
    problem = PROVIDER.problem(replace(BACKEND, control_url="modal://app/serve"))
    assert problem == "control_url: needs the package modal: pip install 'beacon-proxy[modal]'"


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
