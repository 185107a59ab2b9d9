"""What each API key may do, cached for some seconds."""

from __future__ import annotations

import time
from typing import Final

from movieq.queue.api_keys import ApiKeys
from movieq.settings import Grant, key_hash

CACHE_S: Final = 5.0
"""How long a key of Redis works after it was revoked."""
CACHE_KEYS: Final = 10_000


class KeyCache:
    """The known API keys. Only hashes are stored and compared, so that the time of a comparison reveals nothing of a key."""

    def __init__(self, grants: dict[str, Grant], api_keys: ApiKeys) -> None:
        self._settings = {key_hash(key): grant for key, grant in grants.items()}
        self._api_keys = api_keys
        self._cache: dict[str, tuple[float, Grant | None]] = {}

    async def grant(self, id: str) -> Grant | None:
        """Return what the key of this hash may do; None for an unknown key."""
        if (grant := self._settings.get(id)) is not None:
            return grant
        until, cached = self._cache.get(id, (0.0, None))
        if time.monotonic() < until:
            return cached
        if len(self._cache) >= CACHE_KEYS:
            self._cache.clear()
        found = await self._api_keys.grant(id)
        self._cache[id] = (time.monotonic() + CACHE_S, found)
        return found
