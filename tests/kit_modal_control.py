"""A stand-in for Modal's control plane: gRPC on 127.0.0.1, made of the `modal` package's own words.

It is not Modal. It knows the calls that `Function.from_name(…)`, its `get_current_stats()` and its
`autoscaler`'s methods make in modal 1.6.4, and keeps what it was asked with; any other call ends
with UNIMPLEMENTED. What the numbers mean is Modal's documentation (modal/types.py: backlog,
num_total_runners, input_headroom).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from modal_proto import api_pb2

SERVICE = "/modal.client.ModalClient/"


class ControlPlane:
    """One app `llm` with one function `serve`.

    Attributes:
        stats: what the next answer says.
        status: the gRPC error to answer FunctionGet with instead.
        hangs: no call is answered.
        scaled: the bounds it was told, oldest first.
        asked: (call, environment or function id), oldest first.
        tokens: the credentials that came with each.
    """

    def __init__(self, *, hangs: bool = False, status: Status | None = None) -> None:
        self.stats = api_pb2.FunctionStats(backlog=0, num_total_tasks=0)
        self.status = status
        self.hangs = hangs
        self.scaled: list[tuple[int, int]] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: list[tuple[str | None, str | None]] = []
        self.port = 0
        self._server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __mapping__(self) -> Mapping[str, Handler]:
        unary, pb = Cardinality.UNARY_UNARY, api_pb2
        return {
            f"{SERVICE}FunctionGet": Handler(
                self._get, unary, pb.FunctionGetRequest, pb.FunctionGetResponse
            ),
            f"{SERVICE}FunctionGetSchedulingParams": Handler(
                self._settings,
                unary,
                pb.FunctionGetSchedulingParamsRequest,
                pb.FunctionGetSchedulingParamsResponse,
            ),
            f"{SERVICE}FunctionUpdateSchedulingParams": Handler(
                self._scale,
                unary,
                pb.FunctionUpdateSchedulingParamsRequest,
                pb.FunctionUpdateSchedulingParamsResponse,
            ),
            f"{SERVICE}FunctionGetCurrentStats": Handler(
                self._stats, unary, pb.FunctionGetCurrentStatsRequest, pb.FunctionStats
            ),
        }

    async def _get(self, stream: Any) -> None:
        request = await self._next(stream)
        self.asked.append(("FunctionGet", request.environment_name))
        if self.status is not None:
            raise GRPCError(self.status, "no, and here is your token: ak-1 as-secret")
        if (request.app_name, request.object_tag) != ("llm", "serve"):
            raise GRPCError(Status.NOT_FOUND, "Lookup failed")
        ranked = api_pb2.FunctionData.RankedFunction(function=api_pb2.Function())
        await stream.send_message(
            api_pb2.FunctionGetResponse(
                function_id="fu-1",
                handle_metadata=api_pb2.FunctionHandleMetadata(function_name="serve"),
                function=api_pb2.FunctionData(function_name="serve", ranked_functions=[ranked]),
            )
        )

    async def _stats(self, stream: Any) -> None:
        request = await self._next(stream)
        self.asked.append(("FunctionGetCurrentStats", request.function_id))
        await stream.send_message(self.stats)

    async def _settings(self, stream: Any) -> None:
        await self._next(stream)
        said = api_pb2.FunctionGetSchedulingParamsResponse()
        if self.scaled:  # else as a function is that was deployed without any
            least, most = self.scaled[-1]
            settings = said.autoscaler_configuration.settings
            settings.min_containers, settings.max_containers = least, most
        await stream.send_message(said)

    async def _scale(self, stream: Any) -> None:
        request = await self._next(stream)
        settings = request.settings
        self.scaled.append((settings.min_containers, settings.max_containers))
        await stream.send_message(
            api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=settings)
        )

    async def _next(self, stream: Any) -> Any:
        request = await stream.recv_message()
        sent = stream.metadata
        self.tokens.append((sent.get("x-modal-token-id"), sent.get("x-modal-token-secret")))
        if self.hangs:
            await asyncio.Event().wait()
        return request

    async def __aenter__(self) -> Self:
        self._server = Server([self])
        await self._server.start("127.0.0.1", 0)
        listening = self._server._server
        assert listening is not None
        self.port = listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
