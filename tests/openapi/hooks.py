"""What schemathesis loads beside /openapi.json: tasks that exist, and a check that knows what a JSON Schema cannot say."""

from __future__ import annotations

import os
import re
import zlib
from typing import Any, Final

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

TASKS: Final = os.environ["TASKS"].split(",")
"""Tasks of which the first has completed, so that nobody waits for it."""
UNKNOWN: Final = "00000000-0000-4000-8000-000000000000"
STATES: Final = {"invalid_state", "idempotency_mismatch"}
"""Errors that depend on earlier requests."""
UNSAYABLE: Final = re.compile(
    "|".join(
        (
            r"task_data\.model: ",  # the models of this installation
            r"task_data\.loras\[\d+\]\.name: ",  # and their LoRAs
            r"task_data\.fps: ",  # the value of a ratio or of a number as text
            r"task_data\.language: .*got \"[zZ][hH][-_]",  # a Chinese language that nothing speaks
            r"task_data\.resolution: width x height x frames ",
            r"metadata: .*\bbytes\b",
            r".*: expected a whole number.* got -?\d+\.0\b",  # an integer for JSON Schema
            r".*: .*\b64 bits\b",  # anywhere in an object that may have any field
            r"callback_url: .*\b(host|port|well-formed|private)\b",
            r"unsupported file type|the upload is empty",  # an upload's bytes
        )
    ),
    re.DOTALL,
)
"""Messages of refusals of requests that fit their schema."""
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@schemathesis.hook
def before_load_schema(context: Any, schema: dict[str, Any]) -> None:
    """Forget the limits of long texts: it takes minutes to write them to the last character."""
    left: list[Any] = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if value.get("maxLength", 0) > 1000:
                del value["maxLength"]
            left += value.values()
        elif isinstance(value, list):
            left += value


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Ask for a task that exists, every other time, and never for one that would be waited for."""
    operation = case.operation.definition.raw["operationId"]
    task_id = str(case.path_parameters.get("task_id", ""))
    number = zlib.crc32(task_id.encode())
    if _UUID.fullmatch(task_id):
        known = TASKS[:1] if operation in ("stream_task", "get_task") else TASKS
        case.path_parameters["task_id"] = known[number // 2 % len(known)] if number % 2 else UNKNOWN
    if operation == "stream_project":
        case.path_parameters["project_id"] = "without-tasks"


@schemathesis.check
def valid_requests_are_accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    """As positive_data_acceptance, except for what depends on earlier requests, on settings, or on more than a schema can say."""
    if response.status_code in (400, 422):
        answer = response.json()
        if answer["error"] in STATES or UNSAYABLE.match(answer["message"]):
            return True
    return positive_data_acceptance(ctx, response, case)
