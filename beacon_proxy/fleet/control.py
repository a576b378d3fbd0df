"""Questions to backends and their providers: the control plane, never a client's request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp

from ..contracts import Backend, Check, Fault, Notify, Provider, Verdict, Workers
from ..errors import told
from ..wire.faults import fault_of
from ..wire.pool import IDLE_LIMIT, tls_context

CONNECT_LIMIT = 10.0  # s
_Trust = tuple[bool, bool, str | None]  # https, verify, file of authorities
_Said = TypeVar("_Said")


def trust_of(backend: Backend) -> _Trust:
    """How the server is known to be who it says; a session is for one such way."""
    return (backend.scheme == "https", backend.tls_verify, backend.tls_ca_file)


def _sound(check: Check) -> Check:
    """A plugin's check as it is. Raises TypeError where it names models by what are no names."""
    for names in (check.models, check.hot):
        if names is not None and not all(isinstance(name, str) for name in names):
            raise TypeError("a model's name that is no text")
    return check


class Control:
    """The sessions that questions, and requests carried by providers, go through."""

    def __init__(self, providers: Mapping[str, Provider], version: str, notify: Notify) -> None:
        self._providers = providers
        self._version = version
        self._notify = notify
        self._sessions: dict[tuple[_Trust, bool], aiohttp.ClientSession] = {}

    def carriage(self, backend: Backend) -> aiohttp.ClientSession:
        """The session for a provider that takes requests to its backends by itself."""
        return self._session(backend, carries=True)

    async def ask(self, backend: Backend, seconds: float) -> Check | None:
        """Put the free question of the backend's provider; see `contracts.Fleet.check`."""
        try:
            session = self._session(backend, carries=False)
            async with asyncio.timeout(seconds):
                check = await self._providers[backend.provider].check(backend, session)
            return None if check is None else _sound(check)
        except TimeoutError:
            return Check(Verdict.STRIKE, fault=Fault.TIMEOUT, detail=f"no answer in {seconds} s")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            fault, detail = fault_of(exc)
            return Check(Verdict.STRIKE, fault=fault, detail=detail)
        except Exception as exc:  # a plugin's fault must not end the probes of all others
            self._notify("check.failed", backend=backend.name, error=told(exc))
            # Shown to anyone: what the exception says may hold what the plugin was given.
            return Check(Verdict.NEUTRAL, detail=f"the check itself failed: {type(exc).__name__}")

    async def kept(self, backend: Backend, seconds: float) -> int | str:
        """Ask the backend's provider how many workers it keeps; see `contracts.Scales`.

        Returns why it did not say, for the log, where it did not. The provider can scale.
        """
        provider: Any = self._providers[backend.provider]
        session = self._session(backend, carries=False)
        said = await self._put(lambda: provider.kept(backend, session, seconds), seconds)
        if isinstance(said, str) or (type(said) is int and said >= 0):
            return said
        return f"says that it keeps {said!r} workers"

    async def scale(self, backend: Backend, workers: Workers, seconds: float) -> str | None:
        """Tell the backend's provider how many workers to keep; see `contracts.Scales`.

        Returns why it could not be told, for the log; None where it was. The provider can scale.
        """
        provider: Any = self._providers[backend.provider]
        session = self._session(backend, carries=False)
        said = await self._put(lambda: provider.scale(backend, workers, session, seconds), seconds)
        return said if isinstance(said, str) else None

    async def _put(self, ask: Callable[[], Awaitable[_Said]], seconds: float) -> _Said | str:
        """What a provider's method returns; why it did not, for the log, where it failed."""
        try:
            async with asyncio.timeout(seconds):
                return await ask()
        except TimeoutError:
            return f"no answer in {seconds} s"
        except (aiohttp.ClientError, OSError) as exc:
            return fault_of(exc)[1]
        except ValueError as exc:
            return str(exc)
        except Exception as exc:  # a plugin's fault must not end the scaling of all others
            return told(exc)

    def _session(self, backend: Backend, *, carries: bool) -> aiohttp.ClientSession:
        key = (trust_of(backend), carries)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = self._make(*key)
        return session

    def _make(self, trust: _Trust, carries: bool) -> aiohttp.ClientSession:
        secure, verify, ca_file = trust
        # No limit of connections: who waits for one would be told to be slow.
        options: dict[str, Any] = {"force_close": True, "limit": 0}
        if carries:
            options = {"keepalive_timeout": IDLE_LIMIT, "limit": 0}
        # A context costs 25 ms: none where none is used.
        context = tls_context(verify, ca_file) if secure else True
        what = "carry" if carries else "check"
        return aiohttp.ClientSession(
            headers={"User-Agent": f"beacon-proxy/{self._version} ({what})"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT),
            connector=aiohttp.TCPConnector(ssl=context, **options),
        )

    async def close(self) -> None:
        """Close the sessions."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
