"""The guard of outgoing requests: it refuses private networks unless the settings allow them."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from movieq import __version__
from movieq.fetch.data_urls import is_data_url, shown_data_url

TOTAL_S: Final = 30.0
CONNECT_S: Final = 8.0
"""Longest wait for a connection to one IP address; short enough to try a second one within `TOTAL_S`."""


class UrlRefused(aiohttp.InvalidURL):
    """The guard refuses a url. `url` has no userinfo and no query, `description` is the reason; both may be shown to anyone.

    It is a ValueError, and an aiohttp.ClientError because requests of a session raise it too.
    """


Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Refused in addition to what `ipaddress` calls not global, which differs between patch releases of Python. Addresses of relays and tunnels
# can contain any other address; Azure's host has a public one.
_CLOSED: Final[tuple[Network, ...]] = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, which Python 3.11 knows only in part; one cloud's metadata service is here
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv4Network("168.63.129.16/32"),  # Azure's host
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("3fff::/20"),  # documentation, unknown to Python 3.11
)
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_LOOPBACKS: Final = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_USERINFO = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]+|)[^/]*@")  # also in malformed urls
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_AS_IT_STANDS = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")

_PRIVATE: Final = "it leads into a private network that MOVIEQ_ALLOW_PRIVATE_URLS does not list"


class Guard:
    """A guard that allows public addresses, the networks of `MOVIEQ_ALLOW_PRIVATE_URLS`, and the installation's own `origins`.

    `origins` are urls such as "http://cms:3000"; only their host and port count. `resolver` replaces the resolver of the system.
    """

    def __init__(
        self, private_networks: tuple[Network, ...] = (), origins: Iterable[str] = (), resolver: AbstractResolver | None = None
    ) -> None:
        self._networks = private_networks
        self._origins = frozenset((URL(origin).raw_host, URL(origin).port) for origin in origins)
        self._resolver = resolver

    def check_url(self, url: str) -> URL:
        """Return the parsed url. Raise UrlRefused if it may not be called. Host names are not resolved here."""
        if _CONTROL.search(url):
            raise UrlRefused(shown(url), "control characters and backslashes are not allowed in a url")
        if (authority := _AUTHORITY.match(url)) and "@" in authority[1]:
            raise UrlRefused(shown(url), "it must not contain a user name or password")
        try:
            parsed = URL(url)
            if _AS_IT_STANDS.fullmatch(url):  # a signed url must reach its server unchanged, so it is not quoted again
                parsed = URL(url, encoded=True)
        except ValueError as error:
            raise UrlRefused(shown(url), "it is not a well-formed url") from error
        self.check(parsed)
        return parsed

    def check(self, url: URL) -> None:
        """Raise UrlRefused if this parsed url may not be called. The sessions call this for each request."""
        if url.scheme not in ("http", "https"):
            raise UrlRefused(shown(str(url)), "only http and https are allowed")
        host, port = url.raw_host, url.port
        if not host or not port:
            raise UrlRefused(shown(str(url)), "it has no host, or its port is 0")
        if self.owns(host, port):
            return
        try:
            addresses = _addresses(host.lower().removesuffix("."))
        except ValueError as error:
            raise UrlRefused(shown(str(url)), "its host is neither a host name nor an IP address") from error
        if addresses and not any(map(self.permits, addresses)):
            raise UrlRefused(shown(str(url)), _PRIVATE)

    def permits(self, address: Address) -> bool:
        """Whether this address may be called. An IPv4 address inside an IPv6 one is checked as IPv4."""
        if isinstance(address, IPv6Address):
            if address.ipv4_mapped is not None:
                return self.permits(address.ipv4_mapped)
            if address in _NAT64:
                return self.permits(IPv4Address(int(address) & 0xFFFFFFFF))
        return any(address in network for network in self._networks) or _is_public(address)

    def owns(self, host: str, port: int) -> bool:
        """Whether this is one of the installation's own origins, which may have any address."""
        return (host.lower(), port) in self._origins

    def session(self) -> aiohttp.ClientSession:
        """Return a client session whose requests raise UrlRefused for urls that the guard does not allow. The caller closes it.

        The session ignores proxies from the environment, stores no cookies, and does not decompress bodies, so that a small answer cannot
        grow beyond the limit in bytes.
        """
        return aiohttp.ClientSession(
            connector=_Connector(self, self._resolver or aiohttp.ThreadedResolver()),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"User-Agent": f"movieq/{__version__}"},
            timeout=aiohttp.ClientTimeout(total=TOTAL_S, sock_connect=CONNECT_S),
        )


def shown(url: str) -> str:
    """Return the url for a message or a log: without userinfo, query, fragment or data, and at most 300 characters long."""
    if is_data_url(url):
        return shown_data_url(url)
    text = _USERINFO.sub(r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return f"{text[:280]}{'...' if len(text) > 280 else ''}{'?...' if '?' in url else ''}"


class _Connector(aiohttp.TCPConnector):
    """A connector that checks each request's url, because aiohttp does not call its resolver for hosts that are IP addresses."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        super().__init__(resolver=_Resolver(guard, resolver), use_dns_cache=False)
        self._guard = guard

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        self._guard.check(req.url)
        return await super().connect(req, traces, timeout)


class _Resolver(AbstractResolver):
    """A resolver that returns only the addresses that the guard permits. The connection goes to exactly these."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        self._guard = guard
        self._resolver = resolver

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        try:
            found = await self._resolver.resolve(host, port, family)
        except UnicodeError as error:  # a label of more than 63 characters
            raise UrlRefused(shown(host), "its host is not a name that can be looked up") from error
        if self._guard.owns(host, port):
            return found
        permitted = [one for one in found if self._guard.permits(ipaddress.ip_address(one["host"]))]
        if not permitted:
            raise UrlRefused(shown(host), _PRIVATE)
        return permitted

    async def close(self) -> None:
        await self._resolver.close()


def _addresses(host: str) -> tuple[Address, ...]:
    """Return the addresses that this host spells out; none if it is a name. Raises ValueError if it is neither.

    Everything that a socket accepts as an address counts as one, 0x7f.1 and 2130706433 included.
    """
    if ":" in host and "%" not in host:
        return (IPv6Address(host),)
    if not _HOST_NAME.fullmatch(host):
        raise ValueError(host)
    if host == "localhost" or host.endswith(".localhost"):
        return _LOOPBACKS
    if _NUMBER.fullmatch(host.rpartition(".")[2]):  # as in browsers: a host that ends in a number must be an IPv4 address
        try:
            return (IPv4Address(socket.inet_aton(host)),)
        except OSError as error:
            raise ValueError(host) from error
    return ()


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOSED)
