"""Queries for tasks, projects, queues, workers, dead letters, totals and event logs. Nothing here writes.

Redis errors are raised as `redis.exceptions.RedisError`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import msgspec
from redis.exceptions import NoPermissionError, ResponseError

from movieq.queue.connection import Redis
from movieq.queue.records import (
    Logged,
    awaited,
    decode_able,
    decode_heartbeat,
    decode_logged,
    decode_task,
    decode_task_data,
    execute_tolerantly,
    number,
    pairs,
    text,
)
from movieq.tasks.entities import DeadLetter, Project, Task, TaskQueue, WorkerState, WorkerStatus
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import utc
from movieq.tasks.states import STATES, Kind, Priority, ProjectId, TaskId, TaskStatus, TaskType

LOG_ENTRIES: Final = 50
"""Entries of an event log in the first read; each further read asks for twice as many."""
LOG_BYTES: Final = 256 * 1024
"""After so many bytes of an event log no more are read in one call."""
OFFLINE_MS: Final = 15_000
"""A worker whose last heartbeat is older is offline."""


class Stranded(msgspec.Struct, frozen=True):
    """Waiting tasks that no live worker can run: all of a kind or, if `task_type` is set, those of one task type and model."""

    kind: str
    task_type: str
    model: str
    waiting: int

    @property
    def text(self) -> str:
        """A message for operators."""
        if self.task_type:
            return f"no live worker can run {self.waiting} waiting {self.task_type} tasks of {self.kind} with model {self.model}"
        return f"no live worker serves {self.kind}, which has {self.waiting} waiting tasks"


class Memory(msgspec.Struct, frozen=True):
    """The memory of Redis: used bytes, limit (0 for none), and eviction policy ('' if unknown)."""

    used: int
    most: int
    policy: str

    @property
    def evicts(self) -> bool:
        """Whether Redis deletes keys when its memory is full."""
        return self.policy not in ("", "noeviction")


class LogState(msgspec.Struct, frozen=True):
    """The state of an event log: the ids of its first and last entry (None if it is empty), and whether older entries were trimmed."""

    first: str | None
    last: str | None
    trimmed: bool


class Queries:
    """Queries for the tasks, queues and workers of an installation."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names

    # ── Tasks ──

    async def task(self, task_id: TaskId) -> Task | None:
        """Return the task; None if it does not exist."""
        flat = await self._redis.shared.call("HGETALL", self._keys["task"] + task_id)
        return decode_task(task_id, pairs(flat)) if flat else None

    async def tasks(self, ids: Sequence[str]) -> list[Task]:
        """Return the tasks with these ids, without those that do not exist."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.hgetall(self._keys["task"] + task_id)
            return [decode_task(task_id, fields) for task_id, fields in zip(ids, await execute_tolerantly(pipe), strict=True) if fields]

    async def reusable(self, fingerprint: str) -> Task | None:
        """Return the latest completed task with this fingerprint; None if there is none or it was swept."""
        task_id = await self._redis.shared.call("GET", self._keys["reusable"] + fingerprint)
        return await self.task(TaskId(text(task_id))) if task_id else None

    async def task_data(self, task_id: TaskId) -> dict[str, Any]:
        """Return the task_data that the task was submitted with; empty where it was swept."""
        return decode_task_data(await self._redis.get(self._keys["job"] + task_id))

    async def position(self, task: Task) -> int | None:
        """Return the task's position in its project's queue, from 1; None if it is not waiting."""
        rank = await self._redis.shared.call("ZRANK", self._queue(task), task.task_id)
        return None if rank is None else rank + 1

    async def positions(self, tasks: Sequence[Task]) -> list[int | None]:
        """Return each task's position in its project's queue, as `position` does."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for task in tasks:
                pipe.zrank(self._queue(task), task.task_id)
            return [None if rank is None else rank + 1 for rank in await pipe.execute()]

    def _queue(self, task: Task) -> str:
        """Return the key of the task's queue: that of its project in its lane and flow."""
        flow = f":@{task.flow}" if task.flow else ""
        return f"{self._keys['waiting']}{task.lane or task.kind}{flow}:{task.project_id}"

    # ── Projects ──

    async def page(
        self, project_id: ProjectId, status: TaskStatus | None, task_type: TaskType | None, page: int, limit: int
    ) -> tuple[list[Task], int]:
        """Return a page of a project's tasks, newest first, and the total number. Cost: O(log n + limit), two round trips."""
        key = f"{self._keys['index']}{project_id}|{status or ''}|{task_type or ''}"
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zcard(key)
            pipe.zrevrange(key, (page - 1) * limit, page * limit - 1)
            total, ids = await pipe.execute()
        return await self.tasks([text(task_id) for task_id in ids]), total

    async def project(self, project_id: ProjectId) -> Project | None:
        """Return the project with the number of its tasks in each state; None before its first task."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zscore(self._keys["projects"], project_id)
            for status in STATES:
                pipe.zcard(f"{self._keys['index']}{project_id}|{status}|")
            pipe.hget(self._keys["gpu_ms"], project_id)
            pipe.hget(self._keys["record_bytes"], project_id)
            pipe.get(self._keys["upload_bytes"] + project_id)
            created, *counts, gpu_ms, record_bytes, upload_bytes = await pipe.execute()
        if created is None:
            return None
        return Project(
            project_id,
            utc(created),
            dict(zip(STATES, counts, strict=True)),
            round(number(gpu_ms) / 1000, 3),
            int(number(record_bytes)),
            int(number(upload_bytes)),
        )

    async def active(
        self, project_id: ProjectId, task_types: Collection[TaskType], statuses: Collection[TaskStatus], limit: int
    ) -> list[tuple[Task, int | None]]:
        """Return a project's running tasks, then its waiting ones with their queue positions; each group oldest first.

        At most `limit` tasks, only of these types and in these states; an empty collection means all.
        """
        wanted = [status for status in (TaskStatus.PROCESSING, TaskStatus.QUEUED) if not statuses or status in statuses]
        async with self._redis.pipeline(transaction=False) as pipe:
            for status in wanted:
                for task_type in task_types or ("",):
                    pipe.zrange(f"{self._keys['index']}{project_id}|{status}|{task_type}", 0, limit - 1, withscores=True)
            found = await pipe.execute()
        width = len(task_types) or 1
        ids = [
            text(task_id)
            for start in range(0, len(found), width)
            for task_id, _ in sorted(itertools.chain(*found[start : start + width]), key=lambda pair: pair[1])
        ]
        tasks = await self.tasks(ids[:limit])
        return list(zip(tasks, await self.positions(tasks), strict=True))

    # ── Queues ──

    async def queue_sizes(self) -> dict[Kind, int]:
        """Return the number of waiting tasks in each of the three queues."""
        lanes = await self._lanes()
        async with self._redis.pipeline(transaction=False) as pipe:
            for of in itertools.chain(*lanes.values()):
                pipe.zcard(self._keys["waiting"].encode() + of)
            counts = iter(await pipe.execute())
        sizes = {kind: sum(itertools.islice(counts, len(of_kind))) for kind, of_kind in lanes.items()}
        return {kind: sizes[kind] for kind in Kind}

    async def queues(self) -> list[TaskQueue]:
        """Return the three queues. Tasks whose lease has expired count as waiting, so that an autoscaler sees them."""
        lanes = await self._lanes()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            (now_s, micros), *_ = await pipe.execute()
            now_ms = now_s * 1000 + micros // 1000
            for kind in Kind:
                pipe.zcount(self._keys["running"] + kind, "-inf", now_ms)
                pipe.zcard(self._keys["running"] + kind)
                pipe.hmget(self._keys["priorities"] + kind, [1, 2, 3])
                pipe.lrange(self._keys["claim_times"] + kind, 0, 99)
                for of in lanes[kind]:
                    pipe.zcard(self._keys["waiting"].encode() + of)
                    pipe.zrange(self._keys["waiting"].encode() + of, 0, 0, withscores=True)
            answers = iter(await pipe.execute())
        found = []
        for kind in Kind:
            dead, running, priorities, claims = itertools.islice(answers, 4)
            found.append(_queue(kind, now_ms, dead, running, priorities, claims, list(itertools.islice(answers, 2 * len(lanes[kind])))))
        return found

    async def stranded(self, workers: Sequence[WorkerStatus]) -> list[Stranded]:
        """Return the lanes whose waiting tasks none of these workers can run."""
        lanes = list(itertools.chain(*(await self._lanes()).values()))
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._keys["abilities"])
            for of in lanes:
                pipe.zcard(self._keys["waiting"].encode() + of)
            stored, *waiting = await pipe.execute()
        able = {text(worker_id): decode_able(blob) for worker_id, blob in stored.items()}
        found = []
        for of, count in zip(lanes, waiting, strict=True):
            kind, _, need = text(of).partition("/")
            task_type, _, model = need.partition("/")
            serving = [able.get(row.worker_id.rpartition("/")[0]) for row in workers if kind in row.queues]
            if count and not any(not need or each is None or (task_type in each.types and model in each.models) for each in serving):
                found.append(Stranded(kind, task_type, model, count))
        return found

    async def astray(self) -> int:
        """Return how many queued tasks are in no queue, because keys were deleted by hand or a backup was incomplete."""
        lanes = itertools.chain(*(await self._lanes()).values())
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self._keys["totals"], TaskStatus.QUEUED)
            pipe.zcard(self._keys["delayed"])
            for of in lanes:
                pipe.zcard(self._keys["waiting"].encode() + of)
            queued, *waiting = await pipe.execute()
        return max(0, int(queued) - sum(waiting)) if queued and queued.isdigit() else 0

    async def _lanes(self) -> dict[str, list[bytes]]:
        """Return the lanes of each kind: the kind itself, then the lanes of tasks that some worker could not run.

        The kinds of this version come first, then other kinds that have had tasks.
        """
        others = {text(kind) for kind in await awaited(self._redis.smembers(self._keys["kinds"]))}
        kinds = [*Kind, *sorted(others - set(Kind))]
        async with self._redis.pipeline(transaction=False) as pipe:
            for kind in kinds:
                pipe.smembers(self._keys["lanes"] + kind)
            return {kind: [kind.encode(), *sorted(found)] for kind, found in zip(kinds, await pipe.execute(), strict=True)}

    # ── Totals ──

    async def totals(self, projects: Iterable[str] | None) -> dict[TaskStatus, int]:
        """Return the number of tasks in each state, of these projects or, for None, of all."""
        if projects is None:
            found = await self._redis.shared.call("HMGET", self._keys["totals"], *STATES)
            return {status: int(number(count)) for status, count in zip(STATES, found, strict=True)}
        sums = dict.fromkeys(STATES, 0)
        async with self._redis.pipeline(transaction=False) as pipe:
            for project in projects:
                for status in STATES:
                    pipe.zcard(f"{self._keys['index']}{project}|{status}|")
            for place, count in enumerate(await pipe.execute()):
                sums[STATES[place % len(STATES)]] += count
        return sums

    async def average_durations_s(self) -> dict[TaskType, float]:
        """Return the average duration of completed tasks by task type, in seconds."""
        sums = {text(key): number(value) for key, value in pairs(await self._redis.shared.call("HGETALL", self._keys["sums"])).items()}
        return {each: sums.get(f"{each} ms", 0) / sums[f"{each} tasks"] / 1000 for each in REGISTRY.tasks if sums.get(f"{each} tasks")}

    async def gpu_seconds(self, projects: Collection[str] | None) -> float:
        """Return the GPU seconds of all ended runs, of these projects or, for None, of all."""
        whose = [""] if projects is None else list(projects)
        found = await self._redis.shared.call("HMGET", self._keys["gpu_ms"], *whose) if whose else []
        return round(sum(map(number, found)) / 1000, 3)

    async def passed_over(self) -> int:
        """Return how many tasks were claimed before older ones because their model was loaded."""
        return int(number(await self._redis.shared.call("HGET", self._keys["sums"], "claims passed")))

    async def dead_letters(self, count: int = 100, projects: Collection[str] | None = None) -> tuple[list[DeadLetter], int]:
        """Return the latest dead letters, of these projects or, for None, of all, and the total number."""
        async with self._redis.pipeline(transaction=False) as pipe:
            if projects is None:
                pipe.zrevrange(self._keys["dead"], 0, count - 1, withscores=True)
                pipe.zcard(self._keys["dead"])
                found, total = await pipe.execute()
            else:
                for project_id in projects:  # weight 0 keeps the times of the dead letters
                    pipe.zinter({self._keys["dead"]: 1, f"{self._keys['index']}{project_id}|{TaskStatus.FAILED}|": 0}, withscores=True)
                all_found = sorted(itertools.chain(*await pipe.execute()), key=lambda letter: letter[1], reverse=True)
                found, total = all_found[:count], len(all_found)
            for task_id, _ in found:
                pipe.hgetall(self._keys["task"] + text(task_id))
                pipe.get(self._keys["job"] + text(task_id))
            facts = await execute_tolerantly(pipe)
        letters = [_dead_letter(text(id), at_ms, facts[2 * n], facts[2 * n + 1]) for n, (id, at_ms) in enumerate(found) if facts[2 * n]]
        return letters, total

    # ── Workers and Redis ──

    async def workers(self) -> list[WorkerStatus]:
        """Return the rows of every worker's last heartbeat. A worker without a heartbeat for 15 s is offline."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._keys["workers"])
            pipe.zrange(self._keys["heartbeat_times"], 0, -1, withscores=True)
            pipe.time()
            blobs, beats, (seconds, micros) = await pipe.execute()
        now_ms = seconds * 1000 + micros // 1000
        return [
            msgspec.structs.replace(
                row,
                last_heartbeat=utc(at_ms),
                **({"status": WorkerState.OFFLINE, "current_task_id": None} if now_ms - at_ms > OFFLINE_MS else {}),
            )
            for worker_id, at_ms in beats
            for row in decode_heartbeat(blobs.get(worker_id))
        ]

    async def gpu_bytes(self) -> int:
        """Return the memory of the largest GPU of which a worker has sent a heartbeat in the last 30 days; 0 if there was none."""
        return int(await self._redis.shared.call("GET", self._keys["gpu"]) or 0)

    async def memory(self) -> Memory | None:
        """Return the memory of Redis; None if its user may not run INFO."""
        try:
            facts = await awaited(self._redis.info("memory"))
        except NoPermissionError:
            return None
        return Memory(int(facts["used_memory"]), int(facts.get("maxmemory", 0)), facts.get("maxmemory_policy", ""))

    # ── Event logs ──

    async def log_after(self, log: str, after: str | None, count: int = 500) -> list[Logged]:
        """Return entries of an event log after the id `after` (None: from the beginning), oldest first; none at the end of the log.

        `log` is a task's id or `project:PROJECT`. At most `count` entries are returned, and no more once they have `LOG_BYTES`. Unreadable
        entries are skipped.
        """
        found: list[Logged] = []
        size_bytes, asked = 0, LOG_ENTRIES
        while len(found) < count and not (found and size_bytes >= LOG_BYTES):
            asked = min(asked, count - len(found))
            entries = await self._redis.shared.call("XRANGE", self._keys["log"] + log, f"({after}" if after else "-", "+", "COUNT", asked)
            for id, fields in entries:
                size_bytes += sum(map(len, fields))
                if (entry := decode_logged(id, pairs(fields))) is not None:
                    found.append(entry)
            if len(entries) < asked:
                break
            after = entries[-1][0].decode()
            asked *= 2
        return found

    async def log_state(self, log: str) -> LogState:
        """Return the state of an event log: its first and last entry, and whether it was trimmed."""
        try:
            info = pairs(await self._redis.shared.call("XINFO", "STREAM", self._keys["log"] + log))
        except ResponseError as error:
            if "no such key" in str(error):
                return LogState(None, None, False)
            raise
        first, last = (info[name] and info[name][0].decode() for name in (b"first-entry", b"last-entry"))
        return LogState(first, last, info[b"entries-added"] > info[b"length"])


