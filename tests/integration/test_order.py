"""The order of claims, by simulations with the real scripts. Before a task is completed its duration is set, to simulate time.

Redis's clock only gives the order of arrival, so that hours of work pass in seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from movieq.local.embedded import Valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.store import Claimed, Store
from movieq.tasks.states import TaskId
from tests.arrange import CPU, KEY_FLOW, OTHER_KEY_FLOW, new_task, raw, result

EXAMPLES = int(os.environ.get("MOVIEQ_TEST_EXAMPLES", 4))
"""How many examples of each property are tried; 100 for a long look."""
EIGHTH = 1 / 8
"""The share of claims that get the oldest task. A project with a smaller fair share may get this much."""


class Farm:
    """Slots that run what the scripts give them, on a simulated clock (in ms)."""

    def __init__(self, store: Store, slots: int, weights: dict[str, float], durations: Callable[[str], int]) -> None:
        self.store = store
        self.slots = slots
        self.weights = msgspec.json.encode(weights)
        self.durations = durations
        self.now_ms = 0
        self.served_ms: Counter[str] = Counter()
        self.order: list[str] = []
        self._busy: list[tuple[int, int, Claimed, int]] = []
        self._number = itertools.count()

    async def submit(self, project: str, count: int = 1, **fields: Any) -> list[TaskId]:
        tasks = [new_task(project, **fields) for _ in range(count)]
        await asyncio.gather(*(self.store.submit(task) for task in tasks))
        return [task.task_id for task in tasks]

    async def fill(self) -> None:
        """Claim a task for every free slot."""
        if (free := self.slots - len(self._busy)) > 0:
            for claimed in await self.store.claim("farm", f"n{next(self._number)}", CPU * free, self.weights):
                project = claimed.task.project_id
                duration_ms = self.durations(project)
                self.order.append(project)
                heapq.heappush(self._busy, (self.now_ms + duration_ms, next(self._number), claimed, duration_ms))

    async def step(self) -> bool:
        """End the next task, and claim another for its slot; return False if nothing runs."""
        await self.fill()
        if not self._busy:
            return False
        self.now_ms, _, claimed, duration_ms = heapq.heappop(self._busy)
        await raw(self.store).hset(KEYS["task"] + claimed.task.task_id, "made_ms", duration_ms)
        await self.store.complete(claimed.task.task_id, claimed.run, result())
        self.served_ms[claimed.task.project_id] += duration_ms
        await self.fill()
        return True


def simulate(server: Valkey, play: Callable[[Store], Awaitable[None]]) -> None:
    """Run this function on an empty Valkey."""

    async def run() -> None:
        client = connect(server.url, patient=True)
        await client.flushall()
        store = Store(client)
        try:
            await play(store)
        finally:
            await store.redis.aclose()

    asyncio.run(run())


def total_ms(served_ms: Counter[str], *names: str) -> Counter[str]:
    """Return the time of each group of projects whose names begin with one of these."""
    return Counter({name: sum(ms for project, ms in served_ms.items() if project.startswith(name)) for name in names})


def assert_shares(served_ms: Counter[str], weights: dict[str, float], error_ms: Mapping[str, float] | None = None) -> None:
    """Assert that each project got its share of the time within a tenth.

    Now and then the oldest task goes first, while its project is ahead by no more than the estimate of that task. An estimate that is
    `error_ms` too long puts its project ahead by that much, once.
    """
    whole, total = sum(served_ms.values()), sum(weights.values())
    for project, weight in weights.items():
        fair = weight / total
        most = 1.1 * max(fair, EIGHTH) * whole + (error_ms or {}).get(project, 0)
        assert 0.9 * fair * whole <= served_ms[project] <= most, (project, fair, served_ms)


SIMULATION = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WEIGHTS = st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0]), min_size=2, max_size=4).map(lambda found: dict(zip("abcd", found, strict=False)))


@SIMULATION
@given(
    weights=WEIGHTS,
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    error=st.sampled_from([0.2, 1.0, 5.0]),
    flow=st.sampled_from(["", KEY_FLOW]),
)
@example(weights={"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.5}, slots=1, seed=4112, error=5.0, flow="")
def test_under_backlog_projects_share_the_time_by_weight_whatever_their_priorities_and_estimates(
    server: Valkey, weights: dict[str, float], slots: int, seed: int, error: float, flow: str
) -> None:
    chance = random.Random(seed)
    mean_ms = {project: chance.choice([500, 1000, 2000]) for project in weights}

    async def play(store: Store) -> None:
        farm = Farm(store, slots, weights, lambda project: int(mean_ms[project] * chance.uniform(0.5, 1.5)))
        for project in weights:
            for _ in range(12):
                priority, estimate_ms = chance.choice([1, 2, 3]), int(mean_ms[project] * error)
                await farm.submit(project, 50, priority=priority, estimate_ms=estimate_ms, shape=project, flow=flow)
        while farm.now_ms < 300 * sum(mean_ms.values()) / len(mean_ms) / slots:
            assert await farm.step()
        assert_shares(farm.served_ms, weights, {project: max(0, error - 1) * mean for project, mean in mean_ms.items()})

    simulate(server, play)


@SIMULATION
@given(
    used_ms=st.integers(20_000, 200_000),
    seed=st.integers(0, 2**16),
    flows=st.sampled_from([("", ""), (KEY_FLOW, KEY_FLOW), (KEY_FLOW, ""), (KEY_FLOW, OTHER_KEY_FLOW)]),
)
def test_who_used_idle_capacity_owes_nothing_for_it_when_another_comes(
    server: Valkey, used_ms: int, seed: int, flows: tuple[str, str]
) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, 2, {}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        await farm.submit("early", 600, estimate_ms=1000, flow=flows[0])
        while farm.now_ms < used_ms:
            await farm.step()
        farm.served_ms.clear()
        await farm.submit("late", 300, estimate_ms=1000, flow=flows[1])
        until_ms = farm.now_ms + 90_000
        while farm.now_ms < until_ms:
            assert await farm.step()
        assert_shares(farm.served_ms, {"early": 1, "late": 1})

    simulate(server, play)


@SIMULATION
@given(others=st.integers(1, 4), slots=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_a_single_task_waits_behind_no_more_than_one_of_each_other_project_a_slot(
    server: Valkey, others: int, slots: int, seed: int
) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, slots, {}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        for number in range(others):
            await farm.submit(f"p{number}", 200, estimate_ms=1000)
        for _ in range(chance.randrange(50)):
            await farm.step()
        before = len(farm.order)
        await farm.submit("single")
        while "single" not in farm.order[before:]:
            assert await farm.step()
        waited = Counter(farm.order[before : before + farm.order[before:].index("single")])
        assert all(count <= slots + 1 for count in waited.values()), waited  # one a slot, and one by the eighth claim

    simulate(server, play)


@SIMULATION
@given(seed=st.integers(0, 2**16))
def test_a_trickling_client_beside_a_bursting_one_gets_what_it_asks_for_at_once(server: Valkey, seed: int) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, 2, {}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        waits = []
        for _ in range(4):
            await farm.submit("burst", 60, estimate_ms=1000)
            for _ in range(15):
                before = len(farm.order)
                await farm.submit("trickle", estimate_ms=1000)
                while "trickle" not in farm.order[before:]:
                    await farm.step()
                waits.append(farm.order[before:].index("trickle"))
                for _ in range(3):
                    await farm.step()
        assert max(waits) <= 3
        assert sum(waits) / len(waits) <= 1.5

    simulate(server, play)


@SIMULATION
@given(projects=st.integers(2, 200), slots=st.integers(1, 4), seed=st.integers(0, 2**16), first=st.sampled_from(["film", "invented"]))
@example(projects=200, slots=1, seed=0, first="invented")
def test_a_key_that_invents_projects_gets_no_more_than_a_project_with_a_key_of_its_own(
    server: Valkey, projects: int, slots: int, seed: int, first: str
) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, slots, {}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        for name in sorted(("film", "invented"), key=lambda name: name != first):
            if name == "film":
                await farm.submit(name, 200, estimate_ms=1000)
            else:
                for number in range(projects):
                    await farm.submit(f"{name}{number}", 200 // projects + 1, estimate_ms=1000, flow=KEY_FLOW)
        for _ in range(200):
            assert await farm.step()
        assert_shares(total_ms(farm.served_ms, "film", "invented"), {"film": 1, "invented": 1})

    simulate(server, play)


@settings(SIMULATION, max_examples=max(1, EXAMPLES // 2))
@given(seed=st.integers(0, 2**16), slots=st.integers(1, 3))
def test_weights_count_among_flows_for_projects_and_inside_the_flow_of_a_key(server: Valkey, seed: int, slots: int) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, slots, {"film": 2.0, "key-a": 1.5}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        for name, flow in (
            ("film", ""),
            ("key-a", KEY_FLOW),
            ("key-b", KEY_FLOW),
            ("other-a", OTHER_KEY_FLOW),
            ("other-b", OTHER_KEY_FLOW),
        ):
            await farm.submit(name, 400 if name == "film" else 200, estimate_ms=1000, flow=flow)
        for _ in range(500):
            assert await farm.step()
        assert_shares(total_ms(farm.served_ms, "film", "key", "other"), {"film": 2, "key": 1, "other": 1})
        for weights in ({"key-a": 1.5, "key-b": 1.0}, {"other-a": 1.0, "other-b": 1.0}):
            assert_shares(Counter({project: farm.served_ms[project] for project in weights}), weights)

    simulate(server, play)


@SIMULATION
@given(weights=WEIGHTS, slots=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_with_a_single_key_projects_are_served_in_the_order_that_they_have_without_flows(
    server: Valkey, weights: dict[str, float], slots: int, seed: int
) -> None:
    orders: list[list[str]] = []

    async def play(store: Store, flow: str) -> None:
        chance = random.Random(seed)
        farm = Farm(store, slots, weights, lambda _: chance.randrange(500, 1500))
        for _ in range(30):
            project, count = chance.choice(sorted(weights)), chance.randrange(1, 6)
            await farm.submit(project, count, priority=chance.choice([1, 2, 3]), estimate_ms=chance.randrange(200, 5000), flow=flow)
            for _ in range(chance.randrange(6)):
                await farm.step()
        while await farm.step():
            pass
        orders.append(farm.order)

    for flow in ("", KEY_FLOW):
        simulate(server, partial(play, flow=flow))
    assert orders[0] == orders[1]


def test_cancelled_thousands_leave_no_mark_on_the_order(server: Valkey) -> None:
    async def play(store: Store) -> None:
        farm = Farm(store, 1, {}, lambda _: 1000)
        gone = [task_id for flow in ("", KEY_FLOW) for task_id in await farm.submit("a", 1500, estimate_ms=1000, flow=flow)]
        await asyncio.gather(*(store.cancel(task_id) for task_id in gone))
        assert await raw(store).keys(KEYS["virtual_times"] + "*") == []
        await farm.submit("a", 100, estimate_ms=1000)
        await farm.submit("b", 100, estimate_ms=1000)
        for _ in range(100):
            await farm.step()
        assert_shares(farm.served_ms, {"a": 1, "b": 1})

    simulate(server, play)


@SIMULATION
@given(seed=st.integers(0, 2**16))
def test_nothing_waits_for_ever_under_a_flood_of_higher_priority(server: Valkey, seed: int) -> None:
    chance = random.Random(seed)

    async def play(store: Store) -> None:
        farm = Farm(store, 1, {"heavy": 10.0}, lambda _: int(1000 * chance.uniform(0.5, 1.5)))
        low: dict[str, list[TaskId]] = defaultdict(list)
        for project in ("light", "heavy"):
            low[project] = await farm.submit(project, 2, priority=3, estimate_ms=1000)
        waiting = set(itertools.chain.from_iterable(low.values()))
        for turn in range(120):
            await farm.submit("heavy", 2, priority=1, estimate_ms=1000)
            await farm.step()
            found = [task_id for task_id in waiting if await raw(store).hget(KEYS["task"] + task_id, "status") == b"completed"]
            waiting.difference_update(found)
            if not waiting:
                break
            assert turn < 100, waiting

    simulate(server, play)
