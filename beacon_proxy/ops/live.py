"""Live events for one listener: a bounded queue that would rather forget than hold anyone up."""

from __future__ import annotations

import asyncio
from collections import deque

MAX_WAITING = 256  # events


class Listener:
    """Receives encoded events in order; when it is slow, the oldest waiting ones are dropped.

    Attributes:
        dropped: events it never got.
    """

    __slots__ = ("_ready", "_waiting", "dropped")

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=MAX_WAITING)
        self._ready = asyncio.Event()
        self.dropped = 0

    def put(self, event: str, line: bytes) -> None:
        """Queue one event, encoded as a line."""
        self.dropped += len(self._waiting) == MAX_WAITING
        self._waiting.append((event, line))
        self._ready.set()

    async def get(self) -> tuple[str, bytes]:
        """Wait for the next event: its name and its line."""
        while not self._waiting:
            self._ready.clear()
            await self._ready.wait()
        return self._waiting.popleft()
