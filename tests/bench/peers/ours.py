"""movieq: the real worker, store and scripts, with full task state, events, leases and fences. Woken by pub/sub, with a poll of 1 s.

The slots of `work` have no process: their task completes at once through the store. `through_child` has the real child instead, and the
whole of `run_task`, with a picture of 64 x 64.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from arq import func

from movieq import logs
from movieq.errors import TaskFault
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.store import NewTask, Store
from movieq.settings import LogFormat, LogLevel
from movieq.storage.folder import FolderStorage
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import Kind, TaskId
from tests import arrange
from tests.arrange import parts
from tests.bench.peers import peer
from workers.execute import run_task
from workers.protocol import Done, Run
from workers.running import Running
from workers.slots import Group
from workers.supervisor import Child, Progress
from workers.worker import Worker

KWARGS = msgspec.msgpack.encode(peer.PAYLOAD)
PICTURE = msgspec.msgpack.encode({"task_data": {"prompt": "a lamp", "resolution": "64x64"}})
RESULT = arrange.result()
PINGS = 50


def task(project: str = "bench", kwargs: bytes = KWARGS) -> NewTask:
    """A task as the API would submit it."""
    return arrange.new_task(project, task_id=TaskId(str(uuid.uuid4())), kwargs=kwargs)


@asynccontextmanager
async def opened(order: peer.Order) -> AsyncIterator[Store]:
    """A store."""
    store = Store(connect(order.url, patient=True))
    yield store
    await store.redis.aclose()


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    async with opened(order) as store:
        yield lambda: store.submit(task())


class Slot(Child):
    """A slot without a process."""

    async def supervise(self, on_room: Callable[[], None], on_unfit: Callable[[], None] = lambda: None) -> None:
        """It is ready at once."""
        self.slots.on_room = on_room
        self.slots.open()
        await asyncio.Event().wait()


async def work(order: peer.Order, begun: peer.Tally) -> None:
    """A worker."""

    async def noop(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
        begun()
        running: Running = ctx["running"]
        running.free_slot()  # as in run_task: the slot is free as soon as the engine is, while the result is committed
        await ctx["store"].complete(running.task.task_id, running.run, RESULT)

    children: list[Child] = [Slot(f"slot{number}", (Kind.CPU_INTENSIVE,), step_timeout_s=60) for number in range(order.concurrency)]
    async with opened(order) as store:
        await worker(order, store, children, noop, {"store": store}).async_run()


def worker(order: peer.Order, store: Store, children: list[Child], function: Any, ctx: dict[str, Any]) -> Worker:
    """The real worker, as `workers.app.serve` makes it."""
    logs.configure(LogLevel.WARNING, LogFormat.JSON)
    return Worker(
        worker_id=f"bench-{os.getpid()}",
        store=store,
        queries=Queries(store.redis),
        subscriber=Subscriber(order.url),
        children=children,
        drain_s=1.0,
        weights={},
        functions=[func(function, name=task_type) for task_type in REGISTRY.tasks],
        queue_name=KEYS["deliveries"],
        redis_pool=store.redis,
        job_serializer=store.redis.job_serializer,
        job_deserializer=store.redis.job_deserializer,
        ctx=ctx,
    )


class Clocked(Child):
    """The real child, with the times between which it worked on each run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.runs_ns: list[tuple[int, int]] = []

    async def run(self, request: Run, on_message: Callable[[Progress], None], group: Group) -> Done:
        """As the real one."""
        begun_ns = time.monotonic_ns()
        done = await super().run(request, on_message, group)
        self.runs_ns.append((begun_ns, time.monotonic_ns()))
        return done


async def through_child(order: peer.Order) -> None:
    """Prints how long the child is idle between back-to-back tasks: from its answer to the next run, and there and back over the pipes."""
    child = Clocked("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ended = asyncio.Event()

    async def counted(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
        await run_task(ctx, task_data)
        if len(child.runs_ns) == order.tasks:
            ended.set()

    async with opened(order) as store:
        for _ in range(order.tasks):
            await store.submit(task(kwargs=PICTURE))
        with tempfile.TemporaryDirectory() as folder:
            async with Fetcher(Guard(())) as fetcher:
                prepared = parts(store, FolderStorage(Path(folder) / "media", "http://127.0.0.1", (b"secret",)), fetcher, Path(folder))
                working = asyncio.create_task(worker(order, store, [child], counted, {"parts": prepared}).async_run())
                waiting = asyncio.create_task(ended.wait())
                await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)  # the worker first, where it broke
                pings_ms = [await ping(child) for _ in range(PINGS)] if ended.is_set() else []
                for started in (waiting, working):
                    started.cancel()
                await asyncio.wait({working, waiting})
    pipes_ms = statistics.median(pings_ms)
    gaps_ms = sorted((after[0] - before[1]) / 1e6 + pipes_ms for before, after in pairwise(child.runs_ns))
    print(
        json.dumps(
            {
                "gap_p50_ms": statistics.median(gaps_ms),
                "gap_p99_ms": gaps_ms[int(len(gaps_ms) * 0.99)],
                "pipes_ms": pipes_ms,
                "run_p50_ms": statistics.median((after - before) / 1e6 for before, after in child.runs_ns),
            }
        )
    )


async def ping(child: Child) -> float:
    """Milliseconds of a run that the child refuses at once: both pipes, and waking the process at the end of each."""
    nothing = Run("ping", "ping", "bench", "generate_image", "none", "none", {}, {}, {}, 0, "/nonexistent")
    begun_ns = time.monotonic_ns()
    with suppress(TaskFault):
        await arrange.ran(child, nothing)
    return (time.monotonic_ns() - begun_ns) / 1e6


if __name__ == "__main__":
    if sys.argv[1] == "through_child":
        peer.run(through_child(peer.Order()))
    else:
        peer.main(producer, work)
