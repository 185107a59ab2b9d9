"""A small installation of real processes that are killed and started again: two APIs, three workers with a child each, one Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

import movieq
from movieq.api import server
from movieq.errors import SettingsError
from movieq.local.embedded import Valkey
from tests.service import UNLIMITED

APIS, WORKERS = 2, 3
RESPAWN_S = 0.2
ROOT = Path(movieq.__file__).parents[1]
PLUGIN = ROOT / "tests/engines/palettes/movieq_palettes.py"
NEWER: dict[str, list[tuple[str, str]]] = {
    "movieq/tasks/states.py": [
        ('    GOODBYE = "goodbye"\n', '    GOODBYE = "goodbye"\n    NOTED = "noted"\n'),
        ('    CPU_INTENSIVE = "cpu_intensive"\n', '    CPU_INTENSIVE = "cpu_intensive"\n    GPU_TINY = "gpu_tiny"\n'),
    ],
    "movieq/tasks/entities.py": [('    IDLE = "idle"\n', '    IDLE = "resting"\n')],
    "movieq/queue/lua/submit.lua": [("set(t, fields)\n", 'fields.labels = \'{"scene":"12"}\'\nset(t, fields)\n')],
    "movieq/queue/lua/complete.lua": [
        ("finish(t, 'completed'", "log(t, 'noted', {'\"text\":\"of a newer version\"'})\nfinish(t, 'completed'")
    ],
}
"""What the newer version that runs beside this one knows more: an event, a kind, a state of workers, a field of tasks."""


def newer(folder: Path) -> Path:
    """A place with the packages of a newer version, and with a plug-in."""
    for package in ("movieq", "workers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in NEWER.items():
        text = (folder / name).read_text()
        for old, new in changes:
            assert old in text, (name, old)
            text = text.replace(old, new)
        (folder / name).write_text(text)
    shutil.copy(PLUGIN, folder)
    about = folder / "movieq_palettes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: movieq-palettes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[movieq.plugins]\npalettes = movieq_palettes:plugin\n")
    return folder


class Disk:
    """A small disk of its own that can be full; none where file systems cannot be mounted."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place)]
        self.mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0

    def fill(self) -> None:
        with (self.place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**20))

    def clear(self) -> None:
        (self.place / "filler").unlink(missing_ok=True)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)


class Farm:
    """What runs. `keep` starts again whatever has ended, as systemd or Kubernetes would.

    Of a `mixed` one the last API and the last worker are of a newer version and have a plug-in, and the worker before has a small disk.
    """

    def __init__(self, folder: Path, source: Path | None = None, *, mixed: bool = False) -> None:
        """`source`: a folder with another movieq and workers to run."""
        self.folder = folder
        self.source = source
        self.newer = newer(folder / "newer") if mixed else None
        self.disk = Disk(folder / "disk") if mixed else None
        self.valkey = Valkey(folder / "valkey")
        self.sockets: list[socket.socket] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kills: dict[str, int] = {}
        self._stopping = False
        self._log = (folder / "log").open("ab")

    @property
    def urls(self) -> list[str]:
        """Where the APIs are; their sockets outlive them."""
        return [server.address(sock) for sock in self.sockets]

    def start(self, **settings: str) -> None:
        self.valkey.start()
        self.sockets = [server.listen("127.0.0.1", 0) for _ in range(APIS)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
            "MOVIEQ_REDIS_URL": self.valkey.url,
            "MOVIEQ_STORAGE": str(self.folder / "media"),
            "MOVIEQ_SPOOL": str(self.folder / "spool"),
            "MOVIEQ_PUBLIC_URL": self.urls[0],
            "MOVIEQ_ALLOW_PRIVATE_URLS": "127.0.0.0/8",
            "MOVIEQ_LOG_FORMAT": "json",
            **UNLIMITED,
            "MOVIEQ_DRAIN_S": "1",
            "MOVIEQ_MAX_QUEUED_PER_PROJECT": "0",
            **settings,
        }
        for number in range(APIS):
            self._spawn(f"api{number}")
        for number in range(WORKERS):
            self._spawn(f"worker{number}")

    def _spawn(self, name: str) -> None:
        if name.startswith("api"):
            fd = self.sockets[int(name[3:])].fileno()
            command, fds = ["api", "--fd", str(fd)], [fd]
        else:
            command, fds = ["worker"], []
        environment, source = self.environment, self.source
        if self.newer is not None and name in (f"api{APIS - 1}", f"worker{WORKERS - 1}"):
            source = self.newer
        if self.disk is not None and self.disk.mounted and name == f"worker{WORKERS - 2}":
            environment = {**environment, "MOVIEQ_SPOOL": str(self.disk.place / "spool")}
        if source is not None:
            environment = {**environment, "PYTHONPATH": str(source)}
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "movieq.cli", *command],
            cwd=source,
            env=environment,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    async def keep(self) -> None:
        """For ever: what has ended is started again."""
        while True:
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    self._spawn(name)
            if not self.valkey.alive():
                with contextlib.suppress(SettingsError):  # on a busy machine it may take longer than `start` waits: tried again
                    await asyncio.to_thread(self.valkey.start)
            await asyncio.sleep(RESPAWN_S)

    def kill(self, name: str) -> None:
        """kill -9 of one process."""
        self.processes[name].kill()
        self.kills[name[:-1]] = self.kills.get(name[:-1], 0) + 1

    def kill_child(self, name: str) -> None:
        """kill -9 of the child of a worker, where it has one."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.processes[name].pid).children():
                child.kill()
                self.kills["child"] = self.kills.get("child", 0) + 1

    async def restart_redis(self, hard: bool) -> None:
        """Valkey is gone for a moment; `keep` brings it back."""
        assert self.valkey.pid is not None
        os.kill(self.valkey.pid, signal.SIGKILL if hard else signal.SIGTERM)
        self.kills["redis"] = self.kills.get("redis", 0) + 1
        end = time.monotonic() + 10
        while self.valkey.alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def stop_and_go(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while: a worker that everybody takes for dead."""
        process = self.processes[name]
        self.kills["stopped"] = self.kills.get("stopped", 0) + 1
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.valkey.stop()
        for sock in self.sockets:
            sock.close()
        self._log.close()
        if self.disk is not None:
            self.disk.remove()

    def any_worker(self, chance: random.Random) -> str:
        return f"worker{chance.randrange(WORKERS)}"

    def any_api(self, chance: random.Random) -> str:
        return f"api{chance.randrange(APIS)}"
