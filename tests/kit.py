"""The test kit: real sockets on both sides of the whole proxy, nothing of ours mocked.

    async with RawBackend(chat_stream("hi", 3)) as backend, proxy(backend) as p:
        async with RawClient(p.port) as client:
            answer = await client.ask(chat(stream=True))
    assert answer.complete

`kit_backend` and `kit_scripts` play the upstream side, `kit_client` the client's, `kit_proxy` runs
the proxy, `kit_apis` holds what the four dialects say.
"""

from __future__ import annotations

from .kit_apis import (
    APIS,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    Api,
    line,
    named,
)
from .kit_backend import BackendConn, RawBackend, Received, Script
from .kit_client import Answer, RawClient, chat, request
from .kit_proxy import (
    OK,
    Proxy,
    Seen,
    blackhole,
    closed_port,
    eventually,
    plugins,
    proxy,
    through,
)
from .kit_scripts import (
    LAST_CHUNK,
    SSE_HEAD,
    answer,
    chat_events,
    chat_stream,
    chunk,
    each_request,
    event,
    json_answer,
    json_bytes,
    sse,
)
from .kit_wire import Broken, Fields, Wire, header

__all__ = [
    "APIS",
    "CHAT",
    "COMPLETIONS",
    "LAST_CHUNK",
    "MESSAGES",
    "OK",
    "OLLAMA_CHAT",
    "OLLAMA_GENERATE",
    "RESPONSES",
    "SSE_HEAD",
    "Answer",
    "Api",
    "BackendConn",
    "Broken",
    "Fields",
    "Proxy",
    "RawBackend",
    "RawClient",
    "Received",
    "Script",
    "Seen",
    "Wire",
    "answer",
    "blackhole",
    "chat",
    "chat_events",
    "chat_stream",
    "chunk",
    "closed_port",
    "each_request",
    "event",
    "eventually",
    "header",
    "json_answer",
    "json_bytes",
    "line",
    "named",
    "plugins",
    "proxy",
    "request",
    "sse",
    "through",
]
