"""A worker that is asked to end has gone within its drain and ten seconds, whatever Redis, its engine and its disk do."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.fleet import Fleet, Process, eventually, fleet
from tests.service import Service, service
from workers.worker import GONE_S

LONG = {"prompt": "a way up the stairs", "duration": 30, "fps": 24, "resolution": "1280x720"}
DRAIN_S = 2
SLACK_S = 4.0
"""What a busy machine may take beyond."""


def take_away(made: Fleet, redis: str) -> None:
    assert made.valkey.pid is not None
    os.kill(made.valkey.pid, {"hangs": signal.SIGSTOP, "is gone": signal.SIGKILL}[redis])


def give_back(made: Fleet) -> None:
    if made.valkey.pid is not None:
        os.kill(made.valkey.pid, signal.SIGCONT)


async def working(made: Fleet) -> tuple[Service, Process]:
    api, worker = await asyncio.gather(made.api(), made.worker(MOVIEQ_DRAIN_S=str(DRAIN_S)))
    await api.until(await api.submit("generate_video", LONG), "stage", "frames")
    return api, worker


@pytest.mark.parametrize("redis", ["hangs", "is gone"])
@pytest.mark.parametrize("engine", ["works", "hangs"])
async def test_it_has_gone_in_time_while_redis_is_dead(folder: Path, redis: str, engine: str) -> None:
    async with fleet(folder) as made:
        _, worker = await working(made)
        child = worker.child()
        if engine == "hangs":
            child.suspend()
        take_away(made, redis)
        try:
            worker.send(signal.SIGTERM)
            # the operating system's word for it, in the place of a stopwatch: whoever stops it would kill it then
            await worker.ended(DRAIN_S + GONE_S + SLACK_S)
            assert worker.said("worker_ended") == 1, worker.log.read_text()[-3000:]
            assert worker.said("worker_cut_off") == 0
            await eventually(lambda: not child.is_running(), 10)
        finally:
            give_back(made)


async def test_it_hands_its_task_back_where_redis_is_well_although_its_engine_hangs(folder: Path) -> None:
    async with fleet(folder) as made:
        api, worker = await working(made)
        worker.child().suspend()
        worker.send(signal.SIGTERM)
        assert await worker.ended(DRAIN_S + GONE_S + SLACK_S) == 0
        assert worker.said("worker_ended") == 1
        _, answer = await api.call("GET", "/projects/film/tasks")
        assert [task["status"] for task in answer["tasks"]] == ["queued"]


async def test_an_idle_worker_whose_redis_hangs_has_gone_too(folder: Path) -> None:
    async with fleet(folder) as made:
        worker = await made.worker(MOVIEQ_DRAIN_S="0")
        take_away(made, "hangs")
        try:
            await asyncio.sleep(1.5)  # it is in the middle of asking then; if it is not, this asks for less
            worker.send(signal.SIGTERM)
            await worker.ended(GONE_S + SLACK_S)
            assert worker.said("worker_ended") == 1
            assert worker.said("worker_cut_off") == 0
        finally:
            give_back(made)


@pytest.mark.parametrize("redis", ["hangs", "is gone"])
async def test_an_api_process_whose_redis_is_dead_has_gone_within_ten_seconds(folder: Path, redis: str) -> None:
    async with fleet(folder) as made:
        api = await made.api()
        task_id = await api.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64"})
        async with api.events(task_id) as events:
            await anext(aiter(events))
            take_away(made, redis)
            try:
                api.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(api.process.wait, GONE_S + SLACK_S)
            finally:
                give_back(made)


async def test_all_of_up_ends_by_itself_while_its_valkey_hangs(folder: Path) -> None:
    with service(folder, MOVIEQ_DRAIN_S="1") as made:
        await made.until(await made.submit("generate_video", LONG), "stage", "frames")
        (valkey,) = [each for each in psutil.Process(made.process.pid).children() if "valkey" in each.name()]
        valkey.suspend()
    # nothing that it started is left, says `service`
    assert made.process.returncode == 0
    assert "process_killed" not in [line.get("message") for line in made.log]
