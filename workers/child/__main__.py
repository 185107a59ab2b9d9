"""The process of a device: `python -m workers.child --device cpu`.

It speaks `workers.protocol` on its standard input and output: `Ready` when it takes runs, then one run after another. It is synchronous
and knows neither asyncio nor Redis. A reader thread listens for `Cancel` while the main thread works; at the end of the input the process
ends at once, whatever it is doing. It ignores SIGINT and SIGTERM: the worker decides when a child ends.

Whatever libraries print goes to standard error; standard output carries frames alone.
"""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import os
import platform
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from movieq import plugins
from movieq.errors import EngineUnavailable, InternalFault, OutOfMemory, TaskFault
from movieq.pdeathsig import end_with_parent
from movieq.tasks.entities import ModelSwaps
from movieq.tasks.registry import REGISTRY
from workers import protocol
from workers.child.job import Finish, Flag, Made, Take, TakeCancelled, broken
from workers.faults import PLACE, device_problem, host_problem, said
from workers.protocol import Batch, Cancel, Cancelled, Done, Failed, Free, FromChild, Ready, Run, Watched

T = TypeVar("T")


Answer = Done | Failed | Cancelled


class Child:
    """The two ends of the pipe, and the runs between `Run` and its answer, each with its cancel flag."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, device: str) -> None:
        self._device = device
        self._source = source
        self._sink = sink
        self._speaking = threading.Lock()
        self._batches: queue.SimpleQueue[tuple[Run, ...]] = queue.SimpleQueue()
        self._flags: dict[str, Flag] = {}

    def listen(self) -> None:
        """Reads frames until the input ends; then the process ends at once, with nothing to tidy: the worker owns all that it wrote."""
        try:
            while (body := protocol.read_frame(self._source)) is not None:
                message = protocol.to_child_decoder.decode(body)
                if isinstance(message, Cancel):
                    self._cancel(message.run)
                elif isinstance(message, Watched):
                    if flag := self._flags.get(message.run):
                        flag.watched = message.watched
                else:
                    runs = message.runs if isinstance(message, Batch) else (message,)
                    flags = {run.run: Flag() for run in runs}
                    for run, flag in flags.items():
                        flag.beside = tuple(other for name, other in flags.items() if name != run)
                    self._flags |= flags
                    self._batches.put(runs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _cancel(self, run: str) -> None:
        """The run stops at its next step, or with the process; one row of a batch leaves at once, and the others go on."""
        if (flag := self._flags.get(run)) is None:
            return
        flag.set()
        if not all(other.is_set() for other in flag.beside):
            self.send(Cancelled(run))
        elif flag.deaf:
            os._exit(0)

    def send(self, message: FromChild) -> None:
        """Writes one frame, except a second answer to a run. A pipe that nobody reads ends the process, as the end of its input does."""
        try:
            frame = protocol.frame(message)
        except protocol.Unsendable as error:
            if not isinstance(message, Answer):
                raise  # in the engine that sent it: its run fails
            why = f"the engine answered with something that cannot be passed on: {error}"
            frame = protocol.frame(Failed(message.run, InternalFault.code, why, traceback.format_exc()))
        if isinstance(message, Answer) and self._flags.pop(message.run, None) is None:
            return
        try:
            with self._speaking:
                self._sink.write(frame)
                self._sink.flush()
        except BrokenPipeError:
            os._exit(0)

    def work(self) -> None:
        """Does one batch after another, for ever; what needs no device of one is finished while the next has it, one at a time."""
        finisher, finishing = ThreadPoolExecutor(1, "finish"), None
        ended_s = time.perf_counter()
        while True:
            runs = self._batches.get()
            begun_s = time.perf_counter()
            idle_s = begun_s - ended_s
            parts = perform(runs, self.send, self._flags, self._device)
            ended_s = time.perf_counter()
            rest = [(run, part) for run, part in zip(runs, parts, strict=True) if not isinstance(part, Answer)]
            for part in parts:
                if isinstance(part, Answer):
                    self._answer(part)
            if not rest:
                continue
            if finishing is not None:
                finishing.result()  # so that the pictures of two runs at most are in memory
            for run, _ in rest:
                self.send(Free(run.run, ended_s - begun_s, idle_s))
            finishing = finisher.submit(self._finish, rest)

    def _answer(self, answer: Answer) -> None:
        self.send(answer)
        if isinstance(answer, Failed) and answer.broken:
            os._exit(protocol.EXIT_BROKEN)

    def _finish(self, rest: list[tuple[Run, Finish]]) -> None:
        for run, finish in rest:
            self._answer(answered(run, finish))


def perform(runs: tuple[Run, ...], send: Callable[[FromChild], None], flags: dict[str, Flag], device: str = "cpu") -> list[Answer | Finish]:
    """Of each run its answer, or what is left to do for it: every outcome of an engine as the one frame that ends it."""
    takes: list[Take] = []

    def make() -> list[Made | Finish | BaseException]:
        takes.extend(Take(run, send, flags[run.run], device) for run in runs)
        if len(runs) > 1:
            made: list[Made | Finish | BaseException] = engine(runs[0].engine, "make_batch")(takes)
            return made
        takes[0].check()
        return [engine(runs[0].engine)(takes[0])]

    parts = _judged(runs[0], make)
    if not isinstance(parts, list):
        return [msgspec.structs.replace(parts, run=run.run) for run in runs]
    return [part if callable(part) else answered(run, functools.partial(_given, part)) for run, part in zip(runs, parts, strict=True)]


def _given(part: Made | BaseException) -> Made:
    if isinstance(part, BaseException):
        raise part
    return part


def answered(run: Run, finish: Finish) -> Answer:
    """The answer to a run that ends like this."""
    made = _judged(run, finish)
    return Done(run.run, made.files, made.metadata, resident(), *put_by()) if isinstance(made, Made) else made


def _judged(run: Run, work: Callable[[], T]) -> T | Failed | Cancelled:
    """What the work makes, or how it ended."""
    try:
        return work()
    except TakeCancelled:
        return Cancelled(run.run)
    except MemoryError:
        return Failed(run.run, OutOfMemory.code, "the host's memory ran out", traceback.format_exc())
    except Exception as error:
        gone = broken(error)
        ours = isinstance(error, TaskFault) and not gone  # where CUDA broke, a model that could not be loaded is not at fault
        fault = error if isinstance(error, TaskFault) and ours else InternalFault(f"the {run.engine} engine failed: {said(error)}")
        problem = (device_problem(error) if gone else host_problem(error, Path(run.out_dir).parent)) or ""
        if not gone and not Path(run.out_dir).is_dir():
            problem = problem or PLACE[errno.ENOENT]
        return Failed(run.run, fault.code, fault.message, traceback.format_exc(), broken=gone, problem=problem)


def resident() -> tuple[str, ...]:
    """The models on the device: the animatic needs none, and is always there."""
    shelf = sys.modules.get("workers.child.diffusion.model_cache")
    return ("animatic", *(shelf.names() if shelf else ()))


def put_by() -> tuple[tuple[str, ...], ModelSwaps]:
    """The models that wait in the host's memory, and how often models came and went."""
    shelf = sys.modules.get("workers.child.diffusion.model_cache")
    return (shelf.parked(), shelf.swaps()) if shelf else ((), ModelSwaps())


