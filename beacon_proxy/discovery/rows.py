"""An answer of a source to backends: rows checked one by one, the good ones taken."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import Settings, resolve_row
from ..config.backends import Discovery
from ..config.values import split_url
from ..contracts import Backend, Provider
from ..errors import ConfigError
from .answer import raised

_NAME_MOST = 100  # characters, as `config.values` has it
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]")
_PROBLEM_MOST = 200  # characters of one in the log


def backends_of(
    answer: Iterable[Any], source: Discovery, settings: Settings, providers: Mapping[str, Provider]
) -> tuple[list[Backend], list[str]]:
    """Turn an answer into backends and problems, one line a row that is left out.

    Args:
        answer: mappings with the keys of `backends`, or URLs.
        source: says what its rows leave open.
        settings, providers: as of the whole configuration.
    """
    found: dict[str, Backend] = {}
    problems: list[str] = []
    usual = {"provider": source.provider, **source.backend.model_dump(exclude_unset=True)}
    for number, row in enumerate(answer):
        try:
            backend = resolve_row(_whole(row, usual), settings, providers)
        except ConfigError as exc:
            problems += (_line(number, problem) for problem in exc.problems)
            continue
        except Exception as exc:  # of a provider, too: the other rows have no part in it
            problems.append(_line(number, f"cannot be checked: {raised(exc)}"))
            continue
        if found.setdefault(backend.name, backend) is not backend:
            problems.append(_line(number, f"name: must be unique, got {backend.name} twice"))
    return list(found.values()), problems


def _line(number: int, problem: str) -> str:
    return f"[{number}].{problem}"[:_PROBLEM_MOST]


def _whole(row: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what its source says of all; its own keys win, also where they say null."""
    if isinstance(row, str):
        row = {"url": row}
    if not isinstance(row, dict):
        raise ConfigError("must be a mapping with the keys of `backends`, or a URL")
    tls = row.get("tls")
    if isinstance(tls, dict) and tls.get("ca_file") is not None:
        # Whoever writes the source has no business with the files of this machine.
        raise ConfigError("tls.ca_file: must stand in beacon.yaml, at discovery[].backend.tls")
    whole = {**usual, **row}
    if whole.get("name") is None:
        whole["name"] = derived_name(whole.get("provider"), whole.get("url"))
    return whole


def derived_name(provider: object, url: object) -> str:
    """Name a backend by where it is: the same each time, and for no other.

    `golem-10.0.0.1-11434`, `golem-fdaa--3-80`; with its base path where it has one.
    """
    try:
        _, host, port, path = split_url(str(url))
    except ValueError:
        return "unnamed"  # a row that is refused for its URL anyway
    plain = _NOT_OF_A_NAME.sub("-", f"{provider}-{host}-{port}{path}")
    if len(plain) <= _NAME_MOST:
        return plain
    # Cut, two of them could be one.
    mark = hashlib.sha256(f"{provider} {url}".encode("utf-8", "replace")).hexdigest()[:8]
    return f"{plain[: _NAME_MOST - 9]}-{mark}"
