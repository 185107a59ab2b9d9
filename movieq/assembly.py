"""What an installation is made of, opened once by the API and by the worker.

Where the settings name no signing secret, the one in Redis counts, for every process: it is asked for again each second, since a Redis that
was emptied or started anew has another.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from redis.exceptions import RedisError

from movieq import logs
from movieq.settings import Settings
from movieq.store import Store

REFRESH_S: Final = 1.0

log = logs.get()


@asynccontextmanager
async def signing_secrets(settings: Settings, store: Store) -> AsyncIterator[Sequence[bytes]]:
    """The secrets of this installation, for the length of a block: the first signs, each verifies. Raises RedisError."""
    if given := settings.signing_secrets():
        yield given
        return
    kept = [await store.signing_secret()]
    following = asyncio.create_task(_follow(kept, store))
    try:
        yield kept
    finally:
        following.cancel()


async def _follow(kept: list[bytes], store: Store) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        with contextlib.suppress(RedisError, OSError, TimeoutError):  # who needs Redis says that it is away
            if (secret := await store.signing_secret()) != kept[0]:
                log.warning("signing_secret_changed", hint="Redis holds another secret: addresses that the old one signed are refused")
                kept[:] = [secret]
