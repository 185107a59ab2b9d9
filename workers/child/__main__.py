"""The engine process of one device: `python -P -m workers.child --device cpu`.

It speaks `workers.protocol` on its standard input and output: it sends `Ready` when it can take runs, then executes one run, or batch of
runs, after another. It is synchronous and uses neither asyncio nor Redis. A reader thread receives cancels while the main thread works.
When its input ends, the process ends at once, whatever it is doing. It ignores SIGINT and SIGTERM: the worker decides when it ends.

Only protocol frames go to standard output; what libraries print goes to standard error.
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
from workers.child import takes
from workers.child.job import Finish, Flag, Job, JobCancelled, Output, device_is_broken, is_out_of_memory
from workers.faults import PLACE, device_problem, host_problem, public_message
from workers.protocol import Batch, Cancel, Cancelled, Done, Failed, Free, FromChild, Ready, Run, Watched

T = TypeVar("T")
Answer = Done | Failed | Cancelled
"""The messages that end a run."""


def main() -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m workers.child", description="The engine process of one device; started by the worker.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: the only GPU that is visible")
    device: str = parser.parse_args().device
    process = EngineProcess(*private_pipe(), device)
    try:
        plugins.load()
        engine_function("animatic")
        if device != "cpu":
            check_gpu(device)
    except Exception as error:
        print(f"this child cannot work on {device}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # for the worker's log
        sys.exit(protocol.EXIT_UNFIT)
    threading.Thread(target=process.read_messages, name="listen", daemon=True).start()
    loaded, _, _ = models_in_memory()
    process.send(Ready(os.getpid(), device, platform.processor() or platform.machine(), loaded))
    process.run_forever()


def private_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Return standard input and output, out of reach of libraries: for them, input is empty and output goes to standard error."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(source, "rb"), os.fdopen(sink, "wb")


def check_gpu(device: str) -> None:
    """Test that the GPU computes correctly, and import the engine that uses it. Raises whatever goes wrong."""
    import torch

    torch.cuda.set_device(device)
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64**3:
        raise RuntimeError("it computes wrong results")
    engine_function("diffusers")


class EngineProcess:
    """The pipe to the worker, and the cancel flags of the runs that have not been answered."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, device: str) -> None:
        self._device = device
        self._source = source
        self._sink = sink
        self._write_lock = threading.Lock()
        self._batches: queue.SimpleQueue[tuple[Run, ...]] = queue.SimpleQueue()
        self._flags: dict[str, Flag] = {}

    def read_messages(self) -> None:
        """Read messages until the input ends, then end the process without clean-up: the worker owns all files."""
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
                        flag.others = tuple(other for name, other in flags.items() if name != run)
                    self._flags |= flags
                    self._batches.put(runs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _cancel(self, run: str) -> None:
        """Cancel a run: it stops at its next step. One that cannot be interrupted ends with the process.

        A run of a batch whose others go on is answered at once, and leaves the batch.
        """
        if (flag := self._flags.get(run)) is None:
            return
        flag.set()
        if not all(other.is_set() for other in flag.others):
            self.send(Cancelled(run))
        elif flag.uninterruptible:
            os._exit(0)

    def send(self, message: FromChild) -> None:
        """Write a message to the worker; a second answer to a run is dropped. If the worker has closed the pipe, end the process."""
        try:
            frame = protocol.frame(message)
        except protocol.Unsendable as error:
            if not isinstance(message, Answer):
                raise  # in the engine that sent it: its run fails
            why = f"the engine answered with something that cannot be passed on: {error}"
            frame = protocol.frame(Failed(message.run, InternalFault.code, why, traceback.format_exc(), rendered=True))
        if isinstance(message, Answer) and self._flags.pop(message.run, None) is None:
            return
        try:
            with self._write_lock:
                self._sink.write(frame)
                self._sink.flush()
        except BrokenPipeError:
            os._exit(0)

    def run_forever(self) -> None:
        """Execute one batch after another. What needs no device runs in a second thread, one batch at a time, beside the next batch."""
        finisher, finishing = ThreadPoolExecutor(1, "finish"), None
        ended_s = time.perf_counter()
        while True:
            runs = self._batches.get()
            begun_s = time.perf_counter()
            idle_s = begun_s - ended_s
            results = render_runs(runs, self.send, self._flags, self._device)
            ended_s = time.perf_counter()
            unfinished = [(run, result) for run, result in zip(runs, results, strict=True) if not isinstance(result, Answer)]
            for result in results:
                if isinstance(result, Answer):
                    self._answer(result)
            if not unfinished:
                continue
            if finishing is not None:
                finishing.result()  # so that the pictures of two batches at most are in memory
            for run, _ in unfinished:
                self.send(Free(run.run, ended_s - begun_s, idle_s))
            finishing = finisher.submit(self._finish, unfinished)

    def _finish(self, unfinished: list[tuple[Run, Finish]]) -> None:
        for run, finish in unfinished:
            self._answer(finish_run(run, finish, rendered=True))

    def _answer(self, answer: Answer) -> None:
        self.send(answer)
        if isinstance(answer, Failed) and answer.broken:
            os._exit(protocol.EXIT_BROKEN)


def render_runs(
    runs: tuple[Run, ...], send: Callable[[FromChild], None], flags: dict[str, Flag], device: str = "cpu"
) -> list[Answer | Finish]:
    """Render the runs of one batch. Return for each run its answer, or the rest of its work that needs no device."""
    jobs: list[Job] = []

    def render() -> list[Output | Finish | BaseException]:
        jobs.extend(Job(run, send, flags[run.run], device) for run in runs)
        if len(runs) > 1:
            results: list[Output | Finish | BaseException] = engine_function(runs[0].engine, "render_batch")(jobs)
            return results
        jobs[0].check()
        if jobs[0].params.takes > 1:
            return [takes.render(jobs[0], functools.partial(engine_function, runs[0].engine))]
        return [engine_function(runs[0].engine)(jobs[0])]

    results = _result_or_failure(runs[0], render)
    if not isinstance(results, list):
        return [msgspec.structs.replace(results, run=run.run) for run in runs]
    return [
        result if callable(result) else finish_run(run, functools.partial(_return_or_raise, result))
        for run, result in zip(runs, results, strict=True)
    ]


def engine_function(name: str, function: str = "render") -> Any:
    """Return a function of an engine, importing the engine on first use. Raises EngineUnavailable for an unknown engine."""
    if name not in REGISTRY.engines:
        raise EngineUnavailable(f"engine {name!r} is not in this child; it has {', '.join(REGISTRY.engines)}")
    return getattr(importlib.import_module(REGISTRY.engines[name]), function)


def finish_run(run: Run, finish: Finish, *, rendered: bool = False) -> Answer:
    """Do the rest of a run and return its answer. `rendered`: whether the device has done its part."""
    output = _result_or_failure(run, finish)
    if isinstance(output, Failed):
        return msgspec.structs.replace(output, rendered=rendered)
    if not isinstance(output, Output):
        return output
    files = tuple(each if each.seed is not None else msgspec.structs.replace(each, seed=run.seed) for each in output.files)
    return Done(run.run, files, output.metadata, *models_in_memory())


def _return_or_raise(result: Output | BaseException) -> Output:
    if isinstance(result, BaseException):
        raise result
    return result


def _result_or_failure(run: Run, work: Callable[[], T]) -> T | Failed | Cancelled:
    """Return what `work` returns, or the answer that reports its exception."""
    try:
        return work()
    except JobCancelled:
        return Cancelled(run.run)
    except MemoryError:
        return Failed(run.run, OutOfMemory.code, "the host's memory ran out", traceback.format_exc())
    except Exception as error:
        broken = device_is_broken(error)
        if is_out_of_memory(error) and not broken and not isinstance(error, TaskFault):
            return Failed(run.run, OutOfMemory.code, "the memory of its device ran out", traceback.format_exc())
        # on a broken device no model loads: that the model is unavailable would be untrue
        known = isinstance(error, TaskFault) and not broken
        fault = (
            error if isinstance(error, TaskFault) and known else InternalFault(f"the {run.engine} engine failed: {public_message(error)}")
        )
        problem = (device_problem(error) if broken else host_problem(error, Path(run.out_dir).parent)) or ""
        if not broken and not Path(run.out_dir).is_dir():
            problem = problem or PLACE[errno.ENOENT]
        return Failed(run.run, fault.code, fault.message, traceback.format_exc(), broken=broken, problem=problem)


def models_in_memory() -> tuple[tuple[str, ...], tuple[str, ...], ModelSwaps]:
    """Return the models on the device, those offloaded to host memory, and how often models were loaded and evicted.

    The animatic needs no weights and is always there. The diffusion engine is asked only once it was imported: importing it loads torch.
    """
    cache = sys.modules.get("workers.child.diffusion.model_cache")
    if cache is None:
        return ("animatic",), (), ModelSwaps()
    return ("animatic", *cache.loaded_names()), cache.offloaded_names(), cache.swaps()


if __name__ == "__main__":
    main()
