"""GPU time of runs: it is counted for each task over all its runs, however they end, for its project and for the installation.

The runs here only report that they have a GPU; the scripts cannot tell the difference.
"""

from __future__ import annotations

from typing import Any

import pytest

from movieq.gpus import Gpu
from movieq.queue import store as store_module
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.states import Kind, ProjectId, RunToken, TaskId
from tests.arrange import claim, later, new_task, now_ms, raw, result, running
from workers import running as running_module
from workers.running import Running
from workers.supervisor import Child

PROJECT = ProjectId("film")


class Clock:
    """A clock that the test moves."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


async def cost(store: Store, task_id: TaskId) -> tuple[float, float, float]:
    """Return the GPU seconds of the task, of its project and of all projects."""
    task, project = await Queries(store.redis).task(task_id), await Queries(store.redis).project(PROJECT)
    assert task is not None
    assert project is not None
    return task.gpu_ms / 1000, project.gpu_seconds, await Queries(store.redis).gpu_seconds(None)


async def say(store: Store, task_id: TaskId, run: RunToken, ms: float, share: float) -> None:
    """Report that the run has used this much GPU time, and now has this share of a GPU."""
    await store.report(task_id, run, 0.1, "generating_image", gpu=(ms, share))


async def elapsed(store: Store, task_id: TaskId, ms: int) -> None:
    """Move the run's last report back by this time."""
    await raw(store).hincrby(KEYS["task"] + task_id, "gpu_at_ms", -ms)


async def complete(store: Store, task_id: TaskId, run: RunToken) -> None:
    await say(store, task_id, run, 5000, 0)
    await elapsed(store, task_id, 60_000)  # an upload takes its time, and no GPU
    await store.complete(task_id, run, result())


async def fail(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.fail(task_id, run, "it broke", "invalid_input")


async def give_back(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")


async def cancel(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.cancel(task_id)


async def fall_silent(store: Store, task_id: TaskId, run: RunToken) -> None:
    await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {task_id: 1})
    assert (await store.tidy()).reaped == 1


async def run_late(store: Store, task_id: TaskId, run: RunToken) -> None:
    await raw(store).zadd(KEYS["deadlines"], {task_id: 1})
    assert (await store.tidy()).past_deadline == 1


@pytest.mark.parametrize("end", [complete, fail, give_back, cancel, fall_silent, run_late])
async def test_a_run_costs_what_it_had_of_a_gpu_however_it_ends(store: Store, end: Any) -> None:
    task_id, run = await running(store)
    begun_ms = await now_ms(store)
    await say(store, task_id, run, 5000, 0.5)
    assert (await cost(store, task_id))[1:] == (0, 0), "the sums are of runs that ended"
    await end(store, task_id, run)
    of_task, of_project, of_all = await cost(store, task_id)
    assert 5.0 <= of_task <= 5.0 + 0.5 * (await now_ms(store) - begun_ms + 1) / 1000
    assert of_project == of_all == pytest.approx(of_task, abs=0.001)


async def test_what_a_run_has_since_its_last_word_counts_by_its_share_of_the_batch(store: Store) -> None:
    for share in (1.0, 0.25):
        task_id, run = await running(store)
        begun_ms = await now_ms(store)
        await say(store, task_id, run, 0, share)
        await elapsed(store, task_id, 60_000)
        await store.cancel(task_id)
        spent = (await cost(store, task_id))[0]
        assert 60 * share <= spent <= share * (60 + (await now_ms(store) - begun_ms + 1) / 1000)


async def test_every_attempt_of_a_task_counts(store: Store) -> None:
    task_id, run = await running(store)
    await say(store, task_id, run, 1000, 0)
    await give_back(store, task_id, run)
    (again,) = await claim(store)
    assert (await cost(store, task_id))[0] == 1
    await say(store, task_id, again.run, 2000, 0)
    await fail(store, task_id, again.run)
    await store.retry(task_id)
    (third,) = await claim(store)
    await say(store, task_id, third.run, 4000, 0)
    await store.complete(task_id, third.run, result())
    assert await cost(store, task_id) == (7, 7, 7)


async def test_a_verb_said_again_is_not_paid_again(store: Store) -> None:
    task_id, run = await running(store)
    for _ in range(3):
        await say(store, task_id, run, 1000, 0)
    for _ in range(2):
        await store.complete(task_id, run, result())
    assert await cost(store, task_id) == (1, 1, 1)


async def test_a_run_that_comes_back_after_its_lease_was_over_is_paid_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEASE_MS", 1)
    task_id, run = await running(store)
    await say(store, task_id, run, 3000, 1)
    await fall_silent(store, task_id, run)
    assert (await cost(store, task_id))[1] >= 3
    await say(store, task_id, run, 4000, 0)
    await store.complete(task_id, run, result())
    assert await cost(store, task_id) == (4, 4, 4)


async def test_the_time_between_a_lease_that_was_over_and_its_return_counts(store: Store) -> None:
    task_id, run = await running(store)
    await say(store, task_id, run, 0, 1)
    await fall_silent(store, task_id, run)
    await elapsed(store, task_id, 60_000)
    begun = await cost(store, task_id)
    await store.complete(task_id, run, result())
    assert (await cost(store, task_id))[0] >= begun[0] + 60


async def test_a_run_on_a_cpu_costs_nothing(store: Store) -> None:
    task_id, run = await running(store)
    await store.report(task_id, run, 0.1, "generating_image")
    await store.complete(task_id, run, result())
    assert await cost(store, task_id) == (0, 0, 0)
    assert not await raw(store).exists(KEYS["gpu_ms"])


async def test_projects_are_counted_apart(store: Store) -> None:
    for project, ms in (("film", 1000), ("other", 2000)):
        task_id, run = await running(store, project=project)
        await say(store, task_id, run, ms, 0)
        await store.complete(task_id, run, result())
    assert [await Queries(store.redis).gpu_seconds(projects) for projects in (["film"], ["other"], ["film", "other", "new"], [], None)] == [
        1,
        2,
        3,
        0,
        3,
    ]


async def test_with_its_last_task_a_project_is_forgotten_and_the_installations_sum_stays(store: Store) -> None:
    task_id, run = await running(store)
    await say(store, task_id, run, 1000, 0)
    await store.complete(task_id, run, result())
    await later(store)
    await store.sweep(0)
    assert await Queries(store.redis).gpu_seconds(["film"]) == 0
    assert await Queries(store.redis).gpu_seconds(None) == 1


@pytest.mark.parametrize("gpu", [Gpu("cuda:0", "GPU-1"), None])
async def test_a_worker_counts_while_its_child_has_a_gpu(store: Store, gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(running_module, "time", clock)
    await store.submit(new_task())
    (claimed,) = await claim(store)
    child = Child("gpu0", (Kind.GPU_HEAVY,), gpu, step_timeout_s=1)
    held = Running(claimed, child, child.slots.reserve([claimed.task.task_id]))
    assert held.gpu is None, "its inputs are fetched first"
    for share in (0.5, 1.0, 0.0):
        held.use_gpu(share)
        clock.now_s += 10
    assert held.gpu == ((15_000, 0) if gpu else None)
