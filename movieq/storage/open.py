"""Open the storage that the settings name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from movieq.settings import Settings
from movieq.storage.base import Storage
from movieq.storage.folder import FolderStorage


@asynccontextmanager
async def opened(settings: Settings, public_url: str, signing_secrets: Sequence[bytes], *, patient: bool) -> AsyncIterator[Storage]:
    """Yield the storage that the settings name. With `patient`, for workers, requests wait and retry longer. Raises SettingsError."""
    if (bucket := settings.bucket()) is None:
        yield FolderStorage(Path(settings.storage), public_url, signing_secrets)
    else:
        from movieq.storage import s3  # slow to import, and not needed for a folder

        async with s3.opened(bucket, patient=patient) as storage:
            yield storage
