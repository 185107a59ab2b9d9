"""The endpoints for a task's webhook and CMS deliveries, sent and pending."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from movieq import logs
from movieq.api.auth import task_of
from movieq.api.query import only_query
from movieq.api.state import answered, api
from movieq.errors import NotFound
from movieq.settings import Scope
from movieq.tasks.entities import Delivery, DeliveryState, Task
from movieq.tasks.results import utc
from movieq.tasks.wire import DeliveriesAnswer, DeliveryAnswer

log = logs.get()


async def deliveries(request: Request) -> Response:
    """`GET /tasks/{task_id}/deliveries`: list a task's deliveries, oldest first."""
    task, _ = await task_of(request, Scope.READ)
    only_query(request)
    return answered(DeliveriesAnswer(await _listed(request, task)))


async def resend(request: Request) -> Response:
    """`POST /tasks/{task_id}/deliveries/{delivery_id}/resend`: send a delivery again at once. Answer 200 with the delivery."""
    task, _ = await task_of(request, Scope.ADMIN)
    only_query(request)
    delivery_id = request.path_params["delivery_id"]
    await api(request).outbox.resend(task.task_id, delivery_id)
    with logs.bound(task_id=task.task_id, project_id=task.project_id):
        log.info("resend", delivery_id=delivery_id)
    for each in await _listed(request, task):
        if each.delivery_id == delivery_id:
            return answered(each)
    raise NotFound(f"task {task.task_id} has no delivery {delivery_id[:80]}")


async def _listed(request: Request, task: Task) -> list[DeliveryAnswer]:
    return [_answer(*each) for each in await api(request).outbox.deliveries(task.task_id)]


def _answer(delivery_id: str, delivery: Delivery, due_ms: float | None) -> DeliveryAnswer:
    return DeliveryAnswer(
        delivery_id=delivery_id,
        kind=delivery.kind,
        type=f"task.{delivery.type}",
        state=delivery.state,
        url=logs.without_query(delivery.url),
        tries=delivery.tries,
        last_status=delivery.last_status,
        last_problem=delivery.last_problem or None,
        created_at=utc(delivery.at_ms),
        next_try_at=utc(due_ms) if due_ms is not None and delivery.state is DeliveryState.PENDING else None,
    )
