"""Cancel: at once for a waiting task, between two steps of a run, by force if the engine does not react; and only one end in any race."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web
from redis.exceptions import ConnectionError as RedisConnectionError

from movieq.errors import InvalidState, RunLost
from movieq.local.embedded import Valkey
from movieq.queue.connection import _cancellable, connect
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.states import TERMINAL_EVENTS, RunToken, TaskId, TaskStatus
from tests.arrange import claim as claimed
from tests.arrange import new_task, raw, result, running
from tests.fleet import Fleet, Process, eventually
from tests.proxy import Proxy, proxy, script
from tests.service import Receiver, Service, receiver, serving
from workers.concurrency import cancel_all
from workers.supervisor import CANCEL_GRACE_S

SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60}
HOOK = "http://127.0.0.1:1/hook"


async def cancel(api: Service, task_id: str) -> tuple[int, Any]:
    return await api.call("DELETE", f"/tasks/{task_id}/cancel")


# ── How soon ──


async def test_a_waiting_task_is_cancelled_at_once(installation: Fleet) -> None:
    api = await installation.api()
    status, answer = await cancel(api, await api.submit("generate_image", SMALL))
    assert (status, answer["previous_state"]) == (200, "queued")
    assert await claimed(installation.store) == []


async def test_a_cancel_reaches_the_worker_before_a_renewal_would_tell_it_and_the_engine_between_two_steps(installation: Fleet) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response()

    async with proxy(installation.valkey.socket) as between, serving({"/frame": held}) as url:
        api, worker = await asyncio.gather(installation.api(), installation.worker(between.url))
        child = worker.child()
        task_id = await api.submit("generate_image", {**SMALL, "reference_images": [f"{url}/frame"]})
        await asked.wait()
        between.hold(script(installation.store, "renew"))
        await between.happened.wait()  # from now on the worker hears of cancels alone
        await stopped(api, worker, task_id)
        between.release()
        go_on.set()
        task_id = await api.submit("generate_video", LONG)
        await api.until(task_id, "stage", "frames")
        await stopped(api, worker, task_id)
        assert worker.child() == child
        assert (await api.ended(await api.submit("generate_image", SMALL)))["status"] == "completed"
        assert worker.times_logged("child_killed") == 0


async def stopped(api: Service, worker: Process, task_id: str) -> None:
    """Cancel a task, and wait until its worker has stopped the run."""
    before = worker.times_logged("run_stopped")
    status, answer = await cancel(api, task_id)
    assert (status, answer["previous_state"]) == (200, "processing")
    await eventually(lambda: worker.times_logged("run_stopped") > before)


async def test_an_engine_that_does_not_listen_is_killed_after_the_grace_and_its_slot_takes_the_next_task(installation: Fleet) -> None:
    api, worker = await asyncio.gather(installation.api(), installation.worker())
    task_id = await api.submit("generate_video", LONG)
    await api.until(task_id, "stage", "frames")
    deaf = worker.child()
    deaf.suspend()
    begun = time.monotonic()
    assert (await cancel(api, task_id))[0] == 200
    following = await api.submit("generate_image", SMALL)
    await api.until(following, "event", "started")
    assert time.monotonic() - begun >= CANCEL_GRACE_S
    assert worker.times_logged("child_killed") == 1
    assert not deaf.is_running()
    status = await api.ended(following)
    assert (status["status"], status["attempt"]) == ("completed", 1)
    assert [entry.type for entry in await ends_of(installation.store, task_id)] == ["cancelled"]


# ── One end ──


async def complete(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.complete(task_id, run, result())


async def fail(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.fail(task_id, run, "no such frame", "invalid_input")


async def requeue(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.requeue(task_id, run, Budget.TRIES, 3, 60_000, "out of memory", "out_of_memory")


async def run_out(store: Store, task_id: TaskId, run: RunToken) -> None:
    await store.tidy()
    if (await found(store, task_id)).status is TaskStatus.CANCELLED:
        raise RunLost(f"{run} was cancelled")


@pytest.mark.parametrize("end", [complete, fail, requeue, run_out])
async def test_a_cancel_and_an_end_at_the_same_time_make_one_end(
    store: Store, server: Valkey, end: Callable[[Store, TaskId, RunToken], Awaitable[None]]
) -> None:
    other = Store(connect(server.url, patient=True))
    winners: Counter[TaskStatus] = Counter()
    for number in range(100):
        task_id, run = await running(store, callback_url=HOOK)
        await raw(store).zadd(KEYS["deadlines"], {task_id: 1})
        both: list[Awaitable[object]] = [store.cancel(task_id), end(other, task_id, run)]
        answers = await asyncio.gather(*(both if number % 2 else reversed(both)), return_exceptions=True)
        task = await found(store, task_id)
        assert [entry.type for entry in await ends_of(store, task_id)] == [task.status]
        assert len(await raw(store).keys(f"{KEYS['delivery']}{task_id}-*")) == 1
        refused = [type(answer) for answer in answers if isinstance(answer, BaseException)]
        if end is requeue:
            assert task.status is TaskStatus.CANCELLED
            assert set(refused) <= {RunLost}
        else:
            assert refused == [RunLost if task.status is TaskStatus.CANCELLED else InvalidState]
        winners[task.status] += 1
    await other.redis.aclose()
    print(f"cancel and {end.__name__} at once: {dict(winners)}")
    assert len(winners) == (1 if end is requeue else 2)
    assert await raw(store).keys(KEYS["worker_tasks"] + "*") == []
    assert await raw(store).exists(KEYS["deadlines"], KEYS["delayed"]) == 0


async def test_a_cancel_and_a_claim_at_the_same_time_leave_a_cancelled_task_that_nobody_holds(store: Store, server: Valkey) -> None:
    other = Store(connect(server.url, patient=True))
    before: Counter[TaskStatus] = Counter()
    for number in range(100):
        task = new_task(callback_url=HOOK)
        await store.submit(task)
        both: list[Awaitable[Any]] = [store.cancel(task.task_id), claimed(other)]
        answers = await asyncio.gather(*(both if number % 2 else reversed(both)))
        (was, _), got = answers if number % 2 else reversed(answers)
        assert len(got) == (1 if was is TaskStatus.PROCESSING else 0)
        assert [entry.type for entry in await ends_of(store, task.task_id)] == ["cancelled"]
        assert len(await raw(store).keys(f"{KEYS['delivery']}{task.task_id}-*")) == 1
        before[was] += 1
    await other.redis.aclose()
    assert len(before) == 2
    assert await raw(store).keys(KEYS["worker_tasks"] + "*") == []
    assert await raw(store).keys(KEYS["running"] + "*") == []
    assert await raw(store).keys(KEYS["waiting"] + "*") == []


@pytest.mark.parametrize("first", ["commit", "cancel"])
async def test_a_cancel_that_meets_the_commit_of_a_run_makes_one_end_and_one_webhook(installation: Fleet, first: str) -> None:
    async with proxy(installation.valkey.socket) as between, receiver() as hook:
        api, worker = await asyncio.gather(installation.api(), installation.worker(between.url))
        for count in range(1, 4):
            meet = commit_first if first == "commit" else cancel_first
            task_id = await meet(installation, between, api, hook)
            status = (await found(installation.store, task_id)).status
            assert status == ("completed" if first == "commit" else "cancelled")
            await are_over(worker, count)
            assert [entry.type for entry in await ends_of(installation.store, task_id)] == [status]
            _, body = (await hook.wait_for(count))[-1]
            said = msgspec.json.decode(body)
            assert (said["task_id"], said["type"]) == (task_id, f"task.{status}")
            orphans = {prefix.decode() for prefix in await raw(installation.store).zrange(KEYS["orphans"], 0, -1)}
            files = [path for path in (installation.folder / "media").rglob("output.*") if task_id in path.parts]
            assert [any(prefix in str(path) for prefix in orphans) for path in files] == [status == "cancelled"]
        assert len(hook.requests) == 3
        assert worker.alive


async def commit_first(installation: Fleet, between: Proxy, api: Service, hook: Receiver) -> TaskId:
    """Cancel a task that is committed already, before its worker has received the answer to the commit."""
    between.hold(script(installation.store, "complete"))
    task_id = TaskId(await api.submit("generate_image", SMALL, callback_url=hook.url))
    await asyncio.wait_for(between.happened.wait(), 60)
    status, answer = await cancel(api, task_id)
    assert (status, answer["error"]) == (400, "invalid_state")
    between.release()
    return task_id


async def cancel_first(installation: Fleet, between: Proxy, api: Service, hook: Receiver) -> TaskId:
    """Cancel a task while its commit is on its way to Redis."""
    between.hold(script(installation.store, "report", "uploading_result"))
    task_id = TaskId(await api.submit("generate_image", SMALL, callback_url=hook.url))
    await asyncio.wait_for(between.happened.wait(), 60)
    between.freeze()
    between.release()
    await eventually(lambda: any(task_id in path.parts for path in (installation.folder / "media").rglob("output.*")))
    assert (await cancel(api, task_id))[0] == 200
    between.thaw()
    return task_id


async def are_over(worker: Process, count: int) -> None:
    """Wait until the worker has ended this many runs."""
    await eventually(lambda: sum(map(worker.times_logged, ("complete", "run_lost", "run_stopped"))) == count)


# ── Nothing is left ──


async def test_a_cancelled_task_leaves_nothing_behind_that_an_ended_one_does_not(installation: Fleet) -> None:
    async with receiver() as hook:
        later = await tried_before(installation.store, hook.url)
        api = await installation.api()
        waiting = await api.submit("generate_image", SMALL, callback_url=hook.url)
        for task_id in (later, waiting):
            assert (await cancel(api, task_id))[1]["previous_state"] == "queued"
        spool = installation.folder / "spool"
        worker = await installation.worker(MOVIEQ_SPOOL=str(spool))
        begun = await api.submit("generate_video", LONG, callback_url=hook.url)
        await api.until(begun, "stage", "frames")
        assert list(spool.rglob(f"{begun}*")) != []
        await cancel(api, begun)
        await eventually(lambda: worker.times_logged("run_stopped") == 1)
        ended = await api.submit("generate_image", SMALL, callback_url=hook.url)
        await api.ended(ended)
        await hook.wait_for(4)
        await eventually(lambda: has_delivered(installation.store))
        allowed = await places(installation.store, ended)
        await eventually(lambda: no_more_than(installation.store, allowed, later, waiting, begun))
        await eventually(lambda: list(spool.rglob(f"{begun}*")) == [])
        assert [path for path in (installation.folder / "media").rglob("*") if begun in path.parts] == []


async def tried_before(store: Store, hook: str) -> TaskId:
    """Return a task that waits for its next try."""
    task_id, run = await running(store, callback_url=hook)
    await requeue(store, task_id, run)
    await claimed(store)  # the last claim of a worker is kept
    return task_id


async def has_delivered(store: Store) -> bool:
    return bool(await raw(store).zcard(KEYS["deliveries"]) == 0)


async def places(store: Store, task_id: str) -> set[str]:
    """Return every key that names or holds the task because of its id, its end or its worker."""
    redis, found = raw(store), set()
    for key in await redis.keys("*"):
        read = {
            b"string": redis.get,
            b"hash": redis.hgetall,
            b"set": redis.smembers,
            b"zset": lambda key: redis.zrange(key, 0, -1),
            b"list": lambda key: redis.lrange(key, 0, -1),
            b"stream": redis.xrange,
            b"none": redis.get,  # it expired meanwhile
        }[await redis.type(key)]
        if task_id in key.decode() + repr(await read(key)):
            name = re.sub(r"\|(completed|cancelled)\|", "|STATE|", key.decode().replace(task_id, "TASK"))
            name = re.sub(r"\|generate_\w+$", "|TYPE", name)
            found.add(re.sub(f"^({KEYS['claimed']}|{KEYS['idempotency']}).*", r"\1WORKER OR REQUEST", name))
    return found


async def no_more_than(store: Store, allowed: set[str], *task_ids: str) -> bool:
    return all([await places(store, task_id) <= allowed for task_id in task_ids])


async def found(store: Store, task_id: TaskId) -> Any:
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    return task


async def ends_of(store: Store, task_id: str) -> list[Any]:
    """Return the terminal entries of a task's log."""
    return [entry for entry in await Queries(store.redis).log_after(TaskId(task_id), None) if entry.type in TERMINAL_EVENTS]


async def test_a_cancel_that_comes_as_the_connection_breaks_is_not_lost() -> None:
    class Breaking:
        """A connection that answers the cancel of a write with an error that came at the same moment, as `asyncio.wait_for` may."""

        def __init__(self) -> None:
            self.closed = False

        async def send_packed_command(self, *command: Any, **options: Any) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RedisConnectionError("it broke") from None

        async def disconnect(self, nowait: bool = False) -> None:
            self.closed = True

    connection: Any = _cancellable(cast("Any", Breaking))()
    sending = asyncio.create_task(connection.send_packed_command(b"PING"))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert connection.closed


async def test_tasks_that_lose_a_cancel_are_cancelled_again() -> None:
    lost = 0

    async def loses_two() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    async def breaks() -> None:
        raise ValueError("nobody waits for it")

    tasks = [asyncio.create_task(loses_two()), asyncio.create_task(breaks())]
    await asyncio.sleep(0)
    await cancel_all(tasks)
    assert all(task.done() for task in tasks)
