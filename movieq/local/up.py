"""`movieq up`: an embedded Valkey, the API and one worker. At the end all are stopped.

A process that was ready is restarted whenever it dies, after longer and longer waits. If a process that was never ready dies at once five
times in a row, `up` stops everything and gives the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

from movieq import checks, credentials, logs
from movieq.api import server
from movieq.errors import MovieqError, SettingsError
from movieq.local.embedded import Valkey
from movieq.pdeathsig import end_with_parent
from movieq.settings import LogFormat, Settings, variable
from movieq.tasks.states import Kind

RESTART_S: Final = 0.2, 10.0
"""Shortest and longest wait before a restart, in seconds."""
STEADY_S: Final = 10.0
"""After a run of this many seconds, the next restart has the shortest wait again."""
STARTS: Final = 5
"""Failed starts in a row after which `up` gives up."""
LINE_BYTES: Final = 64 * 1024
"""Longest line of a log that is held back until it is complete."""
REST_S: Final = 1.0
"""Longest time to read the output of a process that has ended, in seconds: a process that it started may hold the pipe open."""
API_STOP_S: Final = 10.0
"""Longest time for the API to end, in seconds."""
WORKER_STOP_S: Final = 12.0
"""Longest time for a worker to end after its drain, in seconds. A worker ends by itself after ten."""
VALKEY_CHECK_S: Final = 0.2
VALKEY_AGAIN_S: Final = 2.0

log = logs.get()


async def up(settings: Settings, *, host: str, port: int, folder: Path, worker: bool) -> None:
    """Run until SIGINT or SIGTERM, then stop everything that was started.

    Raises SettingsError before anything is started, and MovieqError if the API or the worker cannot start.
    """
    await checks.start(settings, "up", works=worker)
    if worker:
        credentials.load(settings)  # its worker would end for want of a certificate, again and again
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    sock = server.listen(host, port)
    with contextlib.closing(sock), contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        valkey = None
        if not settings.redis_url:
            valkey = Valkey(folder)
            stack.callback(valkey.stop)
            valkey.start()
            if folder.stat().st_mode & 0o077:  # an earlier version or its user made it so
                log.warning("data_folder_open", problem=f"other users of this machine can read {folder}: run chmod -R go= {folder}")
            environment[variable("redis_url")] = valkey.url
            if not settings.allow_private_urls and server.is_loopback(sock):  # else others could reach this machine's own servers
                environment[variable("allow_private_urls")] = "127.0.0.0/8,::1/128"
        if not settings.api_keys:
            environment[variable("api_keys")] = key = _own_key(folder)
            print(f"API key: {key}", flush=True)  # noqa: T201  # shown to whoever starts it, once a start
        if not settings.queues:
            environment[variable("queues")] = ",".join(Kind)  # its one worker serves them all
        if isinstance(settings.storage, Path):
            environment[variable("storage")] = str(settings.storage.resolve())
        environment[variable("public_url")] = settings.public_url or server.address(sock)
        if settings.log_format is LogFormat.AUTO and sys.stderr.isatty():  # their logs pass through this process to a terminal
            environment[variable("log_format")] = LogFormat.CONSOLE
            environment.setdefault("FORCE_COLOR", "1")
        api = _Process("api", ["--fd", str(sock.fileno())], environment, API_STOP_S, server.READY, sock)
        processes = [api, *([_Process("worker", [], environment, settings.drain_s + WORKER_STOP_S, logs.WORKER_READY)] if worker else [])]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(process.keep()) for process in processes]
            valkey_task = group.create_task(_keep_valkey(valkey)) if valkey is not None else None
            stopping = group.create_task(stop.wait())
            ended, _ = await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
            for task in reversed(tasks):  # the worker first: it hands back what it runs while everything is still there
                task.cancel()
                await asyncio.wait({task})
            stopping.cancel()
            if valkey_task is not None:
                valkey_task.cancel()
    for task in tasks:
        if task in ended:
            raise MovieqError(task.result())


class _Process:
    """The API or the worker, which `keep` keeps running."""

    def __init__(
        self, name: str, options: list[str], environment: dict[str, str], stop_s: float, ready: str, sock: socket.socket | None = None
    ) -> None:
        self.name = name
        self._command = [sys.executable, "-P", "-m", "movieq.cli", name, *options]  # -P: the current folder may contain a `movieq`
        self._environment = environment
        self._stop_s = stop_s
        self._ready_line = ready
        """Start of the line that the process prints when it is ready."""
        self._sockets = [sock.fileno()] if sock else []
        self._was_ready = False
        """Whether the process became ready once."""
        self._announced = False
        self._last_words = b""

    async def keep(self) -> str:
        """Run the process and restart it whenever it ends, until cancelled. Return the reason if it cannot start."""
        wait_s, failures = RESTART_S[0], 0
        while True:
            begun = time.monotonic()
            exit_code = await self._run()
            lived_s = time.monotonic() - begun
            failures = 0 if self._was_ready or lived_s > STEADY_S else failures + 1  # one that waits for Redis lives longer
            if failures == STARTS:
                reason = self._last_words.decode(errors="replace").strip() or "it printed nothing"
                return f"the {self.name} cannot start: it ended {STARTS} times in a row, last with exit code {exit_code}: {reason}"
            if lived_s > STEADY_S:
                wait_s = RESTART_S[0]
            log.error("process_died", process=self.name, exit_code=exit_code, again_in_s=wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RESTART_S[1])

    async def _run(self) -> int:
        """Run the process once and return its exit code. When cancelled, ask it to end, and kill it if it does not."""
        self._last_words = b""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            pass_fds=self._sockets,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for `up`, which stops them in order
            preexec_fn=end_with_parent,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as group:
            passing_on = [group.create_task(self._pass_on(process.stdout)), group.create_task(self._pass_on_errors(process.stderr))]
            try:
                return await process.wait()
            except asyncio.CancelledError:
                await _end(process, self._stop_s)
                raise
            finally:
                await asyncio.wait(passing_on, timeout=REST_S)
                for task in passing_on:
                    task.cancel()

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        """Print the standard output of the process. Of ready lines, print only the first of the API: `up` is ready once."""
        while line := (await output.readline()).decode(errors="replace"):
            if line.startswith(self._ready_line):
                self._was_ready = True
                if self.name != "api" or self._announced:
                    continue
                self._announced = True
            print(line, end="", flush=True)  # noqa: T201  # the standard output of the process

    async def _pass_on_errors(self, output: asyncio.StreamReader) -> None:
        """Copy the log of the process to standard error, in whole lines, and remember the last one."""
        rest = b""
        while part := await output.read(65536):
            lines, newline, rest = (rest + part).rpartition(b"\n")
            if len(rest) > LINE_BYTES:
                newline, rest = newline + rest, b""
            await asyncio.to_thread(self._log, lines + newline)  # a terminal that is paused must stop nothing else
        await asyncio.to_thread(self._log, rest)

    def _log(self, lines: bytes) -> None:
        self._last_words = lines.rstrip().rpartition(b"\n")[2] or self._last_words
        with contextlib.suppress(OSError):  # a full disk or a closed pipe is no reason to stop
            sys.stderr.buffer.write(lines)
            sys.stderr.buffer.flush()


async def _end(process: asyncio.subprocess.Process, stop_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(stop_s):
            await process.wait()
    except TimeoutError:
        log.warning("process_killed", pid=process.pid)
        process.kill()
        await process.wait()


async def _keep_valkey(valkey: Valkey) -> None:
    while True:
        await asyncio.sleep(VALKEY_CHECK_S)
        if not valkey.alive():
            log.error("process_died", process="valkey")
            try:
                await asyncio.to_thread(valkey.start)
            except SettingsError as error:  # a full disk, say: whoever makes room should find the rest running
                log.error("valkey_start_failed", problem=error.message)
                await asyncio.sleep(VALKEY_AGAIN_S)


def _own_key(folder: Path) -> str:
    """The API key of this folder: made once."""
    path = folder / "api-key"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        key = secrets.token_urlsafe(24)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
        return key
