"""The JSON shapes of the API: requests, answers, events and webhooks. Times are RFC 3339 in UTC, durations seconds."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from movieq.errors import RequestError
from movieq.tasks.entities import DeadLetter, ProcessingProgress, Project, TaskQueue, WorkerStatus
from movieq.tasks.results import Result
from movieq.tasks.states import EventType, Kind, ProjectId, TaskId, TaskStatus, TaskType

EVENTS_URL_S: Final = 24 * 3600


URL_PATTERN: Final = r"^[Hh][Tt][Tt][Pp][Ss]?://[^/?#@\\\x00-\x20\x7f]+([/?#][^\\\x00-\x1f\x7f]*)?$"
"""What a JSON Schema says of a url that may be called; `movieq.fetch.guard` decides."""
PROJECT_PATTERN: Final = r"^[a-zA-Z0-9_-]{1,100}(?!\n)$"  # Python's $ also matches before a last line break
PROJECT_RULE: Final = "1 to 100 ASCII letters, digits, hyphens or underscores"


class Deadline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task that has not started by `start_by`, or not finished by `finish_by`, fails."""

    start_by: Annotated[datetime, Meta(tz=True)] | None = None
    finish_by: Annotated[datetime, Meta(tz=True)] | None = None


class SubmitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /tasks/submit`."""

    project_id: Annotated[str, Meta(pattern=PROJECT_PATTERN, description=PROJECT_RULE)]
    task_type: Annotated[str, Meta(description="the name of a task type, such as generate_video")]
    task_data: dict[str, Any]
    priority: Annotated[int, Meta(ge=1, le=3)] | None = None
    callback_url: Annotated[str, Meta(max_length=2048, extra_json_schema={"pattern": URL_PATTERN})] | None = None
    metadata: dict[str, Any] | None = None
    deadline: Deadline | None = None


class Receipt(msgspec.Struct, frozen=True):
    """The answer to a submit: the task is accepted, and will not be lost."""

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
    """The status of a task. The `snapshot` of its stream has `last_event_id` as well.

    `warnings`: those of the receipt, then those of the result.
    `gpu_seconds`: GPU time of its runs; the time of a batch is divided among its tasks. 0 on a CPU.
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
    warnings: list[str]
    events_url: str


class Snapshot(TaskState, frozen=True):
    """The first event of a task's stream: its status, including all events up to `last_event_id`."""

    last_event_id: str | None


class ProjectState(Project, frozen=True):
    """A project. The `snapshot` of its stream has more. The byte limits are null if there are none."""

    record_bytes_limit: int | None
    upload_bytes_limit: int | None
    events_url: str


class ProjectSnapshot(ProjectState, frozen=True):
    """The first event of a project's stream, including all events up to `last_event_id`.

    `active`: running tasks, then queued ones, oldest first: at most a hundred that match the filters of the stream.
    """

    active: list[TaskState]
    last_event_id: str | None


class CancelAnswer(msgspec.Struct, frozen=True):
    """The answer to a cancel. A repeated cancel gets the same answer."""

    task_id: TaskId
    status: TaskStatus
    previous_state: TaskStatus
    cancelled_at: datetime
    message: str


class TaskRow(msgspec.Struct, frozen=True):
    """A task in a project's task list."""

    task_id: TaskId
    task_type: str
    status: TaskStatus
    created_at: datetime
    completed_at: datetime | None
    result_url: str | None
    progress: float


class Pagination(msgspec.Struct, frozen=True):
    """The position of a page in the list. Pages count from 1."""

    page: int
    limit: int
    total: int
    total_pages: int


class TaskPage(msgspec.Struct, frozen=True):
    """A page of a project's task list, newest first."""

    tasks: list[TaskRow]
    pagination: Pagination


class WorkersAnswer(msgspec.Struct, frozen=True):
    """The engine processes of all workers that sent a heartbeat in the last five minutes."""

    workers: list[WorkerStatus]
    total_workers: int
    active_workers: int
    gpu_utilization: float


class HealthAnswer(msgspec.Struct, frozen=True):
    """`degraded`: no live worker can run some waiting tasks, Redis refuses writes, or the storage is unusable. `unhealthy`: no Redis.

    `problems` says what is wrong and what to do.
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
    """The answer while the process is alive. Nothing else is checked."""

    status: str
    timestamp: datetime
    version: str
    uptime: float


class CheckName(StrEnum):
    """What has to work before a task can be accepted and run."""

    REDIS = "redis"
    STORAGE = "storage"
    WORKER = "worker"


class Check(msgspec.Struct, frozen=True):
    """The result of a check, at most a second old. `message` says what is wrong and what to do; it is empty if nothing is wrong."""

    name: CheckName
    ok: bool
    message: str


class ReadyAnswer(msgspec.Struct, frozen=True):
    """`ready`, or `not_ready` if a check failed."""

    status: str
    timestamp: datetime
    version: str
    checks: list[Check]


class UploadAnswer(msgspec.Struct, frozen=True):
    """An upload, stored for seven days. Use `url` as a reference in the task_data of tasks of the same project."""

    upload_id: str
    url: str
    size: int
    media_type: str


class DeliveryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a delivery. `url` is shown without its query; `next_try_at` is null once it was delivered or has failed."""

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
    """A task's webhook and CMS deliveries, sent and pending, oldest first."""

    deliveries: list[DeliveryAnswer]


class DeadLettersAnswer(msgspec.Struct, frozen=True):
    """The dead letters, newest first."""

    dead_letters: list[DeadLetter]
    total: int


class QueuesAnswer(msgspec.Struct, frozen=True):
    """The three queues."""

    queues: list[TaskQueue]


class MetricsAnswer(msgspec.Struct, frozen=True):
    """Totals over all stored tasks that the key may see. Rates are percentages of the ended tasks, durations are in seconds.

    `gpu_seconds`: GPU time of all ended runs, also of deleted tasks. `passed_over`: how often a task was claimed before an older one of
    its project because its model was loaded. `limits_hit`: how often each limit of this API process has refused a client since it started.
    A key for some projects gets no `average_duration`, `passed_over` and `limits_hit`, which are about all projects.
    """

    total_tasks: int
    tasks: dict[TaskStatus, int]
    success_rate: float
    failure_rate: float
    cancellation_rate: float
    average_duration: dict[TaskType, float]
    gpu_seconds: float
    passed_over: int | None
    limits_hit: dict[str, int]


class Alert(msgspec.Struct, frozen=True):
    """A problem that an operator should look at."""

    code: str
    message: str


class TasksHealthAnswer(msgspec.Struct, frozen=True):
    """`healthy`, or `degraded` if there are alerts."""

    status: str
    alerts: list[Alert]


class TaskTypeAnswer(msgspec.Struct, frozen=True):
    """A task type of this installation: its models, its longest run in seconds, and the JSON Schema of its task_data."""

    task_type: TaskType
    description: str
    models: list[str]
    default_model: str | None
    max_duration_s: int
    task_data: dict[str, Any]


class TaskTypesAnswer(msgspec.Struct, frozen=True):
    """The task types of this installation."""

    task_types: list[TaskTypeAnswer]


class FieldError(msgspec.Struct, frozen=True):
    """One of the faults in a request. `path` is that of a field, a query parameter or a header."""

    path: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error."""

    error: Annotated[str, Meta(extra_json_schema={"enum": [each.code for each in RequestError.__subclasses__()]})]
    message: str
    timestamp: datetime
    retryable: bool
    errors: list[FieldError] = []


class Retrying(ProcessingProgress, frozen=True, kw_only=True):
    """The data of `retrying`: a run failed, and the task will run again after `retry_in` seconds."""

    retry_in: float


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """The data of `preview`: a small picture of the run in progress, as a data URL."""

    task_id: TaskId
    project_id: ProjectId
    type: EventType
    time: datetime
    attempt: int
    image: str


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """The data of `gap`: the log was trimmed, and the events between `after` and `first` are lost. A snapshot follows."""

    task_id: TaskId | None = None
    project_id: ProjectId | None = None
    after: str | None = None
    first: str | None = None
    last: str | None = None


class Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    """The data of `goodbye`: the server is stopping, or the API key was revoked. Open the stream again, after the last id."""

    task_id: TaskId | None = None
    project_id: ProjectId | None = None


class Webhook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a webhook. `taskId`, `event`, `data`, `scene_id` and `video_url` repeat fields for older receivers."""

    type: Annotated[str, Meta(description="task.completed, task.failed, task.cancelled or task.updated; newer versions may have others")]
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
    event: Annotated[str, Meta(description="complete, error or cancelled")]
    data: Result | None
    scene_id: Any = None
    video_url: str | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    cancelled_at: datetime | None = None
