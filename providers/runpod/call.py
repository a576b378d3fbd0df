"""The calls about one job of a RunPod queue: submit it, look at it, stop it.

A job is submitted once: a look may fail and be repeated, a submission never. It is stopped unless
it is over, whatever ended the request; the id may have to be waited for until then. What a
submission without an answer left in the queue has no name to stop it by: that is told.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from beacon_proxy.contracts import Fault, Headers

from ..reading import load
from .endpoint import Endpoint
from .job import Failed, Failure, Job
from .pace import Operation, Pace

if TYPE_CHECKING:
    import aiohttp

_ANSWER_MOST = 20 << 20  # bytes; RunPod's own results are below 20 MB
LARGE = 1 << 20  # bytes; what is larger is read in a thread, for it would hold up the others
_CONNECT_LIMIT = 10.0  # s
_LOOK_LIMIT = 30.0  # s
_CANCEL_LIMIT = 2.0  # s
_STOP_LIMIT = 60.0  # s for the id to come, and as long again for a cancel to be taken
_GRACE = 3.0  # s that a job may go on after all of its answer has come
_WAIT = 1000  # ms, the least that `/runsync` may be told to wait
_PAUSE = 0.25  # s after the first question that fails; then twice as long each time
_PAUSE_MOST = 5.0
_LOST = 5.0  # s for which no look finds the job until that is believed
_FORGOTTEN = "Job ID not found"  # the SDK's local server, behind a 200
_SECONDS = re.compile(rb"[0-9]{1,6}")
_REST = 1.0  # s after a 429 that names no time
_REST_MOST = 30.0


class Refused(Exception):
    """RunPod did not take the job; its answer is one to be judged like any other."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(f"RunPod answers {status}")
        self.status, self.headers, self.body = status, headers, body

    @property
    def taken(self) -> bool:
        """Whether the job may be in the queue all the same: a gateway's 5xx does not say."""
        return self.status >= 500


