"""The verbs that change tasks: one method for each Lua script.

A verb can safely be repeated if its answer was lost: the same call gets the same answer. Every verb except submit, preview, leave and
check_write runs to its end even if its caller is cancelled. Redis errors are raised as `redis.exceptions.RedisError`: the API then answers
503, and a worker waits. Other modules have reads (`queries`), deliveries (`outbox`), uploads and files to delete (`files`), and API keys
(`api_keys`).
"""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, cast

import msgspec

from movieq import logs
from movieq.errors import IdempotencyMismatch, InvalidState, NotFound, QueueFull, QuotaExceeded, RunLost
from movieq.queue.connection import Redis
from movieq.queue.records import Able, decode_task, decode_warnings, pairs, text
from movieq.queue.scripts import load
from movieq.settings import variable
from movieq.tasks.entities import Task, WorkerStatus
from movieq.tasks.results import StoredResult
from movieq.tasks.states import Kind, ProjectId, RunToken, TaskId, TaskStatus, TaskType

RETRIES_LIMIT: Final = 20
"""Times that a failed task may be queued again by a client."""
QUOTA_RETRY_S: Final = 3600
"""`Retry-After` of a project whose task records take as many bytes as they may."""
LEASE_MS: Final = 10_000
"""Length of a lease."""
RENEW_S: Final = 3.0
"""Interval at which a worker renews its leases."""
TIDY_S: Final = 1.0
"""Interval at which each API process calls `tidy`."""
TRIES_LIMIT: Final = 3
"""Runs of a task that may end with a recoverable error; the last of them fails the task."""
DEATHS_LIMIT: Final = 3
"""Runs of a task in which the engine process may die; the last of them makes it a dead letter."""
SILENCES_LIMIT: Final = 10
"""Runs of a task whose lease may expire; the last of them makes it a dead letter."""
OUTAGE_MS: Final = 5_000
"""If `tidy` was not called for this long, Redis or all its clients were away, and no lease expires for `QUIET_MS`."""
QUIET_MS: Final = 12_000
FORGET_MS: Final = 300_000
"""A worker without a heartbeat for this long is removed from the list of workers."""

log = logs.get()


