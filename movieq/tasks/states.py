"""The states of a task, the verbs between them, and the names that go with them: task types, queues, priorities, events, engines."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NewType

TaskId = NewType("TaskId", str)
ProjectId = NewType("ProjectId", str)
RunToken = NewType("RunToken", str)
"""Names one run of one task: random, given by the claim, carried by every write of the run (the fence)."""

TaskType = NewType("TaskType", str)
"""Names what can be asked for: one of those below, or of a plug-in. `movieq.tasks.registry` says what each takes and yields."""
GENERATE_VIDEO: Final = TaskType("generate_video")
GENERATE_IMAGE: Final = TaskType("generate_image")
PROCESS_AUDIO: Final = TaskType("process_audio")
RENDER_ANIMATION: Final = TaskType("render_animation")


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

PREFIX_PATTERN: Final = r"[a-z][a-z0-9_-]{0,31}"


class EngineChoice(StrEnum):
    """Which engine makes what names no model: `auto` takes diffusers where the installation has had a GPU worker in the last 30 days."""

    AUTO = "auto"
    DIFFUSERS = "diffusers"
    ANIMATIC = "animatic"
