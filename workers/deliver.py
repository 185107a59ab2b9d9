"""The outbox: plain arq jobs that tell the world how a task ended.

The script that ended the task froze the facts; here they become a body, with addresses signed at the time of sending, and are posted
until the receiver takes them. At least once: a worker that dies after the POST leaves the job to another.
"""

from __future__ import annotations

import time
from typing import Any, Final

import aiohttp
import msgspec
from arq import Retry
from redis.exceptions import RedisError

from movieq import logs, webhooks
from movieq.contracts import MEDIA_URL_S, Delivery, DeliveryState, TaskStatus, Webhook, utc
from movieq.params import TaskType
from movieq.settings import Settings
from movieq.storage import Storage
from movieq.store import Store

SCHEDULE_S: Final = (0.0, 5.0, 30.0)
"""Before each try, from the one before."""
INTERRUPTED_S: Final = 5.0
DAY_S: Final = 86400

log = logs.get()
_EVENT: Final = {TaskStatus.COMPLETED: "complete", TaskStatus.FAILED: "error", TaskStatus.CANCELLED: "cancelled"}


class Outbox(msgspec.Struct, frozen=True):
    """What deliveries work with."""

    store: Store
    storage: Storage
    session: aiohttp.ClientSession
    secrets: tuple[str, ...]
    settings: Settings


async def deliver(ctx: dict[str, Any], delivery_id: str) -> None:
    """The arq function of a delivery: the receiver has it, or refused it for good, or arq is asked to come again."""
    try:
        await _deliver(ctx["outbox"], delivery_id)
    except (RedisError, OSError, TimeoutError) as error:
        # to arq any other exception is the end of the job, and the delivery would be lost
        log.warning("deliver_interrupted", delivery_id=delivery_id, problem=str(error) or type(error).__name__)
        raise Retry(defer=INTERRUPTED_S) from error


async def _deliver(outbox: Outbox, delivery_id: str) -> None:
    delivery = await outbox.store.delivery(delivery_id)
    if delivery is None or delivery.state is not DeliveryState.PENDING:
        return
    body = msgspec.json.encode(webhook(delivery, outbox.storage))
    headers = webhooks.headers(outbox.secrets, delivery_id, int(time.time()), body)
    outcome = await webhooks.send(outbox.session, delivery.url, body, headers)
    tries = delivery.tries + 1  # arq's own count also grows when a worker dies or is stopped
    with logs.bound(task_id=delivery.task_id, project_id=delivery.project_id):
        if outcome.ok:
            await outbox.store.delivered(delivery_id, DeliveryState.DELIVERED, tries, outcome.status, "")
            log.info("deliver", delivery_id=delivery_id, url=logs.without_query(delivery.url), status=outcome.status, tries=tries)
        elif outcome.gone or tries >= len(SCHEDULE_S):
            await outbox.store.delivered(delivery_id, DeliveryState.FAILED, tries, outcome.status, outcome.problem)
            log.error("deliver_failed", delivery_id=delivery_id, url=logs.without_query(delivery.url), problem=outcome.problem, tries=tries)
        else:
            await outbox.store.delivered(delivery_id, DeliveryState.PENDING, tries, outcome.status, outcome.problem)
            wait_s = max(SCHEDULE_S[tries], outcome.retry_after_s or 0.0)
            log.warning("deliver_again", delivery_id=delivery_id, problem=outcome.problem, tries=tries, again_in_s=wait_s)
            raise Retry(defer=wait_s)


def webhook(delivery: Delivery, storage: Storage) -> Webhook:
    """The body of a delivery."""
    result = None if delivery.result is None else storage.result(delivery.result, int(time.time()) + MEDIA_URL_S)
    status, at = delivery.status, utc(delivery.at_ms)
    is_video = delivery.task_type in (TaskType.GENERATE_VIDEO, TaskType.RENDER_ANIMATION)
    return Webhook(
        type=f"task.{delivery.type}",
        timestamp=at,
        task_id=delivery.task_id,
        project_id=delivery.project_id,
        task_type=delivery.task_type,
        status=status,
        result=result,
        error=delivery.error,
        error_code=delivery.error_code,
        processing_time=None if delivery.started_at_ms is None else (delivery.ended_at_ms - delivery.started_at_ms) / 1000,
        metadata=delivery.metadata,
        taskId=delivery.task_id,
        event=_EVENT[status],
        data=result,
        scene_id=delivery.metadata.get("scene_id"),
        video_url=result.media_url if result is not None and is_video else None,
        completed_at=at if status is TaskStatus.COMPLETED else None,
        failed_at=at if status is TaskStatus.FAILED else None,
        cancelled_at=at if status is TaskStatus.CANCELLED else None,
    )


async def sweep(ctx: dict[str, Any]) -> None:
    """The arq cron job that deletes what is over, in small batches: what runs stored and did not commit, uploads, old results and tasks."""
    outbox: Outbox = ctx["outbox"]
    for prefix in await outbox.store.due_orphans():
        await outbox.storage.delete_prefix(prefix)
        await outbox.store.forget_orphan(prefix)
        log.info("orphan_deleted", prefix=prefix)
    if outbox.settings.keep_media_days:
        for prefix in await outbox.store.due_media(outbox.settings.keep_media_days * DAY_S):
            await outbox.storage.delete_prefix(prefix)
            await outbox.store.forget_media(prefix)
            log.info("media_deleted", prefix=prefix)
    if outbox.settings.keep_tasks_days and (count := await outbox.store.sweep(outbox.settings.keep_tasks_days * DAY_S)):
        log.info("tasks_forgotten", count=count)
