"""RunPod's queue API as a transport: a request becomes a job, the job's output the answer.

A document is `/runsync` with the shortest wait, then `/status`; a stream is `/run`, then `/stream`.
The long waits of `/runsync` are not used: until it answers nobody knows the job's id, and who does
not know it cannot cancel.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from beacon_proxy.contracts import Backend, Check, Clock, Dialect, Fault, Headers, Reply, Submission

from .answer import NoAnswer, document_of
from .bill import Bill
from .call import Call, Refused
from .endpoint import Endpoint
from .events import is_stream, stream_for
from .input import body_of
from .job import Failed, Failure, Job, error_in
from .pace import Operation, Pace

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
_JSON: Headers = ((b"Content-Type", b"application/json"),)
_KEPT = (b"content-type", b"retry-after")  # of what RunPod says where it takes no job
_TELLS = 1.0  # s for RunPod to say what a stream took
_LONG = 0.5  # s in the queue, as it looks from here; RunPod's own count decides
_NO_STREAM = "Stream not supported"  # the SDK's local server, of a handler that yields nothing


class Queue:
    """The transport of every queue endpoint of this process."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._endpoints: dict[str, Endpoint] = {}
        self._stopping: set[asyncio.Task[None]] = set()  # they outlive their requests

    async def carry(
        self,
        url: str,
        headers: dict[str, str],
        backend: Backend,
        submission: Submission,
        reply: Reply,
        session: aiohttp.ClientSession,
    ) -> None:
        """See `contracts.Carries`; `url` is the endpoint's, `headers` go with each call to it."""
        reply.billed(0.0)  # nothing has gone out
        try:
            body = body_of(backend, submission, self._clock())
        except ValueError as exc:
            problem = f"the body must be a JSON object: {exc}"
            _say(reply, 400, _JSON, _bad_request(submission.dialect, problem))
            return
        endpoint = self._endpoint(url)
        call = Call(endpoint, headers, session)
        endpoint.calls += 1
        try:
            bill = Bill(endpoint, reply, self._clock)
            await _bring(call, submission, body, reply, bill)
        finally:  # the client left, a limit ran out, or worse: nothing may run on
            if call.at_risk is None:
                endpoint.calls -= 1
            else:
                await self._stop(endpoint, call, reply)

    def learn(self, url: str, check: Check) -> None:
        """Take what a check found out of the endpoint's workers."""
        self._endpoint(url).note(check)

    def _endpoint(self, url: str) -> Endpoint:
        found = self._endpoints.get(url)
        if found is None:  # rows come and go: the others are looked through now and then
            for other in [each for each in self._endpoints.values() if each.idle]:
                del self._endpoints[other.url]
            found = self._endpoints[url] = Endpoint(url, self._clock)
        return found

    async def _stop(self, endpoint: Endpoint, call: Call, reply: Reply) -> None:
        """Wait until the job is stopped; it goes on being stopped where this is cancelled.

        That is so after `CLEAN_UP`, also when the process stops, and then is the time to tell.
        """
        told = False

        async def stop() -> None:
            try:
                left = await call.stop()
            finally:
                endpoint.calls -= 1
            if left is not None and not told:
                reply.left_behind(left)

        task = asyncio.create_task(stop(), name="runpod stop")
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done() and (left := call.at_risk) is not None:
                told = True
                reply.left_behind(left)
            raise


async def _bring(call: Call, submission: Submission, body: bytes, reply: Reply, bill: Bill) -> None:
    """Put the whole answer into `reply`, whichever it is."""
    stream = _Streaming(call, submission, reply, bill) if is_stream(submission) else None
    try:
        if stream is not None:
            await stream.run(body)
        else:
            await _document(call, submission, body, reply, bill)
    except Refused as exc:
        if not exc.taken:
            bill.refused()
        _refuse(reply, exc)
    except Failed as exc:
        failure = exc.failure
        if failure.status and (stream is None or not stream.begun):
            said = failure.body or _bad_request(submission.dialect, failure.detail)
            _say(reply, failure.status, _JSON, said)
        else:
            reply.fail(failure.fault, failure.detail)
    except NoAnswer as exc:
        reply.fail(Fault.MALFORMED, str(exc))


async def _document(
    call: Call, submission: Submission, body: bytes, reply: Reply, bill: Bill
) -> None:
    job = await _result(call, await call.submit(Operation.RUNSYNC, body, bill.sent), reply, bill)
    output = job.output
    if output in (None, []):  # a generator whose pieces the worker does not put together
        job = await call.last_look()
        output = list(job.pieces)
        if failure := error_in(output):
            raise Failed(failure)
        if not output:
            raise Failed(_EMPTY)
    _say(reply, 200, _JSON, await _aside(job, lambda: document_of(submission, output)))


async def _aside(job: Job, work: Callable[[], T]) -> T:
    """Do what takes long for a large output in a thread, for the sake of the other requests."""
    return await asyncio.to_thread(work) if job.large else work()


