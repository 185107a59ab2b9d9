"""Tasks of a key that may use all projects wait in a flow of their own: in every verb, lane and repair. `test_order` has the shares."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from movieq.local.embedded import Valkey
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.records import Able
from movieq.queue.repair import inconsistencies
from movieq.queue.store import Budget, Claimed, Slot, Store
from movieq.tasks.states import Kind, RunToken, TaskId, TaskStatus
from tests.arrange import KEY_FLOW, OTHER_KEY_FLOW, claim, new_task, raw, result
from tests.integration.test_damage import REFUSALS
from tests.integration.test_order import EXAMPLES, simulate

CPU = Kind.CPU_INTENSIVE
FLOW = f"{CPU}:@{KEY_FLOW}"
"""Where the projects of the key share."""
MAIN = Able(("generate_image",), ("animatic",))
_nonces = itertools.count()


async def submitted(store: Store, project: str = "film", flow: str = KEY_FLOW, **fields: Any) -> TaskId:
    task = new_task(project, flow=flow, **fields)
    await store.submit(task)
    return task.task_id


async def scores(store: Store, name: str, scope: str) -> dict[str, float]:
    """Return the virtual times of a scope, of those that wait or of those that are idle."""
    key = KEYS[name] + scope
    found = await (raw(store).hgetall(key) if name == "idle_virtual_times" else raw(store).zrange(key, 0, -1, withscores=True))
    return {member.decode(): float(at) for member, at in (found.items() if isinstance(found, dict) else found)}


async def members(store: Store, *names: str) -> dict[str, set[str]]:
    """Return the members of every sorted set or set under these keys."""
    found = {}
    for name in names:
        for key in await raw(store).keys(KEYS[name] + "*"):
            listed = await (raw(store).smembers(key) if name == "lanes" else raw(store).zrange(key, 0, -1))
            found[key.decode()] = {member.decode() for member in listed}
    return found


async def test_a_run_is_charged_to_its_project_by_weight_and_to_its_flow_and_corrected_at_its_end(store: Store) -> None:
    task_id = await submitted(store, estimate_ms=60_000)
    (claimed,) = await store.claim("w1", "nonce", [Slot((CPU,))], b'{"film": 2}')
    assert await scores(store, "idle_virtual_times", CPU) == {f"@{KEY_FLOW}": 60_000}
    assert await scores(store, "idle_virtual_times", f"{CPU}:film") == {f"@{KEY_FLOW}": 30_000}
    await raw(store).hset(KEYS["task"] + task_id, "made_ms", 1000)
    await store.complete(task_id, claimed.run, result())
    assert await scores(store, "idle_virtual_times", CPU) == {f"@{KEY_FLOW}": 1000}
    assert await scores(store, "idle_virtual_times", f"{CPU}:film") == {f"@{KEY_FLOW}": 500}


async def test_a_flow_and_a_project_that_were_idle_join_at_the_virtual_time_of_the_last_claim(store: Store) -> None:
    for _ in range(10):
        await submitted(store, "busy")
        await submitted(store, "steady", "")
    await claim(store, slots=14)
    await submitted(store, "late")
    await submitted(store, "other", OTHER_KEY_FLOW)
    for scope, member in ((FLOW, "late"), (CPU, f"@{OTHER_KEY_FLOW}")):
        joined = (await scores(store, "virtual_times", scope))[member]
        assert joined == float(await raw(store).get(KEYS["claimed_virtual_time"] + scope)) > 0


async def test_the_eighth_claim_gives_no_more_to_a_flow_or_a_project_that_is_ahead_of_its_share(store: Store) -> None:
    for scope, member, others in ((CPU, f"@{KEY_FLOW}", ""), (FLOW, "film", KEY_FLOW)):
        await raw(store).flushdb()
        ahead = await submitted(store)
        await raw(store).zadd(KEYS["virtual_times"] + scope, {member: 1e6})
        for _ in range(20):
            await submitted(store, "other", others)
        assert ahead not in [each.task.task_id for each in await claim(store, slots=16)]


async def test_the_oldest_task_goes_first_every_eighth_time_whatever_its_flow(store: Store) -> None:
    old = await submitted(store, priority=3)
    for _ in range(20):
        await submitted(store, priority=1)
    assert [each.task.task_id for each in await claim(store, slots=8)].index(old) == 7


async def test_positions_are_those_in_the_queue_of_the_project_in_its_flow(store: Store) -> None:
    own = [await submitted(store, flow="") for _ in range(2)]
    keys = [await submitted(store) for _ in range(3)]
    tasks = await Queries(store.redis).tasks([*own, *keys])
    assert await Queries(store.redis).positions(tasks) == [1, 2, 1, 2, 3]
    assert [await Queries(store.redis).position(task) for task in tasks] == [1, 2, 1, 2, 3]


async def test_a_receipt_expects_a_turn_of_each_flow_and_in_its_flow_of_each_project(store: Store) -> None:
    for project in ("a", "b", "c"):
        for _ in range(10):
            await submitted(store, project)
    assert (await store.submit(new_task("film"))).queue_position == 2  # there are two flows
    assert (await store.submit(new_task("d", flow=KEY_FLOW))).queue_position == 8  # two flows, and in this one four projects
    assert (await store.submit(new_task("d", flow=KEY_FLOW))).queue_position == 16


async def test_a_retry_stays_in_the_flow_of_the_submit(store: Store) -> None:
    task_id = await submitted(store)
    (claimed,) = await claim(store)
    await store.fail(task_id, claimed.run, "it broke", "internal")
    assert (await store.retry(task_id)).queue_position == 1
    assert await members(store, "waiting") == {f"{KEYS['waiting']}{CPU}": {task_id}, f"{KEYS['waiting']}{FLOW}:film": {task_id}}


async def test_a_batch_is_of_one_project_and_one_flow(store: Store) -> None:
    like: dict[str, Any] = {"batch": "key", "batch_rows": 8}
    first = [await submitted(store, **like) for _ in range(2)]
    for project, flow in (("film", ""), ("film", OTHER_KEY_FLOW), ("other", KEY_FLOW)):
        await submitted(store, project, flow, **like)
    got = await claim(store)
    assert [each.task.task_id for each in got] == first
    assert await scores(store, "idle_virtual_times", f"{CPU}:film") == {f"@{KEY_FLOW}": 2000}


async def test_affinity_prefers_a_loaded_model_in_the_queue_whose_turn_it_is(store: Store) -> None:
    fields: dict[str, Any] = {"engine": "diffusion", "kind": Kind.GPU_MEDIUM}
    for model in ("flux", "sdxl"):
        await submitted(store, model=model, **fields)
    (claimed,) = await store.claim("w1", "nonce", [Slot((Kind.GPU_MEDIUM,), ("sdxl",))])
    assert claimed.task.model == "sdxl"


async def test_a_task_that_an_older_version_queued_without_its_flow_is_served(store: Store) -> None:
    """An older API or worker queues a task again in the queue of its project, whatever its flow."""
    task_id = await submitted(store)
    for name, scope, member in (
        ("waiting", f"{FLOW}:film", task_id),
        ("virtual_times", FLOW, "film"),
        ("virtual_times", CPU, f"@{KEY_FLOW}"),
    ):
        await raw(store).zrem(KEYS[name] + scope, member)
    await raw(store).zadd(f"{KEYS['waiting']}{CPU}:film", {task_id: 1})
    await raw(store).zadd(KEYS["virtual_times"] + CPU, {"film": 0})
    assert [each.task.task_id for each in await claim(store)] == [task_id]
    assert await members(store, "waiting", "virtual_times") == {}
    assert await raw(store).hget(KEYS["sums"], "entries dropped") is None
    assert await store.recount(apply=False) == []


@pytest.mark.parametrize("flow", ["@", "", "film:other", "\xff"])
async def test_a_damaged_flow_is_that_of_the_project(store: Store, flow: str) -> None:
    task_id = await submitted(store)
    await raw(store).hset(KEYS["task"] + task_id, "flow", flow.encode("latin-1"))
    (task,) = await Queries(store.redis).tasks([task_id])
    await Queries(store.redis).position(task)
    assert [each.task.task_id for _ in range(3) for each in await claim(store)] == [task_id]
    assert await members(store, "waiting", "virtual_times") == {}


async def test_what_was_lost_of_a_flow_is_found_and_repaired(store: Store) -> None:
    tasks = [await submitted(store, project, flow) for project, flow in (("film", KEY_FLOW), ("other", KEY_FLOW), ("film", ""))]
    before = await members(store, "waiting", "virtual_times")
    for key in before:
        await raw(store).delete(key)
        assert {each.task_id async for each in inconsistencies(store, apply=True)} - {None} <= {*tasks}
        assert await members(store, "waiting", "virtual_times") == before
        assert [each async for each in inconsistencies(store, apply=False)] == []


async def test_what_was_lost_of_a_flow_stops_no_task_that_is_still_listed(store: Store) -> None:
    for lost in (f"{KEYS['waiting']}{FLOW}:film", KEYS["virtual_times"] + FLOW, KEYS["virtual_times"] + CPU):
        await raw(store).flushdb()
        tasks = [await submitted(store, project, flow) for project, flow in (("film", KEY_FLOW), ("other", KEY_FLOW), ("film", ""))]
        await raw(store).delete(lost)
        assert sorted([each.task.task_id for _ in range(8) for each in await claim(store)]) == sorted(tasks), lost
        assert await members(store, "waiting", "virtual_times") == {}


async def test_an_entry_in_the_queue_of_another_flow_is_found_and_removed(store: Store) -> None:
    task_id = await submitted(store)
    before = await members(store, "waiting")
    stray = f"{KEYS['waiting']}{CPU}:film"
    await raw(store).zadd(stray, {task_id: 1})
    assert [each.text async for each in inconsistencies(store, apply=True)] == [f"is in the list {stray}, where it does not belong"]
    assert await members(store, "waiting") == before


async def test_a_sweep_forgets_a_project_in_every_flow(store: Store) -> None:
    for flow in (KEY_FLOW, OTHER_KEY_FLOW, ""):
        await submitted(store, flow=flow)
    for claimed in await claim(store, slots=3):
        await store.complete(claimed.task.task_id, claimed.run, result())
    assert (await scores(store, "idle_virtual_times", f"{CPU}:film")).keys() == {f"@{KEY_FLOW}", f"@{OTHER_KEY_FLOW}"}
    await store.sweep(0)
    assert await raw(store).keys(f"{KEYS['idle_virtual_times']}*film*") == []
    assert (await scores(store, "idle_virtual_times", CPU)).keys() == {f"@{KEY_FLOW}", f"@{OTHER_KEY_FLOW}"}


class Walk:
    """An installation in which verbs follow each other at random."""

    def __init__(self, store: Store, chance: random.Random) -> None:
        self.store = store
        self.chance = chance
        self.runs: list[Claimed] = []
        """Every run so far, also those that have ended."""

    async def step(self) -> None:
        """Call the next verb; a refusal is an answer too."""
        verbs = (
            self.submit,
            self.submit,
            self.claim,
            self.claim,
            self.end,
            self.end,
            self.cancel,
            self.retry,
            self.expire,
            self.due,
            self.resume,
        )
        with contextlib.suppress(*REFUSALS):
            await self.chance.choice(verbs)()

    async def submit(self) -> None:
        model = self.chance.choice(["animatic", "animatic", "palettes"])
        fields: dict[str, Any] = {
            "model": model,
            "priority": self.chance.choice([1, 2, 3]),
            "batch": self.chance.choice(["", "b"]),
            "batch_rows": 2,
        }
        await submitted(self.store, self.chance.choice(["film", "other"]), self.chance.choice(["", KEY_FLOW, OTHER_KEY_FLOW]), **fields)

    async def claim(self) -> None:
        slots = [Slot((CPU,))] * self.chance.randrange(1, 4)
        able = self.chance.choice([MAIN, None])
        self.runs += await self.store.claim("w1", f"walk{next(_nonces)}", slots, b'{"film": 2}', able=able)

    async def end(self) -> None:
        task_id, run = self.run()
        match self.chance.randrange(5):
            case 0:
                await self.store.complete(task_id, run, result())
            case 1:
                await self.store.fail(task_id, run, "it broke", "internal")
            case 2:
                await self.store.requeue(task_id, run, Budget.DRAIN, 0, 0, "its worker stops", "worker_lost")
            case 3:
                await self.store.requeue(task_id, run, Budget.TRIES, 3, 60_000, "it broke", "network")
            case _:
                await self.store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")

    async def cancel(self) -> None:
        if tasks := await self.tasks():
            await self.store.cancel(self.chance.choice(tasks))

    async def retry(self) -> None:
        if tasks := await self.tasks():
            await self.store.retry(self.chance.choice(tasks))

    async def expire(self) -> None:
        task_id, _ = self.run()
        await raw(self.store).zadd(KEYS["running"] + CPU, {task_id: 1}, xx=True)
        await self.store.tidy()

    async def due(self) -> None:
        for task_id in await raw(self.store).zrange(KEYS["delayed"], 0, -1):
            await raw(self.store).zadd(KEYS["delayed"], {task_id: 1})
        await self.store.tidy()

    async def resume(self) -> None:
        await self.store.renew("w1", [], [self.run()], gpu_bytes=0)

    def run(self) -> tuple[TaskId, RunToken]:
        if not self.runs:
            return TaskId("none"), RunToken("none")
        claimed = self.chance.choice(self.runs[-8:])
        return claimed.task.task_id, claimed.run

    async def tasks(self) -> list[TaskId]:
        return sorted(TaskId(key.decode().removeprefix(KEYS["task"])) for key in await raw(self.store).keys(KEYS["task"] + "*"))

    async def expected(self) -> dict[str, set[str]]:
        """Return what lies in the queues and shares if each waiting task is where its record says, and nothing else is there."""
        found: dict[str, set[str]] = defaultdict(set)
        delayed = await raw(self.store).zrange(KEYS["delayed"], 0, -1)
        for task in await Queries(self.store.redis).tasks(await self.tasks()):
            if task.status is not TaskStatus.QUEUED or task.task_id.encode() in delayed:
                continue
            lane = task.lane or task.kind
            scope = f"{lane}:@{task.flow}" if task.flow else lane
            found[KEYS["waiting"] + lane].add(task.task_id)
            found[f"{KEYS['waiting']}{scope}:{task.project_id}"].add(task.task_id)
            found[KEYS["virtual_times"] + scope].add(task.project_id)
            found[KEYS["virtual_times"] + lane].add(f"@{task.flow}" if task.flow else task.project_id)
            if task.lane:
                found[KEYS["lanes"] + task.kind].add(task.lane)
        return found


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16))
def test_after_any_verbs_the_shares_of_both_levels_are_those_of_the_waiting_tasks(server: Valkey, seed: int) -> None:
    async def play(store: Store) -> None:
        walk = Walk(store, random.Random(seed))
        for _ in range(100):
            await walk.step()
            assert await members(store, "waiting", "virtual_times", "lanes") == await walk.expected()
        assert [each async for each in inconsistencies(store, apply=False)] == []
        for task_id in await walk.tasks():
            if (task := await Queries(store.redis).task(task_id)) is not None and not task.status.ended:
                await store.cancel(task_id)
        assert await members(store, "waiting", "virtual_times", "lanes") == {}

    simulate(server, play)
