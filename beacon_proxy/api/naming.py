"""Who answered, as header lines."""

from __future__ import annotations

from ..contracts import Backend


def answered_by(backend: Backend, attempts: int) -> bytes:
    """Name the backend and the number of the attempt that answered."""
    return (
        f"X-Beacon-Backend: {backend.name}\r\n"
        f"X-Beacon-Provider: {backend.provider}\r\n"
        f"X-Beacon-Region: {backend.region}\r\n"
        f"X-Beacon-Attempts: {attempts}\r\n"
    ).encode("ascii", "replace")
