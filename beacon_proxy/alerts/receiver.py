"""One webhook: signs a message, sends it, and tries again as long as that may help.

What is neither 2xx, 408, 429 nor 5xx is a refusal for good, a redirect, too: the signature is for
the host that was configured. URL and secret are told nobody; of a failure the host may be.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import random
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from aiohttp_retry import ExponentialRetry, RetryClient

from ..config.alerts import Webhook, signing_key
from ..contracts import Clock
from .message import Message

# aiohttp-retry tells each try at the level of debug, with what may quote a URL.
_SILENT = logging.Logger("beacon_proxy.alerts")
_SILENT.disabled = True


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a sender is."""

    tries: int = 12
    timeout: float = 15.0  # s a try; Standard Webhooks recommends 15 to 30
    first_wait: float = 1.0  # s before the second try, doubled each time
    longest_wait: float = 300.0  # s
    waiting: int = 256  # messages a webhook, the one under way beside
    at_end: float = 3.0  # s that the end of the process waits for what is still to go out


def signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """The value of `webhook-signature`; source: Standard Webhooks 1.0.0, "Signature scheme"."""
    signed = b".".join((message_id.encode(), timestamp.encode(), body))
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


@dataclass(frozen=True, slots=True)
class Delivery:
    """How one message fared."""

    taken: bool
    said: str  # the status, or why there is none


class Receiver:
    """One webhook as configured.

    Attributes:
        label: its place in the configuration.
        host: all of its URL that may be told.
    """

    def __init__(self, row: Webhook, number: int) -> None:
        self.label = f"webhooks[{number}]"
        self._url = row.url.get_secret_value()
        self.host = urlsplit(self._url).hostname or ""
        self._key = None if row.secret is None else signing_key(row.secret.get_secret_value())
        self._text_alone = row.format == "text"

    async def deliver(
        self, message: Message, session: aiohttp.ClientSession, unix: Clock, retry: Patience
    ) -> Delivery:
        """Send it until it is taken, refused for good, or patience is over."""
        body = message.text_alone() if self._text_alone else message.payload()

        async def sign(
            request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
        ) -> aiohttp.ClientResponse:
            # For each try anew: receivers refuse a time stamp that is five minutes old.
            stamp = str(int(unix()))
            request.headers["webhook-id"] = message.id
            request.headers["webhook-timestamp"] = stamp
            if self._key is not None:
                request.headers["webhook-signature"] = signature(self._key, message.id, stamp, body)
            return await handler(request)

        client = RetryClient(session, logger=_SILENT, retry_options=retry)
        try:
            async with client.post(
                self._url,
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
                middlewares=(sign,),
            ) as answer:
                said = str(answer.status)
                if 300 <= answer.status < 400:
                    said += " (redirects are not followed)"
                return Delivery(200 <= answer.status < 300, said)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return Delivery(False, reason(exc))


def reason(exc: Exception) -> str:
    """Why there was no answer, in words that quote no URL."""
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return "its name cannot be resolved"
    if isinstance(exc, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError)):
        return "its TLS certificate is not trusted, or TLS failed"
    number = exc.errno if isinstance(exc, OSError) else None
    return os.strerror(number) if number and number > 0 else type(exc).__name__


class Patience(ExponentialRetry):
    """When to try again: doubling, with jitter, and as `Retry-After` asks."""

    def __init__(self, limits: Limits, rng: random.Random) -> None:
        super().__init__(
            attempts=limits.tries,
            start_timeout=limits.first_wait / 2,  # it is doubled before the first use
            max_timeout=limits.longest_wait,
            exceptions={aiohttp.ClientError, OSError},  # a timeout is one, too
            retry_all_server_errors=False,  # all are asked of `_is_final`
            evaluate_response_callback=self._is_final,
        )
        self._rng = rng
        self._longest = limits.longest_wait

    async def _is_final(self, response: aiohttp.ClientResponse) -> bool:
        if response.status < 500 and response.status not in (408, 429):
            return True
        response.close()  # aiohttp-retry would leave it to the collector
        return False

    def get_timeout(self, attempt: int, response: aiohttp.ClientResponse | None = None) -> float:
        wait = super().get_timeout(attempt) * self._rng.uniform(0.75, 1.25)
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        if asked.isascii() and asked.isdecimal():
            wait = max(wait, float(asked[:9]))
        return min(wait, self._longest)


def session_of(version: str, timeout: float) -> aiohttp.ClientSession:
    """A session for webhooks; `timeout` s a try."""
    return aiohttp.ClientSession(
        headers={"User-Agent": f"beacon-proxy/{version} (alerts)"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=timeout),
        # Alerts are rare: a connection kept meanwhile is one that the receiver has closed.
        connector=aiohttp.TCPConnector(force_close=True),
    )
