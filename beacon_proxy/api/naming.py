"""Who answered, as header lines."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)
def answered_by(backend: str, provider: str, region: str, attempts: int) -> bytes:
    """Name the backend and the number of the attempt that answered."""
    return (
        f"X-Beacon-Backend: {backend}\r\n"
        f"X-Beacon-Provider: {provider}\r\n"
        f"X-Beacon-Region: {region}\r\n"
        f"X-Beacon-Attempts: {attempts}\r\n"
    ).encode("ascii", "replace")
