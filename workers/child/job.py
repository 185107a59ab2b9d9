"""One run as an engine sees it: what to render, and how to report progress.

An engine is a module with a function `render(job: Job) -> Output | Finish`. It announces its stages with `job.plan`, reports each step
with `job.step`, writes its files into `job.out_dir` and returns them as an `Output`; or it returns a `Finish`, the rest of the work that
needs no device. It knows neither the pipe nor the worker. To fail it raises a `movieq.errors.TaskFault`. To be cancellable it calls
`job.step` or `job.check` often and does not catch `JobCancelled`. An engine that renders several jobs in one call has a function
`render_batch(jobs: list[Job]) -> list[Output | Finish | Exception]` as well.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from movieq.errors import InputUnavailable, causes
from movieq.tasks.params import Params, convert
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import TaskType
from workers.faults import abbreviated, without_paths
from workers.protocol import FromChild, Note, Plan, Preview, Produced, Rows, Run, Stage, Step

STEP_INTERVAL_S = 1 / 20
PREVIEW_INTERVAL_S = 0.5


class JobCancelled(BaseException):
    """The run was cancelled. Not an Exception, so that no engine's `except Exception` swallows it."""


class Flag(threading.Event):
    """The cancel flag of a run, set by the thread that reads the pipe."""

    uninterruptible = False
    """Whether the run cannot look at its flag, as while a model loads; a cancel then ends the process."""
    watched = False
    """Whether someone is watching the run now."""
    others: tuple[Flag, ...] = ()
    """The flags of the other runs of its batch."""


_CUDA: Final = re.compile(r"CUDA (?:driver )?error|CU(?:BLAS|SOLVER|SPARSE|FFT)_STATUS_|cuDNN error|CUDNN_STATUS_|NCCL error")
_EXHAUSTED: Final = re.compile(r"out of memory|_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|cudaErrorMemoryAllocation")
_REFUSED: Final = re.compile(r"_STATUS_(?:NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)")
"""The library checked a call and did not start it."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, on the device or the host. The device still works: with less in its memory, the call may succeed."""
    return any(
        isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or (_is_cuda(cause) and _EXHAUSTED.search(str(cause)))
        for cause in causes(error)
    )


def device_is_broken(error: BaseException | None) -> bool:
    """Whether the error or one of its causes has broken the CUDA context: every later CUDA call of the process fails too.

    All errors of CUDA do so, except allocations that fail and calls that were refused before they started.
    """
    return any(_is_cuda(cause) and not _EXHAUSTED.search(str(cause)) and not _REFUSED.search(str(cause)) for cause in causes(error))


def _is_cuda(error: BaseException) -> bool:
    return type(error).__name__ == "AcceleratorError" or _CUDA.search(str(error)) is not None


class Output(msgspec.Struct, frozen=True):
    """What an engine returns: files in `Job.out_dir`, and the metadata of the result.

    `metadata["digital_source_type"]` is the IPTC name of the kind of media, and is signed where files are signed; without it,
    `trainedAlgorithmicMedia` is signed.
    """

    files: tuple[Produced, ...]
    metadata: dict[str, Any]


Finish = Callable[[], Output]
"""The rest of a run that needs no device. It runs in another thread while the next run has the device, and must not use torch."""


