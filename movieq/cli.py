"""The `movieq` command."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import click
import uvloop
from redis.exceptions import RedisError

import movieq
from movieq import logs
from movieq.errors import MovieqError, SettingsError
from movieq.settings import Settings, load, unknown, variable
from movieq.store import connect

REDIS_S: Final = 10.0
"""How long a starting process waits for Redis."""

log = logs.get()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(movieq.__version__)
def main() -> None:
    """Heavy film work as tasks: storyboards to clips, descriptions to images, lines to voices.

    \b
    movieq up            everything for this machine: an embedded Valkey, the API, one worker
    movieq demo          the same, and a storyboard that becomes a clip
    movieq submit --help how to hand in a task, and `movieq watch TASK_ID` to follow it

    Settings are environment variables (or lines of `.env`) that begin with MOVIEQ_; `movieq doctor` checks them against the real servers.
    """


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", default=8001, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--data",
    "folder",
    default=".movieq",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the queue, the key and the results.",
)
@click.option("--no-worker", is_flag=True, help="Only the queue and the API; start workers elsewhere with `movieq worker`.")
def up(host: str, port: int, folder: Path, no_worker: bool) -> None:
    """Run everything on this machine, until Ctrl-C.

    Starts an embedded Valkey in --data (unless MOVIEQ_REDIS_URL names a server), the API and one worker, and starts again what dies.
    Without MOVIEQ_API_KEYS it makes a key, keeps it in --data and prints it. Prints `movieq ready at URL` when it takes requests.
    """
    from movieq.up import up as run_up

    settings = _settings()
    _run(lambda: run_up(settings, host=host, port=port, folder=folder, worker=not no_worker))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", default=8001, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option("--fd", type=int, hidden=True, help="A listening socket that is already open.")
def api(host: str, port: int, fd: int | None) -> None:
    """Run the API alone, against the server of MOVIEQ_REDIS_URL. Run as many as you like.

    Prints `movieq ready at URL` when it takes requests.
    """
    from movieq import serving

    settings = _settings()

    async def run() -> None:
        await _redis(settings)
        await serving.serve(settings, serving.listen(host, port) if fd is None else socket.socket(fileno=fd))

    _run(run)


@main.command()
def worker() -> None:
    """Run one worker for this machine, against the server of MOVIEQ_REDIS_URL.

    SIGTERM or Ctrl-C drains it: no new tasks, those that can end within MOVIEQ_DRAIN_S do, the others are handed back. A second signal
    hands back at once.
    """
    settings = _settings()
    if not settings.public_url:
        _refuse(f"{variable('public_url')} is not set: webhooks carry addresses under it, such as https://movieq.example")

    async def run() -> None:
        from workers.main import serve

        await _redis(settings)
        await serve(settings)

    _run(run)


def _settings() -> Settings:
    try:
        settings = load()
    except SettingsError as error:
        _refuse(error.message)
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown():
        log.warning("unknown_setting", name=name)
    return settings


async def _redis(settings: Settings) -> None:
    """Returns when Redis answers. Raises SettingsError where it does not."""
    if not settings.redis_url:
        raise SettingsError(f"{variable('redis_url')} is not set: name a Redis or Valkey, or use `movieq up`, which brings its own")
    try:
        client = connect(settings.redis_url, patient=True)
    except ValueError as error:
        raise SettingsError(f"{variable('redis_url')}: {error}") from None
    try:
        async with asyncio.timeout(REDIS_S):
            await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        raise SettingsError(f"{variable('redis_url')}: the server does not answer: {str(error) or type(error).__name__}") from None
    finally:
        await client.aclose()
        await client.connection_pool.disconnect()


def _run(work: Callable[[], Awaitable[Any]]) -> None:
    async def run() -> None:
        await work()

    try:
        uvloop.run(run())
    except MovieqError as error:
        _refuse(error.message)
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(message: str) -> Any:
    raise click.ClickException(message)


if __name__ == "__main__":
    main()
