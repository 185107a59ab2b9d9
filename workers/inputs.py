"""Fetch the inputs of a task into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from movieq.errors import InputUnavailable, cut
from movieq.fetch import download
from movieq.tasks.params import AudioParams, Params
from movieq.tasks.states import ProjectId, TaskId, TaskStatus
from workers.running import Parts

REFERENCE_CHARS: Final = 200
"""Longest part of a reference that stands in a message."""


async def fetch_inputs(parts: Parts, project_id: ProjectId, task_id: TaskId, parsed: Params, spool: Path) -> dict[str, str]:
    """Fetch each reference of the parameters; return reference -> local file. Raises InputUnavailable or InvalidInput, naming it."""
    kinds = (download.Kind.AUDIO,) if isinstance(parsed, AudioParams) else (download.Kind.IMAGE,)
    found: dict[str, str] = {}
    for number, reference in enumerate(parsed.references):
        dest = spool / f"input{number}"
        scheme, _, rest = reference.partition(":")
        if scheme == "upload":
            await _uploaded(parts, project_id, reference, rest, dest)
        elif scheme == "task":
            await _result_of(parts, project_id, task_id, reference, rest, dest)
        else:
            await parts.fetcher.fetch(reference, dest, kinds)
        found[reference] = str(dest)
    return found


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
