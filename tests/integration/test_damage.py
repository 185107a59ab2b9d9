"""Missing or damaged records: each affects only itself, whichever key or field it is and whichever verb meets it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import pytest
import structlog

from movieq.errors import InvalidState, NotFound, RunLost
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Slot, Store
from movieq.tasks.entities import DeliveryState
from movieq.tasks.states import STATES, EventType, Kind, ProjectId, RunToken, TaskId, TaskStatus
from tests.arrange import CPU, KEY_FLOW, claim, new_task, raw, result, running

_nonces = itertools.count()
IDS = {
    name: TaskId(f"00000000-0000-4000-8000-00000000000{number}")
    for number, name in enumerate(["queued", "delayed", "processing", "reaped", "completed", "failed", "cancelled", "offered", "batched"])
}
"""State or list -> the task of the busy installation that is in it."""

REFUSALS = (RunLost, NotFound, InvalidState)


async def busy(store: Store) -> dict[bytes, bytes]:
    """Return all keys, serialised, of an installation with a task in every state, deliveries, leases, deadlines and orphans."""
    hook: dict[str, Any] = {"callback_url": "http://127.0.0.1:1/", "max_ms": 10_000_000}
    for name in ("completed", "failed", "cancelled", "processing", "reaped", "delayed"):
        flow = KEY_FLOW if name in ("failed", "reaped", "delayed") else ""
        await store.submit(new_task(task_id=IDS[name], flow=flow, fingerprint=name, idempotency=name, body_hash="b", **hook))
    runs = {c.task.task_id: c.run for c in await store.claim("w1", "first", CPU * 6)}
    await store.complete(IDS["completed"], runs[IDS["completed"]], result(), "http://127.0.0.1:1/cms")
    await store.requeue(IDS["failed"], runs[IDS["failed"]], Budget.DEATHS, 1, 0, "it died", "worker_lost", exit_code=-9, stage="decode")
    await store.cancel(IDS["cancelled"])
    await store.requeue(IDS["delayed"], runs[IDS["delayed"]], Budget.TRIES, 3, 1, "it broke", "network")
    prefix = "projects/film/image/t/r"
    for name in ("processing", "reaped"):
        await store.report(IDS[name], runs[IDS[name]], 0.5, "generating_image", step=1, steps=2, prefix=prefix, gpu=(1.0, 1.0))
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {IDS["reaped"]: 1})
    await store.renew("w1", [], [(IDS["processing"], runs[IDS["processing"]])], gpu_bytes=24 * 2**30)
    await store.tidy()
    for name in ("queued", "offered", "batched"):
        flow = "" if name == "offered" else KEY_FLOW
        await store.submit(new_task(task_id=IDS[name], flow=flow, finish_by_ms=9_000_000_000_000, batch="b", batch_rows=2, **hook))
    await raw(store).hset(KEYS["task"] + IDS["offered"], "made_on", "here")
    await raw(store).zadd(KEYS["offered"] + "here", {IDS["offered"]: 1})
    for _ in range(3):  # the webhook of the completed task waits for its host, those of the others for a place
        await Outbox(store.redis).record_answer(f"{IDS['completed']}-2", answered=False)
        await raw(store).hincrby(KEYS["delivery"] + f"{IDS['completed']}-2", "tries", 1)
    await Outbox(store.redis).begin(f"{IDS['completed']}-2", 30_000)
    await Outbox(store.redis).admit("w1", "busy", 2, 0, [], 30_000)
    await raw(store).set("runs", runs[IDS["processing"]])
    await raw(store).set("reaped_run", runs[IDS["reaped"]])
    return {key: await raw(store).dump(key) for key in await raw(store).keys("*")}


async def put(store: Store, keys: dict[bytes, bytes]) -> None:
    """Store exactly these keys."""
    await raw(store).flushdb()
    async with raw(store).pipeline(transaction=False) as pipe:
        for key, value in keys.items():
            pipe.restore(key, 0, value)
        await pipe.execute()


async def all_verbs(store: Store) -> None:
    """Call every script and every read; only refusals that undamaged records cause too are accepted."""
    run = RunToken((await raw(store).get("runs") or b"gone").decode())
    reaped = RunToken((await raw(store).get("reaped_run") or b"gone").decode())
    task = IDS["processing"]
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.tidy(),
        lambda: store.submit(new_task(fingerprint="completed", idempotency="completed", body_hash="b")),
        lambda: store.submit(new_task(task_id=IDS["queued"])),
        lambda: store.submit(
            new_task(
                fingerprint="completed",
                reused=IDS["completed"],
                reused_result=b"{}",
                reused_prefix="projects/film/image/t/r",
                max_queued=99,
            )
        ),
        lambda: store.report(task, run, 0.6, "generating_image", gpu=(2.0, 1.0), keep=True),
        lambda: store.report(IDS["reaped"], reaped, 0.6, "generating_image"),
        lambda: store.preview(task, run, b"jpeg"),
        lambda: store.renew("w1", [], [(task, run), (IDS["reaped"], reaped)], gpu_bytes=24 * 2**30),
        lambda: Queries(store.redis).reusable("completed"),
        *(lambda id=id: Queries(store.redis).task(id) for id in IDS.values()),
        *(lambda id=id: Outbox(store.redis).deliveries(id) for id in IDS.values()),
        *(lambda id=id: Queries(store.redis).log_after(id, None) for id in IDS.values()),
        *(lambda id=id: Queries(store.redis).task_data(id) for id in IDS.values()),
        *(lambda s=s: Queries(store.redis).page(ProjectId("film"), s, None, 1, 20) for s in [None, *STATES]),
        lambda: Queries(store.redis).project(ProjectId("film")),
        lambda: Queries(store.redis).active(ProjectId("film"), [], [], 100),
        lambda: Queries(store.redis).queues(),
        lambda: Queries(store.redis).queue_sizes(),
        lambda: Queries(store.redis).totals(None),
        lambda: Queries(store.redis).totals(["film"]),
        lambda: Queries(store.redis).dead_letters(),
        lambda: Queries(store.redis).workers(),
        lambda: Queries(store.redis).average_durations_s(),
        lambda: store.claim("w2", f"n{next(_nonces)}", CPU * 2, host="here"),
        lambda: store.claim("w1", "first", CPU),
        lambda: Outbox(store.redis).admit("w1", "nonce", 9, 9, [], 30_000),
        lambda: Outbox(store.redis).begin(f"{IDS['completed']}-1", 30_000),
        lambda: Outbox(store.redis).delivered(f"{IDS['completed']}-1", DeliveryState.DELIVERED, 1, 200, "", "cms-id"),
        lambda: Outbox(store.redis).begin(f"{IDS['completed']}-2", 30_000),
        lambda: Outbox(store.redis).record_answer(f"{IDS['completed']}-2", answered=False),
        lambda: Outbox(store.redis).record_answer(f"{IDS['completed']}-2", answered=True),
        lambda: Outbox(store.redis).delivered(f"{IDS['completed']}-2", DeliveryState.FAILED, 1, 500, "no"),
        lambda: Outbox(store.redis).resend(IDS["completed"], f"{IDS['completed']}-2"),
        *(lambda id=id: store.retry(id) for id in IDS.values()),
        *(lambda id=id: store.cancel(id) for id in (IDS["delayed"], IDS["failed"], IDS["batched"])),
        lambda: store.requeue(IDS["reaped"], reaped, Budget.TRIES, 3, 0, "it broke", "network"),
        lambda: store.fail(task, run, "it broke", "internal"),
        lambda: store.claim("w3", f"n{next(_nonces)}", CPU * 3),
        lambda: store.complete(task, run, result()),
        lambda: store.tidy(),
        lambda: store.leave("w1"),
        lambda: store.sweep(0),
    ]
    for call in calls:
        with contextlib.suppress(*REFUSALS):
            await call()


async def another_project_is_served(store: Store) -> None:
    """Assert that a new task of another project is claimed and completed, whatever else waits."""
    task = new_task("other", kind=Kind.CPU_INTENSIVE)
    await store.submit(task)
    for _ in range(40):
        for claimed in await claim(store, "w9"):
            if claimed.task.task_id == task.task_id:
                await store.complete(task.task_id, claimed.run, result())
                found = await Queries(store.redis).task(task.task_id)
                assert found is not None
                assert found.status is TaskStatus.COMPLETED
                return
    raise AssertionError("it was not claimed")


async def test_no_key_is_missed_by_any_verb(store: Store) -> None:
    keys = await busy(store)
    assert len(keys) > 60
    for missing in keys:
        await put(store, {key: value for key, value in keys.items() if key != missing})
        try:
            await all_verbs(store)
            await another_project_is_served(store)
        except BaseException as error:
            error.add_note(f"without {missing!r}")
            raise


@pytest.mark.parametrize("value", [None, "nan", "\udcff"])
@pytest.mark.parametrize("name", ["queued", "processing", "reaped", "completed", "failed"])
async def test_no_field_of_a_task_is_missed_by_any_verb(store: Store, name: str, value: str | None) -> None:
    keys = await busy(store)
    key = KEYS["task"] + IDS[name]
    for field in await raw(store).hkeys(key):
        await put(store, keys)
        if value is None:
            await raw(store).hdel(key, field)
        else:
            await raw(store).hset(key, field, value.encode(errors="surrogateescape"))
        try:
            await all_verbs(store)
            await another_project_is_served(store)
        except BaseException as error:
            error.add_note(f"{name}: {field!r} was {value!r}")
            raise


async def test_a_deadline_without_its_task_stops_no_lease_and_no_other_deadline(
    store: Store, logged: list[MutableMapping[str, Any]]
) -> None:
    dead, _ = await running(store, finish_by_ms=1)
    late, _ = await running(store, finish_by_ms=2)
    silent, _ = await running(store)
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {silent: 1})
    await raw(store).delete(KEYS["task"] + dead)
    await store.tidy()
    assert [(await found(store, each)).status for each in (late, silent)] == [TaskStatus.FAILED, TaskStatus.QUEUED]
    await store.tidy()
    assert dropped(logged) == [f"deadlines {dead}"]


async def test_waiting_tasks_without_a_record_hold_up_nobody(store: Store, logged: list[MutableMapping[str, Any]]) -> None:
    gone = [new_task() for _ in range(10)]
    for task in gone:
        await store.submit(task)
    behind = new_task()
    await store.submit(behind)
    await raw(store).delete(*(KEYS["task"] + task.task_id for task in gone))
    (claimed,) = await claim(store)
    assert claimed.task.task_id == behind.task_id
    await store.tidy()
    assert sorted(dropped(logged)) == sorted(f"waiting {task.task_id}" for task in gone)
    assert await Queries(store.redis).queue_sizes() == dict.fromkeys(Kind, 0)


async def test_what_a_dead_worker_held_is_forgotten_with_it_though_the_record_is_gone(store: Store) -> None:
    task_id, _ = await running(store)
    await store.renew("w1", [], [], gpu_bytes=0)
    await raw(store).delete(KEYS["task"] + task_id)
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {task_id: 1})
    await raw(store).zadd(KEYS["heartbeat_times"], {"w1": 1})
    await store.tidy()
    assert await raw(store).keys(KEYS["worker_tasks"] + "*") == []
    assert await raw(store).zcard(KEYS["running"] + "cpu_intensive") == 0


async def test_a_task_whose_definition_is_gone_fails_and_says_what_to_do(store: Store) -> None:
    task = new_task()
    await store.submit(task)
    await raw(store).delete(KEYS["job"] + task.task_id)
    assert await claim(store) == []
    ended = await found(store, task.task_id)
    assert ended.status is TaskStatus.FAILED
    assert ended.error == "the parameters of this task are no longer in Redis: submit it again"
    assert ended.retryable is False
    assert [entry.type for entry in await Queries(store.redis).log_after(task.task_id, None)] == [EventType.FAILED]


async def test_a_queue_without_its_shares_is_served_all_the_same(store: Store) -> None:
    tasks = [new_task(project) for project in ("film", "other", "film")]
    for task in tasks:
        await store.submit(task)
    await raw(store).delete(KEYS["virtual_times"] + "cpu_intensive", KEYS["waiting"] + "cpu_intensive:film")
    claimed = [each.task.task_id for _ in range(6) for each in await claim(store)]
    assert sorted(claimed) == sorted(task.task_id for task in tasks)


async def test_a_record_that_cannot_be_read_is_claimed_as_unknown_and_can_be_given_back(store: Store) -> None:
    task = new_task()
    await store.submit(task)
    await raw(store).hset(KEYS["task"] + task.task_id, "result", "{")
    (claimed,) = await store.claim("w1", "nonce", [Slot((Kind.CPU_INTENSIVE,))])
    assert (claimed.task.task_id, claimed.task.status, claimed.task.project_id) == (task.task_id, TaskStatus.UNKNOWN, "film")
    assert await store.requeue(task.task_id, claimed.run, Budget.TRIES, 1, 0, "unreadable", "internal") is TaskStatus.FAILED


@pytest.fixture
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    """Yield the list of log entries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


