"""The OpenAPI description of the API: its operations, their errors, and the webhook. `movieq.api.schemas` has the schemas of the bodies.

The docstrings of the handlers and of the error classes become the descriptions. What differs from one installation to another, such as the
models, is in `GET /task-types` instead, so that a generated client fits all of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import movieq as package
from movieq.api import deliveries, events, health, projects, queues, tasks, workers
from movieq.api.schemas import Json, Struct, ref, schemas
from movieq.api.state import answered, api
from movieq.errors import MethodNotAllowed, RangeRefused, RequestError
from movieq.settings import Scope
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import STATES
from movieq.tasks.wire import (
    PROJECT_PATTERN,
    CancelAnswer,
    DeadLettersAnswer,
    DeliveriesAnswer,
    DeliveryAnswer,
    HealthAnswer,
    LiveAnswer,
    MetricsAnswer,
    ProjectState,
    QueuesAnswer,
    ReadyAnswer,
    Receipt,
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
    """One operation of the API. The docstring of its handler describes it; `name` is its operationId.

    `answer` is None if the response is not JSON. `body` is a Struct or a media type. `query` and `headers` map parameters to schemas.
    `errors` are the statuses that only some operations answer. `unhealthy` is the answer of a health check with status 503. `events` is the
    schema of a stream's events.
    """

    handler: Callable[..., Any]
    route: str
    name: str
    summary: str
    scope: Scope | None
    answer: Struct | None = None
    status: int = 200
    body: Struct | str | None = None
    query: dict[str, Json] = {}
    headers: dict[str, Json] = {}
    errors: tuple[int, ...] = ()
    unhealthy: Struct | None = None
    events: str = ""

    @property
    def description(self) -> str:
        """Return what the operation does and which key it needs."""
        text = inspect.cleandoc(self.handler.__doc__ or "").partition(": ")[2]
        signed = ", or the signature of an `events_url`" if self.events else ""
        return f"{text[0].upper()}{text[1:]}" + (f" Needs a key with the scope `{self.scope}`{signed}." if self.scope else "")


def _whole(least: int, most: int, default: int, description: str) -> Json:
    return {"type": "integer", "minimum": least, "maximum": most, "default": default, "description": description}


def _some(names: Iterable[str], description: str) -> Json:
    each = f" *({'|'.join(names)}) *"
    return {"type": "string", "pattern": f"^{each}(,{each})*$", "description": f"{description} One or more, comma-separated."}


_EVENT_ID: Final = {"type": "string", "pattern": "^([0-9]{1,18}-[0-9]{1,18})?$"}
_RESUME: Final[dict[str, Json]] = {
    "after": {**_EVENT_ID, "description": "Continue after the event with this id."},
    "expires": {"type": "integer", "description": "Part of a signed `events_url`; use it together with its `signature`."},
}
_LAST_EVENT_ID: Final = {"Last-Event-ID": {**_EVENT_ID, "description": "Overrides `after`. Browsers send it when they reconnect."}}
_IDEMPOTENCY_KEY: Final = {
    "type": "string",
    "pattern": "^[!-~]{1,255}$",
    "description": "Makes a submit safe to repeat: for 24 hours, the same key with the same bytes of the body gets the same receipt.",
}


@cache
def operations() -> dict[str, tuple[Operation, ...]]:
    """Return the operations by tag. Plug-ins must have been loaded, since their task types are among the parameters."""
    read, submit, admin, types = Scope.READ, Scope.SUBMIT, Scope.ADMIN, [*REGISTRY.tasks]
    listed: dict[str, Json] = {
        "status": {"type": "string", "enum": [*STATES], "description": "Only tasks in this state."},
        "task_type": {"type": "string", "enum": types, "description": "Only tasks of this type."},
        "page": _whole(1, projects.PAGES, 1, "Number of the page."),
        "limit": _whole(1, 100, 20, "Most tasks of a page."),
    }
    filters = {**_RESUME, "task_type": _some(types, "Only tasks of these types."), "status": _some(STATES, "Only tasks in these states.")}
    wait = _whole(0, tasks.WAIT_S, 0, "Seconds to wait for the end of the task before answering.")
    letters, letter = {"limit": _whole(1, 1000, 100, "Most dead letters of the answer.")}, "DELETE /dead-letters/{task_id}"
    resend = "POST /tasks/{task_id}/deliveries/{delivery_id}/resend"
    upload = "POST /projects/{project_id}/uploads"
    return {
        "tasks": (
            Operation(
                tasks.submit,
                "POST /tasks/submit",
                "submit_task",
                "Submit a task",
                submit,
                Receipt,
                201,
                SubmitRequest,
                headers={"Idempotency-Key": _IDEMPOTENCY_KEY},
                errors=(409, 422, 429),
            ),
            Operation(tasks.status, "GET /tasks/{task_id}/status", "get_task", "Get a task", read, TaskState, query={"wait": wait}),
            Operation(tasks.cancel, "DELETE /tasks/{task_id}/cancel", "cancel_task", "Cancel a task", submit, CancelAnswer),
            Operation(tasks.cancel, "POST /tasks/{task_id}/cancel", "post_cancel", "Cancel a task by POST", submit, CancelAnswer),
            Operation(tasks.cancel, "DELETE /tasks/{task_id}", "delete_task", "Cancel a task by its own path", submit, CancelAnswer),
            Operation(tasks.retry, "POST /tasks/{task_id}/retry", "retry_task", "Retry a failed task", submit, Receipt, 201),
            Operation(health.task_types, "GET /task-types", "list_task_types", "List task types", read, TaskTypesAnswer),
        ),
        "projects": (
            Operation(projects.project, "GET /projects/{project_id}", "get_project", "Get a project", read, ProjectState),
            Operation(projects.tasks, "GET /projects/{project_id}/tasks", "list_tasks", "List tasks", read, TaskPage, query=listed),
            Operation(projects.upload, upload, "upload_file", "Upload a file", submit, UploadAnswer, 201, "application/octet-stream"),
        ),
        "events": (
            Operation(
                events.TaskEvents,
                "GET /tasks/{task_id}/events",
                "stream_task",
                "Stream a task's events",
                read,
                query=_RESUME,
                headers=_LAST_EVENT_ID,
                events="TaskEvent",
            ),
            Operation(
                events.ProjectEvents,
                "GET /projects/{project_id}/events",
                "stream_project",
                "Stream a project's events",
                read,
                query=filters,
                headers=_LAST_EVENT_ID,
                events="ProjectEvent",
            ),
        ),
        "operators": (
            Operation(workers.status, "GET /workers/status", "list_workers", "List workers", read, WorkersAnswer),
            Operation(queues.queues, "GET /queues", "list_queues", "List queues", admin, QueuesAnswer),
            Operation(queues.metrics, "GET /tasks/metrics", "get_metrics", "Get totals and rates", read, MetricsAnswer),
            Operation(queues.health, "GET /tasks/health", "list_alerts", "List alerts", read, TasksHealthAnswer),
            Operation(
                deliveries.deliveries, "GET /tasks/{task_id}/deliveries", "list_deliveries", "List deliveries", read, DeliveriesAnswer
            ),
            Operation(deliveries.resend, resend, "resend_delivery", "Send a delivery again", admin, DeliveryAnswer),
            Operation(
                queues.dead_letters, "GET /dead-letters", "list_dead_letters", "List dead letters", admin, DeadLettersAnswer, query=letters
            ),
            Operation(queues.drop_dead_letter, letter, "remove_dead_letter", "Remove a dead letter", admin, status=204),
        ),
        "health": (
            Operation(health.health, "GET /health", "get_health", "Health check", None, HealthAnswer, unhealthy=HealthAnswer),
            Operation(health.live, "GET /health/live", "get_liveness", "Liveness check", None, LiveAnswer),
            Operation(health.ready, "GET /health/ready", "get_readiness", "Readiness check", None, ReadyAnswer, unhealthy=ReadyAnswer),
        ),
    }


_TAGS: Final = {
    "tasks": "Submit tasks, read their status, cancel and retry them.",
    "projects": "A project: its tasks, its totals, its uploads.",
    "events": "Streams of server-sent events.",
    "operators": "Workers, queues, deliveries, dead letters, totals and alerts.",
    "health": "Health checks.",
}
_PATHS: Final[dict[str, Json]] = {
    "task_id": {"type": "string", "format": "uuid"},
    "project_id": {"type": "string", "pattern": PROJECT_PATTERN},
    "delivery_id": {"type": "string", "minLength": 1},
}
_SECURITY: Final = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key as a bearer token."},
    "signed_url": {
        "type": "apiKey",
        "in": "query",
        "name": "signature",
        "description": "The signature of an `events_url`, which is valid for 24 hours. Use the URL exactly as issued.",
    },
}
_ABOUT: Final = (
    "Times are RFC 3339 in UTC with `Z`; durations are in seconds unless the name of the field says otherwise. An optional field that is "
    "null counts as absent. Newer versions may add fields to answers, events and webhooks. Every error has the body `ErrorAnswer`."
)


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`: return the description of the API."""
    return answered(document(api(request).public_url))


