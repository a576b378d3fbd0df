"""beacon.schema.json and beacon.example.yaml, made from the models of the configuration.

`python -m beacon_proxy.schema` says whether the two files are what the models make; with `--write`
it writes them. In the example a line that begins with `#` and two spaces is YAML that is switched
off: without its `#` it is valid where it stands.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from .config.alerts import Webhook
from .config.autoscale import Scaled
from .config.backends import BackendSettings, Discovery, TokenPrice
from .config.checks import DEFAULT_CHAIN
from .config.money import Budget
from .config.settings import Settings
from .plugins import Plugins, option_model

SCHEMA, EXAMPLE = "beacon.schema.json", "beacon.example.yaml"
_COLUMN, _WIDTH = 40, 112  # where comments begin and end
_PLAIN = re.compile(r"[A-Za-z$/][A-Za-z0-9_.:/${}\-]*")  # needs no quotes in a block of YAML
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})
_VARIABLE = r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"

# What the example says where a key has no default, or would otherwise be empty.
_SAMPLES: dict[type[BaseModel], Mapping[str, Any]] = {
    BackendSettings: {
        "name": "golem-us-1",
        "provider": "golem",
        "url": "http://127.0.0.1:11434",
        "region": "us-east",
    },
    Discovery: {"provider": "golem", "file": "nodes.json"},
    TokenPrice: {"input": 0.05, "output": 0.2},
    Budget: {"name": "daily", "per": "day", "usd": 5},
    Webhook: {"url": "https://hooks.example/x", "secret": "${ALERT_SECRET}"},
    Scaled: {"backend": "runpod-eu", "max": 3},
}
_SECOND_BACKEND = """
  - name: runpod-eu
    provider: runpod
    url: https://api.runpod.ai/v2/ENDPOINT_ID
    region: eu-west
    api_key: ${RUNPOD_API_KEY}
"""
_OPENING = """\
# yaml-language-server: $schema=./beacon.schema.json
#
# Every key of beacon-proxy's configuration with its default. Copy it to beacon.yaml and keep what
# differs. `beacon-proxy check` finds every problem at once.
#
# ${NAME} in a text is the environment variable's value, $$ a dollar sign. A line that begins with
# `#` and two spaces is switched off: take away its `#` to switch it on.
"""


def schema(plugins: Plugins) -> dict[str, Any]:
    """Make the JSON schema (draft 2020-12) of a whole beacon.yaml."""
    chain = {name: option_model(plugins.middleware[name]) for name in DEFAULT_CHAIN}
    models: list[type[BaseModel]] = [Settings, *chain.values()]
    refs, whole = models_json_schema([(model, "validation") for model in models])
    definitions = whole["$defs"]
    definitions.pop("MiddlewareEntry")
    root = definitions.pop("Settings")
    root["properties"]["middleware"]["default"] = list(DEFAULT_CHAIN)
    root["properties"]["middleware"]["items"] = {
        "anyOf": [
            {"type": "string", "examples": list(DEFAULT_CHAIN)},
            {
                "type": "object",
                "description": "one middleware and its options",
                "properties": {
                    name: {"anyOf": [refs[model, "validation"], {"type": "null"}]}
                    for name, model in chain.items()
                },
                "additionalProperties": {"type": ["object", "null"]},  # of any installed plugin
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    _tidy(root)
    _tidy(definitions)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "beacon.yaml",
    }
    return {**head, **root, "$defs": dict(sorted(definitions.items()))}


def _tidy(node: Any) -> None:
    """Say what the loader lets pass besides the models, and drop titles, which only repeat keys.

    A number may be a `${NAME}`, and a list or mapping may be left empty.
    """
    if isinstance(node, list):
        for item in node:
            _tidy(item)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("title"), str):
        del node["title"]
    for item in node.values():
        _tidy(item)
    if node.get("type") in ("number", "integer", "boolean"):
        node["type"] = [node["type"], "string"]
        node["pattern"] = _VARIABLE
    elif node.get("type") in ("array", "object") and "default" in node:
        node["type"] = [node["type"], "null"]
    elif "$ref" in node and "default" in node:
        node["anyOf"] = [{"$ref": node.pop("$ref")}, {"type": "null"}]


def example(plugins: Plugins) -> str:
    """Make the annotated example: every key, its default and what it means."""
    blocks = [_OPENING]
    for name, field in Settings.model_fields.items():
        if name == "middleware":
            body = [_line("middleware:", field.description, 0), *_chain(plugins)]
        else:
            body = list(_entry(name, field, {}, 0))
        blocks.append("".join(body) + (_SECOND_BACKEND if name == "backends" else ""))
    return "\n".join(blocks)


def _chain(plugins: Plugins) -> Iterator[str]:
    for name in DEFAULT_CHAIN:
        cls = plugins.middleware[name]
        about = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        yield _line(f"- {name}:", about[:1].lower() + about[1:], 1)
        yield from _fields(option_model(cls), {}, 3)


def _fields(model: type[BaseModel], sample: Mapping[str, Any], level: int) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from _entry(field.alias or name, field, sample, level)


def _entry(key: str, field: FieldInfo, sample: Mapping[str, Any], level: int) -> Iterator[str]:
    """The lines of one key: live, or switched off where the default is to have none."""
    value = sample.get(key, None if field.is_required() else field.default)
    inner = _model_in(field.annotation)
    if inner is None:
        yield _line(f"{key}: {_scalar(value)}", _about(field, value), level)
        return
    yield _line(f"{key}:", field.description, level)
    many = isinstance(value, list)
    within = _SAMPLES.get(inner) or {name: getattr(value, name) for name in inner.model_fields}
    children = list(_fields(inner, within, level + (2 if many else 1)))
    if many:
        children[0] = _dashed(children[0], level + 1)
    off = inner is not BackendSettings and (many or value is None)
    yield from (_off(child) for child in children) if off else children


def _dashed(line: str, level: int) -> str:
    indent = "  " * level
    return f"{indent}- {line.removeprefix(indent + '  ')}"


def _off(lines: str) -> str:
    """Comment out, keeping the column of the comments; what is out already stays as it is."""
    return re.sub(r"(?m)^([^#\n].*?) ( #|$)", r"#\1\2", lines)


def _line(text: str, about: str | None, level: int) -> str:
    text = "  " * level + text
    if not about:
        return text + "\n"
    first, *more = wrap(about, _WIDTH - _COLUMN - 2, break_on_hyphens=False)
    rest = "".join(f"{'':{_COLUMN}}# {line}\n" for line in more)
    return f"{text:{_COLUMN - 1}} # {first}\n{rest}"


def _about(field: FieldInfo, value: Any) -> str | None:
    about = field.description
    if about and field.examples and value in (None, [], {}):
        about += f"; e.g. {_scalar(field.examples[0])}"
    return about


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _model_in(hint: Any) -> type[BaseModel] | None:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next(filter(None, map(_model_in, get_args(hint))), None)


def made(plugins: Plugins) -> dict[str, str]:
    """Both files by name, with their text."""
    text = json.dumps(schema(plugins), indent=2, ensure_ascii=False)
    return {SCHEMA: text + "\n", EXAMPLE: example(plugins)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m beacon_proxy.schema", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files instead of comparing")
    write = parser.parse_args(argv).write
    root, stale = Path(__file__).resolve().parents[1], 0
    for name, text in made(Plugins.discover()).items():
        path = root / name
        if path.exists() and path.read_text("utf-8") == text:
            continue
        if write:
            path.write_text(text, "utf-8")
            print(f"{name}: written")
        else:
            stale = 1
            print(f"{name}: is not what the models make; run with --write", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
