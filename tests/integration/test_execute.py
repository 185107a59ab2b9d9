"""A run in this process: what a worker can rely on while it goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.states import GENERATE_VIDEO, Kind, TaskStatus
from tests.arrange import claim, new_task, parts
from workers.execute import run_task
from workers.running import Running
from workers.supervisor import Child

CLIP = {"prompt": "a long way up the stairs", "duration": 1, "fps": 24, "resolution": "64x64"}


class Gated(FolderStorage):
    """Holds each upload until the gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "http://127.0.0.1", (b"secret",))
        self.reached, self.gate = asyncio.Event(), asyncio.Event()

    async def put(self, key: str, source: Path, content_type: str) -> int:
        self.reached.set()
        await self.gate.wait()
        return await super().put(key, source, content_type)


async def test_a_run_that_only_uploads_has_its_finished_files_noted_so_that_a_drain_lets_it_end(store: Store, tmp_path: Path) -> None:
    await store.submit(new_task(task_type=GENERATE_VIDEO))
    (claimed,) = await claim(store)
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ready, storage = asyncio.Event(), Gated(tmp_path / "media")
    (tmp_path / "spool").mkdir()
    async with Fetcher(Guard(())) as fetcher, asyncio.TaskGroup() as group:
        supervising = group.create_task(child.supervise(ready.set))
        await asyncio.wait_for(ready.wait(), 60)
        running = Running(claimed, child, child.slots.reserve([claimed.task.task_id]))
        run = group.create_task(run_task({"parts": parts(store, storage, fetcher, tmp_path / "spool"), "running": running}, CLIP))
        await asyncio.wait_for(storage.reached.wait(), 60)
        assert running.finished is not None
        storage.gate.set()
        await run
        supervising.cancel()
    task = await Queries(store.redis).task(claimed.task.task_id)
    assert task is not None
    assert task.status is TaskStatus.COMPLETED
