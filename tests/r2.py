"""A proxy in front of an S3 server that refuses what R2 refuses, and fails in the ways that a remote server fails."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

Match = Callable[[web.BaseRequest], bool]


class R2:
    """A proxy in front of an S3 server; `endpoint` is the address for clients."""

    def __init__(self, server: str, session: aiohttp.ClientSession) -> None:
        self.endpoint = ""
        self.asked: list[str] = []
        """Method, and path with query, of every request."""
        self.refused: list[str] = []
        """What R2 refuses in the requests so far."""
        self.parts_at_once = 0
        """Most parts that were uploaded at the same time."""
        self.happened = asyncio.Event()
        """Set when a fault begins."""
        self._server = server
        self._session = session
        self._sizes: dict[str, dict[int, int]] = defaultdict(dict)
        self._parts = 0
        self._fault: tuple[Match, int, Callable[[web.BaseRequest], Any]] | None = None

    def answer(self, status: int, code: str, match: Match, times: int = 1) -> None:
        """Answer the next requests that match with this error."""

        async def fail(request: web.BaseRequest) -> web.StreamResponse:
            async for _ in request.content.iter_any():
                pass
            return _error(status, code)

        self._set(match, times, fail)

    def cut(self, match: Match, after_bytes: int = 0, times: int = 1) -> None:
        """Cut the connections of the next requests that match, after this many bytes of their bodies."""

        async def hang_up(request: web.BaseRequest) -> web.StreamResponse:
            came = 0
            while came < after_bytes and (chunk := await request.content.readany()):
                came += len(chunk)
            return _hung_up(request)

        self._set(match, times, hang_up)

    def hang(self, match: Match, times: int = 1) -> None:
        """Read nothing of the next requests that match, and answer nothing."""

        async def sleep(request: web.BaseRequest) -> web.StreamResponse:
            await asyncio.sleep(3600)
            return web.Response()

        self._set(match, times, sleep)

    def slow(self, match: Match, seconds: float, times: int = 1) -> None:
        """Pass on the next requests that match only after this many seconds."""

        async def wait(request: web.BaseRequest) -> web.StreamResponse:
            await asyncio.sleep(seconds)
            return await self.passed_on(request)

        self._set(match, times, wait)

    def heal(self) -> None:
        """End all faults."""
        self._fault = None
        self.happened.clear()

    def _set(self, match: Match, times: int, fail: Callable[[web.BaseRequest], Any]) -> None:
        self._fault = match, times, fail
        self.happened.clear()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.raw_path}")
        if "Expect" in request.headers:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # or it would take its own headers for sent
        if self._fault is not None and self._fault[0](request):
            match, times, fail = self._fault
            self._fault = (match, times - 1, fail) if times > 1 else None
            self.happened.set()
            answer: web.StreamResponse = await fail(request)
            return answer
        if problem := self._problem(request):
            self.refused.append(problem)
            async for _ in request.content.iter_any():
                pass
            return _error(401, "Unauthorized")  # what R2 says too, however little it has to do with it
        part = "partNumber" in request.query
        self._parts += part
        self.parts_at_once = max(self.parts_at_once, self._parts)
        try:
            return await self.passed_on(request)
        except (aiohttp.ClientError, OSError):  # the server has gone
            return _hung_up(request)
        finally:
            self._parts -= part

    def _problem(self, request: web.BaseRequest) -> str | None:
        for name, value in request.headers.items():
            if re.match("x-amz-(sdk-)?checksum|x-amz-trailer", name, re.IGNORECASE) or re.search("STREAMING-|aws-chunked", value):
                return f"{name}: {value}"
        upload = request.query.get("uploadId", "")
        if "partNumber" in request.query:
            self._sizes[upload][int(request.query["partNumber"])] = int(request.headers["Content-Length"])
        elif request.method == "POST" and upload:
            sizes = [size for _, size in sorted(self._sizes[upload].items())]
            if len(set(sizes[:-1])) > 1:
                return f"parts of {sorted(set(sizes))} bytes"
        return None

    async def passed_on(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass a request on unchanged; return the server's answer."""
        url = URL(self._server + request.raw_path, encoded=True)
        body = request.content if request.can_read_body else None
        headers = {name: value for name, value in request.headers.items() if name != "Expect"}
        async with self._session.request(request.method, url, headers=headers, data=body, allow_redirects=False) as answer:
            response = web.StreamResponse(status=answer.status, headers=answer.headers)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def put(request: web.BaseRequest) -> bool:
    """Whether the request stores a file or a part of one."""
    return request.method == "PUT"


def get(request: web.BaseRequest) -> bool:
    """Whether the request reads a file."""
    return request.method == "GET"


def _hung_up(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _error(status: int, code: str) -> web.Response:
    return web.Response(
        status=status, text=f"<Error><Code>{code}</Code><Message>said the test</Message></Error>", content_type="application/xml"
    )


@asynccontextmanager
async def r2(server: str) -> AsyncIterator[R2]:
    """Yield a proxy on a free port for the block."""
    async with aiohttp.ClientSession(
        auto_decompress=False, skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
    ) as session:
        service = R2(server, session)
        runner = web.ServerRunner(web.Server(service.handle), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        service.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield service
        finally:
            await runner.cleanup()
