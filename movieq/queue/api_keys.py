"""What lets clients in: API keys beside those of the settings, and the secret that signs urls where the settings have none."""

from __future__ import annotations

import secrets
from typing import cast

import msgspec

from movieq.queue.connection import Redis
from movieq.queue.records import awaited, decode_grant, text
from movieq.settings import Grant


class ApiKeys:
    """The API keys and the signing secret that an installation keeps in Redis. Of a key only its hash is stored."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names

    async def grant(self, key_hash: str) -> Grant | None:
        """Return what the API key of this hash may do; None for an unknown key."""
        blob = await self._redis.shared.call("HGET", self._keys["keys"], key_hash)
        return None if blob is None else decode_grant(blob)

    async def add_grant(self, key_hash: str, grant: Grant) -> None:
        """Add an API key by its hash."""
        await awaited(self._redis.hset(self._keys["keys"], mapping={key_hash: msgspec.msgpack.encode(grant)}))

    async def grants(self) -> dict[str, Grant]:
        """Return what each API key in Redis may do, by its hash."""
        found = await awaited(self._redis.hgetall(self._keys["keys"]))
        return {text(key_hash): grant for key_hash, blob in found.items() if (grant := decode_grant(blob)) is not None}

    async def revoke(self, key_hash: str) -> bool:
        """Revoke the API key of this hash; return False where there is none. API processes notice within five seconds."""
        return bool(await awaited(self._redis.hdel(self._keys["keys"], key_hash)))

    async def signing_secret(self) -> bytes:
        """Return the secret of signed urls, which the first call generates and stores."""
        while (secret := await self._redis.get(self._keys["secret"])) is None:  # a server that takes no writes just now has one already
            await self._redis.set(self._keys["secret"], secrets.token_bytes(32), nx=True)
        return cast("bytes", secret)
