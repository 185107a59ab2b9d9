"""What a claim of ours costs, and a task in memory, with up to a million tasks waiting.

The backlogs lie in databases of one server side by side, and are measured in turn, so that whatever else the machine does meets them all.
They are filled by the real submit script, a thousand times in one call; `compare` shows that what it writes is what submits write.
"""

from __future__ import annotations

import re
import secrets
import statistics
import time
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import msgspec

from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import NewTask, Store
from movieq.tasks.states import Kind, ProjectId, TaskId, TaskStatus
from tests import arrange
from tests.bench.peers import ours

BATCH = 1000
PROJECTS = 100
"""A million tasks of a hundred projects: ten thousand each, the most that a project may have by default."""
REPORTS = 5


class Backlog(NamedTuple):
    """How many tasks wait and run, of how many projects."""

    waiting: int
    running: int
    projects: int = PROJECTS

    def __str__(self) -> str:
        return f"{self.waiting} waiting, {self.running} running"


class Filler:
    """Submits many tasks like one, each with an id of its own and the next of the projects."""

    def __init__(self, store: Store) -> None:
        self._redis: Any = store.redis
        script = store.scripts["submit"]
        self._args = script.args
        shebang, _, source = script.source.partition("\n")
        # the whole script becomes a function of its arguments: it reads ARGV, here a parameter
        self.source = f"""{shebang}
local ids, projects = {self._args.index("task_id") + 1}, {self._args.index("project_id") + 1}
local template, first, count, spread = ARGV, tonumber(ARGV[#ARGV - 2]), tonumber(ARGV[#ARGV - 1]), tonumber(ARGV[#ARGV])
local prefix, project = template[ids], template[projects]
local function submit(ARGV)
{source}
end
for number = first, first + count - 1 do
  template[ids] = string.format('%s%012d', string.sub(prefix, 1, 24), number)
  template[projects] = project .. number % spread
  submit(template)
end"""

    async def fill(self, count: int, projects: int, like: NewTask) -> None:
        """So many tasks wait."""
        script = self._redis.register_script(self.source)
        arguments = [_argument(like, name) for name in self._args]
        for first in range(0, count, BATCH):
            await script(args=[*arguments, first, min(BATCH, count - first), projects])


def _argument(new: NewTask, name: str) -> Any:
    value = getattr(new, name)
    return "" if value is None else b"[]" if name == "warnings" else value


async def opened(stack: AsyncExitStack, url: str, database: int) -> Store:
    """A store in a database of its own."""
    store = Store(connect(f"{url}?db={database}", patient=True, max_connections=4))
    stack.push_async_callback(store.redis.aclose)
    return store


async def compare(url: str) -> None:
    """Raises AssertionError where the filler writes anything but what submits write."""
    async with AsyncExitStack() as stack:
        filled, submitted = await opened(stack, url, 14), await opened(stack, url, 15)
        like = ours.task("film")
        await Filler(filled).fill(5, 2, like)
        for number in range(5):
            task_id, project_id = f"{like.task_id[:24]}{number:012}", f"film{number % 2}"
            await submitted.submit(msgspec.structs.replace(like, task_id=TaskId(task_id), project_id=ProjectId(project_id)))
        assert await contents(filled.redis) == await contents(submitted.redis)


async def contents(redis: Any) -> dict[str, str]:
    """Every key and what it holds, with T for each time."""
    found = {}
    for key in sorted(await redis.keys("*")):
        match await redis.type(key):
            case b"hash":
                value = sorted((await redis.hgetall(key)).items())
            case b"zset":
                value = await redis.zrange(key, 0, -1, withscores=True)
            case b"set":
                value = sorted(await redis.smembers(key))
            case b"string":
                value = (await redis.get(key))[:-9]  # without the time, which msgpack has last
            case b"stream":
                continue  # a project's log: its last thousand changes, however many tasks wait
            case other:
                raise AssertionError(f"a submit makes no {other}")
        found[key.decode()] = re.sub(r"\d{13}(\.\d+)?|(?<=b'created_us', b')\d+", "T", str(value))
    return found


async def used_bytes(redis: Any) -> int:
    """The server's memory."""
    return int((await redis.info("memory"))["used_memory"])


async def script_us(redis: Any) -> float:
    """Microseconds that the server spent in scripts so far."""
    return float((await redis.info("commandstats")).get("cmdstat_evalsha", {}).get("usec", 0))


async def claims(url: str, backlogs: list[Backlog], count: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The cost of a claim with one free slot for each backlog; what filling the last took and holds.

    After each claim its task is completed and another submitted, unmeasured: the backlog stays.
    """
    async with AsyncExitStack() as stack:
        stores = [await opened(stack, url, database) for database in range(len(backlogs))]
        filled: dict[str, float] = {}
        for store, backlog in zip(stores, backlogs, strict=True):
            for _ in range(0, backlog.running, 100):
                for _ in range(min(100, backlog.running)):
                    await store.submit(ours.task("other"))
                await store.claim("other", secrets.token_hex(8), arrange.CPU * min(100, backlog.running))
            before_bytes, begun_s = await used_bytes(store.redis), time.perf_counter()
            await Filler(store).fill(backlog.waiting, backlog.projects, ours.task("film"))
            filled = {
                "seconds": time.perf_counter() - begun_s,
                "bytes": (await used_bytes(store.redis) - before_bytes) / backlog.waiting,
            }
            assert (await Queries(store.redis).queue_sizes())[Kind.CPU_INTENSIVE] == backlog.waiting
        taken_us: list[list[float]] = [[] for _ in backlogs]
        served_us: list[list[float]] = [[] for _ in backlogs]
        for _ in range(count):
            for place, store in enumerate(stores):
                nonce, before_us = secrets.token_hex(8), await script_us(store.redis)
                begun_s = time.perf_counter()
                (claimed,) = await store.claim("bench", nonce, arrange.CPU)
                taken_us[place].append((time.perf_counter() - begun_s) * 1e6)
                served_us[place].append(await script_us(store.redis) - before_us)
                await store.complete(claimed.task.task_id, claimed.run, ours.RESULT)
                await store.submit(ours.task(claimed.task.project_id))
        costs = {
            str(backlog): {
                "n": count,
                "p50_us": statistics.median(taken_us[place]),
                "p99_us": sorted(taken_us[place])[int(count * 0.99)],
                "server_p50_us": statistics.median(served_us[place]),
            }
            for place, backlog in enumerate(backlogs)
        }
        return costs, filled


async def finished_bytes(url: str, count: int) -> tuple[float, int, float]:
    """The memory of a completed task with its log, the entries of the log, and the memory of the log alone."""
    async with AsyncExitStack() as stack:
        store = await opened(stack, url, 10)
        redis: Any = store.redis
        before = await used_bytes(redis)
        task_id = None
        for _ in range(count):
            task_id, run = await arrange.running(store, kwargs=ours.KWARGS)
            for number in range(1, REPORTS + 1):
                await store.report(task_id, run, number / (REPORTS + 1), "rendering_frames", stage="render", step=number, steps=REPORTS)
            await store.complete(task_id, run, ours.RESULT)
        after = await used_bytes(redis)
        assert task_id is not None
        task = await Queries(store.redis).task(task_id)
        assert task is not None
        assert task.status is TaskStatus.COMPLETED
        log = KEYS["log"] + task_id
        return (after - before) / count, await redis.xlen(log), float(await redis.memory_usage(log, samples=0))
