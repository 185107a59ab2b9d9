"""The `movieq` command."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click
import msgspec
import uvloop

import movieq
from movieq import checks, logs, plugins
from movieq.delivery import payload
from movieq.errors import InvalidState, ModelUnavailable, MovieqError, NotFound, SettingsError, ValidationFailed
from movieq.models import table as models
from movieq.models import weights
from movieq.queue.api_keys import ApiKeys
from movieq.queue.connection import connect
from movieq.queue.store import Store
from movieq.settings import Grant, Scope, Settings, key_hash, load, unknown, variable
from movieq.tasks.states import Priority, TaskStatus, TaskType
from movieq.tasks.wire import PROJECT_PATTERN, DeadLettersAnswer, DeliveriesAnswer

if TYPE_CHECKING:
    from movieq.client import Client

PATIENCE_S: Final = 2.0
"""How long somebody at a terminal waits for a server that does not answer: as long as `up` needs to start one again."""
DATA: Final = Path(".movieq")
LOCAL_URL: Final = "http://127.0.0.1:8001"
"""Where `movieq up` listens unless told otherwise."""

IMAGES: Final = {
    TaskType.GENERATE_VIDEO: "storyboard_images",
    TaskType.GENERATE_IMAGE: "reference_images",
    TaskType.RENDER_ANIMATION: "reference_images",
}
"""Which field of task_data the --image files of a task become."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
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
    try:
        plugins.load()
    except SettingsError as error:
        _refuse(error.message)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option(
    "--data",
    "folder",
    default=DATA,
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
    from movieq.local.up import up as run_up

    settings = _settings()
    _run(lambda: run_up(settings, host=host, port=port, folder=folder, worker=not no_worker))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--fd", type=int, hidden=True, help="A listening socket that is already open.")
def api(host: str, port: int, fd: int | None) -> None:
    """Run the API alone, against the server of MOVIEQ_REDIS_URL. Run as many as you like.

    Prints `movieq ready at URL` when it takes requests.
    """
    from movieq.api import server

    settings = _settings()

    async def run() -> None:
        await checks.start(settings, "api", works=False)
        await server.serve(settings, server.listen(host, port) if fd is None else socket.socket(fileno=fd))

    _run(run)


@main.command()
@click.option("--devices", help="GPUs to use: auto, cpu, or a list such as cuda:0,cuda:1; left out: as MOVIEQ_DEVICES has it.")
def worker(devices: str | None) -> None:
    """Run one worker for this machine, against the server of MOVIEQ_REDIS_URL.

    SIGTERM or Ctrl-C drains it: no new tasks, those that can end within MOVIEQ_DRAIN_S do, the others are handed back. A second signal
    hands back at once.
    """
    settings = _settings()
    if devices is not None:
        settings = msgspec.structs.replace(settings, devices=devices)
    if not settings.public_url:
        _refuse(f"{variable('public_url')} is not set: webhooks carry addresses under it, such as https://movieq.example")

    async def run() -> None:
        from workers.app import serve

        await checks.start(settings, "worker", works=True)
        await serve(settings)

    _run(run)


def _server(command: F) -> F:
    """Adds the options that say which server is meant."""
    key = click.option("--key", help="API key; without it the first of MOVIEQ_API_KEYS, else the one that `movieq up` keeps in .movieq.")
    url = click.option("--url", help=f"Address of the API; without it MOVIEQ_PUBLIC_URL, else {LOCAL_URL}.")
    return url(key(command))


@main.command()
@click.argument("task_type", callback=lambda context, parameter, value: _known(value), metavar="TASK_TYPE")
@click.option("--project", required=True, help="Project that the task belongs to: letters, digits, _ and -.")
@click.option("--data", "data_text", metavar="JSON|@FILE|-", default="{}", help="task_data as JSON, from a file, or from standard input.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="Picture to upload and refer to; again for more, in order."
)
@click.option("--set", "pairs", metavar="NAME=VALUE", multiple=True, help="One field of task_data; the value as JSON, else as text.")
@click.option("--priority", type=click.Choice([each.value for each in Priority]), help="Place in the queue; normal unless said.")
@click.option("--callback", metavar="URL", help="Address that is told when the task ends.")
@click.option("--draft", is_flag=True, help="Make it by the animatic, whatever models there are.")
@click.option("--watch", "watching", is_flag=True, help="Follow it to its end, as `movieq watch` does.")
@_server
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
    """Hand in a task and print its id. TASK_TYPE is generate_video, generate_image, process_audio or render_animation.

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

    The task_data of each type: GET /api/v1/task-types, or README.md.
    """
    task_data = _task_data(TaskType(task_type), data_text, pairs, draft)
    field = IMAGES.get(TaskType(task_type))
    if images and field is None:
        raise click.UsageError(f"--image: {task_type} takes no pictures; those that do: {', '.join(IMAGES)}")

    async def run() -> TaskStatus | None:
        async with _client(url, key) as client:
            if field is not None and images:
                uploads = [await client.upload(project, image) for image in images]
                given = task_data.get(field) or []
                task_data[field] = [*(given if isinstance(given, list) else [given]), *(upload.url for upload in uploads)]
            receipt = await client.submit(
                project, task_type, task_data, priority=Priority(priority) if priority else None, callback_url=callback
            )
            for warning in receipt.warnings:
                click.echo(f"warning: {warning}", err=True)
            click.echo(receipt.task_id)
            return await _watch(client, receipt.task_id, task_type, url) if watching else None

    _exit(_run(run))


@main.command()
@click.argument("task_id")
@_server
def watch(task_id: str, url: str | None, key: str | None) -> None:
    """Follow a task to its end: its step, how much is done, how long it still takes; then where the result is, or what failed.

    Ends with 0 if the task completed, 1 if it failed or was cancelled. Ctrl-C leaves the task running. A connection that breaks, or a
    server that is started again, is waited for: nothing is missed.

    \b
        movieq watch 123e4567-e89b-12d3-a456-426614174000
    """

    async def run() -> TaskStatus:
        async with _client(url, key) as client:
            return await _watch(client, task_id, (await client.status(task_id)).task_type, url)

    _exit(_run(run))


@main.command()
@click.argument("task_id")
@_server
def cancel(task_id: str, url: str | None, key: str | None) -> None:
    """Cancel a task that waits or runs.

    \b
        movieq cancel 123e4567-e89b-12d3-a456-426614174000
    """

    async def run() -> None:
        async with _client(url, key) as client:
            click.echo((await client.cancel(task_id)).message)

    _run(run)


@main.group()
def dead() -> None:
    """List, retry and drop dead letters: tasks that were given up because their worker or their engine died with them too often.

    \b
        movieq dead list
        movieq dead retry 123e4567-e89b-12d3-a456-426614174000
        movieq dead drop 123e4567-e89b-12d3-a456-426614174000

    `list` and `drop` take a key with the scope admin, `retry` one with submit.
    """


@dead.command("list")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="How many to show, latest first.")
@_server
def dead_list(limit: int, url: str | None, key: str | None) -> None:
    """Show the dead letters, latest first: when each was given up, what it died of, where, and the task_data that it was submitted with.

    \b
        movieq dead list --limit 10
    """

    async def run() -> DeadLettersAnswer:
        async with _client(url, key) as client:
            return await client.dead_letters(limit)

    answer = _run(run)
    for letter in answer.dead_letters:
        died = f"{letter.last_stage or 'unknown'}, exit code {'unknown' if letter.exit_code is None else letter.exit_code}"
        click.echo(f"{letter.task_id}  {letter.project_id}  {letter.task_type}  {letter.failed_at:%Y-%m-%d %H:%M:%S} UTC")
        click.echo(f"  error       {_plain(letter.error or 'unknown')}, attempt {letter.attempt}")
        click.echo(f"  last stage  {died}")
        click.echo(f"  task_data   {_plain(msgspec.json.encode(letter.task_data).decode())}")
    if not answer.total:
        click.echo("no dead letters", err=True)
    elif answer.total > len(answer.dead_letters):
        click.echo(f"{len(answer.dead_letters)} of {answer.total} dead letters: --limit shows more", err=True)


