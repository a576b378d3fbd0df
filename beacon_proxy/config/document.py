"""A beacon.yaml as plain data: parsed strictly, then with the environment put in.

YAML by the safe loader, less what surprises: a key given twice is an error, and nothing becomes a
date. `${NAME}` inside a text is the environment variable's value, `$$` is a dollar sign.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .problems import Place, dotted

_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)\}|(\{))")
_DEPTH = 40  # levels; YAML's anchors can make a document that has no end


class _Loader(yaml.SafeLoader):
    """The safe loader, telling apart what PyYAML lets pass."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class-level table
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                self.repeated.append(
                    f"{line}:{column}: duplicate key {key.value}, first in line {seen[key.value]}"
                )
            seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """Read a file into its sections; those left empty are left out.

    Raises:
        ConfigError: each problem as `file:line:column: problem`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text") from exc
    document = _parse(text, path)
    if document is None:
        raise ConfigError(f"{path}: is empty")
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping of sections such as server and backends")
    return {key: section for key, section in document.items() if section is not None}


def _parse(text: str, path: Path) -> object:
    try:
        loader = _Loader(text)
        document: object = loader.get_single_data()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        about = " ".join(part for part in (exc.context, exc.problem) if part)
        if mark and any("${" in line for line in text.splitlines()[mark.line : mark.line + 1]):
            about += "; inside braces or brackets a ${…} must be quoted"
        raise ConfigError(f"{path}{place}: {about}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: is nested too deeply") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{path}: {' '.join(str(exc).split())}") from exc
    if loader.repeated:
        raise ConfigError([f"{path}:{problem}" for problem in loader.repeated])
    return document


def put_in(value: Any, env: Mapping[str, str], problems: list[str], place: Place = ()) -> Any:
    """Copy a document with the variables of its texts replaced; problems are added to the list."""
    if len(place) > _DEPTH:
        problems.append(f"{dotted(place[:4])}…: is nested too deeply")
        return None
    if isinstance(value, dict):
        return {key: put_in(item, env, problems, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [put_in(item, env, problems, (*place, i)) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        dollar, name, broken = match.groups()
        if dollar:
            return "$"
        if broken:
            problems.append(f"{dotted(place)}: has a ${{ that is no ${{NAME}}; $$ is a dollar sign")
        elif name not in env:
            problems.append(f"{dotted(place)}: environment variable {name} is not set")
        else:
            return env[name]
        return match.group()

    return _VARIABLE.sub(replace, value)


def veiled(
    problems: Iterable[str], written: Mapping[str, Any], env: Mapping[str, str]
) -> list[str]:
    """Put `${NAME}` back where a problem quotes what a variable stands for.

    The last net under the messages of plugins. Values under six characters are no secrets, and
    would be found inside other words.
    """
    names = {match[1] for match in _VARIABLE.findall(repr(written)) if match[1]}
    veils = [(env[name], f"${{{name}}}") for name in names if len(env.get(name, "")) >= 6]
    lines = list(problems)
    for value, veil in veils:
        lines = [line.replace(value, veil) for line in lines]
    return lines
