"""`make chaos N=10000`: N tasks through real processes while a driver kills them. Nothing accepted may be lost, nothing done twice.

A random worker or child is killed (-9) every 2 s, an API every 5 s, Redis every 20 s (kill -9 and SIGTERM in turn), a worker is stopped for
15 s once a minute, one task in twenty is cancelled at random. Two versions and two sets of plug-ins run side by side; among the work are
records that are poisoned or deleted, tasks that no worker knows, and a full disk (`odd.py`). At the end every accepted task must be in
exactly one terminal state, its receiver must have heard that state, each completed one must have one committed file whose bytes are right,
no key or file may be left behind, and every alert that should have come must have. The last line is one JSON object with the counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import av
import msgspec
from PIL import Image
from redis.exceptions import RedisError

from movieq.queue.connection import connect
from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.entities import Task
from movieq.tasks.states import EventType, TaskId, TaskStatus
from tests.arrange import raw
from tests.bench.report import percentile, report
from tests.chaos.farm import Farm
from tests.chaos.odd import Oddities
from tests.service import Receiver, serving

KEY = "chaos-key-0123456789"
CANCELLED_SHARE = 0.05

WORK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("generate_image", {"prompt": "a lamp", "resolution": "256x256"}),
    ("generate_video", {"prompt": "a lamp", "resolution": "160x90", "duration": 1, "fps": 12}),
    ("generate_video", {"prompt": "a lamp", "resolution": "160x90", "duration": 2, "fps": 24, "audio_cues": ["sea"]}),
    ("render_animation", {"prompt": "a gull", "resolution": "160x90", "duration": 1, "fps": 12}),
    ("process_audio", {"text": "Land ho."}),
)
"""Tiny work of every type; none takes more than half a second."""
PLUGGED: tuple[tuple[str, dict[str, Any]], ...] = (("make_palette", {"prompt": "a lamp", "colours": 3}),)
"""Work that one API and one worker know."""


class Findings(msgspec.Struct):
    """What the checker found. From `lost` to `silent` all should be 0; `named` says what each is about."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    webhooks: int = 0
    lost: int = 0
    doubled: int = 0
    unheard: int = 0
    wrong_bytes: int = 0
    orphans: int = 0
    leftover_keys: int = 0
    silent: int = 0
    poisoned: int = 0
    strangers: int = 0
    deleted: int = 0
    recovery_p99_s: float = 0.0
    recoveries: int = 0
    named: list[str] = []


