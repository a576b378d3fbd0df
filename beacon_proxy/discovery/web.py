"""Backends from a URL that answers JSON."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from .answer import SIZE_MOST, NoAnswer, parsed


class Web:
    """A URL that answers the array; asked with the tag of its last answer, if it gave one."""

    def __init__(self, url: str, seconds: float, version: str) -> None:
        from aiohttp_retry import ExponentialRetry

        parts = urlsplit(url)
        # Neither path nor query: either may hold a token.
        self.name = f"url {parts.scheme}://{parts.netloc}"
        self._url = url
        self._version = version
        self._session: aiohttp.ClientSession | None = None
        self._tag: str | None = None  # of the last good answer
        self._data: bytes | None = None  # the last good answer, as it came
        # A connection that breaks is asked for once more; what lasts longer is for the next look.
        self._retry = ExponentialRetry(
            attempts=2,
            start_timeout=min(0.1, seconds / 20),
            exceptions={aiohttp.ClientConnectionError},
            retry_all_server_errors=False,
        )

    async def look(self) -> list[Any] | None:
        from aiohttp_retry import RetryClient

        # As it is, for a small body may unpack to any size.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._tag is not None:
            headers["If-None-Match"] = self._tag
        client = RetryClient(self._opened(), retry_options=self._retry)
        try:
            async with client.get(self._url, headers=headers, allow_redirects=False) as answer:
                if answer.status == 304 and self._tag is not None:
                    return None
                data = await _body(answer)
            document = None if data == self._data else parsed(data)
            # Only now: an answer that was given up on its way was seen by nobody.
            self._tag, self._data = answer.headers.get("ETag"), data
            return document
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # Not its text, which may quote the URL.
            raise NoAnswer(f"cannot be asked: {type(exc).__name__}") from None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"User-Agent": f"beacon-proxy/{self._version} (discovery)"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                connector=aiohttp.TCPConnector(force_close=True, limit=4),
            )
        return self._session

    async def rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    if answer.status != 200:
        moved = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise NoAnswer(f"says {answer.status}{moved}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise NoAnswer("is compressed, though it was asked not to be")
    body = bytearray()
    async for piece in answer.content.iter_chunked(1 << 16):
        body += piece
        if len(body) > SIZE_MOST:
            raise NoAnswer(f"is longer than {SIZE_MOST} bytes")
    return bytes(body)
