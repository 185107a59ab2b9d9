"""What stands between movieq and its users: Chromium, nginx, and the clients of Node. The real ones, of the machine's packages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from aiohttp import web
from playwright.async_api import Page, async_playwright

from tests.fleet import Fleet, eventually, fleet
from tests.programs import program
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


@pytest.fixture
async def installation(folder: Path) -> AsyncIterator[Fleet]:
    """A fleet."""
    async with fleet(folder / "fleet", appendfsync="always") as installation:
        yield installation


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """A page of Chromium, empty, of an origin of its own. In the end no script of it has thrown."""

    async def empty(request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>a page</title>", content_type="text/html")

    thrown: list[str] = []
    chromium = program("chromium", "chromium")
    async with serving({"/": empty}) as origin, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        page = await browser.new_page()
        page.on("pageerror", lambda error: thrown.append(str(error)))
        await page.goto(origin)
        yield page
        await browser.close()
    assert thrown == []


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
