"""The provenance of results: the engine writes tags into files; here the finished files are signed with Content Credentials."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from movieq import logs
from movieq.credentials import Claim, Credentials
from movieq.errors import Unsigned
from movieq.tasks.entities import Task
from workers.faults import without_paths
from workers.protocol import Done

log = logs.get()


class Provenance(msgspec.Struct, frozen=True):
    """The settings of provenance: whether files carry tags, what they are signed with, and whether signing is required."""

    tags: bool = True
    credentials: Credentials | None = None
    required: bool = False


async def signed(provenance: Provenance, task: Task, prompt: str, done: Done) -> Done:
    """Return the output with each file signed, and the signer in its metadata.

    If a file cannot be signed, the metadata get a warning, or Unsigned is raised where signing is required. On a cancel this
    ends at once, and the thread that signs ends after the current file.
    """
    credentials = provenance.credentials
    if credentials is None:
        return done
    source = str(done.metadata.get("digital_source_type", "trainedAlgorithmicMedia"))  # the most cautious one if the engine names none
    agent, version = "movieq", None
    details: dict[str, Any] = {"task_id": task.task_id, "task_type": task.task_type}
    if provenance.tags:
        agent, version = task.model, done.metadata.get("revision")
        details |= {"engine": task.engine, "model": task.model, "revision": version, "prompt": prompt}
    try:
        for file in done.files:
            path = Path(file.path)
            seed = {"seed": file.seed} if provenance.tags else {}
            claim = Claim(f"{task.task_id}{path.suffix}", source, agent, version, details | seed)
            await asyncio.to_thread(credentials.sign, path, file.content_type, claim)
    except Unsigned as fault:
        if provenance.required:
            raise
        log.warning("result_unsigned", problem=fault.message)
        return _with(done, warnings=[*done.metadata.get("warnings", []), without_paths(fault.message)])
    return _with(done, signed_by=credentials.name)


def _with(done: Done, **more: Any) -> Done:
    return msgspec.structs.replace(done, metadata={**done.metadata, **more})
