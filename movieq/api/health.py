"""Is it there, and does it work? Also what can be submitted."""

from __future__ import annotations

import time

import msgspec
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response

import movieq as package
from movieq import models
from movieq.api.auth import caller
from movieq.api.state import answered, api, now, only_query
from movieq.contracts import HealthAnswer, Kind, TaskTypeAnswer, TaskTypesAnswer, WorkerState
from movieq.models import Engine
from movieq.params import MAX_DURATION_S, PARAMS
from movieq.settings import EngineChoice, Scope


async def health(request: Request) -> Response:
    """`GET /health`: 200 healthy or degraded, 503 where Redis is away. Needs no key."""
    movieq = api(request)
    uptime = round(time.monotonic() - movieq.started_s, 3)
    try:
        workers = [row for row in await movieq.store.workers() if row.status is not WorkerState.OFFLINE]
        sizes = await movieq.store.queue_sizes()
    except (RedisError, OSError, TimeoutError):
        away = HealthAnswer("unhealthy", now(), package.__version__, "unavailable", 0, dict.fromkeys(Kind, 0), uptime)
        return answered(away, 503, {"Retry-After": "2"})
    served = {kind for row in workers for kind in row.queues}
    stuck = any(size and kind not in served for kind, size in sizes.items())
    healthy = not stuck and await movieq.storage.usable()
    return answered(
        HealthAnswer("healthy" if healthy else "degraded", now(), package.__version__, "connected", len(workers), sizes, uptime)
    )


async def task_types(request: Request) -> Response:
    """`GET /task-types`: what can be submitted here, with the JSON Schema of each task_data."""
    movieq = api(request)
    await caller(request, Scope.READ)
    only_query(request)
    gpu = movieq.settings.engine is EngineChoice.DIFFUSERS or (movieq.settings.engine is EngineChoice.AUTO and await movieq.had_gpu())
    answers = []
    for task_type, cls in PARAMS.items():
        default = models.default(movieq.models, Engine.DIFFUSERS, task_type) if gpu else None
        answers.append(
            TaskTypeAnswer(
                task_type,
                (cls.__doc__ or "").partition(": ")[2],
                [name for name, model in movieq.models.items() if task_type in model.tasks],
                default or next((name for name, model in movieq.models.items() if task_type in model.tasks), None),
                MAX_DURATION_S[task_type],
                _inlined(msgspec.json.schema(cls)),
            )
        )
    return answered(TaskTypesAnswer(answers))


def _inlined(schema: dict[str, object]) -> dict[str, object]:
    """The schema as a plain object: the one definition that msgspec refers to, with the others beside it."""
    definitions = schema.get("$defs")
    if not isinstance(definitions, dict) or "$ref" not in schema:
        return schema
    name = str(schema["$ref"]).rpartition("/")[2]
    rest = {key: value for key, value in definitions.items() if key != name}
    return {**definitions[name], **({"$defs": rest} if rest else {})}