def dropped(logged: list[MutableMapping[str, Any]]) -> list[str]:
    return [each for entry in logged if entry["event"] == "entries_dropped" for each in entry["entries"]]


async def found(store: Store, task_id: TaskId) -> Any:
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    return task


@pytest.mark.parametrize(
    "damage", ["another type", "weight of nothing", "rows of nothing", "a time in the year 33658", "a log", "an index"]
)
async def test_a_record_that_breaks_whoever_reads_it_stops_no_claim_no_deadline_and_no_lease(store: Store, damage: str) -> None:
    odd, _ = await running(store, project="odd", finish_by_ms=1)
    waiting = new_task("odd")
    await store.submit(waiting)
    for task_id in (odd, waiting.task_id):
        key = KEYS["task"] + task_id
        match damage:
            case "another type":
                await raw(store).delete(key)
                await raw(store).set(key, "no record")
            case "weight of nothing":
                await raw(store).hset(key, "weight", 0)
            case "a log":
                await raw(store).delete(KEYS["log"] + task_id)
                await raw(store).set(KEYS["log"] + task_id, "no log")
            case "an index":
                for status in STATES:
                    await raw(store).set(f"{KEYS['index']}odd|{status}|", "no list")
            case "rows of nothing":
                await raw(store).hset(key, mapping={"rows": 0, "batch_rows": -1})
            case _:
                await raw(store).hset(key, mapping={"created_at_ms": 999999999999999, "started_at_ms": 999999999999999})
    silent, _ = await running(store, "w2", project="even")
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {silent: 1, odd: 2})
    await store.tidy()
    await store.tidy()
    assert (await found(store, silent)).status is TaskStatus.QUEUED
    assert await raw(store).zcard(KEYS["deadlines"]) in (0, 1)  # that of the task that waits again, where it has one
    await another_project_is_served(store)


@pytest.mark.parametrize("name", ["priorities", "totals", "sums", "idle_virtual_times"])
async def test_a_damaged_counter_starts_anew(store: Store, name: str) -> None:
    fields = ("1", "2", "3", *STATES, "generate_image tasks", "entries dropped", "film", "other")
    key = KEYS[name] + ("cpu_intensive" if KEYS[name].endswith(":") else "")
    await raw(store).hset(key, mapping=dict.fromkeys(fields, "x"))
    await store.submit(new_task())
    await another_project_is_served(store)
    await store.tidy()


async def test_leases_of_kinds_that_no_list_names_any_more_are_taken_back(store: Store) -> None:
    task_id, _ = await running(store)
    await raw(store).delete(KEYS["kinds"])
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {task_id: 1})
    await store.tidy()
    assert (await found(store, task_id)).status is TaskStatus.QUEUED
