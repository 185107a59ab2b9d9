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
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from movieq import logs
from movieq.errors import TASK_FAULTS, InternalFault, InvalidInput, MovieqError, OutOfMemory, TaskFault, first_of
from movieq.models import table as models
from movieq.settings import PREFIX
from movieq.tasks.entities import ModelSwaps
from movieq.tasks.states import GENERATE_IMAGE, Kind, TaskId
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
from workers.slots import AHEAD_MOST_S, AHEAD_S, Group

START_S: Final = 120.0
"""From spawn to Ready: the imports of a GPU child on a cold disk take their time."""
CANCEL_GRACE_S: Final = 5.0
RESPAWN_S: Final = 0.1, 30.0
"""Shortest and longest wait before a child that died is started again; long lives reset it."""
FAILURES: Final = 3
"""After so many different tasks in a row failed on a device, it is examined before it takes more."""
EXAMINE_S: Final = 120.0
"""How long the self-test of a device may take."""
LOOK_S: Final = 1.0
"""Between two checks, by a run that waits for its device, whether that still works."""
IDLES: Final = 1000
STDERR_LINES: Final = 40
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
"""What an engine must not do, whoever started the worker: fetch models, or run code that comes with them."""

SELF_TEST: Final = "self-test"
ENDS: Final = frozenset(each.__struct_config__.tag for each in (Done, Failed, Cancelled))

Progress = Plan | Step | Note | Rows | Preview | Free
"""What a child says of a run before its end."""

log = logs.get()


class _Whose(msgspec.Struct, frozen=True):
    """The part of a message that tells whose it is, where the rest cannot be read."""

    type: str
    run: str


_whose = msgspec.msgpack.Decoder(_Whose)


class ChildUnfit(MovieqError):
    """A child said that it cannot work here: a GPU that is not there, a library that is missing. Another would say the same."""


