"""What a provider may have beside what it must have, looked up once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from ..contracts import Backend, Exchange, Headers, Hop, Provider, Reply, Submission

if TYPE_CHECKING:
    import aiohttp

SessionOf = Callable[[Backend], "aiohttp.ClientSession"]


def _no_session(backend: Backend) -> aiohttp.ClientSession:
    raise RuntimeError(f"no session for {backend.name}")


class Hooks(NamedTuple):
    """The optional members of one provider, as `contracts` has them; None: it has not got it."""

    carries: Callable[[Backend], bool] | None = None
    carry: (
        Callable[[Backend, Submission, Reply, aiohttp.ClientSession], Coroutine[Any, Any, None]]
        | None
    ) = None
    hop: Callable[[Backend, int, Headers, bytes, bytes, int], Hop | None] | None = None
    fields: Callable[[Backend, Exchange], Headers] | None = None
    takes: Callable[[Backend, Exchange], bool] | None = None
    wakes: Callable[[Backend], bool] | None = None
    scales: bool | None = None
    session: SessionOf = _no_session  # for `carry`

    @classmethod
    def of(cls, provider: Provider, session: SessionOf) -> Hooks:
        """Look them up on `provider`; `session` gives `carry` its session."""
        found = {name: getattr(provider, name, None) for name in cls._fields if name != "session"}
        return cls(**found, session=session)


NO_HOOKS = Hooks()
