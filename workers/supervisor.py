"""The worker's side of an engine process: start it, wait until it serves, drive one run after another, cancel, kill.

A child that dies, hangs or grows too old costs one attempt and one respawn, never the worker. It has a session of its own, so that signals
of a terminal or of systemd do not reach it, and none of movieq's settings, so that no engine can read a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil

from movieq import logs
from movieq.backoff import Backoff
from movieq.errors import TASK_FAULTS, InternalFault, InvalidInput, MovieqError, OutOfMemory, TaskFault, first_of
from movieq.models import table as models
from movieq.settings import PREFIX
from movieq.tasks.entities import ModelSwaps
from movieq.tasks.states import GENERATE_IMAGE, Kind
from workers.concurrency import uninterrupted
from workers.faults import HostFault
from workers.protocol import (
    EXIT_UNFIT,
    HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Free,
    FromChild,
    Note,
    Plan,
    Preview,
    Ready,
    Rows,
    Run,
    Step,
    Unsendable,
    Watched,
    encoded_run,
    frame,
    from_child_decoder,
)
from workers.slots import Group, Slots

START_S: Final = 120.0
"""From spawn to Ready: the imports of a GPU child on a cold disk take their time."""
CANCEL_GRACE_S: Final = 5.0
"""How long a child may take to stop a run, or to end once it has closed its output."""
RESPAWN_S: Final = 0.1, 30.0
"""Shortest and longest wait before a child that died is started again; long lives reset it."""
FAILURES: Final = 3
"""After so many different tasks in a row failed on a device, it is examined before it takes more."""
EXAMINE_S: Final = 120.0
"""How long the self-test of a device may take."""
LOOK_S: Final = 1.0
"""Between two checks, by a run that waits for its device, whether that still works."""
IDLES: Final = 1000
"""How many waits of a device are remembered for the median."""
STDERR_LINES: Final = 40
"""How many lines of a child's standard error are remembered for its error."""
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
"""What an engine must not do, whoever started the worker: fetch models, or run code that comes with them."""

SELF_TEST: Final = "self-test"
ENDS: Final = frozenset(each.__struct_config__.tag for each in (Done, Failed, Cancelled))

Progress = Plan | Step | Note | Rows | Preview | Free
"""What a child sends about a run before its end."""

log = logs.get()


class _Header(msgspec.Struct, frozen=True):
    """The part of a message that tells its type and its run, where the rest cannot be read."""

    type: str
    run: str


_header = msgspec.msgpack.Decoder(_Header)


class ChildUnfit(MovieqError):
    """A child reported that it cannot work here: a GPU that is not there, a library that is missing. Another would report the same."""


