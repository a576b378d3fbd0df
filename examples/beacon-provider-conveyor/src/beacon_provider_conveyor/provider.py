"""Conveyor: a made-up job service, such as many GPU clouds offer.

A request is left as a job, its text is fetched in pieces, a job that nobody wants is taken back;
README.md has the API. The core cannot speak that by itself, so this provider carries each request
there (`contracts.Carries`). Whatever a client may notice is the core's affair: when an answer is
passed on, when another backend is asked, what a broken stream looks like.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from math import inf
from typing import Any

import aiohttp

from beacon_proxy.contracts import (
    Backend,
    Call,
    Capacity,
    Check,
    Dialect,
    Exchange,
    Fault,
    Headers,
    Prompt,
    Provider,
    Reading,
    Reply,
    Submission,
    Usage,
    Verdict,
    Warmth,
)

from .answers import Lines, Voice, chat_voice
from .desk import Desk

CHAT = "/v1/chat/completions"
JSON = (b"Content-Type", b"application/json")


class Conveyor(Provider):
    """The provider `conveyor`."""

    name = "conveyor"
    price_per_second = 0.0002  # USD
    pool = "burst"
    environment = ("CONVEYOR_URL", "CONVEYOR_TOKEN")
    cold_start = 120.0  # s that a worker may take to start
    stays_warm = 60.0  # s after an answer that it surely still runs

    # -- what a configuration means

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        url, token = (env.get(name, "").strip() for name in self.environment)
        if not url:
            return []
        row = {"name": f"conveyor-{region}", "url": url, "region": region}
        return [row | ({"api_key": token} if token else {})]

    def problem(self, backend: Backend) -> str | None:
        return None if backend.api_key else "api_key: conveyor takes no job without a token"

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        return Fault.UNAUTHORIZED if status == 401 else None  # the key is ours, not the client's

    # -- what is free to ask

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        status, said = await Desk(backend, session).status()
        if status != 200:
            return Check(Verdict.STRIKE, fault=Fault.STATUS, detail=f"/status says {status}")
        workers = said["workers"]
        capacity = Capacity(
            running=workers["busy"] + workers["idle"],
            idle=workers["asleep"],
            queued=said["waiting"],
            room=workers["idle"],
        )
        warmth = Warmth.WARM if capacity.running else Warmth.COLD
        models = tuple(said["models"])
        return Check(Verdict.GOOD, models=models, capacity=capacity, warmth=warmth)

    # -- a request, there and back

    def takes(self, backend: Backend, exchange: Exchange) -> bool:
        return exchange.prompt is not None or (exchange.method, exchange.path) == ("POST", CHAT)

    def carries(self, backend: Backend) -> bool:
        return True

    async def carry(
        self,
        backend: Backend,
        submission: Submission,
        reply: Reply,
        session: aiohttp.ClientSession,
    ) -> None:
        prompt = submission.prompt
        try:
            chat = json.loads(self.ask(backend, prompt).body if prompt else submission.body)
            job = _job(chat, submission)
        except (ValueError, KeyError, TypeError):
            _refuse(reply, 400, "not a chat request")  # the client's mistake, not the backend's
            return
        desk = Desk(backend, session)
        reply.billed(0.0)  # Conveyor charges for no job that it does not take
        leaving = asyncio.ensure_future(desk.leave(job))
        try:
            # Shielded: a job whose id is lost on its way back could not be taken back.
            status, said, wait = await asyncio.shield(leaving)
            if status != 201:
                _refuse(reply, status, str(said.get("message")), wait)
                return
            reply.billed(0.0, running=True)
            voice = Lines(said["id"]) if prompt else chat_voice(said["id"], chat)
            await self._bring(desk, said, voice, submission.stream, reply)
        except (asyncio.CancelledError, aiohttp.ClientError, TimeoutError):
            _, said, _ = await leaving
            await desk.take_back(said.get("id"))
            raise

    async def _bring(
        self, desk: Desk, news: dict[str, Any], voice: Voice, stream: bool, reply: Reply
    ) -> None:
        """Fetch a job's text piece by piece until it has ended; `news` are the first of it."""
        said: list[str] = []
        while True:
            news = await desk.news(news["id"], len(said), news["state"])
            if news["state"] == "starting":
                reply.waking()
            if not said and news["started_after"]:
                reply.started_cold(news["started_after"])
            if news["state"] in ("failed", "cancelled"):
                _fail(reply, stream and said, str(news["message"]))
                return
            if stream and not said and (news["text"] or news["state"] == "done"):
                reply.head(200, ((b"Content-Type", voice.stream_type),))
            said += news["text"]
            if stream:
                for text in news["text"]:
                    reply.piece(voice.piece(text))
            if news["state"] == "done":
                break
            await reply.room()  # while the client takes nothing, nothing more is fetched
        if not stream:
            reply.head(200, (JSON,))
        tokens = news["tokens"]
        reply.piece(voice.last(tokens) if stream else voice.document("".join(said), tokens))
        reply.end()

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        chat = {
            "model": prompt.model,
            "messages": [{"role": "user", "content": prompt.prompt}],
            "temperature": prompt.temperature,
            "max_tokens": prompt.max_tokens,
        }
        return Call(CHAT.encode(), json.dumps(chat).encode(), Dialect.OPENAI)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        tokens = document.get("tokens")
        usage = Usage(tokens["input"], tokens["output"]) if tokens else None
        extra = {"job_id": document["job"]} if "job" in document else {}
        return Reading(document["response"], document["done"], usage, None, extra)


def _job(chat: dict[str, Any], submission: Submission) -> dict[str, Any]:
    job = {"model": chat["model"], "messages": chat["messages"]}
    job |= {name: chat[name] for name in ("temperature", "max_tokens") if name in chat}
    if submission.deadline < inf:  # a job that waits longer than its client is for nobody
        job["expires_in"] = max(submission.deadline - time.monotonic(), 0.0)
    return job


def _refuse(reply: Reply, status: int, message: str, wait: str | None = None) -> None:
    """An answer as HTTP would have brought it: the core goes by its status and its Retry-After."""
    fields = (JSON, (b"Retry-After", wait.encode())) if wait else (JSON,)
    reply.head(status, fields)
    reply.piece(json.dumps({"error": {"message": message, "code": status}}).encode())
    reply.end()


def _fail(reply: Reply, begun: object, message: str) -> None:
    if begun:
        reply.fail(Fault.ERROR_BODY, message)
    else:
        _refuse(reply, 500, message)
