"""Tasks in Redis: one method per Lua script, and the reads.

A method of a verb is said again safely: after a lost answer the same call answers the same. Verb calls but submit go on when their
caller is cancelled. Redis's own errors pass through here as `redis.exceptions.RedisError`: where it is away the API answers 503, the worker
waits.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec
from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.exceptions import (
    NoPermissionError,
    ResponseError,
)

from movieq import logs
from movieq.errors import IdempotencyMismatch, InvalidState, NotFound, QueueFull, RunLost
from movieq.queue.connection import SharedConnection
from movieq.queue.keys import DELIVERY_KEPT_S, UPLOAD_KEPT_S, keys
from movieq.queue.records import (
    Able,
    Logged,
    awaited,
    decode_able,
    decode_delivery,
    decode_grant,
    decode_heartbeat,
    decode_logged,
    decode_task,
    decode_task_data,
    decode_warnings,
    execute_tolerantly,
    number,
    pairs,
    text,
)
from movieq.queue.scripts import Script
from movieq.settings import Grant
from movieq.tasks.entities import (
    DeadLetter,
    Delivery,
    DeliveryState,
    Project,
    Task,
    TaskQueue,
    Upload,
    WorkerState,
    WorkerStatus,
)
from movieq.tasks.results import StoredResult, utc
from movieq.tasks.states import STATES, Kind, Priority, ProjectId, RunToken, TaskId, TaskStatus, TaskType

LEASE_MS: Final = 10_000
RENEW_S: Final = 3.0
TIDY_S: Final = 1.0
TRIES_LIMIT: Final = 3
DEATHS_LIMIT: Final = 3
SILENCES_LIMIT: Final = 10
OUTAGE_MS: Final = 5_000
QUIET_MS: Final = 12_000
FORGET_MS: Final = 300_000
OFFLINE_MS: Final = 15_000
ORPHAN_S: Final = 60

log = logs.get()


class Counts(StrEnum):
    """Against which budget of a task a run that gave it back counts."""

    TRIES = "tries"
    DEATHS = "deaths"
    DRAIN = "drain"


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """What submit stores. `kwargs` are those of the arq job (msgpack map), `metadata` is JSON; both pass through as they are."""

    task_id: TaskId
    project_id: ProjectId
    task_type: TaskType
    kind: Kind
    engine: str
    model: str
    shape: str
    priority: int
    bias_ms: int
    kwargs: bytes
    metadata: bytes
    estimate_ms: int
    max_ms: int
    batch: str = ""
    """Tasks of one such key can be made at once, `batch_rows` at most."""
    batch_rows: int = 1
    callback_url: str = ""
    start_by_ms: int | None = None
    finish_by_ms: int | None = None
    warnings: tuple[str, ...] = ()
    idempotency: str = ""
    body_hash: str = ""
    max_queued: int = 0
    max_queued_all: int = 0
    fingerprint: str = ""
    made: str = ""
    """The completed task whose result is this one's: `made_result`, JSON, its files under `made_prefix`, and at most `made_ms` old."""
    made_result: bytes = b""
    made_prefix: str = ""
    made_ms: int | None = None
    made_cms: str = ""
    """Address of the CMS's collection that is to have it."""


class Accepted(msgspec.Struct, frozen=True):
    """The facts of a receipt. `replayed`: the idempotency key had been used for this body before."""

    task_id: TaskId
    created_at_ms: int
    queue_position: int
    estimate_ms: int
    warnings: list[str]
    replayed: bool


class Slot(msgspec.Struct, frozen=True):
    """Where a worker can put a task, or a batch of them: the kinds that it takes and the models in its memory.

    One that is not `free` yet will be in a moment: no submit wakes its worker.
    """

    kinds: tuple[str, ...]
    models: tuple[str, ...] = ()
    free: bool = True


class Claimed(msgspec.Struct, frozen=True):
    """A task that a worker is to run: `job` is arq's definition (msgpack); those of one `slot` are to be made at once.

    A task whose record cannot be read has the status `unknown`, and is to be given back.
    """

    task: Task
    run: RunToken
    job: bytes
    slot: int


class Tidied(msgspec.Struct, frozen=True):
    """How many dead leases, due retries and missed deadlines a call of `tidy` acted on."""

    reaped: int
    due: int
    past_deadline: int

    def __bool__(self) -> bool:
        return bool(self.reaped or self.due or self.past_deadline)