class Budget(StrEnum):
    """The budget of a task that a requeued run counts against."""

    TRIES = "tries"
    DEATHS = "deaths"
    DRAIN = "drain"


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task to submit. `kwargs` is a msgpack map, the keyword arguments of the arq job; `metadata` is JSON. Both are stored unchanged."""

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
    flow: str = ""
    """The flow of its key, as hexadecimal digits; '' for that of its project."""
    batch: str = ""
    """Batch key: tasks with the same key can be rendered together, at most `batch_rows` of them."""
    batch_rows: int = 1
    callback_url: str = ""
    start_by_ms: int | None = None
    finish_by_ms: int | None = None
    warnings: tuple[str, ...] = ()
    idempotency: str = ""
    body_hash: str = ""
    max_queued: int = 0
    max_queued_all: int = 0
    max_bytes: int = 0
    fingerprint: str = ""
    reused: str = ""
    """Id of the completed task whose stored result is reused.

    `reused_result` is that result (JSON), `reused_prefix` the storage prefix of its files, `reuse_within_ms` their highest age (None: any).
    """
    reused_result: bytes = b""
    reused_prefix: str = ""
    reuse_within_ms: int | None = None
    reused_cms: str = ""
    """Address of the CMS collection that gets the reused result."""


class Accepted(msgspec.Struct, frozen=True):
    """An accepted task, as its receipt shows it. `replayed`: the idempotency key had already been used with the same body."""

    task_id: TaskId
    created_at_ms: int
    queue_position: int
    estimate_ms: int
    warnings: list[str]
    replayed: bool


class Slot(msgspec.Struct, frozen=True):
    """A place for a task, or a batch of tasks, in a worker: the kinds that it serves and its loaded models.

    A slot that is not `free` is about to be: it gets tasks, but its worker is not woken by a submit.
    """

    kinds: tuple[str, ...]
    models: tuple[str, ...] = ()
    free: bool = True


class Claimed(msgspec.Struct, frozen=True):
    """A claimed task, which the worker has to run. `job` is arq's job definition (msgpack). Tasks with the same `slot` are a batch.

    A task with a damaged record has the status `unknown`; the worker has to requeue it.
    """

    task: Task
    run: RunToken
    job: bytes
    slot: int


class Tidied(msgspec.Struct, frozen=True):
    """The number of expired leases, due retries and missed deadlines that a call of `tidy` handled."""

    reaped: int
    due: int
    past_deadline: int

    def __bool__(self) -> bool:
        return bool(self.reaped or self.due or self.past_deadline)


class Store:
    """The verbs of an installation's tasks."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.keys = redis.key_names
        self.scripts = load(redis)

    # ── Verbs of clients ──

    async def submit(self, new: NewTask) -> Accepted:
        """Submit a task. It is queued, or completed at once with the stored result of an identical task.

        Raises IdempotencyMismatch, QueueFull, QuotaExceeded.
        """
        arguments = {name: "" if value is None else value for name, value in msgspec.structs.asdict(new).items()}
        arguments["warnings"] = msgspec.json.encode(new.warnings)
        # not shielded from a cancel: a client that disconnected either submits again or no longer wants the task
        answer = await self.scripts["submit"]((), **arguments)
        match answer[0]:
            case b"mismatch":
                raise IdempotencyMismatch("this Idempotency-Key was used with a different body: send the same body, or a new key")
            case b"full" | b"full_all":
                whose, most = (
                    (f"project {new.project_id} has", new.max_queued) if answer[0] == b"full" else ("there are", new.max_queued_all)
                )
                raise QueueFull(
                    f"{whose} {answer[1]} waiting tasks, at most {most} are allowed: try again later",
                    retry_after_s=min(max(1, math.ceil(answer[2] / 1000)), 3600),
                )
            case b"quota":
                raise QuotaExceeded(
                    f"the task records of project {new.project_id} take {answer[1]} bytes, at most {new.max_bytes} are allowed "
                    f"({variable('max_record_mib_per_project')}): wait until ended tasks are deleted ({variable('keep_tasks_days')}), "
                    "or cancel waiting ones",
                    retry_after_s=QUOTA_RETRY_S,
                )
        return _accepted(answer)

    async def cancel(self, task_id: TaskId) -> tuple[TaskStatus, int]:
        """Cancel a task. Return its previous state and the time of the cancel (ms). Raises NotFound, InvalidState."""
        match await self.scripts["cancel"].finish(task_id=task_id):
            case [b"ok", previous, at_ms]:
                return TaskStatus(previous.decode()), at_ms
            case [b"refused", state]:
                raise InvalidState(f"the task is {text(state)} and cannot be cancelled: only queued and processing tasks can")
        raise NotFound(f"no task {task_id}")

    async def retry(self, task_id: TaskId) -> Accepted:
        """Queue a failed task again, with a new budget of tries. Raises NotFound, InvalidState."""
        answer = await self.scripts["retry"].finish(task_id=task_id, nonce=secrets.token_hex(8), limit=RETRIES_LIMIT)
        match answer[0]:
            case b"spent":
                raise InvalidState(f"the task was retried {RETRIES_LIMIT} times, which is the limit: submit it as a new task")
            case b"refused":
                raise InvalidState(f"the task is {text(answer[1])} and cannot be retried: only failed tasks can")
            case b"unknown":
                raise NotFound(f"no task {task_id}")
        return _accepted(answer)

    async def drop_dead_letter(self, task_id: TaskId) -> bool:
        """Remove a task from the dead letters; it stays failed. Return False if it is not a dead letter."""
        return bool(await self.redis.shared.call("ZREM", self.keys["dead"], task_id))

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
        """Claim tasks for a worker: one task or one batch for each slot. A repeated call with the same nonce returns the same tasks.

        `weights`: JSON of project -> share of the queue. `rows`: batch key -> the most tasks that the worker can render together.
        Tasks with finished files on this `host` are returned in addition, as slot -1. `able`: the tasks that the worker can run; None
        for all.
        """
        answer = await self.scripts["claim"].finish(
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
        rendered_ms: int | None = None,
        keep: bool = False,
        gpu: tuple[float, float] | None = None,
    ) -> None:
        """Publish a run's progress. Append it to the event log if it grew by half a percent, or if `keep` is set. Raises RunLost.

        `gpu`: the run's GPU time so far, in ms, and the share of a GPU that it uses now, 0 to 1; None without a GPU. A run with finished
        files also passes `prefix`, the storage prefix for them; `host`, which has them until they are stored; and `rendered_ms`, how long
        it rendered (0 if it found finished files of an earlier run).
        """
        answer = await self.scripts["report"].finish(
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
            rendered_ms="" if rendered_ms is None else rendered_ms,
            keep="1" if keep else "",
            gpu_ms="" if gpu is None else gpu[0],
            gpu_share="" if gpu is None else gpu[1],
            lease_ms=LEASE_MS,
        )
        _fenced(answer, task_id)

    async def preview(self, task_id: TaskId, run: RunToken, jpeg: bytes) -> None:
        """Publish a preview to the watchers of a task, without storing it. Raises RunLost."""
        image = b"data:image/jpeg;base64," + base64.b64encode(jpeg)
        _fenced(await self.scripts["preview"]((), task_id=task_id, run=run, image=image), task_id)

    async def watched(self, task_id: TaskId) -> bool:
        """Return whether the task has a watcher, so that previews are worth rendering."""
        channel = self.keys["events"] + task_id
        ((_, watchers),) = await self.redis.pubsub_numsub(channel)
        return bool(watchers)

    async def complete(self, task_id: TaskId, run: RunToken, result: StoredResult, cms: str = "") -> None:
        """Complete a task with its result, and add its deliveries to the outbox; `cms` is the CMS's address, or empty. Raises RunLost."""
        _fenced(await self.scripts["complete"].finish(task_id=task_id, run=run, result=msgspec.json.encode(result), cms=cms), task_id)

    async def fail(self, task_id: TaskId, run: RunToken, error: str, error_code: str) -> None:
        """Fail a task, without another try. Raises RunLost."""
        _fenced(await self.scripts["fail"].finish(task_id=task_id, run=run, error=error, error_code=error_code), task_id)

    async def requeue(
        self,
        task_id: TaskId,
        run: RunToken,
        budget: Budget,
        limit: int,
        delay_ms: int,
        error: str,
        error_code: str,
        *,
        exit_code: int | None = None,
        stage: str | None = None,
    ) -> TaskStatus:
        """Requeue a task, or fail it if its budget is used up. Return its new state. Raises RunLost."""
        answer = await self.scripts["requeue"].finish(
            task_id=task_id,
            run=run,
            budget=budget,
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
        gpu_bytes: int,
        able: Able | None = None,
    ) -> tuple[list[tuple[TaskId, RunToken]], list[tuple[TaskId, RunToken]]]:
        """Renew the leases of a worker's runs for `LEASE_MS`, and store its heartbeat and the memory of its largest GPU (0: it has none).

        Return the runs that are lost, and the runs that belong to the worker although it did not name them.
        """
        lost, unmentioned = await self.scripts["renew"].finish(
            [part for run in runs for part in run],
            worker_id=worker_id,
            lease_ms=LEASE_MS,
            heartbeat=msgspec.json.encode(heartbeat),
            gpu_bytes=gpu_bytes,
            able=b"" if able is None else msgspec.json.encode(able),
        )
        return _runs(lost), _runs(unmentioned)

    async def leave(self, worker_id: str) -> None:
        """Remove a worker from the list of workers."""
        await self.scripts["leave"]((), worker_id=worker_id)  # not shielded from a cancel: `tidy` would remove the worker later

    async def tidy(self) -> Tidied:
        """Requeue expired leases, queue due retries and fail missed deadlines. Log the invalid entries that scripts have dropped."""
        reaped, due, past_deadline, dropped = await self.scripts["tidy"].finish(
            list(Kind), batch=100, silences_limit=SILENCES_LIMIT, outage_ms=OUTAGE_MS, quiet_ms=QUIET_MS, forget_ms=FORGET_MS
        )
        if dropped:
            entries = [text(each) for each in dropped]
            log.warning(
                "entries_dropped",
                entries=entries,
                cure="the tasks have no record or do not belong in these lists: run `movieq doctor --repair` to find other inconsistencies",
            )
        return Tidied(reaped, due, past_deadline)

    # ── Retention ──

    async def take_turn(self, worker_id: str, turn_ms: int) -> bool:
        """Give this worker the turn to sweep for `turn_ms`, unless another worker has it; 0 ends its turn.

        Return whether it has the turn now.
        """
        return bool(await self.scripts["take_turn"].finish(worker_id=worker_id, turn_ms=turn_ms))

    async def sweep(self, age_s: float, batch: int = 25) -> tuple[int, list[TaskId]]:
        """Delete tasks that ended at least `age_s` ago. Return how many, and which of them had a damaged record.

        If it is `batch`, there may be more. The default batch takes Redis about a millisecond.
        """
        count, damaged = await self.scripts["sweep"].finish(age_ms=int(age_s * 1000), batch=batch)
        return count, [TaskId(task_id.decode(errors="replace")) for task_id in damaged]

    async def retire(self, age_s: float, batch: int = 200) -> int:
        """List the files of results that are at least `age_s` old for deletion. Return how many results; if `batch`, there may be more."""
        return cast("int", await self.scripts["retire"].finish(age_ms=int(age_s * 1000), batch=batch))

    async def check_write(self) -> None:
        """Write to Redis as a submit does. Raises RedisError if Redis refuses the write."""
        await self.scripts["write_check"]((), expires_ms=10_000)

    async def repair(self, task_id: TaskId, lists: Sequence[str], *, apply: bool) -> list[str]:
        """Return the inconsistencies between a task and the `lists` that contain it; repair them if `apply` is set."""
        return [text(each) for each in await self.scripts["repair"].finish(lists, task_id=task_id, apply="1" if apply else "")]

    async def recount(self, *, apply: bool) -> list[str]:
        """Return the counters that are wrong, as sentences; correct them if `apply` is set."""
        return [text(each) for each in await self.scripts["recount"].finish(apply="1" if apply else "")]


def _accepted(answer: Sequence[Any]) -> Accepted:
    code, task_id, created_at_ms, position, estimate_ms, warnings = answer
    return Accepted(TaskId(task_id.decode()), created_at_ms, position, estimate_ms, decode_warnings(warnings), code == b"replayed")


def _runs(flat: Sequence[bytes]) -> list[tuple[TaskId, RunToken]]:
    return [(TaskId(task_id.decode()), RunToken(run.decode())) for task_id, run in pairs(flat).items()]


def _fenced(answer: bytes, task_id: TaskId) -> str:
    if answer == b"lost":
        raise RunLost(f"task {task_id} was cancelled, has ended or belongs to another run")
    return answer.decode()
