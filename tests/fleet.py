"""API processes and workers that are started one by one on a Valkey of their own. (`movieq up` would start one that ends again.)"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from movieq.local.embedded import Valkey
from movieq.queue.connection import connect
from movieq.queue.store import Store
from tests.service import UNLIMITED, Service

KEY = "a-key-that-is-long-enough"
STOP_S = 90
WAIT_S = 60.0
"""How long a test waits for an event that must come, however busy the machine is."""

NVML = """
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda handle: "GPU-1"
"""
"""A module `pynvml` that finds one GPU."""


class Fleet:
    """Processes of movieq and the Valkey that they share. `store` is connected to it directly."""

    def __init__(self, folder: Path, valkey: Valkey, store: Store) -> None:
        self.folder = folder
        self.valkey = valkey
        self.store = store
        self.processes: list[Process] = []

    async def api(self, redis_url: str = "", port: int = 0, **settings: str) -> Service:
        """Start an API process; return it, once it serves, as a client sees it."""
        process = self.start("api", redis_url, ["--port", str(port)], settings)
        assert process.popen.stdout is not None
        line = await asyncio.to_thread(process.popen.stdout.readline)
        assert line.startswith("movieq ready at "), process.log.read_text()
        return Service(self.folder, process.popen, line.removeprefix("movieq ready at ").strip(), KEY)

    async def worker(self, redis_url: str = "", **settings: str) -> Process:
        """Start a worker; return it once its child serves."""
        process = self.start("worker", redis_url, [], settings)
        await eventually(lambda: '"child_ready"' in process.log.read_text() or process.popen.poll() is not None)
        assert process.popen.poll() is None, process.log.read_text()
        return process

    def start(self, name: str, redis_url: str, options: list[str], settings: dict[str, str]) -> Process:
        """Start a process, and do not wait until it serves."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
            "MOVIEQ_REDIS_URL": redis_url or self.valkey.url,
            "MOVIEQ_API_KEYS": KEY,
            "MOVIEQ_STORAGE": str(self.folder / "media"),
            "MOVIEQ_SPOOL": str(self.folder / "spool"),
            "MOVIEQ_ALLOW_PRIVATE_URLS": "127.0.0.0/8",
            "MOVIEQ_LOG_FORMAT": "json",
            **UNLIMITED,
            **({"MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1"} if name == "worker" else {}),
            **settings,
        }
        log = self.folder / f"{name}{len(self.processes)}.log"
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [sys.executable, "-m", "movieq.cli", name, *options],
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.processes.append(Process(popen, log))
        return self.processes[-1]


class Process:
    """A process of a fleet."""

    def __init__(self, popen: subprocess.Popen[str], log: Path) -> None:
        self.popen = popen
        self.log = log

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.popen.poll() is None

    def child(self) -> psutil.Process:
        """Return the engine process of a worker."""
        (found,) = [each for each in psutil.Process(self.popen.pid).children() if "workers.child" in each.cmdline()]
        return found

    def send(self, signum: signal.Signals) -> None:
        """Send the signal to this process alone, not to its children."""
        self.popen.send_signal(signum)

    async def ended(self, within_s: float = STOP_S) -> int:
        """Wait until the process ends; return its exit code."""
        return await asyncio.to_thread(self.popen.wait, within_s)

    def times_logged(self, event: str) -> int:
        """Return how often the process has logged this event."""
        return self.log.read_text().count(f'"{event}"')


@asynccontextmanager
async def fleet(folder: Path, *, appendfsync: str = "everysec") -> AsyncIterator[Fleet]:
    """Yield a fleet with a Valkey for the block, then end all its processes."""
    folder.mkdir(parents=True, exist_ok=True)
    valkey = Valkey(folder / "valkey", appendfsync=appendfsync)
    valkey.start()
    store = Store(connect(valkey.url, patient=True))
    installation = Fleet(folder, valkey, store)
    try:
        yield installation
    finally:
        for process in installation.processes:
            if process.alive:
                process.send(signal.SIGKILL)  # children go with their worker: tests of a graceful end ask for it themselves
            process.popen.wait()
            if process.popen.stdout is not None:
                process.popen.stdout.close()
        await store.redis.aclose()
        valkey.stop()


def python_path(folder: Path) -> str:
    """Return a PYTHONPATH with which a process finds the modules of this folder first."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def eventually(true: Callable[[], bool | Awaitable[bool]], within_s: float = WAIT_S) -> None:
    """Return as soon as the condition is true; fail if it is still false after this time."""
    end = time.monotonic() + within_s
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < end, f"not within {within_s:g} s"
        await asyncio.sleep(0.01)
