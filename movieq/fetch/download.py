"""Downloads of urls that clients name, under a guard.

`Guard` keeps these urls out of private networks. It checks each url before the request, and each IP address of the host name when the
connection is made. The connection goes to exactly the addresses that were checked, so a name server that changes its answer gains nothing.
The guard's sessions check every request in this way, those of webhooks included.

`Fetcher` downloads an image or a sound to a file. It limits bytes and seconds, follows redirects itself so that each is checked, and
accepts a file by its bytes, never by its declared type. Left out: caching, resuming, `upload:` and `task:` references (the worker reads
them from the storage), and decoding, so a file that is damaged after its header passes; `workers.probe` decodes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self
from urllib.parse import urljoin

import aiohttp
import msgspec
from PIL import Image

from movieq.errors import InputUnavailable, InvalidInput, StorageFault
from movieq.fetch.data_urls import decoded, is_data_url
from movieq.fetch.formats import Kind, kind_problem, read_head, sniff
from movieq.fetch.guard import CONNECT_S, TOTAL_S, Guard, shown
from movieq.fetch.pictures import MAX_PIXELS, opened
from movieq.fetch.problems import HttpFault, http_fault, reason

MAX_BYTES: Final = 25 * 1024 * 1024
BACKOFF_S: Final = (0.2, 0.5, 1.0)
"""Waits before the second, third and fourth try, in seconds, after a fault that may pass."""
MAX_REDIRECTS: Final = 5
MAX_SCANS: Final = 100
"""Most scans of a JPEG. A progressive one has about ten; each scan is decoded over all pixels, so that thousands take minutes."""
_COMPRESSED: Final = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"})
"""Content codings that change the bytes. Others are labels, such as the `aws-chunked` that object storages keep from an upload."""


class Fetched(msgspec.Struct, frozen=True):
    """A downloaded file, with the media type that its bytes show."""

    path: Path
    media_type: str
    size_bytes: int


class Fetcher:
    """A downloader under a guard. It is an async context manager, which owns one client session."""

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
        """Download `url` (http, https or data) to `dest`, and check that it is of one of these kinds; images have at most 40 megapixels.

        Raises InputUnavailable if the download fails or exceeds the limits of this fetcher, and InvalidInput if the file is of another
        kind or cannot be used; both name the url without its query. Raises StorageFault if `dest` cannot be written. After an error or
        a cancel, nothing is left at `dest`.
        """
        try:
            if is_data_url(url):
                body = decoded(url)
                if len(body) > self._max_bytes:
                    raise _unavailable(url, _too_large(self._max_bytes))
                with _created(dest) as file:
                    await asyncio.to_thread(file.write, body)
            else:
                await self._tried(url, dest)
            return await asyncio.to_thread(_examined, url, dest, kinds)
        except BaseException as error:
            with contextlib.suppress(OSError):
                dest.unlink()
            if isinstance(error, OSError):  # network errors were translated before
                raise StorageFault(f"cannot write {shown(url)} to {dest}: {error.strerror or error}") from error
            raise

    async def _tried(self, url: str, dest: Path) -> None:
        """Download the url, and try again after faults that may pass. Raises InputUnavailable."""
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
            raise _unavailable(url, f"the download takes longer than {self._total_s:g} s") from error

    async def _followed(self, url: str, dest: Path) -> None:
        """Try once: follow the redirects of the url and write the file. Raises _Missed."""
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
                        raise _Missed("it redirects to something that is not a url") from error
        except aiohttp.ClientError as error:
            raise _missed(error) from error
        raise _Missed(f"it redirects more than {MAX_REDIRECTS} times")

    async def _streamed(self, answer: aiohttp.ClientResponse, dest: Path) -> None:
        if not 200 <= answer.status < 300:
            raise _Missed(f"it answered {answer.status}", may_pass=answer.status in (408, 425, 429) or answer.status >= 500)
        if not _COMPRESSED.isdisjoint(answer.headers.get("Content-Encoding", "").lower().replace(",", " ").split()):
            raise _Missed("its server sends compressed data (Content-Encoding), although the request does not allow that")
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


def image_problem(path: Path, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return why this image cannot be used, judged by its header and its scans, or None if it can. Blocks."""
    body = path.read_bytes()
    try:
        picture = opened(body)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limits, at 89 and 179 megapixels
        return f"it has too many pixels, at most {max_pixels / 1e6:g} megapixels are allowed"
    except Exception:  # Pillow raises errors of any kind for a damaged header
        return "its image header cannot be read"
    width, height = picture.size
    if width * height > max_pixels:
        return f"it has {width}x{height} pixels, at most {max_pixels / 1e6:g} megapixels are allowed"
    # FF DA begins a scan; inside the coded data of a scan FF is always followed by 00 or a restart marker
    if picture.image.format == "JPEG" and (scans := body.count(b"\xff\xda")) > MAX_SCANS:
        return f"it has {scans} scans, at most {MAX_SCANS} are allowed: save it with an ordinary program"
    return None


class _Missed(Exception):
    """A try failed. `may_pass`: whether another one may succeed."""

    def __init__(self, problem: str, *, may_pass: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.may_pass = may_pass


def _created(dest: Path) -> BinaryIO:
    """Create an empty file, to be written in threads: a slow disk must not stop the worker from renewing the leases of other tasks.

    The event loop opens and closes it, so that no thread can create it again after a cancel. Closing waits for a write in progress, by the
    lock of the file's buffer.
    """
    return dest.open("wb")


def _examined(url: str, path: Path, kinds: Collection[Kind]) -> Fetched:
    head = read_head(path)
    if problem := kind_problem(head, kinds):
        raise InvalidInput(f"{shown(url)} {problem}")
    media_type = sniff(head) or ""
    if media_type.startswith("image/") and (problem := image_problem(path)):
        raise InvalidInput(f"{shown(url)} cannot be used: {problem}")
    return Fetched(path=path, media_type=media_type, size_bytes=path.stat().st_size)


def _unavailable(url: str, problem: str) -> InputUnavailable:
    return InputUnavailable(f"{shown(url)} could not be fetched: {problem}")


def _too_large(max_bytes: int) -> str:
    return f"it is larger than {max_bytes / 1024 / 1024:g} MiB"


def _missed(error: aiohttp.ClientError) -> _Missed:
    fault, why = http_fault(error), reason(error)
    match fault:
        case HttpFault.URL:
            return _Missed(why or "it is not a well-formed url")
        case HttpFault.HOST:
            passes = isinstance(error, aiohttp.ClientConnectorDNSError) and error.os_error.errno == socket.EAI_AGAIN
            return _Missed("its host was not found", may_pass=passes)
        case HttpFault.TLS:
            return _Missed("its certificate or TLS handshake was not accepted")
        case HttpFault.TIMEOUT:
            return _Missed("its host did not answer in time", may_pass=True)
        case HttpFault.CONNECT:
            return _Missed(f"no connection: {why or 'refused'}", may_pass=True)
        case HttpFault.BROKE_OFF:
            return _Missed("the connection broke off", may_pass=True)
        case HttpFault.NOT_HTTP:
            return _Missed("its answer is not HTTP")
        case HttpFault.OTHER:
            return _Missed(f"the request failed ({why})")
