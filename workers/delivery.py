"""Deliver the outcome of tasks: plain arq jobs that write results to the CMS and send webhooks to `callback_url`.

The script that ends a task writes its deliveries to the outbox. A job turns each of them into a webhook body or a CMS document, with URLs
signed at the time of sending, and tries until the receiver accepts it: ten times over a day and a half. Delivery is at least once: if a
worker dies, another takes over its job after half a minute. A host that does not answer gets one webhook at a time as a probe; its others
wait, at most two days, and are sent when it answers. Even so the CMS ends up with one document for each task: a try looks for a
document before it creates one. If the answer to a try was lost, the try may have created a second document; a minute later duplicates are
removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec
from arq import Retry
from arq.constants import in_progress_key_prefix

from movieq import logs
from movieq.delivery import webhooks
from movieq.delivery.payload import Document, Payload
from movieq.errors import CmsFault, StorageFault
from movieq.queue.connection import Redis
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.refusals import REDIS_AWAY
from movieq.storage.base import Storage
from movieq.tasks.entities import Delivery, DeliveryKind, DeliveryState
from movieq.tasks.results import MEDIA_URL_S, utc
from movieq.tasks.states import GENERATE_VIDEO, RENDER_ANIMATION, TaskStatus
from movieq.tasks.wire import Webhook
from workers.concurrency import beside

TRIES: Final = 10
SCHEDULE_S: Final = (0.0, 5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)
"""Waits before the first try, the second and so on, in seconds; the last one repeats."""
JITTER: Final = 0.1
"""Share by which a wait varies at random, so that deliveries that failed together are not retried together."""
INTERRUPTED_S: Final = 5.0
TURN_S: Final = 30.0
"""Wait of a webhook for an earlier delivery of its task, in seconds. The end of that one makes the webhook due sooner."""
DOUBT_S: Final = 60.0
"""Time in which a CMS that hung may finish its writes before duplicates are removed, in seconds."""
WEBHOOKS: Final = 64
"""Places for webhooks in a worker. A project, and a host, can have half of them; if others deliver too, less."""
DEPOSITS: Final = 8
"""Places for CMS deliveries in a worker, apart from those for webhooks."""
GIVE_UP_S: Final = 2 * 24 * 3600.0
"""Longest wait of a webhook for its host to answer, in seconds; longer than the schedule of tries."""
HELD_S: Final = 30.0
"""Time until the job of a worker that died is taken over, in seconds."""

log = logs.get()
_EVENT: Final = {TaskStatus.COMPLETED: "complete", TaskStatus.FAILED: "error", TaskStatus.CANCELLED: "cancelled"}


class DeliveryParts(msgspec.Struct, frozen=True):
    """The connections and settings that deliveries share.

    `cms` is None if the installation has none. Files for the CMS pass through `spool`, or through the system's temporary folder.
    """

    redis: Redis
    outbox: Outbox
    queries: Queries
    storage: Storage
    session: aiohttp.ClientSession
    secrets: tuple[str, ...]
    spool: Path | None = None
    cms: Payload | None = None


class _Attempt(msgspec.Struct, frozen=True):
    """The outcome of a try. `final`: another try cannot help. `doubt`: the CMS may have duplicates of the document `media_id`."""

    ok: bool
    final: bool = False
    status: int | None = None
    problem: str = ""
    retry_after_s: float = 0.0
    media_id: str | int | None = None
    doubt: bool = False


async def deliver(ctx: dict[str, Any], delivery_id: str) -> None:
    """Try a delivery once (the arq function of deliveries). Raises Retry if it is to be tried again."""
    parts: DeliveryParts = ctx["delivery_parts"]
    try:
        async with _held(parts.redis, ctx["job_id"]):
            await _deliver(parts, delivery_id)
    except (Retry, asyncio.CancelledError):
        raise
    except REDIS_AWAY as error:
        # after any other exception arq would end the job, and the delivery would be lost
        log.warning("deliver_interrupted", delivery_id=delivery_id, problem=str(error) or type(error).__name__)
        raise Retry(defer=INTERRUPTED_S) from error
    except Exception as error:
        log.exception("deliver_broke", delivery_id=delivery_id)
        raise Retry(defer=wait_s(ctx["job_try"])) from error


def wait_s(tries: int) -> float:
    """Return the wait after this many tries, in seconds."""
    return SCHEDULE_S[min(tries, len(SCHEDULE_S) - 1)] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # spreads load, hides nothing


async def _deliver(parts: DeliveryParts, delivery_id: str) -> None:
    delivery = await parts.outbox.begin(delivery_id, int(HELD_S * 1000))
    if delivery == "wait":
        raise Retry(defer=TURN_S)
    if delivery is None:
        return
    with logs.bound(task_id=delivery.task_id, project_id=delivery.project_id):
        if delivery.state is not DeliveryState.PENDING:
            if delivery.doubt:
                await _remove_doubles(parts, delivery_id, delivery)
            return
        match delivery.kind:
            case DeliveryKind.WEBHOOK if delivery.held_back_ms:
                tried = _held_back(delivery)
            case DeliveryKind.WEBHOOK:
                tried = await _send(parts, delivery_id, delivery)
            case DeliveryKind.PAYLOAD:
                tried = await _deposit(parts, delivery_id, delivery)
            case _:  # a newer version wrote it
                tried = _Attempt(False, problem=f"this worker cannot deliver to {delivery.kind}: update it")
        await _note(parts, delivery_id, delivery, tried)


async def _note(parts: DeliveryParts, delivery_id: str, delivery: Delivery, tried: _Attempt) -> None:
    tries = delivery.tries if delivery.held_back_ms else delivery.tries + 1  # arq's own count also grows when a worker dies or is stopped
    facts = {"delivery_id": delivery_id, "kind": delivery.kind, "url": logs.without_query(delivery.url), "tries": tries}
    over = not tried.ok and (tried.final or tries >= TRIES)
    state = DeliveryState.DELIVERED if tried.ok else DeliveryState.FAILED if over else DeliveryState.PENDING
    media_id = None if state is DeliveryState.PENDING else tried.media_id  # while pending, another document still has to point at it
    known = await parts.outbox.delivered(delivery_id, state, tries, tried.status, tried.problem, media_id)
    match state:
        case DeliveryState.DELIVERED:
            log.info("deliver", **facts, status=tried.status)
        case DeliveryState.FAILED:
            log.error("deliver_failed", **facts, problem=tried.problem)
        case DeliveryState.PENDING:
            again_s = max(wait_s(tries), tried.retry_after_s)
            log.warning("deliver_again", **facts, problem=tried.problem, again_in_s=round(again_s, 1))
            raise Retry(defer=again_s)
    if tried.doubt or (media_id is not None and known not in (None, media_id)):  # `known`: another worker was first
        await parts.outbox.doubt(delivery_id, True)
        raise Retry(defer=DOUBT_S)


@asynccontextmanager
async def _held(redis: Redis, job_id: str) -> AsyncIterator[None]:
    """Hold the job while the block runs. If this worker dies in it, another can take over the job after half a minute."""

    async def hold() -> None:
        while True:
            await asyncio.sleep(HELD_S / 3)
            with contextlib.suppress(*REDIS_AWAY):
                await redis.pexpire(in_progress_key_prefix + job_id, int(HELD_S * 1000))

    async with beside(hold=hold()):
        yield


# ── Webhooks ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _send(parts: DeliveryParts, delivery_id: str, delivery: Delivery) -> _Attempt:
    body = msgspec.json.encode(webhook(delivery, parts.storage))
    headers = webhooks.headers(parts.secrets, delivery_id, int(time.time()), body)
    outcome = await webhooks.send(parts.session, delivery.url, body, headers)
    if outcome.timed_out or outcome.status is not None:
        wait_ms = await parts.outbox.record_answer(delivery_id, not outcome.timed_out)
        if wait_ms:
            log.warning("host_unresponsive", host=urlsplit(delivery.url).netloc, problem=outcome.problem, again_in_s=wait_ms / 1000)
    return _Attempt(outcome.ok, outcome.gone, outcome.status, outcome.problem, outcome.retry_after_s or 0.0)


def _held_back(delivery: Delivery) -> _Attempt:
    """Return the outcome of a webhook that has waited too long for its host. Raise Retry if it can still wait."""
    waited_s = time.time() - max(delivery.at_ms, delivery.resent_at_ms) / 1000
    if waited_s < GIVE_UP_S:
        raise Retry(defer=delivery.held_back_ms / 1000 * random.uniform(1, 1 + JITTER))  # noqa: S311  # spreads load, hides nothing
    return _Attempt(False, final=True, problem="given up: its host did not answer for two days")


def webhook(delivery: Delivery, storage: Storage) -> Webhook:
    """Return the body of a webhook."""
    result = None if delivery.result is None else storage.result(delivery.result, int(time.time()) + MEDIA_URL_S)
    status, ended_at = delivery.status, utc(delivery.ended_at_ms)
    is_video = delivery.task_type in (GENERATE_VIDEO, RENDER_ANIMATION)
    return Webhook(
        type=f"task.{delivery.type}",
        timestamp=utc(delivery.at_ms),
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
        completed_at=ended_at if status is TaskStatus.COMPLETED else None,
        failed_at=ended_at if status is TaskStatus.FAILED else None,
        cancelled_at=ended_at if status is TaskStatus.CANCELLED else None,
    )


# ── The CMS ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _deposit(parts: DeliveryParts, delivery_id: str, delivery: Delivery) -> _Attempt:
    """Write the result to the CMS as a document, and make the document that the task's metadata name refer to it."""
    media_id, doubt = delivery.media_id, delivery.doubt
    try:
        if parts.cms is None:
            raise CmsFault("this worker has no CMS: set MOVIEQ_PAYLOAD_URL where it runs")
        if media_id is None:
            known = await parts.cms.find(delivery.task_id)
            document = known[0] if known else await _create(parts, parts.cms, delivery_id, delivery)
            await _check_size(parts.cms, document, delivery)
            media_id, doubt = document.id, doubt or len(known) > 1
            await parts.outbox.doubt(delivery_id, doubt, media_id)
        if (target := parts.cms.cms.target(delivery.metadata)) is not None:
            await parts.cms.point(target, media_id, delivery.project_id)
    except CmsFault as fault:
        wait = webhooks.retry_after_s(fault.retry_after, time.time()) if fault.retry_after else None
        return _Attempt(False, fault.final, fault.status, fault.message, wait or 0.0, media_id, doubt)
    except StorageFault as fault:
        log.warning("result_not_read", delivery_id=delivery_id, problem=fault.message)  # the message names folders of this machine
        return _Attempt(False, problem="the result cannot be read from the storage at the moment")
    return _Attempt(True, status=200, media_id=media_id, doubt=doubt)


