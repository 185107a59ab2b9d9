"""One run as an engine sees it: what is asked for, and how to say how far it is.

An engine is a function `make(take: Take) -> Made | Finish`. It announces its stages, reports each step that is done and hands back files,
or what is left to do for them without its device. It knows neither the pipe nor the worker. To fail it raises a
`movieq.errors.TaskFault`; to stop when told, it calls `step` or `check` often and lets `TakeCancelled` through. An engine that can make
several tasks in one call has a function `make_batch(takes: list[Take]) -> list[Made | Finish | Exception]` besides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from movieq.errors import InputUnavailable, causes
from movieq.tasks.params import Params, convert
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import TaskType
from workers.faults import without_paths
from workers.protocol import FromChild, Note, Plan, Preview, Produced, Rows, Run, Stage, Step

STEP_INTERVAL_S = 1 / 20
PREVIEW_INTERVAL_S = 0.5


class TakeCancelled(BaseException):
    """The run was cancelled. Not an Exception, so that no engine's `except Exception` swallows it."""


class Flag(threading.Event):
    """Set, from another thread, when the run is to stop. While it is `deaf`, as while a model loads, nobody looks: the process ends.

    `beside`: the flags of the other runs of its batch.
    """

    deaf = False
    watched = False
    """Whether somebody watches the run just now."""
    beside: tuple[Flag, ...] = ()


def broken(error: BaseException | None) -> bool:
    """Whether this or what caused it is a fault of CUDA's other than memory: after one, every call of the process fails."""
    return any(type(cause).__name__ == "AcceleratorError" or "CUDA error" in str(cause) for cause in causes(error))


class Made(msgspec.Struct, frozen=True):
    """What an engine hands back: files in `Take.out_dir`, and the metadata of the result.

    There `digital_source_type` says what it is, by IPTC's name, and is signed where files are: without it, `trainedAlgorithmicMedia`.
    """

    files: tuple[Produced, ...]
    metadata: dict[str, Any]


Finish = Callable[[], Made]
"""The rest of a run, for which its device is not needed: done in another thread, while the next run begins. It must not touch torch."""


class Take:
    """A run in hand. `params` are checked and typed; `warnings` collects what the result should say about what was not honoured.

    `send` carries reports to the worker, `cancelled` is set from another thread when the run is to stop.
    """

    def __init__(self, run: Run, send: Callable[[FromChild], None], cancelled: Flag, device: str = "cpu") -> None:
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

    def plan(self, *stages: Stage) -> None:
        """Announces the stages, once, before any step. Weights are relative shares of the time."""
        self._send(Plan(self.run.run, stages))

    def step(self, stage: str, step: int, steps: int) -> None:
        """Says that `step` of `steps` of `stage` are done; raises TakeCancelled where the run is to stop.

        At most 20 a second leave the child, and always the last of a stage.
        """
        self.check()
        now_s = time.monotonic()
        if step == steps or now_s >= self._step_due_s:
            self._step_due_s = now_s + STEP_INTERVAL_S
            self._send(Step(self.run.run, stage, step, steps))

    def warn(self, text: str) -> None:
        """Goes into the result's warnings."""
        self.warnings.append(without_paths(text))

    def note(self, text: str) -> None:
        """Goes into the log of the task, and into the result's warnings."""
        self.warn(text)
        self._send(Note(self.run.run, text))

    def halved(self, rows: int) -> None:
        """Says that the memory suffices for so many rows of this batch."""
        self._send(Rows(self.run.run, rows))

    def begin(self, stage: str) -> None:
        """Says that a stage begins, which may take its first step late."""
        self.check()
        self._send(Step(self.run.run, stage, 0, 1))

    @property
    def rows(self) -> Sequence[Take]:
        """Those whose pictures are made here, in their order."""
        return (self,)

    @property
    def preview_due(self) -> bool:
        """Whether to show something: the task asked for previews, or is watched, and the last one is half a second old."""
        return (self.params.preview or self._cancelled.watched) and time.monotonic() >= self._preview_due_s

    def preview(self, draw: Callable[[], bytes]) -> None:
        """Sends what `draw` returns, a JPEG of at most 10 kB, where one is due; so it is called at most twice a second."""
        if self.preview_due:
            self._preview_due_s = time.monotonic() + PREVIEW_INTERVAL_S
            self._send(Preview(self.run.run, draw()))

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within, nothing looks whether the run is to stop: if it is, the process ends. For what nobody can stop half way."""
        self._cancelled.deaf = True
        try:
            self.check()
            yield
        finally:
            self._cancelled.deaf = False

    def check(self) -> None:
        """Raises TakeCancelled where the run is to stop."""
        if self.cancelled:
            raise TakeCancelled

    @property
    def cancelled(self) -> bool:
        """Whether the run is to stop."""
        return self._cancelled.is_set()

    def input(self, reference: str) -> Path:
        """The local file of a reference. Raises InputUnavailable where it was not fetched."""
        path = Path(self.run.inputs.get(reference, ""))
        if not path.is_file():
            raise InputUnavailable(f"{shown(reference)} was not fetched")
        return path


class Together(Take):
    """The takes of a batch as one: what is said goes to each. It stops only when all of them are to stop; who stops before has left."""

    def __init__(self, takes: Sequence[Take]) -> None:
        first = takes[0]
        super().__init__(first.run, first._send, first._cancelled, first.device)
        self._rows = takes

    @property
    def rows(self) -> Sequence[Take]:
        """The takes of the batch."""
        return self._rows

    @property
    def cancelled(self) -> bool:
        """Whether all of its runs are to stop."""
        return all(take.cancelled for take in self.rows)

    def plan(self, *stages: Stage) -> None:
        for take in self.rows:
            take.plan(*stages)

    def step(self, stage: str, step: int, steps: int) -> None:
        self.check()
        for take in self.rows:
            if not take.cancelled:
                take.step(stage, step, steps)

    def warn(self, text: str) -> None:
        for take in self.rows:
            take.warn(text)

    def note(self, text: str) -> None:
        for take in self.rows:
            take.note(text)

    def begin(self, stage: str) -> None:
        self.check()
        for take in self.rows:
            if not take.cancelled:
                take.begin(stage)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        with ExitStack() as stack:
            for take in self.rows:
                if not take.cancelled:
                    stack.enter_context(take.deaf())
            yield


def shown(reference: str) -> str:
    """A reference as it stands in a message: whole, but for `data:` urls."""
    return reference if len(reference) <= 200 else f"{reference[:60]}... ({len(reference)} characters)"
