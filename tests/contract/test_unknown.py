"""What this version cannot read, as a newer one wrote it or it is damaged, is shown as what it is; everything beside it as ever."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from movieq.contracts import KEYS, TaskId
from movieq.settings import key_hash
from movieq.store import Store
from tests.arrange import raw
from tests.contract.client import Client
from tests.contract.conftest import Tasks


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("status", "waiting", {"status": "unknown", "task_type": "generate_image"}),
        ("task_type", "evaluate_scene", {"status": "queued", "task_type": "evaluate_scene"}),
        ("kind", "gpu_tiny", {"status": "queued"}),
        ("previous_state", "waiting", {"status": "unknown"}),
        ("created_at_ms", "soon", {"status": "unknown"}),
        ("result", "{", {"status": "unknown"}),
        ("a_new_field", "\x00", {"status": "queued"}),
    ],
)
async def test_a_record_that_cannot_be_read_is_shown_beside_the_others(
    api: Client, tasks: Tasks, store: Store, field: str, value: str, shown: dict[str, Any]
) -> None:
    odd, even = await tasks.queued(), await tasks.queued()
    await raw(store).hset(KEYS["task"] + odd, field, value)
    status = await api.get(f"/api/v1/tasks/{odd}/status")
    assert status.status == 200
    assert {name: status.json[name] for name in shown} == shown
    page = await api.get("/api/v1/projects/film/tasks")
    assert page.status == 200
    rows = {row["task_id"]: row["status"] for row in page.json["tasks"]}
    assert rows == {odd: shown["status"], even: "queued"}


async def test_an_unknown_state_is_no_filter(api: Client, tasks: Tasks) -> None:
    await tasks.queued()
    answer = await api.get("/api/v1/projects/film/tasks?status=unknown")
    assert answer.status == 400
    assert "queued, processing, completed, failed, cancelled" in answer.json["message"]


async def test_a_worker_of_a_newer_version_is_listed(api: Client, store: Store) -> None:
    row = {
        "worker_id": "new/gpu0", "worker_type": "gpu_tiny", "status": "dreaming", "current_task_id": None, "gpu_utilization": 0.5,
        "memory_usage": 1, "tasks_completed": 2, "last_heartbeat": "2026-11-29T00:00:00Z", "queues": ["gpu_tiny"], "device": "cuda:0",
        "memory_total": 2, "temperature": None, "power": None, "models": [], "host": "h", "version": "9", "mood": "good",
    }  # fmt: skip
    await raw(store).hset(KEYS["workers"], mapping={"new": json.dumps([row]), "broken": "{"})
    now_ms = (await raw(store).time())[0] * 1000
    await raw(store).zadd(KEYS["beats"], {"new": now_ms, "broken": now_ms})
    answer = await api.get("/api/v1/workers/status")
    assert answer.status == 200
    assert [(each["worker_type"], each["status"], each["queues"]) for each in answer.json["workers"]] == [
        ("gpu_tiny", "dreaming", ["gpu_tiny"])
    ]
    assert (await api.get("/api/v1/health")).status == 200


async def test_an_event_of_a_newer_version_reaches_those_who_follow(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    event = json.dumps({"task_id": task_id, "type": "noted", "text": "of a newer version"})
    await raw(store).xadd(KEYS["log"] + task_id, {"type": "noted", "data": event})
    await raw(store).xadd(KEYS["log"] + "project:film", {"type": "noted", "data": event})
    await store.fail(task_id, run, "it broke", "internal")
    async with api.events(task_id) as stream:
        names = [event.type for event in await stream.rest()]
    assert names == ["snapshot", "started", "noted", "failed"]


async def test_a_result_that_cannot_be_read_ends_the_stream_all_the_same(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.completed()
    (entry,) = await raw(store).xrevrange(KEYS["log"] + task_id, count=1)
    await raw(store).xdel(KEYS["log"] + task_id, entry[0])
    damaged = json.dumps({"task_id": task_id, "type": "completed", "result": 7})
    await raw(store).xadd(KEYS["log"] + task_id, {"type": "completed", "data": damaged})
    async with api.events(task_id) as stream:
        names = [event.type for event in await stream.rest()]
    assert names[-1] == "completed"


async def test_a_key_with_a_scope_of_a_newer_version_keeps_those_that_are_known(api: Client, store: Store) -> None:
    key = "a-key-of-a-newer-version"
    blob = msgspec.msgpack.encode({"projects": ["film"], "scopes": ["read", "dream"]})
    await raw(store).hset(KEYS["keys"], mapping={key_hash(key): blob, key_hash("another-key-that-is-broken"): b"\xff"})
    assert (await api.get("/api/v1/projects/film/tasks", key=key)).status == 200
    assert list(await store.grants()) == [key_hash(key)]


async def test_the_deliveries_of_a_task_are_listed_beside_one_that_cannot_be_read(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = TaskId(await tasks.failed(callback_url="http://10.9.0.1/hook"))
    await raw(store).hset(KEYS["delivery"] + f"{task_id}-1", mapping={"kind": "pigeon", "state": "flying"})
    answer = await api.get(f"/api/v1/tasks/{task_id}/deliveries")
    assert answer.status == 200
    assert [(each["kind"], each["state"]) for each in answer.json["deliveries"]] == [("pigeon", "flying")]
