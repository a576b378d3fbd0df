"""What no model can see alone: plugins, names used twice, files, one section against another.

These checks read the plain document, not the models, so that they speak in the same breath as the
validation of the models, whatever that finds.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..contracts import Provider, canonical_model
from ..plugins import Plugins, chosen_options, option_model
from .problems import Place, dotted, first_field, lines, meant, shown
from .settings import MiddlewareEntry

DEFAULT_CHAIN = ("health", "region", "cost", "capacity", "failover")


def check_chain(
    content: Any, written: Any, plugins: Plugins, problems: list[str]
) -> list[MiddlewareEntry]:
    """Check the middleware section; None stands for the default chain.

    Args:
        content: the section with its variables put in.
        written: the same as in the file, for messages.
        plugins: what is installed.
        problems: where lines are added.
    """
    if content is None:
        content = written = list(DEFAULT_CHAIN)
    if not isinstance(content, list):
        problems.append(f"middleware: must be a list, got {shown(written)}")
        return []
    chain: list[MiddlewareEntry] = []
    seen: set[str] = set()
    for index, (item, original) in enumerate(zip(content, written, strict=True)):
        at = f"middleware[{index}]"
        link = _link(item)
        if link is None:
            problems.append(
                f"{at}: must be a name, or one name with its options indented under it,"
                f" got {_listed(item) if isinstance(item, dict) else shown(original)}"
            )
            continue
        name, options = link
        if name not in plugins.middleware:
            problems.append(f"{at}: unknown middleware {_unknown(name, plugins.middleware)}")
        elif name in seen:
            problems.append(f"{at}: {name} is listed twice")
        else:
            raw = original.get(name) if isinstance(original, dict) else {}
            checked = check_options(name, plugins.middleware[name], options, raw, problems)
            chain.append(MiddlewareEntry(name=name, options=checked))
        seen.add(name)
    return chain


def _unknown(name: str, known: Iterable[str]) -> str:
    near, installed = meant(name, known), ", ".join(sorted(known)) or "none"
    return f"{shown(name)}{near or ';'} installed: {installed}"


def _link(item: Any) -> tuple[str, Any] | None:
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
        return str(name), {} if options is None else options
    return None


def _listed(item: Mapping[Any, Any]) -> str:
    return "the keys " + ", ".join(map(str, item)) if item else "an empty mapping"


def check_options(
    name: str, cls: type, options: Any, written: Any, problems: list[str]
) -> dict[str, Any]:
    """Check the options of one middleware by its fields and by making one; return the good."""
    model = option_model(cls)

    def place(inside: Place) -> str:
        return dotted(("middleware", name, *inside))

    try:
        good = chosen_options(model.model_validate(options))
    except ValidationError as exc:
        problems += lines(exc, model, written, place)
        if not isinstance(options, dict):
            return {}
        bad = {detail["loc"][0] for detail in exc.errors(include_url=False) if detail["loc"]}
        try:  # once more without those, so that the plugin's own checks see the rest
            rest = {key: value for key, value in options.items() if key not in bad}
            good = chosen_options(model.model_validate(rest))
        except ValidationError:
            return {}
    while (problem := _refusal(cls, good)) is not None:
        field = first_field(problem)
        problems.append(f"middleware.{name}{'.' if field else ': '}{problem}")
        if field is None or field not in good:
            break
        del good[field]  # and look whether the others stand
    return good


def _refusal(cls: type, options: Mapping[str, Any]) -> str | None:
    """What a plugin says against its options, on one line."""
    try:
        cls(**options)
    except (TypeError, ValueError) as exc:
        return " ".join(str(exc).split())
    return None


def check_rows(
    rows: Any,
    providers: Mapping[str, Provider],
    rates: Any,
    place: Callable[[Place], str],
    problems: list[str],
) -> None:
    """Check backend rows against the installed providers and the rates."""
    for index, row in _mappings(rows):
        at = ("backends", index)
        name = row.get("provider")
        provider = providers.get(name) if isinstance(name, str) else None
        if isinstance(name, str) and name and provider is None:
            problems.append(
                f"{place((*at, 'provider'))}: unknown provider {_unknown(name, providers)}"
            )
        kind = row.get("kind", "auto")
        if provider and isinstance(kind, str) and kind not in ("", "auto", *provider.kinds):
            problems.append(
                f"{place((*at, 'kind'))}: must be one of {', '.join(provider.kinds)}"
                f" for provider {name}, got {shown(kind)}"
            )
        problems += (f"{place((*at, key))}: {wrong}" for key, wrong in _price_problems(row, rates))
        if wrong := _two_names(row.get("aliases")):
            problems.append(f"{place((*at, 'aliases'))}: {wrong}")
        control = row.get("control_url")
        if provider and isinstance(control, str) and "://" in control:
            schemes = getattr(provider, "control_schemes", ("http", "https"))
            if control.partition("://")[0] not in schemes:
                told = " or ".join(f"{scheme}://…" for scheme in schemes)
                problems.append(
                    f"{place((*at, 'control_url'))}: must be {told} for provider {name}"
                )


_RENTS = ("price_per_hour", "price_glm_per_hour", "price_per_second")


def _price_problems(row: Mapping[str, Any], rates: Any) -> Iterator[tuple[str, str]]:
    """What contradicts itself in the price of a row: key and problem."""
    model = row.get("price_model", "serverless")
    given = [key for key in _RENTS if row.get(key) is not None]
    if row.get("price_glm_per_hour") is not None and not _has(rates, "GLM"):
        yield "price_glm_per_hour", "needs rates: {GLM: USD per GLM}"
    if model == "rented":
        if row.get("price_per_million_tokens") is not None:
            yield "price_per_million_tokens", "a rented backend bills hours, not tokens"
        if not given:
            yield "price_model", "rented needs price_per_hour or price_glm_per_hour"
        for key in given[1:]:
            yield key, f"must not stand beside {given[0]}: a rent has one price"
    elif row.get("price_per_million_tokens") is not None and "price_per_second" in given:
        yield (
            "price_per_second",
            "must not stand beside price_per_million_tokens: tokens are billed",
        )


def _two_names(aliases: Any) -> str | None:
    """Which two aliases are one model to a client, but two to the backend."""
    first: dict[str, tuple[str, Any]] = {}
    for alias, name in aliases.items() if isinstance(aliases, dict) else ():
        known, other = first.setdefault(canonical_model(str(alias)), (str(alias), name))
        if other != name:
            return f"{shown(known)} and {shown(alias)} are the same model; must have one name"
    return None


def check_defaults(
    sources: Any, providers: Mapping[str, Provider], rates: Any, problems: list[str]
) -> None:
    """Check what each source of discovery says of all its backends, as that of `backends` is."""
    for index, source in _mappings(sources):
        name, said = source.get("provider"), source.get("backend")
        if isinstance(said, dict):
            known = name if isinstance(name, str) and name in providers else None
            start = ("discovery", index, "backend")
            check_rows([{**said, "provider": known}], providers, rates, _under(start), problems)
            check_files([said], _under(start), problems)


def _under(start: Place) -> Callable[[Place], str]:
    return lambda at: dotted((*start, *at[2:]))


def check_names(rows: Any, place: Callable[[int], str], problems: list[str]) -> None:
    """Check that no two rows of a list have one name."""
    first: dict[str, int] = {}
    for index, row in _mappings(rows):
        name = row.get("name")
        if isinstance(name, str) and first.setdefault(name, index) != index:
            problems.append(
                f"{place(index)}: must be unique, got {shown(name)} as {place(first[name])} has"
            )


def check_references(content: Mapping[str, Any], known: Sequence[str], problems: list[str]) -> None:
    """Check what discovery and budgets name: providers, pools and backends."""
    for index, source in _mappings(content.get("discovery")):
        name = source.get("provider")
        if isinstance(name, str) and name and name not in known:
            problems.append(
                f"discovery[{index}].provider: unknown provider {_unknown(name, known)}"
            )
    names = [str(row.get("name")) for _, row in _mappings(content.get("backends"))]
    # What discovery finds has names that nobody knows yet.
    choices = {"pool": ["baseline", "burst"], "provider": [*known]}
    if not content.get("discovery"):
        choices["backend"] = names
    for index, budget in _mappings(content.get("budgets")):
        kind, colon, name = str(budget.get("scope", "all")).partition(":")
        if colon and name and name not in choices.get(kind, [name]):
            problems.append(
                f"budgets[{index}].scope: there is no {kind} {name}{meant(name, choices[kind])}"
            )


_DAYS = {"minute": 1 / 1440, "hour": 1 / 24, "day": 1.0, "month": 31.0}  # of a budget's window


def check_retention(ledger: Any, budgets: Any, problems: list[str]) -> None:
    """Check that the ledger keeps what budgets go on from after a restart."""
    if not isinstance(ledger, dict) or ledger.get("path") == "":
        return
    given: Any = ledger.get("retention_days")
    try:
        days = float(given)  # a variable's value is text
    except (TypeError, ValueError):  # not given, or refused for itself
        return
    rows = [(_DAYS.get(str(row.get("per")), 0.0), row) for _, row in _mappings(budgets)]
    longest, row = max(rows, key=lambda each: each[0], default=(0.0, {}))
    if 0 < days < longest:
        problems.append(
            f"ledger.retention_days: must be at least {longest:g} for budget {row.get('name')}"
            f" per {row.get('per')}, got {shown(given)}"
        )


def check_autoscale(
    section: Any, backends: Any, providers: Mapping[str, Provider], problems: list[str]
) -> None:
    """Check that what is to be scaled is there, once, and of a provider that can."""
    found = {row.get("name"): row for _, row in _mappings(backends)}
    rows = section.get("backends") if isinstance(section, dict) else None
    seen: set[str] = set()
    for index, row in _mappings(rows):
        name, at = row.get("backend"), f"autoscale.backends[{index}]"
        if not isinstance(name, str) or not name:
            continue
        backend = found.get(name)
        if backend is None:
            near = meant(name, map(str, found))
            problems.append(f"{at}.backend: there is no backend {shown(name)}{near}")
            continue
        kind = backend.get("provider")
        if kind in providers and not hasattr(providers[str(kind)], "scale"):
            problems.append(
                f"{at}.backend: provider {kind} cannot be told how many workers to keep"
            )
        elif not backend.get("region") and not row.get("instance"):
            problems.append(
                f"{at}.instance: must name the region of the instance that does it,"
                f" as backend {name} has no region"
            )
        if name in seen:
            problems.append(f"{at}.backend: {shown(name)} is listed twice")
        seen.add(name)


def _mappings(rows: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if isinstance(rows, list):
        yield from ((i, row) for i, row in enumerate(rows) if isinstance(row, dict))


def _has(section: Any, key: str) -> bool:
    return isinstance(section, dict) and key in section


def check_files(rows: Any, place: Callable[[Place], str], problems: list[str]) -> None:
    """Check the files that rows of beacon.yaml name; it blocks, so only before the loop runs."""
    for index, row in _mappings(rows):
        tls = row.get("tls")
        ca_file = tls.get("ca_file") if isinstance(tls, dict) else None
        if isinstance(ca_file, str) and ca_file and (wrong := _no_authorities(ca_file)):
            at = place(("backends", index, "tls", "ca_file"))
            problems.append(f"{at}: {wrong}, got {shown(ca_file)}")


def _no_authorities(file: str) -> str | None:
    """Why a file gives no certificates to trust; None if it does."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError:
        return "must hold certificates in PEM form"
    except OSError as exc:
        return f"cannot be read: {exc.strerror}"
    except ValueError:  # a path may hold what no path can
        return "must be a path"
    return None
