"""Arranging that tests share: tasks and what to do with them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from movieq.queue.store import Claimed, NewTask, Slot, Store
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import GENERATE_IMAGE, PRIORITY_BIAS_MS, Kind, ProjectId, RunToken, TaskId
from workers.protocol import Done, Run
from workers.supervisor import Child, Progress

_nonces = itertools.count()
CPU = [Slot((Kind.CPU_INTENSIVE,))]


def raw(store: Store) -> Any:
    """The client, untyped: redis-py types each answer as a union of its sync and its async form."""
    return store.redis


async def contents(store: Store) -> dict[str, Any]:
    """What every key holds. (`DUMP` compresses the same value to other bytes now and then.)"""
    redis, found = raw(store), {}
    for key in sorted(await redis.keys("*")):
        match await redis.type(key):
            case b"string":
                found[key.decode()] = await redis.get(key)
            case b"hash":
                found[key.decode()] = await redis.hgetall(key)
            case b"list":
                found[key.decode()] = await redis.lrange(key, 0, -1)
            case b"set":
                found[key.decode()] = await redis.smembers(key)
            case b"zset":
                found[key.decode()] = await redis.zrange(key, 0, -1, withscores=True)
            case b"stream":
                found[key.decode()] = await redis.xrange(key)
    return found


def new_task(project: str = "film", priority: int = 2, **fields: Any) -> NewTask:
    """A task that can be submitted."""
    defaults: dict[str, Any] = {
        "task_id": TaskId(str(uuid.uuid4())),
        "project_id": ProjectId(project),
        "task_type": GENERATE_IMAGE,
        "kind": Kind.CPU_INTENSIVE,
        "engine": "animatic",
        "model": "animatic",
        "shape": "image",
        "priority": priority,
        "bias_ms": PRIORITY_BIAS_MS[priority],
        "kwargs": msgspec.msgpack.encode({"task_data": {"prompt": "a lighthouse"}}),
        "metadata": b"{}",
        "estimate_ms": 2000,
        "max_ms": 60_000,
    }
    return NewTask(**{**defaults, **fields})


async def claim(store: Store, worker: str = "w1", slots: int = 1) -> list[Claimed]:
    """What a worker with free slots gets."""
    return await store.claim(worker, f"nonce{next(_nonces)}", CPU * slots)


async def ran(child: Child, request: Run, on_message: Callable[[Progress], None] = lambda message: None) -> Done:
    """What a child made of a run that has it for itself."""
    group = child.slots.reserve([TaskId(request.task_id)])
    try:
        return await child.run(request, on_message, group)
    finally:
        child.slots.leave(group, request.run)


async def running(store: Store, worker: str = "w1", **fields: Any) -> tuple[TaskId, RunToken]:
    """A task in processing: its id and its run."""
    await store.submit(new_task(**fields))
    (claimed,) = await claim(store, worker)
    return claimed.task.task_id, claimed.run


def result(key: str = "projects/film/image/t/r/output.jpg") -> StoredResult:
    """A result of one file."""
    return StoredResult(
        [StoredMedia(key, "character_design", "image/jpeg", 1000)], {"engine": "animatic", "list": [], "n": 12345678901234567}
    )
