"""Records of stored files: uploads, and the storage prefixes to delete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from movieq.errors import QuotaExceeded
from movieq.queue.connection import Redis
from movieq.queue.keys import UPLOAD_KEPT_S
from movieq.queue.scripts import load
from movieq.settings import variable
from movieq.tasks.entities import Upload
from movieq.tasks.states import ProjectId

LEAST_BYTES: Final = 16 * 1024
"""How many bytes an upload counts at least, since a small one takes memory too."""
ORPHAN_S: Final = 60
"""How long a prefix stays in the list before it is deleted, unless it is committed."""


class Files:
    """The uploads of an installation, and its list of storage prefixes to delete."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names
        self._scripts = load(redis, "add_upload", "drop_upload")

    async def check_upload(self, project_id: ProjectId, size_bytes: int, max_bytes: int) -> None:
        """Raise QuotaExceeded if the project's uploads would take more than `max_bytes` (0: no limit) with another one of this size."""
        await self._add(project_id, size_bytes, max_bytes)

    async def add_upload(self, upload_id: str, upload: Upload, prefix: str, max_bytes: int = 0) -> None:
        """Add an upload. Tasks can refer to it for seven days; then the files under `prefix` are deleted. Raises as `check_upload` does."""
        await self._add(upload.project_id, upload.size_bytes, max_bytes, upload_id, msgspec.msgpack.encode(upload), prefix)

    async def _add(
        self, project_id: ProjectId, size_bytes: int, max_bytes: int, upload_id: str = "", upload: bytes = b"", prefix: str = ""
    ) -> None:
        answer = await self._scripts["add_upload"].finish(
            upload_id=upload_id,
            project_id=project_id,
            upload=upload,
            prefix=prefix,
            size=max(size_bytes, LEAST_BYTES),
            max_bytes=max_bytes,
            kept_ms=UPLOAD_KEPT_S * 1000,
        )
        if answer[0] == b"quota":
            raise QuotaExceeded(
                f"the uploads of project {project_id} take {answer[1]} bytes, at most {max_bytes} are allowed "
                f"({variable('max_upload_mib_per_project')}): wait until some expire, seven days after they were sent",
                retry_after_s=math.ceil(answer[2] / 1000),
            )

    async def drop_upload(self, upload_id: str, upload: Upload, prefix: str) -> None:
        """Remove an upload whose file could not be stored, if it was added. What is stored under `prefix` is deleted in a minute."""
        await self._scripts["drop_upload"].finish(
            upload_id=upload_id, project_id=upload.project_id, prefix=prefix, size=max(upload.size_bytes, LEAST_BYTES)
        )

    async def upload(self, upload_id: str) -> Upload | None:
        """Return the upload; None if it does not exist or has expired."""
        blob = await self._redis.shared.call("GET", self._keys["upload"] + upload_id)
        return None if blob is None else msgspec.msgpack.decode(blob, type=Upload)

    async def add_orphan(self, prefix: str) -> None:
        """List a storage prefix for deletion in a minute, unless it is committed by then."""
        seconds, _ = await self._redis.time()
        await self._redis.zadd(self._keys["orphans"], {prefix: (seconds + ORPHAN_S) * 1000})

    async def due_orphans(self, count: int = 100, skip: int = 0) -> list[str]:
        """Return at most `count` storage prefixes to delete now, after the first `skip`; never that of a committed result."""
        seconds, micros = await self._redis.time()
        found = await self._redis.zrangebyscore(self._keys["orphans"], "-inf", seconds * 1000 + micros // 1000, skip, count)
        committed = await self._redis.zmscore(self._keys["media"], found) if found else []
        for prefix, at_ms in zip(found, committed, strict=True):
            if at_ms is not None:
                await self._redis.zrem(self._keys["orphans"], prefix)
        return [prefix.decode(errors="surrogateescape") for prefix, at_ms in zip(found, committed, strict=True) if at_ms is None]

    async def forget_orphans(self, prefixes: Sequence[str]) -> None:
        """Remove deleted prefixes from the list."""
        if prefixes:
            await self._redis.zrem(self._keys["orphans"], *(prefix.encode(errors="surrogateescape") for prefix in prefixes))
