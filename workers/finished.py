"""Finished files that are not stored yet, in folders beside the spools: they outlive their worker, and the next run of the task finds them.

A folder appears whole, by a rename, with a manifest that names its files; a power cut cannot have damaged what it names. It is removed a
minute after its task was committed (a failover of Redis can lose the commit), and a day after the last try to store its files.
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
"""How long a folder stays after the last try to store its files."""
COMMITTED_S: Final = 60.0
"""How long a folder stays once its task is completed or cancelled."""
SWEEP_S: Final = 30.0
"""Between two sweeps."""

log = logs.get()


class Finished(msgspec.Struct, frozen=True):
    """What an engine rendered for a task. `folder` outlives the worker; None where the files are still in the run's own folder."""

    done: Done
    folder: Path | None = None


class _Manifest(msgspec.Struct, frozen=True):
    """`done` with paths relative to the folder, and the size of each file in bytes."""

    done: Done
    sizes: tuple[int, ...]


class FinishedFiles:
    """The folders of this user under `parent`, whichever worker made them."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def save(self, task_id: TaskId, run: RunToken, out_dir: Path, done: Done) -> Finished:
        """Move the files of `out_dir` to a folder that outlives this worker; where that fails they stay where they are."""
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
        """Return what an earlier run of the task has finished here; None where there is nothing whole."""
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
        """Start the folder's day again."""
        if finished.folder is not None:
            with contextlib.suppress(OSError):
                os.utime(finished.folder)

    async def sweep(self, queries: Queries, committed_s: float = COMMITTED_S) -> None:
        """Remove the folders whose time is over."""
        if not (ages := await asyncio.to_thread(self._ages_s)):
            return
        tasks_of = {folder: TaskId(folder.name.removeprefix(PREFIX).partition(".")[0]) for folder in ages}
        states = {task.task_id: task.status for task in await queries.tasks(list(tasks_of.values()))}
        for folder, age_s in ages.items():
            # one that this Redis does not know may be another installation's
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
    """Whether this is a folder, not a link, and this user's: anybody can put anything into a temporary folder."""
    try:
        fd = os.open(folder, FOLDER)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_uid == os.geteuid()
    finally:
        os.close(fd)
