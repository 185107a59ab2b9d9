"""Every shape on a wire or in Redis: entities, requests, answers, events, states, verbs and key names.

Shapes that leave the process are frozen Structs; times in them are RFC 3339 in UTC, durations seconds. Inside, times are milliseconds
since the epoch by the clock of Redis and carry `_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, NewType

import msgspec
from msgspec import Meta

from movieq.params import TaskType

TaskId = NewType("TaskId", str)
ProjectId = NewType("ProjectId", str)
RunToken = NewType("RunToken", str)
"""Names one run of one task: random, given by the claim, carried by every write of the run (the fence)."""

# ── States and verbs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TaskStatus(StrEnum):
    """Where a task is."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """The state of a record that this version cannot read: a newer one wrote it, or it is damaged. It is never stored."""

    @property
    def ended(self) -> bool:
        """Nothing more happens by itself."""
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


STATES: Final = (TaskStatus.QUEUED, TaskStatus.PROCESSING, TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)
"""The states that a task can be in."""


class Verb(StrEnum):
    """The state changes. Each is one Lua script and one method of `Store` of its name."""

    SUBMIT = "submit"
    CLAIM = "claim"
    REPORT = "report"
    COMPLETE = "complete"
    FAIL = "fail"
    REQUEUE = "requeue"
    CANCEL = "cancel"
    RETRY = "retry"


TRANSITIONS: Final[Mapping[tuple[TaskStatus | None, Verb], TaskStatus]] = {
    (None, Verb.SUBMIT): TaskStatus.QUEUED,
    (TaskStatus.QUEUED, Verb.CLAIM): TaskStatus.PROCESSING,
    (TaskStatus.PROCESSING, Verb.REPORT): TaskStatus.PROCESSING,
    (TaskStatus.PROCESSING, Verb.COMPLETE): TaskStatus.COMPLETED,
    (TaskStatus.PROCESSING, Verb.FAIL): TaskStatus.FAILED,
    (TaskStatus.PROCESSING, Verb.REQUEUE): TaskStatus.QUEUED,
    (TaskStatus.QUEUED, Verb.CANCEL): TaskStatus.CANCELLED,
    (TaskStatus.PROCESSING, Verb.CANCEL): TaskStatus.CANCELLED,
    (TaskStatus.FAILED, Verb.RETRY): TaskStatus.QUEUED,
}
"""Every allowed (state, verb) and where it leads. What is not here is refused, or, said again by the same run, answered as before."""


class Kind(StrEnum):
    """A queue, by what its tasks need of a machine."""

    GPU_HEAVY = "gpu_heavy"
    GPU_MEDIUM = "gpu_medium"
    CPU_INTENSIVE = "cpu_intensive"


class Priority(StrEnum):
    """Names of the priorities 1, 2 and 3."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


PRIORITY_BIAS_MS: Final = {1: 2 * 3_600_000, 2: 3_600_000, 3: 0}
"""How much earlier than created a task stands in its queue: priority with ageing, a low task passes a high one after two hours."""


class EventType(StrEnum):
    """Names of the events of a stream. Those of `LOGGED_EVENTS` are in the log and carry an id."""

    STARTED = "started"
    QUEUED = "queued"
    PROGRESS = "progress"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UPDATED = "updated"
    SNAPSHOT = "snapshot"
    PREVIEW = "preview"
    GAP = "gap"
    GOODBYE = "goodbye"


TERMINAL_EVENTS: Final = frozenset({EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED})

# ── Key names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

