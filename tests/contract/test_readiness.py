"""Liveness, and readiness to accept and run tasks: correct answers that cost little and reveal nothing internal."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from arq.connections import ArqRedis

from movieq.api import readiness
from movieq.local.embedded import Valkey
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.states import Kind
from tests.arrange import raw
from tests.contract.client import Answer, Client
from tests.contract.conftest import REFUSALS, refuse_writes, served, stopped, take_writes
from tests.contract.test_health_workers import beat, silent
from tests.fleet import eventually

LIVE, READY, HEALTH = "/health/live", "/health/ready", "/health"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check anew for each request, instead of reusing the last answer."""
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)


def failed(answer: Answer) -> dict[str, str]:
    """Return name -> message of the checks that failed."""
    checks = answer.json["checks"]
    assert [check["name"] for check in checks] == ["redis", "storage", "worker"]
    assert all(check["ok"] == (check["message"] == "") for check in checks)
    found = {check["name"]: check["message"] for check in checks if not check["ok"]}
    assert (answer.status, answer.json["status"]) == ((503, "not_ready") if found else (200, "ready"))
    return found


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
async def test_with_redis_and_storage_and_a_worker_it_is_ready(api: Client, store: Store, prefix: str) -> None:
    await beat(store)
    assert failed(await api.get(prefix + READY, key=None)) == {}
    alive = await api.get(prefix + LIVE, key=None)
    assert (alive.status, alive.json["status"]) == (200, "alive")


async def test_without_a_live_worker_it_is_not_ready(api: Client, store: Store) -> None:
    assert "movieq worker" in failed(await api.get(READY, key=None))["worker"]
    await beat(store)
    await silent(store, "w1", 20)
    assert failed(await api.get(READY, key=None)).keys() == {"worker"}


async def test_without_its_storage_it_is_not_ready_and_health_says_why(settings: Settings, store: Store, folder: Path) -> None:
    await beat(store)
    (folder / "no-folder").write_text("a file")
    async with served(msgspec.structs.replace(settings, storage=folder / "no-folder")) as api:
        found = failed(await api.get(READY, key=None))
        told = (await api.get(HEALTH, key=None)).json
    assert found.keys() == {"storage"}
    assert "MOVIEQ_STORAGE" in found["storage"]
    assert (told["status"], told["problems"]) == ("degraded", [found["storage"]])
    assert str(folder) not in found["storage"]


@pytest.mark.parametrize("state", REFUSALS)
async def test_a_redis_that_refuses_writes_is_not_ready_exactly_while_it_refuses_a_submit(
    own: Valkey, away: Client, direct: Any, state: str
) -> None:
    await beat(away.state.store)
    assert failed(await away.get(READY, key=None)) == {}
    await refuse_writes(own, direct, state)
    assert (await away.submit()).status == 503
    found = failed(await away.get(READY, key=None))
    assert found.keys() == {"redis"}
    assert REFUSALS[state] in found["redis"]
    told = await away.get(HEALTH, key=None)
    assert (told.status, told.json["status"], told.json["redis_status"]) == (200, "degraded", "connected")
    assert told.json["problems"] == [found["redis"]]
    alerts = {alert["code"]: alert["message"] for alert in (await away.get("/api/v1/tasks/health")).json["alerts"]}
    assert alerts["redis_refuses_writes"] == found["redis"]
    assert (await away.get(LIVE, key=None)).status == 200
    await take_writes(direct)
    assert (await away.submit()).status == 201
    assert failed(await away.get(READY, key=None)) == {}


@pytest.mark.parametrize("state", ["hangs", "is away"])
async def test_without_redis_it_lives_and_is_not_ready(own: Valkey, away: Client, state: str) -> None:
    if state == "is away":
        await asyncio.to_thread(own.kill)
        answers = [await away.get(path, key=None) for path in (LIVE, READY, HEALTH)]
    else:
        with stopped(own):
            answers = [await away.get(path, key=None) for path in (LIVE, READY, HEALTH)]
    assert [answer.status for answer in answers] == [200, 503, 503]
    assert failed(answers[1]).keys() == {"redis", "worker"}
    assert answers[2].json["status"] == "unhealthy"
    assert answers[2].json["problems"] == [failed(answers[1])["redis"]]
    for inside in (str(own.socket), str(own.folder), own.url, "127.0.0.1", "Errno"):
        assert all(inside.encode() not in answer.body for answer in answers)


