"""Faults before the first content, with two good backends standing ready: no client notices.

Each fault sits in the backend that the ranker takes first. The client must get the whole answer of
a good one, exactly once; and where nobody stands ready, an explicit error or a visible break.
"""

from __future__ import annotations

import json
import socket
from contextlib import AsyncExitStack
from typing import Any

import pytest

from .kit import (
    APIS,
    CHAT,
    MESSAGES,
    OLLAMA_CHAT,
    RESPONSES,
    Answer,
    Api,
    BackendConn,
    Proxy,
    RawBackend,
    blackhole,
    chunk,
    closed_port,
    proxy,
)
from .kit_faults import (
    FIRST,
    HOW,
    STAGES,
    Ending,
    Fault,
    as_json,
    ask,
    good,
    judge,
    makes,
    pieces,
    says,
    sized,
    stops,
    whole,
)

CHAIN = [{"health": {"probe_interval": 300}}, "region", {"cost": {"default": "cost"}}]
CHAIN += ["capacity", "failover"]
FOUR = (CHAT, MESSAGES, OLLAMA_CHAT, RESPONSES)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
both_modes = pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])


def reframed(*lines: bytes, cut: bool = False) -> Any:
    """The good answer under other framing lines; `cut`: without the end of its body."""

    def make(api: Api, stream: bool) -> bytes:
        kind = api.head.split(b"Content-Type: ")[1].split(b"\r\n")[0]
        body = whole(api, stream)
        if cut:
            body = body[: -len(b"".join(api.end)) - 9] if stream else body[:-20]
        kinds = b"Content-Type: " + (kind if stream else b"application/json")
        sizes = [line.replace(b"SIZE", b"%d" % len(body)) for line in lines]
        return b"\r\n".join([b"HTTP/1.1 200 OK", kinds, *sizes]) + b"\r\n\r\n" + body

    return make


def spoiled(old: bytes, new: bytes) -> Any:
    """The good answer with one thing changed on the wire."""

    def make(api: Api, stream: bool) -> bytes:
        raw = b"".join(pieces(api, stream))
        assert old in raw
        return raw.replace(old, new, 1)

    return make


def bad_chunks(bad: bytes) -> Any:
    """A head that promises chunks, and then something else."""

    def make(api: Api, stream: bool) -> bytes:
        kind = b"application/json" if not stream else api.head.split(b"Type: ")[1].split(b"\r")[0]
        return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind + (
            b"Transfer-Encoding: chunked\r\n\r\n" + bad
        )

    return make


