"""`movieq doctor --repair` finds and reports whatever was deleted by hand, and repairs it with --apply; then every task ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from movieq.local.embedded import Valkey
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.repair import inconsistencies
from movieq.queue.store import Store
from movieq.tasks.states import Kind, TaskStatus
from tests.arrange import KEY_FLOW, claim, contents, new_task, raw, result
from tests.integration.test_damage import busy, put


async def test_an_installation_in_order_has_no_inconsistencies(store: Store) -> None:
    await busy(store)
    await raw(store).delete("runs", "reaped_run")
    assert [each async for each in inconsistencies(store, apply=False)] == []


async def test_looking_changes_nothing(store: Store) -> None:
    keys = await busy(store)
    for missing in keys:
        await put(store, {key: value for key, value in keys.items() if key != missing})
        before = await contents(store)
        async for _ in inconsistencies(store, apply=False):
            pass
        assert await contents(store) == before, missing


async def test_what_was_mended_is_in_order(store: Store) -> None:
    keys = await busy(store)
    for missing in keys:
        await put(store, {key: value for key, value in keys.items() if key != missing})
        async for _ in inconsistencies(store, apply=True):
            pass
        left = [each.text async for each in inconsistencies(store, apply=False)]
        assert [text for text in left if "parameters" not in text] == [], missing  # what is gone for good is only named


@pytest.mark.parametrize("name", ["waiting", "virtual_times", "kinds", "running", "deadlines", "index", "deliveries", "totals", "projects"])
async def test_every_task_ends_after_a_list_was_lost_and_mended(store: Store, name: str) -> None:
    places = (("film", KEY_FLOW), ("other", KEY_FLOW), ("film", ""))
    tasks = [new_task(project, flow=flow, callback_url="http://127.0.0.1:1/") for project, flow in places]
    for task in tasks:
        await store.submit(task)
    await claim(store)
    await store.cancel(tasks[1].task_id)
    for key in await raw(store).keys(KEYS[name] + "*"):
        await raw(store).delete(key)
    assert [each.text async for each in inconsistencies(store, apply=True)] != []
    await raw(store).zadd(KEYS["running"] + "cpu_intensive", {tasks[0].task_id: 1}, xx=True)  # its worker falls silent
    for _ in range(3):
        await store.tidy()
        await raw(store).delete(KEYS["leases_paused"])
        for claimed in await claim(store):
            await store.complete(claimed.task.task_id, claimed.run, result())
    states = [task.status for task in await Queries(store.redis).tasks([task.task_id for task in tasks])]
    assert set(states) == {TaskStatus.COMPLETED, TaskStatus.CANCELLED}
    assert await raw(store).zcard(KEYS["deliveries"]) == 3
    assert await Queries(store.redis).queue_sizes() == dict.fromkeys(Kind, 0)


async def test_counters_are_counted_again(store: Store) -> None:
    await store.submit(new_task())
    await raw(store).hset(KEYS["totals"], "queued", 7)
    await raw(store).hset(KEYS["priorities"] + "cpu_intensive", "2", -3)
    assert [each.text async for each in inconsistencies(store, apply=True)] == [
        "queued tasks are counted as 7 but are 1",
        "waiting tasks of cpu_intensive with priority 2 are counted as -3 but are 1",
    ]
    assert [each async for each in inconsistencies(store, apply=False)] == []


def movieq(folder: Path, server: Valkey, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOVIEQ_REDIS_URL": server.url}
    command = [sys.executable, "-m", "movieq.cli", "doctor", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


async def test_the_command_lists_and_then_mends(store: Store, server: Valkey, tmp_path: Path) -> None:
    task = new_task()
    await store.submit(task)
    await raw(store).delete(KEYS["waiting"] + "cpu_intensive:film")
    looked = movieq(tmp_path, server, "--repair")
    assert (looked.returncode, looked.stdout) == (
        1,
        f"task {task.task_id} is in only one of the two lists of its queue\n1 inconsistency; to repair: movieq doctor --repair --apply\n",
    )
    mended = movieq(tmp_path, server, "--repair", "--apply")
    assert (mended.returncode, mended.stdout.splitlines()[-1]) == (0, "1 inconsistency repaired")
    assert movieq(tmp_path, server, "--repair").stdout == "records and lists agree\n"
    assert [each.task.task_id for each in await claim(store)] == [task.task_id]
    assert "--apply needs --repair" in movieq(tmp_path, server, "--apply").stderr