@dead.command("retry")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@_server
def dead_retry(task_ids: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Queue dead letters again, each with a new budget of tries. Ends with 1 if one could not be.

    \b
        movieq dead retry 123e4567-e89b-12d3-a456-426614174000
    """

    async def retry(client: Client, task_id: str) -> str:
        return f"waits again, in place {(await client.retry(task_id)).queue_position}"

    _for_each(task_ids, retry, url, key)


@dead.command("drop")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@_server
def dead_drop(task_ids: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Take dead letters off the list; the tasks stay failed. Ends with 1 if one was none.

    \b
        movieq dead drop 123e4567-e89b-12d3-a456-426614174000
    """

    async def drop(client: Client, task_id: str) -> str:
        await client.drop_dead_letter(task_id)
        return "dropped"

    _for_each(task_ids, drop, url, key)


def _plain(text: str) -> str:
    """On one line, and with nothing in it that steers a terminal: escaped as in JSON."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _for_each(task_ids: tuple[str, ...], work: Callable[[Client, str], Awaitable[str]], url: str | None, key: str | None) -> None:
    """Says what became of each task; one that is refused does not keep the others from their turn."""

    async def run() -> bool:
        refused = False
        async with _client(url, key) as client:
            for task_id in task_ids:
                try:
                    click.echo(f"{task_id}: {await work(client, task_id)}")
                except (NotFound, InvalidState, ValidationFailed) as error:
                    refused = True
                    click.echo(f"{task_id}: {error.message}", err=True)
        return refused

    if _run(run):
        sys.exit(1)


@main.command()
@click.argument("task_id")
@click.option("--resend", "resent", metavar="DELIVERY", multiple=True, help="Send this one again, now; more than once for several.")
@_server
def deliveries(task_id: str, resent: tuple[str, ...], url: str | None, key: str | None) -> None:
    """Show what was told to the world of a task, or is to be: its webhooks, and its way into the CMS. --resend takes an admin key.

    \b
        movieq deliveries 123e4567-e89b-12d3-a456-426614174000
        movieq deliveries 123e4567-e89b-12d3-a456-426614174000 --resend 123e4567-e89b-12d3-a456-426614174000-1
    """

    async def run() -> DeliveriesAnswer:
        async with _client(url, key) as client:
            for delivery_id in resent:
                await client.resend(task_id, delivery_id)
            return await client.deliveries(task_id)

    answer = _run(run)
    for each in answer.deliveries:
        again = f", again at {each.next_try_at:%Y-%m-%d %H:%M:%S} UTC" if each.next_try_at else ""
        click.echo(f"{each.delivery_id}  {each.kind}  {each.type}  {_plain(each.url)}")
        click.echo(f"  {each.state} after {each.tries} tries{again}{f': {_plain(each.last_problem)}' if each.last_problem else ''}")
    if not answer.deliveries:
        click.echo("nothing to deliver: the task has not ended, or has no callback, and there is no CMS", err=True)


@main.command()
@click.option("--data", "folder", default=DATA, show_default=True, type=click.Path(path_type=Path), help="Folder of `movieq up`.")
@click.option("--callback", metavar="URL", help="A callback_url: may it be called, and does its server answer?")
@click.option("--repair", is_flag=True, help="Instead of checking, list tasks whose records and lists in Redis do not agree.")
@click.option("--apply", is_flag=True, help="With --repair: mend what it finds.")
def doctor(folder: Path, callback: str | None, repair: bool, apply: bool) -> None:
    """Check the settings against the real servers, and say what to do where something is not good.

    A line each: ✓ is good, ! is worth knowing, ✗ is broken. Ends with 1 if something is broken. Changes nothing without --apply: what it
    writes to test a server is deleted, or expires within ten seconds.
    """
    if apply and not repair:
        raise click.UsageError("--apply needs --repair")
    if repair:
        _repair(folder, apply)
        return
    from movieq.local.doctor import examine

    marks = {checks.Mark.GOOD: "green", checks.Mark.NOTE: "yellow", checks.Mark.BROKEN: "red"}

    def show(finding: checks.Finding) -> None:
        click.echo(f" {click.style(finding.mark, fg=marks[finding.mark], bold=True)} {finding.subject:13} {finding.text}")

    if not _run(lambda: examine(load, folder, LOCAL_URL, show, callback)):
        sys.exit(1)


@main.command()
@click.option("--out", default="demo-out", show_default=True, type=click.Path(path_type=Path), help="Folder for what is made.")
@click.option("--data", "folder", type=click.Path(path_type=Path), help="Folder for the queue; without it a temporary one.")
def demo(out: Path, folder: Path | None) -> None:
    """Turn a storyboard into a clip: the whole way of a task, on this machine.

    Starts `movieq up` on a free port, uploads three storyboard frames, submits a clip of them, a picture and a line of dialogue over REST,
    follows the three over server-sent events, downloads what was made and puts it onto a contact sheet. Stops all that it started.
    """
    from rich.console import Console

    from movieq.local import demo as story

    _run(lambda: story.run(out, folder, Console()))


def _repair(folder: Path, apply: bool) -> None:
    """List what is inconsistent in Redis, and mend it where `apply` is set; exit with 1 where something was found and not mended."""
    from movieq.local.embedded import Valkey
    from movieq.queue.repair import inconsistencies

    settings = _settings()
    if not settings.redis_url:
        settings = msgspec.structs.replace(settings, redis_url=Valkey(folder).url)  # the one of a running `movieq up`

    async def run() -> int:
        await checks.reached(settings)
        found = 0
        async with connect(settings.redis_url, patient=True, prefix=settings.key_prefix) as redis:
            async for each in inconsistencies(Store(redis), apply=apply):
                found += 1
                click.echo(f"task {each.task_id} {_plain(each.text)}" if each.task_id else _plain(each.text))
        return found

    if (found := _run(run)) == 0:
        click.echo("records and lists agree")
        return
    count = f"{found} inconsistenc{'y' if found == 1 else 'ies'}"
    if apply:
        click.echo(f"{count} mended")
    else:
        click.echo(f"{count}; to mend: movieq doctor --repair --apply")
        sys.exit(1)


def _known(task_type: str) -> str:
    """A task type, of a plug-in too."""
    if task_type not in list(TaskType):
        raise click.BadParameter(f"{task_type!r} is not one of {', '.join(TaskType)}.")
    return task_type


def _task_data(task_type: TaskType, text: str, pairs: tuple[str, ...], draft: bool) -> dict[str, Any]:
    """What --data, --set and --draft say together."""
    name = text
    try:
        if text == "-":
            name, text = "standard input", sys.stdin.read()
        elif text.startswith("@"):
            name, text = text[1:], Path(text[1:]).read_text()
        task_data = msgspec.json.decode(text, type=dict[str, Any])
    except OSError as error:
        raise click.UsageError(f"--data: {name} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.UsageError(f"--data: a JSON object is expected, got {name[:80]!r}: {error}") from None
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise click.UsageError(f"--set: NAME=VALUE is expected, got {pair[:80]!r}")
        try:
            task_data[field] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            task_data[field] = value
    if draft:
        task_data["draft"] = True
    return task_data


def _client(url: str | None, key: str | None) -> Client:
    """A client of the server that is meant. Raises SettingsError where no key can be found."""
    from movieq.client import Client

    settings = _settings()
    key = key or next(iter(settings.api_keys), "") or _own_key()
    return Client(url or settings.public_url or LOCAL_URL, key, patience_s=PATIENCE_S)


def _own_key() -> str:
    """The key that a `movieq up` in this folder has made."""
    path = DATA / "api-key"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"no API key: name one with --key, or set {variable('api_keys')}; {path}: {error.strerror}") from None


async def _watch(client: Client, task_id: str, name: str, url: str | None) -> TaskStatus:
    """Follows the task in the terminal and says how it ended."""
    from rich.console import Console

    from movieq.local.terminal import follow

    console = Console(stderr=True)
    try:
        end = (await follow(client, {task_id: name}, console))[task_id]
    except asyncio.CancelledError:
        rest = f"{task_id} --url {url}" if url else task_id
        click.echo(f"\nThe task goes on.\n  to watch it again:  movieq watch {rest}\n  to cancel it:       movieq cancel {rest}", err=True)
        raise
    if end.result is not None:
        click.echo(end.result.media_url)
    else:
        click.echo(f"{end.status}: {end.error} ({end.error_code})" if end.error else end.status, err=True)
    return end.status


def _exit(status: TaskStatus | None) -> None:
    if status not in (None, TaskStatus.COMPLETED):
        sys.exit(1)


@main.group("models")
def models_group() -> None:
    """The models of the table: which there are, whether they are on this machine, and getting them there."""


@models_group.command("list")
def models_list() -> None:
    """List the models, what they make, and whether they are here."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "makes", "GPU memory", "licence", "here", box=None, pad_edge=False)
    for name, model in models.load(_settings().models).items():
        makes = ", ".join(model.tasks) + (f" ({', '.join(model.languages)})" if model.languages else "")
        memory = f"{model.gpu_memory_gb:g} GB" if model.gpu_memory_gb else "-"
        sources = weights.sources(model)
        here = "no" if any(map(_missing, sources)) else "yes" if model.verified or not sources else "yes, not yet tried on a GPU"
        table.add_row(name, makes, memory, model.licence or "-", here)
    Console().print(table)


@models_group.command("show")
@click.argument("name")
def models_show(name: str) -> None:
    """Show the entry of a model, and where its weights are."""
    model = _named_model(name)
    click.echo(msgspec.json.format(msgspec.json.encode(model)).decode())
    for source in weights.sources(model):
        click.echo(_missing(source) or f"{source.repository}: {weights.find(source)}")


@models_group.command("check")
@click.argument("names", nargs=-1)
def models_check(names: tuple[str, ...]) -> None:
    """Say of each model (of all, where none is named) whether it can be loaded here, and what is missing."""
    problems = 0
    for name in names or models.load(_settings().models):
        found = [problem for source in weights.sources(_named_model(name)) if (problem := _missing(source))]
        problems += len(found)
        takes = f", takes {_named_model(name).gpu_memory_gb:g} GB of a GPU" if _named_model(name).gpu_memory_gb else ""
        click.echo(f"{name}: {'; '.join(found) or f'ok{takes}'}")
    if problems and names:
        sys.exit(1)


@models_group.command("pull")
@click.argument("names", nargs=-1, required=True)
def models_pull(names: tuple[str, ...]) -> None:
    """Get models from the hub, check every file, and go on where an earlier pull stopped. HF_TOKEN, HF_HOME and HF_ENDPOINT are heeded."""
    for name in names:
        model = _named_model(name)
        if model.licence:
            click.echo(f"{name}: licence {model.licence}", err=True)
        try:
            total = sum(weights.pull(source) for source in weights.sources(model))
        except ImportError:
            _refuse("this needs huggingface_hub: pip install 'movieq[gpu]'")
        except ModelUnavailable as error:
            _refuse(error.message)
        click.echo(f"{name}: {total / 1e9:.1f} GB, checked")


def _named_model(name: str) -> models.Model:
    table = models.load(_settings().models)
    if name not in table:
        _refuse(f"there is no model {name!r}; there are: {', '.join(table)}")
    return table[name]


def _missing(source: models.Weights) -> str | None:
    """Why the weights cannot be loaded here; None where they can."""
    try:
        weights.find(source)
    except ModelUnavailable as error:
        return error.message
    except ImportError:
        return "huggingface_hub is not installed: pip install 'movieq[gpu]'"
    return None


@main.group()
def keys() -> None:
    """Make, list and take back API keys that are kept in Redis, beside those of MOVIEQ_API_KEYS."""


@keys.command("create")
@click.option(
    "--project", "projects", multiple=True, help="A project that the key belongs to; more than once for several, left out for all."
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    help="What it may; left out: as MOVIEQ_API_KEYS has it.",
)
def keys_create(projects: tuple[str, ...], scopes: tuple[str, ...]) -> None:
    """Make a key and show it, this once."""
    if wrong := [project for project in projects if not re.fullmatch(PROJECT_PATTERN, project)]:
        _refuse(f"--project {wrong[0]!r}: {PROJECT_PATTERN} is expected")
    key = secrets.token_urlsafe(24)
    default = frozenset({Scope.READ, Scope.SUBMIT}) if projects else frozenset(Scope)
    grant = Grant(frozenset(projects) if projects else None, frozenset(map(Scope, scopes)) or default)
    _with_api_keys(lambda api_keys: api_keys.add_grant(key_hash(key), grant))
    print(key)


@keys.command("list")
def keys_list() -> None:
    """List the keys by the beginning of their hash, with what they may."""
    for id, grant in _with_api_keys(lambda api_keys: api_keys.grants()).items():
        projects = "all projects" if grant.projects is None else ", ".join(sorted(grant.projects))
        print(f"{id[:12]}  {projects}  {'+'.join(sorted(grant.scopes))}")


@keys.command("revoke")
@click.argument("key_or_hash")
def keys_revoke(key_or_hash: str) -> None:
    """Take a key back, by itself or by the beginning of its hash; API processes notice within five seconds."""

    async def revoke(api_keys: ApiKeys) -> bool:
        found = [
            id for id in await api_keys.grants() if id == key_hash(key_or_hash) or (len(key_or_hash) >= 8 and id.startswith(key_or_hash))
        ]
        return len(found) == 1 and await api_keys.revoke(found[0])

    if not _with_api_keys(revoke):
        _refuse("no such key, or more than one: see `movieq keys list`")


def _with_api_keys(work: Callable[[ApiKeys], Awaitable[T]]) -> T:
    settings = _settings()

    async def run() -> T:
        await checks.reached(settings)
        async with connect(settings.redis_url, patient=True, prefix=settings.key_prefix) as redis:
            return await work(ApiKeys(redis))

    return _run(run)


def _settings() -> Settings:
    try:
        settings = load()
        models.load(settings.models)
        payload.configured(settings)
    except SettingsError as error:
        _refuse(error.message)
    logs.configure(settings.log_level, settings.log_format)
    for name, problem in unknown().items():
        log.warning("unknown_setting", name=name, problem=problem)
    return settings


def _run(work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        return await work()

    try:
        return uvloop.run(run())
    except MovieqError as error:
        _refuse("; ".join((error.message, *getattr(error, "__notes__", ()))))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:  # by a signal
        sys.exit(143)


def _refuse(message: str) -> NoReturn:
    raise click.ClickException(message)


if __name__ == "__main__":
    main()
