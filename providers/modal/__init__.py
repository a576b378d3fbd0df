"""Modal: `provider` speaks to its edge, `stats` asks its control plane (the extra `modal`)."""

from .provider import Modal

__all__ = ["Modal"]
