"""The live view of every backend: what probes and outcomes say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping

import aiohttp

from ..contracts import (
    Backend,
    Candidate,
    Check,
    Clock,
    Exchange,
    Fault,
    Live,
    Notify,
    Outcome,
    Provider,
    Verdict,
    canonical_model,
    tell_nobody,
)
from ..wire.pool import tls_context

_GOOD = Verdict.GOOD  # looked up once: a member of an enumeration is slow to reach
_LACKING_TIME = 300.0  # s that a model stays unlikely on a backend that said it has not got it
_LACKING_MOST = 256  # models remembered so, a backend
_FIRST_GUESS = 5.0  # s, for the price of an answer while none has been seen
_WEIGHT = 0.2  # of the newest outcome in the moving averages: about the last ten count


class Fleet:
    """Every backend with its live state, in the order of the configuration.

    Attributes:
        now: its clock.
        providers: by the name that a backend gives as its own.
        has_totals: some backend limits the whole time of an exchange.
    """

    def __init__(
        self,
        backends: Iterable[Backend],
        providers: Mapping[str, Provider],
        *,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        version: str = "",
        notify: Notify = tell_nobody,
    ) -> None:
        self.now = clock
        self._unix = unix
        self._version = version
        self._notify = notify
        self._rows = tuple((b, Live(model_names=b.model_names)) for b in backends)
        self.providers = providers
        self.has_totals = any(backend.timeouts.total for backend, _ in self._rows)
        self._sessions: dict[tuple[bool, bool, str | None], aiohttp.ClientSession] = {}

    def candidates(self) -> list[Candidate]:
        """One new candidate a backend."""
        return [Candidate(backend, live) for backend, live in self._rows]

    def serving(self, model: str | None, tried: Collection[str]) -> list[Candidate]:
        """Candidates that serve `model` (a canonical name; None: any) and were not tried yet.

        A backend whose models are not known may serve any.
        """
        found = []
        for backend, live in self._rows:
            if tried and backend.name in tried:
                continue
            models = live.models if backend.models is None else backend.models
            # The usual cases without a call: it lists the model, or never said that it lacks one.
            usual = not live.lacking if models is None else model in models
            if usual or model is None or self._serves(backend, live, model):
                found.append(Candidate(backend, live))
        return found

    def knows(self, model: str) -> bool:
        """Whether some backend serves, or may serve, the model."""
        for backend, live in self._rows:  # noqa: SIM110 - any() takes three times as long
            if self._serves(backend, live, model):
                return True
        return False

    def typical_duration(self) -> float:
        """Seconds a good attempt took of late, over all backends; a guess before the first."""
        known = [live.duration for _, live in self._rows if live.duration]
        return sum(known) / len(known) if known else _FIRST_GUESS

    def note(self, exchange: Exchange, outcome: Outcome, live: Live) -> None:
        """Learn latency and success from one attempt."""
        live.last_used = self.now()
        if outcome.verdict is _GOOD:
            live.success += _WEIGHT * (1.0 - live.success)
            live.duration += (_WEIGHT if live.duration else 1.0) * (
                outcome.duration - live.duration
            )
            if outcome.ttft is not None:
                old = live.latency
                live.latency = outcome.ttft if old is None else old + _WEIGHT * (outcome.ttft - old)
        elif outcome.verdict is Verdict.STRIKE:
            live.success -= _WEIGHT * live.success

        elif outcome.fault is Fault.DEADLINE and outcome.sent:
            # No strike, for the client chose how long to wait; but no sign of health either.
            live.success -= _WEIGHT / 2 * live.success

    def lacks(self, live: Live, model: str) -> None:
        """A backend whose models were only assumed said that it has not got this one."""
        if len(live.lacking) >= _LACKING_MOST:
            live.lacking.clear()
        live.lacking[model] = self.now() + _LACKING_TIME

    def _serves(self, backend: Backend, live: Live, model: str) -> bool:
        models = live.models if backend.models is None else backend.models
        if models is not None:
            return model in models
        return model not in live.lacking or live.lacking[model] <= self.now()

    # -- probes ----------------------------------------------------------------------------------

    def _session(self, backend: Backend) -> aiohttp.ClientSession:
        """The control plane's session, one for each way to trust; never for a client's request."""
        secure = backend.scheme == "https"  # a context costs 25 ms: none where none is used
        trust = (secure, backend.tls_verify, backend.tls_ca_file)
        session = self._sessions.get(trust)
        if session is None:
            session = self._sessions[trust] = aiohttp.ClientSession(
                headers={"User-Agent": f"beacon-proxy/{self._version} (check)"},
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(
                    force_close=True, limit=32, ssl=tls_context(*trust[1:]) if secure else True
                ),
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
        except Exception as exc:  # a plugin's fault must not end the probes of all others
            check = Check(Verdict.NEUTRAL, detail=f"the check itself failed: {exc!r}"[:200])
            self._notify("check.failed", backend=backend.name, error=repr(exc)[:200])
        if check is None:
            return None
        live.check = check
        live.last_check = self._unix()
        live.check_latency = check.latency if check.latency is not None else self.now() - started
        if check.models is not None:
            if not backend.model_names:
                live.model_names = check.models
            live.models = frozenset(map(canonical_model, check.models))
        return check