def _queue(
    kind: Kind, now_ms: int, dead: int, running: int, priorities: list[bytes | None], claims: list[bytes], lanes: list[Any]
) -> TaskQueue:
    """Return the row of a queue. `lanes` holds two items for each lane: the number of waiting tasks, and the oldest task with its time."""
    waiting, oldest = sum(lanes[::2]), [at_ms for first in lanes[1::2] for _, at_ms in first]
    claimed = [at_ms for each in claims if (at_ms := number(each)) > 0]
    pace_ms = max(0.0, now_ms - claimed[-1]) / len(claimed) if len(claimed) > 1 else 30_000.0
    return TaskQueue(
        kind,
        waiting + dead,
        {name: int(number(count)) for name, count in zip(Priority, priorities, strict=True)},
        running - dead,
        max(0.0, (now_ms - max(0, min(oldest))) / 1000) if oldest else 0.0,
        math.ceil((waiting + dead) * pace_ms / 1000),
    )


def _dead_letter(task_id: str, at_ms: float, fields: dict[bytes, bytes], job: bytes | None) -> DeadLetter:
    task = decode_task(task_id, fields)
    exit_code = fields.get(b"dead_exit_code", b"")
    return DeadLetter(
        task.task_id,
        task.project_id,
        task.task_type,
        utc(at_ms),
        task.attempt,
        task.error,
        text(fields[b"dead_stage"]) if b"dead_stage" in fields else None,
        int(exit_code) if exit_code.removeprefix(b"-").isdigit() else None,
        decode_task_data(job),
    )
