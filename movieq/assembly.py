"""What an installation is made of, opened once, and closed in reverse order; the API and the worker both use it.

Where the settings have no signing secret, every process uses the one in Redis, and asks for it again each second, since a Redis that was
emptied has a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from movieq import logs
from movieq.delivery import payload
from movieq.delivery.payload import Cms
from movieq.fetch.guard import Guard
from movieq.models import table
from movieq.models.table import Model
from movieq.queue.api_keys import ApiKeys
from movieq.queue.connection import Redis, connect
from movieq.queue.files import Files
from movieq.queue.outbox import Outbox
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.refusals import REDIS_AWAY
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.storage import open as storages
from movieq.storage.base import Storage

REFRESH_S: Final = 1.0

log = logs.get()


class Installation(msgspec.Struct, kw_only=True):
    """An installation, as a process has opened it."""

    settings: Settings
    models: dict[str, Model]
    cms: Cms | None
    redis: Redis
    store: Store
    queries: Queries
    outbox: Outbox
    files: Files
    api_keys: ApiKeys
    subscriber: Subscriber
    """Its `run` must be running for anything to arrive."""
    guard: Guard
    storage: Storage
    signing_secrets: list[bytes]
    """The first signs, all verify."""

    async def follow_signing_secret(self) -> None:
        """Take over a new signing secret of Redis, until cancelled; return at once where the settings have one."""
        while not self.settings.signing_secret:
            await asyncio.sleep(REFRESH_S)
            with contextlib.suppress(*REDIS_AWAY):  # others log that Redis is away
                if (secret := await self.api_keys.signing_secret()) != self.signing_secrets[0]:
                    log.warning("signing_secret_changed", hint="Redis lost the old secret: urls that it signed are refused")
                    self.signing_secrets[:] = [secret]


@asynccontextmanager
async def opened(settings: Settings, public_url: str, *, patient: bool) -> AsyncIterator[Installation]:
    """Open the installation of these settings for the length of a block; `patient` is for workers. Raises SettingsError, RedisError."""
    models, cms = table.load(settings.models), payload.configured(settings)
    async with connect(settings.redis_url, patient=patient, prefix=settings.key_prefix) as redis:
        api_keys = ApiKeys(redis)
        secrets = list(settings.signing_secret) or [await api_keys.signing_secret()]
        async with storages.opened(settings, public_url, secrets, patient=patient) as storage:
            yield Installation(
                settings=settings,
                models=models,
                cms=cms,
                redis=redis,
                store=Store(redis),
                queries=Queries(redis),
                outbox=Outbox(redis),
                files=Files(redis),
                api_keys=api_keys,
                subscriber=Subscriber(settings.redis_url, redis.key_names["events"]),
                guard=Guard(settings.allow_private_urls, settings.own_origins()),
                storage=storage,
                signing_secrets=secrets,
            )
