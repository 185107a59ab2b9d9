"""Guarded downloads: the bytes of a url that a stranger named, or a reason why not.

`Guard` keeps strangers' urls out of private networks. It is asked twice: about the url before anything else, and about every address that a
host name stands for when a connection is made; the connection goes to the addresses that were asked about, so a name server that answers
differently the second time gains nothing. The sessions it makes hold this for every request, also those of webhooks.

`Fetcher` brings an image or a sound into a file: bounded in bytes and seconds, redirects followed by hand, kept only if its bytes (never
the declared type) are of a kind that was asked for. Left out: caching, resuming, `upload:` and `task:` references (they never leave the
house), and decoding, so a file that is damaged behind its header passes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import re
import socket
import struct
from collections.abc import Collection, Iterable
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self
from urllib.parse import unquote_to_bytes, urljoin

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image
from yarl import URL

from movieq import __version__
from movieq.errors import InputUnavailable, InvalidInput, StorageFault

MAX_BYTES: Final = 25 * 1024 * 1024
TOTAL_S: Final = 30.0
CONNECT_S: Final = 8.0
"""For one try at one address, so that a second try still fits into the total."""
BACKOFF_S: Final = (0.2, 0.5, 1.0)
"""Before the second, third and fourth try of a fault that may pass."""
MAX_REDIRECTS: Final = 5
MAX_PIXELS: Final = 40_000_000
HEAD_BYTES: Final = 512
"""What `sniff` wants to see of a file."""

IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""Pillow's names. Its other formats stay shut: some start programs (EPS), none is a still that the web shows."""


class Kind(StrEnum):
    """What a reference can be asked to be: the first half of its media type."""

    IMAGE = "image"
    AUDIO = "audio"


_ACCEPTED: Final = {Kind.IMAGE: "an image (jpeg, png, webp, gif, tiff, bmp)", Kind.AUDIO: "a sound (wav, mp3, flac, ogg, m4a)"}


class Fetched(msgspec.Struct, frozen=True):
    """A file that is there, and what its bytes are."""

    path: Path
    media_type: str
    size_bytes: int


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