@cache
def document(public_url: str) -> Json:
    """Return the description of the whole API as OpenAPI 3.1."""
    errors = _errors()
    answers = {op.answer for group in operations().values() for op in group if op.answer}
    paths: dict[str, Json] = {}
    for tag, group in operations().items():
        for op in group:
            method, path = op.route.split()
            paths.setdefault(f"/api/v1{path}", {})[method.lower()] = _operation(op, tag, errors)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "movieq",
            "version": package.__version__,
            "summary": "Storyboards to clips, descriptions to images, lines to voices.",
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": public_url}],
        "security": [{"key": []}, {"bearer": []}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "webhooks": {"task_ended": {"post": _webhook()}},
        "components": {
            "schemas": schemas(answers, {_error_name(status): {kind.code for kind in kinds} for status, kinds in errors.items()}),
            "responses": {_error_name(status): _error_response(status, kinds) for status, kinds in errors.items()},
            "securitySchemes": _SECURITY,
        },
    }


# ── Operations ──


def _operation(op: Operation, tag: str, errors: dict[int, list[type[RequestError]]]) -> Json:
    places = {"path": {name: _PATHS[name] for name in re.findall(r"\{(\w+)\}", op.route)}, "query": op.query, "header": op.headers}
    statuses = {400, 414, 431, 500, *op.errors}
    statuses |= {401, 403, 503} if op.scope else set()
    statuses |= {404} if places["path"] else set()
    statuses |= {413} if op.body else set()
    described: Json = {
        "tags": [tag],
        "summary": op.summary,
        "description": op.description,
        "operationId": op.name,
        "parameters": [_parameter(name, place, schema) for place, found in places.items() for name, schema in found.items()],
        "responses": {
            **_responses(op),
            **{str(status): {"$ref": f"#/components/responses/{_error_name(status)}"} for status in errors if status in statuses},
        },
        "security": [{each: [op.scope]} for each in _SECURITY if each != "signed_url" or op.events] if op.scope else [],
    }
    if isinstance(op.body, str):
        described["requestBody"] = {"required": True, "content": {op.body: {"schema": {"type": "string", "format": "binary"}}}}
    elif op.body is not None:
        described["requestBody"] = {"required": True, "content": _json(op.body)}
    return described


