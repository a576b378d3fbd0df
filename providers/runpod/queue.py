"""RunPod's queue API as a transport: a request becomes a job, the job's output the answer.

A document is `/runsync` with the shortest wait, then `/status`; a stream is `/run`, then `/stream`.
The long waits of `/runsync` are not used: until it answers nobody knows the job's id, and who does
not know it cannot cancel.
"""

from __future__ import annotations

import asyncio
import json
from time import monotonic
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Clock, Dialect, Fault, Headers, Reply, Submission

from .answer import NoAnswer, document_of
from .call import Call, Endpoint, Failed, Refused
from .events import is_stream, stream_for
from .input import body_of
from .job import Failure, Job, error_in
from .pace import Operation, Pace

if TYPE_CHECKING:
    import aiohttp

_JSON: Headers = ((b"Content-Type", b"application/json"),)
_KEPT = (b"content-type", b"retry-after")  # of what RunPod says where it takes no job
_NO_STREAM = "Stream not supported"  # the SDK's local server, of a handler that yields nothing


class Queue:
    """The transport of every queue endpoint of this process."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._endpoints: dict[str, Endpoint] = {}

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
        try:
            body = body_of(backend, submission, self._clock())
        except ValueError as exc:
            _say(reply, 400, _JSON, _bad_request(submission.dialect, str(exc)))
            return
        endpoint = self._endpoints.get(url)
        if endpoint is None:
            endpoint = self._endpoints[url] = Endpoint(url, self._clock)
        call = Call(endpoint, headers, session)
        try:
            await _bring(call, submission, body, reply)
        except BaseException:  # the client left, a limit ran out, or worse: nothing may run on
            await call.stop()
            raise
        await call.stop()


async def _bring(call: Call, submission: Submission, body: bytes, reply: Reply) -> None:
    """Put the whole answer into `reply`, whichever it is."""
    stream = _Streaming(call, submission, reply) if is_stream(submission) else None
    try:
        if stream is not None:
            await stream.run(body)
        else:
            await _document(call, submission, body, reply)
    except Refused as exc:
        _refuse(reply, exc)
    except Failed as exc:
        failure = exc.failure
        if failure.status and (stream is None or not stream.begun):
            _say(reply, failure.status, _JSON, failure.body)
        else:
            reply.fail(failure.fault, failure.detail)
    except NoAnswer as exc:
        reply.fail(Fault.MALFORMED, str(exc))


async def _document(call: Call, submission: Submission, body: bytes, reply: Reply) -> None:
    job = await _result(call, await call.submit(Operation.RUNSYNC, body), reply)
    output = job.output
    if output in (None, []):  # a generator whose pieces the worker does not put together
        output = list((await call.look(Operation.STREAM)).pieces)
        if failure := error_in(output):
            raise Failed(failure)
        if not output:
            raise Failed(_EMPTY)
    _say(reply, 200, _JSON, document_of(submission, output))


async def _result(call: Call, job: Job, reply: Reply) -> Job:
    """Look at the job until it has completed. Raises Failed where it ends otherwise."""
    pace = Pace()
    while not job.final:
        if job.queued:
            reply.waking()
        await asyncio.sleep(pace.next(queued=job.queued))
        before, job = job.status, await call.look(Operation.STATUS)
        if job.status != before:
            pace.news()
    _tell_start(job, reply)
    if failure := job.failure():
        raise Failed(failure)
    return job


class _Streaming:
    """One stream: the head goes out with the first piece, so that an error before has a status."""

    def __init__(self, call: Call, submission: Submission, reply: Reply) -> None:
        self._call = call
        self._reply = reply
        self._made = stream_for(submission)
        self.begun = False

    async def run(self, body: bytes) -> None:
        reply, pace, completed = self._reply, Pace(), False
        before = await self._call.submit(Operation.RUN, body)
        if failure := before.failure():
            raise Failed(failure)
        while not self._made.ended:
            await reply.room()
            await asyncio.sleep(pace.next(queued=before.queued))
            job = await self._look(completed)
            _tell_start(job, reply)
            if job.queued:
                reply.waking()
            if _has_no_stream(job) and not self.begun:
                status = await self._call.look(Operation.STATUS)
                self._put_whole(await _result(self._call, status, reply))
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
        self._call.over = True  # where the end marker has passed, nobody needs the job any more
        reply.piece(self._made.finish())
        reply.end()

    async def _look(self, completed: bool) -> Job:
        """What came since the last look.

        After the job has completed there is one more: the last pieces may have come between two
        questions, and the SDK's client asks until nothing comes, too. The SDK's local server has
        forgotten the job by then.
        """
        try:
            job = await self._call.look(Operation.STREAM)
        except Failed:
            if completed:
                return Job(status="COMPLETED")
            raise
        if completed:
            return Job(status="COMPLETED", pieces=job.pieces)
        if job.status:
            return job
        if job.pieces:  # the bare list says nothing of the job
            return Job(status="IN_PROGRESS", pieces=job.pieces)
        return await self._call.look(Operation.STATUS)

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


def _tell_start(job: Job, reply: Reply) -> None:
    if job.delay is not None:
        reply.started_cold(job.delay)


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
    message = f"the body must be a JSON object: {problem}"
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error"}
    if dialect is Dialect.ANTHROPIC:
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": {**error, "param": None, "code": None}}).encode()
