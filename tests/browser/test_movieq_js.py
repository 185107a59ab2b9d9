"""movieq.js in Chromium, on a page of another origin: what handlers are told, through restarts, refusals and the 502 of a proxy."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Page

from movieq import signing
from movieq.queue.api_keys import ApiKeys
from movieq.queue.queries import Queries
from movieq.tasks.states import TaskId
from tests.arrange import claim, new_task, result, running
from tests.browser.conftest import NODE, ROOT, listens
from tests.browser.test_clients import work
from tests.fleet import Fleet, eventually, free_port
from tests.nginx import Nginx, nginx
from tests.programs import node
from tests.service import Service, serving

FOLLOW = """async ([script, method, url, {fresh, ...options}, handlers]) => {
    const movieq = await import(script);
    window.told = [];
    if (fresh !== undefined) options.renew = async () => (told.push(["renew", null]), fresh);
    const named = handlers.map((name) => [name, (event) => told.push([name, event])]);
    window.watching = movieq[method](url, {...options, ...Object.fromEntries(named)});
}"""


class Watching:
    """A watch on a page: what its handlers were told."""

    def __init__(self, page: Page) -> None:
        self._page = page

    async def told(self, *handlers: str) -> list[Any]:
        """What these handlers were told so far."""
        told: list[tuple[str, Any]] = await self._page.evaluate("told")
        return [event for name, event in told if name in handlers]

    async def until(self, condition: str, within_s: float = 60) -> None:
        """A condition of `told` and `watching` holds."""
        await self._page.wait_for_function(condition, timeout=within_s * 1000)

    async def last_id(self) -> str:
        """Where another watch would continue."""
        return str(await self._page.evaluate("watching.lastEventId"))


async def watch(page: Page, api_url: str, method: str, url: str, **options: Any) -> Watching:
    """Begins a watch with every handler."""
    handlers = ["onSnapshot", "onProgress", "onChange", "onPreview", "onDone", "onGap", "onError"]
    await page.evaluate(FOLLOW, [f"{api_url}/movieq.js", method, url, options, handlers])
    return Watching(page)


@pytest.fixture
async def api(installation: Fleet) -> Service:
    """Its API process."""
    return await installation.api()


async def events_url(api: Service, path: str) -> str:
    """The signed address in an answer."""
    _, answer = await api.call("GET", path)
    return str(answer["events_url"])


async def test_a_task_is_followed_to_its_end_and_its_end_is_told_once(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    await work(installation.store, task_id, run, range(1, 10))
    watching = await watch(page, api.url, "watchTask", await events_url(api, f"/tasks/{task_id}/status"))
    await watching.until("told.length > 0")
    await work(installation.store, task_id, run, range(10, 20))
    await installation.store.preview(task_id, run, b"\xff\xd8")
    await watching.until("told.some(([name]) => name === 'onPreview')")
    await installation.store.complete(task_id, run, result())
    await watching.until("watching.closed")

    # the snapshot stands for all of before, and the log before it is not told again
    assert [event["progress"] for event in await watching.told("onProgress")] == [0.09, *(step / 100 for step in range(10, 20))]
    (preview,) = await watching.told("onPreview")
    assert preview["image"] == "data:image/jpeg;base64,/9g="
    (done,) = await watching.told("onDone")
    assert done["status"] == "completed"
    assert done["result"]["media_url"].startswith(api.url)
    assert await watching.told("onError", "onGap") == []


async def test_the_page_of_the_guide_follows_a_task(installation: Fleet, api: Service, page: Page) -> None:
    (script,) = re.findall(r"^```js\n(.*?)^```$", (ROOT / "movieq/web/docs/events.md").read_text(), re.MULTILINE | re.DOTALL)
    task_id, run = await running(installation.store)
    await page.evaluate(
        """(events_url) => {
            const picture = {}, seen = {};
            const show = (...shown) => seen.shown = shown, play = (url) => seen.played = url, say = (text) => seen.said = text;
            Object.assign(window, {events_url, picture, seen, show, play, say});
        }""",
        await events_url(api, f"/tasks/{task_id}/status"),
    )
    await page.add_script_tag(type="module", content=script.replace("http://127.0.0.1:8001", api.url))
    await installation.store.report(task_id, run, 0.5, "generating_image", remaining_ms=2000)
    await page.wait_for_function("seen.shown?.[0] === 0.5")
    assert await page.evaluate("seen.shown") == [0.5, "generating_image", 2]
    await installation.store.preview(task_id, run, b"\xff\xd8")
    await page.wait_for_function("picture.src?.startsWith('data:image/jpeg')")
    await installation.store.complete(task_id, run, result())
    await page.wait_for_function("seen.played")
    assert not await page.evaluate("seen.said")


async def test_a_task_that_has_ended_is_done_at_once(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    await installation.store.fail(task_id, run, "there is no such picture", "input_unavailable")
    watching = await watch(page, api.url, "watchTask", await events_url(api, f"/tasks/{task_id}/status"))
    await watching.until("watching.closed")
    (done,) = await watching.told("onDone")
    assert (done["status"], done["error_code"]) == ("failed", "input_unavailable")


async def test_a_failure_from_before_a_retry_is_not_the_end(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    await installation.store.fail(task_id, run, "there is no such picture", "input_unavailable")
    await installation.store.retry(task_id)
    (claimed,) = await claim(installation.store)
    watching = await watch(page, api.url, "watchTask", await events_url(api, f"/tasks/{task_id}/status"))
    await work(installation.store, task_id, claimed.run, range(1, 10))
    await watching.until("told.at(-1)?.[1].progress === 0.09")
    assert await watching.told("onDone") == []
    await installation.store.complete(task_id, claimed.run, result())
    await watching.until("watching.closed")
    assert [done["status"] for done in await watching.told("onDone")] == ["completed"]


async def test_a_watch_that_continues_after_the_end_is_told_the_end(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    await installation.store.complete(task_id, run, result())
    last = (await Queries(installation.store.redis).log_after(task_id, None))[-1].id
    url = await events_url(api, f"/tasks/{task_id}/status")
    watching = await watch(page, api.url, "watchTask", url, after=last)
    await watching.until("watching.closed")
    assert [done["status"] for done in await watching.told("onDone")] == ["completed"]
    watching = await watch(page, api.url, "watchTask", f"{url}&after={last}")
    await watching.until("watching.closed")
    assert [done["status"] for done in await watching.told("onDone")] == ["completed"]


async def test_a_404_of_a_proxy_is_no_reason_to_give_up(installation: Fleet, page: Page, folder: Path) -> None:
    port = free_port()

    asked: list[str] = []

    async def nobody(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404, text="no backend", headers={"Access-Control-Allow-Origin": "*"})

    balancer = web.AppRunner(web.Application(middlewares=[]))
    balancer.app.router.add_get("/{path:.*}", nobody)
    api = await installation.api()
    task_id, run = await running(installation.store)
    url = (await events_url(api, f"/tasks/{task_id}/status")).replace(api.url, f"http://127.0.0.1:{port}")
    await balancer.setup()
    await web.TCPSite(balancer, "127.0.0.1", port).start()
    watching = await watch(page, api.url, "watchTask", url)
    await eventually(lambda: len(asked) >= 3)
    assert await watching.told("onError") == []
    await balancer.cleanup()
    await installation.api(port=port)
    await installation.store.complete(task_id, run, result())
    await watching.until("watching.closed", 30)
    assert [done["status"] for done in await watching.told("onDone")] == ["completed"]


async def test_a_watch_continues_where_another_stopped(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    url = await events_url(api, f"/tasks/{task_id}/status")
    watching = await watch(page, api.url, "watchTask", url)
    await work(installation.store, task_id, run, range(1, 10))
    await watching.until("told.at(-1)?.[1].progress === 0.09")
    last = await watching.last_id()
    await page.evaluate("watching.close()")
    await work(installation.store, task_id, run, range(10, 20))
    watching = await watch(page, api.url, "watchTask", url, after=last)
    await watching.until("told.at(-1)?.[1].progress === 0.19")
    assert [event["progress"] for event in await watching.told("onProgress")] == [step / 100 for step in range(10, 20)]
    assert await watching.told("onGap") == []


async def expired_url(installation: Fleet, api: Service, task_id: TaskId) -> str:
    """The address of a task's stream that has expired a second ago."""
    expires = int(time.time()) - 1
    signature = signing.sign(await ApiKeys(installation.store.redis).signing_secret(), "events", task_id, expires)
    return f"{api.url}/api/v1/tasks/{task_id}/events?expires={expires}&signature={signature}"