async def _result(call: Call, job: Job, reply: Reply, bill: Bill) -> Job:
    """Look at the job until it has completed. Raises Failed where it ends otherwise."""
    pace = Pace()
    bill.note(job)
    while not job.final:
        if job.queued:
            reply.waking()
        await asyncio.sleep(pace.next(queued=job.queued))
        before = job.status
        with bill.looking():
            job = await call.look(Operation.STATUS)
        bill.note(job)
        if job.status != before:
            pace.news()
    if failure := await _aside(job, job.failure):
        raise Failed(failure)
    return job


class _Streaming:
    """One stream: the head goes out with the first piece, so that an error before has a status."""

    def __init__(self, call: Call, submission: Submission, reply: Reply, bill: Bill) -> None:
        self._call = call
        self._bill = bill
        self._reply = reply
        self._made = stream_for(submission)
        self._clock = asyncio.get_running_loop().time
        self.begun = False

    async def run(self, body: bytes) -> None:
        reply, pace, completed = self._reply, Pace(), False
        before = await self._call.submit(Operation.RUN, body, self._bill.sent)
        self._bill.note(before)
        if failure := before.failure():
            raise Failed(failure)
        waits_since = self._clock() if before.queued else None
        while not self._made.ended:
            await reply.room()
            await asyncio.sleep(pace.next(queued=before.queued))
            with self._bill.looking():
                job = await self._look(completed)
            if not completed:
                self._bill.note(job)
            if job.queued:
                reply.waking()
            elif waits_since is not None:
                if self._clock() - waits_since >= _LONG:
                    await self._tell_bill()  # the start: `/status` says it, `/stream` does not
                waits_since = None
            if _has_no_stream(job) and not self.begun:
                status = await self._call.look(Operation.STATUS)
                self._put_whole(await _result(self._call, status, reply, self._bill))
                break
            self._put(job.pieces)
            if failure := job.failure():
                raise Failed(failure)
            if job.pieces or job.status != before.status:
                pace.news()
            if completed and not job.pieces:
                if not self.begun:
                    self._put_whole(await self._call.look(Operation.STATUS))
                break
            completed = completed or job.final
            before = job
        self._call.answered = True
        reply.piece(self._made.finish())
        if self._call.over:
            with suppress(TimeoutError):
                async with asyncio.timeout(_TELLS):  # the client has all but the end of it
                    await self._tell_bill()
        reply.end()

    async def _look(self, completed: bool) -> Job:
        """What came since the last look.

        After the job has completed there is one more: the last pieces may have come between two
        questions, and the SDK's client asks until nothing comes, too. `/stream` does not say why a
        job failed, nor how long it ran; `/status` does.
        """
        if completed:
            return replace(await self._call.last_look(), status="COMPLETED")
        job = await self._call.look(Operation.STREAM)
        if job.final and job.status != "COMPLETED" and not job.error:
            told = await self._call.glance(Operation.STATUS)
            return replace(told, pieces=job.pieces) if told is not None and told.final else job
        if job.status:
            return job
        if job.pieces:  # the bare list says nothing of the job
            return Job(status="IN_PROGRESS", pieces=job.pieces)
        return await self._call.look(Operation.STATUS)

    async def _tell_bill(self) -> None:
        job = await self._call.glance(Operation.STATUS)
        if job is not None and job.failure() is None:
            self._bill.note(job)

    def _put(self, pieces: tuple[Any, ...]) -> None:
        if failure := error_in(list(pieces)):
            raise Failed(failure)
        data = b"".join(map(self._made.feed, pieces))
        if data and not self.begun:
            self.begun = True
            self._reply.head(200, self._made.headers)
        self._reply.piece(data)

    def _put_whole(self, job: Job) -> None:
        """The output of a job that yielded nothing on its way."""
        if failure := job.failure():
            raise Failed(failure)
        items = job.output if isinstance(job.output, list) else [job.output]
        self._put(tuple(item for item in items if item is not None))
        if not self.begun:
            raise Failed(_EMPTY)


_EMPTY = Failure(Fault.EMPTY, "the job completed without an output")


def _has_no_stream(job: Job) -> bool:
    return job.status == "FAILED" and isinstance(job.error, str) and _NO_STREAM in job.error


def _refuse(reply: Reply, refused: Refused) -> None:
    """RunPod's own word instead of a job: no such endpoint, too many requests, a key it refuses."""
    status = refused.status
    if status == 404:
        reply.fail(Fault.GONE, "RunPod knows no such endpoint")
    elif status < 400:
        reply.fail(Fault.STATUS, f"RunPod redirects ({status}); is the url the right one?")
    else:
        kept = tuple(pair for pair in refused.headers if pair[0].lower() in _KEPT)
        _say(reply, status, kept, refused.body)


def _say(reply: Reply, status: int, headers: Headers, body: bytes) -> None:
    reply.head(status, headers)
    reply.piece(body)
    reply.end()


def _bad_request(dialect: Dialect, problem: str) -> bytes:
    error: dict[str, Any] = {"message": problem, "type": "invalid_request_error"}
    if dialect is Dialect.ANTHROPIC:
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": {**error, "param": None, "code": None}}).encode()
