"""Helpers that several tests share: create tasks, claim them, run them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from movieq.fetch.download import Fetcher
from movieq.queue.files import Files
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Claimed, NewTask, Slot, Store
from movieq.settings import Settings, load, variable
from movieq.storage.base import Storage
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import GENERATE_IMAGE, PRIORITY_BIAS_MS, Kind, ProjectId, RunToken, TaskId
from tests.service import UNLIMITED
from workers.delivery import DeliveryParts
from workers.protocol import Done, Run
from workers.running import Parts
from workers.supervisor import Child, Progress

_nonces = itertools.count()
CPU = [Slot((Kind.CPU_INTENSIVE,))]
KEY_FLOW, OTHER_KEY_FLOW = "0123456789abcdef", "fedcba9876543210"
"""The flows of two keys that may use all projects."""


def settings_of(**texts: str) -> Settings:
    """Return the settings of an environment with these variables, and no limits of requests and streams."""
    return load({**UNLIMITED, **{variable(name): text for name, text in texts.items()}}, Path("/nonexistent"))


def raw(store: Store) -> Any:
    """Return the untyped client: redis-py types each answer as a union of its sync and its async form."""
    return store.redis


async def now_ms(store: Store) -> int:
    """Return the time of Redis."""
    seconds, micros = await raw(store).time()
    return int(seconds) * 1000 + int(micros) // 1000


async def later(store: Store, ms: int = 1) -> None:
    """Wait until Redis's clock has moved on by more than this many milliseconds."""
    before = await now_ms(store)
    while await now_ms(store) - before <= ms:
        pass


async def contents(store: Store) -> dict[str, Any]:
    """Return key -> value of all keys. (`DUMP` does not serve: it now and then compresses equal values differently.)"""
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
    """Return a task that can be submitted."""
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
    """Claim tasks for a worker with this many free slots."""
    return await store.claim(worker, f"nonce{next(_nonces)}", CPU * slots)


def parts(store: Store, storage: Storage, fetcher: Fetcher, spool: Path, **rest: Any) -> Parts:
    """Return the parts that runs share."""
    return Parts(store, Queries(store.redis), Files(store.redis), storage, fetcher, spool, **rest)


def delivery_parts(
    store: Store, storage: Storage, session: aiohttp.ClientSession, secrets: tuple[str, ...] = (), **rest: Any
) -> DeliveryParts:
    """Return the parts that deliveries share."""
    return DeliveryParts(store.redis, Outbox(store.redis), Queries(store.redis), storage, session, secrets, **rest)


async def ran(child: Child, request: Run, on_message: Callable[[Progress], None] = lambda message: None) -> Done:
    """Render a run that has the child for itself; return its output."""
    group = child.slots.reserve([TaskId(request.task_id)])
    try:
        return await child.run(request, on_message, group)
    finally:
        child.slots.leave(group, request.run)


async def running(store: Store, worker: str = "w1", **fields: Any) -> tuple[TaskId, RunToken]:
    """Submit a task and claim it; return its id and its run."""
    await store.submit(new_task(**fields))
    (claimed,) = await claim(store, worker)
    return claimed.task.task_id, claimed.run


def result(key: str = "projects/film/image/t/r/output.jpg") -> StoredResult:
    """Return a result of one file."""
    return StoredResult(
        [StoredMedia(key, "character_design", "image/jpeg", 1000)], {"engine": "animatic", "list": [], "n": 12345678901234567}
    )
