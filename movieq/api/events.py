"""The event streams of tasks and projects. The endpoints send the response headers and hand the socket over to the hub.

A stream sends a `snapshot` first, unless the client resumes inside the event log; then the log from there, then live events. A task's
stream sends the whole log and ends after the terminal event. A project's stream starts at the snapshot and does not end. Each state change
of a task has an id in the project's log, which holds the last thousand events for a day; progress events have no id. A comment is sent
every 15 s. A client that reads nothing for 30 s is disconnected.

The headers are sent through ASGI, so that CORS and the request log see them. Then uvicorn hands the connection over, as it does for a
websocket, and drops the request. An open stream therefore costs a socket and a watcher, but no asyncio task, parser or request headers.
The body is chunked, so that a client or proxy can tell the end of a stream from a broken connection; HTTP/1.0 clients get a plain body.
The response has `Connection: close`, since no further request would be read.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from movieq.api.auth import project_of, signed_caller, task_of
from movieq.api.limits import Place
from movieq.api.query import query
from movieq.api.state import Api, Caller, api, encode
from movieq.errors import NotFound
from movieq.queue.queries import LogState
from movieq.settings import Scope as KeyScope
from movieq.streams.sse import START, chunk, frame, pair, retry
from movieq.streams.watchers import Access, Facts, Opening, SocketWatcher, Source, Watcher
from movieq.tasks.entities import Task
from movieq.tasks.faults import given, refused
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import STATES, EventType, ProjectId, TaskId, TaskStatus, TaskType

HAND_OVER: Final = "movieq.hand_over"
"""Name of the ASGI extension through which the server hands a connection over; see `movieq.api.server`."""

OLD_VERSIONS: Final = ("0.9", "1.0")
"""HTTP versions without chunked bodies and `100 Continue`."""

ACTIVE: Final = 100
"""Most tasks in the snapshot of a project."""

_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),  # a proxy that compresses would delay events
    (b"x-accel-buffering", b"no"),
]


class TaskEvents:
    """`GET /tasks/{task_id}/events`: stream a task's events until it ends. Answer 204 if the client has them all."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the stream. Raises RequestError before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        task, who = await (_signed_task(movieq, request) if signed(request) else task_of(request, KeyScope.READ))
        after = _resume_point(request)
        if after is not None and task.status.ended and after == task.last_event_id:
            await send({"type": "http.response.start", "status": 204, "headers": _headers(request)})
            await send({"type": "http.response.body", "body": b""})
            return
        place = _take_place(movieq, request, task.task_id, who)
        access = Access(who.id, task.project_id) if who.id else None
        await _stream(request, send, Source.of_task(task.task_id), place, access, lambda: _opening(movieq, task, after, who))


class ProjectEvents:
    """`GET /projects/{project_id}/events`: stream the events of a project's tasks; `?task_type=` and `?status=` filter them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the stream. Raises RequestError before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        project_id, who = await (_signed_project(request) if signed(request) else project_of(request, KeyScope.READ))
        with query(request, "after", "task_type", "status", "expires", "key", "signature") as asked:
            with asked.faults:
                after = _resume_point(request)
            wanted = _Wanted(asked.choices("task_type", REGISTRY.tasks), asked.choices("status", STATES))
        if await movieq.queries.project(project_id) is None:
            raise NotFound(f"no project {project_id}")
        place = _take_place(movieq, request, f"project:{project_id}", who)
        source = Source.of_project(project_id)
        access = Access(who.id, project_id) if who.id else None
        wants = wanted if wanted.task_types or wanted.statuses else None
        await _stream(request, send, source, place, access, lambda: _project_opening(movieq, project_id, after, wanted, who), wants)


class _Wanted(msgspec.Struct, frozen=True):
    """The filter of a project's stream: the wanted task types and states. An empty set means all."""

    task_types: frozenset[TaskType]
    statuses: frozenset[TaskStatus]

    def __call__(self, facts: Facts) -> bool:
        return (not self.task_types or facts.task_type in self.task_types) and (not self.statuses or facts.status in self.statuses)