FRAMING = [
    says("garbage", b"\x00\xff\x13garbage\r\n\r\n", "malformed"),
    says("ssh banner", b"SSH-2.0-OpenSSH_9.2\r\n", "malformed"),
    says("tls alert", b"\x15\x03\x01\x00\x02\x02\x46", "malformed"),
    says("http/2 settings", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18), "malformed"),
    says("http/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "malformed"),
    says("redis", b"-ERR unknown command\r\n", "malformed"),
    makes("unknown version", spoiled(b"HTTP/1.1 ", b"HTTP/3.7 "), "malformed"),
    makes("status of two digits", spoiled(b"1.1 200", b"1.1 20"), "malformed"),
    makes("nul in the header", spoiled(b"\r\nContent-Type: ", b"\r\nX: \x00\r\nContent-Type: ")),
    makes("space before the colon", spoiled(b"Content-Type:", b"Content-Type :"), "malformed"),
    makes("folded header", spoiled(b"Content-Type: ", b"X: a\r\n b\r\nContent-Type: ")),
    makes("both framings", reframed(b"Content-Length: SIZE", b"Transfer-Encoding: chunked")),
    makes("two lengths", reframed(b"Content-Length: SIZE", b"Content-Length: 7"), "malformed"),
    makes("length list", reframed(b"Content-Length: SIZE, SIZE"), "malformed"),
    makes("negative length", reframed(b"Content-Length: -1"), "malformed"),
    makes("hex length", reframed(b"Content-Length: 0x10"), "malformed"),
    makes("huge length", reframed(b"Content-Length: 99999999999999999999"), "malformed"),
    makes("unknown coding", reframed(b"Transfer-Encoding: gzip, chunked"), "malformed"),
    makes("chunk size no number", bad_chunks(b"zz\r\n{}\r\n0\r\n\r\n"), "malformed"),
    makes("chunk size too large", bad_chunks(b"f" * 17 + b"\r\n"), "malformed"),
    makes("chunk longer than said", bad_chunks(b"2\r\n{}}}}}\r\n0\r\n\r\n"), "malformed"),
    makes("chunk shorter than said", bad_chunks(b"5\r\n{}\r\n0\r\n\r\n"), "malformed", "closed"),
    makes("no last chunk", bad_chunks(b"2\r\n{}\r\n"), "closed"),
    says("switch unasked", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "malformed"),
    says("switch unasked, named", b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"),
    says("interim only", b"HTTP/1.1 100 Continue\r\n\r\n", "closed"),
]
# Framing that is wrong in a way that only the body shows; a stream has said something by then.
LENGTHS = [
    makes("length too long", reframed(b"Content-Length: 99999"), "closed"),
    makes("length too short", reframed(b"Content-Length: 20"), "not_json", "empty"),
    makes("cut, ended by the close", reframed(cut=True), "not_json"),
    makes("cut, with its length", reframed(b"Content-Length: SIZE", cut=True), "not_json"),
]
BEHIND_200 = [
    makes("error", lambda api, stream: _error(api, stream), "error_body", "busy"),
    makes("error after quiet events", lambda api, stream: _error(api, stream, True)),
    makes("error document", lambda api, stream: as_json("200 OK", _error_document(api))),
    says("empty", HEAD + b"Content-Length: 0\r\n\r\n", "empty"),
    says("empty chunks", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "empty"),
    says("blanks", sized("200 OK", "application/json", b" \r\n\r\n"), "empty"),
    says(
        "captive portal", sized("200 OK", "text/html", b"<html>Log in, please</html>"), "not_json"
    ),
    says("portal without a type", b"HTTP/1.1 200 OK\r\n\r\n<html>Log in</html>", "not_json"),
    says("plain text", sized("200 OK", "text/plain", b"upstream connect error"), "not_json"),
]
QUIET_ENDS = [
    makes("clean end after quiet events", lambda api, stream: _quiet(api, b"0\r\n\r\n"), "empty"),
    makes("comments alone", lambda api, stream: _comments(api), "empty"),
    makes("quiet events and the end mark", lambda api, stream: _quiet(api, _done()), "empty"),
]
NGINX = b"<html><head><title>502 Bad Gateway</title></head></html>"
VLLM = {
    "error": {
        "message": "The engine is currently busy and cannot accept new requests. Please try again"
        " later or on a different instance.",
        "type": "Service Unavailable",
        "param": None,
        "code": 503,
    }
}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
NO_SLOT = {"error": {"code": 503, "message": "no slot available", "type": "unavailable_error"}}
OLLAMA = {"error": "server busy, please try again.  maximum pending requests exceeded"}
TGI = {"error": "Model is overloaded", "error_type": "overloaded"}
ANTHROPIC = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
STATUSES = [
    says("vllm busy", as_json("503 Service Unavailable", VLLM), "busy"),
    says("ollama busy", as_json("503 Service Unavailable", OLLAMA), "busy"),
    says("llama.cpp no slot", as_json("503 Service Unavailable", NO_SLOT), "busy"),
    says("llama.cpp loading", as_json("503 Service Unavailable", LOADING), "loading"),
    says("tgi overloaded", as_json("429 Too Many Requests", TGI), "busy"),
    says("rate limit", as_json("429 Too Many Requests", {"error": {}}, "Retry-After: 7"), "busy"),
    says("anthropic overloaded", as_json("529 Overloaded", ANTHROPIC), "busy"),
    says("500", as_json("500 Internal Server Error", {"detail": "CUDA error"}), "status"),
    says("502 of an nginx", sized("502 Bad Gateway", "text/html", NGINX), "status"),
    says("504", sized("504 Gateway Timeout", "text/plain", b"upstream timed out"), "status"),
    says("500 cut short", b"HTTP/1.1 500 E\r\nContent-Length: 99\r\n\r\n{", "closed"),
    says(
        "a key that is refused",
        as_json("401 Unauthorized", {"error": "Unauthorized"}),
        "unauthorized",
        row={"api_key": "a-key-of-our-own"},
    ),
]


def _error(api: Api, stream: bool, quiet: bool = False) -> bytes:
    if not stream:
        return as_json("200 OK", _error_document(api))
    said = b"".join(map(chunk, api.quiet)) if quiet else b""
    return api.head + said + chunk(api.error) + b"0\r\n\r\n"


def _error_document(api: Api) -> Any:
    if api is MESSAGES:
        return ANTHROPIC
    if api is OLLAMA_CHAT:
        return {"error": "llama runner process has terminated"}
    return {"error": {"message": "CUDA out of memory", "type": "server_error", "code": 500}}


def _quiet(api: Api, end: bytes) -> bytes:
    return api.head + b"".join(map(chunk, api.quiet)) + end


def _comments(api: Api) -> bytes:
    return api.head + chunk(b": ping\n\n") * 3 + b"0\r\n\r\n"


def _done() -> bytes:
    return chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def behind(
    stack: AsyncExitStack, api: Api, row: dict[str, Any], spares: int = 2
) -> tuple[Proxy, list[RawBackend]]:
    """A proxy before the backend of `row` and, less wanted, good ones."""
    ready = [await stack.enter_async_context(RawBackend(good(api))) for _ in range(spares)]
    rows = [{"url": one, "price_per_second": 0.0002 + n / 1e4} for n, one in enumerate(ready)]
    p = await stack.enter_async_context(proxy({**FIRST, **row}, *rows, middleware=CHAIN))
    return p, ready


async def check(api: Api, stream: bool, row: dict[str, Any], logged: tuple[str, ...]) -> None:
    """With good ones ready the answer is whole, and came once; the log tells of both attempts."""
    async with AsyncExitStack() as stack:
        p, ready = await behind(stack, api, row)
        ending, got = await ask(p.port, api, stream)
        assert ending is Ending.COMPLETE, (ending, got, p.log)
        assert [len(one.requests) for one in ready] == [1, 0]
        (told,) = await p.exchanges(1)
    assert told["end"] == "complete"
    first, second = told["attempts"]
    assert (first["backend"], second["backend"]) == ("b0", "b1")
    assert first["fault"] in (logged or ("malformed",)), told
    assert second["fault"] is None
    assert len(p.events("exchange.done")) == 1


async def check_fault(fault: Fault, api: Api, stream: bool) -> None:
    async with RawBackend(fault.script(api), eager=fault.eager) as faulty:
        await check(api, stream, {"url": faulty, **fault.row}, fault.logged)
        if not fault.eager:
            assert len(faulty.requests) == 1


def named(fault: Fault) -> str:
    return fault.name


# -- the judge itself


def seen(body: bytes, *, status: int = 200, complete: bool = True) -> Answer:
    return Answer(status, b"OK", [], body, complete=complete)


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_judge_tells_the_endings_apart(api: Api) -> None:
    events, document = whole(api, True), whole(api, False)
    begun = b"".join(api.quiet + api.content)
    assert judge(seen(events), api, True) is Ending.COMPLETE
    assert judge(seen(document), api, False) is Ending.COMPLETE
    assert judge(seen(begun), api, True) is Ending.SHORT
    assert judge(seen(b""), api, True) is judge(seen(b""), api, False) is Ending.SHORT
    assert judge(seen(document[:-3]), api, False) is Ending.SHORT
    assert judge(seen(events, complete=False), api, True) is Ending.BROKEN
    assert judge(seen(b"", status=0, complete=False), api, True) is Ending.BROKEN
    assert judge(seen(b"<html>", status=502), api, True) is Ending.ERROR
    assert judge(seen(begun + api.error), api, True) is Ending.ERROR
    assert judge(seen(begun + events), api, True) is Ending.DOUBLED
    assert judge(seen(begun + events, complete=False), api, True) is Ending.DOUBLED
    assert judge(seen(document * 2), api, False) is Ending.DOUBLED


async def test_judge_calls_silence_hung() -> None:
    async def script(conn: BackendConn) -> None:
        await conn.wait_closed()

    async with RawBackend(script) as silent:
        ending, _ = await ask(silent.port, CHAT, True, patience=0.1)
    assert ending is Ending.HUNG


# -- connections that never come about


@both_modes
async def test_fault_when_the_port_is_closed_the_next_answers(stream: bool) -> None:
    with closed_port() as port:
        await check(CHAT, stream, {"url": f"http://127.0.0.1:{port}"}, ("refused",))


@both_modes
async def test_fault_when_the_connect_is_never_answered_the_next_answers(stream: bool) -> None:
    async with blackhole() as port:
        row = {"url": f"http://127.0.0.1:{port}", "timeouts": {"connect": 0.3}}
        await check(CHAT, stream, row, ("timeout",))


async def test_fault_when_the_name_does_not_resolve_the_next_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: Any = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
        if host == "gone.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    await check(CHAT, True, {"url": "http://gone.test:1"}, ("dns",))


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["400", "silent"])
async def test_fault_when_tls_meets_a_plain_port_the_next_answers(said: bytes) -> None:
    async def script(conn: BackendConn) -> None:
        if said:
            await conn.send(said)
        else:
            await conn.wait_closed()

    async with RawBackend(script, eager=True) as plain:
        row = {"url": f"https://127.0.0.1:{plain.port}", "timeouts": {"connect": 0.3}}
        await check(CHAT, True, row, ("tls",) if said else ("timeout",))


