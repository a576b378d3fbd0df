"""What a source is, and what an answer may be.

What a source raises says what went wrong without a query, a token or a line of the answer.
"""

from __future__ import annotations

from typing import Any, Protocol

import orjson

SIZE_MOST = 1 << 20  # bytes of an answer
ROWS_MOST = 1000  # of an answer; each is looked at for every request


class NoAnswer(Exception):
    """The source could not be asked, or what it says is no answer."""


class Source(Protocol):
    """One place that knows backends."""

    name: str  # for the operator; no secret

    async def look(self) -> list[Any] | None:
        """The rows, as mappings or URLs, not yet checked; None: the same as last time.

        Raises:
            NoAnswer: there is none.
        """
        ...

    async def rest(self, seconds: float) -> None:
        """Wait for so long, or until there is reason to look."""
        ...

    async def close(self) -> None: ...


def parsed(data: bytes) -> list[Any]:
    """Read an array of JSON.

    Raises:
        NoAnswer: it is something else, a part of one, or too long.
    """
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise NoAnswer(f"is not JSON: {exc.msg} at byte {exc.pos}") from None
    if not isinstance(answer, list):
        raise NoAnswer("is no JSON array")
    if len(answer) > ROWS_MOST:
        raise NoAnswer(f"has {len(answer)} rows; {ROWS_MOST} are the most")
    return answer


def raised(exc: Exception) -> str:
    """What an error of our own or of a plugin is and where it was raised; its text may quote."""
    step = exc.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    where = f" in {step.tb_frame.f_code.co_qualname}" if step is not None else ""
    return f"{type(exc).__name__}{where}"
