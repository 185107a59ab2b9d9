"""What the commands share: the settings, the API client, and how an error ends the process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click
import uvloop

from movieq import logs
from movieq.delivery import payload
from movieq.errors import MovieqError, RequestError, SettingsError
from movieq.models import table as models
from movieq.settings import STORAGE, Settings, load, unknown, variable
from movieq.tasks.states import TaskStatus

if TYPE_CHECKING:
    from movieq.client import Client

PATIENCE_S: Final = 2.0
"""How long a command tries to reach a server that does not answer: long enough for `up` to restart it."""
DATA: Final = Path(".movieq")
LOCAL_URL: Final = "http://127.0.0.1:8001"
"""The default address of `movieq up`."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
log = logs.get()


def read_settings(*, storage: Path = STORAGE) -> Settings:
    """Return the settings of this process and set up its log; end it with a message where they are wrong. `storage` is a default."""
    try:
        settings = load(storage=storage)
        models.load(settings.models)
        payload.configured(settings)
    except SettingsError as error:
        refuse(error.message)
    logs.configure(settings.log_level, settings.log_format)
    for name, problem in unknown().items():
        log.warning("unknown_setting", name=name, problem=problem)
    return settings


def run_async(work: Callable[[], Awaitable[T]]) -> T:
    """Return what `work` returns; end the process with the message of a MovieqError, or with the exit code of a signal."""

    async def run() -> T:
        return await work()

    try:
        return uvloop.run(run())
    except MovieqError as error:
        refuse("; ".join((_described(error), *getattr(error, "__notes__", ()))))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:  # by a signal
        sys.exit(143)


def _described(error: MovieqError) -> str:
    """Return the message of an error; for a request with several faults, all of them, one a line."""
    faults = error.errors if isinstance(error, RequestError) else ()
    return "\n".join(f"{path}: {message}" for path, message in faults) if len(faults) > 1 else error.message


def refuse(message: str) -> NoReturn:
    """End the process with this message and exit code 1."""
    raise click.ClickException(message)


def server_options(command: F) -> F:
    """Add --url and --key to a command."""
    key = click.option("--key", help="API key. Default: the first of MOVIEQ_API_KEYS, else the one in .movieq/api-key.")
    url = click.option("--url", help=f"Address of the API. Default: MOVIEQ_PUBLIC_URL, else {LOCAL_URL}.")
    return url(key(command))


def open_client(url: str | None, key: str | None) -> Client:
    """Return a client for the API at `url`, or at its default. Raises SettingsError where no key can be found."""
    from movieq.client import Client

    settings = read_settings()
    key = key or next(iter(settings.api_keys), "") or _own_key()
    return Client(url or settings.public_url or LOCAL_URL, key, patience_s=PATIENCE_S)


def _own_key() -> str:
    """Return the API key that `movieq up` created in this folder."""
    path = DATA / "api-key"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"no API key: pass --key, or set {variable('api_keys')}; {path}: {error.strerror}") from None


def exit_with(status: TaskStatus | None) -> None:
    """End the process with exit code 1 if a task ended in another state than completed."""
    if status not in (None, TaskStatus.COMPLETED):
        sys.exit(1)
