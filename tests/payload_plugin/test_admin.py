"""The plugin in the real admin: Payload in Next.js, built, served, and used by Chromium as an editor would."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Error, Page, Response, Route, async_playwright, expect

from movieq.queue.store import Store
from tests.arrange import claim, result
from tests.browser.conftest import CHROMIUM_OPTIONS, listens
from tests.fleet import KEY, Fleet, free_port
from tests.payload_plugin.conftest import PLUGIN, SECRET, Cms, Movieq, built, environment
from tests.programs import node, program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXAMPLE = PLUGIN / "example"


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cms]:
    """The example, as its README starts it."""
    built()
    port, movieq_port, data = free_port(), free_port(), tmp_path_factory.mktemp("admin")
    settings = {**environment(data, port, movieq_port), "NODE_ENV": "production", "NEXT_TELEMETRY_DISABLED": "1"}
    for command in (["node", "tables.mjs"], ["npx", "--no-install", "next", "build"]):
        done = subprocess.run(command, cwd=EXAMPLE, env=settings, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    next_ = PLUGIN / "node_modules" / "next" / "dist" / "bin" / "next"
    with (data / "log").open("w") as log:
        process = subprocess.Popen(
            [node(PLUGIN), next_, "start", "-H", "127.0.0.1", "-p", str(port)],
            cwd=EXAMPLE,
            env=settings,
            stdout=log,
            stderr=log,
        )
    cms = Cms(f"http://127.0.0.1:{port}", movieq_port)

    async def settled() -> None:
        await listens(port)
        await cms.settle()

    try:
        asyncio.run(settled())
        yield cms
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
async def page(cms: Cms) -> AsyncIterator[Page]:
    """Chromium, with the editor logged in. Neither it nor the CMS has shown it the API key in the end, and no script has thrown."""
    thrown: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=CHROMIUM_OPTIONS)
        page = await browser.new_page(viewport={"width": 1400, "height": 1100})
        page.on("pageerror", lambda error: thrown.append(str(error)))
        await page.goto(f"{cms.url}/admin/login")
        await page.get_by_label("Email").fill("editor@example.test")
        await page.get_by_label("Password").fill(cms.password)
        await page.get_by_role("button", name="Login").click()
        await page.wait_for_url(re.compile(r"/admin$"))
        yield page
        await browser.close()
    assert thrown == []


async def opened(page: Page, cms: Cms, scene: object) -> None:
    """The page of a scene, with its state."""
    async with page.expect_response(re.compile("/api/movieq/scenes/")):
        await page.goto(f"{cms.url}/admin/collections/scenes/{scene}")


async def test_an_editor_queues_a_scene_and_sees_the_bar_move_and_the_clip(installation: Fleet, cms: Cms, page: Page, folder: Path) -> None:
    api = await installation.api(port=cms.movieq_port)
    await installation.worker(MOVIEQ_WEBHOOK_SECRET=SECRET, MOVIEQ_PUBLIC_URL=api.url)
    project = (await cms.create("projects", title="Lighthouse"))["id"]
    boards = [await cms.picture(project) for _ in range(3)]
    fields = {"description": "The keeper lights the lamp", "lighting": "glowworms", "cameraAngle": "dolly in", "duration": 7}
    scene = (await cms.create("scenes", title="The lamp", project=project, storyboard=boards, resolution="1920x1080", **fields))["id"]
    await opened(page, cms, scene)
    await page.screenshot(path=folder / "before.png")
    await page.locator("#field-status").click()
    await page.get_by_text("Queued", exact=True).click()
    await page.get_by_role("button", name="Save", exact=True).click()
    seen: set[str] = set()
    async with asyncio.timeout(60):
        while not await page.locator(".movieq-panel video").count():
            bars = "Array.from(document.querySelectorAll('[role=progressbar]'), (bar) => bar.ariaValueNow)"
            seen |= set(filter(None, await page.evaluate(bars)))
            if len(seen) > 10 and not (folder / "during.png").exists():
                await expect(page.locator("#field-status")).to_contain_text("Processing")
                await page.screenshot(path=folder / "during.png")
                await page.locator("#field-title").fill("The lamp, at night")  # an editor goes on working
            await asyncio.sleep(0.05)
    assert len(seen) > 10, seen
    await expect(page.locator(".movieq-panel__chip")).to_have_text("Ready")
    await expect(page.locator(".movieq-panel__warnings")).to_contain_text("lighting 'glowworms' is not known")
    video = page.locator(".movieq-panel video")
    await page.wait_for_function("document.querySelector('.movieq-panel video').readyState >= 1")
    assert await video.evaluate("video => Math.round(video.duration)") == 7
    await video.evaluate("(video) => { video.muted = true; return video.play() }")
    await page.wait_for_function("document.querySelector('.movieq-panel video').currentTime > 0.2")
    assert (await video.get_attribute("src") or "").startswith(f"{cms.url}/api/media/file/")
    # the form has what was written: the next save takes nothing back, and nobody has to reload for it
    await expect(page.locator("#field-status")).to_contain_text("Completed")
    await page.get_by_role("button", name="Save", exact=True).click()
    await expect(page.get_by_text("Updated successfully").last).to_be_visible()
    now = await cms.scene(scene)
    assert (now["status"], now["title"], now["progress"]) == ("completed", "The lamp, at night", 1)
    assert now["result"] is not None
    await page.screenshot(path=folder / "after.png")


async def test_a_failure_is_told_on_the_page_and_tried_again_from_there(
    store: Store, api: Movieq, cms: Cms, page: Page, folder: Path
) -> None:
    scene = await cms.create("scenes", title="The storm", description="A storm", status="queued")
    await opened(page, cms, scene["id"])
    await expect(page.locator(".movieq-panel__words")).to_contain_text("Waiting, position 1")
    await page.screenshot(path=folder / "waiting.png")
    (claimed,) = await claim(store)
    await store.report(claimed.task.task_id, claimed.run, 0.4, "generating_video", remaining_ms=21_000)
    await expect(page.locator(".movieq-panel__words")).to_contain_text("Generating video, about 21 s left40 %")
    await store.fail(claimed.task.task_id, claimed.run, "the storyboard could not be fetched", "input_unavailable")
    await expect(page.locator(".movieq-panel__error")).to_have_text("the storyboard could not be fetched")
    await page.screenshot(path=folder / "failed.png")
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".movieq-panel__chip")).to_have_text("Waiting")
    again = await cms.scene(scene["id"])
    assert (again["status"], again["error"]) == ("queued", None)
    assert again["taskId"] != scene["taskId"]
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator(".movieq-panel__chip")).to_have_text("Stopped")
    _, status = await api.call("GET", f"/tasks/{again['taskId']}/status")
    assert status["status"] == "cancelled"


async def test_a_page_whose_address_has_expired_gets_a_fresh_one_from_the_cms(store: Store, api: Movieq, cms: Cms, page: Page) -> None:
    scene = await cms.create("scenes", title="The long one", description="A night", status="queued")
    expired = 0

    async def once_expired(route: Route) -> None:
        nonlocal expired
        answer = await route.fetch(headers={**route.request.headers, "origin": cms.url})  # without one Payload takes no cookie
        state = await answer.json()
        if not expired:
            state["eventsUrl"] = re.sub("expires=[0-9]+", "expires=1", state["eventsUrl"])
        expired += 1
        await route.fulfill(response=answer, json=state)

    await page.route("**/api/movieq/scenes/*", once_expired)
    await opened(page, cms, scene["id"])
    (claimed,) = await claim(store)
    await store.report(claimed.task.task_id, claimed.run, 0.25, "generating_video")
    await expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "25", timeout=30_000)
    assert expired > 1


async def test_a_clip_that_the_cms_cannot_fetch_is_said_and_not_asked_for_without_end(
    store: Store, api: Movieq, cms: Cms, page: Page
) -> None:
    scene = await cms.create("scenes", title="The lost one", description="A fog", status="queued")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/api/movieq/scenes/" in request.url else None)
    await opened(page, cms, scene["id"])
    (claimed,) = await claim(store)
    await store.complete(claimed.task.task_id, claimed.run, result())  # of a file that is not there
    await expect(page.locator(".movieq-panel__problem")).to_have_text("movieq's file cannot be downloaded: its server answered 404.")
    await page.wait_for_timeout(3000)
    assert len(asked) <= 5, asked


async def test_nothing_that_a_browser_gets_has_the_api_key(api: Movieq, cms: Cms, page: Page) -> None:
    scene = await cms.create("scenes", title="Secrets", description="A vault", status="queued")
    bodies: list[bytes] = []

    async def noted(response: Response) -> None:
        with contextlib.suppress(Error):  # a redirect or a stream has none
            bodies.append(await response.body())

    page.on("response", noted)
    await opened(page, cms, scene["id"])
    await page.wait_for_load_state("networkidle")
    built_ = b"".join(path.read_bytes() for path in (EXAMPLE / ".next" / "static").rglob("*") if path.is_file())
    assert len(bodies) > 5
    assert b"movieq-panel" in built_
    for secret in (KEY.encode(), SECRET.encode()):
        assert secret not in b"".join(bodies) + built_
