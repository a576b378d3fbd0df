"""docs/alerts.md says what the models, the messages and the signature are."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from beacon_proxy.alerts.alarm import Severity
from beacon_proxy.alerts.message import Instance, Message
from beacon_proxy.alerts.receiver import Limits, signature
from beacon_proxy.alerts.rules import rules_of
from beacon_proxy.config.alerts import Alerts, Rules, signing_key
from beacon_proxy.ops.telemetry import LEVELS

from .config_fakes import ROW, load
from .kit_hooks import SECRET

PAGE = (Path(__file__).parent.parent / "docs" / "alerts.md").read_text("utf-8")
RULES = Rules()
FLOWING = " ".join(PAGE.split())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def row(name: str) -> str:
    section: BaseModel = getattr(RULES, name)
    about = (section.__doc__ or "").strip()
    keys = ", ".join(
        f"{field.alias or key}: {_plain(getattr(section, key))}"
        for key, field in type(section).model_fields.items()
    )
    (rule,) = (rule for rule in rules_of(RULES) if rule.name == name)
    severities = ", ".join(dict.fromkeys(str(mark.severity) for mark in rule.marks))
    return f"| `{name}` | {about} | {severities} | `{keys}` |"


def _plain(value: Any) -> str:
    return "null" if value is None else f"{value:g}"


def test_table_when_compared_with_the_models_is_what_they_say() -> None:
    told = re.search(r"<!-- compared.*?-->\n.*?\n.*?\n(.*?)<!-- end", PAGE, re.DOTALL)
    assert told is not None
    expected = [row(name) for name in Rules.model_fields]
    assert told[1].splitlines() == expected, "\n".join(expected)


def test_night_table_when_compared_with_the_rules_has_each() -> None:
    night = PAGE.partition("## At three in the morning")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", night, re.MULTILINE) == list(Rules.model_fields)


def test_events_when_compared_with_the_errors_of_the_log_are_all_of_them() -> None:
    table = PAGE.partition("## What no rule sees")[2].partition("\n## ")[0]
    told = [name for row in table.splitlines() for name in re.findall(r"`(\w+\.\w+)`", row)]
    errors = [event for event, level in LEVELS.items() if level == "error"]
    assert sorted(told) == sorted(errors)


def test_example_when_loaded_is_valid() -> None:
    (example,) = blocks("yaml")
    env = {"SLACK_WEBHOOK": "https://hooks.example/T0/B0/x", "ALERT_SECRET": SECRET}
    alerts = load(f"{ROW}\n{example}", env).alerts
    assert isinstance(alerts, Alerts)
    assert alerts.rules.blend_off_target is None
    assert alerts.rules.pool_utilisation is not None
    assert (alerts.rules.pool_utilisation.above, alerts.rules.pool_utilisation.for_) == (0.9, 120)
    assert yaml.safe_load(example)["alerts"]["rules"]["blend_off_target"] is False


def test_payload_when_made_is_the_one_that_is_shown() -> None:
    (shown,) = blocks("json")
    unix = 1795403045.678
    message = Message.new(
        type="alert.began",
        unix=unix,
        instance=Instance("us-east", "d8d9e2f1"),
        rule="pool_utilisation",
        subject="burst",
        severity=Severity.WARNING,
        says="pool burst is 93 % full (alert from 80 %)",
        value=0.93,
        threshold=0.8,
        since_unix=unix - 60,
    )
    assert json.loads(message.payload()) == json.loads(shown)


@pytest.mark.parametrize(
    "secret", [SECRET, SECRET.removeprefix("whsec_"), "whsec_c2VjcmV0cw", "0123abcd" * 8, "hunter2"]
)
def test_snippet_when_run_accepts_ours_and_refuses_what_was_changed(secret: str) -> None:
    (snippet,) = blocks("python")
    names: dict[str, Any] = {}
    exec(snippet, names)
    is_genuine, body = names["is_genuine"], '{"text": "grün"}'.encode()

    def headers(stamp: float, message_id: str = "msg_1") -> dict[str, str]:
        when = str(int(stamp))
        made = signature(signing_key(secret), message_id, when, body)
        return {
            "webhook-id": message_id,
            "webhook-timestamp": when,
            "webhook-signature": f"v1,older {made}",
        }

    now = time.time()
    assert is_genuine(secret, headers(now), body)
    assert not is_genuine(secret, headers(now), body + b" ")
    assert not is_genuine(secret, {**headers(now), "webhook-id": "msg_2"}, body)
    assert not is_genuine("whsec_AAAA", headers(now), body)
    assert not is_genuine(secret, headers(now - 400), body)


def test_delivery_when_described_has_the_limits_that_hold() -> None:
    limits = Limits()
    assert f"says nothing within {limits.timeout:g} s" in FLOWING
    assert f"{limits.tries} times in some 20 minutes" in FLOWING
    waits = [min(limits.first_wait * 2**n, limits.longest_wait) for n in range(limits.tries - 1)]
    assert 15 <= sum(waits) / 60 <= 25
    assert f"at most {limits.waiting} wait" in FLOWING
    assert f"{limits.at_end:g} seconds" in FLOWING
