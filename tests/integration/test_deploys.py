"""Workers are stopped and replaced by deploys, terminals and systemd: tasks go on, and nothing counts against them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from collections.abc import Callable
from typing import Any

import msgspec
import psutil
import pytest
from aiohttp import web

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.tasks.states import EventType, TaskId
from tests.arrange import new_task, raw
from tests.fleet import Fleet, Process, eventually
from tests.proxy import proxy
from tests.service import Service, serving

CLIP: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 3, "fps": 24}
"""A clip that takes a few seconds, so that a signal can come while it renders."""
LONG: dict[str, Any] = {**CLIP, "duration": 30, "fps": 60}
SPEECH: dict[str, Any] = {"text": "The lamp must not go out. " * 40}
"""A text that is spoken by a child of the engine process."""
GRACE = "100"
Stop = Callable[[Process], None]


@pytest.mark.parametrize(
    "deploys", [pytest.param(3, id="three"), pytest.param(20, id="twenty", marks=[pytest.mark.slow, pytest.mark.timeout(400)])]
)
async def test_a_task_that_outlasts_many_deploys_completes_with_no_try_used_up(installation: Fleet, deploys: int) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S="0"))
    task_id = await api.submit("generate_video", CLIP)
    done = 0
    async with api.events(task_id) as events:
        async for event in events:
            met = event["event"] == "progress" and event["stage"] == "frames" and event["attempt"] > done
            if met and done < deploys:
                done = event["attempt"]
                worker.send(signal.SIGTERM)
                code, worker = await asyncio.gather(worker.ended(), installation.worker(MOVIEQ_DRAIN_S="0"))
                assert code == 0
    status = await api.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", deploys + 1)
    assert await counted(installation, task_id) == (0, 0, 0)
    events_of = [
        entry.type
        for entry in await Queries(installation.store.redis).log_after(TaskId(task_id), None)
        if entry.type is not EventType.PROGRESS
    ]
    assert events_of == [*[EventType.STARTED, EventType.RETRYING] * deploys, EventType.STARTED, EventType.COMPLETED]
    assert len(list((installation.folder / "media").rglob("output.*"))) == 1


async def test_what_cannot_end_within_the_grace_is_handed_back_at_once(installation: Fleet) -> None:
    asked, over = asyncio.Event(), asyncio.Event()

    async def frame(_: web.Request) -> web.Response:
        asked.set()
        await over.wait()
        return web.Response()

    async with serving({"/frame": frame}) as url:
        api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S=GRACE))
        task_data = {"prompt": "a lamp", "reference_images": [f"{url}/frame"]}
        task = new_task(kwargs=msgspec.msgpack.encode({"task_data": task_data}), estimate_ms=3_600_000)
        await installation.store.submit(task)
        await asked.wait()
        worker.send(signal.SIGTERM)
        assert await worker.ended(int(GRACE) - 5) == 0, "it waited for the whole grace"
        over.set()
    _, status = await api.call("GET", f"/tasks/{task.task_id}/status")
    assert status["status"] == "queued"


async def test_a_worker_that_drains_takes_nothing_new(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S=GRACE, MOVIEQ_CPU_SLOTS="2"))
    await eventually(lambda: worker.times_logged("child_ready") == 2)
    clip = await api.submit("generate_video", CLIP)
    await api.until(clip, "stage", "frames")
    worker.send(signal.SIGTERM)
    await eventually(lambda: worker.times_logged("drain") == 1)
    late = await api.submit("generate_image", {"prompt": "a lamp", "resolution": "256x256"})
    assert await worker.ended() == 0
    found = [(await api.call("GET", f"/tasks/{task_id}/status"))[1] for task_id in (clip, late)]
    assert [(each["status"], each["attempt"]) for each in found] == [("completed", 1), ("queued", 0)]


def ctrl_c(worker: Process) -> None:
    """Send SIGINT as a terminal does, to every process of the foreground group."""
    os.killpg(os.getpgid(worker.popen.pid), signal.SIGINT)


def stop_unit(worker: Process) -> None:
    """Send SIGTERM as systemd does, to every process of the unit."""
    process = psutil.Process(worker.popen.pid)
    for each in (*process.children(recursive=True), process):
        each.terminate()


@pytest.mark.parametrize("how", [ctrl_c, stop_unit])
async def test_a_signal_to_the_whole_group_lets_what_can_end_in_time_end(installation: Fleet, how: Stop) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S=GRACE))
    task_id = await api.submit("generate_video", {**CLIP, "duration": 1})
    await api.until(task_id, "stage", "frames")
    how(worker)
    await ends_undisturbed(installation, api, worker, task_id)


@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="the extra `speech` is not installed")
async def test_a_speaker_below_the_engine_outlasts_the_signal_to_its_unit(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S=GRACE))
    task_id = await api.submit("process_audio", SPEECH)
    await eventually(lambda: speaks(worker))
    stop_unit(worker)
    await ends_undisturbed(installation, api, worker, task_id)


async def ends_undisturbed(installation: Fleet, api: Service, worker: Process, task_id: str) -> None:
    """Assert that the task completes in its current run, and that the worker then ends without a fault."""
    status = await api.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 1)
    assert await counted(installation, task_id) == (0, 0, 0)
    assert await worker.ended() == 0
    assert worker.times_logged("drain") == 1
    assert worker.times_logged("child_ended") == 0


def speaks(worker: Process) -> bool:
    """Whether a speech process runs below the worker."""
    for process in psutil.Process(worker.popen.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "workers.child.animatic.espeak" in process.cmdline():
                return True
    return False


@pytest.mark.parametrize("how", [ctrl_c, stop_unit])
async def test_a_second_signal_to_the_whole_group_hands_back_at_once_and_counts_nothing(installation: Fleet, how: Stop) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker(MOVIEQ_DRAIN_S=GRACE))
    task_id = await api.submit("generate_video", LONG)
    await api.until(task_id, "stage", "frames")
    how(worker)
    await eventually(lambda: worker.times_logged("drain") == 1)
    how(worker)
    assert await worker.ended(int(GRACE) - 5) == 0, "it waited for the whole grace"
    assert await counted(installation, task_id) == (0, 0, 0)
    _, status = await api.call("GET", f"/tasks/{task_id}/status")
    assert (status["status"], status["attempt"], status["queue_position"]) == ("queued", 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True], ids=["Redis is there", "Redis is away"])
async def test_a_worker_whose_engine_does_not_listen_ends_all_the_same(installation: Fleet, away: bool) -> None:
    async with proxy(installation.valkey.socket) as between:
        api, worker = await asyncio.gather(installation.api(), installation.worker(between.url, MOVIEQ_DRAIN_S="0"))
        task_id = await api.submit("generate_video", LONG)
        await api.until(task_id, "stage", "frames")
        worker.child().suspend()
        if away:
            between.freeze()
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
    tries, deaths, silences = await counted(installation, task_id)
    assert (tries, deaths) == (0, 0)
    if not away:  # else its lease has to end, as after the death of a worker
        assert silences == 0
        _, status = await api.call("GET", f"/tasks/{task_id}/status")
        assert (status["status"], status["attempt"], status["queue_position"]) == ("queued", 1, 1)


async def counted(installation: Fleet, task_id: str) -> tuple[int, ...]:
    """Return what counts against the task: tries, deaths, silences."""
    return tuple(map(int, await raw(installation.store).hmget(KEYS["task"] + task_id, "tries", "deaths", "silences")))
