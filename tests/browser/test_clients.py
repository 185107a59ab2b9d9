"""Clients that others have written follow a stream through the death of the API: what they miss, what they hear twice, when they end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import httpx
import httpx_sse
import pytest
from playwright.async_api import Page

from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.states import EventType, RunToken, TaskId
from tests.arrange import result, running
from tests.browser.conftest import NODE
from tests.fleet import Fleet, eventually, free_port
from tests.programs import node, program

LOGGED: Final = [each for each in EventType if each not in (EventType.SNAPSHOT, EventType.GAP, EventType.PREVIEW, EventType.GOODBYE)]
"""Events that have an id; in these runs every progress is one."""
Heard = list[str]
Follow = Callable[[str, Heard], Awaitable[None]]
"""Follows a signed stream until its client holds it to be over, and notes the id of each event that has one."""


async def with_curl(url: str, heard: Heard) -> None:
    while True:
        after = ["-H", f"Last-Event-ID: {heard[-1]}"] if heard else []
        command = [program("curl", "curl"), "-sN", "--max-time", "30", "-w", "\nanswered: %{http_code}\n", *after, url]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async for line in process.stdout:
            field, _, value = line.decode().rstrip().partition(": ")
            if field == "id":
                heard.append(value)
            elif (field, value) == ("answered", "204"):
                await process.wait()
                return
        await process.wait()
        await asyncio.sleep(0.1)


async def with_httpx_sse(url: str, heard: Heard) -> None:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        while True:
            headers = {"Last-Event-ID": heard[-1]} if heard else {}
            try:
                async with httpx_sse.aconnect_sse(client, "GET", url, headers=headers) as source:
                    if source.response.status_code == 204:
                        return
                    async for event in source.aiter_sse():
                        if event.event in LOGGED:
                            heard.append(event.id)
            except httpx.TransportError:
                await asyncio.sleep(0.1)


async def with_npm_eventsource(url: str, heard: Heard) -> None:
    process = await asyncio.create_subprocess_exec(node(NODE), NODE / "follow.js", url, *LOGGED, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            heard.append(line.decode().strip())
        assert await process.wait() == 0, "it ended by another answer than 204"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture(params=["curl", "httpx-sse", "eventsource"])
def follow(request: pytest.FixtureRequest) -> Follow:
    """One of the clients."""
    match request.param:
        case "curl":
            program("curl", "curl")
        case "eventsource":
            node(NODE)
    return {"curl": with_curl, "httpx-sse": with_httpx_sse, "eventsource": with_npm_eventsource}[request.param]


async def work(store: Store, task_id: TaskId, run: RunToken, percents: range) -> None:
    """Reports of a run that keeps its lease, each of which is in the log."""
    for percent in percents:
        await store.report(task_id, run, percent / 100, "generating_image", stage="denoise", step=percent, steps=100)
    await store.renew("w1", [], [(task_id, run)], gpu_bytes=0)


async def through_a_death(installation: Fleet, heard: Heard, open_at: Callable[[str], Awaitable[None]]) -> tuple[str, list[str]]:
    """A task's life while a client follows it, in the middle of which its API is killed and comes back: the address and the log's ids."""
    port = free_port()
    api = await installation.api(port=port)
    task_id, run = await running(installation.store)
    _, status = await api.call("GET", f"/tasks/{task_id}/status")
    await work(installation.store, task_id, run, range(1, 20))
    await open_at(status["events_url"])
    await eventually(lambda: len(heard) >= 20)
    await work(installation.store, task_id, run, range(20, 40))
    await eventually(lambda: len(heard) >= 40)
    api.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(api.process.wait)
    await work(installation.store, task_id, run, range(40, 60))
    await installation.api(port=port)
    await work(installation.store, task_id, run, range(60, 80))
    await eventually(lambda: len(heard) >= 80)
    await installation.store.complete(task_id, run, result())
    return status["events_url"], [entry.id for entry in await Queries(installation.store.redis).log_after(task_id, None, 1000)]


async def test_a_client_of_another_library_misses_nothing_and_hears_nothing_twice_and_knows_the_end(
    installation: Fleet, follow: Follow
) -> None:
    heard: Heard = []
    following: list[asyncio.Task[None]] = []

    async def open_at(url: str) -> None:
        following.append(asyncio.create_task(asyncio.wait_for(follow(url, heard), 60)))

    _, log = await through_a_death(installation, heard, open_at)
    await following[0]
    assert heard == log


async def test_the_eventsource_of_chromium_misses_nothing_and_hears_nothing_twice_and_knows_the_end(
    installation: Fleet, page: Page
) -> None:
    heard: Heard = []
    await page.expose_function("heard", lambda id: heard.append(id))

    async def open_at(url: str) -> None:
        await page.evaluate(
            """([url, types]) => {
                window.source = new EventSource(url);
                for (const type of types) source.addEventListener(type, (event) => heard(event.lastEventId));
            }""",
            [url, LOGGED],
        )

    _, log = await through_a_death(installation, heard, open_at)
    await page.wait_for_function("source.readyState === EventSource.CLOSED", timeout=20_000)
    assert heard == log
