"""The states of a task, the verbs that change them, and the names of task types, queues, priorities, events and engines."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NewType

TaskId = NewType("TaskId", str)
ProjectId = NewType("ProjectId", str)
RunToken = NewType("RunToken", str)
"""Identifies one run of one task. The claim generates it at random, and every write of the run carries it (fencing)."""

TaskType = NewType("TaskType", str)
"""The name of a task type: one of those below, or one of a plug-in. `movieq.tasks.registry` describes each."""
GENERATE_VIDEO: Final = TaskType("generate_video")
GENERATE_IMAGE: Final = TaskType("generate_image")
PROCESS_AUDIO: Final = TaskType("process_audio")
RENDER_ANIMATION: Final = TaskType("render_animation")


class TaskStatus(StrEnum):
    """The states of a task."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """Shown for a record that this version cannot read, because it is damaged or a newer version wrote it. It is never stored."""

    @property
    def ended(self) -> bool:
        """Whether the task has ended: only a retry changes its state again."""
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


STATES: Final = (TaskStatus.QUEUED, TaskStatus.PROCESSING, TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)
"""The states that are stored."""


class Verb(StrEnum):
    """The state changes. Each has a Lua script and a method of `Store` of the same name."""

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
"""The next state for every allowed (state, verb). Any other pair is refused, or answered as before if the same run repeats its verb."""


class Kind(StrEnum):
    """The queues, named for the machine that their tasks need."""

    GPU_HEAVY = "gpu_heavy"
    GPU_MEDIUM = "gpu_medium"
    CPU_INTENSIVE = "cpu_intensive"


class Priority(StrEnum):
    """The names of the priorities 1, 2 and 3."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


PRIORITY_BIAS_MS: Final = {1: 2 * 3_600_000, 2: 3_600_000, 3: 0}
"""How much earlier than its creation a task counts as queued, so that priority ages: after two hours a low task precedes a new high one."""


class EventType(StrEnum):
    """The events of a stream. Those that are in the event log carry an id."""

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
    """Which engine renders tasks that name no model. `auto`: diffusers if a GPU worker was seen in 30 days, else animatic."""

    AUTO = "auto"
    DIFFUSERS = "diffusers"
    ANIMATIC = "animatic"
