"""Workers and engines die, hang, or return after they were given up: nothing is written twice, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import io
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from aiohttp import web
from PIL import Image

from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.settings import Settings
from movieq.storage.folder import FolderStorage
from movieq.tasks.states import EventType, Kind, TaskId, TaskStatus
from tests.arrange import CPU, new_task, raw, result
from tests.fleet import Fleet, eventually
from tests.proxy import proxy, script
from tests.service import serving
from workers.retention import Retention

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60}


@pytest.mark.parametrize("how", ["stands still", "is cut off"])
async def test_a_worker_that_comes_back_after_its_task_was_finished_by_another_changes_nothing(installation: Fleet, how: str) -> None:
    async with proxy(installation.valkey.socket) as between:
        api, zombie = await asyncio.gather(installation.api(), installation.worker(between.url))
        between.hold(script(installation.store, "report", "uploading_result"))
        task_id = TaskId(await api.submit("generate_image", SMALL))
        await asyncio.wait_for(between.happened.wait(), 60)  # it has said where it stores its file, and is about to
        if how == "stands still":
            zombie.send(signal.SIGSTOP)
        else:
            between.freeze()
        between.release()
        other = await installation.worker()
        status = await api.ended(task_id)
        assert (status["status"], status["attempt"]) == ("completed", 2)
        committed = await found(installation.store, task_id)
        log = await Queries(installation.store.redis).log_after(task_id, None)
        files = {path: path.read_bytes() for path in stored(installation) if str(committed.run) in path.parts}
        assert {path.stem for path in files} == {"output"}
        await raw(installation.store).delete(KEYS["orphans"])  # as if they had been deleted already
        if how == "stands still":
            zombie.send(signal.SIGCONT)
        else:
            between.thaw()
        await eventually(lambda: zombie.times_logged("run_lost") + zombie.times_logged("run_stopped") > 0)
        if not only(installation, files):
            await eventually(lambda: has_orphans(installation.store))
        assert await found(installation.store, task_id) == committed
        assert await Queries(installation.store.redis).log_after(task_id, None) == log
        for _ in range(4):  # both go on working
            assert (await api.ended(await api.submit("generate_image", SMALL, project="next")))["status"] == "completed"
        assert zombie.alive
        assert other.alive
        await sweep_at_once(installation)
        assert {path: path.read_bytes() for path in stored(installation) if task_id in path.parts} == files


async def test_what_a_zombie_stores_after_its_orphans_were_deleted_is_listed_anew_and_nothing_committed_is(installation: Fleet) -> None:
    store = installation.store
    await store.submit(new_task())
    (claimed,) = await store.claim("w1", "nonce", CPU)
    task_id, run = claimed.task.task_id, claimed.run
    await store.report(task_id, run, 0.95, "uploading_result", prefix="projects/film/image/t/kept")
    await store.complete(task_id, run, result())
    await Files(store.redis).add_orphan("projects/film/image/t/kept")
    await Files(store.redis).add_orphan("projects/film/image/t/zombie")
    await raw(store).zadd(KEYS["orphans"], dict.fromkeys(await raw(store).zrange(KEYS["orphans"], 0, -1), 1))
    assert await Files(store.redis).due_orphans() == ["projects/film/image/t/zombie"]
    assert await raw(store).zrange(KEYS["orphans"], 0, -1) == [b"projects/film/image/t/zombie"]


async def test_a_run_whose_files_are_due_to_be_deleted_is_not_taken_back(installation: Fleet) -> None:
    store = installation.store
    await store.submit(new_task())
    (claimed,) = await store.claim("w1", "nonce", CPU)
    task_id, run = claimed.task.task_id, claimed.run
    await store.report(task_id, run, 0.95, "uploading_result", prefix="prefix")
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {task_id: 1})
    assert (await store.tidy()).reaped == 1
    await raw(store).zadd(KEYS["orphans"], {"prefix": 1})
    assert (await store.renew("w1", [], [(task_id, run)], gpu_bytes=0))[0] == [(task_id, run)]
    assert (await found(store, task_id)).status is TaskStatus.QUEUED


async def test_a_worker_that_stood_still_keeps_a_run_that_nobody_began_anew(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_CPU_SLOTS="2"))
    await eventually(lambda: worker.times_logged("child_ready") == 2)  # so that it has a slot to claim for, when it goes on
    task_id = TaskId(await api.submit("generate_video", {**LONG, "duration": 4, "fps": 8, "resolution": "320x180"}))
    await api.until(task_id, "event", "started")
    children = [each for each in psutil.Process(worker.popen.pid).children() if "workers.child" in each.cmdline()]
    for child in children:
        child.suspend()
    beat = await beats(installation.store)

    async def beats_again() -> bool:
        return await beats(installation.store) != beat

    await eventually(beats_again)
    worker.send(signal.SIGSTOP)  # its next claim is due before its next renewal
    await eventually(lambda: is_in(installation.store, task_id, TaskStatus.QUEUED))
    for child in children:
        child.resume()
    worker.send(signal.SIGCONT)
    status = await api.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 1)


async def beats(store: Store) -> list[Any]:
    """Return when each worker last renewed its leases."""
    return list(await raw(store).zrange(KEYS["heartbeat_times"], 0, -1, withscores=True))


async def arrange_what_is_due(store: Store) -> list[TaskId]:
    """Return an expired lease, a retry and three deadlines, all due in half a second."""
    reaped, retried, long = new_task("due"), new_task("due"), new_task("due", max_ms=500)
    runs = {}
    for task in (reaped, retried, long):  # all are claimed before the first is due: else a later claim could get it again
        await store.submit(task)
        (claimed,) = await store.claim("gone", f"nonce {task.task_id}", CPU)
        assert claimed.task.task_id == task.task_id
        runs[task.task_id] = claimed.run
    await store.requeue(retried.task_id, runs[retried.task_id], Budget.TRIES, 3, 500, "x", "network")
    due = (await raw(store).time())[0] * 1000 + 500
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {reaped.task_id: due})
    late = [new_task("due", start_by_ms=due), new_task("due", finish_by_ms=due)]
    for task in late:
        await store.submit(task)
    return [task.task_id for task in (reaped, retried, long, *late)]


@pytest.mark.parametrize("busy", [False, True], ids=["no worker at all", "all slots busy"])
async def test_what_is_due_is_acted_on_by_an_api_process(installation: Fleet, busy: bool) -> None:
    api = await installation.api()

    over = asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        await over.wait()
        return web.Response()

    async with serving({"/frame": held}) as url:
        if busy:
            worker = await installation.worker()
            running = await api.submit("generate_video", {"storyboard_images": [f"{url}/frame"]})
            await api.until(running, "event", "started")
            worker.send(signal.SIGSTOP)  # not even its own renewals help
        ids = await arrange_what_is_due(installation.store)

        async def acted() -> bool:
            reaped, retried, *past = [await found(installation.store, task_id) for task_id in ids]
            waiting = await raw(installation.store).zscore(KEYS["waiting"] + Kind.CPU_INTENSIVE, retried.task_id)
            return (
                reaped.status is TaskStatus.QUEUED and waiting is not None and all(task.error_code == "deadline_exceeded" for task in past)
            )

        await eventually(acted)
        over.set()


async def test_a_dead_child_is_noticed_by_its_worker_and_not_by_the_end_of_a_lease(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    task_id = TaskId(await api.submit("generate_video", LONG))
    await api.until(task_id, "stage", "frames")
    worker.child().kill()
    event = await api.until(task_id, "event", "retrying")
    assert "SIGKILL" in event["error"]
    assert await raw(installation.store).hmget(KEYS["task"] + task_id, "deaths", "silences") == [b"1", b"0"]


async def test_a_child_that_dies_while_its_task_fetches_costs_the_task_nothing(installation: Fleet) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response(body=png())

    api, worker = await asyncio.gather(installation.api(), installation.worker())
    async with serving({"/frame": slow}) as url:
        task_id = TaskId(await api.submit("generate_image", {**SMALL, "reference_images": [f"{url}/frame"]}))
        await asyncio.wait_for(asked.wait(), 60)
        worker.child().kill()
        await eventually(lambda: worker.times_logged("child_ended") == 1)  # else the fetched picture may still go to the dying child
        go_on.set()
        status = await api.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 1)
    assert await raw(installation.store).hget(KEYS["task"] + task_id, "deaths") == b"0"


async def test_a_task_that_kills_its_engine_every_time_becomes_a_dead_letter(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    task_id = TaskId(await api.submit("generate_video", {**LONG, "seed": 7}))
    attempt = 0
    async with api.events(task_id) as events:
        async for event in events:
            if event.get("stage") == "frames" and event["event"] == "progress" and event["attempt"] > attempt:
                attempt = event["attempt"]
                worker.child().kill()
    status = await api.ended(task_id)
    assert (status["status"], status["error_code"], status["attempt"], status["retryable"]) == ("failed", "worker_lost", 3, True)
    _, answer = await api.call("GET", "/dead-letters")
    (letter,) = answer["dead_letters"]
    assert (letter["task_id"], letter["exit_code"], letter["last_stage"], letter["attempt"]) == (task_id, -9, "frames", 3)
    assert letter["task_data"] == {**LONG, "seed": 7}
    (same,), total = await Queries(installation.store.redis).dead_letters()
    assert (same.task_id, total) == (task_id, 1)
    # the next task is fine
    assert (await api.ended(await api.submit("generate_image", SMALL)))["status"] == "completed"


async def test_a_task_that_this_worker_has_no_function_for_ends_no_worker(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    odd = new_task(kwargs=msgspec.msgpack.encode({"of_a_newer_movieq": 1}))
    await installation.store.submit(odd)
    await eventually(lambda: has_retried(installation.store, odd.task_id))
    assert (await api.ended(await api.submit("generate_image", SMALL)))["status"] == "completed"
    assert worker.alive


async def has_retried(store: Store, task_id: TaskId) -> bool:
    return any(entry.type is EventType.RETRYING for entry in await Queries(store.redis).log_after(task_id, None))


# ── Arranging ──


async def found(store: Store, task_id: TaskId) -> Any:
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    return task


async def is_in(store: Store, task_id: TaskId, status: TaskStatus) -> bool:
    return (await found(store, task_id)).status is status


def stored(installation: Fleet) -> list[Path]:
    return [path for path in (installation.folder / "media").rglob("*") if path.is_file()]


def only(installation: Fleet, files: dict[Path, bytes]) -> bool:
    return set(stored(installation)) == files.keys()


async def has_orphans(store: Store) -> bool:
    return bool(await raw(store).exists(KEYS["orphans"]))


async def sweep_at_once(installation: Fleet) -> None:
    """Delete now all files that are listed for deletion."""
    orphans = await raw(installation.store).zrange(KEYS["orphans"], 0, -1)
    if orphans:
        await raw(installation.store).zadd(KEYS["orphans"], dict.fromkeys(orphans, 1))
    storage = FolderStorage(installation.folder / "media", "http://127.0.0.1:1", (b"",))
    retention = Retention("test", installation.store, Files(installation.store.redis), storage, Settings())

    async def swept() -> bool:
        await retention.round()  # nothing, while a worker has the turn
        return not await Files(installation.store.redis).due_orphans()

    await eventually(swept)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()
