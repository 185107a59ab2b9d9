"""Fetch the inputs of a task into its folder, and check that they can be decoded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from movieq.errors import InputUnavailable, cut, first_of
from movieq.fetch.formats import Kind
from movieq.fetch.guard import shown
from movieq.tasks.params import AudioParams, Params
from movieq.tasks.states import ProjectId, TaskId, TaskStatus
from workers.running import Parts

AT_ONCE: Final = 4
"""Inputs of one task that are fetched at the same time."""
ALL_S: Final = 300.0
"""Longest time for all inputs of a task, in seconds."""
REFERENCE_CHARS: Final = 200
"""Longest part of a reference that stands in a message."""


async def fetch_inputs(parts: Parts, project_id: ProjectId, task_id: TaskId, parsed: Params, spool: Path) -> dict[str, str]:
    """Fetch the references of the parameters, a few at once, and decode each in a probe; return reference -> local file.

    Raises InputUnavailable or InvalidInput, naming the reference.
    """
    kind = Kind.AUDIO if isinstance(parsed, AudioParams) else Kind.IMAGE
    places = asyncio.Semaphore(AT_ONCE)

    async def fetch(reference: str, dest: Path) -> None:
        scheme, _, rest = reference.partition(":")
        async with places:
            if scheme == "upload":
                await _uploaded(parts, project_id, reference, rest, dest)
            elif scheme == "task":
                await _result_of(parts, project_id, task_id, reference, rest, dest)
            else:
                await parts.fetcher.fetch(reference, dest, (kind,))

    found = {reference: spool / f"input{number}" for number, reference in enumerate(parsed.references)}
    try:
        async with asyncio.timeout(ALL_S), asyncio.TaskGroup() as group:
            for reference, dest in found.items():
                group.create_task(fetch(reference, dest))
    except TimeoutError:
        raise InputUnavailable(f"the {len(found)} inputs could not all be fetched within {ALL_S:g} s") from None
    except BaseExceptionGroup as errors:
        raise first_of(errors)  # noqa: B904  # its own cause is kept
    await parts.probe.check(project_id, [(_name(reference), dest) for reference, dest in found.items()], kind)
    return {reference: str(dest) for reference, dest in found.items()}


def _name(reference: str) -> str:
    """Return the reference for a message: a url without its query and data."""
    return cut(reference, REFERENCE_CHARS) if reference.startswith(("upload:", "task:")) else shown(reference)


async def _uploaded(parts: Parts, project_id: ProjectId, reference: str, upload_id: str, dest: Path) -> None:
    upload = await parts.files.upload(upload_id)
    if upload is None or upload.project_id != project_id or await parts.storage.open(upload.key, dest) is None:
        raise InputUnavailable(f"{cut(reference, REFERENCE_CHARS)}: this project has no such upload (uploads are stored for seven days)")


async def _result_of(parts: Parts, project_id: ProjectId, task_id: TaskId, reference: str, other_id: str, dest: Path) -> None:
    if other_id == task_id:
        raise InputUnavailable(f"{cut(reference, REFERENCE_CHARS)}: a task cannot use its own result")
    other = await parts.queries.task(TaskId(other_id))
    if other is None or other.project_id != project_id:
        raise InputUnavailable(f"{cut(reference, REFERENCE_CHARS)}: this project has no such task")
    if other.status is not TaskStatus.COMPLETED or other.result is None:
        raise InputUnavailable(f"{cut(reference, REFERENCE_CHARS)}: that task is {other.status}; only a completed task has a result")
    media = other.result.media[0]
    key = media.key if media.content_type.startswith(("image/", "audio/")) else media.poster_key or media.key
    if await parts.storage.open(key, dest) is None:
        raise InputUnavailable(f"{cut(reference, REFERENCE_CHARS)}: the file of that task is no longer in the storage")
