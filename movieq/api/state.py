"""The state that the handlers share. It is opened once in the lifespan, and found through the request."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response

from movieq import logs, signing
from movieq.assembly import Installation
from movieq.queue.records import decode_warnings
from movieq.settings import Grant
from movieq.tasks.entities import ProcessingProgress, Project, Task
from movieq.tasks.results import MEDIA_URL_S, StoredResult, utc, warnings_of
from movieq.tasks.states import EventType, TaskId, TaskStatus
from movieq.tasks.wire import EVENTS_URL_S, ProjectSnapshot, ProjectState, Snapshot, TaskState

if TYPE_CHECKING:
    from movieq.api.key_cache import KeyCache
    from movieq.api.limits import Places, Rates
    from movieq.api.readiness import Readiness
    from movieq.streams.hub import Hub

GPU_KNOWN_S = 5.0
"""How long the answer of `gpu_bytes` is cached."""

PRIVATE: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""Headers of JSON responses: they may hold signed urls."""

log = logs.get()

_encoder = msgspec.json.Encoder(decimal_format="number")
_stored_event = msgspec.json.Decoder(dict[str, msgspec.Raw])
_stored_result = msgspec.json.Decoder(StoredResult)


class Caller(msgspec.Struct, frozen=True):
    """The API key of a request, or the one that a signed URL was issued to. `id` is the hash of the key."""

    id: str
    grant: Grant
    until_s: int | None = None
    """Unix time when the caller's signed URL expires; None with the key itself. URLs that are issued to the caller expire then too."""

    @property
    def flow(self) -> str:
        """The flow of its tasks: the start of its id if it may use all projects, else '' for the flow of the task's project."""
        return self.id[:16] if self.grant.projects is None else ""


