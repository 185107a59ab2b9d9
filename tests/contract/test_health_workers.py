"""Health, which needs no key; the list of workers, and which of it a key may see; task types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

import movieq
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.entities import WorkerState, WorkerStatus
from movieq.tasks.results import utc
from movieq.tasks.states import EngineChoice, Kind, TaskId
from tests.arrange import raw
from tests.contract.client import ALL, FILM, Client
from tests.contract.conftest import Tasks, served

WORKERS = "/api/v1/workers/status"
WORKER = {
    *("worker_id", "worker_type", "status", "current_task_id", "gpu_utilization", "memory_usage", "tasks_completed", "last_heartbeat"),
    *("queues", "device", "memory_total", "temperature", "power", "idle_gap", "models", "models_parked", "model_swaps"),
    *("host", "version", "problem"),
}


async def beat(store: Store, worker: str = "w1", task_id: TaskId | None = None, **fields: Any) -> None:
    """Send a heartbeat of a worker with one child."""
    row: dict[str, Any] = {
        **{"worker_id": worker, "worker_type": Kind.CPU_INTENSIVE, "status": WorkerState.IDLE, "current_task_id": task_id},
        **{"gpu_utilization": 0.0, "memory_usage": 1000, "tasks_completed": 3, "last_heartbeat": utc(0), "queues": [Kind.CPU_INTENSIVE]},
        **{"device": "cpu", "memory_total": 2000, "temperature": None, "power": None, "models": [], "host": "h", "version": "0"},
        **fields,
    }
    await store.renew(worker, [WorkerStatus(**row)], [], gpu_bytes=0)


async def silent(store: Store, worker: str, seconds: int) -> None:
    """Move the worker's last heartbeat back by this many seconds."""
    await raw(store).zincrby(KEYS["heartbeat_times"], -seconds * 1000, worker)


# ── Health ──


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_has_every_key(api: Client, path: str) -> None:
    answer = await api.get(path, key=None)
    assert answer.status == 200
    assert answer.json.keys() == {"status", "timestamp", "version", "redis_status", "worker_count", "queue_sizes", "uptime", "problems"}
    assert (answer.json["status"], answer.json["version"], answer.json["redis_status"]) == ("healthy", movieq.__version__, "connected")
    assert answer.json["queue_sizes"] == {"gpu_heavy": 0, "gpu_medium": 0, "cpu_intensive": 0}


async def test_it_is_healthy_where_somebody_works_on_what_waits(api: Client, tasks: Tasks, store: Store) -> None:
    await beat(store)
    await tasks.queued()
    health = (await api.get("/health")).json
    assert (health["status"], health["worker_count"], health["queue_sizes"]["cpu_intensive"]) == ("healthy", 1, 1)


async def test_it_is_degraded_where_nobody_works_on_what_waits(api: Client, tasks: Tasks, store: Store) -> None:
    await beat(store, queues=[Kind.GPU_HEAVY])
    await tasks.queued()
    answer = await api.get("/health")
    assert (answer.status, answer.json["status"]) == (200, "degraded")


async def test_a_worker_that_fell_silent_does_not_count(api: Client, tasks: Tasks, store: Store) -> None:
    await beat(store)
    await silent(store, "w1", 20)
    await tasks.queued()
    health = (await api.get("/health")).json
    assert (health["status"], health["worker_count"]) == ("degraded", 0)


async def test_it_is_degraded_where_the_storage_is_away(settings: Settings, store: Store, folder: Path) -> None:
    (folder / "no-folder").write_text("a file")
    async with served(msgspec.structs.replace(settings, storage=folder / "no-folder")) as api:
        health = await api.get("/health")
        upload = await api.post("/api/v1/projects/film/uploads", data=b"fLaC" + bytes(100))
    assert (health.status, health.json["status"]) == (200, "degraded")
    assert (upload.status, upload.error, "Retry-After" in upload.headers) == (503, "unavailable", True)


# ── Workers ──


async def test_without_workers_the_mean_is_zero(api: Client) -> None:
    assert (await api.get(WORKERS)).json == {"workers": [], "total_workers": 0, "active_workers": 0, "gpu_utilization": 0.0}


async def test_a_row_has_every_key_and_the_time_of_its_heartbeat(api: Client, store: Store) -> None:
    await beat(store)
    (row,) = (await api.get(WORKERS)).json["workers"]
    assert row.keys() == WORKER
    assert not row["last_heartbeat"].startswith("1970")


