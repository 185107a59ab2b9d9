"""The records of a task and of what belongs to it, as the store returns them.

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
"""Numbers of a record. Those beyond, infinite ones and NaN are damage, to the scripts too."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as the store holds it. Absent fields of the hash take the defaults."""

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
    """The lane that it waits in; '' for its kind's own."""
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
    callback_url: str | None = None
    previous_state: TaskStatus | None = None


class Project(msgspec.Struct, frozen=True):
    """A project, known since its first task. `gpu_seconds`: what all its runs that ended had of GPUs."""

    project_id: ProjectId
    created_at: datetime
    tasks: dict[TaskStatus, int]
    gpu_seconds: float


class TaskQueue(msgspec.Struct, frozen=True):
    """A queue as operators and autoscalers see it."""

    queue_name: Kind
    pending_count: int
    priority_distribution: dict[Priority, int]
    running: int
    oldest_waiting_seconds: float
    estimated_wait_time: int


class WorkerState(StrEnum):
    """`busy`: running; `active`: running and taking more; `offline`: not heard of for 15 s."""

    BUSY = "busy"
    ACTIVE = "active"
    IDLE = "idle"
    OFFLINE = "offline"


class ModelSwaps(msgspec.Struct, frozen=True, kw_only=True):
    """How often models came and went since an engine's process began."""

    loads: int = 0
    """From the disk."""
    returns: int = 0
    """From the host's memory."""
    parkings: int = 0
    """Into the host's memory."""
    drops: int = 0
    """Out of memory."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One child of a worker: a GPU, or the host's CPU."""

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
    """Seconds that the device waited between two tasks, where the second was there: the median of the last thousand."""
    models: list[str]
    models_parked: list[str] = []
    model_swaps: ModelSwaps = ModelSwaps()
    host: str
    version: str
    problem: str | None = None
    """What is wrong with the machine or the device: until that is over it takes no tasks. None while nothing is wrong."""

    @property
    def live(self) -> bool:
        """Whether it was heard from lately."""
        return self.status != WorkerState.OFFLINE


class ProcessingProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The data of an event. Terminal ones carry `result`, or `error` and `error_code`."""

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
    """An upload as Redis holds it."""

    project_id: ProjectId
    key: str
    size_bytes: int
    media_type: str


class DeliveryKind(StrEnum):
    """Whom a delivery is for: the task's `callback_url`, or the CMS."""

    WEBHOOK = "webhook"
    PAYLOAD = "payload"


class DeliveryState(StrEnum):
    """`failed`: the receiver refused for good, or every try was used up."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the outbox: the facts as they were frozen when the task ended, and how far the delivery is.

    Of one for the CMS: `media_id` is the document that was made, `doubt` says that a try may have made another that nobody heard of.
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


class DeadLetter(msgspec.Struct, frozen=True):
    """A task that was given up because its worker or its engine died with it too often."""

    task_id: TaskId
    project_id: ProjectId
    task_type: str
    failed_at: datetime
    attempt: int
    error: str | None
    last_stage: str | None
    exit_code: int | None
    task_data: dict[str, Any]
