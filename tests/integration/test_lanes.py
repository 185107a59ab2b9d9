"""Tasks that only some workers can run, because of a plug-in or a rolling upgrade, wait for one of these and block no other task."""

from __future__ import annotations

import itertools

import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries, Stranded
from movieq.queue.records import Able
from movieq.queue.repair import inconsistencies
from movieq.queue.store import Budget, Claimed, Slot, Store
from movieq.tasks.entities import WorkerState, WorkerStatus
from movieq.tasks.results import utc
from movieq.tasks.states import Kind, ProjectId, TaskId, TaskStatus
from tests.arrange import new_task, raw, result

_nonces = itertools.count()
PLAIN = Able(("generate_image", "generate_video"), ("animatic",))
PLUGGED = Able(("generate_image", "generate_video", "palette"), ("animatic", "palettes"))
SLOT = Slot((Kind.CPU_INTENSIVE,))


async def claim(store: Store, able: Able | None, worker: str = "w1", slots: int = 1, host: str = "") -> list[Claimed]:
    return await store.claim(worker, f"nonce{next(_nonces)}", [SLOT] * slots, host=host, able=able)


async def submitted(store: Store, task_type: str = "generate_image", model: str = "animatic", project: str = "film") -> TaskId:
    task = new_task(project, task_type=task_type, model=model)
    await store.submit(task)
    return task.task_id


@pytest.mark.parametrize(("task_type", "model"), [("palette", "palettes"), ("generate_image", "palettes"), ("palette", "animatic")])
async def test_what_a_worker_cannot_run_waits_for_one_that_can(store: Store, task_type: str, model: str) -> None:
    theirs = [await submitted(store, task_type, model) for _ in range(3)]
    ours = await submitted(store)
    assert [each.task.task_id for each in await claim(store, PLAIN, slots=4)] == [ours]
    assert [each.task.task_id for each in await claim(store, PLUGGED, "w2", slots=4)] == theirs
    assert await raw(store).keys(KEYS["lanes"] + "*") == []


async def test_thousands_of_such_tasks_hold_up_nobody_behind_them(store: Store) -> None:
    heard = raw(store).pubsub()
    await heard.subscribe(KEYS["control"] + "w1")
    for _ in range(250):
        await submitted(store, "palette", "palettes")
    ours = await submitted(store)
    for _ in range(3):
        claimed = await claim(store, PLAIN)
        if claimed:
            break
    assert [each.task.task_id for each in claimed] == [ours]
    messages = [await heard.get_message(timeout=5) for _ in range(3)]
    assert [each["data"] for each in messages if each["type"] == "message"] == [b"wake"] * 2  # there was more to move than a claim may
    await heard.aclose()


async def test_the_oldest_is_passed_over_too_where_it_cannot_be_run(store: Store) -> None:
    for number in range(16):
        await submitted(store, "palette", "palettes", f"film{number % 4}")
        await submitted(store, project=f"other{number % 4}")
    for _ in range(16):
        (claimed,) = await claim(store, PLAIN)
        assert claimed.task.task_type == "generate_image"
    assert await claim(store, PLAIN) == []


async def test_queues_and_places_count_what_waits_aside(store: Store) -> None:
    first, second = [await submitted(store, "palette", "palettes") for _ in range(2)]
    assert await claim(store, PLAIN) == []
    (_, _, cpu) = await Queries(store.redis).queues()
    assert (cpu.pending_count, cpu.priority_distribution["normal"]) == (2, 2)  # type: ignore[index]  # a StrEnum is its value
    assert cpu.oldest_waiting_seconds > 0
    assert (await Queries(store.redis).queue_sizes())[Kind.CPU_INTENSIVE] == 2
    tasks = await Queries(store.redis).tasks([first, second])
    assert await Queries(store.redis).positions(tasks) == [1, 2]
    assert [await Queries(store.redis).position(task) for task in tasks] == [1, 2]
    await store.cancel(first)
    await store.cancel(second)
    assert (await Queries(store.redis).queue_sizes())[Kind.CPU_INTENSIVE] == 0
    assert await raw(store).keys(KEYS["lanes"] + "*") == []