# -- an end or a silence at every stage

_EARLY = [
    (stops(stage, how), api, stream)
    for stage in STAGES
    for how in HOW
    for stream in (True, False)
    for api in (APIS if how != "stall" and stage in ("quiet events", "first event") else FOUR[:1])
    if not (stops(stage, how).late and stream)
    and not (stage == "quiet events" and stream and not api.quiet)
]
_STALLED = [(stops("first event", "stall"), api, True) for api in FOUR[1:]]


@pytest.mark.parametrize(
    ("fault", "api", "stream"),
    [
        pytest.param(*case, id=f"{case[0].name}-{case[1].name}-{'sse' if case[2] else 'doc'}")
        for case in _EARLY + _STALLED
    ],
)
async def test_fault_when_the_backend_stops_before_content_the_next_answers(
    fault: Fault, api: Api, stream: bool
) -> None:
    await check_fault(fault, api, stream)


# -- framing that nobody can trust


@both_modes
@pytest.mark.parametrize("fault", FRAMING, ids=named)
async def test_fault_when_the_framing_is_wrong_the_next_answers(fault: Fault, stream: bool) -> None:
    await check_fault(fault, CHAT, stream)


@pytest.mark.parametrize("api", FOUR, ids=lambda api: api.name)
@pytest.mark.parametrize("fault", LENGTHS, ids=named)
async def test_fault_when_a_document_is_cut_the_next_answers(fault: Fault, api: Api) -> None:
    await check_fault(fault, api, False)


