"""A fault of a machine's disk costs no task a try: the worker reports it, claims nothing more, and recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.entities import WorkerStatus
from movieq.tasks.states import RunToken, TaskId, TaskStatus
from tests.arrange import raw
from tests.fleet import Fleet, eventually, fleet
from tests.service import Service
from workers.faults import host_problem, public_message, without_paths
from workers.host import FLOOR_BYTES, UPLOADS_MOST, Host, examine
from workers.spool import spool

TASKS = 8


@pytest.fixture
def disk(folder: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Yield a small file system, and a function that resizes it."""
    place = folder / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place)], check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    try:
        yield place, remount
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def rows(store: Store, *, with_problem: bool) -> list[WorkerStatus]:
    """Return the workers that report a problem, or those that report none."""
    return [row for row in await Queries(store.redis).workers() if (row.problem is not None) is with_problem]


async def healed(store: Store, count: int) -> None:
    async def taking() -> bool:
        return len([row for row in await rows(store, with_problem=False) if row.queues]) == count

    await eventually(taking)


async def all_done_uncounted(installation: Fleet, task_ids: list[str]) -> None:
    """Assert that every task completes, and that nothing counts against it."""
    for task_id in task_ids:

        async def ended(task_id: str = task_id) -> bool:
            task = await Queries(installation.store.redis).task(TaskId(task_id))
            return task is not None and task.status.ended

        await eventually(ended, 90)
        task = await Queries(installation.store.redis).task(TaskId(task_id))
        assert task is not None
        assert task.status is TaskStatus.COMPLETED, (task.error, *[process.log.read_text()[-1500:] for process in installation.processes])
        logged = [
            entry.data for entry in await Queries(installation.store.redis).log_after(TaskId(task_id), None) if entry.type == "retrying"
        ]
        assert await raw(installation.store).hmget(KEYS["task"] + task_id, "tries", "deaths") in ([None, None], [b"0", b"0"]), logged


async def submitted(api: Service, count: int = TASKS, **data: Any) -> list[str]:
    params = {"prompt": "a lamp on a stair", "duration": 1, "fps": 12, "resolution": "320x180", **data}
    return [await api.submit("generate_video", params, project=f"p{number}") for number in range(count)]


