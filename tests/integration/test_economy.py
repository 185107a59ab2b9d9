"""How claims save GPU time: they prefer the loaded model, and claim a batch at once; and they stay fair."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Claimed, NewTask, Slot, Store
from movieq.tasks.states import Kind, RunToken, TaskId, TaskStatus
from tests.arrange import new_task, raw, result

_nonces = itertools.count()
SDXL = Slot((Kind.GPU_MEDIUM,), ("sdxl",))


def gpu_task(model: str, project: str = "film", **fields: Any) -> NewTask:
    """Return a task for this model."""
    return new_task(project, kind=Kind.GPU_MEDIUM, engine="diffusers", model=model, **fields)


async def submitted(store: Store, *tasks: NewTask) -> list[TaskId]:
    """Submit the tasks; return their ids in order."""
    return [(await store.submit(task)).task_id for task in tasks]


async def claimed(store: Store, *slots: Slot, **options: Any) -> list[Claimed]:
    """Claim for these slots."""
    return await store.claim("w1", f"nonce{next(_nonces)}", slots, **options)


async def ids(store: Store, *slots: Slot, **options: Any) -> list[TaskId]:
    """Claim for these slots; return the ids of the tasks."""
    return [each.task.task_id for each in await claimed(store, *slots, **options)]


# ── Affinity ──


async def test_a_task_whose_model_is_loaded_goes_first_within_its_project(store: Store) -> None:
    flux, other, sdxl = await submitted(store, gpu_task("flux"), gpu_task("flux"), gpu_task("sdxl"))
    assert await ids(store, SDXL) == [sdxl]
    assert await Queries(store.redis).passed_over() == 1
    assert await ids(store, SDXL, SDXL) == [flux, other], "there is no other for it"
    assert await Queries(store.redis).passed_over() == 1


async def test_another_project_does_not_wait_for_a_model_that_is_loaded(store: Store) -> None:
    (first,) = await submitted(store, gpu_task("flux", "a"))
    await submitted(store, gpu_task("sdxl", "b"), gpu_task("sdxl", "b"))
    assert first in await ids(store, SDXL, SDXL), "each has its turn"


async def test_a_task_that_was_passed_over_for_half_a_minute_goes_first(store: Store) -> None:
    flux, *_ = await submitted(store, gpu_task("flux"), *(gpu_task("sdxl") for _ in range(4)))
    assert flux not in await ids(store, SDXL)
    key = KEYS["task"] + flux
    since = int(await raw(store).hget(key, "passed_ms"))
    await raw(store).hset(key, "passed_ms", since - 29_000)
    assert flux not in await ids(store, SDXL)
    await raw(store).hset(key, "passed_ms", since - 30_001)
    assert await ids(store, SDXL) == [flux]
    assert await raw(store).hget(key, "passed_ms") is None


async def test_only_the_first_32_are_looked_at(store: Store) -> None:
    first, *_ = await submitted(store, *(gpu_task("flux") for _ in range(32)), gpu_task("sdxl"))
    assert await ids(store, SDXL) == [first]


async def test_an_animatic_is_passed_over_for_no_model(store: Store) -> None:
    draft, _ = await submitted(store, new_task(), new_task(engine="diffusers", model="tiny"))
    assert await ids(store, Slot((Kind.CPU_INTENSIVE,), ("tiny",))) == [draft]


# ── Slots ──


async def test_a_slot_of_several_kinds_takes_one_task_the_oldest(store: Store) -> None:
    heavy, light = await submitted(store, new_task(kind=Kind.GPU_HEAVY), new_task())
    slot = Slot((Kind.CPU_INTENSIVE, Kind.GPU_HEAVY))
    assert await ids(store, slot) == [heavy]
    assert await ids(store, slot) == [light]


async def test_a_slot_that_is_not_free_yet_is_woken_by_no_submit(store: Store) -> None:
    assert await claimed(store, Slot((Kind.CPU_INTENSIVE,), free=False)) == []
    assert not await raw(store).exists(KEYS["idle"] + Kind.CPU_INTENSIVE)
    assert await claimed(store, Slot((Kind.CPU_INTENSIVE,))) == []
    assert await raw(store).smembers(KEYS["idle"] + Kind.CPU_INTENSIVE) == {b"w1"}


# ── Batches ──


async def test_tasks_of_one_batch_key_are_claimed_at_once_up_to_their_cap(store: Store) -> None:
    like: dict[str, Any] = {"batch": "sdxl|512x512", "batch_rows": 3}
    a, b, other, c, d = await submitted(
        store, gpu_task("sdxl", **like), gpu_task("sdxl", **like), gpu_task("sdxl"), gpu_task("sdxl", **like), gpu_task("sdxl", **like)
    )
    await submitted(store, gpu_task("sdxl", "elsewhere", **like))
    got = await claimed(store, SDXL, SDXL, SDXL)
    by_slot = [[each.task.task_id for each in rows] for _, rows in itertools.groupby(got, lambda each: each.slot)]
    assert [a, b, c] in by_slot
    assert [other] in by_slot
    assert len({each.run for each in got}) == len(got)
    assert d not in [each.task.task_id for each in got], "no slot is left for it"
    assert sorted(len(rows) for rows in by_slot) == [1, 1, 3]


async def test_a_worker_that_has_learned_that_fewer_fit_takes_fewer(store: Store) -> None:
    await submitted(store, *(gpu_task("sdxl", batch="key", batch_rows=8) for _ in range(4)))
    assert len(await ids(store, SDXL, rows={"key": 2})) == 2
    assert len(await ids(store, SDXL, rows={"key": 1})) == 1


async def test_a_claim_said_again_answers_the_same_batches(store: Store) -> None:
    await submitted(store, *(gpu_task("sdxl", batch="key", batch_rows=2) for _ in range(3)))
    first, again = [await store.claim("w1", "nonce", [SDXL, SDXL]) for _ in range(2)]
    assert [(each.run, each.slot) for each in first] == [(each.run, each.slot) for each in again]
    assert [each.slot for each in first] == [0, 0, 1]


@pytest.mark.parametrize("how", ["complete", "requeue"])
async def test_what_is_made_at_once_is_charged_once(store: Store, how: str) -> None:
    fields: dict[str, Any] = {"estimate_ms": 60_000, "batch": "key", "batch_rows": 4}
    await submitted(store, *(gpu_task("sdxl", **fields) for _ in range(4)), gpu_task("flux"))
    rows = await claimed(store, SDXL)
    assert len(rows) == 4
    flows = KEYS["virtual_times"] + Kind.GPU_MEDIUM
    assert await raw(store).zscore(flows, "film") == pytest.approx(60_000)
    for each in rows:
        await ended(store, each.task.task_id, each.run, how)
    assert await raw(store).zscore(flows, "film") < 2_000, "the time that it took, and not four times that"


async def ended(store: Store, task_id: TaskId, run: RunToken, how: str) -> None:
    """Complete the run, or requeue its task."""
    if how == "complete":
        await store.complete(task_id, run, result())
    else:
        assert await store.requeue(task_id, run, Budget.DRAIN, 0, 60_000, "", "") is TaskStatus.QUEUED
