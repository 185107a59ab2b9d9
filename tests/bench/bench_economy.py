"""What keeps a GPU busy, by tiny models on the CPU: the gap between two tasks, swaps with and without affinity, pictures made together.

A mixed queue of 200 tasks of four models, of which one at a time has room, goes through the real worker twice: as it is, and by one that
does not say which models are loaded. Tasks of one batch key go through it twice: made together, and one by one.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from arq import func

from movieq import logs
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.local.embedded import Valkey
from movieq.models import choice
from movieq.models import table as models
from movieq.models.table import Model
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.store import NewTask, Slot, Store
from movieq.settings import LogFormat, LogLevel
from movieq.storage.folder import FolderStorage
from movieq.tasks import params
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import Kind, TaskId, TaskStatus
from tests.arrange import new_task, parts
from tests.bench.report import percentile, report
from tests.engines import tiny
from workers.execute import run_task
from workers.supervisor import Child
from workers.worker import Worker

MODELS = 4
TASKS = 200
ALIKE = 64
ROWS = 8
SIDE = 64
NEED_GB = 1000.0
"""More than any machine has: so one model at a time is in memory."""


class Forgetful(Worker):
    """Does not say which models are loaded."""

    def _slots(self) -> list[Slot]:
        return [msgspec.structs.replace(slot, models=()) for slot in super()._slots()]


class Outcome(NamedTuple):
    """What came of a queue."""

    seconds: float
    loads: int
    overtaken_s: float
    """The longest from the first to the last later task that began before one."""
    gaps_ms: list[float]
    rows: float
    """How many pictures were made at once, on average."""


class Bench:
    """A table of tiny models, and queues of tasks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        tiny.sd(folder / "model")
        self.table = {"animatic": models.load()["animatic"]} | {f"tiny{number}": self._entry() for number in range(MODELS)}

    def _entry(self, **limits: Any) -> Model:
        fields = {
            "engine": "diffusers", "kind": "cpu_intensive", "tasks": {"generate_image": 1.0}, "pipeline": "StableDiffusionPipeline",
            "weights": {"repository": str(self.folder / "model")}, "defaults": {"steps": 2}, "gpu_memory_gb": NEED_GB,
            "limits": {"sides": 8, "pixels": [1, SIDE * SIDE], **limits},
        }  # fmt: skip
        return msgspec.convert(fields, Model)

    def together(self, rows: int) -> None:
        """So many pictures of a key are made at once."""
        self.table["tiny0"] = self._entry(batch=[[SIDE * SIDE, rows]] if rows > 1 else [])

    def task(self, number: int, model: str) -> NewTask:
        """A picture."""
        data: dict[str, Any] = {"prompt": f"lamp {number}", "resolution": f"{SIDE}x{SIDE}"}
        key, rows = choice.batch(model, self.table[model], params.convert(params.ImageParams, data))
        kwargs = msgspec.msgpack.encode({"task_data": data})
        return new_task("film", engine="diffusers", model=model, shape=model, kwargs=kwargs, batch=key, batch_rows=rows)

    async def through(self, worker: type[Worker], names: list[str]) -> Outcome:
        """A queue of these models, after a first task for which the child imports its libraries."""
        valkey = Valkey(self.folder / f"valkey{time.monotonic_ns()}")
        valkey.start()
        store = Store(connect(valkey.url, patient=True))
        try:
            ids = [(await store.submit(self.task(number, name))).task_id for number, name in enumerate(["tiny0", *names])]
            return await self._worked(worker, store, valkey.url, ids)
        finally:
            await store.redis.aclose()
            valkey.stop()

    async def _worked(self, worker: type[Worker], store: Store, url: str, ids: list[TaskId]) -> Outcome:
        child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=120)
        left, over = len(ids), asyncio.Event()

        async def counted(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
            nonlocal left
            await run_task(ctx, task_data)
            left -= ctx["running"].reason is None  # else it was given back, and comes again
            if not left:
                over.set()

        async with Fetcher(Guard(())) as fetcher:
            storage = FolderStorage(self.folder / "media", "http://127.0.0.1", (b"secret",))
            working = asyncio.create_task(
                worker(
                    worker_id="bench",
                    store=store,
                    queries=Queries(store.redis),
                    subscriber=Subscriber(url),
                    children=[child],
                    drain_s=1.0,
                    weights={},
                    functions=[func(counted, name=task_type) for task_type in REGISTRY.tasks],
                    queue_name=KEYS["deliveries"],
                    redis_pool=store.redis,
                    job_serializer=store.redis.job_serializer,
                    job_deserializer=store.redis.job_deserializer,
                    ctx={"parts": parts(store, storage, fetcher, self.folder, models=self.table)},
                ).async_run()
            )
            waiting = asyncio.create_task(over.wait())
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            for started in (waiting, working):
                started.cancel()
            await asyncio.wait({working, waiting})
        return self._outcome([await Queries(store.redis).task(task_id) for task_id in ids], child)

    def _outcome(self, tasks: list[Any], child: Child) -> Outcome:
        assert all(task.status is TaskStatus.COMPLETED for task in tasks)
        begun = [task.started_at_ms for task in tasks]
        earlier = [[other for other in begun[number + 1 :] if other < each] or [each] for number, each in enumerate(begun)]
        overtaken = [max(others) - min(others) for others in earlier]
        rows = [task.result.metadata["batch_size"] for task in tasks[1:]]
        seconds = (max(task.ended_at_ms for task in tasks) - tasks[0].ended_at_ms) / 1000
        gaps = [gap * 1000 for gap in child.idle_s]
        return Outcome(seconds, child.model_swaps.loads, max(overtaken) / 1000, gaps, statistics.mean(rows))


async def measure(folder: Path) -> None:
    """Every queue, and the table."""
    logs.configure(LogLevel.ERROR, LogFormat.JSON)
    bench = Bench(folder)
    order = random.Random(1)
    mixed = [f"tiny{order.randrange(MODELS)}" for _ in range(TASKS)]
    kept, forgot = [await bench.through(each, mixed) for each in (Worker, Forgetful)]
    single = await bench.through(Worker, ["tiny0"] * ALIKE)
    bench.together(ROWS)
    batched = await bench.through(Worker, ["tiny0"] * ALIKE)
    report(
        "economy",
        {
            "idle_gap_p50_ms": statistics.median(single.gaps_ms),
            "idle_gap_p99_ms": percentile(single.gaps_ms, 0.99),
            "idle_gap_aim_ms": 30.0,
            "swaps_with_affinity": kept.loads,
            "swaps_without": forgot.loads,
            "swaps_without_to_with": forgot.loads / kept.loads,
            "swaps_without_to_with_aim": 5.0,
            "overtaken_most_s": kept.overtaken_s,
            "overtaken_most_s_aim": 30.0,
            "mixed_with_affinity_s": kept.seconds,
            "mixed_without_s": forgot.seconds,
            "one_by_one_per_s": ALIKE / single.seconds,
            "batched_per_s": ALIKE / batched.seconds,
            "batched_to_one_by_one": single.seconds / batched.seconds,
            "rows_mean": batched.rows,
        },
        {"threads": torch.get_num_threads(), "torch": str(torch.__version__)},
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(measure(Path(temporary)))