class Call:
    """One request at one endpoint.

    Attributes:
        over: the job has ended.
        answered: all of its answer has come, so it is about to end by itself.
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
        self._unknown = False  # it was submitted, and nobody knows what became of it
        self.over = self.answered = False

    async def submit(self, operation: Operation, body: bytes, sending: Callable[[], None]) -> Job:
        """Put the job into the queue; `sending` is called as it goes out.

        In a task of its own: who is cancelled meanwhile still needs the id.

        Raises:
            Refused, Failed: there is no job. aiohttp's errors pass through.
        """
        await self._endpoint.budgets[operation].take()
        work = self._submit(operation, body, sending)
        self._submitting = asyncio.create_task(work, name=f"runpod {operation}")
        # Nobody else waits for it, and it raises nothing: what it found is noted here.
        await asyncio.shield(self._submitting)
        self._submitting = None
        if self._problem is not None:
            raise self._take_problem()
        return self._job

    def _take_problem(self) -> Exception:
        problem, self._problem = self._problem, None
        assert problem is not None
        return problem

    async def _submit(self, operation: Operation, body: bytes, sending: Callable[[], None]) -> None:
        query = f"?wait={_WAIT}" if operation is Operation.RUNSYNC else ""
        target, length = f"/{operation}{query}", {"Content-Length": str(len(body))}
        try:
            status, headers, said = await self._ask(
                "POST", target, _noticed(body, sending), None, length
            )
            if not 200 <= status < 300:
                raise Refused(status, headers, said)
            self._job = await self._read(said)
            if not self._job.id and not self._job.final:
                raise Failed(Failure(Fault.MALFORMED, "RunPod names no job"))
        except Exception as exc:  # told by `submit`, where somebody still waits for it
            self._unknown = _may_have_been_taken(exc)
            self._problem = exc.with_traceback(None)

    async def _read(self, said: bytes) -> Job:
        large = len(said) > LARGE
        job = await asyncio.to_thread(_job_in, said) if large else _job_in(said)
        self.over = self.over or job.final
        return job

    async def look(self, operation: Operation, *, last: bool = False) -> Job:
        """Ask for the job's status or stream; a control plane that stumbles is asked again.

        It is asked until the limits of the request are over: the job runs on meanwhile, and another
        backend would do the same paid work a second time.

        Raises:
            Failed: it does not say, and will not.
        """
        from aiohttp import ClientError  # not above: few have a RunPod backend to ask

        budget, clock = self._endpoint.budgets[operation], asyncio.get_running_loop().time
        pause, lost_since = _PAUSE, None
        while True:
            try:
                status, headers, said = await self._ask_about(operation)
            except (ClientError, OSError):
                status = 0
            else:
                if status == 200:
                    return await self._read(said)
                if status == 429:
                    budget.rest(_rest(headers))
                    continue
                if status == 404 and last:
                    return Job(status="COMPLETED")
                if status < 500 and status != 404:
                    detail = f"RunPod answers {status} about the job"
                    raise Failed(Failure(_fault(status), detail))
            if status != 404:
                lost_since = None
            elif lost_since is None:
                lost_since = clock()
            elif clock() - lost_since >= _LOST:
                raise Failed(Failure(Fault.TIMEOUT, "RunPod has forgotten the job"))
            await asyncio.sleep(pause)
            pause = min(pause * 2.0, _PAUSE_MOST)

    async def glance(self, operation: Operation) -> Job | None:
        """Ask once, for what is only good to know; None: it does not say."""
        from aiohttp import ClientError

        try:
            status, _, said = await self._ask_about(operation)
            return await self._read(said) if status == 200 else None
        except (ClientError, OSError, Failed, RuntimeError):  # the last: the session is closed
            return None

    async def last_look(self) -> Job:
        """Ask for what the job yielded last, after it has completed.

        One that is forgotten by then, as at the SDK's local server, has said all.

        Raises:
            Failed: there may be more, and it does not say what.
        """
        job = await self.look(Operation.STREAM, last=True)
        if job.error == _FORGOTTEN:
            return Job(status="COMPLETED")
        if failure := job.failure():
            raise Failed(failure)
        return job

    async def _ask_about(self, operation: Operation) -> tuple[int, Headers, bytes]:
        target, endpoint = f"/{operation}/{self._name}", self._endpoint
        if not endpoint.posts:
            await endpoint.budgets[operation].take()
            answer = await self._ask("GET", target, None, _LOOK_LIMIT)
            if answer[0] != 405:
                return answer
            endpoint.posts = True
        await endpoint.budgets[operation].take()
        # The local server runs the job while it is asked: no limit there but the core's.
        return await self._ask("POST", target, b"", None)

    async def stop(self) -> str | None:
        """Cancel the job unless it is over; it may take minutes, and raises nothing.

        Returns what may still run, and be paid for; None: nothing.
        """
        if self._submitting is not None:
            await asyncio.wait((self._submitting,), timeout=_STOP_LIMIT)
            if not self._submitting.done():
                self._submitting.cancel()
                return self.named
        if self.over or not self._job.id:
            return self.at_risk
        if self.answered and await self._ends_by_itself():
            return None
        return None if await self._cancel() else self.named

    async def _ends_by_itself(self) -> bool:
        pace = Pace()
        try:
            async with asyncio.timeout(_GRACE):
                while not self.over:
                    await asyncio.sleep(pace.next(queued=False))
                    await self.glance(Operation.STATUS)
        except TimeoutError:
            return False
        return True

    async def _cancel(self) -> bool:
        """Whether the job has ended; one that RunPod does not know (any more) has."""
        from aiohttp import ClientError

        budget, clock = self._endpoint.budgets[Operation.CANCEL], asyncio.get_running_loop().time
        target, end, pause = f"/{Operation.CANCEL}/{self._name}", clock() + _STOP_LIMIT, _PAUSE
        while clock() < end and not self._session.closed:
            await budget.take()
            try:
                status, headers, _ = await self._ask("POST", target, b"", _CANCEL_LIMIT)
            except (ClientError, OSError, Failed, RuntimeError):  # the last: the session is closed
                status = 0
            if 200 <= status < 300 or status == 404:
                self.over = True
                return True
            if status == 429:
                budget.rest(min(_rest(headers), _PAUSE_MOST))
            elif 0 < status < 500:
                return False  # such as a key that may not: no repetition helps
            await asyncio.sleep(pause)
            pause = min(pause * 2.0, _PAUSE_MOST)
        return False

    @property
    def at_risk(self) -> str | None:
        """What may run at RunPod as far as is known now; None: nothing."""
        submitting = self._submitting is not None and not self._submitting.done()
        known = bool(self._job.id) and not self.over
        return self.named if submitting or known or self._unknown else None

    @property
    def named(self) -> str:
        """The job, as an operator finds it in RunPod's console."""
        return f"job {self._job.id}" if self._job.id else "a job whose id never came"

    @property
    def _name(self) -> str:
        return quote(self._job.id, safe="")

    async def _ask(
        self,
        method: str,
        target: str,
        body: bytes | AsyncIterator[bytes] | None,
        limit: float | None,
        fields: dict[str, str] | None = None,
    ) -> tuple[int, Headers, bytes]:
        from aiohttp import ClientTimeout

        async with self._session.request(
            method,
            self._endpoint.url + target,
            data=body,
            headers=self._headers | (fields or {}),
            timeout=ClientTimeout(total=limit, sock_connect=_CONNECT_LIMIT),
            allow_redirects=False,
        ) as response:
            said = bytearray()
            async for piece in response.content.iter_any():
                said += piece
                if len(said) > _ANSWER_MOST:
                    raise Failed(Failure(Fault.MALFORMED, "RunPod's answer is too large"))
            return response.status, response.raw_headers, bytes(said)


async def _noticed(body: bytes, sending: Callable[[], None]) -> AsyncIterator[bytes]:
    """The body; aiohttp takes it once there is a connection to write it to."""
    sending()
    yield body


def _job_in(said: bytes) -> Job:
    document = load(said)
    job = Job.read(document, large=len(said) > LARGE)
    if job is None:
        fault = Fault.NOT_JSON if document is None else Fault.MALFORMED
        raise Failed(Failure(fault, "RunPod's answer is no job"))
    return job


def _may_have_been_taken(problem: Exception) -> bool:
    """Whether the job may be in the queue although its submission failed.

    A connection that breaks and an answer that is cut come after RunPod may have taken it; a
    connection that was never made, and a refusal, do not.
    """
    from aiohttp import ClientConnectorError, ConnectionTimeoutError

    if isinstance(problem, Refused):
        return problem.taken
    return not isinstance(problem, ClientConnectorError | ConnectionTimeoutError)


def _fault(status: int) -> Fault:
    return Fault.UNAUTHORIZED if status in (401, 403) else Fault.STATUS


def _rest(headers: Headers) -> float:
    """Seconds that RunPod asks to be left alone."""
    for name, value in headers:
        if name.lower() == b"retry-after" and _SECONDS.fullmatch(value.strip()):
            return min(max(float(value), _REST), _REST_MOST)
    return _REST
