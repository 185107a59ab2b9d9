"""`movieq doctor` and `movieq demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from movieq import checks, logs
from movieq.cli.context import DATA, LOCAL_URL, read_settings, run_async
from movieq.queue.connection import connect
from movieq.queue.store import Store
from movieq.settings import LogFormat, LogLevel, load
from movieq.tasks.faults import printable


@click.command()
@click.option("--data", "folder", default=DATA, show_default=True, type=click.Path(path_type=Path), help="Folder of `movieq up`.")
@click.option("--callback", metavar="URL", help="Also check a callback_url: whether it may be called, and whether its server answers.")
@click.option("--repair", is_flag=True, help="Instead of the checks, list tasks whose records and lists in Redis disagree.")
@click.option("--apply", is_flag=True, help="With --repair: repair what it finds.")
def doctor(folder: Path, callback: str | None, repair: bool, apply: bool) -> None:
    """Check the settings against the real servers, and say how to fix what is wrong.

    Each check prints a line: ✓ works, ! is a warning, ✗ is broken. Exits with 1 if something is broken. Changes nothing without --apply:
    test data that it writes is deleted, or expires within ten seconds.
    """
    if apply and not repair:
        raise click.UsageError("--apply needs --repair")
    if repair:
        _repair(folder, apply)
        return
    from movieq.local.doctor import examine

    logs.configure(LogLevel.WARNING, LogFormat.AUTO)  # not from the settings, which may be wrong: reading them is one of the checks
    marks = {checks.Mark.GOOD: "green", checks.Mark.NOTE: "yellow", checks.Mark.BROKEN: "red"}

    def show(finding: checks.Finding) -> None:
        click.echo(f" {click.style(finding.mark, fg=marks[finding.mark], bold=True)} {finding.subject:13} {finding.text}")

    if not run_async(lambda: examine(lambda: load(storage=folder / "media"), folder, LOCAL_URL, show, callback)):
        sys.exit(1)


def _repair(folder: Path, apply: bool) -> None:
    """List what is inconsistent in Redis, and repair it where `apply` is set; exit with 1 if something was found and not repaired."""
    from movieq.local.embedded import Valkey
    from movieq.queue.repair import inconsistencies

    settings = read_settings()
    if not settings.redis_url:
        settings = msgspec.structs.replace(settings, redis_url=Valkey(folder).url)  # the one of a running `movieq up`

    async def run() -> int:
        await checks.reached(settings)
        found = 0
        async with connect(settings.redis_url, patient=True, prefix=settings.key_prefix) as redis:
            async for each in inconsistencies(Store(redis), apply=apply):
                found += 1
                click.echo(f"task {each.task_id} {printable(each.text)}" if each.task_id else printable(each.text))
        return found

    if (found := run_async(run)) == 0:
        click.echo("records and lists agree")
        return
    count = f"{found} inconsistenc{'y' if found == 1 else 'ies'}"
    if apply:
        click.echo(f"{count} repaired")
    else:
        click.echo(f"{count}; to repair: movieq doctor --repair --apply")
        sys.exit(1)


@click.command()
@click.option("--out", default="demo-out", show_default=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--data", "folder", type=click.Path(path_type=Path), help="Folder for the queue. Default: a temporary one.")
def demo(out: Path, folder: Path | None) -> None:
    """Render a sample storyboard on this machine, from submit to download.

    Starts `movieq up` on a free port, uploads three storyboard frames, and submits a clip, an image and a line of dialogue. Follows the
    three tasks, downloads their results into --out and puts them on a contact sheet. Stops everything that it started.
    """
    from rich.console import Console

    from movieq.local import demo as story

    run_async(lambda: story.run(out, folder, Console()))
