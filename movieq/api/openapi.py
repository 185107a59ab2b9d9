"""The OpenAPI description of the API, generated from the Structs that it decodes and encodes."""

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
    """One operation of the API.

    `query` maps parameter names to schemas. `answer` is None if the response is not JSON. `body` is a Struct or a media type. `also` maps
    further statuses that are not errors to their responses.
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
    Operation("get", "/health/live", "Liveness check", LiveAnswer, errors=()),
    Operation("get", "/health/ready", "Readiness check: tasks can be accepted and run", ReadyAnswer, errors=(), also={503: ReadyAnswer}),
    Operation("post", "/tasks/submit", "Submit a task", Receipt, 201, SubmitRequest, errors=(400, 401, 403, 409, 413, 422, 429, 503)),
    Operation("get", "/tasks/{task_id}/status", "Get a task", TaskState, query={"wait": _WAIT}),
    Operation("delete", "/tasks/{task_id}/cancel", "Cancel a task", CancelAnswer),
    Operation("post", "/tasks/{task_id}/cancel", "Cancel a task", CancelAnswer),
    Operation("delete", "/tasks/{task_id}", "Cancel a task", CancelAnswer),
    Operation("post", "/tasks/{task_id}/retry", "Retry a failed task", Receipt, 201),
    Operation("get", "/projects/{project_id}/tasks", "List a project's tasks, newest first", TaskPage, query=_PAGE),
    Operation("get", "/workers/status", "List workers", WorkersAnswer),
    Operation(
        "get",
        "/tasks/{task_id}/events",
        "Stream a task's events; 204 if the client has them all",
        None,
        query={"after": {"type": "string"}, **_SIGNED},
        answer_type="text/event-stream",
        also={204: None},
    ),
    Operation("get", "/tasks/{task_id}/deliveries", "List a task's webhook and CMS deliveries, sent and pending", DeliveriesAnswer),
    Operation("post", "/tasks/{task_id}/deliveries/{delivery_id}/resend", "Send a delivery again", DeliveryAnswer),
    Operation("get", "/projects/{project_id}", "Get a project with the number of its tasks in each state", ProjectState),
    Operation(
        "get",
        "/projects/{project_id}/events",
        "Stream the events of a project's tasks",
        None,
        query={"after": {"type": "string"}, "task_type": _MANY, "status": _MANY, **_SIGNED},
        answer_type="text/event-stream",
    ),
    Operation(
        "post",
        "/projects/{project_id}/uploads",
        "Upload an image or sound file, stored for seven days",
        UploadAnswer,
        201,
        "application/octet-stream",
        errors=(400, 401, 403, 413, 503),
    ),
    Operation("get", "/queues", "List queues with their waiting and running tasks", QueuesAnswer, errors=(401, 403, 503)),
    Operation("get", "/tasks/metrics", "Get totals, rates, average durations and GPU seconds", MetricsAnswer, errors=(401, 403, 503)),
    Operation("get", "/tasks/health", "List alerts", TasksHealthAnswer, errors=(401, 403, 503)),
    Operation(
        "get",
        "/dead-letters",
        "List dead letters: tasks that failed because their engine process or worker died too often",
        DeadLettersAnswer,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}},
        errors=(400, 401, 403, 503),
    ),
    Operation("delete", "/dead-letters/{task_id}", "Remove a dead letter", None, 204),
    Operation("get", "/task-types", "List task types", TaskTypesAnswer),
)


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`: return the description of the API."""
    return answered(document(api(request).public_url))


@cache
def document(public_url: str) -> dict[str, Any]:
    """Return the description of the whole API as OpenAPI 3.1."""
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
