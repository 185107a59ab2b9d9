"""Classification of the errors of HTTP requests, so that no message contains aiohttp's own texts, which show addresses and parts of URLs.

Callers write their own message for each fault, since each talks to something else: an input, a callback URL, the CMS, the API.
"""

from __future__ import annotations

import os
from enum import StrEnum

import aiohttp


class HttpFault(StrEnum):
    """The reason why an HTTP request failed."""

    URL = "url"
    """The URL is malformed, or refused by the guard."""
    HOST = "host"
    """The host was not found."""
    TLS = "tls"
    """The TLS handshake failed, or the certificate is invalid."""
    TIMEOUT = "timeout"
    CONNECT = "connect"
    """The connection could not be opened."""
    BROKE_OFF = "broke_off"
    """The connection was closed before the response was complete."""
    NOT_HTTP = "not_http"
    """The response is not HTTP."""
    OTHER = "other"


def http_fault(error: BaseException) -> HttpFault:
    """Return the fault that an error of aiohttp stands for."""
    match error:  # the order matters, since many of aiohttp's errors are subclasses of others
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
    """Return the reason without addresses: the guard's text, the operating system's text, or else the error's type name; may be ''."""
    match error:
        case aiohttp.InvalidURL():
            return error.description or ""
        case aiohttp.ClientConnectorError():
            return os.strerror(error.os_error.errno) if error.os_error.errno else ""  # asyncio's text contains the address
    return type(error).__name__
