"""The stream of a task: an endpoint that answers with a head, and leaves the socket to the hub.

First a `snapshot`, unless the resume point is in the log; then the log after it, then live; the end after the terminal event. A comment
every 15 s; a client that takes nothing for 30 s is dropped.

The head goes out through ASGI, as of every answer: so CORS and the request log know of it. Then uvicorn hands the connection over, as it
does to a websocket, and forgets the request: an open stream is a socket and a watcher, without a task, a parser, or the request's headers.
The body stays chunked, so that a proxy or a client can tell a stream that ended from a connection that broke; `Connection: close`, since
nobody would read another request.
"""

from __future__ import annotations

import re
import time
from typing import Final

from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from movieq import signing
from movieq.api.auth import task_of
from movieq.api.state import Api, api, encode
from movieq.contracts import EventType, Task, TaskId
from movieq.errors import NotFound, ValidationFailed
from movieq.events import START, Opening, SocketWatcher, Source, chunk, frame, pair, retry
from movieq.settings import Scope as KeyScope
from movieq.store import LogState

HAND_OVER: Final = "movieq.hand_over"
"""The extension of the ASGI scope with which the server gives a connection away; see `movieq.serving`."""

_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class TaskEvents:
    """`GET /tasks/{task_id}/events`, with a key, or with the signature of an `events_url` from any origin."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the stream. Raises what makes an error answer before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        signed = not {"expires", "signature"}.isdisjoint(request.query_params)
        task = await (_signed_task(movieq, request) if signed else _keyed_task(request))
        after = _resume_point(request)
        headers = [*_HEADERS, (b"access-control-allow-origin", b"*")] if signed else _HEADERS
        over = after is not None and task.status.ended and after == task.last_event_id
        if over or scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 204 if over else 200, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"connection", b"close")]})
        watcher = SocketWatcher(movieq.hub.part)
        if scope["extensions"][HAND_OVER]["to"](watcher):
            watcher.tell(chunk(retry()))
            movieq.hub.follow(Source.of_task(task.task_id), watcher, lambda: _opening(movieq, task, after))


async def _opening(movieq: Api, task: Task, after: str | None) -> Opening:
    state = await movieq.store.log_state(task.task_id)
    place = _place(state, after)
    frames = b""
    if place == "gap":
        frames += frame(EventType.GAP, encode({"task_id": task.task_id, "after": after, "first": state.first, "last": state.last}))
    if place != "inside":
        position = await movieq.store.position(task)
        frames += frame(EventType.SNAPSHOT, movieq.snapshot(task, position))
    if state.last is None and task.status.ended:  # the log is gone: its last entry lives on in the task
        return Opening(frames + frame(EventType(task.status), movieq.ending(task), task.last_event_id), None)
    return Opening(frames, pair(after) if after is not None and place == "inside" else START)


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


async def _keyed_task(request: HTTPConnection) -> Task:
    return (await task_of(request, KeyScope.READ))[0]


async def _signed_task(movieq: Api, request: HTTPConnection) -> Task:
    task_id, query = TaskId(request.path_params["task_id"]), request.query_params
    signing.verify(movieq.signing_secret, "events", task_id, query.get("expires", ""), query.get("signature", ""), time.time())
    task = await movieq.store.task(task_id)
    if task is None:
        raise NotFound(f"no task {task_id}")
    return task