async def _check_size(cms: Payload, document: Document, delivery: Delivery) -> None:
    """Raise CmsFault if the CMS did not store the whole file, and remove the document."""
    assert delivery.result is not None
    media = delivery.result.media[0]
    if cms.takes_files and not document.whole(media):
        await cms.remove(document.id)
        raise CmsFault(f"the CMS stored {document.filesize} of {media.size_bytes} bytes: check its log, and the disk of its `staticDir`")


async def _create(parts: DeliveryParts, cms: Payload, delivery_id: str, delivery: Delivery) -> Document:
    assert delivery.result is not None
    media = delivery.result.media[0]
    url = parts.storage.result(delivery.result, int(time.time()) + MEDIA_URL_S).media_url
    fields = cms.cms.document(delivery, await parts.queries.task_data(delivery.task_id), url)
    name = f"{media.media_type}-{delivery.task_id}{Path(media.key).suffix}"
    with tempfile.TemporaryDirectory(dir=parts.spool, prefix=f"{delivery_id}-") as folder:
        file = None
        if cms.takes_files:
            file = Path(folder) / "file"
            if await parts.storage.open(media.key, file) is None:
                raise CmsFault("the file is no longer in the storage", final=True)
        await parts.outbox.doubt(delivery_id, True)
        try:
            return await cms.create(fields, file, name, media.content_type)
        except CmsFault as fault:
            if fault.status is not None and fault.status < 500 and not delivery.doubt:
                await parts.outbox.doubt(delivery_id, False)  # the CMS refused the document, so there is none
            raise


async def _remove_doubles(parts: DeliveryParts, delivery_id: str, delivery: Delivery) -> None:
    """Remove the duplicates that tries with a lost answer have created; the document that the task's result names stays."""
    task = await parts.queries.task(delivery.task_id)
    named = task.result.payload_media_id if task is not None and task.result is not None else None
    if parts.cms is None or named is None:
        return
    try:
        for document in await parts.cms.find(delivery.task_id):
            if document.id != named:
                await parts.cms.remove(document.id)
                log.info("duplicate_removed", delivery_id=delivery_id, media_id=document.id)
    except CmsFault as fault:
        log.warning("duplicates_not_removed", delivery_id=delivery_id, problem=fault.message)
        raise Retry(defer=wait_s(len(SCHEDULE_S) // 2)) from None
    await parts.outbox.doubt(delivery_id, False)
