"""A cache of API keys and their rights."""

from __future__ import annotations

import time
from typing import Final

from movieq.queue.api_keys import ApiKeys
from movieq.queue.refusals import REDIS_AWAY
from movieq.settings import Grant, Scope, key_hash
from movieq.streams.watchers import Access

CACHE_S: Final = 5.0
"""How long a key is cached: a revoked key works for at most this long."""
CACHE_KEYS: Final = 10_000
"""Most keys in the cache; when it is full, it is emptied."""


class KeyCache:
    """The API keys of the settings and of Redis. Only hashes are compared, so timing reveals nothing about a key."""

    def __init__(self, grants: dict[str, Grant], api_keys: ApiKeys) -> None:
        self._settings = {key_hash(key): grant for key, grant in grants.items()}
        self._api_keys = api_keys
        self._cache: dict[str, tuple[float, Grant | None]] = {}
        self._away_until_s = 0.0

    async def grant(self, id: str) -> Grant | None:
        """Return the rights of the key with this hash; None for an unknown key."""
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

    async def may_read(self, access: Access) -> bool:
        """Return whether a stream's key may still read its project. While Redis is unavailable, it may."""
        if time.monotonic() < self._away_until_s:
            return True
        try:
            grant = await self.grant(access.key_id)
        except REDIS_AWAY:
            self._away_until_s = time.monotonic() + CACHE_S  # else each key would wait for Redis, and delay all comments
            return True
        return grant is not None and Scope.READ in grant.scopes and grant.allows(access.project_id)
