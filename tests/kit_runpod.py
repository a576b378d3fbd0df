"""A stand-in of RunPod's control plane for queue endpoints: nothing here is RunPod's own.

Towards clients it is the API that RunPod documents (`/run`, `/runsync`, `/status`, `/stream`,
`/cancel`, `/health`); towards workers it speaks what the SDK's real worker loop asks for
(`job-take`, `job-stop`, `job-stream`, `job-done`, `ping`), as recorded from runpod 1.12.0. A test
may play the worker itself instead, by the methods of `Job`, and say what the control plane answers
next. The `runpod` client SDK checks the former half (tests/test_runpod_real.py).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from .kit_proxy import closed_port

ENDPOINT = "ep"
KEY = "rpa_test"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_HOLD = 30.0  # s that a worker's question is held; the SDK gives up after 90


class News:
    """Wakes everybody who waits by then; an event that one of them clears would not."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Until there is news, or `seconds` have passed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)


@dataclass
class Call:
    """One request of a client of the API."""

    operation: str
    id: str
    at: float  # monotonic s
    method: str
    body: Any
    query: str
    authorization: str


@dataclass
class Job:
    """A job, and the worker's side of it for a test that plays the worker."""

    id: str
    input: Any
    policy: Any
    body: bytes
    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    pieces: list[Any] = field(default_factory=list)
    unread: deque[Any] = field(default_factory=deque)
    yielded_at: list[float] = field(default_factory=list)  # monotonic s
    created: float = field(default_factory=time.monotonic)
    delay: int = 0  # ms
    started: float | None = None  # monotonic s
    ran: Any = None  # ms, as the control plane tells it once the job is over; None: as it took
    cancelled_at: float | None = None  # monotonic s
    news: News = field(default_factory=News)

    def start(self, delay: int = 0) -> None:
        self.status, self.delay, self.started = "IN_PROGRESS", delay, time.monotonic()
        self.news.tell()

    def say(self, *pieces: Any) -> None:
        """Yield, as a generator does."""
        for piece in pieces:
            self.pieces.append(piece)
            self.unread.append(piece)
            self.yielded_at.append(time.monotonic())
        self.news.tell()

    def end(self, output: Any = None, *, error: Any = None, status: str | None = None) -> None:
        self.status = status or ("FAILED" if error is not None else "COMPLETED")
        self.output, self.error = output, error
        if self.ran is None:
            began = time.monotonic() if self.started is None else self.started
            self.ran = int((time.monotonic() - began) * 1000)
        self.news.tell()

    @property
    def final(self) -> bool:
        return self.status in FINAL

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.status != "IN_QUEUE":
            document["delayTime"] = self.delay
        if self.final:
            document["executionTime"] = self.ran
            document["workerId"] = "worker-1"
        if self.status == "COMPLETED" and self.output is not None:
            document["output"] = self.output
        if self.error is not None:
            document["error"] = self.error
        return document


Play = Callable[[Job], Awaitable[None]]
Canned = tuple[int, dict[str, str], bytes]


