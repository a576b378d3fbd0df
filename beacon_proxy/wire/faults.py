"""What an exception of the control plane's client means, as a fault of the backend."""

from __future__ import annotations

import socket
import ssl

import aiohttp

from ..contracts import Fault


def fault_of(exc: BaseException) -> tuple[Fault, str]:
    """The fault and words for the log; never the address or what the other side said."""
    if isinstance(exc, TimeoutError):
        return Fault.TIMEOUT, "no answer in time"
    if isinstance(exc, aiohttp.ContentTypeError):
        return Fault.NOT_JSON, "the answer is not JSON"
    if isinstance(exc, aiohttp.ClientResponseError):
        return Fault.STATUS, f"the answer was {exc.status}"
    if isinstance(exc, aiohttp.ClientSSLError | ssl.SSLError):
        return Fault.TLS, "TLS failed"
    if isinstance(exc, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return Fault.DNS, "the name does not resolve"
    if isinstance(exc, aiohttp.ClientConnectorError | ConnectionRefusedError):
        return Fault.REFUSED, "no connection"
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        return Fault.RESET, f"the connection broke: {type(exc).__name__}"
    return Fault.MALFORMED, type(exc).__name__
