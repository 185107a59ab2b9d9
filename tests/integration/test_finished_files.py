"""Finished files that are not stored yet outlive their worker: for a minute only their host gets the task; nothing is rendered twice."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Claimed, Slot, Store
from movieq.tasks.states import Kind, RunToken, TaskId, TaskStatus
from tests.arrange import CPU, new_task, raw, result, running
from workers.finished import MANIFEST, PREFIX, FinishedFiles
from workers.protocol import Done, Produced

TASK, RUN = TaskId("0190-task"), RunToken("abc-1")
NOBODY: list[Slot] = []


# ── What is offered to whom ──


async def saved(store: Store, host: str = "a", **fields: Any) -> tuple[TaskId, RunToken]:
    """Return a task whose finished files lie on this host, and its run."""
    task_id, run = await running(store, **fields)
    await store.report(task_id, run, 0.95, "uploading_result", stage="upload", prefix="p/run", host=host, rendered_ms=700)
    return task_id, run


async def reaped(store: Store, **fields: Any) -> TaskId:
    """Return such a task after the lease of its worker has expired."""
    task_id, _ = await saved(store, **fields)
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {task_id: 1})
    assert (await store.tidy()).reaped == 1
    return task_id


async def claimed_by(store: Store, host: str, slots: Sequence[Slot] = NOBODY) -> list[Claimed]:
    return await store.claim(f"worker of {host}", os.urandom(4).hex(), slots, host=host)


async def score(store: Store, key: str, task_id: TaskId) -> float:
    found = await raw(store).zscore(KEYS[key], task_id)
    assert found is not None
    return float(found)


async def now_ms(store: Store) -> float:
    seconds, micros = await raw(store).time()
    return float(seconds * 1000 + micros / 1000)


async def test_a_dead_run_whose_files_lie_on_a_host_goes_to_that_host_which_needs_no_slot_for_it(store: Store) -> None:
    task_id = await reaped(store)
    assert await claimed_by(store, "b", CPU) == []
    (claimed,) = await claimed_by(store, "a")
    assert (claimed.task.task_id, claimed.task.attempt, claimed.task.status) == (task_id, 2, TaskStatus.PROCESSING)
    assert await claimed_by(store, "a") == []
    await store.complete(task_id, claimed.run, result())


async def test_after_a_minute_it_goes_to_anybody(store: Store) -> None:
    task_id = await reaped(store)
    assert await score(store, "delayed", task_id) - await now_ms(store) == pytest.approx(60_000, abs=2_000)
    await raw(store).zadd(KEYS["delayed"], {task_id: 1})
    await store.tidy()
    (claimed,) = await claimed_by(store, "b", CPU)
    assert claimed.task.task_id == task_id
    assert await claimed_by(store, "a") == []


async def test_a_claim_that_is_said_again_answers_what_was_offered_again(store: Store) -> None:
    await reaped(store)
    first = await store.claim("w2", "nonce", NOBODY, host="a")
    assert await store.claim("w2", "nonce", NOBODY, host="a") == first
    assert len(first) == 1


async def test_a_task_that_was_cancelled_meanwhile_is_not_offered(store: Store) -> None:
    task_id = await reaped(store)
    await store.cancel(task_id)
    assert await claimed_by(store, "a", CPU) == []
    assert await raw(store).zcard(KEYS["delayed"]) == 0


async def test_a_run_that_comes_back_before_anybody_else_began_has_it_again(store: Store) -> None:
    task_id, run = await saved(store)
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {task_id: 1})
    await store.tidy()
    assert await store.renew("w1", [], [(task_id, run)], gpu_bytes=0) == ([], [])
    assert await claimed_by(store, "a") == []
    await store.complete(task_id, run, result())


async def test_what_is_handed_back_goes_to_its_host_at_once_and_what_failed_when_its_pause_is_over(store: Store) -> None:
    task_id, run = await saved(store)
    await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "its worker was stopped", "worker_lost")
    (claimed,) = await claimed_by(store, "a")
    await store.report(task_id, claimed.run, 0.95, "uploading_result", host="a", rendered_ms=0)
    await store.requeue(task_id, claimed.run, Budget.TRIES, 3, 60_000, "the key holds other bytes", "storage")
    assert await claimed_by(store, "a") == []
    await raw(store).zincrby(KEYS["offered"] + "a", -60_000, task_id)
    assert len(await claimed_by(store, "a")) == 1


async def test_who_finds_nothing_there_leaves_the_task_to_anybody(store: Store) -> None:
    task_id = await reaped(store)
    (claimed,) = await claimed_by(store, "a")
    await store.requeue(task_id, claimed.run, Budget.DRAIN, 0, 0, "its worker had no free slot", "worker_lost")
    assert len(await claimed_by(store, "b", CPU)) == 1


async def test_a_task_has_a_day_to_store_its_files_then_it_fails_and_a_retry_is_offered_to_the_host(store: Store) -> None:
    task_id, _ = await saved(store, max_ms=1000)
    assert await score(store, "deadlines", task_id) - await now_ms(store) == pytest.approx(86_400_000, abs=2_000)
    await raw(store).zadd(KEYS["deadlines"], {task_id: 1})
    await store.tidy()
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert (task.status, task.error_code, task.retryable) == (TaskStatus.FAILED, "storage", True)
    assert (await store.retry(task_id)).queue_position == 1
    assert await claimed_by(store, "b", CPU) == []
    assert len(await claimed_by(store, "a")) == 1


async def test_the_wait_for_a_storage_counts_neither_as_time_that_such_tasks_take_nor_against_the_project(store: Store) -> None:
    task_id, run = await saved(store)
    await raw(store).hincrby(KEYS["task"] + task_id, "started_at_ms", -3_600_000)
    await store.complete(task_id, run, result())
    other = await reaped(store)
    (claimed,) = await claimed_by(store, "a")
    await store.report(other, claimed.run, 0.95, "uploading_result", host="a", rendered_ms=0)
    await store.complete(other, claimed.run, result())
    assert await raw(store).lrange(KEYS["durations"] + "image", 0, -1) == [b"700"]
    assert float(await raw(store).hget(KEYS["idle_virtual_times"] + Kind.CPU_INTENSIVE, "film")) == pytest.approx(1400, abs=1)


# ── Folders ──


def out(folder: Path) -> tuple[Path, Done]:
    """Return the folder and the output of an engine."""
    out_dir = folder / "spool" / "out"
    out_dir.mkdir(parents=True)
    (out_dir / "clip.mp4").write_bytes(b"clip")
    (out_dir / "poster.jpg").write_bytes(b"poster")
    files = (Produced(str(out_dir / "clip.mp4"), "output", "video/mp4"), Produced(str(out_dir / "poster.jpg"), "poster", "image/jpeg"))
    return out_dir, Done(RUN, files, {"seed": 7})


def test_what_is_kept_is_found_by_its_task_with_all_that_was_said_of_it(folder: Path) -> None:
    finished_files = FinishedFiles(folder)
    first = finished_files.save(TASK, RUN, *out(folder))
    assert not (folder / "spool" / "out").exists()
    found = FinishedFiles(folder).find(TASK)
    assert found == first
    assert found is not None
    assert [Path(each.path).read_bytes() for each in found.done.files] == [b"clip", b"poster"]
    assert found.done.metadata == {"seed": 7}
    assert finished_files.find(TaskId("0190")) is None


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest", "link"])
def test_what_is_not_whole_or_not_ours_is_not_found(folder: Path, damage: str) -> None:
    finished_files = FinishedFiles(folder)
    place = finished_files.save(TASK, RUN, *out(folder)).folder
    assert place is not None
    match damage:
        case "shorter":
            (place / "clip.mp4").write_bytes(b"cli")
        case "gone":
            (place / "poster.jpg").unlink()
        case "manifest":
            (place / MANIFEST).write_bytes(b"\x81")
        case "link":
            place.rename(folder / "elsewhere")
            place.symlink_to(folder / "elsewhere")
    assert finished_files.find(TASK) is None


def test_where_nothing_can_be_kept_the_run_goes_on_with_what_it_has(folder: Path) -> None:
    out_dir, done = out(folder)
    finished = FinishedFiles(folder / "no-such-folder").save(TASK, RUN, out_dir, done)
    assert (finished.folder, finished.done) == (None, done)


async def test_folders_go_a_minute_after_the_commit_and_a_day_after_the_last_try(store: Store, folder: Path) -> None:
    finished_files = FinishedFiles(folder)
    minute, day = 61, 86_401
    going = [new_task() for _ in range(4)]
    for task in going:
        await store.submit(task)
    completed, cancelled, failed, processing = [each.task.task_id for each in await store.claim("w1", "nonce", CPU * 4)]
    runs = {each.task.task_id: each.run for each in await store.claim("w1", "nonce", CPU)}
    await store.complete(completed, runs[completed], result())
    await store.cancel(cancelled)
    await store.fail(failed, runs[failed], "no", "storage")

    def lay() -> None:
        for task_id in (completed, cancelled, failed, processing, TASK):
            source, done = out(folder / task_id)
            finished_files.save(task_id, RUN, source, done)
            shutil.rmtree(folder / task_id)

    async def left(age_s: float) -> set[str]:
        for path in folder.glob(f"{PREFIX}*"):
            os.utime(path, (time.time() - age_s,) * 2)
        await finished_files.sweep(Queries(store.redis))
        return {path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")}

    lay()
    assert await left(50) == {completed, cancelled, failed, processing, TASK}
    assert await left(minute) == {failed, processing, TASK}
    assert await left(day) == set()
