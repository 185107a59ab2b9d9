"""Authorisation: API keys from the settings and from Redis; a request is checked for its key, then the scope, then the project."""

from __future__ import annotations

import re

import msgspec
from starlette.requests import HTTPConnection

from movieq.api.state import api
from movieq.errors import Forbidden, NotFound, Unauthorized, ValidationFailed
from movieq.settings import Grant, Scope, key_hash
from movieq.tasks.entities import Task
from movieq.tasks.states import ProjectId, TaskId
from movieq.tasks.wire import PROJECT_PATTERN

_UUID = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")


class Caller(msgspec.Struct, frozen=True):
    """The holder of a key: `id` is the hash of the key."""

    id: str
    grant: Grant


async def caller(request: HTTPConnection, scope: Scope) -> Caller:
    """Return the holder of the request's key. Raises Unauthorized, and Forbidden for a key without `scope`."""
    key = request.headers.get("x-api-key")
    if key is None:
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if kind.lower() == "bearer" else ""
    if not key:
        raise Unauthorized("no API key: send it as X-API-Key: KEY, or as Authorization: Bearer KEY")
    id = key_hash(key)
    grant = await api(request).keys.grant(id)
    if grant is None:
        raise Unauthorized("this API key is not known")
    if scope not in grant.scopes:
        raise Forbidden(f"this API key may not {scope}: its scopes are {', '.join(sorted(grant.scopes))}")
    return Caller(id, grant)


def path_task_id(request: HTTPConnection) -> TaskId:
    """Return the task id of the path. Raises ValidationFailed where it is no UUID."""
    text = str(request.path_params["task_id"]).lower()
    if not _UUID.match(text):
        raise ValidationFailed("task_id: a UUID is expected, such as 123e4567-e89b-12d3-a456-426614174000")
    return TaskId(text)


async def task_of(request: HTTPConnection, scope: Scope) -> tuple[Task, Caller]:
    """Return the task of the path and the caller, who may `scope` it. Raises Unauthorized, Forbidden, ValidationFailed, NotFound."""
    who = await caller(request, scope)
    task_id = path_task_id(request)
    task = await api(request).queries.task(task_id)
    if task is None or not who.grant.allows(task.project_id):
        raise NotFound(f"no task {task_id}")
    return task, who


async def project_of(request: HTTPConnection, scope: Scope) -> tuple[ProjectId, Caller]:
    """Return the project of the path and the caller, a member of it. Raises Unauthorized, Forbidden, ValidationFailed, NotFound."""
    who = await caller(request, scope)
    project_id = str(request.path_params["project_id"])
    if not re.fullmatch(PROJECT_PATTERN, project_id):
        raise ValidationFailed(f"project_id: {PROJECT_PATTERN} is expected")
    if not who.grant.allows(project_id):
        if scope is Scope.READ:
            raise NotFound(f"no project {project_id}")
        raise Forbidden(f"this API key does not belong to project {project_id}")
    return ProjectId(project_id), who
