"""The `movieq` command: one file for each group of commands."""

from __future__ import annotations

import click

import movieq
from movieq import plugins
from movieq.cli import dead, keys, local, models, serve, tasks
from movieq.cli.context import refuse
from movieq.errors import SettingsError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(movieq.__version__)
def main() -> None:
    """Render storyboards into clips, descriptions into images, and lines of dialogue into voices.

    \b
    movieq up            run everything on this machine: an embedded Valkey, the API, one worker
    movieq demo          run everything once, to render a sample storyboard
    movieq submit --help see how to submit a task; `movieq watch TASK_ID` follows it

    Settings are environment variables that begin with MOVIEQ_, also read from `.env`. `movieq doctor` checks them.
    """
    try:
        plugins.load()
    except SettingsError as error:
        refuse(error.message)


for command in (
    serve.up,
    serve.api,
    serve.worker,
    tasks.submit,
    tasks.watch,
    tasks.cancel,
    tasks.deliveries,
    dead.dead,
    models.models_group,
    keys.keys,
    local.doctor,
    local.demo,
):
    main.add_command(command)
