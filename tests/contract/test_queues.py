"""What operators and autoscalers see: queues, dead letters, totals, alerts; and what a sweep deletes of it."""

from __future__ import annotations

import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.states import STATES, TaskId, TaskStatus
from tests.arrange import claim, later, new_task, raw, result, running
from tests.contract.client import ADMIN, ALL, FILM, READ, Client
from tests.contract.conftest import Tasks


async def cpu_queue(api: Client) -> dict[str, object]:
    answer = await api.get("/api/v1/queues")
    assert answer.status == 200
    assert [queue["queue_name"] for queue in answer.json["queues"]] == ["gpu_heavy", "gpu_medium", "cpu_intensive"]
    return dict(answer.json["queues"][2])


async def test_a_queue_counts_what_waits_by_priority_and_what_runs(api: Client, store: Store) -> None:
    for priority in (1, 2, 2, 3):
        await store.submit(new_task(priority=priority))
    await claim(store)
    queue = await cpu_queue(api)
    assert (queue["pending_count"], queue["running"]) == (3, 1)
    assert queue["priority_distribution"] == {"high": 0, "normal": 2, "low": 1}
    assert queue["oldest_waiting_seconds"] >= 0  # type: ignore[operator]  # JSON


async def test_a_run_whose_lease_is_over_counts_as_waiting(api: Client, store: Store) -> None:
    task_id, _ = await running(store)
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {task_id: 1})
    await raw(store).set(KEYS["leases_paused"], 2**45, px=10_000)  # nothing is reaped meanwhile
    queue = await cpu_queue(api)
    assert (queue["pending_count"], queue["running"]) == (1, 0)


async def test_the_estimated_wait_follows_the_pace_of_claims(api: Client, store: Store) -> None:
    seconds, _ = await raw(store).time()
    await raw(store).rpush(KEYS["claim_times"] + "cpu_intensive", *(seconds * 1000 - number * 2000 for number in range(1, 11)))
    for _ in range(5):
        await store.submit(new_task())
    assert 9 <= int(str((await cpu_queue(api))["estimated_wait_time"])) <= 12


@pytest.mark.parametrize("path", ["/api/v1/queues", "/api/v1/dead-letters"])
async def test_queues_and_dead_letters_are_for_admins(api: Client, path: str) -> None:
    assert (await api.get(path, key=READ)).status == 403
    assert (await api.get(path, key=ALL)).status == 200


async def test_queues_hold_the_tasks_of_all_projects_so_a_key_of_some_may_not_see_them(api: Client) -> None:
    refused = await api.get("/api/v1/queues", key=ADMIN)
    assert (refused.status, "all projects" in refused.message) == (403, True)


async def buried(store: Store, project: str = "film") -> TaskId:
    task_id, run = await running(store, project=project)
    await store.requeue(task_id, run, Budget.DEATHS, 1, 0, "the engine's process ended", "worker_lost", exit_code=-9, stage="frames")
    return task_id


async def test_a_dead_letter_is_listed_with_what_is_known_of_its_death_until_it_is_retried_or_dropped(api: Client, store: Store) -> None:
    first = await buried(store)
    await later(store)
    second = await buried(store)
    letters = (await api.get("/api/v1/dead-letters")).json
    assert letters["total"] == 2
    letter = letters["dead_letters"][0]
    assert (letter["task_id"], letter["exit_code"], letter["last_stage"]) == (second, -9, "frames")
    assert letter["task_data"] == {"prompt": "a lighthouse"}
    assert (await api.post(f"/api/v1/tasks/{first}/retry")).status == 201
    assert (await api.delete(f"/api/v1/dead-letters/{second}")).status == 204
    assert (await api.get("/api/v1/dead-letters")).json == {"dead_letters": [], "total": 0}
    assert (await api.delete(f"/api/v1/dead-letters/{second}")).status == 404
    assert (await api.status(second))["status"] == "failed"


async def test_an_admin_of_one_project_sees_and_drops_its_dead_letters_only(api: Client, store: Store) -> None:
    ours = await buried(store)
    await later(store)
    foreign = await buried(store, "other")
    letters = (await api.get("/api/v1/dead-letters?limit=1", key=ADMIN)).json
    assert [letter["task_id"] for letter in letters["dead_letters"]] == [ours]
    assert letters["total"] == 1
    assert (await api.delete(f"/api/v1/dead-letters/{foreign}", key=ADMIN)).status == 404