class Fetcher:
    """Downloads under a guard; an async context manager that owns one client session."""

    def __init__(self, guard: Guard, *, max_bytes: int = MAX_BYTES, total_s: float = TOTAL_S) -> None:
        self._guard = guard
        self._max_bytes = max_bytes
        self._total_s = total_s

    async def __aenter__(self) -> Self:
        self._session = self._guard.session()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._session.close()

    async def fetch(self, url: str, dest: Path, kinds: Collection[Kind]) -> Fetched:
        """What `url` (http, https or data) stands for lies at `dest` and is of one of these kinds, an image of at most 40 megapixels.

        Raises InputUnavailable if it cannot be had within the bytes and seconds of this fetcher, InvalidInput if it was had and is
        something else, both naming the url without its query; StorageFault if `dest` cannot be written. Then, and on cancel, nothing lies
        at `dest`.
        """
        try:
            if url[:5].lower() == "data:":
                body = self._decoded(url)
                with _created(dest) as file:
                    await asyncio.to_thread(file.write, body)
            else:
                await self._tried(url, dest)
            return await asyncio.to_thread(_examined, url, dest, kinds)
        except BaseException as error:
            with contextlib.suppress(OSError):
                dest.unlink()
            if isinstance(error, OSError):  # those of the network have become others by now
                raise StorageFault(f"cannot keep {shown(url)} at {dest}: {error.strerror or error}") from error
            raise

    def _decoded(self, url: str) -> bytes:
        """The bytes inside a data url (RFC 2397; base64 forgiving about blanks and padding, as browsers are)."""
        declared, comma, data = url[5:].partition(",")
        if not comma:
            raise InvalidInput(f"{shown(url)} is not a data url: it has no comma")
        body = unquote_to_bytes(data)
        if declared.rstrip().lower().endswith(";base64"):
            body = b"".join(body.split()).rstrip(b"=")
            try:
                body = base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
            except ValueError as error:
                raise InvalidInput(f"{shown(url)} is not valid base64") from error
        if len(body) > self._max_bytes:
            raise _unavailable(url, _too_large(self._max_bytes))
        return body

    async def _tried(self, url: str, dest: Path) -> None:
        """Download, again where a fault may pass, until it is there or the time is over."""
        try:
            async with asyncio.timeout(self._total_s):
                for pause_s in (*BACKOFF_S, None):
                    try:
                        return await self._followed(url, dest)
                    except _Missed as missed:
                        if pause_s is None or not missed.may_pass:
                            raise _unavailable(url, missed.problem) from missed
                        await asyncio.sleep(pause_s)
        except TimeoutError as error:
            raise _unavailable(url, f"it did not come within {self._total_s:g} s") from error

    async def _followed(self, url: str, dest: Path) -> None:
        """One try: from the url, over its redirects, to the file. Raises _Missed."""
        here = url
        try:
            for _ in range(MAX_REDIRECTS + 1):
                async with self._session.get(
                    self._guard.check_url(here),
                    allow_redirects=False,
                    headers={"Accept-Encoding": "identity"},
                    timeout=aiohttp.ClientTimeout(total=self._total_s, sock_connect=CONNECT_S),
                ) as answer:
                    location = answer.headers.get("Location")
                    if answer.status not in (301, 302, 303, 307, 308) or location is None:
                        return await self._streamed(answer, dest)
                    try:
                        here = urljoin(here, location)
                    except ValueError as error:
                        raise _Missed("it redirects to something that is no url") from error
        except aiohttp.ClientError as error:
            raise _missed(error) from error
        raise _Missed(f"it redirects more than {MAX_REDIRECTS} times")

    async def _streamed(self, answer: aiohttp.ClientResponse, dest: Path) -> None:
        if not 200 <= answer.status < 300:
            raise _Missed(f"it answered {answer.status}", may_pass=answer.status in (408, 425, 429) or answer.status >= 500)
        if answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Missed("it came compressed (Content-Encoding), which was not asked for")
        if (answer.content_length or 0) > self._max_bytes:
            raise _Missed(_too_large(self._max_bytes))
        size = 0
        with _created(dest) as file:
            pending = bytearray()
            async for chunk in answer.content.iter_any():
                size += len(chunk)
                if size > self._max_bytes:
                    raise _Missed(_too_large(self._max_bytes))
                pending += chunk
                if len(pending) >= 256 * 1024:
                    await asyncio.to_thread(file.write, bytes(pending))
                    pending.clear()
            await asyncio.to_thread(file.write, pending)


def sniff(head: bytes) -> str | None:
    """The media type that the first bytes of a file (`HEAD_BYTES` are plenty) show; None for whatever is neither image nor sound.

    An mp4 of any brand is `audio/mp4`: whether there is sound in it shows when it is opened. SVG is none: it is a program that draws.
    """
    for media_type, pattern in _MAGIC:
        if pattern.match(head):
            return media_type
    return None


def image_problem(path: Path, max_pixels: int = MAX_PIXELS) -> str | None:
    """Why this file is not an image that can be worked with, read from its header alone; None if nothing speaks against it. Blocks."""
    with path.open("rb") as file:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limit comes at 89 and 179 megapixels
            return f"it has too many pixels, at most {max_pixels / 1e6:g} megapixels are allowed"
        except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, struct.error, Warning):
            # What Pillow's readers raise on damaged headers, a Warning where warnings are errors; UnidentifiedImageError is an OSError.
            return "its image header cannot be read"
    if width * height > max_pixels:
        return f"it has {width}x{height} pixels, at most {max_pixels / 1e6:g} megapixels are allowed"
    return None


