"""The schema and the example are what the models make, and hold every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from beacon_proxy import schema
from beacon_proxy.config import Settings, load_settings
from beacon_proxy.plugins import Plugins, option_model

from .kit_proxy import plugins

ROOT = Path(__file__).parent.parent
SWITCHED_OFF = re.compile(r"(?m)^#(?=  )")


def test_generated_files_when_made_again_are_equal() -> None:
    for name, text in schema.made(plugins()).items():
        assert (ROOT / name).read_text("utf-8") == text, "python -m beacon_proxy.schema --write"


def test_example_when_loaded_as_it_is_is_valid_and_gives_the_defaults() -> None:
    text = (ROOT / schema.EXAMPLE).read_text("utf-8")
    assert text.startswith("# yaml-language-server: $schema=./beacon.schema.json\n")
    settings = load_settings(ROOT / schema.EXAMPLE, {"RUNPOD_API_KEY": "k"}, plugins())
    assert settings.warnings == []
    plain = Settings()
    for key in set(Settings.model_fields) - {"backends", "middleware"}:
        assert getattr(settings, key) == getattr(plain, key)
    for entry in settings.middleware:
        cls: Any = plugins().middleware[entry.name]
        made = cls(**entry.options)
        assert all(getattr(made, key) == getattr(cls(), key) for key in entry.options)


def test_example_when_all_is_switched_on_has_every_key_there_is(tmp_path: Path) -> None:
    text = SWITCHED_OFF.sub("", (ROOT / schema.EXAMPLE).read_text("utf-8"))
    path = tmp_path / "beacon.yaml"
    path.write_text(text, "utf-8")
    load_settings(path, {"RUNPOD_API_KEY": "k", "ALERT_SECRET": "c2VjcmV0"}, plugins())
    document = yaml.safe_load(text)
    chain = {name: options for row in document.pop("middleware") for name, options in row.items()}
    assert missing(Settings, document, "") == []
    for name, cls in plugins().middleware.items():
        assert missing(option_model(cls), chain[name], name) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "server: {prot: 1}",
        "server: {port: 65536}",
        "server: {port: http}",
        "timeouts: {idle: -1}",
        "backends: [{name: a}]",
        "backends: [{name: a, provider: openai, url: 'http://h', pool: big}]",
        "middleware: [health: {probe_intervall: 1}]",
        "middleware: [cost: {blend: {by: time}}]",
        "middleware: [{health: , region: }]",
        "budgets: [{name: a, per: week, usd: 1}]",
    ],
)
def test_schema_when_a_document_is_wrong_refuses_it(wrong: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")  # comes with one of the real clients
    validator = jsonschema.Draft202012Validator(json.loads((ROOT / schema.SCHEMA).read_text()))
    assert not validator.is_valid(yaml.safe_load(wrong))


def test_schema_when_a_document_is_right_accepts_it() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    made = json.loads((ROOT / schema.SCHEMA).read_text())
    jsonschema.Draft202012Validator.check_schema(made)
    text = (ROOT / schema.EXAMPLE).read_text("utf-8")
    others = "server: {port: '${PORT}'}\nmiddleware: [health, region: , mine: {any: 1}]"
    for right in (text, SWITCHED_OFF.sub("", text), others):
        errors = jsonschema.Draft202012Validator(made).iter_errors(yaml.safe_load(right))
        assert [error.message for error in errors] == []


def missing(model: type[BaseModel], document: dict[str, Any], at: str) -> list[str]:
    """The keys of the models that the first row of every section lacks."""
    lacking: list[str] = []
    for name, field_ in model.model_fields.items():
        key, inner = field_.alias or name, _model_in(field_.annotation)
        if key == "middleware":
            continue
        if key not in document:
            lacking.append(f"{at}.{key}")
        elif inner:
            value = document[key]
            lacking += missing(inner, value[0] if isinstance(value, list) else value, f"{at}.{key}")
    return lacking


def _model_in(hint: Any) -> type[BaseModel] | None:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next((found for arg in get_args(hint) if (found := _model_in(arg))), None)


def test_schema_when_read_has_every_key_with_a_description() -> None:
    made = json.loads((ROOT / schema.SCHEMA).read_text("utf-8"))
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(made["properties"]) == set(Settings.model_fields)
    for name, part in [("", made), *made["$defs"].items()]:
        assert part["additionalProperties"] is False, name
        for key, about in part["properties"].items():
            assert about.get("description"), f"{name}.{key}"
    link = made["properties"]["middleware"]["items"]["anyOf"][1]
    assert set(link["properties"]) == set(plugins().middleware)
    assert made["$defs"]["Server"]["properties"]["port"]["maximum"] == 65535


def test_schema_when_asked_without_write_changes_nothing_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Plugins, "discover", plugins)
    monkeypatch.setattr(schema, "__file__", str(tmp_path / "beacon_proxy" / "schema.py"))
    assert schema.main([]) == 1
    assert list(tmp_path.iterdir()) == []
    assert schema.main(["--write"]) == 0
    assert (tmp_path / schema.EXAMPLE).exists()
    assert schema.main([]) == 0
    assert "beacon.schema.json: is not what the models make" in capsys.readouterr().err
