"""The worker's side of an engine process: start it, wait until it serves, drive one run after another, cancel, kill.

A child that dies or hangs costs one attempt and one restart, never the worker. It has a session of its own, so that signals of a terminal
do not reach it, and none of movieq's settings, so that no engine can read a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
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
from movieq.gpus import Gpu
from movieq.models import table as models
from movieq.tasks.entities import ModelSwaps
from movieq.tasks.states import GENERATE_IMAGE, Kind
from workers.concurrency import uninterrupted
from workers.faults import FinishFault, HostFault
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
"""Longest time from spawn to Ready, in seconds: the imports of a GPU child take long on a cold disk."""
CANCEL_GRACE_S: Final = 5.0
"""Longest time that a child may take to stop a run, or to end once it has closed its output, in seconds."""
RESPAWN_S: Final = 0.1, 30.0
"""Shortest and longest wait before a child that died is started again, in seconds. The end of a long-lived child resets the wait."""
FAILURES: Final = 3
"""Number of different tasks in a row that must fail on a device for it to be examined before it gets more."""
EXAMINE_S: Final = 120.0
"""Time limit of the self-test of a device, in seconds."""
LOOK_S: Final = 1.0
"""Time between two checks whether a device still works, by a run that waits for it, in seconds."""
IDLES: Final = 1000
"""Number of idle times of a device that the median is taken of."""
STDERR_LINES: Final = 40
"""Number of last lines of a child's standard error that are stored for an error message."""
_PASSED: Final = re.compile(
    "PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_.*|TZ|TZDIR|TMPDIR|TEMP|TMP|XDG_.*|SSL_CERT_(FILE|DIR)"  # any program
    "|LD_.*|DYLD_.*|MALLOC_.*|GLIBC_TUNABLES|PYTHON.*|VIRTUAL_ENV|CONDA_PREFIX|COV(ERAGE)?_.*"
    "|(CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|HIP|ROCR|ROCM|HSA|AMD|MIOPEN)_.*"  # devices
    "|(TORCH|TORCHINDUCTOR|PYTORCH|TRITON|OMP|MKL|KMP|OPENBLAS|BLIS|NUMEXPR)_.*"
    "|HF_HOME|HF_HUB_CACHE|(TRANSFORMERS|DIFFUSERS|SAFETENSORS|TOKENIZERS|ESPEAK|PHONEMIZER)_.*"
)
"""The environment variables that an engine process gets. It runs models and plug-ins, and needs no credentials of other software."""
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
"""Variables that forbid an engine to download models, and to run code that comes with models."""

SELF_TEST: Final = "self-test"
ENDS: Final = frozenset(each.__struct_config__.tag for each in (Done, Failed, Cancelled))

Progress = Plan | Step | Note | Rows | Preview | Free
"""Messages that a child sends about a run before its end."""

log = logs.get()


class _Header(msgspec.Struct, frozen=True):
    """The type and the run of a message, for one whose rest cannot be decoded."""

    type: str
    run: str


_header = msgspec.msgpack.Decoder(_Header)


class ChildUnfit(MovieqError):
    """A child reported that it cannot work on this machine, where a GPU or a library is missing. Another child would report the same."""


