"""Entry points to plugin classes, and plugin classes to objects.

The built-in plugins are found like anyone's: a package that declares the entry-point group
`beacon_proxy.middleware` or `beacon_proxy.providers` is their equal. A middleware is a dataclass
whose fields are its options; a field whose metadata says `{"injected": True}` is filled by the core
instead (`clock`, `rng`, `region`, `notify`), where the dataclass declares it.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from .contracts import Clock, Notify, Provider, tell_nobody
from .errors import ConfigError

MIDDLEWARE_GROUP = "beacon_proxy.middleware"
PROVIDER_GROUP = "beacon_proxy.providers"


@dataclass(frozen=True, slots=True)
class Plugins:
    """The plugin classes at hand, by the name that a configuration uses."""

    providers: Mapping[str, type] = field(default_factory=dict)
    middleware: Mapping[str, type] = field(default_factory=dict)

    @classmethod
    def discover(cls) -> Plugins:
        """Load every installed plugin.

        Raises:
            ConfigError: naming each plugin that cannot be imported and each name claimed twice.
        """
        problems: list[str] = []
        installed = entry_points()  # once: each call reads the metadata of every package there is
        providers = _load(PROVIDER_GROUP, installed.select(group=PROVIDER_GROUP), problems)
        middleware = _load(MIDDLEWARE_GROUP, installed.select(group=MIDDLEWARE_GROUP), problems)
        if problems:
            raise ConfigError(problems)
        return cls(providers, middleware)


def _load(group: str, points: Iterable[EntryPoint], problems: list[str]) -> dict[str, type]:
    loaded: dict[str, type] = {}
    claimed: dict[str, str] = {}
    for point in points:
        if point.name in claimed:
            # A package that is installed and also in the working directory lists its plugins twice.
            if claimed[point.name] != point.value:
                problems.append(
                    f"plugin {point.name} ({group}): claimed by both {claimed[point.name]}"
                    f" and {point.value}; uninstall one"
                )
            continue
        claimed[point.name] = point.value
        try:
            plugin = point.load()
        except Exception as exc:  # the import of foreign code may raise anything
            problems.append(
                f"plugin {point.name} ({group}): {point.value} cannot be imported:"
                f" {type(exc).__name__}: {exc}"
            )
            continue
        if isinstance(plugin, type):
            loaded[point.name] = plugin
        else:
            problems.append(f"plugin {point.name} ({group}): {point.value} is not a class")
    return loaded


class _Options(BaseModel):
    """What every option model inherits."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def option_model(cls: type) -> type[BaseModel]:
    """Make the model that validates the options of a middleware dataclass.

    Its fields are the init fields of `cls` that are not injected, with their types, defaults and
    `metadata["help"]` as description; an option that is itself a dataclass is treated likewise.
    """
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"plugin {cls.__module__}:{cls.__qualname__} is not a dataclass")
    options = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("injected")]
    hints = _hints(cls, options)
    fields: dict[str, Any] = {f.name: (_strict(hints[f.name]), _described(f)) for f in options}
    return create_model(cls.__name__, __base__=_Options, __module__=cls.__module__, **fields)


def _hints(cls: type, options: list[dataclasses.Field[Any]]) -> dict[str, Any]:
    # Of the options alone: the type of an injected field may exist for type checkers only.
    body = {"__annotations__": {f.name: f.type for f in options}, "__module__": cls.__module__}
    try:
        return get_type_hints(type(cls.__name__, (), body), include_extras=True)
    except NameError as exc:
        raise ConfigError(
            f"plugin {cls.__module__}:{cls.__qualname__}: the type of an option"
            f" cannot be resolved at run time: {exc}"
        ) from exc


def _strict(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        made: type = hint  # a name that mypy keeps narrow inside the lambda
        return Annotated[
            option_model(made), AfterValidator(lambda model: made(**chosen_options(model)))
        ]
    return hint if hint is bool else Annotated[hint, BeforeValidator(no_flag)]


def _described(option: dataclasses.Field[Any]) -> Any:
    about = option.metadata.get("help")
    if option.default is not dataclasses.MISSING:
        return Field(default=option.default, description=about)
    if option.default_factory is not dataclasses.MISSING:
        return Field(default=option.default_factory(), description=about)
    return Field(description=about)


def no_flag(value: Any) -> Any:
    """Refuse true and false where pydantic would take them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    return value


def chosen_options(model: BaseModel) -> dict[str, Any]:
    """The options that were set, nested ones as the objects they became."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def build_middleware(
    cls: type,
    options: Mapping[str, Any],
    *,
    clock: Clock,
    rng: random.Random,
    region: str,
    notify: Notify = tell_nobody,
) -> object:
    """Make a middleware from validated options and what it declares to have injected."""
    given = {"clock": clock, "rng": rng, "region": region, "notify": notify}
    declared = {f.name for f in dataclasses.fields(cls) if f.metadata.get("injected")}
    injected = {name: value for name, value in given.items() if name in declared}
    return cls(**options, **injected)


def build_provider(cls: type) -> Provider:
    """Make the one object of a provider.

    Raises:
        ConfigError: if it cannot be made without arguments, or lacks a part of `Provider`.
    """
    name = f"plugin {cls.__module__}:{cls.__qualname__}"
    try:
        provider: Provider = cls()
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{name} cannot be made: {exc}") from exc
    needed = set(_PARTS)
    for hooks in _TOGETHER:
        if any(hasattr(provider, hook) for hook in hooks):
            needed |= hooks
    lacking = sorted(part for part in needed if not hasattr(provider, part))
    if lacking:
        raise ConfigError(f"{name} is no provider: it lacks {', '.join(lacking)}")
    if wrong := [*_wrong_facts(provider), *_wrong_methods(provider)]:
        raise ConfigError([f"{name}: {problem}" for problem in wrong])
    return provider


def _wrong_facts(provider: Any) -> Iterator[str]:
    """Attributes that are not of their kind: found out later, they cost a client its answer."""
    for key in ("price_per_second", "cold_start", "stays_warm"):
        value = getattr(provider, key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            yield f"{key} must be a number of at least 0, got {value!r}"
    if provider.pool not in ("baseline", "burst"):
        yield f"pool must be baseline or burst, got {provider.pool!r}"
    for key in ("kinds", "environment"):
        value = getattr(provider, key)
        if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
            yield f"{key} must be a tuple of texts, got {value!r}"
    if not provider.kinds:
        yield "kinds must name at least one; the first is the default"


def _wrong_methods(provider: Any) -> Iterator[str]:
    """Methods that nobody would await, and names that are almost a hook's: nobody calls those."""
    for key in sorted((_PARTS | _HOOKS) - _AWAITED):
        if inspect.iscoroutinefunction(getattr(provider, key, None)):
            yield f"{key} must not be async"
    public = {key for key in vars(type(provider)) if key[0] != "_"} - _PARTS - _HOOKS
    for key in sorted(public):
        close = get_close_matches(key, _HOOKS, n=1, cutoff=0.8)
        if close and not hasattr(provider, close[0]):
            yield f"{key} is called by nobody; did you mean {close[0]}?"


_AWAITED = {"check", "carry", "kept", "scale"}
_HOOKS = {
    *("carries", "carry", "hop", "fields", "takes", "wakes"),
    *("scalable", "kept", "scale"),
    *("cold_start", "stays_warm", "scales", "control_schemes", "reads_session"),
}
_PARTS = {*Provider.__annotations__, *(part for part in vars(Provider) if part[0] != "_")}
_TOGETHER = ({"carries", "carry"}, {"scalable", "kept", "scale"})  # one alone would be of no use
