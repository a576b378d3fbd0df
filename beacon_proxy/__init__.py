"""beacon-proxy: a reverse proxy that routes LLM inference over GPU backends.

`contracts` names the words; a request comes in at `api`, is decided in `routing`, moved by `wire`.
"""

from __future__ import annotations

__version__ = "0.1.0"
