"""The live view of every backend: what probes and outcomes say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

import aiohttp

from ..contracts import (
    Backend,
    Candidate,
    Check,
    Clock,
    Exchange,
    Fault,
    Live,
    Outcome,
    Provider,
    Verdict,
    canonical_model,
)
from ..wire.pool import tls_context

_WEIGHT = 0.2  # of the newest outcome in the moving averages: about the last ten count


class Fleet:
    """Every backend with its live state, in the order of the configuration."""

    def __init__(
        self,
        backends: Iterable[Backend],
        providers: Mapping[str, Provider],
        *,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        version: str = "",
    ) -> None:
        self.now = clock
        self._unix = unix
        self._version = version
        self._rows = tuple((b, Live(model_names=b.model_names)) for b in backends)
        self.providers = providers
        self._sessions: dict[tuple[bool, str | None], aiohttp.ClientSession] = {}

    def candidates(self) -> list[Candidate]:
        """One new candidate a backend."""
        return [Candidate(backend, live) for backend, live in self._rows]

    def serving(self, model: str | None, tried: set[str]) -> list[Candidate]:
        """Candidates that serve `model` (a canonical name; None: any) and were not tried yet.

        A backend whose models are not known may serve any.
        """
        return [
            Candidate(backend, live)
            for backend, live in self._rows
            if backend.name not in tried and _serves(backend, live, model)
        ]

    def knows(self, model: str) -> bool:
        """Whether some backend serves, or may serve, the model."""
        return any(_serves(backend, live, model) for backend, live in self._rows)

    def note(self, exchange: Exchange, outcome: Outcome, live: Live) -> None:
        """Learn latency and success from one attempt."""
        live.last_used = self.now()
        if outcome.verdict is Verdict.GOOD:
            live.success += _WEIGHT * (1.0 - live.success)
            live.duration += (_WEIGHT if live.duration else 1.0) * (
                outcome.duration - live.duration
            )
            if outcome.ttft is not None:
                old = live.latency
                live.latency = outcome.ttft if old is None else old + _WEIGHT * (outcome.ttft - old)
        elif outcome.verdict is Verdict.STRIKE:
            live.success -= _WEIGHT * live.success

    # -- probes ----------------------------------------------------------------------------------

    def _session(self, backend: Backend) -> aiohttp.ClientSession:
        """The control plane's session, one for each way to trust; never for a client's request."""
        trust = backend.tls_verify, backend.tls_ca_file
        session = self._sessions.get(trust)
        if session is None:
            session = self._sessions[trust] = aiohttp.ClientSession(
                headers={"User-Agent": f"beacon-proxy/{self._version} (check)"},
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(force_close=True, limit=32, ssl=tls_context(*trust)),
            )
        return session

    async def close(self) -> None:
        """Close the sessions of the control plane."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def check(self, candidate: Candidate, seconds: float) -> Check | None:
        """See `contracts.Fleet.check`."""
        backend, live = candidate.backend, candidate.live
        session = self._session(backend)
        started = self.now()
        try:
            async with asyncio.timeout(seconds):
                check = await self.providers[backend.provider].check(backend, session)
        except TimeoutError:
            check = Check(Verdict.STRIKE, fault=Fault.TIMEOUT, detail=f"no answer in {seconds} s")
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            check = Check(Verdict.STRIKE, fault=Fault.REFUSED, detail="no connection")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            check = Check(Verdict.STRIKE, fault=Fault.MALFORMED, detail=type(exc).__name__)
        if check is None:
            return None
        live.last_check = self._unix()
        live.check_latency = check.latency if check.latency is not None else self.now() - started
        if check.models is not None:
            if not backend.model_names:
                live.model_names = check.models
            live.models = frozenset(map(canonical_model, check.models))
        return check


def _serves(backend: Backend, live: Live, model: str | None) -> bool:
    models = backend.models if backend.models is not None else live.models
    return model is None or models is None or model in models
