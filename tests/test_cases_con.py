"""CON: reusing connections never mixes, repeats or loses requests, on either side of the proxy."""

from __future__ import annotations

import asyncio

import pytest

from .kit import (
    OK,
    BackendConn,
    RawBackend,
    RawClient,
    answer,
    chat,
    closed_port,
    each_request,
    eventually,
    header,
    json_bytes,
    proxy,
    request,
    through,
)

GET = request("GET", "/x")
POST = request("POST", "/x", body=b"pay 5 USD")
DOCUMENT = json_bytes({"choices": [{"message": {"role": "assistant", "content": "hello"}}]})


async def echo(conn: BackendConn) -> None:
    """Answer each request with its method, target and body."""
    async for received in each_request(conn):
        body = b"%b %b %b" % (received.method.encode(), received.target, received.body)
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


async def test_con_01_five_requests_on_one_client_connection():
    async with RawBackend(echo) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for number in range(5):
            got = await client.ask(request("POST", f"/{number}", body=b"%d" % number))
            assert (got.complete, got.body) == (True, b"POST /%d %d" % (number, number))
        assert len(backend.requests) == 5


async def test_con_02_upstream_connection_is_reused_between_clients():
    async with RawBackend(echo) as backend, proxy(backend) as p:
        for number in range(5):
            async with RawClient(p.port) as client:
                got = await client.ask(request("GET", f"/{number}"))
                assert got.body == b"GET /%d " % number
        assert (len(backend.requests), backend.connections) == (5, 1)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_con_03_pipelined_body_is_not_taken_for_the_second_request(chunked):
    async with RawBackend(echo) as backend, proxy(backend) as p, RawClient(p.port) as client:
        body = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
        await client.send(request("POST", "/1", body=body, chunked=chunked) + request("GET", "/2"))
        first, second = await client.response(), await client.response()
        assert (first.body, second.body) == (b"POST /1 " + body, b"GET /2 ")
        assert [r.target for r in backend.requests] == [b"/1", b"/2"]


async def test_con_04_ten_pipelined_requests_are_answered_in_order():
    async def script(conn: BackendConn) -> None:
        """The first are the slowest, so that answers in order of arrival would come reversed."""
        async for received in each_request(conn):
            await asyncio.sleep(0.02 - 0.002 * int(received.target[1:]))
            body = received.target
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(b"".join(request("GET", f"/{n}") for n in range(10)))
        bodies = [(await client.response()).body for _ in range(10)]
        assert bodies == [b"/%d" % n for n in range(10)]


async def test_con_05_http_10_without_keep_alive_closes_after_the_answer():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x", version="HTTP/1.0"))
        assert (got.status, got.body, got.complete) == (200, b"ok", True)
        assert not header(got.headers, "transfer-encoding")
        assert await client.closed()


