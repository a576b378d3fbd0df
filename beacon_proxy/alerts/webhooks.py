"""Carries messages to webhooks, in order, and never in anybody's way.

Each webhook has a bounded queue and a task of its own. `send` only queues; where there is no room
the oldest message goes, and is counted. A receiver that is down is tried for some twenty minutes,
longer and longer apart, before its next message is.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator, Sequence

import aiohttp

from ..config.alerts import Webhook
from ..contracts import Clock, Gauge, Notify
from ..errors import told
from .message import Message
from .receiver import Delivery, Limits, Patience, Receiver, session_of

_USUAL = Limits()


class Webhooks:
    """Every webhook with its queue."""

    def __init__(
        self,
        rows: Sequence[Webhook],
        *,
        version: str,
        unix: Clock,
        rng: random.Random,
        notify: Notify,
        limits: Limits = _USUAL,
    ) -> None:
        self._version, self._unix, self._notify, self._limits = version, unix, notify, limits
        self._patience = Patience(limits, rng)
        self._lines = [_Line(Receiver(row, n), limits.waiting) for n, row in enumerate(rows)]
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._hurried = False

    def start(self) -> None:
        self._session = session_of(self._version, self._limits.timeout)
        self._tasks = [
            asyncio.create_task(self._carry(line, self._session), name=f"alerts {line.label}")
            for line in self._lines
        ]

    def send(self, message: Message) -> None:
        for line in self._lines:
            if line.put(message):
                self._notify("webhook.overflowed", webhook=line.label, host=line.receiver.host)

    async def _carry(self, line: _Line, session: aiohttp.ClientSession) -> None:
        while (message := await line.next()) is not None:
            try:
                done = await line.receiver.deliver(message, session, self._unix, self._patience)
            except Exception as exc:  # the next message may go well
                done = Delivery(False, told(exc))
            line.done(done.taken)
            if not done.taken:
                self._failed(line, message, done.said)

    def _failed(self, line: _Line, message: Message, why: str) -> None:
        self._notify(
            "webhook.failed",
            webhook=line.label,
            host=line.receiver.host,
            error=why,
            id=message.id,
            rule=message.rule,
        )

    def hurry(self) -> None:
        self._hurried = True
        if any(line.closed for line in self._lines):
            for task in self._tasks:
                task.cancel()

    async def close(self) -> None:
        """Let what is queued go out for a moment; what has not by then is lost, and told."""
        for line in self._lines:
            line.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=0 if self._hurried else self._limits.at_end)
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        for line in self._lines:
            for message in line.rest():
                self._failed(line, message, "the proxy ended")
        if self._session is not None:
            await self._session.close()

    def gauges(self) -> Iterator[Gauge]:
        for line in self._lines:
            webhook = ("webhook", line.label)
            for what, count in line.counts.items():
                yield Gauge(
                    "webhook_messages",
                    "Messages of a webhook: delivered, failed, or dropped for want of room.",
                    count,
                    (webhook, ("what", what)),
                    counts=True,
                )
            yield Gauge(
                "webhook_messages_waiting",
                "Messages of a webhook that are still to go out.",
                line.waiting,
                (webhook,),
            )


class _Line:
    """The messages that wait for one webhook."""

    def __init__(self, receiver: Receiver, most: int) -> None:
        self.receiver, self.label = receiver, receiver.label
        self._waiting: deque[Message] = deque()
        self._most = most
        self._under_way: Message | None = None
        self._wake = asyncio.Event()
        self._delivered = self._failed = self._dropped = 0
        self._overflows = False
        self.closed = False

    def put(self, message: Message) -> bool:
        """Queue it. Returns whether that is the first to push another out of a full queue."""
        first = False
        if self.closed:
            self._dropped += 1
            return False
        if len(self._waiting) >= self._most:
            self._waiting.popleft()
            self._dropped += 1
            first, self._overflows = not self._overflows, True
        self._waiting.append(message)
        self._wake.set()
        return first

    async def next(self) -> Message | None:
        """Wait for the oldest message; None: closed, and there is none."""
        while not self._waiting:
            self._overflows = False
            if self.closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        self._under_way = self._waiting.popleft()
        return self._under_way

    def done(self, taken: bool) -> None:
        self._under_way = None
        self._delivered += taken
        self._failed += not taken

    def close(self) -> None:
        """Take no more."""
        self.closed = True
        self._wake.set()

    def rest(self) -> list[Message]:
        """What did not go out."""
        under_way = [] if self._under_way is None else [self._under_way]
        rest = [*under_way, *self._waiting]
        self._failed += len(rest)
        self._waiting.clear()
        self._under_way = None
        return rest

    @property
    def counts(self) -> dict[str, int]:
        """How each message fared that waits no more."""
        return {
            "delivered": self._delivered,
            "failed": self._failed,
            "dropped": self._dropped,
        }

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._under_way is not None)
