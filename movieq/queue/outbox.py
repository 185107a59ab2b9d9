"""The outbox: the webhook and CMS deliveries of ended tasks. The script that ends a task adds them; this module reads and updates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Literal

import msgspec

from movieq.errors import NotFound
from movieq.queue.connection import Redis
from movieq.queue.keys import DELIVERY_KEPT_S
from movieq.queue.records import awaited, decode_delivery, execute_tolerantly, pairs
from movieq.queue.scripts import load
from movieq.tasks.entities import Delivery, DeliveryKind, DeliveryState
from movieq.tasks.states import TaskId


class Admitted(msgspec.Struct, frozen=True):
    """A delivery that a worker may try now.

    `job` is its arq job and `score` the job's score in the arq queue. It counts for the limits of `queue`, its kind and project, and of
    `host`, which is empty for the CMS.
    """

    job: bytes
    score: int
    queue: str
    host: str

    @property
    def is_webhook(self) -> bool:
        """Whether it has a place for webhooks; else it has one for the CMS."""
        return not self.queue.startswith(f"{DeliveryKind.PAYLOAD}:")


class Admission(msgspec.Struct, frozen=True):
    """Deliveries that a worker may try now. `left`: others wait for a place. `more`: this call could not look at all of them."""

    admitted: list[Admitted]
    left: bool
    more: bool


class Outbox:
    """The deliveries of an installation. Each call can safely be repeated if its answer was lost."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names
        self._scripts = load(redis, "admit", "begin", "delivered", "record_answer", "resend")

    async def admit(
        self, worker_id: str, nonce: str, webhook_places: int, cms_places: int, in_flight: Collection[Admitted], held_ms: int
    ) -> Admission:
        """Choose due deliveries for the free places of a worker, in fair shares; `in_flight` are those that it runs.

        If the worker dies, other workers can try them after `held_ms`. A repeated call with the same nonce gets the same answer.
        """
        counts = {
            "queues": Counter(each.queue for each in in_flight),
            "hosts": Counter(each.host for each in in_flight if each.host),
        }
        admitted, left, more = await self._scripts["admit"].finish(
            worker_id=worker_id,
            nonce=nonce,
            held_ms=held_ms,
            webhook_places=webhook_places,
            payload_places=cms_places,
            in_flight=msgspec.json.encode(counts),
        )
        found = [
            Admitted(job, score, queue.decode(errors="replace"), host.decode(errors="replace")) for job, score, queue, host in admitted
        ]
        return Admission(found, bool(left), bool(more))

    async def begin(self, delivery_id: str, held_ms: int) -> Delivery | Literal["wait"] | None:
        """Start a try of a delivery and return the delivery, whose content no longer changes.

        Return "wait" for a webhook while an earlier one of the same task is pending; None if the delivery does not exist or was swept. If
        `held_back_ms` is set, the webhook must not be sent: its host does not answer, and a probe of at most `held_ms` may be in flight.
        """
        answer = await self._scripts["begin"].finish(delivery_id=delivery_id, held_ms=held_ms)
        return "wait" if answer == [b"wait"] else decode_delivery(delivery_id, pairs(answer))

    async def delivered(
        self, delivery_id: str, state: DeliveryState, tries: int, status: int | None, problem: str, media_id: str | int | None = None
    ) -> str | int | None:
        """Record the outcome of a try, and make the deliveries due that waited for it. Return the CMS id that the task's result has now."""
        answer = await self._scripts["delivered"].finish(
            delivery_id=delivery_id,
            state=state,
            tries=tries,
            status="" if status is None else status,
            problem=problem,
            media_id="" if media_id is None else msgspec.json.encode(media_id),
        )
        return msgspec.json.decode(answer, type=str | int) if answer else None

    async def record_answer(self, delivery_id: str, answered: bool) -> int:
        """Record whether the receiver of a webhook answered in time.

        Return for how many ms its host gets no more webhooks; 0 if it does, or if this was returned within the last minute.
        """
        wait_ms: int = await self._scripts["record_answer"].finish(delivery_id=delivery_id, answered="1" if answered else "")
        return wait_ms

    async def resend(self, task_id: TaskId, delivery_id: str) -> None:
        """Make the delivery due now, with a new budget of tries. Raises NotFound."""
        if await self._scripts["resend"].finish(task_id=task_id, delivery_id=delivery_id) == b"unknown":
            raise NotFound(f"task {task_id} has no delivery {delivery_id}")

    async def doubt(self, delivery_id: str, doubt: bool, media_id: str | int | None = None) -> None:
        """Record whether the CMS may hold a document whose creation was not confirmed, and the id of the document that is known."""
        async with self._redis.pipeline(transaction=True) as pipe:
            if media_id is not None:
                pipe.hset(self._keys["delivery"] + delivery_id, "media_id", msgspec.json.encode(media_id).decode())
            if doubt:
                pipe.hset(self._keys["delivery"] + delivery_id, "doubt", "1")
            else:
                pipe.hdel(self._keys["delivery"] + delivery_id, "doubt")
            pipe.expire(self._keys["delivery"] + delivery_id, DELIVERY_KEPT_S)
            await pipe.execute()

    async def deliveries(self, task_id: TaskId) -> list[tuple[str, Delivery, float | None]]:
        """Return the deliveries of a task, oldest first: the id, the delivery, and when the next try is due (ms)."""
        stored = await awaited(self._redis.hget(self._keys["task"] + task_id, "deliveries")) or b""
        count = int(stored) if stored.isdigit() and len(stored) < 5 else 0  # else the field is damaged
        ids = [f"{task_id}-{number}" for number in range(1, count + 1)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for delivery_id in ids:
                pipe.hgetall(self._keys["delivery"] + delivery_id)
            hashes = [found or {} for found in await execute_tolerantly(pipe)]
            for delivery_id, fields in zip(ids, hashes, strict=True):
                pipe.zscore(self._keys["deliveries"], fields.get(b"job", delivery_id))
            due = await pipe.execute()
        found = zip(ids, map(decode_delivery, ids, hashes), due, strict=True)
        return [(id, delivery, at_ms) for id, delivery, at_ms in found if delivery is not None]
