"""`movieq dead`: dead letters."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click
import msgspec

from movieq.cli.context import open_client, run_async, server_options
from movieq.errors import InvalidState, NotFound, ValidationFailed
from movieq.tasks.faults import printable
from movieq.tasks.wire import DeadLettersAnswer

if TYPE_CHECKING:
    from movieq.client import Client


@click.group()
def dead() -> None:
    """List, retry and drop dead letters: tasks that failed because their worker or engine process died too often while running them.

    \b
        movieq dead list
        movieq dead retry 123e4567-e89b-12d3-a456-426614174000
        movieq dead drop 123e4567-e89b-12d3-a456-426614174000

    `list` and `drop` need a key with the scope admin, `retry` one with submit.
    """


@dead.command("list")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="How many to show, newest first.")
@server_options
def dead_list(limit: int, url: str | None, key: str | None) -> None:
    """Show the dead letters, newest first: when each failed, the error, the last stage, and its task_data.

    \b
        movieq dead list --limit 10
    """

    async def run() -> DeadLettersAnswer:
        async with open_client(url, key) as client:
            return await client.dead_letters(limit)

    answer = run_async(run)
    for letter in answer.dead_letters:
        died = f"{letter.last_stage or 'unknown'}, exit code {'unknown' if letter.exit_code is None else letter.exit_code}"
        click.echo(f"{letter.task_id}  {letter.project_id}  {letter.task_type}  {letter.failed_at:%Y-%m-%d %H:%M:%S} UTC")
        click.echo(f"  error       {printable(letter.error or 'unknown')}, attempt {letter.attempt}")
        click.echo(f"  last stage  {died}")
        click.echo(f"  task_data   {printable(msgspec.json.encode(letter.task_data).decode())}")
    if not answer.total:
        click.echo("no dead letters", err=True)
    elif answer.total > len(answer.dead_letters):
        click.echo(f"{len(answer.dead_letters)} of {answer.total} dead letters: --limit shows more", err=True)


@dead.command("retry")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@server_options
def dead_retry(task_ids: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Queue dead letters again, with their tries reset. Exits with 1 if one could not be queued.

    \b
        movieq dead retry 123e4567-e89b-12d3-a456-426614174000
    """

    async def retry(client: Client, task_id: str) -> str:
        return f"queued again, position {(await client.retry(task_id)).queue_position}"

    _for_each(task_ids, retry, url, key)


@dead.command("drop")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@server_options
def dead_drop(task_ids: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Remove dead letters from the list; the tasks stay failed. Exits with 1 if one is not a dead letter.

    \b
        movieq dead drop 123e4567-e89b-12d3-a456-426614174000
    """

    async def drop(client: Client, task_id: str) -> str:
        await client.drop_dead_letter(task_id)
        return "dropped"

    _for_each(task_ids, drop, url, key)


def _for_each(task_ids: tuple[str, ...], work: Callable[[Client, str], Awaitable[str]], url: str | None, key: str | None) -> None:
    """Apply `work` to each task and print its answer or its error; exit with 1 if one failed."""

    async def run() -> bool:
        refused = False
        async with open_client(url, key) as client:
            for task_id in task_ids:
                try:
                    click.echo(f"{task_id}: {await work(client, task_id)}")
                except (NotFound, InvalidState, ValidationFailed) as error:
                    refused = True
                    click.echo(f"{task_id}: {error.message}", err=True)
        return refused

    if run_async(run):
        sys.exit(1)
