"""The streams of tasks and of projects: endpoints that answer with a head, and leave the socket to the hub.

First a `snapshot`, unless the resume point is in the log; then the log after it, then live. The stream of a task begins with the whole log
and ends after the terminal event. That of a project begins at its snapshot and goes on for ever: each change of a task's state has an id of
the project's log, which holds the last thousand for a day; progress has none. A comment every 15 s; a client that takes nothing for 30 s is
dropped.

The head goes out through ASGI, as of every answer: so CORS and the request log know of it. Then uvicorn hands the connection over, as it
does to a websocket, and forgets the request: an open stream is a socket and a watcher, without a task, a parser, or the request's headers.
The body is chunked, so that a proxy or a client can tell a stream that ended from a connection that broke. (An HTTP/1.0 client cannot: it
gets the body plain.) `Connection: close`, since nobody would read another request.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import msgspec
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from movieq import signing
from movieq.api.auth import project_of, task_of
from movieq.api.query import only_query, query_choices
from movieq.api.state import Api, api, encode
from movieq.errors import NotFound, RequestError, ValidationFailed
from movieq.queue.store import LogState
from movieq.settings import Scope as KeyScope
from movieq.streams.sse import START, chunk, frame, pair, retry
from movieq.streams.watchers import Facts, Opening, SocketWatcher, Source
from movieq.tasks.entities import Task
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import STATES, EventType, ProjectId, TaskId, TaskStatus, TaskType

HAND_OVER: Final = "movieq.hand_over"
"""The extension of the ASGI scope with which the server gives a connection away; see `movieq.serving`."""

OLD_VERSIONS: Final = ("0.9", "1.0")
"""Versions of HTTP that have neither chunks nor `100 Continue`."""

ACTIVE: Final = 100
"""How many tasks the snapshot of a project names."""

_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),  # a proxy that compresses would hold events back
    (b"x-accel-buffering", b"no"),
]


class TaskEvents:
    """`GET /tasks/{task_id}/events`, with a key, or with the signature of an `events_url` from any origin."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the stream. Raises what makes an error answer before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        with _told_to_any_origin(request):
            task = await (_signed_task(movieq, request) if _signed(request) else _keyed_task(request))
            after = _resume_point(request)
        if after is not None and task.status.ended and after == task.last_event_id:
            await send({"type": "http.response.start", "status": 204, "headers": _headers(request)})
            await send({"type": "http.response.body", "body": b""})
            return
        await _stream(request, send, Source.of_task(task.task_id), lambda: _opening(movieq, task, after))


class ProjectEvents:
    """`GET /projects/{project_id}/events`, the same of all tasks of a project; `?task_type=` and `?status=` choose among them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the stream. Raises what makes an error answer before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        with _told_to_any_origin(request):
            project_id = _signed_project(movieq, request) if _signed(request) else (await project_of(request, KeyScope.READ))[0]
            only_query(request, "after", "task_type", "status", "expires", "signature")
            after = _resume_point(request)
            wanted = _Wanted(query_choices(request, "task_type", REGISTRY.tasks), query_choices(request, "status", STATES))
            if await movieq.store.project(project_id) is None:
                raise NotFound(f"no project {project_id}")
        source = Source.of_project(project_id)
        wants = wanted if wanted.task_types or wanted.statuses else None
        await _stream(request, send, source, lambda: _project_opening(movieq, project_id, after, wanted), wants)


class _Wanted(msgspec.Struct, frozen=True):
    """Which events of a project a client gets: those of tasks of these types, and in these states, where any are named."""

    task_types: frozenset[TaskType]
    statuses: frozenset[TaskStatus]

    def __call__(self, facts: Facts) -> bool:
        return (not self.task_types or facts.task_type in self.task_types) and (not self.statuses or facts.status in self.statuses)


async def _stream(
    request: HTTPConnection,
    send: Send,
    source: Source,
    opening: Callable[[], Awaitable[Opening]],
    wants: Callable[[Facts], bool] | None = None,
) -> None:
    """The head is sent, and the connection is a watcher's."""
    headers, hub = _headers(request), api(request).hub
    if request.scope["method"] == "HEAD":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    server, chunked = request.scope["extensions"][HAND_OVER], request.scope["http_version"] not in OLD_VERSIONS
    if not chunked:
        server["unchunked"]()
    await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"connection", b"close")]})
    watcher = SocketWatcher(hub.part, wants, chunked=chunked)
    if server["to"](watcher):
        watcher.tell(chunk(retry()))
        hub.follow(source, watcher, opening)


