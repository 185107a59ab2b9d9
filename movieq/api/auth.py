"""Authorisation by API key. A request's key is checked first, then its scope, then its project."""

from __future__ import annotations

import re
import time

from starlette.requests import HTTPConnection

from movieq import signing
from movieq.api.limits import ALLOWANCE
from movieq.api.state import Caller, api
from movieq.errors import Forbidden, NotFound, Unauthorized
from movieq.settings import Grant, Scope, key_hash
from movieq.tasks.entities import Task
from movieq.tasks.faults import given, refused
from movieq.tasks.states import ProjectId, TaskId
from movieq.tasks.wire import PROJECT_PATTERN, PROJECT_RULE

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


async def caller(request: HTTPConnection, scope: Scope) -> Caller:
    """Return the request's API key and its rights. Raises Unauthorized without a valid key, Forbidden if the key lacks `scope`."""
    keys = {key for each in request.headers.getlist("x-api-key") if (key := each.strip())}
    if len(keys) > 1:
        raise Unauthorized("two API keys: send one X-API-Key")
    key = next(iter(keys), "")
    if not key:
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if kind.lower() == "bearer" else ""
    if not key:
        raise Unauthorized("missing API key: send it as X-API-Key: KEY, or as Authorization: Bearer KEY")
    id = key_hash(key)
    grant = await api(request).keys.grant(id)
    if grant is None:
        raise Unauthorized("invalid API key")
    if scope not in grant.scopes:
        raise Forbidden(f"this API key lacks the scope {scope}; its scopes are {', '.join(sorted(grant.scopes))}")
    request.scope[ALLOWANCE] = await api(request).rates.spend(id)
    return Caller(id, grant)


async def signed_caller(request: HTTPConnection, purpose: str, id: str) -> Caller:
    """Return the caller that the request's signed URL of the resource `id` was issued to.

    Raises InvalidSignature, Expired, RateLimited; Forbidden if the API key was revoked or lacks the scope `read`.
    """
    movieq, query = api(request), request.query_params
    key_id, expires = query.get("key", ""), query.get("expires", "")
    signing.verify(movieq.signing_secrets, purpose, signing.subject(id, key_id), expires, query.get("signature", ""), time.time())
    if key_id:
        grant = await movieq.keys.grant(key_id)
    else:  # an earlier version, which may run beside this one during an upgrade, issued the URL
        grant = Grant(None, frozenset({Scope.READ}))
    if grant is None or Scope.READ not in grant.scopes:
        raise Forbidden("The API key of this URL was revoked: request the task or project again with another key")
    request.scope[ALLOWANCE] = await movieq.rates.spend(f"{purpose} {id} {key_id}")
    return Caller(key_id, grant, int(expires))


def path_task_id(request: HTTPConnection) -> TaskId:
    """Return the task id in the request's path. Raises ValidationFailed if it is not a UUID."""
    text = str(request.path_params["task_id"]).lower()
    if not _UUID.fullmatch(text):
        raise refused([("task_id", f"expected a UUID such as 123e4567-e89b-12d3-a456-426614174000, got {given(text)}")])
    return TaskId(text)


async def task_of(request: HTTPConnection, scope: Scope) -> tuple[Task, Caller]:
    """Return the task in the request's path, and the caller, whose key has `scope`.

    Raises Unauthorized, Forbidden, ValidationFailed, NotFound.
    """
    who = await caller(request, scope)
    task_id = path_task_id(request)
    task = await api(request).queries.task(task_id)
    if task is None or not who.grant.allows(task.project_id):
        raise NotFound(f"no task {task_id}")
    return task, who


async def project_of(request: HTTPConnection, scope: Scope) -> tuple[ProjectId, Caller]:
    """Return the project in the request's path, and the caller, whose key has access to it.

    Raises Unauthorized, Forbidden, ValidationFailed, NotFound.
    """
    who = await caller(request, scope)
    project_id = str(request.path_params["project_id"])
    if not re.fullmatch(PROJECT_PATTERN, project_id):
        raise refused([("project_id", f"expected {PROJECT_RULE}, got {given(project_id)}")])
    if not who.grant.allows(project_id):
        if scope is Scope.READ:
            raise NotFound(f"no project {project_id}")
        raise Forbidden(f"this API key has no access to project {project_id}")
    return ProjectId(project_id), who
