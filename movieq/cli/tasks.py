"""`movieq submit`, `watch`, `cancel` and `deliveries`: tasks by the REST API."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from movieq.cli.context import exit_with, open_client, run_async, server_options
from movieq.tasks.faults import given, printable
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import warnings_of
from movieq.tasks.states import Priority, TaskStatus, TaskType
from movieq.tasks.wire import DeliveriesAnswer

if TYPE_CHECKING:
    from movieq.client import Client


@click.command()
@click.argument("task_type", callback=lambda context, parameter, value: _known(value), metavar="TASK_TYPE")
@click.option("--project", required=True, help="Project of the task: letters, digits, _ and -.")
@click.option("--data", "data_text", metavar="JSON|@FILE|-", default="{}", help="task_data: JSON, a file, or - for standard input.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="Image to upload and use; repeat for more, in order."
)
@click.option("--set", "pairs", metavar="NAME=VALUE", multiple=True, help="Set one field of task_data; the value is JSON, or else text.")
@click.option("--priority", type=click.Choice([each.value for each in Priority]), help="Priority within the project. Default: normal.")
@click.option("--callback", metavar="URL", help="URL to POST the result to when the task ends.")
@click.option("--draft", is_flag=True, help="Render a fast animatic, whatever models are available.")
@click.option("--watch", "watching", is_flag=True, help="Follow the task until it ends, like `movieq watch`.")
@server_options
def submit(
    task_type: str,
    project: str,
    data_text: str,
    images: tuple[Path, ...],
    pairs: tuple[str, ...],
    priority: str | None,
    callback: str | None,
    draft: bool,
    watching: bool,
    url: str | None,
    key: str | None,
) -> None:
    """Submit a task and print its id. TASK_TYPE is generate_video, generate_image, process_audio or render_animation.

    \b
    A storyboard of three frames becomes a clip:
        movieq submit generate_video --project pilot --image 1.jpg --image 2.jpg --image 3.jpg \\
            --set scene_description="She finds the letter" --set camera_angle="dolly in" --set lighting=candlelight --watch
    A character, in portrait and as PNG:
        movieq submit generate_image --project pilot --set prompt="a keeper with a lantern" --set resolution=832x1216 --set format=png
    A line of dialogue:
        movieq submit process_audio --project pilot --set text="Who is there?" --set language=en-gb --set emotion=fearful
    All of task_data from a file:
        movieq submit render_animation --project pilot --data @walk.json --priority high

    GET /api/v1/task-types lists the fields of each type.
    """
    task_data = _task_data(TaskType(task_type), data_text, pairs, draft)
    field = REGISTRY.tasks[TaskType(task_type)].image_field
    if images and not field:
        those = ", ".join(each for each, spec in REGISTRY.tasks.items() if spec.image_field)
        raise click.UsageError(f"--image: {task_type} takes no images; these do: {those}")

    async def run() -> TaskStatus | None:
        async with open_client(url, key) as client:
            if images:
                uploads = [await client.upload(project, image) for image in images]
                given = task_data.get(field) or []
                task_data[field] = [*(given if isinstance(given, list) else [given]), *(upload.url for upload in uploads)]
            receipt = await client.submit(
                project, task_type, task_data, priority=Priority(priority) if priority else None, callback_url=callback
            )
            _warn(receipt.warnings)
            click.echo(receipt.task_id)
            return await _watch(client, receipt.task_id, task_type, url, receipt.warnings) if watching else None

    exit_with(run_async(run))


@click.command()
@click.argument("task_id")
@server_options
def watch(task_id: str, url: str | None, key: str | None) -> None:
    """Follow a task until it ends; then print the URL of its result, or the error.

    Shows the current step, the progress and the remaining time, and warns of what was ignored. Exits with 0 if the task completed, with 1
    if it failed or was cancelled. Ctrl-C leaves the task running. Reconnects by itself, without missing events.

    \b
        movieq watch 123e4567-e89b-12d3-a456-426614174000
    """

    async def run() -> TaskStatus:
        async with open_client(url, key) as client:
            state = await client.status(task_id)
            _warn(state.warnings)
            return await _watch(client, task_id, state.task_type, url, state.warnings)

    exit_with(run_async(run))


@click.command()
@click.argument("task_id")
@server_options
def cancel(task_id: str, url: str | None, key: str | None) -> None:
    """Cancel a queued or running task.

    \b
        movieq cancel 123e4567-e89b-12d3-a456-426614174000
    """

    async def run() -> None:
        async with open_client(url, key) as client:
            click.echo((await client.cancel(task_id)).message)

    run_async(run)


@click.command()
@click.argument("task_id")
@click.option("--resend", "resent", metavar="DELIVERY", multiple=True, help="Send this delivery again now; repeat for more.")
@server_options
def deliveries(task_id: str, resent: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Show a task's webhook and CMS deliveries, sent and pending. --resend needs an admin key.

    \b
        movieq deliveries 123e4567-e89b-12d3-a456-426614174000
        movieq deliveries 123e4567-e89b-12d3-a456-426614174000 --resend 123e4567-e89b-12d3-a456-426614174000-1
    """

    async def run() -> DeliveriesAnswer:
        async with open_client(url, key) as client:
            for delivery_id in resent:
                await client.resend(task_id, delivery_id)
            return await client.deliveries(task_id)

    answer = run_async(run)
    for each in answer.deliveries:
        again = f", again at {each.next_try_at:%Y-%m-%d %H:%M:%S} UTC" if each.next_try_at else ""
        click.echo(f"{each.delivery_id}  {each.kind}  {each.type}  {printable(each.url)}")
        click.echo(f"  {each.state} after {each.tries} tries{again}{f': {printable(each.last_problem)}' if each.last_problem else ''}")
    if not answer.deliveries:
        click.echo("no deliveries: the task has not ended, or it has no callback URL and no CMS is configured", err=True)


