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
    """Open the storage that the settings name for the length of a block; `patient` is for workers. Raises SettingsError."""
    if isinstance(settings.storage, Path):
        yield FolderStorage(settings.storage, public_url, signing_secrets)
    else:
        from movieq.storage import s3  # slow to import, and not needed for a folder

        async with s3.opened(settings.storage, patient=patient) as storage:
            yield storage
