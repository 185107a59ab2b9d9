"""Delete what is past its retention: old ended tasks, files of old results, old uploads, and files that runs stored but never committed.

Every worker runs this, but only one at a time has the turn, for some seconds; its settings apply. It deletes in small batches. After each
batch it rests for longer than the batch took Redis, so that other commands do not wait. What cannot be deleted is skipped, logged once and
tried again later. All of this also works while Redis's memory is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from movieq import logs
from movieq.queue.files import Files
from movieq.queue.refusals import REDIS_AWAY, is_fault
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.storage.base import Storage, checked_key

DAY_S: Final = 86400
LOOK_S: Final = 1.0
"""Time between two rounds, in seconds."""
ROUND_S: Final = 10.0
"""Longest turn of a worker, in seconds, even if more is due."""
TURN_MS: Final = 30_000
"""Time until the turn of a worker that died ends, in ms."""
REST: Final = 2.0
"""The pause after a batch in Redis, as a multiple of the time that the batch took."""
TASKS_AT_ONCE: Final = 25
RESULTS_AT_ONCE: Final = 200
FILES_AT_ONCE: Final = 64
DELETERS: Final = 8
"""Prefixes that are deleted at once: few enough to leave threads, and requests to a bucket, for uploads."""
DELETE_S: Final = 120.0
"""Time limit for deleting one prefix, in seconds."""
AGAIN_S: Final = 300.0
"""Wait before a prefix that could not be deleted is tried again, in seconds."""
FAULT_S: Final = 30.0
"""Pause in deleting tasks, results or files after a fault of Redis or of the whole storage, in seconds."""

log = logs.get()


class Retention:
    """The part of a worker that deletes what is past its retention."""

    def __init__(
        self,
        worker_id: str,
        store: Store,
        files: Files,
        storage: Storage,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._worker_id = worker_id
        self._store = store
        self._files = files
        self._storage = storage
        self._tasks_s = settings.keep_tasks_days * DAY_S
        self._media_s = settings.keep_media_days * DAY_S
        self._failed: dict[str, float] = {}
        """Prefix that could not be deleted -> the time at which it is tried again."""
        self._not_before: dict[str, float] = {}
        """"tasks", "results" or "files" -> the time at which they are tried again after a fault."""

    async def run(self) -> None:
        """Delete what is due, once a second, until cancelled."""
        while True:
            try:
                await self.round()
            except REDIS_AWAY as error:
                if is_fault(error):  # while Redis is away, the renewal of leases logs it
                    log.exception("sweep_failed", what="turn")
            await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))  # noqa: S311  # spreads load

    async def round(self) -> None:
        """Delete what is due, for at most `ROUND_S`; do nothing if another worker has the turn."""
        if not await self._store.take_turn(self._worker_id, TURN_MS):
            return
        end_s = self._clock() + ROUND_S
        try:
            async with asyncio.TaskGroup() as group:
                if self._tasks_s:
                    group.create_task(self._guarded("tasks", self._forget_tasks, end_s))
                if self._media_s:
                    group.create_task(self._guarded("results", self._retire_results, end_s))
                group.create_task(self._guarded("files", self._delete_files, end_s))
        finally:
            with contextlib.suppress(*REDIS_AWAY):
                await self._store.take_turn(self._worker_id, 0)

    async def _guarded(self, what: str, work: Callable[[float], Awaitable[None]], end_s: float) -> None:
        """Do one part of a round; a fault in it is logged and does not stop the others."""
        if self._clock() < self._not_before.get(what, 0):
            return
        try:
            await work(end_s)
        except Exception as error:
            away = isinstance(error, REDIS_AWAY)
            log.error("sweep_failed", what=what, problem=str(error) or type(error).__name__, exc_info=not away)
            self._not_before[what] = self._clock() + FAULT_S

    async def _forget_tasks(self, end_s: float) -> None:
        forgotten = 0
        while True:
            begun_s = self._clock()
            count, damaged = await self._store.sweep(self._tasks_s, TASKS_AT_ONCE)
            forgotten += count
            for task_id in damaged:
                log.error("damaged_task_forgotten", task_id=task_id)
            ended_s = self._clock()
            if count < TASKS_AT_ONCE or ended_s > end_s:
                break
            await asyncio.sleep(REST * (ended_s - begun_s))
        if forgotten:
            log.info("tasks_forgotten", count=forgotten)

    async def _retire_results(self, end_s: float) -> None:
        """Hand the files of old results to `_delete_files`."""
        while True:
            begun_s = self._clock()
            count = await self._store.retire(self._media_s, RESULTS_AT_ONCE)
            ended_s = self._clock()
            if count < RESULTS_AT_ONCE or ended_s > end_s:
                break
            await asyncio.sleep(REST * (ended_s - begun_s))

    async def _delete_files(self, end_s: float) -> None:
        now_s = self._clock()
        self._failed = {prefix: again_s for prefix, again_s in self._failed.items() if again_s > now_s - AGAIN_S}
        deleted = skip = 0
        while prefixes := await self._files.due_orphans(FILES_AT_ONCE, skip):
            now_s = self._clock()
            tried = [prefix for prefix in prefixes if self._failed.get(prefix, 0) <= now_s]
            gone = await self._deleted(tried)
            await self._files.forget_orphans(gone)
            for prefix in gone:
                self._failed.pop(prefix, None)
            deleted += len(gone)
            skip += len(prefixes) - len(gone)
            if tried and not gone:  # the storage seems to be away
                self._not_before["files"] = now_s + FAULT_S
                break
            if self._clock() > end_s:
                break
        if deleted:
            log.info("files_deleted", count=deleted)

    async def _deleted(self, prefixes: list[str]) -> list[str]:
        """Delete the files under these prefixes; return the prefixes under which none is left. The others are tried again later."""
        gone: list[str] = []
        problems: dict[str, str] = {}
        waiting = iter(prefixes)

        async def delete() -> None:
            for prefix in waiting:
                try:
                    checked_key(prefix)
                except ValueError:
                    log.error("prefix_invalid", prefix=ascii(prefix))  # no file can have such a prefix: only take it off the list
                    gone.append(prefix)
                    continue
                try:
                    async with asyncio.timeout(DELETE_S):
                        await self._storage.delete_prefix(prefix)
                    gone.append(prefix)
                except Exception as error:  # only this prefix has failed
                    problems[prefix] = str(error) or type(error).__name__

        async with asyncio.TaskGroup() as group:
            for _ in range(DELETERS):
                group.create_task(delete())
        if new := [prefix for prefix in problems if prefix not in self._failed]:
            log.error("files_not_deleted", count=len(new), prefix=new[0], problem=problems[new[0]], again_in_s=AGAIN_S)
        self._failed |= dict.fromkeys(problems, self._clock() + AGAIN_S)
        return gone
