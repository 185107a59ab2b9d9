"""The parts of an installation that the API and the worker share: Redis, storage, model table, CMS and secrets, opened and closed together.

If the settings have no signing secret, every process uses the one in Redis, and reads it again every second, because a Redis that has lost
its data gets a new one.
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
"""Interval at which the signing secret is read again."""

log = logs.get()


class Installation(msgspec.Struct, kw_only=True):
    """The opened parts of an installation."""

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
    """Messages arrive only while its `run` is running."""
    guard: Guard
    storage: Storage
    signing_secrets: list[bytes]
    """The first one signs; each of them is accepted."""

    async def follow_signing_secret(self) -> None:
        """Use the current signing secret of Redis, until cancelled. Return at once if the settings have a secret."""
        while not self.settings.signing_secret:
            await asyncio.sleep(REFRESH_S)
            with contextlib.suppress(*REDIS_AWAY):  # other tasks log that Redis is unavailable
                if (secret := await self.api_keys.signing_secret()) != self.signing_secrets[0]:
                    log.warning("signing_secret_changed", hint="Redis lost the old secret: URLs signed with it are no longer valid")
                    self.signing_secrets[:] = [secret]


@asynccontextmanager
async def opened(settings: Settings, public_url: str, *, patient: bool) -> AsyncIterator[Installation]:
    """Open the installation of these settings, and close it at the end of the block. `patient`: as in `connect`, for workers.

    Raises SettingsError, RedisError.
    """
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
