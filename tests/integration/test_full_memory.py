"""A Redis whose memory is full refuses new data, but nothing that ends a task or frees memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.exceptions import OutOfMemoryError

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.states import TaskId
from tests.arrange import claim, new_task, raw
from tests.fleet import eventually, fleet
from tests.integration.test_redis_faults import RUNNING, SMALL, submitted
from tests.service import receiver


async def over(store: Store, *names: str) -> bool:
    """Whether these lists are empty."""
    return not await raw(store).exists(*(KEYS[name] for name in names))


async def refused(store: Store, kwargs: bytes) -> bool:
    """Whether a task with these arguments is refused."""
    try:
        await store.submit(new_task(kwargs=kwargs))
    except OutOfMemoryError:
        return True
    return False


async def test_with_a_full_memory_tasks_complete_and_are_cancelled_and_delivered(folder: Path) -> None:
    async with fleet(folder) as installation, receiver(500, 200) as hook:
        api = await installation.api()
        await installation.worker()
        task_id = await api.submit("generate_video", RUNNING, callback_url=hook.url)
        next_id = await api.submit("generate_image", SMALL)
        dropped = await api.submit("generate_image", SMALL, callback_url=hook.url)
        await api.until(task_id, "stage", "frames")
        await raw(installation.store).config_set("maxmemory", 1)
        status, headers, answer = await submitted(api)
        assert (status, answer["error"], "Retry-After" in headers) == (503, "unavailable", True)
        assert "memory is full" in answer["message"]
        assert (await api.call("DELETE", f"/tasks/{dropped}/cancel"))[0] == 200
        for each in (task_id, next_id):
            assert (await api.ended(each))["status"] == "completed"
        told = [json.loads(body) for _, body in await hook.wait_for(3, 60)]  # the first was answered with a 500, and comes again
        assert {(each["task_id"], each["status"]) for each in told} == {(task_id, "completed"), (dropped, "cancelled")}
        await eventually(lambda: over(installation.store, "deliveries"))
        assert (await raw(installation.store).info("memory"))["maxmemory"] == 1


async def test_a_worker_that_starts_while_the_memory_is_full_works_off_what_is_there(folder: Path) -> None:
    async with fleet(folder) as installation, receiver() as hook:
        api = await installation.api()
        task_id = await api.submit("generate_image", SMALL, callback_url=hook.url)
        failing = await api.submit("generate_image", {"reference_images": ["upload:none"]})
        await raw(installation.store).config_set("maxmemory", 1)
        worker = await installation.worker()
        assert (await api.ended(task_id))["status"] == "completed"
        assert (await api.ended(failing))["status"] == "failed"
        assert len(await hook.wait_for(1)) == 1
        assert worker.alive


async def test_a_run_whose_engine_dies_is_tried_again_while_the_memory_is_full(folder: Path) -> None:
    async with fleet(folder) as installation:
        api, worker = await asyncio.gather(installation.api(), installation.worker())
        task_id = await api.submit("generate_video", RUNNING)
        await api.until(task_id, "stage", "frames")
        await raw(installation.store).config_set("maxmemory", 1)
        worker.child().kill()
        status = await api.ended(task_id)
        assert (status["status"], status["attempt"]) == ("completed", 2)


async def test_memory_that_was_full_is_there_again_when_what_ended_is_swept(folder: Path) -> None:
    async with fleet(folder) as installation:
        store = installation.store
        redis = raw(store)
        padding = msgspec.msgpack.encode({"task_data": {"prompt": "x" * 20_000}})
        await redis.config_set("maxmemory", (await redis.info("memory"))["used_memory"] + 4 * 1024 * 1024)
        await eventually(lambda: refused(store, padding))
        ended: list[TaskId] = []
        while claimed := await claim(store, slots=50):
            for each in claimed:
                await store.fail(each.task.task_id, each.run, "it broke", "internal")
                ended.append(each.task.task_id)
        assert await refused(store, padding)
        await installation.worker(MOVIEQ_KEEP_TASKS_DAYS="0.00001", MOVIEQ_QUEUES="gpu_heavy")

        async def swept() -> bool:
            return not await Queries(store.redis).tasks(ended)

        await eventually(swept)
        assert not await refused(store, padding)


@pytest.mark.parametrize("command", ["hset", "zadd", "set", "setex", "psetex", "incr", "zincrby"])
async def test_what_a_worker_writes_beside_its_scripts_is_not_refused(folder: Path, command: str) -> None:
    async with fleet(folder) as installation:
        redis = raw(installation.store)
        arguments: dict[str, tuple[Any, ...]] = {
            **{"hset": ("a", "b"), "zadd": ({"a": 1},), "set": ("a",), "setex": (9, "a"), "psetex": (9000, "a"), "incr": ()},
            "zincrby": (1, "a"),
        }
        await redis.config_set("maxmemory", 1)
        await getattr(redis, command)("key", *arguments[command])
        async with redis.pipeline(transaction=True) as pipe:
            getattr(pipe, command)("piped", *arguments[command])
            pipe.expire("piped", 60)
            await pipe.execute()
        assert await redis.exists("key", "piped") == 2
