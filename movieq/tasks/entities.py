"""The records that the queue returns: tasks, projects, queues, workers, uploads and deliveries.

Times are milliseconds since the epoch by the clock of Redis and carry `_ms`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from movieq.tasks.results import Result, StoredResult
from movieq.tasks.states import EventType, Kind, Priority, ProjectId, RunToken, TaskId, TaskStatus

UPLOAD_BYTES: Final = 25 * 1024 * 1024


_MOST: Final = 10**15
Whole = Annotated[int, Meta(ge=-_MOST, le=_MOST)]
Real = Annotated[float, Meta(ge=-_MOST, le=_MOST)]
"""Numbers in a record. Larger ones, infinite ones and NaN count as damage, in the Lua scripts too."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as the store holds it. Fields that the hash lacks have their defaults."""

    task_id: TaskId
    project_id: ProjectId
    task_type: str
    kind: str
    engine: str
    model: str
    shape: str
    status: TaskStatus
    priority: Whole
    created_at_ms: Whole
    estimate_ms: Whole
    max_ms: Whole
    lane: str = ""
    """The lane in which it waits; empty for the main lane of its kind."""
    flow: str = ""
    """The flow of the key that submitted it, if that may use all projects; empty for the flow of its project."""
    batch: str = ""
    attempt: Whole = 0
    run: RunToken | None = None
    worker_id: str | None = None
    progress: Real = 0.0
    current_step: str = "waiting_in_queue"
    stage: str | None = None
    step: Whole | None = None
    steps: Whole | None = None
    remaining_ms: Whole | None = None
    gpu_ms: Real = 0.0
    started_at_ms: Whole | None = None
    ended_at_ms: Whole | None = None
    last_event_id: str | None = None
    result: StoredResult | None = None
    error: str | None = None
    error_code: str | None = None
    retryable: bool | None = None
    metadata: dict[str, Any] = {}
    warnings: str = "[]"
    """The warnings of its receipt, in JSON."""
    callback_url: str | None = None
    previous_state: TaskStatus | None = None


class Project(msgspec.Struct, frozen=True):
    """A project, which exists from its first task on. `gpu_seconds` is the sum over its ended runs.

    `record_bytes` is what the records of its tasks take in Redis, `upload_bytes` what its uploads take.
    """

    project_id: ProjectId
    created_at: datetime
    tasks: dict[TaskStatus, int]
    gpu_seconds: float
    record_bytes: int
    upload_bytes: int


class TaskQueue(msgspec.Struct, frozen=True):
    """The state of a queue, for operators and autoscalers."""

    queue_name: Kind
    pending_count: int
    priority_distribution: dict[Priority, int]
    running: int
    oldest_waiting_seconds: float
    estimated_wait_time: int


class WorkerState(StrEnum):
    """`busy`: runs tasks; `active`: runs tasks and has room for more; `offline`: sent no heartbeat for 15 s."""

    BUSY = "busy"
    ACTIVE = "active"
    IDLE = "idle"
    OFFLINE = "offline"


class ModelSwaps(msgspec.Struct, frozen=True, kw_only=True):
    """How often models were loaded and unloaded since the engine process started."""

    loads: int = 0
    """Loads from disk."""
    returns: int = 0
    """Loads from host memory."""
    parkings: int = 0
    """Moves to host memory."""
    drops: int = 0
    """Removals from memory."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process of a worker, for a GPU or for the CPU."""

    worker_id: str
    worker_type: Annotated[str, Meta(description="gpu_heavy, gpu_medium or cpu_intensive; newer versions may have others")]
    status: Annotated[str, Meta(description="busy, active, idle or offline; newer versions may have others")]
    current_task_id: TaskId | None
    gpu_utilization: float
    memory_usage: int
    tasks_completed: int
    last_heartbeat: datetime
    queues: list[str]
    device: str
    memory_total: int
    temperature: float | None
    power: float | None
    idle_gap: float | None = None
    """Seconds for which the device was idle between two tasks while the second was waiting: median of the last thousand."""
    models: list[str]
    models_parked: list[str] = []
    model_swaps: ModelSwaps = ModelSwaps()
    host: str
    version: str
    problem: str | None = None
    """What is wrong with the machine or the device. The worker takes no tasks until this is None."""

    @property
    def live(self) -> bool:
        """Whether the worker sent a heartbeat recently."""
        return self.status != WorkerState.OFFLINE


class ProcessingProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The data of an event. Terminal events have `result`, or `error` and `error_code`."""

    task_id: TaskId
    project_id: ProjectId
    type: EventType
    time: datetime
    attempt: int
    status: TaskStatus
    progress: float
    current_step: str
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    estimated_remaining: float | None = None
    result: Result | None = None
    error: str | None = None
    error_code: str | None = None
    task_type: str | None = None


class Upload(msgspec.Struct, frozen=True):
    """The record of an upload."""

    project_id: ProjectId
    key: str
    size_bytes: int
    media_type: str


class DeliveryKind(StrEnum):
    """The receiver of a delivery: the task's `callback_url`, or the CMS."""

    WEBHOOK = "webhook"
    PAYLOAD = "payload"


class DeliveryState(StrEnum):
    """`failed`: the receiver refused it permanently, or all tries failed."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the outbox: the state of the task when it ended, and the progress of the delivery.

    For the CMS: `media_id` is the document that was created; `doubt` says that a try may have created another without getting its answer.
    `held_back_ms` is not stored: a try that began gets it if nothing may be sent for this long, because the host does not answer.
    """

    kind: DeliveryKind = DeliveryKind.WEBHOOK
    type: EventType
    state: DeliveryState
    url: str
    task_id: TaskId
    project_id: ProjectId
    task_type: str
    status: TaskStatus
    at_ms: Whole
    ended_at_ms: Whole
    started_at_ms: Whole | None = None
    result: StoredResult | None = None
    error: str | None = None
    error_code: str | None = None
    metadata: dict[str, Any] = {}
    tries: Whole = 0
    last_status: Whole | None = None
    last_problem: str | None = None
    media_id: str | int | None = None
    doubt: bool = False
    resent_at_ms: Whole = 0
    held_back_ms: Whole = 0


class DeadLetter(msgspec.Struct, frozen=True):
    """A task that failed because its worker or engine process died too often while running it."""

    task_id: TaskId
    project_id: ProjectId
    task_type: str
    failed_at: datetime
    attempt: int
    error: str | None
    last_stage: str | None
    exit_code: int | None
    task_data: dict[str, Any]
