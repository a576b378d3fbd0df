"""Where jobs are left, asked after and taken back: Conveyor's API, as README.md has it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import aiohttp

from beacon_proxy.contracts import Backend

WAIT = 10  # s that the service holds an answer back while there is no news


class Desk:
    """One backend's. Raises aiohttp's errors, which the core knows how to name."""

    def __init__(self, backend: Backend, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._base = backend.origin + backend.base_path
        self._fields = {name.decode(): value.decode() for name, value in backend.headers}
        self._fields["Authorization"] = f"Bearer {backend.api_key}"

    async def status(self) -> tuple[int, dict[str, Any]]:
        """Workers, models, how many wait. Wakes nobody, costs nothing."""
        async with self._session.get(self._base + "/status", headers=self._fields) as answer:
            return answer.status, await answer.json() if answer.status == 200 else {}

    async def leave(self, job: dict[str, Any]) -> tuple[int, dict[str, Any], str | None]:
        """Leave a job: the status, 201 or a refusal; what it says; how long to stay away."""
        post = self._session.post(self._base + "/jobs", json=job, headers=self._fields)
        async with post as answer:
            return answer.status, await answer.json(), answer.headers.get("Retry-After")

    async def news(self, job: str, seen: int, state: str) -> dict[str, Any]:
        """What there is beyond the pieces and the state known, or after `WAIT` what there was."""
        asked: dict[str, str | int] = {"after": seen, "state": state, "wait": WAIT}
        get = self._session.get(f"{self._base}/jobs/{job}", params=asked, headers=self._fields)
        async with get as answer:
            answer.raise_for_status()
            news: dict[str, Any] = await answer.json()
            return news

    async def take_back(self, job: str | None) -> None:
        """Stop a job that nobody wants any more. Never raises but CancelledError."""
        if job is not None:
            with suppress(aiohttp.ClientError, TimeoutError):
                url = f"{self._base}/jobs/{job}"
                await (await self._session.delete(url, headers=self._fields)).read()