class Stranded(msgspec.Struct, frozen=True):
    """Waiting tasks that no live worker can run: all of a kind or, where `task_type` is not empty, those of this type and model."""

    kind: str
    task_type: str
    model: str
    waiting: int

    @property
    def text(self) -> str:
        """The sentence for an operator."""
        if self.task_type:
            return f"{self.waiting} tasks of {self.task_type} by {self.model} wait in {self.kind}, and no live worker can run them"
        return f"{self.waiting} tasks wait in {self.kind}, and no live worker serves it"


class Memory(msgspec.Struct, frozen=True):
    """The bytes that Redis uses, the most that it may use, 0 for no limit, and its policy for a full memory, '' where it does not say."""

    used: int
    most: int
    policy: str

    @property
    def evicts(self) -> bool:
        """Whether it deletes keys when it is full."""
        return self.policy not in ("", "noeviction")


class LogState(msgspec.Struct, frozen=True):
    """What the log of a task holds: `first` and `last` entry, None where it is empty, and whether entries were trimmed away."""

    first: str | None
    last: str | None
    trimmed: bool


class Store:
    """The one door to the tasks in Redis: those of the installation with this key prefix."""

    def __init__(self, redis: ArqRedis, prefix: str = "movieq") -> None:
        self.redis = redis
        pool = cast("BlockingConnectionPool", redis.connection_pool)
        self.keys = keys(prefix, int(pool.connection_kwargs.get("db") or 0))
        self._connection = SharedConnection(
            pool, pool.connection_kwargs["retry"], pool.connection_kwargs["socket_timeout"], patience_s=pool.timeout or 0
        )
        scripts = sorted(Path(__file__).with_name("lua").glob("[a-z]*.lua"))
        self._scripts = {path.stem: Script(self._connection, path, self.keys) for path in scripts}

    async def aclose(self) -> None:
        """Every connection, of the store and of its client, is closed."""
        await self._connection.aclose()
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    async def _verb(self, name: str, rest: Sequence[str | int] = (), **args: str | int | float | bytes) -> Any:
        call = asyncio.ensure_future(self._scripts[name](rest, **args))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait({call})  # bounded by the client's own time limits
            if not call.cancelled():
                call.exception()
            raise

    # ── Verbs of clients ──

    async def submit(self, new: NewTask) -> Accepted:
        """The task waits in its queue, or is completed with what was made before. Raises IdempotencyMismatch, QueueFull."""
        arguments = {name: "" if value is None else value for name, value in msgspec.structs.asdict(new).items()}
        arguments["warnings"] = msgspec.json.encode(new.warnings)
        # not shielded, as no worker hangs on it: a client that has gone submits again, or has changed its mind
        answer = await self._scripts["submit"]((), **arguments)
        match answer[0]:
            case b"mismatch":
                raise IdempotencyMismatch("this Idempotency-Key was used with another body: send the same body, or another key")
            case b"full" | b"full_all":
                whose, most = (
                    (f"project {new.project_id} has", new.max_queued) if answer[0] == b"full" else ("there are", new.max_queued_all)
                )
                raise QueueFull(
                    f"{whose} {answer[1]} waiting tasks, at most {most} are allowed: try again later",
                    retry_after_s=min(max(1, math.ceil(answer[2] / 1000)), 3600),
                )
        return _accepted(answer)

    async def cancel(self, task_id: TaskId) -> tuple[TaskStatus, int]:
        """The task is cancelled: its state before, and when (ms). Raises NotFound, InvalidState."""
        match await self._verb("cancel", task_id=task_id):
            case [b"ok", previous, at_ms]:
                return TaskStatus(previous.decode()), at_ms
            case [b"refused", state]:
                raise InvalidState(f"the task is {text(state)} and cannot be cancelled: only queued and processing tasks can")
        raise NotFound(f"no task {task_id}")

    async def retry(self, task_id: TaskId) -> Accepted:
        """The failed task waits in its queue again. Raises NotFound, InvalidState."""
        answer = await self._verb("retry", task_id=task_id, nonce=secrets.token_hex(8))
        match answer[0]:
            case b"refused":
                raise InvalidState(f"the task is {text(answer[1])} and cannot be retried: only failed tasks can")
            case b"unknown":
                raise NotFound(f"no task {task_id}")
        return _accepted(answer)

    # ── Verbs of workers ──

    async def claim(
        self,
        worker_id: str,
        nonce: str,
        slots: Sequence[Slot],
        weights: bytes = b"{}",
        rows: Mapping[str, int] | None = None,
        host: str = "",
        able: Able | None = None,
    ) -> list[Claimed]:
        """Tasks that this worker is to run now: one for each slot, or as many of one batch key. The same nonce answers the same tasks.

        `weights`: JSON of project -> share of the queue. `rows`: batch key -> how many the worker can make at once, where it knows.
        Beside the slots come tasks whose finished files lie on this `host`, in slot -1. `able`: what the worker can run; None for all.
        """
        answer = await self._verb(
            "claim",
            worker_id=worker_id,
            nonce=nonce,
            lease_ms=LEASE_MS,
            weights=weights,
            rows=msgspec.json.encode(rows or {}),
            slots=msgspec.json.encode(slots),
            host=host,
            able=b"" if able is None else msgspec.json.encode(able),
        )
        return [Claimed(decode_task(id.decode(), pairs(flat)), RunToken(run.decode()), job, slot) for id, run, slot, job, flat in answer]

    async def report(
        self,
        task_id: TaskId,
        run: RunToken,
        progress: float,
        current_step: str,
        *,
        stage: str = "",
        step: int | None = None,
        steps: int | None = None,
        remaining_ms: int | None = None,
        prefix: str = "",
        host: str = "",
        made_ms: int | None = None,
        keep: bool = False,
        gpu: tuple[float, float] | None = None,
    ) -> None:
        """The task's progress is published, and logged where it grew by half a percent or is to be kept. Raises RunLost.

        `gpu`: what the run has had of a GPU so far, in ms, and how much of one it has now, 0 to 1; None where it has none.
        `prefix`, `host` and `made_ms` are of a run whose files are finished: where it will store them, where they lie till then, and how
        long it worked for them (0 where it found them there).
        """
        answer = await self._verb(
            "report",
            task_id=task_id,
            run=run,
            progress=progress,
            current_step=current_step,
            stage=stage,
            step="" if step is None else step,
            steps="" if steps is None else steps,
            remaining_ms="" if remaining_ms is None else remaining_ms,
            prefix=prefix,
            host=host,
            made_ms="" if made_ms is None else made_ms,
            keep="1" if keep else "",
            gpu_ms="" if gpu is None else gpu[0],
            gpu_share="" if gpu is None else gpu[1],
            lease_ms=LEASE_MS,
        )
        _fenced(answer, task_id)

    async def preview(self, task_id: TaskId, run: RunToken, jpeg: bytes) -> None:
        """Whoever watches the task sees the picture; it is kept nowhere. Raises RunLost."""
        image = b"data:image/jpeg;base64," + base64.b64encode(jpeg)
        _fenced(await self._scripts["preview"]((), task_id=task_id, run=run, image=image), task_id)

    async def watched(self, task_id: TaskId) -> bool:
        """Whether anybody watches the task just now."""
        channel = self.keys["events"] + task_id
        ((_, watchers),) = await self.redis.pubsub_numsub(channel)
        return bool(watchers)

    async def complete(self, task_id: TaskId, run: RunToken, result: StoredResult, cms: str = "") -> None:
        """The result is committed and its deliveries are in the outbox, one to the CMS where `cms` is its address. Raises RunLost."""
        _fenced(await self._verb("complete", task_id=task_id, run=run, result=msgspec.json.encode(result), cms=cms), task_id)

    async def fail(self, task_id: TaskId, run: RunToken, error: str, error_code: str) -> None:
        """The task has failed for good. Raises RunLost."""
        _fenced(await self._verb("fail", task_id=task_id, run=run, error=error, error_code=error_code), task_id)

    async def requeue(
        self,
        task_id: TaskId,
        run: RunToken,
        counts: Counts,
        limit: int,
        delay_ms: int,
        error: str,
        error_code: str,
        *,
        exit_code: int | None = None,
        stage: str | None = None,
    ) -> TaskStatus:
        """The task waits again, or has failed where its budget is used up: which. Raises RunLost."""
        answer = await self._verb(
            "requeue",
            task_id=task_id,
            run=run,
            counts=counts,
            limit=limit,
            delay_ms=delay_ms,
            error=error,
            error_code=error_code,
            exit_code="" if exit_code is None else exit_code,
            stage=stage or "",
        )
        return TaskStatus(_fenced(answer, task_id))

    async def renew(
        self,
        worker_id: str,
        heartbeat: Sequence[WorkerStatus],
        runs: Iterable[tuple[TaskId, RunToken]],
        *,
        has_gpu: bool,
        able: Able | None = None,
    ) -> tuple[list[tuple[TaskId, RunToken]], list[tuple[TaskId, RunToken]]]:
        """The leases of these runs hold for another `LEASE_MS`. Returns the runs that are lost, and tasks held without being named."""
        lost, unmentioned = await self._verb(
            "renew",
            [part for run in runs for part in run],
            worker_id=worker_id,
            lease_ms=LEASE_MS,
            heartbeat=msgspec.json.encode(heartbeat),
            has_gpu=int(has_gpu),
            able=b"" if able is None else msgspec.json.encode(able),
        )
        return _runs(lost), _runs(unmentioned)

    async def leave(self, worker_id: str) -> None:
        """The worker is no longer listed."""
        await self._scripts["leave"]((), worker_id=worker_id)  # nothing is lost where its caller has no time for it

    async def tidy(self) -> Tidied:
        """Act on dead leases, due retries and missed deadlines; log entries of lists that scripts have dropped meanwhile."""
        reaped, due, past_deadline, dropped = await self._verb(
            "tidy", list(Kind), batch=100, silences_limit=SILENCES_LIMIT, outage_ms=OUTAGE_MS, quiet_ms=QUIET_MS, forget_ms=FORGET_MS
        )
        if dropped:
            entries = [text(each) for each in dropped]
            log.warning(
                "entries_dropped",
                entries=entries,
                cure="their tasks have no record, or do not belong there; `movieq doctor --repair` shows what else is inconsistent",
            )
        return Tidied(reaped, due, past_deadline)

    # ── Retention ──

    async def take_turn(self, worker_id: str, turn_ms: int) -> bool:
        """Give this worker the turn to delete what is over, unless another has it; 0 ends its turn. Return whether it has the turn now."""
        return bool(await self._verb("take_turn", worker_id=worker_id, turn_ms=turn_ms))

    async def sweep(self, age_s: float, batch: int = 25) -> tuple[int, list[TaskId]]:
        """Forget tasks that ended so long ago; return how many, and those whose record was damaged.

        Where these are `batch`, there may be more. The default takes Redis about a millisecond.
        """
        count, damaged = await self._verb("sweep", age_ms=int(age_s * 1000), batch=batch)
        return count, [TaskId(task_id.decode(errors="replace")) for task_id in damaged]

    async def retire(self, age_s: float, batch: int = 200) -> int:
        """List files of results committed so long ago for deletion; return how many results. Where these are `batch`, there may be more."""
        return cast("int", await self._verb("retire", age_ms=int(age_s * 1000), batch=batch))

    async def memory(self) -> Memory | None:
        """Return how Redis's memory is; None where its user may not ask."""
        try:
            facts = await awaited(self.redis.info("memory"))
        except NoPermissionError:
            return None
        return Memory(int(facts["used_memory"]), int(facts.get("maxmemory", 0)), facts.get("maxmemory_policy", ""))

    async def check_write(self) -> None:
        """Write to Redis as a submit does. Raises redis's error where it refuses."""
        await self._scripts["write_check"]((), expires_ms=10_000)

    async def repair(self, task_id: TaskId, lists: Sequence[str], *, apply: bool) -> list[str]:
        """Return what is inconsistent between a task and the `lists` that name it, mended where `apply` is set."""
        return [text(each) for each in await self._verb("repair", lists, task_id=task_id, apply="1" if apply else "")]

    async def recount(self, *, apply: bool) -> list[str]:
        """Return which counters differ from what they count, mended where `apply` is set."""
        return [text(each) for each in await self._verb("recount", apply="1" if apply else "")]

    # ── Reads ──

    async def task(self, task_id: TaskId) -> Task | None:
        """The task; None where there is none."""
        flat = await self._connection.call("HGETALL", self.keys["task"] + task_id)
        return decode_task(task_id, pairs(flat)) if flat else None

    async def made_before(self, fingerprint: str) -> Task | None:
        """The task that made this last; None where there is none (any more)."""
        task_id = await self._connection.call("GET", self.keys["made"] + fingerprint)
        return await self.task(TaskId(text(task_id))) if task_id else None

    async def position(self, task: Task) -> int | None:
        """The task's place in its project's queue, from 1; None while it does not wait."""
        rank = await self._connection.call("ZRANK", f"{self.keys['waiting']}{task.lane or task.kind}:{task.project_id}", task.task_id)
        return None if rank is None else rank + 1

    async def positions(self, tasks: Sequence[Task]) -> list[int | None]:
        """The same of many."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for task in tasks:
                pipe.zrank(f"{self.keys['waiting']}{task.lane or task.kind}:{task.project_id}", task.task_id)
            return [None if rank is None else rank + 1 for rank in await pipe.execute()]

    async def page(
        self, project_id: ProjectId, status: TaskStatus | None, task_type: TaskType | None, page: int, limit: int
    ) -> tuple[list[Task], int]:
        """A page of a project's tasks, newest first, and how many there are. Cost: O(log n + limit), two round trips."""
        key = f"{self.keys['index']}{project_id}|{status or ''}|{task_type or ''}"
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zcard(key)
            pipe.zrevrange(key, (page - 1) * limit, page * limit - 1)
            total, ids = await pipe.execute()
        return await self.tasks([text(task_id) for task_id in ids]), total

    async def project(self, project_id: ProjectId) -> Project | None:
        """The project and how many of its tasks are in each state; None before its first task."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.zscore(self.keys["projects"], project_id)
            for status in STATES:
                pipe.zcard(f"{self.keys['index']}{project_id}|{status}|")
            pipe.hget(self.keys["gpu_ms"], project_id)
            created, *counts, gpu_ms = await pipe.execute()
        if created is None:
            return None
        return Project(project_id, utc(created), dict(zip(STATES, counts, strict=True)), round(number(gpu_ms) / 1000, 3))

    async def active(
        self, project_id: ProjectId, task_types: Collection[TaskType], statuses: Collection[TaskStatus], limit: int
    ) -> list[tuple[Task, int | None]]:
        """The project's tasks that run, and then those that wait, the oldest of each first, with their places in the queue.

        At most `limit`, and of these types and states alone where there are any.
        """
        wanted = [status for status in (TaskStatus.PROCESSING, TaskStatus.QUEUED) if not statuses or status in statuses]
        async with self.redis.pipeline(transaction=False) as pipe:
            for status in wanted:
                for task_type in task_types or ("",):
                    pipe.zrange(f"{self.keys['index']}{project_id}|{status}|{task_type}", 0, limit - 1, withscores=True)
            found = await pipe.execute()
        width = len(task_types) or 1
        ids = [
            text(task_id)
            for start in range(0, len(found), width)
            for task_id, _ in sorted(itertools.chain(*found[start : start + width]), key=lambda pair: pair[1])
        ]
        tasks = await self.tasks(ids[:limit])
        return list(zip(tasks, await self.positions(tasks), strict=True))

    async def queue_sizes(self) -> dict[Kind, int]:
        """How many tasks wait in each of the three queues."""
        lanes = await self._lanes()
        async with self.redis.pipeline(transaction=False) as pipe:
            for of in itertools.chain(*lanes.values()):
                pipe.zcard(self.keys["waiting"].encode() + of)
            counts = iter(await pipe.execute())
        sizes = {kind: sum(itertools.islice(counts, len(of_kind))) for kind, of_kind in lanes.items()}
        return {kind: sizes[kind] for kind in Kind}

    async def _lanes(self) -> dict[str, list[bytes]]:
        """Return the lanes of each kind: its own, and those of tasks that some worker could not run, even of damaged ones.

        The kinds are those of this version, and then those of others that had tasks.
        """
        others = {text(kind) for kind in await awaited(self.redis.smembers(self.keys["kinds"]))}
        kinds = [*Kind, *sorted(others - set(Kind))]
        async with self.redis.pipeline(transaction=False) as pipe:
            for kind in kinds:
                pipe.smembers(self.keys["lanes"] + kind)
            return {kind: [kind.encode(), *sorted(found)] for kind, found in zip(kinds, await pipe.execute(), strict=True)}

    async def astray(self) -> int:
        """Return how many tasks are counted as queued and wait in no queue: keys were deleted by hand, or a backup was incomplete."""
        lanes = itertools.chain(*(await self._lanes()).values())
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hget(self.keys["totals"], TaskStatus.QUEUED)
            pipe.zcard(self.keys["delayed"])
            for of in lanes:
                pipe.zcard(self.keys["waiting"].encode() + of)
            queued, *waiting = await pipe.execute()
        return max(0, int(queued) - sum(waiting)) if queued and queued.isdigit() else 0

    async def stranded(self, workers: Sequence[WorkerStatus]) -> list[Stranded]:
        """Return the lanes with waiting tasks that none of these workers can run."""
        lanes = list(itertools.chain(*(await self._lanes()).values()))
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.keys["abilities"])
            for of in lanes:
                pipe.zcard(self.keys["waiting"].encode() + of)
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

    async def queues(self) -> list[TaskQueue]:
        """The three queues. Runs whose lease is over count as waiting, so that an autoscaler sees them."""
        lanes = await self._lanes()
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            (now_s, micros), *_ = await pipe.execute()
            now_ms = now_s * 1000 + micros // 1000
            for kind in Kind:
                pipe.zcount(self.keys["running"] + kind, "-inf", now_ms)
                pipe.zcard(self.keys["running"] + kind)
                pipe.hmget(self.keys["priorities"] + kind, [1, 2, 3])
                pipe.lrange(self.keys["claim_times"] + kind, 0, 99)
                for of in lanes[kind]:
                    pipe.zcard(self.keys["waiting"].encode() + of)
                    pipe.zrange(self.keys["waiting"].encode() + of, 0, 0, withscores=True)
            answers = iter(await pipe.execute())
        found = []
        for kind in Kind:
            dead, running, priorities, claims = itertools.islice(answers, 4)
            found.append(_queue(kind, now_ms, dead, running, priorities, claims, list(itertools.islice(answers, 2 * len(lanes[kind])))))
        return found

    async def totals(self, projects: Iterable[str] | None) -> dict[TaskStatus, int]:
        """How many tasks are in each state: of these projects, or of all for None."""
        if projects is None:
            found = await self._connection.call("HMGET", self.keys["totals"], *STATES)
            return {status: int(number(count)) for status, count in zip(STATES, found, strict=True)}
        sums = dict.fromkeys(STATES, 0)
        async with self.redis.pipeline(transaction=False) as pipe:
            for project in projects:
                for status in STATES:
                    pipe.zcard(f"{self.keys['index']}{project}|{status}|")
            for place, count in enumerate(await pipe.execute()):
                sums[STATES[place % len(STATES)]] += count
        return sums

    async def average_durations_s(self) -> dict[TaskType, float]:
        """How long completed tasks of each type took, on average over all that ever completed."""
        sums = {text(key): number(value) for key, value in pairs(await self._connection.call("HGETALL", self.keys["sums"])).items()}
        return {each: sums.get(f"{each} ms", 0) / sums[f"{each} tasks"] / 1000 for each in TaskType if sums.get(f"{each} tasks")}

    async def gpu_seconds(self, projects: Collection[str] | None) -> float:
        """What runs that ended had of GPUs: those of these projects, or all for None."""
        whose = [""] if projects is None else list(projects)
        found = await self._connection.call("HMGET", self.keys["gpu_ms"], *whose) if whose else []
        return round(sum(map(number, found)) / 1000, 3)

    async def passed_over(self) -> int:
        """How often a task was claimed before an older one because its model was loaded."""
        return int(number(await self._connection.call("HGET", self.keys["sums"], "claims passed")))

    async def dead_letters(self, count: int = 100, projects: Collection[str] | None = None) -> tuple[list[DeadLetter], int]:
        """The latest dead letters, of these projects where any are named, and how many there are."""
        async with self.redis.pipeline(transaction=False) as pipe:
            if projects is None:
                pipe.zrevrange(self.keys["dead"], 0, count - 1, withscores=True)
                pipe.zcard(self.keys["dead"])
                found, total = await pipe.execute()
            else:
                for project_id in projects:  # what a project has among them: when each was given up
                    pipe.zinter({self.keys["dead"]: 1, f"{self.keys['index']}{project_id}|{TaskStatus.FAILED}|": 0}, withscores=True)
                all_found = sorted(itertools.chain(*await pipe.execute()), key=lambda letter: letter[1], reverse=True)
                found, total = all_found[:count], len(all_found)
            for task_id, _ in found:
                pipe.hgetall(self.keys["task"] + text(task_id))
                pipe.get(self.keys["job"] + text(task_id))
            facts = await execute_tolerantly(pipe)
        letters = [_dead_letter(text(id), at_ms, facts[2 * n], facts[2 * n + 1]) for n, (id, at_ms) in enumerate(found) if facts[2 * n]]
        return letters, total

    async def drop_dead_letter(self, task_id: TaskId) -> bool:
        """The task is no longer a dead letter, and stays failed; False where it was none."""
        return bool(await self._connection.call("ZREM", self.keys["dead"], task_id))

    async def workers(self) -> list[WorkerStatus]:
        """The rows of every worker's last heartbeat; those of a worker not heard of for 15 s are offline."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.keys["workers"])
            pipe.zrange(self.keys["heartbeat_times"], 0, -1, withscores=True)
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

    async def grant(self, key_hash: str) -> Grant | None:
        """What the API key of this hash may; None for an unknown one."""
        blob = await self._connection.call("HGET", self.keys["keys"], key_hash)
        return None if blob is None else decode_grant(blob)

    async def add_grant(self, key_hash: str, grant: Grant) -> None:
        """The API key of this hash may do this."""
        await awaited(self.redis.hset(self.keys["keys"], mapping={key_hash: msgspec.msgpack.encode(grant)}))

    async def grants(self) -> dict[str, Grant]:
        """Every API key that is kept in Redis, by its hash."""
        found = await awaited(self.redis.hgetall(self.keys["keys"]))
        return {text(key_hash): grant for key_hash, blob in found.items() if (grant := decode_grant(blob)) is not None}

    async def revoke(self, key_hash: str) -> bool:
        """The API key of this hash may do nothing any more; False where there was none. API processes notice within five seconds."""
        return bool(await awaited(self.redis.hdel(self.keys["keys"], key_hash)))

    async def tasks(self, ids: Sequence[str]) -> list[Task]:
        """Those of these tasks that there are."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.hgetall(self.keys["task"] + task_id)
            return [decode_task(task_id, fields) for task_id, fields in zip(ids, await execute_tolerantly(pipe), strict=True) if fields]

    async def had_gpu(self) -> bool:
        """Whether a GPU worker was heard of in the last 30 days."""
        return bool(await self._connection.call("EXISTS", self.keys["gpu"]))

    # ── The log ──

    async def log_after(self, log: str, after: str | None, count: int = 500) -> list[Logged]:
        """The next entries of a log (of a task's id, or `project:PROJECT`) after an id, oldest first; from the beginning for None.

        Entries that cannot be read are passed over.
        """
        found: list[Logged] = []
        while (asked := count - len(found)) > 0:
            entries = await self._connection.call("XRANGE", self.keys["log"] + log, f"({after}" if after else "-", "+", "COUNT", asked)
            found += [entry for id, fields in entries if (entry := decode_logged(id, pairs(fields))) is not None]
            if len(entries) < asked:
                break
            after = entries[-1][0].decode()
        return found

    async def log_state(self, log: str) -> LogState:
        """What the log holds."""
        try:
            info = pairs(await self._connection.call("XINFO", "STREAM", self.keys["log"] + log))
        except ResponseError as error:
            if "no such key" in str(error):
                return LogState(None, None, False)
            raise
        first, last = (info[name] and info[name][0].decode() for name in (b"first-entry", b"last-entry"))
        return LogState(first, last, info[b"entries-added"] > info[b"length"])

    # ── The outbox ──

    async def begin(self, delivery_id: str) -> Delivery | Literal["wait"] | None:
        """The facts of a delivery that is being tried: from here on it says what it says.

        "wait" for a webhook while one before it, of the same task, is on its way; None where there is none (any more).
        """
        answer = await self._verb("begin", delivery_id=delivery_id)
        return "wait" if answer == [b"wait"] else decode_delivery(delivery_id, pairs(answer))

    async def delivered(
        self, delivery_id: str, state: DeliveryState, tries: int, status: int | None, problem: str, media_id: str | int | None = None
    ) -> str | int | None:
        """What came of a try is noted, and what waited for its end is due; returns the CMS's id that the task's result has now."""
        answer = await self._verb(
            "delivered",
            delivery_id=delivery_id,
            state=state,
            tries=tries,
            status="" if status is None else status,
            problem=problem,
            media_id="" if media_id is None else msgspec.json.encode(media_id),
        )
        return msgspec.json.decode(answer, type=str | int) if answer else None

    async def resend(self, task_id: TaskId, delivery_id: str) -> None:
        """The delivery is tried again, now, with all its tries. Raises NotFound."""
        if await self._verb("resend", task_id=task_id, delivery_id=delivery_id) == b"unknown":
            raise NotFound(f"task {task_id} has no delivery {delivery_id}")

    async def doubt(self, delivery_id: str, doubt: bool, media_id: str | int | None = None) -> None:
        """Noted: whether a document may have been made that nobody heard of, and the one that was."""
        async with self.redis.pipeline(transaction=True) as pipe:
            if media_id is not None:
                pipe.hset(self.keys["delivery"] + delivery_id, "media_id", msgspec.json.encode(media_id).decode())
            if doubt:
                pipe.hset(self.keys["delivery"] + delivery_id, "doubt", "1")
            else:
                pipe.hdel(self.keys["delivery"] + delivery_id, "doubt")
            pipe.expire(self.keys["delivery"] + delivery_id, DELIVERY_KEPT_S)
            await pipe.execute()

    async def deliveries(self, task_id: TaskId) -> list[tuple[str, Delivery, float | None]]:
        """The deliveries of a task, the oldest first: id, facts, and when the next try is due (ms)."""
        stored = await awaited(self.redis.hget(self.keys["task"] + task_id, "deliveries")) or b""
        count = int(stored) if stored.isdigit() and len(stored) < 5 else 0  # else it is damaged
        ids = [f"{task_id}-{number}" for number in range(1, count + 1)]
        async with self.redis.pipeline(transaction=False) as pipe:
            for delivery_id in ids:
                pipe.hgetall(self.keys["delivery"] + delivery_id)
            hashes = [found or {} for found in await execute_tolerantly(pipe)]
            for delivery_id, fields in zip(ids, hashes, strict=True):
                pipe.zscore(self.keys["deliveries"], fields.get(b"job", delivery_id))
            due = await pipe.execute()
        found = zip(ids, map(decode_delivery, ids, hashes), due, strict=True)
        return [(id, delivery, at_ms) for id, delivery, at_ms in found if delivery is not None]

    async def task_data(self, task_id: TaskId) -> dict[str, Any]:
        """What the task was submitted with; empty where that is gone."""
        return decode_task_data(await self.redis.get(self.keys["job"] + task_id))

    # ── The rest ──

    async def signing_secret(self) -> bytes:
        """The secret of signed urls: made by whoever asks first, kept in Redis."""
        while (secret := await self.redis.get(self.keys["secret"])) is None:  # a server that takes no writes just now has one already
            await self.redis.set(self.keys["secret"], secrets.token_bytes(32), nx=True)
        return cast("bytes", secret)

    async def add_upload(self, upload_id: str, upload: Upload, prefix: str) -> None:
        """The upload can be referred to, and its file is deleted, seven days from now."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.set(self.keys["upload"] + upload_id, msgspec.msgpack.encode(upload), ex=UPLOAD_KEPT_S)
            pipe.time()
            _, (seconds, _) = await pipe.execute()
        await self.redis.zadd(self.keys["orphans"], {prefix: (seconds + UPLOAD_KEPT_S) * 1000})

    async def upload(self, upload_id: str) -> Upload | None:
        """The upload; None where there is none (any more)."""
        blob = await self._connection.call("GET", self.keys["upload"] + upload_id)
        return None if blob is None else msgspec.msgpack.decode(blob, type=Upload)

    async def add_orphan(self, prefix: str) -> None:
        """What lies under the prefix is deleted in a minute, unless it is committed."""
        seconds, _ = await self.redis.time()
        await self.redis.zadd(self.keys["orphans"], {prefix: (seconds + ORPHAN_S) * 1000})

    async def due_orphans(self, count: int = 100, skip: int = 0) -> list[str]:
        """Return storage prefixes to delete now, after the first `skip`: never that of a committed result, whoever listed it."""
        seconds, micros = await self.redis.time()
        found = await self.redis.zrangebyscore(self.keys["orphans"], "-inf", seconds * 1000 + micros // 1000, skip, count)
        committed = await self.redis.zmscore(self.keys["media"], found) if found else []
        for prefix, at_ms in zip(found, committed, strict=True):
            if at_ms is not None:
                await self.redis.zrem(self.keys["orphans"], prefix)
        return [prefix.decode(errors="surrogateescape") for prefix, at_ms in zip(found, committed, strict=True) if at_ms is None]

    async def forget_orphans(self, prefixes: Sequence[str]) -> None:
        """Take prefixes that have been deleted off the list."""
        if prefixes:
            await self.redis.zrem(self.keys["orphans"], *(prefix.encode(errors="surrogateescape") for prefix in prefixes))


def _queue(
    kind: Kind, now_ms: int, dead: int, running: int, priorities: list[bytes | None], claims: list[bytes], lanes: list[Any]
) -> TaskQueue:
    """Return the row of a queue. `lanes`: for each lane in turn how many tasks wait, and the oldest with its time."""
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


def _accepted(answer: Sequence[Any]) -> Accepted:
    code, task_id, created_at_ms, position, estimate_ms, warnings = answer
    return Accepted(TaskId(task_id.decode()), created_at_ms, position, estimate_ms, decode_warnings(warnings), code == b"replayed")


def _runs(flat: Sequence[bytes]) -> list[tuple[TaskId, RunToken]]:
    return [(TaskId(task_id.decode()), RunToken(run.decode())) for task_id, run in pairs(flat).items()]


def _fenced(answer: bytes, task_id: TaskId) -> str:
    if answer == b"lost":
        raise RunLost(f"task {task_id} was cancelled, ended or given to another run")
    return answer.decode()