def engine(name: str, function: str = "make") -> Any:
    """A function of the engine, imported when first asked for. Raises EngineUnavailable where this child has no such engine."""
    if name not in REGISTRY.engines:
        raise EngineUnavailable(f"engine {name!r} is not in this child; it has {', '.join(REGISTRY.engines)}")
    return getattr(importlib.import_module(REGISTRY.engines[name]), function)


def fit(device: str) -> None:
    """The GPU can be used, and what uses it is in memory. Raises where not."""
    import torch

    torch.cuda.set_device(device)
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64**3:
        raise RuntimeError("it computes wrong results")
    engine("diffusers")


def private_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, moved out of reach of libraries: theirs are now the null device and standard error."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(source, "rb"), os.fdopen(sink, "wb")


def main() -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m workers.child", description="The process of one device; started by the worker.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N")
    device: str = parser.parse_args().device
    child = Child(*private_pipe(), device)
    try:
        plugins.load()
        engine("animatic")
        if device != "cpu":
            fit(device)
    except Exception as error:
        print(f"this child cannot work on {device}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # for the worker's log
        sys.exit(protocol.EXIT_UNFIT)
    threading.Thread(target=child.listen, name="listen", daemon=True).start()
    child.send(Ready(os.getpid(), device, platform.processor() or platform.machine(), resident()))
    child.work()


if __name__ == "__main__":
    main()
