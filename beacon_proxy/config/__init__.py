"""beacon.yaml and the environment to `Settings`, and those to backends.

Everything is looked at before anything is refused: an operator sees all problems at once.
Precedence: env `PORT`, file, env `FLY_REGION`, default. Rows of backends come from the file where
it has the key, else from the environment by way of each provider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..contracts import Backend, Headers, Provider, Timeouts, TokenPrice, canonical_model
from ..errors import ConfigError
from ..plugins import Plugins, build_provider
from ..regions import canonical_region, region_of_fly
from .backends import BackendSettings
from .checks import (
    check_autoscale,
    check_chain,
    check_defaults,
    check_files,
    check_names,
    check_references,
    check_retention,
    check_rows,
)
from .document import put_in, read, veiled
from .money import Ledger
from .problems import Place, dotted, lines, shown
from .settings import MiddlewareEntry, Settings, TimeoutSettings
from .values import split_url

__all__ = [
    "MiddlewareEntry",
    "Settings",
    "ledger_settings",
    "load_settings",
    "make_settings",
    "read_settings",
    "resolve_backends",
    "resolve_row",
]

DEFAULT_FILE = Path("beacon.yaml")
HOUR = 3600.0  # s


def load_settings(path: Path | None, env: Mapping[str, str], plugins: Plugins) -> Settings:
    """Read and check the configuration.

    Raises:
        ConfigError: with every problem there is.
    """
    return make_settings(read_settings(path), env, plugins)


def read_settings(path: Path | None) -> dict[str, Any]:
    """Read a file's sections; without a path those of `./beacon.yaml` if there, else none.

    Raises:
        ConfigError: where it is no YAML mapping; what it says is not looked at.
    """
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    return read(path) if path else {}


def make_settings(written: Mapping[str, Any], env: Mapping[str, str], plugins: Plugins) -> Settings:
    """Check what was read.

    Raises:
        ConfigError: with every problem there is.
    """
    unset: list[str] = []
    content: dict[str, Any] = put_in(dict(written), env, unset)
    found: list[str] = []
    providers = {name: build_provider(cls) for name, cls in sorted(plugins.providers.items())}
    content["server"] = _server(content.get("server", {}), env, found)
    rows_of_env: list[dict[str, Any]] = []
    if "backends" not in content:
        needed = not content.get("discovery")
        rows_of_env = _environment(providers, env, content["server"], found, needed=needed)
        content["backends"] = rows_of_env
        written = {**written, "backends": rows_of_env}
    elif content["backends"] == [] and not content.get("discovery"):
        found.append(_how_to_add_one(providers))
    content["middleware"] = check_chain(
        content.get("middleware"), written.get("middleware"), plugins, found
    )
    place = _places(rows_of_env)
    check_rows(content["backends"], providers, content.get("rates"), place, found)
    check_files(content["backends"], place, found)
    check_names(content["backends"], lambda i: place(("backends", i, "name")), found)
    check_names(content.get("budgets"), lambda i: f"budgets[{i}].name", found)
    check_references(content, [*providers], found)
    check_retention(content.get("ledger"), content.get("budgets"), found)
    check_autoscale(content.get("autoscale"), content["backends"], providers, found)
    check_defaults(content.get("discovery"), providers, content.get("rates"), found)
    try:
        settings = Settings.model_validate(content)
    except ValidationError as exc:
        found[:0] = lines(exc, Settings, written, place)
    if unset or found:  # raised out here, so that no traceback holds what pydantic was given
        raise ConfigError([*unset, *veiled(_beside(unset, found), written, env)])
    return settings


def ledger_settings(written: Mapping[str, Any], env: Mapping[str, str]) -> Ledger:
    """The ledger's section alone, for who reads it where the rest of a configuration is not.

    Raises:
        ConfigError: with every problem of that section.
    """
    problems: list[str] = []
    section = put_in(written.get("ledger", {}), env, problems, ("ledger",))
    if not problems:
        try:
            return Ledger.model_validate(section)
        except ValidationError as exc:
            given = written.get("ledger")
            problems += lines(exc, Ledger, given, lambda at: dotted(("ledger", *at)))
    raise ConfigError(problems)


def _beside(unset: list[str], found: list[str]) -> list[str]:
    """The problems at other places than those whose variable is not set anyway."""
    places = {line.partition(": ")[0] for line in unset}
    return [line for line in found if line.partition(": ")[0] not in places]


def _server(section: Any, env: Mapping[str, str], found: list[str]) -> Any:
    """The server section with what the environment says over and under it."""
    if not isinstance(section, dict):
        return section
    server = {key: value for key, value in section.items() if (key, value) != ("region", None)}
    if port := env.get("PORT", "").strip():
        if port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535:
            server["port"] = int(port)
        else:
            found.append(f"environment.PORT: must be a whole number in 0..65535, got {shown(port)}")
    if "region" not in server and (code := env.get("FLY_REGION", "").strip()):
        server["region"] = region_of_fly(code)
    return server


def _environment(
    providers: Mapping[str, Provider],
    env: Mapping[str, str],
    server: Any,
    found: list[str],
    *,
    needed: bool,
) -> list[dict[str, Any]]:
    """The rows of backends that the environment gives, provider by provider."""
    said = server.get("region") if isinstance(server, dict) else None
    region = canonical_region(said) if isinstance(said, str) else _default_region()
    rows: list[dict[str, Any]] = []
    refused = False
    for name, provider in providers.items():
        try:
            rows += [{"provider": name, **row} for row in provider.from_environment(env, region)]
        except ConfigError as exc:
            refused = True
            found += exc.problems
    if needed and not rows and not refused:
        found.append(_how_to_add_one(providers))
    return rows


def _default_region() -> str:
    return Settings().server.region


def _places(rows_of_env: list[dict[str, Any]]) -> Callable[[Place], str]:
    """How a place is called: a row that the environment gave is called by its name."""

    def place(at: Place) -> str:
        if rows_of_env and at[:1] == ("backends",) and len(at) > 1 and isinstance(at[1], int):
            return dotted(("environment", str(rows_of_env[at[1]].get("name")), *at[2:]))
        return dotted(at)

    return place


def _how_to_add_one(providers: Mapping[str, Provider]) -> str:
    names = [variable for provider in providers.values() for variable in provider.environment]
    return (
        "backends: there is none; add one to beacon.yaml, such as"
        " `backends: [{name: local, provider: openai, url: http://127.0.0.1:11434}]`,"
        f" or set the environment ({', '.join(names) or 'no installed provider reads it'})"
    )


def resolve_backends(settings: Settings, plugins: Plugins) -> tuple[Backend, ...]:
    """Turn the rows into backends, with what the provider and the global sections leave to them.

    Raises:
        ConfigError: with every backend that its provider cannot use as configured.
    """
    providers = {
        name: build_provider(plugins.providers[name])
        for name in {row.provider for row in settings.backends}
    }
    backends = tuple(_backend(row, providers[row.provider], settings) for row in settings.backends)
    found = [
        f"backends[{number}].{problem}"
        for number, backend in enumerate(backends)
        if (problem := providers[backend.provider].problem(backend)) is not None
    ]
    by_name = {backend.name: backend for backend in backends}
    for number, row in enumerate(settings.autoscale.backends):
        if (backend := by_name.get(row.backend)) is not None:
            scalable: Any = getattr(providers[backend.provider], "scalable", _never)
            if (problem := scalable(backend)) is not None:
                found.append(f"autoscale.backends[{number}]: backend {row.backend}: {problem}")
    if found:
        raise ConfigError(found)
    return backends


def _never(_: Backend) -> str:
    return "its provider cannot be told how many workers to keep"


def resolve_row(
    row: Mapping[str, Any], settings: Settings, providers: Mapping[str, Provider]
) -> Backend:
    """Turn one row that was found while running into a backend, by the rules of `backends`.

    A file that it names is not looked at: only beacon.yaml may name one, and its were.

    Raises:
        ConfigError: each problem as `key: problem`.
    """
    found: list[str] = []
    check_rows([row], providers, settings.rates, lambda at: dotted(at[2:]), found)
    try:
        made = BackendSettings.model_validate(row)
    except ValidationError as exc:
        found[:0] = lines(exc, BackendSettings, row)
    if found:
        raise ConfigError(found)
    provider = providers[made.provider]
    backend = _backend(made, provider, settings)
    if (problem := provider.problem(backend)) is not None:
        raise ConfigError(problem)
    return backend


def _backend(row: BackendSettings, provider: Provider, settings: Settings) -> Backend:
    scheme, host, port, base_path = split_url(row.url)
    timeouts = _timeouts(row, provider, settings.timeouts)
    stays_warm = getattr(provider, "stays_warm", inf) if row.stays_warm is None else row.stays_warm
    return Backend(
        name=row.name,
        provider=row.provider,
        url=row.url,
        scheme=scheme,
        host=host,
        port=port,
        base_path=base_path,
        region=row.region or settings.server.region,
        pool=row.pool or provider.pool,
        **_prices(row, provider, settings.rates),
        max_in_flight=row.max_in_flight,
        models=_models(row),
        model_names=tuple(row.models or ()),
        api_key=row.api_key.get_secret_value() if row.api_key else "",
        kind=row.kind if row.kind in provider.kinds else provider.kinds[0],
        headers=_headers(row),
        timeouts=timeouts,
        cold_timeouts=timeouts.while_cold() if timeouts.cold_start else None,
        stays_warm=stays_warm,
        tls_verify=row.tls.verify,
        tls_ca_file=row.tls.ca_file,
        control_url=(row.control_url or "").rstrip("/"),
        aliases=tuple(row.aliases.items()),
    )


def _prices(row: BackendSettings, provider: Provider, rates: Mapping[str, float]) -> dict[str, Any]:
    """What a second of work and a second of none cost; `check_rows` left one price to a rent."""
    own = row.price_per_second
    if row.price_model == "serverless":
        price = row.price_per_million_tokens
        if price is not None:
            cached, written = price.cached_input, price.cache_write
            per_token = TokenPrice(
                price.input / 1e6,
                price.output / 1e6,
                None if cached is None else cached / 1e6,
                None if written is None else written / 1e6,
            )
            return {"token_price": per_token, "price_per_second": 0.0}
        return {"price_per_second": provider.price_per_second if own is None else own}
    if row.price_glm_per_hour is not None:
        own = row.price_glm_per_hour * rates["GLM"] / HOUR
    elif row.price_per_hour is not None:
        own = row.price_per_hour / HOUR
    return {
        "price_model": "rented",
        "price_per_second": 0.0,
        "idle_price_per_second": own or 0.0,
        "rented_until_unix": inf if row.rented_until is None else row.rented_until,
    }


def _models(row: BackendSettings) -> frozenset[str] | None:
    """What clients may ask of it; an alias is served, too."""
    if row.models is None:
        return None
    return frozenset(map(canonical_model, (*row.models, *row.aliases)))


def _headers(row: BackendSettings) -> Headers:
    return tuple(
        (name.encode("ascii"), value.get_secret_value().strip(" \t").encode())
        for name, value in row.headers.items()
    )


def _timeouts(row: BackendSettings, provider: Provider, common: TimeoutSettings) -> Timeouts:
    usual = {"cold_start": getattr(provider, "cold_start", 0.0)}
    shared, own = (each.model_dump(exclude_none=True) for each in (common, row.timeouts))
    return Timeouts(**{**usual, **shared, **own})