class ChildDied(MovieqError):
    """The child ended, or was killed, during a run. `exit_code` is negative for a signal; `stage` is the last that the run reported.

    `blameless`: the child was killed because of another run.
    """

    def __init__(self, message: str, exit_code: int | None, stage: str | None, *, blameless: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stage = stage
        self.blameless = blameless


class _Driven:
    """A run that the child renders or will render: its unread messages, its last stage, and whether the child has ended it."""

    def __init__(self, run: str, group: Group) -> None:
        self.run = run
        self.group = group
        self.messages: asyncio.Queue[FromChild | None] = asyncio.Queue()
        """The unread messages; None means that the child is dead."""
        self.stage: str | None = None
        self.ended = False


class Child:
    """The engine process of one device, and the runs on it. It lives while `supervise` runs."""

    def __init__(self, name: str, kinds: tuple[Kind, ...], gpu: Gpu | None = None, *, step_timeout_s: float) -> None:
        """`gpu` is the only GPU that the child sees; without one it works on the CPU."""
        self.name = name
        self.kinds = kinds
        self.gpu = gpu
        self.device = gpu.name if gpu else "cpu"
        self.slots = Slots(self._send)
        self.tasks_completed = 0
        self.models: list[str] = []
        """The models loaded on its device."""
        self.models_parked: list[str] = []
        """The models offloaded to host memory."""
        self.model_swaps = ModelSwaps()
        self.rows: dict[str, int] = {}
        """Batch key -> how many rows fit in its memory, if that is known to be fewer than the model table allows."""
        self.idle_s: deque[float] = deque(maxlen=IDLES)
        """Idle times of the device between two groups, in seconds, where the second was claimed before the first ended."""
        self.problem: str | None = None
        """The problem of its device, in words for users; None while there is none. While there is one, the child gets no tasks."""
        self.unfit: str | None = None
        """Why it cannot work on this machine, if it reported that."""
        self.served = False
        """Whether it has ever worked."""
        self.spool: Path | None = None
        """The folder for its self-test; None for the system's temporary folder."""
        self._suspect = False
        """Whether it must be restarted and examined once it has no run."""
        self._failed: list[Group] = []
        """Groups of different tasks that have failed since a run last completed."""
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
        """The models that will be loaded when a run that is claimed now starts. A model still to be loaded may evict all others."""
        coming = [group.model for group in self.slots.holders if group.model not in self.models]
        return coming or self.models

    @property
    def pid(self) -> int | None:
        """The process id of the child that serves; None while there is none."""
        return self._ready.pid if self._ready else None

    def memory_bytes(self) -> int:
        """Return the resident memory of the child in bytes; 0 while there is none."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else 0
        except (psutil.Error, OSError):  # it has ended; or this process has too many files open
            return 0

    async def supervise(self, on_room: Callable[[], None], on_unfit: Callable[[], None] = lambda: None) -> None:
        """Start the child, start it again whenever it ends, and end it when cancelled.

        `on_room` is called whenever a slot becomes free, and `on_unfit` each time that the child reports that it cannot work on this
        machine. If `on_unfit` raises, the supervision ends with that error.
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
                backoff.reset()  # it was killed for a run, or worked for long
            else:
                await asyncio.sleep(backoff.next_s())

    # ── A run ──

    async def run(self, request: Run, on_message: Callable[[Progress], None], group: Group) -> Done:
        """Render one run of the group, and return its output.

        Raises the TaskFault that the engine reports, and ChildDied if the child ended, or was killed for showing no progress too long.
        Waits for the device; if the child dies before it gets the run, waits for the next child. When cancelled, stops the run between two
        steps, kills the child after `CANCEL_GRACE_S`, and returns only when the child has ended the run or is dead.
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
        except BaseException:  # a cancel, or an error of `on_message`: the child may still render the run
            if group.started.is_set() and not driven.ended:
                await uninterrupted(self._stop(driven))  # no cancel may leave a child that still renders; `CANCEL_GRACE_S` bounds this
            raise
        finally:
            del self._driven[request.run]
            self._restart_if_suspect()

    async def _wait_for_device(self, group: Group) -> None:
        """Wait until the child has the group. Raises HostFault if there is no child for too long."""
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
        """Return the next message of the run. Raises if the child ended the run without a result, died, or is silent for too long."""
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
                    self._stop_serving()  # it ends by itself: no more may be sent to it
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
        """Stop a run; return when the child has answered or was killed."""
        self._send(frame(Cancel(driven.run)))
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                while isinstance(await driven.messages.get(), Progress):
                    pass
        except TimeoutError:
            log.warning("child_killed", child=self.name, reason="it did not stop within the grace", grace_s=CANCEL_GRACE_S)
            self.kill(driven.run)

    def set_watched(self, run: str, watched: bool) -> bool:
        """Notify the child whether this run has watchers; return whether the child has the run."""
        if run not in self._driven or not self._driven[run].group.started.is_set():
            return False
        self._send(frame(Watched(run, watched)))
        return True

    # ── Failures ──

    def suspect(self, problem: str) -> None:
        """Record a problem of the device: it gets no tasks until its child was restarted and has passed a self-test."""
        if not self._suspect:
            log.error("device_problem", child=self.name, device=self.device, problem=problem)
        self._suspect, self.problem = True, problem
        self.slots.close()
        self._failed.clear()

    def _count_failure(self, group: Group) -> None:
        """Count a group that failed by a fault of the engine. `FAILURES` groups of different tasks in a row make the device suspect."""
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
        if failed.rendered and fault is InternalFault:
            return FinishFault(failed.message)
        if issubclass(fault, InternalFault | OutOfMemory):
            self._count_failure(group)
        return fault(failed.message)

    async def _death(self, driven: _Driven) -> ChildDied:
        exit_code = await self._process.wait() if self._process else None
        how = f"signal {_signal(-exit_code)}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        text = f"the engine process ended with {how}{f' in stage {driven.stage}' if driven.stage else ''}"
        death = ChildDied(text, exit_code, driven.stage, blameless=self._blamed not in (None, driven.run))
        if not death.blameless:
            self._count_failure(driven.group)
        return death

    def _note_failure(self, error: BaseException) -> None:
        """Log why the child ended; if it never served, its device becomes suspect."""
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
        """Kill the child and the processes that it started; the next child starts at once. `blamed` is the run that caused it, if any."""
        self._killed, self._blamed = True, blamed
        self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._stop_serving()
            _kill_session(self._process.pid)

    def _note_models(self, message: Ready | Done) -> None:
        """Record the models that the message reports."""
        self.models = list(message.models)
        self.models_parked = list(message.models_parked) if isinstance(message, Done) else []
        self.model_swaps = message.model_swaps if isinstance(message, Done) else ModelSwaps()

    def _stop_serving(self) -> None:
        self._ready = None
        self.slots.close()
        self.models, self.models_parked = [], []

    async def _live(self) -> None:
        """Start the child and follow it to its end. Raises ChildUnfit, and OSError if it ended before it served."""
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
        raise OSError(f"it ended with exit code {process.returncode} before it served: {reason}")

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the working directory may hold another package `workers`
            "-m",
            "workers.child",
            "--device",
            "cuda" if self.gpu else "cpu",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1024 * 1024,
            env=environment() | _devices(self.gpu),
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
        log.info("child_ready", child=self.name, pid=ready.pid, device=self.device)
        self.slots.open()
        while (message := await self._receive(stdout)) is not None:
            if not isinstance(message, Ready) and message.run in self._driven:
                self._driven[message.run].messages.put_nowait(message)
        self._stop_serving()
        self._notify_of_death()

    async def _ended(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the end of a child that has closed its output; kill it if it does not end, and the processes that it started."""
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await process.wait()
        except TimeoutError:
            self._kill()
            await process.wait()
        _kill_session(process.pid)  # else a process that it started could hold its standard error open

    async def _end(self) -> None:
        """Kill the child if it still runs, wait for its end, and notify its runs."""
        self._stop_serving()
        if self._process is not None:
            self._kill()
            await asyncio.shield(self._process.wait())
        self._notify_of_death()

    def _notify_of_death(self) -> None:
        """Notify every run on the child of its death."""
        for driven in self._driven.values():
            if driven.group.started.is_set():
                driven.messages.put_nowait(None)

    async def _examine(self, stdout: asyncio.StreamReader) -> None:
        """Test a new child: let it render a small picture. Raises OSError if it cannot."""
        with tempfile.TemporaryDirectory(dir=self.spool, prefix="self-test-") as folder:
            params = {"prompt": "a self-test", "resolution": "64x64"}
            run = Run(SELF_TEST, SELF_TEST, SELF_TEST, GENERATE_IMAGE, models.ANIMATIC, models.ANIMATIC, params, {}, {}, 1, folder)
            self._send(frame(run))
            async with asyncio.timeout(EXAMINE_S):
                while isinstance(answer := await self._receive(stdout), Progress):
                    pass
        if not isinstance(answer, Done):
            raise OSError(f"it failed its self-test: {answer.message if isinstance(answer, Failed) else 'no result'}")

    async def _receive(self, stream: asyncio.StreamReader) -> FromChild | None:
        """Return the next message; None at end of file.

        A message that cannot be decoded is logged and skipped. If it is one that ends its run, `Failed` is returned in its place.
        """
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
                        return Failed(header.run, InternalFault.code, "the answer of the engine cannot be read", rendered=True)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _send(self, frames: bytes) -> None:
        """Write frames without waiting for room in the pipe: a child that hangs makes none, and the frames of a run fit in memory."""
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


def environment() -> dict[str, str]:
    """Return the environment variables of a process that runs models, plug-ins or decoders."""
    return {**{name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}, **OFFLINE}


def _devices(gpu: Gpu | None) -> dict[str, str]:
    """Return the environment variables with which CUDA sees this GPU alone, or none."""
    if gpu is None:
        return {"CUDA_VISIBLE_DEVICES": ""}
    own = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()  # the operator's choice
    # without expandable segments, models of different sizes leave gaps that no block of the next one fits
    return {"CUDA_VISIBLE_DEVICES": gpu.uuid, **({} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})}


def _sendable(request: Run) -> bytes:
    """Return the encoded request. Raises InvalidInput if it cannot be sent over the pipe."""
    try:
        return encoded_run(request)
    except Unsendable as error:
        log.warning("task_unsendable", problem=str(error.__cause__ or error))
        raise InvalidInput(f"task_data or metadata cannot be passed to the engine: {error}") from None


def _kill_session(pid: int) -> None:
    """Kill the leader of a session and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
