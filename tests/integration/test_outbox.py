"""The outbox: when a delivery is tried again, what each try sends, in which order, and that no delivery is lost."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import pytest
from aiohttp import web
from arq import Retry
from arq.constants import in_progress_key_prefix, retry_key_prefix
from standardwebhooks import Webhook

from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.entities import Delivery, DeliveryState
from movieq.tasks.results import StoredResult
from movieq.tasks.states import EventType, TaskId
from tests.arrange import delivery_parts, raw, result, running
from tests.fleet import eventually, fleet
from tests.service import Receiver, receiver, serving
from workers import delivery as outbox_module
from workers.delivery import JITTER, SCHEDULE_S, TRIES, TURN_S, DeliveryParts, deliver, wait_s

OLD, NEW = ("whsec_" + base64.b64encode(secret).decode() for secret in (b"an old secret of 24 byte", b"a new secret of 24 bytes"))
CMS: Final = "http://cms.test/api/media"


@pytest.fixture
async def parts(store: Store, folder: Path) -> AsyncIterator[DeliveryParts]:
    """Yield the parts that deliveries share while their secret is rotated."""
    async with aiohttp.ClientSession() as session:
        yield delivery_parts(store, FolderStorage(folder, "http://127.0.0.1:1", (b"signs media",)), session, (NEW, OLD))


async def failed(store: Store, url: str, **fields: Any) -> TaskId:
    """Return a failed task with a webhook to this URL."""
    task_id, run = await running(store, callback_url=url, **fields)
    await store.fail(task_id, run, "it broke", "internal")
    return task_id


async def completed(store: Store, url: str, cms: str = CMS) -> TaskId:
    """Return a completed task: its first delivery is for the CMS, if there is one, the next a webhook to this URL."""
    task_id, run = await running(store, callback_url=url)
    await store.complete(task_id, run, result(), cms)
    return task_id


async def tried(parts: DeliveryParts, task_id: TaskId, number: int = 1) -> float | None:
    """Try a delivery; return the seconds until its next try, or None if there is none."""
    delivery_id = f"{task_id}-{number}"
    try:
        await deliver({"delivery_parts": parts, "job_id": delivery_id, "job_try": 1}, delivery_id)
    except Retry as again:
        return (again.defer_score or 0) / 1000
    return None


async def facts(store: Store, task_id: TaskId, number: int = 1) -> Delivery:
    """Return the state of a delivery."""
    return next(delivery for id, delivery, _ in await Outbox(store.redis).deliveries(task_id) if id == f"{task_id}-{number}")


async def due_in_s(store: Store, job: str) -> float:
    """Return the seconds until the job is due."""
    seconds, micros = await raw(store).time()
    due_ms: float = await raw(store).zscore(KEYS["deliveries"], job)
    return due_ms / 1000 - float(seconds) - float(micros) / 1_000_000


def said(hook: Receiver) -> list[tuple[str, Any]]:
    """Return the type and the CMS's id of each webhook that was received."""
    bodies = [json.loads(body) for _, body in hook.requests]
    return [(body["type"], body["result"] and body["result"]["payload_media_id"]) for body in bodies]


# When


async def test_a_receiver_that_is_down_is_tried_ten_times_over_more_than_a_day(store: Store, parts: DeliveryParts) -> None:
    task_id = await failed(store, "http://127.0.0.1:9/hook")
    waits = []
    while (wait := await tried(parts, task_id)) is not None:
        waits.append(wait)
    scheduled = [*SCHEDULE_S[1:], *[SCHEDULE_S[-1]] * (TRIES - len(SCHEDULE_S))]
    assert waits == pytest.approx(scheduled, rel=JITTER + 0.001)
    assert sum(waits) > 86400
    delivery = await facts(store, task_id)
    assert (delivery.state, delivery.tries) == (DeliveryState.FAILED, TRIES)


def test_what_was_missed_together_does_not_come_back_together() -> None:
    waits = [wait_s(1) for _ in range(200)]
    assert 4.5 <= min(waits) < 4.75
    assert 5.25 < max(waits) <= 5.5