async def test_con_05b_http_10_client_gets_a_chunked_answer_without_chunks():
    """RFC 9112 6.1: no Transfer-Encoding to a client that did not say HTTP/1.1."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    async with RawBackend(answer(raw)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x", version="HTTP/1.0"))
        assert (got.complete, got.body, got.framing) == (True, b"abcdef", "eof")
        assert not header(got.headers, "transfer-encoding")


async def test_con_06_http_10_with_keep_alive_is_consistent():
    """Kept or closed, the answer says which (RFC 9112 9.3)."""
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        data = request("GET", "/x", [("Connection", "keep-alive")], version="HTTP/1.0")
        got = await client.ask(data)
        assert (got.complete, got.body) == (True, b"ok")
        if [v.lower() for v in header(got.headers, "connection")] == [b"keep-alive"]:
            assert (await client.ask(data)).body == b"ok"
        else:
            assert await client.closed()


async def test_con_06b_http_10_request_without_host_is_served():
    seen = await through(request("GET", "/x", host=None, version="HTTP/1.0"))
    assert seen.answer.body == b"ok"
    assert len(seen.got.header("host")) == 1


async def answers_once_then_closes(conn: BackendConn) -> None:
    await conn.request()
    await conn.send(DOCUMENT)


@pytest.mark.parametrize("data", [GET, POST, chat()], ids=["GET", "POST", "inference"])
async def test_con_07_upstream_closed_its_idle_connection_and_the_next_request_succeeds(data):
    """The close was there to be seen before the next request began, so a POST is safe, too."""
    async with (
        RawBackend(answers_once_then_closes) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        for number in range(1, 4):
            got = await client.ask(GET if number == 1 else data)
            assert (got.status, got.complete) == (200, True)
            await eventually(lambda: all(c.wire.lost for c in backend.conns))
            assert backend.connections == number
        assert len(backend.requests) == 3


async def closes_on_its_second_request(conn: BackendConn) -> None:
    """The keep-alive race: the close is on its way while the request is, too."""
    first = await conn.request()
    assert first is not None
    await conn.send(DOCUMENT)
    await conn.head_only()


@pytest.mark.parametrize("data", [GET, chat()], ids=["GET", "inference"])
async def test_con_08_reused_connection_that_closes_unanswered_is_tried_once_more_afresh(data):
    async with (
        RawBackend(closes_on_its_second_request) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        assert (await client.ask(data)).complete
        got = await client.ask(data)
        assert (got.status, got.complete) == (200, True)
        assert (backend.connections, len(backend.requests)) == (2, 3)
        health = (await client.ask(request("GET", "/providers"))).json["providers"][0]
        assert (health["healthy"], health["success_rate"]) == (True, 1), "the race is no strike"


async def test_con_08b_fresh_connection_that_closes_unanswered_is_not_tried_for_ever():
    async def script(conn: BackendConn) -> None:
        await conn.request()

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(GET)
        assert (got.status, got.complete) == (502, True)
        assert len(backend.requests) == 1, "the only backend is never asked twice"


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_con_09_post_that_was_read_and_not_answered_is_not_sent_twice(reset):
    async def script(conn: BackendConn) -> None:
        await conn.request()
        if reset:
            conn.reset()

    async with RawBackend(script) as backend, RawBackend(answer(OK)) as spare:
        rows = {"url": backend}, {"url": spare, "region": "asia-pacific"}
        async with proxy(*rows) as p, RawClient(p.port) as client:
            got = await client.ask(POST)
        assert (got.status, got.complete) == (502, True)
        assert [r.body for r in backend.requests] == [b"pay 5 USD"]
        assert spare.requests == []


async def test_con_09b_post_is_not_lost_or_doubled_by_a_reused_connection_that_closes():
    """RFC 9110 9.2.2: that a connection was an old one says nothing about what was done with it.

    A fresh connection for each POST avoids the race, a 502 tells of it; sending twice is neither.
    """
    async with (
        RawBackend(closes_on_its_second_request) as backend,
        proxy(backend) as p,
        RawClient(p.port) as client,
    ):
        await client.ask(GET)
        got = await client.ask(POST)
        assert got.status in (200, 502)
        assert got.complete
        assert [r.method for r in backend.requests] == ["GET", "POST"]


async def test_con_09c_post_that_was_never_sent_goes_to_the_next_backend():
    async with RawBackend(echo) as backend:
        with closed_port() as port:
            rows = {"url": f"http://127.0.0.1:{port}"}, {"url": backend, "region": "asia-pacific"}
            async with proxy(*rows) as p, RawClient(p.port) as client:
                got = await client.ask(POST)
        assert (got.status, got.body) == (200, b"POST /x pay 5 USD")


async def test_con_10_client_that_says_close_is_closed_after_its_answer():
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        got = await client.ask(request("GET", "/x", [("Connection", "close")]))
        assert (got.complete, got.body) == (True, b"ok")
        assert [v.lower() for v in header(got.headers, "connection")] == [b"close"]
        assert await client.closed()
        async with RawClient(p.port) as other:
            await other.ask(GET)
        assert backend.connections == 1, "the client's close says nothing about the upstream"


@pytest.mark.parametrize("at_once", [True, False], ids=["in one packet", "in two"])
async def test_con_10b_nothing_after_close_is_served(at_once):
    """RFC 9112 9.6. What came in one packet may also be refused whole."""
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        first, second = request("GET", "/1", [("Connection", "close")]), request("GET", "/2")
        await client.send(first + second if at_once else first)
        if not at_once:
            await eventually(lambda: backend.requests)
            await client.send(second)
        rest = await client.read_all()
        assert rest.count(b"HTTP/1.") == 1
        assert b"ok" in rest or (at_once and b" 400 " in rest)
        assert [r.target for r in backend.requests] in ([b"/1"], [])


async def test_con_10c_blank_line_after_the_last_body_is_no_second_request():
    """An old client's CRLF too many, behind a POST that says close."""
    async with RawBackend(echo) as backend, proxy(backend) as p, RawClient(p.port) as client:
        data = request("POST", "/1", [("Connection", "close")], b"abc") + b"\r\n"
        got = await client.ask(data)
        assert (got.complete, got.body) == (True, b"POST /1 abc")


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_con_11_clients_that_leave_without_a_byte_do_no_harm(way):
    async with RawBackend(answer(OK)) as backend, proxy(backend) as p:
        for _ in range(50):
            async with RawClient(p.port) as client:
                getattr(client, way)()
        for part in (b"\r\n", b"G", b"GET /x HTTP/1.1\r\nHost:"):
            async with RawClient(p.port) as client:
                await client.send(part)
                getattr(client, way)()
        async with RawClient(p.port) as client:
            assert (await client.ask(GET)).body == b"ok"
        assert len(backend.requests) == 1


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", id="close"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok", id="list"
        ),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", id="HTTP/1.0"),
    ],
)
async def test_con_12_and_13_upstream_that_will_close_is_not_reused(raw):
    """The client's own connection stays open all the same, and is told nothing of it."""
    async with RawBackend(answer(raw)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for number in range(1, 4):
            got = await client.ask(GET)
            assert (got.complete, got.body, got.version) == (True, b"ok", "1.1")
            assert b"close" not in b"".join(header(got.headers, "connection")).lower()
            assert backend.connections == number
        await eventually(lambda: backend.open_connections == 0)


async def test_con_14_blank_lines_before_a_request_are_ignored():
    """RFC 9112 2.2: an old client ends its body with a CRLF too many."""
    async with RawBackend(echo) as backend, proxy(backend) as p, RawClient(p.port) as client:
        await client.send(request("POST", "/1", body=b"a") + b"\r\n" + request("GET", "/2"))
        bodies = [(await client.response()).body for _ in range(2)]
        assert bodies == [b"POST /1 a", b"GET /2 "]


async def test_con_15_twenty_clients_at_once_get_their_own_answers():
    async with RawBackend(echo) as backend:
        async with proxy({"url": backend, "max_in_flight": 6}) as p:

            async def one(name: int) -> None:
                async with RawClient(p.port) as client:
                    for number in range(10):
                        body = b"%d" % (name * number)
                        got = await client.ask(request("PUT", f"/{name}/{number}", body=body))
                        assert got.body == b"PUT /%d/%d %b" % (name, number, body)

            async with asyncio.TaskGroup() as tasks:
                for name in range(20):
                    tasks.create_task(one(name))
        assert len(backend.requests) == 200
        assert backend.connections <= 6, "never more connections than requests at once"


async def test_con_16_upstream_is_not_reused_after_a_client_left_its_answer():
    """What is left of an abandoned answer would be read as the next client's."""

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            if received.target == b"/slow":
                await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\nfirst half")
                await conn.wait_closed()
            else:
                await conn.send(OK)

    async with RawBackend(script) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(request("GET", "/slow"))
            await client.read_until(b"first half")
        await backend.closed.wait(timeout=2)
        async with RawClient(p.port) as client:
            assert (await client.ask(GET)).body == b"ok"
        assert backend.connections == 2


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304), ("HEAD", 404)]
)
async def test_con_17_bodyless_answers_leave_the_connection_in_step(method, status):
    """A parser that waits for the body that Content-Length names swallows the next answer."""

    async def script(conn: BackendConn) -> None:
        async for received in each_request(conn):
            if received.target == b"/bodyless":
                length = b"" if status == 204 else b"Content-Length: 1000\r\n"
                await conn.send(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, length))
            else:
                await conn.send(OK)

    async with RawBackend(script) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for _ in range(3):
            got = await client.ask(request(method, "/bodyless"), method)
            assert (got.status, got.complete, got.body) == (status, True, b"")
            assert (await client.ask(GET)).body == b"ok"
        assert len(backend.requests) == 6
        if method != "HEAD":  # a parser that cannot be told of HEAD has to give its connection up
            assert backend.connections == 1


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_con_18_error_answers_of_the_backend_keep_both_connections(status):
    raw = b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nno" % status
    async with RawBackend(answer(raw)) as backend, proxy(backend) as p, RawClient(p.port) as client:
        for _ in range(3):
            got = await client.ask(GET)
            assert (got.status, got.body) == (status, b"no")
        assert (backend.connections, len(backend.requests)) == (1, 3)


