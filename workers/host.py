"""The machine that a worker runs on: while it cannot work, or store finished files, the worker takes no tasks and shows the reason.

Its disk and its open files are examined until they are in order. The storage is tried by the runs that wait for it.
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
from workers.faults import HOST, host_problem, said

FLOOR_BYTES: Final = 32 * 1024 * 1024
"""With less free space than this, no task is taken."""
SAMPLE_BYTES: Final = 1024 * 1024
"""How much an examination writes and reads again."""
SAMPLE_FILES: Final = 16
"""So many files a machine in order can open beside those that it has open."""
EXAMINE_S: Final = 2.0, 30.0
"""Shortest and longest wait before a machine at fault is examined again; the first run that ends well resets it."""
LOOK_S: Final = 5.0
"""Between two checks of the free space and the open files of a machine that is in order."""
UPLOADS_MOST: Final = 4
"""So many runs, for each child, may wait for a storage that refuses their files before no task is taken."""

log = logs.get()


class Host:
    """What is wrong with this machine, if anything. It recovers only while `monitor` runs."""

    def __init__(self, folder: Path, children: int = 1) -> None:
        self._fault: str | None = None
        self._folder = folder
        self._uploads_most = UPLOADS_MOST * children
        self._refused: dict[RunToken, str] = {}
        self._blamed = asyncio.Event()
        self._backoff = Backoff(*EXAMINE_S)

    @property
    def problem(self) -> str | None:
        """What is wrong, in words for users; None while nothing is."""
        return self._fault or self._storage_problem

    @property
    def can_store(self) -> bool:
        """Whether runs that only store finished files can be claimed: the state of the disk does not matter to them."""
        return self._storage_problem is None and self._fault != HOST[errno.EMFILE]

    @property
    def _storage_problem(self) -> str | None:
        if len(self._refused) < self._uploads_most:
            return None
        return f"its finished files cannot be stored: {next(reversed(self._refused.values()))}"

    def blame(self, problem: str) -> None:
        """Take no more tasks until an examination passes."""
        if self._fault is None:
            log.error("worker_problem", problem=problem)
        self._fault = problem
        self._blamed.set()

    def refused(self, run: RunToken, problem: str) -> None:
        """Note that the storage refuses the files of a run, which waits. Where too many wait, no more tasks are taken."""
        before = self._storage_problem
        self._refused[run] = problem
        if before is None and self._storage_problem is not None:
            log.error("worker_problem", problem=self._storage_problem)

    def waits_no_more(self, run: RunToken) -> None:
        """Note that a run no longer waits for the storage."""
        before = self._storage_problem
        self._refused.pop(run, None)
        if before is not None and self._storage_problem is None:
            log.info("worker_problem_over", was=before)

    def proven(self) -> None:
        """Note that a run ended well: the next fault is a new one."""
        self._backoff.reset()

    async def monitor(self, on_room: Callable[[], None]) -> None:
        """Examine a machine at fault until it is in order, then call `on_room`; watch the free space and open files of one in order."""
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
    """Return what is wrong with the working folder; None where a file can be written there, synced and read again."""
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
    return host_problem(error, folder, folder.parent) or f"its working folder cannot be used: {said(error)}"
