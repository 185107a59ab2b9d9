"""What is past its retention is deleted: in small batches, by one worker at a time, and no failed deletion stops the others."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Bucket, Settings
from movieq.storage import s3
from movieq.storage.base import Storage
from movieq.storage.folder import FolderStorage
from movieq.tasks.states import TaskId
from tests.arrange import new_task, raw, result, running
from tests.fleet import eventually
from workers.retention import AGAIN_S, FILES_AT_ONCE, TASKS_AT_ONCE, TURN_MS, Retention

OVER = Settings(keep_tasks_days=1e-9, keep_media_days=1e-9)


@pytest.fixture
def storage(folder: Path) -> Storage:
    return FolderStorage(folder / "media", "http://127.0.0.1:1", (b"",))


@pytest.fixture
def retention(store: Store, storage: Storage) -> Retention:
    """Return the retention of a worker that deletes whatever has ended."""
    return Retention("w1", store, Files(store.redis), storage, OVER)


async def completed(store: Store, storage: Storage, folder: Path, number: int) -> TaskId:
    """Return a completed task with a file."""
    task_id, run = await running(store)
    prefix = f"projects/film/image/{number}/run"
    (folder / "file").write_bytes(b"film")
    await storage.put(f"{prefix}/output.jpg", folder / "file", "image/jpeg")
    await store.report(task_id, run, 0.95, "uploading_result", prefix=prefix)
    await store.complete(task_id, run, result(f"{prefix}/output.jpg"))
    return task_id


async def orphan(store: Store, storage: Storage, folder: Path, prefix: str) -> None:
    """Store a file that no run committed and that is due to be deleted."""
    (folder / "file").write_bytes(b"film")
    await storage.put(f"{prefix}/output.jpg", folder / "file", "image/jpeg")
    await raw(store).zadd(KEYS["orphans"], {prefix: 1})


def files(folder: Path) -> list[str]:
    return sorted(name for _, _, names in os.walk(folder / "media") for name in names)  # folders may go while it looks


async def left(store: Store, name: str) -> list[bytes]:
    return list(await raw(store).zrange(KEYS[name], 0, -1))


async def test_all_that_is_due_goes_in_one_round_however_many_batches_it_is(
    store: Store, storage: Storage, folder: Path, retention: Retention
) -> None:
    for number in range(2 * max(TASKS_AT_ONCE, FILES_AT_ONCE) + 1):
        await completed(store, storage, folder, number)
    await retention.round()
    await retention.round()  # for results that were listed after the files had been looked through
    assert [await left(store, name) for name in ("ended", "media", "orphans")] == [[], [], []]
    assert files(folder) == []
    assert not await raw(store).keys(KEYS["task"] + "*")
    assert not await raw(store).exists(KEYS["sweeper"])


async def test_nothing_goes_that_is_younger_than_the_settings_say_and_nothing_where_they_say_for_ever(
    store: Store, storage: Storage, folder: Path
) -> None:
    task_id = await completed(store, storage, folder, 1)
    for settings in (Settings(keep_tasks_days=1, keep_media_days=1), Settings(keep_tasks_days=0, keep_media_days=0)):
        await Retention("w1", store, Files(store.redis), storage, settings).round()
    assert await Queries(store.redis).task(task_id) is not None
    assert files(folder) == ["output.jpg"]


async def test_committed_files_that_are_listed_as_orphans_stay(store: Store, storage: Storage, folder: Path) -> None:
    await completed(store, storage, folder, 1)
    await raw(store).zadd(KEYS["orphans"], {"projects/film/image/1/run": 1})
    await Retention("w1", store, Files(store.redis), storage, Settings()).round()
    assert files(folder) == ["output.jpg"]
    assert await left(store, "orphans") == []


async def test_what_cannot_be_deleted_is_passed_over_logged_once_and_tried_again(store: Store, storage: Storage, folder: Path) -> None:
    passed_s = 0.0
    retention = Retention("w1", store, Files(store.redis), storage, OVER, clock=lambda: time.monotonic() + passed_s)
    broken = [f"a/file/{number}" for number in range(3)]
    (folder / "media" / "a").mkdir(parents=True)
    (folder / "media" / "a" / "file").write_bytes(b"")  # in the way of folders
    await raw(store).zadd(KEYS["orphans"], dict.fromkeys([*broken, "../../etc", b"\xff"], 0))  # the first of all
    for number in range(FILES_AT_ONCE):
        await orphan(store, storage, folder, f"uploads/film/{number}")
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await retention.round()
        assert sorted(await left(store, "orphans")) == [prefix.encode() for prefix in broken]
        assert files(folder) == ["file"]
        (folder / "media" / "a" / "file").unlink()
        for _ in range(2):
            passed_s += AGAIN_S
            await retention.round()
    assert await left(store, "orphans") == []
    failures = [line for line in logged if line["event"] == "files_not_deleted"]
    assert [line["count"] for line in failures] == [3]
    assert "Not a directory" in failures[0]["problem"]
    assert len([line for line in logged if line["event"] == "prefix_invalid"]) == 2


async def test_a_storage_that_is_away_stops_no_tasks_and_is_left_alone_for_a_while(store: Store, folder: Path) -> None:
    (folder / "media").write_bytes(b"")  # no folder
    away = Retention("w1", store, Files(store.redis), FolderStorage(folder / "media", "http://127.0.0.1:1", (b"",)), OVER)
    task_id, run = await running(store)
    await store.fail(task_id, run, "it broke", "internal")
    await raw(store).zadd(KEYS["orphans"], {f"uploads/film/{number}": number for number in range(3 * FILES_AT_ONCE)})
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await away.round()
    assert await Queries(store.redis).task(task_id) is None
    assert await raw(store).zcard(KEYS["orphans"]) == 3 * FILES_AT_ONCE
    assert [line["count"] for line in logged if line["event"] == "files_not_deleted"] == [FILES_AT_ONCE]


async def test_files_go_from_a_bucket_too(store: Store, bucket: Bucket, folder: Path) -> None:
    async with s3.opened(bucket, patient=True) as storage:
        for number in range(20):
            await orphan(store, storage, folder, f"uploads/film/{number}")
        await Retention("w1", store, Files(store.redis), storage, OVER).round()
        assert await left(store, "orphans") == []
        assert [await storage.size(f"uploads/film/{number}/output.jpg") for number in range(20)] == [None] * 20


@pytest.mark.parametrize(
    "damage",
    [
        {"project_id": None},
        {"status": None},
        {"task_type": None},
        {"kind": None},
        {"deliveries": "many"},
        {"status": "of-a-newer-movieq"},
        "no hash",
        "gone",
    ],
    ids=str,
)
async def test_a_damaged_record_is_forgotten_with_the_others(store: Store, retention: Retention, damage: Any) -> None:
    ids = []
    for _ in range(3):
        task_id, run = await running(store)
        await store.fail(task_id, run, "it broke", "internal")
        ids.append(task_id)
        await raw(store).zadd(KEYS["ended"], {task_id: len(ids)})
    key = KEYS["task"] + ids[0]
    if isinstance(damage, str):
        await raw(store).delete(key)
        if damage == "no hash":
            await raw(store).set(key, "x")
    else:
        for name, value in damage.items():
            await (raw(store).hdel(key, name) if value is None else raw(store).hset(key, name, value))
    await retention.round()
    assert await left(store, "ended") == []
    for task_id in ids:
        assert not await raw(store).exists(KEYS["task"] + task_id, KEYS["job"] + task_id, KEYS["log"] + task_id)


async def test_a_task_that_is_listed_as_ended_and_is_not_stays(store: Store, retention: Retention) -> None:
    waiting = (await store.submit(new_task())).task_id
    await raw(store).zadd(KEYS["ended"], {waiting: 1})
    await retention.round()
    assert await Queries(store.redis).task(waiting) is not None
    assert await left(store, "ended") == []


async def test_a_fault_with_one_sort_of_thing_stops_no_other(store: Store, storage: Storage, folder: Path, retention: Retention) -> None:
    await completed(store, storage, folder, 1)
    await orphan(store, storage, folder, "uploads/film/1")
    await raw(store).delete(KEYS["ended"])
    await raw(store).set(KEYS["ended"], "no sorted set")
    await retention.round()
    await retention.round()
    assert files(folder) == []


async def test_one_worker_has_the_turn_and_that_of_a_dead_one_ends(
    store: Store, storage: Storage, folder: Path, retention: Retention
) -> None:
    await orphan(store, storage, folder, "uploads/film/1")
    assert await store.take_turn("another", TURN_MS)
    await retention.round()
    assert files(folder) == ["output.jpg"]
    assert 0 < await raw(store).pttl(KEYS["sweeper"]) <= TURN_MS
    await raw(store).pexpire(KEYS["sweeper"], 1)
    await eventually(lambda: gone(store, KEYS["sweeper"]))
    await retention.round()
    assert files(folder) == []


async def gone(store: Store, key: str) -> bool:
    return not await raw(store).exists(key)


@pytest.fixture
async def several(store: Store, storage: Storage) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run the retention of three workers."""
    sweeps = [asyncio.create_task(Retention(f"w{number}", store, Files(store.redis), storage, OVER).run()) for number in range(3)]
    yield sweeps
    for each in sweeps:
        each.cancel()
    await asyncio.gather(*sweeps, return_exceptions=True)


async def test_what_becomes_due_goes_without_a_restart_though_one_worker_has_gone(
    store: Store, storage: Storage, folder: Path, several: list[asyncio.Task[None]]
) -> None:
    for number, worker in enumerate([None, *several[:2]]):
        if worker is not None:
            worker.cancel()
            await asyncio.wait({worker})
        task_id = await completed(store, storage, folder, number)
        await eventually(lambda task_id=task_id: gone(store, KEYS["task"] + task_id), 30)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
        await eventually(lambda: not files(folder))
    assert not several[2].done()


async def test_retention_that_was_shortened_is_that_of_the_next_round(store: Store, storage: Storage, folder: Path) -> None:
    await completed(store, storage, folder, 1)
    month = Settings(keep_tasks_days=30, keep_media_days=30)
    await Retention("old", store, Files(store.redis), storage, month).round()
    assert files(folder) == ["output.jpg"]
    new = Retention("new", store, Files(store.redis), storage, msgspec.structs.replace(month, keep_tasks_days=1e-9, keep_media_days=1e-9))
    await new.round()
    await new.round()
    assert files(folder) == []
