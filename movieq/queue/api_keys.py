"""API keys in Redis beside those of the settings, the token buckets of all keys, and the signing secret if the settings have none."""

from __future__ import annotations

import secrets
from typing import cast

import msgspec

from movieq.queue.connection import Redis
from movieq.queue.records import awaited, decode_grant, text
from movieq.queue.scripts import load
from movieq.settings import Grant


class ApiKeys:
    """The API keys and the signing secret of an installation. Redis holds only the hashes of the keys."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = redis.key_names
        self._take_tokens = load(redis, "take_tokens")["take_tokens"]

    async def grant(self, key_hash: str) -> Grant | None:
        """Return the rights of the API key with this hash; None for an unknown key."""
        blob = await self._redis.shared.call("HGET", self._keys["keys"], key_hash)
        return None if blob is None else decode_grant(blob)

    async def add_grant(self, key_hash: str, grant: Grant) -> None:
        """Store an API key by its hash."""
        await awaited(self._redis.hset(self._keys["keys"], mapping={key_hash: msgspec.msgpack.encode(grant)}))

    async def grants(self) -> dict[str, Grant]:
        """Return the rights of each API key in Redis, by its hash."""
        found = await awaited(self._redis.hgetall(self._keys["keys"]))
        return {text(key_hash): grant for key_hash, blob in found.items() if (grant := decode_grant(blob)) is not None}

    async def revoke(self, key_hash: str) -> bool:
        """Revoke the API key with this hash; return False for an unknown key. API processes notice within five seconds."""
        return bool(await awaited(self._redis.hdel(self._keys["keys"], key_hash)))

    async def take_tokens(self, client: str, per_s: float, burst: int, wanted: int) -> tuple[int, int, int]:
        """Take at most `wanted` tokens from a client's bucket. Return how many it got, how many are left, and the ms until there is one."""
        taken, left, wait_ms = await self._take_tokens((), client=client, per_s=per_s, burst=burst, wanted=wanted)
        return taken, left, wait_ms

    async def signing_secret(self) -> bytes:
        """Return the secret that signs URLs. The first call generates and stores it."""
        while (secret := await self._redis.get(self._keys["secret"])) is None:  # read first: a server may refuse writes for a while
            await self._redis.set(self._keys["secret"], secrets.token_bytes(32), nx=True)
        return cast("bytes", secret)
