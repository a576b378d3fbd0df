"""How many exchanges may run on each backend at once.

`gate` counts them and lets in; `adaptive` finds a backend's real limit, where that is switched on.
"""

from .adaptive import Adaptive
from .gate import Capacity

__all__ = ["Adaptive", "Capacity"]
