"""A worker that is asked to end does so, whatever Redis, its engine and its disk do; if it cannot, it is cut off."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.fleet import STOP_S, Fleet, Process, eventually, fleet, python_path
from tests.proxy import proxy
from tests.service import Service, service

LONG = {"prompt": "a way up the stairs", "duration": 30, "fps": 24, "resolution": "1280x720"}
DRAIN_S = "1"


def take_away(installation: Fleet, redis: str) -> None:
    assert installation.valkey.pid is not None
    os.kill(installation.valkey.pid, {"hangs": signal.SIGSTOP, "is gone": signal.SIGKILL}[redis])


def give_back(installation: Fleet) -> None:
    if installation.valkey.pid is not None:
        os.kill(installation.valkey.pid, signal.SIGCONT)


def cut_off_after(folder: Path, seconds: float) -> dict[str, str]:
    """Return settings of a worker that is cut off this long after its drain: on a busy machine ten seconds may be too short."""
    code = f"import sys\nif sys.orig_argv[-1] == 'worker':\n    import workers.worker\n    workers.worker.GONE_S = {seconds}\n"
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(code)
    return {"MOVIEQ_DRAIN_S": DRAIN_S, "PYTHONPATH": python_path(folder / "patch")}


async def working(installation: Fleet, gone_s: float = STOP_S) -> tuple[Service, Process]:
    """Return the API and its worker, in the middle of a long task."""
    api, worker = await asyncio.gather(installation.api(), installation.worker(**cut_off_after(installation.folder, gone_s)))
    await api.until(await api.submit("generate_video", LONG), "stage", "frames")
    return api, worker


@pytest.mark.parametrize("redis", ["hangs", "is gone"])
@pytest.mark.parametrize("engine", ["works", "hangs"])
async def test_it_ends_by_itself_while_redis_is_dead(folder: Path, redis: str, engine: str) -> None:
    async with fleet(folder) as installation:
        _, worker = await working(installation)
        child = worker.child()
        if engine == "hangs":
            child.suspend()
        take_away(installation, redis)
        try:
            worker.send(signal.SIGTERM)
            await worker.ended()
            assert worker.times_logged("worker_ended") == 1, worker.log.read_text()[-3000:]
            assert worker.times_logged("worker_cut_off") == 0
            await eventually(lambda: not child.is_running())
        finally:
            give_back(installation)


async def test_what_does_not_end_in_its_time_is_cut_off(folder: Path) -> None:
    async with fleet(folder) as installation:
        _, worker = await working(installation, gone_s=0)
        child = worker.child()
        child.suspend()  # the worker waits for it, for longer than it has
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 1
        assert worker.times_logged("worker_cut_off") == 1
        assert worker.times_logged("worker_ended") == 0
        await eventually(lambda: not child.is_running())


async def test_it_hands_its_task_back_where_redis_is_well_although_its_engine_hangs(folder: Path) -> None:
    async with fleet(folder) as installation:
        api, worker = await working(installation)
        worker.child().suspend()
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
        assert worker.times_logged("worker_ended") == 1
        _, answer = await api.call("GET", "/projects/film/tasks")
        assert [task["status"] for task in answer["tasks"]] == ["queued"]


async def test_an_idle_worker_whose_redis_hangs_ends_too(folder: Path) -> None:
    async with fleet(folder) as installation, proxy(installation.valkey.socket) as between:
        worker = await installation.worker(between.url, **cut_off_after(folder, STOP_S))
        between.hold(lambda command, answer: bool(command))
        await between.happened.wait()  # it is in the middle of asking, and hears nothing
        between.freeze()
        worker.send(signal.SIGTERM)
        await worker.ended()
        assert worker.times_logged("worker_ended") == 1
        assert worker.times_logged("worker_cut_off") == 0


@pytest.mark.parametrize("redis", ["hangs", "is gone"])
async def test_an_api_process_whose_redis_is_dead_ends_by_itself(folder: Path, redis: str) -> None:
    async with fleet(folder) as installation:
        api = await installation.api()
        task_id = await api.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64"})
        async with api.events(task_id) as events:
            await anext(aiter(events))
            take_away(installation, redis)
            try:
                api.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(api.process.wait, STOP_S)
            finally:
                give_back(installation)


async def test_all_of_up_ends_by_itself_while_its_valkey_hangs(folder: Path) -> None:
    with service(folder, MOVIEQ_DRAIN_S="1") as installation:
        await installation.until(await installation.submit("generate_video", LONG), "stage", "frames")
        (valkey,) = [each for each in psutil.Process(installation.process.pid).children() if "valkey" in each.name()]
        valkey.suspend()
    # nothing that it started is left, says `service`
    assert installation.process.returncode == 0
    assert "process_killed" not in [line.get("message") for line in installation.log]
