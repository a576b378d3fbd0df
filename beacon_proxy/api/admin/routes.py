"""The proxy's own routes, but for /inference: health, fleet, models, spend, metrics.

All of them only read, answer from memory or the ledger, and ask no backend anything: a monitor that
polls them costs no GPU a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from ...contracts import Candidate, End, Provider
from ...errors import ProxyError
from ...fleet.load import Load
from ...ledger import Ledger
from ...ops.metrics import healthy
from ...ops.telemetry import Telemetry
from ...ops.totals import Totals
from ...ops.windows import MINUTES, SPANS
from ...regions import canonical_region
from . import models, views
from .answers import HEADERS, Handler, View, handler, json_answer, prefers_text, problem
from .costs import Costs
from .events import wants_upgrade, watch

if TYPE_CHECKING:
    from ...config import Settings

_SERVICE = "hybrid-router"
_VARIABLES = ("PORT", "FLY_REGION")  # beside those that the providers read


class Fleet(Protocol):
    """The live view that the routes show."""

    def candidates(self) -> list[Candidate]: ...

    def draining(self) -> list[Candidate]: ...

    def now(self) -> float: ...


class State(Protocol):
    """What this process does at the moment."""

    @property
    def draining(self) -> bool: ...

    @property
    def started_unix(self) -> float: ...

    def alerts(self) -> list[dict[str, Any]]: ...


class Admin:
    """Answers the own routes.

    Attributes:
        routes: exact path to handler. A handler answers errors itself, in the path's dialect.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        fleet: Fleet,
        telemetry: Telemetry,
        providers: Mapping[str, Provider],
        load: Load | None = None,
        env: Mapping[str, str],
        version: str,
        state: State,
        ledger: Ledger | None = None,
    ) -> None:
        self._region = settings.server.region
        self._fleet = fleet
        self._load = Load(fleet) if load is None else load
        self._telemetry = telemetry
        self._env = env
        self._version = version
        self._state = state
        names = [name for provider in providers.values() for name in provider.environment]
        self._variables = tuple(dict.fromkeys((*_VARIABLES, *sorted(names))))
        by_path: dict[str, View] = {
            "/health": self._health,
            "/ready": self._ready,
            "/status": self._status,
            "/modal-health": self._status,
            "/providers": self._providers,
            "/models": self._models,
            "/v1/models": self._openai_models,
            "/api/tags": self._ollama_models,
            "/regions": self._regions,
            "/env": self._environment,
            "/metrics": self._metrics,
        }
        self.routes: Mapping[str, Handler] = {
            **{path: handler(view) for path, view in by_path.items()},
            "/costs": Costs(fleet, telemetry, ledger),
            "/ws": self._ws,
        }

    def _health(self, _request: web.BaseRequest) -> web.Response:
        candidates, now = self._fleet.candidates(), self._fleet.now()
        well = sum(healthy(c.live, now) for c in candidates)
        return json_answer(
            {
                "status": "healthy" if candidates and well == len(candidates) else "degraded",
                "service": _SERVICE,
                "version": self._version,
                "timestamp": self._telemetry.unix(),
                "region": self._region,
                "providers_total": len(candidates),
                "providers_healthy": well,
                "regions": list(models.providers_by_region(candidates)),
                "alerts": self._state.alerts(),
            }
        )

    def _ready(self, _request: web.BaseRequest) -> web.Response:
        candidates, now = self._fleet.candidates(), self._fleet.now()
        status = "ok" if any(views.usable(c.live, now) for c in candidates) else "no_backend"
        if self._state.draining:
            status = "draining"
        answer = {"status": status, "service": _SERVICE, "timestamp": self._telemetry.unix()}
        return json_answer(answer, 200 if status == "ok" else 503)

    def _status(self, _request: web.BaseRequest) -> web.Response:
        timestamp = self._telemetry.unix()
        return json_answer({"status": "healthy", "timestamp": timestamp, "service": _SERVICE})

    def _providers(self, request: web.BaseRequest) -> web.Response:
        region = canonical_region(request.query.get("region", ""))
        totals = self._telemetry.windows.totals(MINUTES, by="backend")
        now, unix = self._fleet.now(), self._telemetry.unix()
        shown = [(each, False) for each in self._fleet.candidates()]
        shown += [(each, True) for each in self._fleet.draining()]
        return json_answer(
            {
                "providers": [
                    views.provider(
                        c,
                        now,
                        unix,
                        totals.get(c.backend.name, Totals()),
                        self._load.of(c),
                        draining=draining,
                    )
                    for c, draining in shown
                    if region in ("", c.backend.region)
                ]
            }
        )

    def _models(self, _request: web.BaseRequest) -> web.Response:
        return json_answer(models.models_by_region(self._fleet.candidates()))

    def _openai_models(self, _request: web.BaseRequest) -> web.Response:
        return json_answer(models.openai_models(self._fleet.candidates(), self._state.started_unix))

    def _ollama_models(self, _request: web.BaseRequest) -> web.Response:
        return json_answer(models.ollama_models(self._fleet.candidates(), self._state.started_unix))

    def _regions(self, _request: web.BaseRequest) -> web.Response:
        candidates, now = self._fleet.candidates(), self._fleet.now()
        return json_answer(
            {
                "region": self._region,
                "minutes": SPANS,
                "regions": views.regions(candidates, now, self._telemetry.windows),
                "timestamp": self._telemetry.unix(),
            }
        )

    def _environment(self, _request: web.BaseRequest) -> web.Response:
        return json_answer(
            {name: "set" if self._env.get(name) else None for name in self._variables}
        )

    def _metrics(self, request: web.BaseRequest) -> web.Response:
        accept = ",".join(request.headers.getall("Accept", ()))
        candidates = self._fleet.candidates()
        if prefers_text(accept):
            names = {candidate.backend.name for candidate in candidates}
            leaving = [c for c in self._fleet.draining() if c.backend.name not in names]
            shown = [*candidates, *{c.backend.name: c for c in leaving}.values()]
            body, content_type = self._telemetry.render(shown, accept)
            headers = {**HEADERS, "Content-Type": content_type}
            return web.Response(body=body, headers=headers)
        metrics = self._telemetry.metrics
        answer = views.summary(candidates, self._fleet.now(), self._load)
        exchanges = dict.fromkeys(map(str, End), 0)
        for (end, *_), count in metrics.exchanges.items():
            exchanges[end] += count
        return json_answer({**answer, "queue_depth": metrics.queue_depth, "exchanges": exchanges})

    async def _ws(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET" and wants_upgrade(request):
            try:
                return await watch(request, self._telemetry)
            except ProxyError as error:
                return problem(request, error)
        return await _PLAIN_WS(request)


_PLAIN_WS = handler(
    lambda _request: json_answer(
        {"status": "ok", "message": "connect with a WebSocket client for live events"}
    )
)
