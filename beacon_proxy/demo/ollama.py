"""Ollama's voice for the demo's backends: real tokens, in the NDJSON that Ollama's clients read.

llama.cpp's server speaks OpenAI and Anthropic, but has no `/api/*`. In front of it stands this
small server, which asks llama.cpp for a chat and tells the answer as Ollama would. It knows text
with the common options; tools and images it refuses. Every other path goes to llama.cpp and back as
it came. It is a prop of the demo and of the tests: the proxy itself translates none of this.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from ..contracts import canonical_model

Line = dict[str, Any]
_OPTIONS = {"num_predict": "max_tokens"} | {
    name: name for name in ("temperature", "seed", "top_p", "top_k", "min_p", "stop")
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
_AUTO = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # aiohttp would invent them


class _Refused(Exception):
    """An answer that is an error: (status, message)."""


class Ollama:
    """The routes, in front of one llama.cpp server."""

    def __init__(self, llama: str, names: Sequence[str], session: aiohttp.ClientSession) -> None:
        self.llama, self.names, self.session = llama, names, session

    def routes(self) -> list[web.RouteDef]:
        return [
            web.head("/", self.alive),
            web.get("/api/version", self.version),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.tags),
            web.post("/api/chat", self.chat),
            web.post("/api/generate", self.chat),
            web.route("*", "/{path:.*}", self.forward),
        ]

    async def alive(self, request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.0-llama.cpp"})

    async def tags(self, request: web.Request) -> web.Response:
        details = {"format": "gguf", "family": "llama", "parameter_size": "135M"}
        row = {"name": self.names[0], "model": self.names[0], "details": details}
        return web.json_response({"models": [row]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`/api/chat` and `/api/generate`; they differ in where the prompt and the text stand."""
        try:
            body = json.loads(await request.read())
            question = self.question(body, generate=request.path == "/api/generate")
            async with aclosing(self.lines(body, question)) as lines:
                first = await anext(lines)
                if "error" in first or not body.get("stream", True):
                    return web.json_response(first, status=500 if "error" in first else 200)
                answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                await answer.prepare(request)
                await answer.write(json.dumps(first).encode() + b"\n")
                async for line in lines:
                    await answer.write(json.dumps(line).encode() + b"\n")
                return answer
        except json.JSONDecodeError as error:
            return web.json_response({"error": f"invalid JSON: {error}"}, status=400)
        except _Refused as refusal:
            status, message = refusal.args
            return web.json_response({"error": message}, status=status)

    def question(self, body: Line, *, generate: bool) -> Line:
        """Say the same request in llama.cpp's words."""
        name = body.get("model") if isinstance(body, dict) else None
        if canonical_model(str(name)) not in map(canonical_model, self.names):
            raise _Refused(404, f'model "{name}" not found, try pulling it first')
        messages = body.get("messages") or []
        if generate:
            turns = (("system", body.get("system")), ("user", body.get("prompt")))
            messages = [{"role": role, "content": text} for role, text in turns if text]
        if body.get("tools") or body.get("images") or any(m.get("images") for m in messages):
            raise _Refused(400, "this demo backend answers text only: no tools, no images")
        options = body.get("options") or {}
        known = {_OPTIONS[key]: value for key, value in options.items() if key in _OPTIONS}
        return {"model": name, "messages": messages, "stream": True, **known}

    async def lines(self, body: Line, question: Line) -> AsyncGenerator[Line, None]:
        """Yield the answer's lines, last one `done: true`; only that one where no stream is asked.

        An error after the first line is a line of its own, and then there is no `done: true`.
        """
        started, held = time.monotonic_ns(), ""
        last: Line = {"finish_reason": "load"}  # no messages: a request to load the model, no more
        timings: dict[str, float] = {}

        def line(text: str, **more: Any) -> Line:
            said = {"message": {"role": "assistant", "content": text}}
            now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            return {
                "model": body["model"],
                "created_at": now,
                **(said if "messages" in body else {"response": text}),
                "done": False,
                **more,
            }

        async with aclosing(self.events(question)) as events:
            async for event in events:
                if "error" in event:
                    yield {"error": event["error"]["message"]}
                    return
                last, timings = event["choices"][0], event.get("timings", timings)
                held += last["delta"].get("content") or ""
                if held and body.get("stream", True):
                    yield line(held)
                    held = ""
        yield line(
            held,
            done=True,
            done_reason=last["finish_reason"],
            total_duration=time.monotonic_ns() - started,
            load_duration=0,
            prompt_eval_count=timings.get("prompt_n", 0) + timings.get("cache_n", 0),
            prompt_eval_duration=int(timings.get("prompt_ms", 0) * 1e6),
            eval_count=timings.get("predicted_n", 0),
            eval_duration=int(timings.get("predicted_ms", 0) * 1e6),
        )

    async def events(self, question: Line) -> AsyncGenerator[Line, None]:
        """Yield what llama.cpp streams for `question`; nothing where it has no message."""
        if not question["messages"]:
            return
        url = f"{self.llama}/v1/chat/completions"
        async with self.session.post(url, json=question) as answer:
            if answer.status != 200:
                raise _Refused(answer.status, (await answer.json())["error"]["message"])
            async for raw in answer.content:
                if raw.startswith(b"data: {"):
                    yield json.loads(raw.removeprefix(b"data: "))

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Everything else is llama.cpp's own."""
        async with self.session.request(
            request.method,
            self.llama + request.raw_path,
            headers=[(k, v) for k, v in request.headers.items() if k.lower() not in _HOP],
            data=await request.read() or None,
            skip_auto_headers=_AUTO,
        ) as upstream:
            answer = web.StreamResponse(status=upstream.status, reason=upstream.reason)
            for key, value in upstream.headers.items():
                if key.lower() not in _HOP:
                    answer.headers.add(key, value)
            await answer.prepare(request)
            async for piece in upstream.content.iter_any():
                await answer.write(piece)
            return answer


@asynccontextmanager
async def listen(llama: str, names: Sequence[str], port: int = 0) -> AsyncIterator[str]:
    """Serve on 127.0.0.1 and yield the URL; a client that leaves stops its tokens at once."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp closes idle ones early
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, auto_decompress=False
    ) as session:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(Ollama(llama, names, session).routes())
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
