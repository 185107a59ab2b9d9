"""`movieq doctor --repair`: whether the records in Redis and the lists that name them fit together.

They do unless somebody deleted keys by hand, restored half a backup, or let Redis evict. Each task is looked at, and mended, by one script,
while everything goes on. Left out: files in the storage, which the sweep finds by its own lists.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from movieq.contracts import TaskId
from movieq.store import Store

LISTS: Final = ("deadlines", "delayed", "ended", "dead")
FAMILIES: Final = ("index", "waiting", "running", "offered")
"""Names of sorted sets of tasks: those that there is one of, and those of which there are many."""
COUNT: Final = 500
"""How many entries Redis is asked for at once."""


class Misfit(msgspec.Struct, frozen=True):
    """What does not fit together: of a task, or of a counter where `task_id` is None."""

    task_id: TaskId | None
    text: str


async def misfits(store: Store, *, apply: bool) -> AsyncIterator[Misfit]:
    """Yield what does not fit together, having mended it where `apply` is set. Raises redis's errors."""
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
            yield Misfit(task_id, text)
        await asyncio.sleep(0)
    for text in await store.recount(apply=apply):
        yield Misfit(None, text)


async def _keys(store: Store, prefix: str) -> AsyncIterator[str]:
    async for key in store.redis.scan_iter(match=f"{prefix}*", count=COUNT):
        yield key.decode(errors="replace")
