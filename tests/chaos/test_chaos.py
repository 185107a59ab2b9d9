"""Chaos in the size that CI runs, and proof that its checker can fail."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import aiohttp
import pytest

import movieq
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.states import TaskId
from tests.chaos.farm import Farm
from tests.chaos.run import KEY, Driver, Findings, all_ended, chaos, check
from tests.fleet import eventually
from tests.service import Receiver, serving


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_done_twice_while_everything_is_killed(tmp_path: Path) -> None:
    found = asyncio.run(chaos(tmp_path, tasks=160, per_second=8.0, seed=7))
    assert found.named == []
    assert found.accepted == found.completed + found.failed + found.cancelled >= 160
    assert min(found.poisoned, found.strangers, found.deleted) > 0
    assert found.recoveries > 2


async def with_farm(farm: Farm, work: str, folder: Path) -> Findings:
    """A few tasks, one deed against them, and what the checker makes of it."""
    farm.start(MOVIEQ_API_KEYS=KEY)
    client = connect(farm.valkey.url, patient=True)
    store = Store(client)
    hook = Receiver()
    try:
        async with serving({"/hook": hook.handle}, "POST") as url:
            driver = Driver(farm, 8, 100.0, seed=1)
            if work == "no aof":
                await client.config_set("appendonly", "no")
                await driver.submit_all(f"{url}/hook")
                await farm.restart_redis(hard=True)
                farm.valkey.start()
                await all_ended(store, driver.accepted, 5)
            else:
                await zombie(farm, store, driver, f"{url}/hook")
                await all_ended(store, driver.accepted, 60)
            return await check(store, driver, hook, folder / "media")
    finally:
        await store.redis.aclose()
        farm.stop()


async def zombie(farm: Farm, store: Store, driver: Driver, callback: str) -> None:
    """A worker is stopped in the middle of a long task until another has finished it, and then goes on."""
    data = {"prompt": "a lamp", "resolution": "640x360", "duration": 30, "fps": 24}
    body = {"project_id": "film", "task_type": "generate_video", "task_data": data, "callback_url": callback, "metadata": {"number": 1}}
    async with (
        aiohttp.ClientSession(headers={"X-API-Key": KEY}) as session,
        session.post(f"{farm.urls[0]}/api/v1/tasks/submit", json=body) as answer,
    ):
        task_id = TaskId((await answer.json())["task_id"])
    driver.accepted[task_id] = data

    async def has_begun() -> bool:
        task = await Queries(store.redis).task(task_id)
        return task is not None and task.stage is not None

    await eventually(has_begun)
    (holder,) = await store.redis.keys(f"{KEYS['worker_tasks']}*")
    pid = int(holder.decode().rsplit("-", 2)[1])
    stopped = next(process for process in farm.processes.values() if process.pid == pid)
    stopped.send_signal(signal.SIGSTOP)
    await all_ended(store, [task_id], 60)
    stopped.send_signal(signal.SIGCONT)

    def is_over() -> bool:
        log = (farm.folder / "log").read_text()
        lost = any(word in line for line in log.splitlines() for word in ("run_lost", "run_stopped") if task_id in line)
        return lost or log.count('"message":"complete"') >= 2

    await eventually(is_over)


def test_the_checker_reports_what_is_lost_without_the_append_only_file(tmp_path: Path) -> None:
    found = asyncio.run(with_farm(Farm(tmp_path), "no aof", tmp_path))
    assert found.lost > 0


@pytest.mark.slow
@pytest.mark.parametrize("fence", [True, False])
def test_the_checker_reports_what_is_done_twice_without_the_fence_and_nothing_with_it(tmp_path: Path, fence: bool) -> None:
    root = Path(movieq.__file__).parents[1]
    for package in ("movieq", "workers"):
        shutil.copytree(root / package, tmp_path / "source" / package)
    if not fence:
        fenced = tmp_path / "source/movieq/queue/lua/includes/fence.lua"
        holds = "return t ~= nil and t.status == 'processing' and t.run == run"
        assert holds in fenced.read_text()
        fenced.write_text(fenced.read_text().replace(holds, "return t ~= nil"))
    (tmp_path / "farm").mkdir()
    found = asyncio.run(with_farm(Farm(tmp_path / "farm", tmp_path / "source"), "zombie", tmp_path / "farm"))
    assert (found.doubled > 0) is not fence
    assert found.lost == 0