@pytest.mark.parametrize(("asked", "least_s", "most_s"), [("120", 120, 120), ("1", 4.5, 5.5), ("soon", 4.5, 5.5), ("999999", 86400, 86400)])
async def test_retry_after_is_heeded_where_it_is_longer(
    store: Store, parts: DeliveryParts, asked: str, least_s: float, most_s: float
) -> None:
    async def busy(_: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": asked})

    async with serving({"/hook": busy}, "POST") as url:
        task_id = await failed(store, f"{url}/hook")
        wait = await tried(parts, task_id)
    assert wait is not None
    assert least_s <= wait <= most_s
    assert (await facts(store, task_id)).last_status == 503


async def test_410_stops_the_tries(store: Store, parts: DeliveryParts) -> None:
    async with receiver(410, 200) as hook:
        task_id = await failed(store, hook.url)
        assert await tried(parts, task_id) is None
        assert await tried(parts, task_id) is None
        assert len(hook.requests) == 1
    assert (await facts(store, task_id)).state is DeliveryState.FAILED


async def test_a_job_of_the_outbox_does_not_expire_and_what_came_of_it_does(store: Store) -> None:
    task_id = await failed(store, "http://127.0.0.1:9/hook")
    assert await raw(store).ttl(f"{KEYS['job']}{task_id}-1") == -1
    assert 29 * 86400 < await raw(store).ttl(f"{KEYS['delivery']}{task_id}-1") <= 30 * 86400


async def test_a_delivery_of_a_kind_that_only_a_newer_version_knows_is_tried_again(store: Store, parts: DeliveryParts) -> None:
    task_id = await completed(store, "http://127.0.0.1:9/hook")
    await raw(store).hset(KEYS["delivery"] + f"{task_id}-1", "kind", "slack")
    assert await tried(parts, task_id) is not None
    delivery = await facts(store, task_id)
    assert (delivery.state, delivery.tries) == (DeliveryState.PENDING, 1)
    assert delivery.last_problem == "this worker cannot deliver to slack: update it"


async def test_a_try_that_breaks_is_another_try_and_not_the_end_of_the_delivery(store: Store, parts: DeliveryParts) -> None:
    task_id = await failed(store, "http://127.0.0.1:9/hook")
    await raw(store).hset(f"{KEYS['delivery']}{task_id}-1", "status", "of a newer movieq")
    assert await tried(parts, task_id) is not None


async def test_a_delivery_that_takes_long_is_nobody_elses(store: Store, parts: DeliveryParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "HELD_S", 3.0)
    gone_on, held = asyncio.Event(), f"{in_progress_key_prefix}%s-1"

    async def slow(_: web.Request) -> web.Response:
        await gone_on.wait()
        return web.Response()

    async with serving({"/hook": slow}, "POST") as url:
        task_id = await failed(store, f"{url}/hook")
        await raw(store).set(held % task_id, b"1", px=60_000)
        trying = asyncio.create_task(tried(parts, task_id))

        async def renewed() -> bool:
            return bool(0 < await raw(store).pttl(held % task_id) <= 3000)

        await eventually(renewed)
        gone_on.set()
        assert await trying is None


# What


async def test_every_try_has_its_own_time_and_signature_and_the_id_and_the_facts_of_the_first(store: Store, parts: DeliveryParts) -> None:
    async with receiver(500, 200) as hook:
        task_id = await failed(store, hook.url)
        await tried(parts, task_id)
        await tried(parts, task_id)
    (first, body), (second, again) = hook.requests
    assert first["webhook-id"] == second["webhook-id"] == f"{task_id}-1"
    assert body == again
    for headers in (first, second):
        for secret in (OLD, NEW):
            assert Webhook(secret).verify(body, headers)["task_id"] == task_id


async def test_the_webhook_waits_for_the_cms_at_most_half_a_minute(store: Store) -> None:
    with_cms, without = await completed(store, "http://127.0.0.1:9/hook"), await completed(store, "http://127.0.0.1:9/hook", "")
    assert 29 < await due_in_s(store, f"{with_cms}-2") <= 30
    assert await due_in_s(store, f"{with_cms}-1") <= 0
    assert await due_in_s(store, f"{without}-1") <= 0


@pytest.mark.parametrize("media_id", [7, "64f0c0ffee", 'with "quotes" }'])
async def test_a_webhook_that_waited_is_due_as_soon_as_the_id_is_there_and_carries_it(
    store: Store, parts: DeliveryParts, media_id: str | int
) -> None:
    async with receiver() as hook:
        task_id = await completed(store, hook.url)
        assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", media_id) == media_id
        assert await due_in_s(store, f"{task_id}-2") <= 0
        assert await tried(parts, task_id, 2) is None
    assert said(hook) == [("task.completed", media_id)]
    assert len(await Outbox(store.redis).deliveries(task_id)) == 2
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.result == StoredResult(result().media, result().metadata, media_id)


async def test_where_the_cms_refuses_the_webhook_goes_out_at_once_without_an_id(store: Store, parts: DeliveryParts) -> None:
    async with receiver() as hook:
        task_id = await completed(store, hook.url)
        assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.FAILED, 1, 400, "project: no such document") is None
        assert await due_in_s(store, f"{task_id}-2") <= 0
        await tried(parts, task_id, 2)
    assert said(hook) == [("task.completed", None)]