async def _opening(movieq: Api, task: Task, after: str | None) -> Opening:
    state = await movieq.store.log_state(task.task_id)
    place = _place(state, after)
    frames = _gap(state, after, {"task_id": task.task_id}) if place == "gap" else b""
    if place != "inside":
        position = await movieq.store.position(task)
        frames += frame(EventType.SNAPSHOT, movieq.snapshot(task, position))
    if state.last is None and task.status.ended:  # the log is gone: its last entry lives on in the task
        return Opening(frames + frame(EventType(task.status), movieq.ending(task), task.last_event_id), None)
    return Opening(frames, pair(after) if after is not None and place == "inside" else START)


async def _project_opening(movieq: Api, project_id: ProjectId, after: str | None, wanted: _Wanted) -> Opening:
    state = await movieq.store.log_state(Source.of_project(project_id).log)
    place = _place(state, after)
    if after is not None and place == "inside":
        return Opening(b"", pair(after))
    # the tasks are read after the log: what happens in between is in the snapshot, and comes again
    project = await movieq.store.project(project_id)
    active = await movieq.store.active(project_id, wanted.task_types, wanted.statuses, ACTIVE)
    frames = _gap(state, after, {"project_id": project_id}) if place == "gap" else b""
    if project is not None:  # else its last task was swept a moment ago
        frames += frame(EventType.SNAPSHOT, movieq.project_snapshot(project, active, state.last))
    return Opening(frames, START if state.last is None or place == "start" else pair(state.last))


def _gap(state: LogState, after: str | None, name: dict[str, str]) -> bytes:
    return frame(EventType.GAP, encode({**name, "after": after, "first": state.first, "last": state.last}))


def _place(state: LogState, after: str | None) -> str:
    """Where the resume point is: "none", "inside" the log, at its "start" with nothing missing between, or in a "gap"."""
    if after is None:
        return "none"
    if state.first is None or state.last is None or pair(after) > pair(state.last):
        return "gap"
    if pair(after) < pair(state.first):  # an id of a log that expired before this one began, unless it is no id at all
        return "start" if pair(after) == START and not state.trimmed else "gap"
    return "inside"


def _resume_point(request: HTTPConnection) -> str | None:
    """The id to continue after; the header of a reconnecting browser wins over the query. Raises ValidationFailed."""
    for name, text in (("Last-Event-ID", request.headers.get("last-event-id")), ("after", request.query_params.get("after"))):
        if text:
            if not _ID.fullmatch(text):
                raise ValidationFailed(f"{name}: an id of this stream is expected, such as 1764000000000-0, got {text[:40]!r}")
            return text
    return None


def _signed(request: HTTPConnection) -> bool:
    return not {"expires", "signature"}.isdisjoint(request.query_params)


def _headers(request: HTTPConnection) -> list[tuple[bytes, bytes]]:
    return [*_HEADERS, (b"access-control-allow-origin", b"*")] if _signed(request) else _HEADERS


@contextlib.contextmanager
def _told_to_any_origin(request: HTTPConnection) -> Iterator[None]:
    """A refusal of a signed address can be read by the page that asked, whatever its origin: movieq.js tells the page why it ends."""
    try:
        yield
    except RequestError as error:
        if _signed(request):
            error.headers = {**error.headers, "Access-Control-Allow-Origin": "*"}
        raise


async def _keyed_task(request: HTTPConnection) -> Task:
    return (await task_of(request, KeyScope.READ))[0]


async def _signed_task(movieq: Api, request: HTTPConnection) -> Task:
    task_id, query = TaskId(request.path_params["task_id"]), request.query_params
    signing.verify(movieq.signing_secrets, "events", task_id, query.get("expires", ""), query.get("signature", ""), time.time())
    task = await movieq.store.task(task_id)
    if task is None:
        raise NotFound(f"no task {task_id}")
    return task


def _signed_project(movieq: Api, request: HTTPConnection) -> ProjectId:
    project_id, query = ProjectId(request.path_params["project_id"]), request.query_params
    signing.verify(movieq.signing_secrets, "project-events", project_id, query.get("expires", ""), query.get("signature", ""), time.time())
    return project_id