class Job:
    """One run of a task. `params` are validated and typed. `warnings` go into the result's metadata: what was ignored or changed."""

    def __init__(self, run: Run, send: Callable[[FromChild], None], cancelled: Flag, device: str = "cpu") -> None:
        """`send` passes a message to the worker; `cancelled` is set by another thread."""
        self.run = run
        self.device = device
        self.params: Params = convert(REGISTRY.tasks[TaskType(run.task_type)].params, run.params)
        self.seed = run.seed
        self.out_dir = Path(run.out_dir)
        self.warnings: list[str] = []
        self._send = send
        self._cancelled = cancelled
        self._step_due_s = 0.0
        self._preview_due_s = 0.0

    def send(self, message: FromChild) -> None:
        """Pass a message to the worker."""
        self._send(message)

    def plan(self, *stages: Stage) -> None:
        """Announce the stages, once, before the first step. Their weights are relative shares of the time."""
        self._send(Plan(self.run.run, stages))

    def begin(self, stage: str) -> None:
        """Report that a stage has started, for stages whose first step takes long. Raises JobCancelled if the run was cancelled."""
        self.check()
        self._send(Step(self.run.run, stage, 0, 1))

    def step(self, stage: str, step: int, steps: int) -> None:
        """Report that `step` of the stage's `steps` are done. Raises JobCancelled if the run was cancelled.

        At most 20 reports a second are sent, and always the last step of a stage.
        """
        self.check()
        now_s = time.monotonic()
        if step == steps or now_s >= self._step_due_s:
            self._step_due_s = now_s + STEP_INTERVAL_S
            self._send(Step(self.run.run, stage, step, steps))

    def warn(self, text: str) -> None:
        """Add a warning to the result, without paths of this machine."""
        self.warnings.append(without_paths(text))

    def note(self, text: str) -> None:
        """Add a warning to the result and an entry to the task's event log."""
        self.warn(text)
        self._send(Note(self.run.run, text))

    def report_batch_limit(self, rows: int) -> None:
        """Report that device memory has room for `rows` jobs of this batch at once, and not for more."""
        self._send(Rows(self.run.run, rows))

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs rendered in this call, in order."""
        return (self,)

    @property
    def preview_due(self) -> bool:
        """Whether to send a preview: the task asked for previews or is watched, and the last one is at least half a second old."""
        return (self.params.preview or self._cancelled.watched) and time.monotonic() >= self._preview_due_s

    def preview(self, encode: Callable[[], bytes]) -> None:
        """Send the JPEG that `encode` returns, at most 10 kB, if a preview is due; `encode` is called only then."""
        if self.preview_due:
            self._preview_due_s = time.monotonic() + PREVIEW_INTERVAL_S
            self._send(Preview(self.run.run, encode()))

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Mark a block that cannot be stopped half way, such as loading a model: a cancel within it ends the process."""
        self._cancelled.uninterruptible = True
        try:
            self.check()
            yield
        finally:
            self._cancelled.uninterruptible = False

    def check(self) -> None:
        """Raise JobCancelled if the run was cancelled."""
        if self.cancelled:
            raise JobCancelled

    @property
    def cancelled(self) -> bool:
        """Whether the run was cancelled."""
        return self._cancelled.is_set()

    def input(self, reference: str) -> Path:
        """Return the local file of a reference. Raises InputUnavailable if it was not fetched."""
        path = Path(self.run.inputs.get(reference, ""))
        if not path.is_file():
            raise InputUnavailable(f"{abbreviated(reference)} was not fetched")
        return path


class BatchJob(Job):
    """The jobs of a batch as one job: reports go to each job that is not cancelled, and it is cancelled when all of them are."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        first = jobs[0]
        super().__init__(first.run, first._send, first._cancelled, first.device)
        self._jobs = jobs

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs of the batch, in order."""
        return self._jobs

    @property
    def cancelled(self) -> bool:
        """Whether all jobs of the batch were cancelled."""
        return all(job.cancelled for job in self.jobs)

    def plan(self, *stages: Stage) -> None:
        for job in self.jobs:
            job.plan(*stages)

    def begin(self, stage: str) -> None:
        self.check()
        for job in self.jobs:
            if not job.cancelled:
                job.begin(stage)

    def step(self, stage: str, step: int, steps: int) -> None:
        self.check()
        for job in self.jobs:
            if not job.cancelled:
                job.step(stage, step, steps)

    def warn(self, text: str) -> None:
        for job in self.jobs:
            job.warn(text)

    def note(self, text: str) -> None:
        for job in self.jobs:
            job.note(text)

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        with ExitStack() as stack:
            for job in self.jobs:
                if not job.cancelled:
                    stack.enter_context(job.uninterruptible())
            yield
