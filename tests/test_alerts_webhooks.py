"""Webhooks against a real receiver: signed, retried, in order, bounded, and no secret told."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook as Verifier

from beacon_proxy.alerts.alarm import Severity
from beacon_proxy.alerts.message import Instance, Message
from beacon_proxy.alerts.receiver import Limits, Patience, reason, signature
from beacon_proxy.alerts.webhooks import Webhooks
from beacon_proxy.config.alerts import Webhook, signing_key

from .kit import BackendConn, RawBackend, answer, blackhole, closed_port, eventually
from .kit_hooks import SECRET, Receiver, Told, receiver, telling

QUICK = Limits(tries=4, timeout=1.0, first_wait=0.01, longest_wait=0.02, waiting=8, at_end=0.3)
HIDDEN = "hidden-path"
ROOT = Path(__file__).parent.parent


def message(number: int = 0, **fields: Any) -> Message:
    made: dict[str, Any] = {
        "type": "alert.began",
        "unix": 1_700_000_000.5,
        "instance": Instance("us-east", "host-1"),
        "rule": "pool_utilisation",
        "subject": "burst",
        "severity": Severity.WARNING,
        "says": f"pool burst is {number} % full (alert from 80 %)",
        "value": 0.9312345678,
        "threshold": 0.8,
        "since_unix": 1_699_999_940.0,
    }
    return Message.new(**{**made, **fields})


def row(to: Receiver | str, **fields: Any) -> Webhook:
    url = to if isinstance(to, str) else to.url
    return Webhook.model_validate({"url": url, "secret": SECRET, **fields})


@asynccontextmanager
async def sender(*rows: Webhook, told: Told, limits: Limits = QUICK) -> AsyncIterator[Webhooks]:
    made = Webhooks(
        rows,
        version="0",
        unix=time.time,
        rng=random.Random(1),
        notify=telling(told),
        limits=limits,
    )
    made.start()
    try:
        yield made
    finally:
        await made.close()


def counts(webhooks: Webhooks, number: int = 0) -> dict[str, float]:
    return {
        dict(gauge.labels).get("what", "waiting"): gauge.value
        for gauge in webhooks.gauges()
        if dict(gauge.labels)["webhook"] == f"webhooks[{number}]"
    }


# What is sent


async def test_webhook_when_it_is_sent_is_signed_and_says_what_how_bad_and_where() -> None:
    told: Told = []
    one = message(93)
    async with receiver() as to, sender(row(to), told=told) as webhooks:
        webhooks.send(one)
        await eventually(lambda: to.taken)
    (got,) = to.taken
    assert got.signed
    assert (got.id, re.fullmatch(r"msg_[0-9a-f]{32}", got.id) is not None) == (one.id, True)
    assert abs(int(got.timestamp) - time.time()) < 60
    assert got.headers["Content-Type"] == "application/json"
    assert got.headers["User-Agent"] == "beacon-proxy/0 (alerts)"
    assert got.json == {
        "text": "WARNING pool_utilisation: pool burst is 93 % full (alert from 80 %)"
        " [us-east, host-1]",
        "type": "alert.began",
        "timestamp": "2023-11-14T22:13:20.500Z",
        "data": {
            "rule": "pool_utilisation",
            "subject": "burst",
            "severity": "warning",
            "value": 0.931235,
            "threshold": 0.8,
            "since": "2023-11-14T22:12:20.000Z",
            "region": "us-east",
            "instance": "host-1",
            "key": "pool_utilisation/burst/warning@us-east/host-1",
        },
    }
    assert told == []


async def test_webhook_when_its_format_is_text_has_nothing_else() -> None:
    async with receiver() as to, sender(row(to, format="text"), told=[]) as webhooks:
        webhooks.send(message(93, type="alert.ended"))
        await eventually(lambda: to.taken)
    assert to.taken[0].json == {
        "text": "ENDED pool_utilisation: pool burst is 93 % full (alert from 80 %), after 60 s"
        " [us-east, host-1]"
    }


async def test_webhook_when_it_has_no_secret_is_not_signed() -> None:
    async with receiver() as to, sender(row(to, secret=None), told=[]) as webhooks:
        webhooks.send(message())
        await eventually(lambda: to.taken)
    assert not to.taken[0].signed


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=200), key=st.binary(min_size=1, max_size=64))
def test_signature_when_made_of_anything_is_what_the_standards_library_makes(
    body: bytes, key: bytes
) -> None:
    text = body.decode("latin-1")
    stamp = str(int(time.time()))
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": stamp,
        "webhook-signature": signature(key, "msg_1", stamp, text.encode()),
    }
    Verifier(key).verify(text, headers, json_parse=False)


@pytest.mark.parametrize(
    "secret",
    [
        SECRET,
        SECRET.removeprefix("whsec_"),
        "whsec_c2VjcmV0cw",  # without its padding
        "c2VjcmV0cw==",
        "0123456789abcdef" * 4,  # hex digits are base64, too
        "hunter2",
        "password",
    ],
)
async def test_secret_when_it_is_taken_signs_what_the_standards_library_verifies_with_it(
    secret: str,
) -> None:
    assert signing_key(secret) == Verifier(secret)._whsecret
    async with receiver(secret=secret) as to, sender(row(to, secret=secret), told=[]) as webhooks:
        webhooks.send(message())
        await eventually(lambda: to.taken)
    assert to.taken[0].signed


@pytest.mark.parametrize(
    "secret",
    ["whsec_", "whsec_x", "whsec_a b", "whsec_ü", "schlüssel", "not base64!", "a-b_", "x"],
)
def test_secret_when_it_is_no_base64_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="must be base64, with or without whsec_ before it"):
        signing_key(secret)


# Failures


async def test_webhook_when_it_fails_twice_is_delivered_once_with_one_id_and_new_stamps() -> None:
    told: Told = []
    stamps = iter([1000.0, 2000.0, 3000.0])
    async with receiver(500, 503) as to:
        webhooks = Webhooks(
            [row(to, secret=None)],
            version="0",
            unix=lambda: next(stamps),
            rng=random.Random(1),
            notify=telling(told),
            limits=QUICK,
        )
        webhooks.start()
        webhooks.send(message())
        await eventually(lambda: to.taken)
        await eventually(lambda: counts(webhooks)["delivered"] == 1)
        await webhooks.close()
    assert len({got.id for got in to.tries}) == 1
    assert [got.timestamp for got in to.tries] == ["1000", "2000", "3000"]
    assert len(to.taken) == 1
    assert told == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 504, 599])
async def test_webhook_when_the_status_may_pass_is_tried_again(status: int) -> None:
    async with receiver(status) as to, sender(row(to), told=[]) as webhooks:
        webhooks.send(message())
        await eventually(lambda: to.taken)
    assert len(to.tries) == 2


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 403, 404, 410])
async def test_webhook_when_it_is_refused_is_told_and_not_tried_again(status: int) -> None:
    """A redirect, too: whoever may answer there has not been given the signature."""
    told: Told = []
    async with receiver() as other, receiver(status) as to:
        to.headers = {"Location": other.url}
        one = message()
        async with sender(row(to), told=told) as webhooks:
            webhooks.send(one)
            await eventually(lambda: told)
            assert counts(webhooks) == {"delivered": 0, "failed": 1, "dropped": 0, "waiting": 0}
    ((event, fields),) = told
    assert event == "webhook.failed"
    said = f"{status} (redirects are not followed)" if status < 400 else str(status)
    assert fields == {
        "webhook": "webhooks[0]",
        "host": "127.0.0.1",
        "error": said,
        "id": one.id,
        "rule": "pool_utilisation",
    }
    assert (len(to.tries), other.tries) == (1, [])


async def test_webhook_when_its_receiver_is_down_for_a_while_arrives_then_in_order() -> None:
    told: Told = []
    with closed_port() as port:
        limits = Limits(tries=1000, timeout=1, first_wait=0.01, longest_wait=0.02, waiting=8)
        to_be = row(f"http://127.0.0.1:{port}/{HIDDEN}")
        sending = sender(to_be, told=told, limits=limits)
        webhooks = await sending.__aenter__()
        for number in range(5):
            webhooks.send(message(number))
        await asyncio.sleep(0.05)
        assert counts(webhooks) == {"delivered": 0, "failed": 0, "dropped": 0, "waiting": 5}
        async with receiver(port=port) as to:
            await eventually(lambda: len(to.taken) == 5)
            await eventually(lambda: counts(webhooks)["delivered"] == 5)
            await sending.__aexit__(None, None, None)
    assert [got.json["text"].split(" %")[0][-1] for got in to.taken] == list("01234")
    assert told == []


async def test_webhook_when_patience_is_over_tells_why_and_goes_on_to_the_next() -> None:
    told: Told = []
    async with receiver(500, 500, 500, 500) as to, sender(row(to), told=told) as webhooks:
        webhooks.send(message(1))
        webhooks.send(message(2))
        await eventually(lambda: to.taken)
    assert [(event, fields["error"]) for event, fields in told] == [("webhook.failed", "500")]
    assert " 2 %" in to.taken[0].json["text"]


async def test_webhook_when_its_receiver_hangs_is_given_up_and_others_are_not_held_up() -> None:
    told: Told = []
    limits = Limits(tries=2, timeout=0.6, first_wait=0.01, longest_wait=0.02, at_end=0.05)
    async with receiver() as slow, receiver() as quick:
        slow.answers.clear()
        async with sender(row(slow), row(quick), told=told, limits=limits) as webhooks:
            webhooks.send(message())
            await eventually(lambda: quick.taken)
            assert not told
            await eventually(lambda: told)
    assert told[0][1]["error"] == "no answer in time"
    assert told[0][1]["webhook"] == "webhooks[0]"


@pytest.mark.parametrize("status", [b"500", b"200", b"404"])
async def test_webhook_when_an_answer_never_ends_is_cut_at_once(status: bytes) -> None:
    """aiohttp-retry keeps an answer that it does not want for as long as it waits: 300 s."""

    async def endless(conn: BackendConn) -> None:
        await conn.request()
        await conn.send(b"HTTP/1.1 " + status + b" X\r\nContent-Length: 1000\r\n\r\nx")
        await conn.request()

    limits = Limits(tries=2, timeout=30, first_wait=30, at_end=0.05)
    async with RawBackend(endless) as to, sender(row(to.url), told=[], limits=limits) as webhooks:
        webhooks.send(message())
        await eventually(lambda: to.requests)
        await eventually(lambda: to.open_connections == 0)
        assert counts(webhooks)["waiting"] == (status == b"500")


async def test_webhook_when_retry_after_is_asked_for_waits_that_long_within_bounds() -> None:
    patience = Patience(Limits(first_wait=1.0, longest_wait=300.0), random.Random(1))

    class Answer:
        def __init__(self, value: str) -> None:
            self.headers = {"Retry-After": value}

    def wait(attempt: int, value: str = "") -> float:
        return patience.get_timeout(attempt, Answer(value) if value else None)  # type: ignore[arg-type]

    assert [0.75 <= wait(n + 1) / 2**n <= 1.25 for n in range(8)] == [True] * 8
    assert wait(1, "7") == 7.0
    assert wait(1, "0") >= 0.75
    assert wait(1, "9" * 400) == 300.0
    for odd in ("soon", "-1", "1.5", "²", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert wait(1, odd) <= 1.25
    assert 225.0 <= wait(30) <= 300.0


# Bounds and the end


async def test_webhook_when_thousands_come_keeps_the_newest_and_counts_the_others() -> None:
    told: Told = []
    async with receiver() as to:
        to.answers.clear()
        async with sender(row(to), told=told) as webhooks:
            webhooks.send(message(0))
            await eventually(lambda: to.tries)
            for number in range(1, 5001):
                webhooks.send(message(number))
            assert counts(webhooks) == {"delivered": 0, "failed": 0, "dropped": 4992, "waiting": 9}
            assert [event for event, _ in told] == ["webhook.overflowed"], "once"
            to.answers.set()
            await eventually(lambda: len(to.taken) == 9)
    numbers = [int(re.findall(r"is (\d+) %", got.json["text"])[0]) for got in to.taken]
    assert numbers == [0, *range(4993, 5001)]


async def test_webhook_when_the_proxy_ends_still_goes_out_if_it_can() -> None:
    told: Told = []
    async with receiver(500) as to:
        async with sender(row(to), told=told) as webhooks:
            webhooks.send(message())
        assert len(to.taken) == 1
        webhooks.send(message())
        assert counts(webhooks)["dropped"] == 1
    assert told == []


async def test_webhook_when_it_cannot_go_out_at_the_end_is_told_in_bounded_time() -> None:
    told: Told = []
    async with receiver() as to:
        to.answers.clear()
        started = time.monotonic()
        async with sender(row(to), told=told) as webhooks:
            for number in range(3):
                webhooks.send(message(number))
            await eventually(lambda: to.tries)
        assert time.monotonic() - started < 5
    assert [(event, fields["error"]) for event, fields in told] == [
        ("webhook.failed", "the proxy ended")
    ] * 3
    assert counts(webhooks)["failed"] == 3


@pytest.mark.parametrize("before", [True, False])
async def test_webhook_when_it_is_hurried_ends_at_once(before: bool) -> None:
    told: Told = []
    limits = Limits(at_end=60)
    async with receiver() as to:
        to.answers.clear()
        sending = sender(row(to), told=told, limits=limits)
        webhooks = await sending.__aenter__()
        webhooks.send(message())
        await eventually(lambda: to.tries)
        if before:
            webhooks.hurry()
        closing = asyncio.create_task(webhooks.close(), name="closing")
        await asyncio.sleep(0.02)
        if not before:
            assert not closing.done()
            webhooks.hurry()
        async with asyncio.timeout(5):
            await closing
    assert [fields["error"] for _, fields in told] == ["the proxy ended"]


# Secrets


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


async def test_secrets_when_all_goes_wrong_are_told_nowhere(
    everything_logged: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    told: Told = []
    with closed_port() as port:
        async with (
            receiver(404, 302) as to,
            blackhole() as nowhere,
            RawBackend(answer(b"HTTP/1.1 nothing\r\n\r\n")) as odd,
        ):
            to.headers = {"Location": f"http://127.0.0.1:1/{HIDDEN}"}
            rows = [
                row(f"http://127.0.0.1:{port}/{HIDDEN}"),
                row(to),
                row(f"http://127.0.0.1:{nowhere}/{HIDDEN}"),
                row(f"https://127.0.0.1:{to.port}/{HIDDEN}"),  # speaks no TLS
                row(f"{odd.url}/{HIDDEN}"),  # aiohttp's error has the whole URL
            ]
            limits = Limits(tries=2, timeout=0.1, first_wait=0.01, longest_wait=0.02)
            async with sender(*rows, told=told, limits=limits) as webhooks:
                webhooks.send(message())
                webhooks.send(message())
                await eventually(lambda: len(told) == 10, 10)
                shown = f"{webhooks!r} {vars(webhooks)!r} {list(webhooks.gauges())!r} {rows!r}"
    reasons = {fields["webhook"]: fields["error"] for _, fields in told}
    assert reasons["webhooks[0]"] == "Connection refused"
    assert reasons["webhooks[1]"] == "302 (redirects are not followed)"
    assert reasons["webhooks[2]"] == "no answer in time"
    assert reasons["webhooks[4]"] == "ClientResponseError"
    out, err = capsys.readouterr()
    for text in (json.dumps(told), shown, everything_logged.text, out, err):
        assert HIDDEN not in text
        assert SECRET[6:] not in text


async def test_webhook_when_its_certificate_is_not_trusted_sends_nothing() -> None:
    told: Told = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    limits = Limits(tries=1, timeout=1)
    async with receiver(tls=context) as to, sender(row(to), told=told, limits=limits) as webhooks:
        webhooks.send(message())
        await eventually(lambda: told)
    assert told[0][1]["error"] == "its TLS certificate is not trusted, or TLS failed"
    assert to.tries == []


def test_reason_when_it_is_any_error_quotes_no_url() -> None:
    url = f"http://h/{HIDDEN}"
    key: Any = None
    for error in (
        aiohttp.InvalidURL(url),
        aiohttp.NonHttpUrlClientError(url),
        aiohttp.ClientConnectorError(key, OSError(111, f"cannot connect to {url}")),
        aiohttp.ServerDisconnectedError(url),
        OSError(f"{url}"),
        ValueError(url),
        TimeoutError(url),
    ):
        assert HIDDEN not in reason(error)
    assert reason(OSError(-2, "name")) == "OSError"
    error = aiohttp.ClientConnectorDNSError(key, OSError(-2, url))
    assert reason(error) == "its name cannot be resolved"
