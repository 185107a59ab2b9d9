"""`movieq up`, `api` and `worker`: the processes of an installation."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from movieq import checks
from movieq.cli.context import DATA, read_settings, refuse, run_async
from movieq.settings import variable

if TYPE_CHECKING:
    pass


THREADS: Final = 256
"""Threads of a worker for file access and name lookups; libuv lets lookups use half of them.

A lookup of a name whose name server does not answer takes a thread for half a minute or longer; with libuv's default of four threads, two
such names would delay every other request. A project can start about two a second (`workers.delivery.WEBHOOKS`).
"""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every address of this machine.")
@click.option("--port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 picks a free one.")
@click.option(
    "--data",
    "folder",
    default=DATA,
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the queue, the API key and the results.",
)
@click.option("--no-worker", is_flag=True, help="Run only the queue and the API; start workers elsewhere with `movieq worker`.")
def up(host: str, port: int, folder: Path, no_worker: bool) -> None:
    """Run everything on this machine, until Ctrl-C.

    Starts an embedded Valkey in --data (unless MOVIEQ_REDIS_URL names a server), the API and one worker, and restarts any that dies.
    Without MOVIEQ_API_KEYS it creates an API key, stores it in --data and prints it. Prints `movieq ready at URL` when it is ready.
    """
    from movieq.local.up import up as run_up

    os.umask(0o077)  # the queue's file, the API key and the results are for this user only
    settings = read_settings(storage=folder / "media")
    run_async(lambda: run_up(settings, host=host, port=port, folder=folder, worker=not no_worker))


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every address of this machine.")
@click.option("--port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 picks a free one.")
@click.option("--fd", type=int, hidden=True, help="File descriptor of a socket that is already listening.")
def api(host: str, port: int, fd: int | None) -> None:
    """Run the API alone, on the Redis of MOVIEQ_REDIS_URL. Run as many as you like.

    Prints `movieq ready at URL` when it is ready.
    """
    from movieq.api import server

    settings = read_settings()

    async def run() -> None:
        await checks.start(settings, "api", works=False)
        await server.serve(settings, server.listen(host, port) if fd is None else socket.socket(fileno=fd))

    run_async(run)


@click.command()
@click.option("--devices", help="GPUs to use: auto, cpu, or a list such as cuda:0,cuda:1. Default: MOVIEQ_DEVICES.")
def worker(devices: str | None) -> None:
    """Run the worker of this machine, on the Redis of MOVIEQ_REDIS_URL.

    SIGTERM or Ctrl-C drains it: it takes no new tasks, lets running ones finish for MOVIEQ_DRAIN_S, and then hands the rest back to the
    queue. A second signal hands them back at once.
    """
    settings = read_settings()
    if devices is not None:
        settings = msgspec.structs.replace(settings, devices=devices)
    if not settings.public_url:
        refuse(
            f"{variable('public_url')} is not set: webhooks contain links to the API; set it to an address such as https://movieq.example"
        )
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(THREADS))  # libuv, below uvloop, reads it at the first lookup

    async def run() -> None:
        from workers.app import serve

        await checks.start(settings, "worker", works=True)
        await serve(settings)

    run_async(run)
