"""The health checks, and the list of task types.

The health checks need no API key. They therefore show no host names, addresses or paths, and ask Redis at most once a second.
"""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import movieq as package
from movieq.api.auth import caller
from movieq.api.query import only_query
from movieq.api.readiness import AWAY
from movieq.api.state import answered, api, now
from movieq.models import choice
from movieq.models.table import Engine
from movieq.settings import Scope
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import EngineChoice, Kind
from movieq.tasks.wire import CheckName, HealthAnswer, LiveAnswer, ReadyAnswer, TaskTypeAnswer, TaskTypesAnswer


async def live(request: Request) -> Response:
    """`GET /health/live`: answer 200 while the process runs. Needs no key. Checks nothing else, since a restart would not help."""
    return answered(LiveAnswer("alive", now(), package.__version__, _uptime_s(request)))


async def ready(request: Request) -> Response:
    """`GET /health/ready`: answer 200 if tasks can be accepted, stored and run, else 503 with the failed checks. Needs no key."""
    checks = list((await api(request).readiness.checks()).values())
    if all(check.ok for check in checks):
        return answered(ReadyAnswer("ready", now(), package.__version__, checks))
    return answered(ReadyAnswer("not_ready", now(), package.__version__, checks), 503, {"Retry-After": "2"})


async def health(request: Request) -> Response:
    """`GET /health`: answer 200 if healthy or degraded, 503 if Redis is unavailable. Needs no key."""
    movieq = api(request)
    uptime = _uptime_s(request)
    if (load := await movieq.readiness.load()) is None:
        away = HealthAnswer("unhealthy", now(), package.__version__, "unavailable", 0, dict.fromkeys(Kind, 0), uptime, [AWAY])
        return answered(away, 503, {"Retry-After": "2"})
    checks = await movieq.readiness.checks()
    problems = [checks[name].message for name in (CheckName.REDIS, CheckName.STORAGE) if not checks[name].ok]
    problems += [movieq.readiness.evicts] if movieq.readiness.evicts else []
    problems += [f"no live worker can run {each.waiting} waiting tasks of {each.kind}: start a worker that can" for each in load.stranded]
    state = "degraded" if problems else "healthy"
    return answered(HealthAnswer(state, now(), package.__version__, "connected", load.workers, load.queue_sizes, uptime, problems))


def _uptime_s(request: Request) -> float:
    return round(time.monotonic() - api(request).started_s, 3)


async def task_types(request: Request) -> Response:
    """`GET /task-types`: list the task types, each with the JSON Schema of its task_data."""
    movieq = api(request)
    await caller(request, Scope.READ)
    only_query(request)
    gpu_bytes = await movieq.gpu_bytes()
    gpu = movieq.settings.engine is EngineChoice.DIFFUSERS or (movieq.settings.engine is EngineChoice.AUTO and gpu_bytes > 0)
    answers = []
    for task_type, spec in REGISTRY.tasks.items():
        default = choice.default(movieq.models, Engine.DIFFUSERS, task_type, gpu_bytes=gpu_bytes) if gpu else None
        answers.append(
            TaskTypeAnswer(
                task_type,
                spec.description,
                [name for name, model in movieq.models.items() if task_type in model.tasks],
                default or next((name for name, model in movieq.models.items() if task_type in model.tasks), None),
                spec.max_duration_s,
                _inlined(msgspec.json.schema(spec.params)),
            )
        )
    return answered(TaskTypesAnswer(answers))


def _inlined(schema: dict[str, object]) -> dict[str, object]:
    """Return the schema with its top-level `$ref` resolved, and the other definitions in `$defs`."""
    definitions = schema.get("$defs")
    if not isinstance(definitions, dict) or "$ref" not in schema:
        return schema
    name = str(schema["$ref"]).rpartition("/")[2]
    rest = {key: value for key, value in definitions.items() if key != name}
    return {**definitions[name], **({"$defs": rest} if rest else {})}
