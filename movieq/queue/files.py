"""Records of stored files: uploads, and the storage prefixes to delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from movieq.queue.connection import Redis
from movieq.queue.keys import UPLOAD_KEPT_S
from movieq.tasks.entities import Upload

ORPHAN_S: Final = 60
"""How long a prefix stays in the list before it is deleted, unless it is committed."""


class Files:
    """The uploads of an installation, and its list of storage prefixes to delete."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names

    async def add_upload(self, upload_id: str, upload: Upload, prefix: str) -> None:
        """Add an upload. Tasks can refer to it for seven days; then the files under `prefix` are deleted."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._keys["upload"] + upload_id, msgspec.msgpack.encode(upload), ex=UPLOAD_KEPT_S)
            pipe.time()
            _, (seconds, _) = await pipe.execute()
        await self._redis.zadd(self._keys["orphans"], {prefix: (seconds + UPLOAD_KEPT_S) * 1000})

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
