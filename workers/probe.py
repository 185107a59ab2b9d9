"""The check of a task's inputs: a short-lived process (`workers.child.probe`) decodes each once, before an engine process gets it.

A file made to cost minutes or gigabytes, or to crash its decoder, costs that process, and not the engine process of a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from movieq import logs
from movieq.errors import InternalFault, InvalidInput, OutOfMemory, TaskFault
from movieq.fetch.formats import Kind
from movieq.tasks.states import ProjectId
from workers.supervisor import environment

AT_ONCE: Final = 2
"""Most probes of a worker at once, each for another project."""
DECODE_S: Final = 10
"""Most processor time that decoding one input may take, in seconds."""
ALL_DECODE_S: Final = 120
"""Most processor time that decoding all inputs of a task may take, in seconds."""
DECODE_BYTES: Final = 2 * 1024**3
"""Most memory that decoding one input may take, in bytes."""
SILENT_S: Final = 120.0
"""Longest time until a probe has decoded the next input, in seconds. It runs out only where a worker gets hardly any processor time."""

log = logs.get()


class Probe:
    """Decodes inputs in processes of their own: `AT_ONCE` at once, one of each project. `decode_s` and `decode_bytes` limit each input."""

    def __init__(self, decode_s: int = DECODE_S, decode_bytes: int = DECODE_BYTES) -> None:
        self._decode_s = decode_s
        self._decode_bytes = decode_bytes
        self._places = asyncio.Semaphore(AT_ONCE)
        self._turns = weakref.WeakValueDictionary[ProjectId, asyncio.Lock]()
        """A lock of each project that has or awaits a probe."""

    async def check(self, project_id: ProjectId, files: Sequence[tuple[str, Path]], kind: Kind) -> None:
        """Decode these files of a task of the project, each with the reference that messages name.

        Raises InvalidInput if one is not of this kind, is damaged or exceeds a limit. Raises a recoverable error if this machine is the
        cause.
        """
        if not files:
            return
        turn = self._turns.setdefault(project_id, asyncio.Lock())
        async with turn, self._places:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the working directory may hold another package `workers`
                "-m",
                "workers.child.probe",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # decoders write there without end
                start_new_session=True,
                env={**environment(), "OPENBLAS_NUM_THREADS": "1"},
            )
            try:
                await self._follow(process, files, kind)
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()

    async def _follow(self, process: asyncio.subprocess.Process, files: Sequence[tuple[str, Path]], kind: Kind) -> None:
        """Send the files to the process and read what it answers. Raises as `check` does."""
        assert process.stdin is not None
        assert process.stdout is not None
        order = [kind, self._decode_s, ALL_DECODE_S, self._decode_bytes, [[reference, str(path)] for reference, path in files]]
        with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended: the reader notices
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        for reference, _ in files:
            try:
                async with asyncio.timeout(SILENT_S):
                    line = await process.stdout.readline()
                    if not line:
                        await process.wait()
            except TimeoutError:
                raise InternalFault(f"this worker was too busy to decode {reference} within {SILENT_S:g} s") from None
            if not line:
                raise self._death(process.returncode, reference)
            match json.loads(line):
                case [text]:
                    log.error("probe_broke", traceback=text)
                    raise InternalFault(f"{reference} could not be decoded: the worker's log says why")
                case [problem, text]:
                    log.error("probe_broke", traceback=text)
                    raise InvalidInput(problem)
                case problem if problem:
                    raise InvalidInput(problem)

    def _death(self, exit_code: int | None, reference: str) -> TaskFault:
        """Return the fault of an input whose decoding has ended the process."""
        log.warning("probe_ended", exit_code=exit_code)
        if exit_code == -signal.SIGXCPU:
            limits = f"at most {self._decode_s} s of processor time are allowed, {ALL_DECODE_S} s for all inputs of a task"
            return InvalidInput(f"{reference} cannot be used: it takes too long to decode; {limits}")
        if exit_code == -signal.SIGKILL:  # by the kernel, when the machine had no memory left
            return OutOfMemory(f"the worker had too little memory to decode {reference}")
        if exit_code is not None and exit_code < 0:
            return InvalidInput(f"{reference} cannot be used: its decoder crashed")
        return InternalFault(f"{reference} could not be decoded: the worker's log says why")
