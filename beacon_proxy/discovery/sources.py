"""From a row of `discovery` to its source."""

from __future__ import annotations

from ..config.backends import Discovery
from .answer import Source
from .file import File
from .web import Web


def source_of(settings: Discovery, version: str) -> Source:
    """Make the source that a row of `discovery` describes; imports what only this kind needs."""
    if settings.file is not None:
        return File(settings.file)
    if settings.url is not None:
        return Web(settings.url, settings.timeout, version)
    from .records import Records

    return Records(settings)
