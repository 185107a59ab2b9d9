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
from typing import BinaryIO, Final

from movieq.errors import EngineUnavailable, InternalFault, OutOfMemory, TaskFault
from workers import protocol
from workers.child import leash
from workers.child.take import Made, Take, TakeCancelled
from workers.protocol import Cancel, Cancelled, Done, Failed, FromChild, Ready, Run

ENGINES: Final = {"animatic": "workers.child.animatic"}
"""Engine -> the module with its `make`. Imported when first asked for; a CPU child has the animatic at hand before it says `Ready`."""


class Child:
    """The two ends of the pipe, and the runs between `Run` and its answer, each with its cancel flag."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._flags: dict[str, threading.Event] = {}

    def listen(self) -> None:
        """Reads frames until the input ends; then the process ends at once, with nothing to tidy: the worker owns all that it wrote."""
        try:
            while (body := protocol.read_frame(self._source)) is not None:
                message = protocol.to_child_decoder.decode(body)
                if isinstance(message, Cancel):
                    if flag := self._flags.get(message.run):
                        flag.set()
                else:
                    self._flags[message.run] = threading.Event()
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
            answer = perform(run, self.send, self._flags[run.run])
            del self._flags[run.run]
            self.send(answer)


def perform(run: Run, send: Callable[[FromChild], None], cancelled: threading.Event) -> Done | Failed | Cancelled:
    """The answer to a run: every outcome of an engine as the one frame that ends it."""
    try:
        take = Take(run, send, cancelled)
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
        return Failed(
            run.run, InternalFault.code, f"the {run.engine} engine failed: {type(error).__name__}: {error}", traceback.format_exc()
        )
    return Done(run.run, made.files, made.metadata)


def engine(name: str) -> Callable[[Take], Made]:
    """The engine's `make`. Raises EngineUnavailable where this child has no such engine."""
    if name not in ENGINES:
        raise EngineUnavailable(f"engine {name!r} is not in this child; it has {', '.join(ENGINES)}")
    make: Callable[[Take], Made] = importlib.import_module(ENGINES[name]).make
    return make


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
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    device: str = parser.parse_args().device
    child = Child(*private_pipe())
    threading.Thread(target=child.listen, name="listen", daemon=True).start()
    engine("animatic")
    child.send(Ready(os.getpid(), device, platform.processor() or platform.machine()))
    child.work()


if __name__ == "__main__":
    main()
