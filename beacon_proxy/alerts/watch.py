"""Looks at every rule again and again, and tells of what begins and ends.

Nothing here waits for anybody: a look takes a millisecond or so, and what is told goes to the log
and to a sender that only takes it in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Protocol

from ..config.alerts import Alerts
from ..contracts import Clock, Gauge, Notify
from ..errors import told
from .alarm import Alarm, Change, Mark, Severity
from .message import BEGAN, ENDED, Message, iso, this_instance
from .rules import Rule, rules_of
from .view import Eyes, Reading, Sources, View

SUBJECTS_MOST = 1000  # of one rule; more are not looked at

_Key = tuple[str, str, str]  # rule, subject, severity


class Sender(Protocol):
    """Who carries messages away."""

    def start(self) -> None: ...

    def send(self, message: Message) -> None:
        """Take a message in; never waits."""
        ...

    def gauges(self) -> Iterator[Gauge]: ...

    def hurry(self) -> None:
        """Let a close that is under way wait no longer."""
        ...

    async def close(self) -> None: ...


class Watch:
    """The alerts of one proxy."""

    def __init__(
        self,
        settings: Alerts,
        sources: Sources,
        *,
        region: str,
        clock: Clock,
        unix: Clock,
        notify: Notify,
        sender: Sender | None = None,
    ) -> None:
        self._settings = settings
        self._rules = rules_of(settings.rules)
        self._eyes = Eyes(sources, clock)
        self._instance = this_instance(region)
        self._clock, self._unix, self._notify = clock, unix, notify
        self._sender = sender
        self._alarms: dict[_Key, Alarm] = {}
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, in the running loop."""
        if self._sender is not None:
            self._sender.start()
        if self._rules:
            self._task = asyncio.create_task(self._run(), name="alerts")

    def hurry(self) -> None:
        if self._sender is not None:
            self._sender.hurry()

    async def close(self) -> None:
        """Look no more, and let what has been told go out, within a bounded time."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._sender is not None:
            await self._sender.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.interval)
            try:
                self.look()
            except Exception as exc:  # a number nobody thought of must not end all alerts
                if not self._failing:
                    self._notify("alerts.failed", error=told(exc))
                self._failing = True
            else:
                self._failing = False

    def look(self) -> None:
        """Read every rule once."""
        view = self._eyes.look()
        seen: set[_Key] = set()
        for rule in self._rules:
            for number, reading in enumerate(rule.read(view)):
                if number >= SUBJECTS_MOST:
                    break
                for mark in rule.marks:
                    if reading.minor and mark.severity is Severity.CRITICAL:
                        continue
                    seen.add(self._see(view, rule, mark, reading))
        for key in self._alarms.keys() - seen:
            self._see_nothing(view, *key)

    def _see(self, view: View, rule: Rule, mark: Mark, reading: Reading) -> _Key:
        key = rule.name, reading.subject, str(mark.severity)
        alarm = self._alarms.get(key)
        if alarm is None:
            alarm = self._alarms[key] = Alarm(mark, self._settings.pause)
        self._take(view.now, key, alarm, reading)
        return key

    def _see_nothing(self, view: View, rule: str, subject: str, severity: str) -> None:
        key = rule, subject, severity
        alarm = self._alarms[key]
        self._take(
            view.now, key, alarm, Reading(subject, None, f"nothing is known of {subject} any more")
        )
        if alarm.forgettable(view.now):
            del self._alarms[key]

    def _take(self, now: float, key: _Key, alarm: Alarm, reading: Reading) -> None:
        since = alarm.since
        change = alarm.see(now, reading.value)
        if change is not None:
            since = alarm.since if since is None else since
            self._tell(change, key[0], alarm, reading, now - (now if since is None else since))

    def _tell(
        self, change: Change, rule: str, alarm: Alarm, reading: Reading, seconds: float
    ) -> None:
        unix = self._unix()
        message = Message.new(
            type=BEGAN if change is Change.BEGAN else ENDED,
            unix=unix,
            instance=self._instance,
            rule=rule,
            subject=reading.subject,
            severity=alarm.mark.severity,
            says=reading.says,
            value=reading.value,
            threshold=alarm.mark.begins if change is Change.BEGAN else alarm.mark.ends,
            since_unix=unix - seconds,
        )
        self._notify(message.type, **message.fields(), text=message.says)
        if self._sender is not None:
            self._sender.send(message)

    def active(self) -> list[dict[str, Any]]:
        """The alerts that have begun and not ended."""
        now, unix = self._clock(), self._unix()
        return [
            {
                "rule": rule,
                "subject": subject,
                "severity": severity,
                "since": iso(unix - now + alarm.since),
            }
            for (rule, subject, severity), alarm in self._alarms.items()
            if alarm.active and alarm.since is not None
        ]

    def gauges(self) -> Iterator[Gauge]:
        """Which alerts are active; a rule that is switched off is not among them."""
        active = {rule for (rule, *_), alarm in self._alarms.items() if alarm.active}
        for rule in self._rules:
            yield Gauge(
                "alert_active",
                "1 while an alert of this rule is active.",
                rule.name in active,
                (("rule", rule.name),),
            )
        for (name, subject, severity), alarm in self._alarms.items():
            yield Gauge(
                "alert_subject_active",
                "1 while this alert is active.",
                alarm.active,
                (("rule", name), ("subject", subject), ("severity", severity)),
            )
        if self._sender is not None:
            yield from self._sender.gauges()
