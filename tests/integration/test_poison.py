"""Tasks that a worker cannot pass on, read or run: each fails or is requeued by itself, and the other tasks complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from arq import cron, func

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.entities import Task
from movieq.tasks.states import Kind, TaskId, TaskStatus
from tests.arrange import claim, new_task, ran, raw
from tests.engines.test_plugins import installed
from tests.fleet import eventually, fleet, python_path
from workers.protocol import MAX_FRAME_BYTES, Run, Unsendable, encoded_run, framed, to_child_decoder
from workers.reporter import reporting
from workers.retry import retry_delay_ms, unreadable_delay_ms
from workers.running import Running
from workers.slots import Group, Slots
from workers.supervisor import Child, Progress
from workers.worker import Worker

SMALL = {"prompt": "a lamp", "resolution": "64x64"}
BEYOND = b'{"n": 123456789012345678901234567890}'
"""Metadata that JSON can hold and msgpack cannot."""


def kwargs(task_data: Any) -> bytes:
    return msgspec.msgpack.encode({"task_data": task_data})


async def submitted(store: Store, **fields: Any) -> TaskId:
    task = new_task(**{"kwargs": kwargs(SMALL), **fields})
    await store.submit(task)
    return task.task_id


async def ended(store: Store, task_id: TaskId, within_s: float = 60) -> Task:
    found: list[Task] = []

    async def over() -> bool:
        task = await Queries(store.redis).task(task_id)
        assert task is not None
        found[:] = [task]
        return task.status.ended

    await eventually(over, within_s)
    return found[0]


async def test_what_cannot_be_passed_to_an_engine_fails_for_good_and_its_neighbours_are_done_in_their_first_attempt(folder: Path) -> None:
    async with fleet(folder) as installation:
        before = [await submitted(installation.store) for _ in range(2)]
        poison = [await submitted(installation.store, metadata=BEYOND) for _ in range(4)]
        after = [await submitted(installation.store) for _ in range(3)]
        worker = await installation.worker()
        for task_id in (*before, *after):
            task = await ended(installation.store, task_id)
            assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1), worker.log.read_text()[-2000:]
        for task_id in poison:
            task = await ended(installation.store, task_id)
            assert (task.status, task.attempt, task.error_code) == (TaskStatus.FAILED, 1, "invalid_input")
            assert "a whole number beyond 64 bits" in str(task.error)
        assert worker.times_logged("child_ready") == 1


async def test_a_row_of_a_batch_that_cannot_be_passed_on_fails_alone(folder: Path) -> None:
    async with fleet(folder) as installation:
        rows = {"batch": "one", "batch_rows": 3}
        good = [await submitted(installation.store, **rows)]
        poison = await submitted(installation.store, **rows, metadata=BEYOND)
        good.append(await submitted(installation.store, **rows))
        worker = await installation.worker()
        assert (await ended(installation.store, poison)).error_code == "invalid_input"
        after = await submitted(installation.store)
        assert (await ended(installation.store, after)).status is TaskStatus.COMPLETED
        for task_id in good:  # the animatic makes no batches: what matters is that they end, and that their slot is free again
            assert (await ended(installation.store, task_id)).status.ended, worker.log.read_text()[-2000:]


async def test_a_task_whose_model_is_not_here_waits_untouched_and_the_worker_does_the_rest(folder: Path) -> None:
    async with fleet(folder) as installation:
        strange = [
            await submitted(installation.store, engine="of-a-plug-in", model="of-a-plug-in"),
            await submitted(installation.store, engine="diffusers", model="of-a-newer-table"),
        ]
        worker = await installation.worker()
        task = await ended(installation.store, await submitted(installation.store))
        assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1)
        for task_id in strange:

            async def waits(task_id: TaskId = task_id) -> bool:
                task = await Queries(installation.store.redis).task(task_id)
                return task is not None and task.lane != "" and (task.status, task.attempt) == (TaskStatus.QUEUED, 0)

            await eventually(waits)
        assert worker.alive


async def test_parameters_that_this_version_cannot_read_say_so_and_cost_nobody_else_anything(folder: Path) -> None:
    async with fleet(folder) as installation:
        odd = [await submitted(installation.store, kwargs=kwargs(data)) for data in ({"prompt": 7}, [1], "text", None)]
        worker = await installation.worker()
        task = await ended(installation.store, await submitted(installation.store))
        assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1)
        for task_id in odd:
            await eventually(partial(tried, installation.store, task_id))
            (said,) = [entry.data for entry in await Queries(installation.store.redis).log_after(task_id, None) if entry.type == "retrying"]
            assert b"this worker cannot read task_data" in said
        assert worker.alive


MAP = msgspec.msgpack.encode
UNREADABLE_JOBS = [b"\xc1", MAP({}), MAP({"task_data": SMALL, "of_a_newer_version": 1}), MAP([1])]


async def test_parameters_that_cannot_be_read_cost_tries_with_a_true_reason_and_fail_at_last(folder: Path) -> None:
    async with fleet(folder) as installation:
        odd = [await submitted(installation.store, kwargs=job) for job in UNREADABLE_JOBS]
        worker = await installation.worker()
        for task_id in odd:
            task = await ended_unread(installation.store, task_id)
            assert (task.status, task.attempt, task.retryable) == (TaskStatus.FAILED, 4, True)
            assert task.error == "its parameters in Redis cannot be read"
            assert await waits_s(installation.store, task_id) == [30, 60, 120]
        assert (await ended(installation.store, await submitted(installation.store))).attempt == 1
        assert worker.alive


async def test_a_record_that_this_version_cannot_read_leaves_a_newer_worker_minutes_to_take_it(folder: Path) -> None:
    async with fleet(folder) as installation:
        task_id = await submitted(installation.store)
        await raw(installation.store).hset(KEYS["task"] + task_id, "result", "{")
        await installation.worker()
        await ended_unread(installation.store, task_id)
        assert await waits_s(installation.store, task_id) == [30, 60, 120]


async def ended_unread(store: Store, task_id: TaskId) -> Task:
    """Wait until the task has ended, cutting short the waits between its tries; return it."""
    redis = raw(store)

    async def over() -> bool:
        if await redis.zscore(KEYS["delayed"], task_id) is not None:
            await redis.zadd(KEYS["delayed"], {task_id: 1}, xx=True)
            await store.tidy()
        task = await Queries(store.redis).task(task_id)
        return task is not None and task.status.ended

    await eventually(over, 60)
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    return task


async def waits_s(store: Store, task_id: TaskId) -> list[float]:
    """Return the waits that its `retrying` events name."""
    entries = [entry.data for entry in await Queries(store.redis).log_after(task_id, None) if entry.type == "retrying"]
    return [msgspec.json.decode(data)["retry_in"] for data in entries]


@pytest.mark.parametrize("attempt", [0, -5, 1, 1025, 10**18])
def test_the_wait_after_any_attempt_is_within_its_bounds(attempt: int) -> None:
    assert 1_500 <= retry_delay_ms(attempt) <= 75_000
    assert 30_000 <= unreadable_delay_ms(attempt) <= 600_000


@pytest.mark.parametrize("message", [b"", b"\xff\xfe", b"cancel", b"cancel a", b"cancel a b c", b"dance", b"wake up"])
async def test_a_message_that_a_worker_does_not_know_is_not_the_end_of_it(folder: Path, message: bytes) -> None:
    async with fleet(folder) as installation:
        worker = await installation.worker()
        (worker_id,) = [row.worker_id.partition("/")[0] for row in await workers(installation.store)]
        assert await raw(installation.store).publish(KEYS["control"] + worker_id, message) == 1
        assert (await ended(installation.store, await submitted(installation.store))).status is TaskStatus.COMPLETED
        assert worker.times_logged("unknown_message") == 1
        assert worker.alive


async def workers(store: Store) -> list[Any]:
    found: list[Any] = []

    async def there() -> bool:
        found[:] = await Queries(store.redis).workers()
        return bool(found)

    await eventually(there)
    return found


async def test_a_fault_of_a_script_is_logged_as_that_and_the_worker_goes_on(folder: Path) -> None:
    async with fleet(folder) as installation:
        worker = await installation.worker()
        await raw(installation.store).set(KEYS["delayed"], "no sorted set")  # tidy fails on it
        await eventually(lambda: worker.times_logged("script_failed") > 0)
        assert "Traceback" in worker.log.read_text()
        await raw(installation.store).delete(KEYS["delayed"])
        assert (await ended(installation.store, await submitted(installation.store))).status is TaskStatus.COMPLETED
        assert worker.alive


# ── The worker's own books ──


@asynccontextmanager
async def books(store: Store) -> AsyncIterator[tuple[Worker, Child]]:
    """Yield a worker that runs nothing, and its child, which is not started."""
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    worker = Worker(
        worker_id="w1",
        store=store,
        queries=Queries(store.redis),
        subscriber=None,  # type: ignore[arg-type]  # it listens to nothing
        children=[child],
        drain_s=0.0,
        weights={},
        functions=[],
        redis_pool=store.redis,
        cron_jobs=[cron(_nothing, month=1)],
        handle_signals=False,
    )
    yield worker, child


async def _nothing(ctx: dict[str, Any]) -> None:
    """Do nothing: arq requires a function or a cron job."""


async def test_a_run_without_a_living_task_loses_its_slot_and_its_lease_and_its_task_waits_again(store: Store) -> None:
    await store.submit(new_task())
    (claimed,) = await claim(store)
    async with books(store) as (worker, child):
        group = child.slots.reserve([claimed.task.task_id])
        worker.runs[claimed.run] = Running(claimed, child, group)
        worker.tend()
        assert child.slots.groups == [group], "it may be about to be tidied by itself"
        worker.tend()
        assert (child.slots.groups, worker.runs) == ([], {})
        await worker.renew()
    task = await Queries(store.redis).task(claimed.task.task_id)
    assert task is not None
    assert task.status is TaskStatus.QUEUED


async def test_a_slot_that_nobody_runs_in_is_free_again(store: Store) -> None:
    async with books(store) as (worker, child):
        child.slots.reserve([TaskId("gone")])
        worker.tend()
        worker.tend()
        assert child.slots.groups == []


async def test_a_run_that_raises_what_nobody_expected_ends_no_other_and_counts_as_a_try(store: Store) -> None:
    await store.submit(new_task())
    (claimed,) = await claim(store)
    async with books(store) as (worker, child):

        async def broke(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
            raise ValueError("nobody expected this")

        worker.functions = {"generate_image": func(broke, name="generate_image")}
        group = child.slots.reserve([claimed.task.task_id])
        async with asyncio.TaskGroup() as runs:
            worker.start(runs, Running(claimed, child, group))
        assert (child.slots.groups, worker.runs) == ([], {})
    assert await raw(store).hget(KEYS["task"] + claimed.task.task_id, "tries") == b"1"


class AlwaysFree(Slots):
    """Slots that are free without a process, and that raise for one task."""

    free = True
    bad = TaskId("")

    def reserve(self, task_ids: Sequence[TaskId], model: str = "", batch: str = "") -> Group:
        if self.bad in task_ids:
            raise ValueError("nobody expected this")
        return super().reserve(task_ids, model, batch)


async def test_one_claimed_task_that_cannot_be_begun_is_given_back_as_a_try_and_the_others_begin(store: Store) -> None:
    tasks = [new_task(project=f"p{number}") for number in range(3)]
    for task in tasks:
        await store.submit(task)
    begun: list[str] = []

    async def begins(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
        begun.append(ctx["job_id"])

    async with books(store) as (worker, _):
        worker.children = [Child(f"cpu{number}", (Kind.CPU_INTENSIVE,), step_timeout_s=60) for number in range(3)]
        for child in worker.children:
            child.slots = slots = AlwaysFree(lambda frames: None)
            slots.bad = tasks[1].task_id
        worker.functions = {"generate_image": func(begins, name="generate_image")}
        async with asyncio.TaskGroup() as runs:
            await worker.claim(runs)
        assert sorted(begun) == sorted([tasks[0].task_id, tasks[2].task_id])
        assert worker.runs == {}
        assert all(child.slots.groups == [] for child in worker.children)
    assert await tried(store, tasks[1].task_id)


# ── The pipe ──


def request(run: str = "r", **fields: Any) -> Run:
    params, metadata = fields.pop("params", {}), fields.pop("metadata", {})
    return Run(run, "t", "p", "generate_image", "animatic", "animatic", params, metadata, {}, 1, "/out", **fields)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "metadata",
    [{"n": 2**64}, {"n": -(2**63) - 1}, {"n": nested(100_000)}, {"n": object()}, {"n": "\ud800"}, {"n": "x" * MAX_FRAME_BYTES}],
    ids=["large", "small", "deep", "object", "surrogate", "long"],
)
def test_what_cannot_go_over_the_pipe_is_refused_before_anything_is_sent(metadata: dict[str, Any]) -> None:
    with pytest.raises(Unsendable) as caught:
        encoded_run(request(metadata=metadata))
    for word in ("Error", "object", "msgpack", "OverflowError", "RecursionError"):
        assert word not in str(caught.value)


def test_params_that_are_no_map_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(Unsendable):
        encoded_run(request(params=[1]))


def test_a_batch_too_long_for_one_frame_goes_run_by_run() -> None:
    bodies = [encoded_run(request(name, metadata={"n": "x" * (MAX_FRAME_BYTES // 2)})) for name in ("a", "b")]
    sent, at = framed(bodies), 0
    found = []
    while at < len(sent):
        size = int.from_bytes(sent[at : at + 4], "big")
        assert size <= MAX_FRAME_BYTES
        found.append(to_child_decoder.decode(sent[at + 4 : at + 4 + size]))
        at += 4 + size
    assert [each.run for each in found if isinstance(each, Run)] == ["a", "b"]


# ── What engines say ──

ODD = """
from movieq.tasks.params import Params
from movieq.plugins import Plugin
from movieq.tasks.registry import TaskSpec
from workers.child.job import Output
from workers.protocol import Note, Produced, Stage
from PIL import Image