async def test_totals_rates_and_durations_are_those_of_the_tasks_that_the_key_may_see(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.completed()
    await tasks.failed()
    await tasks.cancelled()
    await tasks.queued(project_id="other")
    everything = (await api.get("/api/v1/tasks/metrics")).json
    assert everything["total_tasks"] == 4
    assert everything["tasks"] == {"queued": 1, "processing": 0, "completed": 1, "failed": 1, "cancelled": 1}
    assert everything["success_rate"] == everything["failure_rate"] == everything["cancellation_rate"] == 33.33
    assert set(everything["average_duration"]) <= {"generate_video", "generate_image", "process_audio", "render_animation"}
    film = (await api.get("/api/v1/tasks/metrics", key=FILM)).json
    assert (film["total_tasks"], film["tasks"]["queued"]) == (3, 0)
    assert (film["average_duration"], film["passed_over"], film["limits_hit"]) == ({}, None, {})


async def test_gpu_seconds_are_those_of_the_task_of_its_project_and_of_what_the_key_may_see(
    api: Client, tasks: Tasks, store: Store
) -> None:
    for project, ms in (("film", 1500), ("other", 2000)):
        task_id, run = await tasks.processing(project_id=project)
        await store.report(task_id, run, 0.5, "generating_image", gpu=(ms, 0))
        await store.complete(task_id, run, result())
        assert (await api.status(task_id))["gpu_seconds"] == ms / 1000
        assert (await api.get(f"/api/v1/projects/{project}")).json["gpu_seconds"] == ms / 1000
    assert [(await api.get("/api/v1/tasks/metrics", key=key)).json["gpu_seconds"] for key in (ALL, FILM)] == [3.5, 1.5]


async def test_health_raises_an_alert_for_a_queue_without_a_worker_and_for_dead_letters(api: Client, store: Store) -> None:
    assert (await api.get("/api/v1/tasks/health")).json == {"status": "healthy", "alerts": []}
    await buried(store)
    await store.submit(new_task())
    answer = (await api.get("/api/v1/tasks/health")).json
    assert answer["status"] == "degraded"
    assert [alert["code"] for alert in answer["alerts"]] == ["no_worker", "dead_letters"]
    film = (await api.get("/api/v1/tasks/health", key=FILM)).json
    assert [alert["code"] for alert in film["alerts"]] == ["dead_letters"], "who else waits is not theirs to know"


async def test_the_dead_letters_of_other_projects_raise_no_alert(api: Client, store: Store) -> None:
    await buried(store, "other")
    assert (await api.get("/api/v1/tasks/health", key=FILM)).json == {"status": "healthy", "alerts": []}


async def test_the_limit_of_all_projects_answers_429_with_the_pace_of_the_queue(store: Store) -> None:
    await store.submit(new_task("a", max_queued_all=1))
    with pytest.raises(Exception, match="there are 1 waiting tasks") as full:
        await store.submit(new_task("b", max_queued_all=1))
    assert full.value.retry_after_s == 30  # type: ignore[attr-defined]  # QueueFull's; no claim has been seen yet


async def test_what_ended_long_ago_is_forgotten_with_every_trace_and_the_rest_stays(store: Store) -> None:
    kept = new_task()
    for state in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED):
        task_id, run = await running(store, callback_url="http://127.0.0.1:1/")
        match state:
            case TaskStatus.COMPLETED:
                await store.complete(task_id, run, result())
            case TaskStatus.FAILED:
                await store.fail(task_id, run, "it broke", "internal")
            case TaskStatus.CANCELLED:
                await store.cancel(task_id)
    await buried(store, "gone")
    await store.submit(kept)
    for key in await raw(store).zrange(KEYS["deliveries"], 0, -1):
        await raw(store).delete(KEYS["job"] + key.decode())  # as when they are delivered
    assert await store.sweep(3600) == (0, [])
    assert await store.sweep(0) == (4, [])
    left = {key.decode() for key in await raw(store).keys("*")}
    assert {key for key in left if key.startswith((KEYS["task"], KEYS["job"], KEYS["log"]))} == {
        KEYS["task"] + kept.task_id,
        KEYS["job"] + kept.task_id,
        KEYS["log"] + "project:film",
    }
    assert not {key for key in left if key.startswith((KEYS["delivery"], KEYS["dead"], KEYS["ended"]))}
    assert {key for key in left if key.startswith(KEYS["index"])} == {
        f"{KEYS['index']}film|{status}|{task_type}" for status in ("", "queued") for task_type in ("", "generate_image")
    }
    assert await Queries(store.redis).totals(None) == {**dict.fromkeys(STATES, 0), TaskStatus.QUEUED: 1}
