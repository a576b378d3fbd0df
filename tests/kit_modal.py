"""A stub of Modal's edge. It is not Modal: there is no emulator, and no test asks Modal itself.

What it does, and by what right (facts of November 2026):

D  its documentation: a request that got no answer within 150 s is answered 303, with `Location:`
   the same URL and `?__modal_function_call_id=fc-…`; a GET there waits as long again and may be
   answered 303 again; it may be asked for again without a new execution. 401 and its body without
   the proxy token, before any container. A Server answers 503 at once while no container is ready,
   and that request starts one.
S  seen by its users: the bodies of 404, 429, 500 and of the 400 for a POST to a result's address;
   a 408 there once the result has expired, with the ASGI runtime's own words (these are D).
I  inferred: that an answer which has begun streams on past the cut; that the 303 has no body, and
   that a query before it is kept; the body of a Server's 503; that an unknown call is the 404
   `invalid function call`; that a function runs on when whoever asked for it is gone.

The clock is shortened: `cut` stands for the 150 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from .kit_backend import BackendConn, RawBackend, Received

RESULT = b"__modal_function_call_id="
NO_CREDENTIALS = b"modal-http: missing credentials for proxy authorization"
STOPPED = b"modal-http: app for invoked web endpoint is stopped"
NO_CALL = b"modal-http: invalid function call"
DISABLED = b"modal-http: workspace ac-x1 is disabled"
SPENT = b"modal-http: Webhook failed: workspace billing cycle spend limit reached"
BAD_REDIRECT = b"modal-http: bad redirect method"
EXPIRED = b"Missing request, possibly due to expiry or cancellation"
KILLED = b"modal-http: internal error: function was terminated by signal"
LOST = b"modal-http: internal error: status InternalFailure: Server has lost track of input"
NO_PORT = (
    b"modal-http: internal server error: status Failure: "
    b"TimeoutError('Waited too long for port 8000')"
)


def said(status: int, body: bytes = b"", *lines: bytes) -> bytes:
    """An answer of the edge: plain text."""
    head = b"HTTP/1.1 %d Status\r\nContent-Type: text/plain\r\n" % status
    more = b"".join(line + b"\r\n" for line in lines)
    return head + more + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class Call:
    """One input of a function: what it was asked, and the bytes of its HTTP answer so far."""

    def __init__(self, received: Received) -> None:
        self.received = received
        self.cuts = 0  # 303s that were answered for it
        self.data = bytearray()
        self.ended = False
        self._changed = asyncio.Event()

    def answer(self, data: bytes) -> None:
        """Add to the answer; the first bytes begin it."""
        self.data += data
        self._tell()

    def end(self) -> None:
        self.ended = True
        self._tell()

    def cut(self) -> None:
        self.cuts += 1
        self._tell()

    async def until_cut(self, times: int) -> None:
        """The work that lasts `times` times 150 s."""
        while self.cuts < times:
            await self.change()

    async def change(self) -> None:
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


App = Callable[[Call], Awaitable[None]]


def answers(data: bytes, cuts: int = 0) -> App:
    """An app that works for `cuts` times 150 s and then says `data`, an HTTP answer."""

    async def app(call: Call) -> None:
        await call.until_cut(cuts)
        call.answer(data)

    return app


class Function:
    """A web function behind the edge: `url`, and what reached it.

    Attributes:
        cut: s that stand for the 150.
        token: the proxy token it requires, as `wk-…`, `ws-…`.
        refusal: what the edge answers instead of asking the app.
        breaks: connections to come on which the edge hangs up while a result is waited for.
        expired: requests for a result, to come, that are answered 408.
        moved: host that results are said to be at, in place of this one.
        posts: requests that were taken as new work; gets: requests for a result.
        calls: the work that was begun.
    """

    def __init__(
        self,
        app: App,
        *,
        cut: float = 0.15,
        token: tuple[bytes, bytes] | None = None,
        refusal: bytes | None = None,
        breaks: int = 0,
        expired: int = 0,
        moved: bytes | None = None,
    ) -> None:
        self.app = app
        self.cut = cut
        self.token = token
        self.refusal = refusal
        self.breaks = breaks
        self.expired = expired
        self.moved = moved
        self.calls: list[Call] = []
        self.backend = RawBackend(self._serve)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return self.backend.url

    @property
    def posts(self) -> list[Received]:
        return [each for each in self.backend.requests if RESULT not in each.target]

    @property
    def gets(self) -> list[Received]:
        return [each for each in self.backend.requests if RESULT in each.target]

    async def __aenter__(self) -> Self:
        await self.backend.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.backend.__aexit__(kind, exc, trace)

    async def _serve(self, conn: BackendConn) -> None:
        while (received := await conn.request()) is not None:
            if not self._admits(received):
                await conn.send(said(401, NO_CREDENTIALS))
            elif self.refusal is not None:
                await conn.send(self.refusal)
            elif RESULT not in received.target:
                await self._wait(conn, received, self._begin(received))
            elif received.method != "GET":
                await conn.send(said(400, BAD_REDIRECT))
            elif not await self._result(conn, received):
                return

    def _admits(self, received: Received) -> bool:
        if self.token is None:
            return True
        pair = received.header("modal-key"), received.header("modal-secret")
        return pair == ([self.token[0]], [self.token[1]])

    def _begin(self, received: Received) -> Call:
        call = Call(received)
        self.calls.append(call)
        task = asyncio.create_task(self._run(call), name=f"modal fc-{len(self.calls)}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return call

    async def _run(self, call: Call) -> None:
        await self.app(call)
        call.end()

    async def _result(self, conn: BackendConn, received: Received) -> bool:
        """Answer a request for a result; False: the edge hung up instead."""
        number = received.target.partition(RESULT)[2].removeprefix(b"fc-")
        if self.breaks:
            self.breaks -= 1
            return False
        if self.expired:
            self.expired -= 1
            await conn.send(said(408, EXPIRED))
        elif not number.isdigit() or int(number) > len(self.calls):
            await conn.send(said(404, NO_CALL))
        else:
            await self._wait(conn, received, self.calls[int(number) - 1])
        return True

    async def _wait(self, conn: BackendConn, received: Received, call: Call) -> None:
        try:
            async with asyncio.timeout(self.cut):
                while not call.data and not call.ended:
                    await call.change()
        except TimeoutError:
            call.cut()
            await conn.send(said(303, b"", b"Location: " + self._place(received, call)))
            return
        sent = 0
        while True:
            if fresh := bytes(call.data[sent:]):
                sent += len(fresh)  # before the wait: more may be said during it
                await conn.send(fresh)
            elif call.ended:
                return
            else:
                await call.change()

    def _place(self, received: Received, call: Call) -> bytes:
        base = received.target
        if RESULT not in base:
            joined = b"&" if b"?" in base else b"?"
            base += joined + RESULT + b"fc-%d" % (self.calls.index(call) + 1)
        host = self.moved or received.header("host")[0]
        return b"http://" + host + base


class Server:
    """A Modal Server behind the edge: 503 until `needs` requests came, then what `script` says.

    `needs` 0: warm from the start; None: it never comes up. `refuses` is the whole 503.
    """

    def __init__(
        self, answer: bytes, needs: int | None = 0, refuses: bytes = said(503, b"")
    ) -> None:
        self.answer = answer
        self.needs = needs
        self.refuses = refuses
        self.refused = 0
        self.backend = RawBackend(self._serve)

    @property
    def url(self) -> str:
        return self.backend.url

    async def __aenter__(self) -> Self:
        await self.backend.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.backend.__aexit__(kind, exc, trace)

    async def _serve(self, conn: BackendConn) -> None:
        while await conn.request() is not None:
            if self.needs is None or self.refused < self.needs:
                self.refused += 1
                await conn.send(self.refuses)
            else:
                await conn.send(self.answer)