class Api(Installation, kw_only=True):
    """The state of one API process: the installation, and the process's own hub, key cache, limits and readiness checks."""

    public_url: str
    hub: Hub
    keys: KeyCache
    places: Places
    rates: Rates
    started_s: float
    readiness: Readiness
    gpu_known_bytes: int = 0
    gpu_asked_s: float = 0.0

    async def gpu_bytes(self) -> int:
        """Return the memory of the largest GPU that a worker had in the last 30 days; 0 if there was none. Cached for five seconds."""
        if time.monotonic() - self.gpu_asked_s > GPU_KNOWN_S:
            self.gpu_known_bytes, self.gpu_asked_s = await self.queries.gpu_bytes(), time.monotonic()
        return self.gpu_known_bytes

    def url(self, path: str) -> str:
        """Return the absolute URL of a path under /api/v1."""
        return f"{self.public_url}/api/v1{path}"

    def events_url(self, task_id: TaskId, who: Caller, from_s: float | None = None) -> str:
        """Return the signed URL of a task's stream, issued to a caller, valid for a day from the Unix time `from_s` (default: now)."""
        return self.url(f"/tasks/{task_id}/events?{self._signed('events', task_id, who, from_s)}")

    def _signed(self, purpose: str, id: str, who: Caller, from_s: float | None = None) -> str:
        """Return the query of a signed URL, which is valid until it expires or the caller's API key is revoked."""
        expires = who.until_s or int(from_s or time.time()) + EVENTS_URL_S
        signature = signing.sign(self.signing_secrets[0], purpose, signing.subject(id, who.id), expires)
        return f"expires={expires}&{f'key={who.id}&' if who.id else ''}signature={signature}"

    def project_state(self, project: Project, who: Caller) -> ProjectState:
        """Return the project as clients see it, with a signed URL of its stream that is valid for a day."""
        url = self.url(f"/projects/{project.project_id}/events?{self._signed('project-events', project.project_id, who)}")
        settings = self.settings
        return ProjectState(
            **msgspec.structs.asdict(project),
            record_bytes_limit=settings.max_record_bytes or None,
            upload_bytes_limit=settings.max_upload_bytes or None,
            events_url=url,
        )

    def project_snapshot(self, project: Project, active: list[tuple[Task, int | None]], last_event_id: str | None, who: Caller) -> bytes:
        """Return the data of a project's `snapshot` event."""
        state = msgspec.structs.asdict(self.project_state(project, who))
        return encode(ProjectSnapshot(**state, active=[self._state(*each, who) for each in active], last_event_id=last_event_id))

    def media_expiry_s(self) -> int:
        """Return the Unix time at which media URLs signed now expire. It changes once an hour, so that caches can reuse the URLs."""
        return (int(time.time()) // 3600 + 1) * 3600 + MEDIA_URL_S

    async def task_state(self, task: Task, who: Caller) -> TaskState:
        """Return the task as this caller sees it."""
        position = await self.queries.position(task) if task.status is TaskStatus.QUEUED else None
        return self._state(task, position, who)

    def snapshot(self, task: Task, position: int | None, who: Caller) -> bytes:
        """Return the data of a task's `snapshot` event."""
        return encode(Snapshot(**msgspec.structs.asdict(self._state(task, position, who)), last_event_id=task.last_event_id))

    def ending(self, task: Task) -> bytes:
        """Return the data of the terminal event of a task whose log has expired."""
        return encode(
            ProcessingProgress(
                task_id=task.task_id,
                project_id=task.project_id,
                task_type=task.task_type,
                type=EventType(task.status),
                time=utc(task.created_at_ms if task.ended_at_ms is None else task.ended_at_ms),
                attempt=task.attempt,
                status=task.status,
                progress=task.progress,
                current_step=task.current_step,
                stage=task.stage,
                step=task.step,
                steps=task.steps,
                result=None if task.result is None else self.storage.result(task.result, self.media_expiry_s()),
                error=task.error,
                error_code=task.error_code,
            )
        )

    def _state(self, task: Task, position: int | None, who: Caller) -> TaskState:
        ended_ms = task.ended_at_ms
        started_ms = None if task.run is None else task.started_at_ms  # None while the task waits for another attempt
        remaining_ms = task.remaining_ms if task.status is TaskStatus.PROCESSING else None
        return TaskState(
            task_id=task.task_id,
            project_id=task.project_id,
            task_type=task.task_type,
            status=task.status,
            progress=task.progress,
            current_step=task.current_step,
            result=None if task.result is None else self.storage.result(task.result, self.media_expiry_s()),
            error=task.error,
            error_code=task.error_code,
            retryable=task.retryable,
            started_at=None if started_ms is None else utc(started_ms),
            completed_at=None if ended_ms is None else utc(ended_ms),
            created_at=utc(task.created_at_ms),
            processing_time=None if ended_ms is None or started_ms is None else (ended_ms - started_ms) / 1000,
            gpu_seconds=round(task.gpu_ms / 1000, 3),
            attempt=task.attempt,
            queue_position=position,
            estimated_remaining=None if remaining_ms is None else remaining_ms / 1000,
            warnings=[*decode_warnings(task.warnings), *warnings_of(task.result)],
            events_url=self.events_url(task.task_id, who),
        )

    def render(self, event_type: EventType, data: bytes) -> bytes:
        """Return the JSON of an event as clients get it, with signed URLs in its result; unchanged if the result cannot be read."""
        if event_type not in (EventType.COMPLETED, EventType.UPDATED):
            return data
        try:
            event = _stored_event.decode(data)
            stored = _stored_result.decode(event["result"])
            if (media_id := event.pop("payload_media_id", None)) is not None:  # else an older version wrote it into the result
                stored = msgspec.structs.replace(stored, payload_media_id=msgspec.json.decode(media_id))
            result = self.storage.result(stored, self.media_expiry_s())
        except (msgspec.MsgspecError, KeyError, RecursionError) as error:
            log.warning("event_unreadable", type=event_type, problem=str(error))
            return data
        return encode({**event, "result": result})


def api(request: HTTPConnection) -> Api:
    """Return the state of the API process that handles this request."""
    return cast("Api", request.app.state.api)


def encode(answer: Any) -> bytes:
    """Return the JSON of an answer."""
    return _encoder.encode(answer)


def answered(answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response. No cache may store it, since it may hold signed urls."""
    return Response(encode(answer), status, {**PRIVATE, **(headers or {})}, "application/json")


def now() -> datetime:
    """Return the current UTC time of this machine's clock. Times of tasks come from Redis instead."""
    return datetime.now(UTC)
