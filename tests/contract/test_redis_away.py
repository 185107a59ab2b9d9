"""Redis is away, hangs, refuses writes or returns: the API answers 503, and never worse. A fault of a script is another matter."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from redis.exceptions import ResponseError

from movieq.local.embedded import Valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.states import TaskId
from tests.arrange import new_task, raw
from tests.contract.client import BODY, Answer, Client
from tests.contract.conftest import REFUSALS, refuse_writes, served, stopped, take_writes
from tests.contract.test_uploads import image, stored
from tests.fleet import eventually


async def ask(api: Client, method: str, path: str, data: bytes | None = None) -> Answer:
    """Send a request with a JSON body; return the answer."""
    return await api.ask(method, f"/api/v1{path}", data=data, headers={"Content-Type": "application/json"})


async def everything(api: Client, task_id: str) -> dict[str, Answer]:
    """Call every operation; return the answer of each."""
    asked = [
        ("POST", "/tasks/submit", json.dumps(BODY).encode()),
        ("GET", f"/tasks/{task_id}/status", None),
        ("GET", f"/tasks/{task_id}/status?wait=60", None),
        ("DELETE", f"/tasks/{task_id}/cancel", None),
        ("POST", f"/tasks/{task_id}/retry", None),
        ("GET", f"/tasks/{task_id}/events", None),
        ("GET", "/projects/film", None),
        ("GET", "/projects/film/tasks", None),
        ("POST", "/projects/film/uploads", image("PNG")),
        ("GET", "/workers/status", None),
    ]
    answers = await asyncio.gather(*(ask(api, *each) for each in asked))
    return {f"{method} {path}": answer for (method, path, _), answer in zip(asked, answers, strict=True)}


def unavailable(answers: dict[str, Answer]) -> None:
    for operation, answer in answers.items():
        assert (answer.status, answer.error, answer.json["retryable"]) == (503, "unavailable", True), operation
        assert int(answer.headers["Retry-After"]) > 0, operation


async def test_without_redis_every_operation_is_a_503(own: Valkey, away: Client) -> None:
    task_id = (await away.submit()).json["task_id"]
    await asyncio.to_thread(own.kill)
    unavailable(await everything(away, task_id))


async def test_with_a_redis_that_hangs_every_operation_is_a_503(own: Valkey, away: Client) -> None:
    task_id = (await away.submit()).json["task_id"]
    with stopped(own):
        unavailable(await everything(away, task_id))


@pytest.mark.parametrize("state", REFUSALS)
async def test_a_redis_that_takes_no_writes_refuses_them_with_a_503_and_answers_reads(
    own: Valkey, away: Client, direct: Any, state: str
) -> None:
    task_id = (await away.submit()).json["task_id"]
    await refuse_writes(own, direct, state)
    writes = {
        "submit": await ask(away, "POST", "/tasks/submit", json.dumps(BODY).encode()),
        "retry": await ask(away, "POST", f"/tasks/{task_id}/retry"),
        "upload": await ask(away, "POST", "/projects/film/uploads", image("PNG")),
    }
    unavailable(writes)
    assert all(REFUSALS[state] in answer.message for answer in writes.values())
    assert (await away.status(task_id))["status"] == "queued"
    cancelled = await away.delete(f"/api/v1/tasks/{task_id}/cancel")
    assert cancelled.status == (200 if state == "out of memory" else 503)  # what ends a task makes room
    await take_writes(direct)
    assert (await away.submit()).status == 201


async def test_a_replica_that_has_lost_its_primary_and_answers_nothing_is_a_503(away: Client, direct: Any) -> None:
    task_id = (await away.submit()).json["task_id"]
    await direct.config_set("replica-serve-stale-data", "no")
    await direct.replicaof("127.0.0.1", 1)
    unavailable(await everything(away, task_id))


async def test_a_redis_that_is_busy_with_a_script_is_a_503(own: Valkey, away: Client, direct: Any) -> None:
    task_id = (await away.submit()).json["task_id"]
    await direct.config_set("busy-reply-threshold", 1)
    busy = asyncio.create_task(direct.execute_command("EVAL", "while true do end", 0))
    other: Any = connect(own.url, patient=True)

    async def is_busy() -> bool:
        try:
            return not await other.ping()
        except ResponseError as error:
            return str(error).startswith("BUSY")

    await eventually(is_busy)
    await other.aclose()
    await other.connection_pool.disconnect()
    unavailable(await everything(away, task_id))
    await direct.script_kill()
    await asyncio.wait({busy})
    assert "Script killed" in str(busy.exception())
    assert (await away.submit()).status == 201


async def test_a_fault_of_a_script_is_a_500_and_is_logged_with_its_traceback(
    away: Client, direct: Any, logged: pytest.LogCaptureFixture
) -> None:
    assert (await away.submit()).status == 201
    await direct.set(KEYS["projects"], "no list")
    answer = await away.submit()
    assert (answer.status, answer.error) == (500, "internal")
    assert "Retry-After" not in answer.headers
    (record,) = [record for record in logged.records if "request_broke" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert "Traceback" in record.getMessage()
    assert "WRONGTYPE" in record.getMessage()
    await direct.delete(KEYS["projects"])
    assert (await away.submit()).status == 201


async def test_without_redis_health_is_unhealthy_and_says_so_with_a_503(own: Valkey, away: Client) -> None:
    await asyncio.to_thread(own.kill)
    answer = await away.get("/health", key=None)
    assert (answer.status, answer.json["status"], answer.json["redis_status"]) == (503, "unhealthy", "unavailable")
    assert answer.json["queue_sizes"].keys() == {"gpu_heavy", "gpu_medium", "cpu_intensive"}


async def test_without_redis_what_is_wrong_is_still_refused_for_what_it_is(own: Valkey, away: Client) -> None:
    await asyncio.to_thread(own.kill)
    answers = [
        await away.get("/x"),
        await away.get("/api/v1/tasks/submit"),
        await away.get("/api/v1/workers/status", key=None),
        await away.get("/api/v1/tasks/x/status"),
        await away.submit_bytes(b"{"),
    ]
    assert [answer.status for answer in answers] == [404, 405, 401, 400, 400]


async def test_an_upload_that_could_not_be_noted_leaves_no_file(own: Valkey, away: Client, settings: Settings) -> None:
    await asyncio.to_thread(own.kill)
    assert (await away.post("/api/v1/projects/film/uploads", data=image("PNG"))).status == 503
    assert stored(settings) == []


async def test_when_redis_is_back_everything_goes_on_and_nothing_accepted_is_lost(own: Valkey, away: Client) -> None:
    ids = [(await away.submit()).json["task_id"] for _ in range(20)]
    await asyncio.to_thread(own.kill)
    assert (await away.submit()).status == 503
    await asyncio.to_thread(own.start)

    async def healthy() -> bool:
        return (await away.get("/health")).status == 200

    await eventually(healthy)
    assert {(await away.status(task_id))["status"] for task_id in ids} == {"queued"}
    assert (await away.submit()).status == 201


async def test_a_wait_that_redis_leaves_is_answered_with_a_503(own: Valkey, away: Client) -> None:
    task_id = (await away.submit()).json["task_id"]
    waiting = asyncio.create_task(away.get(f"/api/v1/tasks/{task_id}/status?wait=1"))
    await eventually(lambda: away.state.hub.watchers() == 1)
    await asyncio.to_thread(own.kill)
    assert (await waiting).status == 503


@pytest.mark.parametrize("turns", range(12))
async def test_a_read_is_cancelled_at_whatever_moment(store: Store, turns: int) -> None:
    task_id = (await store.submit(new_task())).task_id
    for read in (
        Queries(store.redis).log_after(task_id, None),
        Queries(store.redis).log_state(task_id),
        Queries(store.redis).tasks([task_id]),
        Queries(store.redis).task(TaskId("x")),
    ):
        reading = asyncio.ensure_future(read)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled() == cancelled
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.task_id == task_id


async def test_a_script_that_fails_is_logged_as_that_and_stops_nothing_else(
    settings: Settings, store: Store, logged: pytest.LogCaptureFixture
) -> None:
    await raw(store).set(KEYS["delayed"], "no list of tasks")
    async with served(settings) as api:
        answer = await api.submit()
        await eventually(lambda: "script_failed" in logged.text)
        assert (await api.get(f"/api/v1/tasks/{answer.json['task_id']}/status")).status == 200
        await raw(store).delete(KEYS["delayed"])
    assert "redis_away" not in logged.text
    assert logged.text.count("script_failed") == 1
    assert "WRONGTYPE" in logged.text
