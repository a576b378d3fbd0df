"""`beacon-proxy alerts test`: one message to every webhook, and how each fared."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from ..config.alerts import Alerts
from .alarm import Severity
from .message import TEST, Message, this_instance
from .receiver import Limits, Patience, Receiver, session_of

_ONCE = Limits(tries=1)


def send_test(settings: Alerts, region: str, version: str, say: Callable[[str], None]) -> bool:
    """Send the message, say a line for each webhook; whether all took it."""
    return asyncio.run(_send(settings, region, version, say))


async def _send(settings: Alerts, region: str, version: str, say: Callable[[str], None]) -> bool:
    message = Message.new(
        type=TEST,
        unix=time.time(),
        instance=this_instance(region),
        rule="test",
        subject="test",
        severity=Severity.WARNING,
        says="if you can read this, alerts arrive",
    )
    taken = True
    async with session_of(version, _ONCE.timeout) as session:
        for number, row in enumerate(settings.webhooks):
            receiver = Receiver(row, number)
            patience = Patience(_ONCE, random.Random())
            done = await receiver.deliver(message, session, time.time, patience)
            taken = taken and done.taken
            how = "taken" if done.taken else "not taken"
            say(f"{receiver.label} ({receiver.host}): {how}: {done.said}")
    return taken