def shown(url: str) -> str:
    """The url as it may stand in a message or a log: without userinfo, query, fragment or data, and at most 300 characters of it."""
    if url[:5].lower() == "data:":
        return f"{url.partition(',')[0][:60]},..."
    text = _USERINFO.sub(r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return f"{text[:280]}{'...' if len(text) > 280 else ''}{'?...' if '?' in url else ''}"


_MP3_RATES: Final = bytes(byte for byte in range(256) if 0 < byte >> 4 < 15 and byte >> 2 & 3 != 3)

_MAGIC: Final = [
    (media_type, re.compile(pattern, re.DOTALL))
    for media_type, pattern in (
        ("image/jpeg", rb"\xff\xd8\xff"),
        ("image/png", rb"\x89PNG\r\n\x1a\n"),
        ("image/webp", rb"RIFF....WEBP"),
        ("image/gif", rb"GIF8[79]a"),
        ("image/tiff", rb"II\*\0|MM\0\*"),
        # "BM" begins many a text: also ask for the reserved zeros and a size of the second header that exists
        ("image/bmp", rb"BM....\0{4}....[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}"),
        ("audio/wav", rb"(?:RIFF|RF64)....WAVE"),
        ("audio/flac", rb"fLaC"),
        ("audio/ogg", rb"OggS\0"),
        ("audio/mp4", rb"....ftyp(?:M4A |M4B |mp4[12]|isom|iso[2-9]|3gp[4-7]|dash)"),
        # a tag, or a frame of layer III with a bit rate and a sample rate that exist
        ("audio/mpeg", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][" + re.escape(_MP3_RATES) + rb"]"),
    )
]


class _Missed(Exception):
    """One try failed. `may_pass`: whether another one can help."""

    def __init__(self, problem: str, *, may_pass: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.may_pass = may_pass


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


def _created(dest: Path) -> BinaryIO:
    """An empty file to write to from threads, as a disk that stalls must not stall the leases of other tasks.

    It is opened and closed here and now: after a cancel no thread can bring it back, and its buffer's lock makes closing wait for a write.
    """
    return dest.open("wb")


def _examined(url: str, path: Path, kinds: Collection[Kind]) -> Fetched:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    media_type = sniff(head)
    if media_type is None or media_type.partition("/")[0] not in kinds:
        asked = " or ".join(_ACCEPTED[kind] for kind in Kind if kind in kinds)
        raise InvalidInput(f"{shown(url)} is not usable: {media_type or _description(head)}, and not {asked}")
    if media_type.startswith("image/") and (problem := image_problem(path)):
        raise InvalidInput(f"{shown(url)} is not usable: {problem}")
    return Fetched(path=path, media_type=media_type, size_bytes=path.stat().st_size)


def _description(head: bytes) -> str:
    """For the message alone: what somebody most likely meant to send."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty"
    if b"<svg" in text:
        return "it is an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is an HTML page"
    return "its bytes are of no known kind"


def _unavailable(url: str, problem: str) -> InputUnavailable:
    return InputUnavailable(f"{shown(url)} cannot be had: {problem}")


def _too_large(max_bytes: int) -> str:
    return f"it is larger than {max_bytes / 1024 / 1024:g} MiB"


def _missed(error: aiohttp.ClientError) -> _Missed:
    """aiohttp's errors in our words: its own carry addresses that were resolved, and parts of the url."""
    match error:
        case aiohttp.InvalidURL():
            return _Missed(error.description or "it is not a well-formed url")
        case aiohttp.ClientConnectorDNSError():
            return _Missed("its host was not found", may_pass=error.os_error.errno == socket.EAI_AGAIN)
        case aiohttp.ClientSSLError():
            return _Missed("its certificate or TLS handshake was not accepted")
        case aiohttp.ServerTimeoutError():
            return _Missed("its host did not answer in time", may_pass=True)
        case aiohttp.ClientConnectorError():
            return _Missed(f"no connection: {error.os_error.strerror or 'refused'}", may_pass=True)
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | aiohttp.ClientPayloadError():
            return _Missed("the connection broke off", may_pass=True)
        case aiohttp.ClientResponseError():
            return _Missed("its answer is not HTTP")
        case _:
            return _Missed(f"the request failed ({type(error).__name__})")
