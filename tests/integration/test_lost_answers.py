"""The answer of every script is lost once: the end is the same as without, no task stays held, and each receiver gets one delivery."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from movieq.local.embedded import Valkey
from movieq.queue import store as store_module
from movieq.queue.connection import connect
from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.entities import Delivery, DeliveryState, Upload
from movieq.tasks.states import EventType, Kind, ProjectId, TaskId, TaskStatus
from tests.arrange import CPU, contents, new_task, raw, result
from tests.fleet import Fleet, eventually, fleet
from tests.proxy import Proxy, proxy, script
from tests.service import Receiver, receiver

TASK = TaskId("11111111-1111-4111-8111-111111111111")
HOOK = "http://127.0.0.1:1/hook"
CMS = "http://127.0.0.1:1/api/media"


async def submit(store: Store, **fields: Any) -> Any:
    return (await store.submit(new_task(task_id=TASK, callback_url=HOOK, **fields))).queue_position


async def begun(store: Store, **fields: Any) -> Any:
    await submit(store, **fields)
    (claimed,) = await store.claim("w1", "nonce", CPU)
    return claimed.run


async def report(store: Store) -> Any:
    await store.report(TASK, await begun(store), 0.5, "generating_image", stage="render", step=1, steps=2, prefix="p")


async def preview(store: Store) -> Any:
    await store.preview(TASK, await begun(store), b"jpeg")


async def complete(store: Store) -> Any:
    run = await begun(store)
    await store.report(TASK, run, 0.9, "uploading_result", prefix="p")
    await store.complete(TASK, run, result())


async def fail(store: Store) -> Any:
    await store.fail(TASK, await begun(store), "no such frame", "invalid_input")


async def requeue(store: Store) -> Any:
    return await store.requeue(TASK, await begun(store), Budget.TRIES, 3, 60_000, "out of memory", "out_of_memory")


async def drain(store: Store) -> Any:
    return await store.requeue(TASK, await begun(store), Budget.DRAIN, 0, 0, "stopped", "worker_lost")


async def bury(store: Store) -> Any:
    return await store.requeue(TASK, await begun(store), Budget.DEATHS, 1, 0, "died", "worker_lost", exit_code=-9, stage="render")


async def cancel_queued(store: Store) -> Any:
    await submit(store)
    return (await store.cancel(TASK))[0]


async def cancel_running(store: Store) -> Any:
    await begun(store)
    return (await store.cancel(TASK))[0]


async def retry(store: Store) -> Any:
    await fail(store)
    return (await store.retry(TASK)).queue_position


async def renew(store: Store) -> Any:
    run = await begun(store)
    return await store.renew("w1", [], [(TASK, run)], gpu_bytes=24 * 2**30)


async def renew_reaped(store: Store) -> Any:
    run = await begun(store)
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {TASK: 1})
    await store.tidy()
    return await store.renew("w1", [], [(TASK, run)], gpu_bytes=0)


async def leave(store: Store) -> Any:
    await store.claim("w1", "nonce", CPU)
    await store.renew("w1", [], [], gpu_bytes=0)
    await store.leave("w1")


async def tidy_reaps(store: Store) -> Any:
    await begun(store)
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {TASK: 1})
    await store.tidy()


async def tidy_brings_over(store: Store) -> Any:
    await requeue(store)
    await raw(store).zadd(KEYS["delayed"], {TASK: 1})
    await store.tidy()


async def tidy_ends(store: Store) -> Any:
    await submit(store, start_by_ms=1)
    await store.tidy()


async def sweep(store: Store) -> Any:
    await complete(store)
    await raw(store).zadd(KEYS["ended"], {TASK: 1})
    await store.sweep(1)


async def retire(store: Store) -> Any:
    await complete(store)
    await raw(store).zadd(KEYS["media"], {"p": 1})
    await store.retire(1)


async def take_turn(store: Store) -> Any:
    return await store.take_turn("w1", 30_000), await store.take_turn("w2", 30_000)


async def write_check(store: Store) -> Any:
    await store.check_write()


async def begin(store: Store) -> Any:
    await store.complete(TASK, await begun(store), result(), CMS)
    delivery = await Outbox(store.redis).begin(f"{TASK}-2", 30_000)
    return isinstance(delivery, Delivery) and (delivery.state, delivery.held_back_ms)


async def admit(store: Store) -> Any:
    await fail(store)
    return [each.job for each in (await Outbox(store.redis).admit("w1", "nonce", 9, 9, [], 30_000)).admitted]


async def record_answer(store: Store) -> Any:
    await fail(store)
    said = []
    for tries in range(3):
        said.append(await Outbox(store.redis).record_answer(f"{TASK}-1", answered=False))
        await Outbox(store.redis).delivered(f"{TASK}-1", DeliveryState.PENDING, tries + 1, None, "no answer")
    return said


async def record_answers(store: Store) -> Any:
    said = await record_answer(store)
    await Outbox(store.redis).begin(f"{TASK}-1", 30_000)
    return said, await Outbox(store.redis).record_answer(f"{TASK}-1", answered=True)


async def probe(store: Store) -> Any:
    await record_answer(store)
    await raw(store).hset(KEYS["unresponsive"] + "127.0.0.1:1 film", "until_ms", 1)
    delivery = await Outbox(store.redis).begin(f"{TASK}-1", 30_000)
    return isinstance(delivery, Delivery) and delivery.held_back_ms


async def delivered(store: Store) -> Any:
    await store.complete(TASK, await begun(store), result(), CMS)
    return await Outbox(store.redis).delivered(f"{TASK}-1", DeliveryState.DELIVERED, 1, 200, "", 7)


async def delivered_late(store: Store) -> Any:
    await begin(store)
    return await Outbox(store.redis).delivered(f"{TASK}-1", DeliveryState.DELIVERED, 1, 200, "", "seven")


async def delivered_not_yet(store: Store) -> Any:
    await fail(store)
    return await Outbox(store.redis).delivered(f"{TASK}-1", DeliveryState.PENDING, 1, 500, "answered 500")


async def given_up(store: Store) -> Any:
    await fail(store)
    return await Outbox(store.redis).delivered(f"{TASK}-1", DeliveryState.FAILED, 1, 410, "answered 410")


async def resend(store: Store) -> Any:
    await given_up(store)
    await Outbox(store.redis).resend(TASK, f"{TASK}-1")


async def repair(store: Store) -> Any:
    await submit(store)
    await raw(store).delete(f"{KEYS['waiting']}cpu_intensive:film")
    await store.repair(TASK, [], apply=True)


async def recount(store: Store) -> Any:
    await submit(store)
    await raw(store).hset(KEYS["totals"], "queued", 7)
    await store.recount(apply=True)


async def add_upload(store: Store) -> Any:
    upload = Upload(ProjectId("film"), "uploads/film/upload/file", 1000, "image/png")
    await Files(store.redis).add_upload("upload", upload, "uploads/film/upload", 2**30)


async def drop_upload(store: Store) -> Any:
    files, upload = Files(store.redis), Upload(ProjectId("film"), "uploads/film/u/file", 1000, "image/png")
    await files.add_upload("u", upload, "uploads/film/u")
    await files.drop_upload("u", upload, "uploads/film/u")


SCENES: dict[str, list[Callable[[Store], Awaitable[Any]]]] = {
    "submit": [submit],
    "claim": [begun],
    "report": [report],
    "preview": [preview],
    "complete": [complete],
    "fail": [fail],
    "requeue": [requeue, drain, bury],
    "cancel": [cancel_queued, cancel_running],
    "retry": [retry],
    "renew": [renew, renew_reaped],
    "leave": [leave],
    "tidy": [tidy_reaps, tidy_brings_over, tidy_ends],
    "sweep": [sweep],
    "retire": [retire],
    "take_turn": [take_turn],
    "write_check": [write_check],
    "admit": [admit],
    "begin": [begin, probe],
    "record_answer": [record_answer, record_answers],
    "delivered": [delivered, delivered_late, delivered_not_yet, given_up],
    "resend": [resend],
    "repair": [repair],
    "recount": [recount],
    "add_upload": [add_upload],
    "drop_upload": [drop_upload],
}


@pytest.mark.parametrize(("name", "scene"), [(name, scene) for name, scenes in SCENES.items() for scene in scenes])
async def test_redis_holds_the_same_whether_an_answer_was_lost_or_not(
    store: Store, server: Valkey, name: str, scene: Callable[[Store], Awaitable[Any]]
) -> None:
    said = await scene(store)
    expected = await everything(store)
    await raw(store).flushall()
    async with proxy(server.socket) as between:
        through = Store(connect(between.url, patient=True))
        between.swallow(script(through, name))
        again = await scene(through)
        await through.redis.aclose()
    assert between.swallowed is not None
    assert await everything(store) == expected
    assert again == said


def test_every_script_has_a_scene() -> None:
    assert SCENES.keys() | {"take_tokens"} == {  # whose lost answer costs the client a few tokens
        path.stem for path in Path(store_module.__file__).with_name("lua").glob("*.lua")
    }


async def everything(store: Store) -> dict[str, Any]:
    """Return all that Redis holds, except for what differs from one second to the next."""
    found = {}
    for key, value in (await contents(store)).items():
        digits = -3 if key.split(":")[1] in MEASURED else 6
        found[key] = _steady(value, digits), await raw(store).ttl(key) > 0
    return found


VOLATILE = {b"retried", b"ended_at_ms", b"refunded", b"created_us", b"generate_image ms"}
MEASURED = ("flows", "spent", "clock", "durations")
"""Keys with measured milliseconds. They are compared to the second, which still shows a missing or double estimate."""


def _steady(value: Any, digits: int = 6) -> Any:
    """Return the value without times of day, and with rounded numbers."""
    match value:
        case dict():
            return {key: None if key in VOLATILE else _steady(each, digits) for key, each in value.items()}
        case list() | tuple():
            return [_steady(each, digits) for each in value]
        case bytes() if re.fullmatch(rb"-?\d+(\.\d+)?", value):
            return _steady(float(value), digits)
        case bytes():
            # in JSON, in ids of a log, and packed by MessagePack
            return re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+Z|\b1\d{12}(-\d+)?\b|\xcf.{8}", b"TIME", value, flags=re.DOTALL)
        case int() | float():
            return "TIME" if value > 1e12 else round(value, digits)
    return value


# ── Through the real processes ──


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[tuple[Fleet, Proxy, Receiver]]:
    """Yield an API on the Valkey, a proxy through which a worker can be started, and a receiver of webhooks."""
    async with fleet(tmp_path) as installation, proxy(installation.valkey.socket) as between, receiver() as hook:
        yield installation, between, hook


async def ended(store: Store, task_id: str) -> Any:
    async def over() -> bool:
        task = await Queries(store.redis).task(TaskId(task_id))
        return task is not None and task.status.ended

    await eventually(over)
    return await Queries(store.redis).task(TaskId(task_id))


SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60}


async def nothing_is_held(store: Store) -> None:
    redis = raw(store)
    assert await redis.keys(KEYS["worker_tasks"] + "*") == []
    assert await redis.keys(KEYS["running"] + "*") == []
    assert await redis.keys(KEYS["waiting"] + "*") == []


async def test_a_worker_and_an_api_that_lose_any_answer_lose_no_task(house: tuple[Fleet, Proxy, Receiver]) -> None:
    installation, between, hook = house
    api, worker = await asyncio.gather(installation.api(between.url), installation.worker(between.url))
    for count, name in enumerate(("submit", "claim", "report", "complete", "renew", "tidy"), 1):
        between.swallow(script(installation.store, name))
        task_id = await api.submit("generate_image", SMALL, callback_url=hook.url)
        task = await ended(installation.store, task_id)
        assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1), name
        await asyncio.wait_for(between.happened.wait(), 60)
        await hook.wait_for(count)
    between.swallow(script(installation.store, "fail"))
    task_id = await api.submit("generate_image", {"reference_images": ["upload:none"]}, callback_url=hook.url)
    assert (await ended(installation.store, task_id)).status is TaskStatus.FAILED
    between.swallow(script(installation.store, "retry"))
    status, receipt = await api.call("POST", f"/tasks/{task_id}/retry")
    assert (status, receipt["task_id"]) == (201, task_id)
    assert (await ended(installation.store, task_id)).attempt == 2
    assert len(await hook.wait_for(8)) == 8
    await nothing_is_held(installation.store)
    assert worker.times_logged("run_lost") == 0
    between.swallow(script(installation.store, "leave"))
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0
    assert await raw(installation.store).exists(KEYS["workers"], KEYS["heartbeat_times"]) == 0


async def test_a_hand_back_whose_answer_is_lost_is_one_hand_back(house: tuple[Fleet, Proxy, Receiver]) -> None:
    installation, between, _ = house
    api, worker = await asyncio.gather(installation.api(), installation.worker(between.url, MOVIEQ_DRAIN_S="0"))
    task_id = await api.submit("generate_video", LONG)
    await api.until(task_id, "stage", "frames")
    between.swallow(script(installation.store, "requeue", Budget.DRAIN))
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0
    assert between.swallowed is not None
    assert worker.times_logged("run_lost") == 0
    events = [entry.type for entry in await Queries(installation.store.redis).log_after(TaskId(task_id), None)]
    assert events.count(EventType.RETRYING) == 1
    task = await Queries(installation.store.redis).task(TaskId(task_id))
    assert task is not None
    assert task.status is TaskStatus.QUEUED
    assert await raw(installation.store).zcard(KEYS["waiting"] + Kind.CPU_INTENSIVE) == 1


async def test_a_claim_that_its_worker_did_not_live_to_hear_of_is_run_by_another(house: tuple[Fleet, Proxy, Receiver]) -> None:
    installation, between, hook = house
    api, first = await asyncio.gather(installation.api(), installation.worker(between.url))
    between.hold(script(installation.store, "claim"))
    task_id = await api.submit("generate_image", SMALL, callback_url=hook.url)
    await api.until(task_id, "event", "started")
    await asyncio.wait_for(between.happened.wait(), 60)
    first.send(signal.SIGKILL)
    await installation.worker()
    task = await ended(installation.store, task_id)
    assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 2)
    assert len(await hook.wait_for(1)) == 1
    await nothing_is_held(installation.store)