async def test_a_task_that_comes_back_waits_aside_again(store: Store) -> None:
    task_id = await submitted(store, "palette", "palettes")
    await claim(store, PLAIN)
    (claimed,) = await claim(store, PLUGGED, "w2")
    await store.requeue(task_id, claimed.run, Budget.TRIES, 3, 0, "it broke", "network")
    assert await claim(store, PLAIN) == []
    (claimed,) = await claim(store, PLUGGED, "w2")
    await store.complete(task_id, claimed.run, result())
    (task,) = await Queries(store.redis).tasks([task_id])
    assert task.status is TaskStatus.COMPLETED


async def test_shares_hold_among_projects_aside(store: Store) -> None:
    for project in ("film", "other"):
        for _ in range(8):
            await submitted(store, "palette", "palettes", project)
    assert await claim(store, PLAIN) == []
    projects = [each.task.project_id for _ in range(8) for each in await claim(store, PLUGGED, "w2")]
    assert min(projects.count(ProjectId(each)) for each in ("film", "other")) >= 3  # one of eight goes by age


async def test_what_no_live_worker_can_run_is_named(store: Store) -> None:
    await submitted(store, "palette", "palettes")
    await claim(store, PLAIN)
    for worker, able in (("plain", PLAIN), ("plugged", PLUGGED)):
        await store.renew(worker, [row(worker)], [], gpu_bytes=0, able=able)
    assert await Queries(store.redis).stranded([row("plain")]) == [Stranded("cpu_intensive", "palette", "palettes", 1)]
    assert await Queries(store.redis).stranded([row("plain"), row("plugged")]) == []
    assert await Queries(store.redis).stranded([row("plain"), row("one that says nothing")]) == []
    await submitted(store)
    assert [each.task_type for each in await Queries(store.redis).stranded([])] == ["", "palette"]
    await store.leave("plugged")
    assert await raw(store).hkeys(KEYS["abilities"]) == [b"plain"]


def row(worker: str) -> WorkerStatus:
    """Return the row of a worker that serves the CPU queue."""
    return WorkerStatus(
        worker_id=f"{worker}/cpu0",
        worker_type=Kind.CPU_INTENSIVE,
        status=WorkerState.IDLE,
        current_task_id=None,
        gpu_utilization=0.0,
        memory_usage=0,
        tasks_completed=0,
        last_heartbeat=utc(0),
        queues=[Kind.CPU_INTENSIVE],
        device="cpu",
        memory_total=0,
        temperature=None,
        power=None,
        models=[],
        host="h",
        version="1",
    )


async def test_a_task_whose_model_is_damaged_waits_aside_and_is_counted_and_named(store: Store) -> None:
    task_id = await submitted(store)
    await raw(store).hset(KEYS["task"] + task_id, "model", b"\xff")
    assert await claim(store, PLAIN) == []
    assert (await Queries(store.redis).queue_sizes())[Kind.CPU_INTENSIVE] == 1
    assert [queue.pending_count for queue in await Queries(store.redis).queues()] == [0, 0, 1]
    assert await Queries(store.redis).stranded([]) == [Stranded("cpu_intensive", "generate_image", "\ufffd", 1)]


async def test_tasks_in_no_queue_are_counted_as_astray(store: Store) -> None:
    await submitted(store)
    for _ in range(3):
        await submitted(store, "palette", "palettes")
    (claimed,) = await claim(store, PLAIN, slots=2)
    await store.requeue(claimed.task.task_id, claimed.run, Budget.TRIES, 3, 60_000, "it broke", "network")
    assert await Queries(store.redis).astray() == 0
    await raw(store).delete(KEYS["lanes"] + "cpu_intensive")
    assert await Queries(store.redis).astray() == 3
    async for _ in inconsistencies(store, apply=True):
        pass
    assert await Queries(store.redis).astray() == 0
    assert len(await claim(store, PLUGGED, "w2", slots=4)) == 3


async def test_tasks_of_a_kind_that_this_version_does_not_know_are_named_too(store: Store) -> None:
    await store.submit(new_task(kind="gpu_tiny"))
    assert await Queries(store.redis).stranded([row("plain")]) == [Stranded("gpu_tiny", "", "", 1)]
    assert await Queries(store.redis).astray() == 0