async def test_an_id_that_comes_after_the_half_minute_is_told_by_a_second_webhook(store: Store, parts: DeliveryParts) -> None:
    async with receiver() as hook:
        task_id = await completed(store, hook.url)
        assert await tried(parts, task_id, 2) is None
        await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 4, 201, "", 7)
        assert await tried(parts, task_id, 3) is None
    assert said(hook) == [("task.completed", None), ("task.updated", 7)]
    body = json.loads(hook.requests[1][1])
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert (body["status"], body["event"], body["data"]["payload_media_id"]) == ("completed", "complete", 7)
    assert body["completed_at"] == json.loads(hook.requests[0][1])["completed_at"]


@pytest.mark.parametrize("begun", [False, True])
async def test_the_id_is_told_with_a_result_that_a_newer_version_stored_with_more_fields(
    store: Store, parts: DeliveryParts, begun: bool
) -> None:
    async with receiver() as hook:
        task_id = await completed(store, hook.url)
        newer = msgspec.json.encode(result()).removesuffix(b"}") + b',"labels":["scene 12"]}'
        for key in (KEYS["task"] + task_id, KEYS["delivery"] + f"{task_id}-2"):
            await raw(store).hset(key, "result", newer)
        if begun:
            await tried(parts, task_id, 2)
        assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7) == 7
        await tried(parts, task_id, 3 if begun else 2)
    assert said(hook)[-1] == ("task.updated" if begun else "task.completed", 7)
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.result == StoredResult(result().media, result().metadata, 7)
    assert [entry.type for entry in await Queries(store.redis).log_after(task_id, None)][-1] is EventType.UPDATED


async def test_an_id_that_an_older_version_stored_in_the_result_is_read_and_stays(store: Store) -> None:
    task_id = await completed(store, "http://127.0.0.1:9/hook")
    older = msgspec.json.encode(StoredResult(result().media, result().metadata, 7))
    await raw(store).hset(KEYS["task"] + task_id, mapping={"result": older, "media_id": "7"})
    assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 2, 201, "", 7) == 7
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.result == StoredResult(result().media, result().metadata, 7)
    assert EventType.UPDATED not in [entry.type for entry in await Queries(store.redis).log_after(task_id, None)]


async def test_an_id_that_is_told_twice_is_one_event_and_the_first_stays(store: Store) -> None:
    task_id = await completed(store, "http://127.0.0.1:9/hook")
    assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7) == 7
    assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7) == 7
    assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 2, 201, "", 8) == 7  # of another worker
    assert [entry.type for entry in await Queries(store.redis).log_after(task_id, None)].count(EventType.UPDATED) == 1


async def test_what_came_of_a_delivery_whose_task_was_swept_is_noted_nowhere(store: Store) -> None:
    task_id = await completed(store, "http://127.0.0.1:9/hook")
    await raw(store).delete(KEYS["delivery"] + f"{task_id}-1")
    assert await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7) is None
    assert not await raw(store).exists(KEYS["delivery"] + f"{task_id}-1")


