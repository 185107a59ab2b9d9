"""The JSON shapes of the API: requests, answers, events and webhooks. Times are RFC 3339 in UTC, durations seconds."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from movieq.tasks.entities import DeadLetter, Project, TaskQueue, WorkerStatus
from movieq.tasks.results import Result
from movieq.tasks.states import Kind, ProjectId, TaskId, TaskStatus, TaskType

EVENTS_URL_S: Final = 24 * 3600


PROJECT_PATTERN: Final = r"^[a-zA-Z0-9_-]{1,100}(?!\n)$"  # Python's $ also matches before a last line break


class Deadline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Past `start_by` an unstarted task fails, past `finish_by` any."""

    start_by: Annotated[datetime, Meta(tz=True)] | None = None
    finish_by: Annotated[datetime, Meta(tz=True)] | None = None


class SubmitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /tasks/submit`."""

    project_id: Annotated[str, Meta(pattern=PROJECT_PATTERN)]
    task_type: str
    task_data: dict[str, Any]
    priority: Annotated[int, Meta(ge=1, le=3)] | None = None
    callback_url: Annotated[str, Meta(max_length=2048)] | None = None
    metadata: dict[str, Any] | None = None
    deadline: Deadline | None = None


class Receipt(msgspec.Struct, frozen=True):
    """The task is accepted: from here on it is never lost."""

    task_id: TaskId
    status: TaskStatus
    project_id: ProjectId
    estimated_duration: int
    queue_position: int
    created_at: datetime
    events_url: str
    status_url: str
    warnings: list[str]


class TaskState(msgspec.Struct, frozen=True):
    """The status of a task; the `snapshot` of its stream has `last_event_id` besides.

    `gpu_seconds`: how long its runs had a GPU, a batch's time shared among its tasks; 0 on a CPU.
    """

    task_id: TaskId
    project_id: ProjectId
    task_type: str
    status: TaskStatus
    progress: float
    current_step: str
    result: Result | None
    error: str | None
    error_code: str | None
    retryable: bool | None
    started_at: datetime | None
    completed_at: datetime | None
    created_at: datetime
    processing_time: float | None
    gpu_seconds: float
    attempt: int
    queue_position: int | None
    estimated_remaining: float | None
    events_url: str


class Snapshot(TaskState, frozen=True):
    """The status that begins a stream; events up to `last_event_id` are history."""

    last_event_id: str | None


class ProjectState(Project, frozen=True):
    """A project as clients see it; the `snapshot` of its stream has more."""

    events_url: str


class ProjectSnapshot(ProjectState, frozen=True):
    """What begins the stream of a project; events up to `last_event_id` are in it.

    `active`: the tasks that run, and then those that wait, the oldest first, at most a hundred that the filters of the stream let through.
    """

    active: list[TaskState]
    last_event_id: str | None


class CancelAnswer(msgspec.Struct, frozen=True):
    """The task is cancelled; said again, the same."""

    task_id: TaskId
    status: TaskStatus
    previous_state: TaskStatus
    cancelled_at: datetime
    message: str


class TaskRow(msgspec.Struct, frozen=True):
    """A line of a project's page."""

    task_id: TaskId
    task_type: str
    status: TaskStatus
    created_at: datetime
    completed_at: datetime | None
    result_url: str | None
    progress: float


class Pagination(msgspec.Struct, frozen=True):
    """Where in the list a page is; pages count from 1."""

    page: int
    limit: int
    total: int
    total_pages: int


class TaskPage(msgspec.Struct, frozen=True):
    """A page of a project's tasks, newest first."""

    tasks: list[TaskRow]
    pagination: Pagination


class WorkersAnswer(msgspec.Struct, frozen=True):
    """Every child of every worker heard of in the last five minutes."""

    workers: list[WorkerStatus]
    total_workers: int
    active_workers: int
    gpu_utilization: float


class HealthAnswer(msgspec.Struct, frozen=True):
    """`degraded`: tasks wait that no live worker can run, Redis refuses writes, or storage cannot be used; `unhealthy`: Redis is away.

    `problems` says which of these it is, and what to do.
    """

    status: str
    timestamp: datetime
    version: str
    redis_status: str
    worker_count: int
    queue_sizes: dict[Kind, int]
    uptime: float
    problems: list[str]


class LiveAnswer(msgspec.Struct, frozen=True):
    """The process answers; nothing else was checked."""

    status: str
    timestamp: datetime
    version: str
    uptime: float


class CheckName(StrEnum):
    """What must work for a task to be accepted and run."""

    REDIS = "redis"
    STORAGE = "storage"
    WORKER = "worker"


class Check(msgspec.Struct, frozen=True):
    """Whether one of them worked within the last second. `message` says what is wrong and what to do; it is empty where nothing is."""

    name: CheckName
    ok: bool
    message: str


class ReadyAnswer(msgspec.Struct, frozen=True):
    """`ready`, or `not_ready` where a check failed."""

    status: str
    timestamp: datetime
    version: str
    checks: list[Check]


class UploadAnswer(msgspec.Struct, frozen=True):
    """The bytes are kept for seven days; `url` stands for them in task_data of the same project."""

    upload_id: str
    url: str
    size: int
    media_type: str


class DeliveryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How far a delivery is. `url` is without its query; `next_try_at` is null once it was delivered or given up."""

    delivery_id: str
    kind: Annotated[str, Meta(description="webhook or payload; newer versions may have others")]
    type: str
    state: Annotated[str, Meta(description="pending, delivered or failed; newer versions may have others")]
    url: str
    tries: int
    last_status: int | None
    last_problem: str | None
    created_at: datetime
    next_try_at: datetime | None


class DeliveriesAnswer(msgspec.Struct, frozen=True):
    """What of a task was told to the world, or is to be, the oldest first."""

    deliveries: list[DeliveryAnswer]


class DeadLettersAnswer(msgspec.Struct, frozen=True):
    """The dead letters, latest first."""

    dead_letters: list[DeadLetter]
    total: int


class QueuesAnswer(msgspec.Struct, frozen=True):
    """The three queues."""

    queues: list[TaskQueue]


class MetricsAnswer(msgspec.Struct, frozen=True):
    """Over every task that is kept and that the key may see; rates in percent of those that ended, durations in seconds.

    `gpu_seconds`: what runs that ended had of GPUs, also those of tasks that are kept no more. `passed_over`: how often a task went before
    an older one of its project because its model was loaded.
    """

    total_tasks: int
    tasks: dict[TaskStatus, int]
    success_rate: float
    failure_rate: float
    cancellation_rate: float
    average_duration: dict[TaskType, float]
    gpu_seconds: float
    passed_over: int


class Alert(msgspec.Struct, frozen=True):
    """Something that an operator should look at."""

    code: str
    message: str


class TasksHealthAnswer(msgspec.Struct, frozen=True):
    """`healthy`, or `degraded` where there are alerts."""

    status: str
    alerts: list[Alert]


class TaskTypeAnswer(msgspec.Struct, frozen=True):
    """A task type that can be submitted here: the JSON Schema of its task_data, its models, its longest run in seconds."""

    task_type: TaskType
    description: str
    models: list[str]
    default_model: str | None
    max_duration_s: int
    task_data: dict[str, Any]


class TaskTypesAnswer(msgspec.Struct, frozen=True):
    """Every task type of this installation."""

    task_types: list[TaskTypeAnswer]


class FieldError(msgspec.Struct, frozen=True):
    """One of several things that are wrong."""

    path: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error."""

    error: str
    message: str
    timestamp: datetime
    retryable: bool
    errors: list[FieldError] = []


class Webhook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body that is posted to `callback_url`. `taskId`, `event`, `data`, `scene_id` and `video_url` say the same to older receivers."""

    type: str
    timestamp: datetime
    task_id: TaskId
    project_id: ProjectId
    task_type: str
    status: TaskStatus
    result: Result | None
    error: str | None
    error_code: str | None
    processing_time: float | None
    metadata: dict[str, Any]
    taskId: TaskId
    event: str
    data: Result | None
    scene_id: Any = None
    video_url: str | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    cancelled_at: datetime | None = None
