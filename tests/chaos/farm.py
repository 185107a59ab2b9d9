"""A small installation of real processes that are killed and started again: two APIs, three workers with a child each, one Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from movieq import serving
from movieq.embedded import Valkey

APIS, WORKERS = 2, 3
RESPAWN_S = 0.2


class Farm:
    """What runs. `keep` starts again whatever has ended, as systemd or Kubernetes would."""

    def __init__(self, folder: Path, source: Path | None = None) -> None:
        """`source`: a folder with another movieq and workers to run."""
        self.folder = folder
        self.source = source
        self.valkey = Valkey(folder / "valkey")
        self.sockets: list[socket.socket] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kills: dict[str, int] = {}
        self._stopping = False
        self._log = (folder / "log").open("ab")

    @property
    def urls(self) -> list[str]:
        """Where the APIs are; their sockets outlive them."""
        return [serving.address(sock) for sock in self.sockets]

    def start(self, **settings: str) -> None:
        self.valkey.start()
        self.sockets = [serving.listen("127.0.0.1", 0) for _ in range(APIS)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
            "MOVIEQ_REDIS_URL": self.valkey.url,
            "MOVIEQ_STORAGE": str(self.folder / "media"),
            "MOVIEQ_SPOOL": str(self.folder / "spool"),
            "MOVIEQ_PUBLIC_URL": self.urls[0],
            "MOVIEQ_ALLOW_PRIVATE_URLS": "127.0.0.0/8",
            "MOVIEQ_LOG_FORMAT": "json",
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
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "movieq.cli", *command],
            cwd=self.source,
            env=self.environment,
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

    def any_worker(self, chance: random.Random) -> str:
        return f"worker{chance.randrange(WORKERS)}"

    def any_api(self, chance: random.Random) -> str:
        return f"api{chance.randrange(APIS)}"
