"""What the API and the worker open alike when they start: the signing secrets of an installation.

Where the settings have none, every process uses the one in Redis, and asks for it again each second, since a Redis that was emptied has a
new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from movieq import logs
from movieq.queue.refusals import REDIS_AWAY
from movieq.queue.store import Store
from movieq.settings import Settings

REFRESH_S: Final = 1.0

log = logs.get()


@asynccontextmanager
async def signing_secrets(settings: Settings, store: Store) -> AsyncIterator[Sequence[bytes]]:
    """Yield the secrets of this installation, kept up to date during the block: the first signs, all verify. Raises RedisError."""
    if given := settings.signing_secrets():
        yield given
        return
    kept = [await store.signing_secret()]
    following = asyncio.create_task(_follow(kept, store))
    try:
        yield kept
    finally:
        following.cancel()
        await asyncio.wait({following})


async def _follow(kept: list[bytes], store: Store) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        with contextlib.suppress(*REDIS_AWAY):  # others log that Redis is away
            if (secret := await store.signing_secret()) != kept[0]:
                log.warning("signing_secret_changed", hint="Redis lost the old secret: urls that it signed are refused")
                kept[:] = [secret]
