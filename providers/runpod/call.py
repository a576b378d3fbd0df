"""The calls about one job of a RunPod queue: submit it, look at it, stop it.

A job is submitted once: a look may fail and be repeated, a submission never. It is stopped unless
it is over, whatever ended the request; the id may have to be waited for until then.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from beacon_proxy.contracts import CLEAN_UP, Clock, Fault, Headers

from ..reading import load
from .job import Failure, Job
from .pace import Budget, Operation

if TYPE_CHECKING:
    import aiohttp

_ANSWER_MOST = 64 << 20  # bytes; RunPod's own results are below 20 MB
_CONNECT_LIMIT = 10.0  # s
_LOOK_LIMIT = 30.0  # s
_CANCEL_LIMIT = 2.0  # s
_WAIT = 1000  # ms, the least that `/runsync` may be told to wait
_STUMBLES = 5  # looks in a row that may fail
_LOST = 2  # looks in a row that find no such job
_PAUSE = 0.25  # s after the first of either; then twice as long each time
_SECONDS = re.compile(rb"[0-9]{1,6}")
_REST = 1.0  # s after a 429 that names no time
_REST_MOST = 30.0


class Refused(Exception):
    """RunPod did not take the job; its answer is one to be judged like any other."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(f"RunPod answers {status}")
        self.status, self.headers, self.body = status, headers, body


class Failed(Exception):
    """There is no answer, or no more of it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class Endpoint:
    """What is known of one endpoint's queue: its budgets, and how it wants to be asked."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url
        self.budgets = {operation: Budget(operation, clock) for operation in Operation}
        self.posts = False  # the SDK's local server takes POST alone, also for `/status`


class Call:
    """One request at one endpoint.

    Attributes:
        over: the job has ended, as far as anybody needs it.
    """

    def __init__(
        self, endpoint: Endpoint, headers: dict[str, str], session: aiohttp.ClientSession
    ) -> None:
        self._endpoint = endpoint
        self._headers = headers
        self._session = session
        self._submitting: asyncio.Task[None] | None = None
        self._job = Job()
        self._problem: Exception | None = None
        self.over = False

    async def submit(self, operation: Operation, body: bytes) -> Job:
        """Put the job into the queue.

        In a task of its own: who is cancelled meanwhile still needs the id.

        Raises:
            Refused, Failed: there is no job. aiohttp's errors pass through.
        """
        await self._endpoint.budgets[operation].take()
        work = self._submit(operation, body)
        self._submitting = asyncio.create_task(work, name=f"runpod {operation}")
        await asyncio.shield(self._submitting)
        self._submitting = None
        if self._problem is not None:
            raise self._take_problem()
        return self._job

    def _take_problem(self) -> Exception:
        problem, self._problem = self._problem, None
        assert problem is not None
        return problem

    async def _submit(self, operation: Operation, body: bytes) -> None:
        query = f"?wait={_WAIT}" if operation is Operation.RUNSYNC else ""
        try:
            status, headers, said = await self._ask("POST", f"/{operation}{query}", body, None)
            if not 200 <= status < 300:
                raise Refused(status, headers, said)
            self._job = self._read(said)
            if not self._job.id and not self._job.final:
                raise Failed(Failure(Fault.MALFORMED, "RunPod names no job"))
        except Exception as exc:  # told by `submit`, where somebody still waits for it
            self._problem = exc.with_traceback(None)

    def _read(self, said: bytes) -> Job:
        document = load(said)
        job = Job.read(document)
        if job is None:
            fault = Fault.NOT_JSON if document is None else Fault.MALFORMED
            raise Failed(Failure(fault, "RunPod's answer is no job"))
        self.over = self.over or job.final
        return job

    async def look(self, operation: Operation) -> Job:
        """Ask for the job's status or stream; a control plane that stumbles is asked again.

        Raises:
            Failed: it does not say.
        """
        from aiohttp import ClientError  # not above: few have a RunPod backend to ask

        budget, target = self._endpoint.budgets[operation], f"/{operation}/{self._name}"
        stumbles = lost = 0
        while True:
            await budget.take()
            posts = self._endpoint.posts
            method, body = ("POST", b"") if posts else ("GET", None)
            try:
                # The local server runs the job while it is asked: no limit there but the core's.
                status, headers, said = await self._ask(
                    method, target, body, None if posts else _LOOK_LIMIT
                )
            except (ClientError, OSError) as exc:
                fault = Fault.TIMEOUT if isinstance(exc, TimeoutError) else Fault.RESET
                failure = Failure(fault, "RunPod does not tell of the job")
            else:
                if status == 200:
                    return self._read(said)
                if status == 429:
                    budget.rest(_rest(headers))
                    continue
                if status == 405 and not posts:
                    self._endpoint.posts = True
                    continue
                failure = Failure(_fault(status), f"RunPod answers {status} about the job")
                lost += status == 404
                if lost == _LOST:
                    self.over = True
                    failure = Failure(
                        Fault.TIMEOUT, "RunPod has forgotten the job: its ttl is over"
                    )
                    raise Failed(failure)
                if status < 500 and status != 404:
                    raise Failed(failure)
            stumbles += 1
            if stumbles == _STUMBLES:
                raise Failed(failure)
            await asyncio.sleep(_PAUSE * 2.0 ** (stumbles - 1))

    async def stop(self) -> str | None:
        """Cancel the job unless it is over; raises nothing but its own cancellation.

        Returns what may still run, and be paid for; None: nothing.
        """
        from aiohttp import ClientError

        submitting, self._submitting = self._submitting, None
        in_the_air = False
        if submitting is not None:
            try:
                await asyncio.wait((submitting,), timeout=CLEAN_UP - _CANCEL_LIMIT)
            finally:
                in_the_air = not submitting.done()
                submitting.cancel()
        if self.over or not self._job.id:
            return self.named if in_the_air else None
        budget = self._endpoint.budgets[Operation.CANCEL]
        for _ in range(2):
            await budget.take()
            try:
                status, headers, _ = await self._ask(
                    "POST", f"/{Operation.CANCEL}/{self._name}", b"", _CANCEL_LIMIT
                )
            except (ClientError, OSError):
                continue
            if status < 500 and status != 429:
                return None  # it is done, or there is nothing left to cancel
            if status == 429:
                budget.rest(min(_rest(headers), _REST))
        return self.named

    @property
    def named(self) -> str:
        """The job, as an operator finds it in RunPod's console."""
        return f"job {self._job.id}" if self._job.id else "a job whose id never came"

    @property
    def _name(self) -> str:
        return quote(self._job.id, safe="")

    async def _ask(
        self, method: str, target: str, body: bytes | None, limit: float | None
    ) -> tuple[int, Headers, bytes]:
        from aiohttp import ClientTimeout

        async with self._session.request(
            method,
            self._endpoint.url + target,
            data=body,
            headers=self._headers,
            timeout=ClientTimeout(total=limit, sock_connect=_CONNECT_LIMIT),
            allow_redirects=False,
        ) as response:
            said = bytearray()
            async for piece in response.content.iter_any():
                said += piece
                if len(said) > _ANSWER_MOST:
                    raise Failed(Failure(Fault.MALFORMED, "RunPod's answer is too large"))
            return response.status, response.raw_headers, bytes(said)


def _fault(status: int) -> Fault:
    return Fault.UNAUTHORIZED if status in (401, 403) else Fault.STATUS


def _rest(headers: Headers) -> float:
    """Seconds that RunPod asks to be left alone."""
    for name, value in headers:
        if name.lower() == b"retry-after" and _SECONDS.fullmatch(value.strip()):
            return min(float(value), _REST_MOST)
    return _REST
