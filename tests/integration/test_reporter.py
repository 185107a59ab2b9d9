"""The progress of a run is reported, whatever errors a message of its engine or a report causes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog
from structlog.contextvars import merge_contextvars

from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.states import GENERATE_VIDEO, Kind, TaskStatus
from tests.arrange import claim, new_task, parts
from workers.eta import Eta
from workers.execute import run_task
from workers.protocol import Stage
from workers.running import Running
from workers.supervisor import Child

CLIP = {"prompt": "a long way up the stairs", "duration": 2, "fps": 24, "resolution": "128x72"}


class OddEta(Eta):
    """An ETA that raises at its first step."""

    raised = False
    steps = 0

    def step(self, name: str, step: int, steps: int) -> Stage | None:
        if not self.raised:
            self.raised = True
            raise ValueError("nobody expected this")
        self.steps += 1
        return super().step(name, step, steps)


async def test_a_message_that_cannot_be_understood_is_logged_and_skipped_and_the_run_goes_on(store: Store, tmp_path: Path) -> None:
    await store.submit(new_task(task_type=GENERATE_VIDEO))
    (claimed,) = await claim(store)
    task_id = claimed.task.task_id
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ready = asyncio.Event()
    (tmp_path / "spool").mkdir()
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as entries:
        async with Fetcher(Guard(())) as fetcher, asyncio.TaskGroup() as group:
            supervising = group.create_task(child.supervise(ready.set))
            await asyncio.wait_for(ready.wait(), 60)
            prepared = parts(store, FolderStorage(tmp_path / "media", "http://127.0.0.1", (b"secret",)), fetcher, tmp_path / "spool")
            running = Running(claimed, child, child.slots.reserve([task_id]))
            running.eta = eta = OddEta(2.0)
            await run_task({"parts": prepared, "running": running}, CLIP)
            supervising.cancel()
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert (task.status, task.attempt) == (TaskStatus.COMPLETED, 1), entries
    assert eta.raised
    assert eta.steps > 0, "what came later was understood"
    assert [(entry["sent"], entry["task_id"]) for entry in entries if entry["event"] == "message_skipped"] == [("Step", task_id)]
