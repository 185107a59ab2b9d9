"""Check and repair the consistency of the task records and lists in Redis, for `movieq doctor --repair`.

They become inconsistent only if keys are deleted by hand, evicted, or restored from an incomplete backup. One script checks and repairs
each task while the queue keeps running. Files in the storage are not checked; they have lists of their own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from movieq.queue.store import Store
from movieq.tasks.states import TaskId

LISTS: Final = ("deadlines", "delayed", "ended", "dead")
"""Names of keys that are each one sorted set of tasks."""
FAMILIES: Final = ("index", "waiting", "running", "offered")
"""Names of key prefixes under which there are many sorted sets of tasks."""
COUNT: Final = 500
"""Entries requested from Redis at a time."""


class Inconsistency(msgspec.Struct, frozen=True):
    """An inconsistency of a task or, if `task_id` is None, of a counter. `text` is a clause about it, such as "is in no queue"."""

    task_id: TaskId | None
    text: str


async def inconsistencies(store: Store, *, apply: bool) -> AsyncIterator[Inconsistency]:
    """Yield each inconsistency, and repair it if `apply` is set. Raises RedisError."""
    records = {TaskId(key.removeprefix(store.keys["task"])) async for key in _keys(store, store.keys["task"])}
    named: dict[TaskId, list[str]] = defaultdict(list)
    lists = [store.keys[name] for name in LISTS]
    for family in FAMILIES:
        lists += [key async for key in _keys(store, store.keys[family])]
    for key in lists:
        async for member, _ in store.redis.zscan_iter(key, count=COUNT):
            named[TaskId(member.decode(errors="replace"))].append(key)
    for task_id in sorted(records | named.keys()):
        for text in await store.repair(task_id, named[task_id], apply=apply):
            yield Inconsistency(task_id, text)
        await asyncio.sleep(0)
    for text in await store.recount(apply=apply):
        yield Inconsistency(None, text)


async def _keys(store: Store, prefix: str) -> AsyncIterator[str]:
    async for key in store.redis.scan_iter(match=f"{prefix}*", count=COUNT):
        yield key.decode(errors="replace")
