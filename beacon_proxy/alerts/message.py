"""What is told of an alert: one message, as JSON for programs and as a line for people.

The shape is the one that Standard Webhooks 1.0.0 recommends ("Payload structure"), with `text`
beside it, which is all that Slack's incoming webhooks look at.
"""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from .alarm import Severity

BEGAN, ENDED, TEST = "alert.began", "alert.ended", "alert.test"


@dataclass(frozen=True, slots=True)
class Instance:
    """Which of the proxies speaks."""

    region: str
    host: str


def this_instance(region: str) -> Instance:
    return Instance(region, socket.gethostname())


@dataclass(frozen=True, slots=True)
class Message:
    """One thing to tell."""

    type: str
    unix: float  # s, when it happened
    instance: Instance
    rule: str
    subject: str
    severity: Severity
    says: str
    value: float | None = None
    threshold: float | None = None
    since_unix: float | None = None  # s, when it came past its threshold
    id: str = ""  # the same for each receiver and each try

    @classmethod
    def new(cls, **fields: Any) -> Message:
        return cls(**fields, id=f"msg_{uuid.uuid4().hex}")

    @property
    def key(self) -> str:
        """The same for the beginning and the end of one alert, and for no other alert."""
        where = f"{self.instance.region}/{self.instance.host}"
        return f"{self.rule}/{self.subject}/{self.severity}@{where}"

    @property
    def text(self) -> str:
        """One line: what, how bad, where."""
        word = {BEGAN: self.severity.upper(), ENDED: "ENDED"}.get(self.type, "TEST")
        lasted = ""
        if self.type == ENDED and self.since_unix is not None:
            lasted = f", after {_time(self.unix - self.since_unix)}"
        where = f"{self.instance.region}, {self.instance.host}"
        return f"{word} {self.rule}: {self.says}{lasted} [{where}]"

    def fields(self) -> dict[str, Any]:
        """What the log tells of it, and `data` of the payload begins with."""
        return {
            "rule": self.rule,
            "subject": self.subject,
            "severity": str(self.severity),
            "value": None if self.value is None else round(float(self.value), 6),
            "threshold": self.threshold,
            "since": None if self.since_unix is None else iso(self.since_unix),
        }

    def payload(self) -> bytes:
        """The body of a webhook."""
        where = {"region": self.instance.region, "instance": self.instance.host}
        return orjson.dumps(
            {
                "text": self.text,
                "type": self.type,
                "timestamp": iso(self.unix),
                "data": {**self.fields(), **where, "key": self.key},
            }
        )

    def text_alone(self) -> bytes:
        """The body for receivers that take nothing else."""
        return orjson.dumps({"text": self.text})


def iso(unix: float) -> str:
    """ISO 8601 in UTC, with milliseconds."""
    return (
        datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def _time(seconds: float) -> str:
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(seconds, 0.0):.0f} s"