# -- what a status cannot tell


@both_modes
@pytest.mark.parametrize("api", FOUR, ids=lambda api: api.name)
@pytest.mark.parametrize("fault", BEHIND_200, ids=named)
async def test_fault_when_a_200_holds_no_answer_the_next_answers(
    fault: Fault, api: Api, stream: bool
) -> None:
    logged = fault.logged or ("error_body", "busy")
    await check_fault(Fault(fault.name, fault.play, logged), api, stream)


@pytest.mark.parametrize("fault", QUIET_ENDS, ids=named)
async def test_fault_when_a_stream_says_nothing_the_next_answers(fault: Fault) -> None:
    await check_fault(fault, CHAT, True)


@both_modes
@pytest.mark.parametrize("fault", STATUSES, ids=named)
async def test_fault_when_the_backend_is_overloaded_or_ill_the_next_answers(
    fault: Fault, stream: bool
) -> None:
    await check_fault(fault, CHAT, stream)


@pytest.mark.parametrize("api", FOUR[1:], ids=lambda api: api.name)
async def test_fault_when_busy_every_dialect_is_answered_by_the_next(api: Api) -> None:
    await check_fault(STATUSES[0], api, True)


# -- nobody else: the client is told

_LONE = [stops(stage, how) for stage in STAGES for how in HOW[:2]]
_LONE += [stops(stage, "stall") for stage in ("body read", "quiet events", "tokens")]
_LONE += [*FRAMING, *LENGTHS, *BEHIND_200, *QUIET_ENDS[:1], *STATUSES]


@both_modes
@pytest.mark.parametrize("fault", _LONE, ids=named)
async def test_fault_of_the_only_backend_is_told_to_the_client(fault: Fault, stream: bool) -> None:
    """Explicitly or by a visible break; never by silence, nor by what looks like an answer."""
    backend = RawBackend(fault.script(CHAT), eager=fault.eager)
    async with backend as faulty, AsyncExitStack() as stack:
        p, _ = await behind(stack, CHAT, {"url": faulty, **fault.row}, spares=0)
        ending, got = await ask(p.port, CHAT, stream)
        assert ending in (Ending.ERROR, Ending.BROKEN), (ending, got, p.log)
        (told,) = await p.exchanges(1)
    assert told["end"] == "error"
    if ending is Ending.ERROR and got.status >= 500 and not got.header("x-beacon-backend"):
        assert json.loads(got.body)["error"]["message"]
