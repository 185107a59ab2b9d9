"""The process of a device: `python -m workers.child --device cpu`.

It speaks `workers.protocol` on its standard input and output: `Ready` when it takes runs, then one run after another. It is synchronous
and knows neither asyncio nor Redis. A reader thread listens for `Cancel` while the main thread works; at the end of the input the process
ends at once, whatever it is doing. It ignores SIGINT and SIGTERM: the worker decides when a child ends.

Whatever libraries print goes to standard error; standard output carries frames alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import BinaryIO

from movieq import plugins
from movieq.contracts import ModelSwaps
from movieq.errors import EngineUnavailable, InternalFault, OutOfMemory, TaskFault
from movieq.models import ENGINES
from workers import protocol
from workers.child import leash
from workers.child.take import Flag, Made, Take, TakeCancelled
from workers.protocol import Cancel, Cancelled, Done, Failed, FromChild, Ready, Run, Watched


class Child:
    """The two ends of the pipe, and the runs between `Run` and its answer, each with its cancel flag."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, device: str) -> None:
        self._device = device
        self._source = source
        self._sink = sink
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._flags: dict[str, Flag] = {}

    def listen(self) -> None:
        """Reads frames until the input ends; then the process ends at once, with nothing to tidy: the worker owns all that it wrote."""
        try:
            while (body := protocol.read_frame(self._source)) is not None:
                message = protocol.to_child_decoder.decode(body)
                if isinstance(message, Cancel):
                    if flag := self._flags.get(message.run):
                        flag.set()
                        if flag.deaf:
                            os._exit(0)
                elif isinstance(message, Watched):
                    if flag := self._flags.get(message.run):
                        flag.watched = message.watched
                else:
                    self._flags[message.run] = Flag()
                    self._runs.put(message)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def send(self, message: FromChild) -> None:
        """Writes one frame. A pipe that nobody reads ends the process, as the end of its input does."""
        try:
            self._sink.write(protocol.frame(message))
            self._sink.flush()
        except BrokenPipeError:
            os._exit(0)

    def work(self) -> None:
        """Does one run after another, for ever."""
        while True:
            run = self._runs.get()
            answer = perform(run, self.send, self._flags[run.run], self._device)
            del self._flags[run.run]
            self.send(answer)
            if isinstance(answer, Failed) and answer.broken:
                os._exit(protocol.EXIT_BROKEN)


def perform(run: Run, send: Callable[[FromChild], None], cancelled: Flag, device: str = "cpu") -> Done | Failed | Cancelled:
    """The answer to a run: every outcome of an engine as the one frame that ends it."""
    try:
        take = Take(run, send, cancelled, device)
        take.check()
        made = engine(run.engine)(take)
        take.check()
    except TakeCancelled:
        return Cancelled(run.run)
    except TaskFault as fault:
        return Failed(run.run, fault.code, fault.message, traceback.format_exc())
    except MemoryError:
        return Failed(run.run, OutOfMemory.code, "the host's memory ran out", traceback.format_exc())
    except Exception as error:
        said = f"the {run.engine} engine failed: {type(error).__name__}: {error}"
        return Failed(run.run, InternalFault.code, said, traceback.format_exc(), broken=_beyond_repair(error))
    return Done(run.run, made.files, made.metadata, resident(), *put_by())


def _beyond_repair(error: BaseException | None) -> bool:
    """Whether this or what caused it is a fault of CUDA's other than memory: after one, every call of the process fails."""
    while error is not None:
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def resident() -> tuple[str, ...]:
    """The models on the device: the animatic needs none, and is always there."""
    shelf = sys.modules.get("workers.child.shelf")
    return ("animatic", *(shelf.names() if shelf else ()))


def put_by() -> tuple[tuple[str, ...], ModelSwaps]:
    """The models that wait in the host's memory, and how often models came and went."""
    shelf = sys.modules.get("workers.child.shelf")
    return (shelf.parked(), shelf.swaps()) if shelf else ((), ModelSwaps())


def engine(name: str) -> Callable[[Take], Made]:
    """The engine's `make`, imported when first asked for. Raises EngineUnavailable where this child has no such engine."""
    if name not in ENGINES:
        raise EngineUnavailable(f"engine {name!r} is not in this child; it has {', '.join(ENGINES)}")
    make: Callable[[Take], Made] = importlib.import_module(ENGINES[name]).make
    return make


def fit(device: str) -> None:
    """The GPU can be used, and what uses it is in memory. Raises where not."""
    import torch

    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
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
    leash.hold()
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
