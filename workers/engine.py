"""The worker's side of a child: spawn it, wait till it serves, run one task at a time, cancel, kill.

A child that dies, hangs or grows too old costs one attempt and one respawn, never the worker. It has a session of its own, so that signals
of a terminal or of systemd do not reach it, and none of movieq's settings, so that no engine can read a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import psutil

from movieq import logs
from movieq.contracts import Kind, ModelSwaps, TaskId
from movieq.errors import TASK_FAULTS, InternalFault, MovieqError, TaskFault
from movieq.settings import PREFIX
from workers.protocol import (
    EXIT_UNFIT,
    HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    Done,
    Failed,
    FromChild,
    Note,
    Plan,
    Preview,
    Ready,
    Run,
    Step,
    ToChild,
    Watched,
    frame,
    from_child_decoder,
)

START_S: Final = 120.0
"""From spawn to Ready: the imports of a GPU child on a cold disk take their time."""
CANCEL_GRACE_S: Final = 5.0
RESPAWN_S: Final = 0.1, 30.0
"""Shortest and longest wait before a child that died is started again; long lives reset it."""
STDERR_LINES: Final = 40
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
"""What an engine must not do, whoever started the worker: fetch models, or run code that comes with them."""

Progress = Plan | Step | Note | Preview
"""What a child says of a run before its end."""

log = logs.get()


class ChildUnfit(MovieqError):
    """A child said that it cannot work here: a GPU that is not there, a library that is missing. Another would say the same."""


class ChildDied(MovieqError):
    """The child ended, or had to be killed, with a run. `exit_code` is negative for a signal; `stage` the last one that was heard of."""

    def __init__(self, message: str, exit_code: int | None, stage: str | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stage = stage


class Child:
    """One child and its slot: at most one run at a time. `keep` must be running for it to live."""

    def __init__(self, name: str, kinds: tuple[Kind, ...], device: str, *, step_timeout_s: float) -> None:
        self.name = name
        self.kinds = kinds
        self.device = device
        self.task_id: TaskId | None = None
        self.tasks_completed = 0
        self.models: list[str] = []
        """Those on its device."""
        self.models_parked: list[str] = []
        """Those that wait in the host's memory."""
        self.model_swaps = ModelSwaps()
        self._step_timeout_s = step_timeout_s
        self._ready: Ready | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._serves = asyncio.Event()
        self._killed = False
        self._run: str | None = None
        self._inbox: asyncio.Queue[FromChild | None] = asyncio.Queue()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @property
    def free(self) -> bool:
        """Whether a run can begin now."""
        return self._ready is not None and self.task_id is None

    @property
    def pid(self) -> int | None:
        """Of the child that serves; None while there is none."""
        return self._ready.pid if self._ready else None

    def memory_bytes(self) -> int:
        """Resident memory of the child, 0 while there is none."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else 0
        except psutil.Error:
            return 0

    async def keep(self, on_ready: Callable[[], None]) -> None:
        """Starts the child, again whenever it ended, and ends it when cancelled. `on_ready` is called each time that it serves.

        Raises ChildUnfit.
        """
        wait_s = RESPAWN_S[0]
        while True:
            begun = time.monotonic()
            try:
                await self._live(on_ready)
            except* (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as group:  # its reader's come in a group
                error = group.exceptions[0]
                log.error("child_failed", child=self.name, problem=str(error) or type(error).__name__)
            finally:
                await self._end()
            if self._killed or time.monotonic() - begun > RESPAWN_S[1]:
                wait_s = RESPAWN_S[0]  # it was in order, or is not to blame
            else:
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RESPAWN_S[1])

    async def run(self, request: Run, on_message: Callable[[Progress], None]) -> Done:
        """What the child made of this run.

        Raises the TaskFault that the engine reports; ChildDied where the child ended, or showed no progress for so long that it was killed.
        Waits for the next child where the one that was free has died since: that death was not this run's. Cancelled, it stops the child
        between two steps, kills it after a grace, and goes only when the child is free or gone.
        """
        await self._served()
        self._run = request.run
        self._inbox = asyncio.Queue()
        stage: str | None = None
        try:
            self._send(request)
            while True:
                try:
                    async with asyncio.timeout(self._step_timeout_s):
                        message = await self._inbox.get()
                except TimeoutError:
                    self.kill()
                    raise ChildDied(f"the engine showed no progress for {self._step_timeout_s:g} s and was killed", None, stage) from None
                match message:
                    case Plan() | Step() | Note() | Preview():
                        stage = message.stage if isinstance(message, Step) else stage
                        on_message(message)
                    case Done():
                        self.tasks_completed += 1
                        self._hold(message)
                        return message
                    case Failed():
                        if message.broken:
                            self._gone()  # it ends by itself: nothing must be sent to it any more
                        raise self._fault(message)
                    case None:
                        raise ChildDied(*await self._obituary(stage))
                    case _:
                        raise InternalFault(f"the engine answered {type(message).__name__} without being asked to")
        except asyncio.CancelledError:
            stopping = asyncio.ensure_future(self._stop(request.run))
            while not stopping.done():  # bounded by the grace; a second cancel must not leave a child that still works
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(stopping)
            stopping.result()
            raise
        finally:
            self._run = None

    def watched(self, run: str, watched: bool) -> bool:
        """The child knows whether somebody watches this run; False where it does not work on it."""
        if run != self._run:
            return False
        self._send(Watched(run, watched))
        return True

    def kill(self) -> None:
        """The child, and what it started, is gone; the next one starts at once."""
        self._killed = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._gone()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own

    async def _served(self) -> None:
        try:
            async with asyncio.timeout(START_S):
                while self._ready is None:
                    await self._serves.wait()
        except TimeoutError:
            raise InternalFault(f"no engine came back within {START_S:g} s") from None

    def _hold(self, message: Ready | Done) -> None:
        """What its memory holds by this message."""
        self.models = list(message.models)
        self.models_parked = list(message.models_parked) if isinstance(message, Done) else []
        self.model_swaps = message.model_swaps if isinstance(message, Done) else ModelSwaps()

    def _gone(self) -> None:
        self._ready = None
        self.models, self.models_parked = [], []
        self._serves.clear()

    async def _live(self, on_ready: Callable[[], None]) -> None:
        self._killed = False
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "workers.child",
            "--device",
            self.device,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1024 * 1024,
            env={**{name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}, **OFFLINE},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_stderr(process.stderr))
            async with asyncio.timeout(START_S):
                first = await self._receive(process.stdout)
            if isinstance(first, Ready):
                self._ready = first
                self._hold(first)
                self._serves.set()
                log.info("child_ready", child=self.name, pid=first.pid, device=first.device)
                on_ready()
                while (message := await self._receive(process.stdout)) is not None:
                    if not isinstance(message, Ready) and message.run == self._run:
                        self._inbox.put_nowait(message)
                self._gone()
                self._inbox.put_nowait(None)
            await process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started goes with it, and lets go of its standard error
        if isinstance(first, Ready):
            log.warning("child_ended", child=self.name, pid=first.pid, exit_code=process.returncode)
            return
        said = " / ".join(list(self._stderr)[-3:])
        if process.returncode == EXIT_UNFIT:
            raise ChildUnfit(f"{self.name}: {said}")
        raise OSError(f"it ended with {process.returncode} before it served: {said}")

    async def _end(self) -> None:
        """No process is left, and nobody waits for it."""
        self._gone()
        if self._process is not None:
            self._kill()
            await asyncio.shield(self._process.wait())
        self._inbox.put_nowait(None)

    async def _receive(self, stream: asyncio.StreamReader) -> FromChild | None:
        try:
            (size,) = HEADER.unpack(await stream.readexactly(HEADER.size))
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
            return from_child_decoder.decode(await stream.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _send(self, message: ToChild) -> None:
        """Without waiting for room in the pipe: a child that hangs makes none, and what one run sends fits in memory."""
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            return  # the reader says that the child is gone
        with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's word for a closed pipe
            process.stdin.write(frame(message))

    async def _read_stderr(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            log.debug("child_says", child=self.name, text=text)

    async def _stop(self, run: str) -> None:
        """The child no longer works on the run: it answered, or it is dead."""
        self._send(Cancel(run))
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                while isinstance(await self._inbox.get(), Progress):
                    pass
        except TimeoutError:
            log.warning("child_killed", child=self.name, reason="it did not stop within the grace", grace_s=CANCEL_GRACE_S)
            self.kill()

    async def _obituary(self, stage: str | None) -> tuple[str, int | None, str | None]:
        exit_code = await self._process.wait() if self._process else None
        how = f"signal {signal.Signals(-exit_code).name}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        return f"the engine's process ended with {how}{f' at {stage}' if stage else ''}", exit_code, stage

    def _fault(self, failed: Failed) -> TaskFault:
        if failed.traceback:
            log.info("engine_fault", child=self.name, code=failed.code, traceback=failed.traceback)
        return TASK_FAULTS.get(failed.code, InternalFault)(failed.message)
