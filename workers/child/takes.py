"""Several takes of one task, by any engine: each is rendered as a job of its own seed, and the result has the files of all.

Where an engine renders batches, takes share as few calls as the entry of the model allows. While the files of one call are written, the
next call renders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from movieq.models import choice
from workers.child.job import Finish, Job, JobCancelled, Output
from workers.protocol import FromChild, Note, Plan, Preview, Produced, Step

SEEDS: Final = 2**32


def render(job: Job, function: Callable[[str], Any]) -> Finish:
    """Render all takes of the task; return the rest that needs no device. `function` returns a function of the engine by name."""
    count = job.params.takes
    rows = 1 if job.run.entry is None else choice.rows(job.run.entry, job.params)
    calls = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    outputs: list[Output] = []
    writing: Future[list[Output]] | None = None
    with ThreadPoolExecutor(1, "take") as writer:
        for number, numbers in enumerate(calls):
            takes = [_Take(job, each, call=number, calls=len(calls), leads=each == numbers.start) for each in numbers]
            if len(takes) > 1:
                rendered: list[Output | Finish | Exception] = function("render_batch")(takes)
            else:
                rendered = [function("render")(takes[0])]
            try:
                outputs += writing.result() if writing is not None else []  # so that the pictures of two calls at most are in memory
            except BaseException:
                _drop(takes, rendered)
                raise
            if number + 1 == len(calls):
                break
            takes[0].end_reports()
            writing = writer.submit(_finished, rendered)
    return lambda: _joined(job, [*outputs, *_finished(rendered)])


def _drop(takes: list[_Take], rendered: list[Output | Finish | Exception]) -> None:
    """End what takes still do in threads of their own: each is finished as if it was cancelled."""
    for take, each in zip(takes, rendered, strict=True):
        take.is_dropped = True
        if callable(each):
            with contextlib.suppress(Exception, JobCancelled):
                each()


def _finished(rendered: list[Output | Finish | Exception]) -> list[Output]:
    """Return the output of each take of a call. Raises what failed."""
    outputs = []
    for each in rendered:
        if isinstance(each, Exception):
            raise each
        outputs.append(each if isinstance(each, Output) else each())
    return outputs


def _joined(job: Job, outputs: list[Output]) -> Output:
    """Return the output of the task: the files of all takes, and the metadata of the first with the warnings of all."""
    files = [_moved(job, file, number) for number, output in enumerate(outputs) for file in output.files]
    metadata = dict(outputs[0].metadata)
    if warnings := list(dict.fromkeys(each for output in outputs for each in output.metadata.get("warnings", []))):
        metadata["warnings"] = warnings
    return Output(tuple(files), metadata)


def _moved(job: Job, file: Produced, number: int) -> Produced:
    """Move a file of a take into the folder of the run, where its name must differ from those of other takes."""
    path = Path(file.path)
    target = job.out_dir / f"{path.stem}-{number + 1}{path.suffix}"
    path.rename(target)
    with contextlib.suppress(OSError):  # the engine has left more there
        path.parent.rmdir()
    return msgspec.structs.replace(file, path=str(target), take=number + 1, seed=_seed(job, number))


def _seed(job: Job, number: int) -> int:
    """Return the seed of a take: that of the task plus the number of takes before it, so that each can be rendered again alone."""
    return (job.seed + number) % SEEDS


class _Take(Job):
    """A take as a job. What it reports is reported for the task: of the takes of one call, only by the first."""

    def __init__(self, job: Job, number: int, *, call: int, calls: int, leads: bool) -> None:
        folder = job.out_dir / f"take-{number + 1}"
        folder.mkdir()
        run = msgspec.structs.replace(job.run, run=f"{job.run.run}/{number}", seed=_seed(job, number), out_dir=str(folder))
        super().__init__(run, self._pass_on, job._cancelled, job.device)
        self.is_followed = leads
        """Whether its reports count: not once the next call has begun."""
        self.is_dropped = False
        """Whether another take has failed, and the task with it."""
        self._task = job
        self._last_stage = ""
        self._call, self._calls = call, calls

    @property
    def cancelled(self) -> bool:
        return self.is_dropped or super().cancelled

    @property
    def preview_due(self) -> bool:
        return self.is_followed and super().preview_due

    def end_reports(self) -> None:
        """Report that this call is done; what its takes report from now on is not passed on."""
        self.is_followed = False
        if self._last_stage:
            self._task.send(Step(self._task.run.run, self._last_stage, 1, 1))

    def _pass_on(self, message: FromChild) -> None:
        if isinstance(message, Plan):
            self._last_stage = message.stages[-1].name if message.stages else ""
        if not self.is_followed:
            return
        if isinstance(message, Plan):
            if self._call == 0:  # it announces the stages of all calls; only the first loads the model
                later = [stage for stage in message.stages if stage.name != "load"]
                self._task.plan(*message.stages, *(later * (self._calls - 1)))
        elif isinstance(message, Step | Note | Preview):  # the rest is about the batch key of tasks, which takes do not have
            self._task.send(msgspec.structs.replace(message, run=self._task.run.run))
