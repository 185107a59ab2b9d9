"""The endpoints for projects, their tasks and their uploads."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from pathlib import Path
from typing import IO, Final

from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response

from movieq.api.auth import project_of
from movieq.api.query import only_query, query
from movieq.api.state import answered, api
from movieq.api.tasks import arriving
from movieq.errors import NotFound, PayloadTooLarge, ValidationFailed
from movieq.fetch.download import image_problem
from movieq.fetch.formats import Kind, kind_problem, read_head, sniff
from movieq.settings import Scope
from movieq.tasks.entities import UPLOAD_BYTES, Upload
from movieq.tasks.faults import refused
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import utc
from movieq.tasks.states import STATES
from movieq.tasks.wire import Pagination, TaskPage, TaskRow, UploadAnswer

UPLOAD_S: Final = 300.0
"""Longest time that an upload may take."""
PAGES: Final = 1_000_000
"""Highest page number."""


async def project(request: Request) -> Response:
    """`GET /projects/{project_id}`: return a project with the number of its tasks in each state."""
    project_id, who = await project_of(request, Scope.READ)
    only_query(request)
    movieq = api(request)
    found = await movieq.queries.project(project_id)
    if found is None:
        raise NotFound(f"no project {project_id}")
    return answered(movieq.project_state(found, who))


async def tasks(request: Request) -> Response:
    """`GET /projects/{project_id}/tasks`: list a page of a project's tasks, newest first."""
    movieq = api(request)
    project_id, _ = await project_of(request, Scope.READ)
    with query(request, "status", "task_type", "page", "limit") as asked:
        page, limit = asked.number("page", 1, 1, PAGES), asked.number("limit", 20, 1, 100)
        status, task_type = asked.choice("status", STATES), asked.choice("task_type", REGISTRY.tasks)
    found, total = await movieq.queries.page(project_id, status, task_type, page, limit)
    expiry_s = movieq.media_expiry_s()
    rows = [
        TaskRow(
            task.task_id,
            task.task_type,
            task.status,
            utc(task.created_at_ms),
            None if task.ended_at_ms is None else utc(task.ended_at_ms),
            None if task.result is None else movieq.storage.url(task.result.media[0].key, expiry_s),
            task.progress,
        )
        for task in found
    ]
    return answered(TaskPage(rows, Pagination(page, limit, total, -(-total // limit))))


async def upload(request: Request) -> Response:
    """`POST /projects/{project_id}/uploads`: store an image or sound file, sent as raw bytes, for seven days."""
    movieq = api(request)
    project_id, who = await project_of(request, Scope.SUBMIT)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise refused([("Content-Encoding", "send the file without compression")])
    declared = request.headers.get("content-length", "")
    declared_bytes = int(declared[:20]) if declared.isdecimal() else 0
    if declared_bytes > UPLOAD_BYTES:
        raise PayloadTooLarge(f"the upload is larger than {UPLOAD_BYTES} bytes")
    max_bytes = movieq.settings.max_upload_bytes
    with movieq.places.take_for_body(who.id), tempfile.NamedTemporaryFile(prefix="movieq-upload-") as file:
        await movieq.files.check_upload(project_id, declared_bytes, max_bytes)
        size = await _receive(request, file)
        path = Path(file.name)
        media_type = await asyncio.to_thread(_media_type, path)
        upload_id = secrets.token_urlsafe(16)
        prefix = f"uploads/{project_id}/{upload_id}"
        new = Upload(project_id, f"{prefix}/file", size, media_type)
        try:
            # recorded before it is stored: a file without a record would never be deleted
            await movieq.files.add_upload(upload_id, new, prefix, max_bytes)
            await movieq.storage.put(new.key, path, media_type)
        except BaseException:
            with contextlib.suppress(RedisError):  # then it counts until it expires
                await movieq.files.drop_upload(upload_id, new, prefix)
            raise
    return answered(UploadAnswer(upload_id, f"upload:{upload_id}", size, media_type), 201)


async def _receive(request: Request, file: IO[bytes]) -> int:
    size = 0
    async with arriving(UPLOAD_S):
        async for chunk in request.stream():
            size += len(chunk)
            if size > UPLOAD_BYTES:
                raise PayloadTooLarge(f"the upload is larger than {UPLOAD_BYTES} bytes")
            await asyncio.to_thread(file.write, chunk)
    if size == 0:
        raise ValidationFailed("the upload is empty")
    await asyncio.to_thread(file.flush)
    return size


def _media_type(path: Path) -> str:
    head = read_head(path)
    media_type = sniff(head)
    if media_type is None:
        raise ValidationFailed(f"unsupported file type: the upload {kind_problem(head, tuple(Kind))}")
    if media_type.startswith("image/") and (problem := image_problem(path)):
        raise ValidationFailed(f"the upload cannot be used: {problem}")
    return media_type
