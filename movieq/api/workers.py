"""The endpoint for workers. It returns a row for each engine process of each worker."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from movieq.api.auth import caller
from movieq.api.query import only_query
from movieq.api.state import answered, api
from movieq.queue.queries import Queries
from movieq.settings import Grant, Scope
from movieq.tasks.entities import WorkerState, WorkerStatus
from movieq.tasks.wire import WorkersAnswer


async def status(request: Request) -> Response:
    """`GET /workers/status`: list the engine processes of all workers."""
    queries = api(request).queries
    who = await caller(request, Scope.READ)
    only_query(request)
    rows = await _visible(queries, await queries.workers(), who.grant)
    active = sum(row.status in (WorkerState.BUSY, WorkerState.ACTIVE) for row in rows)
    mean = sum(row.gpu_utilization for row in rows) / len(rows) if rows else 0.0
    return answered(WorkersAnswer(rows, len(rows), active, mean))


async def _visible(queries: Queries, rows: list[WorkerStatus], grant: Grant) -> list[WorkerStatus]:
    """Return the rows with the ids of tasks removed that the key has no access to."""
    if grant.projects is None:
        return rows
    ids = [row.current_task_id for row in rows if row.current_task_id]
    seen = {task.task_id for task in await queries.tasks(ids) if grant.allows(task.project_id)}
    return [row if row.current_task_id in seen else msgspec.structs.replace(row, current_task_id=None) for row in rows]
