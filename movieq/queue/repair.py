"""`movieq doctor --repair`: whether the records in Redis agree with the lists that name them.

They do unless keys were deleted by hand, evicted, or restored from half a backup. Each task is checked, and mended, by one script, while
everything goes on. Left out: files in the storage, which are deleted by lists of their own.
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
"""Names of keys that are one sorted set of tasks."""
FAMILIES: Final = ("index", "waiting", "running", "offered")
"""Names of prefixes under which there are many."""
COUNT: Final = 500
"""How many entries Redis is asked for at once."""


class Inconsistency(msgspec.Struct, frozen=True):
    """What is inconsistent about a task, or about a counter where `task_id` is None, as a clause about it."""

    task_id: TaskId | None
    text: str


async def inconsistencies(store: Store, *, apply: bool) -> AsyncIterator[Inconsistency]:
    """Yield each inconsistency, and repair it where `apply` is set. Raises redis's errors."""
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