async def _stream(
    request: HTTPConnection,
    send: Send,
    source: Source,
    place: Place,
    access: Access | None,
    opening: Callable[[], Awaitable[Opening]],
    wants: Callable[[Facts], bool] | None = None,
) -> None:
    """Send the response headers, and hand the connection over to a watcher, which frees the place when the connection ends."""
    headers, hub = _headers(request), api(request).hub
    if request.scope["method"] == "HEAD":
        place.free()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    server, chunked = request.scope["extensions"][HAND_OVER], request.scope["http_version"] not in OLD_VERSIONS
    if not chunked:
        server["unchunked"]()

    def gone(watcher: Watcher) -> None:
        hub.leave(watcher)
        place.free()

    watcher, handed_over = SocketWatcher(gone, wants, access, chunked=chunked), False
    try:
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"connection", b"close")]})
        handed_over = server["to"](watcher)
    finally:
        if not handed_over:
            place.free()
    if handed_over:
        watcher.tell(chunk(retry()))
        hub.follow(source, watcher, opening)


async def _opening(movieq: Api, task: Task, after: str | None, who: Caller) -> Opening:
    state = await movieq.queries.log_state(task.task_id)
    place = _place(state, after)
    frames = _gap(state, after, {"task_id": task.task_id}) if place == "gap" else b""
    if place != "inside":
        position = await movieq.queries.position(task)
        frames += frame(EventType.SNAPSHOT, movieq.snapshot(task, position, who))
    if state.last is None and task.status.ended:  # the log has expired: build its last event from the task
        return Opening(frames + frame(EventType(task.status), movieq.ending(task), task.last_event_id), None)
    return Opening(frames, pair(after) if after is not None and place == "inside" else START)


async def _project_opening(movieq: Api, project_id: ProjectId, after: str | None, wanted: _Wanted, who: Caller) -> Opening:
    state = await movieq.queries.log_state(Source.of_project(project_id).log)
    place = _place(state, after)
    if after is not None and place == "inside":
        return Opening(b"", pair(after))
    # the tasks are read after the log, so an event in between is in the snapshot and is sent again, but none is missed
    project = await movieq.queries.project(project_id)
    active = await movieq.queries.active(project_id, wanted.task_types, wanted.statuses, ACTIVE)
    frames = _gap(state, after, {"project_id": project_id}) if place == "gap" else b""
    if project is not None:  # else its last task has just been swept
        frames += frame(EventType.SNAPSHOT, movieq.project_snapshot(project, active, state.last, who))
    return Opening(frames, START if state.last is None or place == "start" else pair(state.last))


def _gap(state: LogState, after: str | None, name: dict[str, str]) -> bytes:
    return frame(EventType.GAP, encode({**name, "after": after, "first": state.first, "last": state.last}))


def _place(state: LogState, after: str | None) -> str:
    """Return the position of the resume point: "none", "inside" the log, at its "start" with no event missing, or in a "gap"."""
    if after is None:
        return "none"
    if state.first is None or state.last is None or pair(after) > pair(state.last):
        return "gap"
    if pair(after) < pair(state.first):  # from an earlier log that has expired, unless it is 0-0
        return "start" if pair(after) == START and not state.trimmed else "gap"
    return "inside"


def _resume_point(request: HTTPConnection) -> str | None:
    """Return the id of the last event that the client has. The header of a reconnecting browser overrides the query.

    Raises ValidationFailed.
    """
    for name, text in (("Last-Event-ID", request.headers.get("last-event-id")), ("after", request.query_params.get("after"))):
        if text:
            if not _ID.fullmatch(text):
                raise refused([(name, f"expected an event id such as 1764000000000-0, got {given(text)}")])
            return text
    return None


def signed(request: HTTPConnection) -> bool:
    """Whether the request's URL has a signature, or a part of one."""
    return not {"expires", "signature"}.isdisjoint(request.query_params)


def _take_place(movieq: Api, request: HTTPConnection, subject: str, who: Caller) -> Place:
    return movieq.places.take_for_url(subject, who.id) if signed(request) else movieq.places.take_for_key(who.id)


def _headers(request: HTTPConnection) -> list[tuple[bytes, bytes]]:
    return [*_HEADERS, (b"access-control-allow-origin", b"*")] if signed(request) else _HEADERS


async def _signed_task(movieq: Api, request: HTTPConnection) -> tuple[Task, Caller]:
    task_id = TaskId(request.path_params["task_id"])
    who = await signed_caller(request, "events", task_id)
    task = await movieq.queries.task(task_id)
    if task is None or not who.grant.allows(task.project_id):
        raise NotFound(f"no task {task_id}")
    return task, who


async def _signed_project(request: HTTPConnection) -> tuple[ProjectId, Caller]:
    project_id = ProjectId(request.path_params["project_id"])
    who = await signed_caller(request, "project-events", project_id)
    if not who.grant.allows(project_id):
        raise NotFound(f"no project {project_id}")
    return project_id, who