KEYS: Final[Mapping[str, str]] = {
    # tasks
    "job": "arq:job:",  # + task or delivery: string, arq's definition (msgpack)
    "task": "movieq:task:",  # + task: hash, the fields of Task
    "log": "movieq:log:",  # + task, or project:PROJECT: stream of {type, data}
    "index": "movieq:index:",  # + project|status|type, either empty: zset task -> created
    "projects": "movieq:projects",  # zset project -> first task's time
    "idempotency": "movieq:idempotency:",  # + hash of caller, project and key: string "body hash task"
    "made": "movieq:made:",  # + fingerprint: string, the task that made this last
    "durations": "movieq:durations:",  # + shape: list of the last run times, ms
    "sums": "movieq:sums",  # hash "task_type tasks" and "task_type ms" -> over every completed task
    "gpu_ms": "movieq:gpu_ms",  # hash project, and '' for all -> what runs that ended had of GPUs, ms
    "totals": "movieq:totals",  # hash state -> how many tasks are in it
    "dropped": "movieq:dropped",  # list of "LIST TASK", latest first: entries that scripts dropped in the last day
    "ended": "movieq:ended",  # zset task -> when it ended
    "dead": "movieq:dead",  # zset task -> when it was given up, the dead letters
    "media": "movieq:media",  # zset storage prefix of a result -> when it was committed
    # the queue
    "kinds": "movieq:kinds",  # set of kinds that ever had a task
    "waiting": "movieq:waiting:",  # + kind: zset task -> created; + kind:project: an arq queue, zset task -> created - bias
    "lanes": "movieq:lanes:",  # + kind: set of lanes, kind/type/model, of tasks that some worker cannot run; each has waiting, flows, ...
    "flows": "movieq:flows:",  # + kind: zset project -> virtual time, of projects with waiting tasks
    "spent": "movieq:spent:",  # + kind: hash project -> virtual time when it last went idle
    "clock": "movieq:clock:",  # + kind: string, virtual time of the last claim
    "claims": "movieq:claims:",  # + kind: counter; every eighth claim takes the oldest
    "running": "movieq:running:",  # + kind: zset task -> end of lease
    "offered": "movieq:offered:",  # + host: zset task whose finished files lie there -> from when it may be had
    "delayed": "movieq:delayed",  # zset task -> due
    "deadlines": "movieq:deadlines",  # zset task -> when it fails
    "priorities": "movieq:priorities:",  # + kind: hash priority -> how many wait
    "pace": "movieq:pace:",  # + kind: list of the times of the last hundred claims
    "idle": "movieq:idle:",  # + kind: set of workers that wait for one
    # workers
    "claimed": "movieq:claimed:",  # + worker: list, the last claim's nonce and its "task run"s
    "held": "movieq:held:",  # + worker: set of tasks that it runs
    "workers": "movieq:workers",  # hash worker -> its heartbeat (JSON)
    "able": "movieq:able",  # hash worker -> Able (JSON); a worker without an entry can run everything
    "beats": "movieq:beats",  # zset worker -> time of its last heartbeat
    "heard": "movieq:heard",  # string, when tidy last ran
    "quiet": "movieq:quiet",  # string, until when nothing is reaped
    "gpu": "movieq:gpu",  # string, there while a GPU worker was seen in the last 30 days
    # the way out
    "deliveries": "movieq:deliveries",  # an arq queue
    "delivery": "movieq:delivery:",  # + delivery: hash, the facts frozen when the task ended
    "orphans": "movieq:orphans",  # zset storage prefix -> when to delete it
    "sweeper": "movieq:sweeper",  # string, the worker that now deletes what is over
    # the rest
    "upload": "movieq:upload:",  # + upload: string, Upload (msgpack)
    "secret": "movieq:secret:signing",  # string, made once where MOVIEQ_SIGNING_SECRET is unset
    "write_check": "movieq:write_check",  # string, written by health checks
    "keys": "movieq:keys",  # hash sha256 of an API key -> what it may (msgpack)
    "installation": "movieq:installation",  # hash "salt", "api", "worker" -> Started (JSON) of the last of each
    "check": "movieq:check:",  # + random: string, written by a check at start or by doctor, for ten seconds
    # pub/sub channels
    "events": "movieq:events:",  # + task, or project:PROJECT: "id\ntype\ndata"; ">" and a time in ms for id where it is in no log
    "control": "movieq:control:",  # + worker: "wake" or "cancel TASK RUN"
}
"""Every key and channel of an installation that sets no MOVIEQ_KEY_PREFIX, by the name that the scripts use.

None holds a hash tag: movieq needs one Redis, not a cluster.
"""

PREFIX_PATTERN: Final = r"[a-z][a-z0-9_-]{0,31}"
CHANNELS: Final = ("events", "control")


def keys(prefix: str = "movieq", db: int = 0) -> Mapping[str, str]:
    """Return the keys and channels of an installation: those of `KEYS` under its prefix.

    Pub/sub knows no database numbers, so the channels of every database but 0 carry its number. arq's own keys have no prefix: what follows
    `arq:job:` is unique.
    """
    named = {name: text.replace("movieq:", f"{prefix}:") for name, text in KEYS.items()}
    return named if db == 0 else {**named, **{name: f"{named[name]}{db}:" for name in CHANNELS}}


DELIVERY_KEPT_S: Final = 30 * 24 * 3600
"""How long what came of a delivery can be looked up, unless its task is swept before."""
LOG_KEPT_S: Final = 24 * 3600
"""How long the log of a finished task stays."""
RECEIPT_KEPT_S: Final = 24 * 3600
"""How long an idempotency key is remembered."""
UPLOAD_BYTES: Final = 25 * 1024 * 1024
UPLOAD_KEPT_S: Final = 7 * 24 * 3600
EVENTS_URL_S: Final = 24 * 3600
MEDIA_URL_S: Final = 7 * 24 * 3600
"""How long signed urls are good."""

# ── Results ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


_SEGMENT: Final = "[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
KEY_PATTERN: Final = rf"^{_SEGMENT}(/{_SEGMENT})*(?!\n)$"
"""Of the keys of files. No segment begins with a dot: neither "." nor "..", and no key can meet a temporary file."""
MAX_KEY_CHARS: Final = 1024

StorageKey = Annotated[str, Meta(pattern=KEY_PATTERN, max_length=MAX_KEY_CHARS)]


class StoredMedia(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file of a result as it lies in Redis: by its key, since urls are signed when they are read."""

    key: StorageKey
    media_type: str
    content_type: str
    size_bytes: int
    poster_key: StorageKey | None = None
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None


class StoredResult(msgspec.Struct, frozen=True):
    """What `complete` commits; `media[0]` is the result itself."""

    media: Annotated[list[StoredMedia], Meta(min_length=1)]
    metadata: dict[str, Any]
    payload_media_id: str | int | None = None


class MediaResult(msgspec.Struct, frozen=True):
    """A file of a result. `url` can be opened as it stands for at least a day."""

    url: str
    media_type: str
    content_type: str
    file_size: int
    poster_url: str | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None


class Result(msgspec.Struct, frozen=True):
    """What a completed task made."""

    media_url: str
    payload_media_id: str | int | None
    media: list[MediaResult]
    metadata: dict[str, Any]


# ── Entities ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

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


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

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


# ── Answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


_LAST_MS: Final = 253_402_300_799_000
"""The last second of the year 9999."""


def utc(ms: float) -> datetime:
    """Return milliseconds since the epoch as a time of the contract: the nearest from 1970 to 9999, since a damaged record may say any."""
    return datetime.fromtimestamp(int(min(max(ms, 0), _LAST_MS)) / 1000, UTC)
