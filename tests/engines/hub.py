"""A local model hub, with faults on demand: it serves a folder by the routes of Hugging Face that a pull uses."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from aiohttp import web

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
LARGE: Final = ".safetensors"


class Hub:
    """A server of repositories from folders. `url` is the value for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], Path] = {}
        """By repository and revision."""
        self.url = ""
        self.cut: int | None = None
        """After so many bytes of a large file the connection breaks, once..."""
        self.received: Callable[[], bool] = lambda: True
        """...and when this is true."""
        self.changed = False
        """Whether large files arrive with a changed last byte."""
        self.asked: list[tuple[str, str]] = []
        """Method and Range of each request for a large file."""

    def add(self, folder: Path, repository: str, revision: str) -> None:
        """Serve a folder as a repository."""
        self.folders[repository, revision] = folder

    def _folder(self, request: web.Request) -> Path | None:
        return self.folders.get((request.match_info["repository"], request.match_info["revision"]))

    async def info(self, request: web.Request) -> web.Response:
        """Return the list of files."""
        if (folder := self._folder(request)) is None:
            raise web.HTTPNotFound
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [self._sibling(folder, path) for path in files]
        repository, revision = request.match_info["repository"], request.match_info["revision"]
        return web.json_response({"id": repository, "sha": revision, "private": False, "tags": [], "siblings": siblings})

    def _sibling(self, folder: Path, path: Path) -> dict[str, Any]:
        name, size = str(path.relative_to(folder)), path.stat().st_size
        found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob(path)}
        if name.endswith(LARGE):
            found["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 130}
        return found

    async def file(self, request: web.Request) -> web.StreamResponse:
        """Return a file, from the first byte of the request's range."""
        folder = self._folder(request)
        if folder is None or not (path := folder / request.match_info["name"]).is_file():
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        large = path.name.endswith(LARGE)
        headers = {
            "ETag": f'"{sha256(path) if large else blob(path)}"',
            "X-Repo-Commit": request.match_info["revision"],
            "Accept-Ranges": "bytes",
        }
        if large:
            self.asked.append((request.method, request.headers.get("Range", "")))
            data = data[:-1] + bytes([data[-1] ^ 1]) if self.changed else data
        start = request.http_range.start or 0
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(data) - start)})
        await response.prepare(request)
        if request.method == "GET":
            if large and self.cut is not None:
                await response.write(data[start : start + self.cut])
                self.cut = None
                async with asyncio.timeout(60):
                    while not self.received():
                        await asyncio.sleep(0.01)
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(data[start:])
        return response


@asynccontextmanager
async def hub(folder: Path, repository: str = "team/model", revision: str = COMMIT) -> AsyncIterator[Hub]:
    """Yield a hub that serves a folder as a repository, on a free port."""
    served = Hub()
    served.add(folder, repository, revision)
    application = web.Application()
    application.router.add_get("/api/models/{repository:[^/]+/[^/]+}/revision/{revision}", served.info)
    application.router.add_get("/{repository:[^/]+/[^/]+}/resolve/{revision}/{name:.+}", served.file)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