def _responses(op: Operation) -> Json:
    done: Json = {"description": op.summary}
    if op.answer is not None:
        done["content"] = _json(op.answer)
    if op.body is SubmitRequest:
        done["headers"] = {
            "Location": {"schema": {"type": "string"}, "description": "The `status_url`."},
            "Idempotent-Replayed": {"schema": {"type": "string"}, "description": "`true` if the task had been submitted before."},
        }
    if op.events:
        # generators take the stream for one text, schemathesis for a sequence of objects, as OpenAPI 3.2 will
        done["content"] = {"text/event-stream": {"schema": {"anyOf": [{"type": "string"}, ref(op.events)]}}}
        return {"200": done, "204": {"description": "The client has all events of the task"}} if op.events == "TaskEvent" else {"200": done}
    unhealthy = {"503": {"description": "Unhealthy or not ready", "content": _json(op.unhealthy)}} if op.unhealthy else {}
    return {str(op.status): done, **unhealthy}


def _webhook() -> Json:
    headers = {
        "webhook-id": "Id of the delivery, the same in each repeat.",
        "webhook-timestamp": "Unix time of this try, in seconds.",
        "webhook-signature": "Signatures as in Standard Webhooks: one `v1,` part for each secret. Absent without `MOVIEQ_WEBHOOK_SECRET`.",
        "X-Webhook-Signature": "The hex HMAC-SHA256 of the raw body, keyed with the text of the first secret. Absent without a secret.",
    }
    return {
        "tags": ["tasks"],
        "summary": "A task has ended",
        "description": "Sent to the `callback_url` of a submit when the task completes, fails or is cancelled, and if its result gains a "
        "`payload_media_id` later. Any of them may be sent more than once.",
        "operationId": "task_ended",
        "security": [],
        "parameters": [_parameter(name, "header", {"type": "string", "description": text}) for name, text in headers.items()],
        "requestBody": {"required": True, "content": _json(Webhook)},
        "responses": {
            "2XX": {"description": "Received. Any other answer is tried again, ten times in a day and a half"},
            "410": {"description": "Refused for good: it is not tried again"},
        },
    }


def _parameter(name: str, place: str, schema: Json) -> Json:
    found: Json = {"name": name, "in": place, "required": place == "path", "schema": schema}
    if "description" in schema:
        found["description"] = schema["description"]
        found["schema"] = {key: value for key, value in schema.items() if key != "description"}
    return found


def _json(struct: Struct) -> Json:
    return {"application/json": {"schema": ref(struct.__name__)}}


# ── Errors ──


def _errors() -> dict[int, list[type[RequestError]]]:
    """Return the classes of the errors of operations by their status."""
    found: dict[int, list[type[RequestError]]] = {}
    for kind in _subclasses(RequestError):
        if kind not in (MethodNotAllowed, RangeRefused):  # no operation answers these
            found.setdefault(kind.status, []).append(kind)
    return dict(sorted(found.items()))


def _subclasses(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for each in kind.__subclasses__():
        if each.__module__ == RequestError.__module__:  # else a client's own
            yield each
            yield from _subclasses(each)


def _error_name(status: int) -> str:
    return f"Error{status}"


def _error_response(status: int, kinds: list[type[RequestError]]) -> Json:
    described: Json = {
        "description": " ".join(f"`{kind.code}`: {kind.__doc__}" for kind in kinds),
        "content": {"application/json": {"schema": ref(_error_name(status))}},
    }
    if status in (429, 503):
        described["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait before the next try."}}
    return described