def fill(place: Path, leave: int) -> Path:
    """Write a file that leaves only this many bytes on the file system, and return it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # it is full
            while file.write(bytes(65536)):
                pass
        file.truncate(file.tell() - leave)
    return filler


@pytest.mark.parametrize("leave", [0, 20_000], ids=["full", "all but full"])
async def test_a_full_spool_sends_its_tasks_to_a_healthy_worker_and_takes_work_again_when_there_is_room(
    folder: Path, disk: tuple[Path, Callable[[str], None]], leave: int
) -> None:
    place, _ = disk
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_SPOOL=str(place / "spool")))
        await healed(installation.store, 1)
        filler = fill(place, leave)
        task_ids = await submitted(api)
        (row,) = await problem_of(installation.store)
        assert "its disk is full" in str(row.problem)
        assert row.queues == []
        status, health = await api.call("GET", "/tasks/health")
        assert status == 200
        assert "its disk is full" in next(alert["message"] for alert in health["alerts"] if alert["code"] == "worker_problem")
        await installation.worker()
        await all_done_uncounted(installation, task_ids)
        filler.unlink()
        await eventually(lambda: bad.times_logged("worker_problem_over") > 0)
        await healed(installation.store, 2)
        assert await no_path_in_any_event(installation, task_ids)


async def problem_of(store: Store) -> list[WorkerStatus]:
    found: list[WorkerStatus] = []

    async def said_so() -> bool:
        found[:] = await rows(store, with_problem=True)
        return bool(found)

    await eventually(said_so)
    return found


async def no_path_in_any_event(installation: Fleet, task_ids: list[str]) -> bool:
    """Assert that no event of these tasks contains a path of this machine."""
    for task_id in task_ids:
        for entry in await Queries(installation.store.redis).log_after(task_id, None):
            assert str(installation.folder).encode() not in entry.data, entry.data
            assert b"Errno" not in entry.data, entry.data
    return True


async def test_a_disk_that_fills_while_a_clip_is_encoded_costs_the_clip_no_try(
    folder: Path, disk: tuple[Path, Callable[[str], None]]
) -> None:
    place, _ = disk
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_SPOOL=str(place / "spool")))
        (task_id,) = await submitted(api, 1, duration=4, fps=24, resolution="640x360")
        await api.until(task_id, "stage", "frames")
        filler = fill(place, 0)
        (row,) = await problem_of(installation.store)
        assert "its disk is full" in str(row.problem)
        filler.unlink()
        await all_done_uncounted(installation, [task_id])
        await eventually(lambda: bad.times_logged("worker_problem_over") > 0)
        assert await no_path_in_any_event(installation, [task_id])


@pytest.mark.parametrize("damage", ["read-only", "gone", "a file"])
async def test_a_spool_that_cannot_be_written_to_is_the_machines_fault_too(
    folder: Path, disk: tuple[Path, Callable[[str], None]], damage: str
) -> None:
    place, remount = disk
    home = place / "spool"
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_SPOOL=str(home)))
        await healed(installation.store, 1)
        match damage:
            case "read-only":
                remount("ro")
            case "gone":
                home.rename(place / "elsewhere")
            case "a file":
                home.rename(place / "elsewhere")
                home.write_text("not a folder")
        task_ids = await submitted(api, 4)
        if damage != "gone":  # what is gone is made anew, so soon that no row says so
            assert await problem_of(installation.store)
        await installation.worker()
        await all_done_uncounted(installation, task_ids)
        match damage:
            case "read-only":
                remount("rw")
            case "a file":
                home.unlink()
        await eventually(lambda: bad.times_logged("worker_problem_over") > 0)
        await healed(installation.store, 2)
        assert await no_path_in_any_event(installation, task_ids)


async def test_a_run_whose_folder_is_removed_while_it_works_costs_no_try(folder: Path) -> None:
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker())
        (task_id,) = await submitted(api, 1, duration=4, fps=24, resolution="640x360")
        for attempt in (1, 2, 3):

            async def drawing(attempt: int = attempt) -> bool:
                task = await Queries(installation.store.redis).task(TaskId(task_id))
                assert task is not None
                assert not task.status.ended, (task.error, bad.log.read_text()[-3000:])
                return (task.attempt, task.stage) == (attempt, "frames")

            await eventually(drawing, 90)
            for place in (folder / "spool").glob(f"movieq-spool-*/{task_id}-*"):
                shutil.rmtree(place, ignore_errors=True)
        await all_done_uncounted(installation, [task_id])
        assert await no_path_in_any_event(installation, [task_id])


async def test_a_worker_that_may_not_write_large_files_hands_its_tasks_to_others(folder: Path) -> None:
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker())
        await healed(installation.store, 1)
        processes = psutil.Process(bad.popen.pid), bad.child()
        before = processes[0].rlimit(resource.RLIMIT_FSIZE)
        for process in processes:
            process.rlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        task_ids = await submitted(api, 4)
        (row,) = await problem_of(installation.store)
        assert row.problem == "it may not write files of this size"
        await installation.worker(MOVIEQ_SPOOL=str(folder / "another"))
        await all_done_uncounted(installation, task_ids)
        for process in processes:
            process.rlimit(resource.RLIMIT_FSIZE, before)
        await healed(installation.store, 2)
        assert await no_path_in_any_event(installation, task_ids)


async def test_a_worker_whose_spool_cannot_be_made_ends_with_the_cure(folder: Path) -> None:
    (folder / "file").write_text("")
    async with fleet(folder) as installation:
        worker = installation.start("worker", "", [], {"MOVIEQ_SPOOL": str(folder / "file" / "spool")})
        assert await worker.ended() == 1
        assert "MOVIEQ_SPOOL" in worker.log.read_text()
        assert "Traceback" not in worker.log.read_text()


@pytest.mark.parametrize("damage", ["full", "read-only"])
async def test_a_worker_whose_storage_refuses_its_files_says_so_and_takes_no_more_than_a_few_tasks(
    folder: Path, disk: tuple[Path, Callable[[str], None]], damage: str
) -> None:
    place, remount = disk
    async with fleet(folder) as installation:
        bad = await installation.worker(MOVIEQ_STORAGE=str(place))
        await healed(installation.store, 1)
        filler = fill(place, 0)
        if damage == "read-only":
            remount("ro")
        api = await installation.api()
        task_ids = await pictures(api, 16)
        (row,) = await problem_of(installation.store)
        why = "Read-only file system" if damage == "read-only" else "No space left on device"
        assert row.problem == f"its finished files cannot be stored: {why}"
        assert row.queues == []
        status, health = await api.call("GET", "/tasks/health")
        assert status == 200
        assert why in next(alert["message"] for alert in health["alerts"] if alert["code"] == "worker_problem")
        waiting = [
            task
            for task in await Queries(installation.store.redis).tasks([TaskId(each) for each in task_ids])
            if task.status is TaskStatus.QUEUED
        ]
        assert len(waiting) >= 16 - UPLOADS_MOST - 4  # those, and what was in hand when the fourth was refused
        await installation.worker(MOVIEQ_SPOOL=str(folder / "another"))
        await completed(installation.store, [task.task_id for task in waiting])
        if damage == "read-only":
            remount("rw")
        filler.unlink()
        await all_done_uncounted(installation, task_ids)
        assert bad.times_logged("worker_problem_over") > 0
        await healed(installation.store, 2)
        assert await no_path_in_any_event(installation, task_ids)


async def test_a_worker_that_can_open_no_more_files_hands_its_tasks_to_others_uncounted(folder: Path) -> None:
    async with fleet(folder) as installation:
        api, bad = await asyncio.gather(installation.api(), installation.worker())
        await healed(installation.store, 1)
        process = psutil.Process(bad.popen.pid)
        before = process.rlimit(resource.RLIMIT_NOFILE)
        process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds() + 1, before[1]))
        task_ids = await pictures(api, 12)
        (row,) = await problem_of(installation.store)
        assert row.problem == "it has too many files open"
        assert row.queues == []
        await installation.worker(MOVIEQ_SPOOL=str(folder / "another"))
        await all_done_uncounted(installation, task_ids)
        assert await rows(installation.store, with_problem=True)
        process.rlimit(resource.RLIMIT_NOFILE, before)
        await healed(installation.store, 2)
        assert await no_path_in_any_event(installation, task_ids)


async def pictures(api: Service, count: int) -> list[str]:
    params = {"prompt": "a lamp on a stair", "resolution": "64x64"}
    return [await api.submit("generate_image", params, project=f"p{number}") for number in range(count)]


async def completed(store: Store, task_ids: list[TaskId]) -> None:
    async def all_are() -> bool:
        return all(task.status is TaskStatus.COMPLETED for task in await Queries(store.redis).tasks(task_ids))

    await eventually(all_are, 90)


# ── Examinations ──


async def test_uploads_that_wait_stop_the_worker_until_one_of_them_is_stored(folder: Path) -> None:
    host = Host(folder, children=2)
    runs = [RunToken(f"run{number}") for number in range(2 * UPLOADS_MOST)]
    for run in runs:
        assert (host.problem, host.can_store) == (None, True)
        for _ in range(3):
            host.refused(run, "No space left on device")
    assert (host.problem, host.can_store) == ("its finished files cannot be stored: No space left on device", False)
    host.blame("its disk is full")
    assert (host.problem, host.can_store) == ("its disk is full", False)
    host.waits_no_more(runs[0])
    assert (host.problem, host.can_store) == ("its disk is full", True)
    host.blame("it has too many files open")
    assert host.can_store is False


async def test_a_machine_that_was_blamed_is_examined_until_it_passes(folder: Path) -> None:
    room = asyncio.Event()
    with spool(folder) as place:
        host = Host(place)
        host.blame("its disk is full")
        keeping = asyncio.create_task(host.monitor(room.set))
        try:
            assert host.problem == "its disk is full"
            await asyncio.wait_for(room.wait(), 60)
            assert host.problem is None
        finally:
            keeping.cancel()


def test_an_examination_makes_a_working_folder_that_was_removed_again_and_holds_it(folder: Path) -> None:
    with spool(folder) as place:
        place.rmdir()
        assert examine(place) is None
        with spool(folder):  # a worker that starts beside it takes away what no worker holds
            assert place.is_dir()


def test_too_little_room_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.host.FLOOR_BYTES", 2**60)
    assert "its disk is full" in str(examine(folder))
    assert FLOOR_BYTES < 2**30


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/var/x"), "its disk is full"),
        (OSError(errno.EDQUOT, "Quota"), "its disk quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "it may not write files of this size"),
        (OSError(errno.EMFILE, "Too many"), "it has too many files open"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/spool/t/output.mp4"), "its working folder is gone"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere"), None),
        (PermissionError(errno.EACCES, "Permission denied", "/spool/t"), "it may not write to its working folder"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
        (ValueError("No space left on device"), None),
    ],
)
def test_what_is_the_machines_fault_is_told_from_the_tasks(error: Exception, problem: str | None) -> None:
    assert host_problem(error, Path("/spool")) == problem
    wrapped = RuntimeError("the encoder failed")
    wrapped.__cause__ = error
    assert host_problem(wrapped, Path("/spool")) == problem


def test_what_clients_read_of_an_error_names_no_path_and_no_class() -> None:
    assert public_message(OSError(errno.ENOSPC, "No space left on device", "/var/spool/x")) == "No space left on device"
    assert without_paths("cannot read /var/lib/movieq/media/a/b.mp4: gone", "/var/lib/movieq") == "cannot read b.mp4: gone"
    assert (
        without_paths("https://a.example/var/lib/movieq/x is no picture", "/var/lib/movieq")
        == "https://a.example/var/lib/movieq/x is no picture"
    )


def test_paths_are_cut_out_of_an_error_where_no_file_can_be_opened() -> None:
    code = (
        "import os, resource\nfrom workers.faults import without_paths\n"
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))\n"
        "print(without_paths('cannot open /tmp/a/b.mp4'))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, limits)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("cannot open b.mp4\n", "")
