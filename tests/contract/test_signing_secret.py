"""If the signing secret that is stored in Redis is lost, every process adopts the new one without a restart."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import msgspec

from movieq.queue.store import Store
from movieq.settings import Settings
from tests.arrange import raw
from tests.contract.client import Client
from tests.contract.conftest import Tasks, served
from tests.fleet import eventually, fleet
from tests.service import fetched, receiver

WITHIN_S = 20.0
GOOD = [200, 200, 404]
"""Answers of the URLs of a task's stream, its project's stream and its file (none was stored)."""


async def addresses(api: Client, store: Store) -> list[str]:
    """Return the signed URLs that the API gives for a new task, without the server."""
    status = await api.status(await Tasks(api, store).completed())
    project = (await api.get("/api/v1/projects/film")).json
    return [url.removeprefix(api.url) for url in (status["events_url"], project["events_url"], status["result"]["media_url"])]


async def answers(api: Client, urls: list[str]) -> list[int]:
    """Return the status of the answer to each URL."""
    return [(await api.ask("HEAD" if "/events" in url else "GET", api.url + url, key=None)).status for url in urls]


async def test_two_processes_take_the_secret_of_a_redis_that_was_emptied(settings: Settings, store: Store) -> None:
    async with served(settings) as one, served(settings) as other:
        old = await addresses(one, store)
        assert await answers(one, old) == await answers(other, old) == GOOD
        await raw(store).flushall()

        async def taken() -> bool:
            return await answers(one, old) == await answers(other, old) == [403, 403, 403]

        await eventually(taken, WITHIN_S)
        new = await addresses(one, store) + await addresses(other, store)
        assert await answers(one, new) == await answers(other, new) == GOOD * 2


async def test_secrets_of_the_settings_are_nobody_elses_business(settings: Settings, store: Store) -> None:
    async with served(msgspec.structs.replace(settings, signing_secret=(b"a secret of the settings",))) as api:
        assert await raw(store).keys("*secret*") == [], "a process that followed the one in Redis would have made it by now"
        urls = await addresses(api, store)
        await raw(store).flushall()
        assert await answers(api, urls[2:]) == [404]


async def test_a_worker_signs_with_the_secret_of_the_redis_that_was_emptied(folder: Path) -> None:
    async with fleet(folder / "fleet") as installation, receiver() as hooks:
        api = await installation.api()
        await installation.worker(MOVIEQ_PUBLIC_URL=api.url)

        async def media_url(count: int) -> str:
            await api.submit("generate_image", {"prompt": "a lighthouse", "draft": True}, callback_url=hooks.url)
            _, body = (await hooks.wait_for(count))[-1]
            return str(json.loads(body)["result"]["media_url"])

        assert (await fetched(await media_url(1)))[0] == 200
        await raw(installation.store).flushall()
        api.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(api.process.wait, 60)
        api = await installation.api(port=int(api.url.rpartition(":")[2]))  # knows no other secret than the new one
        seen = 1

        async def opens() -> bool:
            nonlocal seen
            seen += 1
            return (await fetched(await media_url(seen)))[0] == 200

        await eventually(opens)
