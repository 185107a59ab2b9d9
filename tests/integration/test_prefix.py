"""Several installations on one server, in one database or in several: each has its own keys and channels."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from movieq.errors import SettingsError
from movieq.local.embedded import Valkey
from movieq.queue.connection import connect
from movieq.queue.keys import keys
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import load
from movieq.tasks.states import Kind
from tests.arrange import claim, new_task, raw, result
from tests.fleet import Fleet, eventually

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "256x256"}


async def test_two_prefixes_in_one_database_see_nothing_of_each_other(server: Valkey, store: Store) -> None:
    other = Store(connect(server.url, patient=True, prefix="staging"))
    task = new_task()
    await other.submit(task)
    (claimed,) = await claim(other)
    await other.complete(task.task_id, claimed.run, result())
    await other.tidy()
    await other.submit(new_task())
    names = {name.decode() for name in await raw(store).keys("*")}
    assert {name.partition(":")[0] for name in names} == {"staging", "arq"}
    assert await claim(store) == []
    assert await Queries(store.redis).task(task.task_id) is None
    await other.redis.aclose()


@pytest.mark.parametrize(("prefix", "database"), [("staging", 0), ("movieq", 1)])
async def test_what_one_publishes_the_other_does_not_hear(server: Valkey, store: Store, prefix: str, database: int) -> None:
    other = Store(connect(f"{server.url}?db={database}", patient=True, prefix=prefix))
    await raw(other).flushdb()
    task = new_task()
    heard: dict[str, list[bytes]] = {"ours": [], "theirs": []}
    subscriber = Subscriber(server.url)
    running = asyncio.create_task(subscriber.run())
    for whose, each in (("ours", store), ("theirs", other)):
        channel = subscriber.listen(each.keys["events"] + task.task_id, heard[whose].append, lambda: None)
        await channel.wait()
    await other.submit(task)
    await claim(other)
    await eventually(lambda: len(heard["theirs"]) == 1)
    await store.submit(task)
    await claim(store)
    await eventually(lambda: len(heard["ours"]) == 1)
    assert len(heard["theirs"]) == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await raw(other).flushdb()
    await other.redis.aclose()


async def test_two_installations_on_one_server_each_make_their_own(installation: Fleet) -> None:
    first, second = await asyncio.gather(installation.api(MOVIEQ_KEY_PREFIX="one"), installation.api(MOVIEQ_KEY_PREFIX="two"))
    await installation.worker(MOVIEQ_KEY_PREFIX="two")
    waiting = await first.submit("generate_image", SMALL)
    assert (await second.ended(await second.submit("generate_image", SMALL)))["status"] == "completed"
    assert (await first.call("GET", f"/tasks/{waiting}/status"))[1]["status"] == "queued"
    assert (await first.call("GET", "/health"))[1]["queue_sizes"][Kind.CPU_INTENSIVE] == 1
    assert {name.decode().partition(":")[0] for name in await raw(installation.store).keys("*")} == {"one", "two", "arq"}


@pytest.mark.parametrize("prefix", ["", "Movie", "a b", "a:", "a*", "1a", "a\n", "a" * 33])
def test_a_prefix_that_would_not_be_told_apart_is_refused(tmp_path: Path, prefix: str) -> None:
    if prefix.strip():
        with pytest.raises(SettingsError, match="MOVIEQ_KEY_PREFIX"):
            load({"MOVIEQ_KEY_PREFIX": f"{prefix}x\n" if prefix == "a\n" else prefix}, tmp_path / ".env")
    else:
        assert load({"MOVIEQ_KEY_PREFIX": prefix}, tmp_path / ".env").key_prefix == "movieq"


def test_the_channels_of_a_database_carry_its_number() -> None:
    assert keys("film", 3)["events"] == "film:events:3:"
    assert keys("film", 3)["control"] == "film:control:3:"
    assert keys("film", 3)["task"] == keys("film")["task"] == "film:task:"
