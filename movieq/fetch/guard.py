"""Which addresses may be contacted: no private network, unless the settings allow it."""

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

TOTAL_S: Final = 30.0
CONNECT_S: Final = 8.0
"""For one try at one address, so that a second try still fits into the total."""


class UrlRefused(aiohttp.InvalidURL):
    """The guard says no. `url` is without userinfo and query, `description` the reason; both may be shown to anyone.

    A ValueError, and an aiohttp.ClientError as it also comes out of a session's request.
    """


Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Beyond what `ipaddress` knows as not global, which differs between patch releases: relays and tunnels carry any address in their own,
# Azure's host answers on a public one.
_CLOSED: Final[tuple[Network, ...]] = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, of which 3.11 knows a part; a cloud's metadata live here
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv4Network("168.63.129.16/32"),  # Azure's host
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("3fff::/20"),  # documentation, not yet known to 3.11
)
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_LOOPBACKS: Final = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_USERINFO = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]+|)[^/]*@")  # also of a url that is malformed
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_AS_IT_STANDS = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")

_PRIVATE: Final = "it leads into a private network that MOVIEQ_ALLOW_PRIVATE_URLS does not name"


class Guard:
    """Which addresses may be called: public ones, the networks of `MOVIEQ_ALLOW_PRIVATE_URLS`, and the installation's own `origins`.

    `origins` are urls of which host and port count ("http://cms:3000"). `resolver` takes the place of the system's.
    """

    def __init__(
        self, private_networks: tuple[Network, ...] = (), origins: Iterable[str] = (), resolver: AbstractResolver | None = None
    ) -> None:
        self._networks = private_networks
        self._origins = frozenset((URL(origin).raw_host, URL(origin).port) for origin in origins)
        self._resolver = resolver

    def check_url(self, url: str) -> URL:
        """The url, parsed, if it may be called as far as can be said without asking a name server. Raises UrlRefused."""
        if _CONTROL.search(url):
            raise UrlRefused(shown(url), "control characters and backslashes are not allowed in a url")
        if (authority := _AUTHORITY.match(url)) and "@" in authority[1]:
            raise UrlRefused(shown(url), "a user name or password is not allowed in it")
        try:
            parsed = URL(url)
            if _AS_IT_STANDS.fullmatch(url):  # a signed url must reach its server character by character, not quoted anew
                parsed = URL(url, encoded=True)
        except ValueError as error:
            raise UrlRefused(shown(url), "it is not a well-formed url") from error
        self.check(parsed)
        return parsed

    def check(self, url: URL) -> None:
        """As `check_url`, for a url that is parsed already; asked again by the sessions for each request."""
        if url.scheme not in ("http", "https"):
            raise UrlRefused(shown(str(url)), "only http and https are allowed")
        host, port = url.raw_host, url.port
        if not host or not port:
            raise UrlRefused(shown(str(url)), "it names no host, or port 0")
        if self.owns(host, port):
            return
        try:
            addresses = _addresses(host.lower().removesuffix("."))
        except ValueError as error:
            raise UrlRefused(shown(str(url)), "its host is neither a name nor an address") from error
        if addresses and not any(map(self.permits, addresses)):
            raise UrlRefused(shown(str(url)), _PRIVATE)

    def permits(self, address: Address) -> bool:
        """Whether this address may be called. An IPv4 address inside an IPv6 one counts as itself."""
        if isinstance(address, IPv6Address):
            if address.ipv4_mapped is not None:
                return self.permits(address.ipv4_mapped)
            if address in _NAT64:
                return self.permits(IPv4Address(int(address) & 0xFFFFFFFF))
        return any(address in network for network in self._networks) or _is_public(address)

    def owns(self, host: str, port: int) -> bool:
        """Whether this is one of the installation's own origins, which may be called whatever address it has."""
        return (host.lower(), port) in self._origins

    def session(self) -> aiohttp.ClientSession:
        """A client that calls nothing but what the guard permits, forbidden ones raise UrlRefused. The caller closes it.

        It reads no proxy from the environment, keeps no cookies, and hands out bodies as they came over the wire, so that what is counted
        is what is held.
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
    """The url as it may stand in a message or a log: without userinfo, query, fragment or data, and at most 300 characters of it."""
    if url[:5].lower() == "data:":
        return f"{url.partition(',')[0][:60]},..."
    text = _USERINFO.sub(r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return f"{text[:280]}{'...' if len(text) > 280 else ''}{'?...' if '?' in url else ''}"


class _Connector(aiohttp.TCPConnector):
    """Asks the guard about each request's url, as aiohttp's resolver is never asked about hosts that are addresses."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        super().__init__(resolver=_Resolver(guard, resolver), use_dns_cache=False)
        self._guard = guard

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        self._guard.check(req.url)
        return await super().connect(req, traces, timeout)


class _Resolver(AbstractResolver):
    """Lets through, of the addresses of a name, those that the guard permits: exactly these are connected to."""

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
    """The addresses that this host spells out; none where it is a name. Raises ValueError where it is neither.

    Whatever a socket would take for an address counts, also 0x7f.1 and 2130706433.
    """
    if ":" in host and "%" not in host:
        return (IPv6Address(host),)
    if not _HOST_NAME.fullmatch(host):
        raise ValueError(host)
    if host == "localhost" or host.endswith(".localhost"):
        return _LOOPBACKS
    if _NUMBER.fullmatch(host.rpartition(".")[2]):  # the rule of browsers: what ends in a number is an address or nothing
        try:
            return (IPv4Address(socket.inet_aton(host)),)
        except OSError as error:
            raise ValueError(host) from error
    return ()


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOSED)
