"""What stands between movieq and its users: Chromium, nginx, and the clients of Node. The real ones, of the machine's packages."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from aiohttp import web
from playwright.async_api import Page, async_playwright

from movieq import store
from tests.fleet import Fleet, eventually, fleet
from tests.service import serving

ROOT: Final = Path(__file__).parents[2]
NODE: Final = Path(__file__).with_name("node")
CHROMIUM_OPTIONS: Final = [
    "--no-sandbox",  # it shows pages of ours alone, and will not run as root with one
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


def program(name: str, package: str) -> str:
    """The path of a program of the machine."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert found, f"these tests need {name}: apt install {package}, or deselect them with --ignore=tests/browser"
    return found


@pytest.fixture(autouse=True)
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the test's own outlasts every wait."""
    monkeypatch.setattr(store, "LEASE_MS", 300_000)


@pytest.fixture
async def made(folder: Path) -> AsyncIterator[Fleet]:
    """A fleet."""
    async with fleet(folder / "fleet", appendfsync="always") as made:
        yield made


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """A page of Chromium, empty, of an origin of its own. In the end no script of it has thrown."""

    async def empty(request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>a page</title>", content_type="text/html")

    thrown: list[str] = []
    async with serving({"/": empty}) as origin, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=CHROMIUM_OPTIONS)
        page = await browser.new_page()
        page.on("pageerror", lambda error: thrown.append(str(error)))
        await page.goto(origin)
        yield page
        await browser.close()
    assert thrown == []


class Nginx:
    """An nginx with the configuration of deploy/, on free ports; `url` is its address."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder

    @property
    def log(self) -> str:
        """What it wrote of the requests that have ended."""
        return (self._folder / "access.log").read_text()

    @property
    def errors(self) -> str:
        """What it wrote of what went wrong."""
        return "".join((self._folder / name).read_text() for name in ("error.log", "site-error.log"))


@contextmanager
def nginx(folder: Path, port: int, api_port: int) -> Iterator[Nginx]:
    """An nginx at a port, in front of an API at another."""
    folder.mkdir()
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    for written, here in [
        (r"listen 80;", f"listen 127.0.0.1:{port};"),
        (r"server 127\.0\.0\.1:8001;", f"server 127.0.0.1:{api_port};"),
        (r"/var/log/nginx/movieq\.log", str(folder / "access.log")),
        (r"/var/log/nginx/movieq-error\.log", str(folder / "site-error.log")),
    ]:
        site, found = re.subn(written, here, site)
        assert found == 1, written
    kept = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "site.conf").write_text(site)
    (folder / "nginx.conf").write_text(f"pid {folder}/pid; events {{}} http {{ {kept} include {folder}/site.conf; }}")
    command = [program("nginx", "nginx-light"), "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log"), "-g", "daemon off;"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(10)


async def listens(port: int) -> None:
    """Somebody takes connections at the port."""

    async def taken() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await eventually(taken)
