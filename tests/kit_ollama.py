"""Stand-ins behind Golem's backends: Ollama, and yagna's tunnel.

No Ollama is to be had from a package registry. `llmock` of `@copilotkit/aimock` (npm) is a real
server of another's making that speaks its NDJSON; it has neither `/api/version` nor `/api/ps`.
`Yagna` is our own and follows golemfactory/yagna, core/activity/src/http_proxy.rs.
PYTEST_DONT_REWRITE: the module is a plugin and is imported before pytest could rewrite its asserts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

SAID = "one two three four five six seven eight"
PIECES = 8  # of five characters each, 30 ms apart
_LLMOCK = Path(sys.prefix, "parts", "node_modules", ".bin", "llmock")


@pytest.fixture(scope="session")
def ollama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where an Ollama stand-in listens that answers every prompt with `SAID`."""
    if not _LLMOCK.exists():
        why = f"{_LLMOCK} is not installed (make parts)"
        pytest.fail(why) if os.environ.get("BEACON_CI") else pytest.skip(why)
    fixtures = tmp_path_factory.mktemp("llmock") / "fixtures.json"
    fixtures.write_text(json.dumps({"fixtures": [{"match": {}, "response": {"content": SAID}}]}))
    command = [_LLMOCK, "-p", "0", "-f", fixtures, "-c", "5", "-l", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        heard = []
        for line in process.stdout:
            heard.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail(f"llmock did not start: {''.join(heard)}")
        yield found[1]
    finally:
        process.kill()
        process.communicate()


STREAMED = ("text/event-stream", "application/octet-stream")
_DROPPED = ("host", "content-length", "connection", "accept-encoding")
_FRAMING = ("content-length", "transfer-encoding", "connection", "keep-alive", "date")


class Yagna:
    """The path `/activity-api/v1/activity/{id}/proxy-http/{url}` of a requestor's yagna.

    An answer is streamed, and its Content-Type replaced, where `Accept` is exactly one of two
    values; else it is collected whole and must be UTF-8. The query is lost. What it says itself is
    JSON with a `message`, as core/activity/src/error.rs has it.

    Attributes:
        accepts: the Accept of each request, in order.
    """

    APP_KEY = "app-key"
    ACTIVITY = "a1b2c3"

    def __init__(self, behind: str, session: aiohttp.ClientSession) -> None:
        self._behind, self._session = behind, session
        self.accepts: list[str] = []

    async def proxy_http(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.APP_KEY}":
            return web.json_response({"message": "Missing application key"}, status=401)
        if request.match_info["activity_id"] != self.ACTIVITY:
            return web.json_response({"message": "Not found: activity"}, status=404)
        accept = request.headers.get("Accept", "")
        self.accepts.append(accept)
        url = f"{self._behind}/{request.match_info['url']}"
        headers = {n: v for n, v in request.headers.items() if n.lower() not in _DROPPED}
        asked = self._session.request(
            request.method, url, headers=headers, data=await request.read()
        )
        try:
            async with asked as answer:
                fields = {n: v for n, v in answer.headers.items() if n.lower() not in _FRAMING}
                if accept not in STREAMED:
                    text = (await answer.read()).decode()
                    return web.Response(status=answer.status, headers=fields, body=text.encode())
                passed = web.StreamResponse(status=answer.status, headers=fields)
                passed.headers["Content-Type"] = accept
                await passed.prepare(request)
                async for piece in answer.content.iter_any():
                    await passed.write(piece)
                return passed
        except UnicodeDecodeError as why:
            message = f"Service error: Conversion from utf8 failed {why}"
            return web.json_response({"message": message}, status=500)


@asynccontextmanager
async def yagna(behind: str) -> AsyncIterator[tuple[str, Yagna]]:
    """A yagna on a port of its own before the server at `behind`, and the URL of its activity."""
    app = web.Application(client_max_size=1 << 30)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        stand_in = Yagna(behind, session)
        path = "/activity-api/v1/activity/{activity_id}/proxy-http/{url:.*}"
        app.router.add_route("*", path, stand_in.proxy_http)
        async with TestServer(app, host="127.0.0.1") as server:
            base = f"http://127.0.0.1:{server.port}/activity-api/v1/activity"
            yield f"{base}/{Yagna.ACTIVITY}/proxy-http", stand_in
