"""The proxy's own routes, but for /inference: health, fleet, models, spend, metrics, events."""

from __future__ import annotations

from .routes import Admin

__all__ = ["Admin"]
