"""Finished files that are not stored yet, in folders beside the spools. They outlive their worker, and the next run of the task finds them.

A folder is synced and then renamed, so that it appears whole or not at all, even after a power cut. Its manifest lists its files. It is
removed a minute after its task is committed (a failover of Redis can lose the commit), or a day after the last try to store its files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from movieq import logs
from movieq.queue.queries import Queries
from movieq.storage.folder import sync
from movieq.tasks.states import RunToken, TaskId, TaskStatus
from workers.protocol import Done
from workers.spool import FOLDER

PREFIX: Final = "movieq-made-"
MANIFEST: Final = "made.msgpack"
UNSTORED_S: Final = 24 * 3600.0
"""Time from the last try to store the files of a folder to its removal, in seconds."""
COMMITTED_S: Final = 60.0
"""The same for a folder whose task is completed or cancelled."""
SWEEP_S: Final = 30.0
"""Time between two sweeps, in seconds."""

log = logs.get()


class Finished(msgspec.Struct, frozen=True):
    """The output of an engine for a task. `folder` outlives the worker; it is None if the files are still in the run's own folder."""

    done: Done
    folder: Path | None = None


class _Manifest(msgspec.Struct, frozen=True):
    """What a folder holds: `done` with paths relative to the folder, and the size of each file in bytes."""

    done: Done
    sizes: tuple[int, ...]


class FinishedFiles:
    """The folders of finished files under `parent` that belong to this user, from any worker."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def save(self, task_id: TaskId, run: RunToken, out_dir: Path, done: Done) -> Finished:
        """Move the files of `out_dir` to a folder that outlives this worker. If that fails, they stay in `out_dir`."""
        folder = self._parent / f"{PREFIX}{task_id}.{run}"
        try:
            named = _moved(done, lambda path: path.relative_to(out_dir))
            manifest = _Manifest(named, tuple(Path(each.path).stat().st_size for each in done.files))
            (out_dir / MANIFEST).write_bytes(msgspec.msgpack.encode(manifest))
            for path in (*(Path(each.path) for each in done.files), out_dir / MANIFEST, out_dir):
                sync(path)
            out_dir.chmod(0o700)
            out_dir.rename(folder)
        except (OSError, ValueError) as error:
            log.warning("finished_files_not_saved", problem=str(error))
            return Finished(done)
        return Finished(_moved(named, folder.joinpath), folder)

    def find(self, task_id: TaskId) -> Finished | None:
        """Return the finished files of an earlier run of the task on this host; None if there is no complete set."""
        try:
            folders = list(self._parent.glob(f"{PREFIX}{task_id}.*"))
        except OSError as error:
            log.warning("finished_files_unread", problem=str(error))
            return None
        for folder in folders:
            if not _ours(folder):
                continue
            try:
                manifest = msgspec.msgpack.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
                done = _moved(manifest.done, folder.joinpath)
                if manifest.sizes == tuple(Path(each.path).stat().st_size for each in done.files):
                    return Finished(done, folder)
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("finished_files_damaged", folder=str(folder), problem=str(error))
        return None

    def touch(self, finished: Finished) -> None:
        """Reset the age of the folder, so that it stays another day."""
        if finished.folder is not None:
            with contextlib.suppress(OSError):
                os.utime(finished.folder)

    async def sweep(self, queries: Queries, committed_s: float = COMMITTED_S) -> None:
        """Remove old folders: those of completed and cancelled tasks after `committed_s`, others after `UNSTORED_S`."""
        if not (ages := await asyncio.to_thread(self._ages_s)):
            return
        tasks_of = {folder: TaskId(folder.name.removeprefix(PREFIX).partition(".")[0]) for folder in ages}
        states = {task.task_id: task.status for task in await queries.tasks(list(tasks_of.values()))}
        for folder, age_s in ages.items():
            # a task that this Redis does not know may belong to another installation
            over = states.get(tasks_of[folder]) in (TaskStatus.COMPLETED, TaskStatus.CANCELLED)
            if age_s >= (committed_s if over else UNSTORED_S):
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                log.info("finished_files_removed", folder=str(folder))

    def _ages_s(self) -> dict[Path, float]:
        ages = {}
        for folder in filter(_ours, self._parent.glob(f"{PREFIX}*")):
            with contextlib.suppress(OSError):
                ages[folder] = time.time() - folder.stat().st_mtime
        return ages


def _moved(done: Done, where: Callable[[Path], Path]) -> Done:
    files = tuple(msgspec.structs.replace(each, path=str(where(Path(each.path)))) for each in done.files)
    return msgspec.structs.replace(done, files=files)


def _ours(folder: Path) -> bool:
    """Whether this is a folder of this user, and not a link: anybody can put anything into a temporary folder."""
    try:
        fd = os.open(folder, FOLDER)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_uid == os.geteuid()
    finally:
        os.close(fd)
