"""Times that a task must keep, its type's longest run and its request's deadline: past them it fails, and makes room for the next."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from aiohttp import web

from movieq.queue.keys import KEYS
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import GENERATE_VIDEO, TaskId
from tests.arrange import new_task, raw
from tests.fleet import Fleet
from tests.service import Service, serving
from workers.supervisor import CANCEL_GRACE_S

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60}
ACTED_S = 2.0
"""How late a missed time is acted on, at most."""


def moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()


async def submit_long(made: Fleet, max_ms: int) -> str:
    """The id of a long task whose type may run for so long."""
    task = new_task(task_type=GENERATE_VIDEO, kwargs=msgspec.msgpack.encode({"task_data": LONG}), shape="long", max_ms=max_ms)
    await made.store.submit(task)
    return task.task_id


async def next_begins_within(api: Service, seconds: float) -> float:
    """Seconds until a task that comes now has begun. It then completes in its first attempt."""
    begun = time.monotonic()
    following = await api.submit("generate_image", SMALL)
    await api.until(following, "event", "started", seconds)
    begun_s = time.monotonic() - begun
    status = await api.ended(following)
    assert (status["status"], status["attempt"]) == ("completed", 1)
    return begun_s


async def test_a_task_may_run_for_as_long_as_its_type_may(made: Fleet) -> None:
    api = await made.api()
    asked: dict[str, tuple[dict[str, Any], int]] = {
        "generate_video": (LONG, 300),
        "render_animation": ({"prompt": "a gull"}, 300),
        "generate_image": (SMALL, 30),
        "process_audio": ({"text": "Who is there?"}, 30),
    }
    assert asked.keys() == set(REGISTRY.tasks)
    for task_type, (task_data, minutes) in asked.items():
        task_id = await api.submit(task_type, task_data)
        assert await raw(made.store).hget(KEYS["task"] + task_id, "max_ms") == b"%d" % (minutes * 60_000)
    _, answer = await api.call("GET", "/task-types")
    assert {each["task_type"]: each["max_duration_s"] for each in answer["task_types"]} == {
        task_type: minutes * 60 for task_type, (_, minutes) in asked.items()
    }


@pytest.mark.parametrize("limit", ["max_duration_s", "finish_by"])
async def test_a_running_task_past_its_time_fails_and_its_slot_takes_the_next_one(made: Fleet, limit: str) -> None:
    api, worker = await asyncio.gather(made.api(), made.worker())
    child = worker.child()
    due_s = time.time() + 1.5
    if limit == "max_duration_s":
        task_id = await submit_long(made, 1000)
    else:
        task_id = await api.submit("generate_video", LONG, deadline={"finish_by": moment(due_s)})
    status = await api.ended(task_id)
    free_s = await next_begins_within(api, 3)
    assert (status["status"], status["error_code"], status["retryable"]) == ("failed", "deadline_exceeded", False)
    assert status["error"] == ("ran for longer than the 1 s that its type may" if "max" in limit else "not finished by its deadline")
    task = await made.store.task(TaskId(task_id))
    assert task is not None
    assert task.started_at_ms is not None
    assert task.ended_at_ms is not None
    late_s = task.ended_at_ms / 1000 - (task.started_at_ms / 1000 + 1 if "max" in limit else due_s)
    print(f"{limit}: ended {late_s:.2f} s after it was due; the next task began {free_s:.2f} s later")
    assert -0.01 < late_s < ACTED_S
    assert worker.said("run_stopped") == 1
    assert worker.child() == child


@pytest.mark.slow
async def test_an_engine_that_does_not_listen_past_its_time_is_killed_and_its_slot_takes_the_next_task(made: Fleet) -> None:
    api, worker = await asyncio.gather(made.api(), made.worker())
    task_id = await submit_long(made, 3000)
    await api.until(task_id, "stage", "frames")
    deaf = worker.child()
    deaf.suspend()
    status = await api.ended(task_id)
    assert (status["status"], status["error_code"]) == ("failed", "deadline_exceeded")
    free_s = await next_begins_within(api, CANCEL_GRACE_S + 3)
    print(f"an engine that does not listen: the next task began {free_s:.2f} s after the end of the one before")
    assert not deaf.is_running()
    assert worker.said("child_killed") == 1
    assert await raw(made.store).hmget(KEYS["task"] + task_id, "tries", "deaths", "silences") == [b"0"] * 3


async def test_waiting_tasks_fail_at_their_requests_deadlines_though_there_is_no_worker(made: Fleet) -> None:
    api = await made.api()

    async def late_s(**deadline: float) -> float:
        times = {name: moment(at_s) for name, at_s in deadline.items()}
        status = await api.ended(await api.submit("generate_image", SMALL, deadline=times))
        late = time.time() - min(deadline.values())
        assert (status["status"], status["error_code"], status["attempt"]) == ("failed", "deadline_exceeded", 0)
        assert status["error"] == "not started by its deadline"
        return late

    now = time.time()
    late = await asyncio.gather(
        late_s(start_by=now + 1), late_s(finish_by=now + 1.3), late_s(start_by=now + 1.6, finish_by=now + 60), late_s(start_by=now - 60)
    )
    print(f"failed {', '.join(f'{each:.2f}' for each in late[:3])} s after their deadlines")
    assert all(0 <= each < ACTED_S for each in late[:3])
    assert late[3] < 60 + ACTED_S
    assert await raw(made.store).keys(KEYS["waiting"] + "*") == []
    assert await raw(made.store).exists(KEYS["deadlines"]) == 0


async def test_a_task_that_began_in_time_may_run_past_its_start_by(made: Fleet) -> None:
    api, _ = await asyncio.gather(made.api(), made.worker())
    start_by_s = time.time() + 1

    async def frame(_: web.Request) -> web.Response:
        await asyncio.sleep(start_by_s + 1.2 - time.time())  # by then every API process has looked
        raise web.HTTPNotFound

    async with serving({"/frame": frame}) as url:
        data = {**SMALL, "reference_images": [f"{url}/frame"]}
        deadline = {"start_by": moment(start_by_s), "finish_by": moment(start_by_s + 60)}
        status = await api.ended(await api.submit("generate_image", data, deadline=deadline))
    assert (status["error_code"], status["attempt"]) == ("input_unavailable", 1)
    assert time.time() > start_by_s + 1
    assert await raw(made.store).exists(KEYS["deadlines"]) == 0
