"""The folder that a worker works in. The worker removes it at its end; if the worker is killed, the next worker that starts removes it.

A lock on the folder shows that its worker lives: the kernel releases it however the worker ends. (systemd-tmpfiles respects it too.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from movieq import logs

PREFIX: Final = "movieq-spool-"
FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
"""Flags for opening a folder that refuse a link: anybody can put a link into a temporary folder."""

log = logs.get()


@contextmanager
def spool(parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder for the block, under `parent` or the system's temporary folder. Folders of dead workers are removed."""
    parent = parent or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(parent)
    folder, lock = _new_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def mend(folder: Path) -> None:
    """Create the folder again if it was removed, and lock it until the process ends. Raises OSError."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, FOLDER), fcntl.LOCK_EX | fcntl.LOCK_NB)  # never closed: the lock shows that the worker lives


def _new_folder(parent: Path) -> tuple[Path, int]:
    """Return a new folder, and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = os.open(folder, FOLDER)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without such locks: no other worker gets one either, so none removes the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else a worker that started at the same moment has removed it as a dead worker's
            return folder, lock
        os.close(lock)


def _remove_dead(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, FOLDER)
        except OSError:  # not a folder, not ours, or gone
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                log.info("spool_removed", folder=str(folder))
        except OSError:  # its worker lives
            pass
        finally:
            os.close(lock)