async def test_a_storage_that_hangs_is_asked_by_one_thread_and_holds_up_nobody(
    settings: Settings, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await beat(store)
    monkeypatch.setattr(readiness, "CHECK_S", 0.1)
    os.mkfifo(folder / "hangs")

    async def usable() -> bool:
        if (folder / "hangs").exists():
            await asyncio.to_thread((folder / "hangs").read_bytes)
        return True

    async with served(settings) as api:
        api.state.storage.usable = usable  # type: ignore[method-assign]  # a file system that hangs cannot be had here
        try:
            for _ in range(30):  # more than there are threads
                assert "does not respond" in failed(await api.get(READY, key=None))["storage"]
            assert await asyncio.wait_for(asyncio.to_thread(lambda: True), 60)
        finally:
            pipe = os.open(folder / "hangs", os.O_WRONLY)
            (folder / "hangs").unlink()
            os.close(pipe)
        await eventually(lambda: ready(api))


async def ready(api: Client) -> bool:
    return (await api.get(READY, key=None)).status == 200


async def test_however_often_it_is_asked_while_its_checks_are_fresh_it_writes_once(
    quiet_loop: None, redis: ArqRedis, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "FRESH_S", 3600.0)
    async with served(settings) as api:
        await beat(store)
        await raw(store).config_resetstat()
        for _ in range(10):
            await asyncio.gather(*(api.get(path, key=None) for path in (READY, HEALTH, LIVE) for _ in range(10)))
        stats = await raw(store).info("commandstats")
    assert stats["cmdstat_set"]["calls"] == 1
    assert stats["cmdstat_zcard"]["calls"] == 2 * len(Kind), "the lengths of the queues, and of those without workers"


async def test_health_sees_what_has_changed_when_its_cached_answer_is_old(api: Client, store: Store) -> None:
    assert (await api.get(HEALTH, key=None)).json["queue_sizes"][Kind.CPU_INTENSIVE] == 0
    await api.submit()
    seen = (await api.get(HEALTH, key=None)).json
    assert (seen["status"], seen["queue_sizes"][Kind.CPU_INTENSIVE], seen["worker_count"]) == ("degraded", 1, 0)
    await beat(store)
    seen = (await api.get(HEALTH, key=None)).json
    assert (seen["status"], seen["worker_count"]) == ("healthy", 1)


async def test_a_redis_that_evicts_is_a_problem_while_it_does(own: Valkey, away: Client, direct: Any, settings: Settings) -> None:
    async def problems(api: Client) -> list[str]:
        told = (await api.get(HEALTH, key=None)).json
        alerts = (await api.get("/api/v1/tasks/health")).json["alerts"]
        found: list[str] = told["problems"]
        assert found == [alert["message"] for alert in alerts if alert["code"] == "redis_evicts"]
        assert told["status"] == ("degraded" if found else "healthy")
        return found

    await beat(away.state.store)
    assert await problems(away) == []
    await direct.config_set("maxmemory-policy", "allkeys-lru")
    (problem,) = await problems(away)
    assert "allkeys-lru" in problem
    assert "noeviction" in problem
    assert failed(await away.get(READY, key=None)) == {}
    async with served(msgspec.structs.replace(settings, redis_url=own.url, allow_eviction=True)) as allowed:
        assert await problems(allowed) == []
    await direct.config_set("maxmemory-policy", "noeviction")
    assert await problems(away) == []
    await direct.config_set("maxmemory-policy", "allkeys-lru")
    await direct.acl_setuser("default", enabled=True, nopass=True, commands=["-info"])
    assert await problems(away) == []


async def test_a_memory_that_is_nearly_full_is_an_alert(own: Valkey, away: Client, direct: Any) -> None:
    async def codes() -> set[str]:
        return {alert["code"] for alert in (await away.get("/api/v1/tasks/health")).json["alerts"]}

    assert "redis_nearly_full" not in await codes()
    used = (await direct.info("memory"))["used_memory"]
    await direct.config_set("maxmemory", 2 * used)
    assert "redis_nearly_full" not in await codes()
    await direct.config_set("maxmemory", int(used * 1.02))
    assert "redis_nearly_full" in await codes()
