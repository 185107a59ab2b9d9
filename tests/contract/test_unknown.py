"""A record that this version cannot read, because it is newer or damaged, is shown as unknown; all others are unaffected."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from movieq.queue.api_keys import ApiKeys
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from movieq.settings import key_hash
from movieq.tasks.states import TaskId
from tests.arrange import raw
from tests.contract.client import ADMIN, ALL, Client
from tests.contract.conftest import Tasks


def stored_result(key: str, **fields: Any) -> str:
    """Return the JSON of a result with one file."""
    media = {"key": key, "media_type": "character_design", "content_type": "image/jpeg", "size_bytes": 1, **fields}
    return json.dumps({"media": [media], "metadata": {}})


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
        ("created_at_ms", "999999999999999", {"status": "queued"}),
        ("created_at_ms", "-999999999999999", {"status": "queued"}),
        ("created_at_ms", "9" * 500, {"status": "unknown"}),
        ("ended_at_ms", "999999999999999", {"status": "queued"}),
        ("ended_at_ms", "-99999999999999999", {"status": "unknown"}),
        ("remaining_ms", "9" * 5000, {"status": "unknown"}),
        ("gpu_ms", "inf", {"status": "unknown"}),
        ("progress", "nan", {"status": "unknown"}),
        ("result", json.dumps({"media": [], "metadata": {}}), {"status": "unknown", "result": None}),
        ("result", stored_result(""), {"status": "unknown", "result": None}),
        ("result", stored_result("../../etc/passwd"), {"status": "unknown", "result": None}),
        ("result", stored_result("a/b.jpg", poster_key="/a"), {"status": "unknown", "result": None}),
        ("result", stored_result("a/b.jpg\n"), {"status": "unknown", "result": None}),
        ("result", "[" * 5000, {"status": "unknown", "result": None}),
        ("metadata", '{"a":' * 5000, {"status": "unknown"}),
        ("last_event_id", "abc", {"status": "queued"}),
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
    async with api.events("projects/film") as stream:
        snapshot = await stream.until("snapshot")
    assert {row["task_id"]: row["status"] for row in snapshot[-1].data["active"]} == {odd: shown["status"], even: "queued"}


async def test_an_entry_of_a_list_that_cannot_be_read_is_left_out(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.queued()
    await raw(store).set(KEYS["task"] + "a string", "in the place of a record")
    for key in ("film||", "film|queued|", "film|failed|"):
        await raw(store).zadd(KEYS["index"] + key, {b"\xff\xfe": 1, b"a string": 2})
    await raw(store).zadd(KEYS["dead"], {b"\xff\xfe": 1, b"a string": 2})
    page = await api.get("/api/v1/projects/film/tasks")
    assert [row["task_id"] for row in page.json["tasks"]] == [task_id]
    async with api.events("projects/film") as stream:
        snapshot = await stream.until("snapshot")
    assert [row["task_id"] for row in snapshot[-1].data["active"]] == [task_id]
    for key in (ALL, ADMIN):
        assert (await api.get("/api/v1/dead-letters", key=key)).json["dead_letters"] == []


async def test_a_task_that_ended_at_no_time_ends_its_stream_all_the_same(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.failed()
    await raw(store).delete(KEYS["log"] + task_id)
    await raw(store).hset(KEYS["task"] + task_id, "ended_at_ms", "never")
    async with api.events(task_id) as stream:
        assert [event.type for event in await stream.rest()] == ["snapshot", "failed"]


@pytest.mark.parametrize("result", [json.dumps({"media": [], "metadata": {}}), stored_result(""), stored_result("../x"), "{"])
async def test_a_result_that_cannot_be_read_is_given_to_no_other_task(api: Client, tasks: Tasks, store: Store, result: str) -> None:
    same = {"task_data": {"prompt": "a lamp", "seed": 7}}
    task_id = await tasks.completed(**same)
    await raw(store).hset(KEYS["task"] + task_id, "result", result)
    assert (await api.status(await tasks.queued(**same)))["status"] == "queued"
    keys = await raw(store).keys(KEYS["reusable"] + "*")
    assert len(keys) == 1
    await raw(store).set(keys[0], b"\xff\xfe")
    assert (await api.status(await tasks.queued(**same)))["status"] == "queued"


@pytest.mark.parametrize("id", ["abc", "", "1-2-3", "1\n", "9" * 400])
async def test_a_last_event_id_that_is_none_counts_as_absent(api: Client, tasks: Tasks, store: Store, id: str) -> None:
    task_id, run = await tasks.processing()
    await raw(store).hset(KEYS["task"] + task_id, "last_event_id", id)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(api.get(f"/api/v1/tasks/{task_id}/status?wait=30"))
        async with api.events(task_id) as stream:
            (snapshot,) = [event for event in await stream.until("snapshot") if event.type == "snapshot"]
            assert snapshot.data["last_event_id"] is None
        await store.fail(task_id, run, "it broke", "internal")
    assert (waiting.result().status, waiting.result().json["status"]) == (200, "failed")


async def test_streams_pass_over_an_entry_of_a_log_that_cannot_be_read(api: Client, tasks: Tasks, store: Store) -> None:
    first = await tasks.queued()
    ((id, _),) = await raw(store).xrange(KEYS["log"] + "project:film")
    for _ in range(250):
        await raw(store).xadd(KEYS["log"] + "project:film", {"foo": "bar"})
    await raw(store).xadd(KEYS["log"] + "project:film", {"type": "started", "data": "{\n}"})
    await raw(store).xadd(KEYS["log"] + first, {"foo": "bar"})
    second = await tasks.queued()
    await store.cancel(second)
    await store.cancel(first)
    async with api.events("projects/film", last_event_id=id.decode()) as stream:
        events = [await stream.next() for _ in range(3)]
    assert [(event.type, event.data["task_id"]) for event in events if event] == [
        ("queued", second),
        ("cancelled", second),
        ("cancelled", first),
    ]
    async with api.events(first) as stream:
        assert [event.type for event in await stream.rest()] == ["snapshot", "cancelled"]


@pytest.mark.parametrize("value", ["x", "", b"\xff", "nan", "inf", "-1e300", "9" * 500], ids=ascii)
async def test_a_counter_that_cannot_be_read_counts_as_none(api: Client, tasks: Tasks, store: Store, value: str | bytes) -> None:
    await tasks.completed()
    await raw(store).hset(KEYS["priorities"] + "cpu_intensive", mapping=dict.fromkeys("123", value))
    await raw(store).lpush(KEYS["claim_times"] + "cpu_intensive", value, value)
    await raw(store).rpush(KEYS["claim_times"] + "cpu_intensive", value)
    await raw(store).hset(KEYS["sums"], mapping={"generate_image ms": value, "claims passed": value, b"\xff": value})
    await raw(store).hset(KEYS["gpu_ms"], mapping={"film": value, "": value})
    await raw(store).hset(KEYS["totals"], mapping={"completed": value, "failed": value})
    queues = await api.get("/api/v1/queues")
    assert [set(queue["priority_distribution"].values()) for queue in queues.json["queues"]] == [{0}] * 3
    metrics = (await api.get("/api/v1/tasks/metrics")).json
    assert metrics["total_tasks"] == metrics["gpu_seconds"] == 0
    await raw(store).hset(KEYS["sums"], "generate_image tasks", value)
    for path in ("tasks/metrics", "tasks/health", "projects/film", "health"):
        assert (await api.get(f"/api/v1/{path}")).status == 200, path


@pytest.mark.parametrize("score", [1e300, -1e300, float("inf"), float("-inf"), 999999999999999])
async def test_a_time_that_cannot_be_read_stops_no_list(api: Client, tasks: Tasks, store: Store, score: float) -> None:
    task_id = await tasks.failed()
    await tasks.queued()
    row = {
        "worker_id": "w/cpu0", "worker_type": "cpu_intensive", "status": "idle", "current_task_id": None, "gpu_utilization": 0.5,
        "memory_usage": 1, "tasks_completed": 2, "last_heartbeat": "2026-11-29T00:00:00Z", "queues": ["cpu_intensive"], "device": "cpu",
        "memory_total": 2, "temperature": None, "power": None, "models": [], "host": "h", "version": "9",
    }  # fmt: skip
    await raw(store).hset(KEYS["workers"], "w", json.dumps([row]))
    for key, member in (
        ("heartbeat_times", "w"),
        ("dead", task_id),
        ("projects", "film"),
        ("waiting", "x"),
        ("deliveries", f"{task_id}-1"),
    ):
        await raw(store).zadd(KEYS[key] + ("cpu_intensive" if key == "waiting" else ""), {member: score})
    await raw(store).hset(KEYS["task"] + task_id, "deliveries", 1)
    await raw(store).hset(KEYS["delivery"] + f"{task_id}-1", mapping={"kind": "webhook", "state": "pending", "at_ms": "9" * 15})
    paths = ("dead-letters", "projects/film", "workers/status", "health", "queues", "tasks/health", f"tasks/{task_id}/deliveries")
    for path in paths:
        assert (await api.get(f"/api/v1/{path}")).status == 200, path
    assert (await api.get("/api/v1/dead-letters")).json["total"] == 1


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
    await raw(store).zadd(KEYS["heartbeat_times"], {"new": now_ms, "broken": now_ms})
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
        stream.documented = False
        names = [event.type for event in await stream.rest()]
    assert names == ["snapshot", "started", "noted", "failed"]


async def test_a_result_that_cannot_be_read_ends_the_stream_all_the_same(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.completed()
    (entry,) = await raw(store).xrevrange(KEYS["log"] + task_id, count=1)
    await raw(store).xdel(KEYS["log"] + task_id, entry[0])
    damaged = json.dumps({"task_id": task_id, "type": "completed", "result": 7})
    await raw(store).xadd(KEYS["log"] + task_id, {"type": "completed", "data": damaged})
    async with api.events(task_id) as stream:
        stream.documented = False
        names = [event.type for event in await stream.rest()]
    assert names[-1] == "completed"


async def test_a_key_with_a_scope_of_a_newer_version_keeps_those_that_are_known(api: Client, store: Store) -> None:
    key = "a-key-of-a-newer-version"
    blob = msgspec.msgpack.encode({"projects": ["film"], "scopes": ["read", "dream"]})
    await raw(store).hset(KEYS["keys"], mapping={key_hash(key): blob, key_hash("another-key-that-is-broken"): b"\xff"})
    assert (await api.get("/api/v1/projects/film/tasks", key=key)).status == 200
    assert list(await ApiKeys(store.redis).grants()) == [key_hash(key)]


async def test_the_deliveries_of_a_task_are_listed_beside_one_that_cannot_be_read(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = TaskId(await tasks.failed(callback_url="http://10.9.0.1/hook"))
    await raw(store).hset(KEYS["delivery"] + f"{task_id}-1", mapping={"kind": "pigeon", "state": "flying"})
    answer = await api.get(f"/api/v1/tasks/{task_id}/deliveries")
    assert answer.status == 200
    assert [(each["kind"], each["state"]) for each in answer.json["deliveries"]] == [("pigeon", "flying")]
