"""An answer of a source to backends: rows checked one by one, the good ones taken."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import Settings, resolve_row
from ..config.backends import Discovery
from ..config.values import split_url
from ..contracts import Backend, Provider
from ..errors import ConfigError
from .answer import raised

_NAME_MOST = 100  # characters, as `config.values` has it
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]")
_ROWS_AT_ONCE = 10  # a millisecond, then the loop has others to see to
_PROBLEM_MOST = 200  # characters of one in the log


async def backends_of(
    answer: Sequence[Any],
    source: Discovery,
    settings: Settings,
    providers: Mapping[str, Provider],
    last: Iterable[Backend] = (),
) -> tuple[list[Backend], list[str]]:
    """Turn an answer into backends and problems, one line or more a row that is wrong.

    A wrong row whose backend is known leaves that as it was: only an answer that leaves it out
    takes it away. Others have the loop in between, for a row takes 0.1 ms.

    Args:
        answer: mappings with the keys of `backends`, or URLs.
        source: says what its rows leave open.
        settings, providers: as of the whole configuration.
        last: the backends of the last good answer.
    """
    known = {backend.name: backend for backend in last}
    found: dict[str, Backend] = {}
    kept: set[str] = set()  # of them, those as they were
    problems: list[str] = []
    usual = {"provider": source.provider, **source.backend.model_dump(exclude_unset=True)}
    for number, row in enumerate(answer):
        if number % _ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
        whole = _whole(row, usual)
        try:
            backend = _made(row, whole, settings, providers)
        except ConfigError as exc:
            problems += (_line(number, problem) for problem in exc.problems)
            name = whole.get("name")
            if isinstance(name, str) and name in known and name not in found:
                found[name] = known[name]
                kept.add(name)
            continue
        if backend.name in found and backend.name not in kept:
            problems.append(_line(number, f"name: must be unique, got {backend.name} twice"))
            continue
        kept.discard(backend.name)
        found[backend.name] = backend
    return list(found.values()), problems


def _made(
    row: Any, whole: Mapping[str, Any], settings: Settings, providers: Mapping[str, Provider]
) -> Backend:
    """A row, which is `whole` with what its source says, as a backend. Raises ConfigError."""
    if not isinstance(row, str | dict):
        raise ConfigError("must be a mapping with the keys of `backends`, or a URL")
    tls = row.get("tls") if isinstance(row, dict) else None
    if isinstance(tls, dict) and tls.get("ca_file") is not None:
        # Whoever writes the source has no business with the files of this machine.
        raise ConfigError("tls.ca_file: must stand in beacon.yaml, at discovery[].backend.tls")
    try:
        backend = resolve_row(whole, settings, providers)
        return backend if whole.get("region") else replace(backend, region_assumed=True)
    except ConfigError:
        raise
    except Exception as exc:  # of a provider, too: the other rows have no part in it
        raise ConfigError(f"cannot be checked: {raised(exc)}") from None


def _line(number: int, problem: str) -> str:
    return f"[{number}].{problem}"[:_PROBLEM_MOST]


def _whole(row: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what its source says of all; its own keys win, also where they say null."""
    own = row if isinstance(row, dict) else {"url": row}
    whole = {**usual, **own}
    if whole.get("name") is None:
        whole["name"] = derived_name(whole.get("provider"), whole.get("url"))
    return whole


def derived_name(provider: object, url: object) -> str:
    """Name a backend by where it is: the same each time, and for no other.

    `golem-10.0.0.1-11434`, `golem-fdaa--3-80`. Where that could be another place, too (a base path,
    https on another port than 443, http on that), or is too long, a mark of 8 digits is added.
    """
    try:
        scheme, host, port, path = split_url(str(url))
    except ValueError:
        return "unnamed"  # a row that is refused for its URL anyway
    plain = _NOT_OF_A_NAME.sub("-", f"{provider}-{host}-{port}{path}")
    if not path and (scheme == "https") == (port == 443) and len(plain) <= _NAME_MOST:
        return plain
    where = f"{provider} {scheme} {host} {port} {path}"
    mark = hashlib.sha256(where.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{plain[: _NAME_MOST - 9]}-{mark}"
