"""A small Conveyor for the tests: the API of README.md, with a worker that says what it is told to.

No such service exists; a provider's own tests would play what was recorded of the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN = "t-1"


@dataclass
class Job:
    id: str
    asked: dict[str, Any]
    state: str = "waiting"  # starting | running | done | failed | cancelled
    text: list[str] = field(default_factory=list)
    message: str | None = None
    started_after: float | None = None  # s, where a worker had to start
    told: set[str] = field(default_factory=set)  # states that somebody has been told
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def tell(self, state: str, *words: str, message: str | None = None) -> None:
        async with self.changed:
            if self.state != "cancelled":
                self.state, self.message = state, message
                self.text += words
            self.changed.notify_all()

    def news(self, seen: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "state": self.state,
            "text": self.text[seen:],
            "message": self.message,
            "started_after": self.started_after,
            "tokens": {"input": 5, "output": len(self.text)},
        }


class Service:
    """The service and its one worker.

    Attributes:
        words: what the worker says to each job.
        held: it stops after the first word until this is set.
        refusal: what new jobs are answered instead of 201, if anything.
        failure: what a job ends with instead of `done`, if anything.
        cold: s that a job is told to have waited for a worker.
    """

    def __init__(self) -> None:
        self.words = ["hel", "lo"]
        self.held: asyncio.Event | None = None
        self.refusal: web.Response | None = None
        self.failure: str | None = None
        self.cold: float | None = None
        self.jobs: dict[str, Job] = {}
        self.workers: list[asyncio.Task[None]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/status", self._status),
                web.post("/jobs", self._leave),
                web.get("/jobs/{id}", self._news),
                web.delete("/jobs/{id}", self._take_back),
            ]
        )
        return app

    async def _status(self, request: web.Request) -> web.Response:
        workers = {"busy": 0, "idle": 0, "asleep": 1} if self.cold else {"busy": 0, "idle": 1}
        said = {"models": ["m"], "workers": {"asleep": 0, **workers}, "waiting": 0}
        return web.json_response(said)

    async def _leave(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"message": "who are you?"}, status=401)
        if self.refusal is not None:
            return self.refusal
        job = Job(f"j-{len(self.jobs) + 1}", await request.json())
        self.jobs[job.id] = job
        self.workers.append(asyncio.create_task(self._work(job)))
        return web.json_response({"id": job.id, "state": job.state}, status=201)

    async def _work(self, job: Job) -> None:
        if self.cold:
            await job.tell("starting")
            async with job.changed:  # a start takes longer than the way of the question
                await job.changed.wait_for(lambda: "starting" in job.told)
            job.started_after = self.cold
        for number, word in enumerate(self.words):
            await job.tell("running", word)
            if number == 0 and self.held is not None:
                await self.held.wait()
        await job.tell("failed" if self.failure else "done", message=self.failure)

    async def _news(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.json_response({"message": "no such job"}, status=404)
        seen, known = int(request.query["after"]), request.query["state"]
        async with job.changed:
            try:
                async with asyncio.timeout(float(request.query["wait"])):
                    await job.changed.wait_for(lambda: len(job.text) > seen or job.state != known)
            except TimeoutError:
                pass
            job.told.add(job.state)
            job.changed.notify_all()
            return web.json_response(job.news(seen))

    async def _take_back(self, request: web.Request) -> web.Response:
        await self.jobs[request.match_info["id"]].tell("cancelled", message="taken back")
        return web.Response(status=204)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Service, str]]:
    """A service on 127.0.0.1, and its URL."""
    service = Service()
    runner = web.AppRunner(service.app(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield service, f"http://127.0.0.1:{port}"
    finally:
        for worker in service.workers:
            worker.cancel()
        await asyncio.gather(*service.workers, return_exceptions=True)
        await runner.cleanup()
