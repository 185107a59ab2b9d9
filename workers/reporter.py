"""Report the progress, the notes and the previews of a run while it renders."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from movieq import logs
from movieq.errors import RunLost
from movieq.queue.refusals import log_failure
from movieq.queue.store import Store
from workers.concurrency import beside
from workers.faults import without_paths
from workers.protocol import PREVIEW_BYTES, Free, Note, Plan, Preview, Step
from workers.running import Running, Stop
from workers.supervisor import Progress

REPORT_S: Final = 0.1
"""Time between two reports, in seconds."""
PREVIEW_S: Final = 0.5
"""Time between two previews, in seconds."""
WATCHERS_S: Final = 2.0
"""Time between two checks whether the task has watchers, in seconds."""

log = logs.get()


@asynccontextmanager
async def reporting(store: Store, running: Running) -> AsyncIterator[Reporter]:
    """Yield a reporter of the run that sends while the block runs."""
    reporter = Reporter(store, running)
    async with beside(send_reports=reporter.send_reports(), pass_watchers_on=reporter.pass_watchers_on()):
        yield reporter


class Reporter:
    """Reports the latest state of a run, at most ten times a second.

    If the run is lost, it is stopped. No other error of a report or of an engine's message ends the run or prevents later reports.
    """

    def __init__(self, store: Store, running: Running) -> None:
        self._store = store
        self._running = running
        self._news = asyncio.Event()
        self._latest: tuple[str, str, int | None, int | None] | None = None
        self._stage = ""
        self._notes: deque[str] = deque()
        self._preview: bytes | None = None
        self._preview_due_s = 0.0

    def report(self, current_step: str, *, stage: str, step: int | None = None, steps: int | None = None) -> None:
        """Report this step, unless a later one replaces it before it is sent."""
        self._latest = current_step, stage, step, steps
        self._stage = stage
        self._news.set()

    def on_message(self, message: Progress) -> None:
        """Report a message of the engine. A message that cannot be understood is logged and skipped."""
        try:
            self._understand(message)
        except Exception:
            log.exception("message_skipped", sent=type(message).__name__)

    def _understand(self, message: Progress) -> None:
        eta = self._running.eta
        match message:
            case Plan():
                self._running.use_gpu(1 / len(self._running.group.task_ids) if self._running.group else 0.0)
                if (stage := eta.plan(message.stages)) is not None:
                    self.report(stage.step_name, stage=stage.name)
            case Step():
                if (stage := eta.step(message.stage, message.step, message.steps)) is not None:
                    self.report(stage.step_name, stage=stage.name, step=message.step, steps=message.steps)
            case Free():
                self._running.use_gpu(0.0)
            case Note():
                log.info("engine_note", text=message.text)
                self._notes.append(without_paths(message.text))
                self._news.set()
            case Preview():
                if len(message.jpeg) <= PREVIEW_BYTES:
                    self._preview = message.jpeg
                    self._news.set()

    async def send_reports(self) -> None:
        """Send each new state, note and preview, until the run is lost."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._send_news()
            except RunLost:
                self._running.stop(Stop.LOST)
                return
            except Exception as error:
                if log_failure("report_failed", error):  # the same notes would fail again
                    self._notes.clear()
            await asyncio.sleep(REPORT_S)
            if self._preview is not None:  # it came too soon after the last one
                self._news.set()

    async def _send_news(self) -> None:
        while self._notes:
            await self._send(self._notes[0], self._stage, None, None, keep=True)
            self._notes.popleft()
        if self._latest is not None:
            latest, self._latest = self._latest, None
            await self._send(*latest)
        if self._preview is not None and time.monotonic() >= self._preview_due_s:
            self._preview_due_s = time.monotonic() + PREVIEW_S
            jpeg, self._preview = self._preview, None
            await self._store.preview(self._running.task.task_id, self._running.run, jpeg)

    async def _send(self, current_step: str, stage: str, step: int | None, steps: int | None, keep: bool = False) -> None:
        await self._store.report(
            self._running.task.task_id,
            self._running.run,
            self._running.eta.progress,
            current_step,
            stage=stage,
            step=step,
            steps=steps,
            remaining_ms=self._running.eta.remaining_ms(),
            keep=keep,
            gpu=self._running.gpu,
        )

    async def pass_watchers_on(self) -> None:
        """Notify the child when the task gets its first watcher, and when it loses the last: previews are for watchers."""
        passed_on = watched = False
        while True:
            try:
                watched = await self._store.watched(self._running.task.task_id)
                if watched != passed_on and (child := self._running.child) and child.set_watched(self._running.run, watched):
                    passed_on = watched
            except Exception as error:
                log_failure("watchers_unread", error)
            await asyncio.sleep(WATCHERS_S if watched == passed_on else REPORT_S)  # the child may not have the run yet
