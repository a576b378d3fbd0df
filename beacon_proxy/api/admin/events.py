"""The WebSocket at /ws: what the router does, as it does it.

Every frame is text: one JSON object and a line end. First the connection frame, then echoes of what
the client sends and the live events, in the order in which they happen.
"""

from __future__ import annotations

import asyncio

from aiohttp import WSCloseCode, WSMsgType, web

from ...ops.lines import encode
from ...ops.live import Listener
from ...ops.telemetry import Telemetry

_MAX_MESSAGE = 65536  # bytes that a client may send in one message
_HEARTBEAT = 30.0  # s between pings, so that a listener that vanished is noticed
_CLOSE_WAIT = 2.0  # s for the client to answer our close
_LEFT = ""  # no event of the router: the client is gone
_LAST = "server.draining"  # nothing comes after it, and an open listener would hold up the drain


def wants_upgrade(request: web.BaseRequest) -> bool:
    """Whether the request is a WebSocket handshake that can be accepted."""
    return bool(web.WebSocketResponse().can_prepare(request))


async def watch(request: web.BaseRequest, telemetry: Telemetry) -> web.WebSocketResponse:
    """Serve one listener until it leaves or the server drains.

    Raises:
        Overloaded: enough listen already; nothing was sent.
    """
    listener = telemetry.subscribe()
    reader: asyncio.Task[None] | None = None
    ws = web.WebSocketResponse(
        max_msg_size=_MAX_MESSAGE, heartbeat=_HEARTBEAT, timeout=_CLOSE_WAIT, compress=False
    )
    try:
        await ws.prepare(request)
        hello = {"type": "connection", "status": "connected", "timestamp": telemetry.unix()}
        await ws.send_str(_frame(hello))
        reader = asyncio.create_task(_echo(ws, telemetry), name="ws.reader")
        reader.add_done_callback(lambda _: listener.put(_LEFT, b""))
        await _tell(ws, listener)
        if reader.done():
            reader.result()  # what ended it, if that was more than the client's close
    except ConnectionError:
        pass  # it left while it was written to
    finally:
        if reader is not None:
            reader.cancel()
        telemetry.unsubscribe(listener)
    return ws


async def _tell(ws: web.WebSocketResponse, listener: Listener) -> None:
    while True:
        event, line = await listener.get()
        if event == _LEFT:
            return
        await ws.send_str(line.decode())
        if event == _LAST:
            await ws.close(code=WSCloseCode.GOING_AWAY)
            return


async def _echo(ws: web.WebSocketResponse, telemetry: Telemetry) -> None:
    async for message in ws:
        data = message.data
        if message.type is WSMsgType.BINARY:
            data = data.decode("utf-8", "replace")
        elif message.type is not WSMsgType.TEXT:
            return
        await ws.send_str(_frame({"type": "echo", "data": data, "timestamp": telemetry.unix()}))


def _frame(content: dict[str, object]) -> str:
    return (encode(content) + b"\n").decode()
