"""A receiver of webhooks on a real socket that checks signatures with the standard's library."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # of the standard's own tests


@dataclass
class Got:
    """One request as it came."""

    id: str
    timestamp: str
    signed: bool
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """Answers with the statuses of `plan`, then 200.

    Attributes:
        tries: every request; taken: those that were answered 2xx.
        answers: while it is not set, nothing is answered.
    """

    plan: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)  # of the answers of the plan
    tries: list[Got] = field(default_factory=list)
    taken: list[Got] = field(default_factory=list)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    path: str = "/T000/hidden-path"
    secret: str = SECRET
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"http{'s' * bool(self.tls)}://127.0.0.1:{self.port}{self.path}"

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        signed = "webhook-signature" in request.headers
        if signed:
            Webhook(self.secret).verify(
                body, dict(request.headers)
            )  # raises: a 500 that the test sees
        got = Got(
            request.headers["webhook-id"],
            request.headers["webhook-timestamp"],
            signed,
            body,
            dict(request.headers),
        )
        self.tries.append(got)
        await self.answers.wait()
        if self.plan:
            status = self.plan.pop(0)
            if not 200 <= status < 300:
                return web.Response(status=status, headers=self.headers, text="no")
        self.taken.append(got)
        return web.Response(text="ok")


@asynccontextmanager
async def receiver(*plan: int, port: int = 0, **fields: Any) -> AsyncIterator[Receiver]:
    made = Receiver(plan=list(plan), **fields)
    made.answers.set()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=made.tls, reuse_address=True)
    await site.start()
    made.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    try:
        yield made
    finally:
        await runner.cleanup()


Told = list[tuple[str, dict[str, Any]]]


def telling(told: Told) -> Callable[..., None]:
    return lambda event, /, **fields: told.append((event, fields))