class Driver:
    """Submits, cancels and breaks things, and remembers what was accepted and what was broken when."""

    def __init__(self, farm: Farm, tasks: int, per_second: float, seed: int) -> None:
        self.farm = farm
        self.tasks = tasks
        self.per_second = per_second
        self.chance = random.Random(seed)
        self.accepted: dict[TaskId, dict[str, Any]] = {}
        self.broken: list[tuple[float, set[TaskId]]] = []
        self.redis_back_s: list[float] = []

    async def submit_all(self, callback: str) -> None:
        """Every task, over either API, until it is accepted; said again under its key it is one task."""
        async with aiohttp.ClientSession(headers={"X-API-Key": KEY}) as session, asyncio.TaskGroup() as group:
            for number in range(self.tasks):
                group.create_task(self.submit_one(session, number, callback))
                await asyncio.sleep(self.chance.expovariate(self.per_second))

    async def submit_one(self, session: aiohttp.ClientSession, number: int, callback: str) -> None:
        task_type, task_data = self.chance.choice(WORK) if self.farm.newer is None else self.chance.choice((*WORK, *PLUGGED))
        url = self.farm.urls[-1] if task_type == "make_palette" else None
        body: dict[str, Any] = {
            "project_id": f"film{number % 5}",
            "task_type": task_type,
            "task_data": task_data,
            "priority": self.chance.choice([1, 2, 3]),
            "callback_url": callback,
            "metadata": {"number": number},
        }
        answer = await self.insist(session, "POST", "/tasks/submit", url, json=body, headers={"Idempotency-Key": f"take-{number}"})
        task_id = TaskId(answer["task_id"])
        assert task_id not in self.accepted
        self.accepted[task_id] = task_data
        if self.chance.random() < CANCELLED_SHARE:
            await asyncio.sleep(self.chance.random())
            with contextlib.suppress(PermissionError):
                await self.insist(session, "DELETE", f"/tasks/{task_id}/cancel")

    async def insist(self, session: aiohttp.ClientSession, method: str, path: str, url: str | None = None, **options: Any) -> Any:
        """The answer of one API, or of whichever answers first."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            at = url or self.chance.choice(self.farm.urls)
            try:
                async with session.request(method, f"{at}/api/v1{path}", timeout=aiohttp.ClientTimeout(total=5), **options) as answer:
                    if answer.status < 300:
                        return await answer.json()
                    if answer.status == 400:
                        raise PermissionError(await answer.text())  # it has ended meanwhile
                    if answer.status not in (409, 429, 500, 503):
                        raise AssertionError(await answer.text())
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.2)
        raise AssertionError(f"{method} {path} was not answered for two minutes")

    async def break_workers(self, store: Store) -> None:
        while True:
            await asyncio.sleep(2)
            held = await self._held(store)
            busy = sorted(name for name, process in self.farm.processes.items() if process.pid in held)
            name = self.chance.choice(busy) if busy else self.farm.any_worker(self.chance)
            self.broken.append((time.time(), held.get(self.farm.processes[name].pid, set())))
            if self.chance.random() < 0.5:
                self.farm.kill(name)
            else:
                self.farm.kill_child(name)

    async def _held(self, store: Store) -> dict[int, set[TaskId]]:
        """What each worker process runs, by its pid; nothing where Redis is away."""
        found: dict[int, set[TaskId]] = {}
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            for key in await store.redis.keys(f"{KEYS['worker_tasks']}*"):
                pid = int(key.decode().rsplit("-", 2)[1])
                found[pid] = {TaskId(task_id.decode()) for task_id in await store.redis.smembers(key)}  # type: ignore[misc]  # redis-py's union
        return found

    async def break_apis(self) -> None:
        while True:
            await asyncio.sleep(5)
            self.farm.kill(self.farm.any_api(self.chance))

    async def break_redis(self) -> None:
        hard = True
        while True:
            await asyncio.sleep(20)
            await self.farm.restart_redis(hard)
            self.redis_back_s.append(time.time())
            hard = not hard

    async def stop_workers(self) -> None:
        while True:
            await asyncio.sleep(10)
            await self.farm.stop_and_go(self.farm.any_worker(self.chance), 15)
            await asyncio.sleep(35)


async def all_ended(store: Store, accepted: Iterable[TaskId], patience_s: float) -> None:
    """Returns when every task has ended, or no other has for so long: the checker counts what has not."""
    waiting = list(accepted)
    end = time.monotonic() + patience_s
    while waiting and time.monotonic() < end:
        left = [task.task_id for task in await Queries(store.redis).tasks(waiting) if not task.status.ended]
        if len(left) < len(waiting):
            waiting, end = left, time.monotonic() + patience_s
        await asyncio.sleep(0.5)


async def check(store: Store, driver: Driver, hook: Receiver, media: Path, odd: Oddities | None = None) -> Findings:
    """What became of every accepted task, by Redis, by the files and by what the receiver heard."""
    found = Findings(accepted=len(driver.accepted), webhooks=len(hook.requests))
    poisoned: set[TaskId] = set()
    if odd is not None:
        poisoned = odd.poisoned
        found.poisoned, found.strangers, found.deleted, found.silent = len(poisoned), len(odd.strangers), len(odd.ghosts), len(odd.silent)
        found.named += [f"silent: {alert}" for alert in odd.silent]
    heard: dict[str, set[str]] = defaultdict(set)
    for _, body in hook.requests:
        said = msgspec.json.decode(body)
        heard[said["task_id"]].add(said["status"])
    tasks = {task.task_id: task for task in await Queries(store.redis).tasks(list(driver.accepted))}
    states = Counter(task.status for task in tasks.values())
    found.completed, found.failed, found.cancelled = states[TaskStatus.COMPLETED], states[TaskStatus.FAILED], states[TaskStatus.CANCELLED]
    print("failed as", dict(Counter(task.error_code for task in tasks.values() if task.status is TaskStatus.FAILED)))
    committed: set[str] = set()
    for task_id, task_data in driver.accepted.items():
        task = tasks.get(task_id)
        if task is None or not task.status.ended:
            found.lost += 1
            found.named.append(f"lost: {task_id} {task and task.status} {task_id in poisoned and 'poisoned'}")
            continue
        ends = [
            entry.type
            for entry in await Queries(store.redis).log_after(task_id, None)
            if entry.type in ("completed", "failed", "cancelled")
        ]
        if len(ends) != 1 or len(heard[task_id]) > 1:
            found.doubled += 1
            found.named.append(f"doubled: {task_id} ended {ends}, heard {heard[task_id]}")
        if heard[task_id] != {task.status}:
            found.unheard += 1
            found.named.append(f"unheard: {task_id} is {task.status}, heard {heard[task_id]}")
        if task.result is not None:
            media_of = task.result.media[0]
            committed |= {key for key in (media_of.key, media_of.poster_key) if key}
            if not right_bytes(task, media, task_data):
                found.wrong_bytes += 1
                found.named.append(f"wrong bytes: {task_id} {media_of.key}")
    numbers = Counter(task.metadata["number"] for task_id, task in tasks.items() if task_id not in poisoned)
    found.doubled += sum(count - 1 for count in numbers.values())
    found.named += [f"doubled: number {number} was accepted {count} times" for number, count in numbers.items() if count > 1]
    storage = FolderStorage(media, "http://unused", (b"unused",))
    for prefix, _ in await store.redis.zrange(KEYS["orphans"], 0, -1, withscores=True):
        await storage.delete_prefix(prefix.decode())
        await Files(store.redis).forget_orphans([prefix.decode()])
    files = {str(path.relative_to(media)) for path in media.rglob("*") if path.is_file()}
    found.orphans = len(files - committed)
    found.named += [f"orphan: {file}" for file in sorted(files - committed)]
    left = await leftover_entries(store, odd.ghosts if odd is not None else set())
    found.leftover_keys = len(left)
    found.named += [f"left over: {entry}" for entry in left]
    recoveries = await recovery_times(store, driver)
    found.recoveries = len(recoveries)
    found.recovery_p99_s = percentile(recoveries, 0.99) if recoveries else 0.0
    return found


def right_bytes(task: Task, media: Path, task_data: dict[str, Any]) -> bool:
    """Whether the committed file is whole, and of the type, size and length that were asked for."""
    assert task.result is not None
    path = media / task.result.media[0].key
    try:
        if path.stat().st_size != task.result.metadata["file_size"]:
            return False
        if task.task_type == "make_palette":
            with Image.open(path) as strip:
                return strip.size == (192, 64)
        if task.task_type == "generate_image":
            image = Image.open(path)
            image.load()
            return bool(f"{image.width}x{image.height}" == task_data["resolution"])
        with av.open(str(path)) as container:
            if task.task_type == "process_audio":
                return sum(frame.samples for frame in container.decode(audio=0)) > 10_000
            frames = sum(1 for _ in container.decode(video=0))
            return bool(frames == task_data["duration"] * task_data["fps"])
    except (OSError, av.FFmpegError):
        return False


async def leftover_entries(store: Store, ghosts: Collection[TaskId]) -> list[str]:
    """Entries of the queue's own structures that should be empty when everything has ended: key and entry.

    A ghost may stay in what a dead worker held until that is forgotten, five minutes after its last heartbeat.
    """
    left = []
    for name in (
        "waiting",
        "virtual_times",
        "running",
        "worker_tasks",
        "lanes",
        "delayed",
        "deadlines",
        "deliveries",
        "due_deliveries",
        "due_queues",
    ):
        keys = await raw(store).keys(f"{KEYS[name]}*") if KEYS[name].endswith(":") else [KEYS[name].encode()]
        for key in keys:
            entries = await (raw(store).smembers(key) if name in ("worker_tasks", "lanes") else raw(store).zrange(key, 0, -1))
            left += [f"{key.decode()} {entry.decode()}" for entry in entries if name != "worker_tasks" or entry.decode() not in ghosts]
    return left


async def recovery_times(store: Store, driver: Driver) -> list[float]:
    """Seconds from each kill to the next sign of life of each task that it hit, from Redis being back where that was later."""
    times = []
    for at_s, held in driver.broken:
        for task_id in held:
            entries = [entry for entry in await Queries(store.redis).log_after(task_id, None) if entry.type is not EventType.PROGRESS]
            after = [int(entry.id.partition("-")[0]) / 1000 for entry in entries if int(entry.id.partition("-")[0]) / 1000 > at_s]
            if after:
                begun = max([at_s, *(back for back in driver.redis_back_s if at_s < back < after[0])])
                times.append(after[0] - begun)
    return times


async def chaos(folder: Path, tasks: int, per_second: float, seed: int) -> Findings:
    """One run."""
    farm = Farm(folder, mixed=True)
    farm.start(MOVIEQ_API_KEYS=KEY)
    hook = Receiver()
    client = connect(farm.valkey.url, patient=True)
    store = Store(client)
    try:
        async with serving({"/hook": hook.handle}, "POST") as url:
            keeper = asyncio.create_task(farm.keep())
            driver = Driver(farm, tasks, per_second, seed)
            odd = Oddities(driver, store)
            breaking = [
                asyncio.create_task(work)
                for work in (driver.break_workers(store), driver.break_apis(), driver.break_redis(), driver.stop_workers(), odd.run())
            ]
            try:
                await driver.submit_all(f"{url}/hook")
                await asyncio.sleep(5)
            finally:
                for task in breaking:
                    task.cancel()
                await asyncio.gather(*breaking, return_exceptions=True)
                for process in farm.processes.values():
                    process.send_signal(18)  # SIGCONT, for one that was stopped
            async with aiohttp.ClientSession(headers={"X-API-Key": KEY}) as session:
                await odd.afterwards(session, f"{url}/hook")
            await all_ended(store, driver.accepted, 180)  # a record that nobody can read waits for two minutes before its last try
            end = time.monotonic() + 60
            while await client.zcard(KEYS["deliveries"]) and time.monotonic() < end:  # those of a killed worker come 30 s later
                await asyncio.sleep(0.5)
            if keeper.done():
                keeper.result()  # what was killed was not started again: the run says nothing
            findings = await check(store, driver, hook, folder / "media", odd)
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            print("kills", farm.kills)
            return findings
    finally:
        await store.redis.aclose()
        farm.stop()


def main() -> None:
    """Prints the counts; exits 1 where something was lost or done twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=int, nargs="?", default=300)
    parser.add_argument("--per-second", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print("seed", options.seed)
    with tempfile.TemporaryDirectory(prefix="movieq-chaos-") as folder:
        findings = asyncio.run(chaos(Path(folder), options.tasks, options.per_second, options.seed))
    print("\n".join(findings.named))
    report("chaos", {name: value for name, value in msgspec.structs.asdict(findings).items() if name != "named"})
    bad = (
        findings.lost
        + findings.doubled
        + findings.unheard
        + findings.wrong_bytes
        + findings.orphans
        + findings.leftover_keys
        + findings.silent
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