class ControlPlane:
    """See the module's docstring.

    Attributes:
        calls: what clients of the API asked, in order.
        jobs: by id, oldest first.
        play: is run for each new job, where no real worker is to take it.
        canned: answers that come instead of the next ones, by operation.
        meanwhile: what happens to the job just before the next answer, by operation.
        bare: `/stream` answers with the list alone, as the documentation prints it.
        workers, queued: what `/health` counts; None: by the jobs.
        taken, stopped: ids that real workers took, and were told to stop.
    """

    def __init__(self, play: Play | None = None) -> None:
        self.calls: list[Call] = []
        self.jobs: dict[str, Job] = {}
        self.play = play
        self.canned: dict[str, deque[Canned]] = {}
        self.meanwhile: dict[str, Callable[[Job], None]] = {}
        self.bare = False
        self.hold: asyncio.Event | None = None  # submissions are taken, and not answered until set
        self.workers: dict[str, int] | None = None
        self.taken: list[str] = []
        self.stopped: list[str] = []
        self.pings = 0
        self.port = 0
        self._numbers = itertools.count(1)
        self._waiting: deque[Job] = deque()
        self._stops: deque[str] = deque()
        self._news = News()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._closing = False

    @property
    def url(self) -> str:
        return f"{self.base}/{ENDPOINT}"

    @property
    def odd(self) -> str:
        """The same endpoint below a path that tells nothing."""
        return f"http://127.0.0.1:{self.port}/odd/{ENDPOINT}"

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}/v2"

    @property
    def last(self) -> Job:
        return next(reversed(self.jobs.values()))

    def count(self, operation: str) -> int:
        return sum(call.operation == operation for call in self.calls)

    def answers(
        self, operation: str, status: int, body: Any = b"", times: int = 1, **headers: str
    ) -> None:
        """Let the next answers to `operation` be these; `Retry_After` is a header's name."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.canned.setdefault(operation, deque()).extend([(status, fields, raw)] * times)

    # -- running ---------------------------------------------------------------------------------

    async def start(self) -> None:
        app = web.Application(client_max_size=32 << 20)
        for base in (f"/v2/{ENDPOINT}", f"/odd/{ENDPOINT}"):
            self._add_routes(app, base)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _add_routes(self, app: web.Application, base: str) -> None:
        app.router.add_post(f"{base}/openai/{{path:.*}}", self._no_route)
        app.router.add_post(f"{base}/run", self._run)
        app.router.add_post(f"{base}/runsync", self._runsync)
        app.router.add_get(f"{base}/status/{{id}}", self._status)
        app.router.add_get(f"{base}/stream/{{id}}", self._stream)
        app.router.add_post(f"{base}/cancel/{{id}}", self._cancel)
        app.router.add_get(f"{base}/health", self._health)
        app.router.add_get(f"{base}/job-take/{{worker}}", self._take)
        app.router.add_get(f"{base}/job-take-batch/{{worker}}", self._take)
        app.router.add_get(f"{base}/job-stop/{{worker}}", self._stop)
        app.router.add_post(f"{base}/job-stream/{{worker}}/{{id}}", self._streamed)
        app.router.add_post(f"{base}/job-done/{{worker}}/{{id}}", self._done)
        app.router.add_get(f"{base}/ping/{{worker}}", self._ping)

    async def stop(self) -> None:
        self._closing = True
        self._news.tell()
        for task in self._tasks:
            task.cancel()
        await asyncio.sleep(0.01)  # workers' questions that are held get their empty answers
        if self._runner is not None:
            await self._runner.cleanup()

    # -- the clients' side -----------------------------------------------------------------------

    async def _called(self, request: web.Request, operation: str) -> web.Response | None:
        """Note a call; the answer where it is a canned one or a refusal."""
        raw = await request.read()
        body = json.loads(raw) if raw else None
        authorization = request.headers.get("Authorization", "")
        identity = request.match_info.get("id", "")
        query = request.query_string
        call = Call(
            operation, identity, time.monotonic(), request.method, body, query, authorization
        )
        self.calls.append(call)
        if canned := self.canned.get(operation):
            status, headers, said = canned.popleft()
            return web.Response(status=status, headers=headers, body=said)
        if authorization.removeprefix("Bearer ") != KEY:
            return web.Response(status=401)
        return None

    async def _submitted(self, request: web.Request, operation: str) -> Job | web.Response:
        if (refusal := await self._called(request, operation)) is not None:
            return refusal
        call = self.calls[-1]
        if not isinstance(call.body, dict) or not isinstance(call.body.get("input"), dict):
            return web.json_response({"error": "input is required"}, status=400)
        number = next(self._numbers)
        identity = f"sync-{number}-u1" if operation == "runsync" else f"job-{number}-u1"
        raw = await request.read()
        job = Job(identity, call.body["input"], call.body.get("policy"), raw)
        self.jobs[identity] = job
        if self.play is not None:
            task = asyncio.create_task(self._played(job, self.play), name=identity)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting.append(job)
            self._news.tell()
        if self.hold is not None:
            await self.hold.wait()
        return job

    async def _played(self, job: Job, play: Play) -> None:
        await play(job)

    async def _run(self, request: web.Request) -> web.Response:
        job = await self._submitted(request, "run")
        if isinstance(job, web.Response):
            return job
        return web.json_response({"id": job.id, "status": "IN_QUEUE"})

    async def _runsync(self, request: web.Request) -> web.Response:
        job = await self._submitted(request, "runsync")
        if isinstance(job, web.Response):
            return job
        wait = int(request.query.get("wait", "90000"))
        if not 1000 <= wait <= 300_000:
            return web.json_response({"error": "wait"}, status=400)
        end = time.monotonic() + wait / 1000
        while not job.final and (left := end - time.monotonic()) > 0:
            await job.news.wait(left)
        return web.json_response(job.document())

    async def _job(self, request: web.Request, operation: str) -> Job | web.Response:
        if (refusal := await self._called(request, operation)) is not None:
            return refusal
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.json_response({"error": "not found"}, status=404)
        if operation in self.meanwhile:
            self.meanwhile.pop(operation)(job)
        return job

    async def _status(self, request: web.Request) -> web.Response:
        job = await self._job(request, "status")
        return job if isinstance(job, web.Response) else web.json_response(job.document())

    async def _stream(self, request: web.Request) -> web.Response:
        job = await self._job(request, "stream")
        if isinstance(job, web.Response):
            return job
        pieces = [{"output": piece} for piece in job.unread]
        job.unread.clear()
        if self.bare:
            return web.json_response([{"metrics": {}, **piece} for piece in pieces])
        return web.json_response({"status": job.status, "stream": pieces})

    async def _cancel(self, request: web.Request) -> web.Response:
        job = await self._job(request, "cancel")
        if isinstance(job, web.Response):
            return job
        if not job.final:
            job.cancelled_at = time.monotonic()
            job.end(status="CANCELLED")
            if job in self._waiting:
                self._waiting.remove(job)
            if job.id in self.taken:
                self._stops.append(job.id)
                self._news.tell()
        return web.json_response({"id": job.id, "status": job.status})

    async def _health(self, request: web.Request) -> web.Response:
        if (refusal := await self._called(request, "health")) is not None:
            return refusal
        states = [job.status for job in self.jobs.values()]
        jobs = {
            "completed": states.count("COMPLETED"),
            "failed": states.count("FAILED"),
            "inProgress": states.count("IN_PROGRESS"),
            "inQueue": states.count("IN_QUEUE"),
            "retried": 0,
        }
        usual = {"idle": 0, "initializing": 0, "ready": 0, "running": 1, "throttled": 0}
        workers = {**usual, "unhealthy": 0} if self.workers is None else self.workers
        return web.json_response({"jobs": jobs, "workers": workers})

    async def _no_route(self, request: web.Request) -> web.Response:
        """As FastAPI answers, and with it the SDK's local server: there is no OpenAI route."""
        return web.json_response({"detail": "Not Found"}, status=404)

    # -- the workers' side -----------------------------------------------------------------------

    async def _held(self, something: Callable[[], object]) -> bool:
        """Hold a worker's question until there is something, but not for long."""
        end = time.monotonic() + _HOLD
        while not something():
            if self._closing or (left := end - time.monotonic()) <= 0:
                return False
            await self._news.wait(left)
        return True

    async def _take(self, request: web.Request) -> web.Response:
        if not await self._held(lambda: self._waiting):
            return web.Response(status=204)
        batch = "job-take-batch" in request.path
        most = int(request.query.get("batch_size", "1"))
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        for job in taken:
            job.start(int((time.monotonic() - job.created) * 1000))
            self.taken.append(job.id)
        rows = [{"id": job.id, "input": job.input} for job in taken]
        return web.json_response(rows if batch else rows[0])

    async def _stop(self, request: web.Request) -> web.Response:
        await self._held(lambda: self._stops)
        told = list(self._stops)
        self._stops.clear()
        self.stopped += told
        return web.json_response({"jobsToStop": told})

    async def _streamed(self, request: web.Request) -> web.Response:
        said = json.loads(await request.read())
        job = self.jobs[request.match_info["id"]]
        if not job.final:
            job.say(said["output"])
        return web.json_response({})

    async def _done(self, request: web.Request) -> web.Response:
        said = json.loads(await request.read())
        job = self.jobs[request.match_info["id"]]
        if not job.final:
            job.end(said.get("output"), error=said.get("error"))
        return web.json_response({})

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings += 1
        return web.json_response({})


