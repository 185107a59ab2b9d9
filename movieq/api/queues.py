"""The endpoints for queues, dead letters, totals and alerts, for operators and autoscalers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from movieq.api.auth import caller, path_task_id, task_of
from movieq.api.limits import HITS
from movieq.api.query import only_query, query
from movieq.api.state import Api, answered, api
from movieq.errors import Forbidden, NotFound
from movieq.settings import Scope
from movieq.tasks.states import TaskStatus
from movieq.tasks.wire import Alert, CheckName, DeadLettersAnswer, MetricsAnswer, QueuesAnswer, TasksHealthAnswer

OLDEST_WAITING_S: Final = 3600
FAILURES_PERCENT: Final = 20.0
FEWEST_ENDED: Final = 10
FULL_PERCENT: Final = 90.0
"""Limits of the alerts: the longest wait, the share of failures (once so many tasks have ended), and the share of Redis's memory."""


async def queues(request: Request) -> Response:
    """`GET /queues`: list the queues with their waiting and running tasks and waiting times. Needs a key for all projects."""
    who = await caller(request, Scope.ADMIN)
    if who.grant.projects is not None:
        raise Forbidden("this API key belongs to some projects, but queues hold the tasks of all projects: use a key for all projects")
    only_query(request)
    return answered(QueuesAnswer(await api(request).queries.queues()))


async def dead_letters(request: Request) -> Response:
    """`GET /dead-letters`: list the dead letters of the key's projects, latest first."""
    who = await caller(request, Scope.ADMIN)
    with query(request, "limit") as asked:
        limit = asked.number("limit", 100, 1, 1000)
    letters, total = await api(request).queries.dead_letters(limit, who.grant.projects)
    return answered(DeadLettersAnswer(letters, total))


async def drop_dead_letter(request: Request) -> Response:
    """`DELETE /dead-letters/{task_id}`: remove a task from the dead letters; it stays failed. Answer 204."""
    await task_of(request, Scope.ADMIN)
    task_id = path_task_id(request)
    if not await api(request).store.drop_dead_letter(task_id):
        raise NotFound(f"task {task_id} is not a dead letter")
    return Response(status_code=204)


async def metrics(request: Request) -> Response:
    """`GET /tasks/metrics`: return task totals, rates in percent, average durations and GPU seconds."""
    movieq = api(request)
    who = await caller(request, Scope.READ)
    only_query(request)
    sees_all = who.grant.projects is None
    totals = await movieq.queries.totals(who.grant.projects)
    return answered(
        MetricsAnswer(
            sum(totals.values()),
            totals,
            _percent(totals, TaskStatus.COMPLETED),
            _percent(totals, TaskStatus.FAILED),
            _percent(totals, TaskStatus.CANCELLED),
            await movieq.queries.average_durations_s() if sees_all else {},
            await movieq.queries.gpu_seconds(who.grant.projects),
            await movieq.queries.passed_over() if sees_all else None,
            dict(HITS.counts) if sees_all else {},
        )
    )


async def health(request: Request) -> Response:
    """`GET /tasks/health`: list the alerts."""
    movieq = api(request)
    who = await caller(request, Scope.READ)
    only_query(request)
    alerts = await _alerts_of_installation(movieq) if who.grant.projects is None else []
    alerts += await _alerts_of_tasks(movieq, who.grant.projects)
    return answered(TasksHealthAnswer("degraded" if alerts else "healthy", alerts))


async def _alerts_of_installation(movieq: Api) -> list[Alert]:
    """Return the alerts about servers and queues, which concern all projects."""
    alerts = []
    live = [row for row in await movieq.queries.workers() if row.live]
    if not (redis := (await movieq.readiness.checks())[CheckName.REDIS]).ok:
        alerts.append(Alert("redis_refuses_writes", redis.message))
    if movieq.readiness.evicts:
        alerts.append(Alert("redis_evicts", movieq.readiness.evicts))
    memory = await movieq.queries.memory()
    if memory and memory.most and 100 * memory.used > FULL_PERCENT * memory.most:
        cure = "raise its `maxmemory`, or store ended tasks for fewer days: MOVIEQ_KEEP_TASKS_DAYS"
        alerts.append(Alert("redis_nearly_full", f"Redis uses {100 * memory.used / memory.most:.0f} % of its memory: {cure}"))
    if problems := [row.problem for row in live if row.problem]:
        said = "; ".join(sorted(set(problems)))
        alerts.append(Alert("worker_problem", f"{len(problems)} of {len(live)} workers accept no tasks: {said}; see /workers/status"))
    if astray := await movieq.queries.astray():
        alerts.append(Alert("tasks_astray", f"{astray} queued tasks are in no queue: find and repair them with `movieq doctor --repair`"))
    alerts += [Alert("no_worker", each.text) for each in await movieq.queries.stranded(live)]
    for queue in await movieq.queries.queues():
        name, waiting_s = queue.queue_name, queue.oldest_waiting_seconds
        if waiting_s > OLDEST_WAITING_S:
            alerts.append(Alert("long_wait", f"the oldest task in {name} has waited for {waiting_s / 60:.0f} minutes"))
    return alerts


async def _alerts_of_tasks(movieq: Api, projects: Collection[str] | None) -> list[Alert]:
    """Return the alerts about ended tasks of these projects; None: of all projects."""
    alerts = []
    totals = await movieq.queries.totals(projects)
    failed = _percent(totals, TaskStatus.FAILED)
    if failed > FAILURES_PERCENT and sum(count for status, count in totals.items() if status.ended) >= FEWEST_ENDED:
        alerts.append(Alert("failures", f"{failed:.0f} % of the ended tasks have failed"))
    if (dead := (await movieq.queries.dead_letters(1, projects))[1]) > 0:
        alerts.append(Alert("dead_letters", f"{dead} tasks failed because their worker or engine died repeatedly: see /dead-letters"))
    return alerts


def _percent(totals: dict[TaskStatus, int], of: TaskStatus) -> float:
    ended = sum(count for status, count in totals.items() if status.ended)
    return round(100 * totals[of] / ended, 2) if ended else 0.0
