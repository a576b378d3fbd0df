"""Validation errors as lines an operator can act on: `key.path: problem, got value`.

Rule 1: a line shows a value as the file has it, so what a `${VARIABLE}` stands for is never told.
Rule 2: the value of a secret, of an unknown key and of what holds either is not shown at all.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError

Place = tuple[int | str, ...]  # keys and list indices from the top of the document

_WORDS: dict[str, str] = {
    "missing": "is required",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
_KINDS = (
    ("int", "must be a whole number"),
    ("float", "must be a number"),
    ("bool", "must be true or false"),
    ("string", "must be text"),
    ("list", "must be a list"),
    ("dict", "must be a mapping"),
    ("mapping", "must be a mapping"),
    ("model", "must be a mapping"),
    ("dataclass", "must be a mapping"),
)
_FIELD_FIRST = re.compile(r"([A-Za-z_]\w*)[\w.\[\]]*: ")
_USERINFO = re.compile(r"://[^/@\s]*@")
_QUERY = re.compile(r"(://[^?\s]*\?).*")


def dotted(place: Place) -> str:
    """`("backends", 2, "url")` as `backends[2].url`; a middleware is called by its name."""
    if place[:1] == ("middleware",) and len(place) > 2 and isinstance(place[1], int):
        place = ("middleware", *place[2:])
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def meant(word: object, known: Iterable[str]) -> str:
    """`, did you mean …?` where a known word is near; else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """Show a value in a message: short, on one line, without what a URL may hide."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, str):
        value = _QUERY.sub(r"\1…", _USERINFO.sub("://…@", value))
        value = value if len(value) <= 80 else value[:79] + "…"
    return json.dumps(value, ensure_ascii=False, default=str)


def first_field(said: str) -> str | None:
    """The field that a plugin's own message begins with: `a` of `a.b: must be …`."""
    match = _FIELD_FIRST.match(said)
    return match[1] if match else None


def lines(
    error: ValidationError,
    model: type[BaseModel],
    document: object,
    name: Callable[[Place], str] = dotted,
) -> Iterator[str]:
    """Turn a validation error into problems.

    Args:
        error: what `model` said.
        document: what the operator wrote, before variables were put in.
        name: how a place is called.
    """
    for detail in error.errors(include_url=False, include_input=False):
        place, kind = detail["loc"], detail["type"]
        if kind == "extra_forbidden":
            keys = _keys(_models_at(model, place[:-1]))
            yield f"{name(place)}: unknown key{meant(place[-1], keys)}"
            continue
        place = tuple(part for part in place if part != "[key]")
        said = _said(kind, detail["msg"], detail.get("ctx", {}))
        if first_field(said):  # a nested dataclass of a plugin, which names its field and value
            yield f"{name(place)}.{said}"
        else:
            yield f"{name(place)}: {said}{_got(kind, model, document, place)}"


def _said(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in _WORDS:
        plain = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        return _WORDS[kind].format(**plain).replace("'", "")
    for prefix, words in _KINDS:
        if kind.startswith(prefix + "_"):
            return words
    return message[:1].lower() + message[1:]


def _got(kind: str, model: type[BaseModel], document: object, place: Place) -> str:
    if kind == "missing" or _holds_secret(_annotation(model, place)):
        return ""
    value = document
    for part in place:
        try:
            value = value[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return ""  # a default, or a place that only pydantic knows
    return f", got {shown(value)}"


def _annotation(model: type[BaseModel], place: Place) -> object:
    """The type that a place of the document must have; None where there is none."""
    current: object = model
    for part in place:
        models = list(_models_in(current))
        if isinstance(part, str) and models:
            fields = [_field(found, part) for found in models]
            current = next((field for field in fields if field is not None), None)
        else:  # an item of a list, or of a mapping with free keys
            args = get_args(_bare(current))
            current = args[-1] if args else None
    return current


def _bare(hint: object) -> object:
    """A type without `Annotated[…]` and `… | None` around it."""
    while hasattr(hint, "__metadata__"):
        hint = get_args(hint)[0]
    args = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(args) == 1 and type(None) in get_args(hint):
        return _bare(args[0])
    return hint


def _field(model: type[BaseModel], key: str) -> object:
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            return field.annotation
    return None


def _models_in(hint: object) -> Iterator[type[BaseModel]]:
    bare = _bare(hint)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        yield bare


def _models_at(model: type[BaseModel], place: Place) -> Sequence[type[BaseModel]]:
    return list(_models_in(_annotation(model, place)))


def _keys(models: Iterable[type[BaseModel]]) -> list[str]:
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _holds_secret(hint: object) -> bool:
    if hint is SecretStr:
        return True
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return False  # shown as "a mapping" at most
    return any(_holds_secret(arg) for arg in get_args(hint))
