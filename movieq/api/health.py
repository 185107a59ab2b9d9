"""Health: whether the process is alive, whether tasks can be accepted and run, and what is wrong. Also what can be submitted.

The health checks need no key. So they show no names, addresses or paths, and write at most once a second, however often they are called.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import msgspec
from redis.exceptions import RedisError, ResponseError
from starlette.requests import Request
from starlette.responses import Response

import movieq as package
from movieq import models
from movieq.api.auth import caller
from movieq.api.state import answered, api, now, only_query
from movieq.checks import NOEVICTION
from movieq.contracts import (
    Check,
    CheckName,
    HealthAnswer,
    Kind,
    LiveAnswer,
    ReadyAnswer,
    TaskTypeAnswer,
    TaskTypesAnswer,
)
from movieq.models import Engine
from movieq.params import MAX_DURATION_S, PARAMS
from movieq.settings import EngineChoice, Scope
from movieq.storage import Storage
from movieq.store import Store, refusal

FRESH_S: Final = 1.0
"""How long the results of the checks are reused."""
CHECK_S: Final = 3.0
"""How long a check may take."""
AWAY: Final = "Redis cannot be used: start it, or correct MOVIEQ_REDIS_URL; `movieq doctor` says what is wrong"


class Readiness:
    """The results of the checks, which run one at a time and at most once a second, however many ask.

    Beside them, `evicts` says that Redis deletes keys when its memory is full, as the settings do not allow; it is empty otherwise.
    """

    def __init__(self, store: Store, storage: Storage, *, allow_eviction: bool) -> None:
        self.evicts = ""
        self._allow_eviction = allow_eviction
        self._store = store
        self._storage = storage
        self._asking: asyncio.Task[list[Check]] | None = None
        self._asked_s = 0.0
        self._looking: asyncio.Task[bool] | None = None

    async def checks(self) -> dict[CheckName, Check]:
        """Return every check by its name."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_s >= FRESH_S):
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        return {check.name: check for check in await asyncio.shield(self._asking)}

    async def aclose(self) -> None:
        """Stop checking."""
        asked = [task for task in (self._asking, self._looking) if task is not None]
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self) -> list[Check]:
        redis, storage, worker, self.evicts = await asyncio.gather(self._redis(), self._files(), self._worker(), self._eviction())
        return [
            Check(name, not message, message)
            for name, message in ((CheckName.REDIS, redis), (CheckName.STORAGE, storage), (CheckName.WORKER, worker))
        ]

    async def _redis(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                await self._store.check_write()
        except (RedisError, OSError) as error:
            if (refused := refusal(error)) is not None:
                return f"Redis refuses writes because {refused.reason}: {refused.cure}"
            if isinstance(error, ResponseError):
                return "Redis refuses writes: `movieq doctor` says what is wrong"
            return AWAY
        return ""

    async def _eviction(self) -> str:
        if self._allow_eviction:
            return ""
        try:
            async with asyncio.timeout(CHECK_S):
                memory = await self._store.memory()
        except (RedisError, OSError):
            return ""
        if memory is None or not memory.evicts:
            return ""
        return f"Redis deletes tasks when its memory is full, by its maxmemory-policy {memory.policy}: {NOEVICTION}"

    async def _files(self) -> str:
        # a file system that hangs blocks its thread, so there is never more than one
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._storage.usable())
        await asyncio.wait({self._looking}, timeout=CHECK_S)
        if not self._looking.done():
            return "the storage does not answer: `movieq doctor` says what is wrong"
        if self._looking.exception() is not None or not self._looking.result():
            return "the storage cannot be used: check MOVIEQ_STORAGE and its free space; `movieq doctor` says what is wrong"
        return ""

    async def _worker(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                living = [row for row in await self._store.workers() if row.live]
        except (RedisError, OSError):
            return "the workers are unknown while Redis cannot be used"
        if any(row.problem is None for row in living):
            return ""
        return "every live worker has a problem: see /workers/status" if living else "there is no live worker: start `movieq worker`"


async def live(request: Request) -> Response:
    """`GET /health/live`: 200 while this process answers. Checks nothing else, which a restart would not mend. Needs no key."""
    return answered(LiveAnswer("alive", now(), package.__version__, _uptime_s(request)))


async def ready(request: Request) -> Response:
    """`GET /health/ready`: 200 where a task can be accepted, stored and run; else 503 and which check failed. Needs no key."""
    checks = list((await api(request).readiness.checks()).values())
    if all(check.ok for check in checks):
        return answered(ReadyAnswer("ready", now(), package.__version__, checks))
    return answered(ReadyAnswer("not_ready", now(), package.__version__, checks), 503, {"Retry-After": "2"})


async def health(request: Request) -> Response:
    """`GET /health`: 200 healthy or degraded, 503 where Redis is away. Needs no key."""
    movieq = api(request)
    uptime = _uptime_s(request)
    try:
        workers = [row for row in await movieq.store.workers() if row.live]
        sizes, stranded = await movieq.store.queue_sizes(), await movieq.store.stranded(workers)
    except (RedisError, OSError):
        away = HealthAnswer("unhealthy", now(), package.__version__, "unavailable", 0, dict.fromkeys(Kind, 0), uptime, [AWAY])
        return answered(away, 503, {"Retry-After": "2"})
    checks = await movieq.readiness.checks()
    problems = [checks[name].message for name in (CheckName.REDIS, CheckName.STORAGE) if not checks[name].ok]
    problems += [movieq.readiness.evicts] if movieq.readiness.evicts else []
    problems += [f"{each.waiting} tasks wait in {each.kind}, and no live worker can run them: start one that can" for each in stranded]
    state = "degraded" if problems else "healthy"
    return answered(HealthAnswer(state, now(), package.__version__, "connected", len(workers), sizes, uptime, problems))


def _uptime_s(request: Request) -> float:
    return round(time.monotonic() - api(request).started_s, 3)


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
