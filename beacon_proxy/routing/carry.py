"""An attempt whose request a provider takes to its backend by an API of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..contracts import Backend, Fault, Reply, Stage, Submission
from ..errors import ProxyError, UpstreamError
from ..wire.carried import Carried
from ..wire.request import Source
from ..wire.upload import Upload

if TYPE_CHECKING:
    import aiohttp

    from .attempt import Attempt

    Carry = Callable[[Backend, Submission, Reply, aiohttp.ClientSession], Coroutine[Any, Any, None]]


async def carry_by(carry: Carry, attempt: Attempt, source: Source, lone: bool) -> None:
    """Return when the answer can be judged, or `attempt.error` says why there is none.

    The provider needs the whole body, as its own API wraps it. It is kept, however large, and
    counted with all others that are; it must have come by the end of the exchange.
    """
    exchange, backend, upload = attempt.exchange, attempt.backend, source.upload
    deadline, patience = exchange.ends_on(backend), attempt.patience.first_content or inf
    try:
        session = _session(attempt)
        body = b"" if upload is None else await _whole(upload, deadline)
        submission = source.submission(attempt.candidate, body, deadline, patience)
    except ProxyError as exc:
        attempt.error = exc.with_traceback(None)
        return
    attempt.answer = answer = attempt.expect(source.shape, exchange.stream, False, lone)
    wire = attempt.wire
    attempt.flow = carried = Carried(wire.loop, wire.wheel, answer, backend.cold_timeouts)
    attempt.sent, attempt.billed_from = True, monotonic()
    task = carried.start(
        wire.carriers,
        lambda reply: carry(backend, submission, reply, session),
        f"carry {exchange.id}",
        backend.name,
    )
    if upload is not None:
        upload.lend(task)
    while not answer.decided:
        await answer.next_step()


def _session(attempt: Attempt) -> aiohttp.ClientSession:
    try:
        return attempt.hooks.session(attempt.backend)
    except (OSError, ValueError) as exc:  # its file of authorities has gone, or holds none
        detail = "the certificate authorities of this backend cannot be read"
        raise UpstreamError(Fault.TLS, Stage.CONNECT, detail) from exc


async def _whole(upload: Upload, deadline: float) -> bytes:
    try:
        async with asyncio.timeout_at(deadline if deadline < inf else None):
            return await upload.whole()
    except TimeoutError as exc:
        detail = "the deadline ran out before the body had come"
        raise UpstreamError(Fault.DEADLINE, Stage.SEND, detail) from exc