async def test_busy_and_active_are_counted_and_utilization_is_a_mean(api: Client, store: Store) -> None:
    for number, status in enumerate(WorkerState):
        await beat(store, f"w{number}", status=status, gpu_utilization=number / 4)
    told = (await api.get(WORKERS)).json
    assert (told["total_workers"], told["active_workers"], told["gpu_utilization"]) == (4, 2, pytest.approx((0 + 1 + 2 + 3) / 16))


@pytest.mark.parametrize(("seconds", "status"), [(14, "busy"), (16, "offline"), (290, "offline")])
async def test_a_worker_without_a_word_is_offline_after_15_s(api: Client, store: Store, seconds: int, status: str) -> None:
    await beat(store, status=WorkerState.BUSY)
    await silent(store, "w1", seconds)
    told = (await api.get(WORKERS)).json
    assert [row["status"] for row in told["workers"]] == [status]
    assert told["active_workers"] == (status == "busy")


async def test_a_worker_without_a_word_is_forgotten_after_5_minutes(api: Client, store: Store) -> None:
    await beat(store)
    await silent(store, "w1", 301)
    await store.tidy()
    assert (await api.get(WORKERS)).json["workers"] == []


async def test_a_key_sees_the_tasks_of_its_projects_only(api: Client, tasks: Tasks, store: Store) -> None:
    mine, foreign = await tasks.queued(), await tasks.queued(project_id="other")
    for number, task_id in enumerate((mine, foreign)):
        await beat(store, f"w{number}", task_id)
    seen = {key: [row["current_task_id"] for row in (await api.get(WORKERS, key=key)).json["workers"]] for key in (ALL, FILM)}
    assert seen == {ALL: [mine, foreign], FILM: [mine, None]}


# ── Task types ──


async def test_task_types_tell_what_can_be_submitted(api: Client) -> None:
    told = (await api.get("/api/v1/task-types")).json["task_types"]
    assert [each["task_type"] for each in told] == ["generate_video", "generate_image", "process_audio", "render_animation"]
    assert {each["default_model"] for each in told} == {"animatic"}
    for each in told:
        Draft202012Validator.check_schema(each["task_data"])


@pytest.mark.parametrize(
    ("task_type", "task_data"),
    [
        ("generate_video", {"fps": 0}),
        ("generate_video", {"resolution": "x"}),
        ("process_audio", {"text": ""}),
        ("generate_image", {"seed": -1}),
    ],
)
async def test_the_schema_of_a_type_refuses_what_submit_refuses(api: Client, task_type: str, task_data: dict[str, Any]) -> None:
    (schema,) = [each["task_data"] for each in (await api.get("/api/v1/task-types")).json["task_types"] if each["task_type"] == task_type]
    assert not Draft202012Validator(schema).is_valid(task_data)
    assert (await api.submit(task_type=task_type, task_data={"prompt": "x", **task_data})).status == 400


async def test_an_engine_that_no_model_serves_is_refused_by_its_setting(settings: Settings, store: Store, folder: Path) -> None:
    mute = 'engine = "animatic"\nkind = "cpu_intensive"\ntasks = { generate_image = 1 }\n'
    (folder / "models.toml").write_text(f"[csm]\n{mute}")  # so that no model speaks
    models = str(folder / "models.toml")
    async with served(msgspec.structs.replace(settings, engine=EngineChoice.DIFFUSERS, models=models)) as api:
        line = {"text": "Land ho."}
        answer = await api.submit(task_type="process_audio", task_data=line)
        draft = await api.submit(task_type="process_audio", task_data={**line, "draft": True})
    assert (answer.status, "MOVIEQ_ENGINE" in answer.message, draft.status) == (400, True, 201)


@pytest.mark.parametrize("path", [WORKERS, "/api/v1/task-types"])
async def test_a_query_that_nothing_reads_is_refused(api: Client, path: str) -> None:
    answer = await api.get(f"{path}?x=1")
    assert (answer.status, answer.error) == (400, "validation_failed")


async def test_a_worker_that_takes_nothing_says_why_and_is_an_alert_until_it_falls_silent(api: Client, store: Store) -> None:
    await beat(store, problem="its disk is full", queues=[])
    await beat(store, "w2")
    by_worker = {row["worker_id"]: row["problem"] for row in (await api.get(WORKERS)).json["workers"]}
    assert by_worker == {"w1": "its disk is full", "w2": None}
    alerts = (await api.get("/api/v1/tasks/health")).json["alerts"]
    assert [(alert["code"], alert["message"]) for alert in alerts] == [
        ("worker_problem", "1 of 2 workers accept no tasks: its disk is full; see /workers/status")
    ]
    await silent(store, "w1", 20)
    assert (await api.get("/api/v1/tasks/health")).json["alerts"] == []