class ChildDied(MovieqError):
    """The child ended, or had to be killed, with a run. `exit_code` is negative for a signal; `stage` the last one that it reported.

    `blameless`: it was killed because of another run.
    """

    def __init__(self, message: str, exit_code: int | None, stage: str | None, *, blameless: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stage = stage
        self.blameless = blameless


class _Driven:
    """A run that the child works on, or will: its messages so far unread, its last stage, and whether the child has ended it."""

    def __init__(self, run: str, group: Group) -> None:
        self.run = run
        self.group = group
        self.messages: asyncio.Queue[FromChild | None] = asyncio.Queue()
        """None: the child is dead."""
        self.stage: str | None = None
        self.ended = False


class Child:
    """The engine process of one device, and the runs on it. It lives while `supervise` runs."""

    def __init__(self, name: str, kinds: tuple[Kind, ...], device: str, *, step_timeout_s: float) -> None:
        self.name = name
        self.kinds = kinds
        self.device = device
        self.slots = Slots(self._send)
        self.tasks_completed = 0
        self.models: list[str] = []
        """Those loaded on its device."""
        self.models_parked: list[str] = []
        """Those offloaded to the host's memory."""
        self.model_swaps = ModelSwaps()
        self.rows: dict[str, int] = {}
        """Batch key -> how many rows fit in its memory, where that is known to be fewer than the model table allows."""
        self.idle_s: deque[float] = deque(maxlen=IDLES)
        """How long the device waited between two groups, where the second was there before the first was done."""
        self.problem: str | None = None
        """What is wrong with its device, in words for users; None while nothing is. While there is a problem it takes no tasks."""
        self.unfit: str | None = None
        """Why it cannot work here at all, where it reported that."""
        self.served = False
        """Whether it has ever worked."""
        self.spool: Path | None = None
        """Where its self-test writes; None for the system's temporary folder."""
        self._suspect = False
        """Whether it is to be restarted and examined once it has no run."""
        self._failed: list[Group] = []
        """Groups of different tasks that failed since the last one that was done."""
        self._step_timeout_s = step_timeout_s
        self._ready: Ready | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._serves = False
        self._killed = False
        self._blamed: str | None = None
        """The run that the child was killed for, or that broke it."""
        self._driven: dict[str, _Driven] = {}
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @property
    def models_next(self) -> list[str]:
        """The models that will be on its device when it takes what is claimed now: one still to be loaded may push out all others."""
        coming = [group.model for group in self.slots.groups if group.model not in self.models]
        return coming or self.models

    @property
    def pid(self) -> int | None:
        """The process id of the child that serves; None while there is none."""
        return self._ready.pid if self._ready else None

    def memory_bytes(self) -> int:
        """Return the resident memory of the child, 0 while there is none."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else 0
        except (psutil.Error, OSError):  # it has ended; or this process has too many files open
            return 0

    async def supervise(self, on_room: Callable[[], None], on_unfit: Callable[[], None] = lambda: None) -> None:
        """Start the child, again whenever it ended, and end it when cancelled. `on_room` is called whenever a slot becomes free.

        `on_unfit` is called each time that the child reports that it cannot work here; what that raises ends this.
        """
        self.slots.on_room = on_room
        backoff = Backoff(*RESPAWN_S)
        while True:
            started_s = time.monotonic()
            self._serves, self.unfit = False, None
            try:
                await self._live()
            except* Exception as group:  # errors of its reader come in a group
                self._note_failure(first_of(group))
            finally:
                await self._end()
            if self.unfit is not None:
                on_unfit()
            if self._killed or time.monotonic() - started_s > RESPAWN_S[1]:
                backoff.reset()  # it was in order, or is not to blame
            else:
                await asyncio.sleep(backoff.next_s())

    # ── A run ──

    async def run(self, request: Run, on_message: Callable[[Progress], None], group: Group) -> Done:
        """Return what the child rendered for this run, one of its group.

        Raises the TaskFault that the engine reports; ChildDied where the child ended, or showed no progress for so long that it was killed.
        Waits for its turn, and for the next child where the one that was free has died since: that death was not this run's. Cancelled, it
        stops the child between two steps, kills it after a grace, and leaves only when the child is free of it or gone.
        """
        body = _sendable(request)
        driven = self._driven[request.run] = _Driven(request.run, group)
        try:
            self.slots.add(group, request.run, body)
            await self._wait_for_device(group)
            while not isinstance(message := await self._next(driven), Done):
                self._follow(driven, message, on_message)
            self.tasks_completed += 1
            self._failed.clear()
            self._note_models(message)
            return message
        except BaseException:  # a cancel, or what `on_message` raised: the child may still work on it
            if group.started.is_set() and not driven.ended:
                await uninterrupted(self._stop(driven))  # no cancel may leave a child that still works; bounded by the grace
            raise
        finally:
            del self._driven[request.run]
            self._restart_if_suspect()

    async def _wait_for_device(self, group: Group) -> None:
        """Wait until the child has the group. Raises HostFault where there is no child for too long."""
        since_s = time.monotonic()
        while not group.started.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await group.started.wait()
            except TimeoutError:
                if self._ready is not None:
                    since_s = time.monotonic()
                elif self.problem is not None or time.monotonic() - since_s > START_S:
                    raise HostFault(self.problem or "its engine does not start again", device=True) from None

    async def _next(self, driven: _Driven) -> Progress | Done:
        """Return the next message of the run. Raises where the child ended it without a result, died, or is silent for too long."""
        try:
            async with asyncio.timeout(self._step_timeout_s):
                message = await driven.messages.get()
        except TimeoutError:
            driven.ended = True
            self.kill(driven.run)
            self._count_failure(driven.group)
            silence = f"the engine showed no progress for {self._step_timeout_s:g} s and was killed"
            raise ChildDied(silence, None, driven.stage) from None
        if isinstance(message, Progress):
            return message
        driven.ended = True
        match message:
            case Done():
                return message
            case Failed():
                if message.broken:
                    self._stop_serving()  # it ends by itself: nothing must be sent to it any more
                    self._blamed = driven.run
                raise self._fault(message, driven.group)
            case None:
                raise await self._death(driven)
            case _:
                raise InternalFault("the engine stopped without being asked to")

    def _follow(self, driven: _Driven, message: Progress, on_message: Callable[[Progress], None]) -> None:
        match message:
            case Rows():
                self.rows[driven.group.batch] = message.rows
            case Free():
                if driven.group.waited:
                    self.idle_s.append(message.idle_s)
                on_message(message)
                self.slots.leave(driven.group, driven.run)
            case _:
                if isinstance(message, Step):
                    driven.stage = message.stage
                on_message(message)

    async def _stop(self, driven: _Driven) -> None:
        """Stop a run: then the child has answered, or is dead."""
        self._send(frame(Cancel(driven.run)))
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                while isinstance(await driven.messages.get(), Progress):
                    pass
        except TimeoutError:
            log.warning("child_killed", child=self.name, reason="it did not stop within the grace", grace_s=CANCEL_GRACE_S)
            self.kill(driven.run)

    def set_watched(self, run: str, watched: bool) -> bool:
        """Tell the child whether this run has watchers; return whether the child has the run."""
        if run not in self._driven or not self._driven[run].group.started.is_set():
            return False
        self._send(frame(Watched(run, watched)))
        return True

    # ── Failures ──

    def suspect(self, problem: str) -> None:
        """Take no more tasks on a device that may be at fault until its child was restarted and passed a self-test."""
        if not self._suspect:
            log.error("device_problem", child=self.name, device=self.device, problem=problem)
        self._suspect, self.problem = True, problem
        self.slots.close()
        self._failed.clear()

    def _count_failure(self, group: Group) -> None:
        """Count a group that failed by a fault of the engine; too many of different tasks make the device suspect."""
        ids = set(group.task_ids)
        if not any(ids & set(each.task_ids) for each in self._failed):
            self._failed.append(group)
        if len(self._failed) >= FAILURES:
            self.suspect(f"the last {FAILURES} tasks failed on it")

    def _fault(self, failed: Failed, group: Group) -> TaskFault | HostFault:
        if failed.traceback:
            log.info("engine_fault", child=self.name, code=failed.code, traceback=failed.traceback)
        if failed.problem:
            if failed.broken:
                self.suspect(failed.problem)
            return HostFault(failed.problem, device=failed.broken)
        fault = TASK_FAULTS.get(failed.code, InternalFault)
        if issubclass(fault, InternalFault | OutOfMemory):
            self._count_failure(group)
        return fault(failed.message)

    async def _death(self, driven: _Driven) -> ChildDied:
        exit_code = await self._process.wait() if self._process else None
        how = f"signal {_signal(-exit_code)}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        text = f"the engine's process ended with {how}{f' at {driven.stage}' if driven.stage else ''}"
        death = ChildDied(text, exit_code, driven.stage, blameless=self._blamed not in (None, driven.run))
        if not death.blameless:
            self._count_failure(driven.group)
        return death

    def _note_failure(self, error: BaseException) -> None:
        """Log why the child ended, and suspect a device on which it never served."""
        if isinstance(error, ChildUnfit):
            self.unfit = error.message
        log.error("child_failed", child=self.name, problem=str(error) or type(error).__name__)
        log.debug("child_failed_at", child=self.name, exc_info=error)
        if not self._serves:
            self.suspect("its engine cannot work on it" if self.unfit else "its engine does not start")

    def _restart_if_suspect(self) -> None:
        if self._suspect and self._ready is not None and not any(driven.group.started.is_set() for driven in self._driven.values()):
            self.kill()

    # ── The process ──

    def kill(self, blamed: str | None = None) -> None:
        """Kill the child and what it started, because of one run or of all; the next child starts at once."""
        self._killed, self._blamed = True, blamed
        self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._stop_serving()
            _kill_session(self._process.pid)

    def _note_models(self, message: Ready | Done) -> None:
        """Note what its memory holds by this message."""
        self.models = list(message.models)
        self.models_parked = list(message.models_parked) if isinstance(message, Done) else []
        self.model_swaps = message.model_swaps if isinstance(message, Done) else ModelSwaps()

    def _stop_serving(self) -> None:
        self._ready = None
        self.slots.close()
        self.models, self.models_parked = [], []

    async def _live(self) -> None:
        """Start the child and follow it to its end. Raises ChildUnfit, and OSError where it ended before it served."""
        self._killed, self._blamed = False, None
        self._process = process = await self._spawn()
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_stderr(process.stderr))
            async with asyncio.timeout(START_S):
                first = await self._receive(process.stdout)
            if isinstance(first, Ready):
                await self._serve(first, process.stdout)
            await self._ended(process)
        if isinstance(first, Ready):
            log.warning("child_ended", child=self.name, pid=first.pid, exit_code=process.returncode)
            return
        reason = " / ".join(list(self._stderr)[-3:])
        if process.returncode == EXIT_UNFIT:
            raise ChildUnfit(f"{self.name}: {reason}")
        raise OSError(f"it ended with {process.returncode} before it served: {reason}")

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder that this runs in may hold a `workers` of its own
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

    async def _serve(self, ready: Ready, stdout: asyncio.StreamReader) -> None:
        """Pass the child's messages to their runs until it closes its output."""
        if self._suspect:
            await self._examine(stdout)
            log.info("device_problem_over", child=self.name, device=self.device, was=self.problem)
            self._suspect, self.problem = False, None
        self._ready = ready
        self._serves = self.served = True
        self._note_models(ready)
        log.info("child_ready", child=self.name, pid=ready.pid, device=ready.device)
        self.slots.open()
        while (message := await self._receive(stdout)) is not None:
            if not isinstance(message, Ready) and message.run in self._driven:
                self._driven[message.run].messages.put_nowait(message)
        self._stop_serving()
        self._notify_of_death()

    async def _ended(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the end of a child that has closed its output, and kill it where it does not end, and what it started."""
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await process.wait()
        except TimeoutError:
            self._kill()
            await process.wait()
        _kill_session(process.pid)  # what it started lets go of its standard error

    async def _end(self) -> None:
        """Leave no process, and nobody who waits for it."""
        self._stop_serving()
        if self._process is not None:
            self._kill()
            await asyncio.shield(self._process.wait())
        self._notify_of_death()

    def _notify_of_death(self) -> None:
        """Notify every run that the child had."""
        for driven in self._driven.values():
            if driven.group.started.is_set():
                driven.messages.put_nowait(None)

    async def _examine(self, stdout: asyncio.StreamReader) -> None:
        """Have the new child render a small picture before it gets anything else. Raises OSError where it cannot."""
        with tempfile.TemporaryDirectory(dir=self.spool, prefix="self-test-") as folder:
            params = {"prompt": "a self-test", "resolution": "64x64"}
            run = Run(SELF_TEST, SELF_TEST, SELF_TEST, GENERATE_IMAGE, models.ANIMATIC, models.ANIMATIC, params, {}, {}, 1, folder)
            self._send(frame(run))
            async with asyncio.timeout(EXAMINE_S):
                while isinstance(answer := await self._receive(stdout), Progress):
                    pass
        if not isinstance(answer, Done):
            raise OSError(f"it did not pass its self-test: {answer.message if isinstance(answer, Failed) else 'no result'}")

    async def _receive(self, stream: asyncio.StreamReader) -> FromChild | None:
        """Return the next message; None at the end. One that cannot be read is logged and skipped, or ends its run where it was an end."""
        try:
            while True:
                (size,) = HEADER.unpack(await stream.readexactly(HEADER.size))
                if size > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
                body = await stream.readexactly(size)
                try:
                    return from_child_decoder.decode(body)
                except (msgspec.MsgspecError, RecursionError) as error:
                    header = _header.decode(body)
                    log.error("child_unreadable", child=self.name, what=header.type, run=header.run, problem=str(error))
                    if header.type in ENDS:
                        return Failed(header.run, InternalFault.code, "the engine's answer cannot be read")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _send(self, frames: bytes) -> None:
        """Write without waiting for room in the pipe: a child that hangs makes none, and what one run sends fits in memory."""
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            return  # the reader notices that the child is gone
        with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop raises RuntimeError for a closed pipe
            process.stdin.write(frames)

    async def _read_stderr(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            log.debug("child_output", child=self.name, text=text)


def _sendable(request: Run) -> bytes:
    """Return the encoded request. Raises InvalidInput where it cannot go over the pipe."""
    try:
        return encoded_run(request)
    except Unsendable as error:
        log.warning("task_unsendable", problem=str(error.__cause__ or error))
        raise InvalidInput(f"task_data or metadata cannot be passed to the engine: {error}") from None


def _kill_session(pid: int) -> None:
    """Kill a process that leads a session of its own, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
