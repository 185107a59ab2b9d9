"""`movieq up`: an embedded Valkey, the API and one worker. What dies is started again, what was started is stopped."""

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
from movieq.errors import SettingsError
from movieq.local.embedded import Valkey
from movieq.pdeathsig import end_with_parent
from movieq.settings import Settings, variable
from movieq.tasks.states import Kind

RESTART_S: Final = 0.2, 10.0
"""Shortest and longest wait before what died is started again."""
STEADY_S: Final = 10.0
"""Who lived so long begins with the shortest wait again."""
API_STOP_S: Final = 10.0
"""How long the API may take to end."""
WORKER_STOP_S: Final = 12.0
"""How long a worker may take after its drain: by itself it is gone after ten seconds."""
VALKEY_CHECK_S: Final = 0.2
VALKEY_AGAIN_S: Final = 2.0

log = logs.get()


async def up(settings: Settings, *, host: str, port: int, folder: Path, worker: bool) -> None:
    """Runs until SIGINT or SIGTERM; then nothing that it started is left. Raises SettingsError before anything is started."""
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
            environment[variable("redis_url")] = valkey.url
            if not settings.allow_private_urls:
                environment[variable("allow_private_urls")] = "127.0.0.0/8,::1/128"
        if not settings.api_keys:
            environment[variable("api_keys")] = key = _own_key(folder)
            print(f"API key: {key}", flush=True)  # noqa: T201  # shown to whoever starts it, once a start
        if not settings.queues:
            environment[variable("queues")] = ",".join(Kind)  # its one worker serves them all
        if settings.storage == Settings().storage:
            environment.setdefault(variable("storage"), str(folder.resolve() / "media"))
        environment[variable("public_url")] = settings.public_url.rstrip("/") or server.address(sock)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_keep("api", ["api", "--fd", str(sock.fileno())], environment, API_STOP_S, sock))]
            if worker:
                tasks.append(group.create_task(_keep("worker", ["worker"], environment, settings.drain_s + WORKER_STOP_S)))
            if valkey is not None:
                tasks.append(group.create_task(_keep_valkey(valkey)))
            await stop.wait()
            log.info("stopping")
            for task in reversed(tasks[:2]):  # the worker first: it hands back what it runs while everything is still there
                task.cancel()
                await asyncio.wait({task})
            for task in tasks[2:]:
                task.cancel()


async def _keep(name: str, command: list[str], environment: dict[str, str], stop_s: float, sock: socket.socket | None = None) -> None:
    """A process of ours runs, again whenever it ended; when cancelled it is asked to end, and killed where it does not."""
    wait_s = RESTART_S[0]
    told = False
    while True:
        begun = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "movieq.cli",
            *command,
            env=environment,
            pass_fds=[sock.fileno()] if sock else [],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for `up`, which stops them in order
            preexec_fn=end_with_parent,
        )
        assert process.stdout is not None
        try:
            while line := (await process.stdout.readline()).decode():
                if line.startswith(server.READY) and told:
                    continue  # one ready line, however often the API was started again
                told = told or line.startswith(server.READY)
                print(line, end="", flush=True)  # noqa: T201  # what the process says to people
            exit_code = await process.wait()
        except asyncio.CancelledError:
            await _end(process, stop_s)
            raise
        if time.monotonic() - begun > STEADY_S:
            wait_s = RESTART_S[0]
        log.error("process_died", process=name, exit_code=exit_code, again_in_s=wait_s)
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, RESTART_S[1])


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
                log.error("valkey_does_not_start", problem=error.message)
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
