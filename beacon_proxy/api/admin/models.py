"""What the fleet serves, in the three shapes that clients ask for.

A model is one entry however its backends spell it. A backend whose models are not known yet
contributes none, and one that is set aside for a while still does: the list should not flicker.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ...contracts import Backend, Candidate, Candidates, canonical_model


@dataclass(slots=True)
class Model:
    """One model and the backends that serve it."""

    name: str
    backends: list[Backend] = field(default_factory=list)

    @property
    def regions(self) -> list[str]:
        return list(dict.fromkeys(backend.region for backend in self.backends))

    @property
    def types(self) -> list[str]:
        return list(dict.fromkeys(backend.provider for backend in self.backends))


def models(candidates: Candidates) -> list[Model]:
    """What the fleet serves, each model once, by name."""
    found: dict[str, Model] = {}
    for candidate in candidates:
        for name in names_of(candidate) or _aliases(candidate.backend):
            canonical = canonical_model(name)
            model = found.setdefault(canonical, Model(name))
            if model.name == canonical:  # perhaps no spelling that any backend would understand
                model.name = name
            if candidate.backend not in model.backends:
                model.backends.append(candidate.backend)
    return sorted(found.values(), key=lambda model: model.name)


def names_of(candidate: Candidate) -> list[str] | None:
    """What a backend serves, spelled as it spells them where it told; None: not known.

    Beside its own models what clients may call them.
    """
    backend, live = candidate.backend, candidate.live
    served = live.models if backend.models is None else backend.models
    if served is None:
        return None
    spelled = {canonical_model(name): name for name in (*_aliases(backend), *live.model_names)}
    return sorted(spelled.get(name, name) for name in served)


def _aliases(backend: Backend) -> list[str]:
    return [alias for alias, _ in backend.aliases]


def models_by_region(candidates: Candidates) -> dict[str, Any]:
    """The answer of /models."""
    by_region = providers_by_region(candidates)
    served = models(candidates)
    return {
        "models": {
            model.name: {
                "name": model.name,
                "regions": model.regions,
                "providers": [backend.name for backend in model.backends],
                "provider_types": model.types,
            }
            for model in served
        },
        "total_models": len(served),
        "regions_available": list(by_region),
        "providers_by_region": by_region,
    }


def providers_by_region(candidates: Candidates) -> dict[str, list[str]]:
    """Names of backends by region, in the order of the configuration."""
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        found.setdefault(candidate.backend.region, []).append(candidate.backend.name)
    return found


def openai_models(candidates: Candidates, since: float) -> dict[str, Any]:
    """The answer of /v1/models; `since` (unix s) stands for a creation that nobody knows."""
    return {
        "object": "list",
        "data": [
            {
                "id": model.name,
                "object": "model",
                "created": int(since),
                "owned_by": ",".join(model.types),
            }
            for model in models(candidates)
        ],
    }


def ollama_models(candidates: Candidates, since: float) -> dict[str, Any]:
    """The answer of /api/tags; `since` as above."""
    modified = datetime.fromtimestamp(since, UTC).isoformat()
    return {"models": [_tag(model.name, modified) for model in models(candidates)]}


def _tag(name: str, modified: str) -> dict[str, Any]:
    unknown = {"parent_model": "", "format": "", "family": "", "families": []}
    return {
        "name": name,
        "model": name,
        "modified_at": modified,
        "size": 0,
        # Of the name: Ollama's own command line cuts it to 12 characters without looking.
        "digest": hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(),
        "details": {**unknown, "parameter_size": "", "quantization_level": ""},
    }
