"""The readiness checks: whether tasks can be accepted, stored and run. Anybody may ask, so Redis is asked at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import msgspec
from redis.exceptions import ResponseError

from movieq import logs
from movieq.checks import NOEVICTION
from movieq.queue.queries import Queries, Stranded
from movieq.queue.refusals import REDIS_AWAY, refusal
from movieq.queue.store import Store
from movieq.storage.base import Storage
from movieq.tasks.states import Kind
from movieq.tasks.wire import Check, CheckName

FRESH_S: Final = 1.0
"""How long the results are cached."""
CHECK_S: Final = 3.0
"""Longest time that a check may take."""
AWAY: Final = "Redis is unavailable: start it, or correct MOVIEQ_REDIS_URL; `movieq doctor` shows the reason"

log = logs.get()


class Load(msgspec.Struct, frozen=True):
    """The number of live workers, the waiting tasks of each queue, and the lanes whose tasks none of these workers can run."""

    workers: int
    queue_sizes: dict[Kind, int]
    stranded: list[Stranded]


T = TypeVar("T")


class _Cached(Generic[T]):
    """What a function returns, for `FRESH_S`. Requests that come meanwhile wait for one call."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._found: T
        self._fresh_until_s = 0.0

    async def get(self) -> T:
        async with self._lock:
            if time.monotonic() >= self._fresh_until_s:
                self._found = await self._ask()
                self._fresh_until_s = time.monotonic() + FRESH_S
            return self._found


class Readiness:
    """The readiness checks of a process, and its load. Each is read at most once a second; requests in between get the cached results.

    `evicts` is a warning that Redis deletes keys when its memory is full; it is empty if Redis does not, or the settings allow it.
    """

    def __init__(self, store: Store, queries: Queries, storage: Storage, group: asyncio.TaskGroup, *, allow_eviction: bool) -> None:
        """`group` owns the check of the storage, which may outlast the request that started it."""
        self.evicts = ""
        self._allow_eviction = allow_eviction
        self._store = store
        self._queries = queries
        self._storage = storage
        self._group = group
        self._checks = _Cached(self._ask)
        self._load = _Cached(self._ask_load)
        self._looking: asyncio.Task[bool] | None = None

    async def checks(self) -> dict[CheckName, Check]:
        """Return the result of each check by its name."""
        return await self._checks.get()

    async def load(self) -> Load | None:
        """Return the load; None if Redis is unavailable."""
        return await self._load.get()

    def close(self) -> None:
        """Cancel the check of the storage."""
        if self._looking is not None:
            self._looking.cancel()

    async def _ask(self) -> dict[CheckName, Check]:
        redis, storage, worker, self.evicts = await asyncio.gather(self._redis(), self._files(), self._worker(), self._eviction())
        found = {CheckName.REDIS: redis, CheckName.STORAGE: storage, CheckName.WORKER: worker}
        return {name: Check(name, not message, message) for name, message in found.items()}

    async def _ask_load(self) -> Load | None:
        try:
            workers = [row for row in await self._queries.workers() if row.live]
            return Load(len(workers), await self._queries.queue_sizes(), await self._queries.stranded(workers))
        except REDIS_AWAY:
            return None

    async def _redis(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                await self._store.check_write()
        except REDIS_AWAY as error:
            if (refused := refusal(error)) is not None:
                return f"Redis refuses writes because {refused.reason}: {refused.cure}"
            if isinstance(error, ResponseError):
                return "Redis refuses writes: `movieq doctor` shows the reason"
            return AWAY
        return ""

    async def _eviction(self) -> str:
        if self._allow_eviction:
            return ""
        try:
            async with asyncio.timeout(CHECK_S):
                memory = await self._queries.memory()
        except REDIS_AWAY:
            return ""
        if memory is None or not memory.evicts:
            return ""
        return f"Redis deletes tasks when its memory is full (maxmemory-policy {memory.policy}): {NOEVICTION}"

    async def _files(self) -> str:
        # a file system that hangs blocks its thread, so at most one check runs at a time
        if self._looking is None or self._looking.done():
            self._looking = self._group.create_task(self._usable())
        await asyncio.wait({self._looking}, timeout=CHECK_S)
        if not self._looking.done():
            return "the storage does not respond: `movieq doctor` shows the reason"
        if not self._looking.result():
            return "the storage is unusable: check MOVIEQ_STORAGE and the free space; `movieq doctor` shows the reason"
        return ""

    async def _usable(self) -> bool:
        try:
            return await self._storage.usable()
        except Exception:  # raised in the task group, it would end the process
            log.exception("storage_check_failed")
            return False

    async def _worker(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                living = [row for row in await self._queries.workers() if row.live]
        except REDIS_AWAY:
            return "the workers are unknown while Redis is unavailable"
        if any(row.problem is None for row in living):
            return ""
        return "every live worker has a problem: see /workers/status" if living else "there is no live worker: start `movieq worker`"