async def asks_no_more(api: Service, page: Page) -> bool:
    """Whether a page whose clock is installed sends no request for ten hours."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.clock.fast_forward("10:00:00")
    await page.evaluate("(url) => fetch(url)", f"{api.url}/movieq.js")
    return asked == [f"{api.url}/movieq.js"]


@pytest.mark.parametrize("change", ["expired", "changed"])
async def test_a_refused_address_is_told_with_the_reason_and_asked_no_more(
    installation: Fleet, api: Service, page: Page, change: str
) -> None:
    task_id, _ = await running(installation.store)
    await page.clock.install()
    changed = f"{await events_url(api, f'/tasks/{task_id}/status')}x"
    url = await expired_url(installation, api, task_id) if change == "expired" else changed
    watching = await watch(page, api.url, "watchTask", url)
    await watching.until("watching.closed")
    (refused,) = await watching.told("onError")
    assert (refused["status"], refused["error"]) == (403, "expired" if change == "expired" else "invalid_signature")
    assert await asks_no_more(api, page)


async def test_a_watch_whose_address_has_expired_goes_on_with_a_fresh_one(installation: Fleet, api: Service, page: Page) -> None:
    task_id, run = await running(installation.store)
    fresh = await events_url(api, f"/tasks/{task_id}/status")
    watching = await watch(page, api.url, "watchTask", await expired_url(installation, api, task_id), fresh=fresh)
    await watching.until("told.some(([name]) => name === 'onProgress')")
    await installation.store.complete(task_id, run, result())
    await watching.until("watching.closed")
    assert [done["status"] for done in await watching.told("onDone")] == ["completed"]
    assert (await watching.told("renew"), await watching.told("onError")) == ([None], [])


@pytest.mark.parametrize("fresh", ["expired", "none"])
async def test_an_expired_address_without_a_fresh_one_is_told(installation: Fleet, api: Service, page: Page, fresh: str) -> None:
    task_id, _ = await running(installation.store)
    await page.clock.install()
    url = await expired_url(installation, api, task_id)
    watching = await watch(page, api.url, "watchTask", url, fresh=url if fresh == "expired" else None)
    await watching.until("watching.closed")
    assert [refused["error"] for refused in await watching.told("onError")] == ["expired"]
    assert await watching.told("renew") == [None]
    assert await asks_no_more(api, page)


@pytest.mark.parametrize(("status", "retry_after"), [(429, "600"), (503, "600"), (503, "date")])
async def test_a_server_that_is_busy_is_asked_again_at_the_time_that_it_names(
    installation: Fleet, api: Service, page: Page, status: int, retry_after: str
) -> None:
    asked: list[str] = []

    async def busy(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Accept", ""))
        after = formatdate(time.time() + 600, usegmt=True) if retry_after == "date" else retry_after
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Retry-After", "Retry-After": after}
        return web.json_response({"error": "busy", "message": "later", "retryable": True}, status=status, headers=headers)

    await page.clock.install()
    async with serving({"/events": busy}) as url:
        watching = await watch(page, api.url, "watchTask", f"{url}/events")
        await eventually(lambda: len(asked) == 2)  # the stream, and why it was refused
        await page.clock.fast_forward(590_000)
        await page.evaluate("(url) => fetch(url)", f"{api.url}/movieq.js")
        assert len(asked) == 2
        await page.clock.fast_forward(30_000)
        await eventually(lambda: len(asked) > 2)
        assert await watching.told("onError") == []
        await page.evaluate("watching.close()")


@pytest.mark.parametrize("status", [400, 401, 403, 410])
async def test_a_refusal_of_a_proxy_is_told(installation: Fleet, api: Service, page: Page, status: int) -> None:
    async def refusing(request: web.Request) -> web.Response:
        return web.Response(status=status, text="<html>", headers={"Access-Control-Allow-Origin": "*"})

    async with serving({"/events": refusing}) as url:
        watching = await watch(page, api.url, "watchTask", f"{url}/events")
        await watching.until("watching.closed")
        assert [(refused["status"], refused["error"]) for refused in await watching.told("onError")] == [(status, "")]


async def test_a_task_that_is_not_there_any_more_is_told_as_such(installation: Fleet, api: Service, page: Page) -> None:
    url = (await events_url(api, f"/tasks/{(await running(installation.store))[0]}/status")).split("/api/")[0]
    gone, expires = TaskId("00000000-0000-4000-8000-000000000000"), int(time.time()) + 60
    signature = signing.sign(await ApiKeys(installation.store.redis).signing_secret(), "events", gone, expires)
    watching = await watch(page, api.url, "watchTask", f"{url}/api/v1/tasks/{gone}/events?expires={expires}&signature={signature}")
    await watching.until("watching.closed")
    assert [refused["status"] for refused in await watching.told("onError")] == [404]


async def test_a_project_is_followed_change_by_change_through_the_death_of_the_api(installation: Fleet, page: Page) -> None:
    port = free_port()
    api = await installation.api(port=port)
    task_id, run = await running(installation.store)
    watching = await watch(page, api.url, "watchProject", await events_url(api, "/projects/film"))
    await watching.until("told.length === 1")
    (snapshot,) = await watching.told("onSnapshot")
    assert [task["task_id"] for task in snapshot["active"]] == [task_id]
    await installation.store.report(task_id, run, 0.5, "generating_image")
    await watching.until("told.some(([name]) => name === 'onProgress')")

    api.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(api.process.wait)
    await installation.store.complete(task_id, run, result())
    await installation.store.submit(new_task())
    await installation.api(port=port)
    (claimed,) = await claim(installation.store)
    await watching.until("told.at(-1)[1].type === 'started'")
    changes = [(event["type"], event["task_id"]) for event in await watching.told("onChange")]
    assert changes == [("completed", task_id), ("queued", claimed.task.task_id), ("started", claimed.task.task_id)]
    assert len(await watching.told("onSnapshot")) == 1, "it continued at its place"


# ── Behind nginx ──


@pytest.fixture
async def proxied(installation: Fleet, folder: Path) -> AsyncIterator[tuple[Nginx, int]]:
    """An nginx, and the port at which it looks for the API."""
    port, api_port = free_port(), free_port()
    with nginx(folder / "nginx", port, api_port) as running_nginx:
        await listens(port)
        yield running_nginx, api_port


async def test_events_pass_nginx_one_by_one(installation: Fleet, proxied: tuple[Nginx, int], page: Page) -> None:
    proxy, api_port = proxied
    api = await installation.api(port=api_port, MOVIEQ_PUBLIC_URL=proxy.url)
    task_id, run = await running(installation.store)
    url = await events_url(api, f"/tasks/{task_id}/status")
    assert url.startswith(proxy.url)
    watching = await watch(page, proxy.url, "watchTask", url)
    await watching.until("told.length > 0")
    for percent in range(1, 6):
        await work(installation.store, task_id, run, range(percent, percent + 1))
        await watching.until(f"told.at(-1)[1].progress === {percent / 100}")  # before the next is made: nothing keeps it back
    await installation.store.complete(task_id, run, result())
    await watching.until("watching.closed")


async def test_the_502_of_a_restart_is_survived_by_movieq_js_though_not_by_an_eventsource(
    installation: Fleet, proxied: tuple[Nginx, int], page: Page
) -> None:
    proxy, api_port = proxied
    api = await installation.api(port=api_port, MOVIEQ_PUBLIC_URL=proxy.url)
    task_id, run = await running(installation.store)
    url = await events_url(api, f"/tasks/{task_id}/status")
    watching = await watch(page, proxy.url, "watchTask", url)
    await page.evaluate("(url) => { window.plain = new EventSource(url); }", url)
    await work(installation.store, task_id, run, range(1, 10))
    await watching.until("told.at(-1)?.[1].progress === 0.09")
    before = len(await watching.told("onProgress"))

    api.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(api.process.wait)
    await eventually(lambda: proxy.log.count(" 502 ") >= 2)
    await work(installation.store, task_id, run, range(10, 20))
    await installation.api(port=api_port, MOVIEQ_PUBLIC_URL=proxy.url)
    await watching.until("told.at(-1)[1].progress === 0.19", 30)
    told = await watching.told("onProgress")
    assert [event["progress"] for event in told[before:]] == [step / 100 for step in range(10, 20)]
    assert await page.evaluate("plain.readyState === EventSource.CLOSED")
    await installation.store.complete(task_id, run, result())
    await watching.until("watching.closed")
    assert len(await watching.told("onDone")) == 1


async def test_nginx_writes_no_signature_into_its_log(installation: Fleet, proxied: tuple[Nginx, int], page: Page) -> None:
    proxy, api_port = proxied
    api = await installation.api(port=api_port, MOVIEQ_PUBLIC_URL=proxy.url)
    task_id, run = await running(installation.store)
    await installation.store.complete(task_id, run, result())
    url = await events_url(api, f"/tasks/{task_id}/status")
    watching = await watch(page, proxy.url, "watchTask", url)
    await watching.until("watching.closed")
    await eventually(lambda: f"GET /api/v1/tasks/{task_id}/events" in proxy.log)
    api.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(api.process.wait)
    await page.evaluate("(url) => { new EventSource(url); }", url)
    await eventually(lambda: " 502 " in proxy.log)
    assert "signature" not in proxy.log + proxy.errors


# ── The declarations ──


def test_a_page_in_typescript_passes_the_compiler() -> None:
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]
    compiler = NODE / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run([node(NODE), compiler, *options, NODE / "page.ts"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
