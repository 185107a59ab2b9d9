"""What went wrong with an HTTP request, told apart once: aiohttp's own messages carry resolved addresses and parts of the URL.

Each caller has a text of its own for each fault, since each names another thing: an input, a callback address, the CMS, the server.
"""

from __future__ import annotations

import os
from enum import StrEnum

import aiohttp


class HttpFault(StrEnum):
    """What went wrong with a request."""

    URL = "url"
    """Its URL is malformed, or refused by the guard."""
    HOST = "host"
    """Its host was not found."""
    TLS = "tls"
    """The certificate or the TLS handshake was not accepted."""
    TIMEOUT = "timeout"
    CONNECT = "connect"
    """No connection could be made."""
    BROKE_OFF = "broke_off"
    """The connection ended before the answer was complete."""
    NOT_HTTP = "not_http"
    """What answered does not speak HTTP."""
    OTHER = "other"


def http_fault(error: BaseException) -> HttpFault:
    """Return what went wrong. The order matters: many of aiohttp's errors are subclasses of others."""
    match error:
        case aiohttp.InvalidURL():
            return HttpFault.URL
        case aiohttp.ClientConnectorDNSError():
            return HttpFault.HOST
        case aiohttp.ClientSSLError():
            return HttpFault.TLS
        case TimeoutError():
            return HttpFault.TIMEOUT
        case aiohttp.ClientConnectorError():
            return HttpFault.CONNECT
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | aiohttp.ClientPayloadError() | ConnectionError():
            return HttpFault.BROKE_OFF
        case aiohttp.ClientResponseError():
            return HttpFault.NOT_HTTP
    return HttpFault.OTHER


def reason(error: BaseException) -> str:
    """Return why, in words that name no address: the guard's, those of the operating system, or else the type of the error; may be ''."""
    match error:
        case aiohttp.InvalidURL():
            return error.description or ""
        case aiohttp.ClientConnectorError():
            return os.strerror(error.os_error.errno) if error.os_error.errno else ""  # asyncio's text carries the address
    return type(error).__name__
