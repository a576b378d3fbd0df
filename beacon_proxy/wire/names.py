"""Names to addresses, beside the loop: a name that does not resolve must hold up no other.

The loop's own lookups share a few threads, and one that was given up still holds its thread. Here a
name is looked up by one thread at a time, whoever asks, and its last good addresses are kept.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import threading
from contextlib import suppress
from time import monotonic

Addresses = list[tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]]

FRESH = 30.0  # s an answer is used without asking again
KEPT = 3600.0  # s the last good answer is used while no better one comes


class Names:
    """The addresses of every backend's host."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._known: dict[tuple[str, int], tuple[float, Addresses]] = {}
        self._asked: dict[tuple[str, int], asyncio.Future[Addresses]] = {}

    async def resolve(self, host: str, port: int) -> Addresses:
        """The addresses of a host, as `getaddrinfo` gives them. Raises OSError."""
        if _is_address(host):
            return _lookup(host, port)
        key = host, port
        when, addresses = self._known.get(key, (0.0, []))
        age = monotonic() - when
        if addresses and age < FRESH:
            return addresses
        asked = self._asked.get(key)
        if asked is None:
            asked = self._ask(key)
        if addresses and age < KEPT:
            return addresses  # and the answer under way is for the next one
        return await asyncio.shield(asked)

    def forget(self, host: str, port: int) -> None:
        """Keep nothing of a host that may never be asked for again."""
        self._known.pop((host, port), None)

    def _ask(self, key: tuple[str, int]) -> asyncio.Future[Addresses]:
        asked: asyncio.Future[Addresses] = self._loop.create_future()
        self._asked[key] = asked
        # A daemon: a lookup that hangs must not hold up the end of the process either.
        thread = threading.Thread(
            target=self._look_up, args=(key, asked), name=f"lookup {key[0]}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:  # no thread is to be had: who asks next tries again
            self._told(key, asked, OSError(errno.EAGAIN, str(exc)))
        return asked

    def _look_up(self, key: tuple[str, int], asked: asyncio.Future[Addresses]) -> None:
        found: Addresses | OSError
        try:
            found = _lookup(*key)
        except OSError as exc:
            found = exc
        except UnicodeError as exc:  # no host name at all, as `a..b`
            found = socket.gaierror(socket.EAI_NONAME, f"is no host name: {exc}")
        with suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._told, key, asked, found)

    def _told(
        self, key: tuple[str, int], asked: asyncio.Future[Addresses], found: Addresses | OSError
    ) -> None:
        self._asked.pop(key, None)
        if isinstance(found, OSError):
            asked.set_exception(found)
            asked.exception()  # who asked may have given up
        else:
            self._known[key] = monotonic(), found
            asked.set_result(found)


def _lookup(host: str, port: int) -> Addresses:
    return socket.getaddrinfo(  # type: ignore[return-value]  # AF_INET and AF_INET6 alone
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