def _known(task_type: str) -> str:
    """Return the name of a known task type, also of a plug-in's. Raises click.BadParameter."""
    if task_type not in REGISTRY.tasks:
        raise click.BadParameter(f"{task_type!r} is not one of {', '.join(REGISTRY.tasks)}.")
    return task_type


def _task_data(task_type: TaskType, text: str, pairs: tuple[str, ...], draft: bool) -> dict[str, Any]:
    """Return the task_data that --data, --set and --draft describe."""
    name = text
    try:
        if text == "-":
            name, text = "standard input", sys.stdin.read()
        elif text.startswith("@"):
            name, text = text[1:], Path(text[1:]).read_text()
        task_data: Any = msgspec.json.decode(text)
    except OSError as error:
        raise click.UsageError(f"--data: {name} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.UsageError(f"--data: expected a JSON object, got {given(name)}: {error}") from None
    if not isinstance(task_data, dict):
        raise click.UsageError(f"--data: expected a JSON object, got {given(task_data)}")
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise click.UsageError(f"--set: expected NAME=VALUE, got {given(pair)}")
        try:
            task_data[field] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            task_data[field] = value
    if draft:
        task_data["draft"] = True
    return task_data


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


async def _watch(client: Client, task_id: str, name: str, url: str | None, warned: list[str]) -> TaskStatus:
    """Show the progress of a task until it ends, then its result or error, and the warnings that are new. Return how it ended."""
    from rich.console import Console

    from movieq.local.terminal import follow

    console = Console(stderr=True)
    try:
        end = (await follow(client, {task_id: name}, console))[task_id]
    except asyncio.CancelledError:
        rest = f"{task_id} --url {url}" if url else task_id
        click.echo(f"\nThe task keeps running.\n  Watch it again:  movieq watch {rest}\n  Cancel it:       movieq cancel {rest}", err=True)
        raise
    _warn([warning for warning in warnings_of(end.result) if warning not in warned])
    if end.result is not None:
        for take in end.result.media:
            click.echo(take.url)
    else:
        click.echo(f"{end.status}: {end.error} ({end.error_code})" if end.error else end.status, err=True)
    return end.status
