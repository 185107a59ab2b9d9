"""`/openapi.json`, made from the Structs: what the code takes and answers, and nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import movieq as package
from movieq.api.state import answered, api
from movieq.tasks import states as c
from movieq.tasks.entities import ProcessingProgress
from movieq.tasks.registry import REGISTRY
from movieq.tasks.wire import (
    CancelAnswer,
    DeadLettersAnswer,
    DeliveriesAnswer,
    DeliveryAnswer,
    ErrorAnswer,
    HealthAnswer,
    LiveAnswer,
    MetricsAnswer,
    ProjectSnapshot,
    ProjectState,
    QueuesAnswer,
    ReadyAnswer,
    Receipt,
    Snapshot,
    SubmitRequest,
    TaskPage,
    TasksHealthAnswer,
    TaskState,
    TaskTypesAnswer,
    UploadAnswer,
    Webhook,
    WorkersAnswer,
)


class Operation(msgspec.Struct, frozen=True):
    """One operation: `query` maps names to schemas, `answer` is None for what is no JSON, `body` may be a media type.

    `also` are other statuses that are no errors, and their answers.
    """

    method: str
    path: str
    summary: str
    answer: type[msgspec.Struct] | None
    status: int = 200
    body: type[msgspec.Struct] | str | None = None
    query: dict[str, dict[str, Any]] = {}
    answer_type: str = "application/json"
    errors: tuple[int, ...] = (400, 401, 403, 404, 503)
    also: dict[int, type[msgspec.Struct] | None] = {}


_PAGE: Final[dict[str, dict[str, Any]]] = {
    "status": {"type": "string", "enum": [*c.TaskStatus]},
    "task_type": {"type": "string", "enum": [*REGISTRY.tasks]},
    "page": {"type": "integer", "minimum": 1, "default": 1},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
}
_WAIT: Final = {"type": "integer", "minimum": 0, "maximum": 60, "default": 0}
_SIGNED: Final[dict[str, dict[str, Any]]] = {"expires": {"type": "integer"}, "signature": {"type": "string"}}

_MANY: Final = {"type": "string", "description": "one or more, comma-separated"}

OPERATIONS: Final = (
    Operation("get", "/health", "Health check", HealthAnswer, errors=(), also={503: HealthAnswer}),
    Operation("get", "/health/live", "Liveness: the process answers", LiveAnswer, errors=()),
    Operation("get", "/health/ready", "Readiness: tasks can be accepted and run", ReadyAnswer, errors=(), also={503: ReadyAnswer}),
    Operation("post", "/tasks/submit", "Accept a task", Receipt, 201, SubmitRequest, errors=(400, 401, 403, 409, 413, 422, 429, 503)),
    Operation("get", "/tasks/{task_id}/status", "The state of a task", TaskState, query={"wait": _WAIT}),
    Operation("delete", "/tasks/{task_id}/cancel", "Cancel a task", CancelAnswer),
    Operation("post", "/tasks/{task_id}/cancel", "Cancel a task", CancelAnswer),
    Operation("delete", "/tasks/{task_id}", "Cancel a task", CancelAnswer),
    Operation("post", "/tasks/{task_id}/retry", "Queue a failed task again", Receipt, 201),
    Operation("get", "/projects/{project_id}/tasks", "A page of a project's tasks, newest first", TaskPage, query=_PAGE),
    Operation("get", "/workers/status", "Who works", WorkersAnswer),
    Operation(
        "get",
        "/tasks/{task_id}/events",
        "The progress of a task; 204 where nothing will follow",
        None,
        query={"after": {"type": "string"}, **_SIGNED},
        answer_type="text/event-stream",
        also={204: None},
    ),
    Operation("get", "/tasks/{task_id}/deliveries", "The webhooks of a task, and its way into the CMS", DeliveriesAnswer),
    Operation("post", "/tasks/{task_id}/deliveries/{delivery_id}/resend", "Send a delivery again", DeliveryAnswer),
    Operation("get", "/projects/{project_id}", "A project and how many tasks it has in each state", ProjectState),
    Operation(
        "get",
        "/projects/{project_id}/events",
        "The changes of a project's tasks, and their progress",
        None,
        query={"after": {"type": "string"}, "task_type": _MANY, "status": _MANY, **_SIGNED},
        answer_type="text/event-stream",
    ),
    Operation(
        "post",
        "/projects/{project_id}/uploads",
        "Keep the bytes of an image or a sound for seven days",
        UploadAnswer,
        201,
        "application/octet-stream",
        errors=(400, 401, 403, 413, 503),
    ),
    Operation("get", "/queues", "What waits, what runs, for how long", QueuesAnswer, errors=(401, 403, 503)),
    Operation("get", "/tasks/metrics", "Totals, rates in percent, average durations", MetricsAnswer, errors=(401, 403, 503)),
    Operation("get", "/tasks/health", "What an operator should look at", TasksHealthAnswer, errors=(401, 403, 503)),
    Operation(
        "get",
        "/dead-letters",
        "Tasks that were given up after their worker or engine died with them",
        DeadLettersAnswer,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}},
        errors=(400, 401, 403, 503),
    ),
    Operation("delete", "/dead-letters/{task_id}", "List a dead letter no more", None, 204),
    Operation("get", "/task-types", "What can be submitted here", TaskTypesAnswer),
)


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    return answered(document(api(request).public_url))


@cache
def document(public_url: str) -> dict[str, Any]:
    """The whole API as OpenAPI 3.1."""
    structs: set[type[msgspec.Struct]] = {ErrorAnswer, ProcessingProgress, ProjectSnapshot, Snapshot, Webhook}
    structs |= {spec.params for spec in REGISTRY.tasks.values()}
    structs |= {op.answer for op in OPERATIONS if op.answer} | {op.body for op in OPERATIONS if isinstance(op.body, type)}
    ordered = sorted(structs, key=lambda struct: struct.__name__)
    refs, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(ordered, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS:
        paths.setdefault(f"/api/v1{op.path}", {})[op.method] = _operation(op, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "movieq",
            "version": package.__version__,
            "summary": "Storyboards to clips, descriptions to images, lines to voices.",
        },
        "servers": [{"url": public_url}],
        "security": [{"key": []}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(op: Operation, schemas: dict[type[msgspec.Struct], dict[str, Any]]) -> dict[str, Any]:
    content = {op.answer_type: {"schema": schemas[op.answer]} if op.answer else {}}
    error = {"content": {"application/json": {"schema": schemas[ErrorAnswer]}}}
    parameters = [_parameter(name[1:-1], "path", {"type": "string"}) for name in op.path.split("/") if name.startswith("{")]
    parameters += [_parameter(name, "query", schema) for name, schema in op.query.items()]
    if op.path == "/tasks/submit":
        parameters.append(_parameter("Idempotency-Key", "header", {"type": "string", "maxLength": 255}))
    described: dict[str, Any] = {
        "summary": op.summary,
        "operationId": f"{op.method}_{op.path.strip('/').replace('/', '_').replace('{', '').replace('}', '').replace('-', '_')}",
        "parameters": parameters,
        "responses": {
            str(op.status): {"description": op.summary, "content": content},
            **{str(status): {"description": "An error", **error} for status in op.errors},
            **{
                str(status): {
                    "description": op.summary,
                    **({"content": {"application/json": {"schema": schemas[struct]}}} if struct else {}),
                }
                for status, struct in op.also.items()
            },
        },
    }
    if op.body is not None:
        body = {op.body: {}} if isinstance(op.body, str) else {"application/json": {"schema": schemas[op.body]}}
        described["requestBody"] = {"required": True, "content": body}
    if op.path.startswith("/health"):
        described["security"] = []
    if "signature" in op.query:
        described["security"] = [{"key": []}, {"bearer": []}, {}]
    return described


def _parameter(name: str, place: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
