"""An attempt whose request a provider takes to its backend by an API of its own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from math import inf
from typing import TYPE_CHECKING, Any

from ..contracts import Backend, Reply, Submission
from ..errors import ProxyError
from ..wire.carried import Carried
from ..wire.request import Source

if TYPE_CHECKING:
    import aiohttp

    from .attempt import Attempt

    Carry = Callable[[Backend, Submission, Reply, aiohttp.ClientSession], Coroutine[Any, Any, None]]


async def carry_by(carry: Carry, attempt: Attempt, source: Source, lone: bool) -> None:
    """Return when the answer can be judged, or `attempt.error` says why there is none.

    The provider needs the whole body, as its own API wraps it.
    """
    exchange, backend, upload = attempt.exchange, attempt.backend, source.upload
    body = b""
    patience = attempt.patience.first_content or inf
    try:
        if upload is not None:
            whole = upload.body
            body = whole if whole is not None else b"".join([p async for p in upload.pieces()])
        deadline = exchange.ends_on(backend)
        submission = source.submission(attempt.candidate, body, deadline, patience)
    except ProxyError as exc:
        attempt.error = exc.with_traceback(None)
        return
    attempt.answer = answer = attempt.expect(source.shape, exchange.stream, False, lone)
    wire, session = attempt.wire, attempt.hooks.session(backend)
    attempt.flow = carried = Carried(wire.loop, wire.wheel, answer, backend.cold_timeouts)
    attempt.sent = True
    carried.start(
        wire.carriers,
        lambda reply: carry(backend, submission, reply, session),
        f"carry {exchange.id}",
    )
    while not answer.decided:
        await answer.next_step()
