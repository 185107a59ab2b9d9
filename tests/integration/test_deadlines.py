"""Time limits of a task: the longest run of its type, and the deadline of its request. A task that exceeds one fails and frees its slot."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from aiohttp import web

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import GENERATE_VIDEO, Kind, TaskId
from tests.arrange import new_task, raw
from tests.fleet import Fleet
from tests.service import Service, serving

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60}


def moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()


async def submit_long(installation: Fleet, max_ms: int) -> str:
    """Submit a long task whose run may take this long; return its id."""
    task = new_task(task_type=GENERATE_VIDEO, kwargs=msgspec.msgpack.encode({"task_data": LONG}), shape="long", max_ms=max_ms)
    await installation.store.submit(task)
    return task.task_id


async def the_next_completes(api: Service) -> None:
    """Assert that a new task completes in its first attempt."""
    status = await api.ended(await api.submit("generate_image", SMALL))
    assert (status["status"], status["attempt"]) == ("completed", 1)


async def test_a_task_may_run_for_as_long_as_its_type_may(installation: Fleet) -> None:
    api = await installation.api()
    asked: dict[str, tuple[dict[str, Any], int]] = {
        "generate_video": (LONG, 300),
        "render_animation": ({"prompt": "a gull"}, 300),
        "generate_image": (SMALL, 30),
        "process_audio": ({"text": "Who is there?"}, 30),
    }
    assert asked.keys() == set(REGISTRY.tasks)
    for task_type, (task_data, minutes) in asked.items():
        task_id = await api.submit(task_type, task_data)
        assert await raw(installation.store).hget(KEYS["task"] + task_id, "max_ms") == b"%d" % (minutes * 60_000)
    _, answer = await api.call("GET", "/task-types")
    assert {each["task_type"]: each["max_duration_s"] for each in answer["task_types"]} == {
        task_type: minutes * 60 for task_type, (_, minutes) in asked.items()
    }


@pytest.mark.parametrize("limit", ["max_duration_s", "finish_by"])
async def test_a_running_task_past_its_time_fails_and_its_slot_takes_the_next_one(installation: Fleet, limit: str) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    due_s = time.time() + (0 if "max" in limit else 6)  # time to be claimed, on a busy machine too
    if limit == "max_duration_s":
        task_id = await submit_long(installation, 1000)
    else:
        task_id = await api.submit("generate_video", LONG, deadline={"finish_by": moment(due_s)})
    status = await api.ended(task_id)
    await the_next_completes(api)
    assert (status["status"], status["error_code"], status["retryable"]) == ("failed", "deadline_exceeded", False)
    assert status["error"] == ("ran for longer than the 1 s that its type may" if "max" in limit else "not finished by its deadline")
    task = await Queries(installation.store.redis).task(TaskId(task_id))
    assert task is not None
    assert task.started_at_ms is not None
    assert task.ended_at_ms is not None
    assert task.ended_at_ms >= (task.started_at_ms + 1000 if "max" in limit else int(due_s * 1000))
    assert worker.times_logged("run_stopped") == 1


@pytest.mark.slow
async def test_an_engine_that_does_not_listen_past_its_time_is_killed_and_its_slot_takes_the_next_task(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    task_id = await submit_long(installation, 3000)
    await api.until(task_id, "stage", "frames")
    deaf = worker.child()
    deaf.suspend()
    status = await api.ended(task_id)
    assert (status["status"], status["error_code"]) == ("failed", "deadline_exceeded")
    await the_next_completes(api)
    assert not deaf.is_running()
    assert worker.times_logged("child_killed") == 1
    assert await raw(installation.store).hmget(KEYS["task"] + task_id, "tries", "deaths", "silences") == [b"0"] * 3


async def test_waiting_tasks_fail_at_their_requests_deadlines_though_there_is_no_worker(installation: Fleet) -> None:
    api = await installation.api()

    async def fails(**deadline: float) -> None:
        times = {name: moment(at_s) for name, at_s in deadline.items()}
        status = await api.ended(await api.submit("generate_image", SMALL, deadline=times))
        assert time.time() >= min(deadline.values())
        assert (status["status"], status["error_code"], status["attempt"]) == ("failed", "deadline_exceeded", 0)
        assert status["error"] == "not started by its deadline"

    now = time.time()
    await asyncio.gather(
        fails(start_by=now + 1), fails(finish_by=now + 1.3), fails(start_by=now + 1.6, finish_by=now + 3600), fails(start_by=now - 60)
    )
    assert await raw(installation.store).keys(KEYS["waiting"] + "*") == []
    assert await raw(installation.store).exists(KEYS["deadlines"]) == 0


async def test_a_task_that_began_in_time_may_run_past_its_start_by(installation: Fleet) -> None:
    api, _ = await asyncio.gather(installation.api(), installation.worker())
    start_by_s = time.time() + 10  # time to begin, on a busy machine too
    deadline = {"start_by": moment(start_by_s), "finish_by": moment(start_by_s + 3600)}
    asked, over = asyncio.Event(), asyncio.Event()

    async def frame(_: web.Request) -> web.Response:
        asked.set()
        await over.wait()
        raise web.HTTPNotFound

    async with serving({"/frame": frame}) as url:
        task_id = await api.submit("generate_image", {**SMALL, "reference_images": [f"{url}/frame"]}, deadline=deadline)
        await asked.wait()
        waiting = new_task(kind=Kind.GPU_HEAVY, start_by_ms=int(start_by_s * 1000))  # there is nobody who could run it
        await installation.store.submit(waiting)
        assert (await api.ended(waiting.task_id))["error_code"] == "deadline_exceeded"  # so the deadlines were looked at
        over.set()
        status = await api.ended(task_id)
    assert (status["error_code"], status["attempt"]) == ("input_unavailable", 1)
    assert await raw(installation.store).exists(KEYS["deadlines"]) == 0
