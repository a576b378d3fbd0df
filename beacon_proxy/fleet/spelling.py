"""What a backend calls its models, and what clients may call them.

Names compare canonically (`llama3.2:1b` is `llama3.2-1b`), an alias is a further name of a model,
and what a backend itself lists is how it spells them: it knows better than who configured it.
"""

from __future__ import annotations

from collections.abc import Collection

from ..contracts import Backend, Check, Live, canonical_model


def new_live(backend: Backend) -> Live:
    """What is known of a backend that was never asked."""
    names = _names(backend, backend.model_names)
    return Live(model_names=backend.model_names, names=names)


def learn(backend: Backend, live: Live, check: Check) -> None:
    """Take over what a backend said it serves, and holds in memory."""
    if check.hot is not None:
        live.hot = _served(backend, check.hot)
    if check.models is not None:
        _spell(backend, live, check.models)
        live.listed = check.models


def learn_again(backend: Backend, live: Live) -> None:
    """Look anew at what a backend said, now that its row says something else."""
    if live.check is not None and live.check.hot is not None:
        live.hot = _served(backend, live.check.hot)
    _spell(backend, live, live.listed)


def _spell(backend: Backend, live: Live, listed: tuple[str, ...] | None) -> None:
    """Work out its models and their names from its row and from what it listed itself."""
    if listed is None:
        live.model_names = backend.model_names
        live.names = _names(backend, backend.model_names)
        return
    live.model_names = listed
    if backend.model_names:
        told = {canonical_model(name): name for name in reversed(listed)}
        live.model_names = tuple(
            told.get(canonical_model(name), name) for name in backend.model_names
        )
    live.models = _served(backend, listed)
    live.names = _names(backend, (*live.model_names, *listed))


def _names(backend: Backend, own: Collection[str]) -> dict[str, str]:
    """What a client may call a model to how the backend spells it; canonical names are keys, too.

    An exact name goes before one that is only canonically the same, an alias before either.
    """
    exact = {name: name for name in own}
    loose = {canonical_model(name): name for name in reversed([*own])}
    aliases = {
        alias: exact.get(name) or loose.get(canonical_model(name)) or name
        for alias, name in backend.aliases
    }
    loose_aliases = {canonical_model(alias): name for alias, name in aliases.items()}
    return {**loose, **exact, **loose_aliases, **aliases}


def _served(backend: Backend, names: Collection[str]) -> frozenset[str]:
    """The canonical names of these models, and of what else clients may call them."""
    own = frozenset(map(canonical_model, names))
    also = (alias for alias, name in backend.aliases if canonical_model(name) in own)
    return own.union(map(canonical_model, also))
