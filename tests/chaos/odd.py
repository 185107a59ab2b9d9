"""What chaos puts among the work that stops nobody else: records that are poisoned or gone, tasks that no worker knows, a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
from redis.exceptions import RedisError

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.states import Kind, TaskId, TaskStatus
from tests.arrange import new_task, raw

if TYPE_CHECKING:
    from tests.chaos.run import Driver

POISONS: tuple[tuple[str, str | None], ...] = (
    ("metadata", '{"number": %d, "far": 10000000000000000000000000000000}'),
    ("metadata", None),
    ("estimate_ms", "soon"),
    ("created_at_ms", None),
    ("attempt", "nan"),
    ("shape", None),
    ("warnings", "["),
    ("progress", "\xff"),
    ("max_ms", ""),
)
"""Fields of a waiting task, and what is put there; None: it is deleted."""
UNREADABLE = ("result", "{")
"""The same of a record that no version can read: minutes pass before it is given up, so that only long runs have it."""
LONG = 1000
PATIENCE_S = 60


class Oddities:
    """Puts them among the work, and remembers what must come of them."""

    def __init__(self, driver: Driver, store: Store) -> None:
        self.driver = driver
        self.store = store
        self.chance = random.Random(driver.chance.random())
        self.strangers: list[TaskId] = []
        self.poisoned: set[TaskId] = set()
        self.ghosts: set[TaskId] = set()
        self.silent: list[str] = []
        """Alerts that should have come and did not."""

    async def run(self) -> None:
        """One after the other, for as long as the work comes in."""
        while True:
            await asyncio.sleep(0.7)
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self.chance.choice((self._strange, self._delete, self._poison))()

    async def _strange(self) -> None:
        """A task of a type, or of a model, that nobody here knows."""
        odd: dict[str, Any] = self.chance.choice(({"task_type": "evaluate_department"}, {"model": "of-another-table"}))
        task = new_task(f"film{self.chance.randrange(5)}", kind=Kind.CPU_INTENSIVE, **odd)
        self.strangers.append(task.task_id)
        await self.store.submit(task)

    async def _delete(self) -> None:
        """A task of which nothing is left but what the lists say."""
        task = new_task("ghosts", finish_by_ms=int(time.time() * 1000) + self.chance.randrange(10_000))
        await self.store.submit(task)
        await raw(self.store).delete(KEYS["task"] + task.task_id, *self.chance.choice(([], [KEYS["job"] + task.task_id])))
        self.ghosts.add(task.task_id)

    async def _poison(self) -> None:
        """A waiting task whose record cannot be read, or is wrong."""
        tasks = await Queries(self.store.redis).tasks(list(self.driver.accepted)[-50:])
        waiting = [task for task in tasks if task.status is TaskStatus.QUEUED and task.task_id not in self.poisoned]
        if not waiting:
            return
        task = self.chance.choice(waiting)
        task_id = task.task_id
        field, value = self.chance.choice(POISONS if self.driver.tasks < LONG else (*POISONS, UNREADABLE))
        self.poisoned.add(task_id)
        key = KEYS["task"] + task_id
        if value is None:
            await raw(self.store).hdel(key, field)
        else:
            text = value % task.metadata["number"] if "%d" in value else value
            await raw(self.store).hset(key, field, text.encode("latin-1"))

    async def afterwards(self, session: aiohttp.ClientSession, callback: str) -> None:
        """When nothing is broken any more: every alert comes; the disk fills, costs nobody anything, and is used again."""
        farm = self.driver.farm
        if self.strangers:
            await self._await("no_worker", lambda: self._alert(session, "no_worker", "no live worker can run"))
        for task_id in self.strangers:
            with contextlib.suppress(PermissionError):
                await self.driver.insist(session, "DELETE", f"/tasks/{task_id}/cancel")
        if self.ghosts:
            await self._await("entries_dropped", self._logged)
        if farm.disk is not None and farm.disk.mounted:
            farm.disk.fill()
            for number in range(12):
                await self.driver.submit_one(session, 100_000 + number, callback)
            await self._await("worker_problem", lambda: self._alert(session, "worker_problem", "disk is full"))
            farm.disk.clear()
            await self._await("the worker is well again", lambda: self._healed(session))

    async def _await(self, what: str, came: Callable[[], Awaitable[bool]]) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if await came():
                    return
            await asyncio.sleep(0.3)
        self.silent.append(what)

    async def _alerts(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        async with session.get(f"{self.driver.farm.urls[0]}/api/v1/tasks/health") as answer:
            return list((await answer.json())["alerts"])

    async def _alert(self, session: aiohttp.ClientSession, code: str, words: str) -> bool:
        return any(each["code"] == code and words in each["message"] for each in await self._alerts(session))

    async def _healed(self, session: aiohttp.ClientSession) -> bool:
        return all(each["code"] != "worker_problem" for each in await self._alerts(session))

    async def _logged(self) -> bool:
        return '"entries_dropped"' in await asyncio.to_thread((self.driver.farm.folder / "log").read_text, errors="replace")