async def test_con_19_own_errors_keep_the_client_connection_in_step():
    """An error told before the request body was read must not take that body for a request."""
    with closed_port() as port:
        row = {"url": f"http://127.0.0.1:{port}", "models": ["m"]}
        async with proxy(row) as p, RawClient(p.port) as client:
            body = b'{"model": "nobody serves this"}' + b"GET /evil HTTP/1.1\r\n\r\n"
            data = request("POST", "/v1/chat/completions", body=body)
            first = await client.ask(data)
            assert first.complete
            assert first.status in (400, 404, 502, 503)
            if not await client.closed(0.05):
                got = await client.ask(request("GET", "/health"))
                assert (got.status, got.complete) == (200, True)


async def test_con_20_two_requests_never_share_an_upstream_connection_at_once():
    waiting: list[BackendConn] = []

    async def script(conn: BackendConn) -> None:
        async for _ in each_request(conn):
            waiting.append(conn)
            await eventually(lambda: len(waiting) == 5)
            await conn.send(OK)

    async with RawBackend(script) as backend, proxy(backend) as p:
        clients = [RawClient(p.port) for _ in range(5)]
        for client in clients:
            await client.__aenter__()
            await client.send(GET)
        for client in clients:
            assert (await client.response()).body == b"ok"
            await client.__aexit__(None, None, None)
        assert len({id(conn) for conn in waiting}) == 5
        assert p.in_flight() == 0


async def test_con_21_early_final_answer_does_not_leave_a_half_read_request_behind():
    """The rest of the upload would be read as the next request on a reused connection."""

    async def script(conn: BackendConn) -> None:
        received = await conn.head_only()
        assert received is not None
        if received.method == "POST":
            await conn.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            await conn.wait_closed()
        else:
            await conn.send(OK)
            await conn.wait_closed()

    async with RawBackend(script) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            await client.send(request("POST", "/x", [("Content-Length", "10000000")]) + b"x" * 1000)
            got = await client.response()
            assert (got.status, got.body) == (413, b"no")
        async with RawClient(p.port) as client:
            assert (await client.ask(GET)).body == b"ok"
        assert [r.method for r in backend.requests] == ["POST", "GET"]
        assert backend.connections == 2


async def test_con_22_proxy_that_stops_closes_what_is_idle_on_both_sides():
    async with RawBackend(answer(OK)) as backend:
        async with proxy(backend) as p:
            client = await RawClient(p.port).__aenter__()
            assert (await client.ask(GET)).body == b"ok"
        assert await client.closed()
        await backend.closed.wait(timeout=2)
        await client.__aexit__(None, None, None)
