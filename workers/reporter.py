"""Report the progress and the previews of a run."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from movieq import logs
from movieq.errors import RunLost
from movieq.queue.refusals import log_failure
from movieq.queue.store import Store
from workers.faults import without_paths
from workers.host import cancel_all
from workers.protocol import Free, Note, Plan, Preview, Step
from workers.running import Running
from workers.supervisor import Progress

log = logs.get()

REPORT_INTERVAL_S: Final = 0.1
PREVIEW_INTERVAL_S: Final = 0.5
PREVIEW_BYTES: Final = 10_000
WATCH_INTERVAL_S: Final = 2.0
"""Between two looks whether anybody watches the task."""


class Reporter:
    """Says how far the run is: the latest state, at most ten times a second. Within its block a loss of the run stops it."""

    def __init__(self, store: Store, running: Running) -> None:
        self._store = store
        self._running = running
        self._news = asyncio.Event()
        self._latest: tuple[str, str, int | None, int | None] | None = None
        self._stage = ""
        self._notes: deque[str] = deque()
        self._preview: bytes | None = None
        self._preview_due_s = 0.0

    async def __aenter__(self) -> None:
        self._tasks = asyncio.create_task(self._tell()), asyncio.create_task(self._look())

    async def __aexit__(self, *_: object) -> None:
        await cancel_all(self._tasks)

    def say(self, current_step: str, *, stage: str, step: int | None = None, steps: int | None = None) -> None:
        self._latest = current_step, stage, step, steps
        self._stage = stage
        self._news.set()

    def on_message(self, message: Progress) -> None:
        pace = self._running.pace
        match message:
            case Plan():
                self._running.take_gpu(1 / len(self._running.group.task_ids) if self._running.group else 0.0)
                if (stage := pace.plan(message.stages)) is not None:
                    self.say(stage.step_name, stage=stage.name)
            case Step():
                if (stage := pace.step(message.stage, message.step, message.steps)) is not None:
                    self.say(stage.step_name, stage=stage.name, step=message.step, steps=message.steps)
            case Free():
                self._running.take_gpu(0.0)
            case Note():
                log.info("engine_note", text=message.text)
                self._notes.append(without_paths(message.text))
                self._news.set()
            case Preview():
                if len(message.jpeg) <= PREVIEW_BYTES:
                    self._preview = message.jpeg
                    self._news.set()

    async def _tell(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                while self._notes:
                    await self._report(self._notes[0], self._stage, None, None, keep=True)
                    self._notes.popleft()
                if self._latest is not None:
                    latest, self._latest = self._latest, None
                    await self._report(*latest)
                if self._preview is not None and time.monotonic() >= self._preview_due_s:
                    self._preview_due_s = time.monotonic() + PREVIEW_INTERVAL_S
                    jpeg, self._preview = self._preview, None
                    await self._store.preview(self._running.task.task_id, self._running.run, jpeg)
            except RunLost:
                self._running.stop("lost")
                return
            except Exception as error:
                if log_failure("report_failed", error):  # saying it again would fail again
                    self._notes.clear()
            await asyncio.sleep(REPORT_INTERVAL_S)
            if self._preview is not None:  # one that came too soon after the last
                self._news.set()

    async def _look(self) -> None:
        """The child hears when somebody begins or ceases to watch the task."""
        said = watched = False
        while True:
            try:
                watched = await self._store.watched(self._running.task.task_id)
                if watched != said and (child := self._running.child) and child.watched(self._running.run, watched):
                    said = watched
            except Exception as error:
                log_failure("look_failed", error)
            await asyncio.sleep(WATCH_INTERVAL_S if watched == said else REPORT_INTERVAL_S)  # it may not have the run yet

    async def _report(self, current_step: str, stage: str, step: int | None, steps: int | None, keep: bool = False) -> None:
        await self._store.report(
            self._running.task.task_id,
            self._running.run,
            self._running.pace.progress,
            current_step,
            stage=stage,
            step=step,
            steps=steps,
            remaining_ms=int(self._running.pace.remaining_s() * 1000),
            keep=keep,
            gpu=self._running.gpu,
        )
