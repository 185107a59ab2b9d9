"""Redis restarts, dies, hangs, is full, read-only or without its replica during a task: every accepted task ends, and only once.

Meanwhile the API answers 503, and workers wait. Afterwards they go on, and the run is unharmed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.tasks.states import EventType, TaskId
from tests.arrange import raw
from tests.fleet import Fleet, Process, eventually, fleet
from tests.service import Service, receiver

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
RUNNING: dict[str, Any] = {"prompt": "a way up the stairs", "duration": 4, "fps": 24, "resolution": "480x270"}
"""A task that takes a few seconds."""


@asynccontextmanager
async def busy(folder: Path) -> AsyncIterator[tuple[Fleet, Service, Process, TaskId]]:
    """Yield an installation in the middle of a task, with a Redis that loses no answered write; finally await the task's webhook."""
    async with fleet(folder, appendfsync="always") as installation, receiver() as hook:
        api, worker = await asyncio.gather(installation.api(), installation.worker())
        task_id = TaskId(await api.submit("generate_video", RUNNING, callback_url=hook.url))
        await api.until(task_id, "stage", "frames")
        yield installation, api, worker, task_id
        ((_, body),) = await hook.wait_for(1)
        assert (json.loads(body)["task_id"], json.loads(body)["status"]) == (task_id, "completed")


async def submitted(api: Service) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Submit with the same Idempotency-Key each time; return status, headers and body of the answer."""
    body = {"project_id": "film", "task_type": "generate_image", "task_data": SMALL}
    async with (
        aiohttp.ClientSession(headers={"X-API-Key": api.key, "Idempotency-Key": "the-same"}) as session,
        session.post(f"{api.url}/api/v1/tasks/submit", json=body, timeout=aiohttp.ClientTimeout(total=60)) as answer,
    ):
        return answer.status, dict(answer.headers), await answer.json()


async def refused(api: Service) -> None:
    """Assert that this submit is answered with a 503 and a Retry-After."""
    status, headers, answer = await submitted(api)
    assert (status, answer["error"], answer["retryable"]) == (503, "unavailable", True)
    assert int(headers["Retry-After"]) > 0


async def said_again(api: Service) -> str:
    """Repeat this submit until Redis accepts it; return the id of the task."""
    answers: list[dict[str, Any]] = []

    async def taken() -> bool:
        status, _, answer = await submitted(api)
        assert status in (200, 201, 503), answer
        answers.append(answer)
        return status != 503

    await eventually(taken)
    return str(answers[-1]["task_id"])


async def noticed(worker: Process) -> None:
    """Wait until the worker has noticed that Redis is away."""
    before = worker.times_logged("redis_away")
    await eventually(lambda: worker.times_logged("redis_away") > before)


async def accepted(api: Service, count: int = 1) -> list[str]:
    """Submit tasks; return their ids."""
    return [await api.submit("generate_image", SMALL, project=f"other{number}") for number in range(count)]


async def all_ended_once(installation: Fleet, api: Service, worker: Process, task_ids: list[str]) -> None:
    """Assert that every task completed in its first attempt, once by its log, and that nothing else was rendered."""
    for task_id in task_ids:
        status = await api.ended(task_id)
        assert (status["status"], status["attempt"]) == ("completed", 1), (status, worker.log.read_text()[-2000:])
        log = await Queries(installation.store.redis).log_after(TaskId(task_id), None)
        types = [entry.type for entry in log]
        assert types.count(EventType.STARTED) == types.count(EventType.COMPLETED) == 1
        shown = [json.loads(entry.data)["progress"] for entry in log]
        assert shown == sorted(shown)
    made_at_all = (await Queries(installation.store.redis).totals(None)).values()
    outputs = [path for path in (installation.folder / "media").rglob("output.*") if path.is_file()]
    assert (sum(made_at_all), len(outputs)) == (len(task_ids), len(task_ids))
    assert worker.alive
    assert worker.times_logged("child_ready") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["restarted", "killed"])
async def test_a_redis_that_ends_and_comes_back_has_lost_nothing_that_was_accepted(folder: Path, signum: signal.Signals) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 5)]
        assert installation.valkey.pid is not None
        os.kill(installation.valkey.pid, signum)
        await eventually(lambda: not installation.valkey.alive())
        await refused(api)
        await noticed(worker)
        await refused(api)
        await asyncio.to_thread(installation.valkey.start)
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])


async def test_a_redis_that_hangs_for_a_while_costs_a_running_task_nothing(folder: Path) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 2)]
        assert installation.valkey.pid is not None
        os.kill(installation.valkey.pid, signal.SIGSTOP)
        try:
            await refused(api)
            await noticed(worker)
        finally:
            os.kill(installation.valkey.pid, signal.SIGCONT)
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])


async def test_a_redis_that_is_out_of_memory_refuses_new_tasks_only(folder: Path) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 2)]
        await raw(installation.store).config_set("maxmemory", 1)
        await refused(api)
        await all_ended_once(installation, api, worker, task_ids)  # what is there is still worked off: that makes room
        await refused(api)
        await raw(installation.store).config_set("maxmemory", 0)
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])


async def test_connections_that_are_cut_again_and_again_cost_a_running_task_nothing(folder: Path) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 2)]
        redis = raw(installation.store)

        async def connected() -> bool:
            return all([len(await redis.client_list(_type=kind)) >= before[kind] for kind in kinds])

        kinds = ("normal", "pubsub")
        before = {kind: min(2, len(await redis.client_list(_type=kind))) for kind in kinds}
        for _ in range(10):
            for kind in kinds:
                await redis.client_kill_filter(_type=kind, skipme=True)
            await eventually(connected)
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])


async def test_a_fault_of_a_script_costs_a_try_and_holds_no_task(folder: Path) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        await raw(installation.store).set(KEYS["media"], "no sorted set")
        retrying = await api.until(task_id, "event", "retrying")
        assert 1.5 <= retrying["retry_in"] <= 2.5
        await raw(installation.store).delete(KEYS["media"])
        done = await api.until(task_id, "status", "completed")
        assert done["attempt"] == 2
        assert worker.alive


@pytest.mark.parametrize("state", ["read-only", pytest.param("without its replica", marks=pytest.mark.slow)])
async def test_a_redis_that_takes_no_writes_for_a_while_is_waited_for(folder: Path, state: str) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 2)]
        redis = raw(installation.store)
        await (redis.replicaof("127.0.0.1", 1) if state == "read-only" else redis.config_set("min-replicas-to-write", 1))
        await refused(api)
        await noticed(worker)
        await refused(api)
        assert (await api.call("GET", f"/tasks/{task_id}/status"))[1]["status"] == "processing"
        await (redis.replicaof("NO", "ONE") if state == "read-only" else redis.config_set("min-replicas-to-write", 0))
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])


@pytest.mark.slow
@pytest.mark.parametrize("state", ["killed", "read-only"])
async def test_an_outage_that_is_longer_than_a_lease_costs_a_run_nothing(folder: Path, state: str) -> None:
    async with busy(folder) as (installation, api, worker, task_id):
        task_ids = [task_id, *await accepted(api, 2)]
        if state == "killed":
            await asyncio.to_thread(installation.valkey.kill)
        else:
            await raw(installation.store).replicaof("127.0.0.1", 1)
        for _ in range(30 if state == "killed" else 15):
            await refused(api)
            await asyncio.sleep(1)  # the outage lasts
        if state == "killed":
            await asyncio.to_thread(installation.valkey.start)
        else:
            await raw(installation.store).replicaof("NO", "ONE")
        await all_ended_once(installation, api, worker, [*task_ids, await said_again(api)])