@asynccontextmanager
async def control_plane(play: Play | None = None) -> AsyncIterator[ControlPlane]:
    """One in the test's own loop, for a test that plays the worker."""
    control = ControlPlane(play)
    await control.start()
    try:
        yield control
    finally:
        await control.stop()


@contextmanager
def control_plane_beside() -> Iterator[ControlPlane]:
    """One in a thread of its own, for real workers and clients that outlive one test's loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="control plane", daemon=True)
    thread.start()

    async def made() -> ControlPlane:
        control = ControlPlane()
        await control.start()
        return control

    control = asyncio.run_coroutine_threadsafe(made(), loop).result(10)
    try:
        yield control
    finally:
        asyncio.run_coroutine_threadsafe(control.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def queue_row(control: ControlPlane, **more: Any) -> dict[str, Any]:
    """The row of beacon.yaml for it."""
    url = control.url
    return {"url": url, "provider": "runpod", "kind": "queue", "api_key": KEY, **more}


# -- the SDK's own parts, in processes of their own ----------------------------------------------

WORKER = Path(__file__).with_name("runpod_worker.py")
STARTS = 60.0  # s, a fresh interpreter with the SDK on a busy machine


def parts_python() -> str:
    """The interpreter that has the SDK."""
    path = Path(sys.prefix, "parts", "bin", "python")
    if not path.exists():
        missing = f"the parts of the tests are not installed: {path}"
        pytest.fail(missing) if os.environ.get("BEACON_CI") else pytest.skip(missing)
    return str(path)


@contextmanager
def worker(
    home: Path, server: str, *args: str, control: ControlPlane | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The handler in the SDK's own hands; its ping runs in a process beside it."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "SERVER_URL": server,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",  # else it dials 8.8.8.8
        "RUNPOD_DEBUG_LEVEL": "ERROR",
    }
    if control is not None:
        at = f"{control.base}/{ENDPOINT}"
        env |= {
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_POD_ID": "worker-1",
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_WEBHOOK_GET_JOB": f"{at}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{at}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{at}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{at}/ping/$RUNPOD_POD_ID",
        }
    log = home / "worker.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [parts_python(), str(WORKER), *args],
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def local_server(home: Path, server: str, *args: str) -> Iterator[str]:
    with ExitStack() as stack:
        port = stack.enter_context(closed_port())  # held until the server has it: uvicorn reuses it
        options = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
        process = stack.enter_context(worker(home, server, *args, *options))
        end = time.monotonic() + STARTS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (home / "worker.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
