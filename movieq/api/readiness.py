"""Whether a task would be accepted and run now."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from redis.exceptions import ResponseError

from movieq.checks import NOEVICTION
from movieq.queue.refusals import REDIS_AWAY, refusal
from movieq.queue.store import Store
from movieq.storage.base import Storage
from movieq.tasks.wire import Check, CheckName

FRESH_S: Final = 1.0
"""How long the results of the checks are reused."""
CHECK_S: Final = 3.0
"""How long a check may take."""
AWAY: Final = "Redis cannot be used: start it, or correct MOVIEQ_REDIS_URL; `movieq doctor` says what is wrong"


class Readiness:
    """The results of the checks, which run one at a time and at most once a second, however many ask.

    Beside them, `evicts` says that Redis deletes keys when its memory is full, as the settings do not allow; it is empty otherwise.
    """

    def __init__(self, store: Store, storage: Storage, *, allow_eviction: bool) -> None:
        self.evicts = ""
        self._allow_eviction = allow_eviction
        self._store = store
        self._storage = storage
        self._asking: asyncio.Task[list[Check]] | None = None
        self._asked_s = 0.0
        self._looking: asyncio.Task[bool] | None = None

    async def checks(self) -> dict[CheckName, Check]:
        """Return every check by its name."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_s >= FRESH_S):
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        return {check.name: check for check in await asyncio.shield(self._asking)}

    async def aclose(self) -> None:
        """Stop checking."""
        asked = [task for task in (self._asking, self._looking) if task is not None]
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self) -> list[Check]:
        redis, storage, worker, self.evicts = await asyncio.gather(self._redis(), self._files(), self._worker(), self._eviction())
        return [
            Check(name, not message, message)
            for name, message in ((CheckName.REDIS, redis), (CheckName.STORAGE, storage), (CheckName.WORKER, worker))
        ]

    async def _redis(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                await self._store.check_write()
        except REDIS_AWAY as error:
            if (refused := refusal(error)) is not None:
                return f"Redis refuses writes because {refused.reason}: {refused.cure}"
            if isinstance(error, ResponseError):
                return "Redis refuses writes: `movieq doctor` says what is wrong"
            return AWAY
        return ""

    async def _eviction(self) -> str:
        if self._allow_eviction:
            return ""
        try:
            async with asyncio.timeout(CHECK_S):
                memory = await self._store.memory()
        except REDIS_AWAY:
            return ""
        if memory is None or not memory.evicts:
            return ""
        return f"Redis deletes tasks when its memory is full, by its maxmemory-policy {memory.policy}: {NOEVICTION}"

    async def _files(self) -> str:
        # a file system that hangs blocks its thread, so there is never more than one
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._storage.usable())
        await asyncio.wait({self._looking}, timeout=CHECK_S)
        if not self._looking.done():
            return "the storage does not answer: `movieq doctor` says what is wrong"
        if self._looking.exception() is not None or not self._looking.result():
            return "the storage cannot be used: check MOVIEQ_STORAGE and its free space; `movieq doctor` says what is wrong"
        return ""

    async def _worker(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                living = [row for row in await self._store.workers() if row.live]
        except REDIS_AWAY:
            return "the workers are unknown while Redis cannot be used"
        if any(row.problem is None for row in living):
            return ""
        return "every live worker has a problem: see /workers/status" if living else "there is no live worker: start `movieq worker`"
