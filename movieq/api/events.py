"""The stream of a task: a raw ASGI endpoint, since a stream is nothing but bytes that go out until one side leaves.

First a `snapshot`, unless the resume point is in the log; then the log after it, then live; the end after the terminal event. A comment
every 15 s; a client that takes nothing for 30 s is left.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from redis.exceptions import RedisError
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from movieq import logs, signing
from movieq.api.auth import task_of
from movieq.api.state import Api, api, encode
from movieq.contracts import EventType, Task, TaskId
from movieq.errors import NotFound, ValidationFailed
from movieq.events import frame, pair
from movieq.settings import Scope as KeyScope
from movieq.store import LogState

COMMENT_S: Final = 15.0
STUCK_S: Final = 30.0
RETRY_MS: Final = 2000

log = logs.get()
_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class TaskEvents:
    """`GET /tasks/{task_id}/events`, with a key, or with the signature of an `events_url` from any origin."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream. Raises what makes an error answer before anything is sent."""
        request = HTTPConnection(scope)
        movieq = api(request)
        signed = not {"expires", "signature"}.isdisjoint(request.query_params)
        task = await (_signed_task(movieq, request) if signed else _keyed_task(request))
        after = _resume_point(request)
        headers = [*_HEADERS, (b"access-control-allow-origin", b"*")] if signed else _HEADERS
        if after is not None and task.status.ended and after == task.last_event_id:
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        await _stream(movieq, task, after, receive, send)


async def _stream(movieq: Api, task: Task, after: str | None, receive: Receive, send: Send) -> None:
    """Sends until the task ends, the client leaves or gets stuck, or the server goes."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def write() -> None:
        async with aclosing(_frames(movieq, task, after)) as frames:
            async for chunk in frames:
                async with asyncio.timeout(STUCK_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    leaving, writing = asyncio.ensure_future(left()), asyncio.ensure_future(write())
    try:
        await asyncio.wait({leaving, writing}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
    except (RedisError, OSError) as error:  # of them TimeoutError: the client is stuck
        log.warning("stream_left", task_id=task.task_id, problem=str(error) or type(error).__name__)
        # returning without the end of the body closes the connection; the client comes back and goes on where it is
    finally:
        leaving.cancel()
        writing.cancel()
        await asyncio.gather(leaving, writing, return_exceptions=True)


async def _frames(movieq: Api, task: Task, after: str | None) -> AsyncGenerator[bytes]:
    yield f"retry: {RETRY_MS}\n\n".encode()
    state = await movieq.store.log_state(task.task_id)
    place = _place(state, after)
    if place == "gap":
        yield frame(EventType.GAP, encode({"task_id": task.task_id, "after": after, "first": state.first, "last": state.last}))
    if place != "inside":
        position = await movieq.store.position(task)
        yield frame(EventType.SNAPSHOT, movieq.snapshot(task, position))
    if state.last is None and task.status.ended:  # the log is gone: its last entry lives on in the task
        yield frame(EventType(task.status), movieq.ending(task), task.last_event_id)
        return
    start = after if place in ("inside", "before") else None
    async with aclosing(movieq.hub.follow(task.task_id, start, COMMENT_S)) as events:
        async for event in events:
            yield b": still here\n\n" if event is None else event.frame
    if movieq.hub.closing.is_set():
        wait_ms = RETRY_MS + random.randrange(RETRY_MS)  # noqa: S311  # spreads reconnections, hides nothing
        yield f"retry: {wait_ms}\n".encode() + frame(EventType.GOODBYE, encode({"task_id": task.task_id}))


def _place(state: LogState, after: str | None) -> str:
    """Where the resume point is: "none", "inside" the log, "before" it with nothing missing between, or in a "gap"."""
    if after is None:
        return "none"
    if state.first is None or state.last is None or pair(after) > pair(state.last):
        return "gap"
    if pair(after) < pair(state.first):
        return "gap" if state.trimmed else "before"
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