class OddParams(Params, frozen=True, kw_only=True):
    odd: str

    @property
    def description(self):
        return self.odd

def render(job):
    odd = job.params.odd
    if odd == "no plan":
        job.plan()
    elif odd == "no weight":
        job.plan(Stage("a", "a", 0.0), Stage("b", "b", float("nan")), Stage("c", "c", -1.0))
    else:
        job.plan(Stage("a", "a", 1.0))
    job.begin("a")
    if odd == "an unreadable step":
        job.step("a", "one", "two")
    if odd == "an unsendable note":
        job.note(object())
    job.step("a", 1, 1)
    Image.new("RGB", (64, 64)).save(path := job.out_dir / "output.png")
    width = "wide" if odd == "an unreadable answer" else 64
    metadata = {"a number": 2**70, "an object": object()}.get(odd)
    return Output((Produced(str(path), "output", "image/png", width, 64),), {} if metadata is None else {"odd": metadata})

plugin = Plugin(
    task_types={"odd": TaskSpec(params=OddParams)},
    engines={"odd": "odd"},
    models={"odd": {"engine": "odd", "kind": "cpu_intensive", "tasks": {"odd": 1}}},
)
"""
"""An engine of a plug-in that sends what no engine of ours sends."""


async def test_what_an_engine_should_not_say_costs_no_run_but_its_own(folder: Path) -> None:
    site = folder / "site"
    site.mkdir()
    path = {"PYTHONPATH": python_path(installed(site, ("odd", ODD)))}
    async with fleet(folder / "fleet") as installation:
        api, worker = await asyncio.gather(installation.api("", 0, **path), installation.worker("", **path))
        for odd in ("no plan", "no weight", "an unreadable step"):
            ended = await api.ended(await api.submit("odd", {"odd": odd}))
            assert (ended["status"], ended["attempt"]) == ("completed", 1), (odd, ended, worker.log.read_text()[-3000:])
        for odd in ("an unreadable answer", "a number", "an object", "an unsendable note"):
            task_id = await api.submit("odd", {"odd": odd})
            if odd == "an unsendable note":
                await eventually(partial(tried, installation.store, TaskId(task_id)))
                assert (await api.call("DELETE", f"/tasks/{task_id}/cancel"))[0] == 200  # it would be tried again
            else:  # it has rendered
                ended = await api.ended(task_id)
                assert (ended["status"], ended["error_code"], ended["attempt"]) == ("failed", "internal", 1), (odd, ended)
            for entry in await Queries(installation.store.redis).log_after(task_id, None):
                assert b"Error" not in entry.data, entry.data
            ended = await api.ended(await api.submit("generate_image", SMALL))
            assert (ended["status"], ended["attempt"]) == ("completed", 1), odd
        assert worker.times_logged("child_ended") == worker.times_logged("device_problem")  # the last of three in a row, at most
        assert worker.alive


async def tried(store: Store, task_id: TaskId) -> bool:
    """Whether a run of the task has counted as a try."""
    return bool(await raw(store).hget(KEYS["task"] + task_id, "tries") == b"1")


async def test_a_listener_that_raises_fails_its_own_run_and_leaves_the_child_to_the_next(folder: Path) -> None:
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ready = asyncio.Event()
    keeping = asyncio.create_task(child.supervise(ready.set))

    def order(name: str, task_type: str = "generate_image", **params: Any) -> Run:
        (folder / name).mkdir()
        return msgspec.structs.replace(request(name, params={**SMALL, **params}), task_type=task_type, out_dir=str(folder / name))

    def raises(message: Progress) -> None:
        raise ValueError("nobody expected this")

    try:
        await asyncio.wait_for(ready.wait(), 60)
        pid = child.pid
        with pytest.raises(ValueError, match="nobody"):
            await ran(child, order("much work", "generate_video", duration=30, fps=60, resolution="640x360"), raises)
        assert child.slots.groups == []
        assert (await asyncio.wait_for(ran(child, order("second")), 60)).files
        assert child.pid == pid
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_a_report_that_cannot_be_said_does_not_end_the_others(store: Store) -> None:
    """Whatever a report raises, the next one is said."""
    await store.submit(new_task())
    (claimed,) = await claim(store)

    class Odd(Store):
        raised = asked = 0

        async def report(self, *args: Any, **named: Any) -> None:
            if self.raised < 2:
                self.raised += 1
                raise ValueError("nobody expected this")
            await super().report(*args, **named)

        async def watched(self, task_id: TaskId) -> bool:
            self.asked += 1
            raise ValueError("nor this")

    odd = Odd(store.redis)

    async def shown() -> bool:
        reporter.report("drawing", stage="work")
        task = await Queries(store.redis).task(claimed.task.task_id)
        return task is not None and task.current_step == "drawing"

    async with reporting(odd, Running(claimed)) as reporter:
        await eventually(shown)
        await eventually(lambda: odd.asked > 1)