class ChildDied(MovieqError):
    """The child ended, or had to be killed, with a run. `exit_code` is negative for a signal; `stage` the last one that was heard of.

    `blameless`: it was killed for another run's sake.
    """

    def __init__(self, message: str, exit_code: int | None, stage: str | None, *, blameless: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stage = stage
        self.blameless = blameless


class Child:
    """One child and its slots: a group of runs on its device, and one that comes next. `keep` must be running for it to live."""

    def __init__(self, name: str, kinds: tuple[Kind, ...], device: str, *, step_timeout_s: float) -> None:
        self.name = name
        self.kinds = kinds
        self.device = device
        self.groups: list[Group] = []
        self.tasks_completed = 0
        self.models: list[str] = []
        """Those on its device."""
        self.models_parked: list[str] = []
        """Those that wait in the host's memory."""
        self.model_swaps = ModelSwaps()
        self.rows: dict[str, int] = {}
        """Batch key -> how many rows its memory has room for, where that is known to be less than the table says."""
        self.idle_s: deque[float] = deque(maxlen=IDLES)
        """How long the device waited between two groups, where the second was there already when the first was done."""
        self.problem: str | None = None
        """What is wrong with its device, in words for users; None while nothing is. Until then it takes no tasks."""
        self.unfit: str | None = None
        """Why it cannot work here at all, where it said so."""
        self.served = False
        """Whether it has ever worked."""
        self.spool: Path | None = None
        """Where its self-test writes; None for the system's temporary folder."""
        self._suspect = False
        """Whether it is to be restarted and examined once it has no run."""
        self._failed: list[Group] = []
        """Groups of different tasks that failed since the last one that was done."""
        self._on_room: Callable[[], None] = lambda: None
        self._on_device: Group | None = None
        self._free_since_s = time.monotonic()
        self._step_timeout_s = step_timeout_s
        self._ready: Ready | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._serves = False
        self._killed = False
        self._blamed: str | None = None
        self._inboxes: dict[str, tuple[Group, asyncio.Queue[FromChild | None]]] = {}
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @property
    def free(self) -> bool:
        """Whether a run can begin now."""
        return self._ready is not None and not self._suspect and not self.groups

    @property
    def soon(self) -> bool:
        """Whether a run that is claimed now can begin in a moment: its inputs are fetched while the one before it ends."""
        if self._ready is None or self._suspect or len(self.groups) != 1:
            return False
        return not self.groups[0].overdue and self.groups[0].remaining_s() < AHEAD_S

    @property
    def task_id(self) -> TaskId | None:
        """What it works on, or is about to; the first of a batch."""
        group = self._on_device or (self.groups[0] if self.groups else None)
        return group.task_ids[0] if group else None

    @property
    def models_then(self) -> list[str]:
        """Those that will be on its device when it takes what is claimed now: a model that is still to come may push out all others."""
        coming = [group.model for group in self.groups if group.model not in self.models]
        return coming or self.models

    def late(self) -> Group | None:
        """The group that has waited for longer than it was claimed for, and should be given back; what it waits for is overdue."""
        if len(self.groups) < 2 or time.monotonic() - self.groups[1].since_s < AHEAD_MOST_S or self.groups[1].begun.is_set():
            return None
        self.groups[0].overdue = True
        return self.groups[1]

    def reserve(self, task_ids: Sequence[TaskId], model: str = "", batch: str = "") -> Group:
        """A slot for these tasks of a model, which come to `run`, or leave."""
        group = Group(task_ids, model, batch)
        self.groups.append(group)
        return group

    def leave(self, group: Group, run: str) -> None:
        """The run needs nothing more of its device, or never came so far."""
        if group.leave(run):
            self._release(group)
        else:
            self._advance()

    def drop(self, group: Group) -> None:
        """Free the slot of a group that nobody runs."""
        self._release(group)

    def _release(self, group: Group) -> None:
        """The slot of the group is another's."""
        if group in self.groups:
            self.groups.remove(group)
            if self._on_device is group:
                self._on_device, self._free_since_s = None, time.monotonic()
            self._advance()
            self._on_room()

    def _advance(self) -> None:
        """The group that has waited the longest, of those that are whole, has the device, where that is free."""
        if self._ready is None or self._suspect or self._on_device is not None:
            return
        for group in self.groups:
            if not group.begun.is_set() and (frames := group.frames()) is not None:
                self._on_device = group
                group.waited = group.since_s < self._free_since_s
                group.begun.set()
                self._send(frames)
                return

    @property
    def pid(self) -> int | None:
        """Of the child that serves; None while there is none."""
        return self._ready.pid if self._ready else None

    def memory_bytes(self) -> int:
        """Resident memory of the child, 0 while there is none."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else 0
        except (psutil.Error, OSError):  # it has ended; or this process has too many files open
            return 0

    async def keep(self, on_room: Callable[[], None], on_unfit: Callable[[], None] = lambda: None) -> None:
        """Starts the child, again whenever it ended, and ends it when cancelled. `on_room` is called each time that it has a slot more.

        `on_unfit` is called each time that it says that it cannot work here; what that raises ends this.
        """
        self._on_room = on_room
        wait_s = RESPAWN_S[0]
        while True:
            begun = time.monotonic()
            self._serves, self.unfit = False, None
            try:
                await self._live()
            except* Exception as group:  # errors of its reader come in a group
                error = first_of(group)
                if isinstance(error, ChildUnfit):
                    self.unfit = error.message
                log.error("child_failed", child=self.name, problem=str(error) or type(error).__name__)
                log.debug("child_failed_at", child=self.name, exc_info=error)
                if not self._serves:
                    self.suspect("its engine cannot work on it" if self.unfit else "its engine does not start")
            finally:
                await self._end()
            if self.unfit is not None:
                on_unfit()
            if self._killed or time.monotonic() - begun > RESPAWN_S[1]:
                wait_s = RESPAWN_S[0]  # it was in order, or is not to blame
            else:
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RESPAWN_S[1])

    async def run(self, request: Run, on_message: Callable[[Progress], None], group: Group) -> Done:
        """What the child made of this run, a row of its group.

        Raises the TaskFault that the engine reports; ChildDied where the child ended, or showed no progress for so long that it was killed.
        Waits for its turn, and for the next child where the one that was free has died since: that death was not this run's. Cancelled, it
        stops the child between two steps, kills it after a grace, and goes only when the child is free of it or gone.
        """
        try:
            body = encoded_run(request)
        except Unsendable as error:
            log.warning("unsendable", problem=str(error.__cause__ or error))
            raise InvalidInput(f"task_data or metadata cannot be passed to the engine: {error}") from None
        inbox: asyncio.Queue[FromChild | None] = asyncio.Queue()
        self._inboxes[request.run] = group, inbox
        stage: str | None = None
        over = False
        """Whether the child has ended this run."""
        try:
            group.come(request.run, body)
            self._advance()
            await self._turn(group)
            while True:
                try:
                    async with asyncio.timeout(self._step_timeout_s):
                        message = await inbox.get()
                except TimeoutError:
                    over = True
                    self.kill(request.run)
                    self._failure(group)
                    raise ChildDied(f"the engine showed no progress for {self._step_timeout_s:g} s and was killed", None, stage) from None
                over = message is None or isinstance(message, Done | Failed | Cancelled)
                match message:
                    case Plan() | Step() | Note() | Preview():
                        stage = message.stage if isinstance(message, Step) else stage
                        on_message(message)
                    case Free():
                        if group.waited:
                            self.idle_s.append(message.idle_s)
                        on_message(message)
                        self.leave(group, request.run)
                    case Rows():
                        self.rows[group.batch] = message.rows
                    case Done():
                        self.tasks_completed += 1
                        self._failed.clear()
                        self._hold(message)
                        return message
                    case Failed():
                        if message.broken:
                            self._gone()  # it ends by itself: nothing must be sent to it any more
                            self._blamed = request.run
                        raise self._fault(message, group)
                    case None:
                        death = await self._obituary(request.run, stage)
                        if not death.blameless:
                            self._failure(group)
                        raise death
                    case _:
                        raise InternalFault("the engine stopped without being asked to")
        except BaseException:  # a cancel, or what `on_message` raised: the child may still work on it
            if group.begun.is_set() and not over:
                stopping = asyncio.ensure_future(self._stop(request.run, inbox))
                while not stopping.done():  # bounded by the grace; a second cancel must not leave a child that still works
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.shield(stopping)
                stopping.result()
            raise
        finally:
            del self._inboxes[request.run]
            self._renew_if_suspect()

    def suspect(self, problem: str) -> None:
        """Take no more tasks on a device that may be at fault until its child was restarted and passed a self-test."""
        if not self._suspect:
            log.error("device_problem", child=self.name, device=self.device, problem=problem)
        self._suspect, self.problem = True, problem
        self._failed.clear()

    def _failure(self, group: Group) -> None:
        """Note a run that failed by a fault of the engine; too many of different tasks make the device suspect."""
        ids = set(group.task_ids)
        if not any(ids & set(each.task_ids) for each in self._failed):
            self._failed.append(group)
        if len(self._failed) >= FAILURES:
            self.suspect(f"the last {FAILURES} tasks failed on it")

    def _renew_if_suspect(self) -> None:
        if self._suspect and self._ready is not None and not any(group.begun.is_set() for group, _ in self._inboxes.values()):
            self.kill()

    def watched(self, run: str, watched: bool) -> bool:
        """The child knows whether somebody watches this run; False where it does not work on it."""
        if run not in self._inboxes or not self._inboxes[run][0].begun.is_set():
            return False
        self._send(frame(Watched(run, watched)))
        return True

    async def _turn(self, group: Group) -> None:
        """Wait until the child has the group. Raises HostFault where there is no child for too long."""
        since_s = time.monotonic()
        while not group.begun.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await group.begun.wait()
            except TimeoutError:
                if self._ready is not None:
                    since_s = time.monotonic()
                elif self.problem is not None or time.monotonic() - since_s > START_S:
                    raise HostFault(self.problem or "its engine does not start again", device=True) from None

    def kill(self, blamed: str | None = None) -> None:
        """The child, and what it started, is gone, for the sake of one run or of all; the next one starts at once."""
        self._killed, self._blamed = True, blamed
        self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._gone()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own

    def _hold(self, message: Ready | Done) -> None:
        """What its memory holds by this message."""
        self.models = list(message.models)
        self.models_parked = list(message.models_parked) if isinstance(message, Done) else []
        self.model_swaps = message.model_swaps if isinstance(message, Done) else ModelSwaps()

    def _gone(self) -> None:
        self._ready = None
        self.models, self.models_parked = [], []

    async def _live(self) -> None:
        self._killed, self._blamed = False, None
        self._process = process = await asyncio.create_subprocess_exec(
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
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_stderr(process.stderr))
            async with asyncio.timeout(START_S):
                first = await self._receive(process.stdout)
            if isinstance(first, Ready):
                if self._suspect:
                    await self._examine(process)
                    log.info("device_problem_over", child=self.name, device=self.device, was=self.problem)
                    self._suspect, self.problem = False, None
                self._ready = first
                self._serves = self.served = True
                self._hold(first)
                log.info("child_ready", child=self.name, pid=first.pid, device=first.device)
                self._advance()
                self._on_room()
                while (message := await self._receive(process.stdout)) is not None:
                    if not isinstance(message, Ready) and message.run in self._inboxes:
                        self._inboxes[message.run][1].put_nowait(message)
                self._gone()
                self._tell_of_the_end()
            try:
                async with asyncio.timeout(CANCEL_GRACE_S):
                    await process.wait()
            except TimeoutError:  # it closed its output and does not end
                self._kill()
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
        self._tell_of_the_end()

    def _tell_of_the_end(self) -> None:
        """Every run that the child had knows that it is dead."""
        for group, inbox in self._inboxes.values():
            if group.begun.is_set():
                inbox.put_nowait(None)

    async def _examine(self, process: asyncio.subprocess.Process) -> None:
        """Have the new child make a small picture before it gets anything else. Raises OSError where it cannot."""
        assert process.stdout is not None
        with tempfile.TemporaryDirectory(dir=self.spool, prefix="self-test-") as folder:
            params = {"prompt": "a self-test", "resolution": "64x64"}
            run = Run(SELF_TEST, SELF_TEST, SELF_TEST, GENERATE_IMAGE, models.ANIMATIC, models.ANIMATIC, params, {}, {}, 1, folder)
            self._send(frame(run))
            async with asyncio.timeout(EXAMINE_S):
                while isinstance(answer := await self._receive(process.stdout), Progress):
                    pass
        if not isinstance(answer, Done):
            raise OSError(f"it did not pass its self-test: {answer.message if isinstance(answer, Failed) else 'no result'}")

    async def _receive(self, stream: asyncio.StreamReader) -> FromChild | None:
        try:
            while True:
                (size,) = HEADER.unpack(await stream.readexactly(HEADER.size))
                if size > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
                body = await stream.readexactly(size)
                try:
                    return from_child_decoder.decode(body)
                except (msgspec.MsgspecError, RecursionError) as error:
                    whose = _whose.decode(body)
                    log.error("child_unreadable", child=self.name, what=whose.type, run=whose.run, problem=str(error))
                    if whose.type in ENDS:
                        return Failed(whose.run, InternalFault.code, "the engine's answer cannot be read")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _send(self, frames: bytes) -> None:
        """Without waiting for room in the pipe: a child that hangs makes none, and what one run sends fits in memory."""
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            return  # the reader says that the child is gone
        with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's word for a closed pipe
            process.stdin.write(frames)

    async def _read_stderr(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            log.debug("child_says", child=self.name, text=text)

    async def _stop(self, run: str, inbox: asyncio.Queue[FromChild | None]) -> None:
        """The child no longer works on the run: it answered, or it is dead."""
        self._send(frame(Cancel(run)))
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                while isinstance(await inbox.get(), Progress):
                    pass
        except TimeoutError:
            log.warning("child_killed", child=self.name, reason="it did not stop within the grace", grace_s=CANCEL_GRACE_S)
            self.kill(run)

    async def _obituary(self, run: str, stage: str | None) -> ChildDied:
        exit_code = await self._process.wait() if self._process else None
        how = f"signal {_signal(-exit_code)}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        text = f"the engine's process ended with {how}{f' at {stage}' if stage else ''}"
        return ChildDied(text, exit_code, stage, blameless=self._blamed not in (None, run))

    def _fault(self, failed: Failed, group: Group) -> TaskFault | HostFault:
        if failed.traceback:
            log.info("engine_fault", child=self.name, code=failed.code, traceback=failed.traceback)
        if failed.problem:
            if failed.broken:
                self.suspect(failed.problem)
            return HostFault(failed.problem, device=failed.broken)
        fault = TASK_FAULTS.get(failed.code, InternalFault)
        if issubclass(fault, InternalFault | OutOfMemory):
            self._failure(group)
        return fault(failed.message)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