# In which order


async def test_a_webhook_waits_for_the_one_before_it_of_the_same_task(store: Store, parts: DeliveryParts) -> None:
    async with receiver(500, 200) as hook:
        task_id = await completed(store, hook.url)
        await tried(parts, task_id, 2)
        await raw(store).zincrby(KEYS["deliveries"], 36_000_000, f"{task_id}-2")
        await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7)
        assert await due_in_s(store, f"{task_id}-2") <= 0  # it does not hold up what is new for ten hours
        assert await tried(parts, task_id, 3) == TURN_S
        assert (await facts(store, task_id, 3)).tries == 0
        await raw(store).zincrby(KEYS["deliveries"], TURN_S * 1000, f"{task_id}-3")
        assert await tried(parts, task_id, 2) is None
        assert await due_in_s(store, f"{task_id}-3") <= 0
        assert await tried(parts, task_id, 3) is None
    assert said(hook) == [("task.completed", None), ("task.completed", None), ("task.updated", 7)]


# What is damaged


async def test_a_damaged_entry_of_the_outbox_holds_up_no_delivery(folder: Path) -> None:
    async with fleet(folder) as installation, receiver() as hook:
        tasks = [await failed(installation.store, hook.url) for _ in range(5)]
        jobs = [f"{task_id}-1" for task_id in tasks]
        redis = raw(installation.store)
        await redis.zadd(KEYS["deliveries"], {b"\xff\xfe": 1, "names nothing": 1})
        await redis.set(retry_key_prefix + jobs[0], "x")
        await redis.lpush(retry_key_prefix + jobs[1], "x")
        await redis.delete(KEYS["job"] + jobs[2])
        await redis.lpush(KEYS["job"] + jobs[2], "x")
        await Outbox(installation.store.redis).resend(tasks[3], jobs[3])
        await redis.hset(KEYS["delivery"] + jobs[3], mapping={"state": "failed"})
        await Outbox(installation.store.redis).resend(tasks[3], jobs[3])
        await redis.delete(KEYS["job"] + jobs[3] + ".1")
        await redis.lpush(KEYS["job"] + jobs[3] + ".1", "x")
        worker = await installation.worker()

        async def over() -> bool:
            states = [(await facts(installation.store, task_id)).state for task_id in tasks]
            return set(states) == {DeliveryState.DELIVERED} and await redis.zcard(KEYS["deliveries"]) == 0

        await eventually(over)
        assert sorted({headers["webhook-id"] for headers, _ in hook.requests}) == sorted(jobs)
        assert worker.times_logged("entries_dropped") == 1
        assert worker.times_logged("script_failed") == worker.times_logged("claim_failed") == 0


# Again


async def test_what_is_sent_again_has_all_its_tries_and_the_id_and_the_body_that_it_had(store: Store, parts: DeliveryParts) -> None:
    async with receiver(410, 200) as hook:
        task_id = await failed(store, hook.url)
        await tried(parts, task_id)
        await Outbox(store.redis).resend(task_id, f"{task_id}-1")
        delivery = await facts(store, task_id)
        assert (delivery.state, delivery.tries) == (DeliveryState.PENDING, 0)
        assert await due_in_s(store, f"{task_id}-1.1") <= 0
        await tried(parts, task_id)
    assert (await facts(store, task_id)).state is DeliveryState.DELIVERED
    assert hook.requests[0][1] == hook.requests[1][1]
    assert hook.requests[0][0]["webhook-id"] == hook.requests[1][0]["webhook-id"]


async def test_what_waits_is_due_at_once_when_it_is_sent_again(store: Store) -> None:
    task_id = await failed(store, "http://127.0.0.1:9/hook")
    await raw(store).zincrby(KEYS["deliveries"], 3_600_000, f"{task_id}-1")
    await Outbox(store.redis).resend(task_id, f"{task_id}-1")
    assert await due_in_s(store, f"{task_id}-1") <= 0
    assert await raw(store).zcard(KEYS["deliveries"]) == 1
