"""Finished files that are not stored yet, in folders beside the spools: they outlive their worker, and the next run of the task finds them.

A folder appears whole, by a rename, with a manifest that names its files; a power cut cannot have damaged what it names. It goes a minute
after its task was committed (a failover of Redis can lose that), and a day after the last try to store it.
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
KEPT_S: Final = 24 * 3600.0
COMMITTED_S: Final = 60.0
SWEEP_S: Final = 30.0

log = logs.get()


class Made(msgspec.Struct, frozen=True):
    """What an engine made of a task. `folder` outlives the worker, or is None where nothing could be kept."""

    done: Done
    folder: Path | None = None


class _Manifest(msgspec.Struct, frozen=True):
    """`done` with paths inside the folder, and the size of each file in bytes."""

    done: Done
    sizes: tuple[int, ...]


class Kept:
    """The folders of this user under `parent`, whichever worker made them."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def keep(self, task_id: TaskId, run: RunToken, out_dir: Path, done: Done) -> Made:
        """The files of `out_dir` lie in a folder that outlives this worker; they stay where they are where that cannot be had."""
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
            log.warning("not_kept", problem=str(error))
            return Made(done)
        return Made(_moved(named, folder.joinpath), folder)

    def find(self, task_id: TaskId) -> Made | None:
        """What an earlier run of the task made here; None where there is nothing whole."""
        try:
            folders = list(self._parent.glob(f"{PREFIX}{task_id}.*"))
        except OSError as error:
            log.warning("kept_unread", problem=str(error))
            return None
        for folder in folders:
            if not _ours(folder):
                continue
            try:
                manifest = msgspec.msgpack.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
                done = _moved(manifest.done, folder.joinpath)
                if manifest.sizes == tuple(Path(each.path).stat().st_size for each in done.files):
                    return Made(done, folder)
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("kept_is_broken", folder=str(folder), problem=str(error))
        return None

    def touch(self, made: Made) -> None:
        """The folder's day begins anew."""
        if made.folder is not None:
            with contextlib.suppress(OSError):
                os.utime(made.folder)

    async def sweep(self, queries: Queries, committed_s: float = COMMITTED_S) -> None:
        """Folders whose time is over are gone."""
        if not (ages := await asyncio.to_thread(self._ages_s)):
            return
        tasks_of = {folder: TaskId(folder.name.removeprefix(PREFIX).partition(".")[0]) for folder in ages}
        states = {task.task_id: task.status for task in await queries.tasks(list(tasks_of.values()))}
        for folder, age_s in ages.items():
            # one that this Redis does not know may be another installation's
            over = states.get(tasks_of[folder]) in (TaskStatus.COMPLETED, TaskStatus.CANCELLED)
            if age_s >= (committed_s if over else KEPT_S):
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                log.info("kept_removed", folder=str(folder))

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
    """Whether it is a folder, no link, and this user's: in a temporary folder anybody can lay anything."""
    try:
        fd = os.open(folder, FOLDER)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_uid == os.geteuid()
    finally:
        os.close(fd)
