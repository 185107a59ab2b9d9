"""The problems of the machine that a worker runs on. While there is one, the worker claims no tasks and shows the problem.

A problem of the disk or of open files lasts until an examination passes. A problem of the storage lasts until the waiting runs can upload.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from movieq import logs
from movieq.backoff import Backoff
from movieq.tasks.states import RunToken
from workers import spool
from workers.concurrency import set_within
from workers.faults import HOST, host_problem, public_message

FLOOR_BYTES: Final = 32 * 1024 * 1024
"""Least free space on the disk, in bytes. With less, the worker claims no tasks."""
SAMPLE_BYTES: Final = 1024 * 1024
"""Size of the file that an examination writes and reads back, in bytes."""
SAMPLE_FILES: Final = 16
"""Number of files that the worker must be able to open beside those that are open."""
EXAMINE_S: Final = 2.0, 30.0
"""Shortest and longest wait before a machine with a problem is examined again, in seconds. A completed run resets the wait."""
LOOK_S: Final = 5.0
"""Time between two checks of free space and open files while there is no problem, in seconds."""
UPLOADS_MOST: Final = 4
"""Number of runs, for each child, that wait for a storage which refuses their files, at which the worker stops claiming tasks."""

log = logs.get()


class Host:
    """The problem of this machine, if there is one. A problem of the disk or of open files ends only while `monitor` runs."""

    def __init__(self, folder: Path, children: int = 1) -> None:
        self._fault: str | None = None
        self._folder = folder
        self._uploads_most = UPLOADS_MOST * children
        self._refused: dict[RunToken, str] = {}
        self._blamed = asyncio.Event()
        self._backoff = Backoff(*EXAMINE_S)

    @property
    def problem(self) -> str | None:
        """The problem, in words for users; None while there is none."""
        return self._fault or self._storage_problem

    @property
    def can_store(self) -> bool:
        """Whether runs that only store finished files can be claimed. They do not write to the disk."""
        return self._storage_problem is None and self._fault != HOST[errno.EMFILE]

    @property
    def _storage_problem(self) -> str | None:
        if len(self._refused) < self._uploads_most:
            return None
        return f"its finished files cannot be stored: {next(reversed(self._refused.values()))}"

    def blame(self, problem: str) -> None:
        """Record a problem: the worker claims no tasks until an examination passes."""
        if self._fault is None:
            log.error("worker_problem", problem=problem)
        self._fault = problem
        self._blamed.set()

    def refused(self, run: RunToken, problem: str) -> None:
        """Record that a run waits because the storage refuses its files. When too many wait, the worker claims no tasks."""
        before = self._storage_problem
        self._refused[run] = problem
        if before is None and self._storage_problem is not None:
            log.error("worker_problem", problem=self._storage_problem)

    def waits_no_more(self, run: RunToken) -> None:
        """Record that a run no longer waits for the storage."""
        before = self._storage_problem
        self._refused.pop(run, None)
        if before is not None and self._storage_problem is None:
            log.info("worker_problem_over", was=before)

    def proven(self) -> None:
        """Record that a run completed: the waits between examinations start again from the shortest."""
        self._backoff.reset()

    async def monitor(self, on_room: Callable[[], None]) -> None:
        """Look for problems. While there is one, examine the machine again and again; when an examination passes, call `on_room`."""
        while True:
            if self._fault is None:
                if (problem := await asyncio.to_thread(_look, self._folder)) is not None:
                    self.blame(problem)
                else:
                    await set_within(self._blamed, LOOK_S)
                continue
            await asyncio.sleep(self._backoff.next_s())
            if (problem := await asyncio.to_thread(examine, self._folder)) is not None:
                log.warning("worker_problem_lasts", problem=problem)
                self._fault = problem
                continue
            log.info("worker_problem_over", was=self._fault)
            self._fault = None
            self._blamed.clear()
            on_room()


def examine(folder: Path) -> str | None:
    """Return the problem of the working folder; None if a file can be written there, synced and read back."""
    try:
        spool.mend(folder)
        sample = os.urandom(SAMPLE_BYTES)
        with tempfile.TemporaryDirectory(dir=folder, prefix="examined-") as place:
            path = Path(place) / "sample"
            with path.open("wb") as file:
                file.write(sample)
                file.flush()
                os.fsync(file.fileno())
            if path.read_bytes() != sample:
                return HOST[errno.EIO]
    except OSError as error:
        log.debug("examination_failed", problem=str(error))
        return _problem(error, folder)
    return _look(folder)


def _look(folder: Path) -> str | None:
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(SAMPLE_FILES):
                opened.enter_context(Path(os.devnull).open("rb"))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return _problem(error, folder)
    return None if free >= FLOOR_BYTES else f"{HOST[errno.ENOSPC]}: {free // 2**20} MiB are free, {FLOOR_BYTES // 2**20} MiB are needed"


def _problem(error: OSError, folder: Path) -> str:
    return host_problem(error, folder, folder.parent) or f"its working folder cannot be used: {public_message(error)}"
